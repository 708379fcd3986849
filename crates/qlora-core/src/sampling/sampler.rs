//! Draws the next token from logits, with candle-transformers' `LogitsProcessor` and `apply_repeat_penalty`.
//!
//! Cases that candle leaves open are settled here: logits that are not numbers are an error (candle takes a NaN for the
//! largest, or fails while drawing); the largest logit is subtracted before the division by the temperature, so that no
//! temperature overflows; and `top_p` after `top_k` counts from the probabilities of the k tokens, as in transformers
//! (candle counts from those of the whole vocabulary).

use super::config::GenerationConfig;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};
use candle_transformers::utils::apply_repeat_penalty;

/// Draws tokens. The same options, seed and logits give the same tokens (for one version of candle, whose random
/// numbers these are).
pub struct Sampler {
    processor: LogitsProcessor,
    greedy: bool,
    /// The k tokens whose probabilities have to sum to 1 before candle applies `top_p` to them.
    normalized: Option<usize>,
    penalty: f32,
    window: Option<usize>,
}

impl Sampler {
    /// A sampler with these options, at the start of its seed's sequence.
    ///
    /// # Errors
    /// If an option is outside its range.
    pub fn new(config: &GenerationConfig) -> Result<Self> {
        config.validate()?;
        let temperature = config.temperature.unwrap_or(0.0);
        let top_k = config.top_k.filter(|&k| k > 0);
        let top_p = config.top_p.filter(|&p| p < 1.0);
        let greedy = config.is_greedy();
        let sampling = match (top_k, top_p) {
            _ if greedy => Sampling::ArgMax,
            (None, None) => Sampling::All { temperature },
            (Some(k), None) => Sampling::TopK { k, temperature },
            (None, Some(p)) => Sampling::TopP { p, temperature },
            (Some(k), Some(p)) => Sampling::TopKThenTopP { k, p, temperature },
        };
        Ok(Self {
            processor: LogitsProcessor::from_sampling(config.seed, sampling),
            greedy,
            normalized: top_p.and(top_k),
            penalty: config.repetition_penalty,
            window: config.repetition_window,
        })
    }

    /// Whether the next token is always that of the largest logit, the first of several.
    pub fn takes_the_largest(&self) -> bool {
        self.greedy && self.penalty == 1.0
    }

    /// The next token after the tokens `previous` (prompt and what was generated), from its logits: a tensor with one
    /// number a token of the vocabulary, of shape `[vocab]` or with leading dimensions of 1, of any float dtype on any
    /// device.
    ///
    /// # Errors
    /// If the tensor has another shape, or if a logit is NaN or infinite (minus infinity, for a token that is ruled
    /// out, is fine as long as another token is left).
    pub fn sample(&mut self, logits: &Tensor, previous: &[u32]) -> Result<u32> {
        let vocabulary = logits.dims().last().copied().unwrap_or(0);
        if logits.elem_count() != vocabulary || vocabulary == 0 {
            return Err(Error::Invalid(format!("sampling: logits have shape {:?}, expected [vocab]", logits.dims())));
        }
        let logits = logits.flatten_all()?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let mut values = logits.to_vec1::<f32>()?;
        check(&values)?;
        if self.penalty != 1.0 {
            let from = self.window.map_or(0, |window| previous.len().saturating_sub(window));
            values = apply_repeat_penalty(&logits, self.penalty, &previous[from..])?.to_vec1()?;
            // A small penalty can take a large logit past f32's range.
            check(&values)?;
        }
        if !self.greedy {
            let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            values.iter_mut().for_each(|value| *value -= largest);
        }
        let logits = Tensor::from_vec(values, vocabulary, &Device::Cpu)?;
        let normalized = self.normalized;
        Ok(self.processor.sample_f(&logits, |probabilities| {
            if let Some(k) = normalized {
                normalize_largest(probabilities, k);
            }
        })?)
    }
}

fn check(logits: &[f32]) -> Result<()> {
    let bad = |value: &f32| value.is_nan() || *value == f32::INFINITY;
    if let Some(token) = logits.iter().position(bad) {
        let count = logits.iter().filter(|value| bad(value)).count();
        return Err(Error::Invalid(format!(
            "sampling: the logit of token {token} is {} ({count} of {} are not finite); the model's weights or its adapter \
             are broken",
            logits[token],
            logits.len()
        )));
    }
    if logits.iter().all(|&value| value == f32::NEG_INFINITY) {
        return Err(Error::Invalid("sampling: every token is ruled out (all logits are -inf)".to_owned()));
    }
    Ok(())
}

/// Divides all probabilities by the sum of the k largest.
fn normalize_largest(probabilities: &mut [f32], k: usize) {
    if k >= probabilities.len() {
        return;
    }
    let mut sorted = probabilities.to_vec();
    let (largest, _, _) = sorted.select_nth_unstable_by(k, |left, right| right.total_cmp(left));
    let sum: f32 = largest.iter().sum();
    probabilities.iter_mut().for_each(|value| *value /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(edit: impl FnOnce(&mut GenerationConfig)) -> GenerationConfig {
        let mut config = GenerationConfig { seed: 11, ..Default::default() };
        edit(&mut config);
        config
    }

    fn logits(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    /// The share of every token among 20,000 draws.
    fn shares(config: &GenerationConfig, values: &[f32], previous: &[u32]) -> Vec<f64> {
        const DRAWS: usize = 20_000;
        let mut sampler = Sampler::new(config).unwrap();
        let logits = logits(values);
        let mut counts = vec![0usize; values.len()];
        for _ in 0..DRAWS {
            counts[sampler.sample(&logits, previous).unwrap() as usize] += 1;
        }
        counts.into_iter().map(|count| count as f64 / DRAWS as f64).collect()
    }

    /// Within five standard errors, and nothing where the probability is zero.
    fn assert_shares(config: &GenerationConfig, values: &[f32], previous: &[u32], expected: &[f64]) {
        let shares = shares(config, values, previous);
        for (token, (&share, &p)) in shares.iter().zip(expected).enumerate() {
            let tolerance = 5.0 * (p * (1.0 - p) / 20_000.0).sqrt();
            assert!((share - p).abs() <= tolerance, "token {token}: {share} drawn, {p} expected ({shares:?})");
        }
    }

    /// Logits of the probabilities 1/15, 2/15, 4/15, 8/15, shifted.
    const DOUBLING: [f32; 4] =
        [5.0, 5.0 + std::f32::consts::LN_2, 5.0 + 2.0 * std::f32::consts::LN_2, 5.0 + 3.0 * std::f32::consts::LN_2];

    fn fifteenths(counts: [f64; 4]) -> [f64; 4] {
        let sum: f64 = counts.iter().sum();
        counts.map(|count| count / sum)
    }

    #[test]
    fn temperature_scales_the_logits() {
        assert_shares(&config(|c| c.temperature = Some(1.0)), &DOUBLING, &[], &fifteenths([1.0, 2.0, 4.0, 8.0]));
        assert_shares(&config(|c| c.temperature = Some(0.5)), &DOUBLING, &[], &fifteenths([1.0, 4.0, 16.0, 64.0]));
        assert_shares(&config(|c| c.temperature = Some(1e30)), &DOUBLING, &[], &[0.25; 4]);
        assert_shares(&config(|c| c.temperature = Some(1e-6)), &DOUBLING, &[], &[0.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn top_k_keeps_the_largest() {
        let of = |k| config(|c| (c.temperature, c.top_k) = (Some(1.0), Some(k)));
        assert_shares(&of(2), &DOUBLING, &[], &fifteenths([0.0, 0.0, 4.0, 8.0]));
        assert_shares(&of(1), &DOUBLING, &[], &[0.0, 0.0, 0.0, 1.0]);
        for all in [0, 4, 100] {
            assert_shares(&of(all), &DOUBLING, &[], &fifteenths([1.0, 2.0, 4.0, 8.0]));
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let of = |p| config(|c| (c.temperature, c.top_p) = (Some(1.0), Some(p)));
        // 8/15 = 0.533, 12/15 = 0.8, 14/15 = 0.933.
        assert_shares(&of(0.5), &DOUBLING, &[], &[0.0, 0.0, 0.0, 1.0]);
        assert_shares(&of(0.55), &DOUBLING, &[], &fifteenths([0.0, 0.0, 4.0, 8.0]));
        assert_shares(&of(0.9), &DOUBLING, &[], &fifteenths([0.0, 2.0, 4.0, 8.0]));
        assert_shares(&of(1.0), &DOUBLING, &[], &fifteenths([1.0, 2.0, 4.0, 8.0]));
        // The temperature comes first: at 2 the shares of the two largest are 0.395 and 0.280.
        let warm = config(|c| (c.temperature, c.top_p) = (Some(2.0), Some(0.55)));
        let root = std::f64::consts::SQRT_2;
        assert_shares(&warm, &DOUBLING, &[], &fifteenths([0.0, 0.0, 2.0, 2.0 * root]));
    }

    #[test]
    fn top_p_counts_from_what_top_k_left() {
        let of = |p| config(|c| (c.temperature, c.top_k, c.top_p) = (Some(1.0), Some(3), Some(p)));
        // Of the three tokens left: 8/14 = 0.571 and 12/14 = 0.857. Of all four: 0.533 and 0.8.
        assert_shares(&of(0.55), &DOUBLING, &[], &[0.0, 0.0, 0.0, 1.0]);
        assert_shares(&of(0.83), &DOUBLING, &[], &fifteenths([0.0, 0.0, 4.0, 8.0]));
        assert_shares(&of(0.9), &DOUBLING, &[], &fifteenths([0.0, 2.0, 4.0, 8.0]));
    }

    #[test]
    fn greedy_takes_the_largest_and_of_equal_ones_the_first() {
        for temperature in [None, Some(0.0), Some(1e-9)] {
            let mut sampler = Sampler::new(&config(|c| (c.temperature, c.top_k) = (temperature, Some(3)))).unwrap();
            assert_eq!(sampler.sample(&logits(&[-3.0, 7.5, 7.25, -1.0]), &[]).unwrap(), 1);
            assert_eq!(sampler.sample(&logits(&[1.0, 2.0, 2.0, f32::NEG_INFINITY]), &[]).unwrap(), 1);
        }
    }

    #[test]
    fn the_penalty_divides_positive_logits_and_multiplies_negative_ones() {
        // 4 / 2 < 3 but -1 * 2 < -1.5: each flips a choice.
        let mut sampler = Sampler::new(&config(|c| c.repetition_penalty = 2.0)).unwrap();
        assert_eq!(sampler.sample(&logits(&[4.0, 3.0, 0.0]), &[]).unwrap(), 0);
        assert_eq!(sampler.sample(&logits(&[4.0, 3.0, 0.0]), &[0, 0, 2]).unwrap(), 1);
        assert_eq!(sampler.sample(&logits(&[-1.0, -1.5, -9.0]), &[0]).unwrap(), 1);
        // Once a token, however often it occurred: 4 / 2 > 1.5. Unknown tokens are ignored.
        assert_eq!(sampler.sample(&logits(&[4.0, 1.5, 0.0]), &[0, 0, 0, 900]).unwrap(), 0);
        let mut sampler =
            Sampler::new(&config(|c| (c.repetition_penalty, c.repetition_window) = (2.0, Some(2)))).unwrap();
        assert_eq!(sampler.sample(&logits(&[4.0, 3.0, 0.0]), &[0, 2, 2]).unwrap(), 0);
        assert_eq!(sampler.sample(&logits(&[4.0, 3.0, 0.0]), &[2, 0, 2]).unwrap(), 1);
        // In a draw: ln 8 halved is ln sqrt 8.
        let drawn = config(|c| (c.temperature, c.repetition_penalty) = (Some(1.0), 2.0));
        let ln2 = std::f32::consts::LN_2;
        assert_shares(&drawn, &[0.0, ln2, 2.0 * ln2, 3.0 * ln2], &[3], &fifteenths([1.0, 2.0, 4.0, 8f64.sqrt()]));
    }

    #[test]
    fn the_seed_decides_the_draws() {
        let values: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let draws = |seed: u64, top_p: Option<f64>| {
            let mut sampler =
                Sampler::new(&config(|c| (c.temperature, c.seed, c.top_p) = (Some(1.0), seed, top_p))).unwrap();
            (0..50).map(|_| sampler.sample(&logits(&values), &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(draws(1, None), draws(1, None));
        assert_eq!(draws(1, Some(0.9)), draws(1, Some(0.9)));
        assert_ne!(draws(1, None), draws(2, None));
    }

    #[test]
    fn broken_logits_are_an_error_whatever_the_options() {
        let options = [
            config(|_| ()),
            config(|c| c.temperature = Some(1.0)),
            config(|c| (c.temperature, c.top_k, c.top_p) = (Some(1.0), Some(2), Some(0.9))),
            config(|c| c.repetition_penalty = 1.5),
        ];
        for options in &options {
            let mut sampler = Sampler::new(options).unwrap();
            let error = sampler.sample(&logits(&[0.0, f32::NAN, 2.0]), &[1]).unwrap_err().to_string();
            assert!(error.contains("token 1 is NaN (1 of 3"), "{error}");
            assert!(sampler.sample(&logits(&[f32::INFINITY, 1.0]), &[]).is_err());
            let none = sampler.sample(&logits(&[f32::NEG_INFINITY; 3]), &[]).unwrap_err().to_string();
            assert!(none.contains("every token is ruled out"), "{none}");
            assert!(sampler.sample(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap(), &[]).is_err());
            assert!(sampler.sample(&Tensor::zeros(0, DType::F32, &Device::Cpu).unwrap(), &[]).is_err());
            assert_eq!(sampler.sample(&logits(&[f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY]), &[]).unwrap(), 1);
        }
        let mut sampler = Sampler::new(&config(|c| c.repetition_penalty = 1e-30)).unwrap();
        assert!(sampler.sample(&logits(&[1e20, 0.0]), &[0]).is_err());
    }

    #[test]
    fn leading_dimensions_of_one_and_other_dtypes_are_taken() {
        let mut sampler = Sampler::new(&config(|_| ())).unwrap();
        let tensor = logits(&[0.0, 3.0, 1.0]).reshape((1, 1, 3)).unwrap().to_dtype(DType::BF16).unwrap();
        assert_eq!(sampler.sample(&tensor, &[]).unwrap(), 1);
    }
}
