//! llama.cpp's tensor names and Hugging Face's, in both directions, and the row order of its q and k projections.

use qlora_kernels::weight::PlainData;

use crate::config::{Architecture, ModelConfig};

/// llama.cpp's and Hugging Face's names of the tensors outside the layers.
const OUTSIDE: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// llama.cpp's and Hugging Face's names of a layer's modules, and whether the module can have a bias.
const IN_LAYER: [(&str, &str, bool); 11] = [
    ("attn_norm", "input_layernorm", false),
    ("attn_q", "self_attn.q_proj", true),
    ("attn_k", "self_attn.k_proj", true),
    ("attn_v", "self_attn.v_proj", true),
    ("attn_output", "self_attn.o_proj", true),
    ("attn_q_norm", "self_attn.q_norm", false),
    ("attn_k_norm", "self_attn.k_norm", false),
    ("ffn_norm", "post_attention_layernorm", false),
    ("ffn_gate", "mlp.gate_proj", true),
    ("ffn_up", "mlp.up_proj", true),
    ("ffn_down", "mlp.down_proj", true),
];

/// The Hugging Face name of a tensor, if it is one of a Llama-style decoder.
pub(super) fn hugging_face(name: &str) -> Option<String> {
    if let Some((_, outside)) = OUTSIDE.iter().find(|(gguf, _)| *gguf == name) {
        return Some((*outside).to_owned());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // Only the spelling that `ModelConfig::tensor_shapes` uses, so that two names cannot become one.
    let number: u32 = layer.parse().ok().filter(|number: &u32| number.to_string() == layer)?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (_, module, bias) = IN_LAYER.iter().find(|(gguf, ..)| *gguf == part)?;
    let kind = match kind {
        "weight" => "weight",
        "bias" if *bias => "bias",
        _ => return None,
    };
    Some(format!("model.layers.{number}.{module}.{kind}"))
}

/// llama.cpp's name of a tensor with a Hugging Face name, if it is one of a Llama-style decoder.
pub(crate) fn gguf(name: &str) -> Option<String> {
    if let Some((outside, _)) = OUTSIDE.iter().find(|(_, hugging_face)| *hugging_face == name) {
        return Some((*outside).to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (part, ..) = IN_LAYER.iter().find(|(_, hugging_face, _)| *hugging_face == module)?;
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// The heads of a q or k projection whose rows llama.cpp keeps in an order of its own.
pub(crate) fn permuted_heads(name: &str, config: &ModelConfig) -> Option<usize> {
    if !matches!(config.architecture, Architecture::Llama | Architecture::Mistral) {
        None
    } else if name.contains(".self_attn.q_proj.") {
        Some(config.num_attention_heads)
    } else if name.contains(".self_attn.k_proj.") {
        Some(config.num_key_value_heads)
    } else {
        None
    }
}

/// Brings the rows of a q or k projection `[heads * head_dim, cols]` (or its bias) into Hugging Face's order.
///
/// llama.cpp's converter interleaves the two halves of every head (`[heads, 2, d/2]` to `[heads, d/2, 2]`), because its
/// rotary embedding turns neighbouring elements where Hugging Face's turns element `i` with `i + d/2`.
pub(super) fn unpermute(data: &mut PlainData, heads: usize, head_dim: usize) {
    let half = head_dim / 2;
    reorder(data, heads, head_dim, |row| (row % half) * 2 + row / half);
}

/// The inverse of [`unpermute`]: Hugging Face's order to llama.cpp's.
pub(crate) fn permute(data: &mut PlainData, heads: usize, head_dim: usize) {
    let half = head_dim / 2;
    reorder(data, heads, head_dim, |row| (row % 2) * half + row / 2);
}

/// Fills every row of every head with the head's row that `source` names.
fn reorder(data: &mut PlainData, heads: usize, head_dim: usize, source: impl Fn(usize) -> usize) {
    match data {
        PlainData::F32(data) => reorder_rows(data, heads, head_dim, source),
        PlainData::Bf16(data) => reorder_rows(data, heads, head_dim, source),
        PlainData::F16(data) => reorder_rows(data, heads, head_dim, source),
    }
}

fn reorder_rows<T: Copy>(data: &mut [T], heads: usize, head_dim: usize, source: impl Fn(usize) -> usize) {
    let cols = data.len() / (heads * head_dim);
    let mut head_copy = Vec::with_capacity(head_dim * cols);
    for head in data.chunks_exact_mut(head_dim * cols) {
        head_copy.clear();
        head_copy.extend_from_slice(head);
        for (row, target) in head.chunks_exact_mut(cols).enumerate() {
            let source = source(row);
            target.copy_from_slice(&head_copy[source * cols..(source + 1) * cols]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_mapped() {
        for (gguf, expected) in [
            ("token_embd.weight", Some("model.embed_tokens.weight")),
            ("blk.12.attn_q.bias", Some("model.layers.12.self_attn.q_proj.bias")),
            ("blk.0.ffn_norm.weight", Some("model.layers.0.post_attention_layernorm.weight")),
            ("blk.0.ffn_norm.bias", None),
            ("blk.00.ffn_norm.weight", None),
            ("blk.+1.ffn_norm.weight", None),
            ("blk.0.ffn_gate_exps.weight", None),
            ("blk.0", None),
            ("rope_freqs.weight", None),
        ] {
            assert_eq!(hugging_face(gguf).as_deref(), expected, "{gguf}");
        }
    }

    #[test]
    fn rows_return_to_hugging_faces_order() {
        // Two heads of four rows of three columns, numbered in Hugging Face's order, then permuted as llama.cpp does:
        // reshape [heads, 2, d/2], swap the last two.
        let (heads, head_dim, cols) = (2, 4, 3);
        let original: Vec<f32> = (0..heads * head_dim * cols).map(|i| i as f32).collect();
        let mut permuted = Vec::new();
        for head in 0..heads {
            for pair in 0..head_dim / 2 {
                for half in 0..2 {
                    let row = head * head_dim + half * head_dim / 2 + pair;
                    permuted.extend_from_slice(&original[row * cols..(row + 1) * cols]);
                }
            }
        }
        assert_ne!(permuted, original);
        let mut data = PlainData::F32(permuted);
        unpermute(&mut data, heads, head_dim);
        let PlainData::F32(data) = data else { unreachable!() };
        assert_eq!(data, original);
    }

    #[test]
    fn halves_are_interleaved() {
        // One head of six rows of two columns.
        let mut data = PlainData::F32((0..12).map(|i| i as f32).collect());
        permute(&mut data, 1, 6);
        let PlainData::F32(data) = data else { unreachable!() };
        assert_eq!(data, [0., 1., 6., 7., 2., 3., 8., 9., 4., 5., 10., 11.]);
    }

    #[test]
    fn what_is_no_decoders_tensor_has_no_name() {
        assert_eq!(gguf("model.layers.3.mlp.up_proj.bias").as_deref(), Some("blk.3.ffn_up.bias"));
        assert_eq!(gguf("model.layers.3.mlp.experts.0.weight"), None);
        assert_eq!(gguf("model.vision.weight"), None);
    }
}
