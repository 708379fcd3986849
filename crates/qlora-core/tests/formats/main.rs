//! Files of models and adapters: what loads, and what damaged files lead to.

#[path = "../common/mod.rs"]
mod common;

mod damage_set;
mod damage_set_chat;
mod damage_set_gguf;
mod loading;
mod pickles;
mod placement;
mod quantized_loading;
