//! The options of the model and the prompt that `chat` and `generate` share.

use anyhow::Result;
use qlora::trainer::data::ConversationMessage;

use super::Asker;
use crate::model::{Loaded, ModelArgs};
use crate::sampling::SamplingArgs;

/// Options of the model, the sampling and the prompt.
#[derive(clap::Args)]
pub(crate) struct AskArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// The text of the system message.
    #[arg(long)]
    system: Option<String>,
    /// Continues the prompt as plain text, instead of sending it as a chat message.
    #[arg(long)]
    raw: bool,
}

impl AskArgs {
    /// Loads the model.
    ///
    /// # Errors
    /// As [`ModelArgs::load`].
    pub(crate) fn load(&self) -> Result<Loaded> {
        self.model.load()
    }

    /// Asks the model that was loaded.
    pub(crate) fn asker<'a>(&'a self, loaded: &'a Loaded) -> Asker<'a> {
        let config = self.sampling.config(&loaded.files.generation);
        Asker { loaded, encoder: loaded.encoder(&self.model), config, raw: self.raw }
    }

    /// The system message, if there is one.
    pub(crate) fn system(&self) -> Vec<ConversationMessage> {
        self.system.iter().map(|text| ConversationMessage::new("system", text)).collect()
    }
}
