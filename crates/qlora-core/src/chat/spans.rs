//! The spans of the assistant's answers in a rendered conversation.
//!
//! An answer begins where generation would begin: behind the header of its turn. It ends with the marker that ends the turn. Both
//! are found in the text of the whole conversation, since templates write a turn differently once others follow it.

use std::ops::Range;

use super::environment::{ANSWER_BEGIN, ANSWER_END, MARKED};
use super::sentinel;
use super::shape::{End, Shape};
use super::{AnswerSpan, ChatTemplate, Message, RenderedChat, TemplateArguments};
use crate::error::{Error, Result};

/// By the template's generation blocks, which put marks around the answers.
pub(super) fn by_marks(
    template: &ChatTemplate,
    messages: &[Message],
    arguments: &TemplateArguments,
) -> Result<RenderedChat> {
    let text = template.render(messages, false, arguments)?;
    if text.contains([ANSWER_BEGIN, ANSWER_END]) {
        return Err(Error::Invalid("the conversation contains U+FDD0 or U+FDD1, which are not characters".to_owned()));
    }
    let (plain, blocks) = split_marked(&template.render_as(MARKED, messages, false, arguments)?)?;
    if plain != text {
        return Err(Error::Invalid("the chat template changes the text of its generation blocks".to_owned()));
    }
    let speakers: Vec<usize> = (0..messages.len()).filter(|&i| messages[i].is_assistant()).collect();
    let owners = if blocks.len() == speakers.len() {
        speakers.clone()
    } else {
        owners(template, messages, arguments, &text, &blocks, &speakers)
    };
    let not_found = speakers.into_iter().filter(|speaker| !owners.contains(speaker)).collect();
    let answers = owners.into_iter().zip(blocks).map(|(message, span)| AnswerSpan { message, span });
    Ok(RenderedChat { answers: answers.filter(|answer| !answer.span.is_empty()).collect(), not_found, text })
}

/// The text without the marks of generation blocks, and the blocks.
fn split_marked(marked: &str) -> Result<(String, Vec<Range<usize>>)> {
    let (mut text, mut blocks, mut begin) = (String::with_capacity(marked.len()), Vec::new(), None);
    for c in marked.chars() {
        match (c, begin) {
            (ANSWER_BEGIN, None) => begin = Some(text.len()),
            (ANSWER_END, Some(start)) => {
                blocks.push(start..text.len());
                begin = None;
            }
            (ANSWER_BEGIN | ANSWER_END, _) => {
                return Err(Error::Invalid("the chat template has generation blocks inside each other".to_owned()));
            }
            (c, _) => text.push(c),
        }
    }
    if begin.is_some() {
        return Err(Error::Invalid("the chat template changes the text of its generation blocks".to_owned()));
    }
    Ok((text, blocks))
}

/// The answer to which each generation block belongs, where there is not one for each answer: the answer in it, else
/// the one before it.
fn owners(
    template: &ChatTemplate,
    messages: &[Message],
    arguments: &TemplateArguments,
    text: &str,
    blocks: &[Range<usize>],
    speakers: &[usize],
) -> Vec<usize> {
    let (_, marks) = sentinel::place(template, messages, arguments, text);
    let said = |mark: &&sentinel::Mark| messages[mark.message].is_assistant();
    let owner = |block: &Range<usize>| {
        let inside = marks.iter().filter(said).find(|mark| block.contains(&mark.at) || block.end == mark.at);
        let before = || marks.iter().filter(said).rev().find(|mark| mark.at <= block.end);
        inside.or_else(before).map(|mark| mark.message).or(speakers.first().copied()).unwrap_or(0)
    };
    blocks.iter().map(owner).collect()
}

/// By marks in the messages' texts, and where the template lets no marks through, by comparing the conversation with its
/// beginnings.
pub(super) fn by_sentinels(
    template: &ChatTemplate,
    messages: &[Message],
    arguments: &TemplateArguments,
) -> Result<RenderedChat> {
    let text = template.render(messages, false, arguments)?;
    let (mut answers, mut not_found): (Vec<AnswerSpan>, Vec<usize>) = (Vec::new(), Vec::new());
    let mut shape = None;
    for message in (0..messages.len()).filter(|&i| messages[i].is_assistant()) {
        let shape = shape.get_or_insert_with(|| Shape::new(template, messages, arguments, &text));
        let behind = answers.last().map_or(0, |answer| answer.span.end);
        match answer(shape, message).filter(|span| span.start >= behind) {
            Some(span) if span.is_empty() => {}
            Some(span) => answers.push(AnswerSpan { message, span }),
            None => not_found.push(message),
        }
    }
    drop(shape);
    Ok(RenderedChat { text, answers, not_found })
}

fn answer(shape: &mut Shape<'_>, i: usize) -> Option<Range<usize>> {
    let marks = &shape.marks;
    let own = |mark: &sentinel::Mark| mark.message == i;
    let (lowest, highest) = (marks.iter().position(own), marks.iter().rposition(own));
    let whole = match (lowest, highest) {
        // Another message's text inside this one's: the template mixes them.
        (Some(low), Some(high)) if !marks[low..=high].iter().all(own) => return by_prefix(shape, i),
        (Some(low), Some(high)) => !marks[low].closes && marks[high].closes,
        _ => false,
    };
    if !whole && let Some(span) = by_prefix(shape, i) {
        return Some(span);
    }
    let marks = &shape.marks;
    let first = lowest.map(|at| marks[at]).filter(|mark| !mark.closes).map(|mark| mark.at);
    let last = highest.map(|at| marks[at]).filter(|mark| mark.closes).map(|mark| mark.at);
    let before = lowest.or_else(|| marks.iter().position(|mark| mark.message > i)).unwrap_or(marks.len());
    let behind = highest.or_else(|| marks.iter().rposition(|mark| mark.message < i)).map_or(0, |at| at + 1);
    let from = before.checked_sub(1).map_or(0, |at| marks[at].at);
    let to = marks.get(behind).map_or(shape.text.len(), |mark| mark.at);
    // Otherwise the next message's text may stand before the next mark.
    let is_followed = i + 1 == shape.messages.len() || marks.iter().any(|mark| mark.message == i + 1);
    let start = start(shape, i, from..first.or(last).unwrap_or(to), first)?;
    let end = end(shape, i, last, start, to, is_followed)?;
    (start <= end && last.is_none_or(|last| last <= end)).then_some(start..end)
}

/// Finds the start of an answer in the text between the message before and its own; `first` is where its own begins, if
/// known.
fn start(shape: &mut Shape<'_>, i: usize, gap: Range<usize>, first: Option<usize>) -> Option<usize> {
    let between = shape.text.get(gap.clone())?;
    let ends_clean = i.checked_sub(1).is_none_or(|before| shape.white_space_behind(before).is_empty());
    if let Some(head) = shape.head(i)
        && (ends_clean || !head.all.trim().is_empty())
        && let Some(at) = behind(between, &head.all)
    {
        return Some(gap.start + at);
    }
    let prompt = shape.prompt(i);
    if !prompt.trim().is_empty() {
        let found = if first.is_some() { between.rfind(&prompt) } else { between.find(&prompt) };
        if let Some(at) = found {
            return Some(gap.start + at + prompt.len());
        }
        if let Some(at) = first.and_then(|_| behind_part(between, &prompt)) {
            return Some(gap.start + at);
        }
    }
    first
}

/// The end of `head` at the beginning of a text, whose white space may differ from the head's.
fn behind(text: &str, head: &str) -> Option<usize> {
    let (rest, trimmed) = (text.trim_start(), head.trim_start());
    if trimmed.is_empty() {
        return text.starts_with(head).then_some(head.len());
    }
    rest.starts_with(trimmed).then(|| text.len() - rest.len() + trimmed.len())
}

/// The end of the longest beginning of the prompt that a text has: some prompts go on with a block of reasoning, which
/// written answers lack.
fn behind_part(text: &str, prompt: &str) -> Option<usize> {
    const NAMES: [&str; 4] = ["assistant", "model", "bot", "gpt"];
    let names = |part: &str| NAMES.iter().any(|name| part.to_ascii_lowercase().contains(name));
    let ends = prompt.char_indices().rev().map(|(at, c)| at + c.len_utf8());
    ends.filter(|&end| prompt[..end].ends_with(['>', ']', '\n', ':'])).find_map(|end| {
        let part = &prompt[..end];
        let at = text.rfind(part)? + end;
        // The rest belongs to the answer only if the header is complete.
        (names(part) || text[at..].trim().is_empty()).then_some(at)
    })
}

/// Finds the end of an answer; `last` is where its own text ends, if known, `to` where the next message's begins.
fn end(
    shape: &mut Shape<'_>,
    i: usize,
    last: Option<usize>,
    start: usize,
    to: usize,
    is_followed: bool,
) -> Option<usize> {
    let End { marker, blank } = shape.end();
    let from = last.unwrap_or(start);
    let rest = shape.text.get(from..to)?;
    if !marker.is_empty() {
        if let Some(at) = behind(rest, &marker).filter(|_| last.is_some() || shape.messages[i].text() == Some("")) {
            return Some(from + at);
        }
        if let Some(at) = rest.find(&marker).filter(|_| is_followed) {
            return Some(from + at + marker.len());
        }
    }
    if i + 1 == shape.messages.len() {
        return Some(from + closing_len(rest));
    }
    let own = shape.white_space_behind(i);
    let blanks = [format!("{own}{blank}"), blank, own.to_owned()];
    last.map(|last| last + blanks.iter().find(|blank| rest.starts_with(*blank)).map_or(0, String::len))
}

/// Without the white space behind what closes a conversation; white space alone closes it too.
fn closing_len(rest: &str) -> usize {
    let trimmed = rest.trim_end();
    if trimmed.is_empty() { rest.len() } else { trimmed.len() }
}

/// An answer is what the conversation up to and with it has more than the conversation before it, with the prompt for an
/// answer at its end.
fn by_prefix(shape: &mut Shape<'_>, i: usize) -> Option<Range<usize>> {
    let (template, messages, arguments) = (shape.template, shape.messages, shape.arguments);
    let render = |count: usize, ask: bool| template.render(&messages[..count], ask, arguments).ok();
    let before = render(i, true)?;
    let with = if i + 1 == messages.len() { shape.text.to_owned() } else { render(i + 1, false)? };
    let answer = with.strip_prefix(&before).filter(|_| shape.text.starts_with(&with))?;
    let content = messages[i].text().unwrap_or_default().trim();
    // Where nothing asks for an answer, what comes before its text may be the turn's header.
    if render(i, false)? == before && (content.is_empty() || !answer.trim_start().starts_with(content)) {
        return None;
    }
    Some(before.len()..before.len() + answer_len(answer, content, &shape.end().marker))
}

/// The length of an answer without the white space after the marker that ends its turn. Where no marker is written the
/// white space is what ends the turn.
fn answer_len(answer: &str, content: &str, marker: &str) -> usize {
    let trimmed = answer.trim_end();
    let is_marked = !marker.is_empty() && trimmed.ends_with(marker);
    let is_marked = is_marked || !trimmed.is_empty() && (content.is_empty() || !trimmed.ends_with(content));
    if is_marked { trimmed.len() } else { answer.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn white_space_after_the_marker_is_no_answer() {
        assert_eq!(answer_len("hi<|im_end|>\n", "hi", ""), 12);
        assert_eq!(answer_len(" hi</s>", "hi", ""), 7);
        assert_eq!(answer_len("hi\n\n", "hi", ""), 4);
        assert_eq!(answer_len("<|im_end|>\n", "", ""), 10);
        assert_eq!(answer_len("", "", ""), 0);
        assert_eq!(answer_len("\n", "", ""), 1);
        assert_eq!(answer_len("1: ><end>\n", ">", "<end>"), 9);
    }

    #[test]
    fn headers_are_found_with_other_white_space_and_in_part() {
        assert_eq!(behind(" <e>\n<a>\nrest", "<e>\n<a>\n"), Some(9));
        assert_eq!(behind("\nrest", "\n"), Some(1));
        assert_eq!(behind("rest", "\n"), None);
        assert_eq!(behind_part("<u>x<assistant>", "<assistant><think>\n"), Some(15));
        assert_eq!(behind_part("<turn>other\n", "<turn>assistant\n"), None);
        assert_eq!(behind_part("<turn>", "<turn>x\n"), Some(6));
    }
}
