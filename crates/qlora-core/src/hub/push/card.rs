//! The mark of a generated model card: by it a later upload knows the card, and whether a person has edited it.

use sha2::{Digest, Sha256};

use crate::adapter;

const START: &str = "<!-- Written by qlora push (";
const END: &str = "). A later push replaces this card unless it was edited. -->";

/// A generated model card with its mark: a comment at the end, with the digest of the text above it.
pub fn marked_card(text: &str) -> String {
    let text = text.trim_end();
    format!("{text}\n\n{START}{}{END}\n", digest(text))
}

/// Whether a model card is as [`marked_card`] or the save of an adapter wrote it. A card that was edited is not, even if the mark of
/// [`marked_card`] is still there.
pub fn is_generated_card(text: &str) -> bool {
    let Some((above, rest)) = text.rsplit_once(START) else { return adapter::is_generated_card(text) };
    rest.trim_end().strip_suffix(END) == Some(digest(above.trim_end()).as_str())
}

fn digest(text: &str) -> String {
    // The hub may give back other line ends.
    let digest = Sha256::digest(text.replace("\r\n", "\n"));
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edited_card_is_a_person_s() {
        let card = marked_card("---\nlicense: mit\n---\n\n# m\n");
        assert!(card.starts_with("---\nlicense: mit\n---\n\n# m\n\n<!-- "), "{card}");
        assert!(is_generated_card(&card) && is_generated_card(&card.replace('\n', "\r\n")));
        for edited in [card.replace("mit", "other"), format!("{card}more\n"), "# m\n".to_owned(), String::new()] {
            assert!(!is_generated_card(&edited), "{edited}");
        }
    }
}
