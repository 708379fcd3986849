//! Llama-3.1-8B's shape with random weights, for benches of speed and memory.

use std::path::Path;

use half::bf16;
use qlora::config::{Architecture, ModelConfig};
use qlora::kernels::ops::rope::{RopeConfig, RopeScaling};
use qlora::kernels::weight::PlainData;
use qlora::source::{PlainTensor, WeightSource};
use rand::{RngExt, SeedableRng};

/// Weights that are drawn when they are read. Their values do not matter to the speed, only that they are not zeros.
#[derive(Debug)]
pub(crate) struct RandomWeights {
    config: ModelConfig,
    shapes: Vec<(String, Vec<usize>)>,
    normal: Vec<bf16>,
}

impl RandomWeights {
    pub(crate) fn new(config: ModelConfig) -> Self {
        let (hidden, mlp, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let (q, kv) = (hidden, config.num_key_value_heads * config.head_dim);
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
            ("lm_head.weight".to_owned(), vec![vocab, hidden]),
        ];
        for layer in 0..config.num_hidden_layers {
            for (name, shape) in [
                ("input_layernorm", vec![hidden]),
                ("post_attention_layernorm", vec![hidden]),
                ("self_attn.q_proj", vec![q, hidden]),
                ("self_attn.k_proj", vec![kv, hidden]),
                ("self_attn.v_proj", vec![kv, hidden]),
                ("self_attn.o_proj", vec![hidden, q]),
                ("mlp.gate_proj", vec![mlp, hidden]),
                ("mlp.up_proj", vec![mlp, hidden]),
                ("mlp.down_proj", vec![hidden, mlp]),
            ] {
                shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        // The sum of twelve uniform numbers is close enough to a normal one.
        let mut normal = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
        let normal = (0..1 << 20).map(|_| bf16::from_f32(0.02 * normal())).collect();
        Self { config, shapes, normal }
    }
}

impl WeightSource for RandomWeights {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        Path::new("random weights")
    }

    fn file_of(&self, _: &str) -> Option<&Path> {
        None
    }

    fn names(&self) -> Vec<String> {
        self.shapes.iter().map(|(name, _)| name.clone()).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shapes.iter().find(|(other, _)| other == name).map(|(_, shape)| shape.clone())
    }

    fn read(&self, name: &str) -> qlora::core::Result<PlainTensor> {
        let shape = self.shape(name).ok_or_else(|| qlora::core::Error::Invalid(format!("no tensor {name}")))?;
        let len = shape.iter().product();
        let data = match shape.len() {
            1 => vec![bf16::ONE; len],
            _ => {
                let mut data = Vec::with_capacity(len);
                while data.len() < len {
                    data.extend_from_slice(&self.normal[..self.normal.len().min(len - data.len())]);
                }
                data
            }
        };
        Ok(PlainTensor { data: PlainData::Bf16(data), shape })
    }
}

pub(crate) fn llama_8b(layers: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 128_256,
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_hidden_layers: layers,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        rope: RopeConfig {
            theta: 500_000.0,
            scaling: Some(RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            }),
        },
        max_position_embeddings: 131_072,
        sliding_window: vec![None; layers],
        without_rope: Vec::new(),
        scalings: Default::default(),
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        bos_token_id: Some(128_000),
        eos_token_ids: vec![128_001],
    }
}
