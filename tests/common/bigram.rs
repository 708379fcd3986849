//! Model folders whose greedy next token depends on the last token only, for tests of what stands around a model: its files.

use std::path::Path;

use qlora::tokenizer::Tokenizer;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const HIDDEN: usize = 64;
const MLP: usize = 128;
const LAYERS: usize = 2;

/// A plain ChatML template.
pub(crate) const CHATML: &str = "{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}";

/// The model's transitions after a new line: "Hi", the token `end`, and, where that ends nothing, "OopsOops...".
pub(crate) fn chain(end: &str) -> Vec<(&str, &str)> {
    vec![("\u{10a}", "H"), ("H", "i"), ("i", end), (end, "O"), ("O", "o"), ("o", "p"), ("p", "s"), ("s", "O")]
}

/// The files of a model. The tokenizer is the fixture's, with its four special tokens renamed.
pub(crate) struct Files<'a> {
    pub(crate) specials: [&'a str; 4],
    pub(crate) tokenizer_config: Value,
    pub(crate) template: Option<&'a str>,
    pub(crate) config: Value,
    pub(crate) generation: Option<Value>,
    pub(crate) chain: Vec<(&'a str, &'a str)>,
}

impl Default for Files<'_> {
    fn default() -> Self {
        Self {
            specials: ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
            tokenizer_config: json!({"eos_token": "<|im_end|>"}),
            template: Some(CHATML),
            config: json!({"eos_token_id": 2}),
            generation: None,
            chain: chain("<|im_end|>"),
        }
    }
}

impl Files<'_> {
    pub(crate) fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        let put = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
        put("tokenizer.json", &self.tokenizer());
        put("tokenizer_config.json", &self.tokenizer_config.to_string());
        if let Some(template) = self.template {
            put("chat_template.jinja", template);
        }
        if let Some(generation) = &self.generation {
            put("generation_config.json", &generation.to_string());
        }
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": tokenizer.vocab_size(),
            "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu", "torch_dtype": "float32",
        });
        config.as_object_mut().unwrap().extend(self.config.as_object().unwrap().clone());
        put("config.json", &config.to_string());
        self.write_weights(folder, &tokenizer);
    }

    fn tokenizer(&self) -> String {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cases/36-quantize-loses-roles/tokenizer.json");
        let mut text = std::fs::read_to_string(path).unwrap();
        let own = Files::default().specials;
        // By way of names that are no other's.
        for (index, token) in own.iter().enumerate() {
            text = text.replace(&format!("\"{token}\""), &format!("\"<{index}>\""));
        }
        for (index, token) in self.specials.iter().enumerate() {
            text = text.replace(&format!("\"<{index}>\""), &format!("\"{token}\""));
        }
        text
    }

    /// The blocks add nothing to the residual stream, so neither quantizing them nor an untrained adapter changes anything.
    fn write_weights(&self, folder: &Path, tokenizer: &Tokenizer) {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let vocab = tokenizer.vocab_size();
        let mut table: Vec<Vec<f32>> = Vec::new();
        for _ in 0..vocab {
            let row: Vec<f32> = (0..HIDDEN).map(|_| rng.random_range(-1.0..1.0)).collect();
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            table.push(row.iter().map(|x| x / norm).collect());
        }
        let id = |token: &str| tokenizer.token_to_id(token).unwrap_or_else(|| panic!("{token:?} is no token")) as usize;
        let mut head = vec![vec![0f32; HIDDEN]; vocab];
        let next: std::collections::HashMap<usize, usize> =
            self.chain.iter().map(|(from, to)| (id(from), id(to))).collect();
        let other = id(".");
        for (token, row) in table.iter().enumerate() {
            let (to, weight) = next.get(&token).map_or((other, 0.05), |to| (*to, 1.0));
            head[to].iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
        }
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        for (from, to) in &next {
            let logits: Vec<f32> = head.iter().map(|row| dot(row, &table[*from])).collect();
            let best = (0..vocab).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
            assert_eq!(best, *to, "the model says another token after {from}");
        }

        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = vec![
            ("model.embed_tokens.weight".into(), vec![vocab, HIDDEN], table.concat()),
            ("lm_head.weight".into(), vec![vocab, HIDDEN], head.concat()),
            ("model.norm.weight".into(), vec![HIDDEN], vec![1.0; HIDDEN]),
        ];
        for layer in 0..LAYERS {
            let mut add = |name: &str, shape: &[usize], value: Option<f32>| {
                let len: usize = shape.iter().product();
                let data = (0..len).map(|_| value.unwrap_or_else(|| rng.random_range(-0.2..0.2))).collect();
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec(), data));
            };
            add("input_layernorm", &[HIDDEN], Some(1.0));
            add("post_attention_layernorm", &[HIDDEN], Some(1.0));
            add("self_attn.q_proj", &[64, HIDDEN], None);
            add("self_attn.k_proj", &[32, HIDDEN], None);
            add("self_attn.v_proj", &[32, HIDDEN], None);
            add("self_attn.o_proj", &[HIDDEN, 64], Some(0.0));
            add("mlp.gate_proj", &[MLP, HIDDEN], None);
            add("mlp.up_proj", &[MLP, HIDDEN], None);
            add("mlp.down_proj", &[HIDDEN, MLP], Some(0.0));
        }
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(.., data)| data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
            (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
        });
        let file = safetensors::serialize(views, None).unwrap();
        std::fs::write(folder.join("model.safetensors"), file).unwrap();
    }
}
