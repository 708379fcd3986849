//! The parsers of configurations, tokenizers, templates and rows, and how each is driven.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use qlora::chat::{ChatTemplate, Message, TemplateArguments};
use qlora::config::ModelConfig;
use qlora::lora::TargetModules;
use qlora::open::GenerationDefaults;
use qlora::sampling::GenerationConfig;
use qlora::tokenizer::Tokenizer;
use qlora::trainer::TrainConfig;
use qlora::trainer::config::DataOptions;
use qlora::trainer::data::{DataFile, EncodeOptions, RowSource, load_jsonl};
use qlora::trainer::encoder::ModelEncoder;
use serde_json::{Value, json};

use super::mutate;
use super::mutate_files;
use super::random_folder::{GENERATION, TEMPLATE};
use super::seeds::{ROWS, Seeds, fixture, fixtures};
use super::targets::{Target, copy, is_json, put, try_tokenizer};

pub(crate) fn all(folder: &Path, seeds: &Seeds) -> Result<Vec<Target>> {
    Ok(vec![
        model_config()?,
        generation_config(folder, seeds)?,
        tokenizer(folder, seeds)?,
        sentencepiece(folder)?,
        tokenizer_config(folder, seeds)?,
        chat_template()?,
        rows(folder, seeds)?,
        data_files(folder)?,
        training_toml()?,
        target_modules(),
    ])
}

fn model_config() -> Result<Target> {
    let configs: Vec<Value> = serde_json::from_slice(&fixture("loading/configs.json")?)?;
    let texts = configs.iter().map(|entry| entry["config"].to_string().into_bytes());
    let files: Vec<Vec<u8>> = texts.filter(|text| read_model_config(text)).collect();
    Ok(Target {
        name: "config.json",
        weight: 8,
        files,
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(|_, input| read_model_config(input)),
    })
}

fn read_model_config(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input);
    let Ok(config) = ModelConfig::from_json(&text, Path::new("config.json")) else { return false };
    let _ = (config.tensor_shapes().len(), config.parameter_count());
    ModelConfig::from_json(&config.to_json(), Path::new("config.json")).is_ok()
}

fn generation_config(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let path = folder.join("generation_config.json");
    let model = ModelConfig::from_json_file(seeds.model.join("config.json"))?;
    Ok(Target {
        name: "generation_config.json",
        weight: 4,
        files: vec![GENERATION.into()],
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(move |_, input| {
            put(&path, input);
            let config = GenerationConfig::for_model(Some(&path), &model).and_then(|config| config.validate());
            GenerationDefaults::read(&path).is_ok() && config.is_ok()
        }),
    })
}

fn tokenizer(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let path = folder.join("tokenizer.json");
    Ok(Target {
        name: "tokenizer.json",
        weight: 8,
        files: tokenizers(seeds)?,
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(move |_, input| {
            put(&path, input);
            Tokenizer::from_file(&path).is_ok_and(|tokenizer| try_tokenizer(&tokenizer))
        }),
    })
}

fn sentencepiece(folder: &Path) -> Result<Target> {
    const KINDS: [&str; 5] = ["bpe", "gemma", "generic", "unigram", "plain"];
    let mut folders = Vec::new();
    for kind in KINDS {
        folders.push(copy(folder, &format!("sentencepiece-{kind}"), &fixtures().join("sentencepiece").join(kind))?);
    }
    Ok(Target {
        name: "tokenizer.model",
        weight: 8,
        files: folders.iter().map(|folder| fs::read(folder.join("tokenizer.model"))).collect::<Result<_, _>>()?,
        mutate: mutate::bytes,
        // The first field is a piece.
        passes: |input| input.starts_with(b"\x0a"),
        run: Box::new(move |which, input| {
            put(&folders[which].join("tokenizer.model"), input);
            Tokenizer::from_folder(&folders[which]).is_ok_and(|tokenizer| try_tokenizer(&tokenizer))
        }),
    })
}

/// A tokenizer of every kind of model, normalizer, pre-tokenizer, post-processor and decoder.
fn tokenizers(seeds: &Seeds) -> Result<Vec<Vec<u8>>> {
    let added = json!([
        {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
        {"id": 1, "content": "</s>", "single_word": true, "lstrip": true, "rstrip": true, "normalized": true, "special": false},
    ]);
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let of = |model: Value, normalizer: Value, pre: Value, post: Value, decoder: Value| {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre, "post_processor": post, "decoder": decoder, "model": model,
        })
        .to_string()
        .into_bytes()
    };
    let split = json!({"type": "Split", "pattern": {"Regex": "\\p{L}+|\\d{1,3}| ?[^\\s]+|\\s+"}, "behavior": "Isolated", "invert": false});
    Ok(vec![
        fs::read(seeds.model.join("tokenizer.json"))?,
        of(
            json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                "vocab": {"<s>": 0, "</s>": 1, "a": 2, "Ġ": 3, "t": 4, "h": 5, "e": 6, "th": 7, "the": 8, "Ġa": 9},
                "merges": [["t", "h"], ["th", "e"], ["Ġ", "a"]],
            }),
            json!({"type": "NFC"}),
            json!({"type": "Sequence", "pretokenizers": [split, byte_level]}),
            json!({"type": "Sequence", "processors": [byte_level, template]}),
            byte_level.clone(),
        ),
        of(
            json!({"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "the": 3, "water": 4}}),
            json!({"type": "Sequence", "normalizers": [{"type": "Strip", "strip_left": true, "strip_right": true},
                {"type": "Replace", "pattern": {"String": "x"}, "content": "y"}, {"type": "Lowercase"}]}),
            json!({"type": "WhitespaceSplit"}),
            template.clone(),
            Value::Null,
        ),
        of(
            json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
                "vocab": {"<s>": 0, "</s>": 1, "[UNK]": 2, "the": 3, "wat": 4, "##er": 5}}),
            json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}),
            json!({"type": "BertPreTokenizer"}),
            json!({"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}),
            json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        ),
        of(
            json!({"type": "Unigram", "unk_id": 2, "byte_fallback": false,
                "vocab": [["<s>", 0.0], ["</s>", 0.0], ["<unk>", -1.0], ["▁the", -2.0], ["▁", -3.0], ["wat", -4.0], ["er", -5.0]]}),
            json!({"type": "Prepend", "prepend": "▁"}),
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true}),
            json!({"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0], "trim_offsets": true, "add_prefix_space": true}),
            json!({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        ),
    ])
}

fn tokenizer_config(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let folder = copy(folder, "tokenizer-config", &seeds.model)?;
    let full = json!({
        "add_bos_token": true, "add_eos_token": false, "added_tokens_decoder": {
            "0": {"content": "<unk>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true},
            "1": {"content": "<s>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true},
            "2": {"content": "</s>", "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true},
        },
        "additional_special_tokens": [], "bos_token": "<s>", "eos_token": "</s>", "unk_token": {"content": "<unk>"},
        "pad_token": null, "clean_up_tokenization_spaces": false, "model_max_length": 1000000000000000019884624838656.0,
        "tokenizer_class": "LlamaTokenizer", "use_default_system_prompt": false, "legacy": true,
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": TEMPLATE}],
    });
    Ok(Target {
        name: "tokenizer_config.json",
        weight: 6,
        files: vec![fs::read(folder.join("tokenizer_config.json"))?, full.to_string().into_bytes()],
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(move |_, input| {
            put(&folder.join("tokenizer_config.json"), input);
            let template = ChatTemplate::from_folder(&folder, None);
            let tools = ChatTemplate::from_folder(&folder, Some("tool_use"));
            for template in [&template, &tools].into_iter().flatten().flatten() {
                try_template(template);
            }
            Tokenizer::from_folder(&folder).is_ok_and(|tokenizer| try_tokenizer(&tokenizer)) && template.is_ok()
        }),
    })
}

/// A conversation with everything that templates ask for.
fn conversation() -> Vec<Message> {
    let messages = json!([
        {"role": "system", "content": "be"},
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "id": "abcdefgh1", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "name": "f", "tool_call_id": "abcdefgh1", "content": "2"},
        {"role": "assistant", "content": "<think>hm</think>two"},
    ]);
    serde_json::from_value(messages).expect("these are messages")
}

fn arguments() -> TemplateArguments {
    let tools = json!([{"type": "function", "function": {"name": "f", "description": "d",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}}]);
    [("tools".to_owned(), tools), ("enable_thinking".to_owned(), json!(false))].into_iter().collect()
}

/// Renders short and long conversations, all of which may be refused; whether one was rendered.
fn try_template(template: &ChatTemplate) -> bool {
    let (messages, arguments) = (conversation(), arguments());
    let short = template.render(&messages[1..2], true, &TemplateArguments::new()).is_ok();
    let _ = template.render_with_answers(&messages[..2], &arguments);
    let _ = template.render_with_answers(&messages, &arguments);
    template.render(&messages, false, &arguments).is_ok() || short
}

/// Fragments of which templates are composed.
const JINJA: [&str; 40] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{%-",
    "-%}",
    "{#",
    "#}",
    " if ",
    " else ",
    " endif ",
    " for ",
    " in ",
    " endfor ",
    " set ",
    " macro ",
    " endmacro ",
    " is defined ",
    " not ",
    " | ",
    "tojson",
    "trim",
    "namespace(",
    "range(999999999)",
    "loop.index0",
    "messages",
    "[1:]",
    "[::-1]",
    "[-9223372036854775808]",
    "'%99999999d' | format(1)",
    " ~ ",
    " * ",
    "9223372036854775807",
    "''",
    "raise_exception('x')",
    "strftime_now('%d %b %Y')",
    ".items()",
    ".split('')",
    "{% generation %}",
    "{% endgeneration %}",
];

fn special_tokens() -> impl Iterator<Item = (String, String)> {
    [("bos_token", "<s>"), ("eos_token", "</s>")].into_iter().map(|(name, text)| (name.to_owned(), text.to_owned()))
}

fn compile(input: &[u8]) -> Option<ChatTemplate> {
    ChatTemplate::new(&String::from_utf8_lossy(input), special_tokens()).ok()
}

fn chat_template() -> Result<Target> {
    let golden: Value = serde_json::from_slice(&fixture("chat/golden.json")?)?;
    let templates = golden["templates"].as_object().context("templates by name")?;
    let sources = templates.values().filter_map(|template| template["source"].as_str());
    let files = sources.chain([TEMPLATE]).map(|source| source.as_bytes().to_vec()).collect();
    Ok(Target {
        name: "chat template",
        weight: 10,
        files,
        mutate: |rng, input, other| mutate::words(rng, input, other, &JINJA),
        passes: |input| compile(input).is_some(),
        run: Box::new(|_, input| compile(input).is_some_and(|template| try_template(&template))),
    })
}

fn rows(folder: &Path, seeds: &Seeds) -> Result<Target> {
    let path = folder.join("input.jsonl");
    let tokenizer = Tokenizer::from_folder(&seeds.model)?;
    let golden: Value = serde_json::from_slice(&fixture("chat/golden.json")?)?;
    let qwen = golden["templates"]["qwen, tools"]["source"].as_str().context("the template of Qwen")?;
    let templates = [compile(TEMPLATE.as_bytes()), compile(qwen.as_bytes())];
    let options = EncodeOptions::from(&DataOptions::default());
    Ok(Target {
        name: "rows",
        weight: 10,
        files: ROWS.iter().map(|row| row.as_bytes().to_vec()).collect(),
        mutate: mutate::json,
        passes: is_json,
        run: Box::new(move |_, input| {
            put(&path, input);
            let load = |template: &Option<ChatTemplate>| {
                let encoder = ModelEncoder::new(&tokenizer, template.as_ref(), &[2]);
                load_jsonl(std::slice::from_ref(&path), &encoder, &options).is_ok()
            };
            templates.iter().filter(|template| load(template)).count() > 0
        }),
    })
}

/// Files of rows in every format, compressed or not: read to their end, each row parsed, and again from a position in between.
fn data_files(folder: &Path) -> Result<Target> {
    const NAMES: [&str; 13] = [
        "conversations.parquet",
        "conversations-gzip.parquet",
        "conversations-lz4.parquet",
        "conversations-none.parquet",
        "conversations-snappy.parquet",
        "conversations-zstd.parquet",
        "texts.parquet",
        "texts-plain.parquet",
        "texts.csv",
        "texts.tsv",
        "texts.jsonl.zst",
        "conversations.jsonl.gz",
        "conversations.json",
    ];
    let files = NAMES.iter().map(|name| fixture(&format!("rows/{name}"))).collect::<Result<_>>()?;
    let paths = NAMES.map(|name| folder.join(name));
    Ok(Target {
        name: "data files",
        weight: 10,
        files,
        mutate: mutate::bytes,
        passes: |input| {
            let parquet = input.starts_with(b"PAR1") && input.ends_with(b"PAR1");
            parquet
                || input.starts_with(b"\x1f\x8b\x08")
                || input.starts_with(b"\x28\xb5\x2f\xfd")
                || str::from_utf8(input).is_ok()
        },
        run: Box::new(move |which, input| {
            put(&paths[which], input);
            read_rows(&paths[which]).is_some()
        }),
    })
}

/// Reads a file of rows; none if it is refused.
fn read_rows(path: &Path) -> Option<()> {
    let mut source = RowSource::new(vec![DataFile::new(path)]);
    let mut middle = None;
    while let Some((_, rows)) = source.next(2).ok()? {
        for row in rows {
            row.parse().ok()?;
        }
        middle.get_or_insert(source.position());
    }
    let mut resumed = RowSource::new(vec![DataFile::new(path)]);
    resumed.seek(middle?);
    while resumed.next(100).ok()?.is_some() {}
    Some(())
}

fn training_toml() -> Result<Target> {
    let mut config = TrainConfig::default();
    config.model.model_name_or_path = "m".to_owned();
    config.data.train_file = Path::new("t.jsonl").into();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/finetune.toml");
    // With keys of other trainers, in all of TOML's forms.
    let foreign = "model.model_name_or_path = \"m\"\nmodel.load_in_8bit = false\nbf16 = true\n[data]\ntrain_file = ['a', \"b\"]\n\
         dataset_num_proc = 8\n[lora]\ntask_type = \"CAUSAL_LM\"\nbias = \"none\"\nmodules_to_save = []\nuse_dora = false\n\
         target_modules = '.*_proj'\n[training]\nreport_to = [\"none\"]\ntf32 = true\nlr_scheduler_kwargs = { num_cycles = 1 }\n\
         optim = \"paged_adamw_8bit\"\nsave_strategy = \"steps\"\nlearning_rate = 2e-4\nwarmup_ratio = 0.03\n\
         [[data.datasets]]\npath = \"x\"\ncolumns = { messages = \"m\" }\ntags = { user_tag = \"u\" }\n\
         [[data.datasets]]\npath = \"y\"\nfield_messages = \"m\"\nroles = { user = [\"a\", \"b\"] }\nnum_samples = 3\n";
    Ok(Target {
        name: "training TOML",
        weight: 10,
        files: vec![config.to_toml().into_bytes(), fs::read(example)?, foreign.as_bytes().to_vec()],
        mutate: mutate_files::toml,
        passes: |input| str::from_utf8(input).is_ok_and(|text| text.parse::<toml::Table>().is_ok()),
        run: Box::new(|_, input| {
            let text = String::from_utf8_lossy(input);
            // As `--set` does, with a line of the file.
            for line in text.lines().take(20) {
                if let Some((key, value)) = line.split_once(" = ") {
                    let _ = TrainConfig::default().set(&format!("training.{key}"), value);
                }
            }
            TrainConfig::from_toml_str(&text).is_ok_and(|config| TrainConfig::from_toml_str(&config.to_toml()).is_ok())
        }),
    })
}

/// Fragments of which regular expressions are composed.
const REGEX: [&str; 24] = [
    "(",
    ")",
    "[",
    "]",
    "*",
    "+",
    "?",
    "{1000000}",
    "{2,1}",
    "|",
    "^",
    "$",
    "\\d",
    "\\p{L}",
    "\\",
    "(?!a)",
    "(?P<n>",
    "(?i)",
    ".*",
    "\\x41",
    "\\u{0}",
    "\\1",
    "[^",
    "(?:",
];

fn target_modules() -> Target {
    let patterns = [
        "all-linear",
        r".*\.(q|k|v|o)_proj",
        r"model\.layers\.(0|1|[2-9])\.self_attn\.[qkvo]_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\..*)",
    ];
    Target {
        name: "target_modules",
        weight: 4,
        files: patterns.map(|pattern| pattern.as_bytes().to_vec()).to_vec(),
        mutate: |rng, input, other| mutate::words(rng, input, other, &REGEX),
        // Any text is a pattern until it is compiled.
        passes: |input| TargetModules::parse(&String::from_utf8_lossy(input)).is_ok(),
        run: Box::new(|_, input| match TargetModules::parse(&String::from_utf8_lossy(input)) {
            Ok(targets) => {
                targets.matches("model.layers.0.self_attn.q_proj");
                targets.matches(&"a.".repeat(2000));
                true
            }
            Err(_) => false,
        }),
    }
}
