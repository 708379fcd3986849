//! Writes a model as a GGUF file that llama.cpp runs.
//!
//! Layout (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), all little-endian, alignment 32: `GGUF`, version
//! 3, the metadata (architecture, rotary embedding, tokenizer, chat template, end tokens), the tensors' descriptions, the
//! tensors. Names and metadata are those of llama.cpp's converter; rows of q and k are interleaved for Llama and Mistral
//! as it does; quantized blocks are bit-equal with the `gguf` package's ([`blocks`]).
//!
//! | type | matrices | norms and biases |
//! |---|---|---|
//! | f32, f16, bf16 | that type | f32 |
//! | q8_0 | q8_0 | f32 |
//! | q4_0 | q4_0; embedding and head q8_0, as they lose most | f32 |
//!
//! A matrix whose rows are no whole number of blocks is f16. Tensors are read, converted and written one at a time.
//! Before the first is read, the tokenizer is written, read back and compared with the original on a text in many
//! scripts: a model whose tokens differ answers badly without any error.

pub mod blocks;
mod metadata;
mod model;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use half::{bf16, f16};
use qlora_kernels::weight::PlainData;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use self::metadata::{ALIGNMENT, Metadata};
use crate::atomic::PendingFile;
use crate::error::{Error, Result};
use crate::merge::require_space;
use crate::safetensors_stream::disk;
use crate::source::gguf::rows;
use crate::source::{PlainTensor, WeightSource, again};
use crate::spec::Kind;
use crate::tokenizer::Tokenizer;

/// The type of a GGUF file's matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufType {
    /// 32-bit.
    F32,
    /// IEEE half; a value beyond 65504 is an error.
    F16,
    /// bfloat16.
    Bf16,
    /// Blocks of 32 8-bit integers with an f16 scale: 8.5 bits a weight.
    Q8_0,
    /// Blocks of 32 4-bit integers with an f16 scale: 4.5 bits a weight.
    Q4_0,
}

impl GgufType {
    const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0];

    /// Its name in llama.cpp's options: `q8_0`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// ggml's number of the type.
    fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
            Self::Q8_0 => 8,
            Self::Q4_0 => 2,
        }
    }

    /// llama.cpp's number of a file that has mostly this type (`general.file_type`).
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 32,
            Self::Q8_0 => 7,
            Self::Q4_0 => 2,
        }
    }

    /// Elements and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (blocks::BLOCK, blocks::Q8_0_BYTES),
            Self::Q4_0 => (blocks::BLOCK, blocks::Q4_0_BYTES),
        }
    }

    /// What a tensor becomes in a file of this type.
    fn of(self, module: Kind, shape: &[usize]) -> Self {
        let cols = shape.last().copied().unwrap_or(1);
        match self {
            _ if shape.len() < 2 => Self::F32,
            Self::Q8_0 | Self::Q4_0 if !cols.is_multiple_of(blocks::BLOCK) => Self::F16,
            Self::Q4_0 if module == Kind::Table => Self::Q8_0,
            kind => kind,
        }
    }

    fn bytes(self, elements: usize) -> u64 {
        let (block, bytes) = self.block();
        (elements / block * bytes) as u64
    }
}

impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for GgufType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(text));
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::Invalid(format!("{text:?} is no type of GGUF files that is written; there are {names}"))
        })
    }
}

/// How a GGUF file is written.
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
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrittenGguf {
    /// The file's length in bytes.
    pub bytes: u64,
    /// The number of tensors.
    pub tensors: usize,
}

/// One tensor's place in the file.
struct Planned {
    /// Hugging Face's name; none for the table of rotary frequencies.
    source: Option<String>,
    /// The heads whose rows are interleaved.
    interleaved: Option<usize>,
    name: String,
    shape: Vec<usize>,
    kind: GgufType,
    bytes: u64,
}

/// Writes the weights of `source` with their tokenizer to the file `out`, replacing what was there. `progress` is called
/// with the number of tensors done and their total.
///
/// # Errors
/// If the model or its tokenizer has something that GGUF or llama.cpp has no place for, a tensor cannot be read or does
/// not fit the type, or the disk is full or fails. What was at `out` is untouched in that case.
pub fn write(
    source: &dyn WeightSource,
    tokenizer: &Tokenizer,
    out: &Path,
    options: &GgufOptions<'_>,
    mut progress: impl FnMut(usize, usize),
) -> Result<WrittenGguf> {
    if let (GgufType::Q4_0, Some(remark)) = (options.kind, again(source, options.kind.name())) {
        tracing::warn!("{remark}");
    }
    let config = source.config();
    let mut metadata = Metadata::default();
    model::describe(config, options, &mut metadata)?;
    vocabulary::write(tokenizer, config, options, &mut metadata)?;
    let rope_table = model::rope_table(config);
    let plan = plan(source, options.kind, rope_table.as_deref())?;
    let header =
        metadata.header(&plan.iter().map(|t| (t.name.as_str(), &*t.shape, t.kind.id(), t.bytes)).collect::<Vec<_>>());
    let total = header.len() as u64 + plan.iter().map(|t| t.bytes.next_multiple_of(ALIGNMENT)).sum::<u64>();

    let mut file = PendingFile::create(out)?;
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    require_space(folder, out, total)?;
    let mut put = |bytes: &[u8]| file.write_with(|writer| writer.write_all(bytes)).map_err(|error| full(out, error));
    put(&header)?;
    for (index, tensor) in plan.iter().enumerate() {
        let bytes = match (&tensor.source, &rope_table) {
            (Some(name), _) => encode(source, name, tensor)?,
            (None, table) => table.iter().flatten().flat_map(|x| x.to_le_bytes()).collect(),
        };
        if bytes.len() as u64 != tensor.bytes {
            let message = format!("has {} bytes as {}, expected {}", bytes.len(), tensor.kind, tensor.bytes);
            return Err(Error::tensor(&tensor.name, message));
        }
        put(&bytes)?;
        put(&[0; ALIGNMENT as usize][..(bytes.len() as u64).next_multiple_of(ALIGNMENT) as usize - bytes.len()])?;
        progress(index + 1, plan.len());
    }
    file.commit().map_err(|error| full(out, error))?;
    Ok(WrittenGguf { bytes: total, tensors: plan.len() })
}

/// Adds what to do to the error of a full disk.
fn full(out: &Path, error: Error) -> Error {
    match error {
        Error::Io { source, .. } => disk(out, source),
        other => other,
    }
}

fn plan(source: &dyn WeightSource, kind: GgufType, rope_table: Option<&[f32]>) -> Result<Vec<Planned>> {
    let mut plan = Vec::new();
    if let Some(table) = rope_table {
        let (name, shape) = (model::ROPE_TABLE.to_owned(), vec![table.len()]);
        let bytes = 4 * table.len() as u64;
        plan.push(Planned { source: None, interleaved: None, name, shape, kind: GgufType::F32, bytes });
    }
    for tensor in source.config().spec().tensors() {
        let kind = kind.of(tensor.module.role.kind(), &tensor.shape);
        let bytes = kind.bytes(tensor.shape.iter().product());
        let (name, interleaved) = (tensor.gguf(), tensor.module.interleaved_heads);
        plan.push(Planned { source: Some(tensor.name), interleaved, name, shape: tensor.shape, kind, bytes });
    }
    Ok(plan)
}

/// A tensor's bytes in the file.
fn encode(source: &dyn WeightSource, name: &str, &Planned { kind, interleaved, .. }: &Planned) -> Result<Vec<u8>> {
    let PlainTensor { mut data, .. } = source.read_finite(name)?;
    if let Some(heads) = interleaved {
        rows::permute(&mut data, heads, source.config().head_dim);
    }
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
            encode_piece(&data, range, kind, out)
        })
        .collect();
    match results.iter().position(|fits| !fits) {
        None => Ok(out),
        Some(piece) => {
            let message = format!("has a value beyond f16's range near element {}; choose bf16 or f32", piece * PIECE);
            Err(Error::tensor(name, message))
        }
    }
}

/// Returns whether all values fit.
fn encode_piece(data: &PlainData, range: std::ops::Range<usize>, kind: GgufType, out: &mut [u8]) -> bool {
    // bf16 and f16 that stay what they are need no conversion.
    match (data, kind) {
        (PlainData::Bf16(data), GgufType::Bf16) => out.copy_from_slice(bytemuck::cast_slice(&data[range])),
        (PlainData::F16(data), GgufType::F16) => out.copy_from_slice(bytemuck::cast_slice(&data[range])),
        _ => {
            let mut values = vec![0.0; range.len()];
            data.to_f32(range, &mut values);
            match kind {
                GgufType::F32 => out.copy_from_slice(bytemuck::cast_slice(&values)),
                GgufType::Bf16 => {
                    let halves = out.as_chunks_mut().0.iter_mut().zip(&values);
                    halves.for_each(|(out, x)| *out = bf16::from_f32(*x).to_le_bytes());
                }
                GgufType::F16 => {
                    for (out, x) in out.as_chunks_mut().0.iter_mut().zip(&values) {
                        let half = f16::from_f32(*x);
                        if !half.is_finite() {
                            return false;
                        }
                        *out = half.to_le_bytes();
                    }
                }
                GgufType::Q8_0 => blocks::q8_0(&values, out),
                GgufType::Q4_0 => blocks::q4_0(&values, out),
            }
        }
    }
    true
}
