//! One memory-mapped file of weights: safetensors, or a pickle of PyTorch ([`pickle`](crate::formats::pickle)).
//!
//! safetensors: `u64` little-endian header length, a JSON header (name -> dtype, shape, byte range), then the tensors without
//! gaps. Everything the header says is checked against the file's length before a tensor is read.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use half::{bf16, f16};
use qlora_kernels::weight::PlainData;
use qlora_kernels::{Dtype as Float, FileBytes, MappedFile};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::{Error, Result};
use crate::formats::pickle::{self, Place};
use crate::source::{PlainTensor, StoredTensor};

/// The largest header that is read, as in safetensors.
const MAX_HEADER: u64 = 100_000_000;

/// A file of weights with the places of its tensors.
#[derive(Debug)]
pub(in crate::formats) struct Shard {
    path: PathBuf,
    file: MappedFile,
    tensors: HashMap<String, Place>,
    /// Names that tensors go by, where the file calls them otherwise.
    renamed: HashMap<String, String>,
}

impl Shard {
    /// Maps the file and checks where its tensors lie. A name that ends in `.bin` is a pickle's.
    pub(in crate::formats) fn open(path: PathBuf) -> Result<Self> {
        let file = MappedFile::open(&path).map_err(|e| Error::io(&path, e))?;
        let tensors = match path.extension().is_some_and(|end| end == "bin") {
            true => pickle::tensors(&file),
            false => parse_header(&file).map(|(header, data_start)| places(&header, data_start)),
        };
        let tensors = tensors.map_err(|message| Error::format(&path, message))?;
        Ok(Self { path, file, tensors, renamed: HashMap::new() })
    }

    /// Lets the tensor that the file calls `stored` go by `name`; a name that was given before is replaced.
    pub(in crate::formats) fn rename(&mut self, stored: &str, name: &str) {
        self.renamed.retain(|_, other| other != stored);
        self.renamed.insert(name.to_owned(), stored.to_owned());
    }

    fn info(&self, name: &str) -> Option<&Place> {
        self.tensors.get(self.renamed.get(name).map_or(name, String::as_str))
    }

    pub(in crate::formats) fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors' names in the file, in no particular order.
    pub(in crate::formats) fn stored_names(&self) -> impl Iterator<Item = String> {
        self.tensors.keys().cloned()
    }

    pub(in crate::formats) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.info(name).map(|info| info.shape.as_slice())
    }

    pub(in crate::formats) fn dtype(&self, name: &str) -> Option<Dtype> {
        self.info(name).map(|info| info.dtype)
    }

    /// The bytes of one tensor, if they lie one after the other.
    pub(in crate::formats) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let place = self.info(name).filter(|place| place.strides.is_none())?;
        Some(&self.file[place.start..place.start + place.len()])
    }

    /// A plain tensor's place in the file, if its elements lie one after the other.
    pub(in crate::formats) fn stored(&self, name: &str) -> Option<StoredTensor<'_>> {
        let dtype = float(self.dtype(name)?)?;
        let place = self.info(name).filter(|place| place.strides.is_none())?;
        Some(StoredTensor { bytes: self.file.bytes(place.start..place.start + place.len()), dtype })
    }

    /// Copies one tensor out of the file.
    pub(in crate::formats) fn read(&self, name: &str) -> Result<PlainTensor> {
        let info = self.info(name).ok_or_else(|| Error::tensor(name, format!("not in {}", self.path.display())))?;
        let Some(dtype) = float(info.dtype) else { return Err(unsupported_dtype(name, info.dtype, &self.path)) };
        let Some(StoredTensor { bytes, .. }) = self.stored(name) else {
            let bytes = info.gather(&self.file);
            let data = match dtype {
                Float::F32 => PlainData::F32(copied(&bytes)),
                Float::Bf16 => PlainData::Bf16(copied(&bytes)),
                Float::F16 => PlainData::F16(copied(&bytes)),
            };
            return Ok(PlainTensor { data, shape: info.shape.clone() });
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
pub(in crate::formats) fn unsupported_dtype(name: &str, dtype: Dtype, path: &Path) -> Error {
    let message = format!("has dtype {dtype:?} in {}; supported are F32, BF16 and F16", path.display());
    Error::tensor(name, message)
}

fn copied<T: Pod>(bytes: &[u8]) -> Vec<T> {
    let mut out = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut out).copy_from_slice(bytes);
    out
}

fn read<T: Pod>(bytes: FileBytes) -> std::io::Result<Vec<T>> {
    const { assert!(cfg!(target_endian = "little"), "safetensors are little-endian") };
    let mut out = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytes.read_at(0, bytemuck::cast_slice_mut(&mut out))?;
    Ok(out)
}

fn places(header: &Metadata, data_start: usize) -> HashMap<String, Place> {
    let place = |(name, info): (String, &TensorInfo)| {
        let (start, shape) = (data_start + info.data_offsets.0, info.shape.clone());
        (name, Place { dtype: info.dtype, shape, start, strides: None })
    };
    header.tensors().into_iter().map(place).collect()
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
