//! Adapters of every kind that PEFT's LoRA writes: the logits of PEFT, switched, combined and mixed in one batch.
//!
//! Fixtures: `tests/fixtures/peft_kinds`, made by `scripts/fixtures/peft_kinds.py` with PEFT 0.21.2, over the tiny models of
//! `tests/fixtures/peft/base` and `tests/fixtures/models`.
//!
//! The way back into Python needs an interpreter with PEFT:
//! `QLORA_PYTHON=path/to/python cargo test --test peft -- --ignored`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use qlora::adapter::{self, PeftAdapter, SaveOptions};
use qlora::batch::Batch;
use qlora::formats::HfDirectory;
use qlora::generate::{GenerationRequest, generate};
use qlora::kernels::SequenceLayout;
use qlora::lora::{LoraConfig, TargetModules};
use qlora::merge::{MergeInto, MergedSource, PeftUpdate, Rounding};
use qlora::model::{AdapterChoice, CausalLm, Combination, LoadOptions};
use qlora::sampling::GenerationConfig;
use qlora::source::WeightSource;
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn kinds() -> BTreeMap<String, Value> {
    serde_json::from_slice(&std::fs::read(fixtures().join("peft_kinds/facts.json")).unwrap()).unwrap()
}

fn base(name: &str) -> CausalLm {
    let source = HfDirectory::open(fixtures().join(name)).unwrap();
    CausalLm::load(&source, LoadOptions::default()).unwrap()
}

fn read(kind: &str, model: &CausalLm) -> PeftAdapter {
    adapter::open_folder(fixtures().join("peft_kinds").join(kind), model.config()).unwrap()
}

fn tensors(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixtures().join("peft_kinds").join(name), &Device::Cpu).unwrap()
}

fn ids(tensors: &HashMap<String, Tensor>, kind: &str) -> Vec<u32> {
    let ids: Vec<i64> = tensors[&format!("{kind}.input_ids")].to_dtype(DType::I64).unwrap().to_vec1().unwrap();
    ids.into_iter().map(|id| id as u32).collect()
}

fn one(tokens: &[u32]) -> SequenceLayout {
    SequenceLayout::from_lengths(&[tokens.len()])
}

/// The largest difference, and the largest value of `expected`.
fn difference(got: &Tensor, expected: &Tensor) -> (f32, f32) {
    let largest =
        |tensor: Tensor| tensor.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    (largest((got - expected).unwrap()), largest(expected.clone()))
}

#[test]
fn every_kind_gives_the_logits_of_peft() {
    let expected = tensors("logits.safetensors");
    let kinds = kinds();
    assert!(kinds.len() >= 28, "{} kinds", kinds.len());
    let mut worst = 0f32;
    for (kind, facts) in &kinds {
        let mut model = base(facts["base"].as_str().unwrap());
        let tokens = ids(&expected, kind);
        let before = model.logits(&tokens, &one(&tokens), AdapterChoice::Active).unwrap();
        model.load_adapter("a", &read(kind, &model)).unwrap();
        let unused = model.logits(&tokens, &one(&tokens), AdapterChoice::Active).unwrap();
        assert_eq!(difference(&unused, &before).0, 0.0, "{kind}: loading alone changes nothing");

        model.activate_adapter("a").unwrap();
        let got = model.logits(&tokens, &one(&tokens), AdapterChoice::Active).unwrap();
        let (error, largest) = difference(&got, &expected[&format!("{kind}.logits")]);
        println!("{kind:24} {error:.1e} of {largest:.1}");
        assert!(error < 1e-5 * largest.max(1.0), "{kind}: {error} of {largest}");
        worst = worst.max(error / largest);
        // With a cache, token by token.
        let mut cache = model.new_cache(tokens.len());
        for (i, &token) in tokens.iter().enumerate() {
            let row =
                model.next_logits(&[&[token]], &mut [&mut cache], AdapterChoice::Active).unwrap().to_vec().unwrap();
            let row = Tensor::from_vec(row, got.dim(1).unwrap(), &Device::Cpu).unwrap();
            let (error, _) = difference(&row, &got.get(i).unwrap());
            assert!(error < 1e-5 * largest.max(1.0), "{kind}: position {i}: {error}");
        }
        // The loss is that of the logits.
        let labels: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
        let batch = Batch::from_documents([(tokens.as_slice(), labels.as_slice())]);
        let loss = model.evaluate(&batch).unwrap();
        let log = got.broadcast_sub(&got.log_sum_exp(1).unwrap().unsqueeze(1).unwrap());
        let log: Vec<Vec<f32>> = log.unwrap().to_vec2().unwrap();
        let want: f32 = tokens[1..].iter().zip(&log).map(|(&id, row)| -row[id as usize]).sum();
        assert_eq!(loss.trained_tokens, tokens.len() - 1);
        assert!((loss.sum as f32 - want).abs() < 1e-4 * want.abs(), "{kind}: loss {} of {want}", loss.sum);

        model.disable_adapters();
        let off = model.logits(&tokens, &one(&tokens), AdapterChoice::Active).unwrap();
        assert_eq!(difference(&off, &before).0, 0.0, "{kind}");
        model.unload_adapter("a").unwrap();
        assert_eq!(model.memory().loaded_adapters, 0);
    }
    println!("{} kinds, largest error relative to the largest logit {worst:.1e}", kinds.len());
}

#[test]
fn merged_models_give_the_logits_of_peft() {
    let expected = tensors("logits.safetensors");
    let mut merged_kinds = 0;
    for (kind, facts) in kinds() {
        let source = HfDirectory::open(fixtures().join(facts["base"].as_str().unwrap())).unwrap();
        let adapter = adapter::open_folder(fixtures().join("peft_kinds").join(&kind), source.config()).unwrap();
        let update = match PeftUpdate::new(&adapter, &source) {
            Ok(update) => update,
            Err(error) => {
                assert!(kind == "lora_bias" && error.to_string().contains("not merged"), "{kind}: {error}");
                continue;
            }
        };
        let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::None).unwrap();
        let model = CausalLm::load(&merged, LoadOptions::default()).unwrap();
        let tokens = ids(&expected, &kind);
        let got = model.logits(&tokens, &one(&tokens), AdapterChoice::Active).unwrap();
        let (error, largest) = difference(&got, &expected[&format!("{kind}.logits")]);
        println!("{kind:24} {error:.1e} of {largest:.1}");
        assert!(error < 1e-5 * largest.max(1.0), "{kind}: {error} of {largest}");
        merged_kinds += 1;
    }
    assert_eq!(merged_kinds, kinds().len() - 1);
}

#[test]
fn ranks_and_scalings_are_those_of_peft() {
    for (kind, facts) in kinds() {
        let model = base(facts["base"].as_str().unwrap());
        let adapter = read(&kind, &model);
        let got: BTreeMap<&str, (usize, f64)> =
            adapter.modules.iter().map(|m| (m.name.as_str(), (m.rank, m.scaling))).collect();
        let mut expected = BTreeMap::new();
        for (name, values) in facts["modules"].as_object().unwrap() {
            expected.insert(name.as_str(), (values[0].as_u64().unwrap() as usize, values[1].as_f64().unwrap()));
        }
        assert_eq!(got, expected, "{kind}");
    }
}

/// All kinds over the untied Llama, under their names.
fn loaded() -> (CausalLm, Vec<String>) {
    let mut model = base("peft/base");
    let names: Vec<String> =
        kinds().into_iter().filter(|(_, facts)| facts["base"] == "peft/base").map(|(kind, _)| kind).collect();
    for name in &names {
        let adapter = read(name, &model);
        model.load_adapter(name, &adapter).unwrap();
    }
    (model, names)
}

#[test]
fn a_mixed_batch_gives_what_each_sequence_gives_alone() {
    let (mut model, names) = loaded();
    assert!(names.len() >= 15, "{names:?}");
    // The adapter that is trained can be in the batch too.
    let config = LoraConfig { r: 3, target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
    model.add_adapter(config, 1).unwrap();
    let values: Vec<f32> =
        (0..model.adapter().unwrap().layout().len()).map(|i| ((i * 37 % 101) as f32 - 50.0) / 300.0).collect();
    model.adapter().unwrap().set_values(&values).unwrap();

    let mut choices = vec![AdapterChoice::Base, AdapterChoice::Active];
    for (i, name) in names.iter().enumerate() {
        choices.push(AdapterChoice::Named(name));
        if i % 4 == 0 {
            choices.extend([AdapterChoice::Base, AdapterChoice::Named(name), AdapterChoice::Named(name)]);
        }
    }
    let prompts: Vec<Vec<u32>> = (0..choices.len())
        .map(|i| (0..1 + (i * 5) % 9).map(|j| ((i * 31 + j * 17 + 3) % 128) as u32).collect())
        .collect();
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let layout = SequenceLayout::from_lengths(&lengths);
    let mixed = model.logits(&prompts.concat(), &layout, &choices).unwrap();
    let mut base_differs = 0;
    for ((rows, prompt), &choice) in layout.sequences().zip(&prompts).zip(&choices) {
        let alone = model.logits(prompt, &one(prompt), &[choice]).unwrap();
        let got = mixed.narrow(0, rows.start, rows.len()).unwrap();
        let (error, largest) = difference(&got, &alone);
        assert!(error < 1e-5 * largest, "{choice:?}: {error} of {largest}");
        let plain = model.logits(prompt, &one(prompt), &[AdapterChoice::Base]).unwrap();
        base_differs += usize::from(difference(&alone, &plain).0 > 0.01);
    }
    let bases = choices.iter().filter(|&&choice| choice == AdapterChoice::Base).count();
    assert_eq!(base_differs, choices.len() - bases, "every adapter does something");

    // Generation, in which sequences end at different times.
    let config = GenerationConfig { max_new_tokens: 8, temperature: None, ..GenerationConfig::default() };
    let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let together = GenerationRequest::new(&slices, &config).with_adapters(&choices).run(&model).unwrap();
    for ((prompt, &choice), got) in slices.iter().zip(&choices).zip(&together) {
        let alone = GenerationRequest::new(&[prompt], &config).with_adapters(&[choice]).run(&model).unwrap();
        assert_eq!(*got, alone[0], "{choice:?}");
    }
    let error =
        GenerationRequest::new(&slices, &config).with_adapters(&choices[1..]).run(&model).unwrap_err().to_string();
    assert!(error.contains("as many choices"), "{error}");
}

#[test]
fn adapters_are_switched_between_requests() {
    let (mut model, names) = loaded();
    let tokens: Vec<u32> = vec![5, 9, 77, 3];
    let config = GenerationConfig { max_new_tokens: 6, temperature: None, ..GenerationConfig::default() };
    let answer = |model: &CausalLm| generate(model, &tokens, &config, |_| std::ops::ControlFlow::Continue(())).unwrap();
    let plain = answer(&model);
    let mut seen = Vec::new();
    for round in 0..2 {
        for (i, name) in names.iter().enumerate() {
            model.activate_adapter(name).unwrap();
            assert_eq!(model.active_adapter(), Some(name.as_str()));
            let got = answer(&model);
            if round == 0 { seen.push(got) } else { assert_eq!(got, seen[i], "{name}") }
        }
    }
    assert!(seen.iter().filter(|answer| **answer != plain).count() > names.len() / 2);
    // In place of one of the same name, active as it was.
    model.activate_adapter("regex").unwrap();
    let other = read("layers", &model);
    model.load_adapter("regex", &other).unwrap();
    let index = names.iter().position(|name| name == "layers").unwrap();
    assert_eq!(answer(&model), seen[index]);
    model.unload_adapter("regex").unwrap();
    assert_eq!((model.active_adapter(), answer(&model)), (None, plain.clone()));
    let error = model.activate_adapter("regex").unwrap_err().to_string();
    assert!(error.contains("no adapter \"regex\"") && error.contains("\"layers\""), "{error}");
    assert!(model.load_adapter("__base__", &other).is_err() && model.load_adapter("", &other).is_err());
    model.activate_adapter("dora").unwrap();
    model.disable_adapters();
    assert_eq!(answer(&model), plain);
    model.enable_adapter(true);
    assert_ne!(answer(&model), plain);
}

#[test]
fn combined_adapters_are_those_of_peft() {
    let (mut model, _) = loaded();
    let expected = tensors("combined.safetensors");
    let tokens = ids(&tensors("logits.safetensors"), "layers");
    let parts = [("head_lora", 0.7), ("fan_in_fan_out", -0.4), ("embedding", 1.5)];
    for (name, combination) in [("linear", Combination::Linear), ("cat", Combination::Cat)] {
        model.add_weighted_adapter(name, &parts, combination).unwrap();
        model.activate_adapter(name).unwrap();
        let got = model.logits(&tokens, &one(&tokens), AdapterChoice::Active).unwrap();
        let (error, largest) = difference(&got, &expected[name]);
        assert!(error < 2e-5 * largest, "{name}: {error} of {largest}");
    }
    // A weight of its own is the same as a combination of one.
    model.add_weighted_adapter("half", &[("layers", 0.5)], Combination::Cat).unwrap();
    let run =
        |model: &CausalLm, name: &str| model.logits(&tokens, &one(&tokens), &[AdapterChoice::Named(name)]).unwrap();
    let (whole, half) = (run(&model, "layers"), run(&model, "half"));
    assert!(difference(&whole, &half).0 > 0.01);
    for (weight, want) in [(0.5, &half), (0.0, &run_base(&model, &tokens)), (1.0, &whole)] {
        model.set_adapter_weight("layers", weight).unwrap();
        let (error, largest) = difference(&run(&model, "layers"), want);
        assert!(error < 1e-5 * largest, "{weight}: {error}");
    }
    for name in ["dora", "lora_bias", "save_head", "tokens"] {
        let error = model.set_adapter_weight(name, 0.5).unwrap_err().to_string();
        assert!(error.contains("does more than add"), "{error}");
        assert!(model.add_weighted_adapter("x", &[(name, 1.0)], Combination::Cat).is_err());
    }
    let mixed = [("layers", 1.0), ("patterns", 1.0)];
    let error = model.add_weighted_adapter("x", &mixed, Combination::Linear).unwrap_err().to_string();
    assert!(error.contains("cannot be summed"), "{error}");
    model.add_weighted_adapter("x", &mixed, Combination::Cat).unwrap();
    assert!(model.add_weighted_adapter("x", &[("patterns", 1.0), ("regex", f32::NAN)], Combination::Cat).is_err());
    assert!(model.add_weighted_adapter("x", &[], Combination::Cat).is_err());
}

fn run_base(model: &CausalLm, tokens: &[u32]) -> Tensor {
    model.logits(tokens, &one(tokens), &[AdapterChoice::Base]).unwrap()
}

#[test]
fn an_adapter_costs_its_own_bytes() {
    let mut model = base("peft/base");
    let before = model.memory();
    assert_eq!(before.loaded_adapters, 0);
    let mut expected = 0;
    let mut loaded = 0;
    for kind in
        ["layers", "regex", "patterns", "dora", "lora_bias", "tokens", "head_lora", "embedding", "save_head", "layer"]
    {
        let adapter = read(kind, &model);
        let numbers: usize = adapter
            .modules
            .iter()
            .map(|m| {
                m.a.len()
                    + m.b.len()
                    + [&m.bias, &m.magnitude].iter().map(|v| v.as_ref().map_or(0, Vec::len)).sum::<usize>()
            })
            .sum::<usize>()
            + adapter.tokens.iter().map(|tokens| tokens.rows.len()).sum::<usize>();
        let whole: usize = adapter
            .replaced
            .iter()
            .map(|replaced| {
                // Matrices as in the file, vectors in f32.
                let bf16 =
                    matches!(replaced.data, qlora::kernels::weight::PlainData::Bf16(_)) && replaced.shape.len() == 2;
                replaced.data.len() * if bf16 { 2 } else { 4 }
            })
            .sum();
        expected += 4 * numbers + whole;
        model.load_adapter(kind, &adapter).unwrap();
        loaded += 1;
        assert_eq!(model.memory().loaded_adapters, expected, "{kind}");
    }
    assert_eq!((loaded, model.memory().total() - before.total()), (10, expected));
}

#[test]
fn training_refuses_what_it_does_not_train() {
    for (kind, facts) in kinds() {
        let model = base(facts["base"].as_str().unwrap());
        let result = adapter::load(fixtures().join("peft_kinds").join(&kind), model.config());
        // PEFT itself switches fan_in_fan_out off on layers it is not for.
        let of_layers =
            ["regex", "fan_in_fan_out", "patterns", "patterns_rslora", "layers", "layer", "dora", "dora_biased"];
        let of_tables =
            ["tokens", "tokens_tied", "tokens_both", "save_embedding", "save_embedding_tied", "save_both_tied"];
        let of_ends = ["embedding", "embedding_tied", "head_lora", "head_lora_tied"];
        let trained = [&of_layers[..], &of_tables, &of_ends, &["bias_all", "bias_lora_only"]].concat();
        if trained.contains(&kind.as_str()) {
            result.unwrap();
            continue;
        }
        let error = result.unwrap_err().to_string();
        let known = ["is not supported: in training", "lm_head", "embed_tokens"];
        assert!(known.iter().any(|text| error.contains(text)), "{kind}: {error}");
    }
}

/// Saves the adapter of a kind again, which must leave it the same; the folder.
fn resaved(kind: &str, model: &CausalLm) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    read(kind, model).save(folder.path(), &SaveOptions::default()).unwrap();
    folder
}

#[test]
fn every_kind_is_saved_as_it_was() {
    for (kind, facts) in kinds() {
        let mut model = base(facts["base"].as_str().unwrap());
        let folder = resaved(&kind, &model);
        let again = adapter::open_folder(folder.path(), model.config()).unwrap();
        let first = read(&kind, &model);
        assert_eq!(again.kinds, first.kinds, "{kind}");
        assert_eq!(again.config, first.config, "{kind}");
        let tokens = [3, 17, 4, 31, 63];
        let mut run = |adapter: &PeftAdapter| {
            model.load_adapter("a", adapter).unwrap();
            model.activate_adapter("a").unwrap();
            model.logits(&tokens, &one(&tokens), AdapterChoice::Active).unwrap()
        };
        assert_eq!(difference(&run(&first), &run(&again)).0, 0.0, "{kind}");
    }
}

#[test]
#[ignore = "needs a Python with PEFT: QLORA_PYTHON=path/to/python"]
fn peft_takes_every_kind_that_is_saved() {
    let python = std::env::var("QLORA_PYTHON").expect("QLORA_PYTHON names a Python interpreter with PEFT");
    let expected = tensors("logits.safetensors");
    for (kind, facts) in kinds() {
        let folder_of_base = fixtures().join(facts["base"].as_str().unwrap());
        let folder = resaved(&kind, &base(facts["base"].as_str().unwrap()));
        let logits = folder.path().join("logits.safetensors");
        let part = |name: &str| expected[&format!("{kind}.{name}")].clone();
        let tensors = HashMap::from([("input_ids", part("input_ids")), ("logits", part("logits"))]);
        candle_core::safetensors::save(&tensors, &logits).unwrap();
        let output = std::process::Command::new(&python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check_peft.py"))
            .args(["--tolerance", "1e-4", "--base"])
            .arg(folder_of_base)
            .arg("--adapter")
            .arg(folder.path())
            .arg("--logits")
            .arg(&logits)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{kind}: {text}");
    }
}
