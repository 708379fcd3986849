//! Limits for the filters and methods of templates whose result can be far longer than their arguments, and for the depth of
//! their syntax.
//!
//! A template's instructions are counted, but `'%999999999999d' | format(1)` is one instruction. Here the length of such a
//! result is bounded from above before it is made; [`super::made`] adds up what all steps make.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::environment::MAX_OUTPUT;
use super::python::Str;

/// An error if the result of a filter could be longer than a template may write.
pub(super) fn check(name: &str, value: &Value, arguments: &[Value]) -> Result<(), Error> {
    let bound = match name {
        "format" => format_bound(value.as_str().unwrap_or_default(), arguments),
        "indent" => {
            let lines = value.as_str().unwrap_or_default().split('\n').count();
            length(value).saturating_add(lines.saturating_mul(arguments.iter().map(width).fold(4, usize::max)))
        }
        "join" => {
            let separators = arguments.iter().map(length).fold(0, usize::saturating_add);
            let mut bound = 0usize;
            for item in value.try_iter().into_iter().flatten() {
                bound = bound.saturating_add(length(&item)).saturating_add(separators);
                if bound > MAX_OUTPUT {
                    break;
                }
            }
            bound
        }
        "replace" => match (value.as_str(), arguments) {
            (Some(text), [from, to, ..]) => {
                let count = from.as_str().map_or(0, |from| text.matches(from).count());
                text.len().saturating_add(count.saturating_mul(length(to)))
            }
            _ => 0,
        },
        _ => 0,
    };
    if bound > MAX_OUTPUT {
        let message = format!("{name}: the result could be longer than {MAX_OUTPUT} bytes");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    Ok(())
}

/// Every number in the text may be a width or a precision, every mark may stand for all arguments.
fn format_bound(text: &str, arguments: &[Value]) -> usize {
    let numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = numbers.map(|digits| digits.parse().unwrap_or(usize::MAX)).fold(0, usize::saturating_add);
    let marks = text.matches(['%', '{']).count();
    // A width or precision can be an argument.
    let dynamic = text.contains('*') || text.contains(":{");
    let argument = |value: &Value| length(value).saturating_add(if dynamic { width(value) } else { 0 });
    let arguments = arguments.iter().map(argument).fold(0, usize::saturating_add);
    text.len().saturating_add(widths).saturating_add(marks.saturating_mul(arguments))
}

/// A number, or the one that is called `width`; 0 for anything else.
fn width(value: &Value) -> usize {
    let number = |value: &Value| match value.kind() {
        ValueKind::Number => usize::try_from(value.clone()).unwrap_or(0),
        _ => 0,
    };
    match Kwargs::try_from(value.clone()) {
        Ok(named) => named.peek::<Value>("width").as_ref().map_or(0, number),
        Err(_) => number(value),
    }
}

/// Bytes of a value as text, at most a little more than [`MAX_OUTPUT`].
pub(super) fn length(value: &Value) -> usize {
    match value.as_str() {
        Some(text) => text.len(),
        None => {
            let mut count = Count(0);
            // Not written whole: too long, or nested too deep to be written at all.
            write!(count, "{}", Str(value)).map_or(usize::MAX, |()| count.0)
        }
    }
}

/// Counts the written bytes, up to the limit.
struct Count(usize);

impl fmt::Write for Count {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len();
        if self.0 > MAX_OUTPUT { Err(fmt::Error) } else { Ok(()) }
    }
}

/// A string that refuses to grow past [`MAX_OUTPUT`].
#[derive(Default)]
pub(super) struct LimitedString(pub(super) String);

impl fmt::Write for LimitedString {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > MAX_OUTPUT {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

/// The longest template, in bytes: the largest in use have some 30,000.
const MAX_SOURCE: usize = 1 << 20;
/// Words and signs of one tag, texts in quotes not counted.
const MAX_TOKENS: usize = 4096;
/// Branches of one template.
const MAX_BRANCHES: usize = 1024;

/// Refuses templates whose syntax tree could be deeper than the stack is: the parser of minijinja counts parentheses and
/// blocks, but neither signs before a value nor operators behind each other.
pub(super) fn check_source(source: &str) -> Result<(), Error> {
    let refuse = |message: String| Err(Error::new(ErrorKind::SyntaxError, message));
    if source.len() > MAX_SOURCE {
        return refuse(format!("it is {} bytes long, {MAX_SOURCE} are possible", source.len()));
    }
    let branches = source.matches("elif").count();
    if branches > MAX_BRANCHES {
        return refuse(format!("it has {branches} elif, {MAX_BRANCHES} are possible"));
    }
    let (mut rest, mut line) = (source, 1);
    while let Some(start) = rest.find('{') {
        line += rest[..start].matches('\n').count();
        rest = &rest[start + 1..];
        if !rest.starts_with(['{', '%']) {
            continue;
        }
        let (tokens, length) = tag(rest);
        if tokens > MAX_TOKENS {
            return refuse(format!("the tag on line {line} has {tokens} words and signs, {MAX_TOKENS} are possible"));
        }
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    Ok(())
}

/// The words and signs of a tag that begins here, and its bytes.
fn tag(text: &str) -> (usize, usize) {
    let (mut tokens, mut quote, mut word, mut before) = (0, None, false, ' ');
    for (at, c) in text.char_indices() {
        if let Some(end) = quote {
            if c == end && before != '\\' {
                quote = None;
            }
            // Of two backslashes, the second one is no escape.
            before = if before == '\\' && c == '\\' { ' ' } else { c };
            continue;
        }
        if c == '}' && matches!(before, '}' | '%') {
            return (tokens, at + 1);
        }
        before = c;
        let continues = c.is_alphanumeric() || c == '_';
        tokens += usize::from(!(c.is_whitespace() || continues && word));
        word = continues;
        if matches!(c, '"' | '\'') {
            quote = Some(c);
        }
    }
    (tokens, text.len())
}

#[cfg(test)]
mod tests {
    use super::super::ChatTemplate;
    use super::*;

    fn render(source: &str) -> Result<String, String> {
        let template = ChatTemplate::new(source, []).map_err(|error| error.to_string())?;
        template.render(&[], false, &serde_json::Map::new()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_deepest_templates_that_are_possible_fit_the_stack() {
        let deep = |count: usize| {
            [
                format!("{{{{ {}a }}}}", "not ".repeat(count)),
                format!("{{{{ {}1 }}}}", "-".repeat(count)),
                format!("{{{{ 1{} }}}}", "+1".repeat(count / 2)),
                format!("{{{{ 'a'{} }}}}", "~'b'".repeat(count / 2)),
                format!("{{{{ a{} }}}}", "|default".repeat(count / 2)),
                format!("{{{{ {}1 }}}}", "a if b else ".repeat(count / 4)),
                format!("{{{{ {}1 }}}}", "a or ".repeat(count / 2)),
                format!("{{{{ {}1 }}}}", "2**".repeat(count / 3)),
                format!("{{% if a %}}{}{{% endif %}}", "{% elif b %}".repeat(count / 5)),
            ]
        };
        for source in deep(4000) {
            // Whether it means something is another question.
            let _ = render(&source);
        }
        for source in deep(1 << 18) {
            let error = render(&source).unwrap_err();
            assert!(error.contains("are possible"), "{}: {error}", &source[..20]);
        }
    }

    #[test]
    fn tags_are_found_and_texts_are_no_tokens() {
        assert_eq!(tag("{ a.b + 'c d e }}' }} more"), (5 + 1 + 1, 21));
        assert_eq!(tag(r"{ 'it\'s }} \\' }}").1, 18);
        let long = "word ".repeat(10_000);
        assert_eq!(render(&format!("{{{{ '{long}' }}}}")).unwrap(), long);
        assert_eq!(render(&format!("{long}{{# {long} #}}")).unwrap(), long);
        let error = render(&format!("\n{{{{ 1 }}}}\n{{% if {long} %}}")).unwrap_err();
        assert!(error.contains("line 3"), "{error}");
    }

    #[test]
    fn what_is_short_enough_is_as_without_limits() {
        for (source, expected) in [
            ("{{ '%5d|%.2f' | format(7, 1.5) }}", "    7|1.50"),
            ("{{ '{:>4}'.format('x') }}", "   x"),
            ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
            ("{{ 'a\nb' | indent(width=3, first=true) }}", "   a\n   b"),
            ("{{ ['a', 'b'] | join(', ') }}", "a, b"),
            ("{{ [{'n': 1}, {'n': 2}] | join('-', attribute='n') }}", "1-2"),
            ("{{ ', '.join(['a', 'b']) }}", "a, b"),
            ("{{ 'aXbX' | replace('X', '--') }}", "a--b--"),
            ("{{ 'aXbX'.replace('X', '') }}", "ab"),
            ("{{ [1, 'a', none] | string }}", "[1, 'a', None]"),
        ] {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }
}
