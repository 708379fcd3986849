//! A graphics card by its name, as flags.

use anyhow::Result;
use qlora::card::Card;

/// A card that need not be in this machine.
#[derive(clap::Args)]
pub(crate) struct CardArgs {
    /// A card by its name (`RTX 4090`, `T4`, `A100 40GB`), which need not be in this machine: its plan, the longest sequence that fits
    /// and the speed to expect, computed.
    #[arg(long)]
    card: Option<String>,
    /// That card with another memory, in GB as it is sold.
    #[arg(long, value_name = "GB", requires = "card")]
    card_memory: Option<f64>,
    /// That card behind a link to the host of so many GB/s: about 6 for PCIe 3 x8, 12 for PCIe 3 x16, 25 for PCIe 4 x16.
    #[arg(long, value_name = "GB/S", requires = "card")]
    link: Option<f64>,
    /// That card in a host with so many GB of memory; half of it may hold activations [default: 32].
    #[arg(long, value_name = "GB", requires = "card")]
    host_memory: Option<f64>,
}

impl CardArgs {
    /// The card that was named.
    ///
    /// # Errors
    /// If it is not in the table, or its memory or link make no sense.
    pub(crate) fn card(&self) -> Result<Option<Card>> {
        let Some(name) = &self.card else { return Ok(None) };
        let mut card = Card::named(name)?;
        if let Some(gb) = self.card_memory {
            card = card.with_memory(gb)?;
        }
        if let Some(rate) = self.link {
            card = card.with_host_link(rate)?;
        }
        if let Some(gb) = self.host_memory {
            card = card.with_host_memory(gb)?;
        }
        Ok(Some(card))
    }
}
