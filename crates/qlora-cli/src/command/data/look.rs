//! A document for the eye.

use std::hash::{DefaultHasher, Hash, Hasher};

use anstream::ColorChoice;
use qlora::trainer::data::encode::EncodeError;
use qlora::trainer::data::{Encoded, TextEncoder};

use crate::output::{FAINT, GOOD};

/// Stands for the tokens of a row's documents.
pub(super) fn hash(documents: &[Encoded]) -> u64 {
    let mut hasher = DefaultHasher::new();
    documents.iter().for_each(|document| document.ids.hash(&mut hasher));
    hasher.finish()
}

/// The text of a document with its trained tokens in green, or between brackets where there are no colours; with
/// `lines`, a line between tokens.
///
/// # Errors
/// If the tokens cannot be decoded.
pub(super) fn text(document: &Encoded, encoder: &dyn TextEncoder, lines: bool) -> Result<String, EncodeError> {
    let colors = anstream::AutoStream::choice(&std::io::stdout()) != ColorChoice::Never;
    let mut text = String::new();
    for (ids, trained) in runs(document) {
        let piece = match lines {
            true => {
                let tokens: Result<Vec<String>, _> = ids.iter().map(|&id| encoder.decode(&[id])).collect();
                tokens?.join(&format!("{FAINT}|{FAINT:#}"))
            }
            false => encoder.decode(ids)?,
        };
        // Some terminals end a colour with the line.
        let styled =
            |piece: &str| piece.split('\n').map(|line| format!("{GOOD}{line}{GOOD:#}")).collect::<Vec<_>>().join("\n");
        match (trained, colors) {
            (false, _) => text.push_str(&piece),
            (true, true) => text.push_str(&styled(&piece)),
            (true, false) => text.push_str(&format!("⟦{piece}⟧")),
        }
    }
    Ok(text)
}

/// Stretches of tokens that are trained or not.
fn runs(document: &Encoded) -> impl Iterator<Item = (&[u32], bool)> {
    let mut start = 0;
    document.trained.chunk_by(|a, b| a == b).map(move |flags| {
        let ids = &document.ids[start..start + flags.len()];
        start += flags.len();
        (ids, flags[0])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_are_told_apart() {
        let document = Encoded { ids: vec![1, 2, 3, 4], trained: vec![false, true, true, false] };
        let all: Vec<_> = runs(&document).collect();
        assert_eq!(all, [(&[1][..], false), (&[2, 3][..], true), (&[4][..], false)]);
        let of = |ids: &[u32]| hash(&[Encoded { ids: ids.to_vec(), trained: vec![true; ids.len()] }]);
        assert_eq!(of(&[1, 2]), of(&[1, 2]));
        assert_ne!(of(&[1, 2]), of(&[2, 1]));
    }
}
