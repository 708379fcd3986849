//! The names of an adapter's tensors, as PEFT writes them and as other programs do.
//!
//! PEFT's are `base_model.model.{module}.lora_A.weight`. Programs that save a wrapped model, or a state that PEFT did not prepare,
//! leave more in them or less:
//!
//! | in the file | from | read as |
//! |---|---|---|
//! | `_orig_mod.` anywhere | `torch.compile` | without it |
//! | `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`, `module.` in front | FSDP, activation checkpointing, DDP | without it |
//! | `lora_A.default.weight`, `modules_to_save.default.weight` | a raw `state_dict` with the adapter's name | `lora_A.weight`, `weight` |
//! | `model.layers...`, `layers...` | the prefix was cut off, or the model had no head | `base_model.model.model.layers...` |
//!
//! PEFT itself takes such a file for one without tensors, warns, and computes the base. Everything else in front of a module's
//! name is an error that says what it is ([`foreign_prefix`]).

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::peft::PREFIX;
use crate::{Error, Result};

/// Name components that wrapper modules (`torch.compile`, FSDP, activation checkpointing) insert into tensor names.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
/// The parts after which a raw state has the adapter's name.
const NAMED: [&str; 7] = [
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "modules_to_save",
    "trainable_tokens_delta",
];

/// An adapter's tensor file, whose tensors go by PEFT's names.
pub(super) struct AdapterFile<'a> {
    file: SafeTensors<'a>,
    /// PEFT's name to the one in the file.
    stored: BTreeMap<String, String>,
}

impl<'a> AdapterFile<'a> {
    /// Parses a file; `path` is for messages.
    ///
    /// # Errors
    /// If it is no safetensors file, or two of its tensors would have one name.
    pub(super) fn parse(path: &Path, bytes: &'a [u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|error| Error::format(path, format!("broken or truncated safetensors file: {error}")))?;
        let mut stored: BTreeMap<String, String> = BTreeMap::new();
        let mut changed = None;
        for name in file.names() {
            let plain = plain(name);
            if plain != *name {
                changed = Some((name, plain.clone()));
            }
            if let Some(other) = stored.insert(plain.clone(), name.to_owned()) {
                let message = format!(
                    "{other} and {name} are both {plain}: the file holds several adapters, or one twice; save one alone with PEFT's \
                     save_pretrained"
                );
                return Err(Error::format(path, message));
            }
        }
        if let Some((name, plain)) = changed {
            tracing::warn!(
                "{}: {name} and others have not the names that PEFT writes; read as {plain}",
                path.display()
            );
        }
        Ok(Self { file, stored })
    }

    /// The tensors' names, as PEFT writes them.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.stored.keys().map(String::as_str)
    }

    /// A tensor's name in the file.
    pub(super) fn stored_name<'b>(&'b self, name: &'b str) -> &'b str {
        self.stored.get(name).map_or(name, String::as_str)
    }

    /// The tensor with PEFT's name.
    pub(super) fn tensor(&self, name: &str) -> Option<TensorView<'a>> {
        self.file.tensor(self.stored.get(name)?).ok()
    }
}

/// PEFT's name of a tensor with any of the names above; other names stay.
fn plain(name: &str) -> String {
    let mut parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    if parts.first() == Some(&"module") {
        parts.remove(0);
    }
    if let Some(at) = parts.iter().position(|part| NAMED.contains(part)) {
        let last = |part: &&str| matches!(*part, "weight" | "bias");
        match (parts[at], &parts[at + 1..]) {
            ("lora_magnitude_vector", rest) if rest.len() <= 2 => parts.truncate(at + 1),
            ("lora_A" | "lora_B", [name, end]) if !last(name) && last(end) => drop(parts.remove(at + 1)),
            ("modules_to_save", [_, _, ..]) => drop(parts.drain(at..at + 2)),
            (part, [_]) if part.starts_with("lora_embedding") || part == "trainable_tokens_delta" => {
                parts.truncate(at + 1);
            }
            _ => {}
        }
    }
    let name = parts.join(".");
    let inner = name.strip_prefix(PREFIX).unwrap_or(&name);
    let begins = |starts: &[&str]| starts.iter().any(|start| inner.starts_with(start));
    if begins(&["layers.", "embed_tokens.", "norm."]) {
        format!("{PREFIX}model.{inner}")
    } else if begins(&["model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."]) {
        format!("{PREFIX}{inner}")
    } else {
        name
    }
}

/// The common prefix of the module names in all of these, if it differs from PEFT's.
pub(super) fn foreign_prefix<'a>(names: &[&'a str]) -> Option<&'a str> {
    let prefix = |name: &'a str| {
        let starts = ["layers.", "embed_tokens.", "lm_head."];
        let at = starts.iter().filter_map(|start| name.find(start)).min()?;
        Some(&name[..at]).filter(|prefix| prefix.is_empty() || prefix.ends_with('.'))
    };
    let first = prefix(names.first()?)?;
    let expected = [PREFIX, "base_model.model.model."];
    (!expected.contains(&first) && names.iter().all(|name| prefix(name) == Some(first))).then_some(first)
}

/// The error's text for a tensor of a wrong shape.
pub(super) fn wrong_shape(got: &[usize], expected: &[usize]) -> String {
    let hint = match got.iter().product::<usize>() {
        0 => {
            "; it is empty: it was saved by a process that held none of it (DeepSpeed ZeRO-3, FSDP). Gather the parameters and save \
             again"
        }
        _ => "",
    };
    format!("has shape {got:?}, but the model and adapter_config.json give {expected:?}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_wrapped_models_are_peft_s() {
        let q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
        for name in [
            q,
            "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0._orig_mod.self_attn.q_proj.lora_A.default.weight",
            "module.base_model.model.model.layers.0.self_attn.q_proj.lora_A.my_adapter.weight",
            "_fsdp_wrapped_module.base_model.model.model.layers.0._fsdp_wrapped_module.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.0._checkpoint_wrapped_module.self_attn.q_proj.lora_A.weight",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "layers.0.self_attn.q_proj.lora_A.weight",
            "base_model.model.layers.0.self_attn.q_proj.lora_A.weight",
        ] {
            assert_eq!(plain(name), q, "{name}");
        }
        let b = "base_model.model.model.";
        for (name, expected) in [
            ("layers.0.mlp.up_proj.lora_B.default.bias", "layers.0.mlp.up_proj.lora_B.bias"),
            ("layers.0.mlp.up_proj.lora_magnitude_vector.default.weight", "layers.0.mlp.up_proj.lora_magnitude_vector"),
            ("layers.0.mlp.up_proj.lora_magnitude_vector.weight", "layers.0.mlp.up_proj.lora_magnitude_vector"),
            ("embed_tokens.lora_embedding_A.default", "embed_tokens.lora_embedding_A"),
            ("norm.modules_to_save.default.weight", "norm.weight"),
            (
                "embed_tokens.token_adapter.trainable_tokens_delta.default",
                "embed_tokens.token_adapter.trainable_tokens_delta",
            ),
            ("embed_tokens.base_layer.weight", "embed_tokens.base_layer.weight"),
        ] {
            assert_eq!(plain(&format!("{b}{name}")), format!("{b}{expected}"));
            assert_eq!(plain(&format!("{b}{expected}")), format!("{b}{expected}"));
        }
        assert_eq!(plain("lm_head.modules_to_save.default.weight"), "base_model.model.lm_head.weight");
        for other in ["x", "", "base_model.model.stray", "base_model.model.x.model.layers.0.mlp.up_proj.lora_A.weight"]
        {
            assert_eq!(plain(other), other);
        }
    }

    #[test]
    fn foreign_prefixes_are_found() {
        let of = |prefix: &str| {
            let names = ["layers.0.q.lora_A.weight", "layers.1.q.lora_B.weight"].map(|name| format!("{prefix}{name}"));
            foreign_prefix(&[&names[0], &names[1]]).map(str::to_owned)
        };
        for prefix in
            ["base_model.model.model.language_model.", "transformer.", "diffusion_model.", "base_model.model.x."]
        {
            assert_eq!(of(prefix).as_deref(), Some(prefix));
        }
        assert_eq!(of("base_model.model.model."), None);
        assert_eq!(foreign_prefix(&["a.layers.0.x", "b.layers.0.x"]), None);
        assert_eq!(foreign_prefix(&["stray"]), None);
        assert_eq!(foreign_prefix(&[]), None);
    }
}
