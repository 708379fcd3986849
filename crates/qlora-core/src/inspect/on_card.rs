//! A run on a card that need not be there: its plan, the longest sequence and the speed to expect, all computed.

use std::fmt;

use qlora_kernels::Dtype;

use crate::card::Card;
use crate::error::Result;
use crate::model::plan::ExpectedSpeed;
use crate::model::{BatchShape, MemoryPlan, Planner};

/// A predicted training run on a GPU: its memory plan, longest sequence and speed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OnCard {
    /// The card.
    pub card: Card,
    /// The compute type.
    pub dtype: Dtype,
    /// The memory plan: the activations that each block keeps, or the reason why nothing fits.
    pub plan: std::result::Result<MemoryPlan, String>,
    /// The longest single sequence that fits, in tokens; 0 if none does.
    pub longest: usize,
    /// The speed that the cost model expects of the plan.
    pub speed: Option<ExpectedSpeed>,
}

/// A run on `card`: micro-batches of `batch`, at most `budget` bytes, sequences of at most `limit` tokens. `planner_of` makes the
/// planner of a batch, `choose` takes its plan for so many bytes.
///
/// # Errors
/// The error of `planner_of`. That no plan fits is a result.
pub fn on_card(
    card: &Card,
    dtype: Dtype,
    batch: BatchShape,
    budget: Option<u64>,
    limit: usize,
    planner_of: impl Fn(BatchShape) -> Result<Planner>,
    choose: impl Fn(&Planner, u64) -> Result<MemoryPlan>,
) -> Result<OnCard> {
    let bytes = card.plannable(budget);
    // Of ranks that share a batch, each takes its part of the host.
    let planner_of = |batch| {
        let planner = planner_of(batch)?.with_rates(card.rates());
        let ranks = planner.context_ranks();
        Ok(planner.with_host_memory(card.host_memory / 2 / ranks))
    };
    let planner = planner_of(batch)?;
    let plan = choose(&planner, bytes);
    let speed = plan.as_ref().ok().map(|plan| planner.expected_speed(plan));
    let longest = Planner::longest_sequence(limit, bytes, |tokens| planner_of(BatchShape::uniform(1, tokens)))?;
    let plan = plan.map_err(|error| error.to_string());
    Ok(OnCard { card: card.clone(), dtype, plan, longest, speed })
}

impl fmt::Display for OnCard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { card, dtype, .. } = self;
        let gb = |bytes: f64| bytes / 1e9;
        let (major, minor) = card.compute_capability;
        writeln!(f, "on {} (computed from the table of cards; nothing was run):", card.name)?;
        writeln!(
            f,
            "  {:.1} GB of memory at {:.0} GB/s, {} multiprocessors of capability {major}.{minor} with {} KiB of shared memory, \
             {:.0} GB/s to the host",
            gb(card.memory as f64),
            gb(card.bandwidth),
            card.processors,
            card.shared_memory(),
            gb(card.rates().host)
        )?;
        match (dtype, card.has_bf16()) {
            (Dtype::Bf16, false) => {
                let what = "this card has none: set bnb_4bit_compute_dtype = \"float16\"";
                writeln!(f, "  computes in bfloat16, which {what}")?;
            }
            (Dtype::F16, false) => writeln!(f, "  computes in float16: this card has no bfloat16")?,
            _ => writeln!(f, "  computes in {}", dtype.name())?,
        }
        match &self.plan {
            Ok(plan) => writeln!(f, "  plan: {plan}")?,
            Err(why) => writeln!(f, "  no plan: {why}")?,
        }
        writeln!(
            f,
            "  the longest single sequence that fits, with at most {:.0} GB of pinned host memory: {} tokens",
            gb(card.host_memory as f64 / 2.0),
            self.longest
        )?;
        if let Some(speed) = self.speed {
            let (low, high) = speed.range(card.measured);
            let basis = if card.measured { "measured" } else { "assumed" };
            writeln!(
                f,
                "  expected speed, computed with {basis} rates: {} to {} tokens/s",
                rounded(low),
                rounded(high)
            )?;
        }
        Ok(())
    }
}

/// Two digits: an estimate.
fn rounded(number: f64) -> u64 {
    let unit = 10f64.powf((number.max(1.0).log10().floor() - 1.0).max(0.0));
    ((number / unit).round() * unit) as u64
}

#[cfg(test)]
mod tests {
    use super::super::tests::{llama_8b, lora};
    use super::super::{Precision, training_planner_of};
    use super::*;

    fn report(card: Card, sequences: usize, length: usize) -> OnCard {
        let (config, lora) = (llama_8b(), lora(16));
        let dtype = card.compute_dtype();
        let planner_of = |batch| training_planner_of(&config, &lora, Precision::Nf4Double, dtype, batch);
        let batch = BatchShape::uniform(sequences, length);
        on_card(&card, dtype, batch, None, config.max_position_embeddings, planner_of, Planner::plan).unwrap()
    }

    #[test]
    fn a_card_is_described_without_it() {
        let text = report(Card::named("RTX 4090").unwrap(), 1, 2048).to_string();
        for part in [
            "on RTX 4090 (computed",
            "computes in bfloat16\n",
            "plan: peak ",
            "longest single sequence",
            "assumed rates",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        let text = report(Card::named("T4").unwrap(), 1, 2048).to_string();
        assert!(text.contains("computes in float16: this card has no bfloat16"), "{text}");
        assert!(report(Card::named("H100").unwrap(), 1, 2048).to_string().contains("measured rates"));
    }

    #[test]
    fn a_batch_that_does_not_fit_says_why_and_what_would() {
        let small = report(Card::named("RTX 3060").unwrap().with_memory(8.0).unwrap(), 64, 2048);
        assert!(small.speed.is_none() && small.longest > 0);
        let text = small.to_string();
        assert!(text.contains("no plan: a step over 131072 tokens needs at least"), "{text}");
        assert!(!text.contains("expected speed"), "{text}");
        let none = report(Card::named("RTX 3060").unwrap().with_memory(4.0).unwrap(), 1, 64);
        assert_eq!(none.longest, 0);
    }

    #[test]
    fn longer_sequences_fit_more_memory_and_faster_cards_are_faster() {
        let card = |name: &str| report(Card::named(name).unwrap(), 1, 2048);
        let (t4, ada, hopper) = (card("T4"), card("RTX 4090"), card("H100"));
        let small = report(Card::named("RTX 3060").unwrap().with_memory(8.0).unwrap(), 1, 2048);
        assert!(small.longest < t4.longest && t4.longest <= ada.longest && ada.longest < hopper.longest);
        let speed = |on: &OnCard| on.speed.unwrap().tokens_per_second;
        assert!(speed(&t4) < speed(&ada) && speed(&ada) < speed(&hopper));
        assert_eq!([1.0, 99.4, 1234.0, 18_765.0].map(rounded), [1, 99, 1200, 19_000]);
    }
}
