//! Keys of transformers' `TrainingArguments`, and of other trainers for the run.

use toml::Value;

use super::super::choices::Optim;
use super::super::foreign_keys::Is::{Number, Off, On, Text};
use super::super::foreign_keys::Means::{Anyway, If, Nothing, Ours};
use super::super::foreign_keys::{KnownKey, is_off};
use super::super::trackers::Tracker;
use super::key;
use crate::objective::ObjectiveKind;

const PREFERENCE: &str = "write `objective` in [training]: \"sft\" or \"dpo\"; there are no other objectives";
const TRACKER: &str = "metrics go to metrics.jsonl in output_dir, from where scripts/sync_wandb.py and scripts/sync_mlflow.py take \
                       them; leave it out";
const AT_THE_END: &str = "the adapter is uploaded when the run has ended (\"end\"); leave it out, and upload a checkpoint of a run that \
                          goes on with `qlora push OUTPUT_DIR/checkpoint-N OWNER/NAME`";
const ONE_DEVICE: &str = "one device trains; leave it out, and choose the device by `device` in [model]";
const SAVING: &str = "write `save_steps` in [training]; 0 saves one checkpoint at the end";

pub(super) const KEYS: &[KnownKey] = &[
    key(&["do_train"], Anyway(&[On], "a run trains; leave it out")),
    key(&["do_predict", "predict_with_generate"], Anyway(&[Off], "answers are made by `qlora generate`; leave it out")),
    key(
        &["do_eval"],
        If(|config, value| is_off(value) || config.data.evaluates(), "write `validation_file` or `val_size` in [data]"),
    ),
    key(
        &["eval_strategy", "evaluation_strategy"],
        If(
            |config, value| match value.as_str() {
                Some("no") => !config.data.evaluates(),
                Some("steps") => config.training.eval_steps.is_some(),
                _ => false,
            },
            "with a `validation_file` in [data] there is one evaluation at the end; write `eval_steps` in [training] for more",
        ),
    ),
    key(&["val_steps", "eval_interval"], Ours("training.eval_steps")),
    key(&["evals_per_epoch", "eval_delay"], Anyway(&[Off], "write `eval_steps` in [training]")),
    key(
        &["save_strategy"],
        If(
            |config, value| match value.as_str() {
                Some("steps") => config.training.save_steps > 0,
                Some("no") => config.training.save_steps == 0,
                _ => false,
            },
            SAVING,
        ),
    ),
    key(&["saves_per_epoch"], Anyway(&[Off], SAVING)),
    key(&["save_safetensors"], Nothing),
    key(&["save_adapter_only"], Anyway(&[On], "the adapter alone is saved; merge afterwards, with `qlora merge`")),
    key(
        &["save_only_model"],
        Anyway(&[Off], "checkpoints hold the optimizer's state, so that a run can go on; leave it out"),
    ),
    key(&["save_merged_model", "merge_lora", "export_gguf"], Anyway(&[Off], "merge afterwards, with `qlora merge`")),
    key(
        &["save_on_each_node", "save_first_step", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint"],
        Anyway(&[Off], SAVING),
    ),
    key(&["logging_strategy"], Anyway(&[Text("steps")], "write `logging_steps` in [training]")),
    key(
        &["logging_first_step"],
        If(
            |config, value| is_off(value) || config.training.logging_steps == 1,
            "write `logging_steps = 1` in [training]",
        ),
    ),
    key(
        &["load_best_model_at_end", "early_stopping_patience", "early_stopping_steps", "early_stopping_threshold"],
        Anyway(&[Off], "a run goes to its end; compare its checkpoints by `eval_loss` in metrics.jsonl"),
    ),
    key(
        &["per_gpu_train_batch_size", "micro_batch_size", "batch_size", "train_batch_size", "per_device_batch_size"],
        Ours("training.per_device_train_batch_size"),
    ),
    key(&["per_gpu_eval_batch_size", "eval_batch_size", "val_batch_size"], Ours("training.per_device_eval_batch_size")),
    key(
        &[
            "gradient_accumulation",
            "grad_accum_steps",
            "grad_accumulation_steps",
            "accumulate_grad_batches",
            "accumulation_steps",
        ],
        Ours("training.gradient_accumulation_steps"),
    ),
    key(&["epochs", "num_epochs", "max_epochs", "n_epochs"], Ours("training.num_train_epochs")),
    key(&["num_train_steps", "max_train_steps", "num_steps", "total_steps"], Ours("training.max_steps")),
    key(&["lr", "base_lr", "peak_lr"], Ours("training.learning_rate")),
    key(&["lr_scheduler", "scheduler", "lr_schedule", "scheduler_type"], Ours("training.lr_scheduler_type")),
    key(
        &["lr_scheduler_kwargs", "scheduler_args"],
        If(
            // One cycle of "cosine_with_restarts" is "cosine".
            |_, value| is_off(value) || value.get("num_cycles").and_then(Value::as_integer) == Some(1),
            "schedules have no further options; leave it out",
        ),
    ),
    key(
        &["cosine_min_lr_ratio", "cosine_constant_lr_ratio", "min_lr", "min_lr_rate", "lr_end"],
        Anyway(&[Off], "\"cosine\" and \"linear\" go down to 0; leave it out"),
    ),
    key(&["num_warmup_steps", "warmup", "lr_warmup_steps"], Ours("training.warmup_steps")),
    key(&["lr_warmup_ratio", "warmup_proportion"], Ours("training.warmup_ratio")),
    key(&["optimizer", "optimizer_type", "optim_type"], Ours("training.optim")),
    key(
        &["optim_args", "optimizer_args", "optim_target_modules", "lr_groups"],
        Anyway(&[Off], "write `adam_beta1`, `adam_beta2`, `adam_epsilon` and `weight_decay` in [training]"),
    ),
    key(
        &["use_8bit_adam", "use_8bit_optimizer"],
        If(
            |config, value| is_off(value) != (config.training.optim == Optim::Adamw8bit),
            "write `optim` in [training]: \"adamw_8bit\" or \"adamw_torch\"",
        ),
    ),
    key(&["beta1"], Ours("training.adam_beta1")),
    key(&["beta2"], Ours("training.adam_beta2")),
    key(&["epsilon", "eps"], Ours("training.adam_epsilon")),
    key(
        &["clip_grad_norm", "gradient_clip_val", "gradient_clipping", "grad_clip", "max_gradient_norm", "clip_grad"],
        Ours("training.max_grad_norm"),
    ),
    key(
        &["use_gradient_checkpointing"],
        If(
            |config, value| {
                let value = match value.as_str() {
                    // Unsloth's saves memory where it is scarce, as the plan does.
                    Some("unsloth") => Value::String("auto".to_owned()),
                    _ => value.clone(),
                };
                let mut changed = config.clone();
                changed.put("training", "gradient_checkpointing", value).is_ok() && changed == *config
            },
            "write `gradient_checkpointing` in [training]",
        ),
    ),
    key(&["activation_checkpointing", "gradient_checkpointing_enable"], Ours("training.gradient_checkpointing")),
    key(
        &[
            "gradient_checkpointing_kwargs",
            "activation_checkpointing_kwargs",
            "use_reentrant",
            "use_reentrant_gc",
            "activation_offloading",
        ],
        Nothing,
    ),
    key(&["random_state", "random_seed", "set_seed"], Ours("training.seed")),
    key(&["out_dir", "output_path", "save_dir"], Ours("training.output_dir")),
    key(&["auto_resume_from_checkpoints", "resume", "resume_training"], Ours("training.resume_from_checkpoint")),
    key(
        &["lora_model_dir", "peft_model_id", "adapter_path", "init_from_adapter", "resume_adapter_file"],
        Ours("lora.adapter_name_or_path"),
    ),
    key(&["ignore_data_skip"], Anyway(&[Off], "a resumed run goes on where the data were; leave it out")),
    key(&["use_wandb", "use_mlflow", "use_comet", "use_swanlab"], Anyway(&[Off], TRACKER)),
    key(
        &["use_tensorboard"],
        If(
            |config, value| is_off(value) != config.training.report_to.contains(Tracker::TensorBoard),
            "write `report_to` in [training]: \"tensorboard\" or \"none\"",
        ),
    ),
    key(
        &[
            "wandb_project",
            "wandb_entity",
            "wandb_name",
            "wandb_run_id",
            "wandb_watch",
            "wandb_log_model",
            "mlflow_tracking_uri",
            "mlflow_experiment_name",
            "comet_project_name",
            "trackio_space_id",
        ],
        Anyway(&[Off], "metrics go to metrics.jsonl in output_dir; leave it out"),
    ),
    key(&["push_to_hub_model_id", "hub_repo_id"], Ours("training.hub_model_id")),
    key(
        &["hub_strategy"],
        If(|config, value| !config.training.push_to_hub || value.as_str() == Some("end"), AT_THE_END),
    ),
    key(&["hub_always_push"], Anyway(&[Off], AT_THE_END)),
    key(&["hub_revision"], Anyway(&[Off, Text("main")], "the branch is `main`; `qlora push --revision` takes another")),
    key(
        &["fsdp", "fsdp_config", "deepspeed", "ddp_backend", "tensor_parallel_size", "parallelism_config"],
        Anyway(&[Off, Number(1.0)], ONE_DEVICE),
    ),
    key(
        &["sequence_parallel_degree", "cp_size", "sp_size", "ulysses_sequence_parallel_size"],
        Ours("training.context_parallel_size"),
    ),
    key(
        &[
            "ddp_find_unused_parameters",
            "ddp_timeout",
            "ddp_bucket_cap_mb",
            "ddp_broadcast_buffers",
            "accelerator_config",
            "average_tokens_across_devices",
            "ray_scope",
        ],
        Nothing,
    ),
    key(&["local_rank"], Anyway(&[Off, Number(-1.0)], ONE_DEVICE)),
    key(&["auto_find_batch_size"], Anyway(&[Off], "`finetune --dry-run` prints what fits; leave it out")),
    key(&["torch_compile"], Anyway(&[Off], "nothing is compiled at run time; leave it out")),
    key(
        &[
            "torch_compile_backend",
            "torch_compile_mode",
            "use_unsloth",
            "use_liger_kernel",
            "use_liger",
            "enable_liger_kernel",
            "liger_kernel_config",
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "use_kernels",
            "tf32",
        ],
        Nothing,
    ),
    key(
        &[
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "torch_empty_cache_steps",
            "skip_memory_metrics",
            "eval_accumulation_steps",
            "prediction_loss_only",
            "batch_eval_metrics",
        ],
        Nothing,
    ),
    key(&["dataloader_drop_last"], Anyway(&[Off], "all rows are trained; leave it out")),
    key(
        &[
            "log_level",
            "log_level_replica",
            "log_on_each_node",
            "logging_nan_inf_filter",
            "disable_tqdm",
            "run_name",
            "project",
            "plot_loss",
            "strict",
            "debug",
            "label_names",
            "metric_for_best_model",
            "greater_is_better",
            "include_num_input_tokens_seen",
            "include_tokens_per_second",
            "include_for_metrics",
            "include_inputs_for_metrics",
            "half_precision_backend",
            "fp16_opt_level",
        ],
        Nothing,
    ),
    key(&["label_smoothing_factor"], Anyway(&[Off], "the loss is the plain cross entropy; leave it out")),
    key(
        &["neftune_noise_alpha", "noisy_embedding_alpha"],
        Anyway(&[Off], "no noise is added to embeddings; leave it out"),
    ),
    // Other kinds of training than supervised fine-tuning.
    key(&["stage", "trainer_type", "training_type"], Ours("training.objective")),
    key(
        &["rl"],
        If(
            |config, value| match value.as_str() {
                Some(name) if name == config.training.objective.name() => true,
                _ => is_off(value) && config.training.objective == ObjectiveKind::Sft,
            },
            PREFERENCE,
        ),
    ),
    key(&["rl_beta", "dpo_beta", "pref_beta"], Ours("objective.beta")),
    key(&["pref_loss", "dpo_loss_type"], Ours("objective.loss_type")),
    key(&["dpo_label_smoothing"], Ours("objective.label_smoothing")),
    key(
        &[
            "pref_ftx",
            "orpo_alpha",
            "cpo_alpha",
            "simpo_gamma",
            "kto_desirable_weight",
            "kto_undesirable_weight",
            "desirable_weight",
            "undesirable_weight",
            "rpo_alpha",
            "num_generations",
            "reward_model",
            "reward_funcs",
        ],
        Anyway(&[Off], PREFERENCE),
    ),
];
