//! The GGUF files of the set that `damage_set` describes.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::Path;

use crate::common::fixtures;
use crate::common::tally::{Tally, cuts};
use candle_core::quantized::gguf_file::{self, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use qlora_core::formats::Gguf;
use qlora_core::model::{CausalLm, LoadOptions};

/// A GGUF file taken apart.
struct Parts {
    meta: BTreeMap<String, Meta>,
    tensors: BTreeMap<String, Tensor>,
}

impl Parts {
    fn read(path: &Path) -> Self {
        let mut file = File::open(path).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        let tensor = |name: &String| {
            let tensor = content.tensor(&mut File::open(path).unwrap(), name, &Device::Cpu).unwrap();
            tensor.dequantize(&Device::Cpu).unwrap()
        };
        let tensors = content.tensor_infos.keys().map(|name| (name.clone(), tensor(name))).collect();
        Self { meta: content.metadata.into_iter().collect(), tensors }
    }

    fn write(&self, path: &Path) {
        let tensors: HashMap<&str, QTensor> = self
            .tensors
            .iter()
            .map(|(name, t)| (name.as_str(), QTensor::quantize(t, GgmlDType::F32).unwrap()))
            .collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, t)| (*name, t)).collect();
        let meta: Vec<(&str, &Meta)> = self.meta.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &meta, &tensors).unwrap();
    }
}

fn load_gguf(path: &Path) -> Result<(), String> {
    let source = Gguf::open(path).map_err(|error| error.to_string())?;
    CausalLm::load(&source, LoadOptions::default()).map(drop).map_err(|error| error.to_string())
}

#[test]
fn gguf_files() {
    let mut tally = Tally::default();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let original = fixtures().join("loading/llama.gguf");
    let mut parts = Parts::read(&original);
    parts.write(&path);
    load_gguf(&path).unwrap();
    let file = ["model.gguf"];
    for name in parts.tensors.keys().cloned().collect::<Vec<_>>() {
        // The names that errors use are Hugging Face's or the file's.
        let names = [name.as_str(), "model.gguf", "model.", "lm_head"];
        let good = parts.tensors.remove(&name).unwrap();
        parts.write(&path);
        // Without a head of its own the model's is its embedding.
        if name != "output.weight" {
            tally.refused("missing key", &names, &name, || load_gguf(&path));
        }
        let count = good.elem_count();
        let values = good.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for shape in [vec![count / 2, 2], vec![1, count], vec![count, 1, 1]] {
            parts.tensors.insert(name.clone(), Tensor::from_vec(values.clone(), shape, &Device::Cpu).unwrap());
            parts.write(&path);
            tally.refused("wrong shape", &names, &name, || load_gguf(&path));
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = values.clone();
            values[count / 2] = bad;
            parts.tensors.insert(name.clone(), Tensor::from_vec(values, good.dims(), &Device::Cpu).unwrap());
            parts.write(&path);
            tally.refused("NaN", &names, &name, || load_gguf(&path));
        }
        parts.tensors.insert(name.clone(), good);
        // The type is the number before the offset, at the end of the description: integers, and types there are not.
        parts.write(&path);
        let whole = fs::read(&path).unwrap();
        let described = [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
        let at = whole.windows(described.len()).position(|window| window == described).unwrap() + described.len();
        let dims = u32::from_le_bytes(whole[at..at + 4].try_into().unwrap()) as usize;
        for kind in [24u32, 26, 28, 4, 99, u32::MAX] {
            let mut damaged = whole.clone();
            damaged[at + 4 + 8 * dims..][..4].copy_from_slice(&kind.to_le_bytes());
            fs::write(&path, damaged).unwrap();
            tally.refused("wrong dtype", &names[..2], &format!("{name}: {kind}"), || load_gguf(&path));
        }
        // A size and an offset beyond the file.
        for (place, value) in
            [(at + 4, u64::MAX), (at + 4, 1 << 62), (at + 8 + 8 * dims, u64::MAX - 31), (at + 8 + 8 * dims, 1 << 40)]
        {
            let mut damaged = whole.clone();
            damaged[place..place + 8].copy_from_slice(&value.to_le_bytes());
            fs::write(&path, damaged).unwrap();
            tally.refused("hostile size", &names[..2], &format!("{name}: {value}"), || load_gguf(&path));
        }
    }
    for extra in ["blk.2.attn_q.weight", "blk.0.attn_q.lora", "x", "../x", "blk.0.ffn_gate_inp.weight"] {
        parts.tensors.insert(extra.to_owned(), Tensor::zeros(8, candle_core::DType::F32, &Device::Cpu).unwrap());
        parts.write(&path);
        tally.refused("extra key", &[extra, "model.layers.2"], extra, || load_gguf(&path));
        parts.tensors.remove(extra);
    }
    let needed = [
        "general.architecture",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
    ];
    for key in needed {
        let good = parts.meta.remove(key).unwrap_or_else(|| panic!("{key} is not in {:?}", parts.meta.keys()));
        parts.write(&path);
        tally.refused("missing key", &file, key, || load_gguf(&path));
        let short = key.split_once('.').unwrap().1;
        for wrong in
            [Meta::String("x".to_owned()), Meta::Array(vec![Meta::U32(1)]), Meta::F32(f32::NAN), Meta::Bool(true)]
        {
            // A name that no architecture has, or a number of another type.
            parts.meta.insert(key.to_owned(), wrong.clone());
            parts.write(&path);
            tally.refused("wrong dtype", &["model.gguf", short], &format!("{key} {wrong:?}"), || load_gguf(&path));
        }
        for hostile in [Meta::U64(u64::MAX), Meta::U64(1 << 40), Meta::U32(u32::MAX), Meta::I64(-1), Meta::U32(0)] {
            parts.meta.insert(key.to_owned(), hostile.clone());
            parts.write(&path);
            tally.refused("hostile size", &["model.gguf", short, "model."], &format!("{key} {hostile:?}"), || {
                load_gguf(&path)
            });
        }
        parts.meta.insert(key.to_owned(), good);
    }
    let whole = fs::read(&original).unwrap();
    for length in cuts(whole.len()) {
        fs::write(&path, &whole[..length]).unwrap();
        tally.refused("truncated", &file, &format!("{length}"), || load_gguf(&path));
    }
    // Counts of tensors and of metadata, at bytes 8 and 16.
    for place in [8, 16] {
        for value in [u64::MAX, 1 << 62, 1 << 40, 1 << 32, 1 << 20] {
            let mut damaged = whole.clone();
            damaged[place..place + 8].copy_from_slice(&value.to_le_bytes());
            fs::write(&path, damaged).unwrap();
            tally.refused("hostile size", &file, &format!("{value} at {place}"), || load_gguf(&path));
        }
    }
    tally.check(
        "GGUF files",
        &[
            ("NaN", 87),
            ("extra key", 5),
            ("hostile size", 156),
            ("missing key", 34),
            ("truncated", 17),
            ("wrong dtype", 198),
            ("wrong shape", 87),
        ],
    );
}
