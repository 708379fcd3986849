//! The files of a model that state its terms: licences, notices, terms of use.

/// Whether a file in a model's own folder is its licence, its notice or its terms of use, by its name: `LICENSE`, `LICENCE.txt`,
/// `Llama-3.1-LICENSE.md`, `COPYING`, `NOTICE`, `USE_POLICY.md`.
pub(crate) fn is_licence(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let (stem, end) = name.rsplit_once('.').unwrap_or((&name, ""));
    // `llama-3.1-license` has a dot, but no ending.
    let ending = |end: &str| end.len() <= 11 && end.bytes().all(|b| b.is_ascii_alphabetic());
    let stem = match end {
        "" | "md" | "txt" | "pdf" | "rst" => stem,
        other if ending(other) => return false,
        _ => name.as_str(),
    };
    let words: Vec<&str> = stem.split(['-', '_', ' ']).collect();
    let is = |word: &str| matches!(word, "license" | "licence" | "licenses" | "copying" | "notice" | "notices");
    !name.contains('/') && (words.iter().any(|word| is(word)) || stem.ends_with("use_policy"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_known_by_their_names() {
        for name in [
            "LICENSE",
            "license",
            "LICENSE.md",
            "LICENSE.txt",
            "LICENCE",
            "LICENSE-APACHE",
            "Llama-3.1-LICENSE",
            "LICENSE.pdf",
            "COPYING",
            "NOTICE",
            "Notice.txt",
            "USE_POLICY.md",
            "MODEL_LICENSE",
            "THIRD_PARTY_NOTICES",
        ] {
            assert!(is_licence(name), "{name}");
        }
        for name in [
            "README.md",
            "config.json",
            "original/LICENSE",
            "licensed.bin",
            "license.safetensors",
            "",
            ".",
            "notice.py",
        ] {
            assert!(!is_licence(name), "{name}");
        }
    }
}
