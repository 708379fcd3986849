//! An adapter trained here, read by PEFT: the same logits.
//!
//! Needs Python with the packages of `scripts/fixtures/requirements.txt`, SmolLM2 as a Hugging Face folder
//! (`scripts/fixtures/smollm2_to_hf.py` makes it) and the quickstart's adapter:
//!
//! ```sh
//! ./scripts/quickstart.sh
//! QLORA_PYTHON=python3 QLORA_SMOLLM2=HF_FOLDER cargo test --test peft -- --ignored
//! ```

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use candle_core::{Device, Tensor};
use qlora::formats::HfDirectory;
use qlora::kernels::SequenceLayout;
use qlora::model::{AdapterChoice, CausalLm, LoadOptions};

#[test]
#[ignore = "needs Python, SmolLM2 as a Hugging Face folder and the quickstart's adapter"]
fn peft_loads_the_quickstarts_adapter_and_gives_its_logits() {
    let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("set {name}, as this file says"));
    let (python, base) = (variable("QLORA_PYTHON"), variable("QLORA_SMOLLM2"));
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("output/quickstart");

    let mut model = CausalLm::load(&HfDirectory::open(&base).unwrap(), LoadOptions::default()).unwrap();
    let adapter = qlora::adapter::load(&folder, model.config()).unwrap();
    model.set_adapter(adapter.config.lora, adapter.layout, adapter.weights).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| 100 + i * 997 % 40_000).collect();
    let logits = model.logits(&tokens, &SequenceLayout::from_lengths(&[tokens.len()]), AdapterChoice::Active).unwrap();
    let ids = Tensor::from_iter(tokens.iter().map(|&id| i64::from(id)), &Device::Cpu).unwrap();
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("logits.safetensors");
    let tensors = HashMap::from([("input_ids", ids), ("logits", logits)]);
    candle_core::safetensors::save(&tensors, &path).unwrap();

    let status = Command::new(python)
        .arg(root.join("scripts/check_peft.py"))
        .args(["--tolerance", "1e-3", "--base", &base])
        .arg("--adapter")
        .arg(&folder)
        .arg("--logits")
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
}
