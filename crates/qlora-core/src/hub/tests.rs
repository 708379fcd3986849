//! Against a small server that plays the hub.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The server's answers: a status for everything, for a path, or files.
#[derive(Clone, Default)]
struct Hub {
    files: BTreeMap<String, Vec<u8>>,
    /// Path ends and the status they get.
    statuses: Vec<(&'static str, u16)>,
    /// The token that is asked for.
    token: Option<&'static str>,
    commit: Option<&'static str>,
}

struct Server {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(hub: Hub) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        // The thread ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (hub, log) = (hub.clone(), log.clone());
                thread::spawn(move || serve(stream, &hub, &log));
            }
        });
        Self { endpoint, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(stream: TcpStream, hub: &Hub, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut stream = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let path = line.split(' ').nth(1)?.to_owned();
        let (mut token, mut range) = (None, None);
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let Some((name, value)) = header.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "authorization" => token = value.strip_prefix("Bearer ").map(str::to_owned),
                "range" => range = value.strip_prefix("bytes=").map(str::to_owned),
                _ => {}
            }
        }
        log.lock().unwrap().push(path.clone());
        let (status, headers, body) = answer(hub, &path, token.as_deref(), range.as_deref());
        write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{headers}\r\n", body.len()).ok()?;
        stream.write_all(&body).ok()?;
    }
}

fn answer(hub: &Hub, path: &str, token: Option<&str>, range: Option<&str>) -> (u16, String, Vec<u8>) {
    if let Some((_, status)) = hub.statuses.iter().find(|(end, _)| path.ends_with(end)) {
        return (*status, String::new(), Vec::new());
    }
    if hub.token.is_some() && token != hub.token {
        return (401, String::new(), Vec::new());
    }
    let path = &path.replace("/datasets/", "/").replace("/api/org", "/api/models/org");
    if path.starts_with("/api/models/org/name/revision/") {
        let names: Vec<serde_json::Value> =
            hub.files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "siblings": names, "sha": hub.commit.unwrap_or(COMMIT) });
        return (200, "Content-Type: application/json\r\n".to_owned(), body.to_string().into_bytes());
    }
    let name = path.strip_prefix("/org/name/resolve/").and_then(|rest| rest.split_once('/'));
    let Some(data) = name.and_then(|(_, name)| hub.files.get(name)) else { return (404, String::new(), Vec::new()) };
    let (start, end) = range.and_then(|range| range.split_once('-')).unwrap_or(("0", ""));
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(data.len(), |end: usize| end + 1).min(data.len());
    // As on the hub, the name of the content.
    let etag = data
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let headers = format!(
        "ETag: \"{etag:016x}\"\r\nX-Repo-Commit: {}\r\nContent-Range: bytes {start}-{}/{}\r\n",
        hub.commit.unwrap_or(COMMIT),
        end - 1,
        data.len()
    );
    (206, headers, data[start..end].to_vec())
}

/// A model of our own fixtures, with a tokenizer.
fn model() -> Hub {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let mut files = BTreeMap::new();
    for folder in ["loading/llama", "tokenizer/llama"] {
        for entry in fs::read_dir(fixtures.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            files.insert(path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(&path).unwrap());
        }
    }
    files.insert("README.md".to_owned(), b"not needed".to_vec());
    files.insert("LICENSE".to_owned(), b"goes along".to_vec());
    files.insert("pytorch_model.bin".to_owned(), b"not needed".to_vec());
    files.insert("q/tiny.gguf".to_owned(), fs::read(fixtures.join("loading/llama.gguf")).unwrap());
    Hub { files, ..Hub::default() }
}

fn settings(endpoint: &str, cache: &Path, token: Option<&str>) -> Settings {
    let options = OpenOptions {
        endpoint: Some(endpoint.to_owned()),
        cache_dir: Some(cache.to_owned()),
        token: token.map(str::to_owned),
        ..OpenOptions::default()
    };
    Settings::new(&options, |_| None).unwrap()
}

fn refused(hub: Hub, token: Option<&str>) -> String {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(hub);
    snapshot_with("org/name", None, &settings(&server.endpoint, cache.path(), token)).unwrap_err().to_string()
}

#[test]
fn only_the_needed_files_are_downloaded_once() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(model());
    let settings = settings(&server.endpoint, cache.path(), None);
    let snapshot = snapshot_with("org/name", None, &settings).unwrap();
    assert_eq!(snapshot.commit, COMMIT);
    assert!(snapshot.folder.ends_with(format!("models--org--name/snapshots/{COMMIT}")));
    let mut names: Vec<String> = fs::read_dir(&snapshot.folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let expected = [
        "LICENSE",
        "config.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names, expected);
    assert!(
        !cache
            .path()
            .join("models--org--name/blobs")
            .read_dir()
            .unwrap()
            .any(|blob| { blob.unwrap().path().extension().is_some_and(|end| end == "part") })
    );
    let name = |path: &str| path.contains(".md") || path.contains(".bin");
    assert!(!server.requests().iter().any(|path| name(path)), "{:?}", server.requests());

    // The second time only the list of files is asked for; offline nothing is.
    let before = server.requests().len();
    assert_eq!(snapshot_with("org/name", None, &settings).unwrap(), snapshot);
    assert_eq!(server.requests()[before..], ["/api/models/org/name/revision/main"]);
    let offline = Settings { offline: true, ..settings.clone() };
    assert_eq!(snapshot_with("org/name", None, &offline).unwrap(), snapshot);
    let pinned = Settings { revision: COMMIT.to_owned(), ..offline };
    assert_eq!(snapshot_with("org/name", None, &pinned).unwrap(), snapshot);
    assert_eq!(server.requests().len(), before + 1);

    // A hub that cannot be reached is no obstacle to a model that is there.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let unreachable = Settings { endpoint: gone, ..settings };
    assert_eq!(snapshot_with("org/name", None, &unreachable).unwrap(), snapshot);
}

#[test]
fn licences_come_along_and_a_tokenizer_is_downloaded_alone() {
    let mut hub = model();
    for name in ["LICENSE.txt", "USE_POLICY.md", "original/LICENSE"] {
        hub.files.insert(name.to_owned(), b"terms".to_vec());
    }
    let server = Server::start(hub);
    let cache = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        endpoint: Some(server.endpoint.clone()),
        cache_dir: Some(cache.path().to_owned()),
        ..OpenOptions::default()
    };
    let files = crate::open::open_model("org/name", &options).unwrap();
    let companions = crate::merge::Companions::of(&files).unwrap();
    for name in ["LICENSE.txt", "USE_POLICY.md"] {
        assert_eq!(companions.get(name), Some(&b"terms"[..]), "{name}");
    }
    assert!(!companions.names().any(|name| name.contains("original") || name == "README.md"));

    // A GGUF file without a tokenizer, with the one of a repository.
    let other = tempfile::tempdir().unwrap();
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/loading/llama.gguf");
    let options =
        OpenOptions { tokenizer: Some("org/name".into()), cache_dir: Some(other.path().to_owned()), ..options };
    let before = server.requests().len();
    let files = crate::open::open_model(gguf.to_str().unwrap(), &options).unwrap();
    assert!(files.tokenizer.vocab_size() > 100);
    assert!(!server.requests()[before..].iter().any(|path| path.contains("safetensors")), "{:?}", server.requests());
}

#[test]
fn pickles_are_downloaded_where_there_is_nothing_else() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures");
    let read = |name: &str| fs::read(fixtures.join(name)).unwrap();
    let mut hub = model();
    hub.files.retain(|name, _| name.starts_with("tokenizer"));
    hub.files.insert("config.json".to_owned(), read("pickles/model/config.json"));
    for sharded in [false, true] {
        let mut hub = hub.clone();
        let names: &[&str] = match sharded {
            false => &["zip/pytorch_model.bin"],
            true => &[
                "sharded/pytorch_model-00001-of-00002.bin",
                "sharded/pytorch_model-00002-of-00002.bin",
                "sharded/pytorch_model.bin.index.json",
            ],
        };
        for name in names {
            hub.files.insert(name.split_once('/').unwrap().1.to_owned(), read(&format!("pickles/{name}")));
        }
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(hub);
        let settings = settings(&server.endpoint, cache.path(), None);
        let snapshot = snapshot_with("org/name", None, &settings).unwrap();
        crate::formats::HfDirectory::open(&snapshot.folder).unwrap();
        assert_eq!(snapshot_with("org/name", None, &Settings { offline: true, ..settings }).unwrap(), snapshot);
    }
}

#[test]
fn a_model_is_opened_by_its_id() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(model());
    let options = OpenOptions {
        endpoint: Some(server.endpoint.clone()),
        cache_dir: Some(cache.path().to_owned()),
        token: Some("t".to_owned()),
        ..OpenOptions::default()
    };
    // The tokenizer is larger than this model's vocabulary, which is only a warning.
    let files = crate::open::open_model("org/name", &options).unwrap();
    assert_eq!((files.name.as_str(), files.commit.as_deref()), ("org/name", Some(COMMIT)));
    assert_eq!(files.source.config().num_hidden_layers, 2);
    assert!(files.chat_template.is_some());
    assert_eq!(files.generation.eos_token_ids, [2]);

    let before = server.requests().len();
    let error = crate::open::open_model("org/name:q/tiny.gguf", &options).unwrap_err().to_string();
    assert!(error.contains("tokenizer.ggml.model is missing"), "{error}");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizer/llama");
    let options = OpenOptions { tokenizer: Some(folder), ..options };
    let files = crate::open::open_model("org/name:q/tiny.gguf", &options).unwrap();
    assert_eq!(files.name, "org/name");
    assert!(files.chat_template.is_some(), "from the tokenizer's folder");
    assert!(
        server.requests()[before..].iter().all(|path| path.contains("revision/main") || path.ends_with("tiny.gguf"))
    );
}

#[test]
fn refusals_say_which_token_and_where_to_ask() {
    let private = Hub { token: Some("right"), ..model() };
    let error = refused(private.clone(), None);
    assert!(error.contains("401") && error.contains("HF_TOKEN") && error.contains("/settings/tokens"), "{error}");
    assert!(error.contains("org/name with the account"), "{error}");
    let error = refused(private.clone(), Some("wrong"));
    assert!(error.contains("does not accept the access token from the options") && !error.contains("wrong"), "{error}");
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(private);
    snapshot_with("org/name", None, &settings(&server.endpoint, cache.path(), Some("right"))).unwrap();

    // A gated repository shows its list of files to everybody.
    let gated = Hub { statuses: vec![("/config.json", 403)], ..model() };
    let error = refused(gated.clone(), None);
    assert!(
        error.contains("403") && error.contains("HF_TOKEN") && error.contains("ask for access at http://127"),
        "{error}"
    );
    let error = refused(gated, Some("t"));
    assert!(error.contains("403") && error.contains("the access token from the options does not allow it"), "{error}");
    let error = refused(Hub { statuses: vec![("model-00002-of-00003.safetensors", 401)], ..model() }, None);
    assert!(error.contains("401"), "{error}");
}

#[test]
fn what_is_not_there_is_named() {
    let error = refused(Hub { statuses: vec![("revision/main", 404)], ..model() }, None);
    assert!(error.contains("no such repository") && error.contains("revision main"), "{error}");
    let error = refused(Hub { statuses: vec![("/tokenizer.json", 404)], ..model() }, None);
    assert!(error.contains("has no file tokenizer.json"), "{error}");
    let without = |names: &[&str]| {
        let mut hub = model();
        hub.files.retain(|name, _| !names.contains(&name.as_str()));
        refused(hub, None)
    };
    assert!(without(&["tokenizer.json"]).contains("has no tokenizer.json; name one of its GGUF files"));
    assert!(without(&["tokenizer.json", "q/tiny.gguf"]).contains("has no tokenizer.json"));
    assert!(without(&["model-00001-of-00003.safetensors"]).contains("has no model-00001-of-00003.safetensors"));
    assert!(
        without(&["model.safetensors.index.json", "q/tiny.gguf", "pytorch_model.bin"]).contains("has no safetensors")
    );
    let error = refused(Hub { statuses: vec![("revision/main", 500)], ..model() }, None);
    assert!(error.contains("try again later"), "{error}");
    let error = refused(Hub { commit: Some("../../x"), ..model() }, None);
    assert!(error.contains("as its commit"), "{error}");
}

#[test]
fn a_model_that_is_not_supported_is_refused_before_its_weights() {
    let mut hub = model();
    hub.files.insert("config.json".to_owned(), br#"{"model_type": "mamba"}"#.to_vec());
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(hub);
    let error =
        snapshot_with("org/name", None, &settings(&server.endpoint, cache.path(), None)).unwrap_err().to_string();
    assert!(error.contains("\"mamba\""), "{error}");
    assert!(!server.requests().iter().any(|path| path.ends_with(".safetensors")));
}

#[test]
fn offline_says_what_is_missing() {
    let cache = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let online = settings(&endpoint, cache.path(), None);
    let error = snapshot_with("org/name", None, &online).unwrap_err().to_string();
    assert!(
        error.contains("cannot reach") && error.contains("HF_HUB_OFFLINE=1") && error.contains("path of its folder"),
        "{error}"
    );

    let offline = Settings { offline: true, ..online };
    let error = snapshot_with("org/name", None, &offline).unwrap_err().to_string();
    assert!(error.contains("never downloaded"), "{error}");
    let server = Server::start(Hub { statuses: vec![("model-00003-of-00003.safetensors", 500)], ..model() });
    snapshot_with("org/name", None, &settings(&server.endpoint, cache.path(), None)).unwrap_err();
    let pinned = Settings { revision: COMMIT.to_owned(), ..offline };
    let error = snapshot_with("org/name", None, &pinned).unwrap_err().to_string();
    assert!(error.contains("model-00003-of-00003.safetensors is missing"), "{error}");
}

/// Another commit.
const NEXT: &str = "89abcdef0123456789abcdef0123456789abcdef";

#[test]
fn a_new_commit_with_the_same_files_downloads_nothing_again() {
    let cache = tempfile::tempdir().unwrap();
    let old = Server::start(model());
    snapshot_with("org/name", None, &settings(&old.endpoint, cache.path(), None)).unwrap();
    let mut hub = Hub { commit: Some(NEXT), ..model() };
    hub.files.insert("tokenizer_config.json".to_owned(), b"{}".to_vec());
    hub.files.insert("q/tiny.gguf".to_owned(), hub.files["model-00001-of-00003.safetensors"].clone());
    let server = Server::start(hub.clone());
    let online = settings(&server.endpoint, cache.path(), None);
    let snapshot = snapshot_with("org/name", None, &online).unwrap();
    assert_eq!(snapshot.commit, NEXT);
    assert!(snapshot.folder.ends_with(NEXT));
    // The changed file has a second request for its content; of the others only the headers were asked for.
    let requests = server.requests();
    let count = |name: &str| requests.iter().filter(|path| path.ends_with(&format!("/{name}"))).count();
    let changed = count("tokenizer_config.json");
    for name in fs::read_dir(&snapshot.folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()) {
        assert_eq!(fs::read(snapshot.folder.join(&name)).unwrap(), hub.files[&name], "{name}");
        assert!(name == "tokenizer_config.json" || count(&name) == 1 && changed > 1, "{name}: {requests:?}");
    }
    // Nested, and the content of another file.
    let nested = snapshot_with("org/name", Some("q/tiny.gguf"), &online).unwrap();
    assert_eq!(fs::read(nested.folder.join("q/tiny.gguf")).unwrap(), hub.files["q/tiny.gguf"]);
    assert_eq!(server.requests().iter().filter(|path| path.ends_with("tiny.gguf")).count(), 1);
    // Both commits are whole, and a content of another length is not taken.
    let offline = Settings { offline: true, revision: COMMIT.to_owned(), ..online };
    snapshot_with("org/name", None, &offline).unwrap();
    let content = fs::canonicalize(snapshot.folder.join("config.json")).unwrap();
    fs::write(&content, "short").unwrap();
    let third = "f".repeat(40);
    let server = Server::start(Hub { commit: Some(Box::leak(third.into_boxed_str())), ..model() });
    let snapshot = snapshot_with("org/name", None, &settings(&server.endpoint, cache.path(), None)).unwrap();
    assert_eq!(fs::read(snapshot.folder.join("config.json")).unwrap(), model().files["config.json"]);
}

#[test]
fn a_hub_with_a_problem_is_no_obstacle_to_a_model_that_is_there() {
    let cache = tempfile::tempdir().unwrap();
    let well = Server::start(model());
    let known = snapshot_with("org/name", None, &settings(&well.endpoint, cache.path(), None)).unwrap();
    for status in [429, 500, 502, 503, 504] {
        let server = Server::start(Hub { statuses: vec![("revision/main", status)], ..model() });
        let online = settings(&server.endpoint, cache.path(), None);
        assert_eq!(snapshot_with("org/name", None, &online).unwrap(), known, "{status}");
        // Without a cache it is an error that says so.
        let error = refused(Hub { statuses: vec![("revision/main", status)], ..model() }, None);
        assert!(error.contains(&status.to_string()), "{error}");
    }
    // An expired token; without a token a 401 is about the repository.
    let strict = || Hub { token: Some("right"), ..model() };
    let of = |hub: Hub, token: Option<&str>| {
        let server = Server::start(hub);
        snapshot_with("org/name", None, &settings(&server.endpoint, cache.path(), token))
    };
    assert_eq!(of(strict(), Some("expired")).unwrap(), known);
    assert!(of(strict(), None).unwrap_err().to_string().contains("401"));
    for status in [403, 404] {
        assert!(of(Hub { statuses: vec![("revision/main", status)], ..model() }, Some("t")).is_err(), "{status}");
    }
    // In the middle of a new commit, whose first files are there by then: the last whole one is used.
    let mut hub = Hub { commit: Some(NEXT), statuses: vec![("model-00002-of-00003.safetensors", 503)], ..model() };
    hub.files.insert("config.json".to_owned(), [&hub.files["config.json"][..], b"\n"].concat());
    assert_eq!(of(hub, None).unwrap(), known);
    // The adapter of a model that is there is not.
    let server = Server::start(Hub { statuses: vec![("revision/main", 503)], ..model() });
    let online = settings(&server.endpoint, cache.path(), None);
    assert!(adapter_snapshot_with("org/name", None, &online).unwrap_err().to_string().contains("503"));
}

#[test]
fn a_mistyped_folder_is_told_apart_from_an_id() {
    let both = "org/name: there is no such folder here; taken as the id of a repository on the hub: ";
    for hub in [Hub { statuses: vec![("revision/main", 404)], ..model() }, Hub { token: Some("x"), ..model() }] {
        let error = refused(hub, None);
        assert!(error.starts_with(both), "{error}");
    }
    let cache = tempfile::tempdir().unwrap();
    let online = settings("http://127.0.0.1:1", cache.path(), None);
    for settings in [Settings { offline: true, ..online.clone() }, online] {
        let error = snapshot_with("org/name", None, &settings).unwrap_err().to_string();
        assert!(error.starts_with(both), "{error}");
        let error = adapter_snapshot_with("org/name", None, &settings).unwrap_err().to_string();
        assert!(error.starts_with(both), "{error}");
    }
    // For a name that is known to be a repository, the error says nothing of a missing folder.
    let error = refused(Hub { statuses: vec![("/config.json", 404)], ..model() }, None);
    assert!(!error.contains("no such folder"), "{error}");
}

#[test]
fn settings_come_from_options_then_the_environment() {
    let home = tempfile::tempdir().unwrap();
    let from = |options: &OpenOptions, pairs: &[(&str, &str)]| {
        Settings::new(options, |name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    };
    let plain = OpenOptions::default();
    let path = home.path().to_str().unwrap();
    let settings = from(&plain, &[("HOME", path)]).unwrap();
    assert_eq!(settings.cache, home.path().join(".cache/huggingface/hub"));
    assert_eq!((settings.endpoint.as_str(), settings.token, settings.offline), ("https://huggingface.co", None, false));
    assert_eq!(from(&plain, &[("HF_HOME", path)]).unwrap().cache, home.path().join("hub"));
    assert_eq!(from(&plain, &[("HF_HOME", "/x"), ("HF_HUB_CACHE", path)]).unwrap().cache, home.path());
    assert!(from(&plain, &[]).err().unwrap().to_string().contains("HF_HOME"));
    fs::write(home.path().join("token"), " stored\n").unwrap();
    assert_eq!(from(&plain, &[("HF_HOME", path)]).unwrap().token.unwrap(), "stored");
    let environment =
        [("HF_HOME", path), ("HF_TOKEN", "set"), ("HF_HUB_OFFLINE", "true"), ("HF_ENDPOINT", "http://mirror/")];
    let settings = from(&plain, &environment).unwrap();
    assert_eq!(
        (settings.token.unwrap().as_str(), settings.endpoint.as_str(), settings.offline),
        ("set", "http://mirror", true)
    );
    let options = OpenOptions { token: Some("mine".to_owned()), ..OpenOptions::default() };
    assert_eq!(from(&options, &environment).unwrap().token.unwrap(), "mine");
    let options = OpenOptions { token: Some("a\nb".to_owned()), ..OpenOptions::default() };
    let error = from(&options, &environment).err().unwrap().to_string();
    assert!(error.contains("characters") && !error.contains('\n'), "{error}");
    for revision in ["../x", "a b", "", "a//b", "/a"] {
        let options = OpenOptions { revision: Some(revision.to_owned()), ..OpenOptions::default() };
        assert!(from(&options, &environment).is_err(), "{revision}");
    }
}

#[test]
fn an_adapter_is_two_files_possibly_in_a_folder() {
    let cache = tempfile::tempdir().unwrap();
    let file = |name: &str| (name.to_owned(), name.as_bytes().to_vec());
    let files = ["adapter_config.json", "adapter_model.safetensors", "README.md", "b/adapter_config.json"];
    let files =
        files.into_iter().chain(["b/adapter_model.safetensors", "old/adapter_config.json", "old/adapter_model.bin"]);
    // The tokenizers and templates that the adapters were trained with.
    let files = files.chain(["tokenizer.json", "b/chat_template.jinja", "b/additional_chat_templates/tool_use.jinja"]);
    let server = Server::start(Hub { files: files.map(file).collect(), ..model() });
    let settings = settings(&server.endpoint, cache.path(), None);
    let top = adapter_snapshot_with("org/name", None, &settings).unwrap();
    let sub = adapter_snapshot_with("org/name", Some("b"), &settings).unwrap();
    assert_eq!(sub.folder, top.folder.join("b"));
    for (folder, prefix) in [(&top.folder, ""), (&sub.folder, "b/")] {
        for name in [adapter::CONFIG_FILE, adapter::WEIGHTS_FILE] {
            assert_eq!(fs::read_to_string(folder.join(name)).unwrap(), format!("{prefix}{name}"));
        }
    }
    assert!(!server.requests().iter().any(|path| path.contains("README")));
    for beside in ["tokenizer.json", "b/chat_template.jinja", "b/additional_chat_templates/tool_use.jinja"] {
        assert_eq!(fs::read_to_string(top.folder.join(beside)).unwrap(), beside);
    }
    // An old one has its weights in a pickle.
    let old = adapter_snapshot_with("org/name", Some("old"), &settings).unwrap();
    assert_eq!(fs::read_to_string(old.folder.join(adapter::PICKLE_FILE)).unwrap(), "old/adapter_model.bin");
    for wrong in ["..", "a/../b", "", "/a", "a\\b"] {
        let error = adapter_snapshot_with("org/name", Some(wrong), &settings).unwrap_err().to_string();
        assert!(error.contains("not the name of a folder"), "{wrong}: {error}");
    }
    // Offline, from the cache.
    let offline = Settings { offline: true, ..settings };
    assert_eq!(adapter_snapshot_with("org/name", Some("b"), &offline).unwrap(), sub);
    assert_eq!(adapter_snapshot_with("org/name", Some("old"), &offline).unwrap(), old);
    assert!(adapter_snapshot_with("org/name", Some("c"), &offline).is_err());
}

/// The options of inspecting a model on this server.
fn inspecting(server: &Server, cache: &Path, token: Option<&str>) -> OpenOptions {
    OpenOptions {
        endpoint: Some(server.endpoint.clone()),
        cache_dir: Some(cache.to_owned()),
        // Never from this machine's environment.
        token: Some(token.unwrap_or("nobody").to_owned()),
        revision: Some("v1.0".to_owned()),
        ..OpenOptions::default()
    }
}

#[test]
fn inspecting_downloads_the_configuration_alone() {
    use crate::inspect::{Parameters, report};
    use crate::lora::LoraConfig;
    use crate::open::open_config;

    // The same for a model whose checkpoint is stored quantized.
    let config = model().files.remove("config.json").unwrap();
    let mut quantized: serde_json::Value = serde_json::from_slice(&config).unwrap();
    quantized["quantization_config"] = serde_json::json!({ "quant_method": "bitsandbytes", "load_in_4bit": true });
    for config in [config, quantized.to_string().into_bytes()] {
        let cache = tempfile::tempdir().unwrap();
        let mut hub = Hub { token: Some("right"), ..model() };
        hub.files.insert("config.json".to_owned(), config.clone());
        let server = Server::start(hub);
        let options = inspecting(&server, cache.path(), Some("right"));
        let from_hub = open_config("org/name", &options).unwrap();
        let config_address = format!("/org/name/resolve/{COMMIT}/config.json");
        let asked = server.requests();
        assert_eq!(asked[0], "/api/models/org/name/revision/v1.0");
        assert!(asked.len() > 1 && asked[1..].iter().all(|path| *path == config_address), "{asked:?}");
        let snapshots = cache.path().join("models--org--name/snapshots");
        let kept: Vec<_> =
            fs::read_dir(snapshots.join(COMMIT)).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert_eq!(kept, ["config.json"]);

        // A folder with nothing but the same configuration gives the same answer.
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), config).unwrap();
        let from_folder = open_config(folder.path().to_str().unwrap(), &OpenOptions::default()).unwrap();
        assert_eq!(from_hub, from_folder);
        let text = |config| report("org/name", config, &LoraConfig::default(), 2, 64).unwrap();
        assert_eq!(text(&from_hub), text(&from_folder));
        assert_eq!(Parameters::of(&from_hub).total(), 74_432);

        // Offline, it is there for the next time; the model is not.
        let offline = OpenOptions { offline: true, ..options };
        assert_eq!(open_config("org/name", &offline).unwrap(), from_hub);
        assert_eq!(server.requests().len(), asked.len());
        let error = crate::open::open_model("org/name", &offline).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json is missing"), "{error}");
    }
}

#[test]
fn inspecting_what_cannot_be_had_says_why() {
    let refused = |hub: Hub, token: Option<&str>| {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(hub);
        let error = crate::open::open_config("org/name", &inspecting(&server, cache.path(), token)).unwrap_err();
        let asked = server.requests();
        assert!(!asked.iter().any(|path| path.contains(".safetensors") || path.contains(".gguf")), "{asked:?}");
        error.to_string()
    };
    let gated = Hub { statuses: vec![("/config.json", 403)], ..model() };
    let error = refused(gated, Some("t"));
    assert!(error.contains("403") && error.contains("ask for access at http://127"), "{error}");
    let error = refused(Hub { token: Some("right"), ..model() }, None);
    assert!(error.contains("401") && error.contains("HF_TOKEN") && !error.contains("nobody"), "{error}");
    let error = refused(Hub { statuses: vec![("revision/v1.0", 404)], ..model() }, Some("t"));
    assert!(error.contains("no such repository") && error.contains("revision v1.0"), "{error}");

    let without_config = |names: &[&str]| {
        let mut hub = model();
        hub.files.retain(|name, _| names.contains(&name.as_str()));
        refused(hub, None)
    };
    let error = without_config(&["q/tiny.gguf"]);
    assert!(error.contains("org/name:FILE: q/tiny.gguf"), "{error}");
    assert!(without_config(&["README.md"]).contains("has no config.json"));
    let with_config = |text: &str| {
        let mut hub = model();
        hub.files.insert("config.json".to_owned(), text.as_bytes().to_vec());
        refused(hub, None)
    };
    assert!(with_config(r#"{"model_type": "mamba"}"#).contains("\"mamba\""));
    assert!(with_config("<html>").contains("config.json"));
}

#[test]
fn files_of_a_data_set_are_chosen_and_shared() {
    let files = [
        ("README.md", "card"),
        ("data/train-00000-of-00002.jsonl", "{\"text\": \"a\"}"),
        ("data/train-00001-of-00002.jsonl", "{\"text\": \"b\"}"),
        ("data/test.jsonl", "{}"),
        ("../outside", "x"),
    ];
    let files = files.map(|(name, content)| (name.to_owned(), content.as_bytes().to_vec())).into_iter().collect();
    let server = Server::start(Hub { files, token: Some("t"), ..Hub::default() });
    let cache = tempfile::tempdir().unwrap();
    let settings = settings(&server.endpoint, cache.path(), Some("t"));
    let choose = |names: &[String], get: &dyn Fn(&str) -> Result<PathBuf>| {
        assert!(!names.iter().any(|name| name.contains("..")));
        assert_eq!(fs::read_to_string(get("README.md")?).unwrap(), "card");
        Ok(names.iter().filter(|name| name.contains("train")).cloned().collect())
    };
    let of = |settings: &Settings| dataset::dataset_snapshot_with("org/name", settings, &choose);
    let snapshot = of(&settings).unwrap();
    let folder = cache.path().join(format!("datasets--org--name/snapshots/{COMMIT}"));
    let expected = [0, 1].map(|i| folder.join(format!("data/train-0000{i}-of-00002.jsonl")));
    assert_eq!((snapshot.commit.as_str(), snapshot.files.as_slice()), (COMMIT, expected.as_slice()));
    assert_eq!(fs::read_to_string(&snapshot.files[1]).unwrap(), "{\"text\": \"b\"}");
    assert!(!server.requests().iter().any(|path| path.contains("test.jsonl")), "{:?}", server.requests());
    assert!(server.requests()[0].starts_with("/api/datasets/org/name/revision/main"), "{:?}", server.requests());

    // Again: only the list is asked for. Offline, and at the commit: nothing.
    let before = server.requests().len();
    assert_eq!(of(&settings).unwrap(), snapshot);
    assert_eq!(server.requests().len(), before + 1);
    let offline = Settings { offline: true, ..settings.clone() };
    assert_eq!(of(&offline).unwrap(), snapshot);
    assert_eq!(of(&Settings { revision: COMMIT.to_owned(), ..offline.clone() }).unwrap(), snapshot);
    assert_eq!(server.requests().len(), before + 1);
    // A part is gone.
    fs::remove_file(&snapshot.files[1]).unwrap();
    let error = of(&offline).unwrap_err().to_string();
    assert!(error.contains("train-00001-of-00002.jsonl is missing"), "{error}");
    assert_eq!(of(&settings).unwrap(), snapshot);

    let error =
        of(&Settings { token: None, cache: cache.path().join("other"), ..settings.clone() }).unwrap_err().to_string();
    assert!(
        error.contains("401")
            && error.contains("if the data set is gated")
            && error.contains("/datasets/org/name with"),
        "{error}"
    );
    let error = dataset::dataset_snapshot_with("a/b/c", &settings, &choose).unwrap_err().to_string();
    assert!(error.contains("is no file or folder here, and not the id of a data set"), "{error}");
}

/// The branch of the automatic export has slashes in its name.
#[test]
fn the_parquet_branch_is_a_revision() {
    let files = [("default/train/0000.parquet".to_owned(), b"PAR1".to_vec())].into_iter().collect();
    let server = Server::start(Hub { files, ..Hub::default() });
    let cache = tempfile::tempdir().unwrap();
    let settings = Settings { revision: PARQUET_REVISION.to_owned(), ..settings(&server.endpoint, cache.path(), None) };
    let all = |names: &[String], _: &dyn Fn(&str) -> Result<PathBuf>| Ok(names.to_vec());
    let snapshot = dataset::dataset_snapshot_with("org/name", &settings, &all).unwrap();
    assert!(snapshot.files[0].ends_with("default/train/0000.parquet"), "{snapshot:?}");
    assert_eq!(server.requests()[0], "/api/datasets/org/name/revision/refs%2Fconvert%2Fparquet");
    let offline = Settings { offline: true, ..settings };
    assert_eq!(dataset::dataset_snapshot_with("org/name", &offline, &all).unwrap(), snapshot);
}
