//! Checkpoints that tests take apart and put together again, and what models compute of them.
#![allow(dead_code, reason = "every test program uses some of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qlora::formats::HfDirectory;
use qlora::kernels::SequenceLayout;
use qlora::model::{AdapterChoice, CausalLm, LoadOptions};
use qlora::source::WeightSource;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A tensor as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Raw {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) type Tensors = BTreeMap<String, Raw>;

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub(crate) fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let raw = |t: TensorView| Raw { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() };
    file.tensors().into_iter().map(|(name, t)| (name, raw(t))).collect()
}

pub(crate) fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A model in one file, and its configuration.
#[derive(Clone)]
pub(crate) struct Checkpoint {
    pub(crate) config: Value,
    pub(crate) tensors: Tensors,
}

impl Checkpoint {
    pub(crate) fn read(folder: &Path) -> Self {
        let config = serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
        Self { config, tensors: read_tensors(&folder.join("model.safetensors")) }
    }

    pub(crate) fn write(&self, folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        write_tensors(&folder.join("model.safetensors"), &self.tensors);
        fs::write(folder.join("config.json"), self.config.to_string()).unwrap();
    }

    /// The folder that holds it, while the value lives.
    pub(crate) fn folder(&self) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        self.write(folder.path());
        folder
    }

    pub(crate) fn open(&self) -> qlora::core::Result<HfDirectory> {
        HfDirectory::open(self.folder().path())
    }
}

pub(crate) fn floats(path: &Path, name: &str) -> Vec<f32> {
    let tensors = read_tensors(path);
    tensors[name].bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
}

/// Token ids, which are stored in 4 or 8 bytes.
pub(crate) fn ids(path: &Path, name: &str) -> Vec<u32> {
    let raw = &read_tensors(path)[name];
    let width = raw.bytes.len() / raw.shape.iter().product::<usize>();
    raw.bytes.chunks(width).map(|id| u32::from_le_bytes([id[0], id[1], id[2], id[3]])).collect()
}

pub(crate) fn logits(model: &CausalLm, tokens: &[u32]) -> Vec<f32> {
    let logits = model.logits(tokens, &SequenceLayout::from_lengths(&[tokens.len()]), AdapterChoice::Active).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

pub(crate) fn logits_of(source: &dyn WeightSource, tokens: &[u32]) -> Vec<f32> {
    logits(&CausalLm::load(source, LoadOptions::default()).unwrap(), tokens)
}

/// The largest difference of two models' logits.
pub(crate) fn largest(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter().zip(expected).fold(0f32, |max, (a, b)| if (a - b).is_nan() { f32::NAN } else { max.max((a - b).abs()) })
}

/// A `tokenizer.json` of `count` tokens (at most 150): `<unk>`, `<s>`, `</s>`, and characters from `a` on.
pub(crate) fn tokenizer_json(count: usize) -> String {
    let token = |id: usize| match id {
        0 => "<unk>".to_owned(),
        1 => "<s>".to_owned(),
        2 => "</s>".to_owned(),
        3 => "ab".to_owned(),
        id => char::from(b'a' + (id - 4) as u8).to_string(),
    };
    let vocab: serde_json::Map<String, Value> = (0..count).map(|id| (token(id), id.into())).collect();
    let special = |id: usize| {
        serde_json::json!({"id": id, "content": token(id), "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    serde_json::json!({"version": "1.0", "added_tokens": (0..3).map(special).collect::<Vec<_>>(), "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]}})
    .to_string()
}

/// Puts a tokenizer into a folder.
pub(crate) fn write_tokenizer(folder: &Path, count: usize) {
    fs::write(folder.join("tokenizer.json"), tokenizer_json(count)).unwrap();
    fs::write(folder.join("tokenizer_config.json"), r#"{"bos_token": "<s>", "eos_token": "</s>"}"#).unwrap();
}
