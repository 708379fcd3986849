//! The initialization of an adapter: A uniform in `+-1/sqrt(in_features)`, B zero, so that the model starts unchanged. Of the
//! embedding, as in PEFT, A is zero and B from the unit normal distribution.
//!
//! This is PyTorch's `kaiming_uniform_(a = sqrt(5))`, which PEFT uses for `init_lora_weights = true`: with the gain
//! `sqrt(2 / (1 + 5))` its bound is `sqrt(3) * gain / sqrt(in_features)`. The random numbers are not PyTorch's. Every
//! matrix has a ChaCha8 stream of its own, chosen by its name: a module starts the same whatever other modules are
//! trained and in whatever order, and the numbers depend on no library's sampling code.

use super::layout::{AdapterLayout, Which};
use crate::spec::EMBEDDING;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Start values for a buffer of this layout. The same seed gives the same numbers on every machine.
pub fn init(layout: &AdapterLayout, seed: u64) -> Vec<f32> {
    let mut flat = vec![0.0; layout.len()];
    for entry in layout.entries() {
        let embedding = entry.module == EMBEDDING;
        if entry.which != (if embedding { Which::B } else { Which::A }) {
            continue;
        }
        let bound = (1.0 / (entry.cols as f64).sqrt()) as f32;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(fnv1a(entry.tensor_name().as_bytes()));
        for value in &mut flat[entry.range()] {
            if embedding {
                *value = normal(&mut rng);
                continue;
            }
            // 24 random bits: every number in [0, 1) that an f32 holds at that spacing is equally likely.
            let unit = (rng.next_u32() >> 8) as f32 / (1 << 24) as f32;
            *value = (2.0 * unit - 1.0) * bound;
        }
    }
    flat
}

/// A number of the unit normal distribution (Box and Muller's, of which one of two is taken).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    // Not 0, of which there is no logarithm.
    let mut unit = || (f64::from(rng.next_u32()) + 0.5) / 4_294_967_296.0;
    let (radius, angle) = ((-2.0 * unit().ln()).sqrt(), std::f64::consts::TAU * unit());
    (radius * angle.cos()) as f32
}

/// A hash of a buffer's bits, to see in a log whether two runs started, or stand, at the same point.
pub fn fingerprint(flat: &[f32]) -> u64 {
    flat.iter().fold(FNV_OFFSET, |hash, value| fnv1a_from(hash, &value.to_le_bytes()))
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

fn fnv1a(bytes: &[u8]) -> u64 {
    fnv1a_from(FNV_OFFSET, bytes)
}

/// FNV-1a, 64 bits: fixed by its definition, unlike the standard library's hash.
fn fnv1a_from(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::super::modules::tests::tiny_model;
    use super::super::{LoraConfig, TargetModules};
    use super::*;

    fn layout(targets: TargetModules) -> AdapterLayout {
        let config = LoraConfig { r: 16, target_modules: targets, ..Default::default() };
        AdapterLayout::for_model(&config, &tiny_model(2)).unwrap()
    }

    #[test]
    fn a_fills_its_bound_evenly_and_b_is_zero() {
        let layout = layout(TargetModules::AllLinear);
        let flat = init(&layout, 7);
        for entry in layout.entries() {
            let values = &flat[entry.range()];
            if entry.which == Which::B {
                assert!(values.iter().all(|&v| v == 0.0), "{}", entry.tensor_name());
                continue;
            }
            let (n, bound) = (values.len() as f64, 1.0 / (entry.cols as f64).sqrt());
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
            // Standard errors: bound / sqrt(3 n) for the mean, bound^2 * sqrt(4 / 45 / n) for the mean square.
            assert!(mean.abs() < 5.0 * bound / (3.0 * n).sqrt(), "{mean}");
            assert!(
                (variance - bound * bound / 3.0).abs() < 5.0 * bound * bound * (4.0 / 45.0 / n).sqrt(),
                "{variance}"
            );
            assert!(values.iter().all(|&v| f64::from(v).abs() <= bound * (1.0 + 1e-6)));
            assert!(
                values.iter().any(|&v| f64::from(v) > 0.98 * bound)
                    && values.iter().any(|&v| f64::from(v) < -0.98 * bound)
            );
        }
    }

    #[test]
    fn of_an_embedding_a_is_zero_and_b_normal() {
        let layout = layout(TargetModules::list(["q_proj", "embed_tokens"]));
        let (flat, pair) = (init(&layout, 7), layout.get("model.embed_tokens").unwrap());
        assert!(flat[pair.a.range()].iter().all(|&a| a == 0.0));
        let b: Vec<f64> = flat[pair.b.range()].iter().map(|&b| f64::from(b)).collect();
        let n = b.len() as f64;
        let (mean, square) = (b.iter().sum::<f64>() / n, b.iter().map(|b| b * b).sum::<f64>() / n);
        // Five standard errors: 1 / sqrt(n) of the mean, sqrt(2 / n) of the mean square.
        assert!(mean.abs() < 5.0 / n.sqrt() && (square - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "{mean} {square}");
    }

    #[test]
    fn a_module_starts_the_same_whatever_else_is_trained() {
        let (all, few) = (layout(TargetModules::AllLinear), layout(TargetModules::list(["up_proj"])));
        let (from_all, from_few) = (init(&all, 1), init(&few, 1));
        for module in few.modules() {
            let (a, b) = (all.get(module).unwrap().a, few.get(module).unwrap().a);
            assert_eq!(from_all[a.range()], from_few[b.range()], "{module}");
        }
        // Two modules of the same shape start differently, and so do two seeds.
        let of = |flat: &[f32], module: &str| flat[few.get(module).unwrap().a.range()].to_vec();
        assert_ne!(of(&from_few, "model.layers.0.mlp.up_proj"), of(&from_few, "model.layers.1.mlp.up_proj"));
        assert_ne!(from_few, init(&few, 2));
    }

    #[test]
    fn the_numbers_of_a_seed_do_not_change_between_versions() {
        let layout = layout(TargetModules::list(["q_proj"]));
        let flat = init(&layout, 42);
        assert_eq!(flat[..3], [-0.0011224449, -0.051621705, -0.076821506]);
        assert_eq!(fingerprint(&flat), 0x85f2_9129_e810_64e2);
        assert_ne!(fingerprint(&flat), fingerprint(&init(&layout, 43)));
    }
}
