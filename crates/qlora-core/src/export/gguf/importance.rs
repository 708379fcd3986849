//! Importance matrices of llama.cpp (`llama-imatrix`): for every matrix the mean square of the inputs of each of its
//! columns, over some text.
//!
//! Two formats are read. GGUF (`general.type` is `imatrix`): for a matrix NAME the tensors `NAME.in_sum2`, sums of squares, and
//! `NAME.counts`, how many were summed. The older one (usually `.dat`), all little-endian: i32 entries; of each i32 length and name,
//! i32 calls, i32 values, the values in f32 (means times calls); what follows is not needed.

use std::collections::HashMap;
use std::path::Path;

use qlora_kernels::MappedFile;

use crate::error::{Error, Result};
use crate::formats::gguf::named_floats;

/// An importance a column, by the names of a GGUF file's matrices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Importance {
    columns: HashMap<String, Vec<f32>>,
}

/// Longer names and more values than any model has.
const MOST: i32 = 1 << 24;

impl Importance {
    /// Reads a file of either format.
    ///
    /// # Errors
    /// If the file cannot be read, is damaged, or has a value that is negative or no number.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = MappedFile::open(path).map_err(|error| Error::io(path, error))?;
        let columns = match file.starts_with(b"GGUF") {
            true => Self::gguf(&file),
            false => Self::legacy(&file),
        };
        let columns = columns.map_err(|message| Error::format(path, format!("as an importance matrix: {message}")))?;
        for (name, values) in &columns {
            if let Some(index) = values.iter().position(|x| !(x.is_finite() && *x >= 0.0)) {
                let message = format!("the importance of {name}, column {index}, is {}", values[index]);
                return Err(Error::format(path, message));
            }
        }
        Ok(Self { columns })
    }

    /// An importance matrix from values a matrix, by the names of a GGUF file.
    pub fn new(columns: HashMap<String, Vec<f32>>) -> Self {
        Self { columns }
    }

    /// The number of matrices it knows.
    pub fn len(&self) -> usize {
        self.columns.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty()
    }

    /// By name.
    pub(super) fn sorted(&self) -> Vec<(&str, &[f32])> {
        let mut all: Vec<_> = self.columns.iter().map(|(name, values)| (name.as_str(), values.as_slice())).collect();
        all.sort_unstable_by_key(|(name, _)| *name);
        all
    }

    /// The importance of the columns of a matrix (`blk.0.ffn_up.weight`).
    ///
    /// # Errors
    /// If it is of a matrix with another number of columns: of another model.
    pub fn of(&self, name: &str, cols: usize) -> Result<Option<&[f32]>> {
        match self.columns.get(name) {
            Some(values) if values.len() == cols => Ok(Some(values)),
            // llama.cpp too takes none for the embedding, where files of tied heads differ.
            Some(_) if name == "token_embd.weight" => Ok(None),
            Some(values) => Err(Error::tensor(
                name,
                format!("has {cols} columns and the importance matrix {}: it is of another model", values.len()),
            )),
            None => Ok(None),
        }
    }

    fn gguf(file: &[u8]) -> std::result::Result<HashMap<String, Vec<f32>>, String> {
        let mut tensors: HashMap<String, Vec<f32>> = named_floats(file)?.into_iter().collect();
        let names: Vec<String> =
            tensors.keys().filter_map(|name| name.strip_suffix(".in_sum2").map(str::to_owned)).collect();
        if names.is_empty() {
            return Err("it has no tensor that ends with .in_sum2".to_owned());
        }
        let mut columns = HashMap::new();
        for name in names {
            let mut sums = tensors.remove(&format!("{name}.in_sum2")).unwrap_or_default();
            let counts =
                tensors.remove(&format!("{name}.counts")).ok_or_else(|| format!("{name}.counts is missing"))?;
            if counts.is_empty() || !sums.len().is_multiple_of(counts.len()) {
                return Err(format!("{name}: {} sums for {} counts", sums.len(), counts.len()));
            }
            let each = sums.len() / counts.len();
            for (sums, count) in sums.chunks_mut(each.max(1)).zip(&counts) {
                // Of an expert that was never chosen nothing is known.
                sums.iter_mut().for_each(|sum| *sum = if *count > 0.0 { *sum / count } else { 1.0 });
            }
            columns.insert(name, sums);
        }
        Ok(columns)
    }

    fn legacy(file: &[u8]) -> std::result::Result<HashMap<String, Vec<f32>>, String> {
        let mut reader = Reader { rest: file };
        let entries = reader.int("the number of entries", 1)?;
        let mut columns = HashMap::new();
        for _ in 0..entries {
            let len = reader.int("the length of a name", 1)?;
            let name = String::from_utf8(reader.take(len)?.to_vec()).map_err(|_| "a name is no UTF-8".to_owned())?;
            let calls = reader.int("the number of calls", 0)?;
            let len = reader.int("the number of values", 1)?;
            let values = reader.take(4 * len)?.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x));
            let values = values.map(|x| if calls > 0 { x / calls as f32 } else { x }).collect();
            columns.insert(name, values);
        }
        Ok(columns)
    }
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> std::result::Result<&'a [u8], String> {
        let (taken, left) = self.rest.split_at_checked(len).ok_or("the file ends too early, or is no such file")?;
        self.rest = left;
        Ok(taken)
    }

    fn int(&mut self, what: &str, least: i32) -> std::result::Result<usize, String> {
        let bytes = self.take(4)?;
        let value = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        match (least..=MOST).contains(&value) {
            true => Ok(value as usize),
            false => Err(format!("{what} is {value}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::gguf::metadata::Metadata;

    fn written(bytes: &[u8]) -> Result<Importance> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("imatrix");
        std::fs::write(&path, bytes).unwrap();
        Importance::open(path)
    }

    fn legacy(values: &[f32]) -> Vec<u8> {
        let mut bytes = 1i32.to_le_bytes().to_vec();
        bytes.extend(19i32.to_le_bytes());
        bytes.extend(b"blk.0.ffn_up.weight");
        bytes.extend(4i32.to_le_bytes());
        bytes.extend((values.len() as i32).to_le_bytes());
        bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        bytes
    }

    fn gguf(sums: &[f32], counts: &[f32]) -> Vec<u8> {
        let mut metadata = Metadata::default();
        metadata.string("general.type", "imatrix");
        let tensors = [("blk.0.ffn_up.weight.in_sum2", sums), ("blk.0.ffn_up.weight.counts", counts)];
        let shapes: Vec<[usize; 1]> = tensors.iter().map(|(_, values)| [values.len()]).collect();
        let descriptions: Vec<(&str, &[usize], u32, u64)> = tensors
            .iter()
            .zip(&shapes)
            .map(|((name, values), shape)| (*name, &shape[..], 0, 4 * values.len() as u64))
            .collect();
        let mut bytes = metadata.header(&descriptions);
        for (_, values) in tensors {
            bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            bytes.resize(bytes.len().next_multiple_of(32), 0);
        }
        bytes
    }

    #[test]
    fn both_formats_give_means() {
        let read = [written(&legacy(&[8.0, 4.0, 0.0])).unwrap(), written(&gguf(&[8.0, 4.0, 0.0], &[4.0])).unwrap()];
        for importance in read {
            assert_eq!(importance.len(), 1);
            assert_eq!(importance.of("blk.0.ffn_up.weight", 3).unwrap().unwrap(), [2.0, 1.0, 0.0]);
            assert_eq!(importance.of("blk.1.ffn_up.weight", 3).unwrap(), None);
            let error = importance.of("blk.0.ffn_up.weight", 4).unwrap_err().to_string();
            assert!(error.contains("another model") && error.contains("blk.0.ffn_up.weight"), "{error}");
        }
    }

    #[test]
    fn damaged_files_are_refused() {
        let whole = legacy(&[1.0, 2.0]);
        for len in 0..whole.len() {
            assert!(written(&whole[..len]).is_err(), "{len}");
        }
        for bytes in [
            legacy(&[1.0, f32::NAN]),
            legacy(&[-1.0]),
            gguf(&[1.0, 2.0, 3.0], &[1.0, 1.0]),
            gguf(&[f32::INFINITY], &[1.0]),
            Metadata::default().header(&[]),
            b"nothing of the kind".to_vec(),
        ] {
            assert!(written(&bytes).is_err());
        }
    }
}
