//! Contradictions between a folder's files and its `config.json`, as programs that save models leave them, and their
//! resolution: that of transformers 5.17, or an error.
//!
//! | the files | what is made of it |
//! |---|---|
//! | a head besides the embedding although the configuration says that it is tied | if the two are equal it is tied, else it is a head of its own |
//! | a tied model's table stored as the head alone | the embedding is that table |
//! | names without `model.`, as the class without a head saves them | they get it |
//! | `quantization_config`, and not one layer that is stored so | the weights are plain |
//! | the same, and some plain layers that no skip list names | they stay plain |

use std::collections::BTreeMap;

use half::{bf16, f16};
use qlora_kernels::Dtype;
use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::formats::safetensors::shard::Shard;
use crate::source::StoredTensor;
use crate::spec::{EMBEDDING_WEIGHT as EMBEDDING, HEAD_WEIGHT as HEAD};

/// Gives the tensors of a model that was saved without its head (`LlamaModel`) the names that they have with one.
pub(super) fn name_as_with_a_head(shards: &mut [Shard], tensors: &mut BTreeMap<String, usize>) {
    let has = |test: &dyn Fn(&str) -> bool| shards.iter().any(|shard| shard.stored_names().any(|name| test(&name)));
    if has(&|name| name.starts_with("model.")) || !has(&|name| name == "embed_tokens.weight") {
        return;
    }
    let rename = |(name, shard): (String, usize)| {
        if name.starts_with("lm_head.") {
            return (name, shard);
        }
        let full = format!("model.{name}");
        shards[shard].rename(&name, &full);
        (full, shard)
    };
    *tensors = std::mem::take(tensors).into_iter().map(rename).collect();
}

/// Decides whether the head of a model whose configuration says that it is tied is one of its own: `config` and `tensors` (name
/// to shard) are then as for any other model. Returns what there is to say about it.
///
/// # Errors
/// If a table cannot be read.
pub(super) fn settle_head(
    config: &mut ModelConfig,
    tensors: &mut BTreeMap<String, usize>,
    shards: &mut [Shard],
) -> Result<Option<String>> {
    if !config.tie_word_embeddings {
        return Ok(None);
    }
    let quantized =
        ["lm_head.qweight", "lm_head.weight.absmax", "lm_head.SCB"].iter().any(|part| tensors.contains_key(*part));
    let Some(&head) = tensors.get(HEAD) else {
        config.tie_word_embeddings = !quantized;
        return Ok(quantized.then(own_head));
    };
    let Some(&embedding) = tensors.get(EMBEDDING) else {
        // Some programs keep the other one of the two names.
        shards[head].rename(HEAD, EMBEDDING);
        tensors.remove(HEAD);
        tensors.insert(EMBEDDING.to_owned(), head);
        return Ok(None);
    };
    let shape = |shard: usize, name: &str| shards[shard].shape(name).map(<[usize]>::to_vec);
    let (a, b) = (shards[embedding].stored(EMBEDDING), shards[head].stored(HEAD));
    let equal = match (a, b) {
        (Some(a), Some(b)) if shape(embedding, EMBEDDING) == shape(head, HEAD) => {
            equal(&a, &b).map_err(|error| Error::io(shards[head].path(), error))?
        }
        _ => false,
    };
    if equal && !quantized {
        tensors.remove(HEAD);
        return Ok(None);
    }
    config.tie_word_embeddings = false;
    Ok(Some(own_head()))
}

fn own_head() -> String {
    "tie_word_embeddings is true, but the files hold a head (lm_head.weight) that differs from the embedding: the model has a \
     head of its own, which is kept (tie_word_embeddings counts as false)"
        .to_owned()
}

/// Whether two tensors of one shape hold the same values, whatever they are stored in.
fn equal(a: &StoredTensor<'_>, b: &StoredTensor<'_>) -> std::io::Result<bool> {
    const ELEMENTS: usize = 1 << 16;
    let (size_a, size_b) = (bytes_of(a.dtype), bytes_of(b.dtype));
    let count = a.bytes.len() / size_a;
    if count != b.bytes.len() / size_b {
        return Ok(false);
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for start in (0..count).step_by(ELEMENTS) {
        let here = ELEMENTS.min(count - start);
        left.resize(here * size_a, 0);
        right.resize(here * size_b, 0);
        a.bytes.read_at(start * size_a, &mut left)?;
        b.bytes.read_at(start * size_b, &mut right)?;
        let same = match a.dtype == b.dtype {
            true => left == right,
            false => values(&left, a.dtype).eq(values(&right, b.dtype)),
        };
        if !same {
            return Ok(false);
        }
    }
    Ok(true)
}

fn bytes_of(dtype: Dtype) -> usize {
    if dtype == Dtype::F32 { 4 } else { 2 }
}

fn values(bytes: &[u8], dtype: Dtype) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(bytes_of(dtype)).map(move |b| match dtype {
        Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::Bf16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
    })
}

/// The linear layers of the blocks that are stored plain although no skip list of `quantization_config` names them.
pub(super) fn plain_without_reason(
    config: &ModelConfig,
    quantization: &Value,
    is_packed: impl Fn(&str) -> bool,
) -> Vec<String> {
    // bitsandbytes' list, and AWQ's.
    let lists = ["llm_int8_skip_modules", "modules_to_not_convert"].map(|key| quantization[key].as_array());
    let skipped: Vec<&str> = lists.into_iter().flatten().flatten().filter_map(Value::as_str).collect();
    let modules = config.spec();
    let modules = modules.linear().map(|module| module.name.clone());
    modules
        .filter(|module| !is_packed(&format!("{module}.weight")) && !skipped.iter().any(|entry| names(entry, module)))
        .collect()
}

/// Whether an entry of a skip list names a module: its whole parts are in the module's name one after the other.
fn names(entry: &str, module: &str) -> bool {
    let (entry, module) = (format!(".{entry}."), format!(".{module}."));
    module.contains(&entry)
}

/// A remark on a `quantization_config` over weights that are all plain.
pub(super) fn left_over(method: &str) -> String {
    format!(
        "config.json has a quantization_config ({method}), but not one layer is stored so: it was left behind, and the weights \
         are the plain ones that the files hold"
    )
}

/// A remark on plain layers among quantized ones.
pub(super) fn partly(method: &str, plain: &[String]) -> String {
    format!(
        "config.json says {method}, but {} linear layers are stored plain and in no list of skipped modules, the first of them \
         {}: they stay as they are stored",
        plain.len(),
        plain.first().map_or("", String::as_str)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skip_lists_name_modules_by_whole_parts() {
        let module = "model.layers.1.self_attn.q_proj";
        for entry in ["q_proj", "self_attn", "model.layers.1", "layers.1.self_attn.q_proj", module] {
            assert!(names(entry, module), "{entry}");
        }
        for entry in ["proj", "layers.11", "lm_head", "q_proj.weight", "1.mlp"] {
            assert!(!names(entry, module), "{entry}");
        }
    }
}
