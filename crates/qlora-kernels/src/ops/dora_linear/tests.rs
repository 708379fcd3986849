//! DoRA in f64, by PEFT's formula, and its gradients by finite differences with the norms held constant.

use super::super::linear_group::{AdapterPass, Group, LoraSlot, Member, SlotKind};
use super::*;
use crate::testing::{assert_close, numeric_gradient, random, to_f64};
use crate::weight::{PlainData, PlainWeight, WeightCache};

const IN: usize = 7;
const OUT: usize = 5;
const R: usize = 2;
const TOKENS: usize = 9;
const SCALE: f32 = 0.75;

struct Case {
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    residual: Vec<f32>,
    /// A, B, m.
    flat: Vec<f32>,
    dropout: Option<(f32, u64)>,
}

/// Of the part that is trained, in f64.
fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
    let row = |a: &[f64]| b.chunks_exact(k).map(|b| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect::<Vec<_>>();
    a.chunks_exact(k).flat_map(row).collect()
}

impl Case {
    fn new(dropout: Option<(f32, u64)>) -> Self {
        let mut random = random(11);
        let (x, weight, bias) = (random(TOKENS * IN), random(OUT * IN), random(OUT));
        let (residual, flat) = (random(TOKENS * OUT), random(R * IN + OUT * R + OUT));
        Self { x, weight, bias, residual, flat, dropout }
    }

    fn mask(&self) -> Option<Dropout> {
        self.dropout.map(|(p, seed)| Dropout { p, seed, stream: 3, first_row: 0 })
    }

    /// `n` of the parameters as they are: a constant in the backward.
    fn norms(&self) -> Vec<f64> {
        let flat = to_f64(&self.flat);
        let (a, b) = (&flat[..R * IN], &flat[R * IN..][..OUT * R]);
        let row = |i: usize| {
            let of = |k: usize| {
                let low: f64 = (0..R).map(|r| b[i * R + r] * a[r * IN + k]).sum();
                (f64::from(self.weight[i * IN + k]) + f64::from(SCALE) * low).powi(2)
            };
            (0..IN).map(of).sum::<f64>().sqrt()
        };
        (0..OUT).map(row).collect()
    }

    /// PEFT's formula: the base's result, and on top of it `(g - 1) d W^T + g s S B^T`.
    fn reference(&self, x: &[f64], flat: &[f64]) -> Vec<f64> {
        let norms = self.norms();
        let (a, b, m) = (&flat[..R * IN], &flat[R * IN..][..OUT * R], &flat[R * IN + OUT * R..]);
        let drop = |(x, i): (&f64, u64)| match self.mask() {
            None => *x,
            Some(mask) if mask.keeps(i) => x / (1.0 - f64::from(mask.p)),
            Some(_) => 0.0,
        };
        let d: Vec<f64> = x.iter().zip(0..).map(drop).collect();
        let weight = to_f64(&self.weight);
        let (plain, dropped) = (product(x, &weight, IN), product(&d, &weight, IN));
        let low = product(&product(&d, a, IN), b, R);
        (0..TOKENS * OUT)
            .map(|at| {
                let j = at % OUT;
                let g = m[j] / norms[j];
                f64::from(self.residual[at])
                    + plain[at]
                    + f64::from(self.bias[j])
                    + (g - 1.0) * dropped[at]
                    + g * f64::from(SCALE) * low[at]
            })
            .collect()
    }

    fn slot(&self) -> LoraSlot {
        let (b, m) = (R * IN + OUT * R, R * IN + OUT * R + OUT);
        LoraSlot {
            a: 0..R * IN,
            b: R * IN..b,
            rank: R,
            scale: SCALE,
            stream: 3,
            kind: SlotKind::Dora(DoraPlaces { magnitude: b..m, norms: 1..1 + OUT }),
        }
    }

    fn check(&self) {
        let weight = PlainWeight::new(PlainData::F32(self.weight.clone()), OUT, IN);
        let slot = self.slot();
        let member = Member { name: "", weight: &weight, bias: Some(View::vector(&self.bias)), lora: Some(&slot) };
        let cache = WeightCache::default();
        let group = Group { members: &[member], cache: &cache, split: false };
        let workspace = Workspace::poisoned();
        let (a, b) = slot.factors(View::vector(&self.flat), IN, OUT);
        let mut inverse = vec![f32::NAN; OUT + 2];
        let out = ViewMut::vector(&mut inverse).slice_cols(1..1 + OUT);
        inverse_norms(&weight, a, b, SCALE, out).unwrap();
        assert_close("1/n", &inverse[1..=OUT], &self.norms().iter().map(|n| 1.0 / n).collect::<Vec<_>>(), 1e-6);
        let pass = AdapterPass {
            dropout: self.dropout,
            inverse_norms: Some(View::vector(&inverse)),
            ..AdapterPass::new(View::vector(&self.flat))
        };

        let mut x = self.x.clone();
        let mut y = vec![f32::NAN; TOKENS * OUT];
        let residual = View::new(&self.residual, TOKENS, OUT);
        let x_view = ViewMut::new(&mut x, TOKENS, IN);
        let y_view = ViewMut::new(&mut y, TOKENS, OUT);
        let s = group.forward(x_view, Some(&pass), Some(residual), y_view, &workspace).unwrap();
        let (x64, flat64) = (to_f64(&self.x), to_f64(&self.flat));
        assert_close("y", &y, &self.reference(&x64, &flat64), 1e-5);
        let again = group.shrink(View::new(&self.x, TOKENS, IN), Some(&pass), &workspace).unwrap();
        assert_eq!(again.parts[0].as_ref().unwrap().as_slice(), s.parts[0].as_ref().unwrap().as_slice());

        let mut dy = random(12)(TOKENS * OUT);
        let dy64 = to_f64(&dy);
        let mut dx = vec![f32::NAN; TOKENS * IN];
        let dx_view = Some(ViewMut::new(&mut dx, TOKENS, IN));
        let ds = group.backward_input(ViewMut::new(&mut dy, TOKENS, OUT), &pass, dx_view, &workspace).unwrap();
        let expected = numeric_gradient(&x64, &dy64, |x| self.reference(x, &flat64));
        assert_close("dx", &dx, &expected, 1e-5);
        let mut gradient = vec![0.5; self.flat.len()];
        let (x, dy) = (View::new(&self.x, TOKENS, IN), View::new(&dy, TOKENS, OUT));
        let target = ViewMut::vector(&mut gradient);
        group.backward_adapter(x, &s, dy, &ds, &pass, target, &workspace).unwrap();
        let mut expected = numeric_gradient(&flat64, &dy64, |flat| self.reference(&x64, flat));
        expected.iter_mut().for_each(|value| *value += 0.5);
        assert_close("d(A, B, m)", &gradient, &expected, 1e-5);
    }
}

#[test]
fn forward_and_gradients_equal_finite_differences() {
    Case::new(None).check();
    Case::new(Some((0.4, 5))).check();
}

#[test]
fn a_pass_without_norms_is_refused() {
    let case = Case::new(None);
    let weight = PlainWeight::new(PlainData::F32(case.weight.clone()), OUT, IN);
    let slot = case.slot();
    let member = Member { name: "", weight: &weight, bias: None, lora: Some(&slot) };
    let cache = WeightCache::default();
    let group = Group { members: &[member], cache: &cache, split: false };
    let pass = AdapterPass::new(View::vector(&case.flat));
    let (mut x, mut y) = (case.x.clone(), vec![0.0; TOKENS * OUT]);
    let (x, y) = (ViewMut::new(&mut x, TOKENS, IN), ViewMut::new(&mut y, TOKENS, OUT));
    let error = group.forward(x, Some(&pass), None, y, &Workspace::cpu()).unwrap_err().to_string();
    assert!(error.contains("without the norms"), "{error}");
}
