//! The files of a split model: which tensors go into which, and their headers.
//!
//! As `llama-gguf-split` makes them: the first has the metadata of the model; every part says which it is (`split.no`, u16, from 0),
//! how many there are (`split.count`, u16) and how many tensors the model has (`split.tensors.count`, i32).

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::Planned;
use crate::error::{Error, Result};
use crate::formats::gguf::metadata::{ALIGNMENT, Metadata};
use crate::formats::gguf::split::part_names;

/// One file.
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) header: Vec<u8>,
    /// The tensors in it, by their numbers.
    pub(super) tensors: Range<usize>,
    pub(super) bytes: u64,
}

/// The parts of a model that is to be at `out`: one file of that name where everything fits into `limit`.
///
/// # Errors
/// If there would be more parts than names for them.
pub(super) fn split(plan: &[Planned], metadata: &Metadata, out: &Path, limit: Option<u64>) -> Result<Vec<Part>> {
    let ranges = ranges(&plan.iter().map(|tensor| tensor.bytes).collect::<Vec<_>>(), limit);
    let count = ranges.len();
    let paths = match count {
        1 => vec![out.to_owned()],
        _ => {
            let stem = out.file_stem().unwrap_or_default().to_string_lossy();
            // Any part names all of them; the name of the first is asked for.
            let names = part_names(&format!("{stem}-00001-of-{count:05}.gguf")).ok_or_else(|| {
                Error::Invalid(format!(
                    "{}: {count} parts are more than a name has room for; allow larger ones",
                    out.display()
                ))
            })?;
            names.into_iter().map(|name| out.with_file_name(name)).collect()
        }
    };
    let part = |(number, (tensors, path)): (usize, (Range<usize>, PathBuf))| {
        let mut own = if number == 0 { metadata.clone() } else { Metadata::default() };
        if count > 1 {
            own.u16("split.no", number as u16);
            own.u16("split.count", count as u16);
            own.i32("split.tensors.count", plan.len() as i32);
        }
        let planned = &plan[tensors.clone()];
        let described: Vec<_> = planned.iter().map(|t| (t.name.as_str(), &*t.shape, t.kind.id(), t.bytes)).collect();
        let header = own.header(&described);
        let bytes = header.len() as u64 + planned.iter().map(|t| t.bytes.next_multiple_of(ALIGNMENT)).sum::<u64>();
        Part { path, header, tensors, bytes }
    };
    Ok(ranges.into_iter().zip(paths).enumerate().map(part).collect())
}

fn ranges(bytes: &[u64], limit: Option<u64>) -> Vec<Range<usize>> {
    let limit = limit.unwrap_or(u64::MAX);
    let (mut ranges, mut first, mut sum) = (Vec::new(), 0, 0u64);
    for (index, bytes) in bytes.iter().map(|bytes| bytes.next_multiple_of(ALIGNMENT)).enumerate() {
        if index > first && sum.saturating_add(bytes) > limit {
            ranges.push(first..index);
            (first, sum) = (index, 0);
        }
        sum = sum.saturating_add(bytes);
    }
    ranges.push(first..bytes.len());
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_fill_parts_in_their_order() {
        assert_eq!(ranges(&[32, 64, 32, 320, 1], None), vec![0..5; 1]);
        assert_eq!(ranges(&[32, 64, 32, 320, 1], Some(128)), [0..3, 3..4, 4..5]);
        assert_eq!(ranges(&[320, 320], Some(1)), [0..1, 1..2]);
        assert_eq!(ranges(&[1, 1, 1], Some(64)), [0..2, 2..3]);
    }
}
