//! The large grain (the stack as one node) against the small grain (one node an operation), and its promises.

mod common;
#[path = "stack_node/context.rs"]
mod context;

use std::ops::ControlFlow;

use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use candle_nn::Optimizer;
use common::{add_random_adapter, relative_error, tiny_config, tiny_model};
use qlora::autograd::ops;
use qlora::batch::Batch;
use qlora::generate::{GenerationRequest, generate};
use qlora::kernels::ops::rope::RopeTable;
use qlora::kernels::{SequenceLayout, Workspace};
use qlora::lora::{Entry, LoraConfig, TargetModules};
use qlora::model::{AdapterChoice, CausalLm, Keep, TrainPass};
use qlora::sampling::GenerationConfig;

fn lora() -> LoraConfig {
    let target_modules = TargetModules::AllLinear;
    LoraConfig { r: 3, lora_alpha: 6.0, target_modules, ..LoraConfig::default() }
}

fn document(len: usize, seed: u32) -> (Vec<u32>, Vec<i64>) {
    let ids: Vec<u32> = (0..len as u32).map(|i| (i * 7 + seed * 13 + i * i) % 61).collect();
    let labels = ids.iter().enumerate().map(|(i, &id)| if i % 4 == 1 { -100 } else { i64::from(id) }).collect();
    (ids, labels)
}

fn batch(documents: &[(Vec<u32>, Vec<i64>)]) -> Batch {
    Batch::from_documents(documents.iter().map(|(ids, labels)| (ids.as_slice(), labels.as_slice())))
}

fn trained_model(quantized: bool) -> CausalLm {
    let mut model = tiny_model(&tiny_config(), quantized, 7, Workspace::poisoned());
    add_random_adapter(&mut model, lora(), 3);
    model
}

fn direct_gradient(model: &CausalLm, batch: &Batch, num_items: usize, seed: u64) -> (f64, Vec<f32>) {
    let mut gradient = vec![0.0; model.adapter().unwrap().layout().len()];
    let loss = model.accumulate_gradients(batch, num_items, TrainPass::seeded(seed), (&mut gradient).into()).unwrap();
    (loss.sum, gradient)
}

fn node_gradient(model: &CausalLm, batch: &Batch, num_items: usize) -> (f32, Vec<f32>) {
    let loss = model.loss(batch, num_items, TrainPass::default()).unwrap();
    let gradients = loss.backward().unwrap();
    assert_eq!(gradients.get_ids().count(), 1, "the adapter alone gets a gradient, nothing frozen");
    let gradient = gradients.get(model.adapter().unwrap().variable()).unwrap().to_vec1().unwrap();
    (loss.to_scalar().unwrap(), gradient)
}

/// The same decoder composed of one node an operation, with one variable for every A and B.
fn composed(model: &CausalLm, batch: &Batch, num_items: usize) -> (Tensor, Vec<(String, Var, Var)>) {
    let (config, workspace) = (model.config(), Workspace::poisoned());
    let adapter = model.adapter().unwrap();
    let values = adapter.values().unwrap();
    let scale = adapter.config().scaling() as f32;
    let layout = Arc::new(batch.layout.clone());
    let positions = Arc::new(layout.positions().clone());
    let table = Arc::new(RopeTable::new(&config.rope, config.head_dim, layout.max_len()).unwrap());
    let mut variables = Vec::new();

    let mut linear = |name: &str, x: &Tensor| {
        let (linear, pair) = (model.linear_weight(name).unwrap(), adapter.layout().get(name).unwrap());
        let var = |entry: &Entry| {
            let tensor = Tensor::from_slice(&values[entry.range()], (entry.rows, entry.cols), &Device::Cpu);
            Var::from_tensor(&tensor.unwrap()).unwrap()
        };
        let (a, b) = (var(pair.a), var(pair.b));
        let weight = linear.weight.clone();
        let y = ops::qlora_linear(x, a.as_tensor(), b.as_tensor(), weight, scale, None, &workspace).unwrap();
        variables.push((name.to_owned(), a, b));
        let bias = Tensor::new(linear.bias.unwrap().as_slice(), &Device::Cpu).unwrap();
        y.broadcast_add(&bias).unwrap()
    };
    let weight = |name: &str| model.norm_weight(name).unwrap().as_slice();
    let norm = |x: &Tensor, weight: &[f32]| ops::rms_norm(x, weight.into(), config.rms_norm_eps, &workspace).unwrap();
    let rotate = |x: &Tensor| ops::rotary(x, config.head_dim, table.clone(), positions.clone(), &workspace).unwrap();
    let tokens = batch.tokens.len();
    let heads = |x: &Tensor, weight: &[f32]| {
        let width = x.dim(1).unwrap();
        let per_head = x.reshape((tokens * width / config.head_dim, config.head_dim)).unwrap();
        norm(&per_head, weight).reshape((tokens, width)).unwrap()
    };

    let embedding = model.embedding().clone();
    let mut x = ops::embedding(&batch.tokens, &*embedding, &workspace).unwrap();
    for block in &config.spec().blocks {
        let name = |module: &str| format!("{}.{module}", block.name);
        let n = norm(&x, weight(&name("input_layernorm")));
        let q = rotate(&heads(&linear(&name("self_attn.q_proj"), &n), weight(&name("self_attn.q_norm"))));
        let k = rotate(&heads(&linear(&name("self_attn.k_proj"), &n), weight(&name("self_attn.k_norm"))));
        let v = linear(&name("self_attn.v_proj"), &n);
        let attended = ops::causal_attention(&q, &k, &v, block.attention, layout.clone(), &workspace).unwrap();
        x = (&x + linear(&name("self_attn.o_proj"), &attended)).unwrap();
        let n = norm(&x, weight(&name("post_attention_layernorm")));
        let (gate, up) = (linear(&name("mlp.gate_proj"), &n), linear(&name("mlp.up_proj"), &n));
        let h = ops::swiglu(&gate, &up, &workspace).unwrap();
        x = (&x + linear(&name("mlp.down_proj"), &h)).unwrap();
    }
    let hidden = norm(&x, weight("model.norm"));
    let loss = ops::linear_cross_entropy(&hidden, &*embedding, &batch.targets, num_items, &workspace).unwrap();
    (loss, variables)
}

#[test]
fn the_stack_node_equals_the_composition_of_small_nodes() {
    for quantized in [false, true] {
        let model = trained_model(quantized);
        let batch = batch(&[document(11, 1), document(1, 2), document(6, 3)]);
        let items = batch.trained_tokens();
        let (loss, gradient) = node_gradient(&model, &batch, items);
        let (composed_loss, variables) = composed(&model, &batch, items);
        let composed_value = composed_loss.to_scalar::<f32>().unwrap();
        assert!((loss - composed_value).abs() < 1e-5 * loss, "{loss} {composed_value}");
        let composed_gradients = composed_loss.backward().unwrap();
        let layout = model.adapter().unwrap().layout();
        assert_eq!(variables.len(), 21);
        for (name, a, b) in &variables {
            let pair = layout.get(name).unwrap();
            for (entry, var) in [(pair.a, a), (pair.b, b)] {
                let expected: Vec<f32> = composed_gradients.get(var).unwrap().flatten_all().unwrap().to_vec1().unwrap();
                let error = relative_error(&gradient[entry.range()], &expected);
                assert!(error < 2e-5, "{name}: {error}");
                assert!(expected.iter().any(|&x| x != 0.0));
            }
        }
    }
}

#[test]
fn the_gradient_agrees_with_finite_differences_of_the_loss() {
    let model = trained_model(false);
    let batch = batch(&[document(12, 4), document(5, 5)]);
    let items = batch.trained_tokens();
    let (_, gradient) = direct_gradient(&model, &batch, items, 0);
    let adapter = model.adapter().unwrap();
    let start = adapter.values().unwrap();
    // Along each tensor's own gradient: one directional derivative a tensor, with steps far above f32 noise, and Richardson's
    // extrapolation from two of them against the curvature.
    for entry in adapter.layout().entries() {
        let slope = &gradient[entry.range()];
        let norm = slope.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let loss_at = |step: f64| {
            let mut moved = start.clone();
            for (value, g) in moved[entry.range()].iter_mut().zip(slope) {
                *value += (step * f64::from(*g) / norm) as f32;
            }
            adapter.set_values(&moved).unwrap();
            model.evaluate(&batch).unwrap().sum / items as f64
        };
        let slope_over = |step: f64| (loss_at(step) - loss_at(-step)) / (2.0 * step);
        let numeric = (4.0 * slope_over(1e-2) - slope_over(2e-2)) / 3.0;
        assert!((numeric - norm).abs() < 1e-3 * norm + 2e-5, "{}: {numeric} {norm}", entry.module);
    }
}

#[test]
fn the_direct_path_gives_the_nodes_bits() {
    let model = trained_model(true);
    let batch = batch(&[document(9, 1), document(14, 2)]);
    let items = batch.trained_tokens();
    let (loss, gradient) = node_gradient(&model, &batch, items);
    let (sum, direct) = direct_gradient(&model, &batch, items, 0);
    assert_eq!((sum / items as f64) as f32, loss);
    assert_eq!(gradient, direct);
}

#[test]
fn gradient_checkpointing_changes_no_bit() {
    let mut config = lora();
    config.lora_dropout = 0.1;
    let mut model = tiny_model(&tiny_config(), true, 7, Workspace::poisoned());
    add_random_adapter(&mut model, config, 3);
    let batch = batch(&[document(20, 1), document(13, 2)]);
    let kept = direct_gradient(&model, &batch, 10, 5);
    model.set_gradient_checkpointing(true).unwrap();
    let recomputed = direct_gradient(&model, &batch, 10, 5);
    assert_eq!(kept, recomputed);
    assert_ne!(kept.1, direct_gradient(&model, &batch, 10, 6).1, "another seed drops other elements");
}

#[test]
fn every_policy_gives_the_same_gradients() {
    let mut model = trained_model(true);
    let batch = batch(&[document(37, 1), document(21, 2)]);
    let items = batch.trained_tokens();
    let kept = direct_gradient(&model, &batch, items, 5);
    for keep in [Keep::Attention, Keep::OffloadAttention, Keep::Input, Keep::Offload] {
        model.set_keep(vec![keep; model.config().num_hidden_layers]).unwrap();
        assert!(kept == direct_gradient(&model, &batch, items, 5), "{keep:?}");
        // Pieces of the batch see the same dropout; the gradients of A and B are summed in another order.
        for rows in [57, 16, 1] {
            model.set_mlp_rows(Some(rows));
            let pieces = direct_gradient(&model, &batch, items, 5);
            let largest = kept.1.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            let apart = kept.1.iter().zip(&pieces.1).fold(0f32, |apart, (x, y)| apart.max((x - y).abs()));
            assert!(apart < 2e-6 * largest, "{keep:?}, {rows} rows at a time: {apart:e} of {largest:e}");
            assert!((kept.0 - pieces.0).abs() < 1e-6 * kept.0, "{keep:?}, {rows} rows at a time");
        }
        model.set_mlp_rows(None);
    }
}

#[test]
fn gradient_checkpointing_keeps_less() {
    let peak = |checkpointing: bool| {
        let workspace = Workspace::new(&Device::Cpu).unwrap();
        let config =
            qlora::config::ModelConfig { num_hidden_layers: 12, sliding_window: vec![None; 12], ..tiny_config() };
        let mut model = tiny_model(&config, true, 1, workspace.clone());
        add_random_adapter(&mut model, lora(), 3);
        model.set_gradient_checkpointing(checkpointing).unwrap();
        direct_gradient(&model, &batch(&[document(100, 1)]), 10, 0);
        workspace.peak_bytes()
    };
    assert!(peak(true) * 3 < peak(false), "{} {}", peak(true), peak(false));
}

#[test]
fn packed_documents_are_trained_as_alone() {
    let model = trained_model(true);
    let documents = [document(11, 1), document(7, 2), document(20, 3), document(1, 4)];
    let items = batch(&documents).trained_tokens();
    let (sum, packed) = direct_gradient(&model, &batch(&documents), items, 0);
    let mut alone = vec![0.0; packed.len()];
    let mut alone_sum = 0.0;
    for one in &documents {
        let batch = batch(std::slice::from_ref(one));
        alone_sum += model.accumulate_gradients(&batch, items, TrainPass::default(), (&mut alone).into()).unwrap().sum;
    }
    assert!((sum - alone_sum).abs() < 1e-5 * sum);
    assert!(relative_error(&packed, &alone) < 2e-5);
    // Accumulation over micro-batches of two, and of three with a partial last one.
    for size in [2, 3] {
        let mut split = vec![0.0; packed.len()];
        for part in documents.chunks(size) {
            model.accumulate_gradients(&batch(part), items, TrainPass::default(), (&mut split).into()).unwrap();
        }
        assert!(relative_error(&packed, &split) < 2e-5, "{size}");
    }
}

#[test]
fn a_candle_optimizer_trains_every_adapter_through_the_node() {
    let mut model = tiny_model(&tiny_config(), true, 7, Workspace::poisoned());
    model.add_adapter(lora(), 1).unwrap();
    let batch = batch(&[document(30, 1), document(22, 2)]);
    let items = batch.trained_tokens();
    let start = model.adapter().unwrap().values().unwrap();
    let variable = model.adapter().unwrap().variable().clone();
    let mut optimizer = candle_nn::AdamW::new_lr(vec![variable], 2e-2).unwrap();
    let mut losses = Vec::new();
    for _ in 0..30 {
        let loss = model.loss(&batch, items, TrainPass::default()).unwrap();
        optimizer.backward_step(&loss).unwrap();
        losses.push(loss.to_scalar::<f32>().unwrap());
    }
    assert!(losses[29] < losses[0] / 2.0, "{losses:?}");
    let end = model.adapter().unwrap().values().unwrap();
    for entry in model.adapter().unwrap().layout().entries() {
        assert_ne!(start[entry.range()], end[entry.range()], "{}", entry.module);
    }
}

#[test]
fn the_loss_scales_its_gradient_and_runs_backward_once() {
    let model = trained_model(false);
    let batch = batch(&[document(10, 1)]);
    let (_, once) = node_gradient(&model, &batch, 7);
    let loss = model.loss(&batch, 7, TrainPass::default()).unwrap();
    let scaled = loss.affine(3.0, 0.0).unwrap();
    let gradients = scaled.backward().unwrap();
    let thrice: Vec<f32> = gradients.get(model.adapter().unwrap().variable()).unwrap().to_vec1().unwrap();
    let expected: Vec<f32> = once.iter().map(|x| 3.0 * x).collect();
    assert!(relative_error(&thrice, &expected) < 1e-5);
    let error = scaled.backward().unwrap_err().to_string();
    assert!(error.contains("backward ran already"), "{error}");
}

#[test]
fn cached_generation_gives_the_logits_of_the_whole_text() {
    let model = trained_model(true);
    let (ids, _) = document(17, 3);
    let layout = SequenceLayout::from_lengths(&[ids.len()]);
    let all = model.logits(&ids, &layout, AdapterChoice::Active).unwrap().to_vec2::<f32>().unwrap();
    let mut cache = model.new_cache(32);
    let mut got =
        vec![model.next_logits(&[&ids[..6]], &mut [&mut cache], AdapterChoice::Active).unwrap().to_vec().unwrap()];
    got.push(model.next_logits(&[&ids[6..9]], &mut [&mut cache], AdapterChoice::Active).unwrap().to_vec().unwrap());
    got.extend((9..17).map(|i| {
        model.next_logits(&[&ids[i..=i]], &mut [&mut cache], AdapterChoice::Active).unwrap().to_vec().unwrap()
    }));
    for (logits, index) in got.iter().zip([5, 8, 9, 10, 11, 12, 13, 14, 15, 16]) {
        assert!(relative_error(logits, &all[index]) < 1e-5, "token {index}");
    }
    let mut caches = [model.new_cache(32), model.new_cache(32)];
    let [first, second] = &mut caches;
    model.next_logits(&[&ids[..6]], &mut [first], AdapterChoice::Active).unwrap();
    let logits = model.next_logits(&[&ids[6..9], &ids[..6]], &mut [first, second], AdapterChoice::Active).unwrap();
    for (row, index) in logits.as_slice().chunks_exact(61).zip([8, 5]) {
        assert!(relative_error(row, &all[index]) < 1e-5, "batched, token {index}");
    }
    let error = model.next_logits(&[&[1; 40]], &mut [&mut cache], AdapterChoice::Active).unwrap_err().to_string();
    assert!(error.contains("57 tokens"), "{error}");
    assert_eq!(cache.len(), 17, "a refused call leaves the cache as it was");
}

#[test]
fn prompts_in_pieces_give_the_same_answer() {
    let model = trained_model(true);
    let (prompt, other) = (document(23, 4).0, document(7, 5).0);
    let answers = |prefill_chunk_size| {
        let config = GenerationConfig { max_new_tokens: 12, prefill_chunk_size, ..GenerationConfig::default() };
        let both = GenerationRequest::new(&[&prompt, &other], &config).run(&model).unwrap();
        let alone = generate(&model, &prompt, &config, |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(both[0], alone);
        both
    };
    let whole = answers(None);
    assert_eq!(whole[0].tokens.len(), 12);
    for chunk in [1, 2, 7, 22, 23, 100] {
        assert_eq!(answers(Some(chunk)), whole, "{chunk} tokens at a time");
    }
    let config = GenerationConfig { prefill_chunk_size: Some(0), ..GenerationConfig::default() };
    let error = generate(&model, &prompt, &config, |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains("prefill_chunk_size is 0"), "{error}");
}

#[test]
fn the_adapter_can_be_switched_off() {
    let mut model = trained_model(true);
    let (ids, _) = document(9, 3);
    let layout = SequenceLayout::from_lengths(&[9]);
    let with = model.logits(&ids, &layout, AdapterChoice::Active).unwrap().to_vec2::<f32>().unwrap();
    model.enable_adapter(false);
    let without = model.logits(&ids, &layout, AdapterChoice::Active).unwrap().to_vec2::<f32>().unwrap();
    assert_ne!(with, without);
    let base = tiny_model(&tiny_config(), true, 7, Workspace::poisoned());
    assert_eq!(without, base.logits(&ids, &layout, AdapterChoice::Active).unwrap().to_vec2::<f32>().unwrap());
}

#[test]
fn a_sequence_longer_than_the_model_allows_is_refused() {
    let model = trained_model(true);
    let error = model.evaluate(&batch(&[document(129, 1)])).unwrap_err().to_string();
    assert_eq!(error, "a sequence of 129 tokens is longer than the model's max_position_embeddings (128)");
}
