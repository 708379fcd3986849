//! ggml's tensor types: the elements and bytes of a block, and its conversion to f32.

use std::fmt;

use bytemuck::Zeroable;
use candle_core::Device;
use candle_core::quantized::{GgmlDType, ggml_file};
use half::{bf16, f16};
use qlora_kernels::tensor::TensorView;
use qlora_kernels::weight::PlainData;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::iq4;
use crate::error::{Error, Result};

/// A tensor type by its number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GgmlType(u32);

/// Number, name, elements and bytes of a block, and candle's type where it can dequantize it.
type Row = (u32, &'static str, u64, u64, Option<GgmlDType>);

const TYPES: [Row; 33] = [
    (0, "F32", 1, 4, Some(GgmlDType::F32)),
    (1, "F16", 1, 2, Some(GgmlDType::F16)),
    (2, "Q4_0", 32, 18, Some(GgmlDType::Q4_0)),
    (3, "Q4_1", 32, 20, Some(GgmlDType::Q4_1)),
    (6, "Q5_0", 32, 22, Some(GgmlDType::Q5_0)),
    (7, "Q5_1", 32, 24, Some(GgmlDType::Q5_1)),
    (8, "Q8_0", 32, 34, Some(GgmlDType::Q8_0)),
    (9, "Q8_1", 32, 36, None),
    (10, "Q2_K", 256, 84, Some(GgmlDType::Q2K)),
    (11, "Q3_K", 256, 110, Some(GgmlDType::Q3K)),
    (12, "Q4_K", 256, 144, Some(GgmlDType::Q4K)),
    (13, "Q5_K", 256, 176, Some(GgmlDType::Q5K)),
    (14, "Q6_K", 256, 210, Some(GgmlDType::Q6K)),
    (15, "Q8_K", 256, 292, None),
    (16, "IQ2_XXS", 256, 66, None),
    (17, "IQ2_XS", 256, 74, None),
    (18, "IQ3_XXS", 256, 98, None),
    (19, "IQ1_S", 256, 50, None),
    (20, "IQ4_NL", 32, 18, None),
    (21, "IQ3_S", 256, 110, None),
    (22, "IQ2_S", 256, 82, None),
    (23, "IQ4_XS", 256, 136, None),
    (24, "I8", 1, 1, None),
    (25, "I16", 1, 2, None),
    (26, "I32", 1, 4, None),
    (27, "I64", 1, 8, None),
    (28, "F64", 1, 8, None),
    (29, "IQ1_M", 256, 56, None),
    (30, "BF16", 1, 2, Some(GgmlDType::BF16)),
    (34, "TQ1_0", 256, 54, None),
    (35, "TQ2_0", 256, 66, None),
    (39, "MXFP4", 32, 17, None),
    (40, "NVFP4", 64, 36, None),
];

/// Elements that are dequantized at once, a multiple of every block size: what the step needs beside its result.
const CHUNK: usize = 1 << 16;

/// Turns the bytes of whole blocks into their elements.
type Decode = fn(&[u8], &mut [f32]);

impl GgmlType {
    pub(super) const F32: Self = Self(0);

    pub(super) fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().any(|row| row.0 == id).then_some(Self(id))
    }

    fn row(self) -> &'static Row {
        TYPES.iter().find(|row| row.0 == self.0).expect("from_id admits only known types")
    }

    /// Elements and bytes of a block.
    pub(super) fn block(self) -> (u64, u64) {
        (self.row().2, self.row().3)
    }

    /// Whether [`GgmlType::decode`] knows the type.
    pub(super) fn is_supported(self) -> bool {
        self.row().4.is_some() || self.own().is_some()
    }

    /// Dequantizes whole blocks of a type that candle does not know.
    fn own(self) -> Option<Decode> {
        match self.name() {
            "IQ4_NL" => Some(iq4::nl),
            "IQ4_XS" => Some(iq4::xs),
            _ => None,
        }
    }

    /// The names of the types that [`GgmlType::decode`] knows.
    pub(super) fn supported() -> String {
        let names: Vec<&str> = TYPES.iter().filter(|row| GgmlType(row.0).is_supported()).map(|row| row.1).collect();
        names.join(", ")
    }

    /// The elements of whole blocks. F16 and BF16 stay what they are; quantized blocks become f32 through candle, chunk by
    /// chunk, so that beside the result little memory is needed.
    pub(super) fn decode(self, bytes: &[u8]) -> Result<PlainData> {
        let (block, block_bytes) = self.block();
        let elements = bytes.len() / block_bytes as usize * block as usize;
        match self.row().4 {
            Some(GgmlDType::F32) => Ok(PlainData::F32(from_chunks(bytes, f32::from_le_bytes))),
            Some(GgmlDType::F16) => Ok(PlainData::F16(from_chunks(bytes, f16::from_le_bytes))),
            Some(GgmlDType::BF16) => Ok(PlainData::Bf16(from_chunks(bytes, bf16::from_le_bytes))),
            dtype => {
                let mut out = vec![0f32; elements];
                let chunks =
                    out.par_chunks_mut(CHUNK).zip(bytes.par_chunks(CHUNK / block as usize * block_bytes as usize));
                match (dtype, self.own()) {
                    (Some(dtype), _) => chunks.try_for_each(|(out, bytes)| dequantize(dtype, bytes, out))?,
                    (None, Some(own)) => chunks.for_each(|(out, bytes)| own(bytes, out)),
                    (None, None) => {
                        return Err(Error::Unsupported(format!("ggml type {self} (supported: {})", Self::supported())));
                    }
                }
                Ok(PlainData::F32(out))
            }
        }
    }
}

impl GgmlType {
    /// ggml's name of the type.
    pub(super) fn name(self) -> &'static str {
        self.row().1
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn from_chunks<T: Send, const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    bytes.as_chunks().0.iter().map(|chunk| read(*chunk)).collect()
}

fn dequantize(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    // candle reads the blocks through a typed pointer; they are copied to where every block type is aligned.
    let mut aligned = vec![u64::zeroed(); bytes.len().div_ceil(8)];
    let blocks = &mut bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..bytes.len()];
    blocks.copy_from_slice(bytes);
    let tensor =
        ggml_file::qtensor_from_ggml(dtype, blocks, vec![out.len()], &Device::Cpu)?.dequantize(&Device::Cpu)?;
    out.copy_from_slice(TensorView::new("dequantize", &tensor)?.as_slice()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{DType, Tensor};

    use super::*;

    #[test]
    fn block_sizes_are_candles() {
        for (_, name, block, bytes, dtype) in TYPES {
            let Some(dtype) = dtype else { continue };
            assert_eq!((dtype.block_size() as u64, dtype.type_size() as u64), (block, bytes), "{name}");
            assert!(CHUNK.is_multiple_of(block as usize));
        }
    }

    #[test]
    fn every_supported_type_is_decoded_as_by_candle() {
        let elements = 2 * CHUNK + 512;
        let values = Tensor::rand(-1f32, 1.0, elements, &Device::Cpu).unwrap();
        for (id, name, .., dtype) in TYPES {
            let Some(dtype) = dtype else { continue };
            let quantized = QTensor::quantize(&values, dtype).unwrap();
            let expected = quantized.dequantize(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            let expected = expected.to_vec1::<f32>().unwrap();
            let data = GgmlType(id).decode(&quantized.data().unwrap()).unwrap();
            assert_eq!(data.len(), elements, "{name}");
            let mut got = vec![f32::NAN; elements];
            data.to_f32(0..elements, &mut got);
            assert_eq!(got, expected, "{name}");
        }
    }

    /// Bit for bit, signs of zeros included. Made by scripts/fixtures/ggml_errors.py.
    #[test]
    fn blocks_are_read_as_by_the_gguf_package() {
        let path =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf/k_quants.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut compared = 0;
        for (id, name, ..) in TYPES {
            let name = match name.strip_suffix("_K") {
                Some(start) => format!("{}_K", start.to_lowercase()),
                None => name.to_lowercase(),
            };
            let Ok(blocks) = file.tensor(&format!("{name}.blocks")) else { continue };
            let values = file.tensor(&format!("{name}.values")).unwrap();
            let expected: Vec<u32> = values.data().as_chunks().0.iter().map(|x| u32::from_le_bytes(*x)).collect();
            let data = GgmlType(id).decode(blocks.data()).unwrap();
            let mut got = vec![f32::NAN; expected.len()];
            data.to_f32(0..expected.len(), &mut got);
            assert_eq!(got.into_iter().map(f32::to_bits).collect::<Vec<_>>(), expected, "{name}");
            compared += 1;
        }
        assert_eq!(compared, 9);
    }
}
