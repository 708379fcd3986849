//! A model folder as from the hub, small enough to train in milliseconds: random weights, a tokenizer of bytes, a ChatML template.
#![allow(dead_code)]

#[path = "example.rs"]
mod built;

use std::fs;
use std::path::Path;

#[allow(unused_imports, reason = "not every test runs the examples")]
pub(crate) use built::example;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

/// Writes every message between `<|im_start|>` and `<|im_end|>`.
pub(crate) const CHATML: &str = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}\
    {%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}";

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const BYTES: usize = 256;
const VOCABULARY: usize = BYTES + SPECIAL.len();
const HIDDEN: usize = 32;
const MLP: usize = 48;
const LAYERS: usize = 2;

/// Writes the folder; the same seed gives the same model.
pub(crate) fn write_model(folder: &Path, seed: u64, template: &str) {
    write_model_of(folder, seed, template, LAYERS);
}

/// [`write_model`] with another number of layers.
pub(crate) fn write_model_of(folder: &Path, seed: u64, template: &str, layers: usize) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "torch_dtype": "float32", "eos_token_id": BYTES + 2,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let options = json!({ "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[2], "clean_up_tokenization_spaces": false });
    fs::write(folder.join("tokenizer_config.json"), options.to_string()).unwrap();
    fs::write(folder.join("chat_template.jinja"), template).unwrap();
    fs::write(folder.join("model.safetensors"), weights(seed, layers)).unwrap();
}

fn weights(seed: u64, layers: usize) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
    ];
    for layer in 0..layers {
        let mut add =
            |name: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        add("input_layernorm", &[HIDDEN]);
        add("post_attention_layernorm", &[HIDDEN]);
        for (name, rows) in [("q", 32), ("k", 16), ("v", 16), ("o", 32)] {
            add(&format!("self_attn.{name}_proj"), &[rows, HIDDEN]);
        }
        add("mlp.gate_proj", &[MLP, HIDDEN]);
        add("mlp.up_proj", &[MLP, HIDDEN]);
        add("mlp.down_proj", &[HIDDEN, MLP]);
    }
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
        .into_iter()
        .map(|(name, shape)| {
            let center = if shape.len() == 1 { 1.0 } else { 0.0 };
            let count = shape.iter().product::<usize>();
            let bytes = (0..count).flat_map(|_| (center + rng.random_range(-0.3f32..0.3)).to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views =
        tensors.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

/// A byte-level BPE without merges: a token a byte.
fn tokenizer() -> Value {
    // The characters that stand for bytes: printable ones for themselves, the others from 256 on.
    let printable = |byte: usize| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut others = (256u32..).map(|code| char::from_u32(code).unwrap());
    let letter = |byte: usize| if printable(byte) { byte as u8 as char } else { others.next().unwrap() };
    let vocabulary: serde_json::Map<String, Value> =
        (0..BYTES).map(letter).enumerate().map(|(id, letter)| (letter.to_string(), id.into())).collect();
    let special = SPECIAL.iter().enumerate().map(|(i, content)| {
        json!({ "id": BYTES + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true })
    });
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": special.collect::<Vec<_>>(), "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": [] },
    })
}

/// A JSONL file of one question with these answers.
pub(crate) fn write_rows(path: &Path, answers: &[&str]) {
    let row = |answer: &&str| {
        let row =
            json!({ "messages": [{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": answer }] });
        format!("{row}\n")
    };
    fs::write(path, answers.iter().map(row).collect::<String>()).unwrap();
}

/// The configuration that the cases have: two steps of one document each, a checkpoint at the end. Paths are in `folder`.
pub(crate) fn config(folder: &Path) -> qlora::trainer::TrainConfig {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let text = format!(
        "[model]\nmodel_name_or_path = {:?}\nload_in_4bit = false\ndevice = \"cpu\"\n[lora]\nr = 4\nlora_alpha = 8\n\
         [data]\ntrain_file = {:?}\nmax_length = 512\n[training]\noutput_dir = {:?}\nmax_steps = 2\n\
         per_device_train_batch_size = 1\ngradient_accumulation_steps = 1\nsave_steps = 0\n",
        path("model"),
        path("train.jsonl"),
        path("out")
    );
    qlora::trainer::TrainConfig::from_toml_str(&text).unwrap()
}
