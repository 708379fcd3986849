use super::super::testing::ToyEncoder;
use super::*;

fn encoded(text: &str, trained_from: usize) -> Encoded {
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    Encoded { trained: (0..ids.len()).map(|i| i >= trained_from).collect(), ids }
}

#[test]
fn documents_come_back_as_they_were() {
    let dataset = Dataset::from_encoded([encoded("abc", 1), encoded("de", 0)]).unwrap();
    assert_eq!(dataset.len(), 2);
    assert_eq!(dataset.document(0).ids, [97, 98, 99]);
    assert_eq!(dataset.document(1).trained, [true, true]);
    assert_eq!(dataset.document(0).labels(), [-100, 98, 99]);
    assert_eq!(dataset.largest_token(), Some(101));
    assert_eq!(dataset.first_with_token(101), Some(1));
    assert_eq!(dataset.origin(1), "document 1");
    let batch = dataset.batch(&[1, 0]);
    assert_eq!(batch.tokens, [100, 101, 97, 98, 99]);
    assert_eq!(batch.targets, [101, -100, 98, 99, -100]);
    assert_eq!(batch.trained_tokens(), dataset.stats().trained_tokens);
    let text = dataset.document(0).marked_text(&ToyEncoder::default(), "<<", ">>").unwrap();
    assert_eq!(text, "a<<bc>>");
}

#[test]
fn the_fingerprint_sees_tokens_flags_and_boundaries() {
    let of = |documents: Vec<Encoded>| Dataset::from_encoded(documents).unwrap().fingerprint();
    let original = of(vec![encoded("abc", 1), encoded("de", 0)]);
    assert_eq!(original, of(vec![encoded("abc", 1), encoded("de", 0)]));
    for other in [
        vec![encoded("abd", 1), encoded("de", 0)],
        vec![encoded("abc", 2), encoded("de", 0)],
        vec![encoded("ab", 1), encoded("cde", 0)],
        vec![encoded("de", 0), encoded("abc", 1)],
        vec![encoded("abc", 1)],
    ] {
        assert_ne!(of(other), original);
    }
}

#[test]
fn unusable_documents_are_named() {
    let refusal = |document| Dataset::from_encoded([encoded("ab", 0), document]).unwrap_err().to_string();
    assert_eq!(refusal(encoded("ab", 2)), "document 1 has no token to train on");
    assert_eq!(refusal(encoded("a", 0)), "document 1 has no token to train on");
    assert_eq!(refusal(Encoded { ids: vec![1, 2], trained: vec![] }), "document 1 has 2 tokens and 0 flags");
}

#[test]
fn the_summary_mentions_only_what_happened() {
    let stats = DataStats { rows: 5, documents: 3, tokens: 30, trained_tokens: 9, longest: 12, ..Default::default() };
    assert_eq!(stats.to_string(), "3 documents, 30 tokens (9 trained), longest 12");
    let stats = DataStats { truncated: 2, dropped_untrained: 1, ..stats };
    assert!(stats.to_string().ends_with("; 2 truncated; 1 left out with nothing to train on"));
}
