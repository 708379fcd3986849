//! The adapter that a run begins with: a fresh one, or one that was trained before.

use std::collections::BTreeMap;
use std::path::PathBuf;

use qlora_core::adapter;
use qlora_core::config::ModelConfig;
use qlora_core::lora::{AdapterLayout, ByModule, LoraConfig};
use qlora_core::model::CausalLm;
use qlora_core::open::OpenOptions;

use super::lora_config;
use crate::config::{LoraOptions, TrainConfig};
use crate::error::{Error, Result};
use crate::trainer::start::Start;

/// The adapter of a run before the model is loaded.
pub(super) enum Beginning {
    /// Not there yet.
    Fresh(Box<LoraConfig>, AdapterLayout),
    /// Read from a folder.
    Trained(Box<adapter::SavedAdapter>),
}

impl Beginning {
    /// The adapter that `config` asks for. Where it names a trained one, `config` gets that one's options; a run that is resumed
    /// takes its checkpoint's instead, and needs the trained one no more.
    ///
    /// # Errors
    /// If the adapter cannot be found or read, is not one that can be trained, does not fit the model, or `config` asks for
    /// another rank, scale or other layers.
    pub(super) fn of(
        config: &mut TrainConfig,
        model: &ModelConfig,
        start: Option<&Start>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let Some(spec) = config.lora.adapter_name_or_path.clone() else {
            let lora = lora_config(&config.lora)?;
            let layout = AdapterLayout::for_model(&lora, model)?;
            return Ok(Self::Fresh(Box::new(lora), layout));
        };
        let folder: PathBuf = match start.and_then(|start| start.resumed.as_ref()) {
            Some(resumed) => resumed.path.clone(),
            None => adapter::locate(&spec, None, options)?,
        };
        let mut trained = adapter::load(&folder, model)?;
        agree(&config.lora, &trained, model).map_err(|difference| {
            Error::Invalid(format!(
                "{}: {difference} in [lora]: leave it out, a run that begins from an adapter has that adapter's",
                folder.display()
            ))
        })?;
        trained.config.lora.lora_dropout = config.lora.lora_dropout;
        let LoraConfig { r, lora_alpha, use_rslora, use_dora, ref rank_pattern, ref alpha_pattern, .. } =
            trained.config.lora;
        let (rank_pattern, alpha_pattern) = (table(rank_pattern), table(alpha_pattern));
        let has = &trained.config.lora;
        config.lora = LoraOptions {
            r,
            lora_alpha,
            use_rslora,
            use_dora,
            rank_pattern,
            alpha_pattern,
            trainable_token_indices: has.trainable_token_indices.clone(),
            modules_to_save: has.modules_to_save.clone(),
            ensure_weight_tying: has.ensure_weight_tying,
            bias: has.bias,
            ..config.lora.clone()
        };
        Ok(Self::Trained(Box::new(trained)))
    }

    pub(super) fn layout(&self) -> &AdapterLayout {
        match self {
            Self::Fresh(_, layout) => layout,
            Self::Trained(adapter) => &adapter.layout,
        }
    }

    /// Puts the adapter into the model.
    ///
    /// # Errors
    /// If it does not fit.
    pub(super) fn add_to(self, model: &mut CausalLm, seed: u64) -> qlora_core::Result<()> {
        match self {
            Self::Fresh(lora, _) => model.add_adapter(*lora, seed),
            Self::Trained(adapter) => model.set_adapter(adapter.config.lora, adapter.layout, adapter.weights),
        }
    }
}

/// The expressions and their values, as a configuration has them.
fn table<T: Copy>(of: &ByModule<T>) -> BTreeMap<String, T> {
    of.iter().map(|(end, value)| (end.to_owned(), *value)).collect()
}

/// Checks that the given options, where they are not the default, are the adapter's; else names those that are not.
fn agree(asked: &LoraOptions, trained: &adapter::SavedAdapter, model: &ModelConfig) -> std::result::Result<(), String> {
    let (default, has) = (LoraOptions::default(), &trained.config.lora);
    let differs =
        |name: &str, asked: String, has: String| Err(format!("the adapter has {name} = {has}, not {asked} as"));
    if asked.r != has.r && asked.r != default.r {
        return differs("r", asked.r.to_string(), has.r.to_string());
    }
    if asked.lora_alpha != has.lora_alpha && asked.lora_alpha != default.lora_alpha {
        return differs("lora_alpha", asked.lora_alpha.to_string(), has.lora_alpha.to_string());
    }
    if asked.use_rslora && !has.use_rslora {
        return differs("use_rslora", "true".to_owned(), "false".to_owned());
    }
    if asked.use_dora && !has.use_dora {
        return differs("use_dora", "true".to_owned(), "false".to_owned());
    }
    if !asked.rank_pattern.is_empty() && asked.rank_pattern != table(&has.rank_pattern) {
        return differs("rank_pattern", format!("{:?}", asked.rank_pattern), format!("{:?}", table(&has.rank_pattern)));
    }
    if !asked.alpha_pattern.is_empty() && asked.alpha_pattern != table(&has.alpha_pattern) {
        return differs(
            "alpha_pattern",
            format!("{:?}", asked.alpha_pattern),
            format!("{:?}", table(&has.alpha_pattern)),
        );
    }
    if !asked.trainable_token_indices.is_empty() && asked.trainable_token_indices != has.trainable_token_indices {
        let (asked, has) = (&asked.trainable_token_indices, &has.trainable_token_indices);
        return differs("trainable_token_indices", format!("{asked:?}"), format!("{has:?}"));
    }
    if !asked.modules_to_save.is_empty() && asked.modules_to_save != has.modules_to_save {
        let (asked, has) = (&asked.modules_to_save, &has.modules_to_save);
        return differs("modules_to_save", format!("{asked:?}"), format!("{has:?}"));
    }
    if asked.bias != default.bias && asked.bias != has.bias {
        return differs("bias", format!("{:?}", asked.bias), format!("{:?}", has.bias));
    }
    if asked.ensure_weight_tying && !has.ensure_weight_tying {
        return differs("ensure_weight_tying", "true".to_owned(), "false".to_owned());
    }
    if asked.target_modules != default.target_modules {
        let asked = lora_config(asked).map_err(|error| error.to_string())?;
        let lora = LoraConfig { target_modules: asked.target_modules, layers: None, ..has.clone() };
        let layout = AdapterLayout::for_model(&lora, model).map_err(|error| error.to_string())?;
        if layout != trained.layout {
            let count = |layout: &AdapterLayout| format!("{} layers", layout.modules().count());
            return Err(format!(
                "the adapter is on {}, not on the {} of target_modules",
                count(&trained.layout),
                count(&layout)
            ));
        }
    }
    Ok(())
}
