//! Keys of other trainers: accepted where they ask for the behaviour here, otherwise refused with a suggestion.
//!
//! The keys themselves are data, in [`known_keys`](super::known_keys).

use toml::Value;

use super::TrainConfig;
use super::known_keys::KNOWN_KEYS;

/// A key that people copy from elsewhere.
pub(super) struct KnownKey {
    /// Its names: those that mean the same stand together.
    pub(super) names: &'static [&'static str],
    /// The meaning of the key.
    pub(super) means: Means,
}

/// The meaning of a foreign key.
pub(super) enum Means {
    /// Nothing that changes what a run computes here: any value will do.
    Nothing,
    /// One of these values is what happens anyway. The text says what to do for another one.
    Anyway(&'static [Is], &'static str),
    /// Matches the behaviour here if the function says so of the configuration and the value.
    If(fn(&TrainConfig, &Value) -> bool, &'static str),
    /// Our `section.key` under another name.
    Ours(&'static str),
    /// Our `section.key`, a boolean, the other way round.
    Opposite(&'static str),
}

/// A value that a key may have.
pub(super) enum Is {
    /// Nothing is asked for: false, 0, an empty list, table or text, or a text such as "none".
    Off,
    /// True.
    On,
    /// This text, in upper or lower case.
    Text(&'static str),
    /// This number.
    Number(f64),
}

impl Is {
    fn holds(&self, value: &Value) -> bool {
        match (self, value) {
            (Self::Off, value) => is_off(value),
            (Self::On, Value::Boolean(on)) => *on,
            (Self::On, Value::String(text)) => text.eq_ignore_ascii_case("true"),
            (Self::Text(expected), Value::String(text)) => text.eq_ignore_ascii_case(expected),
            (Self::Text(_), Value::Array(items)) => !items.is_empty() && items.iter().all(|item| self.holds(item)),
            (Self::Number(expected), Value::Float(number)) => number == expected,
            (Self::Number(expected), Value::Integer(number)) => *number as f64 == *expected,
            _ => false,
        }
    }
}

/// Whether a value asks for nothing.
pub(super) fn is_off(value: &Value) -> bool {
    match value {
        Value::Boolean(on) => !on,
        Value::Integer(number) => *number == 0,
        Value::Float(number) => *number == 0.0,
        Value::String(text) => {
            ["", "none", "null", "no", "false", "off"].iter().any(|off| text.eq_ignore_ascii_case(off))
        }
        Value::Array(items) => items.iter().all(is_off),
        Value::Table(entries) => entries.values().all(is_off),
        Value::Datetime(_) => false,
    }
}

/// Looks up a foreign key.
pub(super) fn find(key: &str) -> Option<&'static KnownKey> {
    KNOWN_KEYS.into_iter().flatten().find(|known| known.names.contains(&key))
}

impl KnownKey {
    /// The reason why `key = value` is refused in a run of this configuration, as the end of a message; none if it
    /// matches the behaviour here.
    pub(super) fn refusal(&self, config: &TrainConfig, key: &str, value: &Value) -> Option<String> {
        match self.means {
            Means::Nothing => None,
            Means::Anyway(values, advice) => {
                let holds = values.iter().any(|expected| expected.holds(value));
                (!holds).then(|| format!("{}: {advice}", assignment(key, value)))
            }
            Means::If(holds, advice) => {
                (!holds(config, value)).then(|| format!("{}: {advice}", assignment(key, value)))
            }
            Means::Ours(ours) => renamed(config, key, ours, value.clone(), ""),
            Means::Opposite(ours) => {
                let opposite = match value {
                    Value::Boolean(on) => Value::Boolean(!on),
                    other => other.clone(),
                };
                renamed(config, key, ours, opposite, ", with the opposite value")
            }
        }
    }
}

/// The message for a key that is `ours` (`section.key`) here, unless the value is the configuration's already.
fn renamed(config: &TrainConfig, key: &str, ours: &str, value: Value, how: &str) -> Option<String> {
    let (section, name) = ours.split_once('.').expect("keys of ours are written section.key");
    let mut changed = config.clone();
    let write = match changed.put(section, name, value.clone()) {
        Ok(()) if changed == *config => return None,
        Ok(()) => format!(": write `{}`", short(name, &value)?),
        Err(_) => String::new(),
    };
    Some(format!("unknown key `{key}`; here it is `{name}` in [{section}]{how}{write}"))
}

/// `key = value` for a message, without a value that is long.
fn assignment(key: &str, value: &Value) -> String {
    format!("`{}`", short(key, value).unwrap_or_else(|| key.to_owned()))
}

fn short(key: &str, value: &Value) -> Option<String> {
    const LONGEST: usize = 60;
    let text = value.to_string();
    (text.len() <= LONGEST && !text.contains('\n')).then(|| format!("{key} = {text}"))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::keys::sections;
    use super::*;

    const MINIMAL: &str = "[model]\nmodel_name_or_path = \"m\"\n[data]\ntrain_file = \"t.jsonl\"\n";

    fn read(extra: &str) -> std::result::Result<TrainConfig, String> {
        TrainConfig::from_toml_str(&format!("{MINIMAL}{extra}")).map_err(|error| error.to_string())
    }

    #[test]
    fn the_table_is_consistent() {
        let mut seen = HashSet::new();
        for known in KNOWN_KEYS.into_iter().flatten() {
            for name in known.names {
                assert!(seen.insert(name), "{name} stands there twice");
                let ours = sections().iter().any(|(_, keys)| keys.contains(name));
                assert!(!ours, "{name} is a key of ours: take it out of the table");
            }
            if let Means::Ours(ours) | Means::Opposite(ours) = known.means {
                let (section, key) = ours.split_once('.').unwrap();
                assert!(sections().iter().any(|(name, keys)| *name == section && keys.contains(&key)), "{ours}");
            }
        }
        assert!(seen.len() > 300);
    }

    #[test]
    fn what_happens_anyway_is_accepted() {
        let plain = read("").unwrap();
        for line in [
            "[lora]\nbias = \"none\"",
            "[lora]\ntask_type = \"CAUSAL_LM\"",
            "[lora]\npeft_type = \"LORA\"\ninference_mode = false\nfan_in_fan_out = false",
            "[lora]\ninit_lora_weights = true\nuse_dora = false\nmodules_to_save = []\nlayers_to_transform = []",
            "[lora]\nrank_pattern = {}\nalpha_pattern = {}\nloftq_config = {}",
            "[lora]\nlora_r = 16\nlora_target_modules = [\"q_proj\", \"k_proj\", \"v_proj\", \"o_proj\"]",
            "[training]\nbf16 = true\nfp16 = false\ntf32 = true",
            "[training]\nreport_to = \"none\"",
            "[training]\nreport_to = []",
            "[training]\nreport_to = [\"none\"]\nrun_name = \"x\"\npush_to_hub = false",
            "[training]\nevaluation_strategy = \"no\"\nsave_strategy = \"steps\"\nlogging_strategy = \"steps\"",
            "[training]\nneftune_noise_alpha = 0\nlabel_smoothing_factor = 0.0\ndataloader_num_workers = 4",
            "[training]\ngradient_checkpointing_kwargs = { use_reentrant = false }\ngroup_by_length = true",
            "[training.gradient_checkpointing_kwargs]\nuse_reentrant = false",
            "[training]\nlr_scheduler_kwargs = {}\nfsdp = \"\"\ndeepspeed = \"\"\nlocal_rank = -1",
            "[training]\nuse_liger_kernel = true\nddp_find_unused_parameters = false\nrandom_state = 42",
            "dataset_text_field = \"text\"\ndataset_num_proc = 8\npadding_free = true\npacking_strategy = \"bfd\"",
            "train_on_inputs = false\nassistant_only_loss = true\nval_set_size = 0\ntruncation_mode = \"keep_start\"",
            "max_seq_length = 1024\nsample_packing = false\nstreaming = false",
        ] {
            assert_eq!(read(line).as_ref(), Ok(&plain), "{line}");
        }
        // In any section, in none, and with values that agree with the rest of the file.
        for text in [
            "bf16 = true\nreport_to = \"none\"\nmodel.model_name_or_path = \"m\"\ndata.train_file = \"t.jsonl\"",
            "model.model_name_or_path = \"m\"\nmodel.load_in_8bit = false\nmodel.device_map = \"auto\"\nmodel.torch_dtype = \"auto\"\n\
             model.trust_remote_code = true\nmodel.attn_implementation = \"flash_attention_2\"\nmodel.use_cache = false\n\
             model.bnb_4bit_quant_storage = \"uint8\"\nmodel.quant_method = \"bitsandbytes\"\ndata.train_file = \"t.jsonl\"",
        ] {
            assert_eq!(TrainConfig::from_toml_str(text).unwrap(), plain, "{text}");
        }
        assert!(read("[training]\noptim = \"adamw_8bit\"\nuse_8bit_adam = true\nadapter = \"qlora\"").is_ok());
        assert!(read("[lora]\ntarget_modules = \"all-linear\"\nlora_target_linear = true").is_ok());
        assert!(
            read("validation_file = \"v\"\n[training]\neval_strategy = \"steps\"\neval_steps = 5\ndo_eval = true")
                .is_ok()
        );
    }

    #[test]
    fn anything_else_is_refused_with_what_to_write() {
        for (line, parts) in [
            ("[lora]\ntask_type = \"SEQ_CLS\"", &["task_type", "causal"][..]),
            ("[lora]\npeft_use_dora = true", &["`use_dora` in [lora]"]),
            ("[lora]\ninit_lora_weights = \"pissa\"", &["init_lora_weights", "leave it out"]),
            ("[lora]\nlora_modules_to_save = [\"lm_head\"]", &["`modules_to_save` in [lora]"]),
            ("[lora]\nlora_target_linear = true", &["all-linear"]),
            ("[training]\nbf16 = false", &["bf16 = false", "bnb_4bit_compute_dtype"]),
            ("[training]\nfp16 = true", &["bnb_4bit_compute_dtype"]),
            ("[training]\nreport_to = \"wandb\"", &["metrics.jsonl", "\"none\""]),
            ("[training]\nreport_to = [\"tensorboard\", \"wandb\"]", &["metrics.jsonl"]),
            ("[training]\nload_in_8bit = true", &["8-bit", "load_in_4bit = false"]),
            ("[training]\nsave_strategy = \"epoch\"", &["save_steps"]),
            ("[training]\neval_strategy = \"epoch\"", &["eval_steps"]),
            ("[training]\nload_best_model_at_end = true", &["eval_loss"]),
            ("[training]\nlr_scheduler_kwargs = { num_cycles = 3 }", &["lr_scheduler_kwargs"]),
            ("[training]\nneftune_noise_alpha = 5", &["neftune_noise_alpha = 5"]),
            ("[training]\ndeepspeed = \"zero3.json\"", &["one device"]),
            ("[training]\nhub_token = \"hf_x\"", &["HF_TOKEN"]),
            ("[training]\nnum_epochs = 5", &["write `num_train_epochs = 5`"]),
            ("[training]\nrandom_state = 7", &["write `seed = 7`"]),
            ("max_seq_length = 2048", &["write `max_length = 2048`", "[data]"]),
            ("train_on_inputs = true", &["write `completion_only_loss = false`"]),
            ("block_size = 512", &["`max_length` in [data]", "`blocksize` in [model]"]),
            ("val_set_size = 0.1", &["`val_size = 0.1`"]),
            ("chat_template = \"chatml\"", &["chat_template_path"]),
            ("[training]\nrl = \"dpo\"", &["rl = \"dpo\"", "`objective` in [training]"]),
            ("[training]\nrl = \"grpo\"", &["no other objectives"]),
            ("[training]\nbeta = 0.2", &["`beta`", "it belongs in [objective]"]),
            ("[training]\ndpo_beta = 0.2", &["here it is `beta` in [objective]"]),
            ("[[datasets]]\npath = \"x\"", &["`datasets`", "it belongs in [data]"]),
            ("[quantization]\nbits = 4", &["belong in [model]"]),
            ("[adapter]\nr = 4", &["belong in [lora]"]),
        ] {
            let message = read(line).unwrap_err();
            for part in parts {
                assert!(message.contains(part), "{line}: {part:?} is not in {message}");
            }
            assert!(message.lines().all(|line| line.starts_with("line ")), "{line}: {message}");
            assert!(!message.contains("did you mean"), "{line}: {message}");
        }
    }

    #[test]
    fn a_key_of_ours_elsewhere_is_sent_to_its_section() {
        for (line, section) in [
            ("[training]\nr = 8", "[lora]"),
            ("[lora]\npacking = true", "[data]"),
            ("learning_rate = 1e-4", "[training]"),
        ] {
            let message = read(line).unwrap_err();
            assert!(message.contains(&format!("it belongs in {section}")), "{message}");
        }
    }

    #[test]
    fn trackers_by_their_names() {
        use super::super::Tracker::TensorBoard;
        let reports =
            |text: &str| read(&format!("[training]\n{text}")).unwrap().training.report_to.contains(TensorBoard);
        for text in ["report_to = \"tensorboard\"", "report_to = [\"tensorboard\"]", "report_to = \"all\""] {
            assert!(reports(text), "{text}");
            let both = format!("{text}\nuse_tensorboard = true\nlogging_dir = \"runs\"");
            assert!(reports(&both), "{both}");
        }
        assert!(!reports("report_to = false") && !reports("use_tensorboard = false"));
        let refusal = |text: &str| read(&format!("[training]\n{text}")).unwrap_err();
        assert!(refusal("report_to = \"wandb\"").contains("scripts/sync_wandb.py"));
        assert!(refusal("use_tensorboard = true").contains("`report_to` in [training]"));
        assert!(refusal("report_to = \"tensorbord\"").contains("\"tensorbord\" is no tracker here"));
        let config = read("[training]\nreport_to = \"tensorboard\"").unwrap();
        assert_eq!(TrainConfig::from_toml_str(&config.to_toml()).unwrap(), config);
    }

    #[test]
    fn the_command_line_knows_them_too() {
        let mut config = read("").unwrap();
        let before = config.clone();
        config.set("lora.bias", "none").unwrap();
        config.set("training.report_to", "none").unwrap();
        config.set("bf16", "true").unwrap();
        assert_eq!(config, before);
        let refusal = |key, value| before.clone().set(key, value).unwrap_err().to_string();
        assert!(refusal("training.report_to", "wandb").contains("metrics.jsonl"));
        assert!(refusal("lora.lora_r", "8").contains("write `r = 8`"));
    }

    #[test]
    fn values_that_are_meant_are_shown() {
        for (line, part) in [
            (
                "[training]\nlearning_rate = \"2e-4\"",
                "`learning_rate`: invalid type: string \"2e-4\", expected f64; write `learning_rate = 2e-4`",
            ),
            ("[training]\nmax_steps = \"1,000\"", "write `max_steps = 1000`"),
            ("[training]\nmax_steps = 1e3", "write `max_steps = 1000`"),
            ("packing = \"True\"", "write `packing = true`"),
            ("packing = 1", "write `packing = true`"),
            ("[training]\nwarmup_steps = \"none\"", "leave `warmup_steps` out"),
            ("[training]\noptim = \"AdamW_8bit\"", "write `optim = \"adamw_8bit\"`"),
            ("[training]\noptim = \"lion_8bit\"", "write \"adamw_8bit\""),
            ("[training]\nlr_scheduler_type = \"polynomial\"", "write \"linear\""),
            ("[training]\nlr_scheduler_type = \"cosine_with_min_lr\"", "write \"cosine\""),
            ("[lora]\ntarget_modules = [\"all-linear\"]", "write \"all-linear\""),
            ("[lora]\ntarget_modules = \"all\"", "write \"all-linear\""),
            ("[lora]\ntarget_modules = \"q_proj, v_proj\"", "write [\"q_proj\", \"v_proj\"]"),
            ("[lora]\ntarget_modules = \"q_proj\"", "write [\"q_proj\"]"),
            ("packing = True", "TOML writes true and false"),
            ("chat_template_path = None", "leave the key out"),
            ("chat_template_path = a.jinja", "texts stand in quotes"),
            ("packing: true", "TOML writes `key = value`"),
        ] {
            let message = read(line).unwrap_err();
            assert!(message.contains(part), "{line}: {message}");
            assert_eq!(message.lines().count(), 1, "{line}: {message}");
        }
        let json = TrainConfig::from_toml_str("{\"model\": {}}").unwrap_err().to_string();
        assert!(json.contains("not JSON"), "{json}");
        for (line, same) in [
            ("optim = \"adamw_8bit\"", &["paged_adamw_8bit", "adamw_bnb_8bit"][..]),
            ("optim = \"adamw_torch\"", &["adamw_torch_fused", "paged_adamw_32bit", "adamw_hf"]),
            ("lr_scheduler_type = \"cosine\"", &["cosine_with_restarts"]),
        ] {
            let (key, _) = line.split_once(" = ").unwrap();
            for name in same {
                let text = format!("[training]\n{key} = \"{name}\"");
                assert_eq!(read(&text).unwrap(), read(&format!("[training]\n{line}")).unwrap(), "{name}");
            }
        }
    }
}
