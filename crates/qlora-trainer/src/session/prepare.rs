//! Everything of a run that needs no weights, in the order in which it is cheap: options, output folder, lock, checkpoint, data
//! files, the model's description, its tokenizer, the data as tokens, whether the checkpoint belongs to it.

use std::sync::Arc;

use qlora_core::adapter::{self, PeftAdapter};
use qlora_core::chat::TemplateTime;
use qlora_core::config::ModelConfig;
use qlora_core::model::context::SequenceExchange;
use qlora_core::open::{ModelFiles, OpenOptions, open_model};
use qlora_kernels::Workspace;

use super::adapter::Beginning;
use super::weights;
use crate::comm::{Alone, Communicator, check_same_program, check_same_run, context, exchange};
use crate::config::TrainConfig;
use crate::data::configured::Sets;
use crate::data::{Dataset, TrainingData};
use crate::encoder::ModelEncoder;
use crate::error::{Error, Result};
use crate::objective;
use crate::qlora_model::parameters_of;
use crate::samples::SamplePlan;
use crate::trainer::blueprint::{Blueprint, ModelFacts};
use crate::trainer::start::Start;

/// Training data, and validation data if there is any.
pub(super) type Data = (TrainingData, Option<Dataset>);

/// A run without its weights.
pub(super) struct Prepared {
    /// The given configuration, with the options of an adapter that is trained further.
    pub(super) config: TrainConfig,
    pub(super) start: Option<Start>,
    /// The template is the configured one, at the run's time.
    pub(super) files: ModelFiles,
    pub(super) template_time: Option<String>,
    pub(super) beginning: Beginning,
    /// The adapter that the run began from, where the objective compares with it.
    pub(super) reference: Option<PeftAdapter>,
    pub(super) workspace: Workspace,
    /// The ranks that share every micro-batch with this one.
    pub(super) exchange: Option<Arc<dyn SequenceExchange>>,
    pub(super) identity: Vec<(String, String)>,
    pub(super) data: Data,
    /// The prompts to answer while training.
    pub(super) prompts: Option<SamplePlan>,
}

impl Prepared {
    /// A run that is only planned: no output folder is opened, no checkpoint read.
    pub(super) fn planned(config: &TrainConfig) -> Result<Self> {
        Self::new(config, false, &mut (Box::new(Alone) as Box<dyn Communicator>))
    }

    /// `writes` opens the output folder and the checkpoint.
    pub(super) fn new(config: &TrainConfig, writes: bool, comm: &mut Box<dyn Communicator>) -> Result<Self> {
        config.validate()?;
        check_same_program(&mut **comm, config)?;
        let mut config = config.clone();
        let context = config.training.context_parallel_size;
        if writes {
            context::check_ranks(comm.size(), context)?;
        }
        if objective::disables_dropout(&config) {
            config.lora.lora_dropout = 0.0;
        }
        let start = if writes { Some(Start::open_on(&config.training, &mut **comm)?) } else { None };
        config.training.gradient_accumulation_steps =
            micro_batches(&config, start.as_ref(), (comm.size() / context).max(1))?;
        let sets = Sets::find(&config)?;
        if comm.size() > 1
            && let Some(pipe) = sets.pipe()
        {
            return Err(Error::Invalid(format!(
                "{}: what comes through a pipe or from standard input reaches one rank only: give several ranks a file",
                pipe.display()
            )));
        }
        // A model that has to be downloaded first may take an hour. Data that is streamed may take longer to read.
        if !config.data.streaming && !std::path::Path::new(&config.model.model_name_or_path).exists() {
            sets.check()?;
        }
        let workspace = super::workspace(&config, comm.local_rank())?;
        #[cfg(feature = "cuda")]
        crate::comm::nccl::sum_on_gpus(comm, &workspace)?;
        let options = OpenOptions {
            revision: config.model.revision.clone(),
            cache_dir: config.model.cache_dir.clone(),
            offline: config.model.local_files_only,
            tokenizer: config.model.tokenizer_name_or_path.clone(),
            chat_template_path: config.data.chat_template_path.clone(),
            progress: true,
            ..OpenOptions::default()
        };
        let mut files = open_model(&config.model.model_name_or_path, &options)?;
        let template_time = stop_clock(&mut files, start.as_ref(), &mut **comm)?;
        let model = files.source.config();
        let exchange = context::connect(&mut **comm, context, &model.attention(0), &workspace, !writes)?;
        let beginning = Beginning::of(&mut config, model, start.as_ref(), &options)?;
        let reference = reference(&config, model, &options)?;
        let facts = ModelFacts {
            parameters: parameters_of(beginning.layout()),
            identity: identity(&config, &files, &workspace),
            vocab_size: Some(model.vocab_size),
            max_positions: Some(model.max_position_embeddings),
        };
        let encoder = encoder(&files).with_template_kwargs(config.data.chat_template_kwargs.as_map());
        let data = sets.open(&config, encoder, writes)?;
        let data = check(&config, &facts, start.as_ref(), &mut **comm, data)?;
        let prompts = SamplePlan::of(&config, &encoder, data.1.as_ref(), facts.max_positions)?;
        Ok(Self {
            config,
            start,
            files,
            template_time,
            beginning,
            reference,
            workspace,
            exchange,
            identity: facts.identity,
            data,
            prompts,
        })
    }
}

/// The adapter that the objective's reference has. A run that begins with a fresh one compares with the base; one that is
/// resumed still with where it began.
fn reference(config: &TrainConfig, model: &ModelConfig, options: &OpenOptions) -> Result<Option<PeftAdapter>> {
    let needed = objective::of(config).is_some_and(|objective| objective.needs_reference());
    let spec = config.lora.adapter_name_or_path.as_deref().filter(|_| needed);
    Ok(spec.map(|spec| adapter::open(spec, None, options, model)).transpose()?)
}

/// Micro-batches of a step over all ranks. A run that goes on with another number of ranks keeps that of its checkpoint. Ranks that share
/// micro-batches count as one.
fn micro_batches(config: &TrainConfig, start: Option<&Start>, ranks: usize) -> Result<usize> {
    let wanted = config.training.gradient_accumulation_steps * ranks;
    let Some(resumed) = start.and_then(|start| start.resumed.as_ref()) else { return Ok(wanted) };
    let saved = &resumed.checkpoint.state.stateful_callbacks.qlora;
    let Some(kept) = saved.identity.micro_batches().filter(|_| saved.ranks != ranks) else { return Ok(wanted) };
    if kept == 0 || !kept.is_multiple_of(ranks) {
        let possible: Vec<_> = (1..=kept).filter(|n| kept.is_multiple_of(*n)).map(|n| n.to_string()).collect();
        return Err(Error::checkpoint(
            &resumed.path,
            format!(
                "its steps have {kept} micro-batches, which {ranks} ranks cannot share evenly; go on with {} ranks",
                possible.join(", ")
            ),
        ));
    }
    if kept != wanted {
        let each = kept / ranks;
        tracing::warn!(
            "the run keeps its {kept} micro-batches a step: gradient_accumulation_steps is {each} on each of {ranks} ranks"
        );
    }
    Ok(kept)
}

/// The data of a configuration, as tokens.
pub(super) fn load(config: &TrainConfig, encoder: &ModelEncoder<'_>) -> Result<Data> {
    Sets::find(config)?.open(config, *encoder, false)
}

pub(super) fn encoder(files: &ModelFiles) -> ModelEncoder<'_> {
    ModelEncoder::new(&files.tokenizer, files.chat_template.as_ref(), &files.generation.eos_token_ids)
}

/// A template that asks for the time gets that of the run's first start, so that the data is the same on every day.
fn stop_clock(files: &mut ModelFiles, start: Option<&Start>, comm: &mut dyn Communicator) -> Result<Option<String>> {
    let Some(template) = files.chat_template.as_mut().filter(|template| template.reads_clock()) else {
        return Ok(None);
    };
    let resumed = start.and_then(|start| start.resumed.as_ref());
    let saved = resumed.and_then(|resumed| resumed.checkpoint.state.stateful_callbacks.qlora.template_time.as_deref());
    let time: TemplateTime = saved.map_or_else(|| Ok(TemplateTime::now()), str::parse)?;
    // Of several ranks, the first one's clock counts.
    let time: TemplateTime = exchange(comm, "time of the template", &time.to_string())?[0].parse()?;
    template.set_time(time);
    Ok(Some(time.to_string()))
}

/// The identity of a model: its weights, its device, and on a GPU the compute type and the determinism setting.
fn identity(config: &TrainConfig, files: &ModelFiles, workspace: &Workspace) -> Vec<(String, String)> {
    let on_cpu = workspace.device().is_cpu();
    let mut identity = vec![
        ("weights".to_owned(), weights::fingerprint(&*files.source)),
        ("device".to_owned(), if on_cpu { "cpu" } else { "cuda" }.to_owned()),
    ];
    if !on_cpu {
        // The CPU computes in float32, with the same bits every time.
        let frozen = config.model.frozen_compute.map_or("", |_| ", frozen weights in fp8");
        identity.push(("compute type".to_owned(), format!("{}{frozen}", workspace.dtype().name())));
        identity.push(("full_determinism".to_owned(), config.training.full_determinism.to_string()));
    }
    identity
}

/// Checks what [`Trainer::new`](crate::Trainer::new) and resuming check later on, and gives the data back.
fn check(
    config: &TrainConfig,
    facts: &ModelFacts,
    start: Option<&Start>,
    comm: &mut dyn Communicator,
    (training, validation): Data,
) -> Result<Data> {
    let blueprint = Blueprint::new(config, facts, training, validation.as_ref())?;
    check_same_run(comm, &blueprint.identity)?;
    if let Some(resumed) = start.and_then(|start| start.resumed.as_ref()) {
        blueprint.check_resumed(config, resumed)?;
    }
    Ok((blueprint.feed.into_data()?, validation))
}
