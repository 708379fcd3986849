//! Ids of repositories on the Hugging Face hub.

/// The most characters of an id, as the hub has it.
const LONGEST: usize = 96;

/// Whether a name has the form of a repository's id, `owner/name` or `name`: letters, digits, `-`, `_` and `.`, of which neither part
/// begins with a dot or a hyphen. A relative path may have this form too.
pub fn is_hub_id(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let part = |part: &str| !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(plain);
    name.len() <= LONGEST && name.split('/').count() <= 2 && name.split('/').all(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_addresses_are_no_ids() {
        for id in ["gpt2", "HuggingFaceTB/SmolLM2-135M", "a_b/c.d-e"] {
            assert!(is_hub_id(id), "{id}");
        }
        for name in
            ["", "/", "a/", "/a", "./a", "../a", "a/b/c", "-a/b", "a/.b", "a b", "C:\\model", "é/x", "https://x.y"]
        {
            assert!(!is_hub_id(name), "{name:?}");
        }
        assert!(is_hub_id(&"a".repeat(96)) && !is_hub_id(&"a".repeat(97)));
    }
}
