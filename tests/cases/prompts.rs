//! The prompt that is trained is the prompt that is meant: cases from public reports, with the ids that transformers gives.
//!
//! Tried for each kind (`scripts/fixtures/prompts.py` makes the rows and the ids; each is read as training data and as a prompt):
//! - nulls: in rows, messages, calls, arguments, tools; empty lists of calls;
//! - tools: a list, a text, an indented text, a list of texts, one object, none in three forms, beside `prompt` and `completion`,
//!   a template that does not know them; texts that are no JSON, numbers, texts in lists;
//! - arguments: objects and texts, for templates that want objects, either, or texts; compact texts, texts that are no JSON,
//!   calls as one text, OpenAI's old `function_call`;
//! - `system` and `system_prompt` beside `conversations`, `messages`, `prompt`; said twice, empty, against the conversation's own;
//! - `function_call` and `observation` with and without a template that knows calls, two calls, both spellings of messages;
//! - `chat_template_kwargs` in rows (object and text) and in the configuration, and keys that the template does not read;
//! - templates by name, as a list, as files and in GGUF; templates with CR LF; contents as parts;
//! - files: BOM, UTF-16 and UTF-32 with and without a mark, CR, CR LF, NUL, NaN and Infinity, surrogates, keys twice, gzip, Parquet;
//! - tokens in `added_tokens_decoder`, `added_tokens.json`, `special_tokens_map.json`, with roles, with flags, with gaps;
//!   `add_bos_token`, `add_eos_token`, `split_special_tokens`; GGUF files with and without token types.

use std::path::{Path, PathBuf};

use qlora::chat::ChatTemplate;
use qlora::tokenizer::Tokenizer;
use qlora::trainer::config::{DataOptions, OnOverlong, TemplateKwargs, TrainConfig};
use qlora::trainer::data::{Conversation, Dataset, EncodeOptions, Record, load_jsonl, read_json_lines, read_records};
use qlora::trainer::encoder::ModelEncoder;
use serde_json::{Map, Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cases/prompts")
}

fn facts() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixtures().join("facts.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A folder with a tokenizer and its template.
struct Opened {
    folder: tempfile::TempDir,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
}

impl Opened {
    fn new(tokenizer: &str, config: &Value, files: &Value) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixtures().join(tokenizer), folder.path().join("tokenizer.json")).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        for (name, text) in files.as_object().unwrap() {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text.as_str().unwrap()).unwrap();
        }
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        let template = ChatTemplate::from_folder(folder.path(), None).unwrap();
        Self { folder, tokenizer, template }
    }

    fn chatml() -> Self {
        let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        Self::new("tokenizer.json", &json!({"eos_token": "<|im_end|>"}), &json!({"chat_template.jinja": source}))
    }

    fn load(&self, content: &[u8], options: &DataOptions) -> Result<Dataset, String> {
        let path = self.file(content);
        let ends: Vec<u32> = self.tokenizer.eos_token_id().into_iter().collect();
        let encoder = ModelEncoder::new(&self.tokenizer, self.template.as_ref(), &ends)
            .with_template_kwargs(options.chat_template_kwargs.as_map());
        load_jsonl(&[path], &encoder, &EncodeOptions::from(options)).map_err(|error| error.to_string())
    }

    fn file(&self, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join("train.jsonl");
        std::fs::write(&path, content).unwrap();
        path
    }
}

fn text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    tokenizer.decode(ids, false).unwrap()
}

/// Every entry of a case: as training data, and as a prompt for its last message.
fn check(case: &str, count: usize) {
    let facts = facts();
    let entries: Vec<&Value> =
        facts["entries"].as_array().unwrap().iter().filter(|entry| entry["case"] == case).collect();
    assert_eq!(entries.len(), count, "{case}");
    for entry in entries {
        let name = format!("{case}, {}", entry["name"].as_str().unwrap());
        let opened = Opened::new("tokenizer.json", &entry["config"], &entry["files"]);
        let kwargs = entry["kwargs"].as_object().unwrap().clone();
        let options = DataOptions { chat_template_kwargs: kwargs.clone().into(), ..DataOptions::default() };
        let jsonl = entry["jsonl"].as_str().unwrap();
        let dataset = opened.load(jsonl.as_bytes(), &options).unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected: Vec<Vec<u32>> = entry["ids"].as_array().unwrap().iter().map(ids).collect();
        assert_eq!(dataset.len(), expected.len(), "{name}");
        for (i, expected) in expected.iter().enumerate() {
            let got = dataset.document(i).ids;
            assert_eq!(text(&opened.tokenizer, got), text(&opened.tokenizer, expected), "{name}, row {i}");
            assert_eq!(got, expected, "{name}, row {i}");
            assert!(dataset.document(i).labels().iter().any(|label| *label >= 0), "{name}, row {i}");
        }
        let remarks = dataset.remarks().join("\n");
        for remark in entry["remarks"].as_array().unwrap() {
            let remark = remark.as_str().unwrap();
            assert!(remarks.contains(remark) && remarks.contains("train.jsonl"), "{name}: {remark} in {remarks:?}");
        }
        assert!(!remarks.is_empty() || entry["remarks"].as_array().unwrap().is_empty(), "{name}");
        if entry["remarks"].as_array().unwrap().is_empty() {
            assert_eq!(remarks, "", "{name}");
        }
        check_prompts(&opened, entry, &kwargs, &name);
    }
}

fn check_prompts(opened: &Opened, entry: &Value, kwargs: &Map<String, Value>, name: &str) {
    let encoder = ModelEncoder::new(&opened.tokenizer, opened.template.as_ref(), &[]).with_template_kwargs(kwargs);
    let path = opened.file(entry["jsonl"].as_str().unwrap().as_bytes());
    let records = read_records(&path).unwrap();
    for (i, (record, expected)) in records.iter().zip(entry["prompts"].as_array().unwrap()).enumerate() {
        let mut conversation = match record {
            Record::Chat(conversation) => conversation.clone(),
            other => other.instruction_chat().unwrap(),
        };
        conversation.messages.pop();
        let prompt = encoder.prompt(&conversation).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(text(&opened.tokenizer, &prompt), text(&opened.tokenizer, &ids(expected)), "{name}, prompt {i}");
        assert_eq!(prompt, ids(expected), "{name}, prompt {i}");
    }
}

#[test]
fn case_01_null_tool_calls() {
    check("01-null-tool-calls", 5);
}

#[test]
fn case_02_tools_json_string() {
    check("02-tools-json-string", 8);
    let opened = Opened::chatml();
    let row = |tools: Value| {
        let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        json!({"messages": messages, "tools": tools})
    };
    for (tools, part) in [
        (json!("[not json"), "`tools` is a text that is not valid JSON"),
        (json!(7), "`tools` must be a list of tools, or a text with one, not the number 7"),
        (json!("7"), "not the number 7"),
        (json!(["[]"]), "`tools[0]` must be an object, not a list"),
        (json!(["{"]), "`tools[0]` is a text that is not valid JSON"),
        (json!([[]]), "`tools[0]` must be an object, not a list"),
    ] {
        let content = format!("{}\n\n{}\n", row(Value::Null), row(tools));
        let error = opened.load(content.as_bytes(), &DataOptions::default()).unwrap_err();
        assert!(error.contains("train.jsonl:3: ") && error.contains(part), "{error}");
    }
}

#[test]
fn case_03_arguments_json_string() {
    check("03-arguments-json-string", 11);
    // A call that the template does not write would leave an empty answer.
    let opened = Opened::chatml();
    let call =
        json!({"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]});
    let row = json!({"messages": [{"role": "user", "content": "a"}, call]}).to_string();
    let error = opened.load(row.as_bytes(), &DataOptions::default()).unwrap_err();
    assert!(error.contains("train.jsonl:1: message 2 only has tool_calls"), "{error}");
}

#[test]
fn case_10_sharegpt_system_column() {
    check("10-sharegpt-system-column", 9);
}

#[test]
fn case_11_sharegpt_function_call() {
    check("11-sharegpt-function-call", 5);
    let opened = Opened::chatml();
    for (value, part) in [
        ("weather(Oslo)", "`conversations[1]`: `value` is a text that is not valid JSON"),
        ("7", "a function_call must be a JSON object with `name` and `arguments`"),
        ("{}", "a function_call must be a JSON object with `name` and `arguments`"),
    ] {
        let row =
            json!({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]});
        let error = opened.load(row.to_string().as_bytes(), &DataOptions::default()).unwrap_err();
        assert!(error.contains("train.jsonl:1: ") && error.contains(part), "{error}");
    }
}

#[test]
fn case_12_row_template_kwargs() {
    check("12-row-template-kwargs", 5);
    // The same from TOML, from the command line of finetune (`--set`), and from that of generate.
    let minimal = "[model]\nmodel_name_or_path = \"m\"\n[data]\ntrain_file = \"t\"\n";
    let expected = json!({"enable_thinking": false, "date_string": "2024-07-26", "n": [1]});
    let toml =
        format!("{minimal}[data.chat_template_kwargs]\nenable_thinking = false\ndate_string = 2024-07-26\nn = [1]\n");
    let config = TrainConfig::from_toml_str(&toml).unwrap();
    assert_eq!(Value::Object(config.data.chat_template_kwargs.as_map().clone()), expected);
    assert_eq!(TrainConfig::from_toml_str(&config.to_toml()).unwrap(), config);
    for value in [expected.to_string().as_str(), "{ enable_thinking = false, date_string = 2024-07-26, n = [1] }"] {
        let mut config = TrainConfig::from_toml_str(minimal).unwrap();
        config.set("data.chat_template_kwargs", value).unwrap();
        assert_eq!(Value::Object(config.data.chat_template_kwargs.as_map().clone()), expected, "{value}");
    }
    assert_eq!(expected.to_string().parse::<TemplateKwargs>().unwrap().as_map(), expected.as_object().unwrap());
    for (wrong, part) in [("[1]", "JSON object"), ("{", "JSON object"), ("", "JSON object")] {
        assert!(wrong.parse::<TemplateKwargs>().unwrap_err().contains(part), "{wrong}");
    }
    for (kwargs, part) in [
        (json!({"tools": []}), "must not hold `tools`"),
        (json!([1]), "`chat_template_kwargs` must be an object, not a list"),
        (json!("[1]"), "`chat_template_kwargs` must be an object, not a list"),
        (json!("{"), "not valid JSON"),
    ] {
        let row = json!({"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": kwargs});
        let error = Opened::chatml().load(row.to_string().as_bytes(), &DataOptions::default()).unwrap_err();
        assert!(error.contains("train.jsonl:1: ") && error.contains(part), "{error}");
    }
}

#[test]
fn case_14_tool_use_template() {
    check("14-tool-use-template", 2);
}

#[test]
fn contents_and_line_ends() {
    check("content-parts", 2);
    check("line-ends", 1);
}

#[test]
fn case_17_odd_jsonl() {
    let opened = Opened::chatml();
    let row =
        |instruction: &str| format!("{{\"instruction\": \"{instruction}\", \"input\": \"\", \"output\": \"Hello.\"}}");
    let two = format!("{}\n{}\n", row("Hi"), row("how are you?"));
    let load = |content: &[u8]| opened.load(content, &DataOptions::default());
    let expected = load(two.as_bytes()).unwrap();
    let same = |content: &[u8], what: &str| {
        let dataset = load(content).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(dataset.len(), 2, "{what}");
        for i in 0..2 {
            assert_eq!(dataset.document(i).ids, expected.document(i).ids, "{what}");
        }
    };
    same(format!("\u{feff}{two}").as_bytes(), "BOM");
    same(format!("{}\n\u{feff}{}\n", row("Hi"), row("how are you?")).as_bytes(), "BOM of a second file");
    same(two.replace('\n', "\r").as_bytes(), "CR");
    same(two.replace('\n', "\r\n").as_bytes(), "CR LF");
    same(two.replace("\"input\": \"\"", "\"input\": NaN").as_bytes(), "NaN");
    same(two.replace("\"input\": \"\"", "\"input\": null, \"score\": -Infinity").as_bytes(), "Infinity");
    same(two.replace("{\"instruction\"", "{\"instruction\": \"x\", \"instruction\"").as_bytes(), "a key twice");
    assert_eq!(read_json_lines(&opened.file(two.replace('\n', "\r").as_bytes())).unwrap()[1].number, 2);

    let utf16 = |bytes: fn(u16) -> [u8; 2]| two.encode_utf16().flat_map(bytes).collect::<Vec<_>>();
    let utf32 = |bytes: fn(u32) -> [u8; 4]| two.chars().flat_map(|c| bytes(c as u32)).collect::<Vec<_>>();
    for (content, part) in [
        (utf16(u16::to_le_bytes), "train.jsonl: the file is UTF-16 text"),
        (utf16(u16::to_be_bytes), "train.jsonl: the file is UTF-16 text"),
        ([b"\xff\xfe".to_vec(), utf16(u16::to_le_bytes)].concat(), "iconv -f UTF-16LE -t UTF-8"),
        (utf32(u32::to_le_bytes), "train.jsonl: the file is UTF-32 text"),
        ([b"\xff\xfe\0\0".to_vec(), utf32(u32::to_le_bytes)].concat(), "UTF-32"),
        ([two.as_bytes(), &[0; 64]].concat(), "train.jsonl:3: a NUL byte (byte 1 of the line)"),
        (two.replace("how", "\\ud83d").into_bytes(), "train.jsonl:2: not valid JSON: "),
        (two.replace("how", "\\ud83d").into_bytes(), "lone surrogate"),
        (two.replace("\"\", ", "nan, ").into_bytes(), "train.jsonl:1: not valid JSON"),
        (b"\x1f\x8b\x08\0abc".to_vec(), "gzip"),
        (b"PAR1abc".to_vec(), "Parquet"),
    ] {
        let error = load(&content).unwrap_err();
        assert!(error.contains(part), "{part}: {error}");
    }
    // Columns that mean nothing are named, once a file.
    let row = "{\"text\": \"a\", \"id\": 1, \"source\": null}\n{\"text\": \"b\", \"id\": 2, \"url\": \"x\"}\n";
    let remarks = load(row.as_bytes()).unwrap().remarks();
    assert_eq!(remarks.len(), 1);
    assert!(remarks[0].ends_with("train.jsonl: columns that are not used: `id`, `url`"), "{remarks:?}");
}

#[test]
fn case_20_double_bos_raw() {
    let facts = facts();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
    for tokenizer in ["llama-bos-tokenizer.json", "llama-bos-eos-tokenizer.json"] {
        let opened = Opened::new(tokenizer, &config, &json!({}));
        let (prompt, expected) = facts["one_bos"].as_object().unwrap().iter().next().unwrap();
        let expected = ids(expected);
        assert_eq!(expected[0], 1);
        assert_eq!(opened.tokenizer.encode_prompt(prompt).unwrap(), expected, "{tokenizer}");
        assert_eq!(opened.tokenizer.encode_prompt(&format!("<s>{prompt}")).unwrap(), expected, "{tokenizer}");
        // An EOS that the text itself ends with stays.
        assert_eq!(opened.tokenizer.encode_prompt(&format!("{prompt}</s>")).unwrap().last(), Some(&2), "{tokenizer}");
        for row in [
            json!({"text": format!("<s>{prompt}")}),
            json!({"prompt": "<s>Hello how", "completion": " are you?"}),
            json!({"prompt": "<s>Hello how", "completion": " are you?</s>"}),
        ] {
            let dataset = opened.load(row.to_string().as_bytes(), &DataOptions::default()).unwrap();
            assert_eq!(dataset.document(0).ids, [expected.as_slice(), &[2]].concat(), "{tokenizer}: {row}");
            assert!(dataset.stats().to_string().contains("1 with a second BOS removed"), "{}", dataset.stats());
            assert_eq!(dataset.stats().boundary_merged, 0, "{tokenizer}: {row}");
        }
    }
    let without = Opened::new("llama-tokenizer.json", &config, &json!({}));
    assert_eq!(without.tokenizer.encode_prompt("<s>Hello").unwrap()[0], 1);
    assert_ne!(without.tokenizer.encode_prompt("Hello").unwrap()[0], 1);
}

#[test]
fn case_24_added_tokens_config() {
    let facts = facts();
    let variants = facts["added_tokens"].as_array().unwrap();
    assert!(variants.len() >= 24);
    for variant in variants {
        let name = variant["name"].as_str().unwrap();
        let file = format!("{}-tokenizer.json", variant["tokenizer"].as_str().unwrap());
        let Opened { tokenizer, folder, .. } = Opened::new(&file, &variant["config"], &variant["files"]);
        let text = variant["text"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&variant["ids"]), "{name}");
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&variant["plain"]), "{name}");
        assert_eq!(tokenizer.vocab_size() as u64, variant["size"].as_u64().unwrap(), "{name}");
        for id in ids(&variant["special"]) {
            assert!(tokenizer.is_special(id), "{name}: {id}");
        }
        // A saved tokenizer knows the tokens by itself.
        let saved = folder.path().join("saved.json");
        tokenizer.save(&saved).unwrap();
        if name != "split_special_tokens" {
            assert_eq!(
                Tokenizer::from_file(&saved).unwrap().encode(text, true).unwrap(),
                ids(&variant["ids"]),
                "{name}"
            );
        }
    }
    let base = json!({"eos_token": "</s>"});
    for (config, files, part) in [
        (json!({"added_tokens_decoder": {"x": {"content": "a"}}}), json!({}), "tokenizer_config.json"),
        (json!({"added_tokens_decoder": {"1": "a"}}), json!({}), "the entry of 1 is no token"),
        (base, json!({"added_tokens.json": "{\"a\": -1}"}), "added_tokens.json"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixtures().join("llama-tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        for (name, text) in files.as_object().unwrap() {
            std::fs::write(folder.path().join(name), text.as_str().unwrap()).unwrap();
        }
        let error = Tokenizer::from_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn case_41_gguf_added_tokens() {
    let facts = &facts()["gguf"];
    let text = facts["text"].as_str().unwrap();
    for file in facts["files"].as_array().unwrap() {
        let file = file.as_str().unwrap();
        let tokenizer = Tokenizer::from_gguf_file(fixtures().join(format!("{file}.gguf"))).unwrap();
        let expected = ids(&facts["ids"]);
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{file}");
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), text, "{file}");
        let skipped = tokenizer.decode(&expected, true).unwrap();
        assert!(skipped.contains("<think>") && !skipped.contains("<|im_end|>"), "{file}: {skipped}");
    }
}

#[test]
fn case_27_boundary_space() {
    let opened = Opened::new("boundary-tokenizer.json", &json!({"eos_token": "<|im_end|>"}), &json!({}));
    let row = json!({"prompt": "question one answer ", "completion": "fine"}).to_string();
    let dataset = opened.load(row.as_bytes(), &DataOptions::default()).unwrap();
    let eos = opened.tokenizer.eos_token_id().unwrap();
    assert_eq!(dataset.document(0).ids, [ids(&facts()["boundary"]), vec![eos]].concat());
    assert_eq!((dataset.stats().tokens, dataset.stats().trained_tokens), (7, 2));
    assert!(dataset.stats().to_string().contains("1 with a token across prompt and completion"), "{}", dataset.stats());
}

#[test]
fn case_28_truncated_answers() {
    let opened = Opened::chatml();
    let long = "the quick brown fox ".repeat(20);
    let row =
        |q: &str, a: &str| json!({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]});
    let content = format!("{}\n{}\n{}\n", row(&long, "fine"), row("Hi", &long), row("Hi", "Hello."));
    let load = |on_overlong| {
        opened.load(content.as_bytes(), &DataOptions { max_length: 40, on_overlong, ..DataOptions::default() })
    };
    let stats = *load(OnOverlong::Truncate).unwrap().stats();
    assert_eq!((stats.documents, stats.truncated, stats.dropped_after_truncation), (2, 1, 1));
    let stats = *load(OnOverlong::Drop).unwrap().stats();
    assert_eq!((stats.documents, stats.truncated, stats.dropped_overlong), (1, 0, 2));
    let error = load(OnOverlong::Error).unwrap_err();
    assert!(error.contains("train.jsonl:1: ") && error.contains("more than max_length = 40"), "{error}");
}

/// The prompts that `generate --batch` reads from lines.
#[test]
fn prompts_of_a_file() {
    let asked = |row: Value| Conversation::prompt_from_json(&row);
    let roles = |row: Value| -> Vec<String> {
        asked(row)
            .unwrap()
            .messages
            .into_iter()
            .map(|message| format!("{}: {}", message.role, message.content))
            .collect()
    };
    assert_eq!(roles(json!({"prompt": "a", "system": "s", "id": 1})), ["system: s", "user: a"]);
    assert_eq!(roles(json!({"prompt": [{"role": "user", "content": "a"}]})), ["user: a"]);
    assert_eq!(roles(json!({"conversations": [{"from": "human", "value": "a"}], "prompt": null})), ["user: a"]);
    let row = json!({"messages": [{"role": "user", "content": "a"}], "tools": "[{\"name\": \"f\"}]",
                     "chat_template_kwargs": {"enable_thinking": false}});
    let conversation = asked(row).unwrap();
    assert_eq!(conversation.tools, Some(json!([{"name": "f"}])));
    assert_eq!(conversation.template_kwargs["enable_thinking"], false);
    assert!(asked(json!({"text": "a"})).unwrap_err().contains("neither `prompt` nor `messages`; found `text`"));
}
