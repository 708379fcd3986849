use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    special_tokens: Map<String, Value>,
    templates: std::collections::BTreeMap<String, GoldenTemplate>,
    conversations: std::collections::BTreeMap<String, Vec<Message>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct GoldenTemplate {
    source: String,
    arguments: TemplateArguments,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    #[serde(default)]
    add_generation_prompt: bool,
    text: Option<String>,
    answers: Option<Vec<(usize, usize)>>,
    error: Option<String>,
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat/golden.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    ChatTemplate::new(source, tokens.map(|(name, text)| (name.to_owned(), text.to_owned()))).unwrap()
}

#[test]
fn texts_are_those_of_transformers() {
    let golden = golden();
    let tokens = golden.special_tokens.iter().map(|(key, value)| (key.clone(), value.as_str().unwrap().to_owned()));
    let (mut rendered, mut refused) = (0, 0);
    for case in &golden.cases {
        let GoldenTemplate { source, arguments } = &golden.templates[&case.template];
        let template = ChatTemplate::new(source, tokens.clone()).unwrap();
        let messages = &golden.conversations[&case.conversation];
        let name = format!("{} / {} / {}", case.template, case.conversation, case.add_generation_prompt);
        let got = template.render(messages, case.add_generation_prompt, arguments);
        match (&case.text, &case.error) {
            (Some(text), _) => {
                assert_eq!(&got.unwrap(), text, "{name}");
                rendered += 1;
            }
            (None, Some(error)) => {
                let got = got.expect_err(&name).to_string();
                if let Some(reason) = error.strip_prefix("TemplateError: ") {
                    assert!(got.contains(reason), "{name}: {got}");
                }
                refused += 1;
            }
            (None, None) => panic!("{name} has neither text nor error"),
        }
        if let (Some(answers), false) = (&case.answers, case.add_generation_prompt) {
            let got = template.render_with_answers(messages, arguments).unwrap();
            assert_eq!(Some(&got.text), case.text.as_ref(), "{name}");
            let got: Vec<(usize, usize)> = got.answers.iter().map(|a| (a.span.start, a.span.end)).collect();
            let expected: Vec<(usize, usize)> = answers.iter().copied().filter(|(start, end)| start < end).collect();
            assert_eq!(got, expected, "{name}");
        }
    }
    assert!(rendered > 140 && refused > 10, "{rendered} rendered, {refused} refused");
}

/// The texts of the answers, and the messages that are not found.
fn answers(template: &ChatTemplate, messages: &[Message], arguments: &TemplateArguments) -> (Vec<String>, Vec<usize>) {
    let chat = template.render_with_answers(messages, arguments).unwrap();
    assert_eq!(chat.text, template.render(messages, false, arguments).unwrap());
    (chat.answers.iter().map(|answer| chat.text[answer.span.clone()].to_owned()).collect(), chat.not_found)
}

#[test]
fn answers_are_found_without_marks() {
    let golden = golden();
    let none = TemplateArguments::new();
    let answers = |name: &str, conversation: &str| {
        answers(&template(&golden.templates[name].source), &golden.conversations[conversation], &none).0
    };
    assert_eq!(answers("chatml", "three turns"), ["b<|im_end|>", "é😀 e<|im_end|>", "<|im_end|>"]);
    assert_eq!(answers("chatml", "question"), Vec::<String>::new());
    assert_eq!(answers("llama 3", "system"), ["Because.<|eot_id|>"]);
    let call = r#"{"name": "get_weather", "parameters": {"city": "Köln", "days": 2, "exact": true, "scale": 1.0, "none": null}}"#;
    assert_eq!(answers("llama 3", "tools"), [&format!("{call}<|eot_id|>"), "21.5 degrees<|eot_id|>"]);
    assert_eq!(answers("mistral", "three turns"), [" b</s>", " é😀 e</s>", " </s>"]);
    assert_eq!(answers("qwen", "one turn"), ["<think>\n\n</think>\n\nHello!<|im_end|>"]);
    // Earlier answers lose their reasoning in this template, so no prefix ends behind them.
    let last = "<think>\nlet me see\n</think>\n\nA2<|im_end|>";
    assert_eq!(answers("qwen", "reasoning"), ["A1<|im_end|>", last]);
    // This one writes the system message into the last turn, and only if that is the user's.
    let messages = [
        Message::system("s"),
        Message::user("a"),
        Message::assistant("b"),
        Message::user("c"),
        Message::assistant("d"),
    ];
    let mistral = template(&golden.templates["mistral"].source);
    assert_eq!(self::answers(&mistral, &messages, &none), (vec![" b</s>".to_owned(), " d</s>".to_owned()], vec![]));
    let error = mistral.render_with_answers(&golden.conversations["wrong order"], &none).unwrap_err().to_string();
    assert!(error.contains("roles must alternate"), "{error}");
}

#[test]
fn marks_and_prefixes_agree() {
    let golden = golden();
    let none = TemplateArguments::new();
    for name in ["one turn", "three turns", "system"] {
        let messages = &golden.conversations[name];
        let marked = template(&golden.templates["chatml marked"].source).render_with_answers(messages, &none).unwrap();
        let unmarked = golden.templates["chatml marked"]
            .source
            .replace("{%- generation %}", "")
            .replace("{%- endgeneration %}", "");
        let prefixes = template(&unmarked).render_with_answers(messages, &none).unwrap();
        assert_eq!(marked.text, prefixes.text);
        assert_eq!(marked.answers, prefixes.answers);
    }
}

#[test]
fn endless_templates_are_stopped() {
    let none = TemplateArguments::new();
    for (source, reason) in [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for a in range(2000) %}{{ 'x' * 99999 }}{% endfor %}", "more than"),
        ("{{ 'x' * 10000000000 }}", "too large"),
    ] {
        let error = template(source).render(&[], false, &none).unwrap_err().to_string();
        assert!(error.contains("the chat template failed") && error.contains(reason), "{source}: {error}");
    }
}

#[test]
fn errors_say_where() {
    let error = ChatTemplate::new("line 1\n{% if %}", []).unwrap_err().to_string();
    assert!(error.contains("line 2"), "{error}");
    let error =
        template("\n\n{{ messages[0].content.nothing.more }}").render(&[Message::user("x")], false, &Map::new());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("line 3"), "{error}");
    let error = template("{{ strftime_now('%Q%!') }}").render(&[], false, &Map::new()).unwrap_err().to_string();
    assert!(error.contains("date format"), "{error}");
    let error = template("{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}");
    let error = error.render_with_answers(&[], &Map::new()).unwrap_err().to_string();
    assert!(error.contains("inside each other"), "{error}");
    let error = template("{% set x %}{% generation %}abc{% endgeneration %}{% endset %}{{ x | length }}");
    let error = error.render_with_answers(&[], &Map::new()).unwrap_err().to_string();
    assert!(error.contains("changes the text"), "{error}");
    let source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    let error =
        template(source).render_with_answers(&[Message::user("\u{fdd0}")], &Map::new()).unwrap_err().to_string();
    assert!(error.contains("U+FDD0"), "{error}");
}

#[test]
fn the_date_is_todays() {
    let text = template("{{ strftime_now('%d %b %Y') }}").render(&[], false, &Map::new()).unwrap();
    let parts: Vec<&str> = text.split(' ').collect();
    assert!(parts.len() == 3 && parts[0].len() == 2 && parts[1].len() == 3 && parts[2].len() == 4, "{text}");
}

#[test]
fn the_clock_can_be_stopped() {
    let mut clock = template("{{ strftime_now('%d %b %Y %H:%M') }}");
    assert!(clock.reads_clock() && !template("{{ messages }}").reads_clock());
    let time: TemplateTime = "2024-02-29T23:59:58+14:00".parse().unwrap();
    clock.set_time(time);
    assert_eq!(clock.render(&[], false, &Map::new()).unwrap(), "29 Feb 2024 23:59");
    assert_eq!(time.to_string().parse::<TemplateTime>().unwrap(), time);
    assert_eq!(time.to_string(), "2024-02-29T23:59:58+14:00");
    let now = TemplateTime::now();
    assert_eq!(now.to_string().parse::<TemplateTime>().unwrap().to_string(), now.to_string());
    for wrong in ["", "yesterday", "2024-02-30T00:00:00Z"] {
        assert!(wrong.parse::<TemplateTime>().unwrap_err().to_string().contains("not a time"), "{wrong}");
    }
}

/// Either of a model's two templates may read the clock.
#[test]
fn the_clock_of_the_template_for_tools_can_be_stopped() {
    const CLOCK: &str = "{{ strftime_now('%d %b %Y') }}";
    let tools = serde_json::json!({"tools": []}).as_object().unwrap().clone();
    for (main, tool_use, reads, texts) in [
        ("plain", "tools", false, ["plain", "tools"]),
        ("plain", CLOCK, true, ["plain", "29 Feb 2024"]),
        (CLOCK, "tools", true, ["29 Feb 2024", "tools"]),
        (CLOCK, CLOCK, true, ["29 Feb 2024", "29 Feb 2024"]),
    ] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        std::fs::write(folder.path().join("chat_template.jinja"), main).unwrap();
        std::fs::write(folder.path().join("additional_chat_templates/tool_use.jinja"), tool_use).unwrap();
        let mut template = ChatTemplate::from_folder(folder.path(), None).unwrap().unwrap();
        assert_eq!(template.reads_clock(), reads, "{main}, {tool_use}");
        template.set_time("2024-02-29T23:59:58+14:00".parse().unwrap());
        let render = |arguments: &TemplateArguments| template.render(&[], false, arguments).unwrap();
        assert_eq!([render(&Map::new()), render(&tools)], texts);
    }
}

#[test]
fn templates_are_found_in_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let open = |name: Option<&str>| ChatTemplate::from_folder(folder.path(), name);
    let render = |name: Option<&str>| open(name).unwrap().unwrap().render(&[], false, &Map::new()).unwrap();
    assert!(open(None).unwrap().is_none());
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "<b>"}, "eos_token": "<e>", "chat_template": "{{ bos_token }}1{{ eos_token }}"}"#,
    );
    assert_eq!(render(None), "<b>1<e>");
    assert!(open(Some("tool_use")).unwrap_err().to_string().contains("\"tool_use\""));
    let named = r#"{"chat_template": [{"name": "default", "template": "2"}, {"name": "tool_use", "template": "3"}]}"#;
    write("tokenizer_config.json", named);
    assert_eq!((render(None), render(Some("tool_use"))), ("2".to_owned(), "3".to_owned()));
    assert!(open(Some("rag")).unwrap_err().to_string().contains("default, tool_use"));
    write("chat_template.jinja", "4");
    write("additional_chat_templates/rag.jinja", "5");
    assert_eq!((render(None), render(Some("rag"))), ("4".to_owned(), "5".to_owned()));
    write("chat_template.jinja", "{{ oops");
    let error = open(None).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja"), "{error}");
    assert!(open(Some("../x")).is_err());
}

#[derive(Deserialize)]
struct Answers {
    special_tokens: Map<String, Value>,
    templates: std::collections::BTreeMap<String, Twins>,
    conversations: std::collections::BTreeMap<String, Vec<Message>>,
    cases: Vec<Case>,
}

/// A template with generation blocks, and without.
#[derive(Deserialize)]
struct Twins {
    marked: String,
    plain: String,
}

fn twins() -> (Answers, Vec<(String, String)>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat/answers.json");
    let answers: Answers = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let tokens = answers.special_tokens.iter();
    let tokens = tokens.map(|(key, value)| (key.clone(), value.as_str().unwrap().to_owned())).collect();
    (answers, tokens)
}

/// The answers in transformers' generation blocks of a template are found in its twin without them.
/// `scripts/fixtures/chat_answers.py` lists the templates and conversations.
#[test]
fn answers_are_those_of_marked_twins() {
    let (answers, tokens) = twins();
    let none = TemplateArguments::new();
    let (mut found, mut wrong, mut lost) = (0, Vec::new(), Vec::new());
    for case in &answers.cases {
        let Twins { marked, plain } = &answers.templates[&case.template];
        let messages = &answers.conversations[&case.conversation];
        let name = format!("{} / {}", case.template, case.conversation);
        let [marked, plain] = [marked, plain].map(|source| ChatTemplate::new(source, tokens.clone()).unwrap());
        let Some(text) = &case.text else {
            let got = plain.render_with_answers(messages, &none).unwrap_err().to_string();
            assert!(got.contains(case.error.as_ref().unwrap()), "{name}: {got}");
            continue;
        };
        let said = |chat: &RenderedChat| chat.answers.iter().map(|a| (a.message, a.span.clone())).collect::<Vec<_>>();
        let speakers = (0..messages.len()).filter(|&i| messages[i].is_assistant());
        let spans = case.answers.as_ref().unwrap().iter();
        let expected: Vec<(usize, Range<usize>)> = speakers
            .zip(spans)
            .map(|(message, &(start, end))| (message, start..end))
            .filter(|(_, span)| !span.is_empty())
            .collect();
        let chat = marked.render_with_answers(messages, &none).unwrap();
        assert_eq!((&chat.text, said(&chat), chat.not_found.len()), (text, expected.clone(), 0), "{name}");
        let chat = plain.render_with_answers(messages, &none).unwrap();
        assert_eq!(&chat.text, text, "{name}");
        if !chat.not_found.is_empty() {
            lost.push(name);
        } else if said(&chat) != expected {
            let show = |spans: &[(usize, Range<usize>)]| -> Vec<String> {
                spans.iter().map(|(message, span)| format!("{message}: {:?}", &text[span.clone()])).collect()
            };
            wrong.push(format!("{name}:\n  got {:?}\n  not {:?}", show(&said(&chat)), show(&expected)));
        } else {
            found += 1;
        }
    }
    assert!(wrong.is_empty() && lost.is_empty(), "{found} found, lost {lost:#?}, wrong:\n{}", wrong.join("\n"));
    assert_eq!(found, 525);
}

/// Conversations of texts that look like templates, with empty and blank ones, calls and reasoning at any place: what is found is
/// what the marked twin says.
#[test]
fn random_conversations_are_those_of_marked_twins() {
    const TEXTS: [&str; 29] = [
        "Hi",
        "Hello there",
        " a",
        "a ",
        " \n",
        "",
        "\n",
        "x\n",
        "\n\ny",
        "<b>t</b>",
        "[1]",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "</s>",
        "<think>\nr\n</think>\n\nb",
        "<think></think>b",
        "</think>",
        "[INST] q [/INST]",
        "USER: z\nASSISTANT: y",
        "ASSISTANT: ",
        "<|assistant|>\n",
        "<tool_response>\nx\n</tool_response>",
        "<｜Assistant｜>",
        "no",
        ":",
        ">",
        "é",
        "<|end|>\n</s>",
        "<end_of_turn>\n",
    ];
    let (answers, tokens) = twins();
    let compile = |source: &str| ChatTemplate::new(source, tokens.clone()).unwrap();
    let templates: Vec<_> = answers
        .templates
        .iter()
        // It writes nothing but white space between a system message and an answer: whose that is cannot be told.
        .filter(|(name, _)| *name != "mistral v1")
        .map(|(name, twins)| (name, compile(&twins.marked), compile(&twins.plain)))
        .collect();
    let calls = &answers.conversations["tools, two calls"];
    let none = TemplateArguments::new();
    let mut state = 7u64;
    let mut random = |count: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % count
    };
    let mut compared = 0;
    for _ in 0..120 {
        let mut messages = Vec::new();
        if random(3) == 0 {
            messages.push(Message::system(TEXTS[random(TEXTS.len())]));
        }
        let mut role = ["user", "user", "assistant"][random(3)];
        for _ in 0..1 + random(6) {
            let mut message = Message::new(role, TEXTS[random(TEXTS.len())]);
            match (role, random(8)) {
                ("assistant", 0) => {
                    message.extra.insert("reasoning_content".to_owned(), TEXTS[random(TEXTS.len())].into());
                }
                ("assistant", 1) => {
                    message.extra.insert("tool_calls".to_owned(), calls[[1, 3][random(2)]].extra["tool_calls"].clone());
                }
                _ => {}
            }
            messages.push(message);
            role = match (role, random(8)) {
                ("assistant", 0) => "tool",
                ("assistant", _) => "user",
                (other, 0) => other,
                _ => "assistant",
            };
        }
        for (name, marked, plain) in &templates {
            let Ok(expected) = marked.render_with_answers(&messages, &none) else { continue };
            let got = plain.render_with_answers(&messages, &none).unwrap();
            assert_eq!(got, expected, "{name}: {}", serde_json::to_string(&messages).unwrap());
            compared += 1;
        }
    }
    assert!(compared > 2000, "{compared}");
}
