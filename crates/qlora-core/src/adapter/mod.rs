//! Adapters on disk, in PEFT's format: `adapter_config.json`, `adapter_model.safetensors`, and a `README.md` as model
//! card.
//!
//! Tensors are `base_model.model.{module}.lora_A.weight` [r, in_features] and `...lora_B.weight` [out_features, r], in
//! F32, F16 or BF16; the header's metadata is `{"format": "pt"}`. Source: PEFT 0.21.2 (`save_pretrained`). PEFT loads
//! what [`save`] writes; [`load`] takes what PEFT writes, and is strict: a missing or superfluous tensor, a wrong
//! shape, a number that is not finite, or an option that would change the result and is not supported is an error,
//! never a warning. Where the tensors lie in a pickle, `adapter_model.bin`, as PEFT wrote before 0.6, they are read from there.
//!
//! [`load`] and [`save`] are for adapters that are trained: LoRA and DoRA on linear layers of the blocks, rows of tokens, and a whole
//! embedding or head. [`open`] and
//! [`open_folder`] read every kind of PEFT's LoRA, for [`CausalLm::load_adapter`](crate::model::CausalLm::load_adapter).

mod card;
mod config_file;
mod keys;
pub(crate) mod kinds;
mod load;
mod open;
mod peft;
mod peft_save;
#[cfg(test)]
mod peft_tests;
mod resized;
mod save;
#[cfg(test)]
mod tests;
mod trained_over;
mod weights;

pub use card::is_ours as is_generated_card;
pub use config_file::AdapterConfig;
pub use kinds::{AdapterKinds, TrainedBias};
pub use load::{SavedAdapter, load, load_into, read_any_config, read_config};
pub use open::{locate, open};
pub use peft::{LoraModule, PeftAdapter, Replaced, TokenRows, open_folder};
pub(crate) use resized::resize;
pub use save::{AdapterDtype, SaveOptions, save};
pub use trained_over::TrainedOver;
#[cfg(feature = "hub")]
pub(crate) use weights::PICKLE_FILE;

/// The name of the file with the options.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The name of the file with the tensors.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// The name of the file that records the quantization of the base during the adapter's training ([`TrainedOver`]).
pub const TRAINED_OVER_FILE: &str = "base_quantization.json";
/// The name of the model card.
pub const CARD_FILE: &str = "README.md";
/// The name of a head that was trained whole.
const HEAD_TENSOR: &str = "base_model.model.lm_head.weight";
