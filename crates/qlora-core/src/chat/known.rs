//! Published chat templates of well-known models, with the assistant's answers marked.
//!
//! The templates in `known/` are written for this library: each renders what the published template does, character for
//! character, with `{% generation %}` blocks around what the model says. A published template is recognized by a hash of its
//! text. It still renders conversations itself; its marked form only says where the answers are, and is not believed where its
//! text is another one.

/// The marked form of a published template.
pub(super) fn marked(source: &str) -> Option<&'static str> {
    let hash = hash(source);
    KNOWN.iter().find(|(known, _)| *known == hash).map(|(_, marked)| *marked)
}

/// Hashes of published templates, and their marked forms.
const KNOWN: [(u64, &str); 10] = [
    (0x845f_df81_3c63_7ee2, include_str!("known/deepseek_r1_distill.jinja")),
    (0x5c10_ee65_212d_93b3, include_str!("known/gemma.jinja")),
    (0x0e60_067a_5537_498e, include_str!("known/llama3.jinja")),
    (0xcc03_68e1_ffb6_b958, include_str!("known/llama3_1.jinja")),
    (0x368f_4c34_b855_4414, include_str!("known/llama3_2.jinja")),
    (0xeceb_db26_677c_663d, include_str!("known/phi3.jinja")),
    (0xcf27_8cde_387a_54c8, include_str!("known/phi3_5.jinja")),
    (0xe642_ce24_6d7f_2e3d, include_str!("known/qwen2_5.jinja")),
    (0x959a_4551_391a_6549, include_str!("known/qwen3.jinja")),
    (0x3751_fe8e_a484_48ab, include_str!("known/qwen3_instruct_2507.jinja")),
];

/// FNV-1a of the text without white space at its ends and with `\n` ending its lines.
fn hash(source: &str) -> u64 {
    let bytes = source.trim().bytes().filter(|&byte| byte != b'\r');
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use regex::Regex;
    use serde::Deserialize;
    use serde_json::Map;

    use super::*;
    use crate::chat::{ChatTemplate, Message, RenderedChat, TemplateArguments};

    #[derive(Deserialize)]
    struct Published {
        special_tokens: BTreeMap<String, String>,
        /// Files, and the hashes of the published templates that they stand for.
        templates: BTreeMap<String, String>,
        conversations: BTreeMap<String, Vec<Message>>,
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        template: String,
        conversation: String,
        arguments: TemplateArguments,
        text: String,
        answers: Vec<(usize, usize)>,
    }

    fn published() -> Published {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat/known.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn file(name: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/chat/known").join(name);
        std::fs::read_to_string(path).unwrap()
    }

    fn spans(chat: &RenderedChat) -> Vec<(usize, usize)> {
        chat.answers.iter().map(|answer| (answer.span.start, answer.span.end)).collect()
    }

    /// `scripts/fixtures/known_templates.py` has compared the marked forms with the published templates in transformers; here are
    /// their texts and spans. The same spans are found without the marks.
    #[test]
    fn marked_forms_render_what_published_templates_do() {
        let published = published();
        let blocks = Regex::new(r"\{%-?\s*(end)?generation\s*-?%\}").unwrap();
        for case in &published.cases {
            let name = format!("{} / {} / {:?}", case.template, case.conversation, case.arguments);
            let (source, messages) = (file(&case.template), &published.conversations[&case.conversation]);
            let compile = |source: &str| ChatTemplate::new(source, published.special_tokens.clone()).unwrap();
            let expected: Vec<_> = case.answers.iter().copied().filter(|(start, end)| start < end).collect();
            let chat = compile(&source).render_with_answers(messages, &case.arguments).unwrap();
            assert_eq!((&chat.text, spans(&chat)), (&case.text, expected.clone()), "{name}");
            let unmarked = compile(&blocks.replace_all(&source, ""));
            let chat = unmarked.render_with_answers(messages, &case.arguments).unwrap();
            // This template writes no header before a second list of calls: what belongs to it cannot be told.
            if (case.template.as_str(), case.conversation.as_str()) == ("deepseek_r1_distill.jinja", "calls as text") {
                continue;
            }
            let show = |spans: &[(usize, usize)]| spans.iter().map(|&(a, b)| &case.text[a..b]).collect::<Vec<_>>();
            assert_eq!(chat.text, case.text, "{name}");
            assert_eq!(show(&spans(&chat)), show(&expected), "{name}");
        }
        assert!(published.cases.len() > 90, "{}", published.cases.len());
    }

    #[test]
    fn published_templates_are_recognized_by_their_hash() {
        let published = published();
        assert_eq!(published.templates.len(), KNOWN.len());
        for (name, hash) in &published.templates {
            let hash = u64::from_str_radix(hash, 16).unwrap();
            let marked = KNOWN.iter().find(|(known, _)| *known == hash).map(|(_, marked)| *marked);
            assert_eq!(marked, Some(file(name).as_str()), "{name}");
        }
        assert_eq!(hash(" {{ a }}\r\nb\n"), hash("{{ a }}\nb"));
        assert_ne!(hash("{{ a }}"), hash("{{ b }}"));
        assert_eq!(marked("{{ a }}"), None);
    }

    /// A marked form is not believed where it renders something else.
    #[test]
    fn a_marked_form_with_another_text_is_not_used() {
        let marked = ChatTemplate::new(&file("phi3.jinja"), []).unwrap();
        let mut template = ChatTemplate::new("{% for m in messages %}{{ m.content }}|{% endfor %}", []).unwrap();
        template.environment = marked.environment;
        template.environment.add_template_owned("chat template", template.source.clone()).unwrap();
        template.marks = crate::chat::Marks::Known;
        let chat = template.render_with_answers(&[Message::user("a"), Message::assistant("b")], &Map::new()).unwrap();
        assert_eq!((chat.text.as_str(), spans(&chat)), ("a|b|", vec![(2, 4)]));
        assert!(chat.not_found.is_empty());
    }
}
