use super::super::testing::ToyEncoder;
use super::*;

/// Files `a.jsonl` with the texts a0, a1, ..., `b.jsonl` and so on.
fn folder(sizes: &[(&str, usize)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, size) in sizes {
        let rows: String = (0..*size).map(|i| format!("{{\"text\": \"{name}{i}\"}}\n")).collect();
        std::fs::write(folder.path().join(format!("{name}.jsonl")), rows).unwrap();
    }
    folder
}

fn config(toml: &str) -> TrainConfig {
    TrainConfig::from_toml_str(&format!("model.model_name_or_path = \"m\"\n[data]\n{toml}")).unwrap()
}

fn load(config: &TrainConfig) -> Result<(Vec<String>, Option<Vec<String>>)> {
    let (training, validation) = Sets::find(config)?.load(config, &ToyEncoder::default(), None)?;
    let texts = |dataset: &Dataset| -> Vec<String> {
        let encoder = ToyEncoder::default();
        let text = |i| dataset.document(i).marked_text(&encoder, "", "").unwrap();
        (0..dataset.len()).map(text).map(|text| text.trim_matches(['^', '$']).to_owned()).collect()
    };
    Ok((texts(&training), validation.as_ref().map(texts)))
}

#[test]
fn files_folders_and_sets_become_one() {
    let folder = folder(&[("a", 2), ("b", 3)]);
    let path = folder.path().display();
    let (training, validation) = load(&config(&format!("train_file = \"{path}\""))).unwrap();
    assert_eq!((training, validation), (["a0", "a1", "b0", "b1", "b2"].map(String::from).to_vec(), None));
    let toml = format!(
        "train_file = \"{path}/[a].jsonl\"\nmix_strategy = \"interleave_once\"\nvalidation_file = \"{path}/a*\"\n\
         [[data.datasets]]\npath = \"{path}\"\ndata_files = \"b.*\"\n[data.test_datasets]"
    );
    // An empty table is no list.
    assert!(TrainConfig::from_toml_str(&format!("model.model_name_or_path = \"m\"\n[data]\n{toml}")).is_err());
    let (training, validation) = load(&config(toml.strip_suffix("[data.test_datasets]").unwrap())).unwrap();
    assert_eq!(training, ["a0", "b0", "a1", "b1", "b2"]);
    assert_eq!(validation.unwrap(), ["a0", "a1"]);
}

#[test]
fn the_split_is_drawn_from_the_training_data() {
    let folder = folder(&[("a", 20)]);
    let path = folder.path().join("a.jsonl");
    let of = |extra: &str| load(&config(&format!("train_file = {path:?}\n{extra}")));
    let (whole, _) = of("").unwrap();
    let (training, validation) = of("val_size = 0.11").unwrap();
    let validation = validation.unwrap();
    assert_eq!((training.len(), validation.len()), (17, 3));
    assert!(whole.iter().all(|text| training.contains(text) != validation.contains(text)));
    assert_eq!(of("val_size = 0.11").unwrap().1, Some(validation.clone()));
    assert_eq!(of("val_size = 3").unwrap().1, Some(validation.clone()));
    assert_ne!(of("val_size = 3\n[training]\ndata_seed = 7").unwrap().1, Some(validation));
    let message = of("val_size = 20").unwrap_err().to_string();
    assert!(message.contains("val_size = 20 in [data] takes all 20 documents"), "{message}");
    assert_eq!(of("max_samples = 4\nmin_sample_len = 2").unwrap().0.len(), 4);
}

#[test]
fn counts_and_shares_mix_sets() {
    let folder = folder(&[("a", 4), ("b", 6)]);
    let entry = |name: &str, extra: &str| {
        format!("[[data.datasets]]\npath = \"{}/{name}.jsonl\"\n{extra}\n", folder.path().display())
    };
    let (training, _) = load(&config(&(entry("a", "fraction = 0.5") + &entry("b", "fraction = 0.25")))).unwrap();
    assert_eq!(training, ["a0", "a1", "a2", "a3", "b0", "b1"]);
    let (training, _) = load(&config(&(entry("a", "num_samples = 9") + &entry("b", "num_samples = 2")))).unwrap();
    let count = |name: &str| training.iter().filter(|text| text.starts_with(name)).count();
    assert_eq!((count("a"), count("b"), training.len()), (9, 2, 11));
    // The mapping and the format of an entry.
    std::fs::write(folder.path().join("c"), "q\nx\n").unwrap();
    let (training, _) =
        load(&config(&entry("c", "").replace("c.jsonl\"", "c\"\nds_type = \"csv\"\nfield = \"q\""))).unwrap();
    assert_eq!(training, ["x"]);
}

#[test]
fn folders_may_be_laid_out_as_on_the_hub() {
    let folder = folder(&[("train", 2), ("dev", 3)]);
    let path = folder.path().display();
    let entry = |extra: &str| load(&config(&format!("[[data.datasets]]\npath = \"{path}\"\n{extra}")));
    assert_eq!(entry("split = \"validation\"").unwrap().0, ["dev0", "dev1", "dev2"]);
    assert_eq!(entry("").unwrap().0.len(), 5);
    let message = entry("split = \"test\"").unwrap_err().to_string();
    assert!(message.ends_with("it has no split \"test\"; there are train, validation"), "{message}");
    std::fs::write(folder.path().join("README.md"), "---\nconfigs:\n- config_name: x\n  data_files: dev.jsonl\n---")
        .unwrap();
    assert_eq!(entry("name = \"x\"").unwrap().0.len(), 3);
    let file = load(&config(&format!("[[data.datasets]]\npath = \"{path}/dev.jsonl\"\nsplit = \"test\"")))
        .unwrap_err()
        .to_string();
    assert!(file.contains("it is no folder"), "{file}");
}

#[test]
fn ids_are_told_from_paths() {
    for (path, id) in [
        ("HuggingFaceH4/ultrafeedback_binarized", true),
        ("squad", true),
        ("data/train.jsonl", false),
        ("train.csv.gz", false),
        ("./name", false),
        ("a/b/c", false),
        ("/abs", false),
        ("a/*", false),
        ("-", false),
        ("", false),
    ] {
        assert_eq!(is_hub_id(Path::new(path)), id, "{path}");
    }
}

/// A server that plays the hub: files by revision. It answers until the test's process ends.
#[cfg(feature = "hub")]
fn hub(files: &'static [(&'static str, &'static str, &'static str)]) -> String {
    use std::io::{BufRead, BufReader, Write};

    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let commit = |revision: &str| {
        let names: Vec<&str> = files.iter().map(|(revision, _, _)| *revision).collect();
        names.iter().position(|known| *known == revision).map(|i| format!("{i:040x}"))
    };
    let answer = move |path: &str| -> Option<(String, Vec<u8>)> {
        if let Some(revision) = path.strip_prefix("/api/datasets/org/name/revision/") {
            let revision = revision.replace("%2F", "/");
            let names = files.iter().filter(|(of, _, _)| *of == revision);
            let names: Vec<_> = names.map(|(_, name, _)| serde_json::json!({"rfilename": name})).collect();
            return Some((
                String::new(),
                serde_json::json!({"siblings": names, "sha": commit(&revision)?}).to_string().into_bytes(),
            ));
        }
        let (at, name) = path.strip_prefix("/datasets/org/name/resolve/")?.split_once('/')?;
        let file = files.iter().find(|(revision, file, _)| commit(revision).as_deref() == Some(at) && *file == name)?;
        let size = file.2.len();
        let headers = format!(
            "ETag: \"{at}{size}\"\r\nX-Repo-Commit: {at}\r\nContent-Range: bytes 0-{}/{size}\r\n",
            size.max(1) - 1
        );
        Some((headers, file.2.as_bytes().to_vec()))
    };
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|read| read > 0) {
                    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                    let ranged = {
                        let (mut header, mut ranged) = (String::new(), false);
                        while reader.read_line(&mut header).is_ok_and(|read| read > 2) {
                            ranged |= header.to_lowercase().starts_with("range:");
                            header.clear();
                        }
                        ranged
                    };
                    let (status, (headers, body)) = match answer(&path) {
                        Some(found) if ranged => (206, found),
                        Some(found) => (200, found),
                        None => (404, Default::default()),
                    };
                    // hf-hub asks for the first byte, then for all.
                    let _ = write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
                    let _ = stream.write_all(&body);
                    line.clear();
                }
            });
        }
    });
    endpoint
}

#[cfg(feature = "hub")]
#[test]
fn data_sets_come_from_the_hub() {
    const FILES: &[(&str, &str, &str)] = &[
        (
            "main",
            "README.md",
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n  - split: test\n    path: t.csv\n---\n",
        ),
        ("main", "a.jsonl", "{\"text\": \"main\"}\n"),
        ("main", "t.csv", "text\ntest\n"),
        ("script", "name.py", "import datasets\n"),
        ("refs/convert/parquet", "default/train/0000.jsonl", "{\"text\": \"exported\"}\n"),
    ];
    let cache = tempfile::tempdir().unwrap();
    let options =
        OpenOptions { endpoint: Some(hub(FILES)), cache_dir: Some(cache.path().to_owned()), ..OpenOptions::default() };
    let of = |extra: &str| -> Result<Vec<String>> {
        let config = config(&format!("[[data.datasets]]\npath = \"org/name\"\n{extra}"));
        let (training, _) = Sets::find_with(&config.data, &options)?.load(&config, &ToyEncoder::default(), None)?;
        Ok((0..training.len())
            .map(|i| training.document(i).marked_text(&ToyEncoder::default(), "", "").unwrap())
            .collect())
    };
    assert_eq!(of("").unwrap(), ["^main$"]);
    assert_eq!(of("split = \"test\"").unwrap(), ["^test$"]);
    assert_eq!(of("data_files = [\"a.jsonl\", \"t.csv\"]").unwrap(), ["^main$", "^test$"]);
    assert_eq!(of("revision = \"refs/convert/parquet\"").unwrap(), ["^exported$"]);
    assert!(cache.path().join("datasets--org--name/refs/main").is_file());
    let message = of("split = \"dev\"").unwrap_err().to_string();
    assert_eq!(message, "org/name: it has no split \"dev\"; there are train, test");
    assert!(of("revision = \"none\"").unwrap_err().to_string().contains("no revision none"));
    // A repository whose rows a program makes: the export is read instead.
    const SCRIPT: &[(&str, &str, &str)] = &[("main", "name.py", "import datasets\n"), FILES[4]];
    let cache = tempfile::tempdir().unwrap();
    let options =
        OpenOptions { endpoint: Some(hub(SCRIPT)), cache_dir: Some(cache.path().to_owned()), ..OpenOptions::default() };
    let config = config("[[data.datasets]]\npath = \"org/name\"");
    let sets = Sets::find_with(&config.data, &options).unwrap();
    assert!(sets.training[0].files[0].path.ends_with("default/train/0000.jsonl"), "{sets:?}");
    let offline = OpenOptions { offline: true, ..options };
    assert_eq!(Sets::find_with(&config.data, &offline).unwrap().training, sets.training);
}
