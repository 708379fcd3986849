//! Ollama's Modelfile: a chat template in Go's syntax, the texts that end an answer, a system text.
//!
//! Ollama does not run a model's Jinja template. Most templates do the same thing, though: texts before and after every message, a
//! text before the first one, another where the answer begins. These texts are found by rendering conversations whose messages are
//! recognized again; then [`CONVERSATIONS`] conversations are rendered both ways. Where one differs, there is no Go template, and
//! [`go_template`] says why: an Ollama that asks otherwise than the model was trained gets worse answers without any error.
//!
//! Not expressed: tools, images, reasoning that is passed apart from a message, white space that a template takes from the ends of
//! messages. Where the tokenizer puts a token before every text, Ollama does so too: the template's own is left out.

use std::fmt::Write;

use crate::chat::{ChatTemplate, Message, TemplateArguments};
use crate::tokenizer::Tokenizer;

/// The number of conversations on which a Go template is compared.
pub const CONVERSATIONS: usize = 20;

/// The contents of a Modelfile.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Modelfile {
    /// The model: a file beside it, a name in Ollama's library.
    pub from: String,
    /// An adapter's file.
    pub adapter: Option<String>,
    /// The chat template in Go's syntax.
    pub template: Option<String>,
    /// The system message that every conversation begins with.
    pub system: Option<String>,
    /// Texts that end an answer.
    pub stop: Vec<String>,
    /// Further parameters of generating, by Ollama's names.
    pub parameters: Vec<(String, String)>,
}

impl Modelfile {
    /// Of a model at `from`, with nothing else.
    pub fn new(from: impl Into<String>) -> Self {
        Self { from: from.into(), ..Self::default() }
    }

    /// Its text.
    ///
    /// # Errors
    /// If a text has the three quotes that end texts in a Modelfile.
    pub fn text(&self) -> Result<String, String> {
        let mut out = format!("FROM {}\n", self.from);
        let mut add =
            |line: std::fmt::Arguments<'_>| out.write_fmt(format_args!("{line}\n")).map_err(|e| e.to_string());
        if let Some(adapter) = &self.adapter {
            add(format_args!("ADAPTER {adapter}"))?;
        }
        for (what, text) in [("TEMPLATE", &self.template), ("SYSTEM", &self.system)] {
            let Some(text) = text else { continue };
            if text.contains("\"\"\"") || text.ends_with('"') {
                return Err(format!("the {what} has quotes that a Modelfile takes for its end"));
            }
            add(format_args!("{what} \"\"\"{text}\"\"\""))?;
        }
        for (name, value) in &self.parameters {
            add(format_args!("PARAMETER {name} {value}"))?;
        }
        for stop in self.stop.iter().filter(|stop| !stop.contains(['"', '\n'])) {
            add(format_args!("PARAMETER stop \"{stop}\""))?;
        }
        Ok(out)
    }
}

/// The Go template that asks as a Jinja template does.
///
/// # Errors
/// The reason why there is none, as a sentence about the template.
pub fn go_template(template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<String, String> {
    let begin = begin_token(tokenizer);
    let turns = Turns::of(template)?;
    turns.verify(template)?;
    turns.without_begin(begin.as_deref())?.go()
}

/// The token that the tokenizer, and so Ollama, puts before every text.
pub fn begin_token(tokenizer: &Tokenizer) -> Option<String> {
    let id = tokenizer.bos_token_id()?;
    let adds = tokenizer.encode("a", true).is_ok_and(|ids| ids.first() == Some(&id));
    tokenizer.id_to_token(id).filter(|_| adds)
}

/// The texts around messages.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Turns {
    /// Before the first message, where that is the user's.
    opening: String,
    /// Before and after a system text; none if the template has no place for one.
    system: Option<(String, String)>,
    before_user: String,
    after_user: String,
    before_assistant: String,
    after_assistant: String,
    /// After the last message, where the answer begins.
    generation: String,
}

/// Texts that no template has and none changes.
const MARKS: [&str; 4] = ["Zq0systemqZ", "Zq1userqZ", "Zq2answerqZ", "Zq3questionqZ"];

impl Turns {
    fn of(template: &ChatTemplate) -> Result<Self, String> {
        // That for tools is not expressed.
        if template.source().contains("strftime_now") {
            return Err("it writes today's date, which a Go template cannot".to_owned());
        }
        let [system, user, answer, question] = MARKS;
        let between = |messages: &[Message]| -> Result<Vec<String>, String> {
            let text = render(template, messages)?;
            let mut rest = text.as_str();
            let mut parts = Vec::new();
            for message in messages {
                let mark = message.text().unwrap_or_default();
                let (before, after) = rest.split_once(mark).ok_or("it leaves out or moves a message")?;
                parts.push(before.to_owned());
                rest = after;
            }
            parts.push(rest.to_owned());
            Ok(parts)
        };
        let three = [Message::user(user), Message::assistant(answer), Message::user(question)];
        let [opening, to_answer, to_user, to_generation] = &between(&three)?[..] else {
            return Err("it has no three messages".to_owned());
        };
        let with_system: Option<Vec<String>> = between(&[Message::system(system), Message::user(user)]).ok();
        let with_system = with_system.filter(|parts| parts.len() == 3);

        let after_system = with_system.as_ref().map(|parts| parts[1].as_str());
        // Where every turn ends alike, that is what ends a turn, and what follows begins the next. Otherwise any cut that fits all
        // places does.
        let end = turn_end(to_answer, to_user);
        let before_user = &to_user[end.len()..];
        let alike = to_generation.starts_with(end)
            && opening.ends_with(before_user)
            && after_system.is_none_or(|text| text.ends_with(before_user));
        let (after_user, before_user) = match alike {
            true => (end, before_user),
            false => {
                let suffix = common_suffix(opening, to_user);
                let suffix = after_system.map_or(suffix, |text| common_suffix(suffix, text));
                (common_prefix(to_answer, to_generation), suffix)
            }
        };
        let cut = |text: &str| text[..text.len() - before_user.len()].to_owned();
        Ok(Self {
            opening: cut(opening),
            system: with_system.as_ref().map(|parts| (parts[0].clone(), cut(&parts[1]))),
            before_user: before_user.to_owned(),
            after_user: after_user.to_owned(),
            before_assistant: to_answer[after_user.len()..].to_owned(),
            after_assistant: cut(to_user),
            generation: to_generation[after_user.len()..].to_owned(),
        })
    }

    fn render(&self, messages: &[Message]) -> Option<String> {
        let mut out = String::new();
        let text = |message: &Message| message.text().unwrap_or_default().to_owned();
        let mut rest = messages;
        match (messages.first(), &self.system) {
            (Some(first), Some((before, after))) if first.role == "system" => {
                out += &format!("{before}{}{after}", text(first));
                rest = &messages[1..];
            }
            (Some(first), None) if first.role == "system" => return None,
            _ => out += &self.opening,
        }
        for message in rest {
            let (before, after) = match message.is_assistant() {
                true => (&self.before_assistant, &self.after_assistant),
                false => (&self.before_user, &self.after_user),
            };
            out += &format!("{before}{}{after}", text(message));
        }
        Some(out + &self.generation)
    }

    fn verify(&self, template: &ChatTemplate) -> Result<(), String> {
        for (index, messages) in conversations().iter().enumerate() {
            let Some(ours) = self.render(messages) else { continue };
            let expected = render(template, messages)?;
            if ours != expected {
                let at = ours.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
                let near = |text: &str| -> String {
                    let bytes = &text.as_bytes()[at.saturating_sub(12)..];
                    String::from_utf8_lossy(bytes).chars().take(40).collect()
                };
                return Err(format!(
                    "what it writes around a message is not the same in every conversation: in test conversation {} it writes {:?} where \
                     {:?} would be written",
                    index + 1,
                    near(&expected),
                    near(&ours)
                ));
            }
        }
        Ok(())
    }

    fn without_begin(mut self, begin: Option<&str>) -> Result<Self, String> {
        let Some(begin) = begin else { return Ok(self) };
        let cut = |text: &mut String| match text.strip_prefix(begin) {
            Some(rest) => *text = rest.to_owned(),
            None => {
                tracing::warn!("the chat template does not begin with {begin}, which Ollama puts before every text")
            }
        };
        // An opening that is empty has the token in what follows it.
        if self.opening.is_empty() && self.before_user.starts_with(begin) {
            return Err(format!(
                "it writes {begin} before every message, and the tokenizer puts another before the first"
            ));
        }
        cut(&mut self.opening);
        if let Some((before, _)) = &mut self.system {
            cut(before);
        }
        Ok(self)
    }

    /// The template: of `.Messages`, those of the user and the assistant, with `.System` before them.
    fn go(&self) -> Result<String, String> {
        let Self { before_user, after_user, before_assistant, after_assistant, generation, .. } = self;
        let [opening, before_user, after_user, before_assistant, after_assistant, generation] =
            [&self.opening, before_user, after_user, before_assistant, after_assistant, generation]
                .map(|text| escape(text));
        let opening = match &self.system {
            Some((before, after)) => format!(
                "{{{{ if .System }}}}{}{{{{ .System }}}}{}{{{{ else }}}}{opening}{{{{ end }}}}",
                escape(before),
                escape(after)
            ),
            None => opening,
        };
        Ok(format!(
            "{opening}{{{{ range $i, $_ := .Messages }}}}{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}\
             {{{{ if eq .Role \"user\" }}}}{before_user}{{{{ .Content }}}}{after_user}{{{{ if $last }}}}{generation}{{{{ end }}}}\
             {{{{ else if eq .Role \"assistant\" }}}}{before_assistant}{{{{ .Content }}}}\
             {{{{ if not $last }}}}{after_assistant}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
        ))
    }
}

/// Text as a Go template writes it unchanged.
fn escape(text: &str) -> String {
    text.replace("{{", "{{ \"{{\" }}")
}

fn render(template: &ChatTemplate, messages: &[Message]) -> Result<String, String> {
    template.render(messages, true, &TemplateArguments::new()).map_err(|error| error.to_string())
}

/// The common beginning of two texts between messages, up to where a marker or a line begins.
fn turn_end<'a>(a: &'a str, b: &str) -> &'a str {
    let same = common_prefix(a, b);
    let begins = |at: usize| a[..at].ends_with('\n') || a[at..].starts_with(['<', '[']);
    let at = (0..same.len()).rev().find(|&at| same.is_char_boundary(at) && begins(at)).unwrap_or(0);
    &same[..at]
}

fn common_prefix<'a>(a: &'a str, b: &str) -> &'a str {
    let chars = a.char_indices().zip(b.chars());
    let len = chars.take_while(|((_, a), b)| a == b).last().map_or(0, |((at, c), _)| at + c.len_utf8());
    &a[..len]
}

fn common_suffix<'a>(a: &'a str, b: &str) -> &'a str {
    let chars = a.char_indices().rev().zip(b.chars().rev());
    let at = chars.take_while(|((_, a), b)| a == b).last().map_or(a.len(), |((at, _), _)| at);
    &a[at..]
}

/// Conversations that end with a question: short and long, with a system text and without, with texts that templates or Go could
/// take for something else.
fn conversations() -> Vec<Vec<Message>> {
    const TEXTS: [&str; 8] = [
        "What is 2 + 2?",
        "Write it in two lines:\n\nfirst\n  second",
        "na\u{ef}ve \u{4f60}\u{597d} \u{1f44b}",
        "{{ .System }} {% if x %} {{ x }} {% endif %} }}",
        "\"quotes\" and 'others', <tags>, \\n and \\\\",
        "0",
        "def f(x):\n\treturn x[0] + 1  # [INST] not a turn",
        "A sentence that ends with a colon:",
    ];
    (0..CONVERSATIONS)
        .map(|number| {
            let text = |index: usize| TEXTS[(number * 3 + index) % TEXTS.len()];
            let mut messages = Vec::new();
            if number % 2 == 1 {
                messages.push(Message::system(text(5)));
            }
            for turn in 0..=number / 4 {
                if turn > 0 {
                    messages.push(Message::assistant(text(2 * turn)));
                }
                messages.push(Message::user(text(2 * turn + 1)));
            }
            messages
        })
        .collect()
}

#[cfg(test)]
#[path = "modelfile/tests.rs"]
mod tests;
