//! The keys of other trainers that people copy into a configuration, with the treatment of each.
//!
//! Sources: TRL 1.16 (`SFTConfig`), transformers 5.24 and 4 (`TrainingArguments`, `from_pretrained`), PEFT 0.21
//! (`LoraConfig`), bitsandbytes by transformers' `BitsAndBytesConfig`, and the keys that the documentation of Unsloth,
//! Axolotl and LLaMA-Factory uses most. Keys of ours do not stand here. Any key may stand in any section.

mod adapter;
mod data;
mod model;
mod training;

use super::foreign_keys::{KnownKey, Means};

/// Every known key.
pub(super) static KNOWN_KEYS: [&[KnownKey]; 4] = [adapter::KEYS, model::KEYS, data::KEYS, training::KEYS];

const fn key(names: &'static [&'static str], means: Means) -> KnownKey {
    KnownKey { names, means }
}

const ADAPTERS: &str = "adapters are LoRA here; leave it out";
const TOKENIZER: &str = "the tokenizer and its tokens are the model's own; leave it out";

/// The meanings of section names in other trainers' files: our section, and their names for it.
pub(super) const KNOWN_SECTIONS: &[(&str, &[&str])] = &[
    (
        "model",
        &["quantization", "quant", "bnb", "bitsandbytes", "bnb_config", "quantization_config", "base", "base_model"],
    ),
    ("lora", &["peft", "adapter", "adapters", "qlora", "peft_config", "lora_config"]),
    ("data", &["dataset", "datasets", "data_args", "dataset_config"]),
    (
        "training",
        &[
            "train",
            "trainer",
            "sft",
            "sft_config",
            "training_args",
            "training_arguments",
            "optimizer",
            "scheduler",
            "logging",
            "checkpointing",
        ],
    ),
];
