//! Rotary position embedding (arXiv 2104.09864), in place, in the half-split layout of Hugging Face's Llama.
//!
//! Every head of `d` elements is cut into halves `a` and `b`; pair `i` is turned by the angle `position * f[i]`:
//!
//! ```text
//! a' = a cos - b sin          b' = b cos + a sin          f[i] = theta^(-2i/d), then scaled
//! ```
//!
//! The backward is the transposed map (`sin` negated). The scalings are those of transformers 5.23
//! (`modeling_rope_utils.py`): linear, llama3, YaRN (arXiv 2309.00071). The frequencies are computed as there, one f32
//! operation after another, because at position 8192 one unit in the last place of `f` moves the angle by up to 5e-4.
//! The one difference is the power `theta^(2i/d)`, which is correctly rounded here, while PyTorch's differs by one unit
//! in the last place in about 1 of 100 cases, and not in the same ones on every machine. Cos and sin are computed in f64
//! from the f32 angle and rounded once.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::error::{Error, Result};
use crate::parallel::{TASK, rows_per_task};
use crate::sequence::Positions;
use crate::simd::vectorize;
use crate::view::ViewMut;

/// The parameters of a model's rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the angles' geometric series (`rope_theta`).
    pub theta: f64,
    /// The change that stretches them to longer sequences, if any.
    pub scaling: Option<RopeScaling>,
}

impl RopeConfig {
    /// The divisors of the frequencies of heads of `head_dim` elements under Llama 3's scaling, `[head_dim / 2]`, which GGUF files hold
    /// instead of its options; none under another scaling.
    pub fn llama3_divisors(&self, head_dim: usize) -> Option<Vec<f64>> {
        let Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) =
            self.scaling
        else {
            return None;
        };
        let original = original_max_position_embeddings as f64;
        let divisor = |i: usize| {
            let wavelength = std::f64::consts::TAU * self.theta.powf(2.0 * i as f64 / head_dim as f64);
            // 1 where the wavelength is short and the frequency is kept, 0 where it is long and divided.
            let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let kept = kept.clamp(0.0, 1.0);
            1.0 / ((1.0 - kept) / factor + kept)
        };
        Some((0..head_dim / 2).map(divisor).collect())
    }
}

/// The scalings of Hugging Face's `rope_scaling`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// All angles divided by `factor`.
    Linear {
        /// The factor by which the sequence grows.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth step between.
    Llama3 {
        /// The factor by which the sequence grows.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are scaled whole.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The length the model was first trained for.
        original_max_position_embeddings: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// The factor by which the sequence grows.
        factor: f64,
        /// The length the model was first trained for.
        original_max_position_embeddings: usize,
        /// Rotations above which a frequency is kept (32).
        beta_fast: f64,
        /// Rotations below which a frequency is scaled whole (1).
        beta_slow: f64,
        /// The factor of cos and sin; none: `0.1 ln(factor) + 1`.
        attention_factor: Option<f64>,
        /// Whether the correction range is rounded to whole dimensions.
        truncate: bool,
    },
}

/// Cos and sin of every angle up to a largest position: built once a model, used by all layers.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// `[max_positions, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    inverse_frequencies: Vec<f32>,
    attention_factor: f32,
    max_positions: usize,
    #[cfg(feature = "cuda")]
    device: [crate::cuda::OnDevice; 2],
}

impl RopeTable {
    /// The table for positions `0..max_positions` of heads of `head_dim` elements; `8 * head_dim / 2` bytes a position.
    ///
    /// # Errors
    /// If `head_dim` is odd or 0, or a number in `config` is not finite and positive.
    pub fn new(config: &RopeConfig, head_dim: usize, max_positions: usize) -> Result<Self> {
        let inverse_frequencies = inverse_frequencies(config, head_dim)?;
        let attention_factor = attention_factor(config) as f32;
        let half = head_dim / 2;
        let (mut cos, mut sin) = (vec![0.0; max_positions * half], vec![0.0; max_positions * half]);
        cos.par_chunks_exact_mut(half)
            .zip(sin.par_chunks_exact_mut(half))
            .enumerate()
            .with_min_len((TASK / 16 / half).max(1))
            .for_each(|(position, (cos, sin))| {
                for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(&inverse_frequencies) {
                    let (s, c) = f64::from(position as f32 * f).sin_cos();
                    *cos = c as f32 * attention_factor;
                    *sin = s as f32 * attention_factor;
                }
            });
        Ok(Self {
            cos,
            sin,
            inverse_frequencies,
            attention_factor,
            max_positions,
            #[cfg(feature = "cuda")]
            device: Default::default(),
        })
    }

    /// The table that turns nothing, for layers without rotary embedding where a kernel needs one: cos is 1 and sin is 0, so
    /// that every element stays what it is.
    ///
    /// # Errors
    /// If `head_dim` is odd or 0.
    pub fn identity(head_dim: usize, max_positions: usize) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::invalid("rope", format!("head_dim is {head_dim}; it must be even and positive")));
        }
        let half = head_dim / 2;
        Ok(Self {
            cos: vec![1.0; max_positions * half],
            sin: vec![0.0; max_positions * half],
            inverse_frequencies: vec![0.0; half],
            attention_factor: 1.0,
            max_positions,
            #[cfg(feature = "cuda")]
            device: Default::default(),
        })
    }

    /// Cos and sin on a GPU, `[max_positions, head_dim / 2]` each.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_device(&self, gpu: &crate::cuda::Gpu) -> Result<[&crate::cuda::Buffer; 2]> {
        let [cos, sin] = &self.device;
        Ok([cos.get(gpu, &self.cos)?, sin.get(gpu, &self.sin)?])
    }

    /// The elements of one head.
    pub fn head_dim(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }

    /// The number of positions.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Radians per position of every pair: `head_dim / 2`.
    pub fn inverse_frequencies(&self) -> &[f32] {
        &self.inverse_frequencies
    }

    /// The factor of cos and sin: 1 except with YaRN.
    pub fn attention_factor(&self) -> f32 {
        self.attention_factor
    }

    /// The cosines of `position`: `head_dim / 2`.
    ///
    /// # Panics
    /// If `position` is not in the table.
    pub fn cos(&self, position: usize) -> &[f32] {
        let half = self.inverse_frequencies.len();
        &self.cos[position * half..(position + 1) * half]
    }

    /// The sines of `position`: `head_dim / 2`.
    ///
    /// # Panics
    /// If `position` is not in the table.
    pub fn sin(&self, position: usize) -> &[f32] {
        let half = self.inverse_frequencies.len();
        &self.sin[position * half..(position + 1) * half]
    }
}

/// Turns every head of `x` (`[tokens, heads * head_dim]`, queries or keys) by its token's position, in place.
///
/// # Errors
/// If the sizes do not fit each other, a position is beyond the table, or they are on two GPUs.
pub fn forward(x: ViewMut, head_dim: usize, table: &RopeTable, positions: &Positions) -> Result<()> {
    rotate::<false>("rope", x, head_dim, table, positions)
}

/// Turns the gradient of the rotated heads (`[tokens, heads * head_dim]`) into that of the heads before, in place.
///
/// # Errors
/// If the sizes do not fit each other, a position is beyond the table, or they are on two GPUs.
pub fn backward(dx: ViewMut, head_dim: usize, table: &RopeTable, positions: &Positions) -> Result<()> {
    rotate::<true>("rope_backward", dx, head_dim, table, positions)
}

fn rotate<const TRANSPOSED: bool>(
    op: &'static str,
    x: ViewMut,
    head_dim: usize,
    table: &RopeTable,
    positions: &Positions,
) -> Result<()> {
    let [tokens, cols] = x.shape();
    Error::check_shape(op, "the table's heads", &[table.head_dim()], &[head_dim])?;
    Error::check_shape(op, "positions", &[positions.len()], &[tokens])?;
    if !cols.is_multiple_of(head_dim) {
        return Err(Error::invalid(op, format!("{cols} columns are not a whole number of heads of {head_dim}")));
    }
    if let Some(token) = positions.iter().position(|&position| position as usize >= table.max_positions) {
        let (position, max) = (positions[token], table.max_positions);
        return Err(Error::invalid(
            op,
            format!("token {token} is at position {position}, but the table holds positions 0 to {max} (exclusive)"),
        ));
    }
    #[cfg(feature = "cuda")]
    if x.gpu().is_some() {
        return crate::cuda::ops::rope(op, x.cuda(op)?, head_dim, table, positions, TRANSPOSED);
    }
    x.host(op)?.par_rows_mut().zip_eq(&**positions).with_min_len(rows_per_task(cols)).for_each(|(row, &position)| {
        let (cos, sin) = (table.cos(position as usize), table.sin(position as usize));
        vectorize(
            #[inline(always)]
            move || {
                for head in row.chunks_exact_mut(head_dim) {
                    let (a, b) = head.split_at_mut(head_dim / 2);
                    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                        let sin = if TRANSPOSED { -sin } else { *sin };
                        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                    }
                }
            },
        );
    });
    Ok(())
}

const TABLE: &str = "rope_table";

fn check_positive(what: &str, x: f64) -> Result<f64> {
    if x.is_finite() && x > 0.0 {
        return Ok(x);
    }
    Err(Error::invalid(TABLE, format!("{what} is {x}; it must be a positive number")))
}

/// Radians per position of every pair, scaled as `config` says.
fn inverse_frequencies(config: &RopeConfig, head_dim: usize) -> Result<Vec<f32>> {
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(Error::invalid(TABLE, format!("heads of {head_dim} elements cannot be cut into two halves")));
    }
    let theta = check_positive("rope_theta", config.theta)?;
    // theta^(2i/d), with the exponent rounded to f32.
    let powers = (0..head_dim / 2)
        .map(|i| f64::from(theta as f32).powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32)
        .collect::<Vec<_>>();
    let plain = powers.iter().map(|power| 1.0 / power);
    match config.scaling {
        None => Ok(plain.collect()),
        Some(RopeScaling::Linear { factor }) => {
            let factor = check_positive("factor", factor)? as f32;
            Ok(plain.map(|f| f / factor).collect())
        }
        Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
            let factor = check_positive("factor", factor)? as f32;
            let low = check_positive("low_freq_factor", low_freq_factor)?;
            let high = check_positive("high_freq_factor", high_freq_factor)?;
            let length = check_positive("original_max_position_embeddings", original_max_position_embeddings as f64)?;
            let (longest_kept, shortest_scaled) = ((length / high) as f32, (length / low) as f32);
            Ok(plain
                .map(|f| {
                    let wavelength = 1.0 / f * std::f32::consts::TAU;
                    if wavelength < longest_kept {
                        f
                    } else if wavelength > shortest_scaled {
                        f / factor
                    } else {
                        let smooth = (1.0 / wavelength * length as f32 - low as f32) / (high - low) as f32;
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect())
        }
        Some(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        }) => {
            let factor = check_positive("factor", factor)? as f32;
            let length = check_positive("original_max_position_embeddings", original_max_position_embeddings as f64)?;
            let (fast, slow) = (check_positive("beta_fast", beta_fast)?, check_positive("beta_slow", beta_slow)?);
            if let Some(attention_factor) = attention_factor {
                check_positive("attention_factor", attention_factor)?;
            }
            if theta == 1.0 {
                return Err(Error::invalid(TABLE, "rope_theta is 1; YaRN needs frequencies that differ"));
            }
            // The (fractional) pair whose angle makes this many rotations over the original length.
            let pair = |rotations: f64| {
                head_dim as f64 * (length / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (pair(fast), pair(slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            // transformers bounds by the elements of a head, not by its pairs; so do we.
            (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            Ok(powers
                .iter()
                .enumerate()
                .map(|(i, power)| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let kept = 1.0 - ramp;
                    1.0 / (factor * power) * (1.0 - kept) + 1.0 / power * kept
                })
                .collect())
        }
    }
}

fn attention_factor(config: &RopeConfig) -> f64 {
    match config.scaling {
        Some(RopeScaling::Yarn { attention_factor: Some(given), .. }) => given,
        Some(RopeScaling::Yarn { factor, .. }) if factor > 1.0 => 0.1 * factor.ln() + 1.0,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn llama3_divides_the_frequencies_by_its_divisors() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let config = RopeConfig { theta: 500_000.0, scaling: Some(scaling) };
        let plain = inverse_frequencies(&RopeConfig { scaling: None, ..config.clone() }, 128).unwrap();
        let scaled = inverse_frequencies(&config, 128).unwrap();
        let divisors = config.llama3_divisors(128).unwrap();
        assert!(divisors.len() == 64 && divisors[0] == 1.0 && divisors[63] == 8.0);
        for ((plain, scaled), divisor) in plain.iter().zip(&scaled).zip(divisors) {
            let got = f64::from(*plain) / f64::from(*scaled);
            assert!((got - divisor).abs() < 1e-5 * divisor, "{got} {divisor}");
        }
    }

    use super::*;
    use crate::testing::{Window, assert_close, numeric_gradient, random, to_f64};

    fn yarn() -> RopeConfig {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_max_position_embeddings: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate: true,
        };
        RopeConfig { theta: 10_000.0, scaling: Some(scaling) }
    }

    const PLAIN: RopeConfig = RopeConfig { theta: 10_000.0, scaling: None };

    /// The rotation as a product of complex numbers, from the table's own angles.
    fn reference(x: &[f64], head_dim: usize, table: &RopeTable, positions: &Positions) -> Vec<f64> {
        let (half, width) = (head_dim / 2, x.len() / positions.len());
        let mut y = x.to_vec();
        for (row, &position) in y.chunks_exact_mut(width).zip(positions.iter()) {
            for head in row.chunks_exact_mut(head_dim) {
                for i in 0..half {
                    // The angle is an f32 by definition.
                    let angle = f64::from(position as f32 * table.inverse_frequencies()[i]);
                    let factor = f64::from(table.attention_factor());
                    let (a, b) = (head[i], head[half + i]);
                    head[i] = factor * (a * angle.cos() - b * angle.sin());
                    head[half + i] = factor * (a * angle.sin() + b * angle.cos());
                }
            }
        }
        y
    }

    #[test]
    fn the_identity_table_changes_nothing() {
        let table = RopeTable::identity(6, 40).unwrap();
        let before: Vec<f32> = (0..3 * 12).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut x = before.clone();
        forward(ViewMut::new(&mut x, 3, 12), 6, &table, &vec![0, 17, 39].into()).unwrap();
        assert_eq!(x, before);
        assert!(RopeTable::identity(5, 40).is_err() && RopeTable::identity(0, 40).is_err());
    }

    #[test]
    fn forward_and_backward_match_f64() {
        for (tokens, heads, head_dim) in [(1, 1, 2), (5, 3, 6), (2, 9, 64), (17, 1, 14), (3, 4, 16)] {
            for config in [PLAIN, yarn()] {
                for gap in [0, 7] {
                    let table = RopeTable::new(&config, head_dim, 300).unwrap();
                    let positions: Positions = (0..tokens).map(|i| (i * 37 % 300) as u32).collect::<Vec<_>>().into();
                    let width = heads * head_dim;
                    let mut random = random((tokens * width) as u64);
                    let (x, dy) = (random(tokens * width), random(tokens * width));
                    let mut y = Window::of(&x, tokens, width, gap);
                    forward(y.view_mut(), head_dim, &table, &positions).unwrap();
                    let f = |x: &[f64]| reference(x, head_dim, &table, &positions);
                    assert_close("y", &y.to_vec(), &f(&to_f64(&x)), 1e-6);
                    let mut dx = Window::of(&dy, tokens, width, gap);
                    backward(dx.view_mut(), head_dim, &table, &positions).unwrap();
                    let want = numeric_gradient(&to_f64(&x), &to_f64(&dy), f);
                    assert_close("dx", &dx.to_vec(), &want, 1e-6);
                }
            }
        }
    }

    #[test]
    fn position_0_is_left_alone_and_the_backward_undoes_the_forward() {
        let table = RopeTable::new(&PLAIN, 8, 100).unwrap();
        let x = random(3)(2 * 24);
        let mut y = x.clone();
        forward(ViewMut::new(&mut y, 2, 24), 8, &table, &vec![0, 99].into()).unwrap();
        assert_eq!(y[..24], x[..24]);
        assert!(y[24..].iter().zip(&x[24..]).all(|(y, x)| y != x));
        backward(ViewMut::new(&mut y, 2, 24), 8, &table, &vec![0, 99].into()).unwrap();
        assert_close("x", &y, &to_f64(&x), 1e-6);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let table = RopeTable::new(&PLAIN, 8, 100).unwrap();
        let mut x = [1.0; 32];
        let mut run = |cols, head_dim, positions: &Positions| {
            let error = forward(ViewMut::new(&mut x, 32 / cols, cols), head_dim, &table, positions).unwrap_err();
            error.to_string()
        };
        let message = run(16, 8, &vec![3, 100].into());
        assert_eq!(message, "rope: token 1 is at position 100, but the table holds positions 0 to 100 (exclusive)");
        assert_eq!(run(16, 8, &vec![3].into()), "rope: positions has shape [1], expected [2]");
        assert_eq!(run(16, 16, &vec![1, 2].into()), "rope: the table's heads has shape [8], expected [16]");
        assert_eq!(run(4, 8, &vec![0; 8].into()), "rope: 4 columns are not a whole number of heads of 8");
        assert_eq!(x, [1.0; 32]);
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let message = |config: &RopeConfig, head_dim| RopeTable::new(config, head_dim, 4).unwrap_err().to_string();
        assert!(message(&PLAIN, 7).contains("heads of 7 elements"));
        assert!(message(&PLAIN, 0).contains("heads of 0 elements"));
        assert!(message(&RopeConfig { theta: 0.0, scaling: None }, 8).contains("rope_theta is 0"));
        let linear = RopeConfig { theta: 1e4, scaling: Some(RopeScaling::Linear { factor: f64::NAN }) };
        assert!(message(&linear, 8).contains("factor is NaN"));
    }
}
