//! `qlora export`.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use qlora::adapter::{self, PeftAdapter, TrainedOver};
use qlora::config::ModelConfig;
use qlora::export::gguf::{self, GgufOptions, GgufType, WrittenGguf};
use qlora::export::modelfile::{Modelfile, go_template};
use qlora::kernels::Dtype;
use qlora::merge::{
    Companions, FolderOptions, MergeChoice, MergeInto, MergedSource, PeftUpdate, Rounding, WeightUpdate, write_folder,
};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::source::WeightSource;
use serde_json::{Value, json};

use crate::importance::ImportanceArgs;
use crate::model::base_of;
use crate::output::{self, line};

/// Writes a model for other programs: GGUF for llama.cpp and Ollama, a folder for vLLM and transformers, an adapter alone as GGUF.
///
/// An adapter is merged into the base first (as `qlora merge` does, into the weights that it was trained over), but for
/// `--format gguf-lora`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora export HuggingFaceTB/SmolLM2-135M-Instruct --type q4_k_m --out models/
  qlora export --adapter output --type q4_k_m --out model.gguf --modelfile
  qlora export --adapter output --format gguf-lora --out adapter.gguf
  qlora export --adapter output --format safetensors --out for-vllm
  qlora export big-model --type q4_k_m --imatrix imatrix.gguf --split-max-size 5G --out models/
  qlora export MODEL --type q3_k_m --imatrix text.txt --imatrix-out imatrix.gguf --out models/")]
pub(crate) struct Args {
    /// The model: a folder, a GGUF file or a hub id; if not given, the base that the adapter names.
    #[arg(required_unless_present = "adapter")]
    model: Option<String>,
    /// A folder with a PEFT adapter, or a hub id.
    #[arg(long)]
    adapter: Option<String>,
    /// The output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// For GGUF f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l, q4_k_s, q4_k_m (if not given), q5_k_s,
    /// q5_k_m or q6_k; for folders and adapters bf16, f16 or f32 (bf16 and f32, if not given).
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<GgufType>,
    /// The file to write (NAME.gguf), or a folder for it; for --format safetensors the folder.
    #[arg(long)]
    out: PathBuf,
    #[command(flatten)]
    importance: ImportanceArgs,
    /// Splits a model over files of at most so many bytes (5G, 500M), named NAME-00001-of-0000N.gguf.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    split_max_size: Option<u64>,
    /// Writes an Ollama Modelfile beside the GGUF file: chat template, end tokens.
    #[arg(long)]
    modelfile: bool,
    /// The system text of the Modelfile.
    #[arg(long, requires = "modelfile", value_name = "TEXT")]
    system: Option<String>,
    /// A folder or hub id whose tokenizer and chat template are taken instead of the model's own.
    #[arg(long)]
    tokenizer: Option<PathBuf>,
    /// A file with the chat template to write instead of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A file for llama.cpp, Ollama, LM Studio.
    #[default]
    Gguf,
    /// A folder with weights of 16 bits, for vLLM and transformers.
    Safetensors,
    /// The adapter alone, for llama.cpp's `--lora`.
    GgufLora,
}

/// Bytes: a number with K, M or G, which are powers of 1000 as in llama-gguf-split.
fn size(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.trim_end_matches(['b', 'B']).char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1_000),
        Some((at, 'm' | 'M')) => (&text[..at], 1_000_000),
        Some((at, 'g' | 'G')) => (&text[..at], 1_000_000_000),
        _ => (text, 1),
    };
    let bytes =
        digits.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(factor)).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(|| format!("{text:?} is no size, such as 5G or 500M"))
}

/// Says which matrices have another type because of their width, by type.
pub(crate) fn remark_fallbacks(written: &WrittenGguf) {
    let mut kinds: Vec<(&str, &str, usize, usize)> = Vec::new();
    for fallback in &written.fallbacks {
        match kinds
            .iter_mut()
            .find(|kind| (kind.0, kind.1, kind.2) == (fallback.wanted, fallback.got, fallback.columns))
        {
            Some(kind) => kind.3 += 1,
            None => kinds.push((fallback.wanted, fallback.got, fallback.columns, 1)),
        }
    }
    for (wanted, got, columns, count) in kinds {
        let example = written.fallbacks.iter().find(|f| (f.wanted, f.got, f.columns) == (wanted, got, columns));
        let example = example.map_or("", |fallback| &fallback.tensor);
        output::remark(format!(
            "{count} matrices have rows of {columns}, no whole number of blocks of {wanted}: they are {got}, as in llama.cpp (among them \
             {example})"
        ));
    }
    if let Some(first) = written.without_importance.first() {
        let count = written.without_importance.len();
        output::remark(format!(
            "the importance matrix does not know {count} matrices, among them {first}: their columns count the same"
        ));
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let gguf = args.format == Format::Gguf;
    ensure!(gguf || !args.importance.is_given(), "--imatrix is for --format gguf: nothing else is quantized");
    ensure!(gguf || args.split_max_size.is_none(), "--split-max-size is for --format gguf");
    ensure!(args.format != Format::Safetensors || !args.modelfile, "--modelfile is for GGUF files");
    let opened = Opened::new(args)?;
    match args.format {
        Format::Gguf => export_gguf(args, &opened),
        Format::Safetensors => export_folder(args, &opened),
        Format::GgufLora => export_adapter(args, &opened),
    }
}

/// The model, and the adapter with where it belongs.
struct Opened {
    files: ModelFiles,
    adapter: Option<(PeftAdapter, MergeInto)>,
}

impl Opened {
    fn new(args: &Args) -> Result<Self> {
        let options = OpenOptions { progress: !args.json, tokenizer: args.tokenizer.clone(), ..OpenOptions::default() };
        let options = OpenOptions { chat_template_path: args.chat_template.clone(), ..options };
        let Some(name) = &args.adapter else {
            let model = args.model.as_deref().context("name a model or an adapter")?;
            return Ok(Self { files: open_model(model, &options)?, adapter: None });
        };
        let folder = adapter::locate(name, None, &options)?;
        let (model, revision) = match &args.model {
            Some(model) => (model.clone(), None),
            None => base_of(&folder, "the adapter names no base model: name it before --adapter")?,
        };
        let options = OpenOptions { revision, adapter: Some(folder.clone()), ..options };
        let files = open_model(&model, &options).with_context(|| format!("{model}, the base of {name}"))?;
        let adapter = adapter::open_folder(&folder, files.source.config())?;
        let files = files.with_vocabulary_of(&adapter)?;
        let choice = MergeChoice::new(&*files.source, TrainedOver::read(&folder)?.as_ref());
        if let (Some(remark), true) = (choice.remark, args.format != Format::GgufLora) {
            output::remark(remark);
        }
        Ok(Self { files, adapter: Some((adapter, choice.into)) })
    }

    /// Calls `write` with the weights: the model's own, or merged ones.
    fn weights<T>(&self, rounding: Rounding, write: impl FnOnce(&dyn WeightSource) -> Result<T>) -> Result<T> {
        let source = &*self.files.source;
        match (&self.adapter, rounding) {
            (Some((adapter, into)), _) => {
                let update = PeftUpdate::new(adapter, source)?;
                let merged = MergedSource::new(source, &update, *into, rounding)?;
                self.files.check_vocabulary(merged.config().vocab_size)?;
                write(&merged)
            }
            (None, Rounding::To(_)) => write(&MergedSource::new(source, &Nothing, MergeInto::Original, rounding)?),
            (None, _) => write(source),
        }
    }

    /// The last part of the model's name, or of its path.
    fn name(&self, args: &Args) -> String {
        let given = args.adapter.as_deref().filter(|adapter| Path::new(adapter).is_dir()).unwrap_or(&self.files.name);
        let path = Path::new(given.trim_end_matches(['/', '\\']));
        let stem = if path.is_file() { path.file_stem() } else { path.file_name() };
        stem.and_then(|name| name.to_str()).filter(|name| !name.is_empty()).unwrap_or("model").to_owned()
    }
}

/// Changes no weight: to write a model in another precision.
struct Nothing;

impl fmt::Debug for Nothing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no adapter")
    }
}

impl WeightUpdate for Nothing {
    fn targets(&self) -> Vec<String> {
        Vec::new()
    }

    fn apply(&self, _: &str, _: std::ops::Range<usize>, _: usize, _: &mut [f32]) -> qlora::core::Result<()> {
        Ok(())
    }

    fn config(&self, base: &ModelConfig) -> ModelConfig {
        base.clone()
    }
}

/// The file to write: --out, or a name in the folder that it is.
fn file(args: &Args, name: impl FnOnce() -> String) -> Result<PathBuf> {
    let out = &args.out;
    let file = match out.extension() {
        Some(end) if end.eq_ignore_ascii_case("gguf") && !out.is_dir() => out.clone(),
        _ => {
            std::fs::create_dir_all(out).with_context(|| out.display().to_string())?;
            out.join(name())
        }
    };
    ensure!(!file.exists(), "{} exists already; choose another name or delete it", file.display());
    Ok(file)
}

fn export_gguf(args: &Args, opened: &Opened) -> Result<()> {
    let kind = args.kind.unwrap_or(GgufType::Q4KM);
    let name = opened.name(args);
    let out = file(args, || format!("{name}-{}.gguf", kind.name().to_uppercase()))?;
    let files = &opened.files;
    let options = GgufOptions {
        name: Some(&name),
        chat_template: files.chat_template.as_ref().map(|template| template.source()),
        eos_token_ids: &files.generation.eos_token_ids,
        split_bytes: args.split_max_size,
        ..GgufOptions::new(kind)
    };
    let bar = output::bar("", "{pos} of {len} tensors");
    let progress = output::count_of(&bar);
    let written = opened.weights(Rounding::None, |source| {
        let importance = args.importance.of(files, source)?;
        let options = GgufOptions { importance: importance.as_ref(), ..options };
        Ok(gguf::write(source, &files.tokenizer, &out, &options, progress)?)
    })?;
    bar.finish_and_clear();
    remark_fallbacks(&written);
    let modelfile = match args.modelfile {
        true => Some(write_modelfile(args, files, &written, None)?),
        false => None,
    };
    report(args, kind.name(), &written, modelfile)
}

fn export_adapter(args: &Args, opened: &Opened) -> Result<()> {
    let Some((adapter, _)) = &opened.adapter else {
        bail!("--format gguf-lora writes an adapter: name it with --adapter")
    };
    let kind = args.kind.unwrap_or(GgufType::F32);
    let name = opened.name(args);
    let out = file(args, || format!("{name}-lora-{}.gguf", kind.name().to_uppercase()))?;
    let written = gguf::write_adapter(adapter, opened.files.source.config(), &out, kind, Some(&name))?;
    let modelfile = match args.modelfile {
        true => Some(write_modelfile(args, &opened.files, &written, Some(&opened.files.name))?),
        false => None,
    };
    report(args, kind.name(), &written, modelfile)
}

fn export_folder(args: &Args, opened: &Opened) -> Result<()> {
    let dtype = match args.kind {
        None | Some(GgufType::Bf16) => Dtype::Bf16,
        Some(GgufType::F16) => Dtype::F16,
        Some(GgufType::F32) => Dtype::F32,
        Some(other) => bail!("--type {other} is for --format gguf; folders are bf16, f16 or f32"),
    };
    let companions = Companions::of(&opened.files)?;
    let config_json = std::fs::read_to_string(opened.files.source.path().join("config.json")).ok();
    let options = FolderOptions { config_json, ..FolderOptions::default() };
    let bar = output::bar("", "{pos} of {len} tensors");
    let progress = output::count_of(&bar);
    let written = opened
        .weights(Rounding::To(dtype), |source| Ok(write_folder(source, &companions, &args.out, &options, progress)?))?;
    bar.finish_and_clear();
    if args.json {
        let value = json!({"format": "safetensors", "type": dtype.name(), "folder": args.out, "bytes": written.bytes,
            "weight_files": written.shards});
        return Ok(output::print_json(&value)?);
    }
    line!("{}: {:.1} MB in {}", args.out.display(), written.bytes as f64 / 1e6, dtype.name());
    Ok(())
}

/// The path of the written Modelfile, and the reason why it has no template where it has none.
type WrittenModelfile = (PathBuf, Option<String>);

/// `base` is the model that the adapter belongs to.
fn write_modelfile(
    args: &Args,
    files: &ModelFiles,
    written: &WrittenGguf,
    base: Option<&str>,
) -> Result<WrittenModelfile> {
    let [file] = &written.files[..] else {
        bail!("Ollama reads no split files: leave --split-max-size or --modelfile out (the GGUF files are written)")
    };
    let here = format!("./{}", file.file_name().unwrap_or_default().to_string_lossy());
    let mut modelfile = match base {
        None => Modelfile::new(here),
        Some(base) => {
            let mut modelfile = Modelfile::new(base);
            modelfile.adapter = Some(here);
            modelfile
        }
    };
    let template = match &files.chat_template {
        None => Err("the model has no chat template".to_owned()),
        Some(template) => go_template(template, &files.tokenizer)
            .map_err(|why| format!("the model's chat template has no form in Ollama's language: {why}")),
    };
    let why_not = template.as_ref().err().cloned();
    modelfile.template = template.ok();
    modelfile.system.clone_from(&args.system);
    modelfile.stop = files.generation.eos_token_ids.iter().filter_map(|id| files.tokenizer.id_to_token(*id)).collect();
    let generation = &files.generation;
    let mut parameter = |name: &str, value: Option<String>| {
        modelfile.parameters.extend(value.map(|value| (name.to_owned(), value)));
    };
    parameter("temperature", generation.temperature.map(|value| value.to_string()));
    parameter("top_k", generation.top_k.map(|value| value.to_string()));
    parameter("top_p", generation.top_p.map(|value| value.to_string()));
    let path = file.with_file_name("Modelfile");
    let text = modelfile.text().map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))?;
    std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    if let Some(why) = &why_not {
        output::remark(format!("{}: no TEMPLATE is written, and Ollama takes its own guess: {why}", path.display()));
    }
    Ok((path, why_not))
}

fn report(args: &Args, kind: &str, written: &WrittenGguf, modelfile: Option<WrittenModelfile>) -> Result<()> {
    if args.json {
        let fallbacks: Vec<Value> = written
            .fallbacks
            .iter()
            .map(|f| json!({"tensor": f.tensor, "columns": f.columns, "wanted": f.wanted, "got": f.got}))
            .collect();
        let format = if args.format == Format::Gguf { "gguf" } else { "gguf-lora" };
        let mut value = json!({"format": format, "type": kind, "files": written.files, "bytes": written.bytes,
            "tensors": written.tensors, "fallbacks": fallbacks, "without_importance": written.without_importance});
        if let Some((path, why_not)) = modelfile {
            value["modelfile"] = json!({"path": path, "template": why_not.is_none(), "why_no_template": why_not});
        }
        return Ok(output::print_json(&value)?);
    }
    for file in &written.files {
        line!("{}", file.display());
    }
    line!("{:.1} MB in {} tensors, {kind}", written.bytes as f64 / 1e6, written.tensors);
    if let Some((path, _)) = modelfile {
        line!("{} (ollama create NAME -f {})", path.display(), path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_in_powers_of_1000() {
        for (text, bytes) in
            [("5G", 5_000_000_000), ("500M", 500_000_000), ("7k", 7_000), ("2GB", 2_000_000_000), ("12", 12)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "0", "-1G", "1.5G", "99999999999999G"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
