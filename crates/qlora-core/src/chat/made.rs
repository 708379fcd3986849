//! Limits on the total size of the values that a template makes.
//!
//! Steps are counted by minijinja, but a step can double a text. So everything that makes a text or a list out of others pays
//! for it before or right after: the operands of `~`, `+`, `*` and slices (which [`super::operators`] marks with the filters
//! below), what filters and methods give, and what is written, be it to the output or into a `set` block or a macro.
//! The bytes that a rendering makes in all are never more than [`MAX_MADE`] and the last value before it was refused.

use std::fmt::{self, Write};

use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, filters};

use super::environment::MAX_OUTPUT;
use super::limits;
use super::python::Str;

/// Bytes that one rendering may make, all steps together: a thousand messages with texts of 100 kB in all, put together
/// message by message, make half of it.
pub(super) const MAX_MADE: usize = 256 << 20;
/// Bytes of an item of a list.
const ITEM: usize = 32;
/// The longest list.
const MAX_ITEMS: usize = MAX_OUTPUT / ITEM;

/// The filters around operands; see [`super::operators`].
pub(super) const OPERAND: &str = "__operand";
/// As [`OPERAND`], where the value becomes a part of a text.
pub(super) const TEXT: &str = "__text";
/// The filter around the key that is looked up in a list or map: its hash takes as long as its text.
pub(super) const KEY: &str = "__key";
/// The first factor of a product.
pub(super) const FACTOR: &str = "__factor";
/// A factor behind `*`.
pub(super) const TIMES: &str = "__times";
/// The filter around the right operand of another operator of the same precedence.
pub(super) const OVER: &str = "__over";
/// A whole product.
pub(super) const PRODUCT: &str = "__product";

/// The size of the values that a rendering has made so far, in bytes, and the products being computed.
#[derive(Default)]
struct Made {
    bytes: usize,
    /// Products that are being computed, the innermost one last.
    products: Vec<Product>,
}

/// The size of a product: the product of the sizes of texts and lists, and of the numbers.
#[derive(Clone, Copy)]
struct Product {
    size: u128,
    /// Whether a factor is a text or a list.
    repeats: bool,
}

fn refuse<T>(what: impl fmt::Display) -> Result<T, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, what.to_string()))
}

fn made<'a>(state: &'a mut State) -> &'a mut Made {
    state.get_or_insert_extension(Made::default())
}

fn pay(state: &mut State, bytes: usize) -> Result<(), Error> {
    let made = made(state);
    made.bytes = made.bytes.saturating_add(bytes);
    if made.bytes > MAX_MADE {
        return refuse(format!("it makes more than {MAX_MADE} bytes of texts and lists"));
    }
    Ok(())
}

/// Bytes of a text, or of a list without the values that its items point to.
fn size(value: &Value) -> Result<usize, Error> {
    let bytes = match value.kind() {
        ValueKind::String => value.as_str().unwrap_or_default().len(),
        ValueKind::Bytes => value.len().unwrap_or(0),
        ValueKind::Seq | ValueKind::Iterable => {
            let count = |value: &Value| value.try_iter().map_or(0, |items| items.take(MAX_ITEMS + 1).count());
            value.len().unwrap_or_else(|| count(value)).saturating_mul(ITEM)
        }
        ValueKind::Map => value.len().unwrap_or(0).saturating_mul(2 * ITEM),
        _ => return Ok(0),
    };
    if bytes > MAX_OUTPUT {
        return refuse(format!("a text or a list is too large ({MAX_OUTPUT} bytes are possible)"));
    }
    Ok(bytes)
}

/// Bytes of a value that becomes a text.
fn text_size(value: &Value) -> Result<usize, Error> {
    match value.kind() {
        ValueKind::Undefined | ValueKind::String => size(value),
        _ => match limits::length(value) {
            bytes if bytes > MAX_OUTPUT => refuse("a value is nested too deep or too large to be written as a text"),
            bytes => Ok(bytes),
        },
    }
}

fn key(value: Value) -> Result<Value, Error> {
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        text_size(&value)?;
    }
    Ok(value)
}

fn operand(state: &mut State, value: Value) -> Result<Value, Error> {
    pay(state, size(&value)?)?;
    Ok(value)
}

fn part(state: &mut State, value: Value) -> Result<Value, Error> {
    pay(state, text_size(&value)?)?;
    Ok(value)
}

/// A text that a filter made.
pub(super) fn text(state: &mut State, text: String) -> Result<Value, Error> {
    operand(state, Value::from(text))
}

impl Product {
    fn of(value: &Value) -> Result<Self, Error> {
        Ok(match value.kind() {
            ValueKind::Number => {
                let magnitude = f64::try_from(value.clone()).unwrap_or(f64::INFINITY).abs();
                Self { size: magnitude.ceil() as u128, repeats: false }
            }
            ValueKind::String | ValueKind::Seq | ValueKind::Iterable => {
                Self { size: size(value)? as u128, repeats: true }
            }
            _ => Self { size: 1, repeats: false },
        })
    }
}

fn factor(state: &mut State, value: Value) -> Result<Value, Error> {
    let product = Product::of(&value)?;
    made(state).products.push(product);
    Ok(value)
}

fn times(state: &mut State, value: Value) -> Result<Value, Error> {
    let factor = Product::of(&value)?;
    let Some(product) = made(state).products.last_mut() else { return Ok(value) };
    product.size = product.size.saturating_mul(factor.size);
    product.repeats |= factor.repeats;
    if product.repeats && product.size > MAX_OUTPUT as u128 {
        return refuse(format!("a repeated text or list is too large ({MAX_OUTPUT} bytes are possible)"));
    }
    Ok(value)
}

/// Behind `/`, `//` or `%`, of which only numbers come out: at most the quotient or the divisor.
fn over(state: &mut State, value: Value) -> Result<Value, Error> {
    if let Some(product) = made(state).products.last_mut() {
        let divisor = match value.kind() {
            ValueKind::Bool => f64::from(u8::from(value.is_true())),
            _ => f64::try_from(value.clone()).map_or(0.0, f64::abs),
        };
        // Behind a zero or what is no number the quotient is infinite here; rendering refuses it.
        product.size = ((product.size as f64 / divisor).max(divisor).ceil() as u128).saturating_add(1);
        product.repeats = false;
    }
    Ok(value)
}

fn product(state: &mut State, value: Value) -> Result<Value, Error> {
    made(state).products.pop();
    operand(state, value)
}

/// Filters that hand out an existing value.
const PASSING: [&str; 13] =
    ["abs", "attr", "bool", "count", "d", "default", "first", "float", "int", "last", "length", "max", "min"];
/// Filters that take lists and maps as such; the others write them as texts.
const TAKING_LISTS: [&str; 29] = [
    "attr",
    "batch",
    "bool",
    "chain",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "groupby",
    "items",
    "last",
    "length",
    "list",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "sum",
    "tojson",
    "unique",
    "zip",
];

/// Checks the arguments of a filter or method.
fn check_arguments(name: &str, arguments: &[Value]) -> Result<(), Error> {
    for value in arguments {
        size(value)?;
        if !TAKING_LISTS.contains(&name) {
            text_size(value)?;
        }
    }
    Ok(())
}

/// Calls a method with its arguments and its result accounted for.
pub(super) fn method(
    state: &mut State,
    name: &str,
    value: &Value,
    arguments: &[Value],
    call: impl FnOnce(&mut State) -> Result<Value, Error>,
) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        check_arguments(name, std::slice::from_ref(value))?;
        check_arguments(name, arguments)?;
    }
    let result = call(state)?;
    if value.kind() == ValueKind::String {
        pay(state, size(&result)?)?;
    }
    Ok(result)
}

/// Writes a value as Python's `str()`, to the output or into a block that keeps its text.
pub(super) fn write(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let room = MAX_MADE.saturating_sub(made(state).bytes);
    let mut counted = Counted { out, room };
    let written = write!(counted, "{}", Str(value));
    let room_left = counted.room;
    match (written, room_left) {
        (Ok(()), _) => pay(state, room - room_left),
        (Err(_), 0) => refuse(format!("it makes more than {MAX_MADE} bytes of texts and lists")),
        (Err(_), _) => Err(ErrorKind::WriteFailure.into()),
    }
}

/// A writer that passes bytes on as long as there is room.
struct Counted<'a, 'out> {
    out: &'a mut Output<'out>,
    room: usize,
}

impl Write for Counted<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        match self.room.checked_sub(text.len()) {
            Some(room) => self.room = room,
            None => {
                self.room = 0;
                return Err(fmt::Error);
            }
        }
        self.out.write_str(text)
    }
}

/// Puts the account before all of minijinja's filters, and takes away what shows a template's whole state as a text.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.remove_global("debug");
    environment.add_filter(OPERAND, operand);
    environment.add_filter(TEXT, part);
    environment.add_filter(KEY, key);
    environment.add_filter(FACTOR, factor);
    environment.add_filter(TIMES, times);
    environment.add_filter(OVER, over);
    environment.add_filter(PRODUCT, product);
    // minijinja's own make a text of whatever they get.
    let is_text = |value: &Value, of: fn(&str) -> bool| value.as_str().is_some_and(of);
    environment.add_test("lower", move |value: Value| is_text(&value, |text| text.chars().all(char::is_lowercase)));
    environment.add_test("upper", move |value: Value| is_text(&value, |text| text.chars().all(char::is_uppercase)));
    environment.add_test("startingwith", |value: Value, other: Value| {
        matches!((value.as_str(), other.as_str()), (Some(text), Some(start)) if text.starts_with(start))
    });
    environment.add_test("endingwith", |value: Value, other: Value| {
        matches!((value.as_str(), other.as_str()), (Some(text), Some(end)) if text.ends_with(end))
    });
    macro_rules! guarded {
        ($($name:ident)*) => { $(
            // The filter itself keeps a name that no template writes.
            environment.add_filter(concat!(stringify!($name), " itself"), filters::$name);
            guarded!(as stringify!($name), concat!(stringify!($name), " itself"));
        )* };
        (as $name:expr, $itself:expr) => {
            environment.add_filter($name, |state: &mut State, value: Value, rest: Rest<ValueOrKwargs>| {
                let mut arguments = vec![value];
                arguments.extend(rest.into_values());
                check_arguments($name, &arguments)?;
                limits::check($name, &arguments[0], &arguments[1..])?;
                let result = state.apply_filter($itself, &arguments)?;
                if !PASSING.contains(&$name) {
                    pay(state, size(&result)?)?;
                }
                Ok::<Value, Error>(result)
            });
        };
    }
    guarded!(
        abs attr batch bool capitalize chain default dictsort escape first float format groupby indent int items join last
        length lines list lower map max min pprint reject rejectattr replace reverse round safe select selectattr slice
        sort split sum title trim unique upper zip
    );
    guarded!(as "count", "length itself");
    guarded!(as "d", "default itself");
    guarded!(as "e", "escape itself");
}

#[cfg(test)]
mod tests {
    use super::super::ChatTemplate;

    fn render(source: &str) -> Result<String, String> {
        let template = ChatTemplate::new(source, []).map_err(|error| error.to_string())?;
        let messages: Vec<_> = (0..50).map(|i| super::super::Message::user(format!("message {i}"))).collect();
        template.render(&messages, false, &serde_json::Map::new()).map_err(|error| error.to_string())
    }

    /// Runs a statement sixty times.
    fn repeated(before: &str, statement: &str) -> String {
        format!(
            "{{% set ns = namespace(x='0123456789', l=['0123456789']) %}}{before}\
            {{% for i in range(60) %}}{statement}{{% endfor %}}{{{{ ns.x | length }}}} {{{{ ns.l | length }}}}"
        )
    }

    #[test]
    fn what_grows_without_limit_is_refused() {
        for (before, statement) in [
            ("", "{% set ns.x = ns.x ~ ns.x %}"),
            ("", "{% set ns.x = ns.x + ns.x %}"),
            ("", "{% set ns.x = ns.x * 2 %}"),
            ("", "{% set ns.x = 2 * (1 * ns.x) %}"),
            ("", "{% set ns.x = ns.x * (4 // 2) * 2 %}"),
            ("", "{% set ns.x = (ns.x if true else '') ~ (ns.x | default('')) %}"),
            ("", "{% set ns.x = [ns.x, ns.x] | join %}"),
            ("", "{% set ns.x = [ns.x, ns.x] | join('') %}"),
            ("", "{% set ns.x = ''.join([ns.x, ns.x]) %}"),
            ("", "{% set ns.x = ns.x.join(['', '', '']) %}"),
            ("", "{% set ns.x = 'aa' | replace('a', ns.x) %}"),
            ("", "{% set ns.x = 'aa'.replace('a', ns.x) %}"),
            ("", "{% set ns.x = ns.x.replace('0', '00') %}"),
            ("", "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}"),
            ("", "{% set ns.x = '{}{}'.format(ns.x, ns.x) %}"),
            ("", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
            ("", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
            ("", "{% set y | upper %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
            ("{% macro f(a) %}{{ a }}{{ a }}{% endmacro %}", "{% set ns.x = f(ns.x) %}"),
            (
                "{% macro f(a) %}{{ caller() }}{{ caller() }}{% endmacro %}",
                "{% set y %}{% call f(1) %}{{ ns.x }}{% endcall %}{% endset %}{% set ns.x = y %}",
            ),
            ("", "{% set y %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% set ns.x = y %}"),
            ("", "{% set ns.l = ns.l + ns.l %}"),
            ("", "{% set ns.l = ns.l * 2 %}"),
            ("", "{% set ns.l = (ns.l + ns.l) | list %}"),
            ("", "{% set ns.l = ns.l | chain(ns.l) %}"),
            ("", "{% set ns.l = [ns.l, ns.l] %}{{ ns.l }}"),
            ("", "{% set ns.l = [ns.l, ns.l] %}{% set ns.x = ns.l ~ '' %}"),
            ("", "{% set ns.l = [ns.l, ns.l] %}{% set ns.x = ns.l | tojson %}"),
            ("", "{% set ns.l = [ns.l, ns.l] %}{% set ns.x = ns.l | upper %}"),
            ("", "{% set ns.l = [ns.l, ns.l] %}{% if i == 59 %}{{ {ns.l: 1} }}{% endif %}"),
            ("", "{% set ns.l = [ns.l, ns.l] %}{% if i == 59 %}{{ {'a': 1, 2: 3}[ns.l] }}{% endif %}"),
            ("", "{% set ns.x = [ns.x, '\\\\'] | pprint ~ '\\\\' %}{% set ns.x = ns.x ~ ns.x %}"),
        ] {
            let source = repeated(before, statement);
            let error = render(&source).expect_err(&source);
            let reason = ["makes more than", "too large", "longer than", "too long", "nested too deep", "writes more"];
            assert!(reason.iter().any(|reason| error.contains(reason)), "{statement}: {error}");
        }
        // Many large values, each of them small enough.
        for source in [
            "{% set ns = namespace(l=[]) %}{% set x = 'x' * 9999999 %}{% for i in range(5000) %}\
             {% set ns.l = ns.l + [x ~ i] %}{% endfor %}",
            "{% set ns = namespace(l=[]) %}{% set x = 'x' * 9999999 %}{% for i in range(5000) %}\
             {% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
            "{% set ns = namespace(l=[]) %}{% set x = 'x' * 9999999 %}{% for i in range(5000) %}\
             {% set ns.l = ns.l + [x | upper] %}{% endfor %}",
            "{% set ns = namespace(l=[]) %}{% set x = 'x' * 9999999 %}{% for i in range(5000) %}\
             {% set ns.l = ns.l + [x.strip('a')] %}{% endfor %}",
            "{{ ([1] * 100000000) | list | length }}",
            "{{ ((1,) * 100000000) | length }}",
            "{% macro f(x) %}{% if x | length < 99999999 %}{{ f(x ~ x) }}{% endif %}{% endmacro %}{{ f('0123456789') }}",
        ] {
            let error = render(source).expect_err(source);
            assert!(["makes more than", "too large"].iter().any(|reason| error.contains(reason)), "{source}: {error}");
        }
        // A long stretch of plain text in a block that keeps it.
        let source = format!(
            "{{% set ns = namespace(l=[]) %}}{{% for i in range(99999) %}}{{% set x %}}{}{{% endset %}}\
             {{% set ns.l = ns.l + [x] %}}{{% endfor %}}",
            "x".repeat(500_000)
        );
        let error = render(&source).unwrap_err();
        assert!(error.contains("steps") || error.contains("makes more than"), "{error}");
        assert!(render("{{ debug() }}").is_err());
    }

    #[test]
    fn what_conversations_need_is_not() {
        for (source, expected) in [
            (
                "{{ 'a' ~ 1 ~ none }}{{ 1 + 2 * 3 - 4 }}{{ 7 // 2 * 2 }}{{ 2 * 3 / 4 }}{{ 4 // 2 * ' x' }}",
                "a1None361.5 x x",
            ),
            ("{{ -1 + 2 }}{{ 2 * -3 }}{{ 2 ** 3 * 2 }}{{ 'ab' * 2 }}{{ [1] * 2 }}", "1-616abab[1, 1]"),
            ("{{ [1, 2][1:] + [3] }}{{ 'abc'[1:] ~ 'abc'[:-1] }}{{ 'abc'[::-1] }}", "[2, 3]bcabcba"),
            ("{{ 'a' + 'b' if 'x' ~ 'y' == 'xy' else 'c' + 'd' }}", "ab"),
            ("{{ ('a' + 'b') | upper ~ 'c' | upper }}", "ABC"),
            ("{{ {'a': 'x' ~ 'y', 'b': [1 + 1]}['a'] + {'c': 1}['c'] ~ '' }}", "xy1"),
            ("{% set a, b = 'x' ~ 1, 2 + 3 %}{{ a }}{{ b }}", "x15"),
            ("{% macro f(a, b='x' ~ 'y') %}{{ a + b }}{% endmacro %}{{ f('1') }}{{ f(a='1' ~ '2', b='3') }}", "1xy123"),
            (
                "{% for m in messages[:2] + messages[-1:] %}{{ (loop.index0 + 1) ~ m.content }}{% endfor %}",
                "1message 02message 13message 49",
            ),
            (
                "{{ undefined_thing ~ 'a' }}{{ '}}' ~ \"'\" ~ '%}' }}{# a + b #}{% raw %}{{ a + b }}{% endraw %}",
                "a}}'%}{{ a + b }}",
            ),
            (
                "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x ~ m.content %}{% endfor %}{{ ns.x | length }}",
                "490",
            ),
            ("{{ [1, 2] | length * 2 }}{{ 3 * 'a' | length + 1 }}", "44"),
        ] {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }
}
