//! AdamW with moments of 8 bits: a quarter of the optimizer's memory (8-bit Optimizers via Block-wise Quantization,
//! arXiv 2110.02861; layout and maps of bitsandbytes, blocks of 256).
//!
//! Block by block, a moment is `map[code] * absmax`, with `absmax` the largest magnitude of the block and the code the
//! nearest value of a dynamic map, signed for `m` and unsigned for `v`. A step decodes, updates as
//! [`adamw`](super::adamw) does, applies the moments to the parameter before they are rounded, and encodes them again.
//! A `v` above 0 never gets the code of 0: it would read as 0 later, and `m / eps` would be a leap.
//!
//! On the CPU and on a GPU the same bits.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::adamw::{AdamW, Scalars};
#[cfg(feature = "cuda")]
use crate::cuda::Buffer;
use crate::error::{Error, Result};
use crate::matrix::Workspace;
use crate::quant::{signed_dynamic_map, unsigned_dynamic_map};
use crate::view::{View, ViewMut};

const OP: &str = "adamw_8bit";

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// The moments of `len` parameters, where the parameters are.
#[derive(Debug)]
pub struct Moments8bit {
    len: usize,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Host(Box<HostMoments>),
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaMoments>),
}

/// Moments as they lie in memory, and in files.
#[derive(Clone, Debug, PartialEq)]
pub struct HostMoments {
    /// Codes of the first moment.
    pub exp_avg: Vec<u8>,
    /// Codes of the second moment.
    pub exp_avg_sq: Vec<u8>,
    /// The scale of each block of the first moment.
    pub exp_avg_absmax: Vec<f32>,
    /// The scale of each block of the second moment.
    pub exp_avg_sq_absmax: Vec<f32>,
}

#[cfg(feature = "cuda")]
#[derive(Debug)]
pub(crate) struct CudaMoments {
    pub(crate) exp_avg: Buffer,
    pub(crate) exp_avg_sq: Buffer,
    pub(crate) exp_avg_absmax: Buffer,
    pub(crate) exp_avg_sq_absmax: Buffer,
    pub(crate) maps: [Buffer; 2],
}

impl HostMoments {
    /// Zeros.
    pub fn zeros(len: usize) -> Self {
        let blocks = len.div_ceil(BLOCK);
        // The code of 0 is not 0 in the signed map.
        Self {
            exp_avg: vec![127; len],
            exp_avg_sq: vec![0; len],
            exp_avg_absmax: vec![0.0; blocks],
            exp_avg_sq_absmax: vec![0.0; blocks],
        }
    }

    /// Checks the moments of `len` parameters.
    ///
    /// # Errors
    /// If a length is not what follows from `len`, or a scale is negative or not finite.
    pub fn check(&self, len: usize) -> Result<()> {
        let blocks = len.div_ceil(BLOCK);
        for (what, got, expected) in [
            ("exp_avg", self.exp_avg.len(), len),
            ("exp_avg_sq", self.exp_avg_sq.len(), len),
            ("exp_avg_absmax", self.exp_avg_absmax.len(), blocks),
            ("exp_avg_sq_absmax", self.exp_avg_sq_absmax.len(), blocks),
        ] {
            Error::check_shape(OP, what, &[got], &[expected])?;
        }
        match self.exp_avg_absmax.iter().chain(&self.exp_avg_sq_absmax).find(|x| !x.is_finite() || **x < 0.0) {
            Some(scale) => Err(Error::invalid(OP, format!("a scale is {scale}"))),
            None => Ok(()),
        }
    }
}

impl Moments8bit {
    /// Bytes for `len` parameters.
    pub fn bytes_for(len: usize) -> usize {
        2 * len + 2 * 4 * len.div_ceil(BLOCK)
    }

    /// Zeros, where `workspace` is.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(len: usize, workspace: &Workspace) -> Result<Self> {
        Self::from_host(HostMoments::zeros(len), len, workspace)
    }

    /// Moments from a file, where `workspace` is.
    ///
    /// # Errors
    /// If they do not fit `len` parameters, or the memory cannot be had.
    pub fn from_host(moments: HostMoments, len: usize, workspace: &Workspace) -> Result<Self> {
        moments.check(len)?;
        #[cfg(feature = "cuda")]
        if let Some(gpu) = workspace.gpu() {
            let moments = CudaMoments {
                exp_avg: Buffer::upload(gpu, OP, &moments.exp_avg)?,
                exp_avg_sq: Buffer::upload(gpu, OP, &moments.exp_avg_sq)?,
                exp_avg_absmax: Buffer::upload(gpu, OP, &moments.exp_avg_absmax)?,
                exp_avg_sq_absmax: Buffer::upload(gpu, OP, &moments.exp_avg_sq_absmax)?,
                maps: [
                    Buffer::upload(gpu, OP, signed_dynamic_map())?,
                    Buffer::upload(gpu, OP, unsigned_dynamic_map())?,
                ],
            };
            return Ok(Self { len, storage: Storage::Cuda(Box::new(moments)) });
        }
        let _ = workspace;
        Ok(Self { len, storage: Storage::Host(Box::new(moments)) })
    }

    /// A copy on the host, for a file.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_host(&self) -> Result<HostMoments> {
        match &self.storage {
            Storage::Host(moments) => Ok((**moments).clone()),
            #[cfg(feature = "cuda")]
            Storage::Cuda(moments) => Ok(HostMoments {
                exp_avg: moments.exp_avg.download()?,
                exp_avg_sq: moments.exp_avg_sq.download()?,
                exp_avg_absmax: moments.exp_avg_absmax.download()?,
                exp_avg_sq_absmax: moments.exp_avg_sq_absmax.download()?,
            }),
        }
    }
}

/// One step, the `step`-th from 1: updates `param` and its moments. `grad_scale` multiplies the gradient.
///
/// # Errors
/// If lengths differ, `step` is 0, a setting is out of range, or the arguments are not on the same device; nothing is
/// written then.
pub fn step<'a>(
    config: &AdamW,
    step: u64,
    grad_scale: f32,
    param: impl Into<ViewMut<'a>>,
    grad: impl Into<View<'a>>,
    moments: &mut Moments8bit,
) -> Result<()> {
    let scalars = config.scalars(OP, step, grad_scale)?;
    let (param, grad) = (param.into(), grad.into());
    let len = param.rows() * param.cols();
    Error::check_shape(OP, "grad", &[grad.rows() * grad.cols()], &[len])?;
    Error::check_shape(OP, "the moments", &[moments.len], &[len])?;
    #[cfg(feature = "cuda")]
    if let Storage::Cuda(moments) = &mut moments.storage {
        return crate::cuda::optimizer::adamw_8bit(OP, config, step, grad_scale, param, grad, moments);
    }
    #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns, reason = "one kind on the CPU"))]
    let Storage::Host(moments) = &mut moments.storage else { unreachable!("the other kind returned above") };
    let (mut param, grad) = (param.host(OP)?, grad.host(OP)?);
    let gaps = || Error::invalid(OP, "a buffer has gaps between its elements");
    let (param, grad) = (param.as_mut_slice().ok_or_else(gaps)?, grad.as_slice().ok_or_else(gaps)?);
    let HostMoments { exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax } = &mut **moments;
    param
        .par_chunks_mut(BLOCK)
        .zip(grad.par_chunks(BLOCK))
        .zip(exp_avg.par_chunks_mut(BLOCK))
        .zip(exp_avg_sq.par_chunks_mut(BLOCK))
        .zip(exp_avg_absmax)
        .zip(exp_avg_sq_absmax)
        .for_each(|(((((param, grad), m), v), m_scale), v_scale)| {
            update_block(&scalars, param, grad, (m, m_scale), (v, v_scale));
        });
    Ok(())
}

fn update_block(
    scalars: &Scalars,
    param: &mut [f32],
    grad: &[f32],
    (m, m_scale): (&mut [u8], &mut f32),
    (v, v_scale): (&mut [u8], &mut f32),
) {
    let (signed, unsigned) = (signed_dynamic_map(), unsigned_dynamic_map());
    let (mut ms, mut vs) = ([0f32; BLOCK], [0f32; BLOCK]);
    let (mut m_largest, mut v_largest) = (0f32, 0f32);
    for i in 0..param.len() {
        ms[i] = signed[usize::from(m[i])] * *m_scale;
        vs[i] = unsigned[usize::from(v[i])] * *v_scale;
        scalars.apply(&mut param[i], grad[i], &mut ms[i], &mut vs[i]);
        m_largest = m_largest.max(ms[i].abs());
        v_largest = v_largest.max(vs[i]);
    }
    let inverse = |largest: f32| if largest > 0.0 { 1.0 / largest } else { 0.0 };
    let (m_factor, v_factor) = (inverse(m_largest), inverse(v_largest));
    for i in 0..param.len() {
        m[i] = nearest(signed, ms[i] * m_factor);
        let code = nearest(unsigned, vs[i] * v_factor);
        v[i] = if code == 0 && vs[i] > 0.0 { 1 } else { code };
    }
    (*m_scale, *v_scale) = (m_largest, v_largest);
}

/// The index of the value of a sorted map that is nearest to `x`; halfway, the lower.
fn nearest(map: &[f32; 256], x: f32) -> u8 {
    let mut low = 0;
    let mut step = 128;
    while step > 0 {
        if map[low + step] <= x {
            low += step;
        }
        step /= 2;
    }
    let high = (low + 1).min(255);
    (if x - map[low] > map[high] - x { high } else { low }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::adamw;
    use crate::testing::random;

    const CONFIG: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };

    #[test]
    fn nearest_is_nearest() {
        for map in [signed_dynamic_map(), unsigned_dynamic_map()] {
            assert!(map.is_sorted_by(|a, b| a < b));
            for x in (-1050..1050).map(|i| i as f32 / 1000.0) {
                let code = usize::from(nearest(map, x));
                let best = map.iter().map(|value| (x - value).abs()).fold(f32::INFINITY, f32::min);
                assert_eq!((x - map[code]).abs(), best, "{x}");
            }
        }
    }

    /// Fifty steps on a quadratic: the path stays near that with f32 moments.
    #[test]
    fn it_follows_adamw_with_f32_moments() {
        let len = 5 * BLOCK + 77;
        let target = random(3)(len);
        let start = random(4)(len);
        let (mut exact, mut coarse) = (start.clone(), start.clone());
        let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
        let mut moments = Moments8bit::new(len, &Workspace::cpu()).unwrap();
        let gradient = |x: &[f32]| -> Vec<f32> { x.iter().zip(&target).map(|(x, t)| x - t).collect() };
        for t in 1..=50 {
            let grad = gradient(&exact);
            adamw::step(&CONFIG, t, 0.7, &mut exact, &grad, &mut m, &mut v).unwrap();
            let grad = gradient(&coarse);
            step(&CONFIG, t, 0.7, &mut coarse, &grad, &mut moments).unwrap();
        }
        let distance =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt();
        let (apart, moved) = (distance(&exact, &coarse), distance(&exact, &start));
        assert!(apart < 0.05 * moved, "{apart} apart after a way of {moved}");
        assert!(apart > 0.0, "8 bits cannot give the same");
        let kept = moments.to_host().unwrap();
        // Decoded, each moment is within half a step of its map from the exact one: 2% of the block's largest.
        for (i, (m, v)) in m.iter().zip(&v).enumerate() {
            let block = i / BLOCK;
            let near =
                |code: u8, map: &[f32; 256], scale: f32, x: f32| (map[usize::from(code)] * scale - x).abs() / scale;
            assert!(near(kept.exp_avg[i], signed_dynamic_map(), kept.exp_avg_absmax[block], *m) < 0.1);
            assert!(near(kept.exp_avg_sq[i], unsigned_dynamic_map(), kept.exp_avg_sq_absmax[block], *v) < 0.1);
        }
    }

    #[test]
    fn zero_gradients_leave_zero_moments_and_small_ones_do_not_vanish() {
        let mut param = vec![1.0f32; 300];
        let mut moments = Moments8bit::new(300, &Workspace::cpu()).unwrap();
        let config = AdamW { weight_decay: 0.0, ..CONFIG };
        step(&config, 1, 1.0, &mut param, &vec![0.0; 300], &mut moments).unwrap();
        assert!(param.iter().all(|x| *x == 1.0));
        assert_eq!(moments.to_host().unwrap(), HostMoments::zeros(300));
        let mut grad = vec![1e-7f32; 300];
        grad[0] = 10.0;
        step(&config, 2, 1.0, &mut param, &grad, &mut moments).unwrap();
        // v of the small ones is 1e-16 of the largest: far below the map's smallest step, but not 0.
        assert!(moments.to_host().unwrap().exp_avg_sq.iter().all(|code| *code > 0));
    }

    #[test]
    fn a_restart_from_the_host_gives_the_same_bits_and_wrong_files_are_refused() {
        let len = 700;
        let mut random = random(9);
        let (start, grads) = (random(len), [random(len), random(len)]);
        let run = |restart: bool| {
            let (mut param, workspace) = (start.clone(), Workspace::cpu());
            let mut moments = Moments8bit::new(len, &workspace).unwrap();
            step(&CONFIG, 1, 1.0, &mut param, &grads[0], &mut moments).unwrap();
            if restart {
                moments = Moments8bit::from_host(moments.to_host().unwrap(), len, &workspace).unwrap();
            }
            step(&CONFIG, 2, 1.0, &mut param, &grads[1], &mut moments).unwrap();
            (param, moments.to_host().unwrap())
        };
        assert!(run(false) == run(true));
        let refusal = |edit: fn(&mut HostMoments)| {
            let mut moments = HostMoments::zeros(len);
            edit(&mut moments);
            Moments8bit::from_host(moments, len, &Workspace::cpu()).unwrap_err().to_string()
        };
        assert_eq!(refusal(|m| m.exp_avg.truncate(5)), "adamw_8bit: exp_avg has shape [5], expected [700]");
        assert!(refusal(|m| m.exp_avg_sq_absmax[1] = f32::NAN).contains("a scale is NaN"));
        assert!(refusal(|m| m.exp_avg_absmax[0] = -1.0).contains("a scale is -1"));
    }
}
