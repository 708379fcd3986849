//! Errors are named, and leave the last good checkpoint as it was.

use std::fs;
use std::path::Path;

use qlora_trainer::checkpoint::folder;
use qlora_trainer::config::{Resume, TrainConfig};
use qlora_trainer::data::{Dataset, Encoded};
use qlora_trainer::{Error, Parameter, TrainPass, TrainableModel, Trainer};

use crate::toy::{Fault, Toy, VOCAB, config, dataset, trainer};

fn refusal(config: &TrainConfig, model: Toy) -> String {
    match Trainer::new(config.clone(), model, dataset(15), Some(dataset(5))) {
        Ok(mut trainer) => trainer.run().unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

fn resuming(output: &Path) -> TrainConfig {
    let mut config = config(output);
    config.training.resume_from_checkpoint = Resume::Latest;
    config
}

/// A folder with the checkpoints 8 and 9 of a whole run.
fn finished() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    trainer(&config(folder.path()), Toy::new(1)).run().unwrap();
    folder
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let folder = tempfile::tempdir().unwrap();
    // Call 3 + 3 * 2 + 1 after the first evaluation: step 3, micro-batch 2.
    let model = Toy { fault: Some((3 + 6 + 1, Fault::Loss)), ..Toy::new(1) };
    let message = refusal(&config(folder.path()), model);
    assert!(
        message.starts_with("step 3, micro-batch 2: the loss is NaN; the micro-batch holds document "),
        "{message}"
    );
    assert!(message.contains("The last checkpoint is untouched"), "{message}");
    assert_eq!(folder::list(folder.path()).unwrap().len(), 1);
    assert_eq!(folder::latest(folder.path()).unwrap(), Some(folder.path().join("checkpoint-2")));
    // Without the fault the run goes on from there.
    trainer(&resuming(folder.path()), Toy::new(1)).run().unwrap();
}

#[test]
fn a_gradient_that_is_not_finite_is_traced_to_micro_batch_and_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let first = dataset(15);
    // The micro-batch whose first document begins with this token.
    let token = first.document(8).ids[0];
    let element = Toy::new(1).parameters()[2].range.start + 4;
    let mut config = config(folder.path());
    config.training.train_sampling_strategy = qlora_trainer::config::SamplingStrategy::Sequential;
    config.training.eval_on_start = false;
    let place = (0..15).step_by(2).position(|i| first.document(i).ids[0] == token).unwrap();
    let model = Toy { poisoned_token: Some((token, Fault::Gradient(element))), ..Toy::new(1) };
    let message = refusal(&config, model);
    let expected = format!("step {}, micro-batch {}: the gradient of two.lora_A is inf", place / 3 + 1, place % 3 + 1);
    assert!(message.starts_with(&expected), "{message}");
    assert!(message.contains(&format!("holds document {}, document {}.", 2 * place, 2 * place + 1)), "{message}");
}

#[test]
fn tensors_without_gradient_are_named_at_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let message = refusal(&config(folder.path()), Toy { detached: true, ..Toy::new(1) });
    // two.lora_A is excused as long as two.lora_B is zero.
    assert_eq!(message, "step 1: no gradient reaches 1 of 4 trainable tensors: two.lora_B");
    let message = refusal(&config(folder.path()), Toy { detached: true, ..Toy::warm(1) });
    assert_eq!(message, "step 1: no gradient reaches 2 of 4 trainable tensors: two.lora_A, two.lora_B");
    assert!(folder::latest(folder.path()).unwrap().is_none());
}

#[test]
fn an_error_of_the_model_says_where_it_happened() {
    let folder = tempfile::tempdir().unwrap();
    let model = Toy { fault: Some((3 + 4, Fault::Killed)), ..Toy::new(1) };
    assert_eq!(refusal(&config(folder.path()), model), "step 2, micro-batch 2: killed");
}

#[test]
fn a_full_disk_leaves_no_half_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let full = Path::new("/dev/full");
    if !full.exists() {
        return;
    }
    let model = Toy { adapter_path: Some(full.to_owned()), ..Toy::new(1) };
    let message = refusal(&config(folder.path()), model);
    assert!(message.starts_with("/dev/full: No space left"), "{message}");
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().starts_with("checkpoint")), "{names:?}");

    // The same for the log.
    #[cfg(unix)]
    {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("metrics.jsonl");
        std::os::unix::fs::symlink(full, &log).unwrap();
        let message = refusal(&config(folder.path()), Toy::new(1));
        assert!(message.starts_with(&format!("{}: No space left", log.display())), "{message}");
    }
}

#[test]
fn an_output_folder_that_cannot_be_used_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [file.clone(), file.join("deeper")] {
        let message = refusal(&config(&path), Toy::new(1));
        assert!(message.starts_with(&path.display().to_string()), "{message}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"");
}

#[test]
fn an_earlier_run_is_not_overwritten_by_accident() {
    let folder = finished();
    let message = refusal(&config(folder.path()), Toy::new(1));
    assert!(message.contains("checkpoint-9: the output folder holds an earlier run"), "{message}");
    let mut overwrite = config(folder.path());
    (overwrite.training.overwrite_output_dir, overwrite.training.max_steps) = (true, 2);
    trainer(&overwrite, Toy::new(1)).run().unwrap();
    let steps: Vec<u64> = folder::list(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [2]);

    // Without a checkpoint there is nothing to go on from, and nothing to lose.
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(trainer(&resuming(empty.path()), Toy::new(1)).run().unwrap().steps, 9);
    let mut config = config(empty.path());
    config.training.resume_from_checkpoint = Resume::From("no/such".into());
    assert_eq!(refusal(&config, Toy::new(1)), "no/such: there is no such checkpoint folder");
}

#[test]
fn a_checkpoint_of_another_run_is_refused_with_the_difference() {
    let folder = finished();
    let cases: [(&str, &str, &str); 6] = [
        ("training.learning_rate", "0.1", "training.learning_rate: 0.05 in the checkpoint, 0.1 now"),
        ("training.num_train_epochs", "4", "number of steps: 9 in the checkpoint, 12 now"),
        ("training.warmup_steps", "3", "training.warmup_steps: 2 in the checkpoint, 3 now"),
        ("lora.r", "4", "lora.r: 16 in the checkpoint, 4 now"),
        ("data.packing", "true", "data.packing: false in the checkpoint, true now"),
        ("training.data_seed", "1", "training.data_seed: 42 in the checkpoint, 1 now"),
    ];
    for (key, value, expected) in cases {
        let mut config = resuming(folder.path());
        config.set(key, value).unwrap();
        let message = refusal(&config, Toy::new(1));
        assert!(
            message.contains("checkpoint-9 belongs to a different run:") && message.contains(expected),
            "{message}"
        );
    }
    let message = refusal(&resuming(folder.path()), Toy::new(2));
    assert!(message.contains("model: base: "), "{message}");
    let other_data = Trainer::new(resuming(folder.path()), Toy::new(1), dataset(14), Some(dataset(5)));
    let message = other_data.unwrap().run().unwrap_err().to_string();
    assert!(message.contains("training data: \"15 documents") && message.contains("\"14 documents"), "{message}");

    // Options that do not change the numbers may differ.
    let mut config = resuming(folder.path());
    for (key, value) in [("save_steps", "3"), ("logging_steps", "1"), ("gradient_checkpointing", "false")] {
        config.set(&format!("training.{key}"), value).unwrap();
    }
    trainer(&config, Toy::new(1)).run().unwrap();
}

#[test]
fn damaged_checkpoints_are_refused_with_the_file() {
    let folder = finished();
    let checkpoint = folder.path().join("checkpoint-9");
    let refuse_with = |name: &str, content: Option<&[u8]>| {
        let path = checkpoint.join(name);
        let original = fs::read(&path).unwrap();
        match content {
            Some(content) => fs::write(&path, content).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let message = refusal(&resuming(folder.path()), Toy::new(1));
        fs::write(&path, original).unwrap();
        assert!(message.starts_with(&format!("{}: the checkpoint is damaged: ", path.display())), "{message}");
        assert!(message.ends_with("resume from an earlier one"), "{message}");
    };
    for name in ["optimizer.safetensors", "trainer_state.json"] {
        let original = fs::read(checkpoint.join(name)).unwrap();
        refuse_with(name, None);
        for len in [0, 1, 8, 9, original.len() / 2, original.len() - 2] {
            refuse_with(name, Some(&original[..len]));
        }
        refuse_with(name, Some(&[0xff; 100]));
    }
    // Any flipped bit in the numbers.
    let original = fs::read(checkpoint.join("optimizer.safetensors")).unwrap();
    for place in (original.len() - 1500..original.len()).step_by(101) {
        let mut changed = original.clone();
        changed[place] ^= 1;
        refuse_with("optimizer.safetensors", Some(&changed));
    }
    let state = fs::read_to_string(checkpoint.join("trainer_state.json")).unwrap();
    for (from, to) in [("\"format_version\": 1", "\"format_version\": 2"), ("\"qlora\"", "\"other\""), ("0x", "0x")] {
        if from != to {
            assert!(state.contains(from));
            refuse_with("trainer_state.json", Some(state.replace(from, to).as_bytes()));
        }
    }
    // After all that, the checkpoint is as it was.
    trainer(&resuming(folder.path()), Toy::new(1)).run().unwrap();
}

#[test]
fn data_that_does_not_fit_the_model_is_refused_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let build = |documents: Vec<Encoded>| {
        let data = Dataset::from_encoded(documents).unwrap();
        match Trainer::new(config(folder.path()), Toy::new(1), data, None) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        }
    };
    let document = |ids: Vec<u32>| Encoded { trained: vec![true; ids.len()], ids };
    let message = build(vec![document(vec![1, 2]), document(vec![1, VOCAB as u32])]);
    assert_eq!(message, "document 1: token id 11, but the model has only 11; the tokenizer belongs to another model");
    let message = build(vec![document(vec![1; 21])]);
    assert!(message.starts_with("document 0: 21 tokens, but the model has only 20 positions"), "{message}");
    assert_eq!(build(vec![]), "the training data is empty");
    let empty = Trainer::new(config(folder.path()), Toy::new(1), dataset(3), Some(Dataset::new()));
    assert!(matches!(empty, Err(Error::Invalid(message)) if message == "the validation data is empty"));
}

#[test]
fn parameters_must_cover_the_buffer() {
    struct Broken(Toy, Vec<Parameter>);
    impl TrainableModel for Broken {
        fn parameters(&self) -> Vec<Parameter> {
            self.1.clone()
        }
        fn masters(&self) -> qlora_core::Result<Vec<f32>> {
            self.0.masters()
        }
        fn update_masters(
            &mut self,
            update: &mut dyn FnMut(qlora_kernels::ViewMut) -> qlora_kernels::Result<()>,
        ) -> qlora_core::Result<()> {
            self.0.update_masters(update)
        }
        fn accumulate_gradients(
            &mut self,
            batch: &qlora_core::batch::Batch,
            num_items: usize,
            pass: TrainPass,
            grad: qlora_kernels::ViewMut,
        ) -> qlora_core::Result<f64> {
            self.0.accumulate_gradients(batch, num_items, pass, grad)
        }
        fn evaluate(&mut self, batch: &qlora_core::batch::Batch) -> qlora_core::Result<qlora_trainer::LossSum> {
            self.0.evaluate(batch)
        }
        fn save_adapter(&self, folder: &Path) -> qlora_core::Result<()> {
            self.0.save_adapter(folder)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let whole = Toy::new(1).parameters();
    let refuse = |parameters: Vec<Parameter>| match Trainer::new(
        config(folder.path()),
        Broken(Toy::new(1), parameters),
        dataset(3),
        None,
    ) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    assert!(refuse(whole[..3].to_vec()).starts_with("the parameters have 99 elements, the buffer 132"));
    assert!(refuse(whole[1..].to_vec()).starts_with("one.lora_B: the elements 33..66"));
    let mut wrong_shape = whole.clone();
    wrong_shape[2].shape = vec![4, 4];
    assert!(refuse(wrong_shape).starts_with("two.lora_A: "));
}
