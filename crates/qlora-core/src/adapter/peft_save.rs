//! Writes an adapter of any kind, so that PEFT loads it.
//!
//! Matrices and vectors of the adapter in the dtype that is asked for, tensors in place of the base's as they are.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use half::{bf16, f16};
use qlora_kernels::weight::PlainData;
use safetensors::Dtype;
use safetensors::tensor::View;
use serde_json::{Value, json};

use super::config_file::{escape_non_ascii, layers_to_json};
use super::kinds::TrainedBias;
use super::peft::{PREFIX, PeftAdapter, TOKEN_ROWS, factor_names};
use super::save::{AdapterDtype, SaveOptions};
use super::{CONFIG_FILE, WEIGHTS_FILE};
use crate::atomic::{PendingFile, replace_directory};
use crate::companions::Companions;
use crate::formats::safetensors::write_safetensors;
use crate::{Error, Result};

impl PeftAdapter {
    /// Writes `adapter_config.json`, `adapter_model.safetensors` and the companions of `options` to the folder `dir`, which is made
    /// if it does not exist. The base model is the one that `options` name, else the one that the adapter names. There is no model
    /// card.
    ///
    /// # Errors
    /// If a number is not finite or does not fit the dtype, or the folder cannot be written. Nothing half-written is left.
    pub fn save(&self, dir: impl AsRef<Path>, options: &SaveOptions) -> Result<()> {
        let dir = dir.as_ref();
        let tensors = self.tensors(options.dtype)?;
        let json = self.json(options)?;
        if dir.is_dir() {
            return write_files(dir, tensors, &json, &options.companions);
        }
        replace_directory(dir, |temporary| write_files(temporary, tensors, &json, &options.companions))
    }

    fn tensors(&self, dtype: AdapterDtype) -> Result<Vec<(String, Stored)>> {
        let mut tensors = Vec::new();
        let mut push = |module: &str, end: &str, shape: Vec<usize>, data: &[f32]| -> Result<()> {
            let name = format!("{PREFIX}{module}.{end}");
            if let Some(value) = data.iter().find(|&&value| !dtype.holds(value)) {
                return Err(Error::tensor(name, format!("{value} is not finite in {dtype:?}")));
            }
            tensors.push((name, Stored::new(dtype, shape, data)));
            Ok(())
        };
        for module in &self.modules {
            let (name, rank) = (module.name.as_str(), module.rank.max(1));
            let [a, b] = factor_names(name);
            push(name, a, vec![rank, module.a.len() / rank], &module.a)?;
            push(name, b, vec![module.b.len() / rank, rank], &module.b)?;
            for (end, data) in [("lora_B.bias", &module.bias), ("lora_magnitude_vector", &module.magnitude)] {
                data.as_ref().map_or(Ok(()), |data| push(name, end, vec![data.len()], data))?;
            }
        }
        for tokens in &self.tokens {
            let shape = vec![tokens.ids.len(), tokens.rows.len() / tokens.ids.len().max(1)];
            push(&tokens.module, TOKEN_ROWS, shape, &tokens.rows)?;
        }
        for replaced in &self.replaced {
            let (module, end) = replaced.name.rsplit_once('.').unwrap_or((&replaced.name, "weight"));
            let adapted = self.modules.iter().any(|other| other.name == module);
            let key = match adapted {
                true => format!("{PREFIX}{module}.base_layer.{end}"),
                false => format!("{PREFIX}{}", replaced.name),
            };
            tensors.push((key, Stored::plain(&replaced.data, replaced.shape.clone())));
        }
        Ok(tensors)
    }

    fn json(&self, options: &SaveOptions) -> Result<String> {
        let wrong = |error: serde_json::Error| Error::Invalid(format!("adapter options: {error}"));
        let Value::Object(own) = serde_json::to_value(&self.config.lora).map_err(wrong)? else {
            return Err(Error::Invalid("adapter options are no JSON object".to_owned()));
        };
        let mut keys: BTreeMap<String, Value> = own.into_iter().collect();
        keys.entry("task_type".to_owned()).or_insert(Value::Null);
        let kinds = &self.kinds;
        layers_to_json(&self.config.lora, &mut keys);
        let tokens: BTreeMap<&str, &[u32]> =
            kinds.trainable_token_indices.iter().map(|(module, ids)| (module.as_str(), ids.as_slice())).collect();
        let some = |there: bool, value: Value| if there { value } else { Value::Null };
        let bias = match kinds.bias {
            TrainedBias::None => "none",
            TrainedBias::All => "all",
            TrainedBias::LoraOnly => "lora_only",
        };
        let fixed = json!({
            "auto_mapping": null,
            "base_model_name_or_path":
                options.base_model_name_or_path.as_ref().or(self.config.base_model_name_or_path.as_ref()),
            "bias": bias,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "modules_to_save": some(!kinds.modules_to_save.is_empty(), json!(kinds.modules_to_save)),
            "peft_type": "LORA",
            "revision": options.revision.as_ref().or(self.config.revision.as_ref()),
        });
        if let Value::Object(fixed) = fixed {
            keys.extend(fixed);
        }
        // Newer keys only where they are needed: older readers warn about keys they don't know.
        let newer = [
            (kinds.lora_bias, "lora_bias", json!(true)),
            (kinds.ensure_weight_tying, "ensure_weight_tying", json!(true)),
            (!tokens.is_empty(), "trainable_token_indices", json!(tokens)),
        ];
        keys.extend(newer.into_iter().filter(|(on, ..)| *on).map(|(_, key, value)| (key.to_owned(), value)));
        Ok(escape_non_ascii(&serde_json::to_string_pretty(&keys).map_err(wrong)?))
    }
}

fn write_files(dir: &Path, tensors: Vec<(String, Stored)>, json: &str, companions: &Companions) -> Result<()> {
    let mut files = vec![PendingFile::create(dir.join(WEIGHTS_FILE))?, PendingFile::create(dir.join(CONFIG_FILE))?];
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    files[0].write_with(|writer| write_safetensors(writer, tensors, Some(metadata)))?;
    files[1].write_with(|writer| writer.write_all(json.as_bytes()))?;
    files.extend(companions.pending(dir)?);
    files.iter_mut().try_for_each(PendingFile::sync)?;
    files.into_iter().try_for_each(PendingFile::commit)
}

/// A tensor in the form it has on disk.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Stored {
    fn new(dtype: AdapterDtype, shape: Vec<usize>, data: &[f32]) -> Self {
        let (dtype, data) = match dtype {
            AdapterDtype::F32 => (Dtype::F32, data.iter().flat_map(|x| x.to_le_bytes()).collect()),
            AdapterDtype::F16 => (Dtype::F16, data.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()),
            AdapterDtype::BF16 => (Dtype::BF16, data.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()),
        };
        Self { dtype, shape, data }
    }

    fn plain(data: &PlainData, shape: Vec<usize>) -> Self {
        let (dtype, data) = match data {
            PlainData::F32(data) => (Dtype::F32, data.iter().flat_map(|x| x.to_le_bytes()).collect()),
            PlainData::F16(data) => (Dtype::F16, data.iter().flat_map(|x| x.to_le_bytes()).collect()),
            PlainData::Bf16(data) => (Dtype::BF16, data.iter().flat_map(|x| x.to_le_bytes()).collect()),
        };
        Self { dtype, shape, data }
    }
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}
