//! The valid files that mutations begin with: fixtures, and a tiny model that is made, trained for a step and converted here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use qlora::export::gguf::{self, GgufOptions, GgufType};
use qlora::open::{OpenOptions, open_model};
use qlora::trainer::TrainConfig;
use qlora::trainer::session::Session;

use super::random_folder::{self, TEMPLATE};

/// Rows of every kind.
pub(crate) const ROWS: [&str; 9] = [
    r#"{"text": "the water runs"}"#,
    r#"{"prompt": "the water", "completion": " runs"}"#,
    r#"{"prompt": [{"role": "user", "content": "the"}], "completion": [{"role": "assistant", "content": "water"}]}"#,
    r#"{"instruction": "say", "input": "", "output": "water"}"#,
    r#"{"instruction": "say", "input": "the", "output": "water", "system": "be", "history": [["a", "b"]]}"#,
    r#"{"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "the"}, {"role": "assistant", "content": "water"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
    r#"{"conversations": [{"from": "human", "value": "the"}, {"from": "gpt", "value": "water"}]}"#,
    r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "the"}]}, {"role": "assistant", "content": null, "tool_calls": [{"type": "function", "id": "a1", "function": {"name": "f", "arguments": {"x": 1}}}]}, {"role": "tool", "name": "f", "tool_call_id": "a1", "content": "2"}, {"role": "assistant", "content": "two"}], "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}}], "chat_template_kwargs": {"enable_thinking": false}}"#,
    r#"{"system": "be", "tools": "[]", "conversations": [{"from": "human", "value": "the"}, {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {}}"}, {"from": "observation", "value": "1"}, {"from": "gpt", "value": "water"}]}"#,
];

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub(crate) fn fixture(name: &str) -> Result<Vec<u8>> {
    let path = fixtures().join(name);
    fs::read(&path).with_context(|| path.display().to_string())
}

/// A tiny model in every form that it can have.
pub(crate) struct Seeds {
    /// A model folder in Hugging Face's layout.
    pub(crate) model: PathBuf,
    /// The same as a GGUF file.
    pub(crate) gguf: PathBuf,
    /// A checkpoint of a run over it, with the adapter.
    pub(crate) checkpoint: PathBuf,
}

impl Seeds {
    pub(crate) fn make(folder: &Path) -> Result<Self> {
        let model = folder.join("model");
        random_folder::make(&model, 256)?;
        let files = open_model(&model.display().to_string(), &OpenOptions::default())?;
        let gguf = folder.join("model.gguf");
        let options = GgufOptions {
            name: Some("tiny"),
            chat_template: Some(TEMPLATE),
            eos_token_ids: &[2],
            ..GgufOptions::new(GgufType::Q8_0)
        };
        gguf::write(&*files.source, &files.tokenizer, &gguf, &options, |_, _| {})?;
        let checkpoint = train(folder, &model)?;
        Ok(Self { model, gguf, checkpoint })
    }
}

/// One step of training; returns its checkpoint.
fn train(folder: &Path, model: &Path) -> Result<PathBuf> {
    let (data, output) = (folder.join("rows.jsonl"), folder.join("run"));
    fs::write(&data, ROWS[..2].join("\n"))?;
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = model.display().to_string();
    config.model.device = "cpu".to_owned();
    config.lora.r = 2;
    config.data.train_file = data.as_path().into();
    config.training.max_steps = 1;
    config.training.output_dir.clone_from(&output);
    let session = Session::open(&config, |_, _| {})?;
    let (training, validation) = session.datasets()?;
    session.into_trainer(training, validation)?.run()?;
    Ok(output.join("checkpoint-1"))
}
