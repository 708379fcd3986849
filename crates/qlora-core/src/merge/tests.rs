use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use qlora_kernels::Dtype;
use qlora_kernels::quant::{QuantConfig, Quantized4bit};
use qlora_kernels::weight::PlainData;
use safetensors::SafeTensors;

use super::*;
use crate::adapter::{self, SavedAdapter};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::formats::HfDirectory;
use crate::model::{CausalLm, LoadOptions, Quantization};
use crate::open::{OpenOptions, open_model};
use crate::source::{PlainTensor, WeightSource};
use crate::test_support::{largest, logits};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn base() -> HfDirectory {
    HfDirectory::open(fixtures().join("peft/base")).unwrap()
}

fn adapter_of(name: &str, source: &HfDirectory) -> SavedAdapter {
    adapter::load(fixtures().join("peft").join(name), source.config()).unwrap()
}

/// PEFT's input and logits for an adapter.
fn peft_logits(name: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(fixtures().join("peft/logits.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let width = ids.data().len() / ids.shape().iter().product::<usize>();
    let tokens = ids.data().chunks(width).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect();
    let logits = file.tensor(name).unwrap();
    (tokens, logits.data().as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
}

#[test]
fn merged_folders_have_the_logits_of_peft() {
    let source = base();
    for name in ["adapter_list", "adapter_regex", "adapter_rslora", "adapter_bf16"] {
        let adapter = adapter_of(name, &source);
        let update = LoraUpdate::new(&adapter).unwrap();
        let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::Stored).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("merged");
        let mut done = 0;
        // Small shards, so that there are several.
        let options = FolderOptions { max_shard_bytes: 100_000, ..FolderOptions::default() };
        let progress = |n, _| {
            // Nothing has the final name before everything is there.
            assert!(!out.exists());
            done = n;
        };
        let written = write_folder(&merged, &Companions::default(), &out, &options, progress).unwrap();
        assert_eq!(done, source.names().len());
        assert!(written.shards > 1, "{written:?}");
        let read = HfDirectory::open(&out).unwrap();
        let (tokens, expected) = peft_logits(name);
        let difference = largest(&logits(&read, &tokens), &expected);
        assert!(difference < 1e-4, "{name}: {difference}");
        let figures = merged.figures();
        assert_eq!(figures.layers, adapter.layout.modules().count());
        assert!(figures.largest > 0.0 && figures.mean > 0.0 && figures.relative > 0.0, "{figures:?}");
        assert_eq!(figures.rounding, 0.0, "the base is f32");
    }
}

#[test]
fn the_sum_is_rounded_once() {
    let source = base();
    let adapter = adapter_of("adapter_list", &source);
    let update = LoraUpdate::new(&adapter).unwrap();
    let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::To(Dtype::Bf16)).unwrap();
    let name = "model.layers.1.mlp.down_proj.weight";
    let (w, pair) = (source.read(name).unwrap(), adapter.layout.get("model.layers.1.mlp.down_proj").unwrap());
    let (rows, cols, r) = (w.shape[0], w.shape[1], pair.rank());
    let (a, b) = (&adapter.weights[pair.a.range()], &adapter.weights[pair.b.range()]);
    let w = w.into_f32();
    let PlainData::Bf16(got) = merged.read(name).unwrap().data else { panic!("not bf16") };
    let mut change = 0f64;
    for row in 0..rows {
        for col in 0..cols {
            let product: f64 = (0..r).map(|k| f64::from(b[row * r + k]) * f64::from(a[k * cols + col])).sum();
            let exact = f64::from(w[row * cols + col]) + 2.0 * product;
            change = change.max((2.0 * product).abs());
            let got = got[row * cols + col].to_f64();
            // Half a unit in the last of bf16's 8 places, and a little for f32's sum.
            let half_unit = (exact.abs().log2().floor() - 8.0).exp2();
            assert!((got - exact).abs() <= half_unit * (1.0 + 1e-3) + 1e-8, "{got} {exact}");
        }
    }
    let figures = merged.figures();
    assert_eq!((figures.layers, figures.largest_in.as_str()), (1, name));
    assert!((f64::from(figures.largest) - change).abs() < 1e-6, "{figures:?} {change}");
    assert!(figures.rounding > 0.0 && figures.rounding < 0.2, "{figures:?}");
    // Unrounded for writers that round themselves; the others stay what they are.
    let unrounded = MergedSource::new(&source, &update, MergeInto::Original, Rounding::None).unwrap();
    assert!(matches!(unrounded.read(name).unwrap().data, PlainData::F32(_)));
    assert_eq!(unrounded.figures().rounding, 0.0);
    // Tensors without an adapter only change their precision.
    let norm = merged.read("model.norm.weight").unwrap();
    let expected: Vec<f32> =
        source.read("model.norm.weight").unwrap().into_f32().iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
    assert_eq!(norm.into_f32(), expected);
}

#[test]
fn the_dequantized_base_is_the_one_that_is_trained_on() {
    let source = base();
    let adapter = adapter_of("adapter_list", &source);
    let update = LoraUpdate::new(&adapter).unwrap();
    let config = QuantConfig::default();
    let merged = MergedSource::new(&source, &update, MergeInto::Dequantized(config), Rounding::Stored).unwrap();
    // A layer without an adapter is the dequantized one, bit for bit.
    let name = "model.layers.0.self_attn.o_proj.weight";
    let plain = source.read(name).unwrap();
    let quantized = Quantized4bit::quantize(&plain.data, plain.shape[0], plain.shape[1], &config).unwrap();
    let PlainData::F32(expected) = quantized.dequantize(Dtype::F32) else { unreachable!() };
    assert_eq!(merged.read(name).unwrap().into_f32(), expected);
    // The embedding was never quantized.
    let embedding = "model.embed_tokens.weight";
    assert_eq!(merged.read(embedding).unwrap().into_f32(), source.read(embedding).unwrap().into_f32());
    // The whole model answers as base and adapter do.
    let tokens = peft_logits("adapter_list").0;
    let put_on = |model: &mut CausalLm| {
        model.set_adapter(adapter.config.lora.clone(), adapter.layout.clone(), adapter.weights.clone())
    };
    let (_, gaps) = gap::measure(&source, &update, put_on, Quantization::Bits4(config), &tokens, 64).unwrap();
    let [(MergeInto::Original, original), (MergeInto::Dequantized(_), dequantized)] = *gaps else { panic!("{gaps:?}") };
    assert!(dequantized.largest < 1e-4 && dequantized.same_best == 1.0, "{dequantized:?}");
    assert!(dequantized.divergence < 1e-8, "{dequantized:?}");
    assert!(original.largest > 100.0 * dequantized.largest && original.divergence > 1e-6, "{original:?}");
    assert_eq!(original.perplexity_before, dequantized.perplexity_before);
    assert!((dequantized.perplexity_after / dequantized.perplexity_before - 1.0).abs() < 1e-5);
    // Without quantization there is one way.
    let (_, plain) = gap::measure(&source, &update, put_on, Quantization::None, &tokens, 64).unwrap();
    assert_eq!(plain.len(), 1);
    assert!(plain[0].1.largest < 1e-4, "{plain:?}");
    assert!(gap::measure(&source, &update, put_on, Quantization::None, &tokens[..1], 64).is_err());
}

#[test]
fn perplexity_and_divergence_are_what_they_are_called() {
    // Logits that do not depend on the input: a model without blocks' influence is not at hand, so the formulas are
    // checked against each other by hand on a model's own logits.
    let source = base();
    let model = CausalLm::load(&source, LoadOptions::default()).unwrap();
    let tokens = peft_logits("adapter_list").0;
    let reference = gap::Reference::new(&model, &tokens, 10).unwrap();
    assert_eq!(reference.tokens().len(), 10);
    let same = reference.gap(&model).unwrap();
    assert_eq!((same.largest, same.mean, same.divergence, same.same_best), (0.0, 0.0, 0.0, 1.0));
    let all = logits(&source, &tokens[..10]);
    let vocab = source.config().vocab_size;
    let mut nats = 0.0;
    for position in 0..9 {
        let row = &all[position * vocab..(position + 1) * vocab];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        nats -= (f64::from(row[tokens[position + 1] as usize]).exp() / sum).ln();
    }
    assert!((same.perplexity_before / (nats / 9.0).exp() - 1.0).abs() < 1e-6, "{same:?}");
}

/// Gives the model two more tokens and a head of its own, as fully trained modules in an adapter do.
#[derive(Debug)]
struct Resized {
    embedding: PlainTensor,
}

impl WeightUpdate for Resized {
    fn targets(&self) -> Vec<String> {
        Vec::new()
    }

    fn apply(&self, _: &str, _: std::ops::Range<usize>, _: usize, _: &mut [f32]) -> Result<()> {
        Err(Error::Invalid("has no targets".into()))
    }

    fn replacement(&self, name: &str) -> Option<PlainTensor> {
        matches!(name, "model.embed_tokens.weight" | "lm_head.weight").then(|| self.embedding.clone())
    }

    fn config(&self, base: &ModelConfig) -> ModelConfig {
        ModelConfig { vocab_size: self.embedding.shape[0], tie_word_embeddings: false, ..base.clone() }
    }
}

#[test]
fn tied_heads_stay_absent_and_resized_vocabularies_are_written() {
    let tied = HfDirectory::open(fixtures().join("models/qwen2")).unwrap();
    let model = tied.config().clone();
    let lora = crate::lora::LoraConfig { r: 2, ..Default::default() };
    let layout = crate::lora::AdapterLayout::for_model(&lora, &model).unwrap();
    let weights = vec![0.05; layout.len()];
    let config = adapter::AdapterConfig { lora, base_model_name_or_path: None, revision: None };
    let adapter = SavedAdapter { config, layout, weights };
    let update = LoraUpdate::new(&adapter).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("merged");
    let config_json = Some(std::fs::read_to_string(fixtures().join("models/qwen2/config.json")).unwrap());
    let options = FolderOptions { config_json, ..FolderOptions::default() };
    let merged = MergedSource::new(&tied, &update, MergeInto::Original, Rounding::Stored).unwrap();
    let written = write_folder(&merged, &Companions::default(), &out, &options, |_, _| ()).unwrap();
    assert_eq!((written.shards, written.bytes), (1, std::fs::metadata(out.join("model.safetensors")).unwrap().len()));
    let read = HfDirectory::open(&out).unwrap();
    assert_eq!(*read.config(), model);
    assert!(model.tie_word_embeddings && !read.names().contains(&"lm_head.weight".to_owned()));
    // Entries of other programs are kept.
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!((&json["transformers_version"], &json["torch_dtype"]), (&"5.23.0".into(), &"bfloat16".into()));

    let [rows, cols] = [model.vocab_size + 2, model.hidden_size];
    let embedding = PlainTensor { data: PlainData::F32(vec![0.5; rows * cols]), shape: vec![rows, cols] };
    let resized = Resized { embedding };
    let merged = MergedSource::new(&tied, &resized, MergeInto::Original, Rounding::Stored).unwrap();
    let out = folder.path().join("resized");
    write_folder(&merged, &Companions::default(), &out, &options, |_, _| ()).unwrap();
    let read = HfDirectory::open(&out).unwrap();
    assert_eq!((read.config().vocab_size, read.config().tie_word_embeddings), (rows, false));
    assert_eq!(read.shape("lm_head.weight").unwrap(), [rows, cols]);
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_left() {
    let source = base();
    let wide = HfDirectory::open(fixtures().join("models/llama_wide")).unwrap();
    let adapter = adapter_of("adapter_list", &source);
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    // The adapter of a model with more layers.
    let mut more = adapter.clone();
    more.layout = crate::lora::AdapterLayout::for_model(
        &adapter.config.lora,
        &ModelConfig { num_hidden_layers: 3, ..source.config().clone() },
    )
    .unwrap();
    more.weights = vec![0.0; more.layout.len()];
    let update = LoraUpdate::new(&more).unwrap();
    let error = MergedSource::new(&source, &update, MergeInto::Original, Rounding::Stored).unwrap_err().to_string();
    assert!(error.contains("model.layers.2") && error.contains("no such tensor"), "{error}");
    // Of a model with other widths: found while writing, and nothing is left.
    let update = LoraUpdate::new(&adapter).unwrap();
    let merged = MergedSource::new(&wide, &update, MergeInto::Original, Rounding::Stored).unwrap();
    let error = write_folder(&merged, &Companions::default(), &out, &FolderOptions::default(), |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("do not fit the adapter's"), "{error}");
    // A buffer that is too short, values that do not fit f16, an existing folder, a damaged configuration.
    let short = SavedAdapter { weights: vec![0.0; 3], ..adapter.clone() };
    assert!(LoraUpdate::new(&short).unwrap_err().to_string().contains("holds 3"));
    let huge = SavedAdapter { weights: vec![1e3; adapter.weights.len()], ..adapter.clone() };
    let update = LoraUpdate::new(&huge).unwrap();
    let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::To(Dtype::F16)).unwrap();
    let error = write_folder(&merged, &Companions::default(), &out, &FolderOptions::default(), |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("choose bf16 or f32"), "{error}");
    let nan = SavedAdapter { weights: vec![f32::NAN; adapter.weights.len()], ..adapter.clone() };
    let nan_update = LoraUpdate::new(&nan).unwrap();
    let merged = MergedSource::new(&source, &nan_update, MergeInto::Original, Rounding::Stored).unwrap();
    let error = write_folder(&merged, &Companions::default(), &out, &FolderOptions::default(), |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("base or adapter are damaged"), "{error}");
    let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::Stored).unwrap();
    let error = write_folder(&merged, &Companions::default(), folder.path(), &FolderOptions::default(), |_, _| ());
    assert!(error.unwrap_err().to_string().contains("exists already"));
    let options = FolderOptions { config_json: Some("{".into()), ..FolderOptions::default() };
    assert!(write_folder(&merged, &Companions::default(), &out, &options, |_, _| ()).is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn what_belongs_to_a_model_is_carried_along() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("base");
    std::fs::create_dir_all(root.join("additional_chat_templates")).unwrap();
    for name in ["config.json", "model.safetensors", "generation_config.json"] {
        std::fs::copy(fixtures().join("peft/base").join(name), root.join(name)).unwrap();
    }
    // A vocabulary that fits the embedding.
    let tokenizer =
        r#"{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}"#;
    std::fs::write(root.join("tokenizer.json"), tokenizer).unwrap();
    std::fs::write(root.join("tokenizer_config.json"), r#"{"eos_token": "b", "chat_template": "base"}"#).unwrap();
    std::fs::write(root.join("additional_chat_templates/tools.jinja"), "tools").unwrap();
    std::fs::write(root.join("LICENSE"), "free").unwrap();
    std::fs::write(root.join("pytorch_model.bin"), "not this").unwrap();
    let model = open_model(root.to_str().unwrap(), &OpenOptions::default()).unwrap();
    let companions = Companions::of(&model).unwrap();
    let names = [
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(companions.names().collect::<Vec<_>>(), names);
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    companions.write(&out).unwrap();
    assert_eq!(std::fs::read_to_string(out.join("additional_chat_templates/tools.jinja")).unwrap(), "tools");

    // An adapter's tokenizer takes over; the base's template stays, as the adapter has none.
    let own = folder.path().join("adapter");
    std::fs::create_dir(&own).unwrap();
    std::fs::write(own.join("tokenizer.json"), tokenizer.replace("\"b\"", "\"c\"")).unwrap();
    let options = OpenOptions { adapter: Some(own.clone()), ..OpenOptions::default() };
    let open = || open_model(root.to_str().unwrap(), &options).unwrap();
    let companions = Companions::of(&open()).unwrap();
    assert_eq!(companions.get("chat_template.jinja"), Some(&b"base"[..]));
    assert!(companions.get("tokenizer_config.json").is_none());
    assert!(companions.get("tokenizer.json").is_some_and(|bytes| bytes.windows(3).any(|part| part == b"\"c\"")));
    assert_eq!(companions.get("LICENSE"), Some(&b"free"[..]));
    std::fs::write(own.join("chat_template.jinja"), "own").unwrap();
    let companions = Companions::of(&open()).unwrap();
    assert_eq!(companions.get("chat_template.jinja"), Some(&b"own"[..]));
    assert!(companions.get("additional_chat_templates/tools.jinja").is_none());
    // Tokens beyond the embedding.
    open().check_vocabulary(model.source.config().vocab_size).unwrap();
    assert!(open().check_vocabulary(1).unwrap_err().to_string().contains("resized vocabulary"));
    model.check_vocabulary(1).unwrap();
    // A template that was given replaces the one in tokenizer_config.json, which would be a second one.
    let given = folder.path().join("given.jinja");
    std::fs::write(&given, "given").unwrap();
    let options = OpenOptions { chat_template_path: Some(given), ..OpenOptions::default() };
    let companions = Companions::of(&open_model(root.to_str().unwrap(), &options).unwrap()).unwrap();
    assert_eq!(companions.get("chat_template.jinja"), Some(&b"given"[..]));
    let config = String::from_utf8_lossy(companions.get("tokenizer_config.json").unwrap()).into_owned();
    assert!(config.contains("eos_token") && !config.contains("chat_template"), "{config}");
    assert!(companions.get("additional_chat_templates/tools.jinja").is_none());
}

#[test]
fn a_source_reads_the_same_twice() {
    let source = base();
    let adapter = adapter_of("adapter_rslora", &source);
    let update = LoraUpdate::new(&adapter).unwrap();
    let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::Stored).unwrap();
    let read = || -> BTreeMap<String, Vec<u32>> {
        let bits = |name: &String| merged.read(name).unwrap().into_f32().iter().map(|x| x.to_bits()).collect();
        merged.names().iter().map(|name| (name.clone(), bits(name))).collect()
    };
    let (first, figures) = (read(), merged.figures());
    assert!(read() == first && merged.figures() == figures);
    assert!(merged.read("no.such.weight").unwrap_err().to_string().contains("no.such.weight"));
}
