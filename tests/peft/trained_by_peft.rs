//! The adapter of a PEFT training run on SmolLM2-135M-Instruct answers as it does in Python.
//!
//! `scripts/demo-model.sh` fetches the model; adapter and answers are made by `scripts/parity/peft_trained_smollm2.py`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use qlora::adapter;
use qlora::formats::Gguf;
use qlora::generate::{GenerationRequest, generate};
use qlora::model::{AdapterChoice, CausalLm, LoadOptions};
use qlora::sampling::GenerationConfig;
use serde_json::Value;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn greedy_tokens_are_those_of_peft() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = std::env::var_os("QLORA_CACHE").map_or(root.join(".cache"), PathBuf::from);
    let path = cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/demo-model.sh first", path.display());
    let mut model = CausalLm::load(&Gguf::open(path).unwrap(), LoadOptions::default()).unwrap();
    let folder = root.join("tests/fixtures/peft_trained");
    model.load_adapter("orders", &adapter::open_folder(&folder, model.config()).unwrap()).unwrap();

    let cases: Value = serde_json::from_slice(&std::fs::read(folder.join("greedy.json")).unwrap()).unwrap();
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 10);
    let ends = model.config().eos_token_ids.clone();
    let config = GenerationConfig { max_new_tokens: 48, temperature: None, ..GenerationConfig::default() };
    // PEFT keeps the end token.
    let expected =
        |case: &Value| -> Vec<u32> { ids(&case["new_ids"]).into_iter().take_while(|id| !ends.contains(id)).collect() };
    model.activate_adapter("orders").unwrap();
    for case in cases {
        let answer = generate(&model, &ids(&case["input_ids"]), &config, |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(answer.tokens, expected(case), "{}", case["text"]);
    }
    // The same in one batch, with the base's answers between them.
    let prompts: Vec<Vec<u32>> =
        cases.iter().take(3).flat_map(|case| [ids(&case["input_ids"]), ids(&case["input_ids"])]).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let choices = [AdapterChoice::Named("orders"), AdapterChoice::Base].repeat(3);
    let answers = GenerationRequest::new(&prompts, &config).with_adapters(&choices).run(&model).unwrap();
    for (pair, case) in answers.chunks_exact(2).zip(cases) {
        assert_eq!(pair[0].tokens, expected(case));
        assert_ne!(pair[1].tokens, pair[0].tokens, "the base answers otherwise");
    }
}
