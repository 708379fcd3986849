//! One linear layer of a block: a frozen weight, its bias, and its slot in the flat adapter buffer.
//!
//! The computation is in [`qlora_kernels::ops::linear_group`]: layers that read the same input run together.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

pub(crate) use qlora_kernels::ops::linear_group::{AdapterPass, LoraSlot};

use qlora_kernels::ops::linear_group::Member;
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, View};

use super::watch::InputSquares;
use crate::error::{Error, Result};

/// A linear layer of a block.
#[derive(Debug)]
pub(crate) struct Projection {
    name: String,
    weight: Arc<dyn FrozenWeight>,
    bias: Option<Matrix>,
    slot: Option<LoraSlot>,
    /// The place of a trained bias in the flat adapter buffer.
    bias_place: Option<Range<usize>>,
    watch: OnceLock<Arc<InputSquares>>,
}

impl Projection {
    /// A projection without an adapter. The bias is one f32 row, where the weight is.
    ///
    /// # Errors
    /// If the bias does not have one element an output feature.
    pub(crate) fn new(name: impl Into<String>, weight: Arc<dyn FrozenWeight>, bias: Option<Matrix>) -> Result<Self> {
        let name = name.into();
        if let Some(bias) = bias.as_ref().filter(|bias| bias.rows() * bias.cols() != weight.rows()) {
            let elements = bias.rows() * bias.cols();
            let message = format!("has {elements} elements, its weight has {} rows", weight.rows());
            return Err(Error::tensor(format!("{name}.bias"), message));
        }
        Ok(Self { name, weight, bias, slot: None, bias_place: None, watch: OnceLock::new() })
    }

    /// The module's name, such as `model.layers.0.self_attn.q_proj`.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The frozen weight.
    pub(crate) fn weight(&self) -> &Arc<dyn FrozenWeight> {
        &self.weight
    }

    /// The bias, if there is one.
    pub(crate) fn bias(&self) -> Option<&Matrix> {
        self.bias.as_ref()
    }

    /// Input features.
    pub(crate) fn inputs(&self) -> usize {
        self.weight.cols()
    }

    /// Output features.
    pub(crate) fn outputs(&self) -> usize {
        self.weight.rows()
    }

    /// The adapter's place, if this projection has one.
    pub(crate) fn slot(&self) -> Option<&LoraSlot> {
        self.slot.as_ref()
    }

    /// Gives the projection an adapter, or takes it away.
    pub(crate) fn set_slot(&mut self, slot: Option<LoraSlot>) {
        self.slot = slot;
    }

    /// The place of a trained bias in the adapter's values, if this projection has one.
    pub(crate) fn bias_place(&self) -> Option<&Range<usize>> {
        self.bias_place.as_ref()
    }

    /// Says that the projection's bias is trained, and where it lies, or that it is the base's.
    ///
    /// # Errors
    /// If the base has no bias, or one of another length.
    pub(crate) fn set_bias_place(&mut self, place: Option<Range<usize>>) -> Result<()> {
        let own = self.bias.as_ref().map_or(0, |bias| bias.rows() * bias.cols());
        if let Some(place) = place.as_ref().filter(|place| place.len() != own) {
            let message = format!("has {} elements, the base's bias {own}", place.len());
            return Err(Error::tensor(format!("{}.bias", self.name), message));
        }
        self.bias_place = place;
        Ok(())
    }

    /// Whether an adapter trains anything of it.
    pub(super) fn is_trained(&self) -> bool {
        self.slot.is_some() || self.bias_place.is_some()
    }

    /// Sums up the projection's inputs from here on.
    pub(crate) fn watch(&self) -> Arc<InputSquares> {
        self.watch.get_or_init(|| Arc::new(InputSquares::new(self.inputs()))).clone()
    }

    /// Sums up an input, if a watch was set.
    pub(super) fn saw(&self, x: View) -> Result<()> {
        self.watch.get().map_or(Ok(()), |watch| watch.add(x))
    }

    /// As a member of a group of layers in a pass with this adapter: with the trained bias, if there is one. Where rows have adapters
    /// of their own, these say which biases they have.
    pub(crate) fn member<'a>(&'a self, pass: Option<&AdapterPass<'a>>) -> Member<'a> {
        let values = pass.filter(|pass| pass.rows.is_none()).map(|pass| pass.values);
        let trained = values.zip(self.bias_place.clone()).map(|(values, place)| values.slice_cols(place));
        let bias = trained.or_else(|| self.bias.as_ref().map(Matrix::view));
        Member { name: &self.name, weight: &*self.weight, bias, lora: self.slot.as_ref() }
    }
}
