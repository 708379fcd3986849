//! Python's grammar, its refusals, and random patterns. The comparison with Python itself is in
//! `tests/peft/roundtrip.rs`.

use super::*;
use proptest::prelude::*;

fn matches(pattern: &str, name: &str) -> bool {
    ModulePattern::new(pattern).unwrap().matches(name)
}

#[test]
fn the_whole_name_has_to_match() {
    let name = "model.layers.10.self_attn.q_proj";
    assert!(matches(r".*\.(q|v)_proj", name));
    assert!(matches(r"model\.layers\.\d+\.self_attn\.q_proj", name));
    assert!(!matches("q_proj", name));
    assert!(!matches(r".*\.q", name));
    // An alternative must not end the match early.
    assert!(matches("model|model.*", name));
    assert!(!matches("(?:model)|other", name));
}

#[test]
fn python_grammar_is_kept_where_the_crate_differs() {
    assert!(matches("[[a]x]", "[x]") && !matches("[[a]x]", "ax"));
    assert!(matches("[a&&b]", "&") && matches("[a&&b]", "a"));
    assert!(matches("[]x]+", "x]"));
    assert!(matches(r"a{,2}", "") && matches(r"a{,2}", "aa") && !matches(r"a{,2}", "aaa"));
    assert!(matches("a{x}", "a{x}") && matches("a{}", "a{}") && matches("a{,}", "aaa"));
    assert!(matches(r"\<a\>", "<a>"));
    assert!(matches(r"a\Z", "a"));
    assert!(matches(r"\056\x2e\u002e", "..."));
    assert!(matches("(?i)Q_PROJ", "q_proj") && matches("(?i:Q)_proj", "q_proj") && !matches("(?i:Q)_PROJ", "q_proj"));
    assert!(matches("a(?# note )b", "ab"));
    assert!(matches("a}]", "a}]"));
}

#[test]
fn what_python_refuses_is_refused() {
    for pattern in [
        "a**",
        "a*{2}",
        "*a",
        "^*",
        "(",
        ")",
        "a)|(b",
        "[a",
        "[b-a]",
        r"\q",
        r"[\8]",
        r"a\",
        "a(?i)",
        r"\p{L}",
        "a{3,2}",
        "(?<n>a)",
        "(?",
        "(?P<1>a)",
        r"\x1",
        "(?z)",
        r"(?P<n>a)(?P<n>b)",
        r"\400",
    ] {
        let error = ModulePattern::new(pattern).unwrap_err();
        assert!(
            matches!(&error, Error::Invalid(message) if message.contains(&format!("{pattern:?}"))),
            "{pattern}: {error}"
        );
    }
}

#[test]
fn what_has_no_counterpart_is_named() {
    for (pattern, feature) in [
        (r"(?!.*vision).*proj", "lookahead"),
        (r"(?=a)a", "lookahead"),
        (r".*(?<!k)_proj", "lookbehind"),
        (r"(?>a)", "atomic"),
        (r"a*+", "possessive"),
        (r"a{2}+", "possessive"),
        (r"(a)\1", "backreference"),
        (r"(?P<n>a)(?P=n)", "backreference"),
        (r"(a)?(?(1)b|c)", "conditional"),
        (r"(?x) a", "flag"),
        (r"\N{DIGIT ONE}", "by name"),
    ] {
        let error = ModulePattern::new(pattern).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(message) if message.contains(feature)), "{pattern}: {error}");
    }
}

#[test]
fn a_repeat_that_explodes_is_an_error() {
    assert!(ModulePattern::new("((a{1000}){1000}){1000}").is_err());
    assert!(ModulePattern::new("a{99999999999}").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_pattern_is_compiled_or_refused(
        pattern in r"[a-c()\[\]{}*+?|\\.^$,\-:#<>=!PixdZ019&~ ]{0,24}",
        name in "[a-c.]{0,8}",
    ) {
        if let Ok(compiled) = ModulePattern::new(pattern) {
            compiled.matches(&name);
        }
    }

    #[test]
    fn an_escaped_name_matches_itself_alone(name in "\\PC{1,12}", other in "\\PC{1,12}") {
        let escape = |c: char| if c.is_ascii_punctuation() { format!("\\{c}") } else { c.to_string() };
        let escaped: String = name.chars().map(escape).collect();
        let pattern = ModulePattern::new(escaped).unwrap();
        prop_assert!(pattern.matches(&name));
        prop_assert_eq!(pattern.matches(&other), name == other);
    }
}
