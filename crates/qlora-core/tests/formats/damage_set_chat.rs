//! The chat templates of the set that `damage_set` describes.

use crate::common::tally::Tally;
use qlora_core::chat::{ChatTemplate, Message, TemplateArguments};

/// A list of two lists that are the same one, sixty times over.
const NESTED: &str =
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}USE";

#[test]
fn chat_templates() {
    let mut tally = Tally::default();
    let long = "x".repeat(1 << 20);
    let messages = [Message::user("Hello"), Message::assistant("Hi")];
    let templates: [(&'static str, String); 37] = [
        ("loop", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into()),
        ("loop", "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}".into()),
        ("loop", "{% for a in range(10 ** 18) %}{% endfor %}".into()),
        ("loop", "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}".into()),
        ("loop", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into()),
        ("loop", "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}".into()),
        (
            "loop",
            "{% macro f() %}{{ caller() }}{% call f() %}{% endcall %}{% endmacro %}{% call f() %}{% endcall %}".into(),
        ),
        ("loop", "{% include 'chat template' %}".into()),
        ("loop", "{% extends 'chat template' %}".into()),
        ("hostile size", "{{ 'x' * 10000000000 }}".into()),
        ("hostile size", "{{ [1] * 10000000000 }}".into()),
        ("hostile size", "{% for a in range(2000) %}{{ 'x' * 99999 }}{% endfor %}".into()),
        ("hostile size", "{{ range(10 ** 18) | list }}".into()),
        ("hostile size", "{{ '%1000000000000d' | format(1) }}".into()),
        ("hostile size", "{{ '%.1000000000000f' | format(1.5) }}".into()),
        ("hostile size", "{{ '%*d' | format(1000000000000, 1) }}".into()),
        ("hostile size", "{{ ('%s' * 100000) | format('x' * 100000) }}".into()),
        ("hostile size", "{{ '{:>1000000000000}'.format('x') }}".into()),
        ("hostile size", "{{ 'x' | indent(1000000000000, true) }}".into()),
        ("hostile size", "{{ 'x' | indent(width=1000000000000, first=true) }}".into()),
        ("hostile size", "{{ ('x' * 1000000) | replace('x', 'x' * 1000000) }}".into()),
        ("hostile size", "{{ ('x' * 1000000).replace('', 'x' * 1000000) }}".into()),
        ("hostile size", "{{ range(99999) | join('x' * 1000000) }}".into()),
        ("hostile size", "{{ ('x' * 1000000).join(['a'] * 1000000) }}".into()),
        ("hostile size", NESTED.replace("USE", "{{ ns.x | tojson | length }}")),
        ("hostile size", NESTED.replace("USE", "{{ ns.x | string | length }}")),
        ("hostile size", NESTED.replace("USE", "{{ ns.x | join | length }}")),
        ("hostile size", NESTED.replace("USE", "{{ '%s' | format(ns.x) | length }}")),
        ("hostile size", NESTED.replace("USE", "{{ ns.x }}")),
        ("hostile size", format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000))),
        ("hostile size", format!("{{{{ {}1{} }}}}", "[".repeat(100_000), "]".repeat(100_000))),
        ("hostile size", "{% if a %}".repeat(100_000)),
        ("hostile size", format!("{{{{ {} }}}}", "not ".repeat(1_000_000))),
        ("truncated", "{% for m in messages".into()),
        ("truncated", "{% for m in messages %}{{ m.content }}".into()),
        ("truncated", "{{ 'no end }}".into()),
        ("truncated", format!("{{{{ '{long}")),
    ];
    for (kind, source) in templates {
        let what = &source[..source.len().min(60)];
        tally.refused(kind, &["chat template"], what, || {
            let template = ChatTemplate::new(&source, []).map_err(|error| error.to_string())?;
            template.render(&messages, true, &TemplateArguments::new()).map(drop).map_err(|error| error.to_string())
        });
    }
    tally.check("chat templates", &[("hostile size", 24), ("loop", 9), ("truncated", 4)]);
}
