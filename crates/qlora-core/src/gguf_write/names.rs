//! Hugging Face's tensor names to llama.cpp's, and the row order of its q and k projections.

use qlora_kernels::weight::PlainData;

use crate::config::ModelConfig;

/// llama.cpp's name of a tensor, if it is one of a Llama-style decoder.
pub(super) fn gguf(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let part = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// The heads of a q or k projection.
pub(super) fn heads(name: &str, config: &ModelConfig) -> Option<usize> {
    if name.contains(".self_attn.q_proj.") {
        Some(config.num_attention_heads)
    } else if name.contains(".self_attn.k_proj.") {
        Some(config.num_key_value_heads)
    } else {
        None
    }
}

/// Interleaves the two halves of every head of a q or k projection `[heads * head_dim, cols]` (or its bias): `[heads, 2,
/// d/2]` becomes `[heads, d/2, 2]`, as llama.cpp's rotary embedding turns neighbouring elements.
pub(super) fn permute(data: &mut PlainData, heads: usize, head_dim: usize) {
    match data {
        PlainData::F32(data) => permute_rows(data, heads, head_dim),
        PlainData::Bf16(data) => permute_rows(data, heads, head_dim),
        PlainData::F16(data) => permute_rows(data, heads, head_dim),
    }
}

fn permute_rows<T: Copy>(data: &mut [T], heads: usize, head_dim: usize) {
    let cols = data.len() / (heads * head_dim);
    let half = head_dim / 2;
    let mut head_copy = Vec::with_capacity(head_dim * cols);
    for head in data.chunks_exact_mut(head_dim * cols) {
        head_copy.clear();
        head_copy.extend_from_slice(head);
        for (row, target) in head.chunks_exact_mut(cols).enumerate() {
            let source = (row % 2) * half + row / 2;
            target.copy_from_slice(&head_copy[source * cols..(source + 1) * cols]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
