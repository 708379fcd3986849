//! The search for a plan: all choices there are, those that fit, and the fastest of them.

use super::cost::BlockCost;
use super::{Choice, MemoryPlan, Planner};
use crate::error::{Error, Result};
use crate::model::policy::Keep;

impl Planner {
    /// The fastest plan that fits `budget` bytes.
    ///
    /// # Errors
    /// If none does; the message says how much the leanest one needs.
    pub fn plan(&self, budget: u64) -> Result<MemoryPlan> {
        let mut fastest = Fastest::new(self, budget);
        for handling in self.handlings() {
            for everything in 0..=self.layers {
                let choice = Choice { everything, ..handling };
                if !self.fits(&choice, budget) {
                    break;
                }
                // More of either takes more memory.
                let rest = self.layers - everything;
                let attention = most_that(rest, |attention| self.fits(&Choice { attention, ..choice }, budget));
                for attention in [0, attention] {
                    fastest.offer(self.with_inputs(Choice { attention, ..choice }, budget));
                }
            }
        }
        fastest.plan()
    }

    /// The fastest plan in which every block recomputes (gradient checkpointing as other libraries know it). Only inputs
    /// that do not fit on the device go to the host.
    ///
    /// # Errors
    /// As [`Self::plan`].
    pub fn plan_recomputing(&self, budget: u64) -> Result<MemoryPlan> {
        let handlings = self.handlings().filter(|choice| choice.below != Keep::OffloadAttention);
        let fitting: Vec<Choice> = handlings
            .filter(|choice| self.fits(choice, budget))
            .map(|choice| self.with_inputs(choice, budget))
            .collect();
        let pinned = |choice: &Choice| self.pinned(choice);
        let least = fitting.iter().map(pinned).min();
        let mut fastest = Fastest::new(self, budget);
        fitting.into_iter().filter(|choice| Some(pinned(choice)) == least).for_each(|choice| fastest.offer(choice));
        fastest.plan()
    }

    /// The fastest plan in which nothing is recomputed and nothing leaves the device.
    ///
    /// # Errors
    /// If none fits; the message says how much it would need, and what fits.
    pub fn plan_keeping(&self, budget: u64) -> Result<MemoryPlan> {
        let mut fastest = Fastest::new(self, budget);
        let mut least = u64::MAX;
        for split in [false, true] {
            let whole = Choice { everything: self.layers, split, ..Choice::leanest_of(Keep::Input) };
            least = least.min(self.peak(&whole));
            if self.fits(&whole, budget) {
                fastest.offer(whole);
            }
        }
        fastest.plan().map_err(|_| {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            let instead = match self.plan(budget) {
                Ok(plan) => format!("gradient_checkpointing = \"auto\" fits: {plan}"),
                Err(error) => error.to_string(),
            };
            Error::Invalid(format!(
                "gradient_checkpointing = false keeps every activation of a step over {} tokens: {:.2} GB of GPU memory, \
                 {:.2} GB are there; {instead}",
                self.sizes.tokens,
                gb(least),
                gb(budget)
            ))
        })
    }

    /// The plan that needs the least memory, whatever the budget.
    pub fn leanest(&self) -> MemoryPlan {
        let allowed = self.handlings().filter(|choice| self.pinned(choice) <= self.host);
        let leanest = allowed.min_by_key(|choice| self.peak(choice)).expect("there are choices");
        self.describe(&leanest, u64::MAX)
    }

    /// The plan that keeps everything, whatever the budget.
    pub fn richest(&self) -> MemoryPlan {
        let (everything, cached) = (self.layers, self.layers);
        let choice = Choice { everything, cached, ..Choice::leanest_of(Keep::Input) };
        self.describe(&choice, u64::MAX)
    }

    fn fits(&self, choice: &Choice, budget: u64) -> bool {
        self.peak(choice) <= budget && self.pinned(choice) <= self.host
    }

    /// The same choice with as many of the inputs that would leave as fit kept on the device.
    fn with_inputs(&self, choice: Choice, budget: u64) -> Choice {
        if choice.below != Keep::Offload {
            return choice;
        }
        let rest = self.layers - choice.everything - choice.attention;
        let input = most_that(rest, |input| self.fits(&Choice { input, ..choice }, budget));
        Choice { input, ..choice }
    }

    /// All choices with which blocks keep nothing but `below`.
    fn handlings(&self) -> impl Iterator<Item = Choice> + '_ {
        const FEWEST_ROWS: u64 = 1024;
        let pieces = (0..8u32).map(|halvings| self.sizes.tokens.div_ceil(1 << halvings).next_multiple_of(128));
        let pieces = pieces.skip(1).filter(|&rows| rows >= FEWEST_ROWS && rows < self.sizes.tokens).map(Some);
        let pieces: Vec<Option<u64>> = std::iter::once(None).chain(pieces).collect();
        // In fp8 a backward needs the transposed copy, not the one that the recomputation made.
        let weights = [(true, false), (false, false), (false, true)];
        let weights = weights.into_iter().filter(|&(shared, _)| !(shared && self.sizes.fp8));
        let weights: Vec<(bool, bool)> = weights.collect();
        [Keep::Input, Keep::Offload, Keep::OffloadAttention].into_iter().flat_map(move |below| {
            let pieces = pieces.clone();
            weights.clone().into_iter().flat_map(move |(shared, split)| {
                let choice = Choice { shared, split, ..Choice::leanest_of(below) };
                pieces.clone().into_iter().map(move |mlp_rows| Choice { mlp_rows, ..choice })
            })
        })
    }
}

/// The fastest of the choices that were offered.
struct Fastest<'a> {
    planner: &'a Planner,
    budget: u64,
    cost: BlockCost,
    best: Option<(f64, Choice)>,
}

impl<'a> Fastest<'a> {
    fn new(planner: &'a Planner, budget: u64) -> Self {
        Self { planner, budget, cost: planner.cost(), best: None }
    }

    /// Takes a choice that fits, with as many blocks' weights kept as fit too.
    fn offer(&mut self, choice: Choice) {
        let Self { planner, budget, .. } = *self;
        let cached = most_that(planner.layers, |cached| planner.fits(&Choice { cached, ..choice }, budget));
        let choice = Choice { cached, ..choice };
        let seconds = planner.seconds(&self.cost, &choice);
        if self.best.is_none_or(|(least, _)| seconds < least) {
            self.best = Some((seconds, choice));
        }
    }

    fn plan(self) -> Result<MemoryPlan> {
        let Self { planner, budget, .. } = self;
        if let Some((_, choice)) = self.best {
            return Ok(planner.describe(&choice, budget));
        }
        Err(Error::Invalid(format!(
            "a step over {} tokens{} needs at least {:.2} GB of GPU memory ({:.2} GB of it for the model, its adapter \
             and the optimizer), {:.2} GB are there: use shorter sequences, fewer at a time (with more \
             gradient_accumulation_steps), or a smaller rank",
            planner.sizes.tokens,
            planner
                .sizes
                .exchange
                .map_or(String::new(), |exchange| format!(" (the share of one of {} ranks)", exchange.ranks)),
            planner.leanest().peak as f64 / 1e9,
            planner.resident as f64 / 1e9,
            budget as f64 / 1e9
        )))
    }
}

/// The largest number up to `limit` that fits, where 0 does and less fits if more does.
fn most_that(limit: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, limit);
    while low < high {
        let middle = (low + high).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}
