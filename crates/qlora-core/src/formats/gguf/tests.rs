//! Files written by candle's GGUF writer, and headers put together by hand.

use std::fs::File;

use candle_core::quantized::gguf_file::{self, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use qlora_kernels::ops::rope::RopeScaling;
use qlora_kernels::weight::PlainData;

use super::*;
use crate::config::{Architecture, Scalings};

const HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const HIDDEN: usize = 16;

/// A file under construction: two query heads, one key/value head, one block.
struct Model {
    prefix: &'static str,
    meta: Vec<(String, Meta)>,
    tensors: Vec<(String, Tensor)>,
}

impl Model {
    fn new(prefix: &'static str) -> Self {
        let meta = [
            ("block_count", Meta::U32(1)),
            ("context_length", Meta::U32(64)),
            ("embedding_length", Meta::U32(HIDDEN as u32)),
            ("feed_forward_length", Meta::U32(24)),
            ("attention.head_count", Meta::U32(HEADS as u32)),
            ("attention.head_count_kv", Meta::U32(1)),
            ("attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
            ("rope.freq_base", Meta::F32(5e5)),
        ];
        let mut model = Self { prefix, meta: Vec::new(), tensors: Vec::new() };
        model.meta.push(("general.architecture".to_owned(), Meta::String(prefix.to_owned())));
        for (key, value) in meta {
            model.set(key, value);
        }
        for (name, shape) in [
            ("token_embd.weight", vec![10, HIDDEN]),
            ("output_norm.weight", vec![HIDDEN]),
            ("blk.0.attn_norm.weight", vec![HIDDEN]),
            ("blk.0.attn_q.weight", vec![HEADS * HEAD_DIM, HIDDEN]),
            ("blk.0.attn_k.weight", vec![HEAD_DIM, HIDDEN]),
            ("blk.0.attn_v.weight", vec![HEAD_DIM, HIDDEN]),
            ("blk.0.attn_output.weight", vec![HIDDEN, HEADS * HEAD_DIM]),
            ("blk.0.ffn_norm.weight", vec![HIDDEN]),
            ("blk.0.ffn_gate.weight", vec![24, HIDDEN]),
            ("blk.0.ffn_up.weight", vec![24, HIDDEN]),
            ("blk.0.ffn_down.weight", vec![HIDDEN, 24]),
        ] {
            model.add(name, &shape);
        }
        if prefix == "qwen2" {
            model.add("blk.0.attn_q.bias", &[HEADS * HEAD_DIM]);
            model.add("blk.0.attn_k.bias", &[HEAD_DIM]);
            model.add("blk.0.attn_v.bias", &[HEAD_DIM]);
        }
        if prefix == "qwen3" {
            model.add("blk.0.attn_q_norm.weight", &[HEAD_DIM]);
            model.add("blk.0.attn_k_norm.weight", &[HEAD_DIM]);
        }
        model
    }

    fn set(&mut self, key: &str, value: Meta) -> &mut Self {
        let key = if key.starts_with("general.") || key.starts_with("split.") || key.starts_with("tokenizer.") {
            key.to_owned()
        } else {
            format!("{}.{key}", self.prefix)
        };
        self.meta.retain(|(known, _)| *known != key);
        self.meta.push((key, value));
        self
    }

    /// A tensor of consecutive numbers.
    fn add(&mut self, name: &str, shape: &[usize]) -> &mut Self {
        let count: usize = shape.iter().product();
        let tensor = Tensor::arange(0f32, count as f32, &Device::Cpu).unwrap().reshape(shape).unwrap();
        self.put(name, tensor)
    }

    fn put(&mut self, name: &str, tensor: Tensor) -> &mut Self {
        self.tensors.retain(|(known, _)| known != name);
        self.tensors.push((name.to_owned(), tensor));
        self
    }

    fn open(&self) -> Result<Gguf> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        self.write(&path);
        Gguf::open(path)
    }

    fn write(&self, path: &Path) {
        let tensors: Vec<(&str, QTensor)> = self
            .tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
            .collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let meta: Vec<(&str, &Meta)> = self.meta.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &meta, &tensors).unwrap();
    }

    fn refused(&self) -> String {
        self.open().unwrap_err().to_string()
    }
}

fn scaling(model: &Model) -> Option<RopeScaling> {
    model.open().unwrap().config.rope.scaling
}

#[test]
fn rows_are_permuted_where_llama_cpp_rotates_neighbours() {
    let rows = |prefix: &'static str, name: &str| {
        let tensor = Model::new(prefix).open().unwrap().read(name).unwrap();
        let PlainData::F32(data) = tensor.data else { panic!("not f32") };
        let cols = *tensor.shape.last().unwrap();
        data.chunks(cols).map(|row| row[0] as usize / cols).collect::<Vec<_>>()
    };
    let in_order = |count: usize| (0..count).collect::<Vec<_>>();
    let (q, k, v) = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight");
    let name = |part: &str| format!("model.layers.0.{part}");
    assert_eq!(rows("llama", &name(q)), [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
    assert_eq!(rows("llama", &name(k)), [0, 2, 4, 6, 1, 3, 5, 7]);
    assert_eq!(rows("llama", &name(v)), in_order(8));
    for prefix in ["granite", "smollm3", "mistral3"] {
        assert_eq!(rows(prefix, &name(q)), rows("llama", &name(q)));
        assert_eq!(rows(prefix, &name(k)), rows("llama", &name(k)));
    }
    for prefix in ["qwen2", "qwen3"] {
        assert_eq!(rows(prefix, &name(q)), in_order(16));
        assert_eq!(rows(prefix, &name(k)), in_order(8));
    }
}

#[test]
fn ministral_3_ends_where_its_queries_are_scaled() {
    let mut model = Model::new("mistral3");
    model.set("attention.temperature_scale", Meta::F32(0.25)).set("context_length", Meta::U32(64));
    assert!(model.refused().contains("mistral3.attention.temperature_scale without YaRN"));
    model.set("rope.scaling.type", Meta::String("yarn".to_owned())).set("rope.scaling.factor", Meta::F32(4.0));
    model.set("rope.scaling.original_context_length", Meta::U32(16));
    let factor = |model: &Model| match model.open().unwrap().config.rope.scaling {
        Some(RopeScaling::Yarn { attention_factor, .. }) => attention_factor,
        other => panic!("{other:?}"),
    };
    assert_eq!(factor(&model), None);
    model.set("rope.scaling.yarn_log_multiplier", Meta::F32(1.0));
    assert_eq!(factor(&model), Some(1.0));
    model.set("rope.scaling.yarn_log_multiplier", Meta::F32(0.5));
    let expected = (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0);
    assert!((factor(&model).unwrap() - expected).abs() < 1e-12);
    let config = model.open().unwrap().config;
    assert_eq!((config.max_position_embeddings, config.scalings.llama_4_scaling_beta), (16, 0.25));
    model.set("attention.temperature_scale", Meta::F32(0.0));
    assert_eq!(model.open().unwrap().config.max_position_embeddings, 64);
}

#[test]
fn architectures_have_their_parts() {
    let llama = Model::new("llama").open().unwrap();
    assert!(llama.config.tie_word_embeddings && !llama.config.qkv_bias && !llama.config.qk_norm);
    assert_eq!(
        (llama.config.architecture, llama.config.head_dim, llama.config.vocab_size),
        (Architecture::Llama, 8, 10)
    );
    let untied = Model::new("llama").add("output.weight", &[10, HIDDEN]).open().unwrap();
    assert!(!untied.config.tie_word_embeddings);
    assert_eq!(untied.shape("lm_head.weight"), Some(vec![10, HIDDEN]));
    let qwen2 = Model::new("qwen2").open().unwrap();
    assert!(qwen2.config.qkv_bias && !qwen2.config.o_bias);
    let qwen3 = Model::new("qwen3").open().unwrap();
    assert!(qwen3.config.qk_norm && !qwen3.config.qkv_bias);
    assert_eq!(qwen3.shape("model.layers.0.self_attn.q_norm.weight"), Some(vec![HEAD_DIM]));
    let mut granite = Model::new("granite");
    assert_eq!(granite.open().unwrap().config.scalings, Scalings::default());
    granite.set("attention.scale", Meta::F32(0.25)).set("embedding_scale", Meta::F32(12.0));
    granite.set("residual_scale", Meta::F32(0.5)).set("logit_scale", Meta::F32(8.0));
    let Scalings { embedding, attention, residual, logits, .. } = granite.open().unwrap().config.scalings;
    assert_eq!((embedding, attention, residual, logits), (12.0, Some(0.25), 0.5, 8.0));
    let smollm3 = Model::new("smollm3").set("block_count", Meta::U32(1)).open().unwrap();
    assert_eq!(smollm3.config.without_rope, [false]);
    assert!(smollm3.config.tie_word_embeddings);
    let window = Model::new("llama").set("attention.sliding_window", Meta::U32(7)).open().unwrap();
    assert_eq!(window.config.sliding_window, [Some(7)]);

    let mut ends = Model::new("llama");
    ends.set("tokenizer.ggml.eos_token_id", Meta::U32(3)).set("tokenizer.ggml.eot_token_id", Meta::U32(5));
    ends.set("tokenizer.ggml.eom_token_id", Meta::U32(99)).set("tokenizer.ggml.bos_token_id", Meta::I32(1));
    let config = ends.open().unwrap().config;
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![3, 5]));
}

#[test]
fn rotary_options_are_read() {
    let with = |pairs: &[(&str, Meta)]| {
        let mut model = Model::new("llama");
        for (key, value) in pairs {
            model.set(key, value.clone());
        }
        model
    };
    let text = |text: &str| Meta::String(text.to_owned());
    assert_eq!(scaling(&with(&[])), None);
    assert_eq!(scaling(&with(&[("rope.scaling.type", text("none")), ("rope.scaling.factor", Meta::F32(4.0))])), None);
    let linear = Some(RopeScaling::Linear { factor: 4.0 });
    assert_eq!(
        scaling(&with(&[("rope.scaling.type", text("linear")), ("rope.scaling.factor", Meta::F32(4.0))])),
        linear
    );
    assert_eq!(scaling(&with(&[("rope.scale_linear", Meta::F32(4.0))])), linear);
    let yarn = with(&[
        ("rope.scaling.type", text("yarn")),
        ("rope.scaling.factor", Meta::F32(4.0)),
        ("rope.scaling.original_context_length", Meta::U32(16)),
    ]);
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 16,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        truncate: true,
    };
    assert_eq!(scaling(&yarn), Some(expected));
    let longrope = with(&[("rope.scaling.type", text("longrope"))]);
    assert!(longrope.refused().contains("rope scaling \"longrope\""));
    assert!(with(&[("rope.freq_base", Meta::F32(f32::NAN))]).refused().contains("llama.rope.freq_base"));
    assert!(with(&[("rope.dimension_count", Meta::U32(4))]).refused().contains("rotary embeddings of another width"));
}

#[test]
fn llama3_scaling_is_recognised_by_its_divisors() {
    // The divisors as llama.cpp's converter computes them from low 1, high 4, original length 8192.
    let divisors = |factor: f64, low: f64| {
        let divisor = |i: usize| {
            let wavelength = std::f64::consts::TAU * 5e5f64.powf(2.0 * i as f64 / HEAD_DIM as f64);
            if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 / low {
                factor
            } else {
                let smooth = (8192.0 / wavelength - low) / (4.0 - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        };
        let values: Vec<f32> = (0..HEAD_DIM / 2).map(|i| divisor(i) as f32).collect();
        Tensor::new(values, &Device::Cpu).unwrap()
    };
    let mut model = Model::new("llama");
    model.put("rope_freqs.weight", divisors(32.0, 1.0));
    let expected = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(scaling(&model), Some(expected));
    assert!(!model.open().unwrap().names().iter().any(|name| name.contains("rope")));
    model.put("rope_freqs.weight", Tensor::ones(4, candle_core::DType::F32, &Device::Cpu).unwrap());
    assert_eq!(scaling(&model), None);
    model.put("rope_freqs.weight", Tensor::new(&[1f32, 2.0, 3.0, 4.0], &Device::Cpu).unwrap());
    assert!(model.refused().contains("other divisors"));
    model.put("rope_freqs.weight", Tensor::ones(3, candle_core::DType::F32, &Device::Cpu).unwrap());
    assert!(model.refused().contains("rope_freqs.weight"));
    model.put("rope_freqs.weight", divisors(32.0, 1.0)).set("rope.scale_linear", Meta::F32(2.0));
    assert!(model.refused().contains("together with rope scaling"));
}

#[test]
fn the_parts_of_a_split_model_are_one_model() {
    let whole = Model::new("llama");
    let folder = tempfile::tempdir().unwrap();
    let path = |number: usize| folder.path().join(format!("m-{number:05}-of-00003.gguf"));
    // As llama-gguf-split does it: the first part has the metadata (and may have no tensor).
    let write = |number: usize, count: u16, take: &dyn Fn(usize) -> bool| {
        let mut part =
            if number == 1 { Model::new("llama") } else { Model { meta: Vec::new(), ..Model::new("llama") } };
        part.set("split.no", Meta::U16(number as u16 - 1)).set("split.count", Meta::U16(count));
        let mut index = 0;
        part.tensors.retain(|_| {
            index += 1;
            take(index - 1)
        });
        part.write(&path(number));
    };
    let shares: [&dyn Fn(usize) -> bool; 3] = [&|_| false, &|i| i < 5, &|i| i >= 5];
    (0..3).for_each(|i| write(i + 1, 3, shares[i]));
    let (split, one) = (Gguf::open(path(1)).unwrap(), whole.open().unwrap());
    assert_eq!((split.config(), split.names()), (one.config(), one.names()));
    for name in one.names() {
        assert_eq!(split.read(&name).unwrap().into_f32(), one.read(&name).unwrap().into_f32(), "{name}");
    }
    assert_eq!(split.file_of("model.norm.weight").unwrap(), path(2));
    let refused = |what: &[&str]| {
        let error = Gguf::open(path(1)).unwrap_err().to_string();
        assert!(what.iter().all(|what| error.contains(what)), "{what:?}: {error}");
    };
    let error = Gguf::open(path(2)).unwrap_err().to_string();
    assert!(error.contains("give the first, m-00001-of-00003.gguf"), "{error}");
    write(3, 3, &|i| i >= 4);
    refused(&["is in two parts"]);
    write(3, 4, shares[2]);
    refused(&["is not part 3 of 3"]);
    write(3, 3, &|i| i > 5);
    refused(&["missing"]);
    std::fs::remove_file(path(3)).unwrap();
    refused(&["m-00003-of-00003.gguf"]);
}

#[test]
fn what_is_not_supported_is_named() {
    for prefix in ["gemma2", "mistral"] {
        assert!(Model::new(prefix).refused().contains(&format!("architecture \"{prefix}\"")));
    }
    let refused = |key: &str, value: Meta| Model::new("llama").set(key, value).refused();
    assert!(refused("expert_count", Meta::U32(8)).contains("llama.expert_count"));
    assert!(refused("attn_logit_softcapping", Meta::F32(50.0)).contains("llama.attn_logit_softcapping"));
    assert!(refused("split.count", Meta::U16(3)).contains("llama-gguf-split --merge"));
    assert!(refused("attention.value_length", Meta::U32(4)).contains("value heads"));
    assert!(refused("attention.head_count", Meta::U32(0)).contains("head_count 0"));
    assert!(
        refused("attention.head_count_kv", Meta::Array(vec![Meta::U32(1)]))
            .contains("head_count_kv is not a whole number")
    );
    assert!(refused("block_count", Meta::U32(u32::MAX)).contains("llama.block_count"));
    assert!(refused("context_length", Meta::U32(0)).contains("max_position_embeddings is 0"));
    Model::new("llama").set("expert_count", Meta::U32(0)).open().unwrap();
    let error = Model::new("llama").add("blk.0.ffn_gate_inp.weight", &[2, HIDDEN]).refused();
    assert!(error.contains("blk.0.ffn_gate_inp.weight") && error.contains("model.gguf"), "{error}");
    let error = Model::new("llama").add("blk.0.attn_k.weight", &[4, HIDDEN]).refused();
    assert!(
        error.contains("self_attn.k_proj.weight") && error.contains("[4, 16]") && error.contains("[8, 16]"),
        "{error}"
    );
    let error = Model::new("llama").add("blk.1.attn_k.weight", &[8, HIDDEN]).refused();
    assert!(error.contains("model.layers.1.self_attn.k_proj.weight"), "{error}");
}

/// A header of one metadata value and one tensor.
struct Raw {
    version: u32,
    tensors: u64,
    values: u64,
    value: Vec<u8>,
    tensor: Vec<u8>,
    data: usize,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn entry(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [text(key), kind.to_le_bytes().to_vec(), value.to_vec()].concat()
}

fn tensor(name: &str, sizes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = [text(name), (sizes.len() as u32).to_le_bytes().to_vec()].concat();
    sizes.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

impl Default for Raw {
    fn default() -> Self {
        let value = entry("k", 4, &7u32.to_le_bytes());
        Self { version: 3, tensors: 1, values: 1, value, tensor: tensor("t", &[8], 0, 0), data: 32 }
    }
}

impl Raw {
    fn parse(&self, alignment: usize) -> std::result::Result<Header, String> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.tensors.to_le_bytes());
        file.extend(self.values.to_le_bytes());
        file.extend(&self.value);
        file.extend(&self.tensor);
        file.resize(file.len().next_multiple_of(alignment) + self.data, 0);
        Header::parse(&file)
    }
}

#[test]
fn headers_are_checked_against_the_file() {
    let header = Raw::default().parse(32).unwrap();
    assert_eq!(header.tensors[0].bytes.len(), 32);
    let wide = entry("general.alignment", 4, &256u32.to_le_bytes());
    assert_eq!(Raw { value: wide, ..Raw::default() }.parse(256).unwrap().tensors[0].bytes.start, 256);

    let array = |kind: u32, len: u64, rest: &[u8]| [&kind.to_le_bytes()[..], &len.to_le_bytes(), rest].concat();
    let nested = (0..9).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
    let alignment = |value: u32| entry("general.alignment", 4, &value.to_le_bytes());
    let long = [&u64::MAX.to_le_bytes()[..], b"x"].concat();
    let values = [
        (alignment(0), "general.alignment is 0"),
        (alignment(33), "general.alignment is 33"),
        (alignment(1 << 31), "general.alignment"),
        (entry("k", 99, &[]), "type 99"),
        (entry("k", 8, &long), "a string of 18446744073709551615 bytes"),
        (entry("k", 9, &array(0, u64::MAX, &[])), "does not fit"),
        (entry("k", 9, &array(12, 30, &[0; 8])), "ends at byte"),
        (entry("k", 9, &array(8, 9, &[0xff; 16])), "a string of"),
        (entry("k", 9, &nested), "array of type 9"),
        (entry("k", 9, &array(77, 0, &[])), "array of type 77"),
        (long, "metadata key"),
    ];
    for (value, message) in values {
        let error = Raw { value, ..Raw::default() }.parse(32).unwrap_err();
        assert!(error.contains(message), "{message}: {error}");
    }
    let tensors = [
        (tensor("t", &[], 0, 0), "0 dimensions"),
        (tensor("t", &[1; 5], 0, 0), "5 dimensions"),
        (tensor("t", &[0], 0, 0), "is empty"),
        (tensor("t", &[1 << 40, 1 << 40], 0, 0), "too large"),
        (tensor("t", &[1 << 62], 0, 0), "too large"),
        (tensor("t", &[9], 0, 0), "reach past the end"),
        (tensor("t", &[8], 0, 32), "reach past the end"),
        (tensor("t", &[8], 0, u64::MAX - 31), "reach past the end"),
        (tensor("t", &[8], 0, 4), "not a multiple of the alignment"),
        (tensor("t", &[8], 2, 0), "whole blocks of 32"),
        (tensor("t", &[8], 4, 0), "ggml type 4"),
    ];
    for (tensor, message) in tensors {
        let error = Raw { tensor, ..Raw::default() }.parse(32).unwrap_err();
        assert!(error.contains(message) && error.contains("tensor t"), "{message}: {error}");
    }
    let twice = |a: Vec<u8>, b: Vec<u8>| [a, b].concat();
    let value = entry("k", 4, &[0; 4]);
    let error = Raw { values: 2, value: twice(value.clone(), value), ..Raw::default() }.parse(32).unwrap_err();
    assert!(error.contains("metadata k is there twice"), "{error}");
    let pair = |name: &str, offset| Raw {
        tensors: 2,
        tensor: twice(tensor("t", &[8], 0, 0), tensor(name, &[8], 0, offset)),
        data: 64,
        ..Raw::default()
    };
    pair("u", 32).parse(32).unwrap();
    assert!(pair("t", 32).parse(32).unwrap_err().contains("tensor t is there twice"));
    assert!(pair("u", 0).parse(32).unwrap_err().contains("tensors t and u overlap"));
    assert!(Raw { tensors: u64::MAX, ..Raw::default() }.parse(32).unwrap_err().contains("do not fit"));
    assert!(Raw { values: 1 << 40, ..Raw::default() }.parse(32).unwrap_err().contains("do not fit"));
    assert!(Raw { version: 1, ..Raw::default() }.parse(32).unwrap_err().contains("version 1"));
    assert!(Raw { version: 3u32.swap_bytes(), ..Raw::default() }.parse(32).unwrap_err().contains("big-endian"));
    assert!(Header::parse(b"GGML").unwrap_err().contains("not a GGUF file"));
    assert!(Header::parse(b"GG").unwrap_err().contains("ends at byte 2"));
}

#[test]
fn types_that_cannot_be_decoded_are_named_with_their_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut model = Model::new("llama");
    model.tensors.retain(|(name, _)| name != "blk.0.ffn_up.weight");
    let tensors: Vec<(&str, QTensor)> = model
        .tensors
        .iter()
        .map(|(name, tensor)| (name.as_str(), QTensor::quantize(tensor, GgmlDType::F32).unwrap()))
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let meta: Vec<(&str, &Meta)> = model.meta.iter().map(|(key, value)| (key.as_str(), value)).collect();
    gguf_file::write(&mut File::create(&path).unwrap(), &meta, &tensors).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    // The type is the number before the offset, at the end of the description.
    let name = b"blk.0.ffn_gate.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 2 * 8;
    bytes[at..at + 4].copy_from_slice(&26u32.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = Gguf::open(&path).unwrap_err().to_string();
    assert!(error.contains("blk.0.ffn_gate.weight") && error.contains("type I32") && error.contains("Q4_K"), "{error}");
}
