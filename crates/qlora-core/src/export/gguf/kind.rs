//! The types of files, as llama.cpp's options name them, and of tensors.

use std::fmt;
use std::str::FromStr;

use qlora_kernels::ggml::BlockType;

use crate::error::{Error, Result};
use crate::formats::gguf::blocks;

/// The type of a GGUF file: that of most of its matrices. Which matrices have another one is llama.cpp's choice for the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
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
    /// Blocks of 32 4-bit integers with a scale and a minimum: 5 bits a weight.
    Q4_1,
    /// Blocks of 32 5-bit integers with a scale: 5.5 bits a weight.
    Q5_0,
    /// Blocks of 32 5-bit integers with a scale and a minimum: 6 bits a weight.
    Q5_1,
    /// 2-bit K-quants, some matrices with 3 or 4 bits.
    Q2K,
    /// 3-bit K-quants.
    Q3KS,
    /// 3-bit K-quants, sensitive matrices with 4 or 5 bits.
    Q3KM,
    /// 3-bit K-quants, sensitive matrices with 5 bits.
    Q3KL,
    /// 4-bit K-quants, the sensitive matrices of the first layers with 5 bits.
    Q4KS,
    /// 4-bit K-quants, half of the sensitive matrices with 6 bits: the usual choice.
    Q4KM,
    /// 5-bit K-quants.
    Q5KS,
    /// 5-bit K-quants, half of the sensitive matrices with 6 bits.
    Q5KM,
    /// 6-bit K-quants.
    Q6K,
}

impl GgufType {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q2K,
        Self::Q3KS,
        Self::Q3KM,
        Self::Q3KL,
        Self::Q4KS,
        Self::Q4KM,
        Self::Q5KS,
        Self::Q5KM,
        Self::Q6K,
    ];

    /// Name, llama.cpp's number of such a file (`general.file_type`), and the type of most matrices.
    fn row(self) -> (&'static str, u32, TensorType) {
        use TensorType::Blocks;
        match self {
            Self::F32 => ("f32", 0, TensorType::F32),
            Self::F16 => ("f16", 1, TensorType::F16),
            Self::Bf16 => ("bf16", 32, TensorType::Bf16),
            Self::Q8_0 => ("q8_0", 7, TensorType::Q8_0),
            Self::Q4_0 => ("q4_0", 2, Blocks(BlockType::Q4_0)),
            Self::Q4_1 => ("q4_1", 3, Blocks(BlockType::Q4_1)),
            Self::Q5_0 => ("q5_0", 8, Blocks(BlockType::Q5_0)),
            Self::Q5_1 => ("q5_1", 9, Blocks(BlockType::Q5_1)),
            Self::Q2K => ("q2_k", 10, Blocks(BlockType::Q2K)),
            Self::Q3KS => ("q3_k_s", 11, Blocks(BlockType::Q3K)),
            Self::Q3KM => ("q3_k_m", 12, Blocks(BlockType::Q3K)),
            Self::Q3KL => ("q3_k_l", 13, Blocks(BlockType::Q3K)),
            Self::Q4KS => ("q4_k_s", 14, Blocks(BlockType::Q4K)),
            Self::Q4KM => ("q4_k_m", 15, Blocks(BlockType::Q4K)),
            Self::Q5KS => ("q5_k_s", 16, Blocks(BlockType::Q5K)),
            Self::Q5KM => ("q5_k_m", 17, Blocks(BlockType::Q5K)),
            Self::Q6K => ("q6_k", 18, Blocks(BlockType::Q6K)),
        }
    }

    /// Its name in llama.cpp's options: `q4_k_m`.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// llama.cpp's number of a file that has mostly this type (`general.file_type`).
    pub(super) fn file_type(self) -> u32 {
        self.row().1
    }

    /// The type of most matrices.
    pub(super) fn tensor(self) -> TensorType {
        self.row().2
    }

    /// Whether weights that were stored in few bits before lose more than the type's own rounding.
    pub(super) fn is_low(self) -> bool {
        matches!(self.tensor(), TensorType::Blocks(_))
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
        // As llama.cpp: the K-quants without a size are the middle ones.
        let name = match text.to_ascii_lowercase() {
            name if matches!(name.as_str(), "q3_k" | "q4_k" | "q5_k") => format!("{name}_m"),
            name => name,
        };
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::Invalid(format!("{text:?} is no type of GGUF files that is written; there are {names}"))
        })
    }
}

/// The type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TensorType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Blocks(BlockType),
}

impl TensorType {
    /// ggml's number.
    pub(super) fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Bf16 => 30,
            Self::Q8_0 => 8,
            Self::Blocks(kind) => kind.id(),
        }
    }

    /// ggml's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Blocks(kind) => kind.name(),
        }
    }

    /// Elements and bytes of a block.
    pub(super) fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (blocks::BLOCK, blocks::Q8_0_BYTES),
            Self::Blocks(kind) => kind.block(),
        }
    }

    pub(super) fn bytes(self, elements: usize) -> u64 {
        let (block, bytes) = self.block();
        (elements / block * bytes) as u64
    }
}
