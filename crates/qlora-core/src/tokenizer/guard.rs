//! Errors in place of the panics that the `tokenizers` crate answers some damaged files with: a post-processor whose template
//! names a token that it does not list, a normalizer whose expression cuts a character.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};

/// Runs `work` and returns its result; if it panics, that is an error too. The crate keeps no state between calls that
/// a panic could leave half changed, except in caches behind locks of its own.
pub(super) fn guarded<T, E: std::fmt::Display>(work: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    let failed = |message: String| Error::Invalid(format!("the tokenizer failed: {message}"));
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| failed(error.to_string())),
        Err(panic) => Err(failed(format!("its file does not fit together ({})", text(&*panic)))),
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic")
}

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;

    #[test]
    fn a_template_with_a_token_that_it_does_not_list_is_an_error() {
        let file = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "decoder": null, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}}}"#;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, file).unwrap();
        // Refused when it is read, or when it is used.
        let error =
            Tokenizer::from_file(&path).and_then(|tokenizer| tokenizer.encode("a", true)).unwrap_err().to_string();
        assert!(error.contains("tokenizer"), "{error}");
    }
}
