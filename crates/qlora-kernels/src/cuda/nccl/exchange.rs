//! Every process sends every other one a matrix: sends and receives in one group, on the GPU's stream.

use std::ffi::c_int;

use super::api::{BYTES, IN_PROGRESS, SUCCESS};
use super::{KeepWaiting, Nccl, OP};
use crate::cuda::view::{CudaView, one_gpu};
use crate::error::{Error, Result};
use crate::view::{View, ViewMut};

/// Address and length in bytes of a matrix without gaps.
fn memory(view: CudaView) -> Result<(u64, usize)> {
    if view.rows() > 1 && view.stride() != view.cols() {
        return Err(Error::invalid(OP, "a matrix with gaps between its rows cannot be sent"));
    }
    Ok((view.ptr(), view.rows() * view.cols() * view.dtype().size()))
}

impl Nccl {
    /// Sends `outgoing[i]` to process `i` and receives `incoming[i]` from it; both without gaps, and as long as what the other side
    /// gives. Empty ones are left out on both sides. Returns when the exchange is enqueued: it is in order with the stream's work.
    ///
    /// # Errors
    /// If `keep_waiting` fails, a process or connection is lost, there is not one matrix a process, or one has gaps.
    pub fn all_to_all(
        &mut self,
        outgoing: &[View],
        incoming: Vec<ViewMut>,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<()> {
        if self.comm.is_null() {
            return Err(Error::invalid(OP, "the connection was given up after an earlier failure"));
        }
        let enqueued = self.enqueue_all_to_all(outgoing, incoming, keep_waiting);
        if enqueued.is_err() {
            self.abort();
        }
        enqueued
    }

    fn enqueue_all_to_all(
        &mut self,
        outgoing: &[View],
        incoming: Vec<ViewMut>,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<()> {
        if outgoing.len() != self.size || incoming.len() != self.size {
            let message = format!("{} and {} matrices for {} processes", outgoing.len(), incoming.len(), self.size);
            return Err(Error::invalid(OP, message));
        }
        let mut parts = Vec::with_capacity(self.size);
        for (from, to) in outgoing.iter().zip(incoming) {
            let (from, to) = (from.cuda(OP)?, to.cuda(OP)?);
            one_gpu(OP, &self.gpu, [from.gpu(), to.gpu()])?;
            parts.push((memory(from)?, memory(to.as_view())?));
        }
        self.gpu.bind(OP)?;
        let stream = self.gpu.stream().clone();
        let stream = stream.cu_stream().cast();
        let check = |call: &str, status: c_int| match status {
            SUCCESS | IN_PROGRESS => Ok(()),
            status => Err(self.api.describe(call, status, self.comm)),
        };
        // SAFETY: begins a group, which is ended below whatever happens in between.
        check("ncclGroupStart", unsafe { (self.api.group_start)() })?;
        let mut posted = Ok(());
        for (process, &((from, sent), (to, received))) in parts.iter().enumerate() {
            let process = c_int::try_from(process).expect("as many as ncclCommInitRankConfig took");
            if posted.is_ok() && sent > 0 {
                // SAFETY: so many live bytes; memory is freed in the order of the stream, which outlives the call.
                let status = unsafe { (self.api.send)(from as *const _, sent, BYTES, process, self.comm, stream) };
                posted = check("ncclSend", status);
            }
            if posted.is_ok() && received > 0 {
                // SAFETY: as above, and the borrow that was given ends after later work of the stream has been enqueued behind.
                let status = unsafe { (self.api.recv)(to as *mut _, received, BYTES, process, self.comm, stream) };
                posted = check("ncclRecv", status);
            }
        }
        // SAFETY: ends the group begun above.
        let status = unsafe { (self.api.group_end)() };
        posted?;
        self.finish("ncclGroupEnd", status, keep_waiting)
    }
}
