//! Damaged and hostile quantized checkpoints: each is an error that names the tensor or the key, in bounded time and memory.
//!
//! One test goes through every tensor of every fixture; one holds the damages that are particular to a format; two change
//! files at random. The first two count what they did.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::check_memory;
use crate::common::{Checkpoint, FOLDERS, quantized};
use proptest::prelude::*;
use qlora_core::formats::HfDirectory;
use qlora_core::model::{CausalLm, LoadOptions};
use safetensors::Dtype;
use serde_json::{Value, json};

/// Opens the folder and loads the model.
fn load(folder: &Path) -> Result<(), String> {
    let source = HfDirectory::open(folder).map_err(|error| error.to_string())?;
    CausalLm::load(&source, LoadOptions::default()).map(|_| ()).map_err(|error| error.to_string())
}

/// The error of a damaged checkpoint.
fn refused(what: &str, checkpoint: &Checkpoint) -> String {
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write(folder.path());
    let start = Instant::now();
    let error = load(folder.path()).expect_err(what);
    assert!(start.elapsed() < Duration::from_secs(5), "{what}: {:?}", start.elapsed());
    error
}

/// Another dtype of the same size that no weight is stored in.
fn other(dtype: Dtype) -> Dtype {
    match dtype {
        Dtype::U8 | Dtype::I8 => Dtype::F8_E4M3,
        Dtype::F16 | Dtype::BF16 => Dtype::U16,
        Dtype::F32 | Dtype::I32 => Dtype::U32,
        other => panic!("{other:?}"),
    }
}

/// NaN in place of the element in the middle.
fn put_nan(dtype: Dtype, bytes: &mut [u8]) -> bool {
    let nan: &[u8] = match dtype {
        Dtype::F32 => &[0, 0, 0xc0, 0x7f],
        Dtype::F16 => &[0, 0x7e],
        Dtype::BF16 => &[0xc0, 0x7f],
        _ => return false,
    };
    let at = bytes.len() / nan.len() / 2 * nan.len();
    bytes[at..at + nan.len()].copy_from_slice(nan);
    true
}

#[test]
fn every_tensor_missing_mistyped_misshapen_or_not_a_number() {
    let [mut missing, mut typed, mut shaped, mut nan, mut superfluous] = [0; 5];
    for name in FOLDERS {
        let good = Checkpoint::read(&quantized(name));
        for (key, raw) in &good.tensors {
            let what = |kind: &str| format!("{name}: {key} {kind}");
            let error_names = |kind: &str, error: String| {
                // Without its state or a companion, it is the weight or the other companion that is named.
                let module = key.split(".weight").next().unwrap();
                let module = module.rsplit_once('.').map_or(module, |(module, last)| match last {
                    "qweight" | "qzeros" | "scales" | "g_idx" | "SCB" => module,
                    _ => key.split(".weight").next().unwrap(),
                });
                assert!(error.contains(module), "{}: {error}", what(kind));
            };
            // A layer without g_idx or weight_format is whole, and a bias of zeros is left out.
            let optional = key.ends_with(".g_idx") || key.ends_with(".weight_format") || key.ends_with(".bias");
            if !optional {
                let mut damaged = good.clone();
                damaged.tensors.remove(key);
                error_names("missing", refused(&what("missing"), &damaged));
                missing += 1;
            }
            let mut damaged = good.clone();
            damaged.tensors.get_mut(key).unwrap().dtype = other(raw.dtype);
            error_names("mistyped", refused(&what("mistyped"), &damaged));
            typed += 1;
            let count: usize = raw.shape.iter().product();
            if count >= 4 && count.is_multiple_of(2) && !key.ends_with(".bias") && !key.contains(".quant_state.") {
                let mut damaged = good.clone();
                damaged.tensors.get_mut(key).unwrap().shape = vec![count / 2, 2, 1];
                error_names("misshapen", refused(&what("misshapen"), &damaged));
                shaped += 1;
            }
            // 4-bit codes under a floating-point label are any bits.
            let packed = name.starts_with("bnb") && key.ends_with("proj.weight") && raw.shape.ends_with(&[1]);
            let mut damaged = good.clone();
            if !packed && put_nan(raw.dtype, &mut damaged.tensors.get_mut(key).unwrap().bytes) {
                error_names("with NaN", refused(&what("with NaN"), &damaged));
                nan += 1;
            }
        }
        for extra in [
            "model.layers.0.self_attn.q_proj.weight.absmax2",
            "model.layers.0.self_attn.q_proj.SCB2",
            "model.layers.1.self_attn.q_proj.qweight",
            "model.embed_tokens.weight.absmax",
            "model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__int3",
            "model.layers.0.mlp.down_proj.weight_scale",
            "lm_head.bias",
        ] {
            let mut damaged = good.clone();
            let any = damaged.tensors["model.norm.weight"].clone();
            damaged.tensors.insert(extra.to_owned(), any);
            let error = refused(&format!("{name} with {extra}"), &damaged);
            assert!(error.contains(extra), "{name}: {error}");
            superfluous += 1;
        }
    }
    println!("missing {missing}, mistyped {typed}, misshapen {shaped}, not a number {nan}, superfluous {superfluous}");
    assert_eq!((missing, typed, shaped, nan, superfluous), (345, 381, 319, 186, 77));
    check_memory();
}

#[test]
fn cut_files() {
    let mut cuts = 0;
    for name in FOLDERS {
        let folder = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            fs::copy(quantized(name).join(file), folder.path().join(file)).unwrap();
        }
        load(folder.path()).unwrap();
        let path = folder.path().join("model.safetensors");
        let size = fs::metadata(&path).unwrap().len();
        let file = fs::File::options().write(true).open(&path).unwrap();
        for length in (0..size).rev().step_by(211) {
            file.set_len(length).unwrap();
            let error = load(folder.path()).expect_err(name);
            assert!(error.contains("model.safetensors"), "{name} cut to {length}: {error}");
            cuts += 1;
        }
    }
    println!("{cuts} cuts");
    assert!(cuts > 1000, "{cuts}");
}

const STATE: &str = "q_proj.weight.quant_state.bitsandbytes__nf4";

/// A change of a checkpoint, and what the error must say.
type Damage<'a> = (&'a str, Box<dyn Fn(&mut Checkpoint)>, &'a str);

/// Sets a key of the JSON state; a value of `"absent"` removes it.
fn state(key: &'static str, value: Value) -> Box<dyn Fn(&mut Checkpoint)> {
    Box::new(move |checkpoint| {
        let (_, raw) = checkpoint.ending(STATE);
        let mut json: Value = serde_json::from_slice(&raw.bytes).unwrap();
        if value == json!("absent") {
            json.as_object_mut().unwrap().remove(key);
        } else {
            json[key] = value.clone();
        }
        raw.bytes = json.to_string().into_bytes();
        raw.shape = vec![raw.bytes.len()];
    })
}

/// Other bytes as the JSON state.
fn state_text(text: String) -> Box<dyn Fn(&mut Checkpoint)> {
    Box::new(move |checkpoint| {
        let (_, raw) = checkpoint.ending(STATE);
        raw.bytes = text.clone().into_bytes();
        raw.shape = vec![raw.bytes.len()];
    })
}

fn config(key: &'static str, value: Value) -> Box<dyn Fn(&mut Checkpoint)> {
    Box::new(move |checkpoint| checkpoint.config["quantization_config"][key] = value.clone())
}

/// Other bytes at the start of a tensor.
fn bytes(suffix: &'static str, value: &'static [u8]) -> Box<dyn Fn(&mut Checkpoint)> {
    Box::new(move |checkpoint| checkpoint.ending(suffix).1.bytes[..value.len()].copy_from_slice(value))
}

#[test]
fn damages_of_each_format() {
    let nested = "bnb_nf4_nested_u8";
    let damages: Vec<Damage> = vec![
        (nested, state("quant_type", json!("fp4")), "quant_type is \"fp4\"; expected \"nf4\""),
        (nested, state("quant_type", json!("absent")), "quant_type is missing"),
        (nested, state("blocksize", json!(48)), "blocksize is 48"),
        (nested, state("blocksize", json!(128)), "absmax"),
        (nested, state("blocksize", json!(u64::MAX)), "blocksize is 18446744073709551615"),
        (nested, state("blocksize", json!(-64)), "blocksize is -64"),
        (nested, state("blocksize", json!("64")), "blocksize is \"64\""),
        (nested, state("dtype", json!("float64")), "dtype is \"float64\""),
        (nested, state("shape", json!([64, 32])), "shape is [64,32]; expected [64, 64], which the configuration gives"),
        (nested, state("shape", json!([64])), "shape is [64]"),
        (nested, state("shape", json!([64, 64, 1])), "shape is [64,64,1]"),
        (nested, state("shape", json!([64.5, 64])), "shape is [64.5,64]"),
        (nested, state("shape", json!([u64::MAX, 64])), "shape is"),
        (nested, state("shape", json!({})), "shape is {}"),
        (nested, state("shape", json!(vec![64; 4000])), "expected"),
        (nested, state("nested_blocksize", json!(0)), "nested_blocksize is 0"),
        (nested, state("nested_blocksize", json!(3)), "nested_blocksize is 3"),
        (nested, state("nested_blocksize", json!(1)), "nested_absmax"),
        (nested, state("nested_blocksize", json!(1u64 << 63)), "nested_blocksize is"),
        (nested, state("nested_blocksize", json!("absent")), "nested_blocksize is missing"),
        (nested, state("nested_offset", json!("absent")), "nested_offset is missing"),
        (nested, state("nested_offset", json!(1e300)), "nested_offset is"),
        (nested, state("nested_offset", json!(null)), "nested_offset is null"),
        (nested, state("nested_dtype", json!("float16")), "nested_dtype is \"float16\""),
        (nested, state_text(String::new()), "not a JSON object"),
        (nested, state_text("{\"quant_type\": ".to_owned()), "not a JSON object"),
        (nested, state_text("[".repeat(10_000)), "not a JSON object"),
        (nested, state_text(format!("{{\"a\": {}}}", "[".repeat(10_000))), "not a JSON object"),
        (nested, state_text(" ".repeat(1 << 20)), "expected JSON text"),
        (nested, bytes("q_proj.weight.quant_map", &[0, 0, 0, 0]), "value 0 is 0, nf4 has -1"),
        (nested, bytes("q_proj.weight.nested_absmax", &[0, 0, 0x80, 0x7f]), "element 0 is inf"),
        ("bnb_nf4_bf16", bytes("q_proj.weight.absmax", &[0, 0, 0x80, 0xbf]), "element 0 is -1"),
        ("bnb_nf4_bf16", state("nested_offset", json!(0.5)), "nested_blocksize is missing"),
        (
            "bnb_nf4_bf16",
            Box::new(|checkpoint| {
                let both = checkpoint.ending(STATE).1.clone();
                let name = format!("model.layers.0.self_attn.{}", STATE.replace("nf4", "fp4"));
                checkpoint.tensors.insert(name, both);
            }),
            "has a quantization state for NF4 and one for FP4",
        ),
        ("bnb_nf4_bf16", config("load_in_4bit", json!(7)), "load_in_4bit is 7"),
        ("bnb_nf4_bf16", config("quant_method", json!("hqq")), "supported are bitsandbytes"),
        ("bnb_nf4_bf16", config("quant_method", json!("awq")), "no layer stored in AWQ 4-bit"),
        (
            "bnb_nf4_bf16",
            Box::new(|checkpoint| {
                checkpoint.config.as_object_mut().unwrap().remove("quantization_config");
            }),
            "config.json has no quantization_config",
        ),
        (
            "bnb_nf4_bf16",
            Box::new(|checkpoint| checkpoint.config["quantization_config"] = json!([])),
            "expected an object",
        ),
        ("bnb_int8", bytes("weight_format", &[2]), "only 0 (row-major) is read"),
        ("bnb_int8", bytes("q_proj.SCB", &[0, 0, 0x80, 0xbf]), "element 0 is -1"),
        ("bnb_int8", bytes("q_proj.SCB", &[0, 0, 0x80, 0x7f]), "element 0 is inf"),
        ("bnb_int8", config("llm_int8_threshold", json!("six")), "llm_int8_threshold"),
        ("bnb_int8", config("llm_int8_threshold", json!(-6)), "llm_int8_threshold is -6"),
        ("gptq", config("bits", json!(8)), "qweight"),
        ("gptq", config("bits", json!(0)), "GPTQ in 0 bits"),
        ("gptq", config("bits", json!(u64::MAX)), "GPTQ in 18446744073709551615 bits"),
        ("gptq", config("group_size", json!(32)), "qzeros"),
        ("gptq", config("group_size", json!(u64::MAX)), "qzeros"),
        ("gptq", config("group_size", json!(0)), "group_size is 0"),
        ("gptq", config("checkpoint_format", json!("marlin")), "checkpoint_format \"marlin\""),
        ("gptq_act_order", bytes("q_proj.g_idx", &[4, 0, 0, 0]), "element 0 is 4, there are 4 groups"),
        ("gptq_act_order", bytes("q_proj.g_idx", &[255, 255, 255, 255]), "element 0 is -1, there are 4 groups"),
        ("gptq_8bit", config("bits", json!(4)), "qweight"),
        ("gptq_8bit", bytes("q_proj.scales", &[0, 0x7c]), "element 0 is inf"),
        ("awq", config("group_size", json!(48)), "do not fall into words of 8 and groups of 48"),
        ("awq", config("group_size", json!(16)), "qzeros"),
        ("awq", config("bits", json!(8)), "AWQ in 8 bits"),
        ("awq", config("version", json!("gemv")), "version \"gemv\""),
        ("awq", config("quant_method", json!("gptq")), "qweight"),
    ];
    let count = damages.len();
    for (name, damage, said) in damages {
        let mut checkpoint = Checkpoint::read(&quantized(name));
        damage(&mut checkpoint);
        let error = refused(&format!("{name}: {said}"), &checkpoint);
        assert!(error.contains(said), "{name}: expected {said:?} in {error:?}");
        assert!(error.len() < 2000, "{} bytes of message", error.len());
    }
    println!("{count} damages");
    check_memory();
}

/// Any value in place of the one under a key of `quantization_config` or of a state.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-2..200i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        Just(Value::Null),
        prop::sample::select(vec!["gptq", "awq", "bitsandbytes", "gemm", "gptq_v2", ""]).prop_map(Value::from),
        prop::collection::vec(any::<u64>().prop_map(Value::from), 0..3).prop_map(Value::from),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn configurations(which in 0..FOLDERS.len(), changes in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..4)) {
        let mut checkpoint = Checkpoint::read(&quantized(FOLDERS[which]));
        let options = checkpoint.config["quantization_config"].as_object_mut().unwrap();
        for (index, value) in changes {
            let key = options.keys().nth(index.index(options.len())).unwrap().clone();
            options.insert(key, value);
        }
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(folder.path());
        let _ = load(folder.path());
        check_memory();
    }

    #[test]
    fn files(
        which in 0..FOLDERS.len(),
        changes in prop::collection::vec((0.0..1.0f64, prop::collection::vec(any::<u8>(), 1..9)), 1..4),
        header in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(quantized(FOLDERS[which]).join("config.json"), folder.path().join("config.json")).unwrap();
        let mut file = fs::read(quantized(FOLDERS[which]).join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let region = if header { 8 + length } else { file.len() };
        for (at, bytes) in changes {
            let at = (at * region as f64) as usize;
            let end = (at + bytes.len()).min(file.len());
            file[at..end].copy_from_slice(&bytes[..end - at]);
        }
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        let _ = load(folder.path());
        check_memory();
    }
}
