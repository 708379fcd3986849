//! `scripts/kill-resume.sh`: SIGKILL at random moments, and the same bits in the end. A few kills here; for many:
//!
//!     QLORA_JOB=/tmp/job cargo test --test kill_resume -- --ignored write_job
//!     LOG=benches/results/kill_resume_cpu.log scripts/kill-resume.sh target/release/examples/finetune /tmp/job/run.toml 100
#![cfg(unix)]

#[path = "common/tiny_folder.rs"]
mod tiny_folder;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A run of twelve steps with a checkpoint after each, over a quantized base, with dropout and validation.
fn job(folder: &Path) -> PathBuf {
    tiny_folder::write_model(&folder.join("model"), 1, tiny_folder::CHATML);
    let answers: Vec<String> = (0..24).map(|i| format!("answer {i} {}", "and more ".repeat(i))).collect();
    let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
    tiny_folder::write_rows(&folder.join("train.jsonl"), &answers);
    tiny_folder::write_rows(&folder.join("validation.jsonl"), &answers[..4]);
    let mut config = tiny_folder::config(folder);
    for (key, value) in [
        ("model.load_in_4bit", "true"),
        ("lora.target_modules", "all-linear"),
        ("lora.lora_dropout", "0.1"),
        ("data.validation_file", folder.join("validation.jsonl").to_str().unwrap()),
        ("training.max_steps", "12"),
        ("training.per_device_train_batch_size", "2"),
        ("training.gradient_accumulation_steps", "2"),
        ("training.eval_steps", "5"),
        ("training.save_steps", "1"),
    ] {
        config.set(key, value).unwrap();
    }
    let file = folder.join("run.toml");
    fs::write(&file, config.to_toml()).unwrap();
    file
}

#[test]
#[ignore = "writes the job for scripts/kill-resume.sh to the folder QLORA_JOB"]
fn write_job() {
    let folder = PathBuf::from(std::env::var_os("QLORA_JOB").expect("QLORA_JOB=folder"));
    println!("{}", job(&folder).display());
}

#[test]
fn a_few_kills_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let config = job(folder.path());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/kill-resume.sh");
    let output = Command::new("bash")
        .arg(script)
        .arg(tiny_folder::example("finetune"))
        .arg(&config)
        .arg("6")
        .env("WORK", folder.path().join("work"))
        .output()
        .unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("kill 6: ") && text.contains("is the uninterrupted run's, bit for bit"), "{text}{errors}");
}
