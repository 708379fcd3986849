//! Suggestions for misspelled values: numbers in quotes, Python's and YAML's spellings, choices of other trainers.

use toml::Value;

use super::TrainConfig;

/// Values of other trainers, by key: a suggestion, and the reason.
const FOREIGN_VALUES: &[(&str, &[&str], &str)] = &[
    ("lr_scheduler_type", &["polynomial"], "write \"linear\", which it is with transformers' default power of 1"),
    (
        "lr_scheduler_type",
        &["cosine_with_min_lr", "cosine_warmup_with_min_lr", "one_cycle", "onecycle", "rex"],
        "write \"cosine\", which goes down to 0",
    ),
    (
        "lr_scheduler_type",
        &["warmup_stable_decay", "wsd", "inverse_sqrt", "reduce_lr_on_plateau", "greedy"],
        "write \"constant_with_warmup\", \"linear\" or \"cosine\"",
    ),
    ("lr_scheduler_type", &["none", "fixed"], "write \"constant\""),
    (
        "optim",
        &[
            "adafactor",
            "lion",
            "lion_8bit",
            "lion_32bit",
            "paged_lion_8bit",
            "paged_lion_32bit",
            "lomo",
            "adalomo",
            "galore_adamw",
            "galore_adamw_8bit",
            "adamw_torch_8bit",
            "adamw_torch_4bit",
            "ademamix_8bit",
            "apollo_adamw",
            "q_galore_adamw8bit",
            "ao_adamw_8bit",
            "came_pytorch",
            "adam_8bit",
            "paged_ademamix_8bit",
        ],
        "write \"adamw_8bit\", which takes a quarter of AdamW's memory",
    ),
    (
        "optim",
        &[
            "sgd",
            "adagrad",
            "rmsprop",
            "adam",
            "muon",
            "sophia",
            "adamw_anyprecision",
            "schedule_free_adamw",
            "optimi_adamw",
        ],
        "write \"adamw_torch\"",
    ),
    ("bnb_4bit_quant_type", &["int4", "int8", "q4_0", "q4_k_m", "mxfp4", "gptq", "awq", "hqq"], "write \"nf4\""),
    (
        "train_sampling_strategy",
        &["group_by_length", "length"],
        "write \"random\": there is no padding that batches of equal lengths would save",
    ),
];

/// A suggestion for a value of `section.name` that was refused, as the end of a message; empty if there is none.
pub(super) fn hint(section: &str, name: &str, value: &Value, message: &str) -> String {
    let takes = |candidate: &Value| TrainConfig::default().put(section, name, candidate.clone()).is_ok();
    if let Some(candidate) = candidates(value).into_iter().find(takes) {
        // As it was written, where that is TOML: 2e-4 rather than 0.0002.
        let written =
            value.as_str().map(str::trim).filter(|text| text.parse::<Value>().is_ok_and(|read| read == candidate));
        return format!("; write `{name} = {}`", written.map_or_else(|| candidate.to_string(), str::to_owned));
    }
    if let Value::String(text) = value {
        let text = text.to_ascii_lowercase();
        let known = FOREIGN_VALUES.iter().find(|(key, values, _)| *key == name && values.contains(&text.as_str()));
        if let Some((_, _, advice)) = known {
            return format!("; {advice}");
        }
        if message.starts_with("invalid type") && ["", "none", "null", "auto"].contains(&text.as_str()) {
            return format!("; leave `{name}` out for none");
        }
    }
    String::new()
}

/// The likely meanings of a value, in the order in which they are tried.
fn candidates(value: &Value) -> Vec<Value> {
    match value {
        Value::String(text) => {
            let text = text.trim();
            let plain = text.replace([',', '_'], "");
            let number = plain.parse::<i64>().map(Value::Integer).or_else(|_| plain.parse::<f64>().map(Value::Float));
            let number = number.ok().filter(|number| number.as_float().is_none_or(f64::is_finite));
            let flag = match text.to_ascii_lowercase().as_str() {
                "true" | "yes" | "on" => Some(Value::Boolean(true)),
                "false" | "no" | "off" => Some(Value::Boolean(false)),
                _ => None,
            };
            let spelling = Value::String(text.to_ascii_lowercase().replace('-', "_"));
            let dtype = text.strip_prefix("torch.").map(|dtype| Value::String(dtype.to_owned()));
            [number, flag, Some(spelling), dtype].into_iter().flatten().collect()
        }
        Value::Float(number) if number.fract() == 0.0 && number.abs() < 1e15 => vec![Value::Integer(*number as i64)],
        Value::Integer(number @ (0 | 1)) => vec![Value::Boolean(*number == 1)],
        Value::Array(items) if items.len() == 1 => items.clone(),
        _ => Vec::new(),
    }
}

/// A suggestion for a line that is not TOML, as the end of a message.
pub(super) fn syntax_hint(text: &str, line: usize) -> &'static str {
    if text.trim_start().starts_with('{') {
        return "; a configuration is TOML, not JSON: see examples/finetune.toml";
    }
    let line = text.lines().nth(line - 1).unwrap_or_default().trim();
    let is_key = |key: &str| !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    let word = |value: &str| value.split([' ', '\t', '#', ',']).next().unwrap_or_default().to_owned();
    match line.split_once('=').map(|(key, value)| (key.trim(), word(value.trim()))) {
        Some((_, value)) if ["None", "null", "nil", "~"].contains(&value.as_str()) => {
            "; TOML has no value for none: leave the key out"
        }
        Some((_, value)) if ["True", "False", "yes", "no", "on", "off"].contains(&value.as_str()) => {
            "; TOML writes true and false"
        }
        Some((key, value))
            if is_key(key) && value.starts_with(|c: char| c.is_ascii_alphabetic() || "/.~".contains(c)) =>
        {
            "; texts stand in quotes"
        }
        Some(_) => "",
        None => match line.split_once(':') {
            Some((key, _)) if is_key(key.trim()) => "; TOML writes `key = value`",
            _ => "",
        },
    }
}
