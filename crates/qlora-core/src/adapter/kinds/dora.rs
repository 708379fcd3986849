//! DoRA (arXiv 2402.09353): `W + s B A` with its rows scaled to trained magnitudes. What it adds to LoRA beside the product itself
//! ([`qlora_kernels::ops::dora_linear`]): where its numbers lie, what they start as, what a pass has to know, and what is merged.
//!
//! As in PEFT 0.21.2, the magnitudes start as the norms of the rows of `W + s B A`, over the weight as it is held (dequantized),
//! so that the model starts unchanged; and the norms are constants in the backward.

use std::ops::Range;

use qlora_kernels::ops::adapter_rows::LinearChange;
use qlora_kernels::ops::dora_linear;
use qlora_kernels::ops::linear_group::{DoraPlaces, LoraSlot, SlotKind};
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{Matrix, View, Workspace};

use crate::error::{Error, Result};
use crate::lora::AdapterPair;

/// A layer with an adapter.
#[derive(Clone, Copy)]
pub(crate) struct Adapted<'a> {
    pub(crate) name: &'a str,
    pub(crate) weight: &'a dyn FrozenWeight,
    pub(crate) slot: &'a LoraSlot,
}

impl<'a> Adapted<'a> {
    fn places(&self) -> Option<&'a DoraPlaces> {
        match &self.slot.kind {
            SlotKind::Dora(places) => Some(places),
            _ => None,
        }
    }
}

/// The kind of a layer's adapter; `norms` counts the norms of the layers before it.
pub(crate) fn slot_kind(pair: &AdapterPair, norms: &mut usize) -> SlotKind {
    let Some(magnitude) = pair.magnitude else { return SlotKind::Lora };
    let start = *norms;
    *norms += magnitude.numel();
    SlotKind::Dora(DoraPlaces { magnitude: magnitude.range(), norms: start..*norms })
}

/// `1 / ||(W + s B A)_i||` of all layers, as [`AdapterPass::inverse_norms`](qlora_kernels::ops::linear_group::AdapterPass) has
/// them; none for an adapter of another kind. `values`: the flat adapter, one row.
///
/// # Errors
/// If an adapter does not fit its layer, or the device fails.
pub(crate) fn inverse_norms<'a>(
    layers: impl Iterator<Item = Adapted<'a>>,
    values: View,
    workspace: &Workspace,
) -> Result<Option<Matrix>> {
    let layers: Vec<_> = layers.filter_map(|layer| Some((layer, layer.places()?))).collect();
    let Some(len) = layers.iter().map(|(_, places)| places.norms.end).max() else { return Ok(None) };
    let mut norms = workspace.zeros_f32(1, len)?;
    for (Adapted { weight, slot, .. }, places) in layers {
        let part = |range: &Range<usize>, rows: usize| {
            values.slice_cols(range.clone()).reshape(rows, range.len() / rows.max(1))
        };
        let (a, b) = (part(&slot.a, slot.rank), part(&slot.b, weight.rows()));
        let out = norms.view_mut().slice_cols(places.norms.clone());
        dora_linear::inverse_norms(weight, a, b, slot.scale, out)?;
    }
    Ok(Some(norms))
}

/// Writes the magnitudes that a fresh adapter starts with into `values`, whose A and B are there.
///
/// # Errors
/// If a row of a weight is zero: DoRA divides by its norm.
pub(crate) fn start<'a>(
    layers: impl Iterator<Item = Adapted<'a>> + Clone,
    values: &mut [f32],
    inverse_norms: &[f32],
) -> Result<()> {
    for layer in layers {
        let Some(places) = layer.places() else { continue };
        let (magnitude, inverse) = (&mut values[places.magnitude.clone()], &inverse_norms[places.norms.clone()]);
        if let Some(row) = inverse.iter().position(|inverse| !inverse.is_finite()) {
            let message =
                format!("row {row} is zero: DoRA divides by its norm; leave this layer out of target_modules");
            return Err(Error::tensor(format!("{}.weight", layer.name), message));
        }
        magnitude.iter_mut().zip(inverse).for_each(|(magnitude, inverse)| *magnitude = 1.0 / inverse);
    }
    Ok(())
}

/// The flat adapter followed by the factors `m / n` of all outputs: the values that inference over it reads
/// ([`change`]).
///
/// # Errors
/// If the device fails.
pub(crate) fn with_gains<'a>(
    layers: impl Iterator<Item = Adapted<'a>>,
    values: View,
    inverse_norms: &Matrix,
    workspace: &Workspace,
) -> Result<Matrix> {
    let (flat, norms) = (values.to_vec()?, inverse_norms.to_vec()?);
    let mut all = flat;
    let start = all.len();
    all.extend_from_slice(&norms);
    for places in layers.filter_map(|layer| layer.places()) {
        for (magnitude, norm) in places.magnitude.clone().zip(places.norms.clone()) {
            all[start + norm] *= all[magnitude];
        }
    }
    Ok(workspace.upload(&all, 1, all.len())?)
}

/// The change of a linear layer by an adapter of any kind, for inference over a flat adapter of `len` numbers.
pub(crate) fn change(slot: &LoraSlot, len: usize) -> LinearChange {
    let gain = match &slot.kind {
        SlotKind::Dora(places) => Some(len + places.norms.start..len + places.norms.end),
        _ => None,
    };
    let lora = LoraSlot { kind: SlotKind::Lora, ..slot.clone() };
    LinearChange { lora: Some(lora), gain, ..LinearChange::default() }
}

/// Scales each of the given rows of `W + s B A` to its magnitude.
///
/// # Errors
/// If a row is zero; `module` is for the message.
pub(crate) fn rescale(module: &str, rows: Range<usize>, cols: usize, weight: &mut [f32], m: &[f32]) -> Result<()> {
    for ((index, row), m) in rows.clone().zip(weight.chunks_exact_mut(cols.max(1))).zip(&m[rows]) {
        let square: f64 = row.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        let factor = (f64::from(*m) / square.sqrt()) as f32;
        if !factor.is_finite() {
            let message = format!("row {index} of the weight with its adapter is zero: DoRA divides by its norm");
            return Err(Error::tensor(format!("{module}.lora_magnitude_vector"), message));
        }
        row.iter_mut().for_each(|w| *w *= factor);
    }
    Ok(())
}
