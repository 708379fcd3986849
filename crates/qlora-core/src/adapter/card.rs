//! The model card of an adapter: its description for the hub and for readers.

use super::config_file::last_names;
use super::save::SaveOptions;
use crate::hub_id;
use crate::lora::{AdapterLayout, LoraConfig};
use std::fmt::Write;

/// Marks a card as written here, so that it may be replaced.
const MARK: &str = "<!-- Written by qlora at every save. Remove this line to keep your changes. -->";

/// Whether a model card was written by [`save`](super::save), which replaces it at every save.
pub fn is_ours(text: &str) -> bool {
    text.contains(MARK)
}

pub(super) fn text(config: &LoraConfig, layout: &AdapterLayout, options: &SaveOptions) -> String {
    let base = options.base_model_name_or_path.as_deref();
    let mut card = String::from("---\n");
    // The hub takes only ids here, and a relative path looks like one. JSON strings are YAML strings.
    if let Some(id) = base.filter(|name| is_hub_id(name) && !std::path::Path::new(name).exists()) {
        card += &format!("base_model: {}\n", serde_json::Value::from(id));
    }
    card += "library_name: peft\ntags:\n- lora\n---\n";
    card += MARK;
    card += "\n\n# LoRA adapter\n\n";
    let over = options.trained_over.as_ref().map_or_else(String::new, |over| format!("- trained over {over}\n"));
    let of = base.map_or_else(String::new, |name| format!(" of `{name}`"));
    // Writing to a string cannot fail.
    let kind = if config.use_dora { "DoRA" } else { "LoRA" };
    let _ = write!(
        card,
        "A {kind} fine-tune{of}, made with qlora {} and stored in PEFT's format.\n\n\
         - r {}, lora_alpha {}, scaling {} ({})\n- lora_dropout {}\n- layers: {} ({} adapters)\n- {} trained parameters\n{over}\n\
         In Python: `PeftModel.from_pretrained(base_model, \"path/to/this/folder\")`.\n",
        env!("CARGO_PKG_VERSION"),
        config.r,
        config.lora_alpha,
        config.scaling(),
        if config.use_rslora { "rank-stabilized: lora_alpha / sqrt(r)" } else { "lora_alpha / r" },
        config.lora_dropout,
        last_names(layout).join(", "),
        layout.modules().count(),
        layout.len(),
    );
    card
}

/// Whether the name of a base model is the id of a repository, as far as its form says, and not that of a file.
fn is_hub_id(name: &str) -> bool {
    hub_id::is_hub_id(name) && !name.ends_with(".gguf")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hub_ids_go_to_the_header() {
        for (name, expected) in [
            ("org/Model-1.5_b", true),
            ("gpt2", true),
            ("/data/model", false),
            ("./model", false),
            ("a/b/c", false),
            ("m.gguf", false),
            ("", false),
            ("a b", false),
        ] {
            assert_eq!(is_hub_id(name), expected, "{name}");
            let options = SaveOptions { base_model_name_or_path: Some(name.into()), ..Default::default() };
            let card = text(&LoraConfig::default(), &AdapterLayout::new(&[], 8), &options);
            assert_eq!(card.contains("base_model: "), expected);
            assert!(is_ours(&card));
        }
    }
}
