//! Training of parts of the base in its place against PEFT: rows of tokens (`trainable_token_indices`), whole tables
//! (`modules_to_save`) and biases (`bias`); and of LoRA on the embedding and the head. Start, gradients, 20 steps; then saved, read, gone on with, merged.
//!
//! Fixtures: `tests/fixtures/replaced_step`, made by `scripts/fixtures/replaced_step.py` with PEFT 0.21.2.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;
use qlora::adapter::{self, SaveOptions, SavedAdapter};
use qlora::batch::Batch;
use qlora::formats::HfDirectory;
use qlora::kernels::ops::adamw::{self, AdamW};
use qlora::kernels::ops::grad_norm;
use qlora::lora::{LoraConfig, TokenIndices, Which};
use qlora::merge::{LoraUpdate, MergeInto, MergedSource, PeftUpdate, Rounding, WeightUpdate};
use qlora::model::{AdapterChoice, CausalLm, LoadOptions, TrainPass};
use qlora::source::WeightSource;

use crate::common::relative_error;
use crate::step::{Case, fixture, floats};

/// Cases and their bases.
const CASES: [(&str, &str); 12] = [
    ("tokens_untied", "llama"),
    ("tokens_tied", "qwen2"),
    ("tokens_granite", "granite"),
    ("saved_untied", "llama"),
    ("saved_tied", "qwen2"),
    ("saved_follows", "qwen2"),
    ("bias_all", "qwen2"),
    ("bias_lora_only", "qwen2"),
    ("bias_dora_tokens", "qwen2"),
    ("lora_embedding", "llama"),
    ("lora_head", "qwen2"),
    ("lora_both", "granite"),
];

fn load((name, base): (&str, &str)) -> Case {
    Case::load("replaced_step", name, base, LoadOptions::default().quantization)
}

#[test]
fn a_fresh_adapter_starts_with_the_base_and_changes_nothing() {
    for case in CASES {
        let Case { mut model, adapter, batches, .. } = load(case);
        model.remove_adapter().unwrap();
        let batch = &batches[0];
        let base = floats(&model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active).unwrap());
        model.add_adapter(adapter.config.lora, 5).unwrap();
        let trained = model.adapter().unwrap();
        assert_eq!(trained.layout(), &adapter.layout);
        let replaced = trained.layout().tables().chain(trained.layout().biases()).count();
        let ends = ["lm_head", "model.embed_tokens"].map(|end| usize::from(trained.layout().get(end).is_some()));
        assert!(replaced + ends[0] + ends[1] > 0);
        let values = trained.values().unwrap();
        for entry in trained.layout().biases() {
            let linear = model.linear_weight(&entry.module).unwrap();
            assert_eq!(values[entry.range()], linear.bias.unwrap().to_vec().unwrap(), "{case:?}");
        }
        for entry in trained.layout().tables() {
            let table = if entry.module == "lm_head" { model.head() } else { model.embedding() };
            let mut rows = vec![0.0; table.rows() * table.cols()];
            table.dequantize_rows(0..table.rows(), &mut rows);
            let ids: Vec<u32> = match entry.which {
                Which::TokenRows => trained.config().trainable_token_indices.of(&entry.module).unwrap().to_vec(),
                _ => (0..table.rows() as u32).collect(),
            };
            for (id, row) in ids.iter().zip(values[entry.range()].chunks_exact(entry.cols)) {
                assert_eq!(row, &rows[*id as usize * entry.cols..][..entry.cols], "{case:?} {id}");
            }
        }
        let error =
            relative_error(&floats(&model.logits(&batch.tokens, &batch.layout, AdapterChoice::Active).unwrap()), &base);
        assert!(error < 1e-5, "{case:?}: {error}");
    }
}

#[test]
fn loss_and_gradients_are_those_of_peft() {
    for name in CASES {
        let case = load(name);
        case.check_logits(&case.model);
        let (loss, gradient) = case.gradient();
        assert!((loss - case.loss()).abs() < 1e-5 * case.loss(), "{name:?}: {loss} {}", case.loss());
        case.check("grad", &gradient, 1e-4);
        // Evaluation and log-probabilities see the trained head, too.
        let sum: f64 = case.batches.iter().map(|batch| case.model.evaluate(batch).unwrap().sum).sum();
        assert!((sum / case.items as f64 - loss).abs() < 1e-6 * loss, "{name:?}: {sum}");
        let of =
            |batch: &Batch| case.model.log_probabilities(batch, AdapterChoice::Active).unwrap().iter().sum::<f64>();
        let log_probability: f64 = case.batches.iter().map(of).sum();
        assert!((log_probability + sum).abs() < 1e-6 * sum, "{name:?}: {log_probability} {sum}");
    }
}

#[test]
fn candles_graph_and_recomputed_blocks_give_the_same_gradients() {
    for name in CASES {
        let mut case = load(name);
        let (loss, gradient) = case.gradient();
        case.model.set_gradient_checkpointing(true).unwrap();
        assert_eq!(case.gradient(), (loss, gradient), "{name:?}");
        let mut sum = vec![0.0; case.adapter.layout.len()];
        let mut total = 0.0;
        for batch in &case.batches {
            let loss = case.model.loss(batch, case.items, TrainPass::default()).unwrap();
            total += f64::from(loss.to_scalar::<f32>().unwrap());
            let gradients = loss.backward().unwrap();
            let gradient = gradients.get(case.model.adapter().unwrap().variable()).unwrap();
            sum.iter_mut().zip(floats(gradient)).for_each(|(sum, g)| *sum += g);
        }
        assert!((total - case.loss()).abs() < 1e-5 * case.loss(), "{name:?}: {total}");
        case.check("grad", &sum, 1e-4);
    }
}

#[test]
fn twenty_steps_give_the_losses_of_peft() {
    for name in CASES {
        let case = load(name);
        let trained = case.model.adapter().unwrap();
        let options = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        let len = trained.layout().len();
        let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
        let expected = floats(&case.expected["losses"]);
        assert!(expected.len() == 20 && expected[19] < 0.9 * expected[0], "{name:?} learns: {expected:?}");
        for (step, expected) in expected.into_iter().enumerate() {
            let (loss, gradient) = case.gradient();
            // Of the whole loss at first: once it is small, its relative error says more about Adam's rounding than about gradients.
            let (difference, expected) = ((loss - f64::from(expected)).abs(), f64::from(expected));
            assert!(difference < 1e-4 * expected.max(1.0), "{name:?} step {step}: {loss} {expected}");
            let clip = grad_norm::clip_coefficient(grad_norm::global_norm(&gradient).unwrap(), 0.5);
            let number = step as u64 + 1;
            trained.update(|values| adamw::step(&options, number, clip, values, &gradient, &mut m, &mut v)).unwrap();
        }
    }
}

#[test]
fn what_is_saved_is_read_trained_on_and_merged() {
    for name in CASES {
        let mut case = load(name);
        let folder = tempfile::tempdir().unwrap();
        let values = case.model.adapter().unwrap().values().unwrap();
        let lora = &case.adapter.config.lora;
        adapter::save(folder.path(), lora, &case.adapter.layout, &values, &SaveOptions::default()).unwrap();
        let again = adapter::load(folder.path(), case.model.config()).unwrap();
        assert_eq!((&again.config.lora, &again.layout, &again.weights), (lora, &case.adapter.layout, &values));
        // The same tensors as PEFT's file, with the same numbers.
        let tensors = |folder: &Path| {
            candle_core::safetensors::load(folder.join("adapter_model.safetensors"), &Device::Cpu).unwrap()
        };
        let (ours, theirs) = (tensors(folder.path()), tensors(&fixture("replaced_step", name.0)));
        assert_eq!(ours.len(), theirs.len(), "{name:?}: {:?}", ours.keys());
        for (key, tensor) in &theirs {
            assert_eq!((tensor.dims(), floats(tensor)), (ours[key].dims(), floats(&ours[key])), "{name:?} {key}");
        }

        // Loaded for inference, it computes what the trained one does; beside it in one batch, too.
        let loaded = adapter::open_folder(folder.path(), case.model.config()).unwrap();
        case.model.load_adapter("saved", &loaded).unwrap();
        let tokens = case.batches[0].tokens.clone();
        let layout = qlora::kernels::SequenceLayout::from_lengths(&[tokens.len(); 3]);
        let choices = [AdapterChoice::Active, AdapterChoice::Named("saved"), AdapterChoice::Base];
        let mixed = case.model.logits(&tokens.repeat(3), &layout, &choices).unwrap();
        let part = |i: usize| floats(&mixed.narrow(0, i * tokens.len(), tokens.len()).unwrap());
        assert!(relative_error(&part(0), &part(1)) < 1e-5, "{name:?}");
        assert!(relative_error(&part(0), &part(2)) > 1e-2, "{name:?}");
        let mut cache = case.model.new_cache(tokens.len());
        let vocabulary = case.model.config().vocab_size;
        let last =
            case.model.next_logits(&[&tokens], &mut [&mut cache], AdapterChoice::Active).unwrap().to_vec().unwrap();
        assert!(relative_error(&last, &part(0)[(tokens.len() - 1) * vocabulary..]) < 1e-5, "{name:?}");
        case.model.remove_adapter().unwrap();
        case.model.activate_adapter("saved").unwrap();
        case.check_logits(&case.model);

        let source = HfDirectory::open(fixture("models", name.1)).unwrap();
        let (layout, lora) = (&case.adapter.layout, |end: &str| case.adapter.layout.get(end).is_some());
        let whole =
            layout.tables().any(|entry| entry.which == Which::Table) || lora("lm_head") || lora("model.embed_tokens");
        let plain = LoraUpdate::new(&again);
        let mut updates: Vec<Box<dyn WeightUpdate + '_>> = vec![Box::new(PeftUpdate::new(&loaded, &source).unwrap())];
        match plain {
            Ok(update) => updates.push(Box::new(update)),
            Err(error) => assert!(whole && error.to_string().contains("merge with PeftUpdate"), "{error}"),
        }
        assert_eq!(updates.len(), if whole { 1 } else { 2 });
        for update in &updates {
            let merged = MergedSource::new(&source, &**update, MergeInto::Original, Rounding::None).unwrap();
            let tied = source.config().tie_word_embeddings && name.0 != "saved_tied";
            if !whole {
                assert_eq!(merged.config().tie_word_embeddings, tied, "{name:?}");
            }
            case.check_logits(&CausalLm::load(&merged, LoadOptions::default()).unwrap());
        }
    }
}

#[test]
fn options_that_do_not_fit_are_refused_by_name() {
    let Case { mut model, adapter, .. } = load(CASES[0]);
    let fresh = |config: LoraConfig, model: &mut CausalLm| model.add_adapter(config, 1).unwrap_err().to_string();
    let beyond = LoraConfig { trainable_token_indices: TokenIndices::of_embedding([1, 80]), ..LoraConfig::default() };
    assert!(fresh(beyond, &mut model).contains("token 80 is beyond the model's vocabulary of 80"));
    let norm = LoraConfig { modules_to_save: vec!["norm".into()], ..LoraConfig::default() };
    assert!(fresh(norm, &mut model).contains("modules_to_save: \"norm\""));
    // A layout with rows, options without.
    let SavedAdapter { config, layout, weights } = adapter;
    let options = LoraConfig { trainable_token_indices: TokenIndices::default(), ..config.lora };
    let error = model.set_adapter(options.clone(), layout.clone(), weights.clone()).unwrap_err().to_string();
    assert!(error.contains("trainable_tokens_delta") && error.contains("has shape"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let error = adapter::save(folder.path(), &options, &layout, &weights, &SaveOptions::default()).unwrap_err();
    assert!(error.to_string().contains("do not belong to these options"), "{error}");
}

#[test]
#[ignore = "needs a Python with PEFT: QLORA_PYTHON=path/to/python"]
fn peft_takes_what_is_saved_and_gives_the_same_logits() {
    let python = std::env::var("QLORA_PYTHON").expect("QLORA_PYTHON names a Python interpreter with PEFT");
    for name in CASES {
        let case = load(name);
        let folder = tempfile::tempdir().unwrap();
        let SavedAdapter { config, layout, weights } = &case.adapter;
        adapter::save(folder.path(), &config.lora, layout, weights, &SaveOptions::default()).unwrap();
        let tensors = [("input_ids", "input_ids.0"), ("logits", "logits.0")];
        let tensors: HashMap<_, _> = tensors.map(|(to, from)| (to, case.expected[from].clone())).into();
        let logits = folder.path().join("logits.safetensors");
        candle_core::safetensors::save(&tensors, &logits).unwrap();
        let output = std::process::Command::new(&python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/check_peft.py"))
            .args(["--tolerance", "1e-4", "--base"])
            .arg(fixture("models", name.1))
            .arg("--adapter")
            .arg(folder.path())
            .arg("--logits")
            .arg(&logits)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name:?}: {text}");
        println!("{name:?}: {}", text.lines().last().unwrap_or_default());
    }
}
