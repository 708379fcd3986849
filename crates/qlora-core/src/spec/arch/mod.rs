//! The supported architectures: one file each, and the list that names them.
//!
//! An architecture says what its `config.json` and GGUF metadata mean where they differ from others', and which modules its
//! blocks have. A new one is a file here and two entries in this one: its `mod` line and its row in the list.

mod granite;
mod llama;
mod ministral3;
mod mistral;
mod qwen2;
mod qwen3;
mod smollm3;

use serde_json::{Map, Value as Json};

use super::ModelSpec;
use super::config::{Fields, ModelConfig};
use super::decoder::{self, LLAMA_NAMES, Name};
use super::gguf::{Metadata, Problem, Value};
use crate::error::Result;

/// Makes the enum of the architectures and what leads from each to its file.
macro_rules! architectures {
    ($($(#[$doc:meta])+ $name:ident => $definition:path,)+) => {
        /// The architectures whose parts the decoder can be put together from.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Architecture {
            $($(#[$doc])+ $name,)+
        }

        impl Architecture {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The properties of the architecture.
            pub(crate) fn definition(self) -> &'static dyn Definition {
                match self {
                    $(Self::$name => &$definition,)+
                }
            }
        }
    };
}

architectures! {
    /// Llama 2, 3, 3.1, 3.2 and everything of the same shape (SmolLM2, ...).
    Llama => llama::Llama,
    /// Mistral: sliding window.
    Mistral => mistral::Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2 => qwen2::Qwen2,
    /// Qwen3: RMSNorm on every head of q and k.
    Qwen3 => qwen3::Qwen3,
    /// Granite 3: factors of the embedding, the scores, the residual sums and the logits.
    Granite => granite::Granite,
    /// SmolLM3: every fourth block without rotary embedding.
    SmolLM3 => smollm3::SmolLM3,
    /// Ministral 3 without its images: YaRN, sequences up to its original length.
    Ministral3 => ministral3::Ministral3,
}

impl Architecture {
    /// Its class in transformers: `LlamaForCausalLM`.
    pub fn class(self) -> &'static str {
        self.definition().class()
    }

    /// Its `model_type` in a `config.json`: `llama`.
    pub fn model_type(self) -> &'static str {
        self.definition().model_type()
    }

    /// Its `general.architecture` in GGUF files; Mistral's is Llama's.
    pub fn gguf_name(self) -> &'static str {
        self.definition().gguf_name()
    }

    /// The architecture that GGUF files of this name are read as.
    pub(crate) fn of_gguf(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|architecture| architecture.gguf_name() == name)
    }
}

/// The meaning of keys that a `config.json` does not have: the defaults of the class in transformers (checked against 5.23).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Defaults {
    pub(crate) max_position_embeddings: usize,
    /// None: as many as query heads.
    pub(crate) num_key_value_heads: Option<usize>,
    /// None: `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    pub(crate) rope_theta: f64,
    pub(crate) tie_word_embeddings: bool,
    pub(crate) bos_token_id: Option<u32>,
    pub(crate) eos_token_id: Option<u32>,
}

/// The properties of an architecture that distinguish it from others. Functions with a body hold for a block like
/// Llama's.
pub(crate) trait Definition: Sync {
    /// The class in transformers.
    fn class(&self) -> &'static str;

    /// `model_type` in a `config.json`.
    fn model_type(&self) -> &'static str;

    /// `general.architecture` in GGUF files.
    fn gguf_name(&self) -> &'static str {
        self.model_type()
    }

    /// The meaning of missing keys.
    fn defaults(&self) -> Defaults;

    /// Keys of a `config.json` that this architecture reads and others refuse.
    fn own_keys(&self) -> &'static [&'static str] {
        &[]
    }

    /// Reads what is not the same in every architecture: biases, windows, scalings. `config` has everything else.
    ///
    /// # Errors
    /// If an option has a value that this architecture does not take; the message names it.
    fn read_json(&self, fields: &Fields<'_>, config: &mut ModelConfig) -> Result<()>;

    /// Writes the keys that [`Self::read_json`] reads.
    fn write_json(&self, config: &ModelConfig, map: &mut Map<String, Json>);

    /// Keys of GGUF metadata that this architecture reads and others refuse.
    fn own_gguf_keys(&self) -> &'static [&'static str] {
        &[]
    }

    /// Reads what is not the same in every architecture. `config` has everything else; its biases are those that the file has
    /// tensors of, its window is the file's in every layer.
    ///
    /// # Errors
    /// If a key has a value that this architecture does not take.
    fn read_gguf(&self, metadata: &dyn Metadata, config: &mut ModelConfig) -> std::result::Result<(), Problem> {
        refuse_gguf_window(metadata, config)
    }

    /// The metadata values that [`Self::read_gguf`] reads.
    ///
    /// # Errors
    /// The part of the model that llama.cpp has no place for.
    fn write_gguf(&self, config: &ModelConfig) -> std::result::Result<Vec<Value>, String>;

    /// Whether llama.cpp's converter interleaves the two halves of every head of q and k, as llama.cpp rotates neighbours.
    fn interleaves_in_gguf(&self) -> bool {
        false
    }

    /// The modules of a block that this architecture can have, in the order in which files hold them.
    fn names(&self) -> &'static [Name] {
        LLAMA_NAMES
    }
}

impl ModelConfig {
    /// The modules of a model of this configuration, and how its blocks differ.
    pub fn spec(&self) -> ModelSpec {
        decoder::spec(self, self.architecture.definition())
    }
}

/// Refuses a window in GGUF metadata where llama.cpp gives the key no meaning.
fn refuse_gguf_window(metadata: &dyn Metadata, config: &ModelConfig) -> std::result::Result<(), Problem> {
    match config.sliding_window.iter().any(Option::is_some) {
        true => Err(Problem::Unsupported(format!("metadata {}", metadata.key("attention.sliding_window")))),
        false => Ok(()),
    }
}

/// Refuses to write windows into a GGUF file, for architectures whose llama.cpp class has none.
fn no_gguf_window(config: &ModelConfig, what: &str) -> std::result::Result<(), String> {
    match config.sliding_window.iter().any(Option::is_some) {
        true => Err(format!("a sliding window in some layers, or in {what}")),
        false => Ok(()),
    }
}
