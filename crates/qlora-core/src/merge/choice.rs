//! The choice of the weights into which an adapter is merged, from the facts known about its training.

use qlora_kernels::quant::QuantConfig;

use super::source::MergeInto;
use crate::adapter::TrainedOver;
use crate::error::{Error, Result};
use crate::model::Quantization;
use crate::source::WeightSource;

/// The way an adapter is merged into a base, and the quantization of the base where the two are run without merging.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct MergeChoice {
    /// The weights to which the adapter is added.
    pub into: MergeInto,
    /// The quantization that the adapter was trained over, as far as this base can be held so.
    pub quantization: Quantization,
    /// A remark on the choice for the user.
    pub remark: Option<String>,
}

impl MergeChoice {
    /// Into the weights that the adapter was trained over: what quantization leaves of the base where it was quantized in training,
    /// else the weights as they are stored. A base that is stored quantized is what it is; where nothing is known, nothing is
    /// assumed.
    pub fn new(base: &dyn WeightSource, trained_over: Option<&TrainedOver>) -> Self {
        let original =
            |remark: Option<String>| Self { into: MergeInto::Original, quantization: Quantization::None, remark };
        match (base.quantization(), trained_over) {
            (Some(stored), Some(TrainedOver::Plain)) => original(Some(format!(
                "the base is stored in {stored}, but the adapter was trained over unquantized weights: merged into them it would be \
                 closer to what was trained"
            ))),
            (Some(stored), _) => {
                original(Some(format!("the base is stored in {stored}: merging into the weights that this stands for")))
            }
            (None, Some(TrainedOver::Bits4 { config, .. })) => Self {
                into: MergeInto::Dequantized(*config),
                quantization: Quantization::Bits4(*config),
                remark: None,
            },
            (None, Some(TrainedOver::Plain)) => original(None),
            (None, Some(over)) => original(Some(format!(
                "the adapter was trained over {over}, which this base does not hold: merging into its weights as they are stored"
            ))),
            (None, None) => original(Some(
                "nothing beside the adapter says what it was trained over: merging into the weights as they are stored; if they were \
                 quantized in training, say how (`--quant-type nf4`)"
                    .to_owned(),
            )),
        }
    }

    /// The same with the weights as they are stored, whatever was trained over.
    #[must_use]
    pub fn into_original(self) -> Self {
        Self { into: MergeInto::Original, ..self }
    }

    /// The same with what 4 bits leave of the weights: as the adapter was trained, else as `config` says.
    ///
    /// # Errors
    /// If the adapter was trained over something else, or the base is stored quantized.
    pub fn into_dequantized(
        self,
        base: &dyn WeightSource,
        trained_over: Option<&TrainedOver>,
        config: QuantConfig,
    ) -> Result<Self> {
        match (base.quantization(), trained_over) {
            (Some(_), _) | (None, Some(TrainedOver::Bits4 { .. })) => Ok(self),
            (None, None) => Ok(Self {
                into: MergeInto::Dequantized(config),
                quantization: Quantization::Bits4(config),
                remark: None,
            }),
            (None, Some(over)) => Err(Error::Invalid(format!(
                "the adapter was trained over {over}, not over weights that 4 bits leave: merge it into the original ones, or say how \
                 they were quantized in training"
            ))),
        }
    }
}
