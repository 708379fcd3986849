//! One memory-mapped safetensors file.
//!
//! Layout: `u64` little-endian header length, a JSON header (name -> dtype, shape, byte range), then the tensors without
//! gaps. Everything the header says is checked against the file's length before a tensor is read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use half::{bf16, f16};
use qlora_kernels::weight::PlainData;
use qlora_kernels::{Dtype as Float, FileBytes, MappedFile};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::{PlainTensor, StoredTensor};
use crate::error::{Error, Result};

/// The largest header that is read, as in safetensors.
const MAX_HEADER: u64 = 100_000_000;

/// A safetensors file with its parsed header.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    file: MappedFile,
    header: Metadata,
    data_start: usize,
    /// Names that tensors go by, where the file calls them otherwise.
    renamed: HashMap<String, String>,
}

impl Shard {
    /// Maps the file and checks its header.
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let file = MappedFile::open(&path).map_err(|e| Error::io(&path, e))?;
        let (header, data_start) = parse_header(&file).map_err(|message| Error::format(&path, message))?;
        Ok(Self { path, file, header, data_start, renamed: HashMap::new() })
    }

    /// Lets the tensor that the file calls `stored` go by `name`; a name that was given before is replaced.
    pub(super) fn rename(&mut self, stored: &str, name: &str) {
        self.renamed.retain(|_, other| other != stored);
        self.renamed.insert(name.to_owned(), stored.to_owned());
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        match self.renamed.get(name) {
            Some(stored) => self.header.info(stored),
            None => self.header.info(name),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors' names in the file, in no particular order.
    pub(super) fn stored_names(&self) -> impl Iterator<Item = String> {
        self.header.tensors().into_keys()
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.info(name).map(|info| info.shape.as_slice())
    }

    pub(super) fn dtype(&self, name: &str) -> Option<Dtype> {
        self.info(name).map(|info| info.dtype)
    }

    /// The bytes of one tensor.
    pub(super) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let (start, end) = self.info(name)?.data_offsets;
        Some(&self.file[self.data_start + start..self.data_start + end])
    }

    /// A plain tensor's place in the file.
    pub(super) fn stored(&self, name: &str) -> Option<StoredTensor<'_>> {
        let dtype = float(self.dtype(name)?)?;
        let (start, end) = self.info(name)?.data_offsets;
        Some(StoredTensor { bytes: self.file.bytes(self.data_start + start..self.data_start + end), dtype })
    }

    /// Copies one tensor out of the file.
    pub(super) fn read(&self, name: &str) -> Result<PlainTensor> {
        let info = self.info(name).ok_or_else(|| Error::tensor(name, format!("not in {}", self.path.display())))?;
        let Some(StoredTensor { bytes, dtype }) = self.stored(name) else {
            return Err(unsupported_dtype(name, info.dtype, &self.path));
        };
        let data = match dtype {
            Float::F32 => read::<f32>(bytes).map(PlainData::F32),
            Float::Bf16 => read::<bf16>(bytes).map(PlainData::Bf16),
            Float::F16 => read::<f16>(bytes).map(PlainData::F16),
        };
        let data = data.map_err(|error| Error::io(&self.path, error))?;
        Ok(PlainTensor { data, shape: info.shape.clone() })
    }
}

fn float(dtype: Dtype) -> Option<Float> {
    match dtype {
        Dtype::F32 => Some(Float::F32),
        Dtype::BF16 => Some(Float::Bf16),
        Dtype::F16 => Some(Float::F16),
        _ => None,
    }
}

/// The error for a dtype that is not read.
pub(super) fn unsupported_dtype(name: &str, dtype: Dtype, path: &Path) -> Error {
    let message = format!("has dtype {dtype:?} in {}; supported are F32, BF16 and F16", path.display());
    Error::tensor(name, message)
}

fn read<T: Pod>(bytes: FileBytes) -> std::io::Result<Vec<T>> {
    const { assert!(cfg!(target_endian = "little"), "safetensors are little-endian") };
    let mut out = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytes.read_at(0, bytemuck::cast_slice_mut(&mut out))?;
    Ok(out)
}

/// The header and where the data begins. Not `SafeTensors::read_metadata`: that adds lengths from the file unchecked.
fn parse_header(file: &[u8]) -> std::result::Result<(Metadata, usize), String> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("not a safetensors file: only {} bytes long", file.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(format!("not a safetensors file: its header would be {length} bytes long"));
    }
    let Some(text) = rest.get(..length as usize) else {
        let left = rest.len();
        return Err(format!("cut short: the header should be {length} bytes long, {left} bytes follow"));
    };
    let header: Metadata =
        serde_json::from_slice(text).map_err(|e| format!("the safetensors header is damaged: {e}"))?;
    let data = rest.len() - text.len();
    if header.data_len() != data {
        let what = if data < header.data_len() { "cut short" } else { "damaged" };
        return Err(format!(
            "{what}: the header describes {} bytes of tensors, the file has {data}",
            header.data_len()
        ));
    }
    Ok((header, 8 + text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn hostile_headers_are_errors() {
        let good = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8);
        assert!(parse_header(&good).is_ok());
        for length in 0..good.len() {
            assert!(parse_header(&good[..length]).is_err(), "cut to {length} bytes");
        }
        let huge = usize::MAX;
        let half = usize::MAX / 8;
        for (header, message) in [
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#.to_owned(), "damaged"),
            (r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#.to_owned(), "damaged"),
            (format!(r#"{{"a":{{"dtype":"F32","shape":[{huge},{huge}],"data_offsets":[0,8]}}}}"#), "damaged"),
            (format!(r#"{{"a":{{"dtype":"U8","shape":[{half}],"data_offsets":[0,{half}]}}}}"#), "cut short"),
            (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#.to_owned(), "damaged"),
            (r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#.to_owned(), "damaged"),
        ] {
            let error = parse_header(&file(&header, 8)).unwrap_err();
            assert!(error.contains(message), "{header}: {error}");
        }
        let mut huge = good.clone();
        huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(parse_header(&huge).unwrap_err().contains("header would be"));
    }
}
