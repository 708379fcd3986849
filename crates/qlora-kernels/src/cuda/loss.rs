//! Linear + cross-entropy: logits exist for one chunk of tokens at a time, in the type of the activations; the softmax and
//! the losses are f32, their sum f64.

use super::buffer::Buffer;
use super::ffi;
use super::linear::{gather, gather_rows};
use super::view::{CudaView, CudaViewMut};
use crate::error::Result;
use crate::matrix::Workspace;
use crate::ops::linear_cross_entropy::{GradScale, Gradients, PendingLoss, rows_of_chunk_on_gpu};
use crate::ops::trained_tables::Table;
use crate::view::ViewMut;

/// The factor of a gradient of the logits.
#[derive(Clone, Copy)]
enum Scale<'a> {
    Uniform(f32),
    /// One f32 a row with a target.
    Each(&'a Buffer),
}

/// `trained`: the rows with a target, and their targets. `each` takes the loss of every row.
pub(crate) fn run(
    op: &'static str,
    hidden: CudaView,
    head: Table,
    targets: &[i64],
    trained: &[(usize, usize)],
    gradient: Option<Gradients>,
    each: Option<&mut [f64]>,
    workspace: &Workspace,
) -> Result<PendingLoss> {
    let gpu = hidden.gpu();
    let mut losses = workspace.zeros_f32(1, trained.len().max(1))?;
    let scales = match &gradient {
        Some(Gradients { scale: GradScale::PerRow(scales), .. }) => {
            let scales: Vec<f32> = trained.iter().map(|&(row, _)| scales[row]).collect();
            Some(Buffer::upload(&gpu.arc(), op, &scales)?)
        }
        _ => None,
    };
    let (gradient, scale) = match (gradient, &scales) {
        (None, _) => (None, Scale::Uniform(0.0)),
        (Some(gradient), Some(scales)) => (Some((gradient.dhidden.cuda(op)?, gradient.adapter)), Scale::Each(scales)),
        (Some(gradient), None) => {
            let GradScale::Uniform(scale) = gradient.scale else { unreachable!("the others were uploaded above") };
            (Some((gradient.dhidden.cuda(op)?, gradient.adapter)), Scale::Uniform(scale))
        }
    };
    let wanted: Vec<i64> = trained.iter().map(|&(_, target)| target as i64).collect();
    let wanted = Buffer::upload(&gpu.arc(), op, &wanted)?;
    let all = trained.len() == targets.len();
    let rows: Vec<u32> = trained.iter().map(|&(row, _)| row as u32).collect();
    let gathered = (!all).then(|| gather_rows(op, hidden, &rows, workspace)).transpose()?;
    let inputs = match &gathered {
        Some(gathered) => gathered.view().cuda(op)?,
        None => hidden,
    };
    let width = head.weight.cols();
    match gradient {
        Some((dhidden, adapter)) if all => {
            let target = Target { dhidden, scale, adapter };
            chunks(op, inputs, head, &wanted, &mut losses, Some(target), workspace)?;
        }
        None => chunks(op, inputs, head, &wanted, &mut losses, None, workspace)?,
        Some((dhidden, adapter)) => {
            // One more row, of zeros, for the rows without a target.
            let mut compact = workspace.matrix(trained.len() + 1, width)?;
            let view = compact.view_mut().cuda(op)?;
            let last = trained.len();
            let target = Target { dhidden: view.slice_rows(0..last), scale, adapter };
            chunks(op, inputs, head, &wanted, &mut losses, Some(target), workspace)?;
            super::ops::fill(compact.view_mut().cuda(op)?.slice_rows(last..last + 1), 0.0)?;
            let mut ids = vec![last as u32; targets.len()];
            for (position, &(row, _)) in trained.iter().enumerate() {
                ids[row] = position as u32;
            }
            let ids = Buffer::upload(&gpu.arc(), op, &ids)?;
            gather(op, compact.view().cuda(op)?, &ids, dhidden)?;
        }
    }
    if let Some(each) = each {
        let losses = losses.to_vec()?;
        trained.iter().zip(losses).for_each(|(&(row, _), loss)| each[row] = f64::from(loss));
    }
    let mut sum = Buffer::new(&gpu.arc(), op, 8)?;
    let (input, out) = (losses.view().cuda(op)?, sum.as_mut_ptr());
    // SAFETY: the losses are live f32 elements; one f64 is written.
    gpu.launch(op, |stream| unsafe { ffi::qlora_sum_f32(input.ptr() as *const _, trained.len() as i64, out, stream) })?;
    Ok(PendingLoss::on_device(sum, trained.len()))
}

/// The gradients of the rows with a target.
struct Target<'a> {
    dhidden: CudaViewMut<'a>,
    scale: Scale<'a>,
    adapter: Option<ViewMut<'a>>,
}

fn chunks(
    op: &'static str,
    inputs: CudaView,
    head: Table,
    targets: &Buffer,
    losses: &mut crate::matrix::Matrix,
    mut gradient: Option<Target>,
    workspace: &Workspace,
) -> Result<()> {
    let (tokens, vocab) = (inputs.rows(), head.weight.rows());
    let gpu = inputs.gpu();
    let chunk = rows_of_chunk_on_gpu(vocab);
    let mut logits = workspace.matrix(chunk.min(tokens), vocab)?;
    for start in (0..tokens).step_by(chunk) {
        let rows = start..tokens.min(start + chunk);
        let mut logits = logits.view_mut().slice_rows(0..rows.len());
        head.logits(inputs.slice_rows(rows.clone()).into(), logits.reborrow(), workspace)?;
        let view = logits.reborrow().cuda(op)?;
        let losses = losses.view_mut().cuda(op)?.ptr() + 4 * start as u64;
        let (scale, scales) = match &gradient {
            None => (0.0, std::ptr::null()),
            Some(Target { scale: Scale::Uniform(scale), .. }) => (*scale, std::ptr::null()),
            // SAFETY: there is one for every row of the inputs.
            Some(Target { scale: Scale::Each(scales), .. }) => (0.0, unsafe { scales.as_ptr::<f32>().add(start) }),
        };
        // SAFETY: the logits are live; losses, targets and scales, if any, have an element for every row of the inputs.
        gpu.launch(op, |stream| unsafe {
            ffi::qlora_cross_entropy(
                view.dtype().code(),
                view.ptr() as *mut _,
                view.ld(),
                targets.as_ptr::<i64>().add(start),
                losses as *mut f32,
                rows.len() as i64,
                vocab as i64,
                scale,
                scales,
                i32::from(gradient.is_some()),
                gpu.launch_limits(),
                stream,
            )
        })?;
        if let Some(Target { dhidden, adapter, .. }) = &mut gradient {
            let (inputs, target) = (inputs.slice_rows(rows.clone()), dhidden.reborrow().slice_rows(rows));
            let adapter = adapter.as_mut().map(ViewMut::reborrow);
            head.logits_backward(inputs.into(), logits, target.into(), adapter, workspace)?;
        }
    }
    Ok(())
}
