//! Weights as `torch.save` writes them: `pytorch_model.bin` and `adapter_model.bin`.
//!
//! Such a file is a pickle, a program that builds Python objects, with the tensors' bytes beside it. It is read by a machine
//! that knows tensors alone and executes nothing ([`machine`]); a file that asks for anything else is refused, and the message
//! says what for. (candle's reader was measured against this and not taken: it panics on a call with too few arguments, copies an
//! object at every reference to it, so that a file of a kilobyte can ask for all memory, and leaves out what it does not know.)
//!
//! Two layouts: since PyTorch 1.6 a zip archive without compression (`NAME/data.pkl`, `NAME/data/KEY`), before that five pickles
//! one after the other (a magic number, a version, sizes of types, the objects, the keys of the storages) and then each storage as
//! i64 count and elements. Little-endian both.

mod machine;

use std::collections::HashMap;
use std::io::{Cursor, Read};

use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use machine::{Object, Objects, Storage, shown};

/// The largest pickle that is read; the one of a model with 30,000 tensors has 6 MB.
const MAX_PICKLE: u64 = 64 << 20;
/// How the older layout begins: protocol 2, and an integer of ten bytes.
const MAGIC: [u8; 15] = [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// A tensor's place in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// The first element's byte.
    pub(crate) start: usize,
    /// The steps of each dimension in elements, where the elements do not lie one after the other.
    pub(crate) strides: Option<Vec<usize>>,
}

impl Place {
    /// Bytes of its elements.
    pub(crate) fn len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    /// Its elements row-major, from the bytes of its file.
    pub(crate) fn gather(&self, file: &[u8]) -> Vec<u8> {
        let Some(strides) = &self.strides else { return file[self.start..self.start + self.len()].to_vec() };
        let width = width(self.dtype);
        let mut out = Vec::with_capacity(self.len());
        let mut index = vec![0; self.shape.len()];
        for _ in 0..self.len() / width {
            let at = self.start + width * index.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>();
            out.extend_from_slice(&file[at..at + width]);
            for (i, size) in index.iter_mut().zip(&self.shape).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        out
    }
}

/// Bytes of an element of the types that have storages.
fn width(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// The tensors of a file, by name.
///
/// # Errors
/// If it is damaged, or is not a dictionary of tensors alone.
pub(crate) fn tensors(file: &[u8]) -> Result<HashMap<String, Place>, String> {
    let places = read(file)?;
    let total = places.values().fold(0usize, |total, place| total.saturating_add(place.len()));
    // Tied tables are stored once and named twice.
    if total > file.len().saturating_mul(4) {
        return Err(format!(
            "its tensors have {total} bytes, many times the file's: they are views of the same storages"
        ));
    }
    Ok(places)
}

fn read(file: &[u8]) -> Result<HashMap<String, Place>, String> {
    if file.starts_with(&MAGIC) {
        return legacy(file);
    }
    if file.starts_with(b"PK\x03\x04") {
        return archive(file);
    }
    if file.starts_with(b"version https://git-lfs") {
        return Err("a Git LFS pointer, not the weights: run git lfs pull, or download the file".to_owned());
    }
    Err("not a file of torch.save".to_owned())
}

fn archive(file: &[u8]) -> Result<HashMap<String, Place>, String> {
    let broken = |error: zip::result::ZipError| format!("damaged or cut short: {error}");
    let mut zip = ZipArchive::new(Cursor::new(file)).map_err(broken)?;
    let pickles: Vec<String> = zip
        .file_names_raw()
        .filter_map(|name| str::from_utf8(name).ok()?.strip_suffix("/data.pkl"))
        .filter(|prefix| !prefix.contains('/'))
        .map(str::to_owned)
        .collect();
    let [prefix] = &*pickles else {
        return Err("a zip archive that torch.save did not write (it has no NAME/data.pkl)".to_owned());
    };
    let text = |zip: &mut ZipArchive<Cursor<&[u8]>>, name: &str| -> Result<Option<Vec<u8>>, String> {
        let Some(index) = zip.index_for_name_raw(format!("{prefix}/{name}").as_bytes()) else { return Ok(None) };
        let entry = zip.by_index(index).map_err(broken)?;
        if entry.compression() != CompressionMethod::Stored || entry.size() > MAX_PICKLE.min(file.len() as u64) {
            return Err(format!("{name} is compressed or of {} bytes, as torch.save does not write it", entry.size()));
        }
        let mut bytes = Vec::new();
        entry.take(MAX_PICKLE).read_to_end(&mut bytes).map_err(|error| format!("{name} is damaged: {error}"))?;
        Ok(Some(bytes))
    };
    if text(&mut zip, "byteorder")?.is_some_and(|order| order != b"little") {
        return Err("written on a big-endian machine, which is not read".to_owned());
    }
    let pickle = text(&mut zip, "data.pkl")?.expect("its name was found");
    let objects = machine::read(&pickle, &mut 0)?;
    places(&objects, |key, storage| {
        let missing = || format!("cut short: storage {:?} is missing", shown(key));
        let index = zip.index_for_name_raw(format!("{prefix}/data/{key}").as_bytes()).ok_or_else(missing)?;
        let entry = zip.by_index_raw(index).map_err(broken)?;
        let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
        if entry.compression() != CompressionMethod::Stored {
            return Err(format!("storage {:?} is compressed, as torch.save does not write it", shown(key)));
        }
        whole(file, key, storage, start, usize::try_from(entry.size()).ok())
    })
}

fn legacy(file: &[u8]) -> Result<HashMap<String, Place>, String> {
    let mut at = MAGIC.len();
    let version = machine::read(file, &mut at)?;
    if *version.get(version.root) != Object::Int(1001) {
        return Err("a version of torch.save's older layout that is not read".to_owned());
    }
    let system = machine::read(file, &mut at)?;
    let little = |&(key, value): &(u32, u32)| {
        *system.get(key) == Object::Text("little_endian") && *system.get(value) == Object::Bool(true)
    };
    if !matches!(system.get(system.root), Object::Dict(entries) if entries.iter().any(little)) {
        return Err("written on a big-endian machine, which is not read".to_owned());
    }
    let objects = machine::read(file, &mut at)?;
    let keys = machine::read(file, &mut at)?;
    let Object::List(order) = keys.get(keys.root) else { return Err("it has no list of storages".to_owned()) };
    let mut used: HashMap<&str, Storage> = HashMap::new();
    for (_, tensor) in objects.tensors()? {
        used.insert(objects.text(tensor.storage.key)?, tensor.storage);
    }
    let mut starts: HashMap<&str, (usize, usize)> = HashMap::new();
    for &key in order {
        let key = keys.text(key)?;
        let storage = used.get(key).ok_or_else(|| format!("storage {:?} belongs to no tensor", shown(key)))?;
        let count = file.get(at..).and_then(|rest| rest.first_chunk::<8>()).map(|count| u64::from_le_bytes(*count));
        let bytes =
            count.and_then(|count| usize::try_from(count).ok()).and_then(|n| n.checked_mul(width(storage.dtype)));
        let end = bytes.and_then(|bytes| (at + 8).checked_add(bytes)).filter(|&end| end <= file.len());
        let (Some(bytes), Some(end)) = (bytes, end) else {
            return Err(format!("cut short: storage {:?} is not whole", shown(key)));
        };
        starts.insert(key, (at + 8, bytes));
        at = end;
    }
    places(&objects, |key, storage| {
        let place = starts.get(key).copied();
        whole(file, key, storage, place.map(|(start, _)| start), place.map(|(_, bytes)| bytes))
    })
}

/// The start of a storage that lies in the file as a whole.
fn whole(
    file: &[u8],
    key: &str,
    storage: &Storage,
    start: Option<usize>,
    bytes: Option<usize>,
) -> Result<usize, String> {
    let expected = storage.len.checked_mul(width(storage.dtype));
    match (start, bytes) {
        (Some(start), Some(bytes)) if start.checked_add(bytes).is_some_and(|end| end <= file.len()) => {
            if Some(bytes) == expected {
                return Ok(start);
            }
            Err(format!("storage {:?} has {bytes} bytes, its tensors ask for {} elements", shown(key), storage.len))
        }
        _ => Err(format!("cut short: storage {:?} is not whole", shown(key))),
    }
}

/// The places of all tensors, given those of their storages.
fn places(
    objects: &Objects<'_>,
    mut start_of: impl FnMut(&str, &Storage) -> Result<usize, String>,
) -> Result<HashMap<String, Place>, String> {
    let mut starts: HashMap<&str, (usize, Storage)> = HashMap::new();
    let mut places = HashMap::new();
    for (name, tensor) in objects.tensors()? {
        let storage = tensor.storage;
        let key = objects.text(storage.key)?;
        let start = match starts.get(key) {
            Some(&(start, known)) if (known.dtype, known.len) == (storage.dtype, storage.len) => start,
            Some(_) => return Err(format!("storage {:?} is of two types or sizes", shown(key))),
            None => {
                let start = start_of(key, &storage)?;
                starts.insert(key, (start, storage));
                start
            }
        };
        if places.contains_key(name) {
            return Err(format!("two tensors are called {:?}", shown(name)));
        }
        let place = Place {
            dtype: storage.dtype,
            shape: tensor.shape.clone(),
            start: if tensor.len() == 0 { start } else { start + tensor.offset * width(storage.dtype) },
            strides: (!tensor.is_contiguous()).then(|| tensor.strides.clone()),
        };
        places.insert(name.to_owned(), place);
    }
    Ok(places)
}

/// The same tensors as a safetensors file.
///
/// # Errors
/// As [`tensors`]; also if views of the same storages would make it much larger than the file.
pub(crate) fn to_safetensors(file: &[u8]) -> Result<Vec<u8>, String> {
    struct Owned(Dtype, Vec<usize>, Vec<u8>);
    impl safetensors::View for Owned {
        fn dtype(&self) -> Dtype {
            self.0
        }
        fn shape(&self) -> &[usize] {
            &self.1
        }
        fn data(&self) -> std::borrow::Cow<'_, [u8]> {
            (&self.2).into()
        }
        fn data_len(&self) -> usize {
            self.2.len()
        }
    }
    let places = tensors(file)?;
    let owned = places.into_iter().map(|(name, place)| {
        let data = place.gather(file);
        (name, Owned(place.dtype, place.shape, data))
    });
    let mut out = Vec::new();
    crate::formats::safetensors::write_safetensors(&mut out, owned.collect(), None)
        .map_err(|error| error.to_string())?;
    Ok(out)
}

#[cfg(test)]
mod tests;
