//! Errors are said once, and what to do about them.

use std::process::{Command, Stdio};

use crate::random_folder;

#[test]
fn no_error_is_printed_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let write = |name: &str, text: &str| std::fs::write(path(name), text).unwrap();
    random_folder::make(&folder.path().join("model"), 64).unwrap();
    write(
        "unknown.toml",
        "[model]\nmodel_name_or_path = \"m\"\n[data]\ntrain_file = \"t\"\n[training]\nlearning_rte = 1\n",
    );
    let (model, rows) = (path("model"), path("no-rows.jsonl"));
    write("rows.toml", &format!("[model]\nmodel_name_or_path = {model:?}\n[data]\ntrain_file = {rows:?}\n"));

    let runs: [(&str, Vec<String>, &str); 9] = [
        ("train", vec![path("none.toml")], "No such file"),
        ("train", vec![path("unknown.toml")], "learning_rte"),
        ("train", vec![path("rows.toml")], "no-rows.jsonl"),
        ("train", vec![path("rows.toml"), "--r".into(), "many".into()], "many"),
        ("generate", vec!["--model".into(), path("none"), "the".into()], "no such file or folder"),
        (
            "generate",
            vec!["--model".into(), model.clone(), "--batch".into(), rows, "--output".into(), path("o")],
            "No such file",
        ),
        (
            "merge",
            vec!["--base".into(), model, "--adapter".into(), path("no-adapter"), "--out".into(), path("o")],
            "no-adapter",
        ),
        ("inspect", vec![path("none")], "none\""),
        ("adapters", vec!["show".into(), path("none")], "no such folder"),
    ];
    for (name, arguments, said) in runs {
        let mut program = Command::new(super::QLORA);
        // A stack is printed where somebody asked for it.
        program.arg(name).args(&arguments).current_dir(folder.path()).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
        let output = program.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{name} {arguments:?}: {text}");
        assert_eq!(text.matches(said).count(), 1, "{name} {arguments:?} says {said:?}:\n{text}");
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| line.len() > 8).collect();
        for (at, line) in lines.iter().enumerate() {
            let again = lines[at + 1..].iter().find(|later| later.contains(line) || line.contains(*later));
            assert_eq!(again, None, "{name} {arguments:?}:\n{text}");
        }
    }
}

#[test]
fn wrong_arguments_have_an_exit_code_of_their_own() {
    let code = |arguments: &[&str]| Command::new(super::QLORA).args(arguments).output().unwrap().status.code();
    assert_eq!(code(&["train"]), Some(2));
    assert_eq!(code(&["nonsense"]), Some(2));
    assert_eq!(code(&["inspect", "/no/such/model"]), Some(1));
    assert_eq!(code(&["--version"]), Some(0));
}
