//! The header of a GGUF file, checked against the file's length before anything is allocated.
//!
//! Layout (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), all little-endian: magic `GGUF`, `u32` version,
//! `u64` tensor count, `u64` metadata count; the metadata (string key, `u32` type, value); the tensor descriptions (string
//! name, `u32` dimensions, `u64` sizes with the contiguous one first, `u32` type, `u64` offset); padding to
//! `general.alignment`; the tensors. A string is a `u64` length and its bytes.
//!
//! candle's reader takes over duplicates silently, divides by an alignment of zero and holds every array element as an
//! enum; this one keeps strings and arrays as byte ranges of the mapped file, so a header needs little more memory than
//! its keys.

use std::collections::HashMap;
use std::ops::Range;

use super::types::GgmlType;

/// The largest number of dimensions ggml has.
const MAX_DIMS: u32 = 4;
/// Longest key or tensor name that is read (the format allows 65535 for keys, 64 for tensors).
const MAX_NAME: u64 = 65_535;
/// Arrays of arrays are allowed by the format; known files nest no deeper.
const MAX_NESTING: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// The result of parsing; the error is a message without the path.
pub(super) type Parse<T> = std::result::Result<T, String>;

/// A metadata value; strings and arrays stay in the file.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(Range<usize>),
    Array { kind: u32, len: usize, bytes: Range<usize> },
}

/// One tensor's description.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo {
    pub(super) name: String,
    /// Sizes, the outermost first.
    pub(super) shape: Vec<usize>,
    pub(super) kind: GgmlType,
    /// The range of its bytes in the file.
    pub(super) bytes: Range<usize>,
    /// The part of a split model that the file is; 0 is the first, as the only one of others.
    pub(super) part: usize,
}

/// A parsed header. It refers into the bytes it was parsed from.
#[derive(Debug)]
pub(super) struct Header {
    values: HashMap<String, Value>,
    pub(super) tensors: Vec<TensorInfo>,
}

impl Header {
    pub(super) fn parse(file: &[u8]) -> Parse<Self> {
        let mut reader = Reader { file, at: 0 };
        let magic = reader.take(4)?;
        if magic != b"GGUF" {
            return Err("not a GGUF file: it does not begin with GGUF".to_owned());
        }
        match reader.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 => return Err("a big-endian GGUF file, which is not read".to_owned()),
            version => return Err(format!("GGUF version {version}; versions 2 and 3 are read")),
        }
        let (tensor_count, value_count) = (reader.u64()?, reader.u64()?);
        // The smallest metadata entry is an empty key, a type and one byte; the smallest tensor a name, one size and an offset.
        let needed = value_count.checked_mul(13).zip(tensor_count.checked_mul(32)).and_then(|(a, b)| a.checked_add(b));
        if needed.is_none_or(|needed| needed > reader.left() as u64) {
            let left = reader.left();
            return Err(format!(
                "{value_count} metadata entries and {tensor_count} tensors do not fit the {left} bytes left"
            ));
        }

        let mut values = HashMap::new();
        for _ in 0..value_count {
            let key = reader.name("metadata key")?;
            let kind = reader.u32()?;
            let value = reader.value(kind, 0).map_err(|e| format!("metadata {key}: {e}"))?;
            if values.insert(key.clone(), value).is_some() {
                return Err(format!("metadata {key} is there twice"));
            }
        }
        let mut descriptions = Vec::new();
        for _ in 0..tensor_count {
            let name = reader.name("tensor name")?;
            descriptions.push(reader.tensor(&name).map_err(|e| format!("tensor {name}: {e}"))?);
        }
        let mut header = Self { values, tensors: Vec::new() };
        let alignment = match header.u64("general.alignment")? {
            None => DEFAULT_ALIGNMENT,
            Some(alignment) if alignment.is_power_of_two() && (8..=1 << 20).contains(&alignment) => alignment,
            Some(alignment) => return Err(format!("general.alignment is {alignment}, not a power of two from 8 on")),
        };
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        header.tensors = place(descriptions, data_start, alignment, file.len() as u64)?;
        Ok(header)
    }

    /// Whether there is a value for `key`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    fn typed<T>(&self, key: &str, what: &str, read: impl Fn(&Value) -> Option<T>) -> Parse<Option<T>> {
        match self.values.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| format!("metadata {key} is not {what}")),
        }
    }

    pub(super) fn u64(&self, key: &str) -> Parse<Option<u64>> {
        self.typed(key, "a whole number", |value| match value {
            Value::Unsigned(value) => Some(*value),
            Value::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        })
    }

    pub(super) fn f64(&self, key: &str) -> Parse<Option<f64>> {
        self.typed(key, "a number", |value| match value {
            Value::Float(value) => Some(*value),
            Value::Unsigned(value) => Some(*value as f64),
            Value::Signed(value) => Some(*value as f64),
            _ => None,
        })
    }

    pub(super) fn bool(&self, key: &str) -> Parse<Option<bool>> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A string value; `file` is what the header was parsed from.
    pub(super) fn str<'a>(&self, key: &str, file: &'a [u8]) -> Parse<Option<&'a str>> {
        let range = self.typed(key, "a string", |value| match value {
            Value::String(range) => Some(range.clone()),
            _ => None,
        })?;
        range
            .map(|range| std::str::from_utf8(&file[range]).map_err(|_| format!("metadata {key} is not UTF-8")))
            .transpose()
    }

    fn array(&self, key: &str, expected: u32, what: &str) -> Parse<Option<(usize, Range<usize>)>> {
        self.typed(key, what, |value| match value {
            Value::Array { kind, len, bytes } if *kind == expected => Some((*len, bytes.clone())),
            _ => None,
        })
    }

    /// An array of strings.
    pub(super) fn strings<'a>(&self, key: &str, file: &'a [u8]) -> Parse<Option<Vec<&'a str>>> {
        let Some((len, bytes)) = self.array(key, STRING, "a list of strings")? else { return Ok(None) };
        let mut reader = Reader { file: &file[..bytes.end], at: bytes.start };
        let mut strings = Vec::with_capacity(len);
        for index in 0..len {
            let range = reader.string()?;
            let text = std::str::from_utf8(&file[range]);
            strings.push(text.map_err(|_| format!("metadata {key}: entry {index} is not UTF-8"))?);
        }
        Ok(Some(strings))
    }

    /// An array of f32.
    pub(super) fn floats(&self, key: &str, file: &[u8]) -> Parse<Option<Vec<f32>>> {
        let array = self.array(key, FLOAT32, "a list of f32")?;
        Ok(array.map(|(_, bytes)| file[bytes].as_chunks().0.iter().map(|chunk| f32::from_le_bytes(*chunk)).collect()))
    }

    /// An array of i32.
    pub(super) fn ints(&self, key: &str, file: &[u8]) -> Parse<Option<Vec<i32>>> {
        let array = self.array(key, INT32, "a list of i32")?;
        Ok(array.map(|(_, bytes)| file[bytes].as_chunks().0.iter().map(|chunk| i32::from_le_bytes(*chunk)).collect()))
    }
}

const INT32: u32 = 5;
const FLOAT32: u32 = 6;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// The size of a scalar of a metadata type.
fn scalar_size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// A description before its place in the file is known.
struct Description {
    name: String,
    shape: Vec<usize>,
    kind: GgmlType,
    offset: u64,
    size: u64,
}

/// Turns offsets into byte ranges: each within the file, aligned, and none over another.
fn place(descriptions: Vec<Description>, data_start: u64, alignment: u64, file_len: u64) -> Parse<Vec<TensorInfo>> {
    let mut tensors = Vec::with_capacity(descriptions.len());
    for Description { name, shape, kind, offset, size } in descriptions {
        if !offset.is_multiple_of(alignment) {
            return Err(format!("tensor {name}: offset {offset} is not a multiple of the alignment {alignment}"));
        }
        let start = data_start.checked_add(offset);
        let range = start.and_then(|start| Some(start..start.checked_add(size)?)).filter(|range| range.end <= file_len);
        let Some(range) = range else {
            return Err(format!(
                "tensor {name}: its {size} bytes at offset {offset} of the data reach past the end of the file ({file_len} \
                 bytes); the file is cut short or damaged"
            ));
        };
        tensors.push(TensorInfo { name, shape, kind, bytes: range.start as usize..range.end as usize, part: 0 });
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.bytes.start);
    for pair in order.windows(2) {
        if pair[1].bytes.start < pair[0].bytes.end {
            return Err(format!("tensors {} and {} overlap", pair[0].name, pair[1].name));
        }
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("tensor {} is there twice", pair[0])),
        None => Ok(tensors),
    }
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, len: usize) -> Parse<&'a [u8]> {
        let bytes = self.file[self.at..].get(..len);
        let bytes = bytes.ok_or_else(|| format!("the file ends at byte {} within its header", self.file.len()))?;
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Parse<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("take gives as many bytes as asked for"))
    }

    fn u32(&mut self) -> Parse<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Parse<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Parse<Range<usize>> {
        let len = self.u64()?;
        let left = self.left();
        let Some(len) = usize::try_from(len).ok().filter(|len| *len <= left) else {
            return Err(format!("a string of {len} bytes at byte {}, where {left} bytes are left", self.at));
        };
        let start = self.at;
        self.at += len;
        Ok(start..self.at)
    }

    fn name(&mut self, what: &str) -> Parse<String> {
        let start = self.at;
        let range = self.string().map_err(|e| format!("{what}: {e}"))?;
        if range.len() as u64 > MAX_NAME {
            return Err(format!("the {what} at byte {start} is {} bytes long", range.len()));
        }
        match std::str::from_utf8(&self.file[range]) {
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err(format!("the {what} at byte {start} is not UTF-8")),
        }
    }

    fn value(&mut self, kind: u32, depth: u32) -> Parse<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(self.array::<1>()?[0])),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            INT32 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            FLOAT32 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()?[0] != 0),
            STRING => Value::String(self.string()?),
            ARRAY => {
                let (kind, len) = (self.u32()?, self.u64()?);
                let start = self.at;
                let fits = usize::try_from(len).ok().filter(|len| *len <= self.left());
                let Some(len) = fits else { return Err(format!("an array of {len} entries does not fit the file")) };
                match scalar_size(kind) {
                    Some(size) => {
                        let bytes = len.checked_mul(size).ok_or("an array that is too long")?;
                        self.take(bytes)?;
                    }
                    None if kind == STRING => (0..len).try_for_each(|_| self.string().map(drop))?,
                    None if kind == ARRAY && depth < MAX_NESTING => {
                        (0..len).try_for_each(|_| self.value(ARRAY, depth + 1).map(drop))?;
                    }
                    None => return Err(format!("an array of type {kind}, which is not known")),
                }
                Value::Array { kind, len, bytes: start..self.at }
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("type {other} is not known")),
        })
    }

    fn tensor(&mut self, name: &str) -> Parse<Description> {
        let dims = self.u32()?;
        if dims == 0 || dims > MAX_DIMS {
            return Err(format!("{dims} dimensions; between 1 and {MAX_DIMS} are possible"));
        }
        let mut sizes = Vec::new();
        for _ in 0..dims {
            sizes.push(self.u64()?);
        }
        let kind = self.u32()?;
        let kind = GgmlType::from_id(kind).ok_or_else(|| format!("ggml type {kind}, which is not known"))?;
        let offset = self.u64()?;
        let elements = sizes.iter().try_fold(1u64, |product, size| product.checked_mul(*size)).filter(|n| *n > 0);
        let Some(elements) = elements.filter(|n| usize::try_from(*n).is_ok()) else {
            return Err(format!("shape {sizes:?} is empty or too large"));
        };
        let (block, block_bytes) = kind.block();
        if !sizes[0].is_multiple_of(block) {
            return Err(format!("rows of {} elements are not whole blocks of {block} as {kind} has them", sizes[0]));
        }
        let size =
            (elements / block).checked_mul(block_bytes).ok_or_else(|| format!("shape {sizes:?} is too large"))?;
        sizes.reverse();
        let shape = sizes.into_iter().map(|size| size as usize).collect();
        Ok(Description { name: name.to_owned(), shape, kind, offset, size })
    }
}
