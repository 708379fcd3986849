use std::path::Path;

use super::*;
use crate::config::ModelConfig;

#[test]
fn the_shapes_add_up_to_the_parameter_count() {
    let tiny = r#"{"model_type": "MODEL", "vocab_size": 11, "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
        "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": TIED}"#;
    for (model, tied, tensors) in [("llama", "true", 50), ("qwen2", "false", 39), ("qwen3", "true", 47)] {
        let text = tiny.replace("MODEL", model).replace("TIED", tied);
        let config = ModelConfig::from_json(&text, Path::new("config.json")).unwrap();
        let shapes = config.tensor_shapes();
        let sum: u128 = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>() as u128).sum();
        assert_eq!(sum, config.parameter_count(), "{model}");
        assert_eq!(shapes.len(), tensors, "{model}");
    }
}

fn tiny(layers: usize) -> ModelSpec {
    crate::lora::tiny_model(layers).spec()
}

#[test]
fn gguf_names_are_mapped_to_hugging_faces() {
    let names = tiny(2).gguf_names();
    for (gguf, expected) in [
        ("token_embd.weight", Some("model.embed_tokens.weight")),
        ("output.weight", Some("lm_head.weight")),
        ("blk.12.attn_q.bias", Some("model.layers.12.self_attn.q_proj.bias")),
        ("blk.0.ffn_norm.weight", Some("model.layers.0.post_attention_layernorm.weight")),
        ("blk.0.ffn_norm.bias", None),
        ("blk.00.ffn_norm.weight", None),
        ("blk.+1.ffn_norm.weight", None),
        ("blk.1.ffn_norm.weight", Some("model.layers.1.post_attention_layernorm.weight")),
        ("blk.0.ffn_gate_exps.weight", None),
        ("blk.0", None),
        ("rope_freqs.weight", None),
    ] {
        assert_eq!(names.hugging_face(gguf).as_deref(), expected, "{gguf}");
    }
}

#[test]
fn tensors_have_both_names_and_a_place() {
    let config = ModelConfig { mlp_bias: true, ..crate::lora::tiny_model(4) };
    let spec = config.spec();
    let tensor = |name: &str| spec.tensors().find(|tensor| tensor.name == name);
    let bias = tensor("model.layers.3.mlp.up_proj.bias").unwrap();
    assert_eq!((bias.gguf(), bias.shape, bias.is_weight), ("blk.3.ffn_up.bias".to_owned(), vec![96], false));
    assert_eq!(tensor("model.layers.0.self_attn.q_proj.weight").unwrap().module.interleaved_heads, Some(5));
    assert_eq!(tensor("model.layers.0.self_attn.k_proj.weight").unwrap().module.interleaved_heads, Some(2));
    assert_eq!(tensor("model.layers.0.self_attn.v_proj.weight").unwrap().module.interleaved_heads, None);
    // Tied, and without norms of q and k.
    assert!(tensor("lm_head.weight").is_none() && tensor("model.layers.0.self_attn.q_norm.weight").is_none());
}

#[test]
fn modules_that_are_no_linear_layer_are_listed_once() {
    let mut names = tiny(2).other_modules();
    assert!(!names.iter().any(|name| name.ends_with("_proj")));
    let block = |layer: usize| {
        ["", ".self_attn", ".mlp", ".mlp.act_fn", ".input_layernorm", ".post_attention_layernorm"]
            .map(|part| format!("model.layers.{layer}{part}"))
    };
    let outside = ["lm_head", "model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"];
    let mut expected: Vec<String> = outside.into_iter().map(str::to_owned).chain(block(0)).chain(block(1)).collect();
    names.sort();
    expected.sort();
    assert_eq!(names, expected);
}

#[test]
fn linear_layers_of_blocks_are_known_by_the_end_of_their_names() {
    assert!(is_linear_in_a_block("model.layers.0.mlp.down_proj") && is_linear_in_a_block("q_proj"));
    assert!(!is_linear_in_a_block(HEAD) && !is_linear_in_a_block(EMBEDDING) && !is_linear_in_a_block("model.norm"));
}
