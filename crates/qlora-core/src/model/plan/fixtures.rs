//! Plans that were chosen before, and why: changes of rates, sizes or the search show here.
//!
//! `QLORA_WRITE_FIXTURES=1 cargo test -p qlora-core plan::fixtures` writes the files anew; what differs is then to be explained
//! in the column `why`, which stays as it was.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use qlora_kernels::Dtype;

use super::{AttentionWorkspace, BatchShape, MemoryPlan, Planner};
use crate::card::{Card, Rates};
use crate::config::ModelConfig;
use crate::inspect::{AdapterBytes, Precision, WeightBytes};
use crate::lora::{AdapterLayout, LoraConfig, TargetModules};
use crate::model::policy::Keep;

/// The shape of Llama 3.1 8B.
pub(super) fn shape_8b() -> ModelConfig {
    let text = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": false}"#;
    ModelConfig::from_json(text, Path::new("config.json")).unwrap()
}

/// A run over the 8B shape in NF4, all linear layers with r = 16 and AdamW in f32; attention takes nothing (cuDNN's nearly does)
/// or what our own kernels take.
pub(super) fn planner_8b(batch: BatchShape, own_attention: bool) -> Planner {
    let config = shape_8b();
    let lora = LoraConfig { r: 16, target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
    let layout = AdapterLayout::for_model(&lora, &config).unwrap();
    let resident = WeightBytes::of(&config, Precision::Nf4Double).total() + AdapterBytes::of(&layout).training();
    let attention = match own_attention {
        true => AttentionWorkspace::of_own_kernels(&config, batch.tokens),
        false => AttentionWorkspace::default(),
    };
    Planner::from_config(&config, &layout, Dtype::Bf16, batch, attention, resident)
}

/// A plan in a line: blocks by what they keep, from the top, then what holds for all.
pub(super) fn line(plan: &MemoryPlan) -> String {
    let mut out = String::new();
    let mut keep = plan.keep.iter().rev().peekable();
    while let Some(first) = keep.next() {
        let mut count = 1;
        while keep.next_if_eq(&first).is_some() {
            count += 1;
        }
        let name = match first {
            Keep::Nothing => "nothing",
            Keep::Input => "input",
            Keep::Offload => "offload",
            Keep::Attention => "attention",
            Keep::OffloadAttention => "offload-attention",
            Keep::Everything => "everything",
        };
        let _ = write!(out, "{count} {name} + ");
    }
    let _ = write!(out, "{} cached", plan.cached_blocks);
    for (is, what) in [(plan.shared_weights, "shared"), (plan.split_weights, "split")] {
        if is {
            let _ = write!(out, " {what}");
        }
    }
    if let Some(rows) = plan.mlp_rows {
        let _ = write!(out, " rows {rows}");
    }
    let _ = write!(out, " peak {} pinned {}", plan.peak, plan.pinned);
    out
}

/// Compares a file's rows with `rows`; its last column, `why`, is written by hand.
pub(super) fn compare(name: &str, header: &str, rows: &[String]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/plans").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    if std::env::var_os("QLORA_WRITE_FIXTURES").is_some() {
        let why = |row: &str| {
            let key = row.split(',').take(header.split(',').count() - 1).collect::<Vec<_>>().join(",");
            text.lines().find_map(|old| old.strip_prefix(&format!("{key},"))?.split_once(',').map(|(_, why)| why))
        };
        let mut out = format!("{header},why\n");
        for row in rows {
            let _ = writeln!(out, "{row},{}", why(row).unwrap_or_default());
        }
        std::fs::write(&path, out).unwrap();
        return;
    }
    let (found, whys): (Vec<&str>, Vec<&str>) =
        text.lines().skip(1).map(|line| line.rsplit_once(',').expect("a row has a reason")).unzip();
    assert_eq!(found.len(), rows.len(), "{name}");
    for (found, row) in found.iter().zip(rows) {
        assert_eq!(found, row, "{name}");
    }
    assert!(whys.iter().all(|why| !why.trim().is_empty()), "{name}: a plan without a reason");
}

/// The main job of `benches/results/main_job.csv`: the largest batch of its 4 packed bins, and of its 8 documents. Their peaks without a
/// budget are the `predicted_gb` of its rows.
pub(super) fn main_job() -> [(&'static str, BatchShape); 2] {
    let packed = BatchShape { tokens: 8192, uniform_len: None, sequences: 4, trained_tokens: 2600 };
    let docs = BatchShape { tokens: 5192, uniform_len: None, sequences: 8, trained_tokens: 1600 };
    [("packed4x2048", packed), ("docs8", docs)]
}

#[test]
fn plans_on_an_h100_are_those_that_were_measured() {
    assert_eq!(Card::named("H100").unwrap().rates(), Rates::default());
    let mut rows = Vec::new();
    for (case, batch) in main_job() {
        let planner = planner_8b(batch, false);
        for budget in [Some(8u64), Some(12), Some(16), Some(24), Some(48), None] {
            // Without a budget an H100's memory; a budget is planned to 93%, as the pool does.
            let bytes = budget.map_or(80_000_000_000, |gb| gb * 1_000_000_000) / 100 * 93;
            let plan = planner.plan(bytes).unwrap();
            let budget = budget.map_or_else(|| "none".to_owned(), |gb| gb.to_string());
            rows.push(format!("{case},{budget},{}", line(&plan)));
            // An H200 has more memory, and faster, and plans the same.
            let h200 = planner.clone().with_rates(Card::named("H200").unwrap().rates()).plan(bytes).unwrap();
            assert_eq!(line(&h200), line(&plan), "{case} {budget}");
        }
    }
    compare("h100.csv", "case,budget_gb,plan", &rows);
}

/// The cards, memories and links whose plans are kept.
const CARDS: [&str; 4] = ["RTX 3060", "RTX 4090", "T4", "L4"];
const MEMORIES: [f64; 3] = [8.0, 12.0, 24.0];
const LINKS: [f64; 3] = [6.0, 12.0, 25.0];

#[test]
fn plans_for_cards_are_those_that_were_reasoned_about() {
    let batch = BatchShape::uniform(2, 2048);
    let mut rows = Vec::new();
    for name in CARDS {
        for memory in MEMORIES {
            for link in LINKS {
                let card = Card::named(name).unwrap().with_memory(memory).unwrap().with_host_link(link).unwrap();
                let planner = planner_8b(batch, true).with_rates(card.rates()).with_host_memory(16 << 30);
                let plan = planner.plan(card.plannable(None)).unwrap();
                assert!(plan.peak <= card.plannable(None) && plan.pinned <= 16 << 30);
                rows.push(format!("{name},{memory},{link},{}", line(&plan)));
            }
        }
    }
    compare("cards.csv", "card,memory_gb,link_gb_s,plan", &rows);
}

#[test]
fn a_slower_link_takes_no_more_to_the_host() {
    let batch = BatchShape::uniform(2, 2048);
    for name in ["RTX 4090", "T4"] {
        let card = Card::named(name).unwrap().with_memory(12.0).unwrap();
        let pinned = |link: f64| {
            let card = card.clone().with_host_link(link).unwrap();
            planner_8b(batch, true).with_rates(card.rates()).plan(card.plannable(None)).unwrap().pinned
        };
        let by_link = [0.3, 2.0, 6.0, 50.0].map(pinned);
        assert!(by_link.is_sorted() && by_link[0] < by_link[3], "{name}: {by_link:?}");
    }
}

/// The rows of a file of `benches/results` whose fields are these.
fn measured(file: &str, wanted: &[(&str, &str)]) -> Vec<Vec<(String, String)>> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../benches/results").join(file);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut lines = text.lines().map(|line| line.split(',').map(str::to_owned).collect::<Vec<_>>());
    let names = lines.next().unwrap();
    let rows = lines.map(|fields| names.iter().cloned().zip(fields).collect::<Vec<_>>());
    let rows = rows.filter(|row| wanted.iter().all(|(name, value)| row.iter().any(|(n, v)| n == name && v == value)));
    rows.collect()
}

fn field<'a>(row: &'a [(String, String)], name: &str) -> &'a str {
    &row.iter().find(|(n, _)| n == name).unwrap().1
}

#[test]
fn expected_speeds_are_near_what_was_measured() {
    let mut rows = Vec::new();
    let mut add = |case: String, planner: Planner, plan: MemoryPlan, measured: f64| {
        let ratio = planner.expected_speed(&plan).tokens_per_second / measured;
        assert!((0.94..1.14).contains(&ratio), "{case}: expected / measured {ratio:.3}");
        rows.push(format!("{case},{measured:.0},{ratio:.2}"));
    };
    // Steps of one shape, all tokens trained, on an H100.
    for row in measured("train_step.csv", &[("system", "qlora"), ("commit", "d54788d"), ("targets", "all")]) {
        let (case, mode) = (field(&row, "case"), field(&row, "mode"));
        let (sequences, length) = case.split_once('x').map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap())).unwrap();
        let planner = planner_8b(BatchShape::uniform(sequences, length), false);
        let peak = (field(&row, "peak_gb").parse::<f64>().unwrap() * 1.005e9) as u64;
        let plan = match mode {
            "free" => planner.richest(),
            "lean" => planner.plan(peak).unwrap(),
            // 8-bit moments and the embedding on the host are another planner's.
            _ => continue,
        };
        let rates = Card::named("H100").unwrap().rates();
        add(format!("H100,{case} {mode}"), planner.with_rates(rates), plan, field(&row, "tok_s").parse().unwrap());
    }
    // The main job, by default, on an H200.
    for (case, batch) in main_job() {
        for row in measured("main_job.csv", &[("case", case), ("settings", "default"), ("commit", "2a5f2fd")]) {
            let card = Card::named("H200").unwrap();
            let planner = planner_8b(batch, false).with_rates(card.rates());
            let budget = field(&row, "budget_gb");
            let plan = match budget {
                "" => planner.richest(),
                gb => planner.plan(gb.parse::<u64>().unwrap() * 930_000_000).unwrap(),
            };
            let budget = if budget.is_empty() { "none" } else { budget };
            add(format!("H200,{case} budget {budget}"), planner, plan, field(&row, "tok_s").parse().unwrap());
        }
    }
    compare("measured.csv", "card,case,measured_tok_s,expected_over_measured", &rows);
}
