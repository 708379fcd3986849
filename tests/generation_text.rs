//! Answers as text, in batches, with SmolLM2-135M-Instruct, which `scripts/demo-model.sh` fetches.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use qlora::chat::{Message, TemplateArguments};
use qlora::generate::{Answer, AnswerText, CachePlan, GenerationRequest, StopReason, generate};
use qlora::model::{AdapterChoice, CausalLm, LoadOptions};
use qlora::open::{ModelFiles, OpenOptions, open_model};
use qlora::sampling::GenerationConfig;

fn model() -> (ModelFiles, CausalLm) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = std::env::var_os("QLORA_CACHE").map_or(root.join(".cache"), PathBuf::from);
    let path = cache.join("models/SmolLM2-135M-Instruct/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run scripts/demo-model.sh first", path.display());
    let files = open_model(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
    let model = CausalLm::load(&*files.source, LoadOptions::default()).unwrap();
    (files, model)
}

fn prompts(files: &ModelFiles) -> Vec<Vec<u32>> {
    let template = files.chat_template.as_ref().unwrap();
    let encode = |text: &str| {
        let text = template.render(&[Message::user(text)], true, &TemplateArguments::new()).unwrap();
        files.tokenizer.encode(&text, false).unwrap()
    };
    ["Where is Rome?", "Name three colours.", "Write a poem about the moon.", "What is 2 + 2?"].map(encode).to_vec()
}

/// All answers, `size` at a time.
fn answer(files: &ModelFiles, model: &CausalLm, config: &GenerationConfig, size: usize) -> Vec<Answer> {
    let prompts = prompts(files);
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let mut answers = Vec::new();
    let request = GenerationRequest::new(&prompts, config).with_batch_size(size);
    let asked = request.answer_batches(model, &files.tokenizer, |first, batch| {
        assert_eq!(first, answers.len());
        assert!(!batch.is_empty());
        answers.extend(batch);
        Ok(())
    });
    asked.unwrap();
    assert_eq!(answers.len(), prompts.len());
    answers
}

#[test]
fn answers_do_not_depend_on_the_batch_size() {
    let (files, model) = model();
    let config =
        GenerationConfig { max_new_tokens: 12, temperature: Some(1.0), seed: 3, ..GenerationConfig::default() };
    let alone = answer(&files, &model, &config, 1);
    for size in [0, 2, 3, 9] {
        assert_eq!(answer(&files, &model, &config, size), alone, "{size} at a time");
    }
    // Each draws from its own seed; another seed is another text.
    let other = answer(&files, &model, &GenerationConfig { seed: 4, ..config.clone() }, 3);
    assert!(other.iter().zip(&alone).all(|(other, alone)| other.text != alone.text));
    // The second one is what a generation with its seed gives, which is not another seed's first.
    let second = GenerationConfig { seed: config.seed_of_row(1), ..config };
    let generation = generate(&model, &prompts(&files)[1], &second, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(files.tokenizer.decode(&generation.tokens, true).unwrap(), alone[1].text);
}

#[test]
fn a_stop_string_ends_its_answer_alone() {
    let (files, model) = model();
    let config = GenerationConfig { max_new_tokens: 24, ..GenerationConfig::default() };
    let whole = answer(&files, &model, &config, 4);
    // From the middle of a word in the middle of the first answer.
    let text = &whole[0].text;
    let at = text.char_indices().nth(text.chars().count() / 2).unwrap().0;
    let stop: String = text[at..].chars().take(5).collect();
    let stopped = GenerationConfig { stop_strings: vec![stop.clone()], ..config };
    let answers = answer(&files, &model, &stopped, 4);
    for (answer, whole) in answers.iter().zip(&whole) {
        match whole.text.split_once(&stop) {
            Some((before, _)) => {
                assert_eq!(answer.text, before);
                assert_eq!(answer.stop, StopReason::Caller);
                assert!(answer.tokens < whole.tokens, "{} of {} tokens", answer.tokens, whole.tokens);
            }
            None => assert_eq!(answer, whole),
        }
    }
    assert_eq!(answers[0].stop, StopReason::Caller);
    assert!(answers.iter().any(|answer| answer.stop != StopReason::Caller), "all have {stop:?}");

    // Streamed, the pieces are the same text, and none shows a part of the stop string.
    let mut stream = AnswerText::new(&files.tokenizer, &stopped);
    let mut shown = String::new();
    generate(&model, &prompts(&files)[0], &stopped, |token| {
        shown.push_str(&stream.push(token).unwrap());
        assert!(answers[0].text.starts_with(&shown));
        if stream.is_complete() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!(shown + &stream.finish().unwrap(), answers[0].text);
}

#[test]
fn the_planned_memory_is_what_caches_hold_in_the_end() {
    let (files, model) = model();
    let config = |max_new_tokens| GenerationConfig { max_new_tokens, ..GenerationConfig::default() };
    let tokens: Vec<u32> = prompts(&files).concat().into_iter().cycle().take(100).collect();
    for (prompt, new) in [(70, 30), (10, 5), (64, 1)] {
        let plan = CachePlan::new(&model, [prompt], &config(new)).unwrap();
        let mut cache = model.new_cache(prompt + new);
        model.next_logits(&[&tokens[..prompt]], &mut [&mut cache], AdapterChoice::Active).unwrap();
        assert!(cache.held_bytes() <= plan.bytes(), "{prompt} + {new}");
        for token in &tokens[prompt..prompt + new] {
            model.next_logits(&[&[*token]], &mut [&mut cache], AdapterChoice::Active).unwrap();
        }
        assert_eq!((cache.len(), cache.held_bytes()), (prompt + new, plan.bytes()), "{plan}");
    }
    // A model takes no more than it takes.
    let limit = model.config().max_position_embeddings;
    let plan = CachePlan::new(&model, [10, 100], &config(1_000_000)).unwrap();
    assert_eq!((plan.sequences, plan.tokens), (2, 2 * limit));
    // 30 layers, keys and values, 3 heads of 64, f32.
    assert_eq!(plan.token_bytes, 46_080);
    assert_eq!(plan.to_string(), "755.0 MB for 16384 tokens of 2 sequences (46080 bytes each)");
    let error = CachePlan::new(&model, [limit], &config(1)).unwrap_err().to_string();
    assert!(error.contains("8192 tokens"), "{error}");
    let rows = [[1u32; 300].as_slice(), &[1; 10], &[1; 200], &[1; 100]];
    let short = config(10);
    let request = GenerationRequest::new(&rows, &short);
    assert_eq!(request.with_batch_size(2).cache_plan(&model).unwrap().tokens, 310 + 210);
    assert_eq!(request.cache_plan(&model).unwrap().tokens, 310 + 64 + 210 + 110);
    assert_eq!(request.default_batch_size(&model).unwrap(), 4, "no more than there are prompts");
}
