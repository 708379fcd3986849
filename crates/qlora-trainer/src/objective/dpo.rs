//! Direct preference optimization (Rafailov et al. 2023), as TRL's `DPOTrainer` computes it.
//!
//! With `c` and `r` the sums of the log-probabilities of a pair's chosen and rejected completion, and `c0` and `r0` the same
//! under the reference:
//!
//! ```text
//! u = c - c0    v = r - r0    x = beta (u - v)    S(x) = 1 / (1 + e^-x)
//! ```
//!
//! | `loss_type` | loss of a pair | dL/dc = -dL/dr |
//! |---|---|---|
//! | `sigmoid` | `-log S(x)` | `-beta S(-x)` |
//! | `hinge` | `max(0, 1 - x)` | `-beta` if `x < 1`, else 0 |
//! | `ipo` | `(u / n_c - v / n_r - 1 / (2 beta))^2` | `2 (..) / n_c`, and `-2 (..) / n_r` |
//! | `robust`, `e = label_smoothing` | `(-(1 - e) log S(x) + e log S(-x)) / (1 - 2 e)` | `-beta ((1 - e) S(-x) + e S(x)) / (1 - 2 e)` |
//!
//! The derivative of a sum is that of each of its tokens. The loss of a step is the mean over its pairs. Rewards are
//! `beta u` and `beta v`.

use serde::{Deserialize, Serialize};

use super::{Judged, Metrics, Objective, Scored};

/// TRL's `loss_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DpoLoss {
    /// The original: `-log S(x)`.
    #[default]
    Sigmoid,
    /// SLiC's hinge.
    Hinge,
    /// IPO, on means over the tokens.
    Ipo,
    /// The sigmoid loss for labels of which a share of `label_smoothing` is wrong.
    Robust,
}

/// The objective with its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Dpo {
    pub(crate) loss: DpoLoss,
    pub(crate) beta: f64,
    pub(crate) label_smoothing: f64,
}

/// Sums over the tokens of a completion.
#[derive(Clone, Copy, Debug)]
struct Side {
    log_prob: f64,
    /// The log-ratio to the reference.
    ratio: f64,
    tokens: f64,
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log S(x)`, exact for large negative x too.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

impl Dpo {
    /// The loss of a pair, and its derivatives by `c` and `r`.
    fn loss(&self, chosen: Side, rejected: Side) -> (f64, f64, f64) {
        let Self { beta, label_smoothing: e, .. } = *self;
        let x = beta * (chosen.ratio - rejected.ratio);
        let opposite = |loss: f64, by_chosen: f64| (loss, by_chosen, -by_chosen);
        match self.loss {
            DpoLoss::Sigmoid => opposite(-log_sigmoid(x), -beta * sigmoid(-x)),
            DpoLoss::Hinge => opposite((1.0 - x).max(0.0), if x < 1.0 { -beta } else { 0.0 }),
            DpoLoss::Ipo => {
                let distance = chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens - 0.5 / beta;
                (distance * distance, 2.0 * distance / chosen.tokens, -2.0 * distance / rejected.tokens)
            }
            DpoLoss::Robust => {
                let loss = (-(1.0 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1.0 - 2.0 * e);
                opposite(loss, -beta * ((1.0 - e) * sigmoid(-x) + e * sigmoid(x)) / (1.0 - 2.0 * e))
            }
        }
    }
}

impl Objective for Dpo {
    fn group_size(&self) -> usize {
        2
    }

    fn needs_reference(&self) -> bool {
        true
    }

    fn judge(&self, scored: &Scored) -> Judged {
        let targets = &scored.batch.targets;
        let mut judged = Judged { weights: vec![0.0; targets.len()], ..Judged::default() };
        for documents in scored.groups() {
            let [chosen_rows, rejected_rows] = &documents[..] else { continue };
            let side = |rows: &std::ops::Range<usize>| {
                let reference = |row: usize| scored.reference.map_or(0.0, |reference| reference[row]);
                Side {
                    log_prob: rows.clone().map(|row| scored.log_probs[row]).sum(),
                    ratio: rows.clone().map(|row| scored.log_probs[row] - reference(row)).sum(),
                    tokens: rows.clone().filter(|&row| targets[row] >= 0).count() as f64,
                }
            };
            let (chosen, rejected) = (side(chosen_rows), side(rejected_rows));
            let (loss, by_chosen, by_rejected) = self.loss(chosen, rejected);
            judged.loss += loss;
            judged.groups += 1;
            judged.weights[chosen_rows.clone()].fill(by_chosen as f32);
            judged.weights[rejected_rows.clone()].fill(by_rejected as f32);
            let (reward, other) = (self.beta * chosen.ratio, self.beta * rejected.ratio);
            super::add(&mut judged.metrics, &metrics(chosen, rejected, reward, other));
        }
        judged
    }
}

fn metrics(chosen: Side, rejected: Side, reward: f64, other: f64) -> Metrics {
    [
        ("rewards/chosen", reward),
        ("rewards/rejected", other),
        ("rewards/accuracies", f64::from(u8::from(reward > other))),
        ("rewards/margins", reward - other),
        ("logps/chosen", chosen.log_prob),
        ("logps/rejected", rejected.log_prob),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qlora_core::batch::Batch;

    /// Token log-probabilities and sums under the reference, of two pairs: chosen and rejected of each.
    const PAIRS: [(&[f64], f64); 4] = [
        (&[-0.5, -1.25, -0.25], -2.25),
        (&[-1.5, -0.75], -2.0),
        (&[-2.0, -0.125], -1.875),
        (&[-0.5, -0.5, -1.0, -0.25], -3.0),
    ];

    fn judged(dpo: &Dpo) -> (Batch, Judged) {
        let mut documents = Vec::new();
        let (mut log_probs, mut reference) = (Vec::new(), Vec::new());
        for (values, sum) in PAIRS {
            // A prompt of two tokens; the last one predicts the completion's first.
            let ids = vec![1u32; values.len() + 2];
            let labels = (0..ids.len()).map(|i| if i < 2 { -100 } else { 1 }).collect::<Vec<i64>>();
            log_probs.extend([0.0].iter().chain(values).chain(&[0.0]));
            reference.extend([0.0, sum].into_iter().chain(vec![0.0; values.len()]));
            documents.push((ids, labels));
        }
        let batch = Batch::from_documents(documents.iter().map(|(ids, labels)| (&ids[..], &labels[..])));
        let scored = Scored::new(&batch, 2, &log_probs, Some(&reference));
        let judged = dpo.judge(&scored);
        (batch, judged)
    }

    /// Loss and the weights of chosen 0, chosen 1, rejected 0, rejected 1 of TRL 1.16's `DPOTrainer._compute_loss` in f64.
    #[test]
    fn losses_and_weights_are_those_of_trl() {
        let expected = [
            (DpoLoss::Sigmoid, 0.0, 0.706428154, [-0.024375130, -0.026248959, 0.024375130, 0.026248959]),
            (DpoLoss::Hinge, 0.0, 1.025, [-0.05, -0.05, 0.05, 0.05]),
            (DpoLoss::Ipo, 0.0, 25.591362847, [-1.597222222, -2.65625, 2.395833333, 1.328125]),
            (DpoLoss::Robust, 0.1, 0.709553154, [-0.030625130, -0.032498959, 0.030625130, 0.032498959]),
        ];
        for (loss, label_smoothing, value, weights) in expected {
            let (batch, judged) = judged(&Dpo { loss, beta: 0.1, label_smoothing });
            assert_eq!(judged.groups, 2);
            assert!((judged.loss / 2.0 - value).abs() < 1e-8, "{loss:?}: {}", judged.loss / 2.0);
            let documents: Vec<_> = batch.layout.sequences().collect();
            for (document, weight) in [0, 2, 1, 3].into_iter().zip(weights) {
                for row in documents[document].clone().filter(|&row| batch.targets[row] >= 0) {
                    let got = f64::from(judged.weights[row]) / 2.0;
                    assert!((got - weight).abs() < 1e-7, "{loss:?}, document {document}: {got} {weight}");
                }
            }
        }
    }

    #[test]
    fn metrics_are_those_of_trl() {
        let (_, judged) = judged(&Dpo { loss: DpoLoss::Sigmoid, beta: 0.1, label_smoothing: 0.0 });
        let expected = [
            ("logps/chosen", -2.0625),
            ("logps/rejected", -2.25),
            ("rewards/accuracies", 0.5),
            ("rewards/chosen", 0.0),
            ("rewards/margins", -0.025),
            ("rewards/rejected", 0.025),
        ];
        for (name, value) in expected {
            assert!((judged.metrics[name] / 2.0 - value).abs() < 1e-12, "{name}: {}", judged.metrics[name] / 2.0);
        }
        assert_eq!(judged.metrics.len(), expected.len());
    }

    #[test]
    fn derivatives_are_those_of_the_losses() {
        let side = |ratio, tokens| Side { log_prob: ratio, ratio, tokens };
        for loss in [DpoLoss::Sigmoid, DpoLoss::Hinge, DpoLoss::Ipo, DpoLoss::Robust] {
            let dpo = Dpo { loss, beta: 0.3, label_smoothing: 0.2 };
            for (u, v) in [(0.5, -1.0), (-4.0, 3.0), (40.0, -20.0), (-300.0, 400.0)] {
                let at = |u, v| dpo.loss(side(u, 3.0), side(v, 5.0)).0;
                let (_, by_chosen, by_rejected) = dpo.loss(side(u, 3.0), side(v, 5.0));
                let h = 1e-5;
                for (slope, derivative) in [
                    ((at(u + h, v) - at(u - h, v)) / (2.0 * h), by_chosen),
                    ((at(u, v + h) - at(u, v - h)) / (2.0 * h), by_rejected),
                ] {
                    assert!((slope - derivative).abs() < 1e-5 * (1.0 + derivative.abs()), "{loss:?} {u} {v}");
                }
            }
        }
    }
}
