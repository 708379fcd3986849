use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::matrix::{Matrix, Workspace};
use crate::sequence::SequenceLayout;
use crate::view::{View, ViewMut};

/// A layer with its inputs, and the reference: the formula in f64, with the whole score matrix.
struct Case {
    cfg: AttentionConfig,
    lengths: Vec<usize>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dout: Vec<f32>,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>, lengths: &[usize]) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64((heads * 31 + head_dim + lengths.len()) as u64);
        let tokens: usize = lengths.iter().sum();
        let mut random = |len: usize| (0..len).map(|_| rng.random_range(-1.5..1.5)).collect::<Vec<f32>>();
        let (q, dout) = (random(tokens * heads * head_dim), random(tokens * heads * head_dim));
        let (k, v) = (random(tokens * kv_heads * head_dim), random(tokens * kv_heads * head_dim));
        let scale = 1.0 / (head_dim as f32).sqrt();
        let cfg = AttentionConfig { heads, kv_heads, head_dim, scale, window };
        Self { cfg, lengths: lengths.to_vec(), q, k, v, dout }
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Shapes of q (and out), k (and v), lse.
    fn shapes(&self) -> [[usize; 2]; 3] {
        let AttentionConfig { heads, kv_heads, head_dim, .. } = self.cfg;
        [heads * head_dim, kv_heads * head_dim, heads].map(|cols| [self.tokens(), cols])
    }

    fn views(&self) -> [View<'_>; 3] {
        let [q, kv, _] = self.shapes();
        [View::new(&self.q, q[0], q[1]), View::new(&self.k, kv[0], kv[1]), View::new(&self.v, kv[0], kv[1])]
    }

    /// `(out, lse)`
    fn forward(&self, workspace: &Workspace) -> (Matrix, Matrix) {
        let [q, _, lse] = self.shapes();
        let (mut out, mut lse) = (workspace.matrix(q[0], q[1]).unwrap(), workspace.matrix(lse[0], lse[1]).unwrap());
        let [q, k, v] = self.views();
        let layout = SequenceLayout::from_lengths(&self.lengths);
        let order = forward(&self.cfg, q, k, v, &layout, out.view_mut(), lse.view_mut(), workspace).unwrap();
        assert_eq!(order, LseOrder::ByToken);
        (out, lse)
    }

    /// `(dq, dk, dv)`
    fn backward(&self, workspace: &Workspace) -> [Matrix; 3] {
        let [q_shape, kv_shape, _] = self.shapes();
        let (out, lse) = self.forward(workspace);
        let [mut dq, mut dk, mut dv] =
            [q_shape, kv_shape, kv_shape].map(|[rows, cols]| workspace.matrix(rows, cols).unwrap());
        let [q, k, v] = self.views();
        backward(
            &self.cfg,
            q,
            k,
            v,
            out.view(),
            lse.view(),
            LseOrder::ByToken,
            View::new(&self.dout, q_shape[0], q_shape[1]),
            &SequenceLayout::from_lengths(&self.lengths),
            dq.view_mut(),
            dk.view_mut(),
            dv.view_mut(),
            workspace,
        )
        .unwrap();
        [dq, dk, dv]
    }

    /// Calls `row` with every (first token of the sequence, token, head, probabilities of the visible keys from the
    /// given one, lse).
    fn for_each_row(&self, qkv: [&[f64]; 2], mut row: impl FnMut(usize, usize, usize, &[f64], f64)) {
        let AttentionConfig { heads, kv_heads, head_dim: d, scale, window } = self.cfg;
        let mut start = 0;
        for &len in &self.lengths {
            for i in start..start + len {
                let first = window.map_or(start, |window| start.max((i + 1).saturating_sub(window)));
                for h in 0..heads {
                    let q = &qkv[0][(i * heads + h) * d..][..d];
                    let scores: Vec<f64> = (first..=i)
                        .map(|j| {
                            let k = &qkv[1][(j * kv_heads + h / (heads / kv_heads)) * d..][..d];
                            f64::from(scale) * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>()
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                    let lse = max + sum.ln();
                    let p: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
                    row(first, i, h, &p, lse);
                }
            }
            start += len;
        }
    }

    /// `(out, lse)`
    fn reference_forward(&self, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let AttentionConfig { heads, kv_heads, head_dim: d, .. } = self.cfg;
        let (mut out, mut lses) = (vec![0.0; q.len()], vec![0.0; self.tokens() * heads]);
        self.for_each_row([q, k], |first, i, h, p, lse| {
            lses[i * heads + h] = lse;
            for (j, p) in (first..).zip(p) {
                let v = &v[(j * kv_heads + h / (heads / kv_heads)) * d..][..d];
                out[(i * heads + h) * d..][..d].iter_mut().zip(v).for_each(|(out, v)| *out += p * v);
            }
        });
        (out, lses)
    }

    /// `(dq, dk, dv)`
    fn reference_backward(&self) -> [Vec<f64>; 3] {
        let AttentionConfig { heads, kv_heads, head_dim: d, scale, .. } = self.cfg;
        let [q, k, v, dout] = [&self.q, &self.k, &self.v, &self.dout].map(|x| to_f64(x));
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        self.for_each_row([&q, &k], |first, i, h, p, _| {
            let at = (i * heads + h) * d;
            let kv = |j: usize| (j * kv_heads + h / (heads / kv_heads)) * d;
            let dp: Vec<f64> = (first..=i).map(|j| (0..d).map(|c| dout[at + c] * v[kv(j) + c]).sum()).collect();
            let delta: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for (j, (p, dp)) in (first..).zip(p.iter().zip(&dp)) {
                let ds = f64::from(scale) * p * (dp - delta);
                for c in 0..d {
                    dv[kv(j) + c] += p * dout[at + c];
                    dq[at + c] += ds * k[kv(j) + c];
                    dk[kv(j) + c] += ds * q[at + c];
                }
            }
        });
        [dq, dk, dv]
    }
}

fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The largest difference over the largest value; NaN anywhere gives NaN.
fn error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f64, |max, x| max.max(x.abs()));
    let difference = got.iter().zip(want).map(|(&g, w)| (f64::from(g) - w).abs());
    difference.fold(0f64, |max, x| if x > max || x.is_nan() { x } else { max }) / largest.max(1e-30)
}

fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new(9, 3, 64, None, &[1]),
        Case::new(9, 3, 64, None, &[300]),
        Case::new(9, 3, 64, None, &[1, 7, 65, 129, 1, 40]),
        Case::new(4, 4, 80, None, &[129, 65]),
        Case::new(8, 1, 128, None, &[65, 130]),
        Case::new(7, 1, 20, None, &[300, 3]),
        Case::new(1, 1, 1, None, &[17]),
        Case::new(2, 1, 3, None, &[700]),
    ];
    for window in [1, 16, 100] {
        cases.push(Case::new(9, 3, 64, Some(window), &[300, 7, 1]));
        cases.push(Case::new(4, 4, 80, Some(window), &[65, 129]));
        cases.push(Case::new(8, 1, 16, Some(window), &[600]));
    }
    cases
}

#[test]
fn forward_matches_f64() {
    let mut worst = 0f64;
    for case in cases() {
        let (out, lse) = case.forward(&Workspace::poisoned());
        let (q, k, v) = (to_f64(&case.q), to_f64(&case.k), to_f64(&case.v));
        let (want_out, want_lse) = case.reference_forward(&q, &k, &v);
        let errors = [error(out.as_slice(), &want_out), error(lse.as_slice(), &want_lse)];
        assert!(errors.iter().all(|&e| e < 2e-6), "{:?} {:?}: {errors:?}", case.cfg, case.lengths);
        worst = errors.into_iter().fold(worst, f64::max);
    }
    println!("attention forward: largest error {worst:.1e}");
}

#[test]
fn backward_matches_f64() {
    let mut worst = 0f64;
    for case in cases() {
        let got = case.backward(&Workspace::poisoned());
        let want = case.reference_backward();
        for ((name, got), want) in ["dq", "dk", "dv"].into_iter().zip(&got).zip(&want) {
            // With a window of one position the probabilities are 1 and dq and dk are exactly zero.
            let largest = want.iter().fold(0f64, |max, x| max.max(x.abs()));
            let error = if largest < 1e-12 {
                got.as_slice().iter().fold(0f64, |max, x| max.max(f64::from(x.abs())))
            } else {
                error(got.as_slice(), want)
            };
            assert!(error < 5e-6, "{name} of {:?} {:?}: {error:e}", case.cfg, case.lengths);
            worst = worst.max(error);
        }
    }
    println!("attention backward: largest error {worst:.1e}");
}

#[test]
fn backward_matches_finite_differences() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for case in [Case::new(6, 2, 8, None, &[1, 7, 40]), Case::new(4, 1, 5, Some(16), &[37])] {
        let inputs = [to_f64(&case.q), to_f64(&case.k), to_f64(&case.v)];
        let loss = |x: &[Vec<f64>; 3]| -> f64 {
            let out = case.reference_forward(&x[0], &x[1], &x[2]).0;
            out.iter().zip(&case.dout).map(|(out, &w)| out * f64::from(w)).sum()
        };
        let got = case.backward(&Workspace::poisoned());
        for which in 0..3 {
            for _ in 0..40 {
                let at = rng.random_range(0..inputs[which].len());
                let step = 1e-4;
                let shifted = |by: f64| {
                    let mut x = inputs.clone();
                    x[which][at] += by;
                    loss(&x)
                };
                let want = (shifted(step) - shifted(-step)) / (2.0 * step);
                let got = f64::from(got[which].as_slice()[at]);
                assert!((got - want).abs() < 1e-5 * (1.0 + want.abs()), "{which} {at}: {got} {want}");
            }
        }
    }
}

#[test]
fn cached_is_the_end_of_the_whole() {
    for (heads, kv_heads, d, window) in
        [(9, 3, 64, None), (4, 4, 80, Some(100)), (8, 1, 16, Some(16)), (2, 1, 3, Some(1))]
    {
        for n in [1, 7, 65, 1300] {
            let case = Case::new(heads, kv_heads, d, window, &[n]);
            let (q, k, v) = (to_f64(&case.q), to_f64(&case.k), to_f64(&case.v));
            let want = case.reference_forward(&q, &k, &v).0;
            for t in [1, 2, 16, 17, n].into_iter().filter(|&t| t <= n) {
                let workspace = Workspace::poisoned();
                let mut out = workspace.matrix(t, heads * d).unwrap();
                let [q, k, v] = case.views();
                cached(&case.cfg, q.slice_rows(n - t..n), k, v, out.view_mut(), &workspace).unwrap();
                let error = error(out.as_slice(), &want[(n - t) * heads * d..]);
                assert!(error < 2e-6, "{t} of {n}, {:?}: {error:e}", case.cfg);
            }
        }
    }
}

#[test]
fn windows_of_wider_buffers_are_read_and_written() {
    let case = Case::new(6, 2, 16, None, &[70, 9]);
    let (tokens, width) = (case.tokens(), (6 + 2 + 2) * 16);
    let mut fused = vec![f32::NAN; tokens * (width + 5)];
    for t in 0..tokens {
        let row = &mut fused[t * (width + 5)..][..width];
        row[..96].copy_from_slice(&case.q[t * 96..][..96]);
        row[96..128].copy_from_slice(&case.k[t * 32..][..32]);
        row[128..].copy_from_slice(&case.v[t * 32..][..32]);
    }
    let qkv = View::strided(&fused[..tokens * (width + 5) - 5], tokens, width, width + 5);
    let mut out = vec![7.0; tokens * 100];
    let workspace = Workspace::poisoned();
    let mut lse = workspace.matrix(tokens, 6).unwrap();
    let order = forward(
        &case.cfg,
        qkv.slice_cols(0..96),
        qkv.slice_cols(96..128),
        qkv.slice_cols(128..160),
        &SequenceLayout::from_lengths(&case.lengths),
        ViewMut::new(&mut out, tokens, 100).slice_cols(2..98),
        lse.view_mut(),
        &workspace,
    )
    .unwrap();
    assert_eq!(order, LseOrder::ByToken);
    let (want, want_lse) = case.forward(&workspace);
    assert!(lse.as_slice() == want_lse.as_slice());
    for (row, want) in out.chunks_exact(100).zip(want.as_slice().chunks_exact(96)) {
        assert!(&row[2..98] == want);
        assert!(row[..2].iter().chain(&row[98..]).all(|&x| x == 7.0));
    }
}

#[test]
fn packed_sequences_give_the_bits_of_separate_ones() {
    let packed = Case::new(6, 2, 16, None, &[33, 70]);
    let workspace = Workspace::poisoned();
    let (out, _) = packed.forward(&workspace);
    let second = Case {
        lengths: vec![70],
        q: packed.q[33 * 96..].to_vec(),
        k: packed.k[33 * 32..].to_vec(),
        v: packed.v[33 * 32..].to_vec(),
        dout: packed.dout[33 * 96..].to_vec(),
        ..packed
    };
    assert!(second.forward(&workspace).0.as_slice() == &out.as_slice()[33 * 96..]);
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    for case in [Case::new(3, 1, 32, None, &[900]), Case::new(8, 4, 16, Some(100), &[40, 300, 7])] {
        let with_threads = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let workspace = Workspace::poisoned();
                (case.forward(&workspace), case.backward(&workspace))
            })
        };
        let ((one_out, one_lse), one) = with_threads(1);
        for threads in [2, 5, 19] {
            let ((out, lse), gradients) = with_threads(threads);
            assert!(out.as_slice() == one_out.as_slice() && lse.as_slice() == one_lse.as_slice());
            assert!(gradients.iter().zip(&one).all(|(got, one)| got.as_slice() == one.as_slice()), "{threads} threads");
        }
    }
}

#[test]
fn a_long_sequence_never_holds_its_score_matrix() {
    let case = Case::new(1, 1, 64, None, &[4096]);
    let workspace = Workspace::poisoned();
    let (out, lse) = case.forward(&workspace);
    let own = out.bytes() + lse.bytes();
    let forward_bytes = workspace.peak_bytes() - own;
    drop((out, lse));
    let gradients = case.backward(&workspace);
    let own = own + gradients.iter().map(Matrix::bytes).sum::<usize>();
    let backward_bytes = workspace.peak_bytes() - own;
    let whole = 4096 * 4096 * 4;
    println!("temporaries of 4096 tokens: forward {forward_bytes}, backward {backward_bytes} bytes; scores: {whole}");
    let threads = rayon::current_num_threads();
    assert!(forward_bytes < threads * whole / 100);
    assert!(backward_bytes < whole / 6 + threads * whole / 100);
}

#[test]
fn large_scores_and_not_a_number_come_out_as_they_should() {
    // Scores of +-2000 need the running maximum in every block, also where the first block's are the lowest.
    let mut case = Case::new(2, 1, 4, None, &[600]);
    let ramp = |i: usize| if i < 300 { -1000.0 } else { 1000.0 };
    case.q.iter_mut().for_each(|q| *q = 1.0);
    case.k.iter_mut().enumerate().for_each(|(i, k)| *k = ramp(i / 4) + (i % 7) as f32 * 0.1);
    let (q, k, v) = (to_f64(&case.q), to_f64(&case.k), to_f64(&case.v));
    let (out, lse) = case.forward(&Workspace::poisoned());
    let (want, want_lse) = case.reference_forward(&q, &k, &v);
    assert!(error(lse.as_slice(), &want_lse) < 1e-6);
    // The scores themselves carry a rounding of 2000 * 2^-24, which is the relative error of the probabilities.
    assert!(error(out.as_slice(), &want) < 1e-3);

    case.k[4 * 310] = f32::NAN;
    let (out, _) = case.forward(&Workspace::poisoned());
    assert!(out.as_slice()[..310 * 8].iter().all(|x| x.is_finite()));
    assert!(out.as_slice()[310 * 8..].iter().all(|x| x.is_nan()));
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new(4, 2, 8, None, &[5]);
    let workspace = Workspace::poisoned();
    let [q, k, v] = case.views();
    let run = |cfg: &AttentionConfig, lengths: &[usize]| {
        let (mut out, mut lse) = (workspace.matrix(5, 32).unwrap(), workspace.matrix(5, 4).unwrap());
        let layout = SequenceLayout::from_lengths(lengths);
        forward(cfg, q, k, v, &layout, out.view_mut(), lse.view_mut(), &workspace).unwrap_err().to_string()
    };
    assert_eq!(run(&case.cfg, &[4]), "attention_forward: q has shape [5, 32], expected [4, 32]");
    let bad = AttentionConfig { kv_heads: 3, ..case.cfg };
    assert!(run(&bad, &[5]).contains("4 query heads, 3 key/value heads"));
    assert!(run(&AttentionConfig { window: Some(0), ..case.cfg }, &[5]).contains("window of 0"));
    let mut out = workspace.matrix(5, 32).unwrap();
    let error = cached(&case.cfg, q, k.slice_rows(0..3), v.slice_rows(0..3), out.view_mut(), &workspace).unwrap_err();
    assert_eq!(error.to_string(), "attention_cached: 5 queries are more than the 3 positions");
}

#[test]
fn no_tokens_are_no_work() {
    let case = Case::new(2, 1, 4, None, &[]);
    assert_eq!(case.forward(&Workspace::poisoned()).0.rows(), 0);
    assert_eq!(case.backward(&Workspace::poisoned())[1].rows(), 0);
    let mut out: [f32; 0] = [];
    let [q, k, v] = case.views();
    cached(&case.cfg, q, k, v, ViewMut::new(&mut out, 0, 8), &Workspace::poisoned()).unwrap();
}
