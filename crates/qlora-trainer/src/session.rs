//! From a configuration to a model that is ready to train, evaluate and generate.
//!
//! ```no_run
//! use qlora_trainer::session::Session;
//! use qlora_trainer::{Interrupt, TrainConfig};
//!
//! # fn main() -> qlora_trainer::Result<()> {
//! let config = TrainConfig::from_toml_file("examples/finetune.toml")?;
//! let session = Session::open(&config, |_, _| ())?;
//! let (training, validation) = session.data()?;
//! let summary = session.into_trainer(training, validation)?.with_interrupt(Interrupt::on_ctrl_c()?).run()?;
//! println!("{:?}", summary.adapter);
//! # Ok(())
//! # }
//! ```

mod adapter;
mod card;
mod placement;
mod plan;
mod prepare;
mod weights;

use std::sync::{Arc, Mutex, PoisonError};

use qlora_core::adapter::{AdapterDtype, SaveOptions, TrainedOver};
use qlora_core::companions::Companions;
use qlora_core::lora::{ByModule, LoraConfig, ModuleFilter, ModulePattern, TargetModules};
use qlora_core::model::context::heads_of_a_rank;
use qlora_core::model::{
    BasePlacement, BatchShape, CausalLm, DeviceChoice, LoadOptions, MemoryPlan, PlacementKind, Quantization,
};
use qlora_core::open::ModelFiles;
use qlora_kernels::ops::attention::AttentionConfig;
use qlora_kernels::quant::{QuantConfig, QuantType};
use qlora_kernels::{Dtype, Workspace};

pub use self::card::{CardPlan, plan_on_card};
use crate::comm::shares::SharingRanks;
use crate::comm::{Alone, Communicator, or_tell_all};
use crate::config::{self, GradientCheckpointing, LoraOptions, ModelOptions, Targets, Tracker, TrainConfig};
use crate::data::balance::imbalance;
use crate::data::{Dataset, LoaderOptions, TrainingData};
use crate::encoder::{ModelEncoder, ModelText};
use crate::error::{Error, Result};
use crate::progress::TensorBoard;
use crate::qlora_model::{QLoraModel, REFERENCE};
use crate::samples::SamplePlan;
use crate::trainer::Trainer;
use crate::trainer::start::Start;
use placement::Placing;
use prepare::{Data, Prepared};

/// A loaded model with its adapter, its tokenizer and its chat template, under a configuration.
#[derive(Debug)]
pub struct Session {
    config: TrainConfig,
    model: CausalLm,
    text: Arc<ModelText>,
    companions: Companions,
    name: String,
    trained_over: TrainedOver,
    start: Option<Start>,
    template_time: Option<String>,
    identity: Vec<(String, String)>,
    /// The prompts to answer while training.
    prompts: Option<SamplePlan>,
    /// The other processes of the run.
    comm: Box<dyn Communicator>,
    /// How many times as fast the planned steps are expected to be in fp8, where they are not and the GPU has it.
    fp8_gain: Option<f64>,
    /// The largest batch that was planned for, and its plan.
    planned: Option<(BatchShape, Option<MemoryPlan>)>,
    /// What each rank's plan says of its peak, in bytes; none on the CPU.
    peaks: Vec<Option<u64>>,
    /// The data that was read when the session was opened, until it is taken.
    data: Mutex<Option<Data>>,
}

impl Session {
    /// Opens a run: makes and locks the output folder, reads the checkpoint to go on from and the data, and only when all that
    /// is as it should be the base model, which is quantized as configured and gets its adapter. `progress` is called with the
    /// bytes of weights that were read, and their total.
    ///
    /// # Errors
    /// If the configuration is not valid, the output folder, the checkpoint or the data cannot be used, or the model cannot be
    /// found or read; the message names the file, the line or the tensor.
    pub fn open(config: &TrainConfig, progress: impl FnMut(u64, u64)) -> Result<Self> {
        Self::open_on(config, Box::new(Alone), progress)
    }

    /// As [`Session::open`] for one of several processes that train together ([`comm`](crate::comm)). On each the configuration
    /// is the same; `gradient_accumulation_steps` counts the micro-batches of one rank, as in transformers. Rank 0 alone has the
    /// output folder.
    ///
    /// # Errors
    /// As [`Session::open`], on every rank if one of them fails, or if they do not have the same configuration and data.
    pub fn open_on(
        config: &TrainConfig,
        mut comm: Box<dyn Communicator>,
        progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let prepared = Prepared::new(config, true, &mut comm);
        let opened = prepared.and_then(|prepared| Self::load(prepared, &mut *comm, progress));
        let session = or_tell_all(&mut *comm, opened)?;
        Ok(Self { comm, ..session })
    }

    /// As [`Session::open`] to plan a run only: no output folder is made or locked, no checkpoint read.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub fn open_dry_run(config: &TrainConfig, progress: impl FnMut(u64, u64)) -> Result<Self> {
        Self::load(Prepared::planned(config)?, &mut Alone, progress)
    }

    fn load(prepared: Prepared, comm: &mut dyn Communicator, mut progress: impl FnMut(u64, u64)) -> Result<Self> {
        let Prepared { config, start, files, template_time, beginning, reference, workspace, exchange, .. } = prepared;
        let Prepared { identity, data, prompts, .. } = prepared;
        let companions = Companions::of_adapter(&files)?;
        let ModelFiles { source, tokenizer, chat_template, generation, name, .. } = files;
        let template_kwargs = config.data.chat_template_kwargs.as_map().clone();
        let text = ModelText { tokenizer, chat_template, ends: generation.eos_token_ids, template_kwargs };
        let quantization = quantization(&config.model);
        let trained_over = TrainedOver::of(&*source, quantization)?;
        let kind = Placing {
            config: &config,
            source: &*source,
            quantization,
            held: &trained_over,
            layout: beginning.layout(),
            workspace: &workspace,
            training: &data.0,
        }
        .choose(comm)?;
        let mut ranks = SharingRanks::new(comm);
        let load = LoadOptions {
            quantization,
            offload_embedding: config.model.offload_embedding,
            placement: match kind {
                PlacementKind::Streamed => BasePlacement::Streamed,
                PlacementKind::Sharded => BasePlacement::Sharded(&mut ranks),
                _ => BasePlacement::Resident,
            },
            progress: Some(&mut progress),
        };
        let on = workspace.clone();
        let attention = heads_of_a_rank(&source.config().attention(0), config.training.context_parallel_size);
        let loaded = beside_attention(&on, attention, || CausalLm::load_on(&*source, load, workspace));
        let mut model = loaded.map_err(|error| ranks.failed.take().unwrap_or_else(|| error.into()))?;
        model.set_sequence_exchange(exchange)?;
        beginning.add_to(&mut model, config.training.seed)?;
        if let Some(reference) = &reference {
            model.load_adapter(REFERENCE, reference)?;
        }
        if let Some(compute) = config.model.frozen_compute {
            model.set_frozen_compute(compute.into())?;
        }
        // Until `plan_memory` has seen the data.
        model.set_gradient_checkpointing(config.training.gradient_checkpointing == GradientCheckpointing::On)?;
        let data = Mutex::new(Some(data));
        Ok(Self {
            config,
            model,
            text: Arc::new(text),
            companions,
            name,
            trained_over,
            start,
            template_time,
            identity,
            prompts,
            comm: Box::new(Alone),
            fp8_gain: None,
            planned: None,
            peaks: Vec::new(),
            data,
        })
    }

    /// The number of this process among the ranks; 0 for a process of its own.
    pub fn rank(&self) -> usize {
        self.comm.rank()
    }

    /// A description of the ranks, for a line at the start of the run; none for a process of its own.
    pub fn ranks_note(&self) -> Option<String> {
        let (groups, options) = (self.groups(), &self.config.training);
        let described = self.comm.describe()?;
        let micro_batches = options.gradient_accumulation_steps;
        let (batch, each) = (options.per_device_train_batch_size, micro_batches.div_ceil(groups));
        let items = if self.config.data.packing { "bins" } else { "rows" };
        let (shared, who) = match options.context_parallel_size {
            1 => (String::new(), "rank"),
            context => (format!("; groups of {context} share every sequence"), "group"),
        };
        let all = batch * micro_batches;
        Some(format!("{described}{shared}; {all} {items} a step: batches of {batch}, {each} on each {who}"))
    }

    /// The number of ranks, or groups of ranks, that have micro-batches of their own.
    fn groups(&self) -> usize {
        (self.comm.size() / self.config.training.context_parallel_size).max(1)
    }

    /// Where the base is, for a line at the start of the run; none where it is whole on the device.
    pub fn base_note(&self) -> Option<String> {
        self.model.base_memory().map(ToString::to_string)
    }

    /// How evenly the ranks share the tokens of a step, for a line at the start of the run; none for a process of its own, and for data
    /// that is streamed.
    ///
    /// # Errors
    /// If the data does not fit the options.
    pub fn balance_note(&self, training: &TrainingData) -> Result<Option<String>> {
        let (groups, TrainingData::Whole(data)) = (self.groups(), training) else { return Ok(None) };
        if groups == 1 {
            return Ok(None);
        }
        let uneven = imbalance(data, LoaderOptions::from(&self.config), groups)?;
        let hint = if uneven > 0.02 && !self.config.data.packing { "; packing = true evens them out" } else { "" };
        Ok(Some(format!("the ranks' shares of a step's tokens are uneven by {:.2}%{hint}", 100.0 * uneven)))
    }

    /// The configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The model with its adapter.
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// The tokenizer and the chat template. They are kept where a clone of this is, also when the trainer has the model.
    pub fn text(&self) -> &Arc<ModelText> {
        &self.text
    }

    /// Turns rows into tokens the way training sees them.
    pub fn encoder(&self) -> ModelEncoder<'_> {
        self.text.encoder()
    }

    /// A note on the compute type if it is not bfloat16, which most GPUs use, and that the memory plan does not state, or on
    /// the speed that fp8 would bring; none on the CPU.
    pub fn compute_note(&self) -> Option<String> {
        let asked = self.config.model.bnb_4bit_compute_dtype.is_some();
        let fp8 = self.model.frozen_compute() == qlora_kernels::weight::FrozenCompute::Fp8;
        let note = match self.model.workspace().gradient_dtype() {
            Dtype::F16 if fp8 => {
                "multiplies with the frozen weights in fp8, else computes in float16, with loss scaling"
            }
            _ if fp8 => "multiplies with the frozen weights in fp8",
            Dtype::F16 if asked => "computes in float16, with loss scaling",
            Dtype::F16 => "computes in float16, with loss scaling: this GPU has no bfloat16",
            _ => {
                let gain = self.fp8_gain.filter(|gain| *gain >= WORTH_A_NOTE)?;
                return Some(format!("frozen_compute = \"fp8\" in [model] would be about {gain:.1} times as fast"));
            }
        };
        Some(note.to_owned())
    }

    /// The configured training data and, if there is any, validation data. It was read when the session was opened; a second
    /// call reads it again.
    ///
    /// # Errors
    /// If a file cannot be read or a row is not usable; the message names file and line.
    pub fn data(&self) -> Result<(TrainingData, Option<Dataset>)> {
        let read = self.data.lock().unwrap_or_else(PoisonError::into_inner).take();
        read.map_or_else(|| prepare::load(&self.config, &self.encoder()), Ok)
    }

    /// As [`Session::data`], of data that is in memory.
    ///
    /// # Errors
    /// As there; also if the configuration says that data is read while it is trained on.
    pub fn datasets(&self) -> Result<(Dataset, Option<Dataset>)> {
        if self.config.data.streaming {
            return Err(Error::Invalid(
                "with streaming = true in [data] the data is not in memory: use Session::data".to_owned(),
            ));
        }
        match self.data()? {
            (TrainingData::Whole(training), validation) => Ok((*training, validation)),
            (TrainingData::Stream(_), _) => Err(Error::Invalid("the data is a stream: use Session::data".to_owned())),
        }
    }

    /// A run over these data, planned for the memory there is.
    ///
    /// # Errors
    /// If the data does not fit the model, or a step does not fit the memory.
    pub fn into_trainer<'a>(
        mut self,
        training: impl Into<TrainingData>,
        validation: Option<Dataset>,
    ) -> Result<Trainer<'a, QLoraModel>> {
        let training = training.into();
        if let Some(plan) = self.plan_memory(&training)? {
            or_tell_all(&mut *self.comm, self.model.reserve_for(&plan).map_err(Into::into))?;
        }
        let (start, template_time) = (self.start.take(), self.template_time.take());
        let prompts = self.prompts.take();
        let reports = self.config.training.report_to.contains(Tracker::TensorBoard) && self.comm.rank() == 0;
        let board =
            reports.then(|| TensorBoard::new(self.config.training.resolved_logging_dir(), self.config.to_toml()));
        let mut comm = std::mem::replace(&mut self.comm, Box::new(Alone));
        let made = self.into_model().and_then(|(model, config)| Trainer::new(config, model, training, validation));
        let trainer = or_tell_all(&mut *comm, made)?;
        let trainer = trainer.with_start(start, template_time).with_communicator(comm).with_samples(prompts);
        Ok(match board {
            Some(board) => trainer.with_observer(board),
            None => trainer,
        })
    }

    /// The model as the training loop drives it, and the configuration.
    ///
    /// # Errors
    /// If the model has no adapter.
    pub fn into_model(self) -> Result<(QLoraModel, TrainConfig)> {
        let save = SaveOptions {
            dtype: AdapterDtype::F32,
            base_model_name_or_path: Some(self.name),
            revision: self.config.model.revision.clone(),
            trained_over: Some(self.trained_over),
            companions: self.companions,
            ..SaveOptions::default()
        };
        Ok((QLoraModel::new(self.model, save, self.identity)?, self.config))
    }
}

/// From this gain on, fp8 is worth a note.
const WORTH_A_NOTE: f64 = 1.1;

/// The memory of the configured device; `auto` and `cuda` are the GPU of the rank.
fn workspace(config: &TrainConfig, local_rank: usize) -> Result<Workspace> {
    let device: DeviceChoice = config.model.device.parse()?;
    let device = match config.model.device.as_str() {
        "cuda" => DeviceChoice::Cuda(DeviceChoice::of_rank(local_rank)),
        _ => device,
    };
    let limit = config.training.memory_budget.map(|budget| (budget * 1e9) as u64);
    let dtype = config.model.bnb_4bit_compute_dtype.map(Into::into);
    let workspace = device.open_for_rank(local_rank, dtype, limit)?;
    if config.model.frozen_compute == Some(config::FrozenCompute::Fp8) {
        qlora_core::model::check_fp8(&workspace)?;
    }
    #[cfg(feature = "cuda")]
    if let Some(gpu) = workspace.gpu() {
        gpu.set_deterministic(config.training.full_determinism);
    }
    Ok(workspace)
}

/// Runs `load` while another thread opens and tests cuDNN's attention. Both have ended when this returns: a program that then
/// ends with an error must not leave the library at work.
fn beside_attention<T>(workspace: &Workspace, attention: AttentionConfig, load: impl FnOnce() -> T) -> T {
    #[cfg(feature = "cuda")]
    if let Some(gpu) = workspace.gpu() {
        let dtype = workspace.dtype();
        return std::thread::scope(|scope| {
            scope.spawn(move || gpu.attention().prepare(gpu, &attention, dtype));
            load()
        });
    }
    let _ = (workspace, attention);
    load()
}

/// The quantization of the configured base in memory.
pub fn quantization(options: &ModelOptions) -> Quantization {
    if !options.load_in_4bit {
        return Quantization::None;
    }
    let quant_type = match options.bnb_4bit_quant_type {
        config::QuantType::Nf4 => QuantType::Nf4,
        config::QuantType::Fp4 => QuantType::Fp4,
    };
    let double_quant = options.bnb_4bit_use_double_quant;
    Quantization::Bits4(QuantConfig { quant_type, blocksize: options.blocksize, double_quant })
}

/// The configured adapter.
///
/// # Errors
/// If `target_modules` is a regular expression that cannot be used.
pub fn lora_config(options: &LoraOptions) -> Result<LoraConfig> {
    let target_modules = match &options.target_modules {
        Targets::List(names) => TargetModules::Selected(ModuleFilter::List(names.clone())),
        Targets::Pattern(text) if text == "all-linear" => TargetModules::AllLinear,
        Targets::Pattern(text) => TargetModules::Selected(ModuleFilter::Pattern(ModulePattern::new(text)?)),
    };
    Ok(LoraConfig {
        r: options.r,
        lora_alpha: options.lora_alpha,
        lora_dropout: options.lora_dropout,
        use_rslora: options.use_rslora,
        use_dora: options.use_dora,
        rank_pattern: ByModule::new(options.rank_pattern.clone())?,
        alpha_pattern: ByModule::new(options.alpha_pattern.clone())?,
        trainable_token_indices: options.trainable_token_indices.clone(),
        modules_to_save: options.modules_to_save.clone(),
        ensure_weight_tying: options.ensure_weight_tying,
        bias: options.bias,
        target_modules,
        ..LoraConfig::default()
    })
}
