//! A model's sizes and memory needs, computed from its configuration alone: before it is downloaded, without its
//! weights.
//!
//! ```text
//! linear layers   f32 4n, bf16 2n, int8 n + 4 rows (one f32 a row)
//!                 4-bit: n/2 codes + 4 ceil(n/64); with double quantization n/2 + ceil(n/64) + 4 ceil(ceil(n/64)/256)
//!                 int4: n/2 codes + 8 rows ceil(cols/64) (f32 scale and zero point a group)
//! embedding, head bf16 (f32 only with f32); norms and biases f32
//! adapter         16 bytes a parameter in training: value, gradient and AdamW's two moments in f32
//! KV cache        2 x layers x key/value heads x head_dim elements a token
//! activations     Planner, the same sums that plan a run
//! ```
//!
//! Left out: the 16 to 272 table values that each 4-bit layer holds besides, the tables of rotary angles, and what the
//! driver takes.

mod on_card;
mod report;

use qlora_kernels::Dtype;

pub use self::on_card::{OnCard, on_card};
pub use self::report::{InferenceFit, inference_fit, report};
use crate::adapter::TrainedOver;
use crate::card::Card;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::{AdapterLayout, LoraConfig};
use crate::model::plan::AttentionWorkspace;
use crate::model::{BatchShape, Planner};
use crate::spec::{BlockSpec, Kind};

/// The precision of the blocks' linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precision {
    /// 32-bit.
    F32,
    /// 16-bit.
    Bf16,
    /// 8-bit, a scale a row (LLM.int8).
    Int8,
    /// 4-bit integers in groups of 64 columns, each with a scale and a zero point.
    Int4,
    /// 4-bit NF4 or FP4, blocks of 64.
    Nf4,
    /// The same with double quantization: what QLoRA trains on.
    Nf4Double,
}

impl Precision {
    /// All of them, the largest first.
    pub const ALL: [Self; 6] = [Self::F32, Self::Bf16, Self::Int8, Self::Int4, Self::Nf4, Self::Nf4Double];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
            Self::Int4 => "int4, groups of 64",
            Self::Nf4 => "nf4, fp4",
            Self::Nf4Double => "nf4 + double quantization",
        }
    }

    /// Bytes of a weight `[rows, cols]`.
    pub fn weight_bytes(self, rows: usize, cols: usize) -> u64 {
        let n = rows as u64 * cols as u64;
        let blocks = n.div_ceil(64);
        match self {
            Self::F32 => 4 * n,
            Self::Bf16 => 2 * n,
            Self::Int8 => n + 4 * rows as u64,
            Self::Int4 => n.div_ceil(2) + 8 * rows as u64 * cols.div_ceil(64) as u64,
            Self::Nf4 => n.div_ceil(2) + 4 * blocks,
            Self::Nf4Double => n.div_ceil(2) + blocks + 4 * blocks.div_ceil(256),
        }
    }
}

/// Parameters of a model by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Parameters {
    /// The blocks' linear layers, without biases.
    pub linear: u64,
    /// The embedding, and the head where it is not the embedding.
    pub embeddings: u64,
    /// Norms and biases.
    pub vectors: u64,
}

impl Parameters {
    /// Counts those of a model.
    pub fn of(config: &ModelConfig) -> Self {
        let mut parameters = Self { linear: 0, embeddings: 0, vectors: 0 };
        for tensor in config.spec().tensors() {
            let part = match (tensor.is_weight, tensor.module.role.kind()) {
                (true, Kind::Linear) => &mut parameters.linear,
                (true, Kind::Table) => &mut parameters.embeddings,
                _ => &mut parameters.vectors,
            };
            // Sizes are limited where configurations are read: all of it fits.
            *part += tensor.shape.iter().product::<usize>() as u64;
        }
        parameters
    }

    /// All parts.
    pub fn total(&self) -> u64 {
        self.linear + self.embeddings + self.vectors
    }
}

/// Bytes of a model in memory, by part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightBytes {
    /// The blocks' linear layers.
    pub linear: u64,
    /// Embedding and head.
    pub embeddings: u64,
    /// Norms and biases.
    pub vectors: u64,
}

impl WeightBytes {
    /// Those of a model whose linear layers are held in `precision`.
    pub fn of(config: &ModelConfig, precision: Precision) -> Self {
        let parameters = Parameters::of(config);
        let spec = config.spec();
        let linear = spec.linear().map(|module| precision.weight_bytes(module.rows(), module.cols())).sum();
        let element = if precision == Precision::F32 { 4 } else { 2 };
        Self { linear, embeddings: element * parameters.embeddings, vectors: 4 * parameters.vectors }
    }

    /// All parts.
    pub fn total(&self) -> u64 {
        self.linear + self.embeddings + self.vectors
    }
}

/// The memory of an adapter in training, beside the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdapterBytes {
    /// Trainable parameters.
    pub parameters: u64,
    /// The file that PEFT reads, in f32.
    pub file: u64,
    /// Values in memory.
    pub values: u64,
    /// Their gradient.
    pub gradient: u64,
    /// AdamW's two moments.
    pub optimizer: u64,
}

impl AdapterBytes {
    /// Those of an adapter.
    pub fn of(layout: &AdapterLayout) -> Self {
        let parameters = layout.len() as u64;
        let f32 = 4 * parameters;
        Self { parameters, file: f32, values: f32, gradient: f32, optimizer: 2 * f32 }
    }

    /// Values, gradient and optimizer.
    pub fn training(&self) -> u64 {
        self.values + self.gradient + self.optimizer
    }
}

/// Bytes that a token takes in the key-value cache.
pub fn kv_cache_bytes(config: &ModelConfig, dtype: Dtype) -> u64 {
    let width = |block: &BlockSpec| (block.attention.kv_heads * block.attention.head_dim) as u64;
    2 * config.spec().blocks.iter().map(width).sum::<u64>() * dtype.size() as u64
}

/// Bytes of a GPU sold as having `gb` gigabytes that a program can use: 95% of so many GiB, less 0.5 GB for the driver's
/// context and libraries.
pub fn usable_gpu_bytes(gb: u64) -> u64 {
    (gb << 30) / 100 * 95 - 500_000_000
}

/// Bytes of the weights of a model that is trained on a GPU, its linear layers held as `held` says; with `offload_embedding` the
/// embedding is in host memory (a tied one is also the head, and stays).
pub fn weights_in_training(config: &ModelConfig, held: &TrainedOver, offload_embedding: bool) -> u64 {
    let precision = match held {
        TrainedOver::Plain => Precision::Bf16,
        TrainedOver::Bits4 { config, .. } if config.double_quant => Precision::Nf4Double,
        TrainedOver::Bits4 { .. } => Precision::Nf4,
        TrainedOver::Other(name) if name.contains('8') => Precision::Int8,
        TrainedOver::Other(_) => Precision::Int4,
    };
    let mut bytes = WeightBytes::of(config, precision).total();
    if let TrainedOver::Bits4 { config: quant, .. } = held {
        // Scales are fewer where blocks are longer than 64.
        let scales = |n: u64, blocksize: u64| match n.div_ceil(blocksize) {
            blocks if quant.double_quant => blocks + 4 * blocks.div_ceil(256),
            blocks => 4 * blocks,
        };
        for module in config.spec().linear() {
            let n = module.rows() as u64 * module.cols() as u64;
            bytes = bytes + scales(n, quant.blocksize as u64) - scales(n, 64);
        }
    }
    let embedding = 2 * config.vocab_size as u64 * config.hidden_size as u64;
    if offload_embedding && !config.tie_word_embeddings { bytes - embedding } else { bytes }
}

/// The planner of a QLoRA run on a GPU in bf16: weights in `precision`, the adapter with f32 AdamW, `sequences` of `length`
/// tokens a micro-batch.
///
/// # Errors
/// If the options select no layer, or there is no token.
pub fn training_planner(
    config: &ModelConfig,
    lora: &LoraConfig,
    precision: Precision,
    sequences: usize,
    length: usize,
) -> Result<Planner> {
    training_planner_of(config, lora, precision, Dtype::Bf16, shape(sequences, length)?)
}

/// [`training_planner`] for a micro-batch of any form, computing in `dtype`.
///
/// # Errors
/// If the options select no layer.
pub fn training_planner_of(
    config: &ModelConfig,
    lora: &LoraConfig,
    precision: Precision,
    dtype: Dtype,
    batch: BatchShape,
) -> Result<Planner> {
    let layout = AdapterLayout::for_model(lora, config)?;
    let resident = WeightBytes::of(config, precision).total() + AdapterBytes::of(&layout).training();
    let attention = AttentionWorkspace::of_own_kernels(config, batch.tokens);
    Ok(Planner::from_config(config, &layout, dtype, batch, attention, resident))
}

/// A QLoRA run as in [`report`] on a card, which need not be in this machine.
///
/// # Errors
/// As [`report`].
pub fn report_on_card(
    config: &ModelConfig,
    lora: &LoraConfig,
    card: &Card,
    sequences: usize,
    length: usize,
) -> Result<OnCard> {
    let (batch, dtype, limit) = (shape(sequences, length)?, card.compute_dtype(), config.max_position_embeddings);
    let planner_of = |batch| training_planner_of(config, lora, Precision::Nf4Double, dtype, batch);
    on_card(card, dtype, batch, None, limit, planner_of, Planner::plan)
}

fn shape(sequences: usize, length: usize) -> Result<BatchShape> {
    let tokens = sequences.checked_mul(length).filter(|&tokens| tokens > 0 && i32::try_from(tokens).is_ok());
    match tokens {
        Some(_) => Ok(BatchShape::uniform(sequences, length)),
        None => Err(Error::Invalid(format!("{sequences} x {length} is no shape of a micro-batch"))),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::lora::TargetModules;
    use crate::open::{OpenOptions, open_config};

    /// Llama 3.1 8B's configuration, as published.
    pub(super) fn llama_8b() -> ModelConfig {
        let text = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
            "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": false,
            "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "torch_dtype": "bfloat16"}"#;
        ModelConfig::from_json(text, Path::new("config.json")).unwrap()
    }

    pub(super) fn lora(r: usize) -> LoraConfig {
        LoraConfig { r, target_modules: TargetModules::AllLinear, ..LoraConfig::default() }
    }

    #[test]
    fn llama_8b_by_hand() {
        let config = llama_8b();
        let parameters = Parameters::of(&config);
        assert_eq!(parameters.total(), 8_030_261_248);
        // A block: q and o 4096 x 4096, k and v 1024 x 4096, gate, up and down 14336 x 4096.
        assert_eq!(parameters.linear, 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096));
        assert_eq!(parameters.embeddings, 2 * 128_256 * 4096);
        assert_eq!(parameters.vectors, 65 * 4096);
        let bytes = |precision| WeightBytes::of(&config, precision).linear;
        assert_eq!(bytes(Precision::Nf4Double), 3_600_416_768);
        // n/2 + n/16
        assert_eq!(bytes(Precision::Nf4), 6_979_321_856 / 16 * 9);
        assert_eq!(bytes(Precision::Bf16), 2 * 6_979_321_856);
        assert_eq!(bytes(Precision::F32), 4 * 6_979_321_856);
        let rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096);
        assert_eq!(bytes(Precision::Int8), 6_979_321_856 + 4 * rows);
        assert_eq!(WeightBytes::of(&config, Precision::Bf16).embeddings, 4 * 128_256 * 4096);
        // 32 layers, keys and values, 8 heads of 128, 2 bytes.
        assert_eq!(kv_cache_bytes(&config, Dtype::Bf16), 131_072);
        // All linear layers, r = 16: 16 (in + out) each.
        let layout = AdapterLayout::for_model(&lora(16), &config).unwrap();
        let adapter = AdapterBytes::of(&layout);
        assert_eq!(adapter.parameters, 41_943_040);
        assert_eq!((adapter.training(), adapter.file), (671_088_640, 167_772_160));
    }

    #[test]
    fn an_odd_weight_fills_its_last_block_and_byte() {
        // 65 elements: 33 bytes of codes, 2 blocks.
        assert_eq!(Precision::Nf4.weight_bytes(5, 13), 33 + 8);
        assert_eq!(Precision::Nf4Double.weight_bytes(5, 13), 33 + 2 + 4);
    }

    #[test]
    fn bytes_are_those_of_real_weights() {
        use qlora_kernels::quant::{IntBits, IntConfig, QuantConfig, Quantized4bit, QuantizedInt};
        use qlora_kernels::weight::FrozenWeight;
        use qlora_kernels::weight::PlainData;

        let (rows, cols) = (37, 131);
        let data = PlainData::F32((0..rows * cols).map(|i| (i % 17) as f32 - 8.0).collect());
        let nf4 = |double_quant| {
            let config = QuantConfig { double_quant, ..QuantConfig::default() };
            // The tables besides: 16 f32 values, and 256 with the nested scales.
            Quantized4bit::quantize(&data, rows, cols, &config).unwrap().bytes() as u64
        };
        let int4 = IntConfig { bits: IntBits::Four, group_size: Some(64), zero_point: true };
        let int4 = QuantizedInt::quantize(&data, rows, cols, &int4).unwrap().bytes() as u64;
        let int8 = QuantizedInt::llm_int8(&data, rows, cols, 0.0, &[]).unwrap().bytes() as u64;
        assert_eq!(Precision::Int4.weight_bytes(rows, cols), int4);
        assert_eq!(Precision::Int8.weight_bytes(rows, cols), int8);
        let tables = |real: u64, computed: u64| (computed..=computed + 4 * 272 + 4).contains(&real);
        assert!(tables(nf4(false), Precision::Nf4.weight_bytes(rows, cols)), "{}", nf4(false));
        assert!(tables(nf4(true), Precision::Nf4Double.weight_bytes(rows, cols)), "{}", nf4(true));
    }

    #[test]
    fn the_planned_peaks_of_llama_8b_are_those_that_were_measured() {
        // Measured steps on an H100, all linear layers, r = 16: the leanest took 7.19 GB at 4x2048 and 6.69 at 2x512, those that
        // keep everything 46.01 and 23.96. There, cuDNN's attention ran; everything else is the same.
        for (sequences, length, lean, free) in [(4, 2048, 7.19, 46.01), (2, 512, 6.69, 23.96)] {
            let planner = training_planner(&llama_8b(), &lora(16), Precision::Nf4Double, sequences, length).unwrap();
            let near = |plan: crate::model::MemoryPlan, measured: f64| {
                let ratio = plan.peak as f64 / 1e9 / measured;
                assert!((0.97..1.06).contains(&ratio), "{plan} measured {measured}");
            };
            near(planner.leanest(), lean);
            near(planner.richest(), free);
        }
    }

    #[test]
    fn weights_in_training_are_what_the_precision_takes() {
        use qlora_kernels::quant::QuantConfig;

        let config = llama_8b();
        let four = |blocksize, double_quant| {
            let config = QuantConfig { blocksize, double_quant, ..QuantConfig::default() };
            TrainedOver::Bits4 { config, stored: false }
        };
        let of = |held: &TrainedOver| weights_in_training(&config, held, false);
        let total = |precision| WeightBytes::of(&config, precision).total();
        assert_eq!(of(&four(64, true)), total(Precision::Nf4Double));
        assert_eq!(of(&four(64, false)), total(Precision::Nf4));
        // A quarter of the scales, 4 bytes each.
        assert_eq!(of(&four(64, false)) - of(&four(256, false)), 6_979_321_856 / 64 * 4 * 3 / 4);
        assert_eq!(of(&TrainedOver::Plain), total(Precision::Bf16));
        assert_eq!(of(&TrainedOver::Other("LLM.int8".into())), total(Precision::Int8));
        assert_eq!(of(&TrainedOver::Other("GPTQ 4-bit".into())), total(Precision::Int4));
        let offloaded = weights_in_training(&config, &four(64, true), true);
        assert_eq!(of(&four(64, true)) - offloaded, 2 * 128_256 * 4096);
    }

    #[test]
    fn larger_gpus_take_richer_plans() {
        let planner = training_planner(&llama_8b(), &lora(16), Precision::Nf4Double, 4, 2048).unwrap();
        assert!(planner.plan(usable_gpu_bytes(8)).is_err() || planner.leanest().peak <= usable_gpu_bytes(8));
        let kept = |gb| {
            let plan = planner.plan(usable_gpu_bytes(gb)).unwrap();
            assert!(plan.peak <= usable_gpu_bytes(gb));
            plan.keep.iter().filter(|&&keep| keep == crate::model::Keep::Everything).count()
        };
        assert!(kept(16) < kept(24) && kept(24) < kept(48));
        assert_eq!(kept(80), 32);
        assert!(training_planner(&llama_8b(), &lora(16), Precision::Nf4Double, 0, 2048).is_err());
        assert!(training_planner(&llama_8b(), &lora(16), Precision::Nf4Double, usize::MAX, 2).is_err());
        let nothing = LoraConfig { target_modules: TargetModules::list(["query"]), ..LoraConfig::default() };
        assert!(training_planner(&llama_8b(), &nothing, Precision::Nf4Double, 1, 8).is_err());
    }

    #[test]
    fn a_configuration_is_enough() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let text =
            llama_8b().to_json().replacen('{', r#"{"quantization_config": {"quant_method": "bitsandbytes"},"#, 1);
        std::fs::write(&path, text).unwrap();
        for spec in [path.as_path(), folder.path()] {
            let config = open_config(spec.to_str().unwrap(), &OpenOptions::default()).unwrap();
            assert_eq!(Parameters::of(&config).total(), 8_030_261_248);
        }
        std::fs::write(&path, "[]").unwrap();
        let error = open_config(path.to_str().unwrap(), &OpenOptions::default()).unwrap_err().to_string();
        assert!(error.contains("config.json") && error.contains("JSON object"), "{error}");
        std::fs::remove_file(&path).unwrap();
        let error = open_config(folder.path().to_str().unwrap(), &OpenOptions::default()).unwrap_err().to_string();
        assert!(error.contains("neither config.json nor a .gguf file"), "{error}");
    }
}
