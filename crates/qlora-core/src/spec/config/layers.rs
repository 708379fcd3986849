//! `layer_types` and `sliding_window`: the attention window of each block.

use serde_json::Value;

use super::ModelConfig;
use super::json::Fields;
use crate::error::Result;

/// The two keys as a file has them.
#[derive(Debug)]
pub(crate) struct LayerTypes {
    /// `sliding_window`; 4096, as in transformers' classes that have the key, where the file does not name it.
    pub(crate) window: Option<usize>,
    /// For each layer of `layer_types`, whether it is a sliding one.
    slides: Option<Vec<bool>>,
    layers: usize,
}

impl LayerTypes {
    /// # Errors
    /// If a type is not known, or there is not one a layer.
    pub(crate) fn read(fields: &Fields<'_>, config: &ModelConfig) -> Result<Self> {
        let layers = config.num_hidden_layers;
        let window = match fields.get("sliding_window") {
            None => Some(4096),
            Some(Value::Null) => None,
            Some(_) => Some(fields.required("sliding_window")?),
        };
        let types = match fields.get("layer_types") {
            None | Some(Value::Null) => return Ok(Self { window, slides: None, layers }),
            Some(Value::Array(types)) => types,
            Some(other) => return Err(fields.wrong("layer_types", "a list of names", other)),
        };
        if types.len() != layers {
            return Err(fields.invalid(&format!("layer_types has {} entries for {layers} layers", types.len())));
        }
        let slides = |kind: &Value| match kind.as_str() {
            Some("full_attention" | "attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(fields.unsupported(&format!("layer type {kind}"))),
        };
        Ok(Self { window, slides: Some(types.iter().map(slides).collect::<Result<_>>()?), layers })
    }

    /// For architectures in which every layer has the window, or none has one.
    ///
    /// # Errors
    /// If the types say otherwise.
    pub(crate) fn all_or_none(&self, window: Option<usize>, fields: &Fields<'_>) -> Result<Vec<Option<usize>>> {
        if self.slides.iter().flatten().any(|slides| *slides != window.is_some()) {
            return Err(fields.unsupported("layer_types that mix full and sliding attention in this architecture"));
        }
        Ok(vec![window; self.layers])
    }

    /// For architectures in which layers differ: `slides` says it where the file has no types.
    ///
    /// # Errors
    /// If the types ask for a window that there is not.
    pub(crate) fn layers(
        &self,
        window: Option<usize>,
        slides: impl Fn(usize) -> bool,
        fields: &Fields<'_>,
    ) -> Result<Vec<Option<usize>>> {
        if window.is_none() && self.slides.iter().flatten().any(|slides| *slides) {
            return Err(fields.invalid("layer_types asks for sliding attention, but there is no sliding_window in use"));
        }
        let of = |layer: usize| match &self.slides {
            Some(types) => types[layer],
            None => slides(layer),
        };
        Ok((0..self.layers).map(|layer| window.filter(|_| of(layer))).collect())
    }
}
