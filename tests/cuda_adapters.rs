//! Adapters of every kind that PEFT's LoRA writes, on a GPU: the logits of PEFT, switched, mixed in one batch, and in steps of
//! generation.
//!
//! Fixtures as in `peft/kinds.rs`. Models wide enough for the kernels of generation are random ones; the CPU is their
//! reference.
#![cfg(feature = "cuda")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Tensor};
use common::{computes, gpu, relative_error, tiny_config, tiny_model};
use qlora::adapter::{self, LoraModule, PeftAdapter, Replaced, TokenRows};
use qlora::batch::Batch;
use qlora::config::ModelConfig;
use qlora::formats::HfDirectory;
use qlora::generate::{GenerationRequest, generate};
use qlora::kernels::weight::PlainData;
use qlora::kernels::{Dtype, SequenceLayout, Workspace};
use qlora::lora::{Bias, LoraConfig, TargetModules, TokenIndices};
use qlora::model::{AdapterChoice, CausalLm, KvCache, LoadOptions};
use qlora::sampling::GenerationConfig;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// The tests of this file run one at a time: one of them looks at the GPU's memory.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folder of fixtures: where the program was built, or else here, as it may run on another machine.
fn fixtures() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    if built.exists() { built } else { "tests/fixtures".into() }
}

fn kinds() -> BTreeMap<String, Value> {
    serde_json::from_slice(&std::fs::read(fixtures().join("peft_kinds/facts.json")).unwrap()).unwrap()
}

fn on(device: &Device, dtype: Dtype) -> Workspace {
    Workspace::poisoned_on(device, dtype).unwrap()
}

fn base(name: &str, workspace: Workspace) -> CausalLm {
    let source = HfDirectory::open(fixtures().join(name)).unwrap();
    CausalLm::load_on(&source, LoadOptions::default(), workspace).unwrap()
}

fn read(kind: &str, model: &CausalLm) -> PeftAdapter {
    adapter::open_folder(fixtures().join("peft_kinds").join(kind), model.config()).unwrap()
}

fn expected() -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixtures().join("peft_kinds/logits.safetensors"), &Device::Cpu).unwrap()
}

fn one(tokens: &[u32]) -> SequenceLayout {
    SequenceLayout::from_lengths(&[tokens.len()])
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn logits(model: &CausalLm, tokens: &[u32], choice: AdapterChoice) -> Vec<f32> {
    values(&model.logits(tokens, &one(tokens), &[choice]).unwrap())
}

/// `norm(got - want) / norm(want)`; NaN if anything is NaN.
fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(*got) - f64::from(*want)));
    difference / norm(&mut want.iter().map(|&want| f64::from(want)))
}

/// Of the largest logit, how far from PEFT's f32 a model may be: in f32 sums have another order; in the halves every
/// activation is rounded, and where PEFT rounds is not where we do.
const OF_THE_LARGEST: [(Dtype, f32); 3] = [(Dtype::F32, 1e-5), (Dtype::F16, 1e-2), (Dtype::Bf16, 6e-2)];

#[test]
fn every_kind_gives_the_logits_of_peft() {
    let Some(device) = gpu() else { return };
    let _turn = turn();
    let (expected, kinds) = (expected(), kinds());
    assert!(kinds.len() >= 28, "{} kinds", kinds.len());
    let mut failures = Vec::new();
    for (dtype, limit) in OF_THE_LARGEST {
        if !computes(&device, dtype) {
            continue;
        }
        let mut worst = 0f32;
        for (kind, facts) in &kinds {
            let mut model = base(facts["base"].as_str().unwrap(), on(&device, dtype));
            let ids: Vec<i64> = expected[&format!("{kind}.input_ids")].to_dtype(DType::I64).unwrap().to_vec1().unwrap();
            let tokens: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
            let want = values(&expected[&format!("{kind}.logits")]);
            let before = logits(&model, &tokens, AdapterChoice::Active);
            model.load_adapter("a", &read(kind, &model)).unwrap();
            assert!(before == logits(&model, &tokens, AdapterChoice::Active), "{kind}: loading alone changes nothing");

            model.activate_adapter("a").unwrap();
            let got = logits(&model, &tokens, AdapterChoice::Active);
            let whole = relative_error(&got, &want);
            // With a cache: a beginning, then token by token.
            let (mut cache, mut cached) = (model.new_cache(tokens.len()), 0f32);
            let rows = want.len() / tokens.len();
            for (i, token) in tokens.iter().enumerate() {
                let next = if i == 0 { &tokens[..2] } else { std::slice::from_ref(token) };
                if i == 1 {
                    continue;
                }
                let row =
                    model.next_logits(&[next], &mut [&mut cache], AdapterChoice::Active).unwrap().to_vec().unwrap();
                let at = if i == 0 { 1 } else { i };
                let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
                let of = &got[at * rows..(at + 1) * rows];
                let difference = row.iter().zip(of).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                cached = cached.max(difference / largest);
            }
            let labels: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
            let loss = model.evaluate(&Batch::from_documents([(tokens.as_slice(), labels.as_slice())])).unwrap();
            let rows: Vec<&[f32]> = want.chunks_exact(rows).collect();
            let log = |row: &[f32], id: u32| {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = row.iter().map(|x| (x - largest).exp()).sum();
                f64::from(largest + sum.ln() - row[id as usize])
            };
            let want_loss: f64 = tokens[1..].iter().zip(&rows).map(|(&id, row)| log(row, id)).sum();
            let of_loss = ((loss.sum - want_loss).abs() / want_loss) as f32;
            println!(
                "{:4} {kind:24} {whole:.1e} of the largest, with a cache {cached:.1e}, loss {of_loss:.1e}",
                dtype.name()
            );
            let fits = whole <= limit && cached <= limit && of_loss <= limit;
            if !fits {
                failures.push(format!("{} {kind}: {whole:.1e}, {cached:.1e}, {of_loss:.1e}", dtype.name()));
            }
            worst = worst.max(whole);
            model.disable_adapters();
            assert!(before == logits(&model, &tokens, AdapterChoice::Active), "{kind}: switched off");
            model.unload_adapter("a").unwrap();
            assert_eq!(model.memory().loaded_adapters, 0);
        }
        println!("{}: {} kinds, largest error relative to the largest logit {worst:.1e}", dtype.name(), kinds.len());
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// All kinds over the untied Llama, under their names.
fn loaded(workspace: Workspace) -> (CausalLm, Vec<String>) {
    let mut model = base("peft/base", workspace);
    let names: Vec<String> =
        kinds().into_iter().filter(|(_, facts)| facts["base"] == "peft/base").map(|(kind, _)| kind).collect();
    for name in &names {
        let adapter = read(name, &model);
        model.load_adapter(name, &adapter).unwrap();
    }
    (model, names)
}

/// Gives the model an adapter to train, whose values are not zero.
fn train(model: &mut CausalLm) {
    let config = LoraConfig { r: 3, target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
    model.add_adapter(config, 1).unwrap();
    let len = model.adapter().unwrap().layout().len();
    let values: Vec<f32> = (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) / 300.0).collect();
    model.adapter().unwrap().set_values(&values).unwrap();
}

#[test]
fn a_mixed_batch_gives_what_each_sequence_gives_alone() {
    let Some(device) = gpu() else { return };
    let _turn = turn();
    for (dtype, limit) in [(Dtype::F32, 2e-5), (Dtype::Bf16, 4e-2)] {
        if !computes(&device, dtype) {
            continue;
        }
        let (mut model, names) = loaded(on(&device, dtype));
        assert!(names.len() >= 15, "{names:?}");
        // The adapter that is trained can be in the batch too.
        train(&mut model);
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
        let mixed = values(&model.logits(&prompts.concat(), &layout, &choices).unwrap());
        let vocab = model.config().vocab_size;
        let (mut worst, mut differ, mut failures) = (0f64, 0, Vec::new());
        for ((rows, prompt), &choice) in layout.sequences().zip(&prompts).zip(&choices) {
            let alone = logits(&model, prompt, choice);
            let error = error(&mixed[rows.start * vocab..rows.end * vocab], &alone);
            let fits = error < limit;
            if !fits {
                failures.push(format!("{} {choice:?}: {error:.1e}", dtype.name()));
            }
            worst = worst.max(error);
            differ += usize::from(self::error(&logits(&model, prompt, AdapterChoice::Base), &alone) > 1e-3);
        }
        println!("{}: {} sequences mixed, {worst:.1e} from each alone", dtype.name(), choices.len());
        assert!(failures.is_empty(), "{}", failures.join("\n"));
        let bases = choices.iter().filter(|&&choice| choice == AdapterChoice::Base).count();
        assert_eq!(differ, choices.len() - bases, "every adapter does something");
        // Generation, in which sequences end at different times; in bf16 near ties may fall either way.
        if dtype == Dtype::F32 {
            let config = GenerationConfig { max_new_tokens: 8, temperature: None, ..GenerationConfig::default() };
            let slices: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
            let together = GenerationRequest::new(&slices, &config).with_adapters(&choices).run(&model).unwrap();
            for ((prompt, &choice), got) in slices.iter().zip(&choices).zip(&together) {
                let alone = GenerationRequest::new(&[prompt], &config).with_adapters(&[choice]).run(&model).unwrap();
                assert_eq!(*got, alone[0], "{choice:?}");
            }
        }
    }
}

#[test]
fn adapters_are_switched_as_on_the_cpu_and_cost_their_own_bytes() {
    let Some(device) = gpu() else { return };
    let _turn = turn();
    let workspace = on(&device, Dtype::F32);
    let pool = || {
        workspace.gpu().unwrap().synchronize("test").unwrap();
        workspace.gpu().unwrap().pool().used().unwrap()
    };
    let mut model = base("peft/base", workspace.clone());
    let before = (pool(), model.memory().total());
    let mut names: Vec<String> = Vec::new();
    let mut pieces = 0;
    for (kind, facts) in kinds() {
        if facts["base"] == "peft/base" {
            let adapter = read(&kind, &model);
            pieces += 1 + adapter.replaced.iter().filter(|replaced| replaced.shape.len() == 2).count();
            model.load_adapter(&kind, &adapter).unwrap();
            names.push(kind);
        }
    }
    assert!(names.len() >= 15);
    let counted = model.memory().loaded_adapters;
    assert_eq!(model.memory().total() - before.1, counted);
    let taken = (pool() - before.0) as usize;
    println!("{} adapters: {counted} bytes counted, {taken} taken from the pool", names.len());
    // The pool rounds every piece up: an adapter has one, and one a weight that it holds whole.
    assert!((counted..=counted + pieces * 512).contains(&taken), "{counted} counted in {pieces} pieces, {taken} taken");

    let (mut cpu, _) = loaded(Workspace::poisoned());
    let tokens: Vec<u32> = vec![5, 9, 77, 3];
    let config = GenerationConfig { max_new_tokens: 6, temperature: None, ..GenerationConfig::default() };
    let answer = |model: &CausalLm| generate(model, &tokens, &config, |_| ControlFlow::Continue(())).unwrap();
    let plain = answer(&cpu);
    assert_eq!(answer(&model), plain);
    let mut seen = 0;
    for _ in 0..2 {
        for name in &names {
            for model in [&mut model, &mut cpu] {
                model.activate_adapter(name).unwrap();
            }
            let want = answer(&cpu);
            assert_eq!(answer(&model), want, "{name}");
            seen += usize::from(want != plain);
        }
    }
    assert!(seen > names.len());
    // Beside one that is trained.
    train(&mut model);
    train(&mut cpu);
    model.activate_adapter("dora").unwrap();
    cpu.activate_adapter("dora").unwrap();
    assert_eq!(answer(&model), answer(&cpu));
    model.deactivate_adapter();
    cpu.deactivate_adapter();
    assert_eq!(answer(&model), answer(&cpu));
    assert!(answer(&model) != plain, "the trained adapter runs");
}

/// Heads of 64 and layers in whole blocks: a step of generation runs the kernels for a few tokens.
fn wide_config() -> ModelConfig {
    ModelConfig {
        hidden_size: 128,
        intermediate_size: 192,
        num_hidden_layers: 2,
        head_dim: 64,
        sliding_window: vec![None, Some(40)],
        max_position_embeddings: 512,
        tie_word_embeddings: false,
        ..tiny_config()
    }
}

/// Adapters of all kinds for [`wide_config`], by name.
fn wide_adapters(template: &PeftAdapter) -> Vec<(&'static str, PeftAdapter)> {
    let config = wide_config();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut numbers = move |len: usize, center: f32, scale: f32| -> Vec<f32> {
        common::random(&mut rng, len, scale).iter().map(|x| center + x).collect()
    };
    let (hidden, mlp, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let mut shapes = Vec::new();
    for layer in 0..config.num_hidden_layers {
        for (name, shape) in [
            ("self_attn.q_proj", [q, hidden]),
            ("self_attn.k_proj", [kv, hidden]),
            ("self_attn.v_proj", [kv, hidden]),
            ("self_attn.o_proj", [hidden, q]),
            ("mlp.gate_proj", [mlp, hidden]),
            ("mlp.up_proj", [mlp, hidden]),
            ("mlp.down_proj", [hidden, mlp]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    let ends = [("model.embed_tokens".to_owned(), [hidden, vocab]), ("lm_head".to_owned(), [vocab, hidden])];
    let mut module =
        |(name, [outputs, inputs]): &(String, [usize; 2]), rank: usize, bias: bool, dora: bool| LoraModule {
            name: name.clone(),
            rank,
            scaling: 1.5,
            a: numbers(rank * inputs, 0.0, 0.1),
            b: numbers(outputs * rank, 0.0, 0.1),
            bias: bias.then(|| numbers(*outputs, 0.0, 0.2)),
            magnitude: dora.then(|| numbers(*outputs, 1.0, 0.3)),
        };
    let mut modules = |shapes: &[(String, [usize; 2])], rank: usize, bias: bool, dora: bool| -> Vec<LoraModule> {
        shapes.iter().map(|shape| module(shape, rank, bias, dora)).collect()
    };
    let lora = modules(&shapes, 8, false, false);
    let odd = modules(&shapes[3..], 21, false, false);
    let dora = modules(&shapes, 4, false, true);
    let biased = modules(&shapes[..9], 3, true, false);
    let both_ends = modules(&ends, 5, false, false);
    let dora_everywhere = modules(&[&shapes[..], &ends].concat(), 2, false, true);
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let mut replaced = |name: &str, shape: &[usize], center: f32, scale: f32| {
        let data = common::random(&mut rng, shape.iter().product(), scale).iter().map(|x| center + x).collect();
        Replaced { name: name.to_owned(), data: PlainData::F32(data), shape: shape.to_vec(), is_base: false }
    };
    let saved = vec![
        replaced("model.norm.weight", &[hidden], 1.0, 0.4),
        replaced("model.layers.0.input_layernorm.weight", &[hidden], 1.0, 0.4),
        replaced("model.layers.1.post_attention_layernorm.weight", &[hidden], 1.0, 0.4),
        replaced("model.layers.1.self_attn.q_norm.weight", &[config.head_dim], 1.0, 0.4),
        replaced("model.layers.0.self_attn.k_norm.weight", &[config.head_dim], 1.0, 0.4),
        replaced("model.layers.0.mlp.up_proj.weight", &[mlp, hidden], 0.0, 0.15),
        replaced("model.layers.1.self_attn.q_proj.bias", &[q], 0.0, 0.5),
        replaced("lm_head.weight", &[vocab, hidden], 0.0, 1.0),
    ];
    let rows = |module: &str, seed: u64| TokenRows {
        module: module.to_owned(),
        ids: vec![7, 3, 40],
        rows: common::random(&mut ChaCha8Rng::seed_from_u64(seed), 3 * hidden, 1.0),
    };
    let tokens = vec![rows("model.embed_tokens", 11), rows("lm_head", 12)];
    let with = |modules: Vec<LoraModule>, tokens: Vec<TokenRows>, replaced: Vec<Replaced>| PeftAdapter {
        modules,
        tokens,
        replaced,
        ..template.clone()
    };
    vec![
        ("lora", with(lora.clone(), vec![], vec![])),
        ("odd", with(odd, vec![], vec![])),
        ("dora", with(dora, vec![], vec![])),
        ("biased", with(biased, vec![], vec![])),
        ("ends", with(both_ends, vec![], vec![])),
        ("everywhere", with(dora_everywhere, vec![], vec![])),
        ("saved", with(vec![], vec![], saved.clone())),
        ("tokens", with(lora.clone(), tokens, vec![])),
        ("all", with(lora, vec![], saved)),
    ]
}

/// The wide model with all its adapters.
fn wide(quantized: bool, workspace: Workspace) -> (CausalLm, Vec<&'static str>) {
    let template = read("layers", &base("peft/base", Workspace::poisoned()));
    let mut model = tiny_model(&wide_config(), quantized, 7, workspace);
    let mut names = Vec::new();
    for (name, adapter) in wide_adapters(&template) {
        model.load_adapter(name, &adapter).unwrap();
        names.push(name);
    }
    train(&mut model);
    (model, names)
}

/// Runs each sequence's prompt alone, then `steps` tokens of all together; gives the logits after each, by sequence.
fn generation(model: &CausalLm, texts: &[Vec<u32>], prompt: usize, choices: &[AdapterChoice]) -> Vec<Vec<f32>> {
    let mut caches: Vec<KvCache> = texts.iter().map(|text| model.new_cache(text.len())).collect();
    let mut got = vec![Vec::new(); texts.len()];
    for (((text, cache), choice), got) in texts.iter().zip(&mut caches).zip(choices).zip(&mut got) {
        let logits = model.next_logits(&[&text[..prompt]], &mut [cache], &[*choice]).unwrap();
        got.extend(logits.to_vec().unwrap());
    }
    for at in prompt..texts[0].len() {
        let tokens: Vec<&[u32]> = texts.iter().map(|text| &text[at..=at]).collect();
        let mut caches: Vec<&mut KvCache> = caches.iter_mut().collect();
        let logits = model.next_logits(&tokens, &mut caches, choices).unwrap();
        let values = logits.to_vec().unwrap();
        got.iter_mut().zip(values.chunks_exact(logits.cols())).for_each(|(got, row)| got.extend(row));
    }
    got
}

#[test]
fn steps_of_generation_mix_adapters() {
    let Some(device) = gpu() else { return };
    let _turn = turn();
    const PROMPT: usize = 9;
    let mut failures = Vec::new();
    for quantized in [true, false] {
        let (cpu, names) = wide(quantized, Workspace::poisoned());
        let mut choices = vec![AdapterChoice::Base, AdapterChoice::Active];
        choices.extend(names.iter().flat_map(|name| [AdapterChoice::Named(name); 2]));
        choices.extend([AdapterChoice::Active, AdapterChoice::Base, AdapterChoice::Named("lora")]);
        let texts: Vec<Vec<u32>> = (0..choices.len() as u32)
            .map(|i| (0..PROMPT as u32 + 12).map(|j| (i * 17 + j * 7 + j * j) % 61).collect())
            .collect();
        let want: Vec<Vec<f32>> = (texts.iter().zip(&choices))
            .map(|(text, choice)| logits(&cpu, text, *choice)[(PROMPT - 1) * 61..].to_vec())
            .collect();
        for (dtype, limit) in [(Dtype::F32, 2e-5), (Dtype::F16, 1e-2), (Dtype::Bf16, 6e-2)] {
            if !computes(&device, dtype) {
                continue;
            }
            let (gpu, _) = wide(quantized, on(&device, dtype));
            let mixed = generation(&gpu, &texts, PROMPT, &choices);
            let mut worst = [0f64; 3];
            for (((text, choice), want), mixed) in texts.iter().zip(&choices).zip(&want).zip(&mixed) {
                let whole = logits(&gpu, text, *choice)[(PROMPT - 1) * 61..].to_vec();
                let alone = generation(&gpu, std::slice::from_ref(text), PROMPT, &[*choice]);
                let errors = [error(&whole, want), error(mixed, want), error(mixed, &alone[0])];
                let label = format!("{} quantized {quantized} {choice:?}: {errors:.1?}", dtype.name());
                let fits = errors.iter().all(|error| *error < limit);
                if !fits {
                    failures.push(label);
                }
                worst = [0, 1, 2].map(|i| worst[i].max(errors[i]));
            }
            let [whole, steps, alone] = worst;
            println!(
                "{}, quantized {quantized}: {} sequences; from the CPU whole {whole:.1e}, in steps {steps:.1e}; mixed \
                 from alone {alone:.1e}",
                dtype.name(),
                choices.len()
            );
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A model with a DoRA adapter of values that are not zero.
fn with_dora(workspace: Workspace) -> CausalLm {
    let mut model = base("models/llama", workspace);
    let config = LoraConfig { r: 3, use_dora: true, target_modules: TargetModules::AllLinear, ..LoraConfig::default() };
    model.add_adapter(config, 1).unwrap();
    let adapter = model.adapter().unwrap();
    let changed = |(i, value): (usize, f32)| value * (1.0 + (i % 7) as f32 / 20.0) + (i % 5) as f32 / 100.0;
    let values: Vec<f32> = adapter.values().unwrap().into_iter().enumerate().map(changed).collect();
    adapter.set_values(&values).unwrap();
    model
}

#[test]
fn training_with_dora_gives_the_gradients_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let _turn = turn();
    let tokens: Vec<u32> = (0..37).map(|i| (i * 31 + 5) % 70 + 3).collect();
    let labels: Vec<i64> = tokens.iter().map(|&id| i64::from(id)).collect();
    let batch = Batch::from_documents([(tokens.as_slice(), labels.as_slice())]);
    let run = |workspace: Workspace| {
        let model = with_dora(workspace);
        let len = model.adapter().unwrap().layout().len();
        let mut gradient = model.workspace().zeros_f32(1, len).unwrap();
        let pass = qlora::model::TrainPass::default();
        let loss = model.accumulate_gradients(&batch, tokens.len(), pass, gradient.view_mut()).unwrap().sum;
        (loss, gradient.to_vec().unwrap(), logits(&model, &tokens, AdapterChoice::Active))
    };
    let (loss, gradient, expected) = run(Workspace::poisoned());
    for (dtype, limit) in [(Dtype::F32, 2e-4), (Dtype::Bf16, 6e-2)] {
        if !computes(&device, dtype) {
            continue;
        }
        let (got, got_gradient, got_logits) = run(on(&device, dtype));
        assert!((got - loss).abs() < limit * loss, "{}: loss {got}, {loss}", dtype.name());
        let errors = [error(&got_gradient, &gradient), error(&got_logits, &expected)];
        assert!(errors.iter().all(|error| *error < limit), "{}: gradient and logits {errors:?}", dtype.name());
    }
}

#[test]
fn training_rows_of_tokens_and_biases_gives_the_gradients_of_the_cpu() {
    let Some(device) = gpu() else { return };
    let _turn = turn();
    let tokens: Vec<u32> = (0..37).map(|i| (i * 31 + 5) % 70 + 3).collect();
    // Some rows without a target, so that the others are gathered.
    let labels: Vec<i64> = tokens.iter().enumerate().map(|(i, &id)| if i < 9 { -100 } else { i64::from(id) }).collect();
    let batch = Batch::from_documents([(tokens.as_slice(), labels.as_slice())]);
    let trained = TokenIndices::of_embedding([tokens[2], tokens[20], 1]);
    for base_name in ["models/llama", "models/qwen2"] {
        let run = |workspace: Workspace| {
            let mut model = base(base_name, workspace);
            let config =
                LoraConfig { r: 3, trainable_token_indices: trained.clone(), bias: Bias::All, ..LoraConfig::default() };
            model.add_adapter(config, 1).unwrap();
            let adapter = model.adapter().unwrap();
            let changed = |(i, value): (usize, f32)| value + (i % 5) as f32 / 50.0;
            let values: Vec<f32> = adapter.values().unwrap().into_iter().enumerate().map(changed).collect();
            adapter.set_values(&values).unwrap();
            let mut gradient = model.workspace().zeros_f32(1, values.len()).unwrap();
            let pass = qlora::model::TrainPass::default();
            let loss = model.accumulate_gradients(&batch, tokens.len(), pass, gradient.view_mut()).unwrap().sum;
            (loss, gradient.to_vec().unwrap(), logits(&model, &tokens, AdapterChoice::Active), adapter.layout().clone())
        };
        let (loss, gradient, expected, layout) = run(Workspace::poisoned());
        for (dtype, limit) in [(Dtype::F32, 2e-4), (Dtype::Bf16, 6e-2)] {
            if !computes(&device, dtype) {
                continue;
            }
            let (got, got_gradient, got_logits, _) = run(on(&device, dtype));
            assert!((got - loss).abs() < limit * loss, "{base_name} {}: loss {got}, {loss}", dtype.name());
            assert!(error(&got_logits, &expected) < limit, "{base_name} {}: logits", dtype.name());
            for entry in layout.biases().chain(layout.tables()) {
                let error = error(&got_gradient[entry.range()], &gradient[entry.range()]);
                assert!(error < limit, "{base_name} {}: {}: {error}", dtype.name(), entry.tensor_name());
            }
        }
    }
}

#[test]
fn a_whole_table_is_refused_by_its_option() {
    let Some(device) = gpu() else { return };
    let _turn = turn();
    let mut model = base("models/llama", on(&device, Dtype::F32));
    let config = LoraConfig { modules_to_save: vec!["lm_head".into()], ..LoraConfig::default() };
    let error = model.add_adapter(config, 1).unwrap_err().to_string();
    assert!(error.contains("modules_to_save") && error.contains("trainable_token_indices"), "{error}");
}
