//! A frozen weight on a GPU.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use super::buffer::Buffer;
use super::ffi;
use super::gpu::Gpu;
use super::int_weight::DeviceInt;
use super::view::{CudaView, CudaViewMut};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::quant::{Absmax, IntParts, NestedAbsmax, Parts, QuantConfig, QuantType, Quantized4bit, QuantizedInt};
use crate::view::{View, ViewMut};
use crate::weight::{FrozenWeight, Int8Activations, PlainData, PlainWeight};

/// A frozen weight `[rows, cols]` on a GPU: plain, in 4 bits, or in integers.
#[derive(Debug)]
pub struct CudaWeight {
    data: Data,
    rows: usize,
    cols: usize,
}

enum Data {
    Plain { buffer: Buffer, dtype: Dtype },
    Bits4(Box<Bits4>),
    Int(Box<DeviceInt>),
}

/// As [`Parts`], in device memory.
struct Bits4 {
    codes: Buffer,
    absmax: DeviceAbsmax,
    quant_type: QuantType,
    blocksize: usize,
}

enum DeviceAbsmax {
    Plain(Buffer),
    Nested { codes: Buffer, map: Buffer, absmax: Buffer, offset: f32, blocksize: usize },
}

impl CudaWeight {
    const OP: &'static str = "weight to the GPU";

    /// Copies a plain weight, in the workspace's type.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn plain(weight: &PlainWeight, workspace: &Workspace) -> Result<Self> {
        let gpu = gpu_of(workspace)?;
        let (rows, cols, dtype) = (weight.rows(), weight.cols(), workspace.dtype());
        let buffer = match (weight.data(), dtype) {
            (PlainData::F32(data), Dtype::F32) => Buffer::upload(gpu, Self::OP, data)?,
            (PlainData::Bf16(data), Dtype::Bf16) => Buffer::upload(gpu, Self::OP, data)?,
            (PlainData::F16(data), Dtype::F16) => Buffer::upload(gpu, Self::OP, data)?,
            (data, _) => {
                // Another type: through the device, so that only one weight at a time exists twice there.
                let uploaded = upload_plain(gpu, data)?;
                let from = Dtype::of(data);
                let mut buffer = Buffer::new(gpu, Self::OP, rows * cols * dtype.size())?;
                // SAFETY: both buffers have rows * cols elements of their type.
                let (source, target) = unsafe {
                    (
                        CudaView::of_buffer(&uploaded, from, [rows, cols], cols, 0),
                        CudaViewMut::of_buffer(&mut buffer, dtype, [rows, cols], cols, 0),
                    )
                };
                super::ops::cast(source, target)?;
                buffer
            }
        };
        Ok(Self { data: Data::Plain { buffer, dtype }, rows, cols })
    }

    /// Copies a 4-bit weight.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn quantized(weight: &Quantized4bit, workspace: &Workspace) -> Result<Self> {
        let gpu = gpu_of(workspace)?;
        let Parts { codes, absmax, rows, cols, quant_type, blocksize, .. } = weight.parts();
        let codes = Buffer::upload(gpu, Self::OP, codes)?;
        let bits4 =
            Bits4 { codes, absmax: upload_absmax(gpu, absmax)?, quant_type: *quant_type, blocksize: *blocksize };
        Ok(Self { data: Data::Bits4(Box::new(bits4)), rows: *rows, cols: *cols })
    }

    /// Copies an integer weight. Its products use the dequantized weight; LLM.int8's round their input to 8 bits first.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn integers(weight: &QuantizedInt, workspace: &Workspace) -> Result<Self> {
        let gpu = gpu_of(workspace)?;
        let IntParts { rows, cols, .. } = *weight.parts();
        Ok(Self { data: Data::Int(Box::new(DeviceInt::new(gpu, weight)?)), rows, cols })
    }

    /// Quantizes on the GPU: the same bytes as [`Quantized4bit::quantize`]. (The absmax values are doubly quantized on
    /// the host: they are 1/64 of the weight.)
    ///
    /// # Errors
    /// As there; also if the memory cannot be had.
    pub fn quantize(
        data: &PlainData,
        rows: usize,
        cols: usize,
        config: &QuantConfig,
        workspace: &Workspace,
    ) -> Result<Self> {
        const OP: &str = "quantize_4bit";
        let gpu = gpu_of(workspace)?;
        let n = rows * cols;
        if data.len() != n || n == 0 {
            // The CPU version finds the words for what is wrong.
            return Self::quantized(&Quantized4bit::quantize(data, rows, cols, config)?, workspace);
        }
        crate::quant::check_blocksize(OP, config.blocksize)?;
        let blocks = n.div_ceil(config.blocksize);
        let mut codes = Buffer::new(gpu, OP, n.div_ceil(2))?;
        // The source, the absmax values, the first value that cannot be quantized.
        let absmax_at = (n * Dtype::of(data).size()).next_multiple_of(256);
        let bad_at = absmax_at + (4 * blocks).next_multiple_of(256);
        let mut staging = gpu.take_staging(OP, bad_at + 8)?;
        match data {
            PlainData::F32(data) => staging.write(OP, 0, data)?,
            PlainData::Bf16(data) => staging.write(OP, 0, data)?,
            PlainData::F16(data) => staging.write(OP, 0, data)?,
        }
        staging.write(OP, bad_at, &[u64::MAX])?;
        let at = |offset: usize| staging.ptr() + offset as u64;
        let (source, absmax_ptr, bad_ptr) = (at(0) as *const _, at(absmax_at) as *mut f32, at(bad_at) as *mut u64);
        let codes_ptr = codes.as_mut_ptr();
        // SAFETY: the input has n elements, the outputs have the sizes that follow from n and the block size.
        gpu.launch(OP, |stream| unsafe {
            ffi::qlora_quantize_4bit(
                Dtype::of(data).code(),
                source,
                n as i64,
                quant_code(config.quant_type),
                config.blocksize as i64,
                codes_ptr,
                absmax_ptr,
                bad_ptr,
                stream,
            )
        })?;
        let absmax: Vec<f32> = staging.read(OP, absmax_at, blocks)?;
        let first_bad: Vec<u64> = staging.read(OP, bad_at, 1)?;
        gpu.keep_staging(staging);
        if first_bad[0] != u64::MAX {
            // The CPU version names row, column and value.
            Quantized4bit::quantize(data, rows, cols, config)?;
            return Err(Error::invalid(OP, "the GPU found a value that cannot be quantized"));
        }
        let absmax = match config.double_quant {
            false => DeviceAbsmax::Plain(Buffer::upload(gpu, OP, &absmax)?),
            true => upload_absmax(gpu, &Absmax::Nested(NestedAbsmax::quantize(&absmax)))?,
        };
        let bits4 = Bits4 { codes, absmax, quant_type: config.quant_type, blocksize: config.blocksize };
        Ok(Self { data: Data::Bits4(Box::new(bits4)), rows, cols })
    }

    /// The weight as it lies in memory, if it is plain.
    pub(crate) fn plain_view(&self) -> Option<CudaView<'_>> {
        match &self.data {
            Data::Plain { buffer, dtype } => {
                // SAFETY: the buffer has rows * cols elements.
                Some(unsafe { CudaView::of_buffer(buffer, *dtype, [self.rows, self.cols], self.cols, 0) })
            }
            Data::Bits4(_) | Data::Int(_) => None,
        }
    }

    /// [`FrozenWeight::exact_columns`] on the device, and how many they are.
    pub(super) fn exact_on_device(&self) -> Option<(&Buffer, usize)> {
        match &self.data {
            Data::Int(int) => int.exact_on_device(),
            Data::Plain { .. } | Data::Bits4(_) => None,
        }
    }

    /// The weight as the kernels for few tokens take it, with `[blocksize, nested blocksize, type]`, if it has 4 bits.
    pub(super) fn few_member(&self) -> Option<([i64; 3], ffi::FewMember)> {
        let Data::Bits4(bits4) = &self.data else { return None };
        let mut member = ffi::FewMember { codes: bits4.codes.as_ptr(), rows: self.rows as i64, ..Default::default() };
        let nested_blocksize = match &bits4.absmax {
            DeviceAbsmax::Plain(absmax) => {
                member.absmax = absmax.as_ptr();
                0
            }
            DeviceAbsmax::Nested { codes, map, absmax, offset, blocksize } => {
                (member.absmax_codes, member.nested_map) = (codes.as_ptr(), map.as_ptr());
                (member.nested_absmax, member.nested_offset) = (absmax.as_ptr(), *offset);
                *blocksize as i64
            }
        };
        Some(([bits4.blocksize as i64, nested_blocksize, i64::from(quant_code(bits4.quant_type))], member))
    }

    /// Writes the whole weight into `out`, in its type.
    ///
    /// # Errors
    /// If the shapes do not fit, `out` is not on this GPU, or the device fails.
    pub fn dequantize(&self, out: ViewMut) -> Result<()> {
        Error::check_shape(Self::OP, "out", &[out.rows()], &[self.rows])?;
        self.dequantize_into(0, out.cuda(Self::OP)?)
    }

    /// Writes rows, from `first_row` on, into `out`, in its type.
    ///
    /// # Errors
    /// If the shapes do not fit, or the device fails.
    pub fn dequantize_into(&self, first_row: usize, out: CudaViewMut) -> Result<()> {
        const OP: &str = "dequantize_4bit";
        Error::check_shape(OP, "out", &[out.cols()], &[self.cols])?;
        if first_row + out.rows() > self.rows {
            return Err(Error::invalid(OP, format!("rows to {} of {}", first_row + out.rows(), self.rows)));
        }
        let bits4 = match &self.data {
            Data::Plain { .. } => {
                let whole = self.plain_view().expect("it is plain");
                return super::ops::cast(whole.slice_rows(first_row..first_row + out.rows()), out);
            }
            Data::Int(int) => return int.dequantize_into(first_row, out),
            Data::Bits4(bits4) => bits4,
        };
        let null = std::ptr::null::<u8>();
        let (plain, codes, map, absmax, offset, nested_blocksize) = match &bits4.absmax {
            DeviceAbsmax::Plain(absmax) => {
                (absmax.as_ptr::<f32>(), null, null.cast::<f32>(), null.cast::<f32>(), 0.0, 1)
            }
            DeviceAbsmax::Nested { codes, map, absmax, offset, blocksize } => {
                (null.cast(), codes.as_ptr::<u8>(), map.as_ptr(), absmax.as_ptr(), *offset, *blocksize)
            }
        };
        // SAFETY: all buffers are live and have the sizes that follow from the shape and the block sizes.
        out.gpu().launch(OP, |stream| unsafe {
            ffi::qlora_dequantize_4bit(
                out.dtype().code(),
                bits4.codes.as_ptr(),
                plain,
                codes,
                map,
                absmax,
                offset,
                quant_code(bits4.quant_type),
                bits4.blocksize as i64,
                nested_blocksize as i64,
                out.ptr() as *mut _,
                out.ld(),
                first_row as i64,
                out.rows() as i64,
                self.cols as i64,
                stream,
            )
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &Arc<Gpu> {
        match &self.data {
            Data::Plain { buffer, .. } => buffer.gpu(),
            Data::Bits4(bits4) => bits4.codes.gpu(),
            Data::Int(int) => int.gpu(),
        }
    }

    /// The weight on the host again.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_quantized(&self, source_dtype: Dtype) -> Result<Option<Quantized4bit>> {
        let Data::Bits4(bits4) = &self.data else { return Ok(None) };
        let absmax = match &bits4.absmax {
            DeviceAbsmax::Plain(values) => Absmax::Plain(values.download()?),
            DeviceAbsmax::Nested { codes, map, absmax, offset, blocksize } => Absmax::Nested(NestedAbsmax {
                codes: codes.download()?,
                absmax: absmax.download()?,
                quant_map: map.download()?,
                offset: *offset,
                blocksize: *blocksize,
            }),
        };
        let parts = Parts {
            codes: bits4.codes.download()?,
            absmax,
            rows: self.rows,
            cols: self.cols,
            quant_type: bits4.quant_type,
            blocksize: bits4.blocksize,
            source_dtype,
        };
        Quantized4bit::from_parts(parts).map(Some)
    }
}

impl FrozenWeight for CudaWeight {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    /// Through a copy to the host: for checks.
    ///
    /// # Panics
    /// If the device fails.
    fn dequantize_rows(&self, range: Range<usize>, out: &mut [f32]) {
        let read = || -> Result<Vec<f32>> {
            let workspace = Workspace::with_dtype(&self.gpu().device(), Dtype::F32)?;
            let mut rows: Matrix = workspace.matrix(range.len(), self.cols)?;
            self.dequantize_into(range.start, rows.view_mut().cuda(Self::OP)?)?;
            View::to_vec(&rows.view())
        };
        out.copy_from_slice(&read().expect("the GPU copies a weight to the host"));
    }

    fn bytes(&self) -> usize {
        match &self.data {
            Data::Plain { buffer, .. } => buffer.bytes(),
            Data::Int(int) => int.bytes(),
            Data::Bits4(bits4) => {
                bits4.codes.bytes()
                    + match &bits4.absmax {
                        DeviceAbsmax::Plain(values) => values.bytes(),
                        // The offset is the launcher's argument.
                        DeviceAbsmax::Nested { codes, map, absmax, .. } => {
                            codes.bytes() + map.bytes() + absmax.bytes() + size_of::<f32>()
                        }
                    }
            }
        }
    }

    fn int8_activations(&self) -> Option<Int8Activations> {
        match &self.data {
            Data::Int(int) => int.activations(),
            Data::Plain { .. } | Data::Bits4(_) => None,
        }
    }

    fn exact_columns(&self) -> &[u32] {
        match &self.data {
            Data::Int(int) => int.exact_columns(),
            Data::Plain { .. } | Data::Bits4(_) => &[],
        }
    }

    fn as_cuda(&self) -> Option<&CudaWeight> {
        Some(self)
    }
}

fn gpu_of(workspace: &Workspace) -> Result<&Arc<Gpu>> {
    workspace.gpu().ok_or_else(|| Error::invalid(CudaWeight::OP, "the workspace is the CPU's"))
}

fn quant_code(quant_type: QuantType) -> i32 {
    match quant_type {
        QuantType::Nf4 => 0,
        QuantType::Fp4 => 1,
    }
}

fn upload_plain(gpu: &Arc<Gpu>, data: &PlainData) -> Result<Buffer> {
    match data {
        PlainData::F32(data) => Buffer::upload(gpu, CudaWeight::OP, data),
        PlainData::Bf16(data) => Buffer::upload(gpu, CudaWeight::OP, data),
        PlainData::F16(data) => Buffer::upload(gpu, CudaWeight::OP, data),
    }
}

fn upload_absmax(gpu: &Arc<Gpu>, absmax: &Absmax) -> Result<DeviceAbsmax> {
    let op = CudaWeight::OP;
    Ok(match absmax {
        Absmax::Plain(values) => DeviceAbsmax::Plain(Buffer::upload(gpu, op, values)?),
        Absmax::Nested(nested) => DeviceAbsmax::Nested {
            codes: Buffer::upload(gpu, op, &nested.codes)?,
            map: Buffer::upload(gpu, op, &nested.quant_map)?,
            absmax: Buffer::upload(gpu, op, &nested.absmax)?,
            offset: nested.offset,
            blocksize: nested.blocksize,
        },
    })
}

impl Dtype {
    fn of(data: &PlainData) -> Self {
        match data {
            PlainData::F32(_) => Self::F32,
            PlainData::Bf16(_) => Self::Bf16,
            PlainData::F16(_) => Self::F16,
        }
    }
}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain { dtype, .. } => f.write_str(dtype.name()),
            Self::Int(int) => write!(f, "{int:?}"),
            Self::Bits4(bits4) => write!(f, "{}, blocksize {}", bits4.quant_type, bits4.blocksize),
        }
    }
}
