//! Model files that do not fit their configuration: the cases 33, 34 and 35 from public reports, and others of their kinds. What is
//! right comes from transformers (`scripts/fixtures/cases_weights.py`).
//!
//! Tested as well, here or in unit tests:
//! - a tied model whose index lists the head, whose index lists it in a shard that does not hold it, whose shards hold it unlisted,
//!   stored as the head alone, as f32 beside a bf16 embedding, with another shape;
//! - `quantization_config` of GPTQ, AWQ, fp8, HQQ and compressed-tensors left over 16-bit weights; with neither bit width; skip lists
//!   that name everything, some, or nothing; a few plain layers among quantized ones;
//! - `LLaMAForCausalLM`, `LlamaModel`, `PeftModelForCausalLM`, `OptimizedModule` as architecture (`config/json_tests.rs`).

use std::fs;
use std::path::Path;

use crate::files::{
    Checkpoint, Raw, Tensors, fixtures, floats, ids, largest, logits, logits_of, write_tensors, write_tokenizer,
};
use qlora::adapter::{self, TrainedOver};
use qlora::batch::Batch;
use qlora::export::bitsandbytes;
use qlora::export::gguf::{self, GgufOptions, GgufType};
use qlora::formats::{Gguf, HfDirectory};
use qlora::kernels::quant::QuantConfig;
use qlora::lora::{AdapterLayout, LoraConfig};
use qlora::merge::{Companions, FolderOptions, LoraUpdate, MergeInto, MergedSource, Rounding, write_folder};
use qlora::model::{CausalLm, LoadOptions, Quantization};
use qlora::open::{OpenOptions, open_config, open_model};
use qlora::source::WeightSource;
use qlora::tokenizer::Tokenizer;
use qlora::trainer::TrainConfig;
use qlora::trainer::session::Session;
use safetensors::Dtype;
use serde_json::{Value, json};

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

fn case(name: &str) -> std::path::PathBuf {
    fixtures().join("cases").join(name)
}

/// A folder of two shards, and what their index lists besides.
fn sharded(checkpoint: &Checkpoint, also_listed: &[(&str, usize)], unlisted: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let half = checkpoint.tensors.len() / 2;
    let mut map = serde_json::Map::new();
    for (number, file) in files.iter().enumerate() {
        let here = checkpoint.tensors.iter().enumerate().filter(|(i, _)| (i / half).min(1) == number);
        let tensors: Tensors = here.map(|(_, (name, raw))| (name.clone(), raw.clone())).collect();
        write_tensors(&folder.path().join(file), &tensors);
        let listed = tensors.keys().filter(|name| !unlisted.contains(&name.as_str()));
        map.extend(listed.map(|name| (name.clone(), json!(file))));
    }
    map.extend(also_listed.iter().map(|(name, shard)| ((*name).to_owned(), json!(files[*shard]))));
    fs::write(folder.path().join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
    fs::write(folder.path().join("config.json"), checkpoint.config.to_string()).unwrap();
    folder
}

#[test]
fn case_33_index_vs_shards() {
    let tied = Checkpoint::read(&case("34-tied-different-head/same"));
    let logits_file = case("34-tied-different-head/logits.safetensors");
    let (tokens, expected) = (ids(&logits_file, "input_ids"), floats(&logits_file, "same"));
    let same = |folder: &Path| {
        let source = HfDirectory::open(folder).unwrap();
        assert!(source.config().tie_word_embeddings && source.remarks().is_empty(), "{:?}", source.remarks());
        assert!(largest(&logits_of(&source, &tokens), &expected) < 1e-5);
    };
    let mut without = tied.clone();
    without.tensors.remove(HEAD).unwrap();
    // An index that lists a tied head which no shard holds, or in the wrong one; shards with more than the index.
    same(sharded(&without, &[(HEAD, 0)], &[]).path());
    same(sharded(&without, &[(HEAD, 1)], &[]).path());
    same(sharded(&tied, &[], &[HEAD]).path());
    let mut leftover = without.clone();
    for name in ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"] {
        leftover.tensors.insert(name.into(), Raw { dtype: Dtype::F32, shape: vec![2], bytes: vec![0; 8] });
    }
    same(
        sharded(&leftover, &[], &["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]).path(),
    );
    same(sharded(&without, &[("model.layers.0.self_attn.rotary_emb.inv_freq", 0)], &[]).path());

    // Tensors that the model needs are never made up, and unknown tensors are never dropped.
    let refused = |folder: tempfile::TempDir, what: &[&str]| {
        let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
        assert!(what.iter().all(|what| error.contains(what)), "{what:?}: {error}");
    };
    refused(
        sharded(&without, &[("model.layers.1.mlp.up_proj.weight", 0)], &[]),
        &["layers.1.mlp.up_proj", "missing in"],
    );
    refused(
        sharded(&without, &[], &["model.norm.weight"]),
        &["model.norm.weight", "not in model.safetensors.index.json"],
    );
    let mut untied = without.clone();
    untied.config["tie_word_embeddings"] = json!(false);
    refused(sharded(&untied, &[(HEAD, 0)], &[]), &[HEAD, "missing in"]);
}

#[test]
fn a_model_that_was_saved_without_its_head_loads_where_the_head_is_tied() {
    let folder = case("33-index-vs-shards");
    let logits_file = folder.join("logits.safetensors");
    let (tokens, expected) = (ids(&logits_file, "input_ids"), floats(&logits_file, "headless"));
    let source = HfDirectory::open(folder.join("headless")).unwrap();
    assert!(largest(&logits_of(&source, &tokens), &expected) < 1e-5);
    let checkpoint = Checkpoint::read(&folder.join("headless"));
    let read = HfDirectory::open(sharded(&checkpoint, &[], &[]).path()).unwrap();
    assert!(largest(&logits_of(&read, &tokens), &expected) < 1e-5);
    // Without a tied head there is none: transformers makes one up.
    let mut untied = checkpoint.clone();
    untied.config["tie_word_embeddings"] = json!(false);
    let error = untied.open().unwrap_err().to_string();
    assert!(error.contains(HEAD) && error.contains("missing"), "{error}");
    // Written anew, it has the usual names.
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("nf4");
    bitsandbytes::write(&source, &checkpoint.config.to_string(), &QuantConfig::default(), &out, |_, _| ()).unwrap();
    let written = Checkpoint::read(&out);
    assert_eq!(written.config["architectures"], json!(["Qwen2ForCausalLM"]));
    assert!(written.tensors.contains_key(EMBEDDING) && !written.tensors.contains_key("embed_tokens.weight"));
}

#[test]
fn case_34_tied_different_head() {
    let folder = case("34-tied-different-head");
    let logits_file = folder.join("logits.safetensors");
    let tokens = ids(&logits_file, "input_ids");
    let [own, tied] = ["own", "same"].map(|name| floats(&logits_file, name));
    assert!(largest(&own, &tied) > 0.1);

    let same = HfDirectory::open(folder.join("same")).unwrap();
    assert!(same.config().tie_word_embeddings && same.remarks().is_empty());
    assert!(largest(&logits_of(&same, &tokens), &tied) < 1e-5);
    let source = HfDirectory::open(folder.join("own")).unwrap();
    let [remark] = source.remarks() else { panic!("{:?}", source.remarks()) };
    assert!(remark.contains("tie_word_embeddings is true") && remark.contains("head of its own"), "{remark}");
    assert!(largest(&logits_of(&source, &tokens), &own) < 1e-5);

    // So does who asks what the model takes, also where the weights are not there.
    let read = |name: &str| open_config(name, &OpenOptions::default()).unwrap();
    assert!(read(folder.join("same").to_str().unwrap()).tie_word_embeddings);
    assert!(!read(folder.join("own").to_str().unwrap()).tie_word_embeddings);
    assert!(read(folder.join("own/config.json").to_str().unwrap()).tie_word_embeddings);

    // Training sees it.
    let mut model = CausalLm::load(&source, LoadOptions::default()).unwrap();
    model.add_adapter(LoraConfig { r: 2, ..LoraConfig::default() }, 0).unwrap();
    let labels: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
    let loss = model.evaluate(&Batch::from_documents([(&tokens[..], &labels[..])])).unwrap();
    let rows = own.chunks_exact(24).zip(&tokens[1..]);
    let expected: f64 = rows
        .map(|(row, &next)| {
            let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            sum.ln() - f64::from(row[next as usize])
        })
        .sum();
    assert!((loss.sum - expected).abs() < 1e-4, "{} {expected}", loss.sum);

    // So does everything that is written: quantized, merged, GGUF.
    let temporary = tempfile::tempdir().unwrap();
    let config_json = fs::read_to_string(folder.join("own/config.json")).unwrap();
    let head = read_head(&source);
    let nf4 = temporary.path().join("nf4");
    bitsandbytes::write(&source, &config_json, &QuantConfig::default(), &nf4, |_, _| ()).unwrap();
    let lora = LoraConfig { r: 2, ..LoraConfig::default() };
    let layout = AdapterLayout::for_model(&lora, source.config()).unwrap();
    let weights = vec![0.0; layout.len()];
    let config = adapter::AdapterConfig { lora, base_model_name_or_path: None, revision: None };
    let nothing = adapter::SavedAdapter { config, layout, weights };
    let update = LoraUpdate::new(&nothing).unwrap();
    let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::Stored).unwrap();
    let out = temporary.path().join("merged");
    let options = FolderOptions { config_json: Some(config_json), ..FolderOptions::default() };
    write_folder(&merged, &Companions::default(), &out, &options, |_, _| ()).unwrap();
    for folder in [&nf4, &out] {
        let config: Value = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], json!(false), "{}", folder.display());
        let read = HfDirectory::open(folder).unwrap();
        assert!(!read.config().tie_word_embeddings && read.remarks().is_empty());
        assert_eq!(read_head(&read), head);
    }
    assert!(largest(&logits_of(&HfDirectory::open(&out).unwrap(), &tokens), &own) < 1e-5);
    write_tokenizer(temporary.path(), 24);
    let tokenizer = Tokenizer::from_folder(temporary.path()).unwrap();
    let options = GgufOptions { eos_token_ids: &[2], ..GgufOptions::new(GgufType::F32) };
    let gguf = temporary.path().join("model.gguf");
    gguf::write(&source, &tokenizer, &gguf, &options, |_, _| ()).unwrap();
    let read = Gguf::open(&gguf).unwrap();
    assert!(!read.config().tie_word_embeddings);
    assert!(largest(&logits_of(&read, &tokens), &own) < 1e-5);
}

fn read_head(source: &dyn WeightSource) -> Vec<f32> {
    source.read(HEAD).unwrap().into_f32()
}

#[test]
fn heads_of_tied_models_are_compared_by_what_they_hold() {
    let good = Checkpoint::read(&case("34-tied-different-head/same"));
    let tied = |checkpoint: &Checkpoint| checkpoint.open().unwrap().config().tie_word_embeddings;
    // The embedding in bf16, the head the same values in f32; then one value differs.
    let mut wider = good.clone();
    let values: Vec<f32> = good.tensors[HEAD].bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    let halves: Vec<half::bf16> = values.iter().map(|&x| half::bf16::from_f32(x)).collect();
    let embedding = wider.tensors.get_mut(EMBEDDING).unwrap();
    embedding.dtype = Dtype::BF16;
    embedding.bytes = halves.iter().flat_map(|x| x.to_le_bytes()).collect();
    let head = wider.tensors.get_mut(HEAD).unwrap();
    head.bytes = halves.iter().flat_map(|x| x.to_f32().to_le_bytes()).collect();
    assert!(tied(&wider));
    let end = head_end(&wider);
    wider.tensors.get_mut(HEAD).unwrap().bytes[end - 2] ^= 0x40;
    assert!(!tied(&wider));
    // The table is stored under the head's name alone.
    let mut alone = good.clone();
    alone.tensors.remove(EMBEDDING).unwrap();
    let source = alone.open().unwrap();
    assert!(source.config().tie_word_embeddings);
    assert_eq!(source.read(EMBEDDING).unwrap().into_f32(), values);
    // A head of another shape is no head of this model.
    let mut longer = good.clone();
    let head = longer.tensors.get_mut(HEAD).unwrap();
    head.shape[0] += 1;
    head.bytes.resize(head.bytes.len() + 4 * 16, 0);
    let error = longer.open().unwrap_err().to_string();
    assert!(error.contains(HEAD) && error.contains("[25, 16]"), "{error}");
    // Neither table: nothing to make a model of.
    alone.tensors.remove(HEAD).unwrap();
    assert!(alone.open().unwrap_err().to_string().contains(EMBEDDING));
}

fn head_end(checkpoint: &Checkpoint) -> usize {
    checkpoint.tensors[HEAD].bytes.len()
}

fn bitsandbytes() -> Value {
    json!({"_load_in_4bit": true, "_load_in_8bit": false, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true, "llm_int8_skip_modules": null, "load_in_4bit": true, "load_in_8bit": false,
        "quant_method": "bitsandbytes"})
}

#[test]
fn case_35_leftover_quantization_config() {
    let clean = Checkpoint::read(&fixtures().join("models/llama_wide"));
    let temporary = tempfile::tempdir().unwrap();
    let plain = clean.open().unwrap();
    let bits4 = LoadOptions { quantization: Quantization::Bits4(QuantConfig::default()), ..LoadOptions::default() };
    let projections = CausalLm::load(&plain, bits4).unwrap().memory().projections;
    let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    for (number, options) in [
        bitsandbytes(),
        json!({"load_in_4bit": true}),
        json!({"load_in_8bit": true, "quant_method": "bitsandbytes"}),
        json!({"quant_method": "bitsandbytes", "load_in_4bit": false, "load_in_8bit": false}),
        json!({"quant_method": "gptq", "bits": 4, "group_size": 128}),
        json!({"quant_method": "awq", "bits": 4, "version": "gemm"}),
        json!({"quant_method": "hqq"}),
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        fp8.clone(),
    ]
    .into_iter()
    .enumerate()
    {
        let mut leftover = clean.clone();
        leftover.config["quantization_config"] = options.clone();
        let folder = leftover.folder();
        let source = HfDirectory::open(folder.path()).unwrap();
        assert_eq!(source.quantization(), None, "{options}");
        let [remark] = source.remarks() else { panic!("{options}: {:?}", source.remarks()) };
        assert!(remark.contains("quantization_config") && remark.contains("left behind"), "{remark}");
        // Quantized while loading like any other, and written as a real 4-bit checkpoint.
        let bits4 = LoadOptions { quantization: Quantization::Bits4(QuantConfig::default()), ..LoadOptions::default() };
        assert_eq!(CausalLm::load(&source, bits4).unwrap().memory().projections, projections, "{options}");
        let out = temporary.path().join(number.to_string());
        let config = leftover.config.to_string();
        bitsandbytes::write(&source, &config, &QuantConfig::default(), &out, |_, _| ()).unwrap();
        let written = HfDirectory::open(&out).unwrap();
        assert!(written.quantization().is_some() && written.is_packed("model.layers.0.mlp.up_proj.weight"));
        assert!(written.remarks().is_empty());
    }
    // Weights that are stored in a way that is not read are no leftovers.
    for (dtype, size) in [(Dtype::F8_E4M3, 1), (Dtype::I8, 1)] {
        let mut real = clean.clone();
        real.config["quantization_config"] = fp8.clone();
        let raw = real.tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap();
        (raw.dtype, raw.bytes) = (dtype, vec![0; size * raw.shape.iter().product::<usize>()]);
        let error = real.open().unwrap_err().to_string();
        assert!(error.contains("quant_method \"fp8\""), "{error}");
    }
    let mut damaged = clean.clone();
    damaged.config["quantization_config"] = json!(7);
    assert!(damaged.open().unwrap_err().to_string().contains("quantization_config"));
}

#[test]
fn plain_layers_among_quantized_ones_are_named_where_no_list_does() {
    let clean = Checkpoint::read(&fixtures().join("models/llama_wide"));
    let source = clean.open().unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("nf4");
    bitsandbytes::write(&source, &clean.config.to_string(), &QuantConfig::default(), &out, |_, _| ()).unwrap();
    let mut mixed = Checkpoint::read(&out);
    let name = "model.layers.0.self_attn.o_proj.weight";
    mixed.tensors.retain(|other, _| !other.starts_with(name));
    mixed.tensors.insert(name.to_owned(), clean.tensors[name].clone());
    let read = mixed.open().unwrap();
    let [remark] = read.remarks() else { panic!("{:?}", read.remarks()) };
    assert!(remark.contains("1 linear layers") && remark.contains("model.layers.0.self_attn.o_proj"), "{remark}");
    for list in [json!(["lm_head", "o_proj"]), json!(["model.layers.0.self_attn"]), json!(["layers.0"])] {
        mixed.config["quantization_config"]["llm_int8_skip_modules"] = list;
        let read = mixed.open().unwrap();
        assert!(read.remarks().is_empty() && read.quantization().is_some(), "{:?}", read.remarks());
        assert!(!read.is_packed(name));
    }
    // A list that names all of them: they are plain on purpose.
    let mut all = clean.clone();
    all.config["quantization_config"] = bitsandbytes();
    all.config["quantization_config"]["llm_int8_skip_modules"] = json!(["model"]);
    assert!(all.open().unwrap().remarks().is_empty());
}

/// Trains one step on a model whose head is its own although its configuration says otherwise.
#[test]
fn a_run_says_beside_its_adapter_what_it_was_trained_over() {
    let temporary = tempfile::tempdir().unwrap();
    let model = temporary.path().join("model");
    let checkpoint = Checkpoint::read(&case("34-tied-different-head/own"));
    checkpoint.write(&model);
    write_tokenizer(&model, 24);
    fs::write(temporary.path().join("train.jsonl"), "{\"text\": \"abcabcabcabc\"}\n").unwrap();
    let nf4 = temporary.path().join("nf4");
    let config_json = checkpoint.config.to_string();
    let fp4 = QuantConfig { quant_type: qlora::kernels::quant::QuantType::Fp4, blocksize: 128, double_quant: false };
    bitsandbytes::write(&HfDirectory::open(&model).unwrap(), &config_json, &fp4, &nf4, |_, _| ()).unwrap();
    write_tokenizer(&nf4, 24);
    for (folder, four_bit, expected) in [
        (&model, true, TrainedOver::Bits4 { config: QuantConfig::default(), stored: false }),
        (&model, false, TrainedOver::Plain),
        (&nf4, false, TrainedOver::Bits4 { config: fp4, stored: true }),
    ] {
        let mut config = TrainConfig::default();
        config.model.model_name_or_path = folder.display().to_string();
        config.model.load_in_4bit = four_bit;
        config.model.device = "cpu".into();
        config.lora.r = 2;
        config.data.train_file = temporary.path().join("train.jsonl").as_path().into();
        config.training.max_steps = 1;
        config.training.output_dir =
            temporary.path().join(format!("out-{four_bit}-{}", folder.file_name().unwrap().display()));
        let session = Session::open(&config, |_, _| ()).unwrap();
        assert!(!session.model().config().tie_word_embeddings);
        let (training, validation) = session.datasets().unwrap();
        let summary = session.into_trainer(training, validation).unwrap().run().unwrap();
        let folder = summary.adapter.unwrap();
        assert_eq!(TrainedOver::read(&folder).unwrap(), Some(expected));
        let read = adapter::read_config(&folder).unwrap();
        assert_eq!(read.lora.r, 2);
    }
}

#[test]
fn a_gguf_of_few_bits_says_what_it_is_stored_in() {
    let temporary = tempfile::tempdir().unwrap();
    let source = HfDirectory::open(fixtures().join("models/llama_wide")).unwrap();
    write_tokenizer(temporary.path(), 80);
    let tokenizer = Tokenizer::from_folder(temporary.path()).unwrap();
    for (kind, expected) in [(GgufType::Q4_0, Some("Q4_0")), (GgufType::Q8_0, None), (GgufType::F16, None)] {
        let options = GgufOptions { eos_token_ids: &[2], ..GgufOptions::new(kind) };
        let path = temporary.path().join(format!("{kind}.gguf"));
        gguf::write(&source, &tokenizer, &path, &options, |_, _| ()).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.block_type(), expected, "{kind}");
        // Merging keeps it: what is written in few bits again is rounded twice.
        let lora = LoraConfig { r: 2, ..LoraConfig::default() };
        let layout = AdapterLayout::for_model(&lora, gguf.config()).unwrap();
        let weights = vec![0.0; layout.len()];
        let config = adapter::AdapterConfig { lora, base_model_name_or_path: None, revision: None };
        let nothing = adapter::SavedAdapter { config, layout, weights };
        let update = LoraUpdate::new(&nothing).unwrap();
        let merged = MergedSource::new(&gguf, &update, MergeInto::Original, Rounding::None).unwrap();
        assert_eq!(merged.block_type(), expected, "{kind}");
    }
    assert_eq!(source.block_type(), None);
}

#[test]
fn a_tokenizer_can_be_given_by_hand() {
    let temporary = tempfile::tempdir().unwrap();
    let tokenizer_folder = temporary.path().join("tokenizer");
    fs::create_dir(&tokenizer_folder).unwrap();
    write_tokenizer(&tokenizer_folder, 24);
    let tokenizer = Tokenizer::from_folder(&tokenizer_folder).unwrap();
    let source = HfDirectory::open(case("34-tied-different-head/own")).unwrap();
    let options = GgufOptions { eos_token_ids: &[2], ..GgufOptions::new(GgufType::F32) };
    let gguf = temporary.path().join("model.gguf");
    gguf::write(&source, &tokenizer, &gguf, &options, |_, _| ()).unwrap();
    // A way of splitting text that nobody knows.
    let mut bytes = fs::read(&gguf).unwrap();
    let at = bytes.windows(5).position(|window| window == b"gpt-2").unwrap();
    bytes[at..at + 5].copy_from_slice(b"new-1");
    fs::write(&gguf, bytes).unwrap();
    let folder = temporary.path().join("folder");
    Checkpoint::read(&case("34-tied-different-head/own")).write(&folder);
    for model in [&gguf, &folder] {
        let spec = model.to_str().unwrap();
        let error = open_model(spec, &OpenOptions::default()).unwrap_err().to_string();
        assert!(error.contains("--tokenizer") && error.contains("tokenizer_name_or_path"), "{error}");
        let options = OpenOptions { tokenizer: Some(tokenizer_folder.clone()), ..OpenOptions::default() };
        let files = open_model(spec, &options).unwrap();
        assert_eq!(files.tokenizer.encode("abc", false).unwrap(), [3, 6]);
    }
}

#[test]
fn own_heads_answer_the_same_over_four_bits() {
    let folder = case("34-tied-different-head/own");
    let source = HfDirectory::open(&folder).unwrap();
    let bits4 = LoadOptions { quantization: Quantization::Bits4(QuantConfig::default()), ..LoadOptions::default() };
    let model = CausalLm::load(&source, bits4).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("nf4");
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    bitsandbytes::write(&source, &config, &QuantConfig::default(), &out, |_, _| ()).unwrap();
    let stored = CausalLm::load(&HfDirectory::open(&out).unwrap(), LoadOptions::default()).unwrap();
    let tokens = [3, 7, 1, 19];
    assert_eq!(logits(&model, &tokens), logits(&stored, &tokens));
}
