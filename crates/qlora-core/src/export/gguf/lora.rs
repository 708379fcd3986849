//! An adapter alone as a GGUF file, which llama.cpp puts over a base (`--lora`) and Ollama's Modelfile names (`ADAPTER`).
//!
//! As `convert_lora_to_gguf.py` writes it: `general.type` is `adapter`, `adapter.type` is `lora`, and for every module NAME the tensors
//! `NAME.weight.lora_a` `[r, in]` and `NAME.weight.lora_b` `[out, r]`. llama.cpp multiplies by `adapter.lora.alpha / r`; where an adapter
//! scales otherwise (rsLoRA, ranks or alphas of their own), the rest is in B. Rows of B are interleaved where the base's are.
//! The embedding's A is `[vocabulary, r]`, from which rows are taken.

use std::path::Path;

use qlora_kernels::weight::PlainData;

use super::kind::{GgufType, TensorType};
use super::{WrittenGguf, encode_piece, full};
use crate::adapter::PeftAdapter;
use crate::adapter::kinds::{EMBEDDING, HEAD};
use crate::atomic::PendingFile;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::formats::gguf::metadata::{ALIGNMENT, Metadata};
use crate::formats::gguf::rows;

struct Factor {
    name: String,
    shape: [usize; 2],
    data: PlainData,
}

/// Writes an adapter of a model with this configuration to the file `out`, replacing what was there. `kind` is f32, f16 or bf16.
///
/// # Errors
/// If the adapter is more than A and B (DoRA, biases, added tokens, modules that were trained whole), or changes a head that the base
/// does not have: llama.cpp has no place for it, and merging is the way. If the disk is full or fails; nothing is left then.
pub fn write_adapter(
    adapter: &PeftAdapter,
    config: &ModelConfig,
    out: &Path,
    kind: GgufType,
    name: Option<&str>,
) -> Result<WrittenGguf> {
    let kind = match kind.tensor() {
        plain @ (TensorType::F32 | TensorType::F16 | TensorType::Bf16) => plain,
        _ => return Err(Error::Invalid(format!("an adapter as GGUF is f32, f16 or bf16, not {kind}"))),
    };
    let (alpha, factors) = factors(adapter, config)?;
    let mut metadata = Metadata::default();
    metadata.string("general.architecture", config.architecture.gguf_name());
    metadata.string("general.type", "adapter");
    if let Some(name) = name {
        metadata.string("general.name", name);
    }
    metadata.string("adapter.type", "lora");
    metadata.f32("adapter.lora.alpha", alpha);
    let file_type = match kind {
        TensorType::F32 => 0,
        TensorType::F16 => 1,
        _ => 32,
    };
    metadata.u32("general.file_type", file_type);
    metadata.u32("general.quantization_version", 2);
    let size = |factor: &Factor| kind.bytes(factor.data.len());
    let described: Vec<_> = factors.iter().map(|f| (f.name.as_str(), &f.shape[..], kind.id(), size(f))).collect();
    let header = metadata.header(&described);

    let mut file = PendingFile::create(out)?;
    let mut written = 0;
    let mut put = |bytes: &[u8]| {
        written += bytes.len() as u64;
        file.write_with(|writer| writer.write_all(bytes)).map_err(|error| full(out, error))
    };
    put(&header)?;
    for factor in &factors {
        let mut bytes = vec![0; size(factor) as usize];
        if !encode_piece(&factor.data, 0..factor.data.len(), kind, None, &mut bytes) {
            return Err(Error::tensor(&factor.name, "has a value beyond f16's range; choose bf16 or f32"));
        }
        bytes.resize((bytes.len() as u64).next_multiple_of(ALIGNMENT) as usize, 0);
        put(&bytes)?;
    }
    file.commit().map_err(|error| full(out, error))?;
    Ok(WrittenGguf {
        bytes: written,
        tensors: factors.len(),
        files: vec![out.to_owned()],
        fallbacks: Vec::new(),
        without_importance: Vec::new(),
    })
}

/// `adapter.lora.alpha`, and A and B of every module.
fn factors(adapter: &PeftAdapter, config: &ModelConfig) -> Result<(f32, Vec<Factor>)> {
    let no_place = |what: String| {
        let advice = "llama.cpp's adapters have no place for it; merge the adapter (`qlora export --format gguf`)";
        Err(Error::Unsupported(format!("{what}: {advice}")))
    };
    if !adapter.tokens.is_empty() || adapter.vocab_size.is_some() {
        return no_place("the adapter brings tokens of its own".to_owned());
    }
    if let Some(replaced) = adapter.replaced.first() {
        return no_place(format!("the adapter replaces {}", replaced.name));
    }
    let spec = config.spec();
    let alpha_of = |module: &crate::adapter::LoraModule| module.scaling * module.rank as f64;
    let alpha = adapter.modules.first().map_or(1.0, alpha_of);
    let mut factors = Vec::new();
    for module in &adapter.modules {
        if module.magnitude.is_some() || module.bias.is_some() {
            let what = if module.bias.is_some() { "has a bias on B" } else { "is DoRA" };
            return no_place(format!("{}: the adapter {what}", module.name));
        }
        let weight = format!("{}.weight", module.name);
        let Some(tensor) = spec.tensors().find(|tensor| tensor.name == weight) else {
            let tied = module.name == HEAD;
            let what = if tied {
                "the adapter changes the head, which is the embedding's table"
            } else {
                "the base has no such module"
            };
            return no_place(format!("{}: {what}", module.name));
        };
        let (rank, name) = (module.rank, tensor.gguf());
        let (outer, inner) = (module.b.len() / rank, module.a.len() / rank);
        let rest = alpha_of(module) / alpha;
        // Rounding alone is no other scaling.
        let mut b = match (rest - 1.0).abs() < 1e-6 {
            true => module.b.clone(),
            false => module.b.iter().map(|b| (f64::from(*b) * rest) as f32).collect(),
        };
        if let Some(heads) = tensor.module.interleaved_heads {
            let mut data = PlainData::F32(b);
            rows::permute(&mut data, heads, config.head_dim);
            b = match data {
                PlainData::F32(b) => b,
                _ => return Err(Error::tensor(name, "changed its type")),
            };
        }
        let (a, a_shape) = match module.name == EMBEDDING {
            true => ((0..inner).flat_map(|i| module.a.iter().skip(i).step_by(inner).copied()).collect(), [inner, rank]),
            false => (module.a.clone(), [rank, inner]),
        };
        factors.push(Factor { name: format!("{name}.lora_a"), shape: a_shape, data: PlainData::F32(a) });
        factors.push(Factor { name: format!("{name}.lora_b"), shape: [outer, rank], data: PlainData::F32(b) });
    }
    Ok((alpha as f32, factors))
}

#[cfg(test)]
#[path = "lora_tests.rs"]
mod tests;
