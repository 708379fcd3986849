//! The tensors a model of a [`ModelConfig`] consists of.

use super::ModelConfig;

impl ModelConfig {
    /// Name and shape of every tensor, in Hugging Face's names, the embedding first, then block by block. A tied head is
    /// not listed. Matrices are `[output features, input features]`.
    pub fn tensor_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, self.hidden_size])];
        for layer in 0..self.num_hidden_layers {
            self.block_tensors(|name, shape| tensors.push((format!("model.layers.{layer}.{name}"), shape)));
        }
        tensors.push(("model.norm.weight".to_owned(), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab_size, self.hidden_size]));
        }
        tensors
    }

    fn block_tensors(&self, mut emit: impl FnMut(String, Vec<usize>)) {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim);
        emit("input_layernorm.weight".to_owned(), vec![hidden]);
        let projections = [
            ("self_attn.q_proj", q, hidden, self.qkv_bias),
            ("self_attn.k_proj", kv, hidden, self.qkv_bias),
            ("self_attn.v_proj", kv, hidden, self.qkv_bias),
            ("self_attn.o_proj", hidden, q, self.o_bias),
            ("mlp.gate_proj", inner, hidden, self.mlp_bias),
            ("mlp.up_proj", inner, hidden, self.mlp_bias),
            ("mlp.down_proj", hidden, inner, self.mlp_bias),
        ];
        for (name, rows, cols, bias) in projections {
            emit(format!("{name}.weight"), vec![rows, cols]);
            if bias {
                emit(format!("{name}.bias"), vec![rows]);
            }
        }
        if self.qk_norm {
            emit("self_attn.q_norm.weight".to_owned(), vec![self.head_dim]);
            emit("self_attn.k_norm.weight".to_owned(), vec![self.head_dim]);
        }
        emit("post_attention_layernorm.weight".to_owned(), vec![hidden]);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

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
}
