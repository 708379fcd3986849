//! The gated activation of Llama's MLP (SwiGLU, arXiv 2002.05202), elementwise over `[tokens, width]`.
//!
//! ```text
//! h = silu(gate) * up         silu(x) = x * sigmoid(x)
//! d up   = dh * silu(gate)
//! d gate = dh * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
//! ```

use rayon::iter::{IndexedParallelIterator, ParallelIterator};

use crate::error::Result;
use crate::math::sigmoid;
use crate::parallel::rows_per_task;
use crate::simd::vectorize;
use crate::view::{View, ViewMut};

/// `h = silu(gate) * up`; all `[tokens, width]`.
///
/// # Errors
/// If the shapes differ, or the views are not on the same device.
pub fn forward(gate: View, up: View, h: ViewMut) -> Result<()> {
    const OP: &str = "swiglu";
    let [rows, cols] = gate.shape();
    up.expect(OP, "up", rows, cols)?;
    h.expect(OP, "h", rows, cols)?;
    #[cfg(feature = "cuda")]
    if h.gpu().is_some() {
        return crate::cuda::ops::swiglu_forward(OP, gate.cuda(OP)?, up.cuda(OP)?, h.cuda(OP)?);
    }
    let (gate, up, h) = (gate.host(OP)?, up.host(OP)?, h.host(OP)?);
    h.par_rows_mut().enumerate().with_min_len(rows_per_task(cols)).for_each(|(i, h)| {
        let (gate, up) = (gate.row(i), up.row(i));
        vectorize(
            #[inline(always)]
            move || {
                for ((h, gate), up) in h.iter_mut().zip(gate).zip(up) {
                    *h = gate * sigmoid(*gate) * up;
                }
            },
        );
    });
    Ok(())
}

/// The gradients, in place: `gate` becomes `d gate` and `up` becomes `d up`. `h`, if given, becomes the forward's result
/// again (a recomputing caller needs it for the gradient of the projection that follows). All `[tokens, width]`.
///
/// # Errors
/// If the shapes differ, or the views are not on the same device; nothing is written then.
pub fn backward(gate: ViewMut, up: ViewMut, dh: View, h: Option<ViewMut>) -> Result<()> {
    const OP: &str = "swiglu_backward";
    let [rows, cols] = gate.shape();
    up.expect(OP, "up", rows, cols)?;
    dh.expect(OP, "dh", rows, cols)?;
    if let Some(h) = &h {
        h.expect(OP, "h", rows, cols)?;
    }
    #[cfg(feature = "cuda")]
    if gate.gpu().is_some() {
        return crate::cuda::ops::swiglu_backward(OP, gate.cuda(OP)?, up.cuda(OP)?, dh.cuda(OP)?, h);
    }
    let (gate, up, dh) = (gate.host(OP)?, up.host(OP)?, dh.host(OP)?);
    let h = h.map(|h| h.host(OP)).transpose()?;
    let pairs = gate.par_rows_mut().zip(up.par_rows_mut()).enumerate().with_min_len(rows_per_task(cols));
    match h {
        None => pairs.for_each(|(i, (gate, up))| {
            let dh = dh.row(i);
            vectorize(
                #[inline(always)]
                move || {
                    for ((gate, up), dh) in gate.iter_mut().zip(up.iter_mut()).zip(dh) {
                        differentiate(gate, up, *dh);
                    }
                },
            );
        }),
        Some(h) => pairs.zip(h.par_rows_mut()).for_each(|((i, (gate, up)), h)| {
            let dh = dh.row(i);
            vectorize(
                #[inline(always)]
                move || {
                    for (((gate, up), dh), h) in gate.iter_mut().zip(up.iter_mut()).zip(dh).zip(h.iter_mut()) {
                        *h = differentiate(gate, up, *dh);
                    }
                },
            );
        }),
    }
    Ok(())
}

/// Replaces `gate` and `up` by their gradients and returns `silu(gate) * up`.
#[inline(always)]
fn differentiate(gate: &mut f32, up: &mut f32, dh: f32) -> f32 {
    let (g, u) = (*gate, *up);
    let s = sigmoid(g);
    let silu = g * s;
    *gate = dh * u * (s * (1.0 + g * (1.0 - s)));
    *up = dh * silu;
    silu * u
}

/// [`backward`] where `dh` becomes `h` again: no memory but that of the arguments. All `[tokens, width]`.
///
/// # Errors
/// If the shapes differ, or the views are not on the same device; nothing is written then.
pub fn backward_in_place(gate: ViewMut, up: ViewMut, dh: ViewMut) -> Result<()> {
    const OP: &str = "swiglu_backward";
    let [rows, cols] = gate.shape();
    up.expect(OP, "up", rows, cols)?;
    dh.expect(OP, "dh", rows, cols)?;
    #[cfg(feature = "cuda")]
    if gate.gpu().is_some() {
        return crate::cuda::ops::swiglu_backward_in_place(OP, gate.cuda(OP)?, up.cuda(OP)?, dh.cuda(OP)?);
    }
    let (gate, up, dh) = (gate.host(OP)?, up.host(OP)?, dh.host(OP)?);
    let rows = gate.par_rows_mut().zip(up.par_rows_mut()).zip(dh.par_rows_mut());
    rows.with_min_len(rows_per_task(cols)).for_each(|((gate, up), dh)| {
        vectorize(
            #[inline(always)]
            move || {
                for ((gate, up), dh) in gate.iter_mut().zip(up.iter_mut()).zip(dh.iter_mut()) {
                    *dh = differentiate(gate, up, *dh);
                }
            },
        );
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SHAPES, Window, assert_close, numeric_gradient, random, to_f64};

    fn reference(gate: &[f64], up: &[f64]) -> Vec<f64> {
        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect()
    }

    #[test]
    fn forward_and_backward_match_f64() {
        for (seed, &(rows, cols)) in SHAPES.iter().enumerate() {
            for gap in [0, 3] {
                let mut random = random(seed as u64);
                // Wide enough for the flat ends of the sigmoid.
                let gate: Vec<f32> = random(rows * cols).iter().map(|x| 4.0 * x).collect();
                let (up, dh) = (random(rows * cols), random(rows * cols));
                let (gate64, up64, dh64) = (to_f64(&gate), to_f64(&up), to_f64(&dh));
                let (mut gate, mut up) = (Window::of(&gate, rows, cols, gap), Window::of(&up, rows, cols, gap));
                let dh = Window::of(&dh, rows, cols, gap);
                let mut h = Window::poisoned(rows, cols, gap);
                forward(gate.view(), up.view(), h.view_mut()).unwrap();
                assert_close("h", &h.to_vec(), &reference(&gate64, &up64), 1e-6);

                let mut h_again = Window::poisoned(rows, cols, gap);
                let (mut gate_only, mut up_only) = (gate.clone(), up.clone());
                backward(gate.view_mut(), up.view_mut(), dh.view(), Some(h_again.view_mut())).unwrap();
                assert_eq!(h_again.to_vec(), h.to_vec());
                let want = numeric_gradient(&gate64, &dh64, |gate| reference(gate, &up64));
                assert_close("d gate", &gate.to_vec(), &want, 2e-6);
                let want = numeric_gradient(&up64, &dh64, |up| reference(&gate64, up));
                assert_close("d up", &up.to_vec(), &want, 2e-6);

                backward(gate_only.view_mut(), up_only.view_mut(), dh.view(), None).unwrap();
                assert_eq!((gate_only.to_vec(), up_only.to_vec()), (gate.to_vec(), up.to_vec()));
            }
        }
    }

    #[test]
    fn extreme_gates_give_the_limits() {
        let (gate, up) = ([-1e30, -100.0, 100.0, 1e30], [2.0; 4]);
        let mut h = [f32::NAN; 4];
        forward(View::vector(&gate), View::vector(&up), ViewMut::vector(&mut h)).unwrap();
        assert_eq!(h, [0.0, 0.0, 200.0, 2e30]);
        let (mut dgate, mut dup) = (gate, up);
        backward(ViewMut::vector(&mut dgate), ViewMut::vector(&mut dup), View::vector(&[1.0; 4]), None).unwrap();
        assert_eq!((dgate, dup), ([0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 100.0, 1e30]));
    }

    #[test]
    fn shapes_that_do_not_fit_are_named() {
        let (gate, up, mut h) = ([0.0; 6], [0.0; 6], [0.0; 6]);
        let error = forward(View::new(&gate, 2, 3), View::new(&up, 3, 2), ViewMut::new(&mut h, 2, 3)).unwrap_err();
        assert_eq!(error.to_string(), "swiglu: up has shape [3, 2], expected [2, 3]");
    }
}
