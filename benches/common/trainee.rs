//! A model in training, without the trainer: whole optimizer steps over random tokens.

use anyhow::Context;
use qlora::batch::Batch;
use qlora::kernels::Workspace;
use qlora::model::{CausalLm, TrainPass};
use qlora::trainer::config::{Optim, TrainingOptions};
use qlora::trainer::optimizer::Optimizer;
use rand::{RngExt, SeedableRng};

/// A model in training.
pub(crate) struct Trainee {
    pub(crate) model: CausalLm,
    optimizer: Optimizer,
    rng: rand_chacha::ChaCha8Rng,
    steps: u64,
}

impl Trainee {
    /// With a fresh optimizer for the model's adapter.
    pub(crate) fn new(model: CausalLm, optim: Optim, workspace: &Workspace) -> anyhow::Result<Self> {
        let trainable = model.adapter().context("the model has an adapter")?.layout().len();
        let optimizer = Optimizer::new(&TrainingOptions { optim, ..TrainingOptions::default() }, trainable, workspace)?;
        Ok(Self { model, optimizer, rng: rand_chacha::ChaCha8Rng::seed_from_u64(0), steps: 0 })
    }

    /// Random tokens, all of them trained.
    pub(crate) fn batch(&mut self, sequences: usize, length: usize) -> Batch {
        let documents: Vec<Vec<u32>> =
            (0..sequences).map(|_| (0..length).map(|_| self.rng.random_range(0..128_256)).collect()).collect();
        let labels: Vec<Vec<i64>> = documents.iter().map(|ids| ids.iter().map(|&id| i64::from(id)).collect()).collect();
        Batch::from_documents(documents.iter().map(Vec::as_slice).zip(labels.iter().map(Vec::as_slice)))
    }

    /// Everything that a step of training does; returns the mean loss.
    pub(crate) fn step(&mut self, batch: &Batch) -> anyhow::Result<f64> {
        let Self { model, optimizer, steps, .. } = self;
        optimizer.grad.view_mut().fill(0.0)?;
        let items = batch.trained_tokens();
        let loss = model.accumulate_gradients(batch, items, TrainPass::default(), optimizer.grad.view_mut())?;
        let norm = optimizer.grad_norm()?;
        *steps += 1;
        let adapter = model.adapter().context("it has an adapter")?;
        adapter.update(|values| optimizer.update(*steps, 2e-4, norm, values))?;
        let loss = loss.sum / items as f64;
        anyhow::ensure!(loss.is_finite() && norm.is_finite(), "step {steps}: loss {loss}, norm {norm}");
        Ok(loss)
    }
}
