//! The built examples, run as a user runs them.

use std::path::PathBuf;
use std::process::Command;

/// The example of this name. `cargo test` builds examples; a single `--test` does not.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.ancestors().nth(2).unwrap().join("examples");
    let path = folder.join(format!("{name}{}", std::env::consts::EXE_SUFFIX));
    if !path.exists() {
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--example", name]).current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(build.status().unwrap().success() && path.exists(), "{} is missing", path.display());
    }
    path
}
