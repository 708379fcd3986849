//! The table of cards. A new card is a row here.
//!
//! | column | source |
//! |---|---|
//! | memory | MiB that the driver reports, with ECC where it is on by default |
//! | bandwidth | NVIDIA's data sheets (T4, L4, A10, L40S, A100, H100, H200, B200) and product pages (GeForce) |
//! | tensor | the same: dense products in bf16 (T4: f16) with f32 sums. GeForce: 512 operations a clock of a multiprocessor at boost clock (NVIDIA's GA102, AD102 and RTX Blackwell architecture papers: f32 sums at half rate) |
//! | reached | large products in a run, see below |
//! | memory rate | H100: measured, 0.78 of its bandwidth; the others the same share |
//! | link | page-locked copies over 16 lanes of PCIe 3, 4 and 5, half of that over 8; H100, H200: 55 GB/s measured, planned with 50; the others by the ratio of the generations |
//!
//! Of large products an H100 and an H200 reach what was measured (`benches/results/step_profile.csv`), an A100 what has been published
//! of cuBLAS. The others are assumptions: 0.9 of what is stated for GeForce, whose power allows it; half for T4 and L4, whose 70 and
//! 72 W do not; 0.55 to 0.65 for A10 and L40S; 0.7 for B200, as for its predecessors.

use super::{Card, Rates};

/// The share of the stated bandwidth that passes over large tensors reach.
pub(super) const MEMORY_SHARE: f64 = 2.6 / 3.35;

/// Bytes a second of page-locked copies by the generation of PCIe, with 16 lanes.
pub(super) const LINK_GEN3: f64 = 12e9;
const LINK_GEN4: f64 = 25e9;
const LINK_GEN5: f64 = 50e9;

/// A card. See the columns' sources above.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub name: &'static str,
    compute_capability: (u32, u32),
    processors: u32,
    memory_mib: u64,
    bandwidth_gb: f64,
    tensor_tflops: f64,
    reached_tflops: f64,
    link: f64,
    measured: bool,
}

impl Row {
    pub(super) fn card(&self) -> Card {
        let bandwidth = self.bandwidth_gb * 1e9;
        // Whole gigabytes: an H100's rate to the bit.
        let memory = (MEMORY_SHARE * self.bandwidth_gb).round() * 1e9;
        Card {
            name: self.name.to_owned(),
            memory: self.memory_mib << 20,
            compute_capability: self.compute_capability,
            processors: self.processors,
            bandwidth,
            tensor: self.tensor_tflops * 1e12,
            host_memory: HOST_MEMORY,
            rates: Rates::of(self.reached_tflops * 1e12, memory, self.link),
            measured: self.measured,
        }
    }
}

/// The memory of a host of which nothing is said.
pub(super) const HOST_MEMORY: u64 = 32 << 30;

const fn row(
    name: &'static str,
    compute_capability: (u32, u32),
    processors: u32,
    memory_mib: u64,
    bandwidth_gb: f64,
    tensor_tflops: f64,
    reached_tflops: f64,
    link: f64,
) -> Row {
    let measured = false;
    Row {
        name,
        compute_capability,
        processors,
        memory_mib,
        bandwidth_gb,
        tensor_tflops,
        reached_tflops,
        link,
        measured,
    }
}

const fn measured(row: Row) -> Row {
    Row { measured: true, ..row }
}

/// All cards.
#[rustfmt::skip]
pub const ROWS: &[Row] = &[
    // name, capability, multiprocessors, MiB, GB/s, TFLOP/s stated, reached, link
    row("T4",                 (7, 5),   40,  15_110,  320.0,   65.0,   32.0, LINK_GEN3),
    row("RTX 3060",           (8, 6),   28,  12_288,  360.0,   25.5,   23.0, LINK_GEN4),
    row("RTX 3060 Ti",        (8, 6),   38,   8_192,  448.0,   32.4,   29.0, LINK_GEN4),
    row("RTX 3070",           (8, 6),   46,   8_192,  448.0,   40.6,   36.5, LINK_GEN4),
    row("RTX 3080",           (8, 6),   68,  10_240,  760.0,   59.5,   53.5, LINK_GEN4),
    row("RTX 3080 Ti",        (8, 6),   80,  12_288,  912.0,   68.2,   61.0, LINK_GEN4),
    row("RTX 3090",           (8, 6),   82,  24_576,  936.0,   71.2,   64.0, LINK_GEN4),
    row("RTX 3090 Ti",        (8, 6),   84,  24_576, 1008.0,   80.0,   72.0, LINK_GEN4),
    row("RTX 4060",           (8, 9),   24,   8_188,  272.0,   30.2,   27.0, LINK_GEN4 / 2.0),
    row("RTX 4060 Ti",        (8, 9),   34,  16_380,  288.0,   44.1,   39.5, LINK_GEN4 / 2.0),
    row("RTX 4070",           (8, 9),   46,  12_282,  504.0,   58.3,   52.5, LINK_GEN4),
    row("RTX 4070 Super",     (8, 9),   56,  12_282,  504.0,   71.0,   64.0, LINK_GEN4),
    row("RTX 4070 Ti",        (8, 9),   60,  12_282,  504.0,   80.2,   72.0, LINK_GEN4),
    row("RTX 4070 Ti Super",  (8, 9),   66,  16_376,  672.0,   88.2,   79.0, LINK_GEN4),
    row("RTX 4080",           (8, 9),   76,  16_376,  717.0,   97.5,   87.5, LINK_GEN4),
    row("RTX 4080 Super",     (8, 9),   80,  16_376,  736.0,  104.4,   94.0, LINK_GEN4),
    row("RTX 4090",           (8, 9),  128,  24_564, 1008.0,  165.2,  149.0, LINK_GEN4),
    row("RTX 5060",           (12, 0),  30,   8_151,  448.0,   38.4,   34.5, LINK_GEN5 / 2.0),
    row("RTX 5060 Ti",        (12, 0),  36,  16_311,  448.0,   47.4,   42.5, LINK_GEN5 / 2.0),
    row("RTX 5070",           (12, 0),  48,  12_227,  672.0,   61.7,   55.5, LINK_GEN5),
    row("RTX 5070 Ti",        (12, 0),  70,  16_303,  896.0,   87.9,   79.0, LINK_GEN5),
    row("RTX 5080",           (12, 0),  84,  16_303,  960.0,  112.6,  101.0, LINK_GEN5),
    row("RTX 5090",           (12, 0), 170,  32_607, 1792.0,  209.5,  188.0, LINK_GEN5),
    row("A10",                (8, 6),   72,  23_028,  600.0,  125.0,   69.0, LINK_GEN4),
    row("L4",                 (8, 9),   58,  23_034,  300.0,  121.0,   60.0, LINK_GEN4),
    row("L40S",               (8, 9),  142,  46_068,  864.0,  362.0,  235.0, LINK_GEN4),
    row("A100 80GB",          (8, 0),  108,  81_920, 2039.0,  312.0,  250.0, LINK_GEN4),
    row("A100 40GB",          (8, 0),  108,  40_960, 1555.0,  312.0,  250.0, LINK_GEN4),
    row("H100 PCIe",          (9, 0),  114,  81_559, 2000.0,  756.0,  450.0, LINK_GEN5),
    measured(row("H100",      (9, 0),  132,  81_559, 3350.0,  989.4,  700.0, LINK_GEN5)),
    measured(row("H200",      (9, 0),  132, 143_771, 4800.0,  989.4,  700.0, LINK_GEN5)),
    row("B200",               (10, 0), 148, 183_359, 8000.0, 2250.0, 1575.0, LINK_GEN5),
];

/// Words of a name that tell no two cards of the table apart, or only by their memory.
fn says_little(word: &str) -> bool {
    const WORDS: &[&str] =
        &["nvidia", "geforce", "tesla", "rtx", "sxm4", "sxm5", "sxm6", "pcie", "hbm2", "hbm2e", "hbm3", "hbm3e"];
    WORDS.contains(&word) || size(word).is_some()
}

/// Gigabytes of a word such as `80gb`.
fn size(word: &str) -> Option<u64> {
    word.strip_suffix("gb")?.parse().ok()
}

/// The words of a name: `NVIDIA A100-SXM4-40GB`, `rtx4090`, `RTX 3060 12 GB`.
fn words(name: &str) -> Vec<String> {
    let name = name.to_lowercase().replace("rtx", "rtx ");
    let mut words: Vec<String> = Vec::new();
    for word in name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
        match words.last_mut() {
            Some(last) if word == "gb" && last.bytes().all(|b| b.is_ascii_digit()) => last.push_str("gb"),
            _ => words.push(word.to_owned()),
        }
    }
    words
}

/// The row whose words are all in the name, where the name has none that would make it another card; of several the one with the
/// most words, then the nearest memory (`memory` in bytes, or the name's), then the first.
pub(super) fn find(name: &str, memory: Option<u64>) -> Option<&'static Row> {
    let asked = words(name);
    let memory = memory.or_else(|| asked.iter().find_map(|word| size(word)).map(|gb| gb << 30));
    let fits = |row: &&Row| {
        let has = words(row.name);
        let needed = |word: &&String| word.as_str() == "pcie" || !says_little(word);
        has.iter().filter(needed).count() > 0
            && has.iter().filter(needed).all(|word| asked.contains(word))
            && asked.iter().all(|word| says_little(word) || has.contains(word))
    };
    ROWS.iter().filter(fits).min_by_key(|row| {
        let shared = words(row.name).iter().filter(|word| size(word).is_none() && asked.contains(word)).count();
        let apart = memory.map_or(0, |bytes| (row.memory_mib << 20).abs_diff(bytes));
        (std::cmp::Reverse(shared), apart)
    })
}
