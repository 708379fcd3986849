//! Every kind of row that TRL documents, as TRL's own trainers make tokens of it: the same ids, the same tokens trained, the same
//! rows cut and left out, on tokenizers in the style of six families (`scripts/fixtures/trl_rows.py`).
//!
//! | TRL's type of data | rows here | here |
//! |---|---|---|
//! | language modeling | `text`; `messages`; `conversations` | trained |
//! | prompt-completion | texts; messages; with tools | trained |
//! | preference | texts and messages, the prompt explicit or implicit; with tools | `objective = "dpo"` |
//! | unpaired preference, stepwise supervision, prompt-only | | refused by name: no objective reads them |
//!
//! `assistant_only_loss` and `completion_only_loss` of TRL are one key here, `completion_only_loss`: of conversations it trains the
//! assistant's messages, of prompt and completion the latter. What differs from TRL on purpose is in [`DIFFERENCES`].

use std::collections::BTreeSet;
use std::path::Path;

use qlora::chat::ChatTemplate;
use qlora::tokenizer::Tokenizer;
use qlora::trainer::config::{DataOptions, OnUntrained};
use qlora::trainer::data::packing::best_fit_decreasing;
use qlora::trainer::data::{EncodeOptions, Record, load_jsonl};
use qlora::trainer::encoder::ModelEncoder;
use qlora::trainer::fingerprint::Fingerprint;
use serde_json::{Value, json};

/// A document: its row, its ids, and for each whether it is trained.
type Document = (usize, Vec<u32>, Vec<bool>);

/// Where the tokens are not TRL's on purpose: kind of row, TRL's options, and the reason.
const DIFFERENCES: [(&str, &str, &str); 2] = [
    (
        "conversations of human and gpt",
        "{}",
        "TRL hands ShareGPT's names of the roles to the chat template, which knows them as little as the model does",
    ),
    (
        "long completion messages",
        "{}",
        "of a completion of several messages TRL trains the user's and the tools' as well, unless assistant_only_loss is set",
    ),
];

struct Family {
    _folder: tempfile::TempDir,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    ends: Vec<u32>,
    eos: String,
}

impl Family {
    fn new(values: &Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
        write("tokenizer.json", values["tokenizer"].to_string());
        write("tokenizer_config.json", values["config"].to_string());
        write("chat_template.jinja", values["template"].as_str().unwrap().to_owned());
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        let template = ChatTemplate::from_folder(folder.path(), None).unwrap().unwrap();
        let stated = tokenizer.eos_token_id().unwrap();
        let ends = qlora::end_tokens::end_tokens(&tokenizer, Some(&template), [stated]);
        let eos = values["config"]["eos_token"].as_str().unwrap().to_owned();
        Self { _folder: folder, tokenizer, template, ends, eos }
    }

    /// The documents of rows, as training has them.
    fn documents(&self, rows: &Value, completion_only_loss: bool, max_length: usize) -> Vec<Document> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("train.jsonl");
        let lines = rows.as_array().unwrap().iter().map(|row| row.to_string().replace("{eos}", &self.eos) + "\n");
        std::fs::write(&path, lines.collect::<String>()).unwrap();
        let on_untrained = OnUntrained::Skip;
        let options = DataOptions { completion_only_loss, max_length, on_untrained, ..DataOptions::default() };
        let encoder = ModelEncoder::new(&self.tokenizer, Some(&self.template), &self.ends);
        let dataset = match load_jsonl(&[path], &encoder, &EncodeOptions::from(&options)) {
            Ok(dataset) => dataset,
            // No training without a row; TRL goes on with none.
            Err(error) if error.to_string().contains(" rows is left: ") => return Vec::new(),
            Err(error) => panic!("{error}"),
        };
        let document = |i: usize| {
            let line: usize = dataset.origin(i).rsplit_once(':').unwrap().1.parse().unwrap();
            let document = dataset.document(i);
            (line - 1, document.ids.to_vec(), document.trained.to_vec())
        };
        (0..dataset.len()).map(document).collect()
    }

    /// The text with trained stretches in ⟦⟧, for messages.
    fn marked(&self, (_, ids, trained): &Document) -> String {
        let piece = |(id, trained): (&u32, &bool)| {
            let text = self.tokenizer.id_to_token(*id).unwrap_or_default();
            if *trained { format!("⟦{text}⟧") } else { text }
        };
        ids.iter().zip(trained).map(piece).collect::<String>().replace("⟧⟦", "·")
    }
}

fn expected(document: &Value) -> Document {
    let (row, ids) = (document[0].as_u64().unwrap() as usize, serde_json::from_value(document[1].clone()).unwrap());
    let ids: Vec<u32> = ids;
    let edges: Vec<usize> = serde_json::from_value(document[2].clone()).unwrap();
    let trained = (0..ids.len()).map(|i| edges.iter().filter(|&&edge| edge <= i).count() % 2 == 1).collect();
    (row, ids, trained)
}

fn facts() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/trl/rows.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn rows_of_every_kind_are_what_trl_makes_of_them() {
    let facts = facts();
    let (mut problems, mut compared, mut kinds) = (Vec::new(), 0, BTreeSet::new());
    for (name, values) in facts["families"].as_object().unwrap() {
        let family = Family::new(values);
        for case in facts["cases"].as_array().unwrap().iter().filter(|case| case["family"] == name.as_str()) {
            let kind = case["kind"].as_str().unwrap();
            let max_length = case["max_length"].as_u64().unwrap() as usize;
            let only_completions = case["completion_only_loss"].as_bool().unwrap();
            let documents = family.documents(&facts["rows"][kind], only_completions, max_length);
            let expected: Vec<Document> = case["documents"].as_array().unwrap().iter().map(expected).collect();
            let title = format!("{name}, {kind}, {}, max_length {max_length}", case["trl"]);
            kinds.insert(kind.to_owned());
            let rows = |documents: &[Document]| documents.iter().map(|document| document.0).collect::<Vec<_>>();
            if rows(&documents) != rows(&expected) {
                problems.push(format!("{title}: rows {:?}, of TRL {:?}", rows(&documents), rows(&expected)));
                continue;
            }
            for (ours, theirs) in documents.iter().zip(&expected) {
                compared += 1;
                let options = case["trl"].to_string();
                let reason = DIFFERENCES.iter().find(|(of, with, _)| *of == kind && *with == options);
                if (ours == theirs) == reason.is_some() {
                    let (ours, theirs, row) = (family.marked(ours), family.marked(theirs), ours.0);
                    problems.push(format!("{title}, row {row} ({reason:?}):\n  here {ours}\n  TRL  {theirs}"));
                }
            }
        }
    }
    assert!(problems.is_empty(), "{} of {compared}:\n{}", problems.len(), problems.join("\n"));
    let rows = facts["rows"].as_object().unwrap();
    assert_eq!(kinds.len(), rows.len(), "every kind of row is compared");
    assert_eq!(facts["families"].as_object().unwrap().len(), 6);
    assert!(compared >= 500, "{compared}");
}

/// Rows become the tokens that they became when `ENCODING` in `crates/qlora-trainer/src/data/encode.rs` was set. Tokens that are
/// kept on the disk are found by that number, so whoever changes the rules has to raise it.
#[test]
fn rows_become_the_tokens_of_this_version_of_the_encoding() {
    /// Of the ids and masks with `ENCODING = 1`.
    const TOKENS: &str = "5bbb00f080d7fa5b";
    let facts = facts();
    let mut tokens = Fingerprint::new();
    for (name, values) in facts["families"].as_object().unwrap() {
        let family = Family::new(values);
        for case in facts["cases"].as_array().unwrap().iter().filter(|case| case["family"] == name.as_str()) {
            let max_length = case["max_length"].as_u64().unwrap() as usize;
            let only_completions = case["completion_only_loss"].as_bool().unwrap();
            let rows = &facts["rows"][case["kind"].as_str().unwrap()];
            let documents = family.documents(rows, only_completions, max_length);
            tokens.word(documents.len() as u64);
            for (row, ids, trained) in documents {
                tokens.word(row as u64).word(ids.len() as u64);
                for (id, trained) in ids.into_iter().zip(trained) {
                    tokens.word(u64::from(id) << 1 | u64::from(trained));
                }
            }
        }
    }
    assert_eq!(
        tokens.to_string(),
        TOKENS,
        "if this changes on purpose, raise ENCODING in crates/qlora-trainer/src/data/encode.rs and set the new value here"
    );
}

/// Bins hold documents of the same lengths as those of TRL's `packing_strategy = "bfd"`.
#[test]
fn documents_are_packed_as_trl_packs_them() {
    let packing = &facts()["packing"];
    let lengths: Vec<usize> = serde_json::from_value(packing["lengths"].clone()).unwrap();
    let expected: Vec<Vec<usize>> = serde_json::from_value(packing["bins"].clone()).unwrap();
    let of_bin = |bin: Vec<usize>| {
        let mut bin: Vec<usize> = bin.into_iter().map(|document| lengths[document]).collect();
        bin.sort_unstable();
        bin
    };
    let capacity = packing["capacity"].as_u64().unwrap() as usize;
    let mut bins: Vec<Vec<usize>> = best_fit_decreasing(&lengths, capacity).into_iter().map(of_bin).collect();
    bins.sort_unstable();
    assert_eq!(bins, expected);
}

/// What TRL knows and nothing here reads is not trained on by mistake.
#[test]
fn kinds_without_an_objective_are_refused_by_name() {
    let user = json!([{"role": "user", "content": "a"}]);
    let answer = json!([{"role": "assistant", "content": "b"}]);
    for (row, parts) in [
        (json!({"prompt": "a", "completion": "b", "label": true}), ["KTOTrainer", "objective = \"dpo\""]),
        (json!({"prompt": user, "completion": answer, "label": false}), ["unpaired preference", "keep the rows"]),
        (json!({"prompt": "a", "completions": ["b", "c"], "labels": [true, false]}), ["stepwise", "reward models"]),
        (json!({"prompt": "a"}), ["`prompt` without `completion`", "qlora generate --batch"]),
        (json!({"prompt": user}), ["a prompt alone", "GRPO"]),
    ] {
        let message = Record::from_json(&row).unwrap_err();
        assert!(parts.iter().all(|part| message.contains(part)), "{row}: {message}");
    }
    // A column of this name that is no verdict is a column like any other.
    let row = json!({"prompt": "a", "completion": "b", "label": "greeting"});
    assert_eq!(
        Record::from_json(&row).unwrap(),
        Record::from_json(&json!({"prompt": "a", "completion": "b"})).unwrap()
    );
}
