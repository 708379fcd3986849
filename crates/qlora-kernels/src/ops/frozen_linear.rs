//! Products with a frozen weight of any kind: `y = x W^T` and `dx = dy W`.
//!
//! | argument | shape | |
//! |---|---|---|
//! | `x`, `dx` | `[tokens, cols]` | |
//! | `W` | `[rows, cols]` | any [`FrozenWeight`]: 4-bit, integers, bf16, f32 |
//! | `y`, `dy` | `[tokens, rows]` | |
//!
//! A weight of LLM.int8 has `x` rounded to 8 bits in the forward (`int8_activations`), not in the backward.
//!
//! The weight is frozen: there is no gradient of it. Everything is f32. Results do not depend on the number of threads.

use std::ops::Range;
use std::sync::LazyLock;

use pulp::{Simd, WithSimd};
use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use crate::error::Result;
use crate::matrix::Workspace;
use crate::ops::int8_activations;
use crate::ops::matmul::nn_serial;
use crate::transpose::transpose;
use crate::view::{HostView, HostViewMut, View, ViewMut};
use crate::weight::{FrozenWeight, Int8Activations};

/// Up to this many tokens, weights are multiplied row by row as they are dequantized.
const FEW_TOKENS: usize = 4;

/// Weight rows that are dequantized, then transposed, at a time.
const STRIP: usize = 16;

/// The largest part of a weight, in elements, that the backward holds as f32: 16 MB, which leaves room in an L3 cache.
const BACKWARD_SLAB: usize = 1 << 22;

/// The elements of the activations that a task walks over for each of its slabs: they should stay in the L3 cache.
const ACTIVATION_BLOCK: usize = 1 << 21;

/// `y = x W^T + beta * y`. With `beta = 0`, `y` is not read.
///
/// # Errors
/// If a shape does not fit.
pub fn forward(x: View, weight: &dyn FrozenWeight, y: ViewMut, beta: f32, workspace: &Workspace) -> Result<()> {
    const OP: &str = "frozen_linear_forward";
    x.expect(OP, "x", x.rows(), weight.cols())?;
    y.expect(OP, "y", x.rows(), weight.rows())?;
    weight.arrive()?;
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return crate::cuda::linear::frozen_forward(OP, x.cuda(OP)?, weight, y.cuda(OP)?, beta);
    }
    let (x, y) = (x.host(OP)?, y.host(OP)?);
    let mut rounded = None;
    let x = match weight.int8_activations() {
        None => x,
        Some(Int8Activations { threshold }) => {
            let rounded = rounded.insert(workspace.scratch(x.rows(), x.cols()));
            int8_activations::round(x, threshold, weight.exact_columns(), rounded.as_mut_slice());
            HostView::new(rounded.as_slice(), x.rows(), x.cols())
        }
    };
    match x.rows() {
        0 => {}
        1..=FEW_TOKENS => few_tokens(x, weight, y, beta, workspace),
        _ => many_tokens(x, weight, y, beta, workspace),
    }
    Ok(())
}

/// `dx = dy W + beta * dx`. With `beta = 0`, `dx` is not read.
///
/// # Errors
/// If a shape does not fit.
pub fn backward(dy: View, weight: &dyn FrozenWeight, dx: ViewMut, beta: f32, workspace: &Workspace) -> Result<()> {
    const OP: &str = "frozen_linear_backward";
    dy.expect(OP, "dy", dy.rows(), weight.rows())?;
    dx.expect(OP, "dx", dy.rows(), weight.cols())?;
    weight.arrive()?;
    #[cfg(feature = "cuda")]
    if dx.gpu().is_some() {
        return crate::cuda::linear::frozen_backward(OP, dy.cuda(OP)?, weight, dx.cuda(OP)?, beta);
    }
    let (dy, mut dx) = (dy.host(OP)?, dx.host(OP)?);
    let (rows, cols) = (weight.rows(), weight.cols());
    if let Some(data) = weight.as_f32() {
        multiply_slab(dy, HostView::new(data, rows, cols), dx, beta);
        return Ok(());
    }
    // A weight without rows is one empty slab, so that beta is applied.
    let slab = (BACKWARD_SLAB / cols.max(1)).clamp(1, rows.max(1));
    let mut memory = workspace.scratch(slab.min(rows), cols);
    for start in (0..rows.max(1)).step_by(slab) {
        let end = rows.min(start + slab);
        let memory = &mut memory.as_mut_slice()[..(end - start) * cols];
        memory.par_chunks_mut((STRIP * cols).max(1)).enumerate().for_each(|(i, out)| {
            let first = start + i * STRIP;
            weight.dequantize_rows(first..first + out.len() / cols, out);
        });
        let beta = if start == 0 { beta } else { 1.0 };
        multiply_slab(dy.slice_cols(start..end), HostView::new(memory, end - start, cols), dx.reborrow(), beta);
    }
    Ok(())
}

/// `dx = dy w + beta dx`, each task some columns of `dx`.
fn multiply_slab(dy: HostView, w: HostView, dx: HostViewMut, beta: f32) {
    tiles(dx, dy.cols()).into_par_iter().with_max_len(1).for_each(|tile| {
        nn_serial(dy.slice_rows(tile.tokens), w.slice_cols(tile.columns), tile.out, 1.0, beta);
    });
}

/// Each task multiplies with a slab of the weight that lies dequantized and transposed in its L2 cache.
fn many_tokens(x: HostView, weight: &dyn FrozenWeight, y: HostViewMut, beta: f32, workspace: &Workspace) {
    let cols = weight.cols();
    tiles(y, cols).into_par_iter().with_max_len(1).for_each(|tile| {
        let rows = tile.columns;
        let mut memory = workspace.scratch(1, cols * rows.len() + STRIP * strip_stride(cols));
        let (slab, strip) = memory.as_mut_slice().split_at_mut(cols * rows.len());
        dequantize_transposed(weight, rows.clone(), strip, HostViewMut::new(slab, cols, rows.len()));
        let slab = HostView::new(slab, cols, rows.len());
        nn_serial(x.slice_rows(tile.tokens), slab, tile.out, 1.0, beta);
    });
}

/// A part of an output, with its factors: some tokens and some columns of the second factor.
struct Tile<'a> {
    tokens: Range<usize>,
    columns: Range<usize>,
    out: HostViewMut<'a>,
}

/// Cuts an output into tiles for parallel tasks; `inner` is the dimension that the product sums over.
fn tiles(out: HostViewMut<'_>, inner: usize) -> Vec<Tile<'_>> {
    let (tokens, columns, threads) = (out.rows(), out.cols(), rayon::current_num_threads());
    // Multiples of 16 up to 64 suit the matrix kernels alike: the one that leaves the threads idle the least.
    let idle = |width: &usize| columns.div_ceil(*width).next_multiple_of(threads) * width;
    let width = [64, 48, 32].into_iter().min_by_key(idle).expect("three candidates");
    // Few columns are used again for each block of tokens, so that every thread has something to do.
    let blocks = (2 * threads).div_ceil(columns.div_ceil(width).max(1)).min(tokens / 128).max(1);
    let block = tokens.div_ceil(blocks).min((ACTIVATION_BLOCK / inner.max(1)).max(512)).max(1);
    let mut tiles = Vec::with_capacity(columns.div_ceil(width) * tokens.div_ceil(block));
    let mut below = out;
    for first in (0..tokens).step_by(block) {
        let tokens = first..tokens.min(first + block);
        let rows;
        (rows, below) = below.split_rows(tokens.len());
        tiles.extend(split_cols(rows, width).map(|(columns, out)| Tile { tokens: tokens.clone(), columns, out }));
    }
    tiles
}

/// The columns of `x` in windows of `width`, the last one narrower, and which they are.
fn split_cols(x: HostViewMut<'_>, width: usize) -> impl Iterator<Item = (Range<usize>, HostViewMut<'_>)> {
    let (cols, mut rest) = (x.cols(), Some(x));
    (0..cols).step_by(width).map(move |start| {
        let columns = start..cols.min(start + width);
        let (window, right) = rest.take().expect("put back below").split_cols(columns.len());
        rest = Some(right);
        (columns, window)
    })
}

/// The distance of rows in a strip: rows of a power of two would fall into the same few cache sets.
fn strip_stride(cols: usize) -> usize {
    cols.next_multiple_of(16) + 16
}

/// Writes the given rows of the weight as the columns of `out [cols, rows.len()]`, the layout in which the matrix kernels
/// read a second factor. `strip` is memory for `STRIP * strip_stride(cols)` elements.
fn dequantize_transposed(weight: &dyn FrozenWeight, rows: Range<usize>, strip: &mut [f32], out: HostViewMut) {
    let (cols, stride) = (weight.cols(), strip_stride(weight.cols()));
    for (columns, out) in split_cols(out, STRIP) {
        let (first, count) = (rows.start + columns.start, columns.len());
        if let Some(data) = weight.as_f32() {
            transpose(HostView::new(&data[first * cols..(first + count) * cols], count, cols), 1.0, out);
            continue;
        }
        for (row, strip) in (first..first + count).zip(strip.chunks_exact_mut(stride)) {
            weight.dequantize_rows(row..row + 1, &mut strip[..cols]);
        }
        transpose(HostView::strided(strip, count, cols, stride), 1.0, out);
    }
}

/// Reads the weight once: some rows are dequantized into the L1 cache and multiplied with every token there.
fn few_tokens(x: HostView, weight: &dyn FrozenWeight, y: HostViewMut, beta: f32, workspace: &Workspace) {
    let cols = weight.cols();
    let block = (8192 / cols.max(1)).clamp(1, 4) * 4;
    // Enough tasks to even out, but each worth waking a thread for.
    let share = weight.rows().div_ceil(4 * rayon::current_num_threads());
    let rows = share.max((1 << 16) / cols.max(1)).next_multiple_of(block);
    let tasks: Vec<_> = split_cols(y, rows).collect();
    tasks.into_par_iter().with_max_len(1).for_each(|(task, mut y)| {
        let mut memory = workspace.scratch(block, cols);
        let mut products = [0.0; 16];
        for start in (0..y.cols()).step_by(block) {
            let count = (y.cols() - start).min(block);
            let rows = task.start + start..task.start + start + count;
            let rows = match weight.as_f32() {
                Some(data) => &data[rows.start * cols..rows.end * cols],
                None => {
                    let memory = &mut memory.as_mut_slice()[..count * cols];
                    weight.dequantize_rows(rows, memory);
                    memory
                }
            };
            for t in 0..x.rows() {
                ARCH.dispatch(Dots { rows, x: x.row(t), out: &mut products[..count] });
                for (y, product) in y.row_mut(t)[start..].iter_mut().zip(&products[..count]) {
                    *y = if beta == 0.0 { *product } else { product + beta * *y };
                }
            }
        }
    });
}

static ARCH: LazyLock<pulp::Arch> = LazyLock::new(pulp::Arch::new);

/// `out[i] = sum_j rows[i][j] x[j]`.
struct Dots<'a> {
    rows: &'a [f32],
    x: &'a [f32],
    out: &'a mut [f32],
}

impl WithSimd for Dots<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let cols = self.x.len();
        let row = |i: usize| &self.rows[i * cols..(i + 1) * cols];
        let (fours, rest) = self.out.as_chunks_mut::<4>();
        for (i, out) in fours.iter_mut().enumerate() {
            *out = dots(simd, [row(4 * i), row(4 * i + 1), row(4 * i + 2), row(4 * i + 3)], self.x);
        }
        for (i, out) in rest.iter_mut().enumerate() {
            [*out] = dots(simd, [row(4 * fours.len() + i)], self.x);
        }
    }
}

/// Each row's sum runs in two vectors; with four rows that keeps the multipliers busy.
#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, rows: [&[f32]; N], x: &[f32]) -> [f32; N] {
    let (x_vectors, x_tail) = S::as_simd_f32s(x);
    let (x_pairs, x_odd) = x_vectors.as_chunks::<2>();
    let vectors = rows.map(|row| &S::as_simd_f32s(row).0[..x_vectors.len()]);
    let mut sums = [[simd.splat_f32s(0.0); 2]; N];
    for (i, x) in x_pairs.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&vectors) {
            sums[0] = simd.mul_add_e_f32s(row[2 * i], x[0], sums[0]);
            sums[1] = simd.mul_add_e_f32s(row[2 * i + 1], x[1], sums[1]);
        }
    }
    let mut out = [0.0; N];
    for (((out, sums), vectors), row) in out.iter_mut().zip(sums).zip(&vectors).zip(&rows) {
        let mut sum = simd.add_f32s(sums[0], sums[1]);
        if let [x] = x_odd {
            sum = simd.mul_add_e_f32s(vectors[vectors.len() - 1], *x, sum);
        }
        *out = simd.reduce_sum_f32s(sum);
        for (a, b) in row[x.len() - x_tail.len()..].iter().zip(x_tail) {
            *out += a * b;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use rand::{RngExt, SeedableRng};

    use super::*;
    use crate::weight::{PlainData, PlainWeight};

    fn random(rng: &mut rand_chacha::ChaCha8Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    /// The weight in bf16 and, with the same values, in f32.
    fn weights(rng: &mut rand_chacha::ChaCha8Rng, rows: usize, cols: usize) -> [PlainWeight; 2] {
        let data: Vec<bf16> = random(rng, rows * cols).into_iter().map(bf16::from_f32).collect();
        let wide = data.iter().map(|x| x.to_f32()).collect();
        [PlainData::Bf16(data), PlainData::F32(wide)].map(|data| PlainWeight::new(data, rows, cols))
    }

    /// `a [m, k] b [k, n] + beta c` in f64, the operands given by element.
    fn reference(
        [m, n, k]: [usize; 3],
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
        beta: f32,
        c: &[f32],
    ) -> Vec<f64> {
        let dot = |i: usize, j: usize| (0..k).map(|t| f64::from(a(i, t)) * f64::from(b(t, j))).sum::<f64>();
        let old = |at: usize| if beta == 0.0 { 0.0 } else { f64::from(beta) * f64::from(c[at]) };
        (0..m * n).map(|at| dot(at / n, at % n) + old(at)).collect()
    }

    fn assert_close(got: &[f32], want: &[f64], inner: usize, what: &str) {
        for (at, (&got, want)) in got.iter().zip(want).enumerate() {
            let error = (f64::from(got) - want).abs();
            assert!(error < 1e-6 * (inner as f64).max(16.0).sqrt(), "{what}, element {at}: {got} {want}");
        }
    }

    const SHAPES: [[usize; 3]; 12] = [
        [1, 1, 1],
        [1, 37, 50],
        [2, 5, 16],
        [3, 200, 33],
        [4, 130, 96],
        [5, 3, 7],
        [7, 65, 129],
        [130, 192, 80],
        [300, 70, 31],
        [257, 100, 17],
        [9, 1, 300],
        [40, 17, 1],
    ];

    #[test]
    fn forward_matches_f64_for_every_kind_of_weight() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let workspace = Workspace::poisoned();
        for [tokens, rows, cols] in SHAPES {
            let x = random(&mut rng, tokens * cols);
            for weight in weights(&mut rng, rows, cols) {
                let mut w = vec![0.0; rows * cols];
                weight.dequantize_rows(0..rows, &mut w);
                for beta in [0.0, 1.0, -0.5] {
                    let mut y =
                        if beta == 0.0 { vec![f32::NAN; tokens * rows] } else { random(&mut rng, tokens * rows) };
                    let shape = [tokens, rows, cols];
                    let want = reference(shape, |t, c| x[t * cols + c], |c, r| w[r * cols + c], beta, &y);
                    let view = ViewMut::new(&mut y, tokens, rows);
                    forward(View::new(&x, tokens, cols), &weight, view, beta, &workspace).unwrap();
                    assert_close(&y, &want, cols, &format!("{shape:?} {weight:?} beta {beta}"));
                }
            }
        }
    }

    #[test]
    fn backward_matches_f64_for_every_kind_of_weight() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let workspace = Workspace::poisoned();
        for [tokens, rows, cols] in SHAPES {
            let dy = random(&mut rng, tokens * rows);
            for weight in weights(&mut rng, rows, cols) {
                let mut w = vec![0.0; rows * cols];
                weight.dequantize_rows(0..rows, &mut w);
                for beta in [0.0, 1.0, -0.5] {
                    let mut dx =
                        if beta == 0.0 { vec![f32::NAN; tokens * cols] } else { random(&mut rng, tokens * cols) };
                    let shape = [tokens, cols, rows];
                    let want = reference(shape, |t, r| dy[t * rows + r], |r, c| w[r * cols + c], beta, &dx);
                    let view = ViewMut::new(&mut dx, tokens, cols);
                    backward(View::new(&dy, tokens, rows), &weight, view, beta, &workspace).unwrap();
                    assert_close(&dx, &want, rows, &format!("{shape:?} {weight:?} beta {beta}"));
                }
            }
        }
    }

    #[test]
    fn a_weight_of_several_slabs_is_summed_over_all_of_them() {
        // Wider than it is worth: the second slab begins within the rows.
        let (tokens, rows, cols) = (2, 9, BACKWARD_SLAB / 4);
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let [weight, _] = weights(&mut rng, rows, cols);
        let dy = random(&mut rng, tokens * rows);
        let workspace = Workspace::poisoned();
        let mut dx = workspace.matrix(tokens, cols).unwrap();
        let before = workspace.peak_bytes();
        backward(View::new(&dy, tokens, rows), &weight, dx.view_mut(), 0.0, &workspace).unwrap();
        assert!(workspace.peak_bytes() - before <= BACKWARD_SLAB * 4);
        let mut w = vec![0.0; rows * cols];
        weight.dequantize_rows(0..rows, &mut w);
        for at in [0, 1, cols - 1, cols, 2 * cols - 1] {
            let want: f64 =
                (0..rows).map(|r| f64::from(dy[at / cols * rows + r]) * f64::from(w[r * cols + at % cols])).sum();
            assert!((f64::from(dx.as_slice()[at]) - want).abs() < 1e-6);
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(4);
        let [weight, _] = weights(&mut rng, 200, 70);
        for tokens in [1, 3, 300] {
            let (x, dy) = (random(&mut rng, tokens * 70), random(&mut rng, tokens * 200));
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let workspace = Workspace::poisoned();
                let (mut y, mut dx) = (workspace.matrix(tokens, 200).unwrap(), workspace.matrix(tokens, 70).unwrap());
                pool.install(|| {
                    forward(View::new(&x, tokens, 70), &weight, y.view_mut(), 0.0, &workspace).unwrap();
                    backward(View::new(&dy, tokens, 200), &weight, dx.view_mut(), 0.0, &workspace).unwrap();
                });
                (y.into_vec(), dx.into_vec())
            };
            assert!(run(1) == run(2) && run(1) == run(7), "{tokens} tokens");
        }
    }

    #[test]
    fn no_tokens_and_no_inner_dimension() {
        let workspace = Workspace::poisoned();
        let [weight, _] = weights(&mut rand_chacha::ChaCha8Rng::seed_from_u64(5), 3, 4);
        forward(View::new(&[], 0, 4), &weight, ViewMut::new(&mut [], 0, 3), 0.0, &workspace).unwrap();
        backward(View::new(&[], 0, 3), &weight, ViewMut::new(&mut [], 0, 4), 0.0, &workspace).unwrap();
        let empty = PlainWeight::new(PlainData::Bf16(vec![]), 0, 4);
        let mut dx = [2.0; 4];
        backward(View::new(&[], 1, 0), &empty, ViewMut::new(&mut dx, 1, 4), 0.5, &workspace).unwrap();
        assert_eq!(dx, [1.0; 4]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let workspace = Workspace::poisoned();
        let [weight, _] = weights(&mut rand_chacha::ChaCha8Rng::seed_from_u64(6), 3, 4);
        let mut y = [0.0; 6];
        let error = forward(View::new(&[0.0; 10], 2, 5), &weight, ViewMut::new(&mut y, 2, 3), 0.0, &workspace);
        assert_eq!(error.unwrap_err().to_string(), "frozen_linear_forward: x has shape [2, 5], expected [2, 4]");
        let error = backward(View::new(&[0.0; 6], 2, 3), &weight, ViewMut::new(&mut y, 2, 3), 0.0, &workspace);
        assert_eq!(error.unwrap_err().to_string(), "frozen_linear_backward: dx has shape [2, 3], expected [2, 4]");
    }
}
