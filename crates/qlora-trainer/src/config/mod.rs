//! The configuration of a run: a Rust struct, and the same as TOML.
//!
//! The file has the sections `[model]`, `[lora]`, `[data]`, `[training]` and `[objective]`. Keys have the names of transformers, PEFT,
//! bitsandbytes and TRL, and mean here what they mean there. Only `model.model_name_or_path` and `data.train_file` must be
//! given. An unknown key is an error that names the line and the key that was probably meant. Keys of other trainers are
//! accepted where they ask for what happens anyway (`bias = "none"`, `bf16 = true`), otherwise refused with what to
//! write instead.
//!
//! ```
//! use qlora_trainer::config::{Scheduler, TrainConfig};
//!
//! let config = TrainConfig::from_toml_str(
//!     r#"
//!     [model]
//!     model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
//!     [data]
//!     train_file = "train.jsonl"
//!     [training]
//!     lr_scheduler_type = "cosine"
//!     "#,
//! )?;
//! assert_eq!(config.training.lr_scheduler_type, Scheduler::Cosine);
//! assert_eq!(config.training.learning_rate, 2e-4);
//! # Ok::<(), qlora_trainer::Error>(())
//! ```

mod choices;
mod datasets;
mod documented;
mod foreign_keys;
mod keys;
mod known_keys;
mod parse;
mod trackers;
mod validate;
mod values;

use std::collections::BTreeMap;
use std::path::PathBuf;

use qlora_core::lora::{Bias, TokenIndices};
use serde::{Deserialize, Serialize};

pub use crate::objective::{DpoLoss, ObjectiveKind, ObjectiveOptions};

pub use choices::{
    BasePlacement, ComputeDtype, FrozenCompute, GradientCheckpointing, OnOverlong, OnUntrained, Optim, Paths,
    QuantType, Resume, SamplePrompts, SamplingStrategy, Scheduler, Targets, TemplateKwargs,
};
pub use documented::{DocumentedKey, EXAMPLE, documented_keys};

pub use trackers::{ReportTo, Tracker};

pub use datasets::{ColumnNames, DatasetOptions, MixStrategy, TagNames};

/// Everything a run needs to know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// The base model and its quantization.
    pub model: ModelOptions,
    /// The adapters.
    pub lora: LoraOptions,
    /// The data to train on.
    pub data: DataOptions,
    /// Options of the training.
    pub training: TrainingOptions,
    /// Options of the objective.
    pub objective: ObjectiveOptions,
}

/// `[model]`: the base model and its quantization.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelOptions {
    /// A folder with a Hugging Face model, a GGUF file, or a hub id. Must be given.
    pub model_name_or_path: String,
    /// A folder or hub id whose tokenizer and chat template are taken instead of the model's own, such as that of a GGUF file whose
    /// tokenizer is not known. Default: none.
    pub tokenizer_name_or_path: Option<PathBuf>,
    /// Branch, tag or commit on the hub. Default: none, the main branch.
    pub revision: Option<String>,
    /// The folder of downloads. Default: none, the hub's own cache folder.
    pub cache_dir: Option<PathBuf>,
    /// Never ask the network. Default: false.
    pub local_files_only: bool,
    /// Quantize the base's linear layers to 4 bits (QLoRA). False keeps them as they are stored (LoRA). Default: true.
    pub load_in_4bit: bool,
    /// The 4-bit data type. Default: nf4, as in the QLoRA paper.
    pub bnb_4bit_quant_type: QuantType,
    /// Quantize the quantization scales too: 0.37 bits a parameter less. Default: true, as in the QLoRA paper.
    pub bnb_4bit_use_double_quant: bool,
    /// Elements that share a scale: a power of two from 32 to 4096. Default: 64, as in the QLoRA paper.
    pub blocksize: usize,
    /// Leave the embedding's table in host memory while training on a GPU: 1 GB less for Llama 3.1 8B, a little more time.
    /// Default: false.
    pub offload_embedding: bool,
    /// Where the base's linear layers are: `"resident"` (whole on every GPU), `"sharded"` (each rank of a host holds a share of them; a
    /// block's come from the other GPUs while the one before it runs), `"streamed"` (in host memory, from where they come likewise),
    /// `"auto"` (the first of these with which a step fits the memory). All give the same numbers. Default: auto.
    pub base_placement: BasePlacement,
    /// The device to train on: `"auto"` (the first GPU if the program is built with the feature `cuda` and there is
    /// one, otherwise the CPU), `"cpu"`, `"cuda"` or `"cuda:1"`. Default: auto.
    pub device: String,
    /// The compute type on a GPU: `"bfloat16"`, `"float16"` (with dynamic loss scaling) or `"float32"`. The CPU
    /// computes in float32. Default: bfloat16, on a GPU without it (compute capability below 8.0) float16.
    pub bnb_4bit_compute_dtype: Option<ComputeDtype>,
    /// `"fp8"`: multiply with the frozen weights in 8-bit floating point on a Hopper GPU (H100, H200), forward and backward;
    /// adapters, attention, norms and the loss stay in the compute type. Faster, and a little less exact. Default: none, the
    /// compute type.
    pub frozen_compute: Option<FrozenCompute>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            model_name_or_path: String::new(),
            tokenizer_name_or_path: None,
            revision: None,
            cache_dir: None,
            local_files_only: false,
            load_in_4bit: true,
            bnb_4bit_quant_type: QuantType::Nf4,
            bnb_4bit_use_double_quant: true,
            blocksize: 64,
            offload_embedding: false,
            base_placement: BasePlacement::Auto,
            device: "auto".to_owned(),
            bnb_4bit_compute_dtype: None,
            frozen_compute: None,
        }
    }
}

/// `[lora]`: the adapters, in PEFT's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraOptions {
    /// Rank. Default: 16.
    pub r: usize,
    /// Scale: the adapter's output is multiplied by `lora_alpha / r`. Default: 32, twice the default rank.
    pub lora_alpha: f64,
    /// Dropout before A. Default: 0.
    pub lora_dropout: f64,
    /// The linear layers that get an adapter: a list of names, one regular expression, or `"all-linear"`. Default: the
    /// attention's q, k, v and o projections. The QLoRA paper needs `"all-linear"` to match full fine-tuning.
    pub target_modules: Targets,
    /// Divide `lora_alpha` by the square root of `r` instead of `r`. Default: false.
    pub use_rslora: bool,
    /// DoRA: a trained magnitude for every output of the layers beside A and B. Default: false.
    pub use_dora: bool,
    /// Other ranks than `r`, by the end of a layer's name (a regular expression); the first match in sorted order counts.
    /// Default: none.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha`, likewise. Default: none.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Tokens whose rows of the embedding are trained beside the adapters, such as those of a chat format that the base does not know:
    /// a list of ids, or lists by `embed_tokens` and `lm_head`. Of a tied model the head's rows are the same. Default: none.
    pub trainable_token_indices: TokenIndices,
    /// Modules that are trained whole and saved with the adapter: `embed_tokens` and `lm_head`. On the CPU only. Default: none.
    pub modules_to_save: Vec<String>,
    /// Biases of the base that are trained beside the adapters: `"all"`, `"lora_only"` (those of layers with adapters) or `"none"`. Default:
    /// `"none"`.
    pub bias: Bias,
    /// The head of a tied model follows an embedding that is in `modules_to_save`; without, the two part. Default: false.
    pub ensure_weight_tying: bool,
    /// Begin from this trained adapter (a folder, such as the output or a checkpoint of another run, or a hub id) instead of a
    /// fresh one, with a fresh optimizer and learning rate schedule; PEFT's `is_trainable = True`. Its `r`, `lora_alpha`,
    /// `use_rslora`, `use_dora`, patterns, layers, token rows, whole modules and biases are
    /// taken; `lora_dropout` is this configuration's. Default: none.
    pub adapter_name_or_path: Option<String>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: Targets::List(["q_proj", "k_proj", "v_proj", "o_proj"].map(String::from).to_vec()),
            use_rslora: false,
            use_dora: false,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            trainable_token_indices: TokenIndices::default(),
            modules_to_save: Vec::new(),
            bias: Bias::None,
            ensure_weight_tying: false,
            adapter_name_or_path: None,
        }
    }
}

/// `[data]`: the training and validation data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataOptions {
    /// Files of rows, one path or a list, relative to the working directory: JSONL, a JSON list, CSV, TSV, Parquet or text, also
    /// compressed (`.gz`, `.zst`); a folder with such files; a pattern such as `data/*.parquet`; `-` for standard input; the id of
    /// a data set on the hub (`org/name`), of which the split `train` is read. Must be given, or else `datasets`.
    pub train_file: Paths,
    /// The same to evaluate on. Default: none, no evaluation.
    pub validation_file: Paths,
    /// A share (below 1) or a number of documents that are drawn from the training data and evaluated on instead. Default: 0.
    pub val_size: f64,
    /// Only the first so many rows of each set are read. Default: none, all.
    pub max_samples: Option<usize>,
    /// Documents of fewer tokens are left out; the number is reported (Axolotl's name). Default: 0.
    pub min_sample_len: usize,
    /// Of documents with the same tokens, of which the same are trained, only the first one stays; the number is reported
    /// (Axolotl's name). Default: false.
    pub dataset_exact_deduplication: bool,
    /// The way several data sets are combined: `"concat"`, `"interleave_under"` (until the first one is used up),
    /// `"interleave_over"` (until all were seen whole, from the beginning where one is used up) or `"interleave_once"`
    /// (each row once). Default: concat.
    pub mix_strategy: MixStrategy,
    /// The probability of each set, `train_file` first, where they are interleaved. Default: none, they take turns.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interleave_probs: Vec<f64>,
    /// A file with a Jinja chat template that replaces the tokenizer's own. Default: none.
    pub chat_template_path: Option<PathBuf>,
    /// The longest document in tokens, and with `packing` the size of a bin. Default: 1024.
    pub max_length: usize,
    /// The treatment of a longer document: `"truncate"` keeps its start, `"drop"` leaves it out, `"error"` stops.
    /// Default: truncate; the number is reported.
    pub on_overlong: OnOverlong,
    /// The treatment of a row without a token to train on: `"error"` or `"skip"`. Default: error.
    pub on_untrained: OnUntrained,
    /// Train on the assistant's messages and on completions only. False trains on every token. Plain `text` rows are
    /// always trained whole. Default: true.
    pub completion_only_loss: bool,
    /// Put several documents into one bin of up to `max_length` tokens. They stay separate sequences: no token sees
    /// another document. Default: false.
    pub packing: bool,
    /// Further arguments of the chat template, such as `{ enable_thinking = false }` or `{ date_string = "26 Jul 2024" }`; a
    /// row's own `chat_template_kwargs` come before them. Default: none.
    #[serde(skip_serializing_if = "TemplateKwargs::is_empty")]
    pub chat_template_kwargs: TemplateKwargs,
    /// Read the rows while they are trained on, for data that is larger than the memory: it takes about 200 MB, whatever the
    /// size. Needs `max_steps`; `val_size`, if any, is a number of documents at the beginning. Default: false.
    pub streaming: bool,
    /// With `streaming`: the documents that are shuffled together. Default: 16384, as in LLaMA-Factory.
    pub buffer_size: usize,
    /// Keep tokenized rows on the disk, so that the next start with the same data, tokenizer and template is ready at once; of sets
    /// of 1 MB and more, not streamed. Default: true.
    pub dataset_cache: bool,
    /// The folder of tokenized rows (Axolotl's name). Default: `qlora-tokens` beside what Python's `datasets` keeps
    /// (`HF_DATASETS_CACHE`, `HF_HOME`).
    pub dataset_prepared_path: Option<PathBuf>,
    /// Tokenize again what was kept. Default: false.
    pub overwrite_cache: bool,
    /// `[[data.datasets]]`: sets of rows with the roles of their columns, behind those of `train_file`. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub datasets: Vec<DatasetOptions>,
    /// `[[data.test_datasets]]`: the same to evaluate on (Axolotl's name). Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub test_datasets: Vec<DatasetOptions>,
}

impl TrainConfig {
    /// Files and folders of this machine that hold rows of the data: the data itself, tokenized rows, and TensorBoard's events.
    pub fn places_of_rows(&self) -> Vec<PathBuf> {
        let data = &self.data;
        let files = data.train_file.as_slice().iter().chain(data.validation_file.as_slice());
        let sets = data.datasets.iter().chain(&data.test_datasets).map(|set| &set.path);
        let mut places: Vec<PathBuf> = files.chain(sets).chain(&data.dataset_prepared_path).cloned().collect();
        places.push(self.training.resolved_logging_dir());
        places
    }
}

impl DataOptions {
    /// Whether there is something to evaluate on.
    pub fn evaluates(&self) -> bool {
        !self.validation_file.is_empty() || !self.test_datasets.is_empty() || self.val_size > 0.0
    }

    /// The number of sets to train on.
    pub(crate) fn training_sets(&self) -> usize {
        usize::from(!self.train_file.is_empty()) + self.datasets.len()
    }
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            train_file: Paths::default(),
            validation_file: Paths::default(),
            val_size: 0.0,
            max_samples: None,
            min_sample_len: 0,
            dataset_exact_deduplication: false,
            mix_strategy: MixStrategy::Concat,
            interleave_probs: Vec::new(),
            streaming: false,
            buffer_size: 16_384,
            dataset_cache: true,
            dataset_prepared_path: None,
            overwrite_cache: false,
            datasets: Vec::new(),
            test_datasets: Vec::new(),
            chat_template_path: None,
            max_length: 1024,
            on_overlong: OnOverlong::Truncate,
            on_untrained: OnUntrained::Error,
            completion_only_loss: true,
            packing: false,
            chat_template_kwargs: TemplateKwargs::default(),
        }
    }
}

/// `[training]`: the options of training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainingOptions {
    /// The folder of checkpoints, metrics and the final adapter. Default: `output`.
    pub output_dir: PathBuf,
    /// Delete the checkpoints of an earlier run that lie in `output_dir`. Default: false, such a folder is refused.
    pub overwrite_output_dir: bool,
    /// Go on from a checkpoint: true for the latest in `output_dir` (a run without one begins), or a path. Default: false.
    pub resume_from_checkpoint: Resume,
    /// Go on from a checkpoint with what this configuration says about learning rate, scheduler, warmup, number of steps, weight
    /// decay and clipping, where the checkpoint's run had it otherwise (Megatron's name). Default: false, such a checkpoint is
    /// refused.
    pub override_opt_param_scheduler: bool,
    /// Passes over the data; may be fractional. Default: 3.
    pub num_train_epochs: f64,
    /// The number of optimizer steps, if positive: it replaces `num_train_epochs`. Default: -1.
    pub max_steps: i64,
    /// Documents (with `packing`: bins) in a micro-batch. Default: 2.
    pub per_device_train_batch_size: usize,
    /// Documents in a micro-batch of the evaluation. Default: none, as for training.
    pub per_device_eval_batch_size: Option<usize>,
    /// Micro-batches in an optimizer step. The loss is normalised by the trained tokens of all of them. Default: 8,
    /// which makes 16 documents a step, as in the QLoRA paper.
    pub gradient_accumulation_steps: usize,
    /// The number of ranks that share every micro-batch, each with a part of its tokens, for sequences that are too long for one GPU
    /// (accelerate's and axolotl's name; Ulysses). With N ranks there are N / `context_parallel_size` groups, which have micro-batches
    /// of their own, and `gradient_accumulation_steps` counts those of a group. Query heads have to divide over it. Default: 1.
    pub context_parallel_size: usize,
    /// Recompute activations in the backward pass instead of keeping them: less memory, up to a third more time, the same
    /// gradients. `"auto"` takes whatever is fastest in the memory there is, block by block; true recomputes every
    /// block; false recomputes nothing, and a run that does not fit is refused. Default: auto.
    pub gradient_checkpointing: GradientCheckpointing,
    /// The most GPU memory to use, in GB (10^9 bytes); the run is planned for it and cannot take more. Default: none,
    /// what is free.
    pub memory_budget: Option<f64>,
    /// The same bits in every run on a GPU, for some speed (a CPU gives them anyway). Default: false.
    pub full_determinism: bool,
    /// The training objective: `"sft"` (supervised fine-tuning: the cross-entropy of answers) or `"dpo"` (direct
    /// preference optimization, on pairs of answers; its options stand in `[objective]`). Default: sft.
    pub objective: ObjectiveKind,
    /// The optimizer: `"adamw_torch"`, or `"adamw_8bit"` with moments of 8 bits. Default: adamw_torch.
    pub optim: Optim,
    /// The peak learning rate. Default: 2e-4, the QLoRA paper's for 7B and 13B.
    pub learning_rate: f64,
    /// The learning rate schedule after the warmup. Default: linear (down to zero).
    pub lr_scheduler_type: Scheduler,
    /// Steps in which the learning rate rises from zero; below 1 it is a share of all steps. Default: none.
    pub warmup_steps: Option<f64>,
    /// The same as a share of all steps. Default: none, which means 0.03 (the QLoRA paper's) without `warmup_steps`,
    /// and no warmup for the scheduler `constant`. A share below 1 leaves at least one step after the warmup.
    pub warmup_ratio: Option<f64>,
    /// Gradients with a larger norm are scaled down to it; 0 turns that off. Default: 1.
    pub max_grad_norm: f64,
    /// AdamW's decoupled weight decay. Default: 0.
    pub weight_decay: f64,
    /// AdamW's decay of the first moment. Default: 0.9.
    pub adam_beta1: f64,
    /// AdamW's decay of the second moment. Default: 0.999.
    pub adam_beta2: f64,
    /// AdamW's epsilon. Default: 1e-8.
    pub adam_epsilon: f64,
    /// Seed of the adapters' initialisation and of dropout. Default: 42.
    pub seed: u64,
    /// Seed of the order of the data. Default: none, as `seed`.
    pub data_seed: Option<u64>,
    /// The order of the data: `"random"` (another one in each epoch) or `"sequential"`. Default: random.
    pub train_sampling_strategy: SamplingStrategy,
    /// Steps between two lines in `metrics.jsonl`. Default: 1.
    pub logging_steps: u64,
    /// Steps between two evaluations. Default: none, only at the end.
    pub eval_steps: Option<u64>,
    /// Evaluate before the first step. Default: false.
    pub eval_on_start: bool,
    /// Steps between two checkpoints; 0 for one at the end only. Default: 100.
    pub save_steps: u64,
    /// The number of checkpoints that are kept; 0 for all. Default: 2.
    pub save_total_limit: usize,
    /// A store to which every checkpoint is sent while the run goes on, and from which `resume_from_checkpoint = true` takes the newest
    /// if the output folder has no newer one: `s3://`, `gs://` or `az://` with bucket and prefix (feature `object-store`), or
    /// `file:///folder`. Default: none.
    pub checkpoint_store: Option<String>,
    /// A file whose appearance, or change, asks the run to save a checkpoint and end, as SIGTERM does: for notices of preemption.
    /// With several ranks it is looked for on every host. Default: none.
    pub preemption_file: Option<PathBuf>,
    /// Steps between two rounds of greedy answers to the same prompts, which go to `samples.jsonl` and the report; there is also one
    /// before the first step and one after the last. They change no bit of the run. Default: none, no answers.
    pub sample_every: Option<u64>,
    /// The prompts: a list of user messages, or a JSONL file with rows of `messages` or `prompt`. Default: none, the first rows of
    /// the validation data.
    #[serde(skip_serializing_if = "SamplePrompts::is_empty")]
    pub sample_prompts: SamplePrompts,
    /// The most tokens of such an answer. Default: 64.
    pub sample_max_new_tokens: usize,
    /// The trackers that the run reports to: `"tensorboard"` or `"none"`. Default: none.
    pub report_to: ReportTo,
    /// The folder of TensorBoard's event files. Default: none, the environment's `TENSORBOARD_LOGGING_DIR` or else `runs` in
    /// `output_dir`.
    pub logging_dir: Option<PathBuf>,
    /// Upload the adapter to the Hugging Face hub when the run has ended: `qlora train` does what `qlora push` does. Default: false.
    pub push_to_hub: bool,
    /// The repository to upload to: `owner/name`, or a name of the token's owner. Default: none, the name of `output_dir`.
    pub hub_model_id: Option<String>,
    /// Make a new repository a private one. Default: false.
    pub hub_private_repo: bool,
}

impl Default for TrainingOptions {
    fn default() -> Self {
        Self {
            output_dir: PathBuf::from("output"),
            overwrite_output_dir: false,
            resume_from_checkpoint: Resume::No,
            override_opt_param_scheduler: false,
            num_train_epochs: 3.0,
            max_steps: -1,
            per_device_train_batch_size: 2,
            per_device_eval_batch_size: None,
            gradient_accumulation_steps: 8,
            context_parallel_size: 1,
            gradient_checkpointing: GradientCheckpointing::Auto,
            memory_budget: None,
            full_determinism: false,
            objective: ObjectiveKind::Sft,
            optim: Optim::AdamwTorch,
            learning_rate: 2e-4,
            lr_scheduler_type: Scheduler::Linear,
            warmup_steps: None,
            warmup_ratio: None,
            max_grad_norm: 1.0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            seed: 42,
            data_seed: None,
            train_sampling_strategy: SamplingStrategy::Random,
            logging_steps: 1,
            eval_steps: None,
            eval_on_start: false,
            save_steps: 100,
            save_total_limit: 2,
            checkpoint_store: None,
            preemption_file: None,
            sample_every: None,
            sample_prompts: SamplePrompts::default(),
            sample_max_new_tokens: 64,
            report_to: ReportTo::default(),
            logging_dir: None,
            push_to_hub: false,
            hub_model_id: None,
            hub_private_repo: false,
        }
    }
}

impl TrainingOptions {
    /// The number of optimizer steps when an epoch has `steps_per_epoch`.
    pub fn total_steps(&self, steps_per_epoch: usize) -> u64 {
        match u64::try_from(self.max_steps) {
            Ok(steps) if steps > 0 => steps,
            _ => (self.num_train_epochs * steps_per_epoch as f64).ceil() as u64,
        }
    }

    /// The number of warmup steps out of `total_steps`. A share is rounded up as in transformers, but not to all steps: the
    /// first step of a warmup has a learning rate of zero, and a run of one step would train nothing.
    pub fn resolved_warmup_steps(&self, total_steps: u64) -> u64 {
        const DEFAULT_RATIO: f64 = 0.03;
        let of_ratio = |ratio: f64| {
            let steps = (ratio * total_steps as f64).ceil() as u64;
            if ratio < 1.0 { steps.min(total_steps.saturating_sub(1)) } else { steps }
        };
        match (self.warmup_steps, self.warmup_ratio) {
            (Some(steps), _) if steps >= 1.0 => steps as u64,
            (Some(ratio), _) | (None, Some(ratio)) => of_ratio(ratio),
            (None, None) if self.lr_scheduler_type == Scheduler::Constant => 0,
            (None, None) => of_ratio(DEFAULT_RATIO),
        }
    }

    /// The repository that the adapter is uploaded to; none if nothing is uploaded, or `output_dir` has no name.
    pub fn hub_repository(&self) -> Option<String> {
        let name = || Some(self.output_dir.file_name()?.to_string_lossy().into_owned());
        self.push_to_hub.then(|| self.hub_model_id.clone().or_else(name)).flatten()
    }

    /// The folder of TensorBoard's event files.
    pub fn resolved_logging_dir(&self) -> PathBuf {
        let of_environment = || std::env::var_os("TENSORBOARD_LOGGING_DIR").map(PathBuf::from);
        let given = self.logging_dir.clone().or_else(of_environment).filter(|folder| !folder.as_os_str().is_empty());
        given.unwrap_or_else(|| self.output_dir.join("runs"))
    }

    /// The seed of the order of the data.
    pub fn resolved_data_seed(&self) -> u64 {
        self.data_seed.unwrap_or(self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_warmup_resolve_as_in_transformers() {
        let mut options = TrainingOptions::default();
        assert_eq!(options.total_steps(7), 21);
        options.num_train_epochs = 1.1;
        assert_eq!(options.total_steps(7), 8);
        options.max_steps = 5;
        assert_eq!(options.total_steps(7), 5);

        assert_eq!(options.resolved_warmup_steps(100), 3);
        assert_eq!(options.resolved_warmup_steps(101), 4);
        options.warmup_steps = Some(0.1);
        assert_eq!(options.resolved_warmup_steps(101), 11);
        options.warmup_steps = Some(10.0);
        assert_eq!(options.resolved_warmup_steps(101), 10);
        (options.warmup_steps, options.warmup_ratio) = (None, Some(0.5));
        assert_eq!(options.resolved_warmup_steps(101), 51);
        options.warmup_ratio = Some(1.0);
        assert_eq!(options.resolved_warmup_steps(1), 1);
        for share in [None, Some(0.03), Some(0.99)] {
            options.warmup_ratio = share;
            assert_eq!((options.resolved_warmup_steps(1), options.resolved_warmup_steps(0)), (0, 0));
            assert!((1..20).all(|steps| options.resolved_warmup_steps(steps) < steps));
        }
        (options.warmup_ratio, options.lr_scheduler_type) = (None, Scheduler::Constant);
        assert_eq!(options.resolved_warmup_steps(101), 0);
    }
}
