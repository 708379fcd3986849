//! The backward of a group: the input's gradient, and the adapters'.

use super::{Plan, check_gpu, fp8, put_back, split, weights};
use crate::cuda::blas::Kind;
use crate::cuda::ffi;
use crate::cuda::ops;
use crate::cuda::view::{CudaView, CudaViewMut, one_gpu};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::ops::dropout;
use crate::ops::linear_group::{AdapterPass, Group, Shrunk};
use crate::view::{View, ViewMut};

pub(crate) fn backward_input(
    op: &'static str,
    group: &Group,
    dy: ViewMut,
    s: Option<&Shrunk>,
    adapter: &AdapterPass,
    dx: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let plan = Plan::new(op, group, true);
    let Plan { n, rp, .. } = plan;
    let mut dy = dy.cuda(op)?;
    let gpu = dy.gpu();
    let dx = dx.map(|dx| dx.cuda(op)).transpose()?;
    check_gpu(op, group, gpu, [dx.as_ref().map(|dx| dx.gpu()), adapter.values.gpu()])?;
    if fp8::takes(group) && !gpu.peft_rounding() {
        return fp8::backward_input(&plan, group, dy.as_view(), s, adapter, dx, workspace);
    }
    if group.split && group.members.len() > 1 {
        return split::backward_input(&plan, group, dy, s, adapter, dx, workspace);
    }
    if rp == 0 {
        let Some(dx) = dx else { return Ok(Shrunk::default()) };
        if let (1, Some(plain)) = (group.members.len(), group.members[0].weight.as_cuda().and_then(|w| w.plain_view()))
        {
            gpu.matmul(op, Kind::Nn, dy.as_view(), plain, dx, 1.0, 0.0)?;
        } else {
            let fused = weights(&plan, group, None, workspace)?;
            let w = fused.view().cuda(op)?.slice_rows(0..n);
            gpu.matmul(op, Kind::Nn, dy.as_view(), w, dx, 1.0, 0.0)?;
            put_back(group, fused);
        }
        return Ok(Shrunk::default());
    }
    let fused = weights(&plan, group, Some(adapter), workspace)?;
    let (ds, db);
    {
        let w = fused.view().cuda(op)?;
        let b = w.slice_rows(0..n).margin(rp);
        let augmented = dy.margin_width() >= rp && !adapter.drops();
        (ds, db) = shrink_gradient(&plan, &mut dy, b, s.and_then(|s| s.part(0)), augmented, workspace)?;
        if let Some(mut dx) = dx {
            if augmented {
                let dy = dy.as_view().with_margin(rp);
                gpu.matmul(op, Kind::Nn, dy, w.slice_rows(0..n + rp), dx, 1.0, 0.0)?;
            } else {
                gpu.matmul(op, Kind::Nn, dy.as_view(), w.slice_rows(0..n), dx.reborrow(), 1.0, 0.0)?;
                let a = w.slice_rows(n..n + rp);
                add_adapters_part(&plan, ds.view().cuda(op)?, a, adapter, dx, workspace)?;
            }
        }
    }
    put_back(group, fused);
    Ok(Shrunk { parts: vec![Some(ds)], db })
}

/// Adds `drop'(dS A)` of all members to `dx`.
pub(super) fn add_adapters_part(
    plan: &Plan,
    ds: CudaView,
    a: CudaView,
    adapter: &AdapterPass,
    mut dx: CudaViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let op = plan.op;
    let gpu = dx.gpu();
    if !adapter.drops() {
        return gpu.matmul(op, Kind::Nn, ds, a, dx, 1.0, 1.0);
    }
    let mut part = workspace.matrix(dx.rows(), dx.cols())?;
    for (slot, _, r0) in &plan.adapted {
        let columns = *r0..r0 + slot.rank;
        let ds = ds.slice_cols(columns.clone());
        gpu.matmul(op, Kind::Nn, ds, a.slice_rows(columns), part.view_mut().cuda(op)?, 1.0, 0.0)?;
        let mask = adapter.dropout_of(slot).expect("the probability is positive");
        dropout::backward(&mask, part.view(), dx.reborrow().into())?;
    }
    Ok(())
}

/// `dS = dy B`, and `dy^T S` where one pass makes both. `b`: `s B`, `[n, rp]`. With a margin of `dy`, dS is in it as well.
pub(super) fn shrink_gradient(
    plan: &Plan,
    dy: &mut CudaViewMut,
    b: CudaView,
    s: Option<&Matrix>,
    augmented: bool,
    workspace: &Workspace,
) -> Result<(Matrix, Option<Matrix>)> {
    let Plan { op, rp, .. } = *plan;
    let gpu = dy.gpu();
    let mut ds = workspace.matrix(dy.rows(), rp)?;
    if !augmented {
        gpu.matmul(op, Kind::Nn, dy.as_view(), b, ds.view_mut().cuda(op)?, 1.0, 0.0)?;
        return Ok((ds, None));
    }
    let (columns, mut target) = dy.split_margin(rp);
    let db = match s {
        Some(s) => factors_in_one_pass(op, columns, b, s, target.reborrow(), workspace)?,
        None => None,
    };
    if db.is_none() {
        gpu.matmul(op, Kind::Nn, columns, b, target, 1.0, 0.0)?;
    }
    ops::cast(dy.as_view().margin(rp), ds.view_mut().cuda(op)?)?;
    Ok((ds, db))
}

/// `dS = dy B`, written, and `dB = dy^T S`, returned, from one pass over `dy`: where the kernel takes the sizes and beats
/// two matrix products (on an H100 up to 32 columns: 235 against 367 us for 8192 x 28672).
pub(super) fn factors_in_one_pass(
    op: &'static str,
    dy: CudaView,
    b: CudaView,
    s: &Matrix,
    ds: CudaViewMut,
    workspace: &Workspace,
) -> Result<Option<Matrix>> {
    const MOST_COLUMNS: usize = 32;
    let (tokens, n, rp) = (dy.rows(), dy.cols(), ds.cols());
    let s = s.view().cuda(op)?;
    let aligned = |v: CudaView| v.ptr().is_multiple_of(16) && v.stride().is_multiple_of(8);
    let fits = rp.is_multiple_of(16) && rp <= MOST_COLUMNS && n.is_multiple_of(8) && dy.dtype() != Dtype::F32;
    if !fits || !aligned(dy) || !aligned(s) || !aligned(b) || tokens == 0 {
        return Ok(None);
    }
    let gpu = ds.gpu();
    // SAFETY: a pure function of its arguments.
    let floats = unsafe { ffi::qlora_lora_ds_db_workspace(tokens as i64, n as i64, rp as i64, gpu.launch_limits()) };
    if floats <= 0 {
        return Ok(None);
    }
    let mut db = workspace.matrix_f32(n, rp)?;
    let scratch = gpu.alloc(op, 4 * floats as usize)?;
    let target = db.view_mut().cuda(op)?;
    // SAFETY: all windows are live and have the sizes passed; the scratch memory has the size asked for.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_lora_ds_db(
            dy.dtype().code(),
            dy.ptr() as *const _,
            dy.ld(),
            b.ptr() as *const _,
            b.ld(),
            s.ptr() as *const _,
            s.ld(),
            ds.ptr() as *mut _,
            ds.ld(),
            target.ptr() as *mut f32,
            scratch.ptr() as *mut f32,
            tokens as i64,
            n as i64,
            rp as i64,
            gpu.launch_limits(),
            stream,
        )
    })?;
    Ok(Some(db))
}

pub(crate) fn backward_adapter(
    op: &'static str,
    group: &Group,
    x: View,
    s: &Shrunk,
    dy: View,
    ds: &Shrunk,
    adapter: &AdapterPass,
    gradient: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    adapter_gradient(op, group, x, s.part(0), dy, (ds.part(0), ds.db.as_ref()), adapter, gradient, workspace)
}

fn adapter_gradient(
    op: &'static str,
    group: &Group,
    x: View,
    s: Option<&Matrix>,
    dy: View,
    (ds, db): (Option<&Matrix>, Option<&Matrix>),
    adapter: &AdapterPass,
    gradient: ViewMut,
    workspace: &Workspace,
) -> Result<()> {
    let plan = Plan::new(op, group, true);
    let Plan { n, k, rp, .. } = plan;
    let (x, dy, gradient) = (x.cuda(op)?, dy.cuda(op)?, gradient.cuda(op)?);
    let gpu = dy.gpu();
    one_gpu(op, gpu, [x.gpu(), gradient.gpu()])?;
    let (Some(s), Some(ds)) = (s, ds) else {
        return Err(Error::invalid(op, "a backward without its forward's S"));
    };
    let mut da = workspace.matrix_f32(rp, k)?;
    let made: Matrix;
    let db = match db {
        Some(db) => db,
        None => {
            let mut product = workspace.matrix_f32(n, rp)?;
            gpu.matmul(op, Kind::Tn, dy, s.view().cuda(op)?, product.view_mut().cuda(op)?, 1.0, 0.0)?;
            made = product;
            &made
        }
    };
    if !adapter.drops() {
        gpu.matmul(op, Kind::Tn, ds.view().cuda(op)?, x, da.view_mut().cuda(op)?, 1.0, 0.0)?;
    } else {
        let mut dropped = workspace.matrix(x.rows(), x.cols())?;
        for (slot, _, r0) in &plan.adapted {
            let mask = adapter.dropout_of(slot).expect("the probability is positive");
            dropout::forward(&mask, x.into(), dropped.view_mut())?;
            let columns = *r0..r0 + slot.rank;
            let ds = ds.view().cuda(op)?.slice_cols(columns.clone());
            let da = da.view_mut().cuda(op)?.slice_rows(columns);
            gpu.matmul(op, Kind::Tn, ds, dropped.view().cuda(op)?, da, 1.0, 0.0)?;
        }
    }
    let flat = plan.flat(gradient.as_view())?.cast_mut();
    let (da, db) = (da.view().cuda(op)?, db.view().cuda(op)?);
    debug_assert_eq!((da.dtype(), db.dtype()), (Dtype::F32, Dtype::F32));
    // SAFETY: da and db have no gaps; the slots lie in the gradient.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_lora_accumulate(
            da.ptr() as *const _,
            db.ptr() as *const _,
            plan.members,
            flat,
            n as i64,
            k as i64,
            rp as i64,
            stream,
        )
    })
}
