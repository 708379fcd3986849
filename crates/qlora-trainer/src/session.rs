//! From a configuration to a model that is ready to train, evaluate and generate.
//!
//! ```no_run
//! use qlora_trainer::session::Session;
//! use qlora_trainer::{Interrupt, TrainConfig};
//!
//! # fn main() -> qlora_trainer::Result<()> {
//! let config = TrainConfig::from_toml_file("examples/finetune.toml")?;
//! let session = Session::open(&config, |_, _| ())?;
//! let (training, validation) = session.datasets()?;
//! let summary = session.into_trainer(training, validation)?.with_interrupt(Interrupt::on_ctrl_c()?).run()?;
//! println!("{:?}", summary.adapter);
//! # Ok(())
//! # }
//! ```

mod plan;

use std::path::Path;

use qlora_core::adapter::{AdapterDtype, SaveOptions};
use qlora_core::chat::ChatTemplate;
use qlora_core::lora::{LoraConfig, ModuleFilter, ModulePattern, TargetModules};
use qlora_core::model::{CausalLm, DeviceChoice, LoadOptions, Quantization};
use qlora_core::open::{GenerationDefaults, ModelFiles, OpenOptions, open_model};
use qlora_core::tokenizer::Tokenizer;
use qlora_kernels::Workspace;
use qlora_kernels::quant::{QuantConfig, QuantType};

use crate::config::{self, GradientCheckpointing, LoraOptions, ModelOptions, Targets, TrainConfig};
use crate::data::{Dataset, EncodeOptions, load_jsonl};
use crate::encoder::ModelEncoder;
use crate::error::{Error, Result};
use crate::qlora_model::QLoraModel;
use crate::trainer::Trainer;

/// A loaded model with a fresh adapter, its tokenizer and its chat template, under a configuration.
#[derive(Debug)]
pub struct Session {
    config: TrainConfig,
    model: CausalLm,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    generation: GenerationDefaults,
    name: String,
    commit: Option<String>,
}

impl Session {
    /// Opens the base model, quantizes it as configured and adds the adapter. `progress` is called with the bytes of
    /// weights that were read, and their total.
    ///
    /// # Errors
    /// If the configuration is not valid, or the model cannot be found or read; the message names the file or the tensor.
    pub fn open(config: &TrainConfig, mut progress: impl FnMut(u64, u64)) -> Result<Self> {
        config.validate()?;
        let options = OpenOptions {
            revision: config.model.revision.clone(),
            cache_dir: config.model.cache_dir.clone(),
            offline: config.model.local_files_only,
            progress: true,
            ..OpenOptions::default()
        };
        let ModelFiles { source, tokenizer, chat_template, generation, name, commit } =
            open_model(&config.model.model_name_or_path, &options)?;
        let template = match &config.data.chat_template_path {
            Some(path) => Some(template_from_file(path, &tokenizer)?),
            None => chat_template,
        };
        let load = LoadOptions {
            quantization: quantization(&config.model),
            offload_embedding: config.model.offload_embedding,
            progress: Some(&mut progress),
        };
        let workspace = workspace(config)?;
        #[cfg(feature = "cuda")]
        prepare_attention(&workspace, source.config());
        let mut model = CausalLm::load_on(&*source, load, workspace)?;
        model.add_adapter(lora_config(&config.lora)?, config.training.seed)?;
        // Until `plan_memory` has seen the data.
        model.set_gradient_checkpointing(config.training.gradient_checkpointing == GradientCheckpointing::On)?;
        Ok(Self { config: config.clone(), model, tokenizer, template, generation, name, commit })
    }

    /// The configuration.
    pub fn config(&self) -> &TrainConfig {
        &self.config
    }

    /// The model with its adapter.
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Turns rows into tokens the way training sees them.
    pub fn encoder(&self) -> ModelEncoder<'_> {
        ModelEncoder::new(&self.tokenizer, self.template.as_ref(), &self.generation.eos_token_ids)
            .with_template_kwargs(self.config.data.chat_template_kwargs.as_map())
    }

    /// Reads the configured training data and, if there is any, validation data.
    ///
    /// # Errors
    /// If a file cannot be read or a row is not usable; the message names file and line.
    pub fn datasets(&self) -> Result<(Dataset, Option<Dataset>)> {
        let options = EncodeOptions::from(&self.config.data);
        let encoder = self.encoder();
        let training = load_jsonl(self.config.data.train_file.as_slice(), &encoder, &options)?;
        let validation = match self.config.data.validation_file.as_slice() {
            [] => None,
            files => Some(load_jsonl(files, &encoder, &options)?),
        };
        Ok((training, validation))
    }

    /// A run over these data, planned for the memory there is.
    ///
    /// # Errors
    /// If the data does not fit the model, or a step does not fit the memory.
    pub fn into_trainer<'a>(
        mut self,
        training: Dataset,
        validation: Option<Dataset>,
    ) -> Result<Trainer<'a, QLoraModel>> {
        self.plan_memory(&training)?;
        let (model, config) = self.into_model()?;
        Trainer::new(config, model, training, validation)
    }

    /// The model as the training loop drives it, and the configuration.
    ///
    /// # Errors
    /// If the model has no adapter.
    pub fn into_model(self) -> Result<(QLoraModel, TrainConfig)> {
        let save = SaveOptions {
            dtype: AdapterDtype::F32,
            base_model_name_or_path: Some(self.name.clone()),
            revision: self.config.model.revision.clone(),
            ..SaveOptions::default()
        };
        let mut identity = vec![("model".to_owned(), self.name)];
        identity.extend(self.commit.map(|commit| ("commit".to_owned(), commit)));
        Ok((QLoraModel::new(self.model, save, identity)?, self.config))
    }
}

/// The memory of the configured device.
fn workspace(config: &TrainConfig) -> Result<Workspace> {
    let device: DeviceChoice = config.model.device.parse()?;
    let limit = config.training.memory_budget.map(|budget| (budget * 1e9) as u64);
    let workspace = device.open(config.model.bnb_4bit_compute_dtype.into(), limit)?;
    #[cfg(feature = "cuda")]
    if let Some(gpu) = workspace.gpu() {
        gpu.set_deterministic(config.training.full_determinism);
    }
    Ok(workspace)
}

/// Opens and tests cuDNN's attention while the model is loaded.
#[cfg(feature = "cuda")]
fn prepare_attention(workspace: &Workspace, config: &qlora_core::config::ModelConfig) {
    let Some(gpu) = workspace.gpu().cloned() else { return };
    let attention = config.attention(0);
    let dtype = workspace.dtype();
    std::thread::spawn(move || gpu.attention().prepare(&gpu, &attention, dtype));
}

/// How the configured base is held in memory.
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
        target_modules,
        ..LoraConfig::default()
    })
}

fn template_from_file(path: &Path, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    let source = std::fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
    // Some editors put a byte order mark before the text.
    let source = source.strip_prefix('\u{feff}').unwrap_or(&source);
    let roles = [
        ("bos_token", tokenizer.bos_token_id()),
        ("eos_token", tokenizer.eos_token_id()),
        ("unk_token", tokenizer.unk_token_id()),
        ("pad_token", tokenizer.pad_token_id()),
    ];
    let tokens = roles.into_iter().filter_map(|(role, id)| Some((role.to_owned(), tokenizer.id_to_token(id?)?)));
    Ok(ChatTemplate::new(source, tokens)?)
}
