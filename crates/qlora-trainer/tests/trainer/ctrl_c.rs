//! Signals to a real process: Ctrl-C saves and leaves, a second one leaves at once, a kill loses at most what came after
//! the last checkpoint.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use qlora_trainer::checkpoint::folder;
use qlora_trainer::config::Resume;
use qlora_trainer::progress::ProgressBar;
use qlora_trainer::{Interrupt, Outcome};

use crate::toy::{Toy, config, result, trainer};

const OUTPUT: &str = "QLORA_TEST_OUTPUT";
const PAUSE: &str = "QLORA_TEST_PAUSE";

/// Not a test: the process that the tests start.
#[test]
#[ignore = "started by the other tests"]
fn child() {
    let (Ok(output), Ok(pause)) = (std::env::var(OUTPUT), std::env::var(PAUSE)) else { return };
    let pause = Duration::from_millis(pause.parse().unwrap());
    let interrupt = Interrupt::on_ctrl_c().unwrap();
    assert!(Interrupt::on_ctrl_c().unwrap_err().to_string().starts_with("cannot handle Ctrl-C"));
    let model = Toy { pause, ..Toy::new(1) };
    let summary = trainer(&config(Path::new(&output)), model)
        .with_observer(ProgressBar::new())
        .with_interrupt(interrupt)
        .run()
        .unwrap();
    assert_eq!(summary.outcome, Outcome::Interrupted);
}

fn start(output: &Path, pause: u32) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "ctrl_c::child"])
        .env(OUTPUT, output)
        .env(PAUSE, pause.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Waits until the log has so many lines.
fn wait_for_log(output: &Path, lines: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while fs::read_to_string(output.join("metrics.jsonl")).map_or(0, |log| log.lines().count()) < lines {
        assert!(Instant::now() < deadline, "the run did not begin");
        sleep(Duration::from_millis(5));
    }
}

fn resumes_to_the_same_end(output: &Path) {
    let reference = tempfile::tempdir().unwrap();
    trainer(&config(reference.path()), Toy::new(1)).run().unwrap();
    let mut config = config(output);
    if folder::latest(output).unwrap().is_some() {
        config.training.resume_from_checkpoint = Resume::Latest;
    }
    trainer(&config, Toy::new(1)).run().unwrap();
    assert_eq!(result(output, 9), result(reference.path(), 9));
}

#[test]
fn the_first_saves_and_leaves() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = start(folder.path(), 150);
    wait_for_log(folder.path(), 2);
    signal(&child, "-INT");
    assert!(child.wait().unwrap().success());
    let (step, _) = folder::list(folder.path()).unwrap().pop().expect("a checkpoint");
    assert!((2..9).contains(&step), "{step}");
    resumes_to_the_same_end(folder.path());
}

#[test]
fn the_second_leaves_at_once() {
    let folder = tempfile::tempdir().unwrap();
    // A step takes 45 seconds.
    let mut child = start(folder.path(), 15_000);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !folder.path().join("metrics.jsonl").exists() {
        assert!(Instant::now() < deadline, "the run did not begin");
        sleep(Duration::from_millis(5));
    }
    signal(&child, "-INT");
    sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none());
    let asked = Instant::now();
    signal(&child, "-INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(asked.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_kill_at_any_time_loses_no_more_than_the_last_steps() {
    for delay in [0, 7, 19, 40] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = start(folder.path(), 2);
        wait_for_log(folder.path(), 1);
        sleep(Duration::from_millis(delay));
        signal(&child, "-KILL");
        child.wait().unwrap();
        resumes_to_the_same_end(folder.path());
    }
}
