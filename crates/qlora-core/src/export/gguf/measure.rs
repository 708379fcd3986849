//! Making an importance matrix: the model reads a text, and the squares of its matrices' inputs are averaged.

use std::collections::HashMap;
use std::path::Path;

use super::importance::Importance;
use crate::atomic::write_atomically;
use crate::error::{Error, Result};
use crate::formats::gguf::metadata::{ALIGNMENT, Metadata};
use crate::model::{AdapterChoice, CausalLm, LoadOptions};
use crate::source::WeightSource;

impl Importance {
    /// Tokens that are read at a time, as by llama.cpp.
    pub const CHUNK: usize = 512;

    /// That of a model for texts as tokens; each is read by itself, from its first token on. The model is computed on the CPU, from the
    /// weights as they are stored. `progress` is called with the number of texts that were read and their total.
    ///
    /// # Errors
    /// If the model cannot be loaded, there is no text, or a token is outside the vocabulary.
    pub fn measure(
        source: &dyn WeightSource,
        texts: &[Vec<u32>],
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        if texts.iter().all(Vec::is_empty) {
            return Err(Error::Invalid("an importance matrix needs some text".to_owned()));
        }
        let model = CausalLm::load(source, LoadOptions::default())?;
        let spec = source.config().spec();
        let names: HashMap<String, String> =
            spec.linear().map(|module| (module.name.clone(), format!("{}.weight", module.gguf))).collect();
        let blocks = model.stack().blocks();
        // q, k and v read the same, and so do gate and up: one of them is watched.
        let watched: Vec<_> = blocks
            .iter()
            .flat_map(|block| {
                let group = |members: Vec<&str>, watch| {
                    (members.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), watch)
                };
                [
                    group(vec![block.q.name(), block.k.name(), block.v.name()], block.q.watch()),
                    group(vec![block.o.name()], block.o.watch()),
                    group(vec![block.gate.name(), block.up.name()], block.gate.watch()),
                    group(vec![block.down.name()], block.down.watch()),
                ]
            })
            .collect();
        for (index, tokens) in texts.iter().enumerate().filter(|(_, tokens)| !tokens.is_empty()) {
            model.next_logits(&[tokens], &mut [&mut model.new_cache(tokens.len())], AdapterChoice::Active)?;
            progress(index + 1, texts.len());
        }
        let mut columns = HashMap::new();
        for (members, watch) in watched {
            let means = watch.means();
            for member in members {
                let name = names.get(&member).cloned();
                let name = name.ok_or_else(|| Error::tensor(&member, "has no name in GGUF files"))?;
                columns.insert(name, means.clone());
            }
        }
        Ok(Self::new(columns))
    }

    /// Writes it as llama.cpp's `llama-imatrix` does (GGUF), replacing what was there.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut metadata = Metadata::default();
        metadata.string("general.type", "imatrix");
        metadata.strings("imatrix.datasets", &[] as &[&str]);
        metadata.u32("imatrix.chunk_count", 1);
        metadata.u32("imatrix.chunk_size", Self::CHUNK as u32);
        let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        for (name, values) in self.sorted() {
            // Means, of one "call".
            tensors.push((format!("{name}.in_sum2"), vec![1, values.len()], values.to_vec()));
            tensors.push((format!("{name}.counts"), vec![1, 1], vec![1.0]));
        }
        let described: Vec<(&str, &[usize], u32, u64)> = tensors
            .iter()
            .map(|(name, shape, values)| (name.as_str(), &shape[..], 0, 4 * values.len() as u64))
            .collect();
        let header = metadata.header(&described);
        write_atomically(path, |out| {
            out.write_all(&header)?;
            for (.., values) in &tensors {
                let mut bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                bytes.resize((bytes.len() as u64).next_multiple_of(ALIGNMENT) as usize, 0);
                out.write_all(&bytes)?;
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::formats::HfDirectory;

    #[test]
    fn the_squares_are_those_of_what_matrices_read() {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models/llama");
        let source = HfDirectory::open(&folder).unwrap();
        let texts = vec![vec![1, 5, 9, 40, 3], vec![7], vec![]];
        let mut done = 0;
        let importance = Importance::measure(&source, &texts, |n, _| done = n).unwrap();
        let config = source.config();
        assert_eq!((importance.len(), done), (7 * config.num_hidden_layers, 2));
        // The first block's q reads the normed embedding: by hand.
        let table = source.read("model.embed_tokens.weight").unwrap().into_f32();
        let norm = source.read("model.layers.0.input_layernorm.weight").unwrap().into_f32();
        let (hidden, eps) = (config.hidden_size, f64::from(config.rms_norm_eps));
        let mut expected = vec![0f64; hidden];
        for token in texts.iter().flatten() {
            let x = &table[*token as usize * hidden..][..hidden];
            let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / hidden as f64;
            for ((sum, x), weight) in expected.iter_mut().zip(x).zip(&norm) {
                *sum += (f64::from(*x) * f64::from(*weight)).powi(2) / (mean + eps) / 6.0;
            }
        }
        for name in ["attn_q", "attn_k", "attn_v"] {
            let got = importance.of(&format!("blk.0.{name}.weight"), hidden).unwrap().unwrap();
            for (got, expected) in got.iter().zip(&expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-4 * (1.0 + expected), "{name}: {got} {expected}");
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        importance.write(file.path()).unwrap();
        assert_eq!(Importance::open(file.path()).unwrap(), importance);
        assert!(Importance::measure(&source, &[vec![]], |_, _| ()).is_err());
    }
}
