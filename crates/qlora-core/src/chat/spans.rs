//! Which parts of a rendered conversation are the assistant's answers.

use super::environment::{ANSWER_BEGIN, ANSWER_END, MARKED};
use super::{ChatTemplate, Message, RenderedChat, TemplateArguments};
use crate::error::{Error, Result};

/// By the template's generation blocks, which put marks around the answers.
pub(super) fn by_marks(
    template: &ChatTemplate,
    messages: &[Message],
    arguments: &TemplateArguments,
) -> Result<RenderedChat> {
    let plain = template.render(messages, false, arguments)?;
    if plain.contains([ANSWER_BEGIN, ANSWER_END]) {
        return Err(Error::Invalid("the conversation contains U+FDD0 or U+FDD1, which are not characters".to_owned()));
    }
    let marked = template.render_as(MARKED, messages, false, arguments)?;
    let mut text = String::with_capacity(marked.len());
    let mut answers = Vec::new();
    let mut begin = None;
    for c in marked.chars() {
        match (c, begin) {
            (ANSWER_BEGIN, None) => begin = Some(text.len()),
            (ANSWER_END, Some(start)) => {
                answers.push(start..text.len());
                begin = None;
            }
            (ANSWER_BEGIN | ANSWER_END, _) => {
                return Err(Error::Invalid("the chat template has generation blocks inside each other".to_owned()));
            }
            (c, _) => text.push(c),
        }
    }
    if begin.is_some() || text != plain {
        return Err(Error::Invalid("the chat template changes the text of its generation blocks".to_owned()));
    }
    answers.retain(|answer| !answer.is_empty());
    Ok(RenderedChat { text, answers })
}

/// By prefixes: an answer is what the conversation up to and with it has more than the conversation before it, with the
/// prompt for an answer at its end.
pub(super) fn by_prefixes(
    template: &ChatTemplate,
    messages: &[Message],
    arguments: &TemplateArguments,
) -> Result<RenderedChat> {
    let text = template.render(messages, false, arguments)?;
    let mut answers = Vec::new();
    for (index, message) in messages.iter().enumerate().filter(|(_, message)| message.is_assistant()) {
        let fails = |what: &str| {
            Error::Invalid(format!(
                "the answers cannot be told from the rest: {what} (message {}). Train on single answers, or use a chat template \
                 that marks them with {{% generation %}} and {{% endgeneration %}}",
                index + 1
            ))
        };
        let before = template
            .render(&messages[..index], true, arguments)
            .map_err(|error| fails(&format!("the conversation before an answer cannot be rendered alone ({error})")))?;
        let with = if index + 1 == messages.len() {
            text.clone()
        } else {
            template.render(&messages[..=index], false, arguments)?
        };
        let Some(answer) = with.strip_prefix(&before) else {
            return Err(fails("the chat template writes something else before an answer than its generation prompt"));
        };
        if !text.starts_with(&with) {
            return Err(fails(
                "the chat template changes an answer when messages follow it (some drop the reasoning of earlier answers)",
            ));
        }
        answers.push(before.len()..before.len() + answer_len(answer, message.text()));
    }
    Ok(RenderedChat { text, answers })
}

/// The length of an answer without the white space after the marker that ends its turn. Where no marker is written the
/// white space is what ends the turn.
fn answer_len(answer: &str, content: Option<&str>) -> usize {
    let trimmed = answer.trim_end();
    let content = content.unwrap_or_default().trim();
    let marker = !trimmed.is_empty() && (content.is_empty() || !trimmed.ends_with(content));
    if marker { trimmed.len() } else { answer.len() }
}

#[cfg(test)]
mod tests {
    use super::answer_len;

    #[test]
    fn white_space_after_the_marker_is_no_answer() {
        assert_eq!(answer_len("hi<|im_end|>\n", Some("hi")), 12);
        assert_eq!(answer_len(" hi</s>", Some("hi")), 7);
        assert_eq!(answer_len("hi\n\n", Some("hi")), 4);
        assert_eq!(answer_len("<|im_end|>\n", Some("")), 10);
        assert_eq!(answer_len("", Some("")), 0);
        assert_eq!(answer_len("\n", Some("")), 1);
    }
}
