//! Values written as Python writes them: `str()`, `repr()` and `json.dumps()`.

use std::fmt::{self, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

use super::environment::MAX_OUTPUT;

/// Deepest nesting that is written; conversations come from JSON, which is read no deeper.
const MAX_DEPTH: usize = 128;

/// Displays a value as Python's `str()`.
pub(super) struct Str<'a>(pub(super) &'a Value);

impl fmt::Display for Str<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.kind() {
            ValueKind::Undefined => Ok(()),
            ValueKind::String => f.write_str(self.0.as_str().unwrap_or_default()),
            _ => repr(f, self.0, 0),
        }
    }
}

fn repr(out: &mut impl Write, value: &Value, depth: usize) -> fmt::Result {
    if depth > MAX_DEPTH {
        return Err(fmt::Error);
    }
    match value.kind() {
        ValueKind::None => out.write_str("None"),
        ValueKind::Bool => out.write_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(out, value, ["inf", "-inf", "nan"]),
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            out.write_char('[')?;
            items(out, value.try_iter().map_err(|_| fmt::Error)?, |out, item| repr(out, &item, depth + 1))?;
            out.write_char(']')
        }
        ValueKind::Map => {
            out.write_char('{')?;
            items(out, value.try_iter().map_err(|_| fmt::Error)?, |out, key| {
                repr(out, &key, depth + 1)?;
                out.write_str(": ")?;
                repr(out, &value.get_item(&key).map_err(|_| fmt::Error)?, depth + 1)
            })?;
            out.write_char('}')
        }
        _ => write!(out, "{value}"),
    }
}

fn items<W: Write>(
    out: &mut W,
    items: impl Iterator<Item = Value>,
    mut write: impl FnMut(&mut W, Value) -> fmt::Result,
) -> fmt::Result {
    for (index, item) in items.enumerate() {
        if index > 0 {
            out.write_str(", ")?;
        }
        write(out, item)?;
    }
    Ok(())
}

/// A string as Python quotes it: in single quotes unless it only has single quotes inside.
fn quoted(out: &mut impl Write, text: &str) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            c if c == quote => write!(out, "\\{c}")?,
            c if (c as u32) < 0x20 || (0x7f..0xa1).contains(&(c as u32)) || c == '\u{ad}' => {
                write!(out, "\\x{:02x}", c as u32)?
            }
            c => out.write_char(c)?,
        }
    }
    out.write_char(quote)
}

/// A number as Python's `repr()`: the shortest digits, an exponent from 1e16 and below 1e-4 on.
fn number(out: &mut impl Write, value: &Value, special: [&str; 3]) -> fmt::Result {
    if value.is_integer() {
        return write!(out, "{value}");
    }
    let Ok(x) = f64::try_from(value.clone()) else { return write!(out, "{value}") };
    if x.is_nan() {
        return out.write_str(special[2]);
    }
    if x.is_infinite() {
        return out.write_str(if x > 0.0 { special[0] } else { special[1] });
    }
    if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
        return write!(out, "{digits}e{sign}{exponent:0>2}");
    }
    write!(out, "{x:?}")
}

/// The filter `tojson` of transformers: `json.dumps` with its keyword arguments, without escaping HTML.
pub(super) fn to_json(value: &Value, arguments: Kwargs) -> Result<String, Error> {
    let ensure_ascii = arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let indent = match arguments.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?.min(64)),
        }),
    };
    let sort_keys = arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = match arguments.get::<Option<Vec<String>>>("separators")? {
        None if indent.is_some() => [",".to_owned(), ": ".to_owned()],
        None => [", ".to_owned(), ": ".to_owned()],
        Some(separators) => separators
            .try_into()
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two texts"))?,
    };
    arguments.assert_all_used()?;
    let mut writer = JsonWriter { out: String::new(), ensure_ascii, indent, separators, sort_keys };
    writer.value(value, 0)?;
    Ok(writer.out)
}

/// A JSON value as `json.dumps` writes it.
pub(super) fn json_text(value: &serde_json::Value) -> String {
    let separators = [", ".to_owned(), ": ".to_owned()];
    let mut writer = JsonWriter { out: String::new(), ensure_ascii: false, indent: None, separators, sort_keys: false };
    // Only values nested deeper than JSON is read fail.
    match writer.value(&Value::from(minijinja::value::Serde(value)), 0) {
        Ok(()) => writer.out,
        Err(_) => value.to_string(),
    }
}

struct JsonWriter {
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    separators: [String; 2],
    sort_keys: bool,
}

impl JsonWriter {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let refuse = |message: &str| Err(Error::new(ErrorKind::BadSerialization, format!("tojson: {message}")));
        // Lists in lists that are the same list grow without limit.
        if self.out.len() > MAX_OUTPUT {
            return refuse("the text is too long");
        }
        if depth > MAX_DEPTH {
            return refuse("the value is nested too deep");
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => number(&mut self.out, value, ["Infinity", "-Infinity", "NaN"])
                .map_err(|_| Error::from(ErrorKind::WriteFailure))?,
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list('[', ']', depth, items, |writer, item| writer.value(&item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.list('{', '}', depth, keys, |writer, key| {
                    match key.as_str() {
                        Some(text) => writer.string(text),
                        None => writer.string(&Str(&key).to_string()),
                    }
                    writer.out.push_str(&writer.separators[1].clone());
                    writer.value(&value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Undefined => return refuse("the value is undefined"),
            kind => return refuse(&format!("a {kind} is no JSON")),
        }
        Ok(())
    }

    fn list(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: Vec<Value>,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        let empty = items.is_empty();
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.out.push_str(&self.separators[0].clone());
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !empty {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && c as u32 > 0x7e) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
