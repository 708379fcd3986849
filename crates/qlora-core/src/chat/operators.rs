//! Marks the operands of a template's operators.
//!
//! minijinja computes `a ~ b` itself, without asking anyone how long the result may be. So before a template is compiled, the
//! operands of `~`, `+` and `*` and what is sliced get a filter, which counts (see [`super::made`]): `a ~ b` becomes
//! `(a)|__text ~ (b)|__text`. The filters hand their value on as it is, and only whole operands get one, so that nothing else
//! changes. Filters and not functions, because a template cannot put anything of its own in a filter's place.

use super::made::{FACTOR, KEY, OPERAND, OVER, PRODUCT, TEXT, TIMES};

/// A template with its operands marked.
pub(super) struct Marked {
    pub(super) source: String,
    /// The longest plain text inside of blocks whose text is kept (`set` blocks, macros and the like): writing such texts is
    /// not counted.
    pub(super) longest_kept: usize,
}

/// Longest text in quotes that is not worth a mark.
const SHORT: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Name,
    Number,
    Text,
    Open,
    Close,
    /// One of `+ - ~ * / %`, with `D` for `//` and `P` for `**`.
    Math(char),
    Dot,
    Pipe,
    /// A token that ends an expression: comparisons, `,`, `:`, `=`.
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    kind: Kind,
    start: usize,
    end: usize,
}

/// Marks a template. A part that cannot be read is left as it is: compiling it fails with the right message.
pub(super) fn mark(source: &str) -> Marked {
    let mut marks = Marks { source, inserted: Vec::new() };
    let (mut at, mut kept_blocks, mut longest_kept, mut recursive) = (0, 0usize, 0, false);
    let mut longest = 0;
    while let Some((start, marker)) = next_marker(source, at) {
        let text = start - at;
        longest = longest.max(text);
        if kept_blocks > 0 {
            longest_kept = longest_kept.max(text);
        }
        // Behind the marker and the sign of white space control.
        let inside = start + 2 + usize::from(matches!(source.as_bytes().get(start + 2), Some(b'-' | b'+')));
        let end = match marker {
            b'#' => source[inside..].find("#}").map(|end| inside + end + 2),
            b'%' if raw_begin(&source[inside..]).is_some() => {
                let body = inside + raw_begin(&source[inside..]).unwrap_or(0);
                raw_end(source, body).inspect(|end| {
                    longest = longest.max(end - body);
                    if kept_blocks > 0 {
                        longest_kept = longest_kept.max(end - body);
                    }
                })
            }
            _ => tag(source, inside, marker == b'%').map(|(tokens, end)| {
                let words = |token: &Token| (token.kind == Kind::Name).then(|| &source[token.start..token.end]);
                let first = tokens.first().and_then(words);
                match first.filter(|_| marker == b'%') {
                    Some("macro" | "call" | "filter" | "generation" | "block") => kept_blocks += 1,
                    Some("set") if !assigns(source, &tokens) => kept_blocks += 1,
                    Some("endmacro" | "endcall" | "endfilter" | "endgeneration" | "endblock" | "endset") => {
                        kept_blocks = kept_blocks.saturating_sub(1);
                    }
                    Some("for") => recursive |= tokens.last().and_then(words) == Some("recursive"),
                    _ => {}
                }
                let skipped = usize::from(marker == b'%' && first.is_some());
                marks.level(&tokens[skipped..], false);
                end
            }),
        };
        match end {
            Some(end) => at = end,
            None => break,
        }
    }
    // The body of a recursive loop is kept where the loop calls itself.
    let longest_kept = if recursive { longest.max(longest_kept) } else { longest_kept };
    Marked { source: marks.written(), longest_kept }
}

/// Whether a `set` tag has its value behind `=` and not in a block.
fn assigns(source: &str, tokens: &[Token]) -> bool {
    let mut depth = 0isize;
    tokens.iter().any(|token| {
        depth += isize::from(token.kind == Kind::Open) - isize::from(token.kind == Kind::Close);
        depth == 0 && &source[token.start..token.end] == "="
    })
}

/// The next `{{`, `{%` or `{#`.
fn next_marker(source: &str, from: usize) -> Option<(usize, u8)> {
    let bytes = source.as_bytes();
    (from..bytes.len().saturating_sub(1))
        .find(|&at| bytes[at] == b'{' && matches!(bytes[at + 1], b'{' | b'%' | b'#'))
        .map(|at| (at, bytes[at + 1]))
}

/// The length of the rest of a `raw` tag that begins here.
fn raw_begin(rest: &str) -> Option<usize> {
    let after = rest.trim_ascii_start().strip_prefix("raw")?.trim_ascii_start();
    let after = after.strip_prefix(['-', '+']).unwrap_or(after);
    Some(rest.len() - after.strip_prefix("%}")?.len())
}

/// Finds the end of a raw block whose body begins at `from`.
fn raw_end(source: &str, from: usize) -> Option<usize> {
    let mut at = from;
    while let Some(found) = source[at..].find("{%") {
        at += found + 2;
        let rest = source[at..].strip_prefix(['-', '+']).unwrap_or(&source[at..]);
        let Some(after) = rest.trim_ascii_start().strip_prefix("endraw") else { continue };
        let after = after.trim_ascii_start();
        let after = after.strip_prefix(['-', '+']).unwrap_or(after);
        if let Some(after) = after.strip_prefix("%}") {
            return Some(source.len() - after.len());
        }
    }
    None
}

/// The tokens of a tag and where it ends.
fn tag(source: &str, from: usize, block: bool) -> Option<(Vec<Token>, usize)> {
    let bytes = source.as_bytes();
    let end = if block { b"%}" } else { b"}}" };
    let mut at = from;
    let (mut tokens, mut depth): (Vec<Token>, isize) = (Vec::new(), 0);
    loop {
        let rest = &bytes[at..];
        let first = *rest.first()?;
        if first.is_ascii_whitespace() {
            at += 1;
            continue;
        }
        if depth == 0 {
            let skipped = usize::from(matches!(first, b'-' | b'+'));
            if rest[skipped..].starts_with(end) {
                return Some((tokens, at + skipped + 2));
            }
        }
        let (kind, length) = match first {
            b'"' | b'\'' => (Kind::Text, text_length(rest)?),
            b'0'..=b'9' => {
                (Kind::Number, number_length(rest, tokens.last().is_some_and(|t| t.kind == Kind::Dot && t.end == at)))
            }
            b'_' | b'a'..=b'z' | b'A'..=b'Z' => {
                (Kind::Name, rest.iter().take_while(|c| **c == b'_' || c.is_ascii_alphanumeric()).count())
            }
            _ => match rest.get(..2) {
                Some(b"//") => (Kind::Math('D'), 2),
                Some(b"**") => (Kind::Math('P'), 2),
                Some(b"==" | b"!=" | b">=" | b"<=") => (Kind::Other, 2),
                _ => match first {
                    b'+' | b'-' | b'~' | b'*' | b'/' | b'%' => (Kind::Math(char::from(first)), 1),
                    b'.' => (Kind::Dot, 1),
                    b'|' => (Kind::Pipe, 1),
                    b',' | b':' | b'=' | b'<' | b'>' => (Kind::Other, 1),
                    b'(' | b'[' | b'{' => (Kind::Open, 1),
                    b')' | b']' | b'}' => (Kind::Close, 1),
                    _ => return None,
                },
            },
        };
        depth += isize::from(kind == Kind::Open) - isize::from(kind == Kind::Close);
        tokens.push(Token { kind, start: at, end: at + length });
        at += length;
    }
}

fn text_length(rest: &[u8]) -> Option<usize> {
    let mut escaped = false;
    for (at, &byte) in rest.iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            byte if byte == rest[0] => return Some(at + 1),
            _ => {}
        }
    }
    None
}

fn number_length(rest: &[u8], after_dot: bool) -> usize {
    let digits = |from: usize| rest[from..].iter().take_while(|c| c.is_ascii_alphanumeric() || **c == b'_').count();
    let mut length = digits(0);
    if !after_dot && rest.get(length) == Some(&b'.') && rest.get(length + 1).is_some_and(u8::is_ascii_digit) {
        length += 1 + digits(length + 1);
    }
    let hexadecimal = matches!(rest.get(1), Some(b'x' | b'X'));
    if !hexadecimal && matches!(rest[length - 1], b'e' | b'E') && matches!(rest.get(length), Some(b'+' | b'-')) {
        length += 1 + digits(length + 1);
    }
    length
}

/// An operand of a chain of operators, by the bytes of the source.
#[derive(Clone, Copy, Debug)]
struct Operand {
    start: usize,
    end: usize,
    /// A number, or a short text in quotes.
    small: bool,
}

/// The state of parsing the current operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// Nothing yet, or a sign, a dot or a pipe: more has to follow.
    Incomplete,
    /// It could end here.
    Complete,
    /// Behind `is` (and `not`): the name of a test has to follow.
    TestName,
    /// Behind the name of a test: its argument may follow without parentheses.
    Test,
}

struct Marks<'a> {
    source: &'a str,
    inserted: Vec<(usize, String)>,
}

impl Marks<'_> {
    /// Reads the tokens between two brackets (or of a whole tag).
    fn level(&mut self, tokens: &[Token], map: bool) {
        let mut chain = Chain::default();
        let mut i = 0;
        while i < tokens.len() {
            let token = tokens[i];
            let mut last = i;
            match token.kind {
                Kind::Open => {
                    last = closing(tokens, i);
                    let inside = &tokens[(i + 1).min(last)..last];
                    let subscript = chain.reading == Reading::Complete && self.is(token, "[");
                    let slice = subscript && self.slice(&chain, inside);
                    self.level(inside, self.is(token, "{"));
                    if subscript && !slice && last < tokens.len() && inside.iter().any(|t| t.kind == Kind::Name) {
                        self.insert(token.end, "(".to_owned());
                        self.insert(tokens[last].start, format!(")|{KEY}"));
                    }
                    let end = tokens.get(last).map_or(token.end, |close| close.end);
                    chain.extend(token.start, end, false, Reading::Complete);
                }
                Kind::Close => self.flush(&mut chain),
                Kind::Number | Kind::Text => {
                    if chain.reading == Reading::Complete && !chain.after(Kind::Dot) {
                        self.flush(&mut chain);
                    }
                    let small = token.end - token.start <= SHORT;
                    chain.extend(token.start, token.end, small, Reading::Complete);
                }
                Kind::Name => self.name(&mut chain, token),
                Kind::Dot | Kind::Pipe => {
                    let before = chain.reading == Reading::Complete || chain.reading == Reading::Test;
                    if before && token.kind == Kind::Pipe {
                        chain.plain = false;
                    }
                    chain.extend(token.start, token.end, false, Reading::Incomplete);
                }
                Kind::Math(operator) => {
                    let complete = matches!(chain.reading, Reading::Complete | Reading::Test);
                    match operator {
                        'P' if complete => {
                            chain.extend(token.start, token.end, false, Reading::Incomplete);
                            chain.plain = false;
                        }
                        _ if complete => chain.operator(operator),
                        // `*` and `**` before the arguments of a call.
                        '*' | 'P' => {}
                        // A sign: the operand begins here, what is sliced behind it.
                        _ => {
                            chain.extend(token.start, token.end, false, Reading::Incomplete);
                            chain.atom = None;
                        }
                    }
                }
                Kind::Other => {
                    if let (true, Some(key), []) = (map && self.is(token, ":"), chain.operand, &*chain.operators)
                        && !key.small
                    {
                        self.around(key, KEY);
                    }
                    self.flush(&mut chain);
                }
            }
            chain.last = Some(token.kind);
            i = last + 1;
        }
        self.flush(&mut chain);
    }

    fn is(&self, token: Token, text: &str) -> bool {
        &self.source[token.start..token.end] == text
    }

    fn name(&mut self, chain: &mut Chain, token: Token) {
        let word = &self.source[token.start..token.end];
        if chain.after(Kind::Dot) || chain.after(Kind::Pipe) {
            return chain.extend(token.start, token.end, false, Reading::Complete);
        }
        match (chain.reading, word) {
            (Reading::TestName, "not") => chain.extend(token.start, token.end, false, Reading::TestName),
            (Reading::TestName, _) => chain.extend(token.start, token.end, false, Reading::Test),
            (Reading::Complete | Reading::Test, "is") => {
                chain.plain = false;
                chain.extend(token.start, token.end, false, Reading::TestName);
            }
            (_, "if" | "else" | "elif" | "and" | "or" | "not" | "in") => self.flush(chain),
            (Reading::Complete, _) => {
                self.flush(chain);
                chain.extend(token.start, token.end, false, Reading::Complete);
            }
            _ => chain.extend(token.start, token.end, false, Reading::Complete),
        }
    }

    /// Marks what is sliced, where the bracket behind it holds a slice; says whether it does.
    fn slice(&mut self, chain: &Chain, inside: &[Token]) -> bool {
        let mut depth = 0isize;
        let is_slice = inside.iter().any(|token| {
            depth += isize::from(token.kind == Kind::Open) - isize::from(token.kind == Kind::Close);
            depth == 0 && token.kind == Kind::Other && &self.source[token.start..token.end] == ":"
        });
        if let (Some(atom), Some(operand), true) = (chain.atom, chain.operand, is_slice && chain.plain) {
            self.insert(atom, "((".to_owned());
            self.insert(operand.end, format!(")|{OPERAND})"));
        }
        is_slice
    }

    /// Marks the operands of a chain and begins a new one.
    fn flush(&mut self, chain: &mut Chain) {
        let Chain { mut operands, operators, operand, .. } = std::mem::take(chain);
        operands.extend(operand);
        if operators.is_empty() || operands.len() != operators.len() + 1 {
            return;
        }
        let is_sum = |operator: char| matches!(operator, '+' | '-' | '~');
        let counts = operators.iter().any(|operator| matches!(operator, '+' | '~'));
        let mut first = 0;
        while first < operands.len() {
            // A product, which ends before the next operator of a sum.
            let last = (first..operators.len()).find(|&i| is_sum(operators[i])).unwrap_or(operands.len() - 1);
            let factors = &operands[first..=last];
            let between = &operators[first..last];
            let near = |i: Option<usize>| i.and_then(|i| operators.get(i)) == Some(&'~');
            let in_text = near(first.checked_sub(1)) || near(Some(last));
            let whole = Operand { start: factors[0].start, end: factors[factors.len() - 1].end, small: false };
            if between.contains(&'*') {
                for (i, factor) in factors.iter().enumerate() {
                    let filter = match i.checked_sub(1).map(|before| between[before]) {
                        None => FACTOR,
                        Some('*') => TIMES,
                        Some(_) => OVER,
                    };
                    self.around(*factor, filter);
                }
                self.around(whole, PRODUCT);
            }
            if counts && !(factors.len() == 1 && factors[0].small) {
                self.around(whole, if in_text { TEXT } else { OPERAND });
            }
            first = last + 1;
        }
    }

    fn around(&mut self, operand: Operand, filter: &str) {
        self.insert(operand.start, "(".to_owned());
        self.insert(operand.end, format!(")|{filter}"));
    }

    fn insert(&mut self, at: usize, text: String) {
        self.inserted.push((at, text));
    }

    fn written(mut self) -> String {
        // Of insertions at one place, the inner ones came first, which is the order of closing brackets; opening ones are alike.
        self.inserted.sort_by_key(|(at, _)| *at);
        let mut text = String::with_capacity(self.source.len() + 12 * self.inserted.len());
        let mut done = 0;
        for (at, inserted) in &self.inserted {
            text.push_str(&self.source[done..*at]);
            text.push_str(inserted);
            done = *at;
        }
        text.push_str(&self.source[done..]);
        text
    }
}

/// Operands and the operators between them.
struct Chain {
    operands: Vec<Operand>,
    operators: Vec<char>,
    /// The operand that is being read.
    operand: Option<Operand>,
    /// The start of the operand without its sign.
    atom: Option<usize>,
    /// Whether it has no filter, test or power yet: only such can be sliced.
    plain: bool,
    reading: Reading,
    last: Option<Kind>,
}

impl Default for Chain {
    fn default() -> Self {
        let (operands, operators) = (Vec::new(), Vec::new());
        Self { operands, operators, operand: None, atom: None, plain: true, reading: Reading::Incomplete, last: None }
    }
}

impl Chain {
    fn extend(&mut self, start: usize, end: usize, small: bool, reading: Reading) {
        self.atom.get_or_insert(start);
        self.operand = Some(match self.operand {
            Some(operand) => Operand { end, small: false, ..operand },
            None => Operand { start, end, small },
        });
        self.reading = reading;
    }

    fn operator(&mut self, operator: char) {
        self.operands.extend(self.operand.take());
        self.operators.push(operator);
        (self.atom, self.plain, self.reading) = (None, true, Reading::Incomplete);
    }

    fn after(&self, kind: Kind) -> bool {
        self.last == Some(kind)
    }
}

/// The bracket that closes the one at `open`, or the end.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0isize;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        depth += isize::from(token.kind == Kind::Open) - isize::from(token.kind == Kind::Close);
        if depth == 0 {
            return i;
        }
    }
    tokens.len()
}

#[cfg(test)]
mod tests;
