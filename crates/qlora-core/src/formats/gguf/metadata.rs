//! The header of a GGUF file in bytes.

/// Tensors begin at multiples of this (the format's default).
pub(crate) const ALIGNMENT: u64 = 32;

const VERSION: u32 = 3;

/// The metadata in the order in which it was added.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metadata {
    count: u64,
    bytes: Vec<u8>,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        string(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }

    pub(crate) fn u16(&mut self, key: &str, value: u16) {
        self.key(key, 2);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn i32(&mut self, key: &str, value: i32) {
        self.key(key, 5);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(u8::from(value));
    }

    pub(crate) fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        string(&mut self.bytes, value);
    }

    fn array(&mut self, key: &str, kind: u32, len: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((len as u64).to_le_bytes());
    }

    pub(crate) fn strings<S: AsRef<str>>(&mut self, key: &str, values: &[S]) {
        self.array(key, 8, values.len());
        values.iter().for_each(|value| string(&mut self.bytes, value.as_ref()));
    }

    pub(crate) fn ints(&mut self, key: &str, values: &[i32]) {
        self.array(key, 5, values.len());
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    pub(crate) fn floats(&mut self, key: &str, values: &[f32]) {
        self.array(key, 6, values.len());
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    /// Everything before the first tensor's bytes. A tensor is its name, its shape with the outermost size first, ggml's
    /// number of its type, and its bytes; each begins at the next multiple of the alignment.
    pub(crate) fn header(&self, tensors: &[(&str, &[usize], u32, u64)]) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.extend(&self.bytes);
        let mut offset = 0u64;
        for (name, shape, kind, bytes) in tensors {
            string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            // The contiguous size comes first.
            shape.iter().rev().for_each(|&size| out.extend((size as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += bytes.next_multiple_of(ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
        out
    }
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
