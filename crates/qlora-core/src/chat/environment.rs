//! The Jinja environment of transformers' chat templates, on minijinja.

use std::fmt::Write as _;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use minijinja_contrib::pycompat;
use regex::Regex;

use super::clock::TemplateTime;
use super::{known, limits, made, operators, python};

/// The template as it is.
pub(super) const PLAIN: &str = "chat template";
/// The template with its generation blocks between [`ANSWER_BEGIN`] and [`ANSWER_END`].
pub(super) const MARKED: &str = "chat template with marked answers";

/// Non-characters of Unicode, which no text contains.
pub(super) const ANSWER_BEGIN: char = '\u{FDD0}';
/// See [`ANSWER_BEGIN`].
pub(super) const ANSWER_END: char = '\u{FDD1}';

/// Instructions that a template may run: a conversation of a thousand messages needs about a hundredth.
pub(super) const FUEL: u64 = 5_000_000;
/// The longest text that a template may write.
pub(super) const MAX_OUTPUT: usize = 16 << 20;

/// The longest message of `raise_exception`, in bytes.
const MAX_MESSAGE: usize = 1000;

/// Plain text that blocks may keep (`set` blocks, macros): writing one of their texts takes a step, however long it is.
const MAX_KEPT: usize = 1 << 30;

/// Room for the parser, which calls itself for every level of a template's syntax tree.
const STACK: usize = 64 << 20;

/// The origin of the marks around the assistant's answers in [`MARKED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marks {
    /// None: there is no such template.
    None,
    /// The template itself.
    Own,
    /// The library's own form of a published template.
    Known,
}

/// Compiles a template; also returns the origin of the marks around the assistant's answers.
pub(super) fn compile(source: &str) -> Result<(Environment<'static>, Marks), Error> {
    limits::check_source(source)?;
    let failed = |what: &str| Error::new(ErrorKind::InvalidOperation, format!("the parser's thread {what}"));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || compile_here(source));
        thread
            .map_err(|error| failed(&format!("cannot start: {error}")))?
            .join()
            .unwrap_or_else(|_| Err(failed("panicked")))
    })
}

fn compile_here(source: &str) -> Result<(Environment<'static>, Marks), Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    // Well-known templates are recognized by their own text.
    let known = known::marked(source);
    let operators::Marked { source, longest_kept } = operators::mark(source);
    let source = source.as_str();
    environment.set_fuel(Some(FUEL.min((MAX_KEPT / longest_kept.max(1)) as u64)));
    environment.set_formatter(made::write);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", |state: &mut State, value: Value, arguments: Kwargs| {
        made::text(state, python::to_json(&value, arguments)?)
    });
    environment.add_filter("string", |state: &mut State, value: Value| -> Result<Value, Error> {
        let mut out = limits::LimitedString::default();
        match write!(out, "{}", python::Str(&value)) {
            Ok(()) => made::text(state, out.0),
            Err(_) => Err(Error::new(
                ErrorKind::InvalidOperation,
                "string: the value is nested too deep or too long to be written",
            )),
        }
    });
    made::install(&mut environment);
    environment.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
        let mut text = limits::LimitedString::default();
        // The beginning of an overlong message is enough.
        let _ = write!(text, "{}", python::Str(&message));
        text.0.truncate(text.0.floor_char_boundary(MAX_MESSAGE));
        Err(Error::new(ErrorKind::InvalidOperation, text.0))
    });
    environment.add_function("strftime_now", |format: &str| TemplateTime::now().format(format));
    environment.add_function("__generation", |state: &mut State, arguments: Kwargs| body(state, &arguments));
    environment.add_function("__marked_generation", |state: &mut State, arguments: Kwargs| -> Result<Value, Error> {
        let body = body(state, &arguments)?;
        Ok(Value::from(format!("{ANSWER_BEGIN}{body}{ANSWER_END}")))
    });

    // minijinja has no tags of its own making; transformers' `generation` is a call block underneath anyway.
    let begin = Regex::new(r"\{%([-+]?)\s*generation\s*([-+]?)%\}").expect("a valid expression");
    let end = Regex::new(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}").expect("a valid expression");
    let with = |source: &str, function: &str| {
        let opened = begin.replace_all(source, format!("{{%$1 call {function}() $2%}}"));
        end.replace_all(&opened, "{%$1 endcall $2%}").into_owned()
    };
    environment.add_template_owned(PLAIN, with(source, "__generation"))?;
    let known = known.map(|marked| operators::mark(marked).source);
    let (marks, marked) = match (begin.is_match(source), &known) {
        (true, _) => (Marks::Own, Some(source)),
        (false, Some(marked)) => (Marks::Known, Some(marked.as_str())),
        (false, None) => (Marks::None, None),
    };
    if let Some(marked) = marked {
        environment.add_template_owned(MARKED, with(marked, "__marked_generation"))?;
    }
    Ok((environment, marks))
}

/// Makes `strftime_now` write this time from now on.
pub(super) fn set_time(environment: &mut Environment<'_>, time: TemplateTime) {
    environment.add_function("strftime_now", move |format: &str| time.format(format));
}

/// Renders one of the two forms of a compiled template.
pub(super) fn render(environment: &Environment<'_>, template: &str, context: Value) -> Result<String, Error> {
    let mut output = Limited(Vec::new());
    let template = environment.get_template(template)?;
    // minijinja 3.0.5 panics on a few expressions (found by fuzzing: an index out of bounds in its operators); nothing outlives the call.
    let rendered = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        template.render_captured_to(context, &mut output).map(drop)
    }));
    rendered.unwrap_or_else(|_| Err(Error::new(ErrorKind::InvalidOperation, "an expression cannot be computed")))?;
    String::from_utf8(output.0).map_err(|_| Error::new(ErrorKind::WriteFailure, "the output is not UTF-8"))
}

/// The text of a call block.
fn body(state: &mut State, arguments: &Kwargs) -> Result<Value, Error> {
    arguments.get::<Value>("caller")?.call(state, &[])
}

/// Python's methods: those of pycompat, and a few more that templates use.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    if let (Some(text), [argument]) = (value.as_str(), arguments)
        && let Some(affix) = argument.as_str()
    {
        match name {
            "removeprefix" => return Ok(Value::from(text.strip_prefix(affix).unwrap_or(text))),
            "removesuffix" => return Ok(Value::from(text.strip_suffix(affix).unwrap_or(text))),
            _ => {}
        }
    }
    match (name, arguments) {
        ("join", [items, ..]) => limits::check(name, items, std::slice::from_ref(value))?,
        _ => limits::check(name, value, arguments)?,
    }
    made::method(state, name, value, arguments, |state| {
        pycompat::unknown_method_callback(state, value, name, arguments)
    })
}

/// A buffer that refuses to grow past [`MAX_OUTPUT`].
struct Limited(Vec<u8>);

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other(format!("it writes more than {MAX_OUTPUT} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
