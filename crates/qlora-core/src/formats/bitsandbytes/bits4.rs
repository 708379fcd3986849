//! bitsandbytes' 4-bit tensors of a linear layer `P` of shape `[N, K]` (`QuantState.as_dict`):
//!
//! | tensor | dtype, shape | |
//! |---|---|---|
//! | `P.weight` | U8 `[ceil(N K / 2), 1]` | or the same bytes as I8, F16, BF16, F32, F64 (`bnb_4bit_quant_storage`) |
//! | `P.weight.absmax` | F32 `[blocks]` | U8 if nested |
//! | `P.weight.quant_map` | F32 `[16]` | must be the type's own |
//! | `P.weight.nested_absmax` | F32 `[ceil(blocks / 256)]` | nested only |
//! | `P.weight.nested_quant_map` | F32 `[256]` | nested only |
//! | `P.weight.quant_state.bitsandbytes__nf4` (`fp4`) | U8 | JSON: type, block sizes, dtype and shape before quantization |

use qlora_kernels::Dtype as Float;
use qlora_kernels::quant::{Absmax, BLOCKSIZES, NestedAbsmax, Parts, QuantType};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::formats::packed::Raw;

/// The largest JSON state that is read; real ones have some 200 bytes.
const MAX_STATE: usize = 1 << 14;

/// The JSON quantization state of a tensor.
#[derive(Debug)]
pub(in crate::formats) struct State {
    quant_type: QuantType,
    blocksize: usize,
    dtype: Float,
    /// Block size and offset of double quantization.
    nested: Option<(usize, f32)>,
}

/// The state, and the names of all tensors, that of the codes first.
pub(in crate::formats) fn find(
    raw: &Raw<'_>,
    module: &str,
    [rows, cols]: [usize; 2],
) -> Result<Option<(State, Vec<String>)>> {
    let weight = format!("{module}.weight");
    let part = |suffix: &str| format!("{weight}.{suffix}");
    let state_name = |quant_type: QuantType| part(&format!("quant_state.bitsandbytes__{}", quant_type.name()));
    let types = [QuantType::Nf4, QuantType::Fp4];
    let quant_type = match types.map(|quant_type| raw.has(&state_name(quant_type))) {
        [true, true] => return Err(Error::tensor(&weight, "has a quantization state for NF4 and one for FP4")),
        [true, false] => QuantType::Nf4,
        [false, true] => QuantType::Fp4,
        [false, false] => {
            let companion = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"].map(part);
            let integers = matches!(raw.dtype(&weight), Some(Dtype::U8 | Dtype::I8));
            return match companion.iter().find(|name| raw.has(name)) {
                None if !integers => Ok(None),
                found => {
                    let why = found.map_or("its dtype is an integer".to_owned(), |name| format!("there is {name}"));
                    let message = format!("missing in {}; {weight} is 4-bit ({why})", raw.folder.display());
                    Err(Error::tensor(state_name(QuantType::Nf4), message))
                }
            };
        }
    };
    let name = state_name(quant_type);
    let state = parse(raw, &name, quant_type, [rows, cols])?;
    let owner = format!("{weight} in {quant_type}");
    let elements = rows * cols;
    let (bytes, blocks) = (elements.div_ceil(2), elements.div_ceil(state.blocksize));

    let storage = [Dtype::U8, Dtype::I8, Dtype::F16, Dtype::BF16, Dtype::F32, Dtype::F64];
    let count = match raw.dtype(&weight) {
        Some(Dtype::F16 | Dtype::BF16) => bytes.div_ceil(2),
        Some(Dtype::F32) => bytes.div_ceil(4),
        Some(Dtype::F64) => bytes.div_ceil(8),
        _ => bytes,
    };
    raw.expect(&weight, &owner, &storage, &[&[count, 1], &[1, count]])?;
    if raw.bytes(&weight)?.len() != bytes {
        let message =
            format!("{bytes} bytes of codes do not fill whole {:?} in {}", raw.dtype(&weight), raw.place(&weight));
        return Err(Error::tensor(&weight, message));
    }
    let mut parts = vec![weight.clone(), part("absmax"), part("quant_map"), name.clone()];
    raw.expect(&part("quant_map"), &owner, &[Dtype::F32], &[&[16]])?;
    match state.nested {
        None => raw.expect(&part("absmax"), &owner, &[Dtype::F32], &[&[blocks]])?,
        Some((nested_blocksize, _)) => {
            raw.expect(&part("absmax"), &owner, &[Dtype::U8], &[&[blocks]])?;
            raw.expect(&part("nested_absmax"), &owner, &[Dtype::F32], &[&[blocks.div_ceil(nested_blocksize)]])?;
            raw.expect(&part("nested_quant_map"), &owner, &[Dtype::F32], &[&[256]])?;
            parts.extend([part("nested_absmax"), part("nested_quant_map")]);
        }
    }
    Ok(Some((state, parts)))
}

fn parse(raw: &Raw<'_>, name: &str, quant_type: QuantType, shape: [usize; 2]) -> Result<State> {
    let wrong = |message: String| Error::tensor(name, format!("{message}, in {}", raw.place(name)));
    let bytes = raw.bytes(name)?;
    if raw.dtype(name) != Some(Dtype::U8) || bytes.len() > MAX_STATE {
        return Err(wrong(format!("is {} bytes of {:?}; expected JSON text as U8", bytes.len(), raw.dtype(name))));
    }
    let json: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|error| wrong(format!("is not a JSON object ({error})")))?;
    let show = |key: &str| json.get(key).map_or("missing".to_owned(), |value| format!("{:.60}", value.to_string()));
    let expected = |key: &str, expected: String| wrong(format!("{key} is {}; expected {expected}", show(key)));
    let number = |key: &str| json.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
    if json.get("quant_type").and_then(Value::as_str) != Some(quant_type.name()) {
        return Err(expected("quant_type", format!("\"{}\", as in its name", quant_type.name())));
    }
    let blocksize = number("blocksize").filter(|size| BLOCKSIZES.contains(size));
    let blocksize = blocksize.ok_or_else(|| expected("blocksize", format!("one of {BLOCKSIZES:?}")))?;
    let dtype = match json.get("dtype").and_then(Value::as_str) {
        Some("float32") => Float::F32,
        Some("bfloat16") => Float::Bf16,
        Some("float16") => Float::F16,
        _ => return Err(expected("dtype", "\"float32\", \"bfloat16\" or \"float16\"".to_owned())),
    };
    let sizes = json.get("shape").and_then(Value::as_array).map(|sizes| sizes.iter().map(Value::as_u64).collect());
    let sizes: Option<Vec<Option<u64>>> = sizes;
    if sizes.as_deref() != Some(&shape.map(|size| Some(size as u64))) {
        return Err(expected("shape", format!("{shape:?}, which the configuration gives")));
    }
    let nested = if ["nested_blocksize", "nested_offset", "nested_dtype"].iter().any(|key| json.contains_key(*key)) {
        let nested_blocksize = number("nested_blocksize").filter(|size| size.is_power_of_two() && *size <= 1 << 20);
        let nested_blocksize =
            nested_blocksize.ok_or_else(|| expected("nested_blocksize", "a power of two, such as 256".to_owned()))?;
        if json.get("nested_dtype").and_then(Value::as_str) != Some("float32") {
            return Err(expected("nested_dtype", "\"float32\"".to_owned()));
        }
        let offset = json.get("nested_offset").and_then(Value::as_f64).map(|offset| offset as f32);
        let offset = offset.filter(|offset| offset.is_finite());
        Some((nested_blocksize, offset.ok_or_else(|| expected("nested_offset", "a number".to_owned()))?))
    } else {
        None
    };
    Ok(State { quant_type, blocksize, dtype, nested })
}

pub(in crate::formats) fn read(raw: &Raw<'_>, module: &str, [rows, cols]: [usize; 2], state: &State) -> Result<Parts> {
    let weight = format!("{module}.weight");
    let part = |suffix: &str| format!("{weight}.{suffix}");
    let map = raw.f32(&part("quant_map"))?;
    let own = state.quant_type.quant_map();
    // Versions of bitsandbytes round the table's last bit differently; a really different one would be another type.
    if let Some(i) = (0..16).find(|&i| map[i].is_nan() || (map[i] - own[i]).abs() > 1e-6) {
        let message = format!("value {i} is {}, {} has {}: not bitsandbytes' table", map[i], state.quant_type, own[i]);
        return Err(Error::tensor(part("quant_map"), format!("{message}, in {}", raw.place(&part("quant_map")))));
    }
    let absmax = match state.nested {
        None => Absmax::Plain(raw.scales(&part("absmax"), 0.0)?),
        Some((blocksize, offset)) => Absmax::Nested(NestedAbsmax {
            codes: raw.bytes(&part("absmax"))?.to_vec(),
            absmax: raw.scales(&part("nested_absmax"), f32::MIN)?,
            quant_map: raw.scales(&part("nested_quant_map"), f32::MIN)?,
            offset,
            blocksize,
        }),
    };
    Ok(Parts {
        codes: raw.bytes(&weight)?.to_vec(),
        absmax,
        rows,
        cols,
        quant_type: state.quant_type,
        blocksize: state.blocksize,
        source_dtype: state.dtype,
    })
}
