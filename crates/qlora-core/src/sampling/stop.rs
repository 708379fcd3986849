//! Stop strings in a text that comes in pieces.
//!
//! A stop string may begin in one piece and end in a later one. A text that could be its beginning is held back until
//! the next piece decides, so that no part of a stop string is ever shown.
//!
//! Of several stop strings the one that is complete first wins, and of those that end together the longest. So a text
//! stops at the same place however it is cut into pieces, and never waits for a longer stop string once one is there.
//!
//! A stop string may hold special tokens (`<|eot_id|>`), which are part of the text for it and hidden where the text is shown.

use std::ops::Range;

/// Finds the first stop string of a text that is pushed piece by piece.
#[derive(Clone, Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    /// The byte ranges of `held` that are not shown, ascending.
    hidden: Vec<Range<usize>>,
    found: Option<usize>,
}

impl StopStrings {
    /// Looks for `stops`; empty strings are ignored.
    pub fn new<S: Into<String>>(stops: impl IntoIterator<Item = S>) -> Self {
        let stops = stops.into_iter().map(Into::into).filter(|stop: &String| !stop.is_empty()).collect();
        Self { stops, held: String::new(), hidden: Vec::new(), found: None }
    }

    /// Takes the next piece and returns the text that is certain not to belong to a stop string. Once one was found,
    /// what came before it is returned and everything after it is dropped.
    pub fn push(&mut self, piece: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        self.held.push_str(piece);
        self.search()
    }

    /// As [`StopStrings::push`], for a piece that is not shown: the text of a special token.
    pub fn push_hidden(&mut self, piece: &str) -> String {
        if self.found.is_some() {
            return String::new();
        }
        self.hidden.push(self.held.len()..self.held.len() + piece.len());
        self.held.push_str(piece);
        self.search()
    }

    fn search(&mut self) -> String {
        let found = |i: usize| self.held.find(&self.stops[i]).map(|at| (at + self.stops[i].len(), at, i));
        if let Some((_, at, stop)) = (0..self.stops.len()).filter_map(found).min() {
            self.found = Some(stop);
            let before = self.release(at);
            self.held.clear();
            self.hidden.clear();
            return before;
        }
        let may_begin = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(may_begin).unwrap_or(self.held.len());
        self.release(keep)
    }

    /// Takes the first `len` bytes off the held text, and returns the part of them that is shown.
    fn release(&mut self, len: usize) -> String {
        let rest = self.held.split_off(len);
        let text = std::mem::replace(&mut self.held, rest);
        let mut shown = String::with_capacity(text.len());
        let mut at = 0;
        for hidden in &self.hidden {
            shown.push_str(&text[at.min(len)..hidden.start.min(len)]);
            at = hidden.end;
        }
        shown.push_str(&text[at.min(len)..]);
        self.hidden.retain(|hidden| hidden.end > len);
        for hidden in &mut self.hidden {
            *hidden = hidden.start.saturating_sub(len)..hidden.end - len;
        }
        shown
    }

    /// The stop string that was found, if one was.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|i| self.stops[i].as_str())
    }

    /// At the end of the text: the held text, which turned out to be no stop string.
    pub fn finish(&mut self) -> String {
        self.release(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut finder = StopStrings::new(stops.iter().copied());
        let mut text: String = pieces.iter().map(|piece| finder.push(piece)).collect();
        text += &finder.finish();
        (text, finder.found().map(str::to_owned))
    }

    #[test]
    fn a_stop_string_across_pieces_is_found_and_not_shown() {
        assert_eq!(run(&["\n\nUser:"], &["Hi.\n", "\nUs", "er: more"]), ("Hi.".into(), Some("\n\nUser:".into())));
        assert_eq!(run(&["###"], &["a#", "#b", "##", "#c"]), ("a##b".into(), Some("###".into())));
        assert_eq!(run(&["END"], &["an E", "N"]), ("an EN".into(), None));
        assert_eq!(run(&[], &["a", "b"]), ("ab".into(), None));
        // Of two that end together the longest wins, otherwise the one that is complete first.
        assert_eq!(run(&["cd", "abcd"], &["xab", "cd"]), ("x".into(), Some("abcd".into())));
        assert_eq!(run(&["bc", "abcd"], &["xab", "cd"]), ("xa".into(), Some("bc".into())));
        assert_eq!(run(&["bc", "abcd"], &["xabcd"]), ("xa".into(), Some("bc".into())));
    }

    #[test]
    fn only_a_possible_beginning_is_held_back() {
        let mut finder = StopStrings::new(["<end>"]);
        assert_eq!(finder.push("text <e"), "text ");
        assert_eq!(finder.push("x \u{e9}<"), "<ex \u{e9}");
        assert_eq!(finder.push("end>tail"), "");
        assert_eq!((finder.push("more"), finder.finish()), (String::new(), String::new()));
        assert_eq!(finder.found(), Some("<end>"));
    }

    #[test]
    fn special_tokens_stop_and_are_not_shown() {
        let mut finder = StopStrings::new(["<|end|>"]);
        assert_eq!((finder.push("text"), finder.push_hidden("<|x|>")), ("text".into(), "".into()));
        assert_eq!(finder.push(" more"), " more");
        assert_eq!((finder.push_hidden("<|end|>"), finder.push("tail")), ("".into(), "".into()));
        assert_eq!(finder.found(), Some("<|end|>"));
        // Half of the stop string is text; what turns out to be none is shown, but for the hidden part of it.
        let mut finder = StopStrings::new(["!<|end|>\nA"]);
        assert_eq!(finder.push("a!"), "a");
        assert_eq!((finder.push_hidden("<|end|>"), finder.push("\n")), ("".into(), "".into()));
        assert_eq!(finder.push("B"), "!\nB");
        assert_eq!((finder.push("!"), finder.push_hidden("<|end|>")), ("".into(), "".into()));
        assert_eq!(finder.push("\nAB"), "");
        assert!(finder.found().is_some());
        // The text ends in the middle of it.
        let mut finder = StopStrings::new(["\u{e9}<|end|>x"]);
        assert_eq!((finder.push("a\u{e9}"), finder.push_hidden("<|end|>")), ("a".into(), "".into()));
        assert_eq!(finder.finish(), "\u{e9}");
    }

    proptest! {
        #[test]
        fn pieces_give_what_the_whole_text_gives(
            stops in prop::collection::vec("[ab\u{e9}]{1,4}", 0..3),
            pieces in prop::collection::vec("[ab\u{e9}]{0,5}", 0..8),
        ) {
            let whole = pieces.concat();
            let cut = stops.iter().filter_map(|stop| whole.find(stop).map(|at| (at + stop.len(), at))).min();
            let cut = cut.map(|(_, at)| at);
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let (text, found) = run(&stops, &pieces);
            prop_assert_eq!(&text, &whole[..cut.unwrap_or(whole.len())]);
            prop_assert_eq!(found.is_some(), cut.is_some());
        }
    }
}
