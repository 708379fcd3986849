//! Marks around the messages' texts: where each message stands in a rendered conversation.
//!
//! The conversation is rendered a second time with marks in its texts, made of characters that no text contains. If the
//! result without its marks is the plain text, the template did not notice them, and they say where each message went, however the
//! template trims, splits, drops or moves the texts. Marks stand where templates do not look: behind leading and before
//! trailing white space, outside of reasoning tags. A message whose marks change the text anyway gets fewer, or none.

use serde_json::Value;

use super::message::REASONING;
use super::{ChatTemplate, Message, TemplateArguments};

/// Non-characters of Unicode; the first two of their block mark generation blocks.
const OPEN: char = '\u{FDD2}';
const CLOSE: char = '\u{FDD3}';
const DIGIT: u32 = 0xFDD4;
const BASE: usize = 16;
const LAST: char = '\u{FDE4}';

/// Renderings that are spent on finding the messages that cannot be marked.
const ATTEMPTS: usize = 48;

/// One side of a message's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// The message, by its place in the conversation.
    pub(super) message: usize,
    /// The byte of the plain text before which the mark stood.
    pub(super) at: usize,
    /// Whether a text ends here.
    pub(super) closes: bool,
}

/// The placement of a message's sentinels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    /// All its texts, at their ends.
    Edges,
    /// Its content only, at its ends.
    Content,
    /// Its content only, clear of a tag that it begins or ends with.
    Inside,
    /// Not at all.
    Nowhere,
}

/// Whether a text has characters that marks are made of.
pub(super) fn is_marked(text: &str) -> bool {
    text.contains(|c| ('\u{FDD0}'..='\u{FDEF}').contains(&c))
}

/// The text without marks, and the marks. None if marks were cut.
pub(super) fn read(marked: &str) -> Option<(String, Vec<Mark>)> {
    let (mut text, mut marks) = (String::with_capacity(marked.len()), Vec::new());
    let mut chars = marked.chars();
    while let Some(c) = chars.next() {
        match c {
            OPEN | CLOSE => {
                let mut message = 0usize;
                loop {
                    match chars.next()? {
                        LAST => break,
                        digit => {
                            let digit = (digit as u32).checked_sub(DIGIT).filter(|&digit| digit < BASE as u32)?;
                            message = message.checked_mul(BASE)?.checked_add(digit as usize)?;
                        }
                    }
                }
                marks.push(Mark { message, at: text.len(), closes: c == CLOSE });
            }
            '\u{FDD4}'..='\u{FDE4}' => return None,
            c => text.push(c),
        }
    }
    Some((text, marks))
}

/// A message with marks in its texts.
pub(super) fn mark(message: &Message, index: usize, placement: Placement) -> Message {
    let mut marked = message.clone();
    match placement {
        Placement::Nowhere => {}
        Placement::Content => mark_content(&mut marked.content, index, edges),
        Placement::Inside => mark_content(&mut marked.content, index, clear_of_tags),
        Placement::Edges => {
            let mut spoken = false;
            if message.is_assistant() {
                for key in REASONING.into_iter().chain(["tool_plan", "tool_calls", "function_call"]) {
                    if let Some(value) = marked.extra.get_mut(key) {
                        spoken |= mark_values(value, index);
                    }
                }
            }
            match &mut marked.content {
                // Whether a content is empty decides what a call of a tool looks like.
                Value::String(text) if text.trim().is_empty() && spoken => {}
                content => mark_content(content, index, edges),
            }
        }
    }
    marked
}

/// Marks as many messages as the template allows, and where the marks are in `text`, the conversation as it renders.
pub(super) fn place(
    template: &ChatTemplate,
    messages: &[Message],
    arguments: &TemplateArguments,
    text: &str,
) -> (Vec<Placement>, Vec<Mark>) {
    let mut search = Search { template, messages, arguments, text, attempts: ATTEMPTS };
    let mut placements = vec![Placement::Edges; messages.len()];
    let mut candidates: Vec<usize> = (0..messages.len()).collect();
    for next in [Placement::Content, Placement::Inside, Placement::Nowhere] {
        if let Some(marks) = search.attempt(&placements) {
            return search.silent(placements, marks);
        }
        let mut noticed = Vec::new();
        search.noticed(&candidates, &placements, &mut noticed);
        noticed.iter().for_each(|&message| placements[message] = next);
        candidates = noticed;
    }
    match search.attempt(&placements) {
        Some(marks) => search.silent(placements, marks),
        None => (vec![Placement::Nowhere; messages.len()], Vec::new()),
    }
}

struct Search<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Message],
    arguments: &'a TemplateArguments,
    text: &'a str,
    attempts: usize,
}

impl Search<'_> {
    fn attempt(&self, placements: &[Placement]) -> Option<Vec<Mark>> {
        let marked: Vec<_> =
            self.messages.iter().zip(placements).enumerate().map(|(i, (m, &place))| mark(m, i, place)).collect();
        let (text, marks) = read(&self.template.render(&marked, false, self.arguments).ok()?)?;
        (text == self.text).then_some(marks)
    }

    /// Marks the contents of answers too that should have marks and have none: the template leaves out what was marked.
    fn silent(&mut self, placements: Vec<Placement>, marks: Vec<Mark>) -> (Vec<Placement>, Vec<Mark>) {
        let has_mark = |i: usize| marks.iter().any(|mark| mark.message == i);
        let is_silent =
            |i: &usize| placements[*i] == Placement::Edges && self.messages[*i].is_assistant() && !has_mark(*i);
        let silent: Vec<usize> = (0..placements.len()).filter(is_silent).collect();
        if silent.is_empty() {
            return (placements, marks);
        }
        let mut more = placements.clone();
        silent.iter().for_each(|&message| more[message] = Placement::Content);
        let mut noticed = Vec::new();
        self.noticed(&silent, &more, &mut noticed);
        noticed.iter().for_each(|&message| more[message] = Placement::Edges);
        match self.attempt(&more) {
            Some(marks) => (more, marks),
            None => (placements, marks),
        }
    }

    /// Those of `candidates` whose marks change the text, by halving.
    fn noticed(&mut self, candidates: &[usize], placements: &[Placement], noticed: &mut Vec<usize>) {
        if candidates.is_empty() {
            return;
        }
        let Some(left) = self.attempts.checked_sub(1) else { return noticed.extend(candidates) };
        self.attempts = left;
        let mut only = vec![Placement::Nowhere; placements.len()];
        candidates.iter().for_each(|&message| only[message] = placements[message]);
        if self.attempt(&only).is_some() {
            return;
        }
        match candidates {
            [message] => noticed.push(*message),
            _ => {
                let (first, second) = candidates.split_at(candidates.len() / 2);
                self.noticed(first, placements, noticed);
                self.noticed(second, placements, noticed);
            }
        }
    }
}

type Pieces = fn(&str) -> Vec<(usize, usize)>;

fn mark_content(content: &mut Value, index: usize, pieces: Pieces) {
    match content {
        Value::String(text) => *text = marked_text(text, index, &pieces(text)),
        Value::Array(parts) => {
            for part in parts {
                if let Some(Value::String(text)) = part.get_mut("text") {
                    *text = marked_text(text, index, &pieces(text));
                }
            }
        }
        _ => {}
    }
}

/// Marks all texts in a value that are not blank; whether there are some. Kinds and ids are compared by templates.
fn mark_values(value: &mut Value, index: usize) -> bool {
    match value {
        Value::String(text) if text.trim().is_empty() => false,
        Value::String(text) => {
            *text = marked_text(text, index, &edges(text));
            true
        }
        Value::Array(items) => items.iter_mut().fold(false, |any, item| mark_values(item, index) | any),
        Value::Object(map) => map
            .iter_mut()
            .filter(|(key, _)| !matches!(key.as_str(), "type" | "id" | "role"))
            .fold(false, |any, (_, item)| mark_values(item, index) | any),
        _ => false,
    }
}

fn marked_text(text: &str, index: usize, pieces: &[(usize, usize)]) -> String {
    let mut digits = String::new();
    let mut rest = index;
    loop {
        digits.insert(0, char::from_u32(DIGIT + (rest % BASE) as u32).unwrap_or(LAST));
        rest /= BASE;
        if rest == 0 {
            break;
        }
    }
    let (mut marked, mut done) = (String::with_capacity(text.len() + 64), 0);
    for &(start, end) in pieces {
        marked += &text[done..start];
        marked.extend([OPEN]);
        marked += &digits;
        marked.extend([LAST]);
        marked += &text[start..end];
        marked.extend([CLOSE]);
        marked += &digits;
        marked.extend([LAST]);
        done = end;
    }
    marked + &text[done..]
}

/// Tags at which templates split a content, to drop the reasoning of earlier turns.
const REASONING_TAGS: [&str; 6] = ["<think>", "</think>", "<thinking>", "</thinking>", "[THINK]", "[/THINK]"];

/// The byte ranges between reasoning tags, without the white space at their ends; of a blank text its beginning.
fn edges(text: &str) -> Vec<(usize, usize)> {
    let (mut pieces, mut start) = (Vec::new(), 0);
    loop {
        let tag = REASONING_TAGS.iter().filter_map(|tag| Some((start + text[start..].find(tag)?, tag.len()))).min();
        let end = tag.map_or(text.len(), |(at, _)| at);
        let piece = &text[start..end];
        if !piece.trim().is_empty() {
            pieces.push((start + piece.len() - piece.trim_start().len(), start + piece.trim_end().len()));
        }
        match tag {
            Some((at, len)) => start = at + len,
            None => break,
        }
    }
    if pieces.is_empty() {
        let at = if text.trim().is_empty() { 0 } else { text.trim_end().len() };
        pieces.push((at, at));
    }
    pieces
}

/// The text without the tags that it begins and ends with.
fn clear_of_tags(text: &str) -> Vec<(usize, usize)> {
    const LONGEST_TAG: usize = 48;
    let (mut start, mut end) = (0, text.len());
    loop {
        start += text[start..end].len() - text[start..end].trim_start().len();
        let rest = &text[start..end];
        let close = if rest.starts_with('<') { '>' } else { ']' };
        match rest.find(close) {
            Some(at) if rest.starts_with(['<', '[']) && at < LONGEST_TAG => start += at + 1,
            _ => break,
        }
    }
    loop {
        end = start + text[start..end].trim_end().len();
        let rest = &text[start..end];
        let open = if rest.ends_with('>') { '<' } else { '[' };
        match rest.rfind(open) {
            Some(at) if rest.ends_with(['>', ']']) && rest.len() - at <= LONGEST_TAG => end = start + at,
            _ => break,
        }
    }
    if start < end { vec![(start, end)] } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn marks_are_read_back() {
        for index in [0, 1, 15, 16, 4095, 70_000] {
            let marked = marked_text(" ab ", index, &[(1, 2), (2, 3)]);
            let (text, marks) = read(&marked).unwrap();
            let mark = |at, closes| Mark { message: index, at, closes };
            assert_eq!(
                (text.as_str(), marks),
                (" ab ", vec![mark(1, false), mark(2, true), mark(2, false), mark(3, true)])
            );
            // Half a mark is no mark.
            let cut: String = marked.chars().take(3).collect();
            assert_eq!(read(&cut), None);
        }
        assert_eq!(read("a\u{FDD5}"), None);
        assert!(is_marked(&marked_text("", 3, &[(0, 0)])) && !is_marked("a\u{FDCF}\u{FDF0}"));
    }

    #[test]
    fn marks_stand_inside_white_space_and_between_reasoning_tags() {
        let pieces = |text: &'static str| edges(text).into_iter().map(|(a, b)| &text[a..b]).collect::<Vec<_>>();
        assert_eq!(pieces(" a b\n"), ["a b"]);
        assert_eq!(pieces("<think>\n hm \n</think>\n\nA"), ["hm", "A"]);
        assert_eq!(pieces("<think>\n\n</think>\n\nA"), ["A"]);
        assert_eq!(edges(" \n"), [(0, 0)]);
        assert_eq!(edges("<think></think>"), [(15, 15)]);
        let inside = |text: &'static str| clear_of_tags(text).into_iter().map(|(a, b)| &text[a..b]).collect::<Vec<_>>();
        assert_eq!(inside(" <tool_response>\nx < y\n</tool_response>"), ["x < y"]);
        assert_eq!(inside("[a] [b]c"), ["c"]);
        assert_eq!(inside("<a></a>"), Vec::<&str>::new());
        assert_eq!(inside("é"), ["é"]);
    }

    #[test]
    fn kinds_and_ids_of_calls_are_left_alone() {
        let call = json!([{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": "b", "c": 1}}}]);
        let mut message = Message { content: json!(""), ..Message::new("assistant", "") };
        message.extra.insert("tool_calls".to_owned(), call);
        let marked = mark(&message, 0, Placement::Edges);
        let (plain, marks) = read(&serde_json::to_string(&marked).unwrap()).unwrap();
        assert_eq!(plain, serde_json::to_string(&message).unwrap());
        assert_eq!(marks.len(), 4);
        assert_eq!(marked.extra["tool_calls"][0]["type"], "function");
        assert_eq!(marked.content, "");
    }
}
