//! Our 4-bit formats against tensors that bitsandbytes quantized and dequantized (`scripts/fixtures/bnb_4bit.py`).

use half::{bf16, f16};
use qlora::kernels::quant::{
    Absmax, NestedAbsmax, Parts, QuantConfig, QuantType, Quantized4bit, SourceDtype, signed_dynamic_map,
};
use qlora::kernels::weight::{FrozenWeight, PlainData};
use safetensors::SafeTensors;

const FILES: [(&str, SourceDtype); 3] =
    [("f32", SourceDtype::F32), ("bf16", SourceDtype::Bf16), ("f16", SourceDtype::F16)];

/// One tensor as bitsandbytes wrote it.
struct Case<'a> {
    /// `<input>/<quant type>/<blocksize>/<plain or nested>`
    name: String,
    file: &'a SafeTensors<'a>,
    state: serde_json::Value,
}

impl Case<'_> {
    fn bytes(&self, key: &str) -> &[u8] {
        let name = format!("{}.{key}", self.name);
        self.file.tensor(&name).unwrap_or_else(|error| panic!("{name}: {error}")).data()
    }

    fn f32s(&self, key: &str) -> Vec<f32> {
        self.bytes(key).chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    fn integer(&self, key: &str) -> usize {
        self.state[key].as_u64().unwrap_or_else(|| panic!("{}: {key} in {}", self.name, self.state)) as usize
    }

    fn input(&self) -> Option<Vec<u8>> {
        let name = format!("input.{}", self.name.split('/').next().unwrap());
        Some(self.file.tensor(&name).ok()?.data().to_vec())
    }

    fn nested(&self) -> bool {
        self.state.get("nested_blocksize").is_some()
    }

    fn offset(&self) -> f32 {
        self.state["nested_offset"].as_f64().unwrap() as f32
    }

    fn config(&self) -> QuantConfig {
        QuantConfig {
            quant_type: self.state["quant_type"].as_str().unwrap().parse().unwrap(),
            blocksize: self.integer("blocksize"),
            double_quant: self.nested(),
        }
    }

    fn shape(&self) -> (usize, usize) {
        let shape = self.state["shape"].as_array().unwrap();
        (shape[0].as_u64().unwrap() as usize, shape[1].as_u64().unwrap() as usize)
    }

    /// The weight as a checkpoint has it.
    fn weight(&self, source_dtype: SourceDtype) -> Quantized4bit {
        let absmax = if self.nested() {
            Absmax::Nested(NestedAbsmax {
                codes: self.bytes("weight.absmax").to_vec(),
                absmax: self.f32s("weight.nested_absmax"),
                quant_map: self.f32s("weight.nested_quant_map"),
                offset: self.offset(),
                blocksize: self.integer("nested_blocksize"),
            })
        } else {
            Absmax::Plain(self.f32s("weight.absmax"))
        };
        let QuantConfig { quant_type, blocksize, .. } = self.config();
        let (rows, cols) = self.shape();
        let codes = self.bytes("weight").to_vec();
        Quantized4bit::from_parts(Parts { codes, absmax, rows, cols, quant_type, blocksize, source_dtype }).unwrap()
    }

    /// Our own quantization of the input.
    fn quantized(&self, dtype: SourceDtype, double_quant: bool) -> Option<Quantized4bit> {
        let (rows, cols) = self.shape();
        let data = plain(dtype, &self.input()?);
        Some(Quantized4bit::quantize(&data, rows, cols, &QuantConfig { double_quant, ..self.config() }).unwrap())
    }
}

fn plain(dtype: SourceDtype, bytes: &[u8]) -> PlainData {
    let (pairs, quads) = (bytes.as_chunks::<2>().0, bytes.as_chunks::<4>().0);
    match dtype {
        SourceDtype::F32 => PlainData::F32(quads.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
        SourceDtype::Bf16 => PlainData::Bf16(pairs.iter().map(|&bytes| bf16::from_le_bytes(bytes)).collect()),
        SourceDtype::F16 => PlainData::F16(pairs.iter().map(|&bytes| f16::from_le_bytes(bytes)).collect()),
    }
}

fn bits(data: &PlainData) -> Vec<u32> {
    match data {
        PlainData::F32(data) => data.iter().map(|x| x.to_bits()).collect(),
        PlainData::Bf16(data) => data.iter().map(|x| u32::from(x.to_bits())).collect(),
        PlainData::F16(data) => data.iter().map(|x| u32::from(x.to_bits())).collect(),
    }
}

fn f32_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Calls `check` for every case of every file and returns how many there were.
fn for_each_case(mut check: impl FnMut(&Case, SourceDtype)) -> usize {
    let mut count = 0;
    for (name, dtype) in FILES {
        let path = format!("{}/tests/fixtures/quant/bnb_{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for key in file.names() {
            let Some((case, _)) = key.split_once(".weight.quant_state.bitsandbytes__") else { continue };
            let state = serde_json::from_slice(file.tensor(key).unwrap().data()).unwrap();
            let case = Case { name: case.to_string(), file: &file, state };
            assert_eq!(case.state["dtype"], dtype.name());
            check(&case, dtype);
            count += 1;
        }
    }
    count
}

#[test]
fn dequantized_values_are_equal() {
    let mut kinds = std::collections::BTreeSet::new();
    let count = for_each_case(|case, dtype| {
        let weight = case.weight(dtype);
        let expected = bits(&plain(dtype, case.bytes("dequantized")));
        let got = bits(&weight.dequantize(dtype));
        let wrong = got.iter().zip(&expected).filter(|(got, expected)| got != expected).count();
        assert_eq!((wrong, got.len()), (0, expected.len()), "{dtype:?} {}", case.name);
        if dtype == SourceDtype::F32 {
            let mut rows = vec![f32::NAN; expected.len()];
            weight.dequantize_rows(0..weight.rows(), &mut rows);
            assert_eq!(f32_bits(&rows), expected, "{}", case.name);
        }
        kinds.insert((case.config().quant_type.name(), case.config().blocksize, case.nested(), dtype.name()));
    });
    assert_eq!((count, kinds.len()), (192, 2 * 3 * (6 + 2)), "{kinds:?}");
}

#[test]
fn codes_and_absmax_are_equal() {
    let mut elements = 0;
    for_each_case(|case, dtype| {
        let Some(weight) = case.quantized(dtype, false) else { return };
        assert_eq!(weight.codes(), case.bytes("weight"), "{dtype:?} {}", case.name);
        if !case.nested() {
            let absmax = f32_bits(&weight.absmax().to_f32());
            assert_eq!(absmax, f32_bits(&case.f32s("weight.absmax")), "{dtype:?} {}", case.name);
        }
        elements += weight.rows() * weight.cols();
    });
    assert!(elements > 100_000, "{elements}");
}

#[test]
fn nested_codes_and_absmax_are_equal_given_the_offset() {
    let (mut blocks, mut differ) = (0, 0);
    for_each_case(|case, dtype| {
        if !case.nested() {
            return;
        }
        let absmax = case.quantized(dtype, false).unwrap().absmax().to_f32();
        let nested = NestedAbsmax::quantize_around(&absmax, case.offset());
        assert_eq!(nested.codes, case.bytes("weight.absmax"), "{dtype:?} {}", case.name);
        assert_eq!(f32_bits(&nested.absmax), f32_bits(&case.f32s("weight.nested_absmax")), "{dtype:?} {}", case.name);
        assert_eq!(f32_bits(&nested.quant_map), f32_bits(&case.f32s("weight.nested_quant_map")));

        // With our own offset, which is summed in another order.
        let Absmax::Nested(own) = case.quantized(dtype, true).unwrap().absmax().clone() else { unreachable!() };
        let ulps = own.offset.to_bits().abs_diff(case.offset().to_bits());
        assert!(ulps <= 2, "{dtype:?} {}: offset {} or {}", case.name, own.offset, case.offset());
        blocks += own.codes.len();
        differ += own.codes.iter().zip(&nested.codes).filter(|(own, given)| own != given).count();
    });
    assert!(blocks > 2000, "{blocks}");
    assert!(differ * 1000 <= blocks, "{differ} of {blocks} nested codes differ with our own offset");
}

#[test]
fn tables_are_equal() {
    for_each_case(|case, _| {
        let quant_type: QuantType = case.config().quant_type;
        assert_eq!(f32_bits(&case.f32s("weight.quant_map")), f32_bits(&quant_type.quant_map()), "{}", case.name);
        if case.nested() {
            assert_eq!(f32_bits(&case.f32s("weight.nested_quant_map")), f32_bits(signed_dynamic_map()));
        }
    });
}
