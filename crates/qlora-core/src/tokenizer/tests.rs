use std::path::PathBuf;

use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    pre: Option<String>,
    decoded: Option<String>,
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tokenizer").join(name)
}

fn cases(name: &str) -> Vec<Case> {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> String {
    let mut stream = tokenizer.decode_stream(skip);
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text.push_str(&stream.finish().unwrap());
    text
}

#[test]
fn sentence_piece_ids_are_sentencepieces() {
    let gguf = Tokenizer::from_gguf_file(fixture("spm.gguf")).unwrap();
    let folder = Tokenizer::from_folder(fixture("llama")).unwrap();
    let cases = cases("spm.json");
    assert!(cases.len() > 150);
    for Case { text, ids, decoded, .. } in &cases {
        assert_eq!(&gguf.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(&folder.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.encode(text, false).unwrap(), ids[1..], "{text:?}");
        assert_eq!(Some(gguf.decode(ids, true).unwrap()), *decoded, "{text:?}");
        assert_eq!(Some(streamed(&gguf, ids, true)), *decoded, "{text:?}");
    }
    assert_eq!(
        (gguf.bos_token_id(), gguf.eos_token_id(), gguf.unk_token_id(), gguf.pad_token_id()),
        (Some(1), Some(2), Some(0), None)
    );
    assert_eq!(
        (folder.bos_token_id(), folder.eos_token_id(), folder.unk_token_id(), folder.pad_token_id()),
        (Some(1), Some(2), Some(0), None)
    );
    assert_eq!((gguf.vocab_size(), folder.vocab_size()), (420, 420));
    assert!(gguf.is_special(1) && !gguf.is_special(300));
}

#[test]
fn byte_level_ids_are_the_original_tokenizers() {
    let kinds = ["llama-bpe", "qwen2", "tekken"];
    let tokenizers =
        kinds.map(|pre| (pre, Tokenizer::from_gguf_file(fixture(&format!("byte-level-{pre}.gguf"))).unwrap()));
    let cases = cases("byte-level.json");
    assert!(cases.len() > 400);
    for Case { text, ids, pre, .. } in &cases {
        let pre = pre.as_deref().unwrap();
        let tokenizer = &tokenizers.iter().find(|(kind, _)| *kind == pre).unwrap().1;
        assert_eq!(&tokenizer.encode(text, false).unwrap(), ids, "{pre}: {text:?}");
        let with = tokenizer.encode(text, true).unwrap();
        let bos = usize::from(pre != "qwen2");
        assert_eq!((&with[..bos], &with[bos..]), (&[0][..bos], &ids[..]), "{pre}: {text:?}");
        let decoded = tokenizer.decode(ids, false).unwrap();
        assert_eq!(streamed(tokenizer, ids, false), decoded, "{pre}: {text:?}");
        assert!(decoded == *text || pre == "qwen2", "{pre}: {text:?}");
    }
}

#[test]
fn streams_do_not_split_characters() {
    let tokenizer = Tokenizer::from_gguf_file(fixture("byte-level-qwen2.gguf")).unwrap();
    let ids = tokenizer.encode("é😀", false).unwrap();
    assert_eq!(ids.len(), 6, "a token a byte");
    let mut stream = tokenizer.decode_stream(true);
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["", "é", "", "", "", "😀"]);
    assert_eq!(stream.finish().unwrap(), "");
    // A character that never becomes complete is handed out in the end.
    assert_eq!(streamed(&tokenizer, &ids[..4], true), tokenizer.decode(&ids[..4], true).unwrap());
    let broken = vec![ids[3]; 40];
    assert_eq!(streamed(&tokenizer, &broken, true), tokenizer.decode(&broken, true).unwrap());
}

#[test]
#[allow(clippy::single_range_in_vec_init, reason = "lists of one span")]
fn tokens_in_spans_are_found() {
    let tokenizer = Tokenizer::from_folder(fixture("llama")).unwrap();
    let text = "the water  x</s>";
    let pieces = tokenizer.encode_pieces(text, true).unwrap();
    assert_eq!(pieces[0], Piece { id: 1, bytes: 0..0 });
    let covered: String = pieces[1..].iter().map(|piece| &text[piece.bytes.clone()]).collect();
    assert_eq!(covered, text);
    for (spans, expected) in [
        (vec![], vec![]),
        (vec![0..3], vec!["the"]),
        (vec![11..16], vec!["x", "</s>"]),
        (vec![0..1, 15..16], vec!["the", "</s>"]),
        (vec![0..16], vec!["the", " water", " ", " ", "x", "</s>"]),
    ] {
        let (ids, inside) = tokenizer.encode_with_spans(text, &spans, true).unwrap();
        assert!(!inside[0], "BOS is in no span");
        let found: Vec<&str> = (0..ids.len()).filter(|&i| inside[i]).map(|i| &text[pieces[i].bytes.clone()]).collect();
        assert_eq!(found.concat(), expected.concat(), "{spans:?}: {found:?}");
    }
    // Byte-level post-processors cut spaces from offsets; a token of spaces alone must still be found.
    let path = tempfile::tempdir().unwrap();
    let file = path.path().join("tokenizer.json");
    let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
        "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
        "post_processor":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
        "decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},
        "model":{"type":"BPE","vocab":{"a":0,"Ġ":1,"Ġa":2},"merges":[["Ġ","a"]]}}"#;
    std::fs::write(&file, json).unwrap();
    let tokenizer = Tokenizer::from_file(&file).unwrap();
    let (ids, inside) = tokenizer.encode_with_spans("a   a", &[1..3], false).unwrap();
    assert_eq!((ids, inside), (vec![0, 1, 1, 2], vec![false, true, true, false]));
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    assert!(Tokenizer::from_folder(folder.path()).unwrap_err().to_string().contains("tokenizer.json is missing"));
    std::fs::write(folder.path().join("tokenizer.model"), "").unwrap();
    assert!(
        Tokenizer::from_folder(folder.path()).unwrap_err().to_string().contains("tokenizer.model: it has no tokens")
    );
    let good = std::fs::read_to_string(fixture("llama/tokenizer.json")).unwrap();
    for (from, to, message) in [
        ("{", "[", "not a tokenizer.json"),
        ("\"merges\":[[", "\"merges\":[[\"aaaaaaaaaaaaaaaaaaaaaaaaaa\",\"bbbbbbbbbbbbbbbbbbbbbbbb\"],[", "merge 0"),
        ("\"type\":\"BPE\"", "\"type\":\"BPQ\"", "not a tokenizer.json"),
    ] {
        std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let error = Tokenizer::from_file(&path).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn hostile_vocabularies_are_errors() {
    use crate::formats::gguf::{Vocabulary, VocabularyKind};
    let vocabulary = |kind, pre, tokens: &[&'static str], merges: &[&'static str], scores: &[f32]| Vocabulary {
        kind,
        pre,
        tokens: tokens.to_vec(),
        types: Vec::new(),
        scores: scores.to_vec(),
        merges: merges.to_vec(),
        added: Vec::new(),
        bos: None,
        eos: None,
        unknown: None,
        padding: None,
        add_bos: None,
        add_eos: None,
        add_space_prefix: None,
    };
    let long = "x".repeat(2000).leak();
    for (vocabulary, message) in [
        (vocabulary(VocabularyKind::ByteLevel, "default", &[], &[], &[]), "empty"),
        (vocabulary(VocabularyKind::ByteLevel, "default", &["a", "a"], &[], &[]), "tokens 0 and 1"),
        (vocabulary(VocabularyKind::ByteLevel, "bloom", &["a"], &[], &[]), "pre-tokenizer \"bloom\""),
        (vocabulary(VocabularyKind::ByteLevel, "default", &["a", "b"], &["a b"], &[]), "merge 0"),
        (vocabulary(VocabularyKind::ByteLevel, "default", &["a", "b"], &["ab"], &[]), "merge 0"),
        (vocabulary(VocabularyKind::SentencePiece, "default", &["a"], &[], &[]), "scores"),
        (vocabulary(VocabularyKind::SentencePiece, "default", &["a"], &[], &[f32::NAN]), "score NaN"),
        (vocabulary(VocabularyKind::SentencePiece, "default", &[long], &[], &[0.0]), "2000 characters"),
    ] {
        let error = gguf::build(&vocabulary).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

/// Ids by transformers (`scripts/fixtures/sentencepiece_models.py`).
#[test]
fn sentencepiece_models_alone_give_the_ids_of_transformers() {
    let expected: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("../sentencepiece/expected.json")).unwrap()).unwrap();
    let mut texts = 0;
    for (kind, expected) in expected.as_object().unwrap() {
        let tokenizer = Tokenizer::from_folder(fixture("../sentencepiece").join(kind)).unwrap();
        assert_eq!(tokenizer.vocab_size(), expected["size"].as_u64().unwrap() as usize, "{kind}");
        let role = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        assert_eq!(role(tokenizer.special.bos).as_deref(), expected["bos"].as_str(), "{kind}");
        assert_eq!(role(tokenizer.special.eos).as_deref(), expected["eos"].as_str(), "{kind}");
        for row in expected["rows"].as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            let ids = |key: &str| -> Vec<u32> {
                row[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
            };
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids("ids"), "{kind} {text:?}");
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids("with_special"), "{kind} {text:?}");
            assert_eq!(
                tokenizer.decode(&ids("ids"), false).unwrap(),
                row["decoded"].as_str().unwrap(),
                "{kind} {text:?}"
            );
            texts += 1;
        }
    }
    assert_eq!(texts, 6 * 23);
}

#[test]
fn damaged_sentencepiece_models_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.model");
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Tokenizer::from_folder(folder.path()).map_err(|error| error.to_string())
    };
    for kind in ["bpe", "unigram"] {
        let good = std::fs::read(fixture("../sentencepiece").join(kind).join("tokenizer.model")).unwrap();
        assert!(read(&good).is_ok());
        for at in (0..good.len()).step_by(7) {
            let _ = read(&good[..at]);
            let mut damaged = good.clone();
            damaged[at] ^= 0xff;
            if let Ok(tokenizer) = read(&damaged) {
                let _ = tokenizer.encode("the water \u{301}x", true);
            }
        }
    }
    for (bytes, message) in [
        (&b"\x0a\xff\xff\xff\xff\x0f"[..], "cut short"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x0a\x03\x0a\x01a\x12\x02\x18\x03", "model type 3"),
        (b"\x0a\x03\x0a\x01a\x0a\x03\x0a\x01a\x12\x02\x18\x02", "tokens 0 and 1 are equal"),
        (b"\x0a\x08\x0a\x01a\x15\0\0\xc0\x7f", "score NaN"),
        (b"\x0a\x02\x0a\0", "0 characters"),
        (b"\x1a\x06\x12\x04\0\0\0\0", "precompiled_charsmap"),
        (b"\x1a\x06\x12\x04\xfc\xff\xff\xff", "precompiled_charsmap"),
        (b"\x0b", "encoding 3"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "more than ten bytes"),
        (b"{\"version\": 1}", "SentencePiece"),
    ] {
        let error = read(bytes).unwrap_err();
        assert!(error.contains(message) && error.contains("tokenizer.model"), "{}: {error}", bytes.escape_ascii());
    }
    let good = std::fs::read(fixture("../sentencepiece/bpe/tokenizer.model")).unwrap();
    for (config, message) in [
        (r#"{"tokenizer_class": "T5Tokenizer"}"#, "T5Tokenizer"),
        (r#"{"add_bos_token": true, "bos_token": ""}"#, "add_bos_token"),
    ] {
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        assert!(read(&good).unwrap_err().contains(message), "{config}");
    }
}
