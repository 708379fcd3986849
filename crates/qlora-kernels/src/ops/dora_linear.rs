//! A linear layer with a DoRA adapter (arXiv 2402.09353): LoRA's direction, and a trained magnitude for every output.
//!
//! With `x [tokens, in]`, the frozen `W [out, in]`, `A [r, in]`, `B [out, r]`, the magnitudes `m [out]`, the factor `s` and the
//! norm of a row `n_i = ||(W + s B A)_i||`, which is a constant in the backward (section 4.3 of the paper):
//!
//! ```text
//! g = m / n      S = x A^T      h = x W^T + s S B^T      y = residual + g h + bias
//! dS = s (g dy) B     dx = (g dy) W + dS A     dA += dS^T x     dB += s (g dy)^T S     dm += sum over tokens of (dy h) / n
//! ```
//!
//! Dropout is PEFT's: the adapter sees `d = drop(x)`, and the base's product is made of both,
//! `y = residual + x W^T + (g - 1) d W^T + g s S B^T + bias` with `S = d A^T`, so that `h = d W^T + s S B^T` in `dm`.
//!
//! The backward makes `h` again instead of keeping it: one more product with `W`, and no `[tokens, out]` between forward and
//! backward. The norms change with A and B alone and are given to a pass ([`inverse_norms`]).
//!
//! On a GPU the products are those of every other layer; what is done to rows and columns runs through candle's kernels, a few
//! rows at a time in f32.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::dropout::{self, Dropout};
use super::linear_group::by_member::{AdaptedLinear, Layer};
use super::linear_group::{DoraPlaces, add_bias};
use super::matmul::nn_serial;
use super::residual::add;
use super::{frozen_linear, lora_linear};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::parallel::{TASK, rows_per_task};
use crate::view::{HostViewMut, View, ViewMut};
use crate::weight::FrozenWeight;

const OP: &str = "dora_linear";

/// `||(W + scale B A)_i||^2` of every row, in f64. `weight` is in host memory; `a`: `[r, in]`, `b`: `[out, r]`.
///
/// # Errors
/// If the shapes do not fit each other, or a view is not on the CPU.
pub fn row_squares(weight: &dyn FrozenWeight, a: View, b: View, scale: f32) -> Result<Vec<f64>> {
    check(weight, a, b)?;
    weight.arrive()?;
    let (rows, cols) = (weight.rows(), weight.cols());
    let (a, b) = (a.host(OP)?, b.host(OP)?);
    let mut squares = vec![0.0; rows];
    let step = (4 * TASK / cols.max(1)).max(1);
    squares.par_chunks_mut(step).enumerate().for_each(|(task, squares)| {
        let range = task * step..task * step + squares.len();
        let mut sum = vec![0.0; range.len() * cols];
        weight.dequantize_rows(range.clone(), &mut sum);
        nn_serial(b.slice_rows(range), a, HostViewMut::new(&mut sum, squares.len(), cols), scale, 1.0);
        for (square, row) in squares.iter_mut().zip(sum.chunks_exact(cols.max(1))) {
            *square = row.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        }
    });
    Ok(squares)
}

/// Writes `1 / ||(W + scale B A)_i||` of every row: `out` is one f32 row where the weight is, `a` and `b` are f32 there too. A
/// row of zeros gives infinity.
///
/// # Errors
/// If the shapes do not fit each other, or the views are not on the same device.
pub fn inverse_norms(weight: &dyn FrozenWeight, a: View, b: View, scale: f32, mut out: ViewMut) -> Result<()> {
    check(weight, a, b)?;
    out.expect(OP, "the inverse norms", 1, weight.rows())?;
    weight.arrive()?;
    #[cfg(feature = "cuda")]
    if let (Some(weight), Some(gpu)) = (weight.as_cuda(), out.gpu()) {
        return on_gpu::inverse_norms(weight, a, b, scale, out, gpu);
    }
    let squares = row_squares(weight, a, b, scale)?;
    let inverse: Vec<f32> = squares.iter().map(|square| (1.0 / square.sqrt()) as f32).collect();
    out.reborrow().copy_from(View::new(&inverse, 1, inverse.len()))
}

fn check(weight: &dyn FrozenWeight, a: View, b: View) -> Result<()> {
    a.expect(OP, "a", a.rows(), weight.cols())?;
    b.expect(OP, "b", weight.rows(), a.rows())
}

/// The adapter of one layer in one pass.
pub(super) struct Dora<'a> {
    layer: Layer<'a>,
    places: &'a DoraPlaces,
    /// `m [out]`, one row.
    magnitude: View<'a>,
    /// `1 / n [out]`, one row.
    inverse: View<'a>,
}

impl<'a> Dora<'a> {
    pub(super) fn new(layer: Layer<'a>, places: &'a DoraPlaces) -> Result<Self> {
        let Some(norms) = layer.pass.inverse_norms else {
            return Err(Error::invalid(OP, "a pass without the norms of the weights with their adapters"));
        };
        let outputs = layer.member.weight.rows();
        for (range, len) in [(&places.magnitude, layer.pass.values.cols()), (&places.norms, norms.cols())] {
            if range.len() != outputs || range.end > len {
                return Err(Error::invalid(OP, format!("elements {range:?} of {len} for {outputs} outputs")));
            }
        }
        let magnitude = layer.pass.values.slice_cols(places.magnitude.clone());
        Ok(Self { layer, places, magnitude, inverse: norms.slice_cols(places.norms.clone()) })
    }

    fn dropout(&self) -> Option<Dropout> {
        self.layer.pass.dropout_of(self.layer.slot)
    }

    /// `g = m / n`, one f32 row.
    fn gain(&self, workspace: &Workspace) -> Result<Matrix> {
        let mut gain = workspace.matrix_f32(1, self.inverse.cols())?;
        gain.view_mut().copy_from(self.inverse)?;
        scale_columns(gain.view_mut(), self.magnitude)?;
        Ok(gain)
    }

    /// `g - 1`.
    fn gain_less_one(&self, gain: &Matrix, workspace: &Workspace) -> Result<Matrix> {
        let mut less = workspace.upload(&vec![-1.0; gain.cols()], 1, gain.cols())?;
        add(gain.view(), less.view_mut())?;
        Ok(less)
    }

    /// A, in the activations' type.
    fn a(&self, workspace: &Workspace) -> Result<Matrix> {
        copy(self.layer.factors().0, workspace)
    }

    /// B with its rows times `g`, in the activations' type.
    fn scaled_b(&self, gain: &Matrix, workspace: &Workspace) -> Result<Matrix> {
        let b = self.layer.factors().1;
        let mut scaled = workspace.matrix_f32(b.rows(), b.cols())?;
        scaled.view_mut().copy_from(b)?;
        scale_rows(scaled.view_mut(), gain.view())?;
        if scaled.dtype() == workspace.dtype() {
            return Ok(scaled);
        }
        copy(scaled.view(), workspace)
    }
}

fn copy(view: View, workspace: &Workspace) -> Result<Matrix> {
    let mut copy = workspace.matrix(view.rows(), view.cols())?;
    copy.view_mut().copy_from(view)?;
    Ok(copy)
}

/// `drop(x)`.
fn dropped(mask: &Dropout, x: View, workspace: &Workspace) -> Result<Matrix> {
    let mut dropped = workspace.matrix(x.rows(), x.cols())?;
    dropout::forward(mask, x, dropped.view_mut())?;
    Ok(dropped)
}

impl AdaptedLinear for Dora<'_> {
    fn forward(&self, x: View, residual: Option<View>, mut y: ViewMut, workspace: &Workspace) -> Result<Matrix> {
        let Layer { member, slot, .. } = self.layer;
        let gain = self.gain(workspace)?;
        let mask = self.dropout();
        match &mask {
            None => {
                frozen_linear::forward(x, member.weight, y.reborrow(), 0.0, workspace)?;
                scale_columns(y.reborrow(), gain.view())?;
            }
            Some(mask) => {
                let d = dropped(mask, x, workspace)?;
                frozen_linear::forward(d.view(), member.weight, y.reborrow(), 0.0, workspace)?;
                scale_columns(y.reborrow(), self.gain_less_one(&gain, workspace)?.view())?;
                frozen_linear::forward(x, member.weight, y.reborrow(), 1.0, workspace)?;
            }
        }
        let (a, b) = (self.a(workspace)?, self.scaled_b(&gain, workspace)?);
        let mut s = workspace.matrix(x.rows(), slot.rank)?;
        lora_linear::forward(x, a.view(), b.view(), slot.scale, mask, s.view_mut(), y.reborrow(), workspace)?;
        if let Some(bias) = member.bias {
            add_bias(y.reborrow(), bias)?;
        }
        if let Some(residual) = residual {
            add(residual, y)?;
        }
        Ok(s)
    }

    fn shrink(&self, x: View, workspace: &Workspace) -> Result<Matrix> {
        let mut s = workspace.matrix(x.rows(), self.layer.slot.rank)?;
        lora_linear::shrink(x, self.a(workspace)?.view(), self.dropout(), s.view_mut(), workspace)?;
        Ok(s)
    }

    fn backward_input(&self, dy: View, mut dx: Option<ViewMut>, add: bool, workspace: &Workspace) -> Result<Matrix> {
        let Layer { member, slot, .. } = self.layer;
        let (gain, mask) = (self.gain(workspace)?, self.dropout());
        if let Some(dx) = &mut dx {
            let beta = if add { 1.0 } else { 0.0 };
            let mut scaled = copy(dy, workspace)?;
            match &mask {
                None => {
                    scale_columns(scaled.view_mut(), gain.view())?;
                    frozen_linear::backward(scaled.view(), member.weight, dx.reborrow(), beta, workspace)?;
                }
                Some(mask) => {
                    frozen_linear::backward(dy, member.weight, dx.reborrow(), beta, workspace)?;
                    scale_columns(scaled.view_mut(), self.gain_less_one(&gain, workspace)?.view())?;
                    let mut dd = workspace.matrix(dy.rows(), member.weight.cols())?;
                    frozen_linear::backward(scaled.view(), member.weight, dd.view_mut(), 0.0, workspace)?;
                    dropout::backward(mask, dd.view(), dx.reborrow())?;
                }
            }
        }
        let (a, b) = (self.a(workspace)?, self.scaled_b(&gain, workspace)?);
        let mut ds = workspace.matrix(dy.rows(), slot.rank)?;
        lora_linear::backward_input(dy, a.view(), b.view(), slot.scale, mask, ds.view_mut(), dx, workspace)?;
        Ok(ds)
    }

    fn backward_adapter(
        &self,
        x: View,
        s: View,
        dy: View,
        ds: View,
        mut gradient: ViewMut,
        workspace: &Workspace,
    ) -> Result<()> {
        let Layer { member, slot, .. } = self.layer;
        let mask = self.dropout();
        // s dy^T S is both dB without its rows' factors and, with B, the adapter's part of dm.
        let mut product = workspace.zeros_f32(dy.cols(), slot.rank)?;
        let (da, mut db) = slot.factors_mut(gradient.reborrow(), x.cols(), dy.cols());
        lora_linear::backward_adapter(x, slot.scale, mask, s, dy, ds, da, product.view_mut(), workspace)?;
        let mut base = workspace.matrix(dy.rows(), dy.cols())?;
        match &mask {
            None => frozen_linear::forward(x, member.weight, base.view_mut(), 0.0, workspace)?,
            Some(mask) => {
                let d = dropped(mask, x, workspace)?;
                frozen_linear::forward(d.view(), member.weight, base.view_mut(), 0.0, workspace)?;
            }
        }
        let mut scaled = workspace.matrix_f32(dy.cols(), slot.rank)?;
        scaled.view_mut().copy_from(product.view())?;
        scale_rows(scaled.view_mut(), self.gain(workspace)?.view())?;
        add(scaled.view(), db.reborrow())?;
        let dm = gradient.slice_cols(self.places.magnitude.clone());
        let adapter = (self.layer.factors().1, product.view());
        magnitude_gradient((dy, base.view()), adapter, self.inverse, dm)
    }
}

/// The elements of a vector, which lies in one row.
fn vector<'a>(view: View<'a>, len: usize) -> Result<&'a [f32]> {
    Error::check_shape(OP, "a vector", &[view.rows() * view.cols()], &[len])?;
    view.host(OP)?.as_slice().ok_or_else(|| Error::invalid(OP, "a vector has gaps between its elements"))
}

/// `y[:, j] *= factors[j]`.
fn scale_columns(y: ViewMut, factors: View) -> Result<()> {
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return on_gpu::scale(y, factors, (1, factors.cols()));
    }
    let (cols, factors) = (y.cols(), vector(factors, y.cols())?);
    let rows = y.host(OP)?.par_rows_mut().with_min_len(rows_per_task(cols));
    rows.for_each(|row| row.iter_mut().zip(factors).for_each(|(y, factor)| *y *= factor));
    Ok(())
}

/// `y[i, :] *= factors[i]`.
fn scale_rows(y: ViewMut, factors: View) -> Result<()> {
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return on_gpu::scale(y, factors, (factors.cols(), 1));
    }
    let factors = vector(factors, y.rows())?;
    for (row, factor) in y.host(OP)?.rows_mut().zip(factors) {
        row.iter_mut().for_each(|y| *y *= factor);
    }
    Ok(())
}

/// `dm[i] += inverse[i] * (sum over t of dy[t, i] base[t, i] + sum over k of b[i, k] db[i, k])`, the sums in f64 (f32 on a GPU).
fn magnitude_gradient((dy, base): (View, View), (b, db): (View, View), inverse: View, mut dm: ViewMut) -> Result<()> {
    #[cfg(feature = "cuda")]
    if dm.gpu().is_some() {
        return on_gpu::magnitude_gradient((dy, base), (b, db), inverse, dm);
    }
    const COLUMNS: usize = 256;
    let (dy, base, b, db) = (dy.host(OP)?, base.host(OP)?, b.host(OP)?, db.host(OP)?);
    let inverse = vector(inverse, dm.cols())?;
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    let mut sums: Vec<f64> = (0..b.rows()).map(|i| dot(b.row(i), db.row(i))).collect();
    sums.par_chunks_mut(COLUMNS).enumerate().for_each(|(task, sums)| {
        let columns = task * COLUMNS..task * COLUMNS + sums.len();
        for t in 0..dy.rows() {
            let (dy, base) = (&dy.row(t)[columns.clone()], &base.row(t)[columns.clone()]);
            for ((sum, &dy), &base) in sums.iter_mut().zip(dy).zip(base) {
                *sum += f64::from(dy) * f64::from(base);
            }
        }
    });
    let mut dm = dm.reborrow().host(OP)?;
    for ((dm, sum), inverse) in dm.row_mut(0).iter_mut().zip(&sums).zip(inverse) {
        *dm += (sum * f64::from(*inverse)) as f32;
    }
    Ok(())
}

/// The same on a GPU, by candle's kernels in f32.
#[cfg(feature = "cuda")]
mod on_gpu {
    use candle_core::Tensor;

    use super::OP;
    use crate::cuda::{CudaWeight, Gpu};
    use crate::dtype::Dtype;
    use crate::error::{Error, Result};
    use crate::matrix::Workspace;
    use crate::ops::{matmul, rms_norm, scale};
    use crate::tensor::TensorView;
    use crate::view::{View, ViewMut};
    use crate::weight::FrozenWeight;

    /// Elements that are handled at a time: 32 MiB in f32.
    const CHUNK: usize = 1 << 23;

    fn chunks(rows: usize, cols: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
        let step = (CHUNK / cols.max(1)).max(1);
        (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
    }

    /// A copy in f32.
    fn tensor(view: View) -> Result<Tensor> {
        let gpu = view.gpu().ok_or_else(|| Error::invalid(OP, "an argument is on the CPU"))?;
        let workspace = Workspace::with_dtype(&gpu.device(), Dtype::F32)?;
        let mut copy = workspace.matrix(view.rows(), view.cols())?;
        copy.view_mut().copy_from(view)?;
        copy.into_tensor((view.rows(), view.cols()))
    }

    /// `y *= factors`, which are seen in a shape that is stretched to y's.
    pub(super) fn scale(mut y: ViewMut, factors: View, shape: (usize, usize)) -> Result<()> {
        let factors = tensor(factors)?.reshape(shape)?;
        for rows in chunks(y.rows(), y.cols()) {
            let factors = if shape.0 == 1 { factors.clone() } else { factors.narrow(0, rows.start, rows.len())? };
            let product = tensor(y.as_view().slice_rows(rows.clone()))?.broadcast_mul(&factors)?;
            y.reborrow().slice_rows(rows).copy_from(TensorView::new(OP, &product)?.view())?;
        }
        Ok(())
    }

    pub(super) fn magnitude_gradient(
        (dy, base): (View, View),
        (b, db): (View, View),
        inverse: View,
        dm: ViewMut,
    ) -> Result<()> {
        let mut sum = (tensor(b)? * tensor(db)?)?.sum_keepdim(1)?.reshape((1, dm.cols()))?;
        for rows in chunks(dy.rows(), dy.cols()) {
            let product = (tensor(dy.slice_rows(rows.clone()))? * tensor(base.slice_rows(rows))?)?;
            sum = (sum + product.sum_keepdim(0)?)?;
        }
        let sum = (sum * tensor(inverse)?.reshape((1, dm.cols()))?)?;
        let sum = TensorView::new(OP, &sum)?;
        crate::cuda::ops::add(OP, sum.view().cuda(OP)?, dm.cuda(OP)?)
    }

    /// In f32: the root of a row's mean square is what a norm divides by.
    pub(super) fn inverse_norms(
        weight: &CudaWeight,
        a: View,
        b: View,
        factor: f32,
        mut out: ViewMut,
        gpu: &Gpu,
    ) -> Result<()> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let workspace = Workspace::with_dtype(&gpu.device(), Dtype::F32)?;
        let ones = workspace.upload(&vec![1.0; cols], 1, cols)?;
        for rows in chunks(rows, cols) {
            let (mut sum, mut normed) = (workspace.matrix(rows.len(), cols)?, workspace.matrix(rows.len(), cols)?);
            weight.dequantize_into(rows.start, sum.view_mut().cuda(OP)?)?;
            matmul::nn(b.slice_rows(rows.clone()), a, sum.view_mut(), factor, 1.0)?;
            let mut rstd = workspace.matrix(1, rows.len())?;
            let column = rstd.view_mut().reshape(rows.len(), 1);
            rms_norm::forward(sum.view(), ones.view(), 0.0, normed.view_mut(), column)?;
            out.reborrow().slice_cols(rows).copy_from(rstd.view())?;
        }
        scale::in_place(out, 1.0 / (cols as f32).sqrt())
    }
}

#[cfg(test)]
mod tests;
