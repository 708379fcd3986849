//! 4-bit checkpoints that we write, against the file that bitsandbytes wrote for the same model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use qlora::export::bitsandbytes;
use qlora::formats::HfDirectory;
use qlora::kernels::quant::{Absmax, QuantConfig, Quantized4bit};
use qlora::source::WeightSource;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn written(quantization: &QuantConfig) -> (HfDirectory, tempfile::TempDir, Vec<u8>) {
    let folder = fixtures().join("models/llama_wide");
    let source = HfDirectory::open(&folder).unwrap();
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let out = temporary.path().join("out");
    let mut done = 0;
    let size = bitsandbytes::write(&source, &config, quantization, &out, |n, _| done = n).unwrap();
    assert_eq!(done, source.names().len());
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    assert_eq!(bytes.len() as u64, size.after);
    (source, temporary, bytes)
}

fn layout(file: &SafeTensors) -> BTreeMap<String, (Dtype, Vec<usize>)> {
    file.tensors().into_iter().map(|(name, t)| (name, (t.dtype(), t.shape().to_vec()))).collect()
}

#[test]
fn names_types_and_shapes_are_those_of_bitsandbytes() {
    let (_, _folder, bytes) = written(&QuantConfig::default());
    let ours = SafeTensors::deserialize(&bytes).unwrap();
    let theirs = std::fs::read(fixtures().join("lora_step/llama_nf4/base.safetensors")).unwrap();
    let theirs = SafeTensors::deserialize(&theirs).unwrap();
    let (mut got, expected) = (layout(&ours), layout(&theirs));
    // Theirs holds the quantized layers alone.
    got.retain(|name, _| name.contains("_proj."));
    let state = |file: &SafeTensors, name: &str| -> Value {
        serde_json::from_slice(file.tensor(name).unwrap().data()).unwrap()
    };
    assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, expected) in &expected {
        if name.contains("quant_state") {
            let (mut ours_state, theirs_state) = (state(&ours, name), state(&theirs, name));
            // Theirs was quantized from f32; offsets are means summed in another order.
            assert_eq!(ours_state["dtype"], "bfloat16");
            ours_state["dtype"] = theirs_state["dtype"].clone();
            let offset = |state: &Value| state["nested_offset"].as_f64().unwrap();
            assert!((offset(&ours_state) - offset(&theirs_state)).abs() < 1e-6);
            ours_state["nested_offset"] = theirs_state["nested_offset"].clone();
            assert_eq!(ours_state, theirs_state, "{name}");
            continue;
        }
        assert_eq!(&got[name], expected, "{name}");
        if name.ends_with("quant_map") {
            assert_eq!(ours.tensor(name).unwrap().data(), theirs.tensor(name).unwrap().data(), "{name}");
        }
    }
}

#[test]
fn what_is_written_is_what_is_trained_on() {
    for double_quant in [false, true] {
        let quantization = QuantConfig { double_quant, ..QuantConfig::default() };
        let (source, folder, bytes) = written(&quantization);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for name in source.names() {
            let tensor = source.read(&name).unwrap();
            if !name.contains("_proj.") {
                assert_eq!(file.tensor(&name).unwrap().shape(), tensor.shape, "{name}");
                continue;
            }
            let weight =
                Quantized4bit::quantize(&tensor.data, tensor.shape[0], tensor.shape[1], &quantization).unwrap();
            assert_eq!(file.tensor(&name).unwrap().data(), weight.codes(), "{name}");
            let absmax = file.tensor(&format!("{name}.absmax")).unwrap();
            match weight.absmax() {
                Absmax::Plain(plain) => {
                    let bytes: Vec<u8> = plain.iter().flat_map(|x| x.to_le_bytes()).collect();
                    assert_eq!(absmax.data(), bytes, "{name}");
                }
                Absmax::Nested(nested) => assert_eq!(absmax.data(), nested.codes, "{name}"),
            }
        }
        let config = std::fs::read_to_string(folder.path().join("out/config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["quantization_config"]["bnb_4bit_use_double_quant"], double_quant);
        assert_eq!(config["quantization_config"]["bnb_4bit_quant_type"], "nf4");
    }
}

#[test]
fn an_existing_folder_is_left_alone() {
    let folder = fixtures().join("models/llama_wide");
    let source = HfDirectory::open(&folder).unwrap();
    let error = bitsandbytes::write(&source, "{}", &QuantConfig::default(), &folder, |_, _| ()).unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
}
