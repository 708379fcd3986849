//! A model with its adapters, as `chat`, `generate` and `eval` take it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use qlora::adapter;
use qlora::kernels::quant::QuantConfig;
use qlora::kernels::weight::FrozenCompute;
use qlora::model::{CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::trainer::config::TemplateKwargs;
use qlora::trainer::encoder::ModelEncoder;

use crate::output;

/// Options that choose the model.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// A folder, a GGUF file or a hub id; if not given, what the first adapter names as its base.
    #[arg(long, required_unless_present = "adapter")]
    pub(crate) model: Option<String>,
    /// A PEFT adapter: a folder or a hub id; as NAME=ADAPTER it has a name. May be given several times.
    #[arg(long)]
    pub(crate) adapter: Vec<String>,
    /// The adapter that answers: its name, "base" for none, or "all" for all of them (the first one is the default).
    #[arg(long)]
    pub(crate) with: Option<String>,
    /// A folder or hub id whose tokenizer and chat template are taken instead of the model's own.
    #[arg(long)]
    pub(crate) tokenizer: Option<PathBuf>,
    /// A file with the chat template to ask with, instead of the adapter's or the model's.
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Further arguments of the chat template, as in training: '{"enable_thinking": false}'.
    #[arg(long, value_name = "JSON", default_value = "{}")]
    pub(crate) chat_template_kwargs: TemplateKwargs,
    /// Branch, tag or commit of the model on the hub.
    #[arg(long)]
    pub(crate) revision: Option<String>,
    /// auto, cpu, cuda, or such as cuda:1.
    #[arg(long, default_value = "auto")]
    pub(crate) device: DeviceChoice,
    /// Keep the weights as stored instead of quantizing them to NF4.
    #[arg(long)]
    pub(crate) no_quantization: bool,
    /// Multiplies with the model's weights in 8 bits, on a Hopper GPU: prompts, evaluation, and answers to 64 prompts and more at a
    /// time are then faster, and a little less exact (as in training: frozen_compute).
    #[arg(long, value_name = "fp8", value_parser = ["fp8"])]
    pub(crate) frozen_compute: Option<String>,
}

/// A model that is ready to answer.
pub(crate) struct Loaded {
    pub(crate) model: CausalLm,
    pub(crate) files: ModelFiles,
    /// The adapters' names, in the order in which they were given.
    pub(crate) adapters: Vec<String>,
    /// Whether all of them answer.
    pub(crate) all_answer: bool,
}

impl ModelArgs {
    /// Loads the model with its adapters, and puts on the one that answers.
    ///
    /// # Errors
    /// If a part of it is not found or damaged, or the device is not there.
    pub(crate) fn load(&self) -> anyhow::Result<Loaded> {
        let mut options = OpenOptions {
            progress: true,
            tokenizer: self.tokenizer.clone(),
            revision: self.revision.clone(),
            ..OpenOptions::default()
        };
        let mut folders = Vec::new();
        for adapter in &self.adapter {
            let (name, spec) = adapter.split_once('=').unwrap_or((adapter, adapter));
            let of_adapter = OpenOptions { revision: None, ..options.clone() };
            folders.push((name, adapter::locate(spec, None, &of_adapter)?));
        }
        let all_answer = self.with.as_deref() == Some("all");
        // The model is asked as the adapter that answers was trained: with its tokenizer and its chat template.
        let answering = match self.with.as_deref() {
            None | Some("all") => folders.first(),
            Some(name) => folders.iter().find(|(other, _)| *other == name),
        };
        options.adapter = answering.map(|(_, folder)| folder.clone());
        options.chat_template_path.clone_from(&self.chat_template);
        let mut files = open_model(&self.base(&folders)?, &options)?;
        let mut adapters = Vec::new();
        for (name, folder) in &folders {
            let adapter = adapter::open_folder(folder, files.source.config())?;
            files = files.with_vocabulary_of(&adapter)?;
            adapters.push(((*name).to_owned(), adapter));
        }
        // A checkpoint that is stored quantized stays as it is.
        let quantization = match self.no_quantization || files.source.quantization().is_some() {
            true => Quantization::None,
            false => Quantization::Bits4(QuantConfig::default()),
        };
        let workspace = self.device.open(None, None)?;
        let bar = output::bar("loading", "{bytes} of {total_bytes}");
        let mut progress = output::bytes_of(&bar);
        let options = LoadOptions { quantization, progress: Some(&mut progress), ..LoadOptions::default() };
        let mut model = CausalLm::load_on(&*files.source, options, workspace)?;
        bar.finish_and_clear();
        if self.frozen_compute.is_some() {
            model.set_frozen_compute(FrozenCompute::Fp8)?;
            model.keep_fp8_weights()?;
        }
        for (name, adapter) in &adapters {
            model.load_adapter(name, adapter).with_context(|| name.clone())?;
        }
        let adapters: Vec<String> = adapters.into_iter().map(|(name, _)| name).collect();
        match self.with.as_deref() {
            Some("base" | "all") => {}
            Some(name) => model.activate_adapter(name)?,
            None => adapters.first().map_or(Ok(()), |name| model.activate_adapter(name))?,
        }
        let device = if model.workspace().device().is_cpu() { "the CPU" } else { "the GPU" };
        output::remark(format!("{}: {:.2} GB on {device}", files.name, model.memory().total() as f64 / 1e9));
        Ok(Loaded { model, files, adapters, all_answer })
    }

    /// The model, or what the first adapter names as its base.
    fn base(&self, adapters: &[(&str, PathBuf)]) -> anyhow::Result<String> {
        if let Some(model) = &self.model {
            return Ok(model.clone());
        }
        let (name, folder) = adapters.first().context("give --model or --adapter")?;
        let (base, _) = base_of(folder, &format!("{name} names no base model: give --model"))?;
        Ok(base)
    }
}

/// The model that the adapter in a folder names as its base, and its revision.
///
/// # Errors
/// If the configuration cannot be read; `missing` if it names none.
pub(crate) fn base_of(folder: &Path, missing: &str) -> anyhow::Result<(String, Option<String>)> {
    let (config, _) = adapter::read_any_config(folder)?;
    Ok((config.base_model_name_or_path.with_context(|| missing.to_owned())?, config.revision))
}

impl Loaded {
    /// Writes conversations as training does.
    pub(crate) fn encoder<'a>(&'a self, args: &'a ModelArgs) -> ModelEncoder<'a> {
        ModelEncoder::new(
            &self.files.tokenizer,
            self.files.chat_template.as_ref(),
            &self.files.generation.eos_token_ids,
        )
        .with_template_kwargs(args.chat_template_kwargs.as_map())
    }
}
