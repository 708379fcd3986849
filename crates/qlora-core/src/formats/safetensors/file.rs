//! Writes a safetensors file tensor by tensor, so that only one tensor at a time is held in its file's form.
//!
//! Layout: u64 little-endian length of the header; the header, JSON, padded with spaces to 8 bytes; the tensors' bytes
//! without gaps. Tensors are ordered by dtype (widest first), then by name, as the safetensors crate and its Python
//! binding do: the same tensors and metadata give the same bytes. The crate's own writers need the whole file in
//! memory, or choose the temporary file themselves.

use safetensors::tensor::{Metadata, TensorInfo, View};
use std::collections::{HashMap, HashSet};
use std::io::{self, Write};

/// Writes `tensors` with `metadata` (the header's `__metadata__`) to `writer`.
///
/// # Errors
/// If two tensors have the same name, if a tensor's bytes do not fit its shape, or if writing fails.
pub fn write_safetensors<V: View>(
    writer: &mut dyn Write,
    mut tensors: Vec<(String, V)>,
    metadata: Option<HashMap<String, String>>,
) -> io::Result<()> {
    tensors.sort_by(|(left_name, left), (right_name, right)| {
        right.dtype().cmp(&left.dtype()).then_with(|| left_name.cmp(right_name))
    });
    let mut end = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for (name, tensor) in &tensors {
        let start = end;
        end += tensor.data_len();
        let info = TensorInfo { dtype: tensor.dtype(), shape: tensor.shape().to_vec(), data_offsets: (start, end) };
        infos.push((name.clone(), info));
    }
    let mut names = HashSet::new();
    if let Some((name, _)) = infos.iter().find(|(name, _)| !names.insert(name)) {
        return Err(io::Error::other(format!("two tensors are called {name}")));
    }
    let header = Metadata::new(metadata, infos).map_err(io::Error::other)?;
    let mut header = serde_json::to_vec(&header).map_err(io::Error::other)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    writer.write_all(&(header.len() as u64).to_le_bytes())?;
    writer.write_all(&header)?;
    for (name, tensor) in &tensors {
        let data = tensor.data();
        if data.len() != tensor.data_len() {
            return Err(io::Error::other(format!(
                "tensor {name} has {} bytes, expected {}",
                data.len(),
                tensor.data_len()
            )));
        }
        writer.write_all(&data)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    #[test]
    fn the_bytes_are_those_of_the_safetensors_crate() {
        let bytes: Vec<u8> = (0..64).collect();
        let view = |dtype, shape: &[usize], range: std::ops::Range<usize>| {
            TensorView::new(dtype, shape.to_vec(), &bytes[range]).unwrap()
        };
        let tensors = || {
            vec![
                ("z".to_owned(), view(Dtype::BF16, &[3], 0..6)),
                ("b".to_owned(), view(Dtype::F32, &[2, 3], 6..30)),
                ("a".to_owned(), view(Dtype::BF16, &[0, 4], 0..0)),
                ("c".to_owned(), view(Dtype::U8, &[1], 63..64)),
                ("a2".to_owned(), view(Dtype::F32, &[], 30..34)),
            ]
        };
        let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
        let mut ours = Vec::new();
        write_safetensors(&mut ours, tensors(), metadata.clone()).unwrap();
        assert_eq!(ours, safetensors::serialize(tensors(), metadata).unwrap());
        let same = vec![("a".to_owned(), view(Dtype::U8, &[1], 0..1)), ("a".to_owned(), view(Dtype::BF16, &[1], 1..3))];
        assert!(write_safetensors(&mut Vec::new(), same, None).unwrap_err().to_string().contains("called a"));
    }
}
