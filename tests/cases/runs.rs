//! Runs: how they begin, stop, go on and are told apart. Cases from public reports have their number.
//!
//! Other inputs of the same kinds that were tried here:
//! - nothing is loaded before a mistake is found: a missing, empty, broken data file (with a model that would have to be
//!   downloaded, too), a validation file of the wrong kind, an output folder that is a file, that another run has or that holds an
//!   earlier run, a checkpoint that is missing, damaged, an adapter or an output folder, layers that the model does not have, a
//!   warmup over the whole run, tokens that the model does not have;
//! - one step: default warmup, a share, `warmup_steps = 1`, 10, `warmup_ratio = 1`;
//! - signals: SIGINT, SIGTERM, SIGHUP with and without somebody who reads the output, SIGHUP under `nohup`, SIGTERM twice;
//! - the same run: another spelling of the path, a link, a copy of the model, layers by name, by pattern and in another order, any
//!   number of threads, another day; not the same run: other weights in the same folder, a changed value in the configuration;
//! - an adapter to go on from: the output of a run, a checkpoint, of other rank and scale than the defaults, with the same, the
//!   default and other values in the configuration, resumed after the adapter is gone, one that does not exist;
//! - a rescue: a new learning rate, scheduler, number of steps, from the latest and from an earlier checkpoint.

#[path = "runs_data.rs"]
mod data;
#[path = "runs_samples.rs"]
mod samples;

use std::cell::{Cell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::tiny_folder::{CHATML, config, write_model, write_rows};
use qlora::card::Card;
use qlora::kernels::Dtype;
use qlora::model::Keep;
use qlora::trainer::config::{Paths, Resume, Targets};
use qlora::trainer::fingerprint::Fingerprint;
use qlora::trainer::progress::{Event, Observer};
use qlora::trainer::session::{Session, plan_on_card};
use qlora::trainer::{Outcome, Result, Summary, TrainConfig};

/// A folder with a model, four rows and the configuration of the cases.
fn job() -> (tempfile::TempDir, TrainConfig) {
    job_with(CHATML)
}

fn job_with(template: &str) -> (tempfile::TempDir, TrainConfig) {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("model"), 1, template);
    write_rows(&folder.path().join("train.jsonl"), &["Hello.", "fine", "one", "two"]);
    let config = config(folder.path());
    (folder, config)
}

fn run(config: &TrainConfig) -> Result<Summary> {
    let session = Session::open(config, |_, _| ())?;
    let (training, validation) = session.datasets()?;
    session.into_trainer(training, validation)?.run()
}

/// The reason why a configuration is refused, before a byte of the weights is read.
fn refused(config: &TrainConfig) -> String {
    let loaded = Cell::new(false);
    let error = Session::open(config, |_, _| loaded.set(true)).unwrap_err().to_string();
    assert!(!loaded.get(), "loaded before: {error}");
    error
}

fn adapter(output: &Path) -> Vec<u8> {
    fs::read(output.join("adapter_model.safetensors")).unwrap()
}

fn with(config: &TrainConfig, changes: &[(&str, &str)]) -> TrainConfig {
    let mut config = config.clone();
    changes.iter().for_each(|(key, value)| config.set(key, value).unwrap());
    config
}

/// The values of all lora_B.
fn lora_b(output: &Path) -> Vec<f32> {
    let bytes = adapter(output);
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let b = file.tensors().into_iter().filter(|(name, _)| name.contains("lora_B"));
    b.flat_map(|(_, tensor)| {
        tensor.data().chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect::<Vec<_>>()
    })
    .collect()
}

/// A record of the events of a run.
#[derive(Clone, Default)]
struct Told {
    initial: Rc<RefCell<String>>,
    first_step: Rc<Cell<u64>>,
    messages: Rc<RefCell<Vec<String>>>,
    rates: Rc<RefCell<Vec<f64>>>,
}

impl Observer for Told {
    fn observe(&mut self, event: &Event<'_>) {
        match event {
            Event::Started(info) => {
                info.initial_parameters.clone_into(&mut self.initial.borrow_mut());
                self.first_step.set(info.first_step);
            }
            Event::Message(text) => self.messages.borrow_mut().push((*text).to_owned()),
            Event::Step(info) => self.rates.borrow_mut().push(info.learning_rate),
            _ => {}
        }
    }
}

fn run_told(config: &TrainConfig) -> (Summary, Told) {
    let told = Told::default();
    let session = Session::open(config, |_, _| ()).unwrap();
    let (training, validation) = session.datasets().unwrap();
    let summary = session.into_trainer(training, validation).unwrap().with_observer(told.clone()).run().unwrap();
    (summary, told)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn case_16_date_template_resume() {
    let dated =
        format!("{{{{- '<|im_start|>system\\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}}}{CHATML}");
    let (folder, config) = job_with(&dated);
    let first =
        with(&config, &[("training.max_steps", "4"), ("training.save_steps", "2"), ("training.save_total_limit", "0")]);
    let mut second = with(&first, &[("training.output_dir", folder.path().join("again").to_str().unwrap())]);
    second.training.resume_from_checkpoint = Resume::From(folder.path().join("out/checkpoint-2"));
    // 26 hours lie between the two clocks: always another date.
    let finetune = |config: &TrainConfig, zone: &str| {
        let file = folder.path().join("run.toml");
        fs::write(&file, config.to_toml()).unwrap();
        let output = std::process::Command::new(crate::tiny_folder::example("finetune"))
            .arg(&file)
            .env("TZ", zone)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    finetune(&first, "AAA+12");
    finetune(&second, "AAA-14");
    let (out, again) = (folder.path().join("out"), folder.path().join("again"));
    assert!(adapter(&out) == adapter(&again));
    let state = |folder: &Path| fs::read_to_string(folder.join("checkpoint-4/trainer_state.json")).unwrap();
    let time = |folder: &Path| {
        let json: serde_json::Value = serde_json::from_str(&state(folder)).unwrap();
        json["stateful_callbacks"]["qlora"]["template_time"].as_str().unwrap().to_owned()
    };
    assert!(time(&out) == time(&again) && time(&out).ends_with("-12:00"), "{}", time(&out));

    // The date is what it takes: with that of another day the data is another.
    let file = out.join("checkpoint-2/trainer_state.json");
    let other = fs::read_to_string(&file).unwrap().replace(&time(&out), "2001-01-01T00:00:00+00:00");
    fs::write(&file, other).unwrap();
    fs::remove_dir_all(&again).unwrap();
    assert!(refused(&second).contains("training data: "));
}

#[test]
fn case_22_one_step_warmup() {
    let (folder, config) = job();
    let config = with(
        &config,
        &[
            ("training.max_steps", "-1"),
            ("training.num_train_epochs", "1"),
            ("training.gradient_accumulation_steps", "4"),
        ],
    );
    let of = |name: &str, changes: &[(&str, &str)]| {
        let output = folder.path().join(name);
        let mut config = with(&config, changes);
        config.training.output_dir = output.clone();
        (config, output)
    };
    let few = [
        ("default", None),
        ("share", Some(("training.warmup_ratio", "0.03"))),
        ("steps", Some(("training.warmup_steps", "0.5"))),
    ];
    for (name, change) in few {
        let (config, output) = of(name, change.as_slice());
        assert_eq!(run(&config).unwrap().steps, 1);
        assert!(lora_b(&output).iter().any(|&value| value != 0.0), "{name}");
        assert!(
            fs::read_to_string(output.join("metrics.jsonl")).unwrap().contains("\"learning_rate\":0.0002"),
            "{name}"
        );
    }
    for change in [("training.warmup_steps", "1"), ("training.warmup_steps", "10"), ("training.warmup_ratio", "1")] {
        let (config, _) = of("refused", &[change]);
        let error = refused(&config);
        assert!(error.contains("learning rate is 0") && error.contains("warmup_steps = 0"), "{error}");
    }
    // Two steps that are both of a longer warmup: the second one trains.
    let (config, output) = of("two", &[("training.warmup_steps", "10"), ("training.max_steps", "2")]);
    run(&config).unwrap();
    assert!(lora_b(&output).iter().any(|&value| value != 0.0));
}

#[test]
fn case_23_continue_from_adapter() {
    let (folder, config) = job();
    let at = |name: &str| folder.path().join(name);
    write_rows(&at("other.jsonl"), &["fine", "two"]);
    run(&config).unwrap();
    let (out, checkpoint) = (at("out"), at("out/checkpoint-2"));

    let mut other_data = config.clone();
    other_data.data.train_file = Paths::One(at("other.jsonl"));
    other_data.training.output_dir = at("out-other");
    other_data.training.resume_from_checkpoint = Resume::From(checkpoint.clone());
    let more_steps = with(&config, &[("training.max_steps", "4"), ("training.resume_from_checkpoint", "true")]);
    for (config, difference) in [(&other_data, "training data: "), (&more_steps, "number of steps: 2")] {
        let error = refused(config);
        assert!(error.contains(difference), "{error}");
        assert!(error.contains(&format!("adapter_name_or_path = {checkpoint:?} in [lora]")), "{error}");
    }
    assert!(refused(&more_steps).contains("override_opt_param_scheduler = true"));
    assert!(!refused(&other_data).contains("override_opt_param_scheduler"));

    // The way out that the refusals name works: from where the first run ended, with a fresh optimizer and schedule.
    other_data.training.resume_from_checkpoint = Resume::No;
    other_data.training.save_steps = 1;
    for from in [&out, &checkpoint] {
        other_data.training.overwrite_output_dir = true;
        other_data.lora.adapter_name_or_path = Some(from.to_str().unwrap().to_owned());
        let (summary, told) = run_told(&other_data);
        assert_eq!((summary.outcome, summary.steps, told.first_step.get()), (Outcome::Finished, 2, 0));
        let trained = qlora::adapter::load(&out, &model_config(&at("model"))).unwrap();
        assert_eq!(*told.initial.borrow(), Fingerprint::new().floats(&trained.weights).to_string());
        assert_eq!(told.rates.borrow()[..], [0.0, 2e-4]);
    }
    assert!(adapter(&out) != adapter(&at("out-other")));
    let expected = adapter(&at("out-other"));

    // Rank and scale are the adapter's where the configuration has the defaults, and must not be others.
    let defaults = with(&other_data, &[("lora.r", "16"), ("lora.lora_alpha", "32")]);
    run(&defaults).unwrap();
    assert!(adapter(&at("out-other")) == expected);
    let saved = fs::read_to_string(at("out-other/adapter_config.json")).unwrap();
    assert!(saved.contains("\"r\": 4") && saved.contains("\"lora_alpha\": 8"), "{saved}");
    let names = r#"["o_proj", "v_proj", "k_proj", "q_proj"]"#;
    run(&with(&other_data, &[("lora.target_modules", names), ("lora.lora_dropout", "0.1")])).unwrap();
    for (key, value) in
        [("lora.r", "8"), ("lora.lora_alpha", "4"), ("lora.use_rslora", "true"), ("lora.target_modules", "all-linear")]
    {
        let error = refused(&with(&other_data, &[(key, value)]));
        assert!(error.contains(key.trim_start_matches("lora.")) && error.contains("leave it out"), "{key}: {error}");
    }
    let error = refused(&with(&other_data, &[("lora.adapter_name_or_path", "no/such/adapter")]));
    assert!(error.contains("no such folder"), "{error}");

    // A run from an adapter is resumed without it.
    run(&other_data).unwrap();
    fs::remove_dir_all(at("out-other/checkpoint-2")).unwrap();
    let gone = with(&other_data, &[("lora.adapter_name_or_path", "gone"), ("training.resume_from_checkpoint", "true")]);
    let (_, told) = run_told(&gone);
    assert_eq!(told.first_step.get(), 1);
    assert!(adapter(&at("out-other")) == expected);
}

#[test]
fn a_run_with_dora_and_patterns_is_resumed_and_gone_on_with() {
    let (folder, config) = job();
    let at = |name: &str| folder.path().join(name);
    let dora = with(
        &config,
        &[("lora.use_dora", "true"), ("lora.rank_pattern", "{ q_proj = 2 }"), ("lora.alpha_pattern", "{ v_proj = 3 }")],
    );
    let dora = with(&dora, &[("training.save_steps", "1"), ("lora.lora_dropout", "0.1")]);
    run(&dora).unwrap();
    let whole = adapter(&at("out"));
    fs::remove_dir_all(at("out/checkpoint-2")).unwrap();
    let resumed = with(&dora, &[("training.resume_from_checkpoint", "true")]);
    let other_alpha = with(&resumed, &[("lora.alpha_pattern", "{ v_proj = 4 }")]);
    assert!(refused(&other_alpha).contains("lora.alpha_pattern"));
    let (_, told) = run_told(&resumed);
    assert_eq!(told.first_step.get(), 1);
    assert!(adapter(&at("out")) == whole);

    let out = at("out");
    let mut next = with(&config, &[("lora.adapter_name_or_path", out.to_str().unwrap())]);
    next.training.output_dir = at("next");
    run(&next).unwrap();
    let model = model_config(&at("model"));
    let [first, trained] = [&out, &next.training.output_dir].map(|dir| qlora::adapter::load(dir, &model).unwrap());
    assert!(trained.config.lora.use_dora && first.layout == trained.layout);
    assert_eq!(trained.config.lora.alpha_pattern, first.config.lora.alpha_pattern);
    for entry in trained.layout.entries() {
        assert_ne!(first.weights[entry.range()], trained.weights[entry.range()], "{}", entry.tensor_name());
    }
    next.training.output_dir = at("never");
    for (key, value) in [("lora.rank_pattern", "{ q_proj = 3 }"), ("lora.alpha_pattern", "{ v_proj = 4 }")] {
        let error = refused(&with(&next, &[(key, value)]));
        assert!(error.contains(key.trim_start_matches("lora.")) && error.contains("leave it out"), "{key}: {error}");
    }

    // Magnitudes do not come to an adapter that was trained without.
    let mut plain = config.clone();
    plain.training.output_dir = at("plain");
    run(&plain).unwrap();
    let from_plain =
        with(&next, &[("lora.adapter_name_or_path", at("plain").to_str().unwrap()), ("lora.use_dora", "true")]);
    assert!(refused(&from_plain).contains("use_dora"));
}

#[test]
fn a_run_with_token_rows_is_resumed_and_gone_on_with() {
    let (folder, config) = job();
    let at = |name: &str| folder.path().join(name);
    // Tokens of the rows: others would have no gradient.
    let tokenizer = qlora::tokenizer::Tokenizer::from_folder(at("model")).unwrap();
    let mut ids = tokenizer.encode("Hello.fine", false).unwrap();
    ids.dedup();
    let [first, second, third, ..] = ids[..] else { panic!("{ids:?}") };
    let list = |a: u32, b: u32| format!("[{a}, {b}]");
    let [chosen, swapped] = [list(first, second), list(second, first)];
    let tokens = with(&config, &[("lora.trainable_token_indices", chosen.as_str()), ("training.save_steps", "1")]);
    run(&tokens).unwrap();
    let whole = adapter(&at("out"));
    fs::remove_dir_all(at("out/checkpoint-2")).unwrap();
    let resumed = with(&tokens, &[("training.resume_from_checkpoint", "true")]);
    let other = list(first, third);
    let others = with(&resumed, &[("lora.trainable_token_indices", other.as_str())]);
    assert!(refused(&others).contains("lora.trainable_token_indices"));
    let (_, told) = run_told(&resumed);
    assert_eq!(told.first_step.get(), 1);
    assert!(adapter(&at("out")) == whole);

    let out = at("out");
    let mut next = with(&config, &[("lora.adapter_name_or_path", out.to_str().unwrap())]);
    next.training.output_dir = at("next");
    run(&next).unwrap();
    let model = model_config(&at("model"));
    let [first, trained] = [&out, &next.training.output_dir].map(|dir| qlora::adapter::load(dir, &model).unwrap());
    assert_eq!((first.layout.tables().count(), &first.layout), (1, &trained.layout));
    assert_eq!(first.config.lora.trainable_token_indices, trained.config.lora.trainable_token_indices);
    for entry in trained.layout.entries() {
        assert_ne!(first.weights[entry.range()], trained.weights[entry.range()], "{}", entry.tensor_name());
    }
    next.training.output_dir = at("never");
    for (key, value) in [
        ("lora.trainable_token_indices", swapped.as_str()),
        ("lora.modules_to_save", "[\"lm_head\"]"),
        ("lora.ensure_weight_tying", "true"),
    ] {
        let error = refused(&with(&next, &[(key, value)]));
        assert!(error.contains(key.trim_start_matches("lora.")) && error.contains("leave it out"), "{key}: {error}");
    }
    let mut beyond = with(&config, &[("lora.trainable_token_indices", "[1000000]")]);
    beyond.training.output_dir = at("never");
    let error = refused(&beyond);
    assert!(error.contains("beyond the model's vocabulary"), "{error}");
}

fn model_config(folder: &Path) -> qlora::config::ModelConfig {
    qlora::config::ModelConfig::from_json_file(folder.join("config.json")).unwrap()
}

#[test]
fn mistakes_are_found_before_the_model_is_loaded() {
    let (folder, config) = job();
    let at = |name: &str| folder.path().join(name);
    let set = |key: &str, value: &Path| with(&config, &[(key, value.to_str().unwrap())]);
    fs::write(at("broken.jsonl"), "{\"text\": \"a\"}\n{\"text\": \n").unwrap();
    fs::write(at("empty.jsonl"), "\n").unwrap();
    fs::write(at("file"), "").unwrap();
    for key in ["data.train_file", "data.validation_file"] {
        assert!(refused(&set(key, &at("none.jsonl"))).contains("none.jsonl: No such file"), "{key}");
        assert!(refused(&set(key, &at("broken.jsonl"))).contains("broken.jsonl:2: not valid JSON"), "{key}");
        assert!(refused(&set(key, &at("empty.jsonl"))).contains("empty.jsonl: the file has no rows"), "{key}");
        // Before anything is downloaded.
        let from_hub = with(&set(key, &at("broken.jsonl")), &[("model.model_name_or_path", "nobody/nothing")]);
        assert!(refused(&from_hub).contains("broken.jsonl:2"), "{key}");
    }
    let long = "x".repeat(600);
    write_rows(&at("long.jsonl"), &[&long]);
    let too_long = with(&set("data.train_file", &at("long.jsonl")), &[("data.max_length", "700")]);
    assert!(refused(&too_long).contains("the model has only 512 positions"));
    assert!(refused(&set("training.output_dir", &at("file"))).contains("file: "));
    assert!(refused(&set("training.resume_from_checkpoint", &at("nowhere"))).contains("no such checkpoint folder"));
    assert!(refused(&with(&config, &[("lora.target_modules", "[\"none_proj\"]")])).contains("none_proj"));
    assert!(refused(&with(&config, &[("model.device", "cuda:77")])).contains("cuda"));

    run(&config).unwrap();
    assert!(refused(&config).contains("checkpoint-2: the output folder holds an earlier run"));
    let resume = |path: &Path| refused(&set("training.resume_from_checkpoint", path));
    assert!(resume(&at("out")).contains("this is an output folder; name one of its checkpoints: "));
    fs::remove_file(at("out/checkpoint-2/optimizer.safetensors")).unwrap();
    fs::remove_file(at("out/checkpoint-2/trainer_state.json")).unwrap();
    assert!(resume(&at("out/checkpoint-2")).contains("adapter_name_or_path"));
    fs::write(at("out/checkpoint-2/trainer_state.json"), "{").unwrap();
    assert!(resume(&at("out/checkpoint-2")).contains("the checkpoint is damaged"));
    fs::remove_dir_all(at("out/checkpoint-2")).unwrap();

    // A session has its folder until it ends; one that only plans needs none.
    let session = Session::open(&config, |_, _| ()).unwrap();
    assert!(refused(&config).contains("another run is writing to this folder"));
    Session::open_dry_run(&set("training.output_dir", &at("file")), |_, _| ()).unwrap();
    Session::open_dry_run(&config, |_, _| ()).unwrap();
    drop(session);
    run(&config).unwrap();
}

#[test]
fn resuming_in_an_empty_folder_begins() {
    let (folder, config) = job();
    let resume = with(&config, &[("training.resume_from_checkpoint", "true")]);
    let (summary, told) = run_told(&resume);
    assert_eq!(summary.outcome, Outcome::Finished);
    assert!(told.messages.borrow()[0].contains("holds no checkpoint: the run begins"), "{:?}", told.messages.borrow());
    let again = run_told(&resume).1;
    assert_eq!((again.first_step.get(), again.messages.borrow().len()), (2, 0));
    assert!(folder.path().join("out/adapter_model.safetensors").exists());
}

#[test]
fn what_killed_writers_left_goes() {
    let (folder, config) = job();
    let out = folder.path().join("out");
    fs::create_dir(&out).unwrap();
    let left = [
        "adapter_model.safetensors.tmp-Ab12Cd",
        "metrics.jsonl.tmp-000000",
        "loss.svg.tmp-zzzzzz",
        "checkpoint-9.tmp-Ab12Ce",
    ];
    left.iter().for_each(|name| fs::write(out.join(name), "half").unwrap());
    fs::remove_file(out.join(left[3])).unwrap();
    fs::create_dir(out.join(left[3])).unwrap();
    fs::write(out.join("my.tmp-notes"), "").unwrap();
    run(&config).unwrap();
    let names: Vec<String> =
        fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let temporary: Vec<_> = names.iter().filter(|name| name.contains(".tmp-")).collect();
    assert_eq!(temporary, ["my.tmp-notes"]);
}

#[test]
fn a_run_is_its_numbers() {
    let (folder, config) = job();
    let at = |name: &str| folder.path().join(name);
    let config = with(&config, &[("training.save_steps", "1"), ("training.save_total_limit", "0")]);
    run(&config).unwrap();
    let expected = adapter(&at("out"));
    let mut again = config.clone();
    again.training.output_dir = at("again");
    again.training.resume_from_checkpoint = Resume::From(at("out/checkpoint-1"));
    let goes_on = |config: &TrainConfig| {
        let _ = fs::remove_dir_all(at("again"));
        run(config).unwrap();
        assert!(adapter(&at("again")) == expected);
    };
    let of_model = |path: &Path| with(&again, &[("model.model_name_or_path", path.to_str().unwrap())]);

    goes_on(&of_model(&at("./model/../model/")));
    copy(&at("model"), &at("elsewhere"));
    goes_on(&of_model(&at("elsewhere")));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(at("model"), at("link")).unwrap();
        goes_on(&of_model(&at("link")));
    }
    let mut layers = again.clone();
    layers.lora.target_modules = Targets::List(["v_proj", "k_proj", "o_proj", "q_proj"].map(String::from).to_vec());
    goes_on(&layers);
    layers.lora.target_modules = Targets::Pattern(r".*self_attn\.(q|k|v|o)_proj".to_owned());
    goes_on(&layers);
    for changes in [
        [("training.logging_steps", "2")],
        [("data.on_overlong", "drop")],
        [("model.bnb_4bit_compute_dtype", "float32")],
    ] {
        goes_on(&with(&again, &changes));
    }

    // Other weights under the same name, and other arithmetic with the same weights.
    fs::remove_dir_all(at("again")).unwrap();
    layers.lora.target_modules = Targets::Pattern("all-linear".to_owned());
    let error = refused(&layers);
    assert!(error.contains("lora.target_modules: ") && error.contains("trainable parameters: "), "{error}");
    write_model(&at("model"), 2, CHATML);
    assert!(refused(&again).contains("model: weights: "));
    write_model(&at("model"), 1, CHATML);
    let file = at("model/config.json");
    let text = fs::read_to_string(&file).unwrap().replace("10000.0", "500000.0");
    fs::write(&file, text).unwrap();
    assert!(refused(&again).contains("model: weights: "));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let (folder, config) = job();
    let rows: Vec<String> = (0..6).map(|i| "the quick brown fox ".repeat(4 + 3 * i)).collect();
    write_rows(&folder.path().join("train.jsonl"), &rows.iter().map(String::as_str).collect::<Vec<_>>());
    let mut config = with(
        &config,
        &[
            ("training.per_device_train_batch_size", "6"),
            ("lora.target_modules", "all-linear"),
            ("lora.lora_dropout", "0.1"),
        ],
    );
    config.model.load_in_4bit = true;
    let mut with_threads = |threads: usize| {
        config.training.output_dir = folder.path().join(threads.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&config)).unwrap();
        adapter(&config.training.output_dir)
    };
    let one = with_threads(1);
    for threads in [2, 3, 8] {
        assert!(with_threads(threads) == one, "{threads} threads");
    }
}

#[test]
fn a_run_can_be_rescued() {
    let (folder, config) = job();
    let out = folder.path().join("out");
    let config = with(
        &config,
        &[
            ("training.max_steps", "6"),
            ("training.save_steps", "2"),
            ("training.save_total_limit", "0"),
            ("training.warmup_steps", "0"),
        ],
    );
    run(&config).unwrap();
    let diverged = adapter(&out);
    let mut rescue = with(&config, &[("training.learning_rate", "1e-5"), ("training.lr_scheduler_type", "cosine")]);
    rescue.training.resume_from_checkpoint = Resume::From(out.join("checkpoint-2"));
    let error = refused(&rescue);
    assert!(error.contains("training.learning_rate: 0.0002 in the checkpoint, 0.00001 now"), "{error}");
    assert!(error.contains("set override_opt_param_scheduler = true in [training]"), "{error}");
    // It is no excuse for anything else.
    rescue.training.override_opt_param_scheduler = true;
    let error = refused(&with(&rescue, &[("training.seed", "1")]));
    assert!(error.contains("training.seed") && !error.contains("learning_rate: "), "{error}");

    let (_, told) = run_told(&rescue);
    assert_eq!(told.first_step.get(), 2);
    let rates = told.rates.borrow();
    assert!(rates.len() == 4 && rates.iter().all(|&rate| rate > 0.0 && rate <= 1e-5), "{rates:?}");
    assert!(
        told.messages.borrow()[0].contains("learning_rate: 0.0002 in the checkpoint"),
        "{:?}",
        told.messages.borrow()
    );
    assert!(adapter(&out) != diverged);
    // Later checkpoints are moved out of the way, so that "the latest" is the rescued run's.
    for step in [4, 6] {
        assert!(
            out.join(format!("superseded-checkpoint-{step}")).exists()
                && out.join(format!("checkpoint-{step}")).exists()
        );
    }
    let rescued = adapter(&out);
    fs::remove_dir_all(out.join("checkpoint-6")).unwrap();
    let latest = with(&rescue, &[("training.resume_from_checkpoint", "true")]);
    let (_, told) = run_told(&latest);
    assert_eq!((told.first_step.get(), told.messages.borrow().len()), (4, 0));
    assert!(adapter(&out) == rescued);
    // More steps, from the end.
    let (summary, told) = run_told(&with(&latest, &[("training.max_steps", "8")]));
    assert_eq!((summary.steps, told.first_step.get()), (8, 6));
}

#[cfg(unix)]
mod signals {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// `finetune` over so many steps that it does not end by itself; waits until it has trained some.
    fn start(folder: &Path, config: &TrainConfig, shell: Option<&str>, stderr: Stdio) -> Child {
        let file = folder.join("run.toml");
        fs::write(&file, config.to_toml()).unwrap();
        let program = crate::tiny_folder::example("finetune");
        let before = lines(config);
        let mut command = match shell {
            // The parent of the tests may ignore signals, as nohup does, and a child would ignore them too.
            None if signals_are_ignored() => {
                let mut command = Command::new("env");
                command.arg("--default-signal=HUP,INT,TERM").arg(program);
                command
            }
            None => Command::new(program),
            Some(script) => {
                let mut command = Command::new("sh");
                command.args(["-c", script, "sh"]).arg(program);
                command
            }
        };
        let mut child = command.arg(&file).stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while lines(config) < before + 3 {
            assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "the run did not begin");
            std::thread::sleep(Duration::from_millis(5));
        }
        child
    }

    /// Of the log: an earlier run's stay until the resumed one has taken them over.
    fn lines(config: &TrainConfig) -> usize {
        fs::read_to_string(config.training.output_dir.join("metrics.jsonl")).map_or(0, |log| log.lines().count())
    }

    /// Whether this process ignores SIGHUP, SIGINT or SIGTERM, where Linux says so.
    fn signals_are_ignored() -> bool {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).map(str::trim);
        let bit = |number: u32| 1u64 << (number - 1);
        ignored
            .and_then(|mask| u64::from_str_radix(mask, 16).ok())
            .is_some_and(|mask| mask & (bit(1) | bit(2) | bit(15)) != 0)
    }

    /// The exit code of a run that was asked to stop.
    fn ended(child: &mut Child) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                panic!("the run goes on after its signal");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(child: &Child, name: &str) {
        assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
    }

    fn long_job() -> (tempfile::TempDir, TrainConfig) {
        let (folder, config) = job();
        (folder, with(&config, &[("training.max_steps", "1000000"), ("training.resume_from_checkpoint", "true")]))
    }

    fn latest(config: &TrainConfig) -> Option<PathBuf> {
        qlora::trainer::checkpoint::folder::latest(&config.training.output_dir).unwrap()
    }

    #[test]
    fn every_one_saves_and_says_so_in_the_exit_code() {
        let (folder, config) = long_job();
        let mut before = None;
        for (name, code) in [("-INT", 130), ("-TERM", 143), ("-HUP", 129)] {
            let mut child = start(folder.path(), &config, None, Stdio::null());
            signal(&child, name);
            assert_eq!(ended(&mut child), Some(code), "{name}");
            let now = latest(&config);
            assert!(now.is_some() && now != before, "{name}: {now:?}");
            before = now;
        }
    }

    #[test]
    fn a_terminal_that_is_gone_is_no_obstacle() {
        let (folder, config) = long_job();
        let mut child = start(folder.path(), &config, None, Stdio::piped());
        drop(child.stderr.take());
        signal(&child, "-HUP");
        assert_eq!(ended(&mut child), Some(129));
        assert!(latest(&config).is_some());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn nohup_is_respected() {
        let (folder, config) = long_job();
        let script = "trap '' HUP; exec \"$@\"";
        let mut child = start(folder.path(), &config, Some(script), Stdio::null());
        signal(&child, "-HUP");
        std::thread::sleep(Duration::from_millis(300));
        assert!(child.try_wait().unwrap().is_none() && latest(&config).is_none());
        // Twice, as a scheduler may: it still saves.
        signal(&child, "-TERM");
        let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        assert_eq!(ended(&mut child), Some(143));
        assert!(latest(&config).is_some());
    }
}

#[test]
fn fp8_without_a_gpu_that_has_it_is_refused_before_anything_is_read() {
    let (folder, config) = job();
    let config = with(&config, &[("model.device", "cpu"), ("model.frozen_compute", "fp8")]);
    let mut read = false;
    let error = Session::open(&config, |_, _| read = true).unwrap_err().to_string();
    assert!(error.contains("frozen_compute = \"fp8\"") && error.contains("Hopper") && error.contains("CPU"), "{error}");
    assert!(!read, "weights were read");
    drop(folder);
}

#[test]
fn a_run_is_planned_for_a_card_that_is_not_there() {
    let (folder, config) = job();
    // The configured device and the output folder play no part.
    let config = with(&config, &[("model.device", "cuda:77")]);
    let on = |config: &TrainConfig, card: &str| plan_on_card(config, &Card::named(card).unwrap()).unwrap();
    let t4 = on(&config, "T4");
    assert_eq!((t4.on.dtype, t4.training.read().len()), (Dtype::F16, 4));
    let plan = t4.on.plan.as_ref().unwrap();
    assert!(plan.keep.iter().all(|&keep| keep == Keep::Everything) && plan.peak < t4.on.card.usable(), "{plan}");
    let text = t4.on.to_string();
    assert!(text.contains("on T4 (computed") && text.contains("computes in float16"), "{text}");
    assert_eq!(on(&config, "L4").on.dtype, Dtype::Bf16);
    assert_eq!(on(&with(&config, &[("model.bnb_4bit_compute_dtype", "float32")]), "L4").on.dtype, Dtype::F32);

    let recomputing = on(&with(&config, &[("training.gradient_checkpointing", "true")]), "L4");
    let recomputing = recomputing.on.plan.unwrap();
    assert!(recomputing.keep.iter().all(|&keep| keep == Keep::Input), "{recomputing}");
    // 10 kB hold no step.
    let nothing = on(&with(&config, &[("training.memory_budget", "1e-5")]), "H100");
    assert!(nothing.on.plan.unwrap_err().contains("needs at least") && nothing.on.longest == 0);
    // fp8 is Hopper's, and its plan is another one.
    let fp8 = with(&config, &[("model.frozen_compute", "fp8")]);
    let refused = plan_on_card(&fp8, &Card::named("RTX 4090").unwrap()).unwrap_err().to_string();
    assert!(
        refused.contains("frozen_compute") && refused.contains("H100") && refused.contains("RTX 4090"),
        "{refused}"
    );
    let (fp8, plain) = (on(&fp8, "H100").on.plan.unwrap(), on(&config, "H100").on.plan.unwrap());
    assert!(fp8.cached_blocks == plain.cached_blocks && fp8.peak != plain.peak, "{fp8}; {plain}");
    // 8-bit moments are smaller.
    let small = on(&with(&config, &[("training.optim", "adamw_8bit")]), "T4");
    assert!(small.on.plan.unwrap().resident < plan.resident);
    assert!(!folder.path().join("out").exists());
}
