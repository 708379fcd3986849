//! A merged model answers the demo task as often exactly as base and adapter do.
//!
//! `scripts/demo-model.sh` fetches the model. The whole way, with the adapter of the quickstart (some minutes):
//!
//!     cargo test --release --test merge_exact_match -- --ignored --nocapture

use std::path::{Path, PathBuf};

use qlora::adapter;
use qlora::kernels::Dtype;
use qlora::kernels::quant::QuantConfig;
use qlora::merge::Rounding;
use qlora::model::Quantization;
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::trainer::TrainConfig;
use qlora::trainer::config::Paths;
use qlora::trainer::data::read_records;
use qlora::trainer::exact_match::{MergeMatch, merge_match};
use qlora::trainer::session::Session;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn model() -> (String, ModelFiles) {
    let cache = std::env::var_os("QLORA_CACHE").map_or(root().join(".cache"), PathBuf::from);
    let path = cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/demo-model.sh first", path.display());
    let path = path.to_str().unwrap().to_owned();
    let files = open_model(&path, &OpenOptions::default()).unwrap();
    (path, files)
}

/// Of the first `rows` held-out rows, over NF4 with double quantization, merged in bf16.
fn measure(files: &ModelFiles, folder: &Path, rows: usize) -> MergeMatch {
    let adapter = adapter::open_folder(folder, files.source.config()).unwrap();
    let mut records = read_records(&root().join("examples/data/demo_heldout.jsonl")).unwrap();
    assert_eq!(records.len(), 100);
    records.truncate(rows);
    let nf4 = Quantization::Bits4(QuantConfig::default());
    let figures = merge_match(files, &adapter, nf4, Rounding::To(Dtype::Bf16), &records, 48, |_, _| ()).unwrap();
    println!("exact answers: {figures}");
    figures
}

fn within_two_points(figures: &MergeMatch) {
    let merged = figures.dequantized.expect("the base is quantized");
    let points = 100.0 * merged.abs_diff(figures.unmerged) as f64 / figures.rows as f64;
    assert!(points <= 2.0, "{figures}");
}

#[test]
fn an_adapter_of_peft_merges() {
    let (_, files) = model();
    let figures = measure(&files, &root().join("tests/fixtures/peft_trained"), 50);
    // It was trained for 40 steps: enough to be far from the base model, which has no exact answer.
    assert!(figures.unmerged >= 10, "{figures}");
    within_two_points(&figures);
}

#[test]
#[ignore = "trains for some minutes"]
fn the_adapter_of_the_quickstart_merges() {
    let (path, files) = model();
    let folder = tempfile::tempdir().unwrap();
    let mut config = TrainConfig::from_toml_file(root().join("examples/quickstart.toml")).unwrap();
    config.model.model_name_or_path = path;
    config.data.train_file = Paths::One(root().join("examples/data/demo_train.jsonl"));
    config.training.output_dir = folder.path().join("run");
    let session = Session::open(&config, |_, _| ()).unwrap();
    let (training, validation) = session.datasets().unwrap();
    let summary = session.into_trainer(training, validation).unwrap().run().unwrap();
    let figures = measure(&files, summary.adapter.as_deref().unwrap(), 100);
    assert!(figures.unmerged >= 85, "{figures}");
    within_two_points(&figures);
}
