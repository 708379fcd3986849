//! A base with as many rows in its tables as the model that an adapter was trained on.
//!
//! Where tokens were added before training, PEFT saves both tables whole beside A and B, and its `AutoPeftModel` resizes the base
//! before it loads them. Here the base keeps its own rows and gets the adapter's for the tokens that it lacks; rows beyond a
//! smaller vocabulary are left out. The adapter's tables then take the place of the base's where they differ, as in PEFT.

use std::path::Path;

use half::{bf16, f16};
use qlora_kernels::weight::PlainData;

use super::kinds::{EMBEDDING, HEAD};
use super::peft::PeftAdapter;
use crate::config::{ModelConfig, StoredQuantization};
use crate::source::{PlainTensor, SourceWeight, StoredTensor, WeightSource};
use crate::{Error, Result};

/// `base` with the vocabulary of `adapter`, which was read for it; `base` itself where the two have the same.
///
/// # Errors
/// If the adapter does not bring the rows that the base lacks.
pub(crate) fn resize(base: Box<dyn WeightSource>, adapter: &PeftAdapter) -> Result<Box<dyn WeightSource>> {
    let own = base.config();
    let Some(vocab_size) = adapter.vocab_size.filter(|size| *size != own.vocab_size) else { return Ok(base) };
    let config = ModelConfig { vocab_size, ..own.clone() };
    let modules: &[&str] = if own.tie_word_embeddings { &[EMBEDDING] } else { &[EMBEDDING, HEAD] };
    let mut tables = Vec::new();
    for module in modules {
        let name = format!("{module}.weight");
        let shape = [config.vocab_size, config.hidden_size];
        let Some(table) = adapter.replaced.iter().find(|replaced| replaced.name == name && replaced.shape == shape)
        else {
            return Err(Error::tensor(
                name,
                format!("the adapter does not bring the table of its {} tokens", shape[0]),
            ));
        };
        let from = own.vocab_size.min(shape[0]) * shape[1];
        let mut added = vec![0.0; table.data.len() - from];
        table.data.to_f32(from..table.data.len(), &mut added);
        tables.push((name, added));
    }
    Ok(Box::new(Resized { base, config, tables }))
}

#[derive(Debug)]
struct Resized {
    base: Box<dyn WeightSource>,
    config: ModelConfig,
    /// The tables by name, and the rows that follow the base's.
    tables: Vec<(String, Vec<f32>)>,
}

impl Resized {
    fn added(&self, name: &str) -> Option<&[f32]> {
        self.tables.iter().find(|(table, _)| table == name).map(|(_, rows)| rows.as_slice())
    }
}

impl WeightSource for Resized {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn file_of(&self, name: &str) -> Option<&Path> {
        self.base.file_of(name)
    }

    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self.added(name) {
            Some(_) => Some(vec![self.config.vocab_size, self.config.hidden_size]),
            None => self.base.shape(name),
        }
    }

    fn quantization(&self) -> Option<&StoredQuantization> {
        self.base.quantization()
    }

    fn remarks(&self) -> &[String] {
        self.base.remarks()
    }

    fn block_type(&self) -> Option<&'static str> {
        self.base.block_type()
    }

    fn is_packed(&self, name: &str) -> bool {
        self.added(name).is_none() && self.base.is_packed(name)
    }

    fn read_weight(&self, name: &str) -> Result<SourceWeight> {
        match self.added(name) {
            Some(_) => self.read(name).map(SourceWeight::Plain),
            None => self.base.read_weight(name),
        }
    }

    fn stored(&self, name: &str) -> Option<StoredTensor<'_>> {
        if self.added(name).is_some() { None } else { self.base.stored(name) }
    }

    fn stored_bytes(&self, name: &str) -> u64 {
        self.base.stored_bytes(name)
    }

    fn read(&self, name: &str) -> Result<PlainTensor> {
        let Some(added) = self.added(name) else { return self.base.read(name) };
        // A head may be stored quantized.
        let mut tensor = self.base.read_weight(name)?.into_plain();
        let kept = self.config.vocab_size * self.config.hidden_size - added.len();
        match &mut tensor.data {
            PlainData::F32(data) => extend(data, kept, added, |x| x),
            PlainData::Bf16(data) => extend(data, kept, added, bf16::from_f32),
            PlainData::F16(data) => extend(data, kept, added, f16::from_f32),
        }
        tensor.shape = vec![self.config.vocab_size, self.config.hidden_size];
        Ok(tensor)
    }
}

fn extend<T>(data: &mut Vec<T>, kept: usize, added: &[f32], round: impl Fn(f32) -> T) {
    data.truncate(kept);
    data.extend(added.iter().map(|&x| round(x)));
}
