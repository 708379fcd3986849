use std::path::Path;

use super::*;

/// As much of Go's text/template as our templates use.
mod go {
    use crate::chat::Message;

    #[derive(Debug)]
    enum Node {
        Text(String),
        Action(String),
        If(Vec<(String, Vec<Node>)>),
        Range(Vec<Node>),
    }

    pub(super) fn render(template: &str, messages: &[Message]) -> String {
        let mut rest = template;
        let (nodes, end) = parse(&mut rest);
        assert_eq!((end.as_str(), rest), ("", ""));
        let mut out = String::new();
        run(&nodes, messages, None, &mut out);
        out
    }

    /// Nodes up to an action that ends or continues a block, and that action.
    fn parse(rest: &mut &str) -> (Vec<Node>, String) {
        let mut nodes = Vec::new();
        loop {
            let Some((text, after)) = rest.split_once("{{") else {
                nodes.push(Node::Text(std::mem::take(rest).to_owned()));
                return (nodes, String::new());
            };
            nodes.push(Node::Text(text.to_owned()));
            // A quoted text within an action may hold braces.
            let quoted = after.trim_start().starts_with('"');
            let from =
                if quoted { after.find('"').unwrap() + after.trim_start()[1..].find('"').unwrap() + 2 } else { 0 };
            let end = from + after[from..].find("}}").unwrap();
            let action = after[..end].trim().to_owned();
            *rest = &after[end + 2..];
            if action == "end" || action.starts_with("else") {
                return (nodes, action);
            }
            if let Some(condition) = action.strip_prefix("if ") {
                let mut branches = Vec::new();
                let mut condition = condition.to_owned();
                loop {
                    let (body, end) = parse(rest);
                    branches.push((condition, body));
                    match end.strip_prefix("else") {
                        Some(other) => condition = other.trim().strip_prefix("if ").unwrap_or("true").to_owned(),
                        None => break,
                    }
                }
                nodes.push(Node::If(branches));
            } else if action.starts_with("range $i, $_ := .Messages") {
                let (body, end) = parse(rest);
                assert_eq!(end, "end");
                nodes.push(Node::Range(body));
            } else {
                nodes.push(Node::Action(action));
            }
        }
    }

    fn run(nodes: &[Node], messages: &[Message], at: Option<usize>, out: &mut String) {
        let text = |message: &Message| message.text().unwrap().to_owned();
        let system: Vec<String> = messages.iter().filter(|message| message.role == "system").map(text).collect();
        let system = system.join("\n\n");
        let is = |condition: &str| match condition {
            "true" => true,
            ".System" => !system.is_empty(),
            "$last" => at.unwrap() + 1 == messages.len(),
            "not $last" => at.unwrap() + 1 != messages.len(),
            condition => {
                let role = condition.strip_prefix("eq .Role \"").and_then(|rest| rest.strip_suffix('"'));
                messages[at.unwrap()].role == role.unwrap_or_else(|| panic!("condition {condition}"))
            }
        };
        for node in nodes {
            match node {
                Node::Text(text) => out.push_str(text),
                Node::Action(action) => match action.as_str() {
                    ".System" => out.push_str(&system),
                    ".Content" => out.push_str(&text(&messages[at.unwrap()])),
                    "$last := eq (len (slice $.Messages $i)) 1" => {}
                    action => {
                        let quoted = action.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
                        out.push_str(quoted.unwrap_or_else(|| panic!("action {action}")));
                    }
                },
                Node::If(branches) => {
                    if let Some((_, body)) = branches.iter().find(|(condition, _)| is(condition)) {
                        run(body, messages, at, out);
                    }
                }
                Node::Range(body) => (0..messages.len()).for_each(|index| run(body, messages, Some(index), out)),
            }
        }
    }
}

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + \
                      '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const MISTRAL: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}\
                       {% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
                       {% for message in turns %}{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + \
                       message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}";
const ZEPHYR: &str = "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}\
                      {% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}";

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(name, text)| (name.to_owned(), text.to_owned()));
    ChatTemplate::new(source, tokens).unwrap()
}

/// A published template, as the library writes it: see `chat/known.rs`.
fn known(name: &str) -> ChatTemplate {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/chat/known").join(format!("{name}.jinja"));
    template(&std::fs::read_to_string(path).unwrap())
}

/// The measure: the same text on 20 conversations of 6 families and more.
#[test]
fn go_templates_write_what_jinja_does() {
    let families = [
        ("chatml", template(CHATML)),
        ("mistral", template(MISTRAL)),
        ("zephyr", template(ZEPHYR)),
        ("llama 3", known("llama3")),
        ("gemma", known("gemma")),
        ("phi 3", known("phi3")),
        ("phi 3.5", known("phi3_5")),
        ("qwen 2.5", known("qwen2_5")),
        ("qwen 3", known("qwen3")),
        ("qwen 3 instruct 2507", known("qwen3_instruct_2507")),
    ];
    let mut expressed = Vec::new();
    for (name, template) in &families {
        let go = match Turns::of(template).and_then(|turns| turns.verify(template).and(Ok(turns))) {
            Ok(turns) => turns.go().unwrap(),
            Err(why) => {
                println!("{name}: {why}");
                continue;
            }
        };
        let mut compared = 0;
        for messages in conversations() {
            // A template that refuses a system text has no place for one in Ollama either.
            let Ok(expected) = render(template, &messages) else { continue };
            assert_eq!(go::render(&go, &messages), expected, "{name}");
            compared += 1;
        }
        assert!(compared == CONVERSATIONS || (*name == "gemma" && compared == CONVERSATIONS / 2), "{name}: {compared}");
        expressed.push(*name);
    }
    println!("{expressed:?}");
    for name in ["chatml", "mistral", "zephyr", "llama 3", "gemma", "phi 3", "qwen 2.5"] {
        assert!(expressed.contains(&name), "{name}");
    }
}

#[test]
fn what_go_cannot_say_is_refused_with_a_reason() {
    for (source, reason) in [
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}", "date"),
        // The system text in the last message.
        (
            "{% for m in messages %}{% if m.role == 'user' %}[{{ messages[0].content if loop.last and messages[0].role == 'system' \
             }}|{{ m.content }}]{% elif m.role == 'assistant' %}({{ m.content }}){% endif %}{% endfor %}",
            "not the same in every conversation",
        ),
        (
            "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
            "not the same in every conversation",
        ),
        ("nothing", "leaves out"),
    ] {
        let template = template(source);
        let error = Turns::of(&template).and_then(|turns| turns.verify(&template)).unwrap_err();
        assert!(error.contains(reason), "{source}: {error}");
    }
}

#[test]
fn a_begin_token_that_ollama_adds_is_left_out() {
    let template = template(MISTRAL);
    let turns = Turns::of(&template).unwrap();
    let go = turns.clone().without_begin(Some("<s>")).unwrap().go().unwrap();
    let messages = [Message::system("S"), Message::user("U")];
    assert_eq!(go::render(&go, &messages), "[INST] S\n\nU [/INST]");
    assert_eq!(go::render(&turns.go().unwrap(), &messages), "<s>[INST] S\n\nU [/INST]");
}

#[test]
fn turns_end_where_a_person_would_end_them() {
    let turns = Turns::of(&template(CHATML)).unwrap();
    assert_eq!((turns.before_user.as_str(), turns.after_user.as_str()), ("<|im_start|>user\n", "<|im_end|>\n"));
    assert_eq!(turns.generation, "<|im_start|>assistant\n");
    let turns = Turns::of(&known("llama3")).unwrap();
    assert_eq!(turns.after_user, "<|eot_id|>");
    assert_eq!(turns.before_assistant, turns.generation);
}

#[test]
fn a_modelfile_by_hand() {
    let file = Modelfile {
        template: Some("{{ .System }}".to_owned()),
        system: Some("Be brief.".to_owned()),
        stop: vec!["<|im_end|>".to_owned()],
        parameters: vec![("temperature".to_owned(), "0.7".to_owned())],
        ..Modelfile::new("./m.gguf")
    };
    let expected = "FROM ./m.gguf\nTEMPLATE \"\"\"{{ .System }}\"\"\"\nSYSTEM \"\"\"Be brief.\"\"\"\nPARAMETER temperature 0.7\n\
                    PARAMETER stop \"<|im_end|>\"\n";
    assert_eq!(file.text().unwrap(), expected);
    let quotes = Modelfile { system: Some("a\"\"\"b".to_owned()), ..Modelfile::new("m") };
    assert!(quotes.text().unwrap_err().contains("SYSTEM"));
}
