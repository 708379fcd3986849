use proptest::prelude::*;

use super::mark;

fn marked(source: &str) -> String {
    let short = mark(source).source;
    [
        ("|__operand", "|o"),
        ("|__text", "|t"),
        ("|__factor", "|f"),
        ("|__times", "|x"),
        ("|__over", "|v"),
        ("|__product", "|p"),
        ("|__key", "|k"),
    ]
    .iter()
    .fold(short, |text, (long, short)| text.replace(long, short))
}

#[test]
fn whole_operands_are_marked() {
    for (source, expected) in [
        ("{{ a ~ b }}", "{{ (a)|t ~ (b)|t }}"),
        ("{{- a.b['c'] + d(e) -}}", "{{- (a.b['c'])|o + (d(e))|o -}}"),
        ("{{ a | f(1) ~ 'x' ~ b|g }}", "{{ (a | f(1))|t ~ 'x' ~ (b|g)|t }}"),
        ("{{ a - 1 }}{{ i % 2 }}{{ a / b }}", "{{ a - 1 }}{{ i % 2 }}{{ a / b }}"),
        ("{{ i + 1 }}", "{{ (i)|o + 1 }}"),
        ("{{ a * b + c }}", "{{ (((a)|f * (b)|x)|p)|o + (c)|o }}"),
        ("{{ a / b * -c ** 2 }}", "{{ ((a)|f / (b)|v * (-c ** 2)|x)|p }}"),
        ("{{ a if b ~ c else d + e }}", "{{ a if (b)|t ~ (c)|t else (d)|o + (e)|o }}"),
        ("{{ f(a, *b, c=d ~ e, **g) }}", "{{ f(a, *b, c=(d)|t ~ (e)|t, **g) }}"),
        ("{% set x = a is not defined and b ~ c %}", "{% set x = a is not defined and (b)|t ~ (c)|t %}"),
        (
            "{% for x in a + b if c + d == e recursive %}",
            "{% for x in (a)|o + (b)|o if (c)|o + (d)|o == e recursive %}",
        ),
        ("{%- set ns.x = ns.x + m[1:] -%}", "{%- set ns.x = (ns.x)|o + (((m)|o)[1:])|o -%}"),
        ("{{ -m.a[b[1]:][0] }}", "{{ -((m.a)|o)[b[1]:][0] }}"),
        ("{{ {'a': b ~ c}.a ~ [d + e] }}", "{{ ({'a': (b)|t ~ (c)|t}.a)|t ~ ([(d)|o + (e)|o])|t }}"),
        (
            "{% raw %}{{ a ~ b }}{% endraw %}{# {{ a ~ b }} #}a ~ b",
            "{% raw %}{{ a ~ b }}{% endraw %}{# {{ a ~ b }} #}a ~ b",
        ),
        ("{{ '}}' ~ a }}{{ b ~ \"\\\"\" ~ 'it\\'s' }}", "{{ '}}' ~ (a)|t }}{{ (b)|t ~ \"\\\"\" ~ 'it\\'s' }}"),
        ("{% call(x) f(a + b) %}", "{% call(x) f((a)|o + (b)|o) %}"),
        ("{{ 1.5e-3 + a }}{{ a.0.1 ~ b }}{{ 0x1e+b }}", "{{ 1.5e-3 + (a)|o }}{{ (a.0.1)|t ~ (b)|t }}{{ 0x1e+(b)|o }}"),
        ("{{ a + }}{{ a ~ b", "{{ a + }}{{ a ~ b"),
        (
            "{{ {a: b, 'c': d, e.f: 1}[g][h + 1]['i'] }}",
            "{{ {(a)|k: b, 'c': d, (e.f)|k: 1}[(g)|k][((h)|o + 1)|k]['i'] }}",
        ),
        ("{{ not a + b }}{{ a not in b + c }}", "{{ not (a)|o + (b)|o }}{{ a not in (b)|o + (c)|o }}"),
    ] {
        assert_eq!(marked(source), expected, "{source}");
    }
}

#[test]
fn kept_texts_are_measured() {
    assert_eq!(mark("long text {{ a }}").longest_kept, 0);
    assert_eq!(mark("long text{% set a %}kept{% endset %}not kept").longest_kept, 4);
    assert_eq!(
        mark("{% set a = 1 %}not kept{% macro f() %}ab{% if a %}abc{% endif %}{% endmacro %}abcdef").longest_kept,
        3
    );
    assert_eq!(mark("{% for a in b recursive %}kept{% endfor %}as well").longest_kept, 4);
}

fn expression() -> impl Strategy<Value = String> {
    let atom = prop::sample::select(vec![
        "1",
        "2",
        "0.5",
        "'ab'",
        "\"c\"",
        "x",
        "ns.y",
        "ns['y']",
        "l",
        "l[0]",
        "l[1:]",
        "none",
        "true",
        "f('a', b=2)",
        "x[::-1]",
        "missing",
        "{'a': x}['a']",
        "(1, 2)",
        "x | upper",
        "l | length",
        "x is defined",
        "x is not string",
        "x.upper()",
        "'}}'",
    ]);
    let operator = prop::sample::select(vec![
        "+",
        "-",
        "~",
        "*",
        "/",
        "//",
        "%",
        "**",
        "==",
        "<",
        "and",
        "or",
        "in",
        "not in",
        "if x else",
    ]);
    let sign = prop::sample::select(vec!["", "", "", "-", "not "]);
    atom.prop_map(str::to_owned).prop_recursive(4, 24, 4, move |inner| {
        let pair = (inner.clone(), operator.clone(), inner.clone()).prop_map(|(a, op, b)| format!("{a} {op} {b}"));
        prop_oneof![
            3 => pair,
            1 => (sign.clone(), inner.clone()).prop_map(|(sign, a)| format!("{sign}{a}")),
            1 => inner.clone().prop_map(|a| format!("({a})")),
            1 => inner.clone().prop_map(|a| format!("[{a}][0]")),
            1 => inner.clone().prop_map(|a| format!("({a}) | string | length")),
            1 => inner.prop_map(|a| format!("f({a}, b={a})")),
        ]
    })
}

#[test]
fn quotients_by_nothing_are_no_panic() {
    let mut environment = minijinja::Environment::new();
    super::super::made::install(&mut environment);
    for expression in
        ["[1][0] / true * 1", "1 / false * 'ab'", "1 / 0 * 2", "1 // 0", "1 % 0", "1 / 'x' * 3", "2 ** 3 / none"]
    {
        let render = |source: &str| environment.render_str(source, ()).map_err(|error| error.kind());
        let source = format!("{{{{ {expression} }}}}");
        if let Ok(plain) = render(&source) {
            assert_eq!(render(&mark(&source).source).as_deref(), Ok(plain.as_str()), "{expression}");
        } else {
            render(&mark(&source).source).unwrap_err();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// An expression means the same with its marks.
    #[test]
    fn marks_change_nothing(expression in expression()) {
        let mut environment = minijinja::Environment::new();
        super::super::made::install(&mut environment);
        environment.set_undefined_behavior(minijinja::UndefinedBehavior::Lenient);
        let source = format!(
            "{{% macro f(a, b=1) %}}<{{{{ a }}}}{{{{ b }}}}>{{% endmacro %}}{{% set ns = namespace(y='yy') %}}{{{{ {expression} }}}}\
             {{% set a = {expression} %}}{{{{ a }}}}{{% if {expression} %}}1{{% endif %}}"
        );
        let render = |source: &str| {
            let context = minijinja::context! { x => "xyz", l => ["p", "q", "r"] };
            environment.render_str(source, context).map_err(|error| error.kind())
        };
        // Expressions that minijinja refuses (`x is defined + 1`, which Jinja reads) may become readable.
        if let Ok(plain) = render(&source) {
            prop_assert_eq!(Ok(plain), render(&mark(&source).source), "{}", source);
        }
    }

    /// Whatever a template is, marking it ends.
    #[test]
    fn damaged_templates_never_panic(source in "[a-z0-9{}%#\"'+*~|.,:()\\[\\] \n\\\\-]{0,80}") {
        let _ = mark(&source);
    }
}
