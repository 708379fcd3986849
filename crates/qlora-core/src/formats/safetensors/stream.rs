//! Writes a safetensors file whose tensors become known one after the other.
//!
//! The header stands before the data but depends on it: room is left for the longest header there can be, and what is not
//! needed is filled with spaces, as the format allows. [`write_safetensors`](crate::formats::safetensors::write_safetensors)
//! is for tensors that are all known beforehand.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use qlora_kernels::weight::PlainData;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::source::PlainTensor;

/// Bytes that an entry of the header needs beside the tensor's name: dtype, up to four sizes, two offsets.
const ENTRY: usize = 192;

/// A safetensors file that is being written. Nothing makes it atomic: write it into a folder that
/// [`replace_directory`](crate::atomic::replace_directory) fills.
#[derive(Debug)]
pub struct SafetensorsStream {
    file: BufWriter<File>,
    path: PathBuf,
    room: usize,
    header: Map<String, Value>,
    written: u64,
}

impl SafetensorsStream {
    /// Begins a file that will hold some of the tensors called `names`.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn create<'a>(path: &Path, names: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        Self::with_room(path, names.into_iter().map(|name| name.len() + ENTRY).sum::<usize>() + 64)
    }

    /// Begins a file whose header takes up to `room` bytes, rounded up to whole words.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn with_room(path: &Path, room: usize) -> Result<Self> {
        let room = room.next_multiple_of(8);
        let file = File::create(path).map_err(|error| Error::io(path, error))?;
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut stream =
            Self { file: BufWriter::with_capacity(1 << 20, file), path: path.to_owned(), room, header, written: 0 };
        stream.write(&vec![b' '; 8 + room])?;
        Ok(stream)
    }

    /// Appends a tensor.
    ///
    /// # Errors
    /// If it was written before, or the disk is full or fails.
    pub fn tensor(&mut self, name: &str, tensor: &PlainTensor) -> Result<()> {
        let (dtype, bytes): (_, &[u8]) = match &tensor.data {
            PlainData::F32(data) => ("F32", bytemuck::cast_slice(data)),
            PlainData::Bf16(data) => ("BF16", bytemuck::cast_slice(data)),
            PlainData::F16(data) => ("F16", bytemuck::cast_slice(data)),
        };
        self.bytes(name, dtype, &tensor.shape, bytes)
    }

    /// Appends a tensor of any type: `dtype` is safetensors' name for it, such as `U8`.
    ///
    /// # Errors
    /// If it was written before, or the disk is full or fails.
    ///
    /// # Panics
    /// If the length is none of this type and shape.
    pub fn bytes(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let elements: usize = shape.iter().product();
        assert!(bytes.len().is_multiple_of(elements.max(1)), "{name}: {} bytes as {dtype} {shape:?}", bytes.len());
        if self.header.contains_key(name) {
            return Err(Error::tensor(name, format!("is written twice to {}", self.path.display())));
        }
        let end = self.written + bytes.len() as u64;
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [self.written, end]});
        self.header.insert(name.to_owned(), entry);
        self.written = end;
        self.write(bytes)
    }

    /// Bytes of tensors so far.
    pub fn len(&self) -> u64 {
        self.written
    }

    /// Whether there is no tensor yet.
    pub fn is_empty(&self) -> bool {
        self.header.len() == 1
    }

    /// The tensors' names, in the order in which they were written.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.header.keys().skip(1).map(String::as_str)
    }

    /// Writes the header and flushes the file to the disk. Returns the file's length.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn finish(mut self) -> Result<u64> {
        let header = Value::Object(std::mem::take(&mut self.header)).to_string();
        if header.len() > self.room {
            return Err(Error::format(&self.path, "the header outgrew the room that was left for it"));
        }
        let length = (self.room as u64).to_le_bytes();
        let file = &mut self.file;
        let result = (|| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&length)?;
            file.write_all(header.as_bytes())?;
            file.flush()?;
            file.get_ref().sync_all()
        })();
        result.map_err(|error| disk(&self.path, error))?;
        Ok(8 + self.room as u64 + self.written)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|error| disk(&self.path, error))
    }
}

/// A write error, with advice if the disk is full.
pub(crate) fn disk(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            let message = format!("{error}; nothing is left of the output: free some space or choose another disk");
            Error::io(path, io::Error::new(error.kind(), message))
        }
        _ => Error::io(path, error),
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn the_safetensors_crate_reads_what_was_streamed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut stream = SafetensorsStream::create(&path, ["a", "b", "never written"]).unwrap();
        assert!(stream.is_empty());
        let b = PlainTensor { data: PlainData::Bf16(vec![bf16::ONE; 3]), shape: vec![3] };
        let a = PlainTensor { data: PlainData::F32(vec![1.0, -2.0]), shape: vec![1, 2] };
        stream.tensor("b", &b).unwrap();
        stream.tensor("a", &a).unwrap();
        assert!(stream.tensor("a", &a).unwrap_err().to_string().contains("written twice"));
        assert_eq!(stream.names().collect::<Vec<_>>(), ["b", "a"]);
        assert_eq!(stream.len(), 14);
        let length = stream.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, length);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 2);
        assert_eq!(file.tensor("a").unwrap().data(), [0, 0, 128, 63, 0, 0, 0, 192]);
        assert_eq!(file.tensor("b").unwrap().shape(), [3]);
    }

    #[test]
    fn the_room_is_enough_for_the_largest_numbers() {
        let name = "model.layers.4095.self_attn.q_norm.weight";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let mut stream = SafetensorsStream::create(&path, [name]).unwrap();
        let big = u64::MAX;
        let entry = json!({"dtype": "BF16", "shape": [big, big, big, big], "data_offsets": [big, big]});
        stream.header.insert(name.to_owned(), entry);
        assert!(stream.finish().is_ok());
    }

    #[test]
    fn a_full_disk_says_what_to_do() {
        let error = disk(Path::new("out"), io::Error::from(io::ErrorKind::StorageFull)).to_string();
        assert!(error.contains("out") && error.contains("free some space"), "{error}");
        // A device that is always full, where there is one.
        if Path::new("/dev/full").exists() {
            let mut stream = SafetensorsStream::create(Path::new("/dev/full"), ["a"]).unwrap();
            let big = PlainTensor { data: PlainData::F32(vec![1.0; 1 << 20]), shape: vec![1 << 20] };
            let error = stream.tensor("a", &big).unwrap_err().to_string();
            assert!(error.contains("/dev/full") && error.contains("free some space"), "{error}");
        }
    }
}
