//! `examples/finetune.toml` is valid, complete, and says the truth about the defaults.

use std::path::Path;

use qlora::trainer::TrainConfig;
use qlora::trainer::config::Paths;

#[test]
fn it_has_every_key_with_its_default() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/finetune.toml");
    let config = TrainConfig::from_toml_file(&path).unwrap();
    let mut expected = TrainConfig::default();
    expected.model.model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct".into();
    expected.data.train_file = Paths::One("data/train.jsonl".into());
    assert_eq!(config, expected);

    // Keys without a value by default are there as comments.
    let text = std::fs::read_to_string(&path).unwrap();
    let uncommented = |key: &str| {
        let lines = text.lines().map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.starts_with(&format!("{key} = ")) => rest,
            _ => line,
        });
        lines.collect::<Vec<_>>().join("\n")
    };
    for key in [
        "tokenizer_name_or_path",
        "revision",
        "cache_dir",
        "validation_file",
        "max_samples",
        "chat_template_path",
        "per_device_eval_batch_size",
    ]
    .into_iter()
    .chain([
        "adapter_name_or_path",
        "trainable_token_indices",
        "modules_to_save",
        "chat_template_kwargs",
        "warmup_steps",
        "warmup_ratio",
        "data_seed",
        "memory_budget",
        "logging_dir",
        "bnb_4bit_compute_dtype",
    ]) {
        assert_ne!(uncommented(key), text, "{key}");
        let changed = TrainConfig::from_toml_str(&uncommented(key)).unwrap();
        assert_ne!(changed, config, "{key}");
    }
    let whole = config.to_toml();
    let keys: Vec<&str> = whole.lines().filter_map(|line| Some(line.split_once(" = ")?.0)).collect();
    let missing: Vec<_> = keys.iter().filter(|key| !text.contains(&format!("{key} = "))).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(keys.len() > 30);
}
