//! Keys of TRL's `SFTConfig`, and of other trainers for data, tokenizer and chat template.

use super::super::choices::SamplingStrategy;
use super::super::foreign_keys::Is::{Off, Text};
use super::super::foreign_keys::Means::{Anyway, If, Nothing, Opposite, Ours};
use super::super::foreign_keys::{KnownKey, is_off};
use super::{TOKENIZER, key};

const ROWS: &str = "columns and roles are recognized by their names: see the row formats of `train_file`";

pub(super) const KEYS: &[KnownKey] = &[
    key(
        &[
            "max_seq_length",
            "sequence_len",
            "cutoff_len",
            "model_max_length",
            "max_seq_len",
            "seq_length",
            "seq_len",
            "sequence_length",
            "max_sequence_length",
            "max_len",
            "context_length",
        ],
        Ours("data.max_length"),
    ),
    key(
        &[
            "dataset",
            "dataset_name",
            "dataset_path",
            "data_path",
            "data_file",
            "data_files",
            "train_data",
            "train_dataset",
            "train_path",
            "training_file",
            "dataset_id",
        ],
        Ours("data.train_file"),
    ),
    key(
        &[
            "eval_file",
            "test_file",
            "val_file",
            "valid_file",
            "dev_file",
            "eval_dataset",
            "validation_data",
            "val_data",
            "validation_path",
            "eval_data_file",
        ],
        Ours("data.validation_file"),
    ),
    key(&["val_set_size", "eval_size", "test_size", "test_split_size"], Ours("data.val_size")),
    key(&["validation_split_percentage"], Anyway(&[Off], "write the share as `val_size` in [data]: 0.05 for 5")),
    key(
        &[
            "dataset_config",
            "dataset_config_name",
            "dataset_split",
            "dataset_train_split",
            "dataset_test_split",
            "dataset_dir",
        ],
        If(
            |_, _| false,
            "write it in an entry of [[data.datasets]]: `path`, `name`, `split`, `revision`, `data_files`",
        ),
    ),
    key(&["dataset_text_field"], Anyway(&[Text("text")], ROWS)),
    key(
        &[
            "text_column",
            "prompt_column",
            "response_column",
            "roles_to_train",
            "formatting_func",
            "dataset_kwargs",
            "dataset_format",
            "data_format",
        ],
        Anyway(&[Off], ROWS),
    ),
    key(
        &[
            "columns",
            "tags",
            "field_messages",
            "message_property_mappings",
            "message_field_training",
            "field_instruction",
            "field_input",
            "field_output",
            "field_system",
            "field_tools",
            "ds_type",
            "split",
            "data_dir",
            "subset",
        ],
        Anyway(&[Off], "write it in an entry of [[data.datasets]]"),
    ),
    key(&["max_train_samples"], Ours("data.max_samples")),
    key(&["max_eval_samples"], Anyway(&[Off], "all rows of the validation data are used: cut the file (`head -n`)")),
    key(&["deduplicate", "dedup", "drop_duplicates"], Ours("data.dataset_exact_deduplication")),
    key(&["mixing_strategy", "stopping_strategy"], Anyway(&[Off], "write `mix_strategy` in [data]")),
    key(&["probabilities", "interleave_prob"], Ours("data.interleave_probs")),
    key(&["sample_packing", "neat_packing", "use_packing", "multipack"], Ours("data.packing")),
    key(
        &["eval_packing", "eval_sample_packing"],
        If(
            |config, value| value.as_bool() == Some(config.data.packing),
            "write `packing` in [data]; it holds for both",
        ),
    ),
    key(
        &["packing_strategy"],
        Anyway(&[Text("bfd")], "documents are packed best-fit decreasing (\"bfd\"); leave it out"),
    ),
    key(
        // There is no padding.
        &[
            "padding_free",
            "padding_side",
            "pad_to_multiple_of",
            "pad_to_sequence_len",
            "group_by_length",
            "length_column_name",
        ],
        Nothing,
    ),
    key(
        &["truncation_mode"],
        Anyway(
            &[Text("keep_start")],
            "the start of a document is kept; write `on_overlong` in [data] to drop or refuse it",
        ),
    ),
    key(&["assistant_only_loss", "train_on_responses_only"], Ours("data.completion_only_loss")),
    key(&["train_on_input", "train_on_inputs", "train_on_prompt"], Opposite("data.completion_only_loss")),
    key(&["mask_history"], Anyway(&[Off], "every answer of a conversation is trained; leave it out")),
    key(
        &["chat_template", "template", "prompt_template", "chat_template_jinja"],
        Anyway(
            &[Text("tokenizer_default"), Text("default")],
            "the model's own template is used; write the path of another as `chat_template_path` in [data]",
        ),
    ),
    key(
        &[
            "eos_token",
            "pad_token",
            "bos_token",
            "special_tokens",
            "eot_tokens",
            "added_tokens",
            "tokens",
            "add_special_tokens",
            "resize_vocab",
        ],
        Anyway(&[Off], TOKENIZER),
    ),
    key(
        &[
            "dataset_num_proc",
            "dataset_processes",
            "dataset_batch_size",
            "preprocessing_num_workers",
            "num_of_sequences",
            "chars_per_token",
            "dataset_keep_in_memory",
            "skip_prepare_dataset",
            "remove_unused_columns",
        ],
        Nothing,
    ),
    key(&["tokenized_path", "dataset_prepared_dir"], Ours("data.dataset_prepared_path")),
    key(&["load_from_cache_file"], Opposite("data.overwrite_cache")),
    key(&["overwrite_dataset_cache", "reset_cache"], Ours("data.overwrite_cache")),
    key(&["pretraining_dataset"], Anyway(&[Off], "write `train_file` and `streaming = true` in [data]")),
    key(&["shuffle_buffer_size", "streaming_multipack_buffer_size", "streaming_buffer_size"], Ours("data.buffer_size")),
    key(
        &["disable_shuffling"],
        If(
            |config, value| is_off(value) == (config.training.train_sampling_strategy == SamplingStrategy::Random),
            "write `train_sampling_strategy = \"sequential\"` in [training]",
        ),
    ),
    key(
        &["shuffle", "shuffle_dataset", "shuffle_merged_datasets"],
        If(
            |config, value| is_off(value) != (config.training.train_sampling_strategy == SamplingStrategy::Random),
            "write `train_sampling_strategy` in [training]: \"random\" or \"sequential\"",
        ),
    ),
];
