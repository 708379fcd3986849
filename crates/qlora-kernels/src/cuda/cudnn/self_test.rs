//! A small attention on the device, compared with f64 on the host.

use std::ffi::c_void;
use std::sync::atomic::Ordering;

use half::{bf16, f16};

use super::error::{CudnnError, Result};
use super::reference::{Attention, Sizes, attention, relative_error};
use super::search::MASKS_THE_END;
use super::shape::{PackedLayout, Packing, Rows, SdpaBackward, SdpaForward, SdpaShape, SdpaType};
use super::{Cudnn, SdpaLaunch};

/// The device operations that the self test needs. The implementation releases the allocated memory.
pub trait SelfTestDevice {
    /// The `cudaStream_t` to launch on.
    fn stream(&self) -> *mut c_void;
    /// New device memory, aligned to 256 bytes.
    fn allocate(&mut self, bytes: usize) -> std::result::Result<u64, String>;
    /// Copies to the device.
    fn upload(&mut self, address: u64, bytes: &[u8]) -> std::result::Result<(), String>;
    /// Waits for the stream, then copies from the device.
    fn download(&mut self, address: u64, bytes: &mut [u8]) -> std::result::Result<(), String>;
}

/// Largest relative error that rounding can explain (measured: about half of it).
fn tolerance(dtype: SdpaType) -> f64 {
    match dtype {
        SdpaType::Bf16 => 1e-2,
        SdpaType::F16 => 2e-3,
    }
}

/// Elements between the windows of a row and behind them; they must stay as they were.
const GAP: usize = 8;

/// Rows behind the last sequence of a packed batch; they must stay as they were too. More than any tile has.
const TAIL: usize = 272;

/// The batches that a packed plan is tried with, one after the other: lengths of one token, of a few, and around those of
/// tiles, in shapes that have room for more and longer sequences.
const PACKED: [&[usize]; 3] = [&[129, 1, 64, 17, 127, 63], &[65, 200, 1, 128], &[255, 1]];

/// The shape for them: sequences and their longest length.
const PACKED_BOUNDS: (i64, i64) = (8, 256);

impl Cudnn {
    /// Computes small attentions forward and backward and compares all results with f64. `model` gives the heads, the
    /// element type, and whether sequences are packed and gradients deterministic; its batch and length are not used.
    /// Packed, several batches go through the same two plans. Takes one to three seconds, most of it to build the first
    /// two plans.
    ///
    /// All that is to be written is NaN before, and so is the workspace, and so is what lies beside and behind the rows of
    /// the sequences: it must not get into any result, nor be written.
    ///
    /// Returns the largest relative error of the output, the log-sum-exp and the three gradients.
    pub fn self_test(&self, device: &mut dyn SelfTestDevice, model: &SdpaShape) -> Result<f64> {
        if model.kv_heads < 1 || model.heads % model.kv_heads != 0 {
            return Err(CudnnError::Unsupported(format!("heads do not divide: {model:?}")));
        }
        let kv_heads = model.kv_heads.min(2);
        // Where the version allows it, a length that is not a multiple of any tile.
        let seq = if self.api.version() >= MASKS_THE_END { 200 } else { 256 };
        let (batch, seq) = if model.packed { PACKED_BOUNDS } else { (3, seq) };
        let shape = SdpaShape { batch, seq, heads: model.heads / model.kv_heads * kv_heads, kv_heads, ..*model };
        let uniform = [seq as usize; 3];
        let batches: &[&[usize]] = if shape.packed { &PACKED } else { &[&uniform] };
        let first = self.compare(device, &shape, batches);
        let Some(error) = first.as_ref().err().filter(|_| shape.packed) else { return first };
        // There is another way to write the same.
        self.padding_first.store(true, Ordering::Relaxed);
        self.compare(device, &shape, batches).map_err(|second| {
            self.padding_first.store(false, Ordering::Relaxed);
            CudnnError::SelfTest(format!("{error}; written otherwise: {second}"))
        })
    }

    /// The largest relative error of batches of one shape; too large a one is an error.
    fn compare(&self, device: &mut dyn SelfTestDevice, shape: &SdpaShape, batches: &[&[usize]]) -> Result<f64> {
        let mut worst = 0.0f64;
        for lengths in batches {
            let errors = Case::new(shape, lengths).run(self, device)?;
            let largest = errors.iter().map(|(_, error)| *error).fold(0.0, f64::max);
            if largest > tolerance(shape.dtype) {
                let list: Vec<String> = errors.iter().map(|(name, error)| format!("{name} {error:.1e}")).collect();
                let text = format!("relative errors {} for lengths {lengths:?} in {shape:?}", list.join(", "));
                return Err(CudnnError::SelfTest(text));
            }
            worst = worst.max(largest);
        }
        Ok(worst)
    }
}

/// One comparison: inputs, their layout, and the sequences.
pub(crate) struct Case<'a> {
    shape: &'a SdpaShape,
    lengths: &'a [usize],
    /// Q, K and V (and likewise their gradients) are windows of rows of `width` elements.
    width: usize,
    starts: [usize; 3],
    scale: f32,
    /// Rows behind the sequences, of NaN.
    tail: usize,
    qkv: Vec<f64>,
    d_o: Vec<f64>,
}

/// Windows of a row buffer: token-major values without the gaps.
type Windows = [Vec<f64>; 3];

impl<'a> Case<'a> {
    /// Random inputs of standard deviation one, rounded to the element type.
    pub(crate) fn new(shape: &'a SdpaShape, lengths: &'a [usize]) -> Self {
        let (wide, narrow) = ((shape.heads * shape.head_dim) as usize, (shape.kv_heads * shape.head_dim) as usize);
        let starts = [0, wide + GAP, wide + narrow + 2 * GAP];
        let width = wide + 2 * narrow + 3 * GAP;
        let tokens: usize = lengths.iter().sum();
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut values = |count: usize| (0..count).map(|_| round(random.normal(), shape.dtype)).collect::<Vec<_>>();
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let tail = if shape.packed { TAIL } else { 0 };
        Self { shape, lengths, width, starts, scale, tail, qkv: values(tokens * width), d_o: values(tokens * wide) }
    }

    /// Runs both passes and returns the relative error of every result.
    pub(crate) fn run(&self, cudnn: &Cudnn, device: &mut dyn SelfTestDevice) -> Result<Vec<(&'static str, f64)>> {
        let shape = self.shape;
        let tokens: usize = self.lengths.iter().sum();
        let wide = (shape.heads * shape.head_dim) as usize;
        let fail = CudnnError::SelfTest;

        let rows = tokens + self.tail;
        let inputs = |device: &mut dyn SelfTestDevice, values: &[f64], width: usize| {
            let mut bytes = encode(values, shape.dtype);
            bytes.resize(rows * width * 2, 0xff);
            upload(device, &bytes)
        };
        let qkv = inputs(device, &self.qkv, self.width)?;
        let d_o = inputs(device, &self.d_o, wide)?;
        // Everything that is to be written is NaN before.
        let o = upload(device, &vec![0xff; rows * wide * 2])?;
        let gradients = upload(device, &vec![0xff; rows * self.width * 2])?;
        let lse = upload(device, &vec![0xff; rows * shape.heads as usize * 4])?;
        let window =
            |base: u64, index: usize| Rows { pointer: base + 2 * self.starts[index] as u64, stride: self.width as i64 };
        let dense = |pointer: u64| Rows { pointer, stride: wide as i64 };

        let (lengths, offsets) = self.packing(device)?;
        let packing = Packing { tokens: tokens as i64, lengths, offsets: &offsets };
        let packing = shape.packed.then_some(packing);
        let forward = SdpaForward {
            q: window(qkv, 0),
            k: window(qkv, 1),
            v: window(qkv, 2),
            o: dense(o),
            lse,
            scale: self.scale,
            packing,
        };
        launch(device, &cudnn.forward(shape, &forward)?)?;
        let backward = SdpaBackward {
            q: window(qkv, 0),
            k: window(qkv, 1),
            v: window(qkv, 2),
            o: dense(o),
            lse,
            d_o: dense(d_o),
            dq: window(gradients, 0),
            dk: window(gradients, 1),
            dv: window(gradients, 2),
            scale: self.scale,
            packing,
        };
        launch(device, &cudnn.backward(shape, &backward)?)?;

        let mut read = |address: u64, row_bytes: usize, what: &str| -> Result<Vec<u8>> {
            let mut bytes = vec![0; rows * row_bytes];
            device.download(address, &mut bytes).map_err(fail)?;
            if bytes.split_off(tokens * row_bytes).iter().any(|byte| *byte != 0xff) {
                return Err(fail(format!("{what} was written behind the last sequence")));
            }
            Ok(bytes)
        };
        let o = decode(&read(o, wide * 2, "the output")?, shape.dtype);
        let lse = self.tokenwise(&read(lse, shape.heads as usize * 4, "the log-sum-exp")?);
        let bytes = read(gradients, self.width * 2, "a gradient")?;
        self.check_gaps(&bytes)?;
        let [dq, dk, dv] = self.windows(&decode(&bytes, shape.dtype));

        let exact = self.reference();
        Ok([
            ("o", o, exact.o),
            ("lse", lse, exact.lse),
            ("dq", dq, exact.dq),
            ("dk", dk, exact.dk),
            ("dv", dv, exact.dv),
        ]
        .map(|(name, result, exact)| (name, self.error(&result, &exact)))
        .to_vec())
    }

    /// The relative error of all sequences together or, where it is larger, a third of that of one sequence: a short one that is
    /// all wrong hardly shows in the whole, and the rounding of few numbers varies more than that of many. The result of a
    /// sequence is measured beside at least a tenth of what such a share of all would be (alone, a token has no gradients of
    /// q and k).
    fn error(&self, result: &[f64], exact: &[f64]) -> f64 {
        let tokens: usize = self.lengths.iter().sum();
        let width = exact.len() / tokens;
        let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let all = norm(exact);
        let (mut worst, mut start) = (relative_error(result, exact), 0);
        for &len in self.lengths {
            let range = start * width..(start + len) * width;
            start += len;
            let (result, exact) = (&result[range.clone()], &exact[range]);
            let difference: Vec<f64> = result.iter().zip(exact).map(|(a, b)| a - b).collect();
            let scale = norm(exact).max(0.1 * all * (len as f64 / tokens as f64).sqrt());
            let error = norm(&difference) / scale.max(f64::MIN_POSITIVE) / 3.0;
            // NaN is no small error.
            worst = if error.is_finite() { worst.max(error) } else { f64::INFINITY };
        }
        worst
    }

    /// Lengths and offsets on the device.
    fn packing(&self, device: &mut dyn SelfTestDevice) -> Result<(u64, Vec<(i64, u64)>)> {
        let shape = self.shape;
        let layout = PackedLayout::with_bounds(self.lengths, shape.batch, shape.seq);
        let lengths: Vec<u8> = layout.lengths.iter().flat_map(|length| length.to_le_bytes()).collect();
        let wide = shape.heads * shape.head_dim;
        let offsets = [self.width as i64, wide, shape.heads].map(|stride| {
            let bytes: Vec<u8> = layout.offsets(stride).into_iter().flat_map(i64::to_le_bytes).collect();
            Ok((stride, upload(device, &bytes)?))
        });
        Ok((upload(device, &lengths)?, offsets.into_iter().collect::<Result<_>>()?))
    }

    /// The three windows of a buffer of rows.
    fn windows(&self, rows: &[f64]) -> Windows {
        let (wide, narrow) = (self.shape.heads * self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        [(0, wide), (1, narrow), (2, narrow)].map(|(index, width)| {
            let range = self.starts[index]..self.starts[index] + width as usize;
            rows.chunks_exact(self.width).flat_map(|row| row[range.clone()].iter().copied()).collect()
        })
    }

    /// Elements between the windows of the gradients must be untouched.
    fn check_gaps(&self, bytes: &[u8]) -> Result<()> {
        let ends = [self.starts[1], self.starts[2], self.width];
        for (row, elements) in bytes.chunks_exact(2 * self.width).enumerate() {
            if ends.iter().any(|end| elements[2 * (end - GAP)..2 * end].iter().any(|byte| *byte != 0xff)) {
                return Err(CudnnError::SelfTest(format!("row {row} was written outside of the gradients")));
            }
        }
        Ok(())
    }

    /// The log-sum-exp as `[tokens, heads]`.
    fn tokenwise(&self, bytes: &[u8]) -> Vec<f64> {
        let values: Vec<f64> =
            bytes.as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect();
        if self.shape.packed {
            return values;
        }
        let (heads, seq) = (self.shape.heads as usize, self.shape.seq as usize);
        (0..values.len())
            .map(|index| {
                let (token, head) = (index / heads, index % heads);
                values[(token / seq * heads + head) * seq + token % seq]
            })
            .collect()
    }

    fn reference(&self) -> Attention {
        let shape = self.shape;
        let (heads, kv_heads) = (shape.heads as usize, shape.kv_heads as usize);
        let d = shape.head_dim as usize;
        let [q, k, v] = self.windows(&self.qkv);
        let empty = Attention { o: vec![], lse: vec![], dq: vec![], dk: vec![], dv: vec![] };
        let (mut all, mut token) = (empty, 0);
        for &seq in self.lengths {
            let wide = token * heads * d..(token + seq) * heads * d;
            let narrow = token * kv_heads * d..(token + seq) * kv_heads * d;
            let sizes = Sizes { seq, heads, kv_heads, head_dim: d };
            let (k, v) = (&k[narrow.clone()], &v[narrow]);
            let one = attention(sizes, &q[wide.clone()], k, v, &self.d_o[wide], f64::from(self.scale));
            all.o.extend(one.o);
            all.lse.extend(one.lse);
            all.dq.extend(one.dq);
            all.dk.extend(one.dk);
            all.dv.extend(one.dv);
            token += seq;
        }
        all
    }
}

fn upload(device: &mut dyn SelfTestDevice, bytes: &[u8]) -> Result<u64> {
    let address = device.allocate(bytes.len()).map_err(CudnnError::SelfTest)?;
    device.upload(address, bytes).map_err(CudnnError::SelfTest)?;
    Ok(address)
}

fn launch(device: &mut dyn SelfTestDevice, launch: &SdpaLaunch<'_>) -> Result<()> {
    let workspace = upload(device, &vec![0xff; launch.workspace().max(256)])?;
    // SAFETY: all addresses come from `device` with the sizes that belong to them, and are released by it later.
    unsafe { launch.run(device.stream(), workspace) }
}

fn round(value: f64, dtype: SdpaType) -> f64 {
    match dtype {
        SdpaType::Bf16 => bf16::from_f64(value).to_f64(),
        SdpaType::F16 => f16::from_f64(value).to_f64(),
    }
}

fn encode(values: &[f64], dtype: SdpaType) -> Vec<u8> {
    let bits = |value: &f64| match dtype {
        SdpaType::Bf16 => bf16::from_f64(*value).to_le_bytes(),
        SdpaType::F16 => f16::from_f64(*value).to_le_bytes(),
    };
    values.iter().flat_map(bits).collect()
}

fn decode(bytes: &[u8], dtype: SdpaType) -> Vec<f64> {
    let value = |bytes: &[u8; 2]| match dtype {
        SdpaType::Bf16 => bf16::from_le_bytes(*bytes).to_f64(),
        SdpaType::F16 => f16::from_le_bytes(*bytes).to_f64(),
    };
    bytes.as_chunks::<2>().0.iter().map(value).collect()
}

/// xorshift64*, and the sum of twelve uniform numbers as a normal one: enough for test data.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}
