//! The parsers of model files, and how each is driven. Those of texts are in [`targets_text`](super::targets_text).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use qlora::adapter;
use qlora::config::ModelConfig;
use qlora::formats::{Gguf, HfDirectory};
use qlora::source::WeightSource;
use qlora::tokenizer::Tokenizer;
use qlora::trainer::checkpoint;
use serde_json::Value;

use super::mutate::{self, Rng};
use super::mutate_files::{self, parts};
use super::seeds::{Seeds, fixture, fixtures};
use super::targets_text;

/// Makes an input from a valid file and another one of the same kind.
pub(crate) type Mutate = fn(&mut Rng, &[u8], &[u8]) -> Vec<u8>;

/// Reads an input that was made from the file of that number; returns whether it was accepted.
pub(crate) type Parser = dyn Fn(usize, &[u8]) -> bool;

/// One parser.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    /// Its share of the inputs.
    pub(crate) weight: u64,
    /// Valid files.
    pub(crate) files: Vec<Vec<u8>>,
    pub(crate) mutate: Mutate,
    /// Whether an input has the right outermost syntax.
    pub(crate) passes: fn(&[u8]) -> bool,
    /// Reads an input that was made from the file of that number; returns whether it was accepted.
    pub(crate) run: Box<Parser>,
}

/// Every parser, each with files that it accepts.
pub(crate) fn all(folder: &Path) -> Result<Vec<Target>> {
    let seeds = Seeds::make(folder)?;
    let mut targets = vec![
        safetensors(folder, &seeds)?,
        shard_index(folder)?,
        quantization_config(folder)?,
        gguf_model(folder, &seeds)?,
        gguf_tokenizer(folder)?,
        pickled_model(folder)?,
        adapter_config(folder, &seeds)?,
        adapter_weights(folder, &seeds)?,
        trainer_state(folder, &seeds)?,
        optimizer_state(folder, &seeds)?,
    ];
    targets.extend(targets_text::all(folder, &seeds)?);
    for target in &targets {
        for (which, file) in target.files.iter().enumerate() {
            ensure!((target.passes)(file) && (target.run)(which, file), "{}: file {which} is refused", target.name);
        }
    }
    Ok(targets)
}

pub(crate) fn is_json(input: &[u8]) -> bool {
    serde_json::from_slice::<Value>(input).is_ok()
}

fn is_safetensors(input: &[u8]) -> bool {
    parts(input).is_some_and(|(header, _)| is_json(header))
}

fn is_gguf(input: &[u8]) -> bool {
    input.starts_with(b"GGUF\x03\0\0\0") || input.starts_with(b"GGUF\x02\0\0\0")
}

/// A folder with copies of all files of another one.
pub(crate) fn copy(folder: &Path, name: &str, from: &Path) -> Result<PathBuf> {
    let to = folder.join(name);
    fs::create_dir_all(&to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if let Some(name) = path.file_name().filter(|_| path.is_file()) {
            fs::write(to.join(name), fs::read(&path)?)?;
        }
    }
    Ok(to)
}

/// Writes an input where a parser expects it.
pub(crate) fn put(path: &Path, input: &[u8]) {
    fs::write(path, input).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn read_all(source: &dyn WeightSource) -> bool {
    // Every tensor is read, also behind one that is refused.
    let refused = |name: &&String| match source.is_packed(name) {
        true => source.read_weight(name).is_err(),
        false => source.read(name).is_err(),
    };
    source.names().iter().filter(refused).count() == 0
}

const QUANTIZED: [&str; 5] = ["bnb_nf4_nested_u8", "bnb_fp4_f32", "bnb_int8", "gptq_act_order", "awq"];

fn safetensors(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let mut folders = vec![copy(folder, "safetensors", &seeds.model)?];
    for name in QUANTIZED {
        folders.push(copy(folder, &format!("safetensors-{name}"), &fixtures().join("quantized").join(name))?);
    }
    let files = folders.iter().map(|folder| fs::read(folder.join("model.safetensors"))).collect::<Result<_, _>>()?;
    Ok(Target {
        name: "safetensors",
        weight: 10,
        files,
        mutate: mutate_files::safetensors,
        passes: is_safetensors,
        run: Box::new(move |which, input| {
            put(&folders[which].join("model.safetensors"), input);
            HfDirectory::open(&folders[which]).is_ok_and(|source| read_all(&source))
        }),
    })
}

/// Both layouts of `torch.save`. The older one has no checksums, so that every change reaches the pickle machine.
fn pickled_model(folder: &Path) -> Result<Target> {
    let folder = copy(folder, "pickles", &fixtures().join("pickles/model"))?;
    fs::remove_file(folder.join("model.safetensors"))?;
    Ok(Target {
        name: "pickles",
        weight: 10,
        files: vec![fixture("pickles/legacy/pytorch_model.bin")?, fixture("pickles/zip/pytorch_model.bin")?],
        mutate: mutate_files::pickle,
        passes: |input| input.starts_with(b"\x80\x02\x8a\x0a") || input.starts_with(b"PK\x03\x04"),
        run: Box::new(move |_, input| {
            put(&folder.join("pytorch_model.bin"), input);
            HfDirectory::open(&folder).is_ok_and(|source| read_all(&source))
        }),
    })
}

fn shard_index(folder: &Path) -> Result<Target> {
    let folder = copy(folder, "index", &fixtures().join("loading/llama"))?;
    Ok(Target {
        name: "shard index",
        weight: 6,
        files: vec![fixture("loading/llama/model.safetensors.index.json")?],
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(move |_, input| {
            put(&folder.join("model.safetensors.index.json"), input);
            HfDirectory::open(&folder).is_ok()
        }),
    })
}

fn quantization_config(folder: &Path) -> Result<Target> {
    let mut folders = Vec::new();
    for name in QUANTIZED {
        folders.push(copy(folder, &format!("quantization-{name}"), &fixtures().join("quantized").join(name))?);
    }
    let files = folders.iter().map(|folder| fs::read(folder.join("config.json"))).collect::<Result<_, _>>()?;
    Ok(Target {
        name: "quantization config",
        weight: 6,
        files,
        // The quantization's part alone: the rest is the model configuration's.
        mutate: |rng, input, other| {
            let (Ok(mut config), Ok(donor)) =
                (serde_json::from_slice::<Value>(input), serde_json::from_slice::<Value>(other))
            else {
                return mutate::bytes(rng, input, other);
            };
            mutate::change_json(rng, &mut config["quantization_config"], &donor["quantization_config"]);
            config.to_string().into_bytes()
        },
        passes: is_json,
        run: Box::new(move |which, input| {
            put(&folders[which].join("config.json"), input);
            HfDirectory::open(&folders[which]).is_ok_and(|source| read_all(&source))
        }),
    })
}

fn gguf_model(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let path = folder.join("input.gguf");
    Ok(Target {
        name: "GGUF model",
        weight: 10,
        files: vec![fs::read(&seeds.gguf)?],
        mutate: mutate_files::gguf,
        passes: is_gguf,
        run: Box::new(move |_, input| {
            put(&path, input);
            let Ok(source) = Gguf::open(&path) else { return false };
            let template = source.chat_template().is_ok();
            let tokenizer = Tokenizer::from_gguf(&source).is_ok_and(|tokenizer| try_tokenizer(&tokenizer));
            read_all(&source) && template && tokenizer
        }),
    })
}

fn gguf_tokenizer(folder: &Path) -> Result<Target> {
    let path = folder.join("tokenizer.gguf");
    let names = ["spm", "byte-level-llama-bpe", "byte-level-qwen2", "byte-level-tekken"];
    let files = names.iter().map(|name| fixture(&format!("tokenizer/{name}.gguf"))).collect::<Result<_>>()?;
    Ok(Target {
        name: "GGUF tokenizer",
        weight: 8,
        files,
        mutate: mutate_files::gguf,
        passes: is_gguf,
        run: Box::new(move |_, input| {
            put(&path, input);
            Tokenizer::from_gguf_file(&path).is_ok_and(|tokenizer| try_tokenizer(&tokenizer))
        }),
    })
}

/// Encodes and decodes; both may refuse.
pub(crate) fn try_tokenizer(tokenizer: &Tokenizer) -> bool {
    let text = "the water  x</s>\n123 é😀 \u{301}<s>";
    let encoded = tokenizer.encode(text, true);
    let pieces = tokenizer.encode_pieces(text, false).is_ok();
    let spans = tokenizer.encode_with_spans(text, &[0..3, 4..9], true).is_ok();
    let decoded = encoded.as_ref().is_ok_and(|ids| tokenizer.decode(ids, true).is_ok());
    let mut stream = tokenizer.decode_stream(false);
    let streamed = encoded.is_ok_and(|ids| ids.iter().all(|&id| stream.push(id).is_ok())) && stream.finish().is_ok();
    pieces && spans && decoded && streamed
}

const ADAPTERS: [&str; 8] =
    ["dora", "bias_all", "patterns", "regex", "layers", "save_head_norms", "tokens_both", "head_lora"];

fn adapter_folders(folder: &Path, kind: &str, seeds: &Seeds) -> Result<Vec<(PathBuf, ModelConfig)>> {
    let trained = ModelConfig::from_json_file(seeds.model.join("config.json"))?;
    let mut folders = vec![(copy(folder, kind, &seeds.checkpoint)?, trained)];
    for name in ADAPTERS {
        let from = fixtures().join("peft_kinds").join(name);
        folders.push((copy(folder, &format!("{kind}-{name}"), &from)?, kinds_base(name)?));
    }
    Ok(folders)
}

/// The configuration of the model that an adapter of `peft_kinds` is for.
fn kinds_base(name: &str) -> Result<ModelConfig> {
    let facts: Value = serde_json::from_slice(&fixture("peft_kinds/facts.json")?)?;
    let base = facts[name]["base"].as_str().context("every kind has a base")?;
    Ok(ModelConfig::from_json_file(fixtures().join(base).join("config.json"))?)
}

fn adapter_config(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let folders = adapter_folders(folder, "adapter-config", seeds)?;
    let files =
        folders.iter().map(|(folder, _)| fs::read(folder.join(adapter::CONFIG_FILE))).collect::<Result<_, _>>()?;
    Ok(Target {
        name: "adapter_config.json",
        weight: 6,
        files,
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(move |which, input| {
            let (folder, config) = &folders[which];
            put(&folder.join(adapter::CONFIG_FILE), input);
            let _ = adapter::load(folder, config);
            adapter::open_folder(folder, config).is_ok()
        }),
    })
}

fn adapter_weights(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let folders = adapter_folders(folder, "adapter-weights", seeds)?;
    let files =
        folders.iter().map(|(folder, _)| fs::read(folder.join(adapter::WEIGHTS_FILE))).collect::<Result<_, _>>()?;
    Ok(Target {
        name: "adapter weights",
        weight: 6,
        files,
        mutate: mutate_files::safetensors,
        passes: is_safetensors,
        run: Box::new(move |which, input| {
            let (folder, config) = &folders[which];
            put(&folder.join(adapter::WEIGHTS_FILE), input);
            let _ = adapter::load(folder, config);
            adapter::open_folder(folder, config).is_ok()
        }),
    })
}

fn trainer_state(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let folder = copy(folder, "checkpoint-state", &seeds.checkpoint)?;
    Ok(Target {
        name: "trainer_state.json",
        weight: 6,
        files: vec![fs::read(folder.join("trainer_state.json"))?],
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(move |_, input| {
            put(&folder.join("trainer_state.json"), input);
            checkpoint::load(&folder).is_ok()
        }),
    })
}

fn optimizer_state(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let folder = copy(folder, "checkpoint-optimizer", &seeds.checkpoint)?;
    Ok(Target {
        name: "optimizer.safetensors",
        weight: 6,
        files: vec![fs::read(folder.join("optimizer.safetensors"))?],
        mutate: mutate_files::safetensors,
        passes: is_safetensors,
        run: Box::new(move |_, input| {
            put(&folder.join("optimizer.safetensors"), input);
            checkpoint::load(&folder).is_ok()
        }),
    })
}
