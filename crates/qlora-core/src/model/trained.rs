//! The trained adapter: all its tensors back to back in one candle variable, and the values derived from them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Var;
use qlora_kernels::ops::adapter_rows::AdapterChanges;
use qlora_kernels::tensor::{TensorView, update_in_place};
use qlora_kernels::{Matrix, View, ViewMut, Workspace};

use super::stack::Stack;
use super::train::TrainPass;
use crate::adapter::kinds::dora;
use crate::adapter::kinds::tables::TrainedTables;
use crate::error::{Error, Result};
use crate::lora::{AdapterLayout, LoraConfig};

/// An adapter in memory that can be trained.
#[derive(Clone, Debug)]
pub struct TrainedAdapter {
    config: LoraConfig,
    layout: AdapterLayout,
    pub(super) flat: Var,
    /// Its slots by module, for batches in which other sequences have other adapters.
    changes: Arc<AdapterChanges>,
    /// Its parts of the embedding and the head.
    tables: Arc<TrainedTables>,
    derived: Arc<Derived>,
}

/// Values derived from an adapter's values and the weights, computed when first asked for.
#[derive(Debug, Default)]
struct Derived {
    /// The variable was handed out: its holder may change the values at any time, so nothing is remembered.
    handed_out: AtomicBool,
    remembered: Mutex<Remembered>,
}

#[derive(Clone, Debug, Default)]
struct Remembered {
    inverse_norms: Option<Arc<Matrix>>,
    with_gains: Option<Arc<Matrix>>,
}

impl TrainedAdapter {
    pub(super) fn new(
        config: LoraConfig,
        layout: AdapterLayout,
        flat: Var,
        changes: AdapterChanges,
        tables: TrainedTables,
    ) -> Self {
        Self { config, layout, flat, changes: Arc::new(changes), tables: Arc::new(tables), derived: Arc::default() }
    }

    /// The parts of the embedding and the head that it holds.
    pub(crate) fn tables(&self) -> &Arc<TrainedTables> {
        &self.tables
    }

    /// Its configuration.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// The layout of the tensors in the flat buffer.
    pub fn layout(&self) -> &AdapterLayout {
        &self.layout
    }

    /// All tensors back to back, f32, one dimension: the variable that a candle optimizer trains. Once it was asked for,
    /// the norms that DoRA needs are computed for every pass, generated tokens included: the variable may change at any
    /// time.
    pub fn variable(&self) -> &Var {
        self.derived.handed_out.store(true, Ordering::Relaxed);
        &self.flat
    }

    /// A copy of all values.
    pub fn values(&self) -> Result<Vec<f32>> {
        Ok(self.flat.as_tensor().to_vec1()?)
    }

    /// Replaces all values.
    ///
    /// # Errors
    /// If there is another number of them.
    pub fn set_values(&self, values: &[f32]) -> Result<()> {
        if values.len() != self.layout.len() {
            let (got, expected) = (values.len(), self.layout.len());
            return Err(Error::Invalid(format!("the adapter has {expected} values, {got} were given")));
        }
        self.update(|flat| flat.copy_from(View::vector(values)))
    }

    /// The adapter's changes of the model, by module.
    pub(super) fn changes(&self) -> &AdapterChanges {
        &self.changes
    }

    /// The dropout of a training pass, if the configuration has any.
    pub(super) fn dropout(&self, train: TrainPass) -> Option<(f32, u64)> {
        (self.config.lora_dropout > 0.0).then_some((self.config.lora_dropout as f32, train.seed))
    }

    /// Changes the values where they are: one row, f32, on the model's device.
    pub fn update(&self, update: impl FnOnce(ViewMut) -> qlora_kernels::Result<()>) -> Result<()> {
        *self.remembered() = Remembered::default();
        Ok(update_in_place("adapter", self.flat.as_tensor(), update)?)
    }

    fn remembered(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.derived.remembered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, set: impl FnOnce(&mut Remembered)) {
        if !self.derived.handed_out.load(Ordering::Relaxed) {
            set(&mut self.remembered());
        }
    }

    /// The inverse norms that a DoRA training pass needs, from the weights with the adapter; none where it is LoRA.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn inverse_norms(&self, stack: &Stack, workspace: &Workspace) -> Result<Option<Arc<Matrix>>> {
        if !self.config.use_dora {
            return Ok(None);
        }
        if let Some(norms) = self.known(|remembered| &remembered.inverse_norms) {
            return Ok(Some(norms));
        }
        let values = TensorView::new("adapter", self.flat.as_tensor())?;
        let norms = dora::inverse_norms(stack.adapted(), values.view(), workspace)?.map(Arc::new);
        self.remember(|remembered| remembered.inverse_norms.clone_from(&norms));
        Ok(norms)
    }

    /// The values as inference reads them, where the flat ones are not all of it.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn for_inference(&self, stack: &Stack, workspace: &Workspace) -> Result<Option<Arc<Matrix>>> {
        if let Some(values) = self.known(|remembered| &remembered.with_gains) {
            return Ok(Some(values));
        }
        let Some(norms) = self.inverse_norms(stack, workspace)? else { return Ok(None) };
        let values = TensorView::new("adapter", self.flat.as_tensor())?;
        let values = Arc::new(dora::with_gains(stack.adapted(), values.view(), &norms, workspace)?);
        self.remember(|remembered| remembered.with_gains = Some(values.clone()));
        Ok(Some(values))
    }

    fn known(&self, part: impl FnOnce(&Remembered) -> &Option<Arc<Matrix>>) -> Option<Arc<Matrix>> {
        let handed_out = self.derived.handed_out.load(Ordering::Relaxed);
        part(&self.remembered()).clone().filter(|_| !handed_out)
    }
}
