//! The order of things over a folder whose operations can be made to fail.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::folder::Folder;
use super::mirror::Opened;
use super::upload::Uploader;
use super::{Mirror, Store, open};

/// An operation, a part of the key, and how often it fails.
type Faults = Arc<Mutex<Vec<(&'static str, &'static str, usize)>>>;

/// A folder of which some operations fail.
#[derive(Debug)]
struct Faulty {
    store: Folder,
    faults: Faults,
}

impl Faulty {
    fn fails(&self, operation: &str, key: &str) -> io::Result<()> {
        let mut faults = self.faults.lock().unwrap();
        let fault = faults.iter_mut().find(|(of, part, left)| *of == operation && key.contains(part) && *left > 0);
        match fault {
            Some((_, _, left)) => {
                *left -= 1;
                Err(io::Error::other(format!("injected: {operation}")))
            }
            None => Ok(()),
        }
    }
}

impl Store for Faulty {
    fn put(&self, key: &str, content: &File) -> io::Result<()> {
        self.fails("put", key)?;
        self.store.put(key, content)?;
        self.fails("answer", key)
    }

    fn put_new(&self, key: &str, content: &[u8]) -> io::Result<()> {
        self.fails("put_new", key)?;
        self.store.put_new(key, content)?;
        // It arrived, but its answer did not.
        self.fails("answer", key)
    }

    fn get(&self, key: &str, to: &Path) -> io::Result<()> {
        self.fails("get", key)?;
        self.store.get(key, to)
    }

    fn list(&self, prefix: &str) -> io::Result<Vec<String>> {
        self.fails("list", prefix)?;
        self.store.list(prefix)
    }

    fn delete(&self, key: &str) -> io::Result<()> {
        self.fails("delete", key)?;
        self.store.delete(key)
    }
}

struct Place {
    folder: tempfile::TempDir,
    faults: Faults,
}

impl Place {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), faults: Arc::default() }
    }

    fn mirror(&self) -> Mirror {
        let store = Folder::new(&self.folder.path().join("store"));
        let store = Box::new(Faulty { store, faults: Arc::clone(&self.faults) });
        Mirror::new(store, "test://store").with_pause(Duration::from_millis(1))
    }

    fn fail(&self, operation: &'static str, part: &'static str, times: usize) {
        self.faults.lock().unwrap().push((operation, part, times));
    }

    /// A checkpoint on the disk, in a folder of its own.
    fn checkpoint(&self, step: u64, text: &str) -> Opened {
        let path = self.folder.path().join(format!("disk-{step}-{text}"));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("adapter.safetensors"), format!("adapter {step} {text}")).unwrap();
        fs::write(path.join("optimizer.safetensors"), vec![step as u8; 3 << 20]).unwrap();
        let opened = Opened::new(step, &path).unwrap();
        // The run may delete it as soon as it is handed over.
        fs::remove_dir_all(&path).unwrap();
        opened
    }

    fn upload(&self, step: u64) {
        self.mirror().upload(&self.checkpoint(step, "a")).unwrap();
    }

    fn objects(&self) -> Vec<String> {
        let mut keys = Folder::new(&self.folder.path().join("store")).list("").unwrap();
        keys.sort();
        keys
    }

    /// What a machine that resumes gets.
    fn fetched(&self, above: Option<u64>) -> Option<(String, BTreeMap<String, Vec<u8>>)> {
        let output = tempfile::tempdir_in(self.folder.path()).unwrap();
        let path = self.mirror().fetch_newest(output.path(), above).unwrap()?;
        let left: Vec<_> = fs::read_dir(output.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left.len(), 1, "{left:?}");
        let file = |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
        let files = fs::read_dir(&path).unwrap().flatten().map(file).collect();
        Some((path.file_name().unwrap().to_str().unwrap().to_owned(), files))
    }
}

#[test]
fn the_newest_checkpoint_comes_back_with_its_bytes() {
    let place = Place::new();
    assert!(place.fetched(None).is_none());
    place.upload(9);
    place.upload(10);
    let (name, files) = place.fetched(None).unwrap();
    assert_eq!(name, "checkpoint-10");
    assert_eq!(files["adapter.safetensors"], b"adapter 10 a");
    assert_eq!(files["optimizer.safetensors"], vec![10; 3 << 20]);
    // The disk has the same, or a newer one.
    assert!(place.fetched(Some(10)).is_none() && place.fetched(Some(11)).is_none());
    assert_eq!(place.fetched(Some(9)).unwrap().0, "checkpoint-10");
    assert_eq!(place.mirror().steps().unwrap(), [10, 9]);
}

#[test]
fn failures_that_pass_are_tried_again() {
    let place = Place::new();
    place.fail("put", "optimizer", 4);
    place.fail("put_new", "checkpoint-5.json", 2);
    place.fail("answer", "checkpoint-5.json", 1);
    place.upload(5);
    place.fail("list", "", 2);
    place.fail("get", "adapter", 3);
    assert_eq!(place.fetched(None).unwrap().0, "checkpoint-5");
}

#[test]
fn a_checkpoint_that_did_not_arrive_whole_is_none() {
    let place = Place::new();
    place.upload(5);
    // A put that keeps failing, in the middle of the files; the commit that fails.
    for (operation, part) in [("put", "optimizer"), ("put_new", "checkpoint-6.json")] {
        place.fail(operation, part, 5);
        let error = place.mirror().upload(&place.checkpoint(6, "a")).unwrap_err().to_string();
        assert!(error.contains("test://store/checkpoint-6") && error.contains("injected"), "{error}");
        assert_eq!(place.fetched(None).unwrap().0, "checkpoint-5");
        assert_eq!(place.objects().len(), 3, "what was sent is deleted: {:?}", place.objects());
    }
    // A killed upload: files without a manifest.
    let store = Folder::new(&place.folder.path().join("store"));
    store.put_new("checkpoint-7.abc/adapter.safetensors", b"half").unwrap();
    assert_eq!(place.fetched(None).unwrap().0, "checkpoint-5");
    place.upload(7);
    assert_eq!(place.fetched(None).unwrap().1["adapter.safetensors"], b"adapter 7 a");
}

#[test]
fn a_manifest_whose_files_are_gone_or_damaged_is_passed_over() {
    let place = Place::new();
    (5..9).for_each(|step| place.upload(step));
    let stored = |step: u64, file: &str| {
        let prefix = format!("checkpoint-{step}.");
        let of = |key: &String| key.starts_with(&prefix) && key.ends_with(file);
        place.folder.path().join("store").join(place.objects().into_iter().find(of).unwrap())
    };
    fs::remove_file(stored(8, "optimizer.safetensors")).unwrap();
    fs::write(stored(7, "adapter.safetensors"), "another of its size".get(..11).unwrap()).unwrap();
    fs::write(stored(6, ".json"), "{\"format_version\": 1").unwrap();
    assert_eq!(place.fetched(None).unwrap().0, "checkpoint-5");
    // Nothing newer than the disk has is whole: that is what the run goes on from.
    assert!(place.fetched(Some(5)).is_none());
    fs::write(stored(5, "optimizer.safetensors"), "short").unwrap();
    let output = place.folder.path().join("output");
    let error = place.mirror().fetch_newest(&output, None).unwrap_err().to_string();
    assert!(error.contains("checkpoint-8."), "{error}");
    // A name that leads out of the folder is none.
    let manifest = stored(5, ".json");
    let text = fs::read_to_string(&manifest).unwrap().replace("adapter.safetensors", "../adapter.safetensors");
    fs::write(&manifest, text).unwrap();
    assert!(place.mirror().fetch_newest(&output, None).is_err());
    assert!(!place.folder.path().join("adapter.safetensors").exists() && !output.join("adapter.safetensors").exists());
}

#[test]
fn old_checkpoints_go_manifest_first_and_a_repeated_step_replaces() {
    let place = Place::new();
    (1..6).for_each(|step| place.upload(step));
    place.mirror().limit(2, 5).unwrap();
    assert_eq!(place.mirror().steps().unwrap(), [5, 4]);
    assert_eq!(place.objects().len(), 6);
    // Interrupted between the two: only rubbish is left.
    place.fail("delete", "adapter", 9);
    place.mirror().limit(1, 5).unwrap();
    assert_eq!(place.mirror().steps().unwrap(), [5]);
    assert_eq!(place.objects().len(), 4);
    place.faults.lock().unwrap().clear();
    // The same step with the same files changes nothing; with others it replaces.
    let before = place.objects();
    place.upload(5);
    assert_eq!(place.objects(), before);
    place.mirror().upload(&place.checkpoint(5, "b")).unwrap();
    assert_eq!(place.fetched(None).unwrap().1["adapter.safetensors"], b"adapter 5 b");
    // What does not arrive leaves what was there, and nothing is deleted before.
    let before = place.objects();
    for (operation, part) in [("put", "checkpoint-5.json"), ("put", "optimizer")] {
        place.fail(operation, part, 5);
        place.mirror().upload(&place.checkpoint(5, "c")).unwrap_err();
        place.faults.lock().unwrap().clear();
        assert_eq!(
            (place.objects(), place.fetched(None).unwrap().1["adapter.safetensors"].as_slice()),
            (before.clone(), &b"adapter 5 b"[..])
        );
    }
    place.mirror().forget_after(4).unwrap();
    assert!(place.fetched(None).is_none());
}

#[test]
fn what_may_be_committed_is_not_deleted() {
    let place = Place::new();
    place.upload(5);
    // The manifest arrives, its answer does not, and then the store cannot be asked about it.
    place.fail("answer", "checkpoint-6.json", 1);
    place.fail("get", "checkpoint-6.json", 2 * 5);
    let error = place.mirror().upload(&place.checkpoint(6, "a")).unwrap_err().to_string();
    assert!(error.contains("injected: get"), "{error}");
    place.faults.lock().unwrap().clear();
    assert_eq!(place.fetched(None).unwrap().1["adapter.safetensors"], b"adapter 6 a");
    // A manifest that replaces another arrives, its answer does not.
    place.fail("answer", "checkpoint-6.json", 1);
    place.mirror().upload(&place.checkpoint(6, "b")).unwrap();
    assert_eq!(place.fetched(None).unwrap().1["adapter.safetensors"], b"adapter 6 b");
    assert_eq!(place.objects().len(), 6, "{:?}", place.objects());
}

#[test]
fn the_checkpoint_just_sent_stays_whatever_else_there_is() {
    let place = Place::new();
    [3, 4, 8, 9].into_iter().for_each(|step| place.upload(step));
    place.mirror().limit(2, 4).unwrap();
    assert_eq!(place.mirror().steps().unwrap(), [9, 4]);
    place.mirror().limit(1, 4).unwrap();
    assert_eq!(place.mirror().steps().unwrap(), [4]);
}

#[test]
fn a_step_is_sent_again_where_its_files_are_gone_or_its_manifest_cannot_be_read() {
    let place = Place::new();
    place.upload(5);
    let find = |file: &str| place.objects().into_iter().find(|key| key.ends_with(file)).unwrap();
    let stored = |file: &str| place.folder.path().join("store").join(find(file));
    fs::remove_file(stored("optimizer.safetensors")).unwrap();
    place.upload(5);
    assert_eq!(place.fetched(None).unwrap().1["optimizer.safetensors"], vec![5; 3 << 20]);
    fs::write(stored(".json"), "{").unwrap();
    place.upload(5);
    assert_eq!(place.fetched(None).unwrap().1["optimizer.safetensors"], vec![5; 3 << 20]);
}

#[test]
fn a_store_that_does_not_answer_is_not_taken_for_a_damaged_checkpoint() {
    let place = Place::new();
    (5..7).for_each(|step| place.upload(step));
    let output = place.folder.path().join("output");
    for part in ["checkpoint-6.json", "adapter"] {
        for above in [None, Some(5)] {
            place.faults.lock().unwrap().clear();
            place.fail("get", part, 5);
            let error = place.mirror().fetch_newest(&output, above).unwrap_err().to_string();
            assert!(error.contains("checkpoint-6") && error.contains("injected"), "{error}");
        }
    }
    assert_eq!(fs::read_dir(&output).unwrap().count(), 0);
}

#[cfg(unix)]
#[test]
fn others_may_read_what_they_may_read_elsewhere() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = Place::new();
    place.upload(5);
    let at = |name: &str| place.folder.path().join(name);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    fs::write(at("file"), "").unwrap();
    fs::create_dir(at("output")).unwrap();
    for key in place.objects() {
        assert_eq!(mode(&at("store").join(&key)), mode(&at("file")), "{key}");
    }
    let fetched = place.mirror().fetch_newest(&at("output"), None).unwrap().unwrap();
    assert_eq!(mode(&fetched), mode(&at("output")));
}

#[test]
fn an_uploader_says_what_became_of_checkpoints_and_the_last_must_arrive() {
    let place = Place::new();
    let disk = place.folder.path().join("disk");
    fs::create_dir_all(&disk).unwrap();
    fs::write(disk.join("adapter.safetensors"), "adapter").unwrap();
    let finish = |uploader: &mut Uploader| {
        let mut said = Vec::new();
        let finished = uploader.finish(&mut |text| said.push(text.to_owned()));
        (finished, said)
    };
    // One fails and the next arrives: the run has lost nothing.
    place.fail("put", "checkpoint-1.", 5);
    let mut uploader = Uploader::start(place.mirror(), 2);
    uploader.send(1, &disk).unwrap();
    let mut said = Vec::new();
    while said.is_empty() {
        std::thread::sleep(Duration::from_millis(2));
        said = uploader.news();
    }
    assert!(
        said[0].starts_with("checkpoint-1 is not in the store: ") && said[0].ends_with("the run goes on"),
        "{said:?}"
    );
    uploader.send(2, &disk).unwrap();
    let (finished, said) = finish(&mut uploader);
    finished.unwrap();
    assert_eq!(said, ["checkpoint-2 is in test://store"]);
    assert_eq!(uploader.on_its_way(), None);
    // The run goes on, and the last one fails.
    place.fail("put_new", "checkpoint-3", 5);
    uploader.send(3, &disk).unwrap();
    assert_eq!(uploader.on_its_way(), Some(3));
    let error = finish(&mut uploader).0.unwrap_err().to_string();
    assert!(error.contains("of step 3, is on this machine only") && error.contains("injected"), "{error}");
}

#[test]
fn urls_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("file://{}/", folder.path().display());
    assert_eq!(open(&url).unwrap().url(), url.trim_end_matches('/'));
    for wrong in ["bucket/run", "file://relative", "ftp://host/x", "https://host/x"] {
        assert!(open(wrong).unwrap_err().to_string().contains("is no store of checkpoints"), "{wrong}");
    }
    #[cfg(not(feature = "object-store"))]
    assert!(open("s3://bucket/run").unwrap_err().to_string().contains("feature `object-store`"));
}
