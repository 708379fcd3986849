//! Graphics cards as the planner sees them: memory, rates and limits, from a table ([`table`]), for a card that need not be in
//! this machine.
//!
//! ```
//! use qlora_core::card::Card;
//!
//! # fn main() -> qlora_core::Result<()> {
//! let card = Card::named("RTX 4090")?.with_host_link(12.0)?;
//! assert!(card.has_bf16() && card.rates().host == 12e9);
//! assert_eq!(Card::named("T4")?.compute_dtype().name(), "float16");
//! # Ok(())
//! # }
//! ```

mod rates;
pub mod table;

use qlora_kernels::Dtype;

pub use self::rates::{MeasuredRates, Rates};
use crate::error::{Error, Result};

/// A graphics card.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Card {
    /// The name of the GPU: `RTX 4090`.
    pub name: String,
    /// Bytes of memory that its driver reports.
    pub memory: u64,
    /// Compute capability, major and minor.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub processors: u32,
    /// Bytes a second between the card and its memory, as its maker states.
    pub bandwidth: f64,
    /// Operations a second in dense 16-bit products with sums in f32, as its maker states.
    pub tensor: f64,
    /// Bytes of the host's memory, of which plans may page-lock half; 32 GiB if nothing else is said.
    pub host_memory: u64,
    /// The rates that plans are ranked with.
    rates: Rates,
    /// Whether those rates were measured on such a card.
    pub measured: bool,
}

impl Card {
    /// A card of the table by its name, in any spelling: `RTX 4090`, `rtx4090`, `NVIDIA GeForce RTX 4090`, `A100 40GB`.
    ///
    /// # Errors
    /// If no card of the table is called so; the message names all that are there.
    pub fn named(name: &str) -> Result<Self> {
        table::find(name, None).map(table::Row::card).ok_or_else(|| {
            let names: Vec<&str> = table::ROWS.iter().map(|row| row.name).collect();
            Error::Invalid(format!(
                "no card {name:?} in the table; there are {}. Another card plans as the nearest of them with its own memory and link",
                names.join(", ")
            ))
        })
    }

    /// All cards of the table.
    pub fn all() -> Vec<Self> {
        table::ROWS.iter().map(table::Row::card).collect()
    }

    /// The card behind what a driver says of a device: the row of the table with its name, or, where there is none, rates by its
    /// architecture. `clock` in Hz, `bandwidth` in bytes a second.
    pub fn of_device(
        name: &str,
        compute_capability: (u32, u32),
        processors: u32,
        clock: f64,
        bandwidth: f64,
        memory: u64,
    ) -> Self {
        if let Some(row) = table::find(name, Some(memory)) {
            return Self { memory, ..row.card() };
        }
        // Operations a clock of one multiprocessor: halved on cards for games, which sum in f32 at half rate.
        let each = match compute_capability {
            (..=7, _) => 1024.0,
            (8, 0) => 2048.0,
            (8, _) | (12.., _) => 512.0,
            (9, _) => 4096.0,
            _ => 8192.0,
        };
        let tensor = each * f64::from(processors) * clock;
        let rates = Rates::of(0.7 * tensor, table::MEMORY_SHARE * bandwidth, table::LINK_GEN3);
        let name = name.to_owned();
        let host_memory = table::HOST_MEMORY;
        Self { name, memory, compute_capability, processors, bandwidth, tensor, host_memory, rates, measured: false }
    }

    /// The card of a GPU.
    ///
    /// # Errors
    /// If the driver fails.
    #[cfg(feature = "cuda")]
    pub fn of_gpu(gpu: &qlora_kernels::cuda::Gpu) -> Result<Self> {
        let facts = gpu.facts()?;
        let (capability, processors) = (facts.compute_capability, facts.processors);
        Ok(Self::of_device(gpu.model(), capability, processors, facts.clock, facts.bandwidth, facts.memory))
    }

    /// The same card sold with `gb` gigabytes, of which its driver reports 95%.
    ///
    /// # Errors
    /// If that is less than 1 or more than 1024.
    pub fn with_memory(self, gb: f64) -> Result<Self> {
        if !(1.0..=1024.0).contains(&gb) {
            return Err(Error::Invalid(format!("{gb} GB is no memory of a card: from 1 to 1024")));
        }
        Ok(Self { memory: (gb * 0.95 * f64::from(1 << 30)) as u64, ..self })
    }

    /// The same card behind a link to the host's memory over which page-locked copies run at `gb` gigabytes (10^9 bytes) a second:
    /// about 6 for PCIe 3 with 8 lanes, 12 for PCIe 3 with 16, 25 for PCIe 4 with 16, 50 for PCIe 5 with 16.
    ///
    /// # Errors
    /// If that is less than 0.1 or more than 1000.
    pub fn with_host_link(self, gb: f64) -> Result<Self> {
        if !(0.1..=1000.0).contains(&gb) {
            return Err(Error::Invalid(format!("{gb} GB/s is no rate of a link: from 0.1 to 1000")));
        }
        Ok(Self { rates: Rates { host: gb * 1e9, ..self.rates }, ..self })
    }

    /// The same card in a host with `gb` GiB of memory.
    ///
    /// # Errors
    /// If that is less than 1 or more than 65536.
    pub fn with_host_memory(self, gb: f64) -> Result<Self> {
        if !(1.0..=65536.0).contains(&gb) {
            return Err(Error::Invalid(format!("{gb} GB is no memory of a host: from 1 to 65536")));
        }
        Ok(Self { host_memory: (gb * f64::from(1 << 30)) as u64, ..self })
    }

    /// The rates that plans are ranked with.
    pub fn rates(&self) -> Rates {
        self.rates
    }

    /// Bytes that a run can have: what the driver reports less 0.5 GB for its context and libraries.
    pub fn usable(&self) -> u64 {
        self.memory.saturating_sub(500_000_000)
    }

    /// Bytes that a plan can be for: 93% of what can be used (the pool cannot join free pieces), or of `budget`.
    pub fn plannable(&self, budget: Option<u64>) -> u64 {
        self.usable().min(budget.unwrap_or(u64::MAX)) / 100 * 93
    }

    /// Whether it multiplies in bf16: from compute capability 8.0 on.
    pub fn has_bf16(&self) -> bool {
        self.compute_capability >= (8, 0)
    }

    /// The default compute type: bfloat16 where the GPU has it, else float16.
    pub fn compute_dtype(&self) -> Dtype {
        if self.has_bf16() { Dtype::Bf16 } else { Dtype::F16 }
    }

    /// The most shared memory of a block, in KiB.
    ///
    /// Source: CUDA C++ programming guide, technical specifications per compute capability.
    pub fn shared_memory(&self) -> u32 {
        match self.compute_capability {
            (..=7, _) => 64,
            (8, 0 | 7) => 163,
            (8, _) | (12.., _) => 99,
            _ => 227,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_in_any_spelling() {
        let named = |name: &str| Card::named(name).map(|card| card.name);
        for name in ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "4090", " RTX  4090 "] {
            assert_eq!(named(name).unwrap(), "RTX 4090", "{name}");
        }
        for (name, found) in [
            ("Tesla T4", "T4"),
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA H100 PCIe", "H100 PCIe"),
            ("NVIDIA H200", "H200"),
            ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
            ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
            ("A100 40 GB", "A100 40GB"),
            ("A100", "A100 80GB"),
            ("RTX 3060 12 GB", "RTX 3060"),
            ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
            ("NVIDIA GeForce RTX 4060 Ti", "RTX 4060 Ti"),
        ] {
            assert_eq!(named(name).unwrap(), found, "{name}");
        }
        // Other chips under names that begin alike.
        for name in ["NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 D", "A10G", "RTX", "", "GTX 1080", "GB"] {
            let error = named(name).unwrap_err().to_string();
            assert!(error.contains("RTX 5090") && error.contains("B200"), "{name}: {error}");
        }
    }

    #[test]
    fn a_device_is_its_row_with_its_own_memory() {
        let of = |name: &str, memory| Card::of_device(name, (8, 0), 108, 1.41e9, 1.5e12, memory);
        let card = of("NVIDIA A100-SXM4-40GB", 42 << 30);
        assert_eq!((card.name.as_str(), card.memory), ("A100 40GB", 42 << 30));
        // A name without its memory.
        assert_eq!(of("NVIDIA A100", 39 << 30).name, "A100 40GB");
        let unknown = of("NVIDIA PG506-232", 24 << 30);
        assert_eq!(unknown.name, "NVIDIA PG506-232");
        // 108 x 2048 x 1.41 GHz, which is what the A100's data sheet says.
        assert!((unknown.tensor / 312e12 - 1.0).abs() < 0.01 && !unknown.measured);
        assert!(unknown.rates().products > 200e12);
    }

    #[test]
    fn memory_and_link_can_be_said() {
        let card = Card::named("RTX 3060").unwrap().with_memory(8.0).unwrap().with_host_link(6.0).unwrap();
        assert_eq!(card.memory, 8_160_437_862);
        assert_eq!(card.plannable(None), (card.memory - 500_000_000) / 100 * 93);
        assert_eq!(card.plannable(Some(5_000_000_000)), 4_650_000_000);
        assert_eq!(card.rates().host, 6e9);
        assert_eq!(card.rates().products, Card::named("RTX 3060").unwrap().rates().products);
        for wrong in [0.0, -1.0, f64::NAN, 1e9] {
            assert!(card.clone().with_memory(wrong).is_err() && card.clone().with_host_link(wrong).is_err());
        }
    }

    #[test]
    fn the_table_is_plausible() {
        for card in Card::all() {
            let rates = card.rates();
            let share = |reached: f64, stated: f64| (0.3..1.0).contains(&(reached / stated));
            assert!(share(rates.products, card.tensor), "{card:?}");
            assert!(share(rates.memory, card.bandwidth), "{card:?}");
            assert!(rates.attention < rates.products && rates.host < rates.memory, "{card:?}");
            assert_eq!(Card::named(&card.name).unwrap(), card);
            assert_eq!(card.has_bf16(), card.name != "T4");
            assert!(card.usable() < card.memory);
        }
        for name in [
            "T4", "L4", "RTX 3060", "RTX 3070", "RTX 3080", "RTX 3090", "RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090",
            "RTX 5060", "RTX 5070", "RTX 5080", "RTX 5090", "A10", "A100", "L40S", "H100", "H200", "B200",
        ] {
            Card::named(name).unwrap();
        }
    }
}
