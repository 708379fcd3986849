//! Merged models and GGUF files by the libraries they are for. The checks that need no Python are in qlora-core.

use std::path::{Path, PathBuf};
use std::process::Command;

use qlora::adapter;
use qlora::export::gguf::{self, GgufOptions, GgufType};
use qlora::formats::HfDirectory;
use qlora::merge::{Companions, FolderOptions, LoraUpdate, MergeInto, MergedSource, Rounding, write_folder};
use qlora::source::WeightSource;
use qlora::tokenizer::Tokenizer;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn check(script: &str, arguments: &[&str]) -> String {
    let python = std::env::var("QLORA_PYTHON").expect("QLORA_PYTHON names a Python interpreter with gguf and PEFT");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script);
    let output = Command::new(python).arg(script).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

#[test]
#[ignore = "needs a Python with PEFT: QLORA_PYTHON=path/to/python"]
fn transformers_takes_merged_folders_and_computes_what_peft_does() {
    let base = fixtures().join("peft/base");
    let source = HfDirectory::open(&base).unwrap();
    for name in ["adapter_list", "adapter_regex", "adapter_rslora", "adapter_bf16"] {
        let folder = fixtures().join("peft").join(name);
        let adapter = adapter::load(&folder, source.config()).unwrap();
        let update = LoraUpdate::new(&adapter).unwrap();
        let merged = MergedSource::new(&source, &update, MergeInto::Original, Rounding::Stored).unwrap();
        let temporary = tempfile::tempdir().unwrap();
        let out = temporary.path().join("merged");
        let config_json = Some(std::fs::read_to_string(base.join("config.json")).unwrap());
        let options = FolderOptions { config_json, max_shard_bytes: 100_000 };
        write_folder(&merged, &Companions::default(), &out, &options, |_, _| ()).unwrap();
        let [base, folder, out] = [&base, &folder, &out].map(|path| path.to_str().unwrap());
        let text =
            check("check_merged.py", &["--base", base, "--adapter", folder, "--merged", out, "--tolerance", "1e-4"]);
        println!("{name}: {}", text.trim());
    }
}

#[test]
#[ignore = "needs a Python with gguf and transformers: QLORA_PYTHON=path/to/python"]
fn the_gguf_package_finds_its_own_bytes() {
    // A tokenizer of 420 tokens; the models have 80 rows, so one with few tokens is made.
    let temporary = tempfile::tempdir().unwrap();
    let tokens: Vec<String> = (0..80usize)
        .map(|id| match id {
            0..3 => format!("\"{}\": {id}", ["<unk>", "<s>", "</s>"][id]),
            _ => format!("\"{}\": {id}", char::from_u32(0x100 + id as u32).unwrap_or('?')),
        })
        .collect();
    let special = |id: usize, content: &str| {
        format!(
            r#"{{"id": {id}, "content": "{content}", "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}}"#
        )
    };
    let added = [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")].join(",");
    let level = |kind: &str| {
        format!(r#"{{"type": "{kind}", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}}"#)
    };
    let json = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{added}], "normalizer": null,
            "pre_tokenizer": {}, "post_processor": null, "decoder": {},
            "model": {{"type": "BPE", "vocab": {{{}}}, "merges": []}}}}"#,
        level("ByteLevel"),
        level("ByteLevel"),
        tokens.join(",")
    );
    std::fs::write(temporary.path().join("tokenizer.json"), json).unwrap();
    let roles = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    std::fs::write(temporary.path().join("tokenizer_config.json"), roles).unwrap();
    let tokenizer = Tokenizer::from_folder(temporary.path()).unwrap();
    for name in ["llama", "llama_wide", "mistral", "qwen2"] {
        let folder = fixtures().join("models").join(name);
        let source = HfDirectory::open(&folder).unwrap();
        for kind in [GgufType::F32, GgufType::F16, GgufType::Bf16, GgufType::Q8_0, GgufType::Q4_0] {
            let out = temporary.path().join("model.gguf");
            let options = GgufOptions {
                name: Some(name),
                chat_template: Some("{{ messages }}"),
                eos_token_ids: &[2, 5],
                ..GgufOptions::new(kind)
            };
            gguf::write(&source, &tokenizer, &out, &options, |_, _| ()).unwrap();
            let (file, folder) = (out.to_str().unwrap(), folder.to_str().unwrap());
            let mut arguments = vec!["--gguf", file, "--folder", folder, "--ends", "2,5"];
            // Rows of the others are no whole blocks.
            if name == "llama_wide" || matches!(kind, GgufType::F32 | GgufType::F16 | GgufType::Bf16) {
                arguments.extend(["--type", kind.name()]);
            }
            let text = check("check_gguf.py", &arguments);
            println!("{name} {kind}: {}", text.trim());
        }
    }
    // transformers reads GGUF files of Llama through its own code, and un-permutes.
    let out = temporary.path().join("model.gguf");
    let folder = fixtures().join("models/llama_wide");
    let options = GgufOptions::new(GgufType::F32);
    gguf::write(&HfDirectory::open(&folder).unwrap(), &tokenizer, &out, &options, |_, _| ()).unwrap();
    let arguments = ["--gguf", out.to_str().unwrap(), "--folder", folder.to_str().unwrap(), "--transformers", "1e-3"];
    println!("{}", check("check_gguf.py", &arguments));
}
