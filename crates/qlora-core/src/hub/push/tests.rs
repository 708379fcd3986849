//! Against a small server that plays the hub and its store. Requests and answers have the forms of huggingface_hub 2.4
//! (`_commit_api.py`, `lfs.py`, `hf_api.py`).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use std::path::Path;

use sha2::{Digest, Sha256};

use super::*;

const TOKEN: &str = "hf_secret";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How a request fails.
#[derive(Clone, Copy)]
enum Fault {
    Status(u16),
    /// The connection ends before an answer.
    Break,
}

#[derive(Default)]
struct Hub {
    exists: bool,
    private: bool,
    /// The ids of the files in the repository.
    files: BTreeMap<String, String>,
    store: HashMap<String, Vec<u8>>,
    parts: HashMap<(String, usize), Vec<u8>>,
    chunk_size: Option<usize>,
    /// Requests whose path contains the text fail so often.
    faults: Vec<(&'static str, Fault, usize)>,
    /// Method and path, and whether the token came along.
    log: Vec<(String, bool)>,
    messages: Vec<Value>,
}

struct Server {
    endpoint: String,
    hub: Arc<Mutex<Hub>>,
}

impl Server {
    fn start(hub: Hub) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let hub = Arc::new(Mutex::new(hub));
        let shared = hub.clone();
        // The thread ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = shared.clone();
                thread::spawn(move || serve(stream, &hub, port));
            }
        });
        Self { endpoint: format!("http://127.0.0.1:{port}"), hub }
    }

    fn push(&self, folder: &Path, id: &str, options: &PushOptions) -> Result<Pushed> {
        let open = OpenOptions {
            token: Some(TOKEN.to_owned()),
            endpoint: Some(self.endpoint.clone()),
            cache_dir: Some("unused".into()),
            ..OpenOptions::default()
        };
        let mut client = Client::new(Settings::new(&open, |_| None)?)?;
        client.pause = Duration::from_millis(1);
        let result = push_with(&files_of(folder)?.files, id, options, &client, &mut |_| {});
        if let Err(error) = &result {
            assert!(!error.to_string().contains(TOKEN), "{error}");
        }
        result
    }

    fn requests(&self, of: &str) -> Vec<String> {
        let log = &self.hub.lock().unwrap().log;
        log.iter().map(|(request, _)| request.clone()).filter(|request| request.contains(of)).collect()
    }
}

fn serve(mut stream: TcpStream, hub: &Mutex<Hub>, port: u16) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let (method, path) = line.rsplit_once(' ')?.0.split_once(' ')?;
        let (mut token, mut length) = (false, 0);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let Some((name, value)) = header.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "authorization" => token = value == format!("Bearer {TOKEN}"),
                "content-length" => length = value.parse().ok()?,
                "transfer-encoding" => panic!("stores want to know the length"),
                _ => {}
            }
        }
        let mut hub = hub.lock().unwrap();
        hub.log.push((format!("{method} {path}"), token));
        let fault = hub.faults.iter_mut().find(|(part, _, left)| path.contains(part) && *left > 0);
        let fault = fault.map(|(_, fault, left)| {
            *left -= 1;
            *fault
        });
        if matches!(fault, Some(Fault::Break)) {
            let _ = reader.read_exact(&mut vec![0; length / 2]);
            return None;
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let (status, headers, answer) = match fault {
            Some(Fault::Status(status)) => (status, "X-Error-Message: because\r\n".to_owned(), Value::Null),
            _ => answer(&mut hub, method, path, &body, port),
        };
        let text = if answer.is_null() { String::new() } else { answer.to_string() };
        write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{headers}\r\n{text}", text.len()).ok()?;
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn answer(hub: &mut Hub, method: &str, path: &str, body: &[u8], port: u16) -> (u16, String, Value) {
    let ok = |value: Value| (200, String::new(), value);
    // Another host than the hub's.
    let store = format!("http://localhost:{port}/store");
    let json = || serde_json::from_slice::<Value>(body).unwrap();
    if method == "GET" && path == "/api/whoami-v2" {
        return ok(json!({"name": "org", "type": "user"}));
    }
    if path == "/api/repos/create" {
        let request = json();
        assert_eq!((&request["name"], &request["organization"]), (&json!("name"), &json!("org")));
        if hub.exists {
            return (409, String::new(), json!({"error": "You already created this model repo"}));
        }
        (hub.exists, hub.private) = (true, request["visibility"] == "private");
        return ok(json!({"url": "https://hub/org/name", "name": "org/name"}));
    }
    if path == "/api/models/org/name" {
        return if hub.exists { ok(json!({})) } else { (404, String::new(), Value::Null) };
    }
    if path == "/api/models/org/name/preupload/main" {
        let request = json();
        let file = |file: &Value| {
            let path = file["path"].as_str().unwrap();
            let sample = STANDARD.decode(file["sample"].as_str().unwrap()).unwrap();
            assert!(sample.len() as u64 == file["size"].as_u64().unwrap().min(512));
            let large = path.ends_with(".safetensors") || path.ends_with(".empty");
            let ignored = request["gitIgnore"].as_str().is_some_and(|list| list.lines().any(|line| line == path));
            json!({"path": path, "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": ignored,
                "oid": hub.files.get(path)})
        };
        return ok(json!({"files": request["files"].as_array().unwrap().iter().map(file).collect::<Vec<_>>()}));
    }
    if path == "/org/name.git/info/lfs/objects/batch" {
        let request = json();
        assert_eq!((&request["operation"], &request["ref"]["name"]), (&json!("upload"), &json!("main")));
        let object = |object: &Value| {
            let (oid, size) = (object["oid"].as_str().unwrap(), object["size"].as_u64().unwrap() as usize);
            let mut answer = object.clone();
            if hub.store.contains_key(oid) {
                return answer;
            }
            let verify = json!({"href": format!("http://127.0.0.1:{port}/verify")});
            let upload = match hub.chunk_size {
                Some(chunk) if size > chunk => {
                    let mut header = json!({"chunk_size": chunk.to_string()});
                    for part in 1..=size.div_ceil(chunk) {
                        header[format!("{part:05}")] = json!(format!("{store}/{oid}/{part}"));
                    }
                    json!({"href": format!("http://127.0.0.1:{port}/complete"), "header": header})
                }
                _ => json!({"href": format!("{store}/{oid}")}),
            };
            answer["actions"] = json!({"upload": upload, "verify": verify});
            answer
        };
        let objects: Vec<Value> = request["objects"].as_array().unwrap().iter().map(object).collect();
        return ok(json!({"objects": objects}));
    }
    if let Some(rest) = path.strip_prefix("/store/") {
        assert_eq!(method, "PUT");
        match rest.split_once('/') {
            Some((oid, part)) => drop(hub.parts.insert((oid.to_owned(), part.parse().unwrap()), body.to_vec())),
            None if sha256(body) == rest => drop(hub.store.insert(rest.to_owned(), body.to_vec())),
            None => return (400, String::new(), Value::Null),
        }
        return (200, format!("ETag: \"{}\"\r\n", body.len()), Value::Null);
    }
    if path == "/complete" {
        let request = json();
        let oid = request["oid"].as_str().unwrap();
        let mut whole = Vec::new();
        for part in request["parts"].as_array().unwrap() {
            let bytes = &hub.parts[&(oid.to_owned(), part["partNumber"].as_u64().unwrap() as usize)];
            assert_eq!(part["etag"].as_str().unwrap(), format!("\"{}\"", bytes.len()));
            whole.extend_from_slice(bytes);
        }
        assert_eq!(sha256(&whole), oid);
        hub.store.insert(oid.to_owned(), whole);
        return ok(json!({}));
    }
    if path == "/verify" {
        let there = hub.store.get(json()["oid"].as_str().unwrap()).map(|bytes| bytes.len() as u64);
        return if there == json()["size"].as_u64() { ok(json!({})) } else { (404, String::new(), Value::Null) };
    }
    if path == "/api/models/org/name/commit/main" {
        for line in str::from_utf8(body).unwrap().lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let value = &line["value"];
            let path = value["path"].as_str().unwrap_or_default().to_owned();
            match line["key"].as_str().unwrap() {
                "header" => hub.messages.push(value.clone()),
                "file" => {
                    let bytes = STANDARD.decode(value["content"].as_str().unwrap()).unwrap();
                    let id = sha1::Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), &bytes].concat());
                    hub.files.insert(path, id.iter().map(|byte| format!("{byte:02x}")).collect());
                }
                "lfsFile" => {
                    let oid = value["oid"].as_str().unwrap();
                    assert_eq!(hub.store[oid].len() as u64, value["size"].as_u64().unwrap());
                    hub.files.insert(path, oid.to_owned());
                }
                other => panic!("{other}"),
            }
        }
        return ok(json!({"success": true, "commitOid": COMMIT, "commitUrl": "https://hub/commit"}));
    }
    panic!("{method} {path}");
}

#[test]
fn a_run_keeps_its_rows_and_checkpoints() {
    let folder = tempfile::tempdir().unwrap();
    let kept = ["adapter_config.json", "checkpoint-x/notes.txt", "loss.svg", "metrics.jsonl", "nested/a.txt"];
    let private = [
        "checkpoint-10/optimizer.safetensors",
        "checkpoint-10.tmp-trash/rng.json",
        "superseded-checkpoint-10/train.txt",
        "superseded-checkpoint-10.2/train.txt",
        "nested/checkpoint-3/x",
        "nested/samples.jsonl",
        "wandb/run/files.txt",
        "mlruns/0/x",
        "wandb-run-id",
        "mlflow-run-id",
        "runs/events.out.tfevents.1.x",
        "samples.jsonl",
        "report.html",
    ];
    for name in kept.iter().chain(&private) {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "a private row").unwrap();
    }
    let found = files_of(folder.path()).unwrap();
    assert_eq!(found.files.iter().map(|file| &*file.path).collect::<Vec<_>>(), kept);
    let left_out = [
        "checkpoint-10.tmp-trash/",
        "checkpoint-10/",
        "mlflow-run-id",
        "mlruns/",
        "nested/checkpoint-3/",
        "nested/samples.jsonl",
        "report.html",
        "runs/",
        "samples.jsonl",
        "superseded-checkpoint-10.2/",
        "superseded-checkpoint-10/",
        "wandb-run-id",
        "wandb/",
    ];
    assert_eq!(found.left_out, left_out);
    let server = Server::start(Hub::default());
    let pushed = server.push(folder.path(), "org/name", &PushOptions::default()).unwrap();
    assert_eq!(pushed.changed, kept);
    assert!(server.hub.lock().unwrap().files.keys().eq(kept.iter()));
    // A file that is named goes up.
    assert_eq!(files_of(&folder.path().join("report.html")).unwrap().files.len(), 1);
}

/// A folder with two large files, text and what is not to be sent.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let bytes: Vec<u8> = (0..300_000u32).map(|i| (i * 7 % 251) as u8).collect();
    write("a.safetensors", &bytes[..5_000]);
    write("b.safetensors", &bytes);
    write("README.md", b"# card\n");
    write("x.empty", b"");
    write("more/config.json", b"{}");
    write(".cache/x", b"hidden");
    write("checkpoint-10/optimizer.safetensors", b"state");
    folder
}

#[test]
fn a_folder_goes_up_once_and_then_only_what_changed() {
    let server = Server::start(Hub { chunk_size: Some(100_000), ..Hub::default() });
    let folder = folder();
    let mut options = PushOptions { private: true, ..PushOptions::default() };
    let pushed = server.push(folder.path(), "name", &options).unwrap();
    let all = ["README.md", "a.safetensors", "b.safetensors", "more/config.json", "x.empty"];
    assert_eq!((&*pushed.changed, pushed.unchanged), (&all.map(str::to_owned)[..], 0));
    assert_eq!((pushed.commit.as_deref(), pushed.url), (Some(COMMIT), format!("{}/org/name", server.endpoint)));
    {
        let hub = server.hub.lock().unwrap();
        assert!(hub.private && hub.files.keys().eq(all.iter()));
        assert_eq!(hub.files["x.empty"], "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", "git's id of nothing");
        assert_eq!(hub.messages, [json!({"summary": "Upload with qlora", "description": ""})]);
        // Three parts of one file, the other as a whole; the store never sees the token.
        let store: Vec<&(String, bool)> = hub.log.iter().filter(|(path, _)| path.contains("/store/")).collect();
        assert!(store.len() == 4 && store.iter().all(|(_, token)| !token), "{store:?}");
        assert!(hub.log.iter().filter(|(path, _)| !path.contains("/store/")).all(|(_, token)| *token), "{:?}", hub.log);
    }
    let again = server.push(folder.path(), "org/name", &options).unwrap();
    assert_eq!((again.commit, again.changed.len(), again.unchanged), (None, 0, 5));
    fs::write(folder.path().join("README.md"), "# another\n").unwrap();
    fs::write(folder.path().join(".gitignore"), "more/config.json\n").unwrap();
    options.commit_message = Some("A card\n\nand why".to_owned());
    let third = server.push(folder.path(), "org/name", &options).unwrap();
    assert_eq!(
        (&*third.changed, &*third.ignored),
        (&[".gitignore".to_owned(), "README.md".to_owned()][..], &["more/config.json".to_owned()][..])
    );
    let hub = server.hub.lock().unwrap();
    assert_eq!(hub.messages[1..], [json!({"summary": "A card", "description": "and why"})]);
    assert_eq!(hub.log.iter().filter(|(path, _)| path.contains("/commit/")).count(), 2);
}

#[test]
fn what_broke_off_is_taken_up() {
    let folder = folder();
    // Faults that pass are no errors.
    let faults = vec![
        ("/repos/create", Fault::Status(503), 1),
        ("/preupload/", Fault::Break, 1),
        ("/batch", Fault::Status(429), 2),
        ("/store/", Fault::Break, 1),
        ("/commit/", Fault::Status(500), 1),
    ];
    let server = Server::start(Hub { faults, chunk_size: Some(100_000), ..Hub::default() });
    server.push(folder.path(), "org/name", &PushOptions::default()).unwrap();
    assert_eq!(server.hub.lock().unwrap().files.len(), 5);

    // A transfer that never succeeds ends the upload; the next one begins where it was.
    let server = Server::start(Hub { chunk_size: Some(100_000), ..Hub::default() });
    server.hub.lock().unwrap().faults.push(("/2", Fault::Break, 5));
    let error = server.push(folder.path(), "org/name", &PushOptions::default()).unwrap_err().to_string();
    assert!(error.contains("b.safetensors") && error.contains("not sent again"), "{error}");
    assert!(server.requests("/commit/").is_empty() && server.hub.lock().unwrap().files.is_empty());
    let before = server.requests("/store/").len();
    server.push(folder.path(), "org/name", &PushOptions::default()).unwrap();
    let sent = server.requests("/store/").split_off(before);
    assert!(sent.len() == 3 && sent.iter().all(|path| path.split('/').count() == 4), "{sent:?}");
    assert_eq!(server.hub.lock().unwrap().files.len(), 5);
}

#[test]
fn refusals_say_what_to_do() {
    let folder = folder();
    for (part, status, expected) in [
        ("/preupload/", 401, "does not accept the access token from the options"),
        ("/preupload/", 403, "the right to write"),
        ("/preupload/", 404, "no branch main"),
        ("/preupload/", 307, "renamed"),
        ("/commit/", 409, "changed meanwhile"),
        ("/commit/", 412, "changed meanwhile"),
        ("/batch", 413, "split the model"),
        ("/batch", 429, "limits the requests"),
        ("/commit/", 500, "has a problem"),
        ("/store/", 503, "sends only what is missing"),
        ("/repos/create", 401, "does not accept"),
        ("/repos/create", 403, "to make one for its owner"),
        ("/preupload/", 400, "refuses"),
    ] {
        let server = Server::start(Hub { faults: vec![(part, Fault::Status(status), 99)], ..Hub::default() });
        let error = server.push(folder.path(), "org/name", &PushOptions::default()).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(&format!("status {status}")), "{part}: {error}");
        assert!(error.contains("it says: because"), "{error}");
        assert!(server.hub.lock().unwrap().files.is_empty());
    }
    // A token for one repository cannot make it, which does not matter if it is there.
    let server =
        Server::start(Hub { exists: true, faults: vec![("/repos/create", Fault::Status(403), 9)], ..Hub::default() });
    server.push(folder.path(), "org/name", &PushOptions::default()).unwrap();
    for id in ["", "a/b/c", "../x", "a b", "-a/b", "a/"] {
        let error = server.push(folder.path(), id, &PushOptions::default()).unwrap_err().to_string();
        assert!(error.contains("not the id of a repository"), "{id}: {error}");
    }
    let settings = |token: Option<&str>, offline| {
        let open = OpenOptions {
            token: token.map(str::to_owned),
            cache_dir: Some("unused".into()),
            offline,
            ..OpenOptions::default()
        };
        Client::new(Settings::new(&open, |_| None).unwrap()).err().unwrap().to_string()
    };
    assert!(settings(None, false).contains("HF_TOKEN"));
    assert!(settings(Some("t"), true).contains("HF_HUB_OFFLINE"));
}

#[test]
fn files_are_chosen_by_name() {
    let folder = folder();
    let one = files_of(&folder.path().join("README.md")).unwrap();
    assert_eq!(one.files.iter().map(|file| &*file.path).collect::<Vec<_>>(), ["README.md"]);
    assert!(files_of(&folder.path().join("nothing")).unwrap_err().to_string().contains("nothing"));
    let empty = tempfile::tempdir().unwrap();
    let server = Server::start(Hub::default());
    let error = server.push(empty.path(), "org/name", &PushOptions::default()).unwrap_err().to_string();
    assert!(error.contains("no files"), "{error}");
    assert!(server.hub.lock().unwrap().log.is_empty(), "no repository is made for nothing");
}
