//! The joint operations of a run's ranks in a step, an evaluation, a save.
//!
//! Micro-batch `i` of a step is that of rank `i % size`. Its number, its seed and the step's trained tokens do not depend on
//! how many ranks there are, so a step of the same micro-batches is the same step however they are spread. Where the sums are
//! made in order ([`Communicator::sums_in_order`]) it has the same bits too: rank 0 goes on from the sum so far, the others
//! begin at zero, and after every round each has the sum that one process would have accumulated. (Up to the rounding of a
//! micro-batch's gradient, which a process alone adds to the sum while it is made: where the adapter's scaling is a power of
//! two, as it is by default, that changes no bit.)
//!
//! With `context_parallel_size` ranks that follow each other form groups: micro-batch `i` is that of group `i % groups`, each rank of
//! which has a share of its tokens. A step then has the same bits for any number of groups of that size.
//!
//! [`Communicator::sums_in_order`]: crate::comm::Communicator::sums_in_order

use serde::{Deserialize, Serialize};

use super::Trainer;
use crate::comm::exchange;
use crate::data::StepBatch;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::model::{LossSum, TrainableModel};
use crate::objective::{self, Judged, Metrics};
use crate::progress::Event;
use crate::times::{Clock, OwnTimes};

/// A rank's report at the end of a step.
#[derive(Debug, Default, Serialize, Deserialize)]
struct StepReport {
    /// Whether this rank was asked to stop.
    interrupted: bool,
    /// The step's data, all of it: every rank must have the same.
    data: String,
    /// The loss sum and the metrics of each of its micro-batches.
    parts: Vec<(Bits, Vec<(String, Bits)>)>,
    times: OwnTimes,
}

/// A number as its bits: JSON has neither NaN nor infinity.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Bits(u64);

impl From<f64> for Bits {
    fn from(value: f64) -> Self {
        Self(value.to_bits())
    }
}

impl From<Bits> for f64 {
    fn from(Bits(bits): Bits) -> Self {
        Self::from_bits(bits)
    }
}

fn to_bits(metrics: Metrics) -> Vec<(String, Bits)> {
    metrics.into_iter().map(|(name, value)| (name, value.into())).collect()
}

fn from_bits(metrics: Vec<(String, Bits)>) -> Metrics {
    metrics.into_iter().map(|(name, value)| (name, value.into())).collect()
}

/// Stands for everything that a step trains on.
fn describe(batch: &StepBatch) -> String {
    let mut fingerprint = Fingerprint::new();
    for micro_batch in &batch.micro_batches {
        fingerprint.word(micro_batch.tokens.len() as u64);
        micro_batch.tokens.iter().for_each(|&token| {
            fingerprint.word(u64::from(token));
        });
    }
    let (micro_batches, tokens) = (batch.micro_batches.len(), batch.tokens());
    format!("{micro_batches} micro-batches, {tokens} tokens, {} trained, fingerprint {fingerprint}", batch.num_items)
}

/// The losses of a batch of an evaluation.
#[derive(Clone, Debug, Default)]
pub(super) struct EvalPart {
    pub(super) loss: f64,
    pub(super) trained_tokens: usize,
    pub(super) groups: usize,
    pub(super) metrics: Metrics,
}

impl From<LossSum> for EvalPart {
    fn from(LossSum { sum, trained_tokens }: LossSum) -> Self {
        Self { loss: sum, trained_tokens, ..Self::default() }
    }
}

impl EvalPart {
    pub(super) fn of(judged: Judged, trained_tokens: usize) -> Self {
        Self { loss: judged.loss, trained_tokens, groups: judged.groups, metrics: judged.metrics }
    }

    fn add(&mut self, other: &Self) {
        self.loss += other.loss;
        self.trained_tokens += other.trained_tokens;
        self.groups += other.groups;
        objective::add(&mut self.metrics, &other.metrics);
    }
}

/// The ranks' items in the order in which one process would have made them: the first of each rank, then the second.
fn in_turns<T>(ranks: Vec<Vec<T>>) -> impl Iterator<Item = T> {
    let mut ranks: Vec<_> = ranks.into_iter().map(Vec::into_iter).collect();
    let most = ranks.iter().map(ExactSizeIterator::len).max().unwrap_or(0);
    (0..most).flat_map(move |_| ranks.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>())
}

impl<M: TrainableModel> Trainer<'_, M> {
    /// The gradient of a step, summed over all ranks. Returns the sums of its losses and metrics.
    pub(super) fn gradient(&mut self, step: u64, batch: &StepBatch) -> Result<(f64, Metrics)> {
        let (rank, ranks) = (self.comm.rank(), self.comm.size());
        let (group, groups) = self.groups();
        let in_order = self.comm.sums_in_order();
        let micro_batches = batch.micro_batches.len();
        let mut own = StepReport::default();
        let mut clock = Clock::start();
        self.optimizer.grad.view_mut().fill(0.0)?;
        self.comm.at_step(step);
        for round in 0..micro_batches.div_ceil(groups) {
            // Rank 0 has the sum so far.
            if in_order && rank > 0 && round > 0 {
                self.optimizer.grad.view_mut().fill(0.0)?;
            }
            let micro_batch = round * groups + group;
            if micro_batch < micro_batches {
                let mut metrics = Metrics::new();
                let loss = self.accumulate(step, batch, micro_batch, &mut metrics)?;
                if !loss.is_finite() {
                    return Err(self.non_finite(step, batch, micro_batch, &format!("the loss is {loss}")));
                }
                own.parts.push((loss.into(), to_bits(metrics)));
                clock.computed(self.share_of(batch.micro_batches[micro_batch].tokens.len()));
            }
            self.announce_interrupt();
            self.comm.check()?;
            if in_order && ranks > 1 {
                self.sum_gradient(&mut clock)?;
            }
        }
        if !in_order {
            self.sum_gradient(&mut clock)?;
        }
        own.times = clock.finish(self.comm.receiving());
        own.interrupted = self.interrupt.requested();
        let all = if ranks == 1 {
            vec![own]
        } else {
            own.data = describe(batch);
            exchange(&mut *self.comm, "end of a step", &own)?
        };
        if let Some(other) = (1..all.len()).find(|&rank| all[rank].data != all[0].data) {
            return Err(Error::Invalid(format!(
                "step {step}: the data is not the same on all ranks: {} at rank 0, {} at rank {other}",
                all[0].data, all[other].data
            )));
        }
        self.stop_agreed |= all.iter().any(|report| report.interrupted);
        if ranks > 1 {
            self.count_times(step, &all.iter().map(|report| report.times.clone()).collect::<Vec<_>>());
        }
        let (mut loss_sum, mut sums) = (0.0, Metrics::new());
        for (loss, metrics) in in_turns(all.into_iter().map(|report| report.parts).collect()) {
            loss_sum += f64::from(loss);
            objective::add(&mut sums, &from_bits(metrics));
        }
        Ok((loss_sum, sums))
    }

    /// The number of this rank's group, and how many groups there are. The ranks of a group have the same micro-batches.
    pub(super) fn groups(&self) -> (usize, usize) {
        let context = self.context_ranks();
        (self.comm.rank() / context, self.comm.size() / context)
    }

    /// How many ranks share a micro-batch.
    pub(super) fn context_ranks(&self) -> usize {
        if self.comm.size() == 1 { 1 } else { self.config.training.context_parallel_size }
    }

    /// The tokens that this rank has of a micro-batch of so many.
    fn share_of(&self, tokens: usize) -> usize {
        let context = self.context_ranks();
        let until = |rank: usize| tokens * rank / context;
        let place = self.comm.rank() % context;
        until(place + 1) - until(place)
    }

    fn sum_gradient(&mut self, clock: &mut Clock) -> Result<()> {
        clock.sum_begins();
        self.comm.sum("gradient", self.optimizer.grad.view_mut())?;
        clock.sum_is_done();
        Ok(())
    }

    /// Adds a step's times, and names a rank that the others wait for.
    fn count_times(&mut self, step: u64, all: &[OwnTimes]) {
        self.times.add(all);
        self.progress.window.times.add(all);
        if let Some(straggler) = self.watch.add(step, all) {
            let text = straggler.describe(&self.comm.name(straggler.rank));
            if self.comm.rank() == 0 {
                tracing::info!(step, "{text}");
            }
            self.notify(&Event::Message(&format!("step {step}: {text}")));
        }
    }

    /// The first micro-batch of the step whose gradient alone is not finite, on whichever rank.
    pub(super) fn first_non_finite(&mut self, step: u64, batch: &StepBatch) -> Option<Error> {
        let (rank, ranks) = (self.comm.rank(), self.comm.size());
        let (group, groups) = self.groups();
        let mut own = None;
        for micro_batch in (group..batch.micro_batches.len()).step_by(groups) {
            match self.problem_of(step, batch, micro_batch) {
                None => {}
                // Who computes nothing more would leave the rest of its group waiting: they are told at once.
                Some(error) if self.context_ranks() > 1 && !matches!(error, Error::NonFinite { .. }) => {
                    return Some(error);
                }
                Some(error) => {
                    own.get_or_insert((micro_batch, error));
                    if self.context_ranks() == 1 {
                        break;
                    }
                }
            }
        }
        if ranks == 1 {
            return own.map(|(_, error)| error);
        }
        let found = own.as_ref().map(|(micro_batch, error)| (*micro_batch, error.to_string()));
        let all = match exchange(&mut *self.comm, "search for what is not finite", &found) {
            Ok(all) => all,
            Err(error) => return Some(error),
        };
        let named = all.into_iter().enumerate().filter_map(|(of, found)| found.map(|(at, text)| (at, of, text)));
        let (_, of, text) = named.min_by_key(|(at, ..)| *at)?;
        match own {
            Some((_, error)) if of == rank => Some(error),
            _ => Some(Error::rank(of, format!("found: {text}"))),
        }
    }

    /// An evaluation of which each rank has made a part; `None` if one of them was asked to stop.
    pub(super) fn whole_evaluation(&mut self, parts: Vec<EvalPart>, interrupted: bool) -> Result<Option<EvalPart>> {
        let all = match self.comm.size() {
            1 => vec![(interrupted, parts)],
            _ => {
                let sent =
                    |part: EvalPart| (Bits::from(part.loss), part.trained_tokens, part.groups, to_bits(part.metrics));
                let mine: (bool, Vec<_>) = (interrupted, parts.into_iter().map(sent).collect());
                let all = exchange(&mut *self.comm, "evaluation", &mine)?;
                let received = |(loss, trained_tokens, groups, metrics): (Bits, usize, usize, Vec<(String, Bits)>)| {
                    EvalPart { loss: loss.into(), trained_tokens, groups, metrics: from_bits(metrics) }
                };
                all.into_iter().map(|(asked, parts)| (asked, parts.into_iter().map(received).collect())).collect()
            }
        };
        if all.iter().any(|(interrupted, _)| *interrupted) {
            self.stop_agreed = true;
            return Ok(None);
        }
        let mut whole = EvalPart::default();
        in_turns(all.into_iter().map(|(_, parts)| parts).collect()).for_each(|part| whole.add(&part));
        Ok(Some(whole))
    }

    /// Checks that all ranks have the same parameters now: each makes every update by itself.
    pub(super) fn check_same_parameters(&mut self) -> Result<()> {
        if self.comm.size() == 1 {
            return Ok(());
        }
        let mine = Fingerprint::new().floats(&self.model.masters()?).to_string();
        let all = exchange(&mut *self.comm, "parameters", &mine)?;
        let others: Vec<_> = (1..all.len()).filter(|&rank| all[rank] != all[0]).collect();
        if others.is_empty() {
            return Ok(());
        }
        let step = self.progress.global_step;
        Err(Error::Invalid(format!(
            "after step {step} the parameters of ranks {others:?} are not those of rank 0: different GPUs, libraries or a memory \
             fault; the last checkpoint is from before it"
        )))
    }

    /// Whether no rank stops here; if one does, all do.
    pub(super) fn all_go_on(&mut self, goes_on: bool) -> Result<bool> {
        if self.comm.size() == 1 {
            return Ok(goes_on);
        }
        let all_go_on = exchange(&mut *self.comm, "answers", &goes_on)?.into_iter().all(|goes_on| goes_on);
        self.stop_agreed |= !all_go_on;
        Ok(all_go_on)
    }

    /// Waits until all ranks are here.
    pub(super) fn meet(&mut self, place: &'static str) -> Result<()> {
        if self.comm.size() > 1 {
            self.comm.gather(place, Vec::new())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_does_not_have_arrive() {
        for value in [0.1, -0.0, f64::NAN, f64::INFINITY, f64::MIN_POSITIVE / 3.0] {
            let text = serde_json::to_string(&Bits::from(value)).unwrap();
            let back: f64 = serde_json::from_str::<Bits>(&text).unwrap().into();
            assert_eq!(back.to_bits(), value.to_bits());
        }
    }

    #[test]
    fn parts_come_in_the_order_of_one_process() {
        let all = in_turns(vec![vec![0, 3, 6], vec![1, 4], vec![2, 5]]).collect::<Vec<_>>();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(in_turns::<i32>(vec![vec![], vec![]]).count(), 0);
    }
}
