//! A model folder that `generate` and `finetune` take: one layer of random weights, the tokenizer of a fixture, a chat template.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use qlora::config::ModelConfig;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// A chat template with the tokens that the tokenizer has.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}{{ bos_token if loop.first else '' }}[{{ m['role'] }}] \
     {% if m['content'] is string %}{{ m['content'] | trim }}{% else %}{{ m['content'] | tojson }}{% endif %}</s>\n\
     {% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}";

/// The `generation_config.json` of a typical chat model.
pub(crate) const GENERATION: &str = r#"{"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "do_sample": true,
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 512, "min_p": 0.0,
    "num_beams": 1, "transformers_version": "5.24.0"}"#;

/// The end tokens of [`GENERATION`], which the model never says: their rows of the tied embedding are zero.
const ENDS: [usize; 2] = [2, 3];

/// Writes the model, for texts of up to `max_position_embeddings` tokens.
pub(crate) fn make(folder: &Path, max_position_embeddings: usize) -> Result<()> {
    fs::create_dir_all(folder)?;
    let hidden_size = 16;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 420, "hidden_size": hidden_size,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": max_position_embeddings, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    });
    fs::write(folder.join("config.json"), config.to_string())?;
    // Tests of other crates of the workspace use this file, too.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|folder| folder.join("tests/fixtures").is_dir());
    let fixture = root.context("no tests/fixtures")?.join("tests/fixtures/tokenizer/llama");
    let read = |name: &str| fs::read(fixture.join(name)).with_context(|| fixture.join(name).display().to_string());
    fs::write(folder.join("tokenizer.json"), read("tokenizer.json")?)?;
    let mut tokenizer: Value = serde_json::from_slice(&read("tokenizer_config.json")?)?;
    tokenizer["chat_template"] = json!(TEMPLATE);
    fs::write(folder.join("tokenizer_config.json"), tokenizer.to_string())?;
    fs::write(folder.join("generation_config.json"), GENERATION)?;

    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut tensors = Vec::new();
    for (name, shape) in ModelConfig::from_json_file(folder.join("config.json"))?.tensor_shapes() {
        let mut values: Vec<f32> = (0..shape.iter().product::<usize>()).map(|_| rng.random_range(-0.5..0.5)).collect();
        if name.contains("embed_tokens") {
            ENDS.iter().for_each(|end| values[end * hidden_size..][..hidden_size].fill(0.0));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect();
        tensors.push((name, shape, bytes));
    }
    let views =
        tensors.iter().map(|(name, shape, bytes)| Ok((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?)));
    let views: Vec<_> = views.collect::<Result<_>>()?;
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None)?)?;
    Ok(())
}
