//! Adapters that other programs wrote, and what merging makes of them: the cases 30, 32 and 37 from public reports, and others of
//! their kinds. What is right comes from PEFT (`scripts/fixtures/cases_weights.py`, `peft_adapter.py`, `peft_kinds.py`).
//!
//! Tested as well, here or in unit tests (`adapter/keys.rs`, `adapter/trained_over.rs`):
//! - names with `_orig_mod.` in front, inside and behind a block's number, DDP's `module.`, FSDP's and activation checkpointing's
//!   wrappers, adapter names other than `default`, keys of a model without a head, DoRA, embeddings, saved modules and tokens in raw
//!   states, two adapters in one file, prefixes of other classes;
//! - vocabularies larger and smaller than the base's, tied and not, with one table alone, with tables of different lengths, over a
//!   4-bit base, two adapters of different vocabularies;
//! - merging over bases stored in NF4, FP4, with and without double quantization, LLM.int8, GPTQ, AWQ; adapters trained over another
//!   form of the base than the one that is given.

use std::fs;
use std::path::{Path, PathBuf};

use crate::files::{
    Checkpoint, Tensors, fixtures, floats, ids, largest, logits, logits_of, read_tensors, write_tensors,
    write_tokenizer,
};
use qlora::adapter::{self, PeftAdapter, TrainedOver};
use qlora::config::ModelConfig;
use qlora::export::bitsandbytes;
use qlora::formats::HfDirectory;
use qlora::kernels::Dtype;
use qlora::kernels::quant::{QuantConfig, QuantType};
use qlora::merge::{
    Companions, FolderOptions, MergeChoice, MergeInto, MergedSource, PeftUpdate, Rounding, write_folder,
};
use qlora::model::{CausalLm, LoadOptions, Quantization};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::source::WeightSource;

/// Writes an adapter's folder anew with other tensors.
fn adapter_with(from: &Path, to: &Path, tensors: &Tensors) {
    fs::create_dir_all(to).unwrap();
    fs::copy(from.join("adapter_config.json"), to.join("adapter_config.json")).unwrap();
    write_tensors(&to.join("adapter_model.safetensors"), tensors);
}

fn with_adapter(source: &dyn WeightSource, adapter: &PeftAdapter, quantization: Quantization) -> CausalLm {
    let mut model = CausalLm::load(source, LoadOptions { quantization, ..LoadOptions::default() }).unwrap();
    model.load_adapter("a", adapter).unwrap();
    model.activate_adapter("a").unwrap();
    model
}

/// A renaming of tensors as another program does it.
type Rename = dyn Fn(&str) -> String;

#[test]
fn case_30_adapter_keys() {
    let source = HfDirectory::open(fixtures().join("peft/base")).unwrap();
    let good = fixtures().join("peft/adapter_list");
    let tensors = read_tensors(&good.join("adapter_model.safetensors"));
    let tokens = ids(&fixtures().join("peft/logits.safetensors"), "input_ids");
    let expected = floats(&fixtures().join("peft/logits.safetensors"), "adapter_list");
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("adapter");
    let write = |rename: &dyn Fn(&str) -> String| {
        let renamed = tensors.iter().map(|(name, raw)| (rename(name), raw.clone())).collect();
        adapter_with(&good, &folder, &renamed);
    };
    let renames: [(&str, &Rename); 7] = [
        ("good", &|name| name.to_owned()),
        ("compile", &|name| format!("_orig_mod.{name}")),
        ("compile-inside", &|name| name.replace("base_model.model.", "base_model.model._orig_mod.")),
        ("default", &|name| name.replace(".weight", ".default.weight")),
        ("bare", &|name| name.replace("base_model.model.", "")),
        ("ddp", &|name| format!("module.{name}")),
        ("fsdp", &|name| name.replace("layers.1.", "layers.1._fsdp_wrapped_module.")),
    ];
    for (what, rename) in renames {
        write(rename);
        let adapter = adapter::open_folder(&folder, source.config()).unwrap();
        let model = with_adapter(&source, &adapter, Quantization::None);
        assert!(largest(&logits(&model, &tokens), &expected) < 1e-4, "{what}");
        // Training goes on from the same values.
        let trained = adapter::load(&folder, source.config()).unwrap();
        let original = adapter::load(&good, source.config()).unwrap();
        assert_eq!(trained.weights, original.weights, "{what}");
    }
    // The error for another class's model names the excess part of the tensor names.
    for prefix in ["base_model.model.model.language_model.", "transformer.model.", "diffusion_model."] {
        write(&|name| name.replace("base_model.model.model.", prefix));
        for error in [
            adapter::open_folder(&folder, source.config()).unwrap_err().to_string(),
            adapter::load(&folder, source.config()).unwrap_err().to_string(),
        ] {
            assert!(
                error.contains(&format!("begin with \"{prefix}\"")) && error.contains("base_model.model."),
                "{error}"
            );
        }
    }
    // One file with two adapters is not one adapter.
    let mut both = tensors.clone();
    both.extend(tensors.iter().map(|(name, raw)| (name.replace(".weight", ".other.weight"), raw.clone())));
    adapter_with(&good, &folder, &both);
    let error = adapter::open_folder(&folder, source.config()).unwrap_err().to_string();
    assert!(error.contains("several adapters") && error.contains(".other.weight"), "{error}");
    // Empty tensors are refused by name.
    let mut empty = tensors.clone();
    for raw in empty.values_mut() {
        (raw.shape, raw.bytes) = (vec![0], Vec::new());
    }
    adapter_with(&good, &folder, &empty);
    for error in [
        adapter::open_folder(&folder, source.config()).unwrap_err().to_string(),
        adapter::load(&folder, source.config()).unwrap_err().to_string(),
    ] {
        assert!(error.contains("lora_A.weight") && error.contains("ZeRO-3"), "{error}");
    }
}

/// The base of a case with a tokenizer, opened as programs open it.
fn resized_base(name: &str) -> (ModelFiles, tempfile::TempDir) {
    let temporary = tempfile::tempdir().unwrap();
    Checkpoint::read(&fixtures().join("cases/32-resized-vocab-adapter").join(name)).write(temporary.path());
    write_tokenizer(temporary.path(), 20);
    (open_model(temporary.path().to_str().unwrap(), &OpenOptions::default()).unwrap(), temporary)
}

#[test]
fn case_32_resized_vocab_adapter() {
    let case = fixtures().join("cases/32-resized-vocab-adapter");
    let expected = case.join("logits.safetensors");
    for (name, base, vocab) in [("larger", "base", 27), ("smaller", "base", 20), ("tied-larger", "tied", 27)] {
        let (files, _folder) = resized_base(base);
        let adapter = adapter::open_folder(case.join(name), files.source.config()).unwrap();
        assert_eq!(adapter.vocab_size, Some(vocab), "{name}");
        let tokens = ids(&expected, &format!("{name}.input_ids"));
        let expected = floats(&expected, name);
        // Over the base as it is: what to do.
        let mut model = CausalLm::load(&*files.source, LoadOptions::default()).unwrap();
        let error = model.load_adapter("a", &adapter).unwrap_err().to_string();
        assert!(error.contains(&format!("{vocab} tokens")) && error.contains("with_vocabulary_of"), "{error}");

        let base_config = files.source.config().clone();
        let files = files.with_vocabulary_of(&adapter).unwrap();
        let model = with_adapter(&*files.source, &adapter, Quantization::None);
        assert!(largest(&logits(&model, &tokens), &expected) < 1e-5, "{name}");
        assert_eq!(model.config().vocab_size, vocab);
        // The tables are the base's with the adapter's rows: nothing is held twice.
        assert!(model.memory().loaded_adapters < 4 * 16 * vocab, "{:?}", model.memory());

        // Merged, over the resized base and over the one as it is.
        let plain = HfDirectory::open(case.join(base)).unwrap();
        // But for the end tokens, which opening a model gathers from all its files.
        assert_eq!(*plain.config(), ModelConfig { eos_token_ids: Vec::new(), ..base_config });
        let sources: [&dyn WeightSource; 2] = [&*files.source, &plain];
        for source in sources {
            let temporary = tempfile::tempdir().unwrap();
            let out = temporary.path().join("merged");
            let update = PeftUpdate::new(&adapter, source).unwrap();
            let merged = MergedSource::new(source, &update, MergeInto::Original, Rounding::Stored).unwrap();
            let config_json = Some(fs::read_to_string(case.join(base).join("config.json")).unwrap());
            let options = FolderOptions { config_json, ..FolderOptions::default() };
            write_folder(&merged, &Companions::default(), &out, &options, |_, _| ()).unwrap();
            let read = HfDirectory::open(&out).unwrap();
            assert_eq!(read.config().vocab_size, vocab);
            assert_eq!(read.config().tie_word_embeddings, base == "tied");
            assert!(largest(&logits_of(&read, &tokens), &expected) < 1e-5, "{name}");
        }
    }
}

#[test]
fn resized_vocabularies_go_over_four_bits_and_are_checked() {
    let case = fixtures().join("cases/32-resized-vocab-adapter");
    let (files, folder) = resized_base("base");
    let config = files.source.config().clone();
    let adapter = adapter::open_folder(case.join("larger"), &config).unwrap();
    let files = files.with_vocabulary_of(&adapter).unwrap();
    // Stored in 4 bits, or quantized while loading: the same.
    let temporary = tempfile::tempdir().unwrap();
    let nf4 = temporary.path().join("nf4");
    let text = fs::read_to_string(folder.path().join("config.json")).unwrap();
    let source = HfDirectory::open(folder.path()).unwrap();
    bitsandbytes::write(&source, &text, &QuantConfig::default(), &nf4, |_, _| ()).unwrap();
    write_tokenizer(&nf4, 24);
    let stored =
        open_model(nf4.to_str().unwrap(), &OpenOptions::default()).unwrap().with_vocabulary_of(&adapter).unwrap();
    let tokens = [3, 25, 1, 26];
    let bits4 = Quantization::Bits4(QuantConfig::default());
    let expected = logits(&with_adapter(&*files.source, &adapter, bits4), &tokens);
    assert_eq!(logits(&with_adapter(&*stored.source, &adapter, Quantization::None), &tokens), expected);

    // One without tables goes over either.
    let mut plain = read_tensors(&case.join("larger/adapter_model.safetensors"));
    plain.retain(|name, _| name.contains("lora_"));
    let without = temporary.path().join("without");
    adapter_with(&case.join("larger"), &without, &plain);
    let without = adapter::open_folder(&without, &config).unwrap();
    assert_eq!(without.vocab_size, None);
    with_adapter(&*files.source, &without, Quantization::None);
    with_adapter(&source, &without, Quantization::None);

    // Two adapters of different vocabularies are not beside each other.
    let smaller = adapter::open_folder(case.join("smaller"), &config).unwrap();
    let mut model = with_adapter(&*files.source, &adapter, Quantization::None);
    assert!(model.load_adapter("b", &smaller).unwrap_err().to_string().contains("20 tokens"));
    // Going on with training needs the merged model.
    let error = adapter::load(case.join("larger"), &config).unwrap_err().to_string();
    assert!(error.contains("embed_tokens.weight") && error.contains("merge it into its base"), "{error}");

    // Other dimensions are still wrong, and so are tables that do not belong together.
    let tensors = read_tensors(&case.join("larger/adapter_model.safetensors"));
    let damaged = temporary.path().join("damaged");
    let refused = |change: &dyn Fn(&mut Tensors), what: &[&str]| {
        let mut changed = tensors.clone();
        change(&mut changed);
        adapter_with(&case.join("larger"), &damaged, &changed);
        let error = adapter::open_folder(&damaged, &config).unwrap_err().to_string();
        assert!(what.iter().all(|what| error.contains(what)), "{what:?}: {error}");
    };
    let (embedding, head) = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight");
    refused(&|t| drop(t.remove(head)), &[embedding, "has shape [27, 16]", "needs both tables"]);
    refused(&|t| drop(t.remove(embedding)), &[head, "has shape [27, 16]", "needs both tables"]);
    refused(
        &|t| {
            let raw = t.get_mut(head).unwrap();
            raw.shape[0] -= 1;
            raw.bytes.truncate(raw.bytes.len() - 4 * 16);
        },
        &["has shape [26, 16]", "needs both tables"],
    );
    refused(&|t| t.values_mut().for_each(|raw| raw.shape.reverse()), &["has shape"]);
    refused(&|t| t.get_mut(embedding).unwrap().shape = vec![16, 27], &[head, "needs both tables"]);
}

/// The base and the adapter of case 37, and PEFT's input.
fn case_37() -> (HfDirectory, PathBuf, PeftAdapter, Vec<u32>) {
    let source = HfDirectory::open(fixtures().join("peft/base")).unwrap();
    let folder = fixtures().join("peft/adapter_list");
    let adapter = adapter::open_folder(&folder, source.config()).unwrap();
    let tokens = ids(&fixtures().join("peft/logits.safetensors"), "input_ids");
    (source, folder, adapter, tokens)
}

#[test]
fn case_37_merge_onto_4bit() {
    let (source, _, adapter, tokens) = case_37();
    let temporary = tempfile::tempdir().unwrap();
    let config_json = fs::read_to_string(fixtures().join("peft/base/config.json")).unwrap();
    for (number, config) in
        [QuantConfig::default(), QuantConfig { quant_type: QuantType::Fp4, blocksize: 128, double_quant: false }]
            .into_iter()
            .enumerate()
    {
        let folder = temporary.path().join(format!("stored-{number}"));
        bitsandbytes::write(&source, &config_json, &config, &folder, |_, _| ()).unwrap();
        let stored = HfDirectory::open(&folder).unwrap();
        // The quantization that it was trained over is known from the base, whatever else is said.
        let choice = MergeChoice::new(&stored, None);
        assert_eq!((choice.into, choice.quantization), (MergeInto::Original, Quantization::None));
        assert!(choice.remark.unwrap().contains("bitsandbytes 4-bit"));
        let over = TrainedOver::of(&stored, Quantization::None).unwrap();
        assert_eq!(over, TrainedOver::Bits4 { config, stored: true });

        let out = temporary.path().join(format!("merged-{number}"));
        let update = PeftUpdate::new(&adapter, &stored).unwrap();
        let merged = MergedSource::new(&stored, &update, MergeInto::Original, Rounding::Stored).unwrap();
        let base_json = Some(fs::read_to_string(folder.join("config.json")).unwrap());
        let options = FolderOptions { config_json: base_json, ..FolderOptions::default() };
        write_folder(&merged, &Companions::default(), &out, &options, |_, _| ()).unwrap();
        let read = HfDirectory::open(&out).unwrap();
        assert!(read.quantization().is_none() && read.remarks().is_empty());
        assert_eq!(merged.figures().layers, adapter.modules.len());
        // The merged model answers as base and adapter do.
        let expected = logits(&with_adapter(&stored, &adapter, Quantization::None), &tokens);
        assert!(largest(&logits_of(&read, &tokens), &expected) < 1e-4);
        // Over the original weights, quantized as the stored ones were: the same model.
        let again = MergeChoice::new(&source, Some(&over));
        assert_eq!(again.into, MergeInto::Dequantized(config));
        let update = PeftUpdate::new(&adapter, &source).unwrap();
        let merged_again = MergedSource::new(&source, &update, again.into, Rounding::Stored).unwrap();
        for name in merged_again.names() {
            assert_eq!(merged_again.read(&name).unwrap().into_f32(), merged.read(&name).unwrap().into_f32(), "{name}");
        }
    }
}

#[test]
fn bases_in_integers_merge_too() {
    // Folders by bitsandbytes and in GPTQ's and AWQ's layouts.
    for name in ["bnb_int8", "gptq", "awq", "bnb_nf4_bf16"] {
        let base = HfDirectory::open(fixtures().join("quantized").join(name)).unwrap();
        let lora = qlora::lora::LoraConfig { r: 2, ..qlora::lora::LoraConfig::default() };
        let layout = qlora::lora::AdapterLayout::for_model(&lora, base.config()).unwrap();
        let weights = (0..layout.len()).map(|i| ((i * 37 % 101) as f32 - 50.0) / 2000.0).collect();
        let config = adapter::AdapterConfig { lora, base_model_name_or_path: None, revision: None };
        let adapter = adapter::SavedAdapter { config, layout, weights };
        let update = qlora::merge::LoraUpdate::new(&adapter).unwrap();
        let merged = MergedSource::new(&base, &update, MergeInto::Original, Rounding::To(Dtype::F32)).unwrap();
        let mut unmerged = CausalLm::load(&base, LoadOptions::default()).unwrap();
        unmerged.set_adapter(adapter.config.lora.clone(), adapter.layout.clone(), adapter.weights.clone()).unwrap();
        let tokens = [1, 5, 9, 2, 7];
        let (got, expected) = (logits_of(&merged, &tokens), logits(&unmerged, &tokens));
        let scale = expected.iter().fold(0f32, |max, x| max.max(x.abs()));
        // LLM.int8 rounds activations as well, which the merged weights do not.
        let tolerance = if name == "bnb_int8" { 0.1 } else { 1e-4 };
        assert!(largest(&got, &expected) < tolerance * scale, "{name}: {} of {scale}", largest(&got, &expected));
        let over = TrainedOver::of(&base, Quantization::None).unwrap();
        assert_eq!(matches!(over, TrainedOver::Other(_)), name != "bnb_nf4_bf16", "{over}");
    }
}

#[test]
fn merging_goes_into_what_was_trained_over() {
    let (source, folder, _, _) = case_37();
    let over = |over: TrainedOver| MergeChoice::new(&source, Some(&over));
    let config = QuantConfig { quant_type: QuantType::Fp4, blocksize: 256, double_quant: false };
    let four_bit = TrainedOver::Bits4 { config, stored: false };
    let choice = over(four_bit.clone());
    assert_eq!((choice.into, choice.quantization), (MergeInto::Dequantized(config), Quantization::Bits4(config)));
    assert_eq!(choice.remark, None);
    assert_eq!(choice.clone().into_original().into, MergeInto::Original);
    assert_eq!(choice.clone().into_dequantized(&source, Some(&four_bit), QuantConfig::default()).unwrap(), choice);
    assert_eq!((over(TrainedOver::Plain).into, over(TrainedOver::Plain).remark), (MergeInto::Original, None));
    let gptq = over(TrainedOver::Other("GPTQ 4-bit".to_owned()));
    assert!(gptq.into == MergeInto::Original && gptq.remark.unwrap().contains("GPTQ 4-bit"));
    // Nothing is assumed of an adapter that says nothing.
    assert_eq!(TrainedOver::read(&folder).unwrap(), None);
    let unknown = MergeChoice::new(&source, None);
    assert!(unknown.into == MergeInto::Original && unknown.remark.as_ref().unwrap().contains("--quant-type nf4"));
    let asked = unknown.into_dequantized(&source, None, QuantConfig::default()).unwrap();
    assert_eq!(asked.into, MergeInto::Dequantized(QuantConfig::default()));
    let error = over(TrainedOver::Plain).into_dequantized(&source, Some(&TrainedOver::Plain), config).unwrap_err();
    assert!(error.to_string().contains("unquantized weights"), "{error}");
}

#[test]
fn the_base_of_every_kind_is_found() {
    let kinds = fs::read_to_string(fixtures().join("peft_kinds/facts.json")).unwrap();
    let kinds: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&kinds).unwrap();
    assert!(kinds.len() > 20);
    for kind in kinds.keys() {
        let (config, _) = adapter::read_any_config(fixtures().join("peft_kinds").join(kind)).unwrap();
        assert!(config.base_model_name_or_path.is_some_and(|base| !base.is_empty()), "{kind}");
    }
}
