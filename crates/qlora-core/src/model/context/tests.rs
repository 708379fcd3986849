use super::*;

fn attention(heads: usize, kv_heads: usize) -> AttentionConfig {
    AttentionConfig { heads, kv_heads, head_dim: 8, scale: 1.0, window: None }
}

#[test]
fn heads_divide_or_are_refused_with_what_works() {
    for (heads, kv_heads, works) in
        [(32, 8, &[1, 2, 4, 8, 16, 32][..]), (24, 6, &[1, 2, 3, 6, 12, 24]), (5, 1, &[1, 5])]
    {
        for ranks in 0..=heads + 1 {
            assert_eq!(
                check_heads(&attention(heads, kv_heads), ranks).is_ok(),
                works.contains(&ranks),
                "{heads} {ranks}"
            );
        }
    }
    let error = check_heads(&attention(24, 6), 4).unwrap_err().to_string();
    assert!(error.ends_with("context_parallel_size can be 1, 2, 3, 6, 12, 24"), "{error}");
}

#[test]
fn every_query_head_is_with_its_key_head() {
    for (heads, kv_heads, ranks) in [(32, 8, 4), (32, 8, 16), (6, 3, 3), (4, 1, 4)] {
        let config = attention(heads, kv_heads);
        let own = heads_of_a_rank(&config, ranks);
        for rank in 0..ranks {
            let (q, kv) = (columns_of(heads, 1, rank, ranks), columns_of(kv_heads, 1, rank, ranks));
            assert_eq!((q.len(), kv.len()), (own.heads, own.kv_heads));
            for (head, global) in q.enumerate() {
                assert_eq!(kv.start + head / own.group(), global / config.group(), "{heads} {kv_heads} {rank} {head}");
            }
        }
    }
}

#[test]
fn shares_are_even_and_batches_have_a_token_for_each() {
    let exchange = PlannedExchange { ranks: 4 };
    let share = Share::new(&exchange, &SequenceLayout::from_lengths(&[5, 6]));
    assert_eq!(share.bounds, [0, 2, 5, 8, 11]);
    assert_eq!((share.rows(), share.positions().to_vec()), (0..2, vec![0, 1]));
    let small = Batch::from_documents([(&[5, 6, 7][..], &[5, 6, 7][..])]);
    let padded = with_a_token_each(&small, Some(&exchange));
    assert_eq!((padded.tokens.len(), padded.trained_tokens()), (4, small.trained_tokens()));
    assert_eq!(padded.layout.sequences().collect::<Vec<_>>(), [0..3, 3..4]);
    assert_eq!(*with_a_token_each(&small, None), small);
}
