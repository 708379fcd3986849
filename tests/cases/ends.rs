//! Tests of the end of an answer, and of its record, which has to go wherever the model goes. Each test is a public
//! report of another program's fault; the reports are named in its comment.
//!
//! Other inputs of the same kind that these tests try:
//! - the end token named by `generation_config.json` alone, by `config.json` alone (one, a list), by `tokenizer_config.json` alone
//!   (a text, an object), by `special_tokens_map.json` alone, by the chat template alone, by its text alone, by no file at all;
//! - GGUF files with `eos_token_id` alone, with and without a chat template; files that we write;
//! - stop strings: a special token, special token and text, half of one, one that never comes;
//! - templates of files, of `tokenizer_config.json`, given by hand; an adapter's folder with a template and no tokenizer, with
//!   both, with neither;
//! - quantizing and training from a folder and from a GGUF file; merging into a folder and into a GGUF file.

use std::path::{Path, PathBuf};

use qlora::adapter;
use qlora::chat::{Message, TemplateArguments};
use qlora::export::bitsandbytes;
use qlora::export::gguf::{self, GgufOptions, GgufType};
use qlora::formats::HfDirectory;
use qlora::generate::GenerationRequest;
use qlora::kernels::quant::QuantConfig;
use qlora::merge::{Companions, FolderOptions, MergeInto, MergedSource, PeftUpdate, Rounding, write_folder};
use qlora::model::{CausalLm, LoadOptions};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::sampling::GenerationConfig;
use qlora::tokenizer::Tokenizer;
use qlora::trainer::TrainConfig;
use qlora::trainer::session::Session;
use serde_json::{Value, json};

use crate::bigram::{CHATML, Files, chain};

fn open(path: &Path, options: &OpenOptions) -> ModelFiles {
    open_model(path.to_str().unwrap(), options).unwrap()
}

/// The model's answer to "x", as the example `generate` asks it.
fn answer_with(files: &ModelFiles, adapter: Option<&Path>, stop: &[&str]) -> String {
    let mut model = CausalLm::load(&*files.source, LoadOptions::default()).unwrap();
    if let Some(folder) = adapter {
        model.load_adapter("a", &adapter::open_folder(folder, model.config()).unwrap()).unwrap();
        model.activate_adapter("a").unwrap();
    }
    let template = files.chat_template.as_ref().expect("a chat template");
    let prompt = template.render_prompt(&[Message::user("x")], &TemplateArguments::new()).unwrap();
    let prompt = files.tokenizer.encode(&prompt, false).unwrap();
    let config = GenerationConfig {
        max_new_tokens: 12,
        stop_strings: stop.iter().map(|stop| (*stop).to_owned()).collect(),
        ..GenerationConfig::default()
    };
    let mut answers = GenerationRequest::new(&[&prompt], &config).answer(&model, &files.tokenizer).unwrap();
    answers.swap_remove(0).text
}

fn answer(path: &Path) -> String {
    answer_with(&open(path, &OpenOptions::default()), None, &[])
}

/// A run over one or more conversations; `data` are further lines of `[data]`.
fn run(folder: &Path, model: &str, rows: &[(&str, &str)], data: &str) -> TrainConfig {
    let line = |(user, assistant): &(&str, &str)| {
        let messages = json!([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]);
        format!("{}\n", json!({ "messages": messages }))
    };
    std::fs::write(folder.join("train.jsonl"), rows.iter().map(line).collect::<String>()).unwrap();
    let at = |name: &str| serde_json::to_string(folder.join(name).to_str().unwrap()).unwrap();
    let (model, train, out) = (at(model), at("train.jsonl"), at("out"));
    let toml = format!(
        "[model]\nmodel_name_or_path = {model}\nload_in_4bit = false\ndevice = \"cpu\"\n[lora]\nr = 4\ntarget_modules = [\"o_proj\", \"down_proj\"]\n[data]\ntrain_file = \
         {train}\nmax_length = 512\n{data}\n[training]\noutput_dir = {out}\nmax_steps = 2\n\
         per_device_train_batch_size = 1\ngradient_accumulation_steps = 1\nsave_steps = 1\n"
    );
    let path = folder.join("run.toml");
    std::fs::write(&path, toml).unwrap();
    TrainConfig::from_toml_file(&path).unwrap()
}

fn trained(config: &TrainConfig) {
    let session = Session::open(config, |_, _| ()).unwrap();
    let (training, validation) = session.datasets().unwrap();
    session.into_trainer(training, validation).unwrap().run().unwrap();
}

/// The tokens of the whole data, and the text of those that are trained.
fn tokens(config: &TrainConfig) -> (usize, String) {
    let session = Session::open(config, |_, _| ()).unwrap();
    let (training, _) = session.datasets().unwrap();
    let labels: Vec<i64> = (0..training.len()).flat_map(|row| training.document(row).labels()).collect();
    let ids: Vec<u32> = labels.iter().filter_map(|&label| u32::try_from(label).ok()).collect();
    (labels.len(), session.text().tokenizer().decode(&ids, false).unwrap())
}

fn read(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// QwenLM/Qwen3#1422, QwenLM/Qwen3#927, modelscope/ms-swift#3113: base models whose configurations name `<|endoftext|>` while
/// the tokenizer and the template end a turn with `<|im_end|>`.
#[test]
fn case_08_eos_only_in_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let ends = json!({"eos_token_id": 0, "bos_token_id": 0});
    let base = Files { config: ends.clone(), generation: Some(json!({"eos_token_id": 0})), ..Files::default() };
    base.write(&folder.path().join("model"));
    assert_eq!(answer(&folder.path().join("model")), "Hi");
    let config = run(folder.path(), "model", &[("x", "Hi")], "");
    assert_eq!(tokens(&config).1, "Hi<|im_end|>");
    // The answers of the run's model end at the same tokens.
    let files = open(&folder.path().join("model"), &OpenOptions::default());
    assert_eq!(files.source.config().eos_token_ids, files.generation.eos_token_ids);
    assert_eq!(files.generation.eos_token_ids, [0, 2]);
}

/// Each place that can name the end, alone. The end's text is one that nobody knows.
#[test]
fn an_end_that_one_file_names_is_an_end() {
    let specials = ["<|a|>", "<|im_start|>", "<|fin|>", "<s>"];
    let plain =
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|im_start|>assistant\n\n";
    let none = || Files {
        specials,
        tokenizer_config: json!({}),
        template: Some(plain),
        config: json!({"eos_token_id": null}),
        chain: chain("<|fin|>"),
        ..Files::default()
    };
    let marked = CHATML.replace("<|im_end|>", "<|fin|>");
    let named: [(&str, Files<'_>); 6] = [
        ("tokenizer_config.json", Files { tokenizer_config: json!({"eos_token": "<|fin|>"}), ..none() }),
        ("as an object", Files { tokenizer_config: json!({"eos_token": {"content": "<|fin|>"}}), ..none() }),
        ("config.json", Files { config: json!({"eos_token_id": 2}), ..none() }),
        ("config.json, a list", Files { config: json!({"eos_token_id": [0, 2]}), ..none() }),
        ("generation_config.json", Files { generation: Some(json!({"eos_token_id": 2})), ..none() }),
        ("the template", Files { template: Some(&marked), ..none() }),
    ];
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("none");
    none().write(&model);
    assert_eq!(answer(&model), "HiOopsOopsO", "nothing names it");
    std::fs::write(model.join("special_tokens_map.json"), r#"{"eos_token": "<|fin|>"}"#).unwrap();
    assert_eq!(answer(&model), "Hi", "special_tokens_map.json");
    for (name, files) in named {
        let model = folder.path().join(name);
        files.write(&model);
        assert_eq!(answer(&model), "Hi", "{name}");
    }
    // Known by the text alone, whatever is said.
    for end in ["<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>"] {
        let model = folder.path().join(end.trim_matches(['<', '>', '/', '|']));
        let specials = ["<|a|>", "<|im_start|>", end, "<s>"];
        Files { specials, chain: chain(end), ..none() }.write(&model);
        assert_eq!(answer(&model), "Hi", "{end}");
    }
}

/// The end of an answer as it is written may also be named by a stop string.
#[test]
fn stop_strings_name_special_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '\\n' }}";
    let specials = ["<|a|>", "<|im_start|>", "<|fin|>", "<s>"];
    Files {
        specials,
        tokenizer_config: json!({}),
        template: Some(template),
        config: json!({"eos_token_id": null}),
        chain: chain("<|fin|>"),
        ..Files::default()
    }
    .write(folder.path());
    let files = open(folder.path(), &OpenOptions::default());
    assert_eq!(answer_with(&files, None, &[]), "HiOopsOopsO");
    assert_eq!(answer_with(&files, None, &["<|fin|>"]), "Hi");
    assert_eq!(answer_with(&files, None, &["i<|fin|>O"]), "H");
    assert_eq!(answer_with(&files, None, &["<|fin|>x", "sO"]), "HiOop");
    // It is not there at all.
    assert_eq!(answer_with(&files, None, &["<s>"]), "HiOopsOopsO");
    // `generation_config.json` may have stop strings.
    std::fs::write(folder.path().join("generation_config.json"), r#"{"stop_strings": ["oops"]}"#).unwrap();
    assert_eq!(open(folder.path(), &OpenOptions::default()).generation.stop_strings, ["oops"]);
}

/// hiyouga/LlamaFactory#5836 and #7785, Lightning-AI/litgpt#1986: the template that a base model was trained with is gone
/// afterwards.
#[test]
fn case_25_template_not_kept() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // The base has no template and names another end.
    let config = json!({"eos_token_id": 0, "bos_token_id": null});
    Files { template: None, config, ..Files::default() }.write(&at("model"));
    std::fs::write(at("model/LICENSE-APACHE.txt"), "free").unwrap();
    std::fs::write(at("chatml.jinja"), CHATML).unwrap();
    let path = serde_json::to_string(at("chatml.jinja").to_str().unwrap()).unwrap();
    let config = run(folder.path(), "model", &[("Hi", "Hello.")], &format!("chat_template_path = {path}"));
    assert_eq!(tokens(&config).1, "Hello.<|im_end|>");
    trained(&config);

    for adapter in ["out", "out/checkpoint-1"] {
        assert_eq!(std::fs::read_to_string(at(adapter).join("chat_template.jinja")).unwrap(), CHATML);
        assert_eq!(read(at(adapter).join("tokenizer_config.json")), json!({"eos_token": "<|im_end|>"}));
        assert!(at(adapter).join("tokenizer.json").is_file());
        assert_eq!(read(at(adapter).join("generation_config.json")), json!({"eos_token_id": [0, 2]}));
        assert!(!at(adapter).join("LICENSE-APACHE.txt").exists(), "that is the base's");
    }
    assert!(open(&at("model"), &OpenOptions::default()).chat_template.is_none());
    let options = OpenOptions { adapter: Some(at("out")), ..OpenOptions::default() };
    let files = open(&at("model"), &options);
    assert_eq!(answer_with(&files, Some(&at("out")), &[]), "Hi");

    // Merged, everything is there.
    merge(&files, &at("out"), &at("merged"));
    assert_eq!(answer(&at("merged")), "Hi");
    assert_eq!(std::fs::read_to_string(at("merged/chat_template.jinja")).unwrap(), CHATML);
    assert_eq!(std::fs::read_to_string(at("merged/LICENSE-APACHE.txt")).unwrap(), "free");
    // As a GGUF file.
    gguf(&files, &at("merged.gguf"));
    let merged = open(&at("merged.gguf"), &OpenOptions::default());
    assert_eq!(merged.chat_template.as_ref().unwrap().source(), CHATML);
    assert_eq!(answer_with(&merged, None, &[]), "Hi");

    // A template that is given by hand goes before the adapter's and the base's.
    let other = CHATML.replace("<|im_start|>", "<s>");
    std::fs::write(at("other.jinja"), &other).unwrap();
    let files = open(&at("model"), &OpenOptions { chat_template_path: Some(at("other.jinja")), ..options });
    assert_eq!(answer_with(&files, Some(&at("out")), &[]), "Hi");
    merge(&files, &at("out"), &at("merged-other"));
    assert_eq!(std::fs::read_to_string(at("merged-other/chat_template.jinja")).unwrap(), other);
}

/// Adapters of other programs have only some of the files.
#[test]
fn an_adapters_folder_has_what_it_has() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    Files::default().write(&at("model"));
    std::fs::create_dir(at("adapter")).unwrap();
    let options = OpenOptions { adapter: Some(at("adapter")), ..OpenOptions::default() };
    let source = || open(&at("model"), &options).chat_template.unwrap().source().to_owned();
    assert_eq!(source(), CHATML, "an empty folder");
    // A template in tokenizer_config.json, without a tokenizer.
    let config = json!({"chat_template": "{{ eos_token }}own", "eos_token": "ignored: no tokenizer"});
    std::fs::write(at("adapter/tokenizer_config.json"), config.to_string()).unwrap();
    assert_eq!(source(), "{{ eos_token }}own");
    let files = open(&at("model"), &options);
    let text = files.chat_template.as_ref().unwrap().render(&[], false, &TemplateArguments::new()).unwrap();
    assert_eq!(text, "<|im_end|>own", "the special tokens are those of the tokenizer in use");
    // A file goes before it, as in transformers.
    std::fs::write(at("adapter/chat_template.jinja"), "file").unwrap();
    assert_eq!(source(), "file");
    // A tokenizer with other special tokens, as it was saved after tokens were added.
    let specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fin|>"];
    let own = Files { specials, tokenizer_config: json!({"eos_token": "<|fin|>"}), ..Files::default() };
    own.write(&at("own"));
    std::fs::copy(at("own/tokenizer.json"), at("adapter/tokenizer.json")).unwrap();
    std::fs::copy(at("own/tokenizer_config.json"), at("adapter/tokenizer_config.json")).unwrap();
    let files = open(&at("model"), &options);
    assert_eq!(files.tokenizer.encode("<|fin|>", false).unwrap(), [3]);
    assert!(files.generation.eos_token_ids.contains(&3) && files.generation.eos_token_ids.contains(&2));
    // A name is looked for where there are templates.
    let named = OpenOptions { chat_template: Some("default".into()), ..options.clone() };
    assert_eq!(open(&at("model"), &named).chat_template.unwrap().source(), "file");
}

/// ModelCloud/GPTQModel#1291, mlc-ai/mlc-llm#3077: a quantized folder without the roles of the special tokens and the list of
/// end tokens.
#[test]
fn case_36_quantize_loses_roles() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let template = format!("{{{{- bos_token }}}}{CHATML}");
    Files {
        tokenizer_config: json!({"bos_token": "<s>", "eos_token": "<|im_end|>", "model_max_length": 2048}),
        template: Some(&template),
        config: json!({"eos_token_id": 0}),
        generation: Some(json!({"eos_token_id": [0, 2], "temperature": 0.7})),
        ..Files::default()
    }
    .write(&at("model"));
    let additional = at("model/additional_chat_templates");
    std::fs::create_dir(&additional).unwrap();
    std::fs::write(additional.join("tool_use.jinja"), "tools").unwrap();
    std::fs::write(at("model/special_tokens_map.json"), r#"{"bos_token": "<s>"}"#).unwrap();
    std::fs::write(at("model/LICENSE"), "free").unwrap();
    quantize(&at("model"), &at("quantized"));
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
        "LICENSE",
    ] {
        let bytes = |folder: &str| std::fs::read(at(folder).join(name)).unwrap();
        assert_eq!(bytes("quantized"), bytes("model"), "{name}");
    }
    assert_eq!((answer(&at("model")).as_str(), answer(&at("quantized")).as_str()), ("Hi", "Hi"));
    let of = |model: &str| tokens(&run(folder.path(), model, &[("x", "Hi")], ""));
    assert_eq!(of("model").0, 16);
    assert_eq!(of("quantized"), of("model"));
}

/// The same from a GGUF file, which has no such files, and with a configuration that does not list the end.
#[test]
fn what_is_quantized_from_a_gguf_file_has_the_files() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let template = format!("{{{{- bos_token }}}}{CHATML}");
    let tokenizer_config = json!({"bos_token": "<s>", "eos_token": "<|im_end|>"});
    Files { tokenizer_config, template: Some(&template), config: json!({"eos_token_id": 0}), ..Files::default() }
        .write(&at("model"));
    gguf(&open(&at("model"), &OpenOptions::default()), &at("model.gguf"));
    quantize(&at("model.gguf"), &at("quantized"));
    let config = read(at("quantized/tokenizer_config.json"));
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&json!("<s>"), &json!("<|im_end|>")));
    assert_eq!(read(at("quantized/generation_config.json"))["eos_token_id"], json!([2, 0]));
    assert_eq!(std::fs::read_to_string(at("quantized/chat_template.jinja")).unwrap(), template);
    assert_eq!(answer(&at("quantized")), "Hi");
    let of = |model: &str| tokens(&run(folder.path(), model, &[("x", "Hi")], ""));
    assert_eq!(of("quantized"), of("model"));
}

/// unslothai/unsloth#468, intel/ipex-llm#10815, vllm-project/vllm#4180: a GGUF file of Llama 3 that names `<|end_of_text|>`
/// only.
#[test]
fn case_39_gguf_eot() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let header = |role: &str| format!("'<|start_header_id|>' + {role} + '<|start_header_id|>\\n\\n'");
    let template = format!(
        "{{%- for m in messages %}}{{{{- {} + m.content + '<|eot_id|>' }}}}{{%- endfor %}}\
         {{%- if add_generation_prompt %}}{{{{- {} }}}}{{%- endif %}}",
        header("m.role"),
        header("'assistant'")
    );
    let specials = ["<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|begin_of_text|>"];
    Files {
        specials,
        tokenizer_config: json!({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
        template: Some(&template),
        config: json!({"eos_token_id": 0}),
        chain: chain("<|eot_id|>"),
        ..Files::default()
    }
    .write(&at("model"));
    // As a converter writes it that looks at the configuration only.
    let source = HfDirectory::open(at("model")).unwrap();
    let tokenizer = Tokenizer::from_folder(at("model")).unwrap();
    let write = |name: &str, template: Option<&str>| {
        let options = GgufOptions { chat_template: template, ..GgufOptions::new(GgufType::F32) };
        gguf::write(&source, &tokenizer, &at(name), &options, |_, _| ()).unwrap();
    };
    write("model.gguf", Some(&template));
    let raw = qlora::formats::Gguf::open(at("model.gguf")).unwrap();
    assert_eq!(qlora::source::WeightSource::config(&raw).eos_token_ids, [0], "the file names one end");
    assert_eq!(answer(&at("model.gguf")), "Hi");
    // Without a template, by its text.
    write("bare.gguf", None);
    let options = OpenOptions { chat_template_path: Some(at("model/chat_template.jinja")), ..OpenOptions::default() };
    assert_eq!(answer_with(&open(&at("bare.gguf"), &options), None, &[]), "Hi");
    assert_eq!(open(&at("bare.gguf"), &OpenOptions::default()).generation.eos_token_ids, [0, 2]);

    // A GGUF file that we write from the model names the turn's end, and a model that we train ends with it.
    gguf(&open(&at("model"), &OpenOptions::default()), &at("ours.gguf"));
    let raw = qlora::formats::Gguf::open(at("ours.gguf")).unwrap();
    assert_eq!(qlora::source::WeightSource::config(&raw).eos_token_ids, [0, 2]);
    for model in ["model", "model.gguf", "ours.gguf"] {
        assert_eq!(tokens(&run(folder.path(), model, &[("x", "Hi")], "")).1, "Hi<|eot_id|>", "{model}");
    }
}

/// unslothai/unsloth#4150: saved tokenizers whose template ignores `add_generation_prompt`. (What such a template trains is
/// tested where answers are found.)
#[test]
fn case_07_no_generation_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let template = "{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}";
    Files { template: Some(template), ..Files::default() }.write(folder.path());
    let files = open(folder.path(), &OpenOptions::default());
    let chat = files.chat_template.as_ref().unwrap();
    let prompt = chat.render_prompt(&[Message::user("x")], &TemplateArguments::new()).unwrap();
    assert_eq!(prompt, "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(answer(folder.path()), "Hi");
    // The evaluation of the trainer asks in the same way.
    let ends = &files.generation.eos_token_ids;
    let encoder = qlora::trainer::encoder::ModelEncoder::new(&files.tokenizer, Some(chat), ends);
    let row = r#"{"messages": [{"role": "user", "content": "x"}]}"#;
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, row).unwrap();
    let records = qlora::trainer::data::read_records(&path).unwrap();
    let qlora::trainer::data::Record::Chat(conversation) = &records[0] else { panic!("no conversation") };
    assert_eq!(encoder.prompt(conversation).unwrap(), files.tokenizer.encode(&prompt, false).unwrap());
}

/// unslothai/unsloth#1008, huggingface/trl#3091, verl-project/verl#535: labels that are masked by the pad token, which is the
/// end token.
#[test]
fn case_29_pad_is_eos() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer_config = json!({"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"});
    let config = json!({"eos_token_id": 2, "pad_token_id": 2});
    Files { tokenizer_config, config, ..Files::default() }.write(&folder.path().join("model"));
    let rows = [("Hi", "Hello."), ("how are you?", "I am fine.")];
    assert_eq!(tokens(&run(folder.path(), "model", &rows, "")).1, "Hello.<|im_end|>I am fine.<|im_end|>");
}

fn quantize(model: &Path, out: &Path) {
    let files = open(model, &OpenOptions::default());
    bitsandbytes::write_model(&files, &QuantConfig::default(), out, |_, _| ()).unwrap();
}

fn merge(files: &ModelFiles, adapter: &Path, out: &Path) {
    let adapter = adapter::open_folder(adapter, files.source.config()).unwrap();
    let update = PeftUpdate::new(&adapter, &*files.source).unwrap();
    let merged = MergedSource::new(&*files.source, &update, MergeInto::Original, Rounding::Stored).unwrap();
    let config_json = std::fs::read_to_string(files.source.path().join("config.json")).ok();
    let options = FolderOptions { config_json, ..FolderOptions::default() };
    write_folder(&merged, &Companions::of(files).unwrap(), out, &options, |_, _| ()).unwrap();
}

fn gguf(files: &ModelFiles, out: &Path) {
    let options = GgufOptions {
        chat_template: files.chat_template.as_ref().map(|template| template.source()),
        eos_token_ids: &files.generation.eos_token_ids,
        ..GgufOptions::new(GgufType::F32)
    };
    gguf::write(&*files.source, &files.tokenizer, out, &options, |_, _| ()).unwrap();
}
