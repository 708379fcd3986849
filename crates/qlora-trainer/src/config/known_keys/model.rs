//! Keys of transformers' `from_pretrained` and `BitsAndBytesConfig`, and of other trainers for the model.

use qlora_core::model::DeviceChoice;
use toml::Value;

use super::super::TrainConfig;
use super::super::choices::ComputeDtype;
use super::super::foreign_keys::Is::{Number, Off, On, Text};
use super::super::foreign_keys::Means::{Anyway, If, Nothing, Opposite, Ours};
use super::super::foreign_keys::{KnownKey, is_off};
use super::{ADAPTERS, key};

const COMPUTE: &str = "write `bnb_4bit_compute_dtype` in [model]: \"bfloat16\", \"float16\" or \"float32\"";
const BIT8: &str =
    "8-bit weights cannot be made here: the base is held in 4 bits, or with `load_in_4bit = false` as it is stored";

pub(super) const KEYS: &[KnownKey] = &[
    key(
        &[
            "base_model",
            "model",
            "model_name",
            "model_id",
            "pretrained_model_name_or_path",
            "base_model_name_or_path",
            "model_path",
        ],
        Ours("model.model_name_or_path"),
    ),
    key(&["model_revision", "revision_of_model"], Ours("model.revision")),
    key(
        &["tokenizer", "tokenizer_name", "tokenizer_path", "processor_name_or_path"],
        Ours("model.tokenizer_name_or_path"),
    ),
    key(
        &[
            "model_type",
            "tokenizer_type",
            "base_model_config",
            "tokenizer_config",
            "is_llama_derived_model",
            "is_mistral_derived_model",
            "is_qwen_derived_model",
        ],
        Nothing,
    ),
    key(
        &["use_fast", "use_fast_tokenizer", "tokenizer_use_fast"],
        Anyway(&[On], "tokenizer.json is read; leave it out"),
    ),
    key(&["load_in_8bit", "quantize_8bit"], Anyway(&[Off], BIT8)),
    key(&["load_in_16bit"], Opposite("model.load_in_4bit")),
    key(&["full_finetuning"], Anyway(&[Off], ADAPTERS)),
    key(
        &["quantization_bit"],
        If(
            |config, value| config.model.load_in_4bit && value.as_integer() == Some(4),
            "the base is held in 4 bits by `load_in_4bit = true` in [model]; there are no other widths",
        ),
    ),
    key(
        &["quant_method", "quantization_method", "load_quantized"],
        Anyway(
            &[Text("bitsandbytes"), Text("bnb"), Text("bits_and_bytes")],
            "the formats are bitsandbytes': `bnb_4bit_quant_type` in [model]",
        ),
    ),
    key(&["bnb_4bit_quant_storage"], Anyway(&[Text("uint8")], "two values are stored a byte; leave it out")),
    key(&["llm_int8_threshold"], Anyway(&[Number(6.0)], BIT8)),
    key(
        &["llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"],
        Anyway(&[Off], BIT8),
    ),
    key(
        &["double_quantization", "use_bnb_nested_quant", "use_double_quant", "use_nested_quant", "double_quant"],
        Ours("model.bnb_4bit_use_double_quant"),
    ),
    key(&["quantization_type", "quant_type"], Ours("model.bnb_4bit_quant_type")),
    key(&["quant_block_size", "quantization_block_size"], Ours("model.blocksize")),
    key(
        &["block_size"],
        If(
            |_, _| false,
            "write `max_length` in [data] for the length of documents, `blocksize` in [model] for the quantization",
        ),
    ),
    key(
        &["torch_dtype", "dtype", "compute_dtype", "precision"],
        If(
            |config, value| value.as_str().is_some_and(|name| name == "auto" || dtype(name) == Some(compute(config))),
            COMPUTE,
        ),
    ),
    key(
        &["bf16"],
        If(
            |config, value| match value {
                Value::String(auto) if auto == "auto" => true,
                value => is_off(value) != (compute(config) == ComputeDtype::Bfloat16),
            },
            COMPUTE,
        ),
    ),
    key(&["fp16", "float16"], If(|config, value| is_off(value) != (compute(config) == ComputeDtype::Float16), COMPUTE)),
    key(
        &["pure_bf16", "bf16_full_eval", "fp16_full_eval", "upcast_layernorm", "upcast_lmhead_output"],
        Anyway(&[Off], "adapters, norms and sums are kept in float32; leave it out"),
    ),
    key(
        &["device_map"],
        If(
            |config, value| match value {
                Value::Table(parts) => parts.values().all(|part| is_device(&config.model.device, part)),
                value => value.as_str() == Some("auto") || is_device(&config.model.device, value),
            },
            "one device holds the model: write `device` in [model], such as \"auto\", \"cuda:1\" or \"cpu\"",
        ),
    ),
    key(
        &["use_cpu", "no_cuda"],
        If(|config, value| is_off(value) || config.model.device == "cpu", "write `device = \"cpu\"` in [model]"),
    ),
    key(
        &["max_memory", "max_memory_gb", "memory_limit"],
        If(|_, _| false, "write `memory_budget` in [training], in GB"),
    ),
    key(&["trust_remote_code"], Nothing), // No code of a model is ever run.
    key(
        &["token", "hf_token", "use_auth_token", "hub_token", "hf_hub_token"],
        Anyway(
            &[Off, On],
            "set the environment variable HF_TOKEN, or run `hf auth login`; no token belongs in this file",
        ),
    ),
    key(
        &["rope_scaling", "rope_theta"],
        Anyway(&[Off], "the model's config.json says how positions are encoded; change it there"),
    ),
    key(
        &[
            "attn_implementation",
            "flash_attention",
            "flash_attn",
            "use_flash_attention_2",
            "use_flash_attn",
            "sdp_attention",
            "xformers_attention",
        ],
        Nothing,
    ),
    key(&["use_cache", "low_cpu_mem_usage", "use_safetensors", "return_dict", "model_init_kwargs"], Nothing),
    key(&["fast_inference", "gpu_memory_utilization", "max_lora_rank", "float8_kv_cache"], Nothing),
];

/// The configured compute type; without one that of most GPUs.
fn compute(config: &TrainConfig) -> ComputeDtype {
    config.model.bnb_4bit_compute_dtype.unwrap_or(ComputeDtype::Bfloat16)
}

/// The compute type of a name as PyTorch and the command lines of trainers write it.
fn dtype(name: &str) -> Option<ComputeDtype> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        "bfloat16" | "bf16" => Some(ComputeDtype::Bfloat16),
        "float16" | "fp16" | "half" => Some(ComputeDtype::Float16),
        "float32" | "fp32" | "float" => Some(ComputeDtype::Float32),
        _ => None,
    }
}

/// Whether a value of `device_map` is the device of this configuration: a name, or the number of a GPU.
fn is_device(device: &str, value: &Value) -> bool {
    let name = match value {
        Value::Integer(number) => format!("cuda:{number}"),
        Value::String(name) => name.clone(),
        _ => return false,
    };
    let same = |left: &str, right: &str| match (left.parse::<DeviceChoice>(), right.parse::<DeviceChoice>()) {
        (Ok(left), Ok(right)) => left == right,
        _ => false,
    };
    // "auto" is the first GPU where there is one.
    same(device, &name) || (device == "auto" && ["cuda", "cuda:0"].contains(&name.as_str()))
}
