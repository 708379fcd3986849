//! `qlora push` without a hub: what it would send, and what it says where it cannot.

use std::fs;
use std::process::{Command, Output};

fn push(folder: &std::path::Path, arguments: &[&str]) -> Output {
    Command::new(super::QLORA)
        .arg("push")
        .args(arguments)
        .env_remove("HF_TOKEN")
        .env_remove("HUGGING_FACE_HUB_TOKEN")
        .env_remove("HF_TOKEN_PATH")
        .env("HF_HOME", folder.join("home"))
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .unwrap()
}

#[test]
fn a_dry_run_shows_files_and_card() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("adapter");
    fs::create_dir_all(adapter.join("checkpoint-1")).unwrap();
    fs::write(
        adapter.join("adapter_config.json"),
        r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "org/base"}"#,
    )
    .unwrap();
    fs::write(adapter.join("checkpoint-1/optimizer.safetensors"), "state").unwrap();
    fs::write(adapter.join("samples.jsonl"), "a private row").unwrap();
    let path = adapter.to_str().unwrap();
    let output = push(folder.path(), &[path, "me/tuned", "--dry-run", "--license", "mit"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for part in ["To me/tuned, branch main:", "adapter_config.json", "base_model: \"org/base\"", "license: \"mit\""] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    let (listed, left_out) = text.split_once("Left out: ").unwrap();
    assert!(!listed.contains("checkpoint-1") && !listed.contains("samples") && !adapter.join("README.md").exists());
    assert!(left_out.starts_with("checkpoint-1/, samples.jsonl\n"), "{text}");

    // A card of one's own stays.
    fs::write(adapter.join("README.md"), "mine").unwrap();
    let output = push(folder.path(), &[path, "me/tuned", "--dry-run", "--json"]);
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(value["card"].is_null() && value["files"].as_array().unwrap().len() == 2, "{value}");

    let output = push(folder.path(), &[path, "me/tuned"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && error.contains("HF_TOKEN"), "{error}");
}
