//! Matrix products into a given output: `c = alpha * a b + beta * c` for the three transpositions that training needs.
//!
//! | function | a | b | c | used for |
//! |---|---|---|---|---|
//! | [`nt`] | `[m, k]` | `[n, k]` | `[m, n]` | `y = x W^T` |
//! | [`nn`] | `[m, k]` | `[k, n]` | `[m, n]` | `dx = dy W` |
//! | [`tn`] | `[k, m]` | `[k, n]` | `[m, n]` | `dW = dy^T x` |
//!
//! On CUDA, cuBLASLt does the work with f32 sums. On the CPU the `gemm` crate does it, in f32. The `*_serial` kinds stay on the calling thread: they are for
//! operations that cut their work into parallel tasks themselves.

use gemm::Parallelism;

#[cfg(feature = "cuda")]
use crate::cuda::Kind;
use crate::error::{Error, Result};
use crate::view::{HostView, HostViewMut, View, ViewMut};

/// `c = alpha * a b^T + beta * c`.
pub fn nt(a: View, b: View, c: ViewMut, alpha: f32, beta: f32) -> Result<()> {
    const OP: &str = "matmul_nt";
    #[cfg(feature = "cuda")]
    if let Some(gpu) = c.gpu() {
        return gpu.matmul(OP, Kind::Nt, a.cuda(OP)?, b.cuda(OP)?, c.cuda(OP)?, alpha, beta);
    }
    b.expect(OP, "b", c.cols(), a.cols())?;
    c.expect(OP, "c", a.rows(), b.rows())?;
    let (a, b) = (a.host(OP)?, b.host(OP)?);
    run(OP, Strided::rows(a), Strided::columns(b), c, alpha, beta, a.cols())
}

/// [`nt`] on the calling thread.
///
/// # Panics
/// If the shapes do not fit each other or a factor is NaN.
#[allow(dead_code, reason = "the third of three")]
pub(crate) fn nt_serial(a: HostView, b: HostView, mut c: HostViewMut, alpha: f32, beta: f32) {
    assert_eq!((b.cols(), c.rows(), c.cols()), (a.cols(), a.rows(), b.rows()), "matmul_nt: shapes");
    call_gemm(Strided::rows(a), Strided::columns(b), &mut c, alpha, beta, a.cols(), Parallelism::None);
}

/// `c = alpha * a b + beta * c`.
pub fn nn(a: View, b: View, c: ViewMut, alpha: f32, beta: f32) -> Result<()> {
    const OP: &str = "matmul_nn";
    #[cfg(feature = "cuda")]
    if let Some(gpu) = c.gpu() {
        return gpu.matmul(OP, Kind::Nn, a.cuda(OP)?, b.cuda(OP)?, c.cuda(OP)?, alpha, beta);
    }
    b.expect(OP, "b", a.cols(), c.cols())?;
    c.expect(OP, "c", a.rows(), b.cols())?;
    let (a, b) = (a.host(OP)?, b.host(OP)?);
    run(OP, Strided::rows(a), Strided::rows(b), c, alpha, beta, a.cols())
}

/// [`nn`] on the calling thread.
///
/// # Panics
/// If the shapes do not fit each other or a factor is NaN.
pub(crate) fn nn_serial(a: HostView, b: HostView, mut c: HostViewMut, alpha: f32, beta: f32) {
    assert_eq!((b.rows(), c.rows(), c.cols()), (a.cols(), a.rows(), b.cols()), "matmul_nn: shapes");
    call_gemm(Strided::rows(a), Strided::rows(b), &mut c, alpha, beta, a.cols(), Parallelism::None);
}

/// `c = alpha * a^T b + beta * c`.
pub fn tn(a: View, b: View, c: ViewMut, alpha: f32, beta: f32) -> Result<()> {
    const OP: &str = "matmul_tn";
    #[cfg(feature = "cuda")]
    if let Some(gpu) = c.gpu() {
        return gpu.matmul(OP, Kind::Tn, a.cuda(OP)?, b.cuda(OP)?, c.cuda(OP)?, alpha, beta);
    }
    b.expect(OP, "b", a.rows(), c.cols())?;
    c.expect(OP, "c", a.cols(), b.cols())?;
    let (a, b) = (a.host(OP)?, b.host(OP)?);
    run(OP, Strided::columns(a), Strided::rows(b), c, alpha, beta, a.rows())
}

/// [`tn`] on the calling thread.
///
/// # Panics
/// If the shapes do not fit each other or a factor is NaN.
pub(crate) fn tn_serial(a: HostView, b: HostView, mut c: HostViewMut, alpha: f32, beta: f32) {
    assert_eq!((b.rows(), c.rows(), c.cols()), (a.rows(), a.cols(), b.cols()), "matmul_tn: shapes");
    call_gemm(Strided::columns(a), Strided::rows(b), &mut c, alpha, beta, a.rows(), Parallelism::None);
}

/// A matrix by pointer and the distances between its rows and columns.
struct Strided {
    ptr: *const f32,
    row: isize,
    col: isize,
}

impl Strided {
    fn rows(view: HostView) -> Self {
        Self { ptr: view.as_ptr(), row: view.stride() as isize, col: 1 }
    }

    /// The transposed matrix.
    fn columns(view: HostView) -> Self {
        Self { ptr: view.as_ptr(), row: 1, col: view.stride() as isize }
    }
}

/// Below this many multiply-adds a product runs on the calling thread: waking the others would cost more.
const PARALLEL_ABOVE: usize = 1 << 19;

fn run(op: &'static str, a: Strided, b: Strided, c: ViewMut, alpha: f32, beta: f32, k: usize) -> Result<()> {
    let mut c = c.host(op)?;
    let (m, n) = (c.rows(), c.cols());
    if alpha.is_nan() || beta.is_nan() {
        return Err(Error::invalid(op, "alpha and beta must not be NaN"));
    }
    let threads = if m * n * k < PARALLEL_ABOVE { 1 } else { rayon::current_num_threads() };
    let parallelism = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };
    call_gemm(a, b, &mut c, alpha, beta, k, parallelism);
    Ok(())
}

/// The callers have checked that `a` is `[c.rows, k]` and `b` is `[k, c.cols]`.
fn call_gemm(a: Strided, b: Strided, c: &mut HostViewMut, alpha: f32, beta: f32, k: usize, parallelism: Parallelism) {
    assert!(!alpha.is_nan() && !beta.is_nan(), "the factors of a matrix product must not be NaN");
    let stride = c.stride() as isize;
    // SAFETY: the callers checked that a is [m, k], b is [k, n] and c is [m, n]; views guarantee that all elements at
    // these strides lie in borrowed memory and that c's is borrowed mutably, so it overlaps neither a nor b. With
    // beta = 0, c is not read.
    unsafe {
        gemm::gemm(
            c.rows(),
            c.cols(),
            k,
            c.as_mut_ptr(),
            1,
            stride,
            beta != 0.0,
            a.ptr,
            a.col,
            a.row,
            b.ptr,
            b.col,
            b.row,
            beta,
            alpha, // the crate's first factor belongs to c
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    fn random(rng: &mut rand_chacha::ChaCha8Rng, len: usize) -> Vec<f32> {
        (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..cols).flat_map(|c| (0..rows).map(move |r| x[r * cols + c])).collect()
    }

    #[test]
    fn all_transpositions_match_f64_over_plain_and_odd_shapes() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (64, 96, 128), (17, 1, 33), (1, 100, 64), (200, 130, 70)] {
            let (a, b, c0) = (random(&mut rng, m * k), random(&mut rng, k * n), random(&mut rng, m * n));
            for (alpha, beta) in [(1.0, 0.0), (0.5, 1.0), (2.0, -0.5)] {
                let expected: Vec<f64> = (0..m * n)
                    .map(|i| {
                        let dot: f64 = (0..k).map(|t| f64::from(a[i / n * k + t]) * f64::from(b[t * n + i % n])).sum();
                        f64::from(alpha) * dot + f64::from(beta) * f64::from(c0[i])
                    })
                    .collect();
                let (at, bt) = (transposed(&a, m, k), transposed(&b, k, n));
                let start = if beta == 0.0 { vec![f32::NAN; m * n] } else { c0.clone() };
                let mut results = [start.clone(), start.clone(), start];
                let [c_nn, c_nt, c_tn] = &mut results;
                nn(View::new(&a, m, k), View::new(&b, k, n), ViewMut::new(c_nn, m, n), alpha, beta).unwrap();
                nt(View::new(&a, m, k), View::new(&bt, n, k), ViewMut::new(c_nt, m, n), alpha, beta).unwrap();
                tn(View::new(&at, k, m), View::new(&b, k, n), ViewMut::new(c_tn, m, n), alpha, beta).unwrap();
                for result in &results {
                    for (&got, &want) in result.iter().zip(&expected) {
                        assert!(
                            (f64::from(got) - want).abs() < 1e-5 * (k as f64).sqrt().max(1.0),
                            "{m} {n} {k}: {got} {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_strided_window_of_the_output_is_written_and_nothing_else() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 0.0, 1.0]);
        let mut c = vec![9.0; 8];
        let window = ViewMut::new(&mut c, 2, 4).slice_cols(1..3);
        nn(View::new(&a, 2, 2), View::new(&b, 2, 2), window, 1.0, 0.0).unwrap();
        assert_eq!(c, [9.0, 1.0, 2.0, 9.0, 9.0, 3.0, 4.0, 9.0]);
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let (a, b) = ([0.0; 6], [0.0; 6]);
        let mut c = vec![0.0; 4];
        let error = nn(View::new(&a, 2, 3), View::new(&b, 2, 3), ViewMut::new(&mut c, 2, 2), 1.0, 0.0).unwrap_err();
        assert_eq!(error.to_string(), "matmul_nn: b has shape [2, 3], expected [3, 2]");
    }

    #[test]
    fn serial_products_give_the_bits_of_the_parallel_ones() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
        let narrow = [(1, 1500, 400), (1500, 1, 400), (16, 900, 64), (900, 16, 64), (300, 8, 2000)];
        for (m, n, k) in [(1, 1, 1), (5, 3, 9), (130, 70, 200), (192, 160, 300)].into_iter().chain(narrow) {
            let (a, b) = (random(&mut rng, m * k), random(&mut rng, k * n));
            type Parallel = fn(View, View, ViewMut, f32, f32) -> Result<()>;
            type Serial = fn(HostView, HostView, HostViewMut, f32, f32);
            let cases: [(Parallel, Serial, [usize; 2], [usize; 2]); 3] =
                [(nn, nn_serial, [m, k], [k, n]), (nt, nt_serial, [m, k], [n, k]), (tn, tn_serial, [k, m], [k, n])];
            for (parallel, serial, sa, sb) in cases {
                let (mut c, mut d) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
                let (a, b) = (View::new(&a, sa[0], sa[1]), View::new(&b, sb[0], sb[1]));
                serial(a.host("t").unwrap(), b.host("t").unwrap(), HostViewMut::new(&mut d, m, n), 0.5, 0.0);
                for threads in [2, 3, 7, 19] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| parallel(a, b, ViewMut::new(&mut c, m, n), 0.5, 0.0).unwrap());
                    assert!(c == d, "{m} {n} {k}, {threads} threads");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "shapes")]
    fn serial_products_refuse_shapes_that_do_not_fit() {
        nn_serial(
            HostView::new(&[0.0; 6], 2, 3),
            HostView::new(&[0.0; 6], 2, 3),
            HostViewMut::new(&mut [0.0; 6], 2, 3),
            1.0,
            0.0,
        );
    }
}
