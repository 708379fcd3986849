//! Writes a model as a GGUF file that llama.cpp runs.
//!
//! Layout (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), all little-endian, alignment 32: `GGUF`, version
//! 3, the metadata (architecture, rotary embedding, tokenizer, chat template, end tokens), the tensors' descriptions, the
//! tensors. Names and metadata are those of llama.cpp's converter; rows of q and k are interleaved for Llama and Mistral
//! as it does.
//!
//! The type of each matrix is llama.cpp's choice for the same name (`mix`); vectors are f32. Blocks of q8_0, and those
//! of q4_0 without an importance matrix, are bit-equal with the `gguf` package's ([`blocks`]); the others are found by
//! a search that leaves less error than llama.cpp's ([`qlora_kernels::ggml`]).
//!
//! Large models are split over several files where asked for. Tensors are read, converted and written one at a time.
//! Before the first is read, the tokenizer is written, read back and compared with the original on a text in many
//! scripts: a model whose tokens differ answers badly without any error.

mod importance;
mod kind;
mod lora;
mod measure;
mod mix;
mod model;
mod parts;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use qlora_kernels::ggml::{self, BlockType};
use qlora_kernels::weight::PlainData;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

pub use self::importance::Importance;
pub use self::kind::GgufType;
use self::kind::TensorType;
pub use self::lora::write_adapter;
use self::mix::Mix;
use crate::atomic::PendingFile;
use crate::error::{Error, Result};
use crate::formats::gguf::metadata::{ALIGNMENT, Metadata};
use crate::formats::gguf::{blocks, rows};
use crate::formats::safetensors::disk;
use crate::merge::require_space;
use crate::source::{PlainTensor, WeightSource, again};
use crate::tokenizer::Tokenizer;

/// Options of writing a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufOptions<'a> {
    /// The type of the matrices.
    pub kind: GgufType,
    /// `general.name`.
    pub name: Option<&'a str>,
    /// The chat template.
    pub chat_template: Option<&'a str>,
    /// The tokens that end an answer, as `generation_config.json` has them.
    pub eos_token_ids: &'a [u32],
    /// The weights of the matrices' columns in quantization.
    pub importance: Option<&'a Importance>,
    /// A file is closed before its tensors would have more bytes than this (a single one may have more); what follows goes into
    /// further files, named as llama.cpp's `llama-gguf-split` does: `NAME-00001-of-00003.gguf`. None: one file.
    pub split_bytes: Option<u64>,
}

impl GgufOptions<'_> {
    /// One file of this type without a name and a chat template.
    pub fn new(kind: GgufType) -> Self {
        Self { kind, name: None, chat_template: None, eos_token_ids: &[], importance: None, split_bytes: None }
    }
}

/// The size of a written GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WrittenGguf {
    /// Bytes of all files.
    pub bytes: u64,
    /// The number of tensors.
    pub tensors: usize,
    /// The files: one, or the parts of a split model.
    pub files: Vec<PathBuf>,
    /// Matrices whose rows are no whole number of blocks of the type they would have had.
    pub fallbacks: Vec<Fallback>,
    /// Matrices that were quantized without an importance though an importance matrix was given, but for the embedding: it does
    /// not know them.
    pub without_importance: Vec<String>,
}

/// A matrix that has another type than the file's mix has for it, because of its width.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fallback {
    /// llama.cpp's name of the matrix.
    pub tensor: String,
    /// The elements of its rows.
    pub columns: usize,
    /// The type that needs rows of whole blocks.
    pub wanted: &'static str,
    /// The type it has.
    pub got: &'static str,
}

/// One tensor's place in the file.
struct Planned {
    /// Hugging Face's name; none for the table of rotary frequencies.
    source: Option<String>,
    /// The heads whose rows are interleaved.
    interleaved: Option<usize>,
    name: String,
    shape: Vec<usize>,
    kind: TensorType,
    /// The type that its rows do not fit.
    wanted: Option<TensorType>,
    bytes: u64,
}

/// Writes the weights of `source` with their tokenizer to the file `out` (or its parts), replacing what was there. `progress` is called
/// with the number of tensors done and their total.
///
/// # Errors
/// If the model or its tokenizer has something that GGUF or llama.cpp has no place for, a tensor cannot be read or does
/// not fit the type, the importance matrix is of another model, or the disk is full or fails. The old contents of `out`
/// are untouched in that case.
pub fn write(
    source: &dyn WeightSource,
    tokenizer: &Tokenizer,
    out: &Path,
    options: &GgufOptions<'_>,
    mut progress: impl FnMut(usize, usize),
) -> Result<WrittenGguf> {
    if let (true, Some(remark)) = (options.kind.is_low(), again(source, options.kind.name())) {
        tracing::warn!("{remark}");
    }
    let config = source.config();
    let mut metadata = Metadata::default();
    model::describe(config, options, &mut metadata)?;
    vocabulary::write(tokenizer, config, options, &mut metadata)?;
    let rope_table = model::rope_table(config);
    let plan = plan(source, options, rope_table.as_deref());
    let mut without_importance = Vec::new();
    for tensor in &plan {
        let (Some(importance), TensorType::Blocks(_)) = (options.importance, tensor.kind) else { continue };
        let cols = tensor.shape.last().copied().unwrap_or(1);
        if importance.of(&tensor.name, cols)?.is_none() && tensor.name != "token_embd.weight" {
            without_importance.push(tensor.name.clone());
        }
    }
    let parts = parts::split(&plan, &metadata, out, options.split_bytes)?;
    let bytes = parts.iter().map(|part| part.bytes).sum();

    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut files = Vec::new();
    let mut done = 0;
    for part in &parts {
        let path = &part.path;
        let mut file = PendingFile::create(path)?;
        if files.is_empty() {
            require_space(folder, out, bytes)?;
        }
        let mut put =
            |bytes: &[u8]| file.write_with(|writer| writer.write_all(bytes)).map_err(|error| full(path, error));
        put(&part.header)?;
        for tensor in &plan[part.tensors.clone()] {
            let bytes = match (&tensor.source, &rope_table) {
                (Some(name), _) => encode(source, name, tensor, options.importance)?,
                (None, table) => table.iter().flatten().flat_map(|x| x.to_le_bytes()).collect(),
            };
            if bytes.len() as u64 != tensor.bytes {
                let message = format!("has {} bytes as {}, expected {}", bytes.len(), tensor.kind.name(), tensor.bytes);
                return Err(Error::tensor(&tensor.name, message));
            }
            put(&bytes)?;
            put(&[0; ALIGNMENT as usize][..(bytes.len() as u64).next_multiple_of(ALIGNMENT) as usize - bytes.len()])?;
            done += 1;
            progress(done, plan.len());
        }
        file.sync().map_err(|error| full(path, error))?;
        files.push(file);
    }
    // All are on the disk before the first gets its name.
    for (file, part) in files.into_iter().zip(&parts) {
        file.commit().map_err(|error| full(&part.path, error))?;
    }
    let fallbacks = plan.iter().filter_map(|tensor| {
        let columns = tensor.shape.last().copied()?;
        let (wanted, got) = (tensor.wanted?.name(), tensor.kind.name());
        Some(Fallback { tensor: tensor.name.clone(), columns, wanted, got })
    });
    Ok(WrittenGguf {
        bytes,
        tensors: plan.len(),
        fallbacks: fallbacks.collect(),
        files: parts.into_iter().map(|part| part.path).collect(),
        without_importance,
    })
}

/// Adds what to do to the error of a full disk.
fn full(out: &Path, error: Error) -> Error {
    match error {
        Error::Io { source, .. } => disk(out, source),
        other => other,
    }
}

fn plan(source: &dyn WeightSource, options: &GgufOptions<'_>, rope_table: Option<&[f32]>) -> Vec<Planned> {
    let config = source.config();
    let mix = Mix::new(options.kind, config, options.importance.is_some());
    let mut plan = Vec::new();
    if let Some(table) = rope_table {
        let (name, shape) = (model::ROPE_TABLE.to_owned(), vec![table.len()]);
        let (kind, bytes) = (TensorType::F32, 4 * table.len() as u64);
        plan.push(Planned { source: None, interleaved: None, name, shape, kind, wanted: None, bytes });
    }
    for tensor in config.spec().tensors() {
        let (name, interleaved) = (tensor.gguf(), tensor.module.interleaved_heads);
        let (kind, wanted) = mix.of(&name, tensor.shape.len(), tensor.shape.last().copied().unwrap_or(1));
        let bytes = kind.bytes(tensor.shape.iter().product());
        plan.push(Planned { source: Some(tensor.name), interleaved, name, shape: tensor.shape, kind, wanted, bytes });
    }
    plan
}

/// A tensor's bytes in the file.
fn encode(
    source: &dyn WeightSource,
    name: &str,
    planned: &Planned,
    importance: Option<&Importance>,
) -> Result<Vec<u8>> {
    let kind = planned.kind;
    let PlainTensor { mut data, shape } = source.read_finite(name)?;
    if let Some(heads) = planned.interleaved {
        rows::permute(&mut data, heads, source.config().head_dim);
    }
    let cols = shape.last().copied().unwrap_or(1);
    let importance = importance.map(|importance| importance.of(&planned.name, cols)).transpose()?.flatten();
    let (block, block_bytes) = kind.block();
    let mut out = vec![0; data.len() / block * block_bytes];
    // Whole blocks, and small enough that the f32 copies of all threads stay small.
    const PIECE: usize = 1 << 16;
    let results: Vec<bool> = out
        .par_chunks_mut(PIECE / block * block_bytes)
        .enumerate()
        .map(|(index, out)| {
            let first = index * PIECE;
            let range = first..first + out.len() / block_bytes * block;
            encode_piece(&data, range, kind, importance, out)
        })
        .collect();
    match results.iter().position(|fits| !fits) {
        None => Ok(out),
        Some(piece) => {
            let message = format!(
                "has a value beyond the range of {} near element {}; choose bf16 or f32",
                kind.name(),
                piece * PIECE
            );
            Err(Error::tensor(name, message))
        }
    }
}

/// Returns whether all values fit.
fn encode_piece(
    data: &PlainData,
    range: std::ops::Range<usize>,
    kind: TensorType,
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> bool {
    // bf16 and f16 that stay what they are need no conversion.
    match (data, kind) {
        (PlainData::Bf16(data), TensorType::Bf16) => out.copy_from_slice(bytemuck::cast_slice(&data[range])),
        (PlainData::F16(data), TensorType::F16) => out.copy_from_slice(bytemuck::cast_slice(&data[range])),
        _ => {
            let first = range.start;
            let mut values = vec![0.0; range.len()];
            data.to_f32(range, &mut values);
            match kind {
                TensorType::F32 => out.copy_from_slice(bytemuck::cast_slice(&values)),
                TensorType::Bf16 => {
                    let halves = out.as_chunks_mut().0.iter_mut().zip(&values);
                    halves.for_each(|(out, x)| *out = bf16::from_f32(*x).to_le_bytes());
                }
                TensorType::F16 => {
                    for (out, x) in out.as_chunks_mut().0.iter_mut().zip(&values) {
                        let half = f16::from_f32(*x);
                        if !half.is_finite() {
                            return false;
                        }
                        *out = half.to_le_bytes();
                    }
                }
                TensorType::Q8_0 => blocks::q8_0(&values, out),
                TensorType::Blocks(BlockType::Q4_0) if importance.is_none() => blocks::q4_0(&values, out),
                TensorType::Blocks(kind) => return ggml::quantize(kind, &values, first, importance, out),
            }
        }
    }
    true
}
