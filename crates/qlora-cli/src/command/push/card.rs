//! The model card (`README.md`) of an upload: what the hub shows, finds and links models by, and how to use the model.
//!
//! The front matter has the keys that PEFT and TRL write (`base_model`, `library_name`, `pipeline_tag`, `datasets`, `license`, `metrics`,
//! `tags`); the hub takes ids only, so folders of this machine are left out everywhere.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use qlora::adapter;
use qlora::hub_id;
use serde_json::Value;
use toml::Table;

/// The most rows of the table of losses.
const ROWS: usize = 20;

/// The kind of files in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Adapter,
    Model,
    Gguf,
}

impl Kind {
    fn of(paths: &[String]) -> Option<Self> {
        let has = |name: &str| paths.iter().any(|path| path == name);
        match () {
            () if has("adapter_config.json") => Some(Self::Adapter),
            () if has("config.json") => Some(Self::Model),
            () => paths.iter().any(|path| path.ends_with(".gguf")).then_some(Self::Gguf),
        }
    }

    fn library(self) -> &'static str {
        match self {
            Self::Adapter => "peft",
            Self::Model => "transformers",
            Self::Gguf => "gguf",
        }
    }

    fn relation(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Model => "finetune",
            Self::Gguf => "quantized",
        }
    }
}

/// The card for what lies in `folder`, of which `paths` are uploaded as `id`; none if it is not known what that is. `base` is used
/// where no adapter names one.
pub(super) fn text(
    folder: &Path,
    paths: &[String],
    id: &str,
    license: Option<&str>,
    base: Option<&str>,
) -> Option<String> {
    let kind = Kind::of(paths)?;
    let adapter = adapter::read_any_config(folder).ok().filter(|_| kind == Kind::Adapter).map(|(config, _)| config);
    let named = adapter.as_ref().and_then(|config| config.base_model_name_or_path.as_deref());
    // A path with one slash looks like an id; what is a folder here was one then.
    let base = base.or(named).filter(|name| is_hub_id(name) && !Path::new(name).exists());
    let run = Run::find(folder);
    let name = id.rsplit('/').next().unwrap_or(id);
    let objective = run.value(&["training", "objective"]).unwrap_or_else(|| "sft".to_owned());

    let mut card = front_matter(kind, base, license, &run, &objective);
    let of = base.map_or_else(String::new, |base| format!(" of [{base}](https://huggingface.co/{base})"));
    let what = match kind {
        Kind::Adapter if adapter.as_ref().is_some_and(|config| config.lora.use_dora) => "A DoRA adapter",
        Kind::Adapter => "A LoRA adapter",
        Kind::Model => "A fine-tune",
        Kind::Gguf => "GGUF files",
    };
    // Writing to a string cannot fail.
    let _ = write!(card, "# {name}\n\n{what}{of}, made with qlora {}.\n\n## Use\n\n", env!("CARGO_PKG_VERSION"));
    card += &usage(kind, id, base, paths);
    if let Some(config) = &adapter {
        let lora = &config.lora;
        let _ = write!(
            card,
            "## Training\n\n| | |\n|---|---|\n| r, lora_alpha, lora_dropout | {}, {}, {} |\n",
            lora.r, lora.lora_alpha, lora.lora_dropout
        );
        if let Ok(Some(over)) = adapter::TrainedOver::read(folder) {
            let _ = writeln!(card, "| trained over | {over} |");
        }
        card += &run.table();
    }
    card += &run.losses();
    Some(card)
}

fn front_matter(kind: Kind, base: Option<&str>, license: Option<&str>, run: &Run, objective: &str) -> String {
    // JSON strings are YAML strings.
    let quoted = |text: &str| Value::from(text).to_string();
    let mut text = "---\n".to_owned();
    let mut tags = vec!["qlora".to_owned()];
    if let Some(base) = base {
        text += &format!("base_model: {}\n", quoted(base));
        tags.push(format!("base_model:{}:{base}", kind.relation()));
    }
    text += &format!("library_name: {}\npipeline_tag: text-generation\n", kind.library());
    if let Some(license) = license {
        text += &format!("license: {}\n", quoted(license));
    }
    let datasets = run.datasets();
    if !datasets.is_empty() {
        text += "datasets:\n";
        datasets.iter().for_each(|id| text += &format!("- {}\n", quoted(id)));
    }
    if !run.log.is_empty() {
        text += "metrics:\n- loss\n";
    }
    if kind == Kind::Adapter {
        tags.extend(["lora".to_owned(), objective.to_owned()]);
    }
    text += "tags:\n";
    tags.iter().for_each(|tag| text += &format!("- {}\n", quoted(tag)));
    text + "---\n\n"
}

fn usage(kind: Kind, id: &str, base: Option<&str>, paths: &[String]) -> String {
    let with_tokenizer = paths.iter().any(|path| path == "tokenizer.json" || path == "tokenizer.model");
    let tokenizer = if with_tokenizer { Some(id) } else { base };
    let python = |import: &str, class: &str| {
        let Some(tokenizer) = tokenizer else { return String::new() };
        format!(
            "In Python:\n\n```python\n{import}\n\nmodel = {class}.from_pretrained(\"{id}\", device_map=\"auto\")\n\
             tokenizer = AutoTokenizer.from_pretrained(\"{tokenizer}\")\n\
             messages = [{{\"role\": \"user\", \"content\": \"Hello!\"}}]\n\
             inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, \
             return_tensors=\"pt\")\n\
             output = model.generate(**inputs.to(model.device), max_new_tokens=256)\n\
             print(tokenizer.decode(output[0], skip_special_tokens=True))\n```\n\n"
        )
    };
    let shell = |lines: &str| format!("On the command line:\n\n```sh\n{lines}\n```\n\n");
    match kind {
        Kind::Adapter => {
            let import = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer";
            python(import, "AutoPeftModelForCausalLM") + &shell(&format!("qlora chat --adapter {id}"))
        }
        Kind::Model => {
            let import = "from transformers import AutoModelForCausalLM, AutoTokenizer";
            python(import, "AutoModelForCausalLM") + &shell(&format!("qlora chat {id}"))
        }
        Kind::Gguf => {
            let file = paths.iter().find(|path| path.ends_with(".gguf")).map_or("FILE.gguf", String::as_str);
            shell(&format!("ollama run hf.co/{id}\nqlora chat {id}:{file}"))
        }
    }
}

/// What a run left in its output folder.
#[derive(Default)]
struct Run {
    config: Table,
    /// The lines of `metrics.jsonl`.
    log: Vec<Value>,
}

impl Run {
    fn find(folder: &Path) -> Self {
        let newest = newest_checkpoint(folder);
        let config = newest.and_then(|folder| fs::read_to_string(folder.join("config.toml")).ok());
        let config = config.and_then(|text| text.parse().ok()).unwrap_or_default();
        let log = fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
        Self { config, log: log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect() }
    }

    /// A key of the configuration as text.
    fn value(&self, path: &[&str]) -> Option<String> {
        let (last, tables) = path.split_last()?;
        let table = tables.iter().try_fold(&self.config, |table, key| table.get(*key)?.as_table())?;
        match table.get(*last)? {
            toml::Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        }
    }

    /// The data sets of the hub that it was trained on.
    fn datasets(&self) -> Vec<String> {
        let data = self.config.get("data").and_then(toml::Value::as_table);
        let files = data.and_then(|data| data.get("train_file"));
        let files = match files {
            Some(toml::Value::Array(list)) => list.iter().collect(),
            other => other.into_iter().collect::<Vec<_>>(),
        };
        let sets = data.and_then(|data| data.get("datasets")).and_then(toml::Value::as_array);
        let sets = sets.into_iter().flatten().filter_map(|set| set.get("path"));
        let mut ids: Vec<String> = Vec::new();
        for id in files.into_iter().chain(sets).filter_map(toml::Value::as_str) {
            // A path with one slash looks the same; what is a file here was one then.
            let is_file =
                Path::new(id).exists() || Path::new(id).extension().is_some_and(|end| DATA.iter().any(|d| end == *d));
            if id.contains('/') && is_hub_id(id) && !is_file && !ids.iter().any(|known| known == id) {
                ids.push(id.to_owned());
            }
        }
        ids
    }

    /// Rows of a table with the options that matter.
    fn table(&self) -> String {
        const KEYS: [&str; 8] = [
            "learning_rate",
            "lr_scheduler_type",
            "optim",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_length",
            "seed",
        ];
        let mut rows = String::new();
        for key in KEYS {
            if let Some(value) = self.value(&["training", key]).or_else(|| self.value(&["data", key])) {
                rows += &format!("| {key} | {value} |\n");
            }
        }
        rows + "\n"
    }

    /// The losses, thinned out to at most [`ROWS`].
    fn losses(&self) -> String {
        let step = |entry: &Value| entry["step"].as_u64().unwrap_or_default();
        let evaluated: Vec<&Value> = self.log.iter().filter(|entry| entry["eval_loss"].is_number()).collect();
        let trained: Vec<&Value> = self.log.iter().filter(|entry| entry["loss"].is_number()).collect();
        let shown = if evaluated.is_empty() { &trained } else { &evaluated };
        let Some(last) = shown.len().checked_sub(1) else { return String::new() };
        let rows = ROWS.min(shown.len());
        let mut text = "| step | epoch | training loss | validation loss |\n|---|---|---|---|\n".to_owned();
        for row in 1..=rows {
            let entry = shown[last * row / rows];
            let loss =
                trained.iter().rev().find(|other| step(other) <= step(entry)).and_then(|other| other["loss"].as_f64());
            let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.4}"));
            let epoch = entry["epoch"].as_f64().map_or_else(String::new, |epoch| format!("{epoch:.2}"));
            let of_eval = number(entry["eval_loss"].as_f64());
            text += &format!("| {} | {epoch} | {} | {of_eval} |\n", step(entry), number(loss));
        }
        text
    }
}

const DATA: [&str; 8] = ["jsonl", "json", "csv", "tsv", "parquet", "txt", "gz", "zst"];

fn newest_checkpoint(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    entries.map(|entry| entry.path()).filter_map(|path| Some((step(&path)?, path))).max().map(|(_, path)| path)
}

/// Whether a name has the form of an id on the hub, and not that of a file.
fn is_hub_id(name: &str) -> bool {
    hub_id::is_hub_id(name) && !name.ends_with(".gguf")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn an_adapter_s_card_says_where_it_is_from_and_how_to_use_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let config = r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "org/base"}"#;
        write(root, "adapter_config.json", config);
        let toml = "[data]\ntrain_file = \"data/rows.jsonl\"\n[[data.datasets]]\npath = \"org/rows\"\n[training]\nlearning_rate = 0.0002\n\
             objective = \"dpo\"\n";
        write(root, "checkpoint-9/config.toml", "[training]\nlearning_rate = 1.0\n");
        write(root, "checkpoint-10/config.toml", toml);
        let log: Vec<String> =
            (1..=100).map(|step| format!(r#"{{"step": {step}, "epoch": 0.5, "loss": {}.5}}"#, 200 - step)).collect();
        write(root, "metrics.jsonl", &log.join("\n"));
        let paths = ["adapter_config.json".to_owned(), "tokenizer.json".to_owned()];
        let card = text(root, &paths, "me/tuned", Some("mit"), None).unwrap();
        for part in [
            "---\nbase_model: \"org/base\"\nlibrary_name: peft\n",
            "license: \"mit\"\ndatasets:\n- \"org/rows\"\nmetrics:\n- loss\n",
            "- \"base_model:adapter:org/base\"\n- \"lora\"\n- \"dpo\"\n---\n",
            "# tuned\n",
            "AutoPeftModelForCausalLM.from_pretrained(\"me/tuned\"",
            "AutoTokenizer.from_pretrained(\"me/tuned\")",
            "qlora chat --adapter me/tuned",
            "| r, lora_alpha, lora_dropout | 8, 16, 0 |",
            "| learning_rate | 0.0002 |",
            "| 100 | 0.50 | 100.5000 |  |",
        ] {
            assert!(card.contains(part), "{part}\n{card}");
        }
        assert_eq!(card.lines().filter(|line| line.starts_with("| ") && line.contains("| 0.50 |")).count(), ROWS);
        // A base that is a folder of this machine is nothing for the hub.
        write(root, "adapter_config.json", &config.replace("org/base", "/data/base"));
        let card = text(root, &paths, "me/tuned", None, None).unwrap();
        assert!(!card.contains("base_model") && !card.contains("/data"), "{card}");
        // Also one with a relative path, which has the form of an id.
        assert!(Path::new("src/command").is_dir() && is_hub_id("src/command"));
        write(root, "adapter_config.json", &config.replace("org/base", "src/command"));
        let card = text(root, &paths, "me/tuned", None, None).unwrap();
        assert!(!card.contains("base_model") && !card.contains("src/command"), "{card}");
    }

    #[test]
    fn models_and_gguf_files_have_cards_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let card = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
            text(folder.path(), &paths, "me/m", None, Some("org/base"))
        };
        let model = card(&["config.json", "model.safetensors"]).unwrap();
        assert!(
            model.contains("library_name: transformers") && model.contains("base_model:finetune:org/base"),
            "{model}"
        );
        let gguf = card(&["m-q4_k_m.gguf"]).unwrap();
        assert!(gguf.contains("library_name: gguf") && gguf.contains("qlora chat me/m:m-q4_k_m.gguf"), "{gguf}");
        assert!(card(&["notes.txt"]).is_none());
    }
}
