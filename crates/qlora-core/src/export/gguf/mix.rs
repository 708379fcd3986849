//! The type of every tensor in a file, equal to llama.cpp's choice for the same name (`llama-quantize`, build 10605).
//!
//! A vector is f32. Of matrices, the head (or, where there is none, the embedding, which is then the head as well) is q6_K in all
//! quantized files but q8_0. What v and the second projection of the feed-forward part do is felt most, so that these get more
//! bits in some layers; "some" are the first and the last eighth and every third between ([`more_bits`]):
//!
//! | file | v | ffn_down | attention's output |
//! |---|---|---|---|
//! | q2_k | q4_K where 4 or more heads share one, else q3_K | q3_K | q3_K |
//! | q3_k_m | q5_K in the first two layers, else q4_K | q5_K in the first sixteenth, else q4_K | q4_K |
//! | q3_k_l | q5_K | q5_K | q5_K |
//! | q4_k_s | q5_K in the first four layers | q5_K in the first eighth | |
//! | q4_k_m, q5_k_m | q6_K in some layers | q6_K in some layers | |
//! | q4_0, q5_0 with an importance matrix | | q4_1, q5_1 in the first eighth | |
//!
//! Where v would be q3_K or q4_K in a model that llama.cpp calls 70B, it is q5_K. A matrix whose rows are no whole number of
//! blocks of 256 takes the next type with blocks of 32: q4_0 for q2_K and q3_K, q5_0 for q4_K, q5_1 for q5_K, q8_0 for
//! q6_K; and f16 where the rows are no whole blocks of 32 either.

use qlora_kernels::ggml::BlockType;

use super::kind::{GgufType, TensorType};
use crate::config::ModelConfig;

/// The inputs of the choice of a tensor's type, besides its name.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mix {
    kind: GgufType,
    layers: usize,
    /// Query heads a key-value head.
    sharing: usize,
    /// Whether the embedding is the head.
    tied: bool,
    /// Whether llama.cpp calls the model 70B.
    large: bool,
    importance: bool,
}

impl Mix {
    pub(super) fn new(kind: GgufType, config: &ModelConfig, importance: bool) -> Self {
        let layers = config.num_hidden_layers;
        let (heads, shared) = (config.num_attention_heads, config.num_key_value_heads);
        let large = match config.architecture.gguf_name() {
            "llama" => layers == 80 && heads != shared,
            "qwen2" => layers == 80,
            _ => false,
        };
        Self { kind, layers, sharing: heads / shared.max(1), tied: config.tie_word_embeddings, large, importance }
    }

    /// The type of a tensor with rows of `cols` elements, and the one that these do not fit.
    pub(super) fn of(&self, name: &str, dimensions: usize, cols: usize) -> (TensorType, Option<TensorType>) {
        if dimensions < 2 {
            return (TensorType::F32, None);
        }
        let wanted = self.wanted(name, cols);
        let fits = |kind: TensorType| cols.is_multiple_of(kind.block().0);
        if fits(wanted) {
            return (wanted, None);
        }
        let smaller = match wanted {
            TensorType::Blocks(BlockType::Q2K | BlockType::Q3K) => TensorType::Blocks(BlockType::Q4_0),
            TensorType::Blocks(BlockType::Q4K) => TensorType::Blocks(BlockType::Q5_0),
            TensorType::Blocks(BlockType::Q5K) => TensorType::Blocks(BlockType::Q5_1),
            TensorType::Blocks(BlockType::Q6K) => TensorType::Q8_0,
            _ => TensorType::F16,
        };
        (if fits(smaller) { smaller } else { TensorType::F16 }, Some(wanted))
    }

    fn wanted(&self, name: &str, cols: usize) -> TensorType {
        use BlockType::{Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K};
        let TensorType::Blocks(most) = self.kind.tensor() else { return self.kind.tensor() };
        let head = name == "output.weight" || (self.tied && name == "token_embd.weight");
        if head {
            return if cols.is_multiple_of(most.block().0) { TensorType::Blocks(Q6K) } else { TensorType::Q8_0 };
        }
        let Some((layer, part)) = layer_and_part(name) else { return TensorType::Blocks(most) };
        let eighth = layer < self.layers / 8;
        let some = more_bits(layer, self.layers);
        let block = match (part, self.kind) {
            ("attn_v" | "attn_qkv", kind) => {
                let block = match kind {
                    GgufType::Q2K if self.sharing >= 4 => Q4K,
                    GgufType::Q2K => Q3K,
                    GgufType::Q3KM if layer < 2 => Q5K,
                    GgufType::Q3KM => Q4K,
                    GgufType::Q3KL => Q5K,
                    GgufType::Q4KM | GgufType::Q5KM if some => Q6K,
                    GgufType::Q4KS if layer < 4 => Q5K,
                    _ => most,
                };
                if self.large && matches!(block, Q3K | Q4K) { Q5K } else { block }
            }
            ("ffn_down", GgufType::Q2K) => Q3K,
            ("ffn_down", GgufType::Q3KM) if layer < self.layers / 16 => Q5K,
            ("ffn_down", GgufType::Q3KM) => Q4K,
            ("ffn_down", GgufType::Q3KL) => Q5K,
            ("ffn_down", GgufType::Q4KS) if eighth => Q5K,
            ("ffn_down", GgufType::Q4KM | GgufType::Q5KM) if some => Q6K,
            ("ffn_down", _) if self.importance && eighth && most == Q4_0 => Q4_1,
            ("ffn_down", _) if self.importance && eighth && most == Q5_0 => Q5_1,
            ("attn_output", GgufType::Q2K) => Q3K,
            ("attn_output", GgufType::Q3KM) => Q4K,
            ("attn_output", GgufType::Q3KL) => Q5K,
            _ => most,
        };
        TensorType::Blocks(block)
    }
}

/// Whether a layer is among those whose sensitive matrices get more bits.
fn more_bits(layer: usize, layers: usize) -> bool {
    let eighth = layers / 8;
    layer < eighth || layer >= 7 * layers / 8 || (layer - eighth) % 3 == 2
}

/// Of `blk.3.attn_v.weight`: 3 and `attn_v`.
fn layer_and_part(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest.strip_suffix(".weight")?))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Made by scripts/fixtures/gguf_types.py with llama.cpp's own function.
    #[test]
    fn every_tensor_has_llama_cpps_type() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf/types.json");
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let number = |value: &serde_json::Value, key: &str| value[key].as_u64().unwrap() as usize;
        let mut compared = 0;
        for model in json["models"].as_array().unwrap() {
            let layers = number(model, "layers");
            let (heads, shared) = (number(model, "heads"), number(model, "kv_heads"));
            let architecture = model["architecture"].as_str().unwrap();
            let tied = !model["output"].as_bool().unwrap();
            let (hidden, inner) = (number(model, "hidden"), number(model, "inner"));
            for (file, types) in model["types"].as_object().unwrap() {
                let (name, importance) =
                    file.strip_suffix("+imatrix").map_or((file.as_str(), false), |name| (name, true));
                let kind: GgufType = name.parse().unwrap();
                let large = layers == 80 && (architecture == "qwen2" || heads != shared);
                let mix = Mix { kind, layers, sharing: heads / shared, tied, large, importance };
                let mut names = vec![("token_embd".to_owned(), hidden)];
                if !tied {
                    names.push(("output".to_owned(), hidden));
                }
                for layer in 0..layers {
                    for part in ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"] {
                        names.push((format!("blk.{layer}.{part}"), if part == "ffn_down" { inner } else { hidden }));
                    }
                }
                let expected: Vec<&str> = types.as_str().unwrap().split(' ').collect();
                let all = expected.iter().flat_map(|run| {
                    let (count, kind) = run.split_once('x').unwrap();
                    std::iter::repeat_n(kind, count.parse().unwrap())
                });
                let all: Vec<&str> = all.collect();
                assert_eq!(all.len(), names.len());
                for ((name, cols), expected) in names.iter().zip(all) {
                    let name = format!("{name}.weight");
                    let got = mix.of(&name, 2, *cols).0.name();
                    assert_eq!(got, expected, "{architecture} of {layers} layers, {file}: {name}");
                    compared += 1;
                }
            }
        }
        assert!(compared > 10_000, "{compared}");
    }

    #[test]
    fn fallbacks_say_what_was_wanted() {
        let mix = Mix { kind: GgufType::Q4KM, layers: 8, sharing: 1, tied: true, large: false, importance: false };
        let blocks = TensorType::Blocks;
        assert_eq!(mix.of("blk.4.ffn_up.weight", 2, 576), (blocks(BlockType::Q5_0), Some(blocks(BlockType::Q4K))));
        assert_eq!(mix.of("blk.4.ffn_up.weight", 2, 90), (TensorType::F16, Some(blocks(BlockType::Q4K))));
        assert_eq!(mix.of("blk.4.ffn_up.weight", 2, 512), (blocks(BlockType::Q4K), None));
        assert_eq!(mix.of("blk.4.attn_norm.weight", 1, 576), (TensorType::F32, None));
        let mix = Mix { kind: GgufType::Q8_0, ..mix };
        assert_eq!(mix.of("blk.4.ffn_up.weight", 2, 90), (TensorType::F16, Some(TensorType::Q8_0)));
    }
}
