//! Writes a model as a 4-bit checkpoint in the layout of bitsandbytes and transformers.
//!
//! Every linear layer `P` of the blocks becomes `P.weight` (U8 `[n/2, 1]`, the even element in the high nibble),
//! `P.weight.absmax`, `P.weight.quant_map` and `P.weight.quant_state.bitsandbytes__nf4` (JSON as bytes); with double
//! quantization also `P.weight.nested_absmax` and `P.weight.nested_quant_map`. All other tensors keep their name and
//! precision. `config.json` gains `quantization_config`.
//!
//! Tensors are read, quantized and written one after the other ([`SafetensorsStream`]).

use std::fs;
use std::path::Path;

use qlora_kernels::quant::{Absmax, QuantConfig, Quantized4bit};
use qlora_kernels::weight::PlainData;
use serde_json::{Value, json};

use crate::atomic::replace_directory;
use crate::companions::Companions;
use crate::error::{Error, Result};
use crate::file;
use crate::formats::safetensors::SafetensorsStream;
use crate::open::ModelFiles;
use crate::source::WeightSource;
use crate::spec::Module;

/// The size of a quantized checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct QuantizedSize {
    /// Bytes of all weights in their source.
    pub before: u64,
    /// Bytes of the written file.
    pub after: u64,
}

/// Quantizes a model into the folder `out`, which must not exist yet, with all that belongs to it: configuration, tokenizer, chat
/// template, generation configuration and licence ([`Companions`]). `progress` is called with the number of tensors done and
/// their total.
///
/// # Errors
/// As [`write()`]; also if one of these files cannot be read.
pub fn write_model(
    model: &ModelFiles,
    quantization: &QuantConfig,
    out: &Path,
    progress: impl FnMut(usize, usize),
) -> Result<QuantizedSize> {
    let folder = model.source.path();
    let config = match folder.is_dir() {
        true => file::read_text(&folder.join("config.json"), file::SMALL)?,
        false => model.source.config().to_json(),
    };
    write_with(&*model.source, &config, &Companions::of(model)?, quantization, out, progress)
}

/// Quantizes the linear layers of `source` into the folder `out`, which must not exist yet. `config_json` is the model's
/// own `config.json`. `progress` is called with the number of tensors done and their total.
///
/// # Errors
/// If a tensor cannot be read or holds a value that is not finite, or the folder exists or cannot be written; nothing is
/// left in that case.
pub fn write(
    source: &dyn WeightSource,
    config_json: &str,
    quantization: &QuantConfig,
    out: &Path,
    progress: impl FnMut(usize, usize),
) -> Result<QuantizedSize> {
    write_with(source, config_json, &Companions::default(), quantization, out, progress)
}

fn write_with(
    source: &dyn WeightSource,
    config_json: &str,
    companions: &Companions,
    quantization: &QuantConfig,
    out: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<QuantizedSize> {
    if out.exists() {
        return Err(Error::format(out, "exists already; choose another folder or delete it"));
    }
    if let Some(stored) = source.quantization() {
        let path = source.path().display();
        return Err(Error::Invalid(format!(
            "{path}: the weights are stored in {stored} already; start from the original bf16, f16 or f32 weights"
        )));
    }
    let config = config_with_quantization(source, config_json, quantization)?;
    if let Some(remark) = crate::source::again(source, quantization.quant_type.name()) {
        tracing::warn!("{remark}");
    }
    let names = source.names();
    let quantized: std::collections::HashSet<String> =
        source.config().spec().linear().map(Module::weight_name).collect();
    replace_directory(out, |folder| {
        // At most 6 entries of some 200 bytes for each tensor of the source.
        let stream = SafetensorsStream::with_room(&folder.join("model.safetensors"), names.len() * 1600 + 1024)?;
        let mut writer = Writer { stream, unaligned: Vec::new() };
        let mut before = 0;
        for (index, name) in names.iter().enumerate() {
            let tensor = source.read_finite(name)?;
            let element = if matches!(tensor.data, PlainData::F32(_)) { 4 } else { 2 };
            before += (tensor.data.len() * element) as u64;
            if quantized.contains(name) {
                let weight = Quantized4bit::quantize(&tensor.data, tensor.shape[0], tensor.shape[1], quantization)
                    .map_err(|error| Error::tensor(name, error.to_string()))?;
                writer.quantized(name, weight, &tensor.shape)?;
            } else {
                writer.stream.tensor(name, &tensor)?;
            }
            progress(index + 1, names.len());
        }
        let after = writer.finish()?;
        companions.write(folder)?;
        let path = folder.join("config.json");
        fs::write(&path, &config).map_err(|error| Error::io(&path, error))?;
        Ok(QuantizedSize { before, after })
    })
}

/// The model's configuration with the entries that transformers needs to load the checkpoint.
fn config_with_quantization(source: &dyn WeightSource, config: &str, quantization: &QuantConfig) -> Result<String> {
    let mut config = source.config().rewrite(Some(config))?;
    let dtype = config.get("torch_dtype").or_else(|| config.get("dtype")).and_then(Value::as_str);
    let compute = dtype.unwrap_or("bfloat16").to_owned();
    config.insert(
        "quantization_config".into(),
        json!({
            "_load_in_4bit": true,
            "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": compute,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": quantization.quant_type.name(),
            "bnb_4bit_use_double_quant": quantization.double_quant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": null,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": true,
            "load_in_8bit": false,
            "quant_method": "bitsandbytes",
        }),
    );
    serde_json::to_string_pretty(&config).map_err(|error| Error::Invalid(format!("config.json: {error}")))
}

/// Writes the parts of quantized weights.
struct Writer {
    stream: SafetensorsStream,
    /// Tensors of odd size, which come last so that all others stay aligned.
    unaligned: Vec<(String, Vec<u8>)>,
}

impl Writer {
    fn bytes(&mut self, name: String, shape: &[usize], bytes: Vec<u8>) -> Result<()> {
        if bytes.len().is_multiple_of(8) {
            return self.stream.bytes(&name, "U8", shape, &bytes);
        }
        self.unaligned.push((name, bytes));
        Ok(())
    }

    fn quantized(&mut self, name: &str, weight: Quantized4bit, shape: &[usize]) -> Result<()> {
        let parts = weight.into_parts();
        let quant_type = parts.quant_type.name();
        let mut state = json!({
            "quant_type": quant_type,
            "blocksize": parts.blocksize,
            "dtype": parts.source_dtype.name(),
            "shape": shape,
        });
        self.floats(&format!("{name}.quant_map"), &parts.quant_type.quant_map())?;
        match parts.absmax {
            Absmax::Plain(absmax) => self.floats(&format!("{name}.absmax"), &absmax)?,
            Absmax::Nested(nested) => {
                state["nested_blocksize"] = json!(nested.blocksize);
                state["nested_dtype"] = json!("float32");
                // The f64 that prints as the f32's exact value, as Python prints it.
                state["nested_offset"] = json!(f64::from(nested.offset));
                self.floats(&format!("{name}.nested_absmax"), &nested.absmax)?;
                self.floats(&format!("{name}.nested_quant_map"), &nested.quant_map)?;
                self.bytes(format!("{name}.absmax"), &[nested.codes.len()], nested.codes)?;
            }
        }
        let codes = parts.codes.len();
        self.bytes(name.to_owned(), &[codes, 1], parts.codes)?;
        let state = python_json(&state).into_bytes();
        self.unaligned.push((format!("{name}.quant_state.bitsandbytes__{quant_type}"), state));
        Ok(())
    }

    fn floats(&mut self, name: &str, values: &[f32]) -> Result<()> {
        // An odd number of f32 would leave the next 8-byte type unaligned; there is none in these files.
        self.stream.bytes(name, "F32", &[values.len()], bytemuck::cast_slice(values))
    }

    fn finish(mut self) -> Result<u64> {
        for (name, bytes) in std::mem::take(&mut self.unaligned) {
            let columns = !name.contains(".weight.");
            let shape = if columns { vec![bytes.len(), 1] } else { vec![bytes.len()] };
            self.stream.bytes(&name, "U8", &shape, &bytes)?;
        }
        self.stream.finish()
    }
}

/// JSON with the spaces of Python's `json.dumps`: `", "` and `": "`.
fn python_json(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let parts: Vec<_> = map.iter().map(|(key, value)| format!("\"{key}\": {}", python_json(value))).collect();
            format!("{{{}}}", parts.join(", "))
        }
        Value::Array(list) => format!("[{}]", list.iter().map(python_json).collect::<Vec<_>>().join(", ")),
        other => other.to_string(),
    }
}
