//! `push_to_hub`: a run whose adapter is uploaded when it has ended, to a small server that plays the hub.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use crate::tiny_folder::{CHATML, write_model, write_rows};

#[derive(Default)]
struct Hub {
    /// Commits fail.
    broken: bool,
    private: Option<bool>,
    /// The files of the repository, in base64.
    files: BTreeMap<String, String>,
}

/// Starts a hub on which every file is small.
fn start(hub: &Arc<Mutex<Hub>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let hub = hub.clone();
    // The thread ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let hub = hub.clone();
            thread::spawn(move || serve(stream, &hub));
        }
    });
    address
}

fn serve(mut stream: TcpStream, hub: &Mutex<Hub>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let path = line.split(' ').nth(1)?.to_owned();
        let mut length = 0;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let Some((name, value)) = header.trim_end().split_once(": ") else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let (status, answer) = answer(&mut hub.lock().unwrap(), &path, &body);
        let text = if answer.is_null() { String::new() } else { answer.to_string() };
        write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{text}", text.len()).ok()?;
    }
}

fn answer(hub: &mut Hub, path: &str, body: &[u8]) -> (u16, Value) {
    let json = || serde_json::from_slice::<Value>(body).unwrap();
    match path {
        "/api/whoami-v2" => (200, json!({"name": "me", "type": "user"})),
        "/api/repos/create" if hub.private.is_some() => (409, json!({"error": "You already created this model repo"})),
        "/api/repos/create" => {
            hub.private = Some(json()["visibility"] == "private");
            (200, json!({"url": "https://hub/me/tuned", "name": "me/tuned"}))
        }
        "/api/models/me/tuned" => (200, json!({"private": hub.private})),
        "/api/models/me/tuned/preupload/main" => {
            let file = |file: &Value| json!({"path": file["path"], "uploadMode": "regular", "shouldIgnore": false});
            let files: Vec<Value> = json()["files"].as_array().unwrap().iter().map(file).collect();
            (200, json!({ "files": files }))
        }
        "/api/models/me/tuned/commit/main" if hub.broken => (403, json!({"error": "no right to write"})),
        "/api/models/me/tuned/commit/main" => {
            for line in str::from_utf8(body).unwrap().lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                if line["key"] == "file" {
                    let text = |key: &str| line["value"][key].as_str().unwrap().to_owned();
                    hub.files.insert(text("path"), text("content"));
                }
            }
            (200, json!({"success": true, "commitOid": "0123", "commitUrl": "https://hub/commit"}))
        }
        _ => (404, Value::Null),
    }
}

fn train(folder: &Path, endpoint: &str, token: Option<&str>, arguments: &[&str]) -> Output {
    let mut command = Command::new(super::QLORA);
    for name in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        command.env_remove(name);
    }
    token.map(|token| command.env("HF_TOKEN", token));
    let given = ["train", "model", "train.jsonl", "--device", "cpu", "--r", "4", "--max-steps", "1", "--push-to-hub"];
    let command = command.args(given).args(arguments).current_dir(folder);
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", folder.join("home")).output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, CHATML);
    write_rows(&folder.path().join("train.jsonl"), &["four", "five"]);
    folder
}

#[test]
fn the_adapter_of_a_run_is_uploaded_when_it_has_ended() {
    let (folder, hub) = (folder(), Arc::new(Mutex::new(Hub::default())));
    let endpoint = start(&hub);
    let arguments = ["--hub-model-id", "me/tuned", "--hub-private-repo", "--output-dir", "output"];
    let planned = train(folder.path(), &endpoint, None, &[&arguments[..], &["--dry-run"]].concat());
    assert!(said(&planned).contains("then it would upload the adapter to me/tuned (private"), "{}", said(&planned));
    assert!(hub.lock().unwrap().private.is_none() && !folder.path().join("output").exists());

    let output = train(folder.path(), &endpoint, Some("hf_write"), &arguments);
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("/me/tuned: "), "{}", said(&output));
    let hub = hub.lock().unwrap();
    assert_eq!(hub.private, Some(true));
    for name in ["adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"] {
        assert!(hub.files.contains_key(name), "{name}: {:?}", hub.files.keys());
    }
    let kept: Vec<&String> = hub.files.keys().filter(|name| name.starts_with("checkpoint")).collect();
    assert!(kept.is_empty() && !hub.files.contains_key("report.html"), "{kept:?}");
}

#[test]
fn an_upload_that_fails_loses_nothing() {
    let (folder, hub) = (folder(), Arc::new(Mutex::new(Hub { broken: true, ..Hub::default() })));
    let endpoint = start(&hub);
    // Without an id the output folder's name is the repository's.
    let output = train(folder.path(), &endpoint, Some("hf_write"), &["--output-dir", "tuned"]);
    let error = said(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for part in ["`qlora push tuned tuned`", "saved, but not uploaded", "no right to write"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(folder.path().join("tuned/adapter_model.safetensors").exists());
    assert!(hub.lock().unwrap().files.is_empty());
}

/// Before hours of training, not behind them.
#[test]
fn a_run_that_could_not_be_uploaded_does_not_begin() {
    let folder = folder();
    let output = train(folder.path(), "http://127.0.0.1:9", None, &["--output-dir", "tuned"]);
    let error = said(&output);
    assert!(output.status.code() == Some(1) && error.contains("push_to_hub") && error.contains("HF_TOKEN"), "{error}");
    assert!(!folder.path().join("tuned").exists());
}
