//! The elementwise and rowwise operations. Shapes are checked by the functions in [`crate::ops`] that call these.

use super::ffi;
use super::view::{CudaView, CudaViewMut};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ops::rope::RopeTable;
use crate::sequence::Positions;
use crate::view::{View, ViewMut};

/// An error unless all types are the same: kernels are compiled for one type of activations at a time.
pub(super) fn same_dtype(op: &'static str, dtypes: &[Dtype]) -> Result<i32> {
    match dtypes.iter().find(|&&dtype| dtype != dtypes[0]) {
        None => Ok(dtypes[0].code()),
        Some(other) => {
            Err(Error::invalid(op, format!("element types differ: {} and {}", dtypes[0].name(), other.name())))
        }
    }
}

/// The address of an f32 vector of `len` elements without gaps.
pub(super) fn vector(op: &'static str, what: &'static str, view: CudaView, len: usize) -> Result<*const f32> {
    let gapless = view.rows() <= 1 || view.stride() == view.cols();
    if view.dtype() != Dtype::F32 || !gapless {
        return Err(Error::invalid(op, format!("{what} must be float32 without gaps")));
    }
    Error::check_shape(op, what, &[view.rows() * view.cols()], &[len])?;
    Ok(view.ptr() as *const f32)
}

pub(super) fn vector_mut(op: &'static str, what: &'static str, view: CudaViewMut, len: usize) -> Result<*mut f32> {
    Ok(vector(op, what, view.as_view(), len)?.cast_mut())
}

pub(crate) fn rms_norm_forward(
    op: &'static str,
    x: CudaView,
    delta: Option<CudaView>,
    weight: View,
    eps: f32,
    y: ViewMut,
    rstd: ViewMut,
) -> Result<()> {
    let y = y.cuda(op)?;
    let (rows, cols) = (x.rows(), x.cols());
    let width = weight.rows() * weight.cols();
    let groups = cols / width.max(1);
    let dtype = same_dtype(op, &[x.dtype(), y.dtype(), delta.map_or(x.dtype(), |delta| delta.dtype())])?;
    let weight = vector(op, "weight", weight.cuda(op)?, width)?;
    let rstd = vector_mut(op, "rstd", rstd.cuda(op)?, rows * groups)?;
    let (delta_ptr, ld_delta) = delta.map_or((0, 0), |delta| (delta.ptr(), delta.ld()));
    // SAFETY: all windows are live and have the sizes passed; x is written only with a delta, which
    // `rms_norm_residual` gives together with exclusive access to x.
    y.gpu().launch(op, |stream| unsafe {
        ffi::qlora_rms_norm_forward(
            dtype,
            x.ptr() as *mut _,
            x.ld(),
            delta_ptr as *const _,
            ld_delta,
            weight,
            eps,
            y.ptr() as *mut _,
            y.ld(),
            rstd,
            rows as i64,
            width as i64,
            groups as i64,
            y.gpu().early(),
            stream,
        )
    })
}

pub(crate) fn rms_norm_residual(
    op: &'static str,
    x: CudaViewMut,
    delta: CudaView,
    weight: View,
    eps: f32,
    y: ViewMut,
    rstd: ViewMut,
) -> Result<()> {
    rms_norm_forward(op, x.as_view(), Some(delta), weight, eps, y, rstd)
}

pub(crate) fn rms_norm_backward(
    op: &'static str,
    x: View,
    weight: View,
    rstd: View,
    dy: View,
    dx: ViewMut,
    accumulate: bool,
) -> Result<()> {
    let (x, dy, dx) = (x.cuda(op)?, dy.cuda(op)?, dx.cuda(op)?);
    let (rows, cols) = (x.rows(), x.cols());
    let width = weight.rows() * weight.cols();
    let groups = cols / width.max(1);
    let dtype = same_dtype(op, &[x.dtype(), dy.dtype(), dx.dtype()])?;
    let weight = vector(op, "weight", weight.cuda(op)?, width)?;
    let rstd = vector(op, "rstd", rstd.cuda(op)?, rows * groups)?;
    // SAFETY: all windows are live and have the sizes passed.
    dx.gpu().launch(op, |stream| unsafe {
        ffi::qlora_rms_norm_backward(
            dtype,
            x.ptr() as *const _,
            x.ld(),
            weight,
            rstd,
            dy.ptr() as *const _,
            dy.ld(),
            dx.ptr() as *mut _,
            dx.ld(),
            i32::from(accumulate),
            rows as i64,
            width as i64,
            groups as i64,
            stream,
        )
    })
}

pub(crate) fn rope(
    op: &'static str,
    x: CudaViewMut,
    head_dim: usize,
    table: &RopeTable,
    positions: &Positions,
    transposed: bool,
) -> Result<()> {
    let gpu = x.gpu();
    let [cos, sin] = table.on_device(gpu)?;
    let positions = positions.on_device(gpu)?;
    // SAFETY: the window is live; the caller checked that all positions are in the table.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_rope(
            x.dtype().code(),
            x.ptr() as *mut _,
            x.ld(),
            cos.as_ptr(),
            sin.as_ptr(),
            positions.as_ptr(),
            x.rows() as i64,
            (x.cols() / head_dim.max(1)) as i64,
            head_dim as i64,
            i32::from(transposed),
            stream,
        )
    })
}

pub(crate) fn swiglu_forward(op: &'static str, gate: CudaView, up: CudaView, h: CudaViewMut) -> Result<()> {
    let dtype = same_dtype(op, &[gate.dtype(), up.dtype(), h.dtype()])?;
    // SAFETY: all windows are live and of the same shape.
    h.gpu().launch(op, |stream| unsafe {
        ffi::qlora_swiglu_forward(
            dtype,
            gate.ptr() as *const _,
            gate.ld(),
            up.ptr() as *const _,
            up.ld(),
            h.ptr() as *mut _,
            h.ld(),
            h.rows() as i64,
            h.cols() as i64,
            stream,
        )
    })
}

pub(crate) fn swiglu_backward(
    op: &'static str,
    gate: CudaViewMut,
    up: CudaViewMut,
    dh: CudaView,
    h: Option<ViewMut>,
) -> Result<()> {
    let h = h.map(|h| h.cuda(op)).transpose()?;
    let dtype = same_dtype(op, &[gate.dtype(), up.dtype(), dh.dtype(), h.as_ref().map_or(dh.dtype(), |h| h.dtype())])?;
    let (h_ptr, ldh) = h.as_ref().map_or((0, 0), |h| (h.ptr(), h.ld()));
    launch_swiglu_backward(op, dtype, gate, up, dh, h_ptr, ldh)
}

/// [`swiglu_backward`] where `h` takes the place of `dh`.
pub(crate) fn swiglu_backward_in_place(
    op: &'static str,
    gate: CudaViewMut,
    up: CudaViewMut,
    dh: CudaViewMut,
) -> Result<()> {
    let dtype = same_dtype(op, &[gate.dtype(), up.dtype(), dh.dtype()])?;
    launch_swiglu_backward(op, dtype, gate, up, dh.as_view(), dh.ptr(), dh.ld())
}

fn launch_swiglu_backward(
    op: &'static str,
    dtype: i32,
    gate: CudaViewMut,
    up: CudaViewMut,
    dh: CudaView,
    h: u64,
    ldh: i64,
) -> Result<()> {
    // SAFETY: all windows are live and of the same shape; the kernel reads an element of dh before it writes that of h.
    gate.gpu().launch(op, |stream| unsafe {
        ffi::qlora_swiglu_backward(
            dtype,
            gate.ptr() as *mut _,
            gate.ld(),
            up.ptr() as *mut _,
            up.ld(),
            dh.ptr() as *const _,
            dh.ld(),
            h as *mut _,
            ldh,
            gate.rows() as i64,
            gate.cols() as i64,
            stream,
        )
    })
}

pub(crate) fn dropout(
    op: &'static str,
    add: bool,
    x: CudaView,
    y: CudaViewMut,
    first_row: usize,
    key: u64,
    threshold: u32,
    scale: f32,
) -> Result<()> {
    let dtype = same_dtype(op, &[x.dtype(), y.dtype()])?;
    // SAFETY: both windows are live and of the same shape.
    y.gpu().launch(op, |stream| unsafe {
        ffi::qlora_dropout(
            dtype,
            i32::from(add),
            x.ptr() as *const _,
            x.ld(),
            y.ptr() as *mut _,
            y.ld(),
            y.rows() as i64,
            y.cols() as i64,
            first_row as i64,
            key,
            threshold,
            scale,
            stream,
        )
    })
}

/// Copies between element types; shapes were checked.
pub(crate) fn cast(from: CudaView, to: CudaViewMut) -> Result<()> {
    const OP: &str = "cast";
    // SAFETY: both windows are live and of the same shape.
    to.gpu().launch(OP, |stream| unsafe {
        ffi::qlora_cast(
            from.dtype().code(),
            from.ptr() as *const _,
            from.ld(),
            to.dtype().code(),
            to.ptr() as *mut _,
            to.ld(),
            to.rows() as i64,
            to.cols() as i64,
            stream,
        )
    })
}

pub(crate) fn fill(y: CudaViewMut, value: f32) -> Result<()> {
    // SAFETY: the window is live.
    y.gpu().launch("fill", |stream| unsafe {
        ffi::qlora_fill(y.dtype().code(), y.ptr() as *mut _, y.ld(), y.rows() as i64, y.cols() as i64, value, stream)
    })
}

/// `y *= factor`.
pub(crate) fn scale(op: &'static str, y: CudaViewMut, factor: f32) -> Result<()> {
    // SAFETY: the window is live.
    y.gpu().launch(op, |stream| unsafe {
        ffi::qlora_scale(y.dtype().code(), y.ptr() as *mut _, y.ld(), y.rows() as i64, y.cols() as i64, factor, stream)
    })
}

/// `y += x`.
pub(crate) fn add(op: &'static str, x: CudaView, y: CudaViewMut) -> Result<()> {
    let dtype = same_dtype(op, &[x.dtype(), y.dtype()])?;
    // SAFETY: both windows are live and of the same shape.
    y.gpu().launch(op, |stream| unsafe {
        ffi::qlora_add(
            dtype,
            x.ptr() as *const _,
            x.ld(),
            y.ptr() as *mut _,
            y.ld(),
            y.rows() as i64,
            y.cols() as i64,
            stream,
        )
    })
}

/// Adds an f32 bias to every row.
pub(crate) fn add_bias(op: &'static str, y: CudaViewMut, bias: CudaView) -> Result<()> {
    let bias = vector(op, "bias", bias, y.cols())?;
    // SAFETY: the window is live; the bias has an element a column.
    y.gpu().launch(op, |stream| unsafe {
        ffi::qlora_add_bias(y.dtype().code(), y.ptr() as *mut _, y.ld(), bias, y.rows() as i64, y.cols() as i64, stream)
    })
}
