//! Formats the figures of [`inspect`](super) for a model as readable text.

use std::fmt::Write;

use qlora_kernels::Dtype;

use super::{AdapterBytes, Parameters, Precision, WeightBytes, kv_cache_bytes, training_planner, usable_gpu_bytes};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::lora::{AdapterLayout, LoraConfig};
use crate::model::Keep;
use crate::model::Planner;

/// Gigabytes that GPUs are sold with.
const GPUS: [u64; 8] = [8, 12, 16, 24, 40, 48, 80, 141];

/// The least cache that is of use, in tokens.
const LEAST_CACHE: u64 = 1024;

/// The highest precision that fits a given memory, and the cache tokens that fit beside the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InferenceFit {
    /// The highest of bf16, int8 and NF4 with double quantization whose weights fit.
    pub precision: Precision,
    /// Tokens of bf16 cache beside them, of all sequences together.
    pub tokens: u64,
}

/// Whether a model generates in `usable` bytes: weights and at least 1024 tokens of bf16 key-value cache.
pub fn inference_fit(config: &ModelConfig, usable: u64) -> Option<InferenceFit> {
    [Precision::Bf16, Precision::Int8, Precision::Nf4Double].into_iter().find_map(|precision| {
        let left = usable.checked_sub(WeightBytes::of(config, precision).total())?;
        let tokens = left / kv_cache_bytes(config, Dtype::Bf16);
        (tokens >= LEAST_CACHE).then_some(InferenceFit { precision, tokens })
    })
}

/// Everything about a model called `name`: parameters, bytes in each precision, an adapter, the key-value cache, a training
/// step of `sequences` of `length` tokens, and the GPUs it fits. Several lines, the last one ended.
///
/// # Errors
/// If `lora` selects no layer, or there is no token.
pub fn report(name: &str, config: &ModelConfig, lora: &LoraConfig, sequences: usize, length: usize) -> Result<String> {
    let layout = AdapterLayout::for_model(lora, config)?;
    let planner = training_planner(config, lora, Precision::Nf4Double, sequences, length)?;
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = model(&mut out, name, config);
    let _ = adapter(&mut out, config, lora, &layout);
    let _ = cache(&mut out, config);
    let _ = step(&mut out, config, &planner, sequences, length);
    let _ = gpus(&mut out, config, &planner);
    Ok(out)
}

fn model(out: &mut String, name: &str, config: &ModelConfig) -> std::fmt::Result {
    let parameters = Parameters::of(config);
    writeln!(out, "{name}: {:?}, {} parameters", config.architecture, grouped(parameters.total()))?;
    writeln!(
        out,
        "  {} layers, width {}, {} heads of {} ({} for keys and values), MLP {}, vocabulary {}{}",
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.head_dim,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
        if config.tie_word_embeddings { ", head tied to the embedding" } else { "" }
    )?;
    writeln!(
        out,
        "  linear layers {}, embedding and head {}, norms and biases {}\n",
        grouped(parameters.linear),
        grouped(parameters.embeddings),
        grouped(parameters.vectors)
    )?;
    writeln!(out, "{:26} {:>18} {:>12}", "weights in", "linear layers", "all")?;
    for precision in Precision::ALL {
        let bytes = WeightBytes::of(config, precision);
        writeln!(out, "{:26} {:>18} {:>12}", precision.name(), size(bytes.linear), size(bytes.total()))?;
    }
    // Half of f32 is bf16.
    let more = WeightBytes::of(config, Precision::F32).embeddings / 2;
    writeln!(
        out,
        "embedding and head count as bf16, in the first row as f32; on the CPU they are f32 in every row: {} more",
        size(more)
    )
}

fn adapter(out: &mut String, config: &ModelConfig, lora: &LoraConfig, layout: &AdapterLayout) -> std::fmt::Result {
    let adapter = AdapterBytes::of(layout);
    writeln!(
        out,
        "\nadapter, r = {}, {} layers: {} parameters ({:.3}%), file {}",
        lora.r,
        layout.modules().count(),
        grouped(adapter.parameters),
        100.0 * adapter.parameters as f64 / Parameters::of(config).total() as f64,
        size(adapter.file)
    )?;
    writeln!(
        out,
        "  in training: values {}, gradient {}, AdamW {} (f32)",
        size(adapter.values),
        size(adapter.gradient),
        size(adapter.optimizer)
    )
}

fn cache(out: &mut String, config: &ModelConfig) -> std::fmt::Result {
    let token = kv_cache_bytes(config, Dtype::Bf16);
    writeln!(
        out,
        "\nKV cache, bf16: {} bytes a token, {} for the {} tokens the model takes",
        grouped(token),
        size(token * config.max_position_embeddings as u64),
        grouped(config.max_position_embeddings as u64)
    )
}

fn step(
    out: &mut String,
    config: &ModelConfig,
    planner: &Planner,
    sequences: usize,
    length: usize,
) -> std::fmt::Result {
    let (lean, free) = (planner.leanest(), planner.richest());
    writeln!(out, "\nQLoRA step of {sequences}x{length} tokens in bf16, f32 AdamW:")?;
    if length > config.max_position_embeddings {
        let limit = grouped(config.max_position_embeddings as u64);
        writeln!(out, "  (longer than the {limit} tokens that the model takes: such a run is refused)")?;
    }
    writeln!(out, "  weights, adapter and optimizer {}", size(lean.resident))?;
    writeln!(
        out,
        "  activations {} at least, {} where everything is kept",
        size(lean.peak - lean.resident),
        size(free.peak - free.resident)
    )
}

fn gpus(out: &mut String, config: &ModelConfig, planner: &Planner) -> std::fmt::Result {
    writeln!(out, "\n{:>7} {:>11}  {:28} training step", "GPU, GB", "usable", "weights, tokens of KV cache")?;
    for gb in GPUS {
        let usable = usable_gpu_bytes(gb);
        let inference = match inference_fit(config, usable) {
            Some(InferenceFit { precision: Precision::Nf4Double, tokens }) => format!("nf4, {}", grouped(tokens)),
            Some(InferenceFit { precision, tokens }) => format!("{}, {}", precision.name(), grouped(tokens)),
            None => "does not fit".to_owned(),
        };
        writeln!(out, "{gb:>7} {:>11}  {inference:28} {}", size(usable), step_on(planner, usable))?;
    }
    Ok(())
}

/// The plan of a step in `usable` bytes.
fn step_on(planner: &Planner, usable: u64) -> String {
    match planner.plan(usable) {
        Ok(plan) => {
            let count = |keep: Keep| plan.keep.iter().filter(|&&k| k == keep).count();
            let what = match (count(Keep::Everything), plan.keep.len()) {
                (kept, all) if kept == all => "keeps all activations".to_owned(),
                _ if count(Keep::Offload) > 0 => "recomputes, inputs in host memory".to_owned(),
                (kept, all) => format!("keeps {kept} of {all} blocks, recomputes the others"),
            };
            format!("{}: {what}", size(plan.peak))
        }
        Err(_) => format!("does not fit: {} are needed", size(planner.leanest().peak)),
    }
}

/// Decimal units with three or more digits: kilobytes below 1 MB, megabytes below 1 GB.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// Digits in groups of three.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::tests::{llama_8b, lora};
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!(
            ["0", "999", "1,000", "8,030,261,248"],
            [0, 999, 1000, 8_030_261_248].map(grouped).each_ref().map(|s| &**s)
        );
        let sizes = [744, 999_999, 1_000_000, 167_772_160, 1_000_000_000, 16_060_522_496].map(size);
        assert_eq!(
            ["0.7 kB", "1000.0 kB", "1.0 MB", "167.8 MB", "1.00 GB", "16.06 GB"],
            sizes.each_ref().map(|s| &**s)
        );
    }

    #[test]
    fn what_fits_is_the_highest_precision_with_room_for_a_cache() {
        let config = llama_8b();
        let fit = |gb| inference_fit(&config, usable_gpu_bytes(gb));
        assert_eq!(fit(80).unwrap().precision, Precision::Bf16);
        assert_eq!(fit(16).unwrap().precision, Precision::Int8);
        assert_eq!(fit(8).unwrap().precision, Precision::Nf4Double);
        assert_eq!(fit(4), None);
        // To the byte: one token less than what is needed does not count.
        let weights = WeightBytes::of(&config, Precision::Bf16).total();
        let at = |tokens: u64| inference_fit(&config, weights + tokens * 131_072).unwrap();
        assert_eq!(at(1024), InferenceFit { precision: Precision::Bf16, tokens: 1024 });
        assert_eq!(at(1023).precision, Precision::Int8);
    }

    #[test]
    fn a_report_says_what_a_user_asks() {
        let text = report("some/model", &llama_8b(), &lora(16), 4, 2048).unwrap();
        for line in [
            "some/model: Llama, 8,030,261,248 parameters",
            "32 layers, width 4096, 32 heads of 128 (8 for keys and values), MLP 14336, vocabulary 128256\n",
            "adapter, r = 16, 224 layers: 41,943,040 parameters (0.522%), file 167.8 MB",
            "values 167.8 MB, gradient 167.8 MB, AdamW 335.5 MB (f32)",
            "KV cache, bf16: 131,072 bytes a token, 17.18 GB for the 131,072 tokens the model takes",
            "QLoRA step of 4x2048 tokens in bf16, f32 AdamW:\n  weights",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
        // 2 x 128,256 x 4096, two bytes each.
        assert!(text.contains("on the CPU they are f32 in every row: 2.10 GB more\n"), "{text}");
        let row = |start: &str| {
            text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}\n{text}"))
        };
        assert!(row("nf4 + double").ends_with("5.70 GB"), "{text}");
        assert!(row("     80").contains("bf16, 4") && row("     80").ends_with("keeps all activations"), "{text}");
        assert!(row("     24").contains("blocks, recomputes the others"), "{text}");
        assert!(text.ends_with('\n') && !text.contains("NaN"));

        let long = report("m", &llama_8b(), &lora(16), 1, 200_000).unwrap();
        assert!(long.contains("longer than the 131,072 tokens that the model takes"), "{long}");
        assert!(long.contains("8     7.66 GB") && long.contains("does not fit: "), "{long}");
        assert!(report("m", &llama_8b(), &lora(16), 0, 8).is_err());
    }
}
