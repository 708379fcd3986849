//! `quantization_config`: the quantization of a checkpoint's weights.
//!
//! Keys that are missing get the default of the method's configuration class in transformers (checked against 5.23). What
//! a module's tensors are is decided by the tensors themselves; the configuration gives what they do not say.

use std::fmt;
use std::path::Path;

use serde_json::Value;

use super::json::Fields;
use crate::error::Result;
use crate::file;

/// The quantization of a checkpoint's linear layers. Modules that are stored plain (skip lists) are always allowed.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum StoredQuantization {
    /// bitsandbytes' NF4 or FP4; each tensor carries its own state.
    Bnb4bit,
    /// bitsandbytes' LLM.int8.
    Bnb8bit {
        /// `llm_int8_threshold`: activation columns from this magnitude on are not rounded.
        threshold: f32,
    },
    /// GPTQ.
    Gptq {
        /// 4 or 8.
        bits: usize,
        /// Input features that share a scale; none for all.
        group_size: Option<usize>,
        /// The offset of a stored zero point, added when it is read: 1 in the format `gptq`, 0 in `gptq_v2`.
        zero_offset: u8,
        /// Modules may have bits and groups of their own (`dynamic`).
        per_module: bool,
    },
    /// AWQ in the GEMM layout, 4-bit.
    Awq {
        /// Input features that share a scale; none for all.
        group_size: Option<usize>,
    },
}

/// The supported quantization methods, for messages.
const SUPPORTED: &str = "bitsandbytes (4-bit NF4 and FP4, 8-bit), gptq (4 and 8 bits; checkpoint_format gptq and \
                         gptq_v2) and awq (4 bits; version gemm)";

impl StoredQuantization {
    /// Reads `quantization_config` from the text of a `config.json`; none if the weights are stored plain. `path` is only
    /// named in errors.
    ///
    /// # Errors
    /// If the method or one of its options is not supported; the message says which are.
    pub fn from_json(text: &str, path: &Path) -> Result<Option<Self>> {
        let map = file::parse_object(text, path)?;
        parse(&Fields::new(path, &map))
    }
}

impl fmt::Display for StoredQuantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bnb4bit => f.write_str("bitsandbytes 4-bit"),
            Self::Bnb8bit { .. } => f.write_str("bitsandbytes 8-bit"),
            Self::Gptq { bits, .. } => write!(f, "GPTQ {bits}-bit"),
            Self::Awq { .. } => f.write_str("AWQ 4-bit"),
        }
    }
}

pub(super) fn parse(fields: &Fields<'_>) -> Result<Option<StoredQuantization>> {
    const KEY: &str = "quantization_config";
    let Some(map) = fields.object(KEY)? else { return Ok(None) };
    let fields = &fields.inside(KEY, map);
    let flag = |key: &str| -> Result<bool> { Ok(fields.bool(key)?.unwrap_or(false)) };
    let load =
        |bits: &str| -> Result<bool> { Ok(flag(&format!("load_in_{bits}"))? || flag(&format!("_load_in_{bits}"))?) };
    let method = match fields.string("quant_method")? {
        // Before transformers 4.35, bitsandbytes was the only method and not named.
        None if load("4bit")? || load("8bit")? => "bitsandbytes",
        None => return Err(fields.invalid(&format!("quant_method is missing; supported are {SUPPORTED}"))),
        Some(method) => method,
    };
    Ok(Some(match method {
        "bitsandbytes" => match (load("4bit")?, load("8bit")?) {
            (true, false) => StoredQuantization::Bnb4bit,
            (false, true) => {
                let threshold = fields.f64("llm_int8_threshold")?.unwrap_or(6.0) as f32;
                if !(threshold.is_finite() && threshold >= 0.0) {
                    return Err(fields.invalid(&format!("llm_int8_threshold is {threshold}; expected 0 or more")));
                }
                StoredQuantization::Bnb8bit { threshold }
            }
            (true, true) => return Err(fields.invalid("load_in_4bit and load_in_8bit are both true")),
            (false, false) => return Err(fields.invalid("neither load_in_4bit nor load_in_8bit is true")),
        },
        "gptq" => gptq(fields)?,
        "awq" => {
            let bits = either(fields, "bits", "w_bit")?.unwrap_or(4);
            if bits != 4 {
                return Err(unsupported(fields, &format!("AWQ in {bits} bits")));
            }
            for key in ["version", "format", "checkpoint_format"] {
                if let Some(format) = fields.string(key)?.filter(|format| !format.eq_ignore_ascii_case("gemm")) {
                    return Err(unsupported(fields, &format!("AWQ with {key} \"{format}\"")));
                }
            }
            let group_size = match fields.get("group_size") {
                Some(_) => group_size(fields, "group_size")?,
                None => group_size(fields, "q_group_size")?,
            };
            StoredQuantization::Awq { group_size }
        }
        other => return Err(unsupported(fields, &format!("quant_method \"{other}\""))),
    }))
}

fn gptq(fields: &Fields<'_>) -> Result<StoredQuantization> {
    let bits = fields.usize("bits")?.ok_or_else(|| fields.invalid("bits is missing"))?;
    if !matches!(bits, 4 | 8) {
        return Err(unsupported(fields, &format!("GPTQ in {bits} bits")));
    }
    let format = match fields.string("checkpoint_format")? {
        Some(format) => format,
        None => fields.string("format")?.unwrap_or("gptq"),
    };
    let zero_offset = match format.to_ascii_lowercase().as_str() {
        "gptq" => 1,
        "gptq_v2" => 0,
        _ => return Err(unsupported(fields, &format!("GPTQ with checkpoint_format \"{format}\""))),
    };
    if fields.bool("is_marlin_format")?.unwrap_or(false) {
        return Err(unsupported(fields, "GPTQ repacked for Marlin (is_marlin_format)"));
    }
    if let Some(dtype) = fields.string("pack_dtype")?.filter(|dtype| *dtype != "int32") {
        return Err(unsupported(fields, &format!("GPTQ with pack_dtype \"{dtype}\"")));
    }
    let per_module = fields.object("dynamic")?.is_some_and(|rules| !rules.is_empty());
    Ok(StoredQuantization::Gptq { bits, group_size: group_size(fields, "group_size")?, zero_offset, per_module })
}

fn either(fields: &Fields<'_>, key: &str, other: &str) -> Result<Option<usize>> {
    Ok(match fields.usize(key)? {
        None => fields.usize(other)?,
        bits => bits,
    })
}

/// -1 means one group of all input features; 128 is what both methods' classes have as default.
fn group_size(fields: &Fields<'_>, key: &str) -> Result<Option<usize>> {
    if fields.get(key).and_then(Value::as_i64) == Some(-1) {
        return Ok(None);
    }
    match fields.usize(key)? {
        None => Ok(Some(128)),
        Some(0) => Err(fields.invalid(&format!("{key} is 0; expected -1 or at least 1"))),
        size => Ok(size),
    }
}

fn unsupported(fields: &Fields<'_>, what: &str) -> crate::Error {
    fields.unsupported(&format!(
        "{what}: the checkpoint is quantized in a way that is not read; supported are {SUPPORTED}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(options: &str) -> Result<Option<StoredQuantization>> {
        StoredQuantization::from_json(&format!(r#"{{"quantization_config": {options}}}"#), Path::new("config.json"))
    }

    #[test]
    fn methods_are_told_apart() {
        assert_eq!(read("null").unwrap(), None);
        assert_eq!(StoredQuantization::from_json("{}", Path::new("x")).unwrap(), None);
        let bnb = StoredQuantization::Bnb4bit;
        assert_eq!(read(r#"{"load_in_4bit": true, "load_in_8bit": false}"#).unwrap(), Some(bnb));
        assert_eq!(read(r#"{"_load_in_4bit": true, "quant_method": "bitsandbytes"}"#).unwrap(), Some(bnb));
        let int8 = |threshold| Some(StoredQuantization::Bnb8bit { threshold });
        assert_eq!(read(r#"{"load_in_8bit": true, "quant_method": "bitsandbytes"}"#).unwrap(), int8(6.0));
        assert_eq!(read(r#"{"load_in_8bit": true, "llm_int8_threshold": 0}"#).unwrap(), int8(0.0));
        let gptq = |bits, group_size, zero_offset, per_module| {
            Some(StoredQuantization::Gptq { bits, group_size, zero_offset, per_module })
        };
        let with = |options: &str| read(&format!(r#"{{"quant_method": "gptq", {options}}}"#)).unwrap();
        assert_eq!(with(r#""bits": 4"#), gptq(4, Some(128), 1, false));
        assert_eq!(with(r#""bits": 8, "group_size": -1, "format": "gptq_v2""#), gptq(8, None, 0, false));
        let dynamic = r#""bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "dynamic": {"-:.*": {}}"#;
        assert_eq!(with(dynamic), gptq(4, Some(32), 0, true));
        let awq = |group_size| Some(StoredQuantization::Awq { group_size });
        assert_eq!(read(r#"{"quant_method": "awq", "bits": 4, "version": "gemm"}"#).unwrap(), awq(Some(128)));
        assert_eq!(
            read(r#"{"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}"#).unwrap(),
            awq(Some(64))
        );
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (options, message) in [
            ("7", "expected an object"),
            ("{}", "quant_method is missing; supported are bitsandbytes"),
            (r#"{"quant_method": "hqq"}"#, "quant_method \"hqq\""),
            (r#"{"quant_method": "bitsandbytes"}"#, "neither load_in_4bit nor"),
            (r#"{"load_in_8bit": true, "load_in_4bit": true}"#, "both true"),
            (r#"{"load_in_8bit": true, "llm_int8_threshold": -1}"#, "llm_int8_threshold is -1"),
            (r#"{"quant_method": "gptq"}"#, "bits is missing"),
            (r#"{"quant_method": "gptq", "bits": 3}"#, "GPTQ in 3 bits"),
            (r#"{"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}"#, "\"marlin\""),
            (r#"{"quant_method": "gptq", "bits": 4, "is_marlin_format": true}"#, "Marlin"),
            (r#"{"quant_method": "gptq", "bits": 4, "pack_dtype": "int64"}"#, "pack_dtype"),
            (r#"{"quant_method": "gptq", "bits": 4, "group_size": 0}"#, "group_size is 0"),
            (r#"{"quant_method": "gptq", "bits": 4, "group_size": -7}"#, "group_size is -7"),
            (r#"{"quant_method": "awq", "bits": 8}"#, "AWQ in 8 bits"),
            (r#"{"quant_method": "awq", "version": "gemv"}"#, "version \"gemv\""),
        ] {
            let error = read(options).unwrap_err().to_string();
            assert!(error.contains(message) && error.contains("config.json"), "{options}: {error}");
        }
    }
}
