//! A regular expression over module names, with the meaning it has in PEFT: Python's `re.fullmatch(pattern, name)`.
//!
//! Python's syntax and that of the `regex` crate overlap but differ: `[a&&b]`, `[[:alpha:]]`, `a**`, `\<`, `{,3}`, `\Z`
//! are read differently or by one side only, and `a*+` is possessive in one and a plain repeat in the other. So the
//! pattern is read here with Python 3.11's grammar and written out again in a form that leaves the crate no choice:
//! every literal as a code point, every repeat as one the crate has. An expression without a counterpart in a
//! linear-time engine (lookaround, backreferences, conditionals, atomic groups, possessive repeats) is an error that
//! names it.
//!
//! Not reproduced, as module names are ASCII and not empty: how the two classify characters beyond ASCII (`\w`), and
//! that `\B` does not match the empty string before Python 3.14.

use crate::{Error, Result};
use regex::Regex;

/// A compiled module pattern. Equality is that of the pattern's text.
#[derive(Clone, Debug)]
pub struct ModulePattern {
    source: String,
    regex: Regex,
}

impl ModulePattern {
    /// Compiles a pattern in Python's syntax.
    ///
    /// # Errors
    /// If the pattern is not valid in Python, or uses a feature that has no counterpart here (lookaround and the like).
    pub fn new(pattern: impl Into<String>) -> Result<Self> {
        let source = pattern.into();
        if source.len() > MAX_PATTERN {
            let (start, length): (String, _) = (source.chars().take(60).collect(), source.len());
            return Err(Error::Invalid(format!(
                "the module pattern that begins with {start:?} is {length} bytes long; {MAX_PATTERN} are possible"
            )));
        }
        let translated = Translator::new(&source).run().map_err(|problem| match problem {
            Problem::Invalid { message, at } => {
                Error::Invalid(format!("module pattern {source:?}: {message} at position {at}"))
            }
            Problem::Unsupported(feature) => Error::Unsupported(format!(
                "{feature} in the module pattern {source:?}; list the modules, or leave some out with exclude_modules"
            )),
        })?;
        // The translation is balanced by construction, so the group cannot be closed from inside.
        let regex = Regex::new(&format!(r"\A(?:{translated})\z"))
            .map_err(|error| Error::Invalid(format!("module pattern {source:?}: {error}")))?;
        Ok(Self { source, regex })
    }

    /// The pattern as it was given.
    pub fn as_str(&self) -> &str {
        &self.source
    }

    /// Whether the pattern matches the whole of `module`.
    pub fn matches(&self, module: &str) -> bool {
        self.regex.is_match(module)
    }
}

impl PartialEq for ModulePattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for ModulePattern {}

/// The longest pattern, in bytes: a name of every layer of the largest models fits many times.
const MAX_PATTERN: usize = 1 << 16;

enum Problem {
    Invalid { message: String, at: usize },
    Unsupported(&'static str),
}

type Step<T> = std::result::Result<T, Problem>;

/// The element before the current position, for the rules about repeats.
#[derive(Clone, Copy, PartialEq)]
enum Before {
    /// The start of an alternative.
    Nothing,
    /// Something that can be repeated.
    Item,
    /// `^`, `$`, `\b` and the like.
    Anchor,
    /// A repeat.
    Repeat,
}

/// One member of a character class, or one escape.
#[derive(Clone, Copy)]
enum Atom {
    Char(char),
    /// `\d`, `\W` and the like, by letter.
    Category(char),
}

struct Translator {
    chars: Vec<char>,
    at: usize,
    out: String,
    before: Before,
    /// The number of open groups.
    depth: usize,
    /// Flags for the whole pattern, from `(?i)` at its start.
    global_flags: String,
    /// Whether nothing but flags and comments has been read.
    at_start: bool,
}

impl Translator {
    fn new(pattern: &str) -> Self {
        Self {
            chars: pattern.chars().collect(),
            at: 0,
            out: String::with_capacity(2 * pattern.len()),
            before: Before::Nothing,
            depth: 0,
            global_flags: String::new(),
            at_start: true,
        }
    }

    fn run(mut self) -> Step<String> {
        while let Some(c) = self.next() {
            match c {
                '(' => self.group()?,
                ')' if self.depth == 0 => return self.invalid("unbalanced parenthesis"),
                ')' => {
                    self.depth -= 1;
                    self.push(")", Before::Item);
                }
                '|' => self.push("|", Before::Nothing),
                '^' => self.push("^", Before::Anchor),
                '$' => self.push("$", Before::Anchor),
                '.' => self.push(".", Before::Item),
                '[' => self.class()?,
                '\\' => self.escape()?,
                '*' | '+' | '?' => self.repeat(c.to_string())?,
                '{' => match self.braces()? {
                    Some(repeat) => self.repeat(repeat)?,
                    None => self.literal('{'),
                },
                _ => self.literal(c),
            }
        }
        if self.depth > 0 {
            return self.invalid("missing )");
        }
        Ok(if self.global_flags.is_empty() { self.out } else { format!("(?{}:{})", self.global_flags, self.out) })
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn invalid<T>(&self, message: impl Into<String>) -> Step<T> {
        Err(Problem::Invalid { message: message.into(), at: self.at })
    }

    fn push(&mut self, text: &str, before: Before) {
        self.out.push_str(text);
        self.before = before;
        self.at_start = false;
    }

    fn literal(&mut self, c: char) {
        let text = code_point(c);
        self.push(&text, Before::Item);
    }

    /// After a repeat's text: checks the repeated element and writes the repeat.
    fn repeat(&mut self, repeat: String) -> Step<()> {
        match self.before {
            Before::Nothing | Before::Anchor => return self.invalid("nothing to repeat"),
            Before::Repeat => return self.invalid("multiple repeat"),
            Before::Item => {}
        }
        if self.take('+') {
            return Err(Problem::Unsupported("a possessive repeat"));
        }
        self.take('?'); // Lazy or not, the whole name has to match.
        self.push(&repeat, Before::Repeat);
        Ok(())
    }

    /// After `{`: the repeat if there is one, else nothing is read and the brace is a literal.
    fn braces(&mut self) -> Step<Option<String>> {
        let start = self.at;
        let low = self.digits();
        let high = if self.take(',') { self.digits() } else { low.clone() };
        if !self.take('}') || self.at == start + 1 {
            self.at = start;
            return Ok(None);
        }
        let bound = |text: &str| text.parse::<u32>().ok();
        match (low.as_str(), high.as_str()) {
            ("", "") => Ok(Some("*".to_owned())),
            (_, "") => Ok(Some(format!("{{{low},}}"))),
            ("", _) => Ok(Some(format!("{{0,{high}}}"))),
            _ if bound(&low) > bound(&high) => self.invalid("min repeat greater than max repeat"),
            _ => Ok(Some(format!("{{{low},{high}}}"))),
        }
    }

    fn digits(&mut self) -> String {
        let start = self.at;
        while self.peek().is_some_and(|c| c.is_ascii_digit()) {
            self.at += 1;
        }
        self.chars[start..self.at].iter().collect()
    }

    /// After `(`.
    fn group(&mut self) -> Step<()> {
        if !self.take('?') {
            self.open("(");
            return Ok(());
        }
        let Some(c) = self.next() else { return self.invalid("unexpected end of pattern") };
        match c {
            ':' => self.open("(?:"),
            '#' => while self.next().ok_or(()).or_else(|()| self.invalid("missing ), unterminated comment"))? != ')' {},
            '=' | '!' => return Err(Problem::Unsupported("a lookahead")),
            '<' if matches!(self.peek(), Some('=' | '!')) => return Err(Problem::Unsupported("a lookbehind")),
            '>' => return Err(Problem::Unsupported("an atomic group")),
            '(' => return Err(Problem::Unsupported("a conditional group")),
            'P' if self.take('=') => return Err(Problem::Unsupported("a backreference")),
            'P' if self.take('<') => {
                let start = self.at;
                while self.next().ok_or(()).or_else(|()| self.invalid("missing >, unterminated name"))? != '>' {}
                let name: String = self.chars[start..self.at - 1].iter().collect();
                let mut letters = name.chars();
                let valid = letters.next().is_some_and(|c| c == '_' || c.is_alphabetic());
                if !valid || !letters.all(|c| c == '_' || c.is_alphanumeric()) {
                    return self.invalid(format!("bad group name {name:?}"));
                }
                self.open(&format!("(?P<{name}>"));
            }
            'a' | 'i' | 'L' | 'm' | 's' | 'u' | 'x' | '-' => self.flags(c)?,
            _ => return self.invalid(format!("unknown extension ?{c}")),
        }
        Ok(())
    }

    fn open(&mut self, text: &str) {
        self.depth += 1;
        self.push(text, Before::Nothing);
    }

    /// After `(?` and the first of `aiLmsux-`: flags for the whole pattern, or for a group.
    fn flags(&mut self, first: char) -> Step<()> {
        let (mut on, mut off, mut negative) = (String::new(), String::new(), false);
        let mut c = first;
        loop {
            match c {
                'i' | 'm' | 's' if negative => off.push(c),
                'i' | 'm' | 's' => on.push(c),
                // Unicode matching is the default.
                'u' if !negative => {}
                'a' | 'x' | 'L' => return Err(Problem::Unsupported("an inline flag other than i, m, s, u")),
                '-' if !negative => negative = true,
                ')' if !negative => {
                    if !self.at_start {
                        return self.invalid("global flags not at the start of the expression");
                    }
                    self.global_flags
                        .extend(on.chars().filter(|flag| !self.global_flags.contains(*flag)).collect::<Vec<_>>());
                    return Ok(());
                }
                ':' if negative && off.is_empty() => return self.invalid("missing flag"),
                ':' => break,
                _ => return self.invalid("unknown flag"),
            }
            c = match self.next() {
                Some(c) => c,
                None => return self.invalid("missing :"),
            };
        }
        if on.chars().any(|flag| off.contains(flag)) {
            return self.invalid("flag turned on and off");
        }
        let unique =
            |flags: String| ['i', 'm', 's'].into_iter().filter(|flag| flags.contains(*flag)).collect::<String>();
        let (on, off) = (unique(on), unique(off));
        let text = if off.is_empty() { format!("(?{on}:") } else { format!("(?{on}-{off}:") };
        self.open(&text);
        Ok(())
    }

    /// After a backslash outside a class.
    fn escape(&mut self) -> Step<()> {
        match self.peek() {
            Some('b' | 'B' | 'A') => {
                let text = format!("\\{}", self.chars[self.at]);
                self.at += 1;
                self.push(&text, Before::Anchor);
                return Ok(());
            }
            Some('Z') => {
                self.at += 1;
                self.push(r"\z", Before::Anchor);
                return Ok(());
            }
            Some('1'..='9') if !self.three_octal_digits() => return Err(Problem::Unsupported("a backreference")),
            _ => {}
        }
        match self.escaped(false)? {
            Atom::Char(c) => self.literal(c),
            Atom::Category(c) => self.push(&format!("\\{c}"), Before::Item),
        }
        Ok(())
    }

    fn three_octal_digits(&self) -> bool {
        self.chars.len() >= self.at + 3 && self.chars[self.at..self.at + 3].iter().all(|c| matches!(c, '0'..='7'))
    }

    /// After a backslash: the escapes that mean a character or a category, inside and outside classes.
    fn escaped(&mut self, in_class: bool) -> Step<Atom> {
        let Some(c) = self.next() else { return self.invalid("bad escape (end of pattern)") };
        Ok(match c {
            'd' | 'D' | 's' | 'S' | 'w' | 'W' => Atom::Category(c),
            'a' => Atom::Char('\x07'),
            'b' if in_class => Atom::Char('\x08'),
            'f' => Atom::Char('\x0c'),
            'n' => Atom::Char('\n'),
            'r' => Atom::Char('\r'),
            't' => Atom::Char('\t'),
            'v' => Atom::Char('\x0b'),
            'x' => Atom::Char(self.hexadecimal(2)?),
            'u' => Atom::Char(self.hexadecimal(4)?),
            'U' => Atom::Char(self.hexadecimal(8)?),
            'N' => return Err(Problem::Unsupported("a character by name")),
            '0'..='7' => {
                let mut value = c as u32 - '0' as u32;
                for _ in 0..2 {
                    if let Some(digit @ '0'..='7') = self.peek() {
                        value = 8 * value + (digit as u32 - '0' as u32);
                        self.at += 1;
                    }
                }
                match char::from_u32(value).filter(|_| value <= 0o377) {
                    Some(c) => Atom::Char(c),
                    None => return self.invalid("octal escape value outside of range 0-0o377"),
                }
            }
            _ if c.is_ascii_alphanumeric() => return self.invalid(format!("bad escape \\{c}")),
            _ => Atom::Char(c),
        })
    }

    fn hexadecimal(&mut self, digits: usize) -> Step<char> {
        let text: String = self.chars[self.at..].iter().take(digits).take_while(|c| c.is_ascii_hexdigit()).collect();
        self.at += text.len();
        match u32::from_str_radix(&text, 16).ok().filter(|_| text.len() == digits).and_then(char::from_u32) {
            Some(c) => Ok(c),
            None => self.invalid("incomplete or impossible escape"),
        }
    }

    /// After `[`.
    fn class(&mut self) -> Step<()> {
        let mut text = String::from(if self.take('^') { "[^" } else { "[" });
        let mut first = true;
        loop {
            let low = match self.class_member(first)? {
                None => break,
                Some(atom) => atom,
            };
            first = false;
            if !self.take('-') {
                text.push_str(&class_text(low));
                continue;
            }
            match self.class_member(false)? {
                // A hyphen before the closing bracket is a literal.
                None => {
                    text.push_str(&class_text(low));
                    text.push_str(&code_point('-'));
                    break;
                }
                Some(high) => match (low, high) {
                    (Atom::Char(low), Atom::Char(high)) if low <= high => {
                        text.push_str(&format!("{}-{}", code_point(low), code_point(high)));
                    }
                    _ => return self.invalid("bad character range"),
                },
            }
        }
        text.push(']');
        self.push(&text, Before::Item);
        Ok(())
    }

    /// The next member of a class, or none at the closing bracket, which is a literal in the first place.
    fn class_member(&mut self, first: bool) -> Step<Option<Atom>> {
        match self.next() {
            None => self.invalid("unterminated character set"),
            Some(']') if !first => Ok(None),
            Some('\\') => self.escaped(true).map(Some),
            Some(c) => Ok(Some(Atom::Char(c))),
        }
    }
}

/// A character that stands for itself, wherever it is put.
fn code_point(c: char) -> String {
    if c.is_ascii_alphanumeric() || c == '_' { c.to_string() } else { format!("\\x{{{:X}}}", c as u32) }
}

fn class_text(atom: Atom) -> String {
    match atom {
        Atom::Char(c) => code_point(c),
        Atom::Category(c) => format!("\\{c}"),
    }
}

#[cfg(test)]
mod tests;
