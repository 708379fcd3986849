//! Cases from public reports about where the assistant's answers are: what is trained of a conversation. Texts and ids are those of
//! transformers (`scripts/fixtures/cases_answers.py`).
//!
//! Further inputs of these kinds, in `tests/fixtures/chat/answers.json` (`scripts/fixtures/chat_answers.py`): templates in the style
//! of ChatML (plain, trimmed, with a default system message, without a generation prompt, needing a user), Llama 2 and 3,
//! Mistral v1 and v3 (the system message in the last user turn, tools), Gemma, Phi-3 and 4, R1 distillates, Zephyr, TinyLlama,
//! Qwen2.5 and 3, words without markers, and templates that look at or count the texts; conversations with a system message,
//! several turns, the assistant or the user at either end, two answers in a row, empty answers and questions at every place, the
//! same text twice, white space, markers and tags in the texts, reasoning in the text and apart, calls of tools.

use std::path::{Path, PathBuf};

use qlora::chat::ChatTemplate;
use qlora::tokenizer::Tokenizer;
use qlora::trainer::TrainConfig;
use qlora::trainer::config::OnUntrained;
use qlora::trainer::data::{Dataset, EncodeOptions, load_jsonl};
use qlora::trainer::encoder::ModelEncoder;
use serde_json::Value;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cases").join(name)
}

/// The rows of `<case>/<name>.jsonl` through the tokenizer of the cases and `<name>.jinja`.
fn load(case: &str, name: &str, change: impl Fn(&mut EncodeOptions)) -> (Dataset, Vec<(String, String, Vec<u32>)>) {
    let mut options = EncodeOptions::from(&TrainConfig::default().data);
    change(&mut options);
    let path = |extension: &str| folder(case).join(format!("{name}.{extension}"));
    load_with(&std::fs::read_to_string(path("jinja")).unwrap(), &path("jsonl"), &options).unwrap()
}

/// Of a document the whole text, the trained stretches in brackets, and the ids.
type Shown = (String, String, Vec<u32>);

/// The documents, and what they look like.
fn load_with(template: &str, rows: &Path, options: &EncodeOptions) -> qlora::trainer::Result<(Dataset, Vec<Shown>)> {
    let tokenizer = Tokenizer::from_folder(folder("chat-tokenizer")).unwrap();
    let template = ChatTemplate::new(template, []).unwrap();
    let encoder = ModelEncoder::new(&tokenizer, Some(&template), &[]);
    let dataset = load_jsonl(&[rows.to_owned()], &encoder, options)?;
    let documents = (0..dataset.len()).map(|i| {
        let document = dataset.document(i);
        let text = document.marked_text(&encoder, "", "").unwrap();
        (text, document.marked_text(&encoder, "⟦", "⟧").unwrap(), document.ids.to_vec())
    });
    let documents = documents.collect();
    Ok((dataset, documents))
}

/// Texts and ids are transformers', the trained stretches those that are wanted.
fn check(case: &str, name: &str) {
    let right = std::fs::read_to_string(folder(case).join(format!("{name}.json"))).unwrap();
    let right: Vec<Value> = serde_json::from_str(&right).unwrap();
    let (dataset, documents) = load(case, name, |_| ());
    assert_eq!((documents.len(), dataset.stats().answers_not_found), (right.len(), 0));
    for ((text, marked, ids), right) in documents.iter().zip(&right) {
        assert_eq!(text, right["text"].as_str().unwrap());
        let expected: Vec<u32> =
            right["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(ids, &expected);
        let trained: Vec<&str> = marked.split('⟦').skip(1).map(|piece| piece.split('⟧').next().unwrap()).collect();
        let wanted: Vec<&str> =
            right["trained"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
        assert_eq!(trained, wanted, "{case} {name}: {marked}");
    }
}

#[test]
fn case_04_qwen3_multiturn() {
    check("04-qwen3-multiturn", "qwen3");
}

#[test]
fn case_06_empty_answer_marked() {
    check("06-empty-answer-marked", "marked");
    check("06-empty-answer-marked", "unmarked");
}

#[test]
fn case_07_no_generation_prompt() {
    check("07-no-generation-prompt", "unasked");
}

#[test]
fn case_13_assistant_first() {
    check("13-assistant-first", "first");
    check("13-assistant-first", "needs-user");
}

/// With the loss on all tokens nothing needs to be found: the template only renders.
#[test]
fn everything_is_trained_without_looking_for_answers() {
    for (case, name) in [("04-qwen3-multiturn", "qwen3"), ("13-assistant-first", "needs-user")] {
        let (dataset, documents) = load(case, name, |options| options.completion_only_loss = false);
        for (text, marked, ids) in &documents {
            assert_eq!(marked, &format!("⟦{text}⟧"));
            assert!(!ids.is_empty());
        }
        assert_eq!(dataset.stats().answers_not_found, 0);
    }
}

/// An answer that the template leaves out or shreds is not trained, and the remark names its row; where nothing is left the row is
/// refused with what to do.
#[test]
fn answers_that_are_not_found_are_counted() {
    const LEAVES_OUT: &str = "{% for m in messages %}{% if m.content != 'no' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                              {% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    let row = |answers: [&str; 2]| {
        let [first, second] = answers;
        format!(
            r#"{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "{first}"}},
                {{"role": "user", "content": "b"}}, {{"role": "assistant", "content": "{second}"}}]}}"#
        )
        .replace('\n', " ")
    };
    std::fs::write(&rows, [row(["x", "y"]), row(["no", "y"]), row(["x", "no"])].join("\n")).unwrap();
    let options = EncodeOptions::from(&TrainConfig::default().data);
    let (dataset, documents) = load_with(LEAVES_OUT, &rows, &options).unwrap();
    let marked: Vec<&str> = documents.iter().map(|(_, marked, _)| marked.as_str()).collect();
    let turn = |role: &str, text: &str| format!("<|im_start|>{role}\n{text}\n");
    let said = |text: &str| turn("assistant", &format!("⟦{text}<|im_end|>⟧"));
    let asked = |text: &str| turn("user", &format!("{text}<|im_end|>"));
    assert_eq!(marked[0], asked("a") + &said("x") + &asked("b") + &said("y"));
    assert_eq!(marked[1], asked("a") + &asked("b") + &said("y"));
    assert_eq!(marked[2], asked("a") + &said("x") + &asked("b"));
    assert_eq!((dataset.stats().answers_not_found, dataset.stats().first_not_found), (2, Some(2)));
    let stats = dataset.stats().to_string();
    assert!(
        stats.ends_with("2 answers not found in the chat template's text and not trained (the first in line 2)"),
        "{stats}"
    );

    std::fs::write(&rows, row(["no", "no"])).unwrap();
    let error = load_with(LEAVES_OUT, &rows, &options).unwrap_err().to_string();
    for part in ["rows.jsonl:1", "not found in the text", "{% generation %}", "chat_template_path"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let skip = EncodeOptions { on_untrained: OnUntrained::Skip, ..options };
    assert!(load_with(LEAVES_OUT, &rows, &skip).unwrap_err().to_string().contains("none of 1 rows is left"));
}

/// Messages that are not to be trained are left alone, whichever they are.
#[test]
fn single_answers_can_be_left_out() {
    let temporary = tempfile::tempdir().unwrap();
    let rows = temporary.path().join("rows.jsonl");
    let row = r#"{"messages": [{"role": "assistant", "content": "", "weight": 0}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "same", "weight": 0}, {"role": "user", "content": "same"},
        {"role": "assistant", "content": "same"}]}"#;
    std::fs::write(&rows, row.replace('\n', " ")).unwrap();
    let options = EncodeOptions::from(&TrainConfig::default().data);
    for (case, name) in [
        ("06-empty-answer-marked", "marked"),
        ("06-empty-answer-marked", "unmarked"),
        ("07-no-generation-prompt", "unasked"),
    ] {
        let template = std::fs::read_to_string(folder(case).join(format!("{name}.jinja"))).unwrap();
        let (_, documents) = load_with(&template, &rows, &options).unwrap();
        let (_, marked, _) = &documents[0];
        assert_eq!(marked.matches('⟦').count(), 1, "{marked}");
        assert!(marked.ends_with("<|im_start|>assistant\n⟦same<|im_end|>⟧\n"), "{marked}");
    }
}
