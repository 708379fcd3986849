//! Checkpoints that are stored quantized: logits against the libraries that wrote them, codes bit for bit, training over
//! each kind, and what we write read back.
//!
//! The fixtures are made by `scripts/fixtures/quantized_checkpoints.py`; its head says which logits are the libraries' own
//! and which are those of the layout's reference dequantization in PyTorch.

use std::path::Path;
use std::process::Command;

use crate::common::{Checkpoint, FOLDERS, fixtures, quantized};
use candle_core::{DType, Device, Tensor};
use qlora_core::batch::Batch;
use qlora_core::config::{ModelConfig, StoredQuantization};
use qlora_core::export::bitsandbytes;
use qlora_core::formats::HfDirectory;
use qlora_core::lora::{LoraConfig, linear_modules};
use qlora_core::model::{AdapterChoice, CausalLm, LoadOptions, Quantization, TrainPass};
use qlora_core::source::{PlainTensor, SourceWeight, WeightSource};
use qlora_kernels::SequenceLayout;
use qlora_kernels::quant::{IntBits, IntConfig, QuantConfig, QuantType};
use qlora_kernels::weight::{FrozenWeight, PlainData};
use safetensors::Dtype;

fn load_as(source: &dyn WeightSource, quantization: Quantization) -> CausalLm {
    CausalLm::load(source, LoadOptions { quantization, ..LoadOptions::default() }).unwrap()
}

fn load(folder: &Path) -> CausalLm {
    load_as(&HfDirectory::open(folder).unwrap(), Quantization::None)
}

fn logits(model: &CausalLm, ids: &[u32]) -> Vec<f32> {
    let logits = model.logits(ids, &SequenceLayout::from_lengths(&[ids.len()]), AdapterChoice::Active).unwrap();
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Unlike f32::max, keeps NaN.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, d| if d.is_nan() || d > worst { d } else { worst })
}

/// Each sequence's ids and expected logits.
fn expected(folder: &Path) -> Vec<(Vec<u32>, Vec<f32>)> {
    let tensors = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    let ids = |tensor: &Tensor| tensor.to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1().unwrap();
    (0..2).map(|i| (ids(&tensors[&format!("input_ids.{i}")]), flat(&tensors[&format!("logits.{i}")]))).collect()
}

#[test]
fn logits_are_those_of_the_libraries() {
    for name in FOLDERS {
        let folder = quantized(name);
        let model = load(&folder);
        for (ids, expected) in expected(&folder) {
            let difference = largest_difference(&logits(&model, &ids), &expected);
            println!("{name}: {difference:.1e}");
            // bitsandbytes' CPU code scales 8-bit products by 6.200124e-5; 1 / 127^2 is 6.2000124e-5, 1.8e-5 of it less.
            let tolerance = if name == "bnb_int8" { 1e-3 } else { 2e-5 };
            assert!(difference < tolerance, "{name}: {difference}");
        }
    }
}

#[test]
fn without_the_rounding_of_activations_8_bit_logits_differ() {
    let folder = quantized("bnb_int8");
    let model = load_as(&Dequantized(HfDirectory::open(&folder).unwrap()), Quantization::None);
    let (ids, expected) = expected(&folder).remove(1);
    assert!(largest_difference(&logits(&model, &ids), &expected) > 0.02);
}

#[test]
fn codes_are_taken_over_bit_for_bit() {
    for name in FOLDERS {
        let folder = quantized(name);
        let (source, file) = (HfDirectory::open(&folder).unwrap(), Checkpoint::read(&folder));
        let (mut packed, mut plain) = (0, 0);
        for module in linear_modules(source.config()) {
            let weight = format!("{}.weight", module.name);
            let part = |part: &str| &file.tensors[&format!("{}.{part}", module.name)];
            match source.read_weight(&weight).unwrap() {
                SourceWeight::Plain(_) => plain += 1,
                SourceWeight::FourBit(read) => {
                    assert_eq!(read.codes(), file.tensors[&weight].bytes, "{name}, {weight}");
                    packed += 1;
                }
                SourceWeight::Int(read) if name == "bnb_int8" => {
                    assert_eq!(read.parts().codes, file.tensors[&weight].bytes, "{name}, {weight}");
                    packed += 1;
                }
                SourceWeight::Int(read) => {
                    let (rows, cols, bits) = (module.out_features, module.in_features, read.bits().bits());
                    let words: Vec<u32> = words(&part("qweight").bytes);
                    // Codes are signed where all zero points are the middle.
                    let middle = if read.parts().zeros.is_none() { 1 << (bits - 1) } else { 0 };
                    for row in 0..rows {
                        for col in 0..cols {
                            let code = if name == "awq" {
                                let nibble = [0, 4, 1, 5, 2, 6, 3, 7][row % 8];
                                words[col * rows / 8 + row / 8] >> (4 * nibble) & 15
                            } else {
                                let pack = 32 / bits;
                                words[col / pack * rows + row] >> (bits * (col % pack)) & ((1 << bits) - 1)
                            };
                            assert_eq!(i32::from(read.code(row, col)), code as i32 - middle, "{name}, {weight}");
                        }
                    }
                    packed += 1;
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(source.is_packed(&weight), !matches!(source.read_weight(&weight), Ok(SourceWeight::Plain(_))));
        }
        let expected = match name {
            "bnb_nf4_skip" => (4, 3),
            "bnb_int8" => (6, 1),
            _ => (7, 0),
        };
        assert_eq!((packed, plain), expected, "{name}");
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

/// `bnb_4bit_quant_storage` changes the label of the same bytes.
#[test]
fn every_storage_type_gives_the_same_weights() {
    let mut compared = 0;
    for name in FOLDERS.into_iter().filter(|name| name.starts_with("bnb_nf4") || name.starts_with("bnb_fp4")) {
        let model = load(&quantized(name));
        let ids = [3, 9, 4, 14, 1];
        let want = logits(&model, &ids);
        for (dtype, size) in
            [(Dtype::U8, 1), (Dtype::I8, 1), (Dtype::F16, 2), (Dtype::BF16, 2), (Dtype::F32, 4), (Dtype::F64, 8)]
        {
            let mut checkpoint = Checkpoint::read(&quantized(name));
            let owners: Vec<String> =
                checkpoint.tensors.keys().filter(|key| key.contains(".quant_state.")).cloned().collect();
            for owner in owners {
                let weight = checkpoint.tensors.get_mut(owner.split(".quant_state.").next().unwrap()).unwrap();
                (weight.dtype, weight.shape) = (dtype, vec![weight.bytes.len() / size, 1]);
            }
            let folder = tempfile::tempdir().unwrap();
            checkpoint.write(folder.path());
            let again = load(folder.path());
            assert_eq!(logits(&again, &ids), want, "{name} as {dtype:?}");
            assert_eq!(again.memory(), model.memory());
            compared += 1;
        }
    }
    assert_eq!(compared, 30);
}

#[test]
fn memory_is_counted_to_the_byte() {
    // 64 x 64: q, o, gate, up, down; 16 x 64: k, v.
    let elements = [4096, 4096, 4096, 4096, 4096, 1024, 1024];
    let sum = |bytes: &dyn Fn(usize) -> usize| elements.into_iter().map(bytes).sum::<usize>();
    for (name, expected) in [
        ("bnb_nf4_bf16", sum(&|n| n / 2 + n / 64 * 4)),
        ("bnb_fp4_f32", sum(&|n| n / 2 + n / 64 * 4)),
        // Codes of absmax, one f32 for up to 256 of them, the map, the offset.
        ("bnb_nf4_nested_u8", sum(&|n| n / 2 + n / 64 + 4 + 1024 + 4)),
        // down_proj is f16.
        ("bnb_int8", sum(&|n| n + n / 64 * 4) + 4096 - 64 * 4),
        // Symmetric: no zero points.
        ("gptq", sum(&|n| n / 2 + n / 16 * 4)),
        ("gptq_act_order", sum(&|n| n / 2 + n / 16 * 8 + 64 * 2)),
        ("gptq_v2", sum(&|n| n / 2 + n / 64 * 8)),
        ("gptq_8bit", sum(&|n| n + n / 32 * 8)),
        ("awq", sum(&|n| n / 2 + n / 32 * 8)),
    ] {
        assert_eq!(load(&quantized(name)).memory().projections, expected, "{name}");
    }
    let head = load(&quantized("bnb_nf4_skip")).memory().embeddings;
    assert_eq!(head, 16 * 64 * 2 + 16 * 64 / 2 + 16 + 4 + 1024 + 4, "the embedding in bf16, the head in NF4");
}

/// A source whose quantized weights are handed out as the f32 values they stand for.
#[derive(Debug)]
struct Dequantized(HfDirectory);

impl WeightSource for Dequantized {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn file_of(&self, name: &str) -> Option<&Path> {
        self.0.file_of(name)
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.shape(name)
    }

    fn read(&self, name: &str) -> qlora_core::Result<PlainTensor> {
        let weight = self.0.read_weight(name)?;
        let shape = weight.shape();
        let frozen: Box<dyn FrozenWeight> = match weight {
            SourceWeight::Plain(tensor) => return Ok(tensor),
            SourceWeight::FourBit(weight) => Box::new(weight),
            SourceWeight::Int(weight) => Box::new(weight),
            other => panic!("{other:?}"),
        };
        let mut data = vec![f32::NAN; shape.iter().product()];
        frozen.dequantize_rows(0..shape[0], &mut data);
        Ok(PlainTensor { data: PlainData::F32(data), shape })
    }
}

fn gradient(model: &CausalLm, batch: &Batch) -> Vec<f32> {
    let mut gradient = vec![0.0; model.adapter().unwrap().layout().len()];
    let items = batch.trained_tokens();
    model.accumulate_gradients(batch, items, TrainPass::default(), (&mut gradient).into()).unwrap();
    gradient
}

/// An adapter whose two factors are both non-zero, so that both have gradients.
fn add_adapter(model: &mut CausalLm) {
    model.add_adapter(LoraConfig { r: 4, ..LoraConfig::default() }, 1).unwrap();
    let len = model.adapter().unwrap().layout().len();
    let values: Vec<f32> = (0..len).map(|i| ((i * 7919 % 1000) as f32 / 1000.0 - 0.5) * 0.3).collect();
    model.adapter().unwrap().set_values(&values).unwrap();
}

/// Training over a quantized base is training over the values it stands for.
#[test]
fn adapters_train_over_every_kind() {
    let ids: Vec<u32> = (0..12).map(|i| 3 + i * 5 % 13).collect();
    let labels: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let batch = Batch::from_documents([(ids.as_slice(), labels.as_slice())]);
    for name in FOLDERS {
        let source = HfDirectory::open(quantized(name)).unwrap();
        let mut model = load_as(&source, Quantization::None);
        let mut plain = load_as(&Dequantized(source), Quantization::None);
        add_adapter(&mut model);
        add_adapter(&mut plain);
        let (got, want) = (gradient(&model, &batch), gradient(&plain, &batch));
        let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        let error = norm(&got.iter().zip(&want).map(|(a, b)| a - b).collect::<Vec<_>>()) / norm(&want);
        // The rounding of activations to 8 bits changes what gradients are taken at.
        let (least, most) = if name == "bnb_int8" { (1e-4, 0.1) } else { (0.0, 1e-5) };
        assert!(norm(&want) > 1e-3 && (least..most).contains(&error), "{name}: {error}");
        for checkpointing in [false, true] {
            model.set_gradient_checkpointing(checkpointing).unwrap();
            assert_eq!(gradient(&model, &batch), got, "{name}, gradient checkpointing {checkpointing}");
        }
    }
}

#[test]
fn the_bias_of_zeros_that_old_tools_write_is_left_out() {
    for name in ["gptq", "awq"] {
        let mut checkpoint = Checkpoint::read(&quantized(name));
        let (bias, raw) = checkpoint.ending("o_proj.bias");
        let bias = bias.to_owned();
        raw.bytes[1] = 0x3c;
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(folder.path());
        let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&bias) && error.contains("no place for it"), "{error}");
    }
}

/// With `dynamic`, GPTQModel gives modules bits and groups of their own: the shapes say which. `g_idx` may be missing.
#[test]
fn gptq_modules_may_differ() {
    let mut checkpoint = Checkpoint::read(&quantized("gptq"));
    let other = Checkpoint::read(&quantized("gptq_8bit"));
    let folder = tempfile::tempdir().unwrap();
    for (name, raw) in other.tensors {
        if name.contains("down_proj") {
            checkpoint.tensors.insert(name, raw);
        }
    }
    checkpoint.tensors.remove("model.layers.0.mlp.up_proj.g_idx");
    checkpoint.write(folder.path());
    let error = HfDirectory::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("down_proj.qweight") && error.contains("4 bits with groups of 16"), "{error}");
    checkpoint.config["quantization_config"]["dynamic"] =
        serde_json::json!({"+:.*down_proj": {"bits": 8, "group_size": 32}});
    checkpoint.write(folder.path());
    let mixed = HfDirectory::open(folder.path()).unwrap();
    for (module, from) in [("mlp.down_proj", "gptq_8bit"), ("mlp.up_proj", "gptq"), ("self_attn.k_proj", "gptq")] {
        let name = format!("model.layers.0.{module}.weight");
        let read = |source: &HfDirectory| match source.read_weight(&name).unwrap() {
            SourceWeight::Int(weight) => weight,
            other => panic!("{other:?}"),
        };
        assert!(read(&mixed) == read(&HfDirectory::open(quantized(from)).unwrap()), "{module}");
    }
}

#[test]
fn quantized_weights_are_not_quantized_again() {
    let config = QuantConfig::default();
    let fp4 = Quantization::Bits4(QuantConfig { quant_type: QuantType::Fp4, ..config });
    let nf4 = Quantization::Bits4(config);
    let int4 = Quantization::Int(IntConfig::default());
    for (name, asked, said) in [
        ("gptq", nf4, "GPTQ 4-bit and cannot be quantized again to nf4"),
        ("awq", Quantization::Int8, "AWQ 4-bit and cannot be quantized again to LLM.int8"),
        ("bnb_int8", fp4, "bitsandbytes 8-bit and cannot be quantized again to fp4"),
        ("bnb_nf4_bf16", int4, "bitsandbytes 4-bit and cannot be quantized again to 4-bit integers"),
    ] {
        let source = HfDirectory::open(quantized(name)).unwrap();
        let options = LoadOptions { quantization: asked, ..LoadOptions::default() };
        let error = CausalLm::load(&source, options).unwrap_err().to_string();
        assert!(error.contains(said) && error.contains(name), "{error}");
        let weight = "model.layers.0.self_attn.o_proj.weight";
        let error = source.read(weight).unwrap_err().to_string();
        assert!(error.contains("is stored quantized") && error.contains(weight), "{error}");
        let out = tempfile::tempdir().unwrap();
        let error = bitsandbytes::write(&source, "{}", &config, &out.path().join("x"), |_, _| ()).unwrap_err();
        assert!(error.to_string().contains("already"), "{error}");
    }
    // Asking for the stored quantization is no contradiction, and plain layers of a skip list stay plain.
    let source = HfDirectory::open(quantized("bnb_nf4_skip")).unwrap();
    assert_eq!(load_as(&source, nf4).memory(), load_as(&source, Quantization::None).memory());
    let source = HfDirectory::open(quantized("bnb_int8")).unwrap();
    assert_eq!(load_as(&source, Quantization::Int8).memory(), load_as(&source, Quantization::None).memory());
    assert_eq!(source.quantization(), Some(&StoredQuantization::Bnb8bit { threshold: 6.0 }));
}

/// Loads a plain model in every integer kind: the finer the steps, the closer the logits.
#[test]
fn integers_while_loading() {
    let source = HfDirectory::open(fixtures().join("models/llama_wide")).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 70).collect();
    let exact = logits(&load_as(&source, Quantization::None), &ids);
    let size = exact.iter().fold(0f32, |m, x| m.max(x.abs()));
    let error = |quantization| largest_difference(&logits(&load_as(&source, quantization), &ids), &exact) / size;
    let int = |bits, group_size, zero_point| Quantization::Int(IntConfig { bits, group_size, zero_point });
    for (quantization, least, most) in [
        (Quantization::Int8, 1e-4, 0.05),
        (int(IntBits::Eight, None, false), 1e-4, 0.03),
        (int(IntBits::Eight, Some(16), true), 1e-4, 0.02),
        (int(IntBits::Four, Some(16), true), 5e-3, 0.6),
        (int(IntBits::Four, Some(16), false), 5e-3, 0.6),
        (int(IntBits::Four, None, true), 5e-3, 0.9),
    ] {
        let error = error(quantization);
        assert!((least..most).contains(&error), "{quantization:?}: {error}");
    }
    let bytes = |quantization| load_as(&source, quantization).memory().projections;
    let elements: usize =
        linear_modules(source.config()).iter().map(|module| module.in_features * module.out_features).sum();
    assert_eq!(bytes(int(IntBits::Four, Some(16), false)), elements / 2 + elements / 16 * 4);
    assert_eq!(bytes(int(IntBits::Eight, Some(32), true)), elements + elements / 32 * 8);
}

/// The layers that bitsandbytes quantized to 8 bits from the same f16 weights would have these codes: its own, read from the
/// fixture, dequantized to within f16 and quantized again, are a fixed point.
#[test]
fn llm_int8_of_what_it_read_is_what_it_read() {
    let source = HfDirectory::open(quantized("bnb_int8")).unwrap();
    let plain = load_as(&source, Quantization::None);
    assert!(format!("{:?}", plain.linear_weights().next().unwrap().weight).contains("LLM.int8"));
    let name = "model.layers.0.mlp.gate_proj.weight";
    let SourceWeight::Int(read) = source.read_weight(name).unwrap() else { panic!("not integers") };
    let values = Dequantized(source).read(name).unwrap().data;
    let again = qlora_kernels::quant::QuantizedInt::llm_int8(&values, read.rows(), read.cols(), 6.0, &[]).unwrap();
    assert_eq!(again.parts().codes, read.parts().codes);
}

const WRITTEN: [(QuantType, bool); 4] =
    [(QuantType::Nf4, true), (QuantType::Nf4, false), (QuantType::Fp4, true), (QuantType::Fp4, false)];

/// Writes `llama_wide` in four bits.
fn written(quant_type: QuantType, double_quant: bool, out: &Path) -> QuantConfig {
    let folder = fixtures().join("models/llama_wide");
    let config = QuantConfig { quant_type, double_quant, ..QuantConfig::default() };
    let source = HfDirectory::open(&folder).unwrap();
    let json = std::fs::read_to_string(folder.join("config.json")).unwrap();
    bitsandbytes::write(&source, &json, &config, out, |_, _| ()).unwrap();
    config
}

#[test]
fn what_is_written_is_read_back() {
    let source = HfDirectory::open(fixtures().join("models/llama_wide")).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 70).collect();
    for (quant_type, double_quant) in WRITTEN {
        let out = tempfile::tempdir().unwrap();
        let config = written(quant_type, double_quant, &out.path().join("out"));
        let (direct, back) = (load_as(&source, Quantization::Bits4(config)), load(&out.path().join("out")));
        assert_eq!(logits(&back, &ids), logits(&direct, &ids), "{config:?}");
        assert_eq!(back.memory(), direct.memory(), "{config:?}");
    }
}

/// Needs a Python with transformers and bitsandbytes: `QLORA_PYTHON=python cargo test -- --ignored`.
#[test]
#[ignore = "runs Python"]
fn what_is_written_loads_in_transformers() {
    let python = std::env::var("QLORA_PYTHON").expect("QLORA_PYTHON names a Python with transformers and bitsandbytes");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/fixtures/quantized_checkpoints.py");
    let input = fixtures().join("models/llama_wide/expected.safetensors");
    let texts = candle_core::safetensors::load(&input, &Device::Cpu).unwrap();
    for (quant_type, double_quant) in WRITTEN {
        let temporary = tempfile::tempdir().unwrap();
        let (folder, ids, out) =
            (temporary.path().join("out"), temporary.path().join("ids"), temporary.path().join("logits"));
        written(quant_type, double_quant, &folder);
        let only_ids =
            texts.iter().filter(|(name, _)| name.starts_with("input_ids")).map(|(n, t)| (n.clone(), t.clone()));
        candle_core::safetensors::save(&only_ids.collect(), &ids).unwrap();
        let done = Command::new(&python).arg(&script).arg("--read").args([&folder, &ids, &out]).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let theirs = candle_core::safetensors::load(&out, &Device::Cpu).unwrap();
        let model = load(&folder);
        for i in 0..2 {
            let ids: Vec<u32> = texts[&format!("input_ids.{i}")].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
            let want: Vec<f32> = theirs[&format!("logits.{i}")].flatten_all().unwrap().to_vec1().unwrap();
            let difference = largest_difference(&logits(&model, &ids), &want);
            println!("{quant_type}, double quantization {double_quant}: {difference:.1e}");
            assert!(difference < 1e-3, "{quant_type}, double quantization {double_quant}: {difference}");
        }
    }
}
