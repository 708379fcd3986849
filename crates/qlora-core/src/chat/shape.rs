//! The text that a template writes around the assistant's answers, learned from rendered conversations.

use super::message::REASONING;
use super::sentinel::{self, Mark, Placement};
use super::{ChatTemplate, Message, TemplateArguments};

/// A conversation with its rendering, and what was learned about the template from it.
pub(super) struct Shape<'a> {
    pub(super) template: &'a ChatTemplate,
    pub(super) messages: &'a [Message],
    pub(super) arguments: &'a TemplateArguments,
    pub(super) text: &'a str,
    pub(super) placements: Vec<Placement>,
    pub(super) marks: Vec<Mark>,
    // By the role of the message before.
    heads: Vec<(Option<&'a str>, Option<Head>)>,
    general_prompt: Option<String>,
    end: Option<End>,
}

/// The text between a message and the answer to it: the header of the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    /// All of it.
    pub(super) all: String,
    /// The part that `add_generation_prompt` adds; empty if it adds nothing.
    pub(super) prompt: String,
}

/// The text behind an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct End {
    /// The marker that ends a turn, whatever follows; empty if there is none.
    pub(super) marker: String,
    /// The white space that ends a turn where there is no marker.
    pub(super) blank: String,
}

/// A text that stands for any.
const ANY: &str = "x";

impl<'a> Shape<'a> {
    pub(super) fn new(
        template: &'a ChatTemplate,
        messages: &'a [Message],
        arguments: &'a TemplateArguments,
        text: &'a str,
    ) -> Self {
        let (placements, marks) = if sentinel::is_marked(text) {
            (vec![Placement::Nowhere; messages.len()], Vec::new())
        } else {
            sentinel::place(template, messages, arguments, text)
        };
        let (heads, general_prompt, end) = (Vec::new(), None, None);
        Self { template, messages, arguments, text, placements, marks, heads, general_prompt, end }
    }

    /// The header of answer `i`; none if the conversation up to there cannot be rendered alone.
    pub(super) fn head(&mut self, i: usize) -> Option<Head> {
        let role = self.role_before(i);
        if let Some((_, head)) = self.heads.iter().find(|(known, _)| *known == role) {
            return head.clone();
        }
        // The last place of that kind: templates treat the end of a conversation as generation does.
        let places = (0..self.messages.len()).rev();
        let last = places.filter(|&at| self.messages[at].is_assistant()).find(|&at| self.role_before(at) == role);
        let head = self.learn_head(self.marked(last.unwrap_or(i)));
        self.heads.push((role, head.clone()));
        head
    }

    /// The generation prompt: of this place, else of any question.
    pub(super) fn prompt(&mut self, i: usize) -> String {
        if let Some(head) = self.head(i) {
            return head.prompt;
        }
        if self.general_prompt.is_none() {
            let mut places = 0..self.messages.len();
            let asked = places.find(|&at| self.messages[at].is_assistant() && self.role_before(at) == Some("user"));
            let head = asked.and_then(|at| self.head(at));
            let head = head.or_else(|| self.learn_head(vec![any("user", 0)]));
            self.general_prompt = Some(head.unwrap_or_default().prompt);
        }
        self.general_prompt.clone().unwrap_or_default()
    }

    /// The text that ends an answer, learned at the first call.
    pub(super) fn end(&mut self) -> End {
        if self.end.is_none() {
            self.end = Some(self.learn_end().unwrap_or_default());
        }
        self.end.clone().unwrap_or_default()
    }

    /// The white space at the end of a message's content.
    pub(super) fn white_space_behind(&self, i: usize) -> &'a str {
        let text = self.messages[i].text().unwrap_or_default();
        &text[text.trim_end().len()..]
    }

    fn role_before(&self, i: usize) -> Option<&'a str> {
        i.checked_sub(1).map(|before| self.messages[before].role.as_str())
    }

    /// The first `count` messages, marked.
    fn marked(&self, count: usize) -> Vec<Message> {
        let messages = self.messages.iter().zip(&self.placements).take(count).enumerate();
        messages.map(|(i, (message, &placement))| sentinel::mark(message, i, placement)).collect()
    }

    /// The text behind the last mark.
    fn tail(&self, marked: &[Message], add_generation_prompt: bool) -> Option<String> {
        let (text, marks) = sentinel::read(&self.template.render(marked, add_generation_prompt, self.arguments).ok()?)?;
        Some(text[marks.last().map_or(0, |mark| mark.at)..].to_owned())
    }

    /// The text before the last message, back to the mark before.
    fn gap(&self, marked: &[Message]) -> Option<String> {
        let (text, marks) = sentinel::read(&self.template.render(marked, false, self.arguments).ok()?)?;
        let at = marks.iter().position(|mark| mark.message + 1 == marked.len())?;
        let before = at.checked_sub(1).map_or(0, |before| marks[before].at);
        Some(text[before..marks[at].at].to_owned())
    }

    /// The text behind message `i`, up to the next mark.
    fn behind(&self, marked: &[Message], i: usize) -> Option<String> {
        let (text, marks) = sentinel::read(&self.template.render(marked, false, self.arguments).ok()?)?;
        between(&text, &marks, i)
    }

    fn learn_head(&self, before: Vec<Message>) -> Option<Head> {
        let asked = self.tail(&before, true)?;
        let unasked = self.tail(&before, false);
        if unasked.as_ref() != Some(&asked) {
            let shared = common(&asked, &unasked.unwrap_or_default());
            return Some(Head { prompt: asked[shared..].to_owned(), all: asked });
        }
        // Nothing is added: either the answer follows at once, or the template writes a header together with it.
        let mut answered = before;
        answered.push(any("assistant", answered.len()));
        let written = self.gap(&answered)?;
        let at_once = written.strip_prefix(&asked).is_some_and(|rest| rest.trim().is_empty());
        Some(Head { all: if at_once { asked } else { written }, prompt: String::new() })
    }

    fn learn_end(&self) -> Option<End> {
        let conversation = |turns: &[&str]| turns.iter().enumerate().map(|(i, role)| any(role, i)).collect::<Vec<_>>();
        // Behind an answer that ends the conversation, and behind one that does not.
        let (closing, own) = self.closing(&conversation)?;
        let count = self.messages.len();
        let followed = (0..count).find_map(|i| self.followed(i)).or_else(|| {
            let mut marked = self.marked(count);
            marked.push(any("user", count));
            self.messages.last().filter(|last| is_plain(last)).and_then(|_| self.behind(&marked, count - 1))
        });
        let made_up = || self.behind(&conversation(&["user", "assistant", "user"]), 1);
        if closing.trim().is_empty() {
            let blank = closing.strip_prefix(own).unwrap_or(&closing).to_owned();
            return Some(End { marker: String::new(), blank });
        }
        let mut marker = shared_marker(&closing, followed.or_else(made_up).as_deref());
        if marker.is_empty()
            && let (Some(closing), Some(followed)) =
                (self.tail(&conversation(&["user", "assistant"]), false), made_up())
        {
            marker = shared_marker(&closing, Some(&followed));
        }
        Some(End { marker, blank: String::new() })
    }

    /// The text behind an answer without calls that ends a conversation, and the white space at that answer's own end.
    fn closing(&self, conversation: &dyn Fn(&[&str]) -> Vec<Message>) -> Option<(String, &'a str)> {
        let answers: Vec<usize> = (0..self.messages.len()).filter(|&i| self.messages[i].is_assistant()).collect();
        if let Some(&last) = answers.iter().rev().find(|&&i| self.is_usable(i)) {
            let own = self.white_space_behind(last);
            let tail = match self.marks.last() {
                Some(mark) if last + 1 == self.messages.len() && mark.message == last && mark.closes => {
                    Some(self.text[mark.at..].to_owned())
                }
                _ => self.tail(&self.marked(last + 1), false),
            };
            if let Some(tail) = tail {
                return Some((tail, own));
            }
        }
        let mut marked = self.marked(answers.last().copied().unwrap_or(0));
        marked.push(any("assistant", marked.len()));
        let tail = self.tail(&marked, false);
        Some((tail.or_else(|| self.tail(&conversation(&["user", "assistant"]), false))?, ""))
    }

    /// The text behind an answer without calls, if another message's follows.
    fn followed(&self, i: usize) -> Option<String> {
        self.is_usable(i).then(|| between(self.text, &self.marks, i)).flatten()
    }

    /// Whether the text behind an answer ends it: a part of the answer's own does not.
    fn is_usable(&self, i: usize) -> bool {
        is_plain(&self.messages[i]) && matches!(self.placements[i], Placement::Edges | Placement::Content)
    }
}

/// The text from the end of message `i` to the next mark.
fn between(text: &str, marks: &[Mark], i: usize) -> Option<String> {
    let last = marks.iter().rposition(|mark| mark.message == i).filter(|&at| marks[at].closes)?;
    Some(text[marks[last].at..marks.get(last + 1)?.at].to_owned())
}

/// An answer that ends with its content: without calls, and not empty behind its reasoning.
fn is_plain(message: &Message) -> bool {
    let has = |keys: &[&str]| keys.iter().any(|key| message.extra.get(*key).is_some_and(|value| !value.is_null()));
    let is_blank = message.text().is_some_and(|text| text.trim().is_empty());
    message.is_assistant() && !has(&["tool_calls", "function_call"]) && !(is_blank && has(&REASONING))
}

/// The common beginning of both texts that end an answer, without white space around it.
fn shared_marker(closing: &str, followed: Option<&str>) -> String {
    let closing = closing.trim_start();
    let shared = followed.map_or(closing.len(), |followed| common(closing, followed.trim_start()));
    closing[..shared].trim_end().to_owned()
}

fn any(role: &str, index: usize) -> Message {
    sentinel::mark(&Message::new(role, ANY), index, Placement::Edges)
}

/// The length of two texts' common beginning, back to where a tag or a line ends.
fn common(a: &str, b: &str) -> usize {
    let shared = a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
    if shared == a.len() || shared == b.len() {
        return shared;
    }
    a[..shared].rfind(['>', ']', '\n']).map_or(0, |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::common;

    #[test]
    fn texts_part_where_a_tag_ends() {
        assert_eq!(common("<|end|>\n<|user|>", "<|end|>\n<|endoftext|>"), 8);
        assert_eq!(common("</s>", "</s><s>[INST]"), 4);
        assert_eq!(common("<eos>", "<end>"), 0);
        assert_eq!(common("é$", "é$ü"), 3);
    }
}
