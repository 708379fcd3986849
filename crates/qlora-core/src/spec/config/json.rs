//! Hugging Face's `config.json` to a [`ModelConfig`].
//!
//! Keys that are missing get the default of the architecture's configuration class in transformers (checked against
//! 5.23, in `spec/arch/`); keys that change the computation in a way the decoder does not know are errors; all others are ignored.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Architecture, MAX_LAYERS, ModelConfig, Scalings, quantization, rope};
use crate::error::{Error, Result};
use crate::file::{self, SMALL};

impl ModelConfig {
    /// Reads a `config.json` as transformers 4 or 5 writes it.
    ///
    /// # Errors
    /// If the file cannot be read, is no valid configuration, or asks for something that is not supported; the message
    /// names the option.
    pub fn from_json_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_json(&file::read_text(path, SMALL)?, path)
    }

    /// Reads the text of a `config.json`; `path` is only named in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json_file`].
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        parse(text, path)
    }
}

/// Options that change the computation. Where an architecture does not read them (`own_keys` of its definition) and they are set to anything but null, false, 0 or an empty collection, the
/// model is not one the decoder can run.
const UNSUPPORTED: [&str; 24] = [
    "add_cross_attention",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "is_encoder_decoder",
    "logit_scale",
    "logits_scaling",
    "moe_intermediate_size",
    "n_routed_experts",
    "no_rope_layers",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "per_layer_config",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "scale_emb",
    "text_config",
    "use_mrope",
    "use_qk_norm",
    "vision_config",
];

pub(super) fn parse(text: &str, path: &Path) -> Result<ModelConfig> {
    let map = file::parse_object(text, path)?;
    let fields = Fields::new(path, &map);
    let architecture = architecture(&fields)?;
    refuse(&fields, architecture.definition().own_keys())?;

    let num_hidden_layers = fields.required("num_hidden_layers")?;
    if num_hidden_layers > MAX_LAYERS {
        return Err(
            fields.invalid(&format!("num_hidden_layers is {num_hidden_layers}; at most {MAX_LAYERS} are supported"))
        );
    }
    let hidden_size = fields.required("hidden_size")?;
    let num_attention_heads = fields.required("num_attention_heads")?;
    let defaults = architecture.definition().defaults();
    let max_position_embeddings = fields.usize("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
    // A key set to null means one key/value head a query head; a missing one means the class's default.
    let num_key_value_heads = match fields.get("num_key_value_heads") {
        Some(Value::Null) => num_attention_heads,
        None => defaults.num_key_value_heads.unwrap_or(num_attention_heads),
        Some(_) => fields.required("num_key_value_heads")?,
    };
    let head_dim = match (fields.get("head_dim"), defaults.head_dim) {
        (None, Some(head_dim)) => head_dim,
        (None | Some(Value::Null), _) => {
            if num_attention_heads == 0 || !hidden_size.is_multiple_of(num_attention_heads) {
                return Err(fields.invalid(&format!(
                    "hidden_size ({hidden_size}) is not a multiple of num_attention_heads ({num_attention_heads}), and there is \
                     no head_dim"
                )));
            }
            hidden_size / num_attention_heads
        }
        (Some(_), _) => fields.required("head_dim")?,
    };
    let vocab_size = fields.required("vocab_size")?;
    let in_vocabulary = |id: &u32| (*id as usize) < vocab_size;
    let mut config = ModelConfig {
        architecture,
        vocab_size,
        hidden_size,
        intermediate_size: fields.required("intermediate_size")?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        rms_norm_eps: fields.f64("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope: rope::parse(&fields, max_position_embeddings, defaults.rope_theta)?,
        max_position_embeddings,
        sliding_window: vec![None; num_hidden_layers],
        without_rope: Vec::new(),
        scalings: Scalings::default(),
        tie_word_embeddings: fields.bool("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        bos_token_id: match fields.get("bos_token_id") {
            None => defaults.bos_token_id.filter(in_vocabulary),
            Some(_) => fields.token_ids("bos_token_id", vocab_size)?.first().copied(),
        },
        eos_token_ids: match fields.get("eos_token_id") {
            None => defaults.eos_token_id.filter(in_vocabulary).into_iter().collect(),
            Some(_) => fields.token_ids("eos_token_id", vocab_size)?,
        },
    };
    architecture.definition().read_json(&fields, &mut config)?;
    config.check_sizes(path)?;
    Ok(config)
}

/// The architecture from `architectures`, else from `model_type`; both must agree where both are known.
fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let known = Architecture::ALL;
    let supported = || known.iter().map(|architecture| architecture.class()).collect::<Vec<_>>().join(", ");
    let by_type = match fields.string("model_type")? {
        None => None,
        Some(kind) => match known.iter().find(|architecture| architecture.model_type() == kind) {
            Some(architecture) => Some(*architecture),
            None => {
                let around = around(fields, known)?;
                return Err(fields.unsupported(&format!("model_type \"{kind}\"{around} (supported: {})", supported())));
            }
        },
    };
    let listed = match fields.get("architectures") {
        None | Some(Value::Null) => None,
        Some(Value::Array(names)) => names.first(),
        Some(other) => return Err(fields.wrong("architectures", "a list of names", other)),
    };
    let by_name = match listed {
        None => None,
        Some(name) => match known.iter().find(|known| is_class(name.as_str().unwrap_or_default(), known.class())) {
            Some(architecture) => Some(*architecture),
            None if by_type.is_some() && WRAPPERS.iter().any(|wrapper| name == wrapper) => None,
            None => return Err(fields.unsupported(&format!("architecture {name} (supported: {})", supported()))),
        },
    };
    match (by_name, by_type) {
        (Some(a), Some(b)) if a != b => Err(fields.invalid("architectures and model_type name different models")),
        (Some(architecture), _) | (None, Some(architecture)) => Ok(architecture),
        (None, None) => Err(fields.invalid("neither architectures nor model_type says what model this is")),
    }
}

/// For messages about a model with images or sound: whether the text model in it would be supported.
fn around(fields: &Fields<'_>, known: &[Architecture]) -> Result<String> {
    let text = fields.object("text_config")?.and_then(|text| text.get("model_type")).and_then(Value::as_str);
    let supported = text.filter(|text| known.iter().any(|architecture| architecture.model_type() == *text));
    Ok(supported.map_or_else(String::new, |text| {
        format!(", a model around a {text}, which has to be saved by itself, without what is beside text_config")
    }))
}

/// Classes around a model whose name some programs write; `model_type` then says what the model is.
const WRAPPERS: [&str; 4] =
    ["PeftModelForCausalLM", "OptimizedModule", "FullyShardedDataParallel", "DistributedDataParallel"];

/// Whether a name is that of a class, as it is now or as the first conversions wrote it (`LLaMAForCausalLM`), or that of the same
/// model without its head (`LlamaModel`).
fn is_class(name: &str, class: &str) -> bool {
    let family = class.trim_end_matches("ForCausalLM");
    name.eq_ignore_ascii_case(class) || name.strip_suffix("Model") == Some(family)
}

/// Errors for options that would make the result wrong if they were ignored.
fn refuse(fields: &Fields<'_>, own_keys: &[&str]) -> Result<()> {
    // Only that it can be read: it says how the weights are stored, not what the model computes.
    quantization::parse(fields)?;
    for key in ["hidden_act", "hidden_activation"] {
        if let Some(activation) = fields.string(key)?
            && !matches!(activation, "silu" | "swish")
        {
            return Err(fields.unsupported(&format!("{key} \"{activation}\" (supported: silu)")));
        }
    }
    for key in UNSUPPORTED.into_iter().filter(|key| !own_keys.contains(key)) {
        let harmless = match fields.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::Bool(set)) => !set,
            Some(Value::Number(number)) => number.as_f64() == Some(0.0),
            Some(Value::String(_)) => false,
            Some(Value::Array(items)) => items.is_empty(),
            Some(Value::Object(items)) => items.is_empty(),
        };
        if !harmless {
            return Err(fields.unsupported(key));
        }
    }
    if fields.f64("attention_dropout")?.is_some_and(|p| p != 0.0) {
        tracing::warn!("{}: attention_dropout is ignored: attention runs without dropout", fields.path.display());
    }
    Ok(())
}

/// A JSON object whose values are asked for by key; errors name the file and the key. Null counts as missing except in
/// [`Fields::get`].
pub(crate) struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    prefix: String,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { path, map, prefix: String::new() }
    }

    /// The object under `key` of the same file.
    pub(crate) fn inside(&self, key: &str, map: &'a Map<String, Value>) -> Self {
        Self { path: self.path, map, prefix: format!("{key}.") }
    }

    pub(crate) fn path(&self) -> &Path {
        self.path
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key)
    }

    pub(crate) fn invalid(&self, message: &str) -> Error {
        Error::format(self.path, format!("{}{message}", self.prefix))
    }

    pub(crate) fn wrong(&self, key: &str, expected: &str, got: &Value) -> Error {
        let mut got = got.to_string();
        if got.len() > 60 {
            got.truncate(got.floor_char_boundary(60));
            got.push_str("...");
        }
        self.invalid(&format!("{key} is {got}; expected {expected}"))
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(key, expected, value)),
        }
    }

    pub(crate) fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    pub(crate) fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn object(&self, key: &str) -> Result<Option<&'a Map<String, Value>>> {
        self.typed(key, "an object", Value::as_object)
    }

    /// A whole number; `8192.0` counts as one, as some files write it so.
    pub(crate) fn usize(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| {
            value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .or_else(|| value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x)).map(|x| x as usize))
        })
    }

    pub(crate) fn required(&self, key: &str) -> Result<usize> {
        self.usize(key)?.ok_or_else(|| self.invalid(&format!("{key} is missing")))
    }

    /// A token id or a list of them. Ids outside the vocabulary are dropped with a warning: published files contain
    /// some, and no token can have them.
    fn token_ids(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>> {
        let values = match self.map.get(key) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let mut ids = Vec::new();
        for value in values {
            let id = value.as_i64().ok_or_else(|| self.wrong(key, "a token id or a list of them", value))?;
            match u32::try_from(id).ok().filter(|id| (*id as usize) < vocab_size) {
                Some(id) if ids.contains(&id) => {}
                Some(id) => ids.push(id),
                None => {
                    tracing::warn!("{}: {key} {id} is outside the vocabulary of {vocab_size}", self.path.display());
                }
            }
        }
        Ok(ids)
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
