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
    /// A page in the place of the answer, as a proxy or a portal gives one.
    Page,
    /// Nothing is read or answered any more.
    Stall,
    /// The answer stops before its end.
    StalledAnswer,
}

#[derive(Default)]
struct Hub {
    exists: bool,
    private: bool,
    /// The ids of the files in the repository.
    files: BTreeMap<String, String>,
    /// The contents of those that are text.
    texts: BTreeMap<String, String>,
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
    patience: Duration,
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
        Self { endpoint: format!("http://127.0.0.1:{port}"), hub, patience: Duration::from_secs(60) }
    }

    fn push(&self, folder: &Path, id: &str, options: &PushOptions) -> Result<Pushed> {
        self.push_files(&files_of(folder)?.files, id, options, &mut |_| {})
    }

    fn push_files(
        &self,
        files: &[PushFile],
        id: &str,
        options: &PushOptions,
        step: &mut dyn FnMut(PushStep<'_>),
    ) -> Result<Pushed> {
        let open = OpenOptions {
            token: Some(TOKEN.to_owned()),
            endpoint: Some(self.endpoint.clone()),
            cache_dir: Some("unused".into()),
            ..OpenOptions::default()
        };
        let mut client = Client::with_patience(Settings::new(&open, |_| None)?, self.patience)?;
        client.pause = Duration::from_millis(1);
        let result = push_with(files, id, options, &client, step);
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
        if matches!(fault, Some(Fault::Stall | Fault::StalledAnswer)) {
            drop(hub);
            if matches!(fault, Some(Fault::StalledAnswer)) {
                reader.read_exact(&mut vec![0; length]).ok()?;
                write!(stream, "HTTP/1.1 200 X\r\nContent-Length: 100\r\n\r\n{{").ok()?;
            }
            thread::sleep(Duration::from_secs(60));
            return None;
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        let (status, headers, answer) = match fault {
            Some(Fault::Status(status)) => (status, "X-Error-Message: because\r\n".to_owned(), Value::Null),
            Some(Fault::Page) => (200, String::new(), json!("<html>welcome</html>")),
            _ => answer(&mut hub, method, path, &body, port),
        };
        let text = match answer {
            Value::Null => String::new(),
            Value::String(text) => text,
            other => other.to_string(),
        };
        write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{headers}\r\n{text}", text.len()).ok()?;
    }
}

fn git_id(bytes: &[u8]) -> String {
    let id = sha1::Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat());
    id.iter().map(|byte| format!("{byte:02x}")).collect()
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
        return if hub.exists { ok(json!({"private": hub.private})) } else { (404, String::new(), Value::Null) };
    }
    if let Some(file) = path.strip_prefix("/org/name/raw/main/") {
        return hub.texts.get(file).map_or((404, String::new(), Value::Null), |text| ok(json!(text)));
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
                    hub.files.insert(path.clone(), git_id(&bytes));
                    hub.texts.insert(path, String::from_utf8(bytes).unwrap());
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
fn a_card_that_a_person_wrote_or_edited_stays() {
    let folder = tempfile::tempdir().unwrap();
    let card = |text: &str, existing| {
        let from = folder.path().join("card");
        fs::write(&from, marked_card(text)).unwrap();
        let mut file = PushFile::new(from, "README.md");
        file.existing = existing;
        [file]
    };
    let server = Server::start(Hub { exists: true, ..Hub::default() });
    let push = |text: &str, existing| {
        server.push_files(&card(text, existing), "org/name", &PushOptions::default(), &mut |_| {}).unwrap()
    };
    let there = || server.hub.lock().unwrap().texts["README.md"].clone();
    // A new one, and one that only qlora wrote; the card is looked at only if it differs.
    assert_eq!(push("# first", Existing::ReplacedIfGenerated).changed, ["README.md"]);
    assert!(server.requests("/raw/").is_empty());
    assert_eq!(push("# second", Existing::ReplacedIfGenerated).changed, ["README.md"]);
    assert_eq!((server.requests("/raw/").len(), there()), (1, marked_card("# second")));
    assert_eq!(push("# second", Existing::ReplacedIfGenerated).unchanged, 1);
    // Another file's upload replaces none at all.
    let pushed = push("# third", Existing::Kept);
    assert_eq!((pushed.commit, &*pushed.kept), (None, &["README.md".to_owned()][..]));
    // An edit stays although the mark does, as does a card of a person's.
    for text in [marked_card("# second").replace("second", "edited"), "# mine\n".to_owned()] {
        let id = git_id(text.as_bytes());
        {
            let mut hub = server.hub.lock().unwrap();
            hub.files.insert("README.md".to_owned(), id);
            hub.texts.insert("README.md".to_owned(), text.clone());
        }
        let pushed = push("# third", Existing::ReplacedIfGenerated);
        assert_eq!((pushed.commit, &*pushed.kept, there()), (None, &["README.md".to_owned()][..], text));
    }
    // A card that cannot be read is not replaced either.
    server.hub.lock().unwrap().faults.push(("/raw/", Fault::Status(500), 5));
    let files = card("# third", Existing::ReplacedIfGenerated);
    let error = server.push_files(&files, "org/name", &PushOptions::default(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("README.md") && there() == "# mine\n", "{error}");
    assert_eq!(push("# third", Existing::Replaced).changed, ["README.md"]);
}

#[test]
fn a_page_is_no_commit() {
    let folder = folder();
    let server = Server::start(Hub { faults: vec![("/commit/", Fault::Page, 1)], ..Hub::default() });
    let error = server.push(folder.path(), "org/name", &PushOptions::default()).unwrap_err().to_string();
    assert!(error.contains("does not say the id of the commit"), "{error}");
    assert!(server.hub.lock().unwrap().files.is_empty());
}

#[test]
fn a_file_that_changes_is_not_sent() {
    let folder = folder();
    let path = folder.path().join("README.md");
    for (text, changed) in [("# card\n", false), ("# ca", true), ("# bard\n", true)] {
        fs::write(&path, "# card\n").unwrap();
        let file = PushFile::new(&path, "README.md");
        let mut local = Local::read(&file).unwrap();
        local.hash(false).unwrap();
        fs::write(&path, text).unwrap();
        let result = commit(&[local], "message");
        assert_eq!(result.is_err(), changed, "{text}");
        assert!(result.err().is_none_or(|error| error.to_string().contains("README.md: it changed while it was read")));
    }
    // No repository is made for files that cannot be read.
    let server = Server::start(Hub::default());
    let files = [PushFile::new(&path, "README.md"), PushFile::new(folder.path().join("missing"), "missing")];
    let error = server.push_files(&files, "org/name", &PushOptions::default(), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("missing") && server.hub.lock().unwrap().log.is_empty(), "{error}");
}

#[test]
fn a_server_that_stalls_is_an_error() {
    let folder = folder();
    // Larger than what the sockets' buffers take, so that sending stalls too.
    fs::remove_file(folder.path().join("a.safetensors")).unwrap();
    fs::File::create(folder.path().join("b.safetensors")).unwrap().set_len(24 << 20).unwrap();
    for (part, fault) in [
        ("/preupload/", Fault::Stall),
        ("/preupload/", Fault::StalledAnswer),
        ("/store/", Fault::Stall),
        ("/store/", Fault::StalledAnswer),
        ("/commit/", Fault::StalledAnswer),
    ] {
        let mut server = Server::start(Hub { faults: vec![(part, fault, 99)], ..Hub::default() });
        server.patience = Duration::from_millis(300);
        let error = server.push(folder.path(), "org/name", &PushOptions::default()).unwrap_err().to_string();
        assert!(error.contains("failed (") && error.contains("timeout"), "{part}: {error}");
        assert!(server.hub.lock().unwrap().files.is_empty());
    }
}

#[test]
fn an_address_of_the_store_that_ran_out_is_asked_for_again() {
    let folder = folder();
    let server = Server::start(Hub { chunk_size: Some(100_000), ..Hub::default() });
    // The first file as a whole, then the second part of the other.
    server.hub.lock().unwrap().faults.extend([("/store/", Fault::Status(403), 1), ("/2", Fault::Status(403), 1)]);
    server.push(folder.path(), "org/name", &PushOptions::default()).unwrap();
    assert_eq!(server.requests("/batch").len(), 3);
    assert_eq!(server.hub.lock().unwrap().files.len(), 5);
    // A new address that does not help is an error of the store, not of the token.
    for (status, expected) in [(403, "does not take the address"), (400, "refuses"), (404, "refuses")] {
        let server = Server::start(Hub { faults: vec![("/store/", Fault::Status(status), 99)], ..Hub::default() });
        let error = server.push(folder.path(), "org/name", &PushOptions::default()).unwrap_err().to_string();
        assert!(error.contains("the store for large files at localhost") && error.contains(expected), "{error}");
        assert!(!error.contains("token") && !error.contains("branch") && !error.contains("/store"), "{error}");
    }
}

#[test]
fn a_public_repository_is_not_taken_for_a_private_one() {
    let folder = folder();
    let files = files_of(folder.path()).unwrap().files;
    let options = PushOptions { private: true, ..PushOptions::default() };
    for (exists, private, told) in [(false, false, false), (true, true, false), (true, false, true)] {
        let server = Server::start(Hub { exists, private, ..Hub::default() });
        let mut steps = Vec::new();
        let mut step = |step: PushStep<'_>| steps.push(format!("{step:?}"));
        server.push_files(&files, "org/name", &options, &mut step).unwrap();
        let public = steps.iter().position(|step| step == "AlreadyPublic(\"org/name\")");
        assert_eq!(public, told.then_some(0), "before anything else: {steps:?}");
    }
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
        "logs/events.out.tfevents.1.x",
        "prepared/000001.tokens",
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
        "logs/events.out.tfevents.1.x",
        "mlflow-run-id",
        "mlruns/",
        "nested/checkpoint-3/",
        "nested/samples.jsonl",
        "prepared/000001.tokens",
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
