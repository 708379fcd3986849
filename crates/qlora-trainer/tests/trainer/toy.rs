//! A language model small enough to differentiate by hand, and runs of it.
//!
//! The logits after token `t` with predecessor `u` in the same document are
//! `base[t] + B1 A1[:, t] + drop(B2 A2[:, u])`; the loss is the cross-entropy. Because of `u`, a loader that lets documents
//! see each other changes the loss.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use qlora_core::batch::{Batch, IGNORE_INDEX};
use qlora_core::{Error, Result};
use qlora_kernels::{Dtype, Workspace};
use qlora_trainer::config::{Paths, TrainConfig};
use qlora_trainer::data::{Dataset, Encoded};
use qlora_trainer::{LossSum, Parameter, TrainPass, TrainableModel, Trainer};
use serde_json::Value;

pub(crate) const VOCAB: usize = 11;
const RANK: usize = 3;
const TENSOR: usize = VOCAB * RANK;
/// A1, B1, A2, B2.
const OFFSETS: [usize; 4] = [0, TENSOR, 2 * TENSOR, 3 * TENSOR];

/// An injected fault of the toy model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fault {
    /// The loss is NaN.
    Loss,
    /// This element of the gradient is infinite.
    Gradient(usize),
    /// An error, as when the process is killed.
    Killed,
}

#[derive(Clone)]
pub(crate) struct Toy {
    pub(crate) base: Vec<f32>,
    pub(crate) flat: Vec<f32>,
    /// Calls of `accumulate_gradients` and `evaluate` so far.
    pub(crate) calls: Rc<Cell<usize>>,
    /// The seeds of all calls so far.
    pub(crate) seeds: Rc<RefCell<Vec<u64>>>,
    /// The loss scales of all calls so far.
    pub(crate) scales: Rc<RefCell<Vec<f32>>>,
    /// The workspace whose type the gradients of logits have.
    pub(crate) workspace: Workspace,
    /// Happens at this call, from 0.
    pub(crate) fault: Option<(usize, Fault)>,
    /// Happens whenever a batch holds this token in front.
    pub(crate) poisoned_token: Option<(u32, Fault)>,
    /// This element of every gradient is infinite.
    pub(crate) poisoned_gradient: Option<usize>,
    /// The gradients are multiplied by this.
    pub(crate) factor: f64,
    /// The loss scale is not applied to gradients before they are stored, only afterwards.
    pub(crate) ignores_scale: bool,
    /// The second pair of tensors gets no gradient.
    pub(crate) detached: bool,
    /// Drops terms at random. It depends on the row in the batch, so not when batches are compared.
    pub(crate) dropout: bool,
    /// The duration of each call.
    pub(crate) pause: Duration,
    /// The path of the adapter, if it is not written in the checkpoint.
    pub(crate) adapter_path: Option<PathBuf>,
}

impl Toy {
    pub(crate) fn new(seed: u32) -> Self {
        let value =
            |i: usize| (hash(seed.wrapping_mul(7919).wrapping_add(i as u32)) as f32 / u32::MAX as f32 - 0.5) * 2.0;
        let mut flat = vec![0.0; 4 * TENSOR];
        for offset in [OFFSETS[0], OFFSETS[2]] {
            (offset..offset + TENSOR).for_each(|i| flat[i] = value(i));
        }
        Self {
            base: (0..VOCAB * VOCAB).map(|i| value(i + 10_000)).collect(),
            flat,
            calls: Rc::default(),
            seeds: Rc::default(),
            scales: Rc::default(),
            workspace: Workspace::cpu(),
            fault: None,
            poisoned_token: None,
            poisoned_gradient: None,
            factor: 1.0,
            ignores_scale: false,
            detached: false,
            dropout: true,
            pause: Duration::ZERO,
            adapter_path: None,
        }
    }

    /// With lora_B away from zero, so that every gradient is busy.
    pub(crate) fn warm(seed: u32) -> Self {
        let mut toy = Self::new(seed);
        let other = Self::new(seed + 1);
        toy.flat[OFFSETS[1]..][..TENSOR].copy_from_slice(&other.flat[..TENSOR]);
        toy.flat[OFFSETS[3]..][..TENSOR].copy_from_slice(&other.flat[OFFSETS[2]..][..TENSOR]);
        toy
    }

    /// Loss sum over the batch; adds the gradient of `sum / num_items` to `grad` if there is one.
    fn pass(
        &self,
        batch: &Batch,
        num_items: usize,
        pass: impl Into<Option<TrainPass>>,
        mut grad: Option<&mut [f32]>,
    ) -> f64 {
        let pass = pass.into();
        let (seed, scale) = (pass.map(|pass| pass.seed), pass.map_or(1.0, |pass| f64::from(pass.loss_scale)));
        let mut total = 0.0;
        for rows in batch.layout.sequences() {
            for row in rows.clone() {
                let Ok(target) = usize::try_from(batch.targets[row]) else {
                    assert_eq!(batch.targets[row], IGNORE_INDEX);
                    continue;
                };
                let t = batch.tokens[row] as usize;
                let u = (row > rows.start).then(|| batch.tokens[row - 1] as usize);
                // Dropout of a whole term, scaled by 1 / (1 - p) with p = 1/2.
                let keep = seed
                    .filter(|_| self.dropout)
                    .map_or(1.0, |seed| f64::from(hash(seed as u32 ^ row as u32) % 2) * 2.0);
                let pairs = [(0, Some(t), 1.0), (2, u, keep)];
                let mut logits: Vec<f64> = self.base[t * VOCAB..][..VOCAB].iter().map(|&x| f64::from(x)).collect();
                for &(pair, token, keep) in &pairs {
                    let Some(token) = token else { continue };
                    for (i, logit) in logits.iter_mut().enumerate() {
                        for r in 0..RANK {
                            *logit += keep * self.b(pair, i, r) * self.a(pair, r, token);
                        }
                    }
                }
                let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
                total += sum.ln() + largest - logits[target];
                let Some(grad) = grad.as_deref_mut() else { continue };
                for &(pair, token, keep) in &pairs {
                    let Some(token) = token.filter(|_| !(self.detached && pair == 2)) else { continue };
                    for (i, logit) in logits.iter().enumerate() {
                        let probability = (logit - largest).exp() / sum;
                        let d = keep * (probability - f64::from(u8::from(i == target))) / num_items as f64;
                        let d = match self.ignores_scale {
                            true => scale * self.stored(self.factor * d),
                            false => self.stored(scale * self.factor * d),
                        };
                        for r in 0..RANK {
                            grad[OFFSETS[pair + 1] + i * RANK + r] += (d * self.a(pair, r, token)) as f32;
                            grad[OFFSETS[pair] + r * VOCAB + token] += (d * self.b(pair, i, r)) as f32;
                        }
                    }
                }
            }
        }
        total
    }

    /// A gradient as a device stores it that computes in the toy's type.
    fn stored(&self, gradient: f64) -> f64 {
        if self.workspace.gradient_dtype() == Dtype::F32 {
            return gradient;
        }
        let mut stored = [gradient as f32];
        self.workspace.round_gradient((&mut stored).into()).unwrap();
        f64::from(stored[0])
    }

    fn a(&self, pair: usize, r: usize, token: usize) -> f64 {
        f64::from(self.flat[OFFSETS[pair] + r * VOCAB + token])
    }

    fn b(&self, pair: usize, i: usize, r: usize) -> f64 {
        f64::from(self.flat[OFFSETS[pair + 1] + i * RANK + r])
    }

    fn fault(&self, batch: &Batch) -> Option<Fault> {
        std::thread::sleep(self.pause);
        let call = self.calls.replace(self.calls.get() + 1);
        let at_call = self.fault.filter(|(at, _)| *at == call);
        let at_token = self.poisoned_token.filter(|(token, _)| batch.tokens.first() == Some(token));
        let (_, fault) = at_call.or(at_token.map(|(_, fault)| (0, fault)))?;
        Some(fault)
    }
}

impl TrainableModel for Toy {
    fn parameters(&self) -> Vec<Parameter> {
        let parameter = |i: usize| Parameter {
            name: ["one.lora_A", "one.lora_B", "two.lora_A", "two.lora_B"][i].into(),
            range: OFFSETS[i]..OFFSETS[i] + TENSOR,
            shape: if i.is_multiple_of(2) { vec![RANK, VOCAB] } else { vec![VOCAB, RANK] },
            silenced_by: i.is_multiple_of(2).then_some(i + 1),
            may_rest: false,
            decays: true,
        };
        (0..4).map(parameter).collect()
    }

    fn workspace(&self) -> Result<Workspace> {
        Ok(self.workspace.clone())
    }

    fn masters(&self) -> qlora_core::Result<Vec<f32>> {
        Ok(self.flat.to_vec())
    }

    fn update_masters(
        &mut self,
        update: &mut dyn FnMut(qlora_kernels::ViewMut) -> qlora_kernels::Result<()>,
    ) -> qlora_core::Result<()> {
        Ok(update(qlora_kernels::ViewMut::vector(&mut self.flat))?)
    }

    fn accumulate_gradients(
        &mut self,
        batch: &Batch,
        num_items: usize,
        pass: TrainPass,
        grad: qlora_kernels::ViewMut,
    ) -> Result<f64> {
        let mut grad = grad.host("toy")?;
        let grad = grad.row_mut(0);
        self.seeds.borrow_mut().push(pass.seed);
        self.scales.borrow_mut().push(pass.loss_scale);
        let fault = self.fault(batch);
        if fault == Some(Fault::Killed) {
            return Err(Error::Invalid("killed".into()));
        }
        let loss = self.pass(batch, num_items, pass, Some(&mut *grad));
        match fault {
            Some(Fault::Loss) => return Ok(f64::NAN),
            Some(Fault::Gradient(element)) => grad[element] = f32::INFINITY,
            _ => {}
        }
        if let Some(element) = self.poisoned_gradient {
            grad[element] = f32::INFINITY;
        }
        Ok(loss)
    }

    fn evaluate(&mut self, batch: &Batch) -> Result<LossSum> {
        if matches!(self.fault(batch), Some(Fault::Killed | Fault::Loss)) {
            return Err(Error::Invalid("killed".into()));
        }
        Ok(LossSum { sum: self.pass(batch, 1, None, None), trained_tokens: batch.trained_tokens() })
    }

    fn save_adapter(&self, folder: &Path) -> Result<()> {
        let path = self.adapter_path.clone().unwrap_or_else(|| folder.join("adapter_model.bin"));
        let bytes: Vec<u8> = self.flat.iter().flat_map(|x| x.to_le_bytes()).collect();
        fs::write(&path, bytes).map_err(|error| Error::io(path, error))
    }

    fn identity(&self) -> Vec<(String, String)> {
        vec![("base".into(), format!("{:?}", self.base[0]))]
    }

    fn vocab_size(&self) -> Option<usize> {
        Some(VOCAB)
    }

    fn max_positions(&self) -> Option<usize> {
        Some(20)
    }
}

/// Documents of 3 to 9 tokens; all but the first token or two are trained.
pub(crate) fn dataset(documents: usize) -> Dataset {
    let document = |i: usize| {
        let length = 3 + hash(i as u32) as usize % 7;
        let ids: Vec<u32> = (0..length).map(|place| hash((100 * i + place) as u32) % VOCAB as u32).collect();
        Encoded { trained: (0..length).map(|place| place > i % 2).collect(), ids }
    };
    Dataset::from_encoded((0..documents).map(document)).unwrap()
}

/// 9 steps of 2 x 3 documents out of 15, the last step of each epoch being partial.
pub(crate) fn config(output: &Path) -> TrainConfig {
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = "toy".into();
    config.data.train_file = Paths::One("toy".into());
    config.data.validation_file = Paths::One("toy".into());
    let training = &mut config.training;
    training.output_dir = output.to_owned();
    training.per_device_train_batch_size = 2;
    training.gradient_accumulation_steps = 3;
    training.learning_rate = 0.05;
    training.weight_decay = 0.01;
    training.warmup_steps = Some(2.0);
    training.max_grad_norm = 0.5;
    training.logging_steps = 2;
    training.eval_steps = Some(3);
    training.eval_on_start = true;
    training.save_steps = 2;
    config
}

/// A run of the toy that has not begun.
pub(crate) fn trainer(config: &TrainConfig, model: Toy) -> Trainer<'static, Toy> {
    Trainer::new(config.clone(), model, dataset(15), Some(dataset(5))).unwrap()
}

/// Everything a run leaves that must not depend on how often it was interrupted.
pub(crate) fn result(output: &Path, steps: u64) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = output.join(format!("checkpoint-{steps}"));
    let mut files = BTreeMap::new();
    for path in [checkpoint.join("optimizer.safetensors"), output.join("adapter_model.bin")] {
        files.insert(path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap());
    }
    let log = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let lines: Vec<String> = log.lines().map(without_times).collect();
    files.insert("metrics.jsonl".into(), lines.join("\n").into_bytes());
    let state = fs::read_to_string(checkpoint.join("trainer_state.json")).unwrap();
    files.insert("trainer_state.json".into(), without_times(&state).into_bytes());
    files
}

/// JSON without what differs between two runs of the same thing.
fn without_times(json: &str) -> String {
    fn strip(value: &mut Value) {
        match value {
            Value::Object(map) => {
                let memory = ["peak_memory", "anonymous_memory", "gpu_peak_memory"];
                for key in ["tokens_per_second", "eval_runtime", "seconds"].into_iter().chain(memory) {
                    map.shift_remove(key);
                }
                map.values_mut().for_each(strip);
            }
            Value::Array(list) => list.iter_mut().for_each(strip),
            _ => {}
        }
    }
    let mut value: Value = serde_json::from_str(json).unwrap();
    strip(&mut value);
    value.to_string()
}

fn hash(x: u32) -> u32 {
    let mut z = x.wrapping_add(0x9e37_79b9);
    z = (z ^ (z >> 16)).wrapping_mul(0x85eb_ca6b);
    z = (z ^ (z >> 13)).wrapping_mul(0xc2b2_ae35);
    z ^ (z >> 16)
}

#[test]
fn the_toys_gradient_is_right() {
    let mut toy = Toy::warm(3);
    let data = dataset(3);
    let batch = data.batch(&[0, 1, 2]);
    let num_items = batch.trained_tokens();
    let mut grad = vec![0.0; toy.flat.len()];
    toy.accumulate_gradients(&batch, num_items, TrainPass::seeded(5), (&mut grad).into()).unwrap();
    for (i, slope_of_model) in grad.into_iter().enumerate() {
        let original = toy.flat[i];
        let mut at = |value: f32| {
            toy.flat[i] = value;
            toy.pass(&batch, num_items, TrainPass::seeded(5), None) / num_items as f64
        };
        let (high, low) = (original + 1e-3, original - 1e-3);
        let slope = (at(high) - at(low)) / (f64::from(high) - f64::from(low));
        toy.flat[i] = original;
        assert!((slope - f64::from(slope_of_model)).abs() < 1e-5, "element {i}: {slope} {slope_of_model}");
    }
}
