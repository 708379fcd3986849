//! `qlora adapters`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use qlora::adapter::{self, AdapterConfig, AdapterDtype, AdapterKinds, SaveOptions, TrainedOver};
use qlora::lora::LoraConfig;
use qlora::open::{OpenOptions, open_config};
use serde_json::{Value, json};

use crate::output::{self, TITLE};

/// Lists adapters, shows an adapter's contents, stores one in another precision.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Lists the adapters below a folder.
    List {
        /// The folder in which adapters are searched.
        #[arg(default_value = ".")]
        folder: PathBuf,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Shows an adapter's options, kinds and file.
    Show {
        /// A folder or a hub id.
        adapter: String,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Writes an adapter of any kind in PEFT's format, in another precision.
    Convert {
        /// A folder or a hub id.
        adapter: String,
        /// The folder to write.
        out: PathBuf,
        /// f32, bf16 or f16.
        #[arg(long, default_value = "f32")]
        dtype: String,
        /// The model that the adapter is for; if not given, what the adapter names.
        #[arg(long)]
        base: Option<String>,
    },
}

/// Folders within folders that are searched.
const DEPTH: usize = 4;
const CONFIG: &str = "adapter_config.json";

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.action {
        Action::List { folder, json } => list(folder, *json),
        Action::Show { adapter, json } => show(adapter, *json),
        Action::Convert { adapter, out, dtype, base } => convert(adapter, out, dtype, base.as_deref()),
    }
}

fn list(folder: &Path, json: bool) -> Result<()> {
    let mut found = Vec::new();
    search(folder, DEPTH, &mut found).with_context(|| folder.display().to_string())?;
    found.sort();
    let described: Vec<(String, Result<Value>)> =
        found.iter().map(|path| (path.display().to_string(), describe(path))).collect();
    if json {
        let rows = described.into_iter().map(|(path, value)| match value {
            Ok(mut value) => {
                value["path"] = path.into();
                value
            }
            Err(error) => json!({ "path": path, "error": format!("{error:#}") }),
        });
        return Ok(output::print_json(&rows.collect())?);
    }
    let mut text = String::new();
    for (path, value) in &described {
        text += &match value {
            Ok(value) => {
                let base = value["base_model"].as_str().unwrap_or("no base named");
                format!("{TITLE}{path}{TITLE:#}  r {}, {}, {base}\n", value["r"], kinds_of(value))
            }
            Err(error) => format!("{TITLE}{path}{TITLE:#}  {error:#}\n"),
        };
    }
    if described.is_empty() {
        output::remark(format!("no adapter (folder with {CONFIG}) below {}", folder.display()));
    }
    Ok(output::print(&text)?)
}

fn search(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    if folder.join(CONFIG).is_file() {
        found.push(folder.to_owned());
    }
    if depth == 0 {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        // Links could lead in circles; folders that may not be read hold nothing of ours.
        if entry.file_type()?.is_dir() && !entry.file_name().to_string_lossy().starts_with('.') {
            let _ = search(&entry.path(), depth - 1, found);
        }
    }
    Ok(())
}

fn kinds_of(value: &Value) -> String {
    let kinds: Vec<&str> = value["kinds"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    kinds.join(" + ")
}

fn show(adapter: &str, json: bool) -> Result<()> {
    let folder = adapter::locate(adapter, None, &OpenOptions { progress: true, ..OpenOptions::default() })?;
    let value = describe(&folder)?;
    if json {
        return Ok(output::print_json(&value)?);
    }
    let mut text = format!("{TITLE}{}{TITLE:#}\n", folder.display());
    for (name, entry) in value.as_object().into_iter().flatten().filter(|(_, entry)| !entry.is_null()) {
        let entry = match entry {
            Value::String(text) => text.clone(),
            Value::Array(list) => list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "),
            other => other.to_string(),
        };
        text += &format!("  {:18} {entry}\n", name.replace('_', " "));
    }
    Ok(output::print(&text)?)
}

/// A JSON description of an adapter folder: its configuration, its kinds of modules and its weight file.
fn describe(folder: &Path) -> Result<Value> {
    let (AdapterConfig { lora, base_model_name_or_path, revision }, kinds) = adapter::read_any_config(folder)?;
    let weights = ["adapter_model.safetensors", "adapter_model.bin"].map(|name| folder.join(name));
    let weights = weights.iter().find_map(|path| Some((path, path.metadata().ok()?.len())));
    Ok(json!({
        "base_model": base_model_name_or_path,
        "revision": revision,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "scaling": lora.scaling(),
        "use_rslora": lora.use_rslora,
        "target_modules": serde_json::to_value(&lora.target_modules)?,
        "kinds": kind_names(&lora, &kinds),
        "trained_over": TrainedOver::read(folder)?.map(|over| over.to_string()),
        "file": weights.map(|(path, _)| path.file_name().map(|name| name.to_string_lossy().into_owned())),
        "bytes": weights.map(|(_, bytes)| bytes),
    }))
}

fn kind_names(lora: &LoraConfig, kinds: &AdapterKinds) -> Vec<&'static str> {
    let optional = [
        (lora.use_dora, "DoRA"),
        (kinds.lora_bias, "bias of B"),
        (!lora.rank_pattern.is_empty() || !lora.alpha_pattern.is_empty(), "ranks or alphas by layer"),
        (!kinds.modules_to_save.is_empty(), "whole modules"),
        (!kinds.trainable_token_indices.is_empty(), "token rows"),
        (kinds.bias != adapter::TrainedBias::None, "biases"),
    ];
    ["LoRA"].into_iter().chain(optional.into_iter().filter_map(|(is, name)| is.then_some(name))).collect()
}

fn convert(spec: &str, out: &Path, dtype: &str, base: Option<&str>) -> Result<()> {
    if out.exists() {
        bail!("{} exists already; choose another name or delete it", out.display());
    }
    let dtype = match dtype {
        "f32" | "float32" => AdapterDtype::F32,
        "bf16" | "bfloat16" => AdapterDtype::BF16,
        "f16" | "float16" => AdapterDtype::F16,
        other => bail!("--dtype {other} is not f32, bf16 or f16"),
    };
    let options = OpenOptions { progress: true, ..OpenOptions::default() };
    let folder = adapter::locate(spec, None, &options)?;
    let (config, _) = adapter::read_any_config(&folder)?;
    let base = match (base, &config.base_model_name_or_path) {
        (Some(base), _) => base.to_owned(),
        (None, Some(base)) => base.clone(),
        (None, None) => bail!("the adapter names no base model: give --base"),
    };
    let model =
        open_config(&base, &options).with_context(|| format!("{base}, the base; --base takes another place of it"))?;
    let read = adapter::open_folder(&folder, &model)?;
    let save =
        SaveOptions { dtype, base_model_name_or_path: Some(base), revision: config.revision, ..SaveOptions::default() };
    read.save(out, &save)?;
    Ok(output::print(&format!("{}\n", out.display()))?)
}
