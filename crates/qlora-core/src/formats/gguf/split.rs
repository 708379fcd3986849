//! Models that llama.cpp has split over several files (`llama-gguf-split`): `NAME-00001-of-00003.gguf` and so on, each with a header
//! of its own tensors. The metadata of the model is in the first, `split.no` and `split.count` in all.

use std::path::{Path, PathBuf};

use qlora_kernels::MappedFile;

use super::header::Header;
use crate::error::{Error, Result};

/// The names of all parts of a model, by that of the first or any other; none if a name is not that of a part.
pub(crate) fn part_names(name: &str) -> Option<Vec<String>> {
    let (stem, _, count) = part(name)?;
    // Nobody splits a model into more; a count from a name is nothing to trust.
    (count <= 9999).then(|| (1..=count).map(|number| format!("{stem}-{number:05}-of-{count:05}.gguf")).collect())
}

/// Whether a file is a part of a split model and not its first.
pub(crate) fn is_later_part(name: &str) -> bool {
    part(name).is_some_and(|(_, number, _)| number > 1)
}

fn part(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let parse = |digits: &str| -> Option<usize> {
        (digits.len() == 5 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
    };
    let (number, count) = (parse(number)?, parse(count)?);
    (1..=count).contains(&number).then_some((stem, number, count))
}

/// A part of a model beside its first.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) path: PathBuf,
    pub(super) file: MappedFile,
}

/// Opens the other parts of the model whose first one is at `path`, and adds their tensors to its header.
///
/// # Errors
/// If the file is not the first part, another one is missing, damaged or of another model, or a tensor is in two of them.
pub(super) fn open_rest(path: &Path, header: &mut Header) -> Result<Vec<Part>> {
    let format = |path: &Path| {
        let path = path.to_owned();
        move |message: String| Error::format(path, message)
    };
    let count = header.u64("split.count").map_err(format(path))?.unwrap_or(1);
    if count <= 1 {
        return Ok(Vec::new());
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(names) = part_names(name).filter(|names| names.len() as u64 == count) else {
        return Err(Error::Unsupported(format!(
            "{} is one part of {count} of a split GGUF file, but its name does not end in -00001-of-{count:05}.gguf, by which the others \
             would be found: rename the parts, or merge them (llama-gguf-split --merge)",
            path.display()
        )));
    };
    if header.u64("split.no").map_err(format(path))?.unwrap_or(0) != 0 || names[0] != name {
        return Err(Error::format(
            path,
            format!("this is a later part of a split GGUF file: give the first, {}", names[0]),
        ));
    }
    let mut parts = Vec::new();
    for (number, name) in names.iter().enumerate().skip(1) {
        let path = path.with_file_name(name);
        let file = MappedFile::open(&path).map_err(|error| Error::io(&path, error))?;
        let mut other = Header::parse(&file).map_err(format(&path))?;
        let key = |key: &str| other.u64(key).map_err(format(&path));
        if key("split.count")? != Some(count) || key("split.no")? != Some(number as u64) {
            return Err(Error::format(&path, format!("is not part {} of {count} of the model", number + 1)));
        }
        for tensor in &mut other.tensors {
            tensor.part = number;
            if header.tensors.iter().any(|known| known.name == tensor.name) {
                return Err(Error::tensor(
                    &tensor.name,
                    format!("is in two parts of the model, one of them {}", path.display()),
                ));
            }
        }
        header.tensors.append(&mut other.tensors);
        parts.push(Part { path, file });
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_known() {
        let names = part_names("q/m-Q4-00002-of-00003.gguf").unwrap();
        assert_eq!(names, ["q/m-Q4-00001-of-00003.gguf", "q/m-Q4-00002-of-00003.gguf", "q/m-Q4-00003-of-00003.gguf"]);
        assert!(is_later_part("m-00002-of-00003.gguf") && !is_later_part("m-00001-of-00003.gguf"));
        for name in [
            "m.gguf",
            "m-1-of-3.gguf",
            "m-00004-of-00003.gguf",
            "m-00000-of-00003.gguf",
            "m-00001-of-00003.bin",
            "m-00001-of-99999.gguf",
            "-of-.gguf",
            "m-0000é-of-00003.gguf",
        ] {
            assert_eq!(part_names(name), None, "{name}");
        }
    }
}
