//! The backward of a group: the input's gradient, and the adapters'.

use super::{Plan, check_gpu, parts, put_back, weights};
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
use crate::weight::WeightCache;

pub(crate) fn backward_input(
    op: &'static str,
    group: &Group,
    dy: ViewMut,
    s: Option<&Shrunk>,
    adapter: &AdapterPass,
    dx: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    if group.split && group.members.len() > 1 {
        return backward_input_split(op, group, dy, adapter, dx, workspace);
    }
    let plan = Plan::new(op, group, true);
    let Plan { n, rp, .. } = plan;
    let mut dy = dy.cuda(op)?;
    let gpu = dy.gpu();
    let dx = dx.map(|dx| dx.cuda(op)).transpose()?;
    check_gpu(op, group, gpu, [dx.as_ref().map(|dx| dx.gpu()), adapter.values.gpu()])?;
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
    let mut ds = workspace.matrix(dy.rows(), rp)?;
    let mut db = None;
    {
        let w = fused.view().cuda(op)?;
        let b = w.slice_rows(0..n).margin(rp);
        let dropped = adapter.drops();
        let augmented = dy.margin_width() >= rp && !dropped;
        if augmented {
            let (columns, mut target) = dy.split_margin(rp);
            let s = s.and_then(|s| s.part(0));
            db = match s {
                Some(s) => factors_in_one_pass(op, columns, b, s, target.reborrow(), workspace)?,
                None => None,
            };
            if db.is_none() {
                gpu.matmul(op, Kind::Nn, columns, b, target, 1.0, 0.0)?;
            }
            ops::cast(dy.as_view().margin(rp), ds.view_mut().cuda(op)?)?;
        } else {
            gpu.matmul(op, Kind::Nn, dy.as_view(), b, ds.view_mut().cuda(op)?, 1.0, 0.0)?;
        }
        if let Some(mut dx) = dx {
            if augmented {
                let dy = dy.as_view().with_margin(rp);
                gpu.matmul(op, Kind::Nn, dy, w.slice_rows(0..n + rp), dx, 1.0, 0.0)?;
            } else {
                gpu.matmul(op, Kind::Nn, dy.as_view(), w.slice_rows(0..n), dx.reborrow(), 1.0, 0.0)?;
                let a = w.slice_rows(n..n + rp);
                if dropped {
                    let mut part = workspace.matrix(dx.rows(), dx.cols())?;
                    for (slot, _, r0) in &plan.adapted {
                        let columns = *r0..r0 + slot.rank;
                        let ds = ds.view().cuda(op)?.slice_cols(columns.clone());
                        gpu.matmul(op, Kind::Nn, ds, a.slice_rows(columns), part.view_mut().cuda(op)?, 1.0, 0.0)?;
                        let mask = adapter.dropout_of(slot).expect("the probability is positive");
                        dropout::backward(&mask, part.view(), dx.reborrow().into())?;
                    }
                } else {
                    gpu.matmul(op, Kind::Nn, ds.view().cuda(op)?, a, dx, 1.0, 1.0)?;
                }
            }
        }
    }
    put_back(group, fused);
    Ok(Shrunk { parts: vec![Some(ds)], db })
}

/// `dS = dy B`, written, and `dB = dy^T S`, returned, from one pass over `dy`: where the kernel takes the sizes and beats
/// two matrix products (on an H100 up to 32 columns: 235 against 367 us for 8192 x 28672).
fn factors_in_one_pass(
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
    // SAFETY: a pure function of its arguments.
    let floats = unsafe { ffi::qlora_lora_ds_db_workspace(tokens as i64, n as i64, rp as i64) };
    if floats <= 0 {
        return Ok(None);
    }
    let mut db = workspace.matrix_f32(n, rp)?;
    let gpu = ds.gpu();
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
            stream,
        )
    })?;
    Ok(Some(db))
}

fn backward_input_split(
    op: &'static str,
    group: &Group,
    mut dy: ViewMut,
    adapter: &AdapterPass,
    mut dx: Option<ViewMut>,
    workspace: &Workspace,
) -> Result<Shrunk> {
    let mut shrunk = Shrunk::default();
    for (index, (member, columns)) in parts(group).enumerate() {
        let dy = dy.reborrow().slice_cols(columns);
        let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
        let mut ds = match (&mut dx, index) {
            (None, _) => backward_input(op, &one, dy, None, adapter, None, workspace)?,
            (Some(dx), 0) => backward_input(op, &one, dy, None, adapter, Some(dx.reborrow()), workspace)?,
            (Some(dx), _) => {
                let mut part = workspace.matrix(dx.rows(), dx.cols())?;
                let ds = backward_input(op, &one, dy, None, adapter, Some(part.view_mut()), workspace)?;
                ops::add(op, part.view().cuda(op)?, dx.reborrow().cuda(op)?)?;
                ds
            }
        };
        shrunk.parts.push(ds.parts.pop().flatten());
    }
    Ok(shrunk)
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
    if group.split && group.members.len() > 1 {
        let mut gradient = gradient;
        for (index, (member, columns)) in parts(group).enumerate().filter(|(_, (member, _))| member.lora.is_some()) {
            let one = Group { members: std::slice::from_ref(member), cache: &WeightCache::default(), split: false };
            let (s, ds) = (s.part(index), ds.part(index));
            let dy = dy.slice_cols(columns);
            adapter_gradient(op, &one, x, s, dy, (ds, None), adapter, gradient.reborrow(), workspace)?;
        }
        return Ok(());
    }
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
