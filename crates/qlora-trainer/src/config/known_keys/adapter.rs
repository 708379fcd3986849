//! Keys of PEFT's `LoraConfig`, and of other trainers for the adapter.

use super::super::choices::Targets;
use super::super::foreign_keys::Is::{Off, On, Text};
use super::super::foreign_keys::Means::{Anyway, If, Nothing, Ours};
use super::super::foreign_keys::{KnownKey, is_off};
use super::{ADAPTERS, key};

pub(super) const KEYS: &[KnownKey] = &[
    key(&["task_type"], Anyway(&[Text("CAUSAL_LM")], "models are causal language models; leave it out")),
    key(&["peft_type", "peft_method"], Anyway(&[Text("LORA")], ADAPTERS)),
    key(&["lora_bias"], Anyway(&[Off], "adapters have no bias in training; leave it out")),
    key(&["inference_mode"], Anyway(&[Off], "the adapter is trained; leave it out")),
    key(&["fan_in_fan_out", "lora_fan_in_fan_out"], Anyway(&[Off], "weights are stored [out, in]; leave it out")),
    key(
        &["init_lora_weights"],
        Anyway(&[On, Text("default")], "A starts as PEFT's default (Kaiming uniform), B as zero; leave it out"),
    ),
    key(&["peft_use_dora"], Ours("lora.use_dora")),
    key(&["peft_use_rslora"], Ours("lora.use_rslora")),
    key(&["use_lora", "use_qlora", "use_peft"], Anyway(&[On], "adapters are always trained; leave it out")),
    key(
        &["use_qalora", "use_bdlora", "use_vera", "use_relora", "relora", "relora_steps", "loraplus_lr_ratio"],
        Anyway(
            &[Off],
            "of LoRA's variants rank-stabilized LoRA (`use_rslora`) and DoRA (`use_dora`) can be trained; leave it out",
        ),
    ),
    key(&["qalora_group_size", "loraplus_lr_embedding", "megatron_core"], Nothing),
    key(
        &[
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "arrow_config",
            "velora_config",
            "pissa_init",
        ],
        Anyway(&[Off], "A starts as PEFT's default (Kaiming uniform), B as zero; leave it out"),
    ),
    key(&["lora_modules_to_save", "additional_target"], Ours("lora.modules_to_save")),
    key(
        &["unfrozen_parameters"],
        Anyway(
            &[Off],
            "beside adapters, `modules_to_save` and `trainable_token_indices` in [lora] train an embedding and a head",
        ),
    ),
    key(&["target_parameters"], Anyway(&[Off], "name linear layers in `target_modules` in [lora]")),
    key(
        &[
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "lora_layers_to_transform",
            "peft_layers_to_transform",
        ],
        Anyway(
            &[Off],
            "write a regular expression for the wanted modules as `target_modules` in [lora], such as \
             'model\\.layers\\.(0|1)\\..*_proj'",
        ),
    ),
    key(
        &["layer_replication", "alora_invocation_tokens", "megatron_config", "auto_mapping"],
        Anyway(&[Off], "not supported in training; leave it out"),
    ),
    key(&["lora_r", "lora_rank", "rank", "lora_dim"], Ours("lora.r")),
    key(&["alpha"], Ours("lora.lora_alpha")),
    key(&["dropout"], Ours("lora.lora_dropout")),
    key(&["lora_target", "lora_target_modules", "lora_modules", "peft_target_modules"], Ours("lora.target_modules")),
    key(
        &["lora_target_linear"],
        If(
            |config, value| {
                let all = matches!(&config.lora.target_modules, Targets::Pattern(name) if name.eq_ignore_ascii_case("all-linear"));
                is_off(value) || all
            },
            "write `target_modules = \"all-linear\"` in [lora]",
        ),
    ),
    key(
        &["adapter"],
        If(
            |config, value| {
                let bits4 = config.model.load_in_4bit;
                value.as_str().is_some_and(|name| (name == "qlora" && bits4) || (name == "lora" && !bits4))
            },
            "the adapter is LoRA; its base is held in 4 bits by `load_in_4bit = true` in [model], as it is stored by false",
        ),
    ),
    key(&["finetuning_type"], Anyway(&[Text("lora")], ADAPTERS)),
];
