//! Work that is enqueued once and then runs again and again as one CUDA graph: hundreds of short kernels without the gaps that
//! the launches of each leave between them.
//!
//! While [`Gpu::capture`] runs, this thread's launches go to a stream of their own, which records and does not run them; other
//! threads go on as before. Only launches can be recorded. Everything else (copies, products by cuBLAS, attention by cuDNN,
//! fresh memory) still goes to the GPU's own stream, where it does no harm, and makes the recording worthless: it is thrown
//! away then, and its caller runs the work as usual.
//!
//! A graph has the addresses of everything that was recorded. What they belong to must outlive it, and nothing else may use the
//! memory: a [`StepMemory`](super::StepMemory) of its own sees to both. The kernels' shared workspaces may move when they
//! grow; [`Graph::launch`] then says that the graph is out of date.

use std::cell::Cell;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use candle_core::cuda_backend::cudarc::driver::{CudaStream, sys};

use super::counters::count;
use super::ffi;
use super::gpu::{Gpu, cuda_error, status_error};
use crate::error::{Error, Result};

const OP: &str = "CUDA graph";

thread_local! {
    /// The stream that records this thread's launches, and the address of its GPU.
    static RECORDING: Cell<(sys::CUstream, usize)> = const { Cell::new((ptr::null_mut(), 0)) };
    /// Whether something was enqueued meanwhile that cannot be recorded.
    static SPOILT: Cell<bool> = const { Cell::new(false) };
}

/// Recorded launches.
#[derive(Debug)]
pub struct Graph {
    exec: ffi::GraphExec,
    gpu: Arc<Gpu>,
    /// The state of the shared workspaces when it was recorded.
    moves: u64,
}

// SAFETY: a graph may be launched and destroyed by any thread, one at a time.
unsafe impl Send for Graph {}

fn check(code: i32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(status_error(OP, code)) }
}

/// Ends the recording of this thread, whatever happens.
struct Recording {
    stream: Arc<CudaStream>,
    ended: bool,
}

impl Recording {
    /// What was recorded, if it is to be kept and can be.
    fn end(mut self, keep: bool) -> Result<Option<ffi::GraphExec>> {
        self.ended = true;
        let mut exec = ptr::null_mut();
        // SAFETY: the capture was begun on this stream by this thread.
        check(unsafe { ffi::qlora_graph_end(self.stream.cu_stream().cast(), i32::from(keep), &raw mut exec) })?;
        Ok((!exec.is_null()).then_some(exec))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDING.set((ptr::null_mut(), 0));
        if !self.ended {
            // The work panicked.
            let mut exec = ptr::null_mut();
            // SAFETY: as in `end`.
            let _ = unsafe { ffi::qlora_graph_end(self.stream.cu_stream().cast(), 0, &raw mut exec) };
        }
    }
}

/// The stream for this thread's launches on a GPU, if they are being recorded.
pub(super) fn recording(gpu: &Gpu) -> Option<sys::CUstream> {
    let (stream, recorded) = RECORDING.get();
    (!stream.is_null() && recorded == ptr::from_ref(gpu).addr()).then_some(stream)
}

/// To be called by everything that goes to the GPU's own stream.
pub(super) fn spoil() {
    if !RECORDING.get().0.is_null() {
        SPOILT.set(true);
    }
}

/// Ends the work of a recording with an error, which its caller does not see: for what must not run half.
pub(super) fn refuse(op: &'static str) -> Result<()> {
    spoil();
    match RECORDING.get().0.is_null() {
        true => Ok(()),
        false => Err(Error::invalid(op, "it cannot be recorded")),
    }
}

impl Gpu {
    #[doc(hidden)] // Only for who keeps what the module says: the compiler cannot see to it.
    /// Records what `work` launches, without running it, and gives its result too; none if something in it cannot be recorded.
    ///
    /// # Errors
    /// Whatever `work` returns, or if the device fails.
    pub fn capture<T, E: From<Error>>(
        self: &Arc<Self>,
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<Option<(Graph, T)>, E> {
        self.bind(OP)?;
        let moves = self.workspaces().moves.load(Ordering::Relaxed);
        let stream = self.stream().context().new_stream().map_err(|error| cuda_error(OP, error))?;
        // SAFETY: the stream is new and this thread's alone.
        check(unsafe { ffi::qlora_graph_begin(stream.cu_stream().cast()) })?;
        RECORDING.set((stream.cu_stream(), ptr::from_ref(&**self).addr()));
        SPOILT.set(false);
        let recording = Recording { stream, ended: false };
        let value = work();
        let spoilt = SPOILT.get() || self.workspaces().moves.load(Ordering::Relaxed) != moves;
        let exec = recording.end(!spoilt && value.is_ok())?;
        if spoilt {
            // Also where the work failed: its caller runs it as usual.
            return Ok(None);
        }
        let value = value?;
        if exec.is_some() {
            count(&self.counting().graphs);
        }
        Ok(exec.map(|exec| (Graph { exec, gpu: self.clone(), moves }, value)))
    }
}

impl Graph {
    /// Enqueues everything; false if it is out of date and has to be recorded again.
    ///
    /// # Errors
    /// If the device fails.
    pub fn launch(&self) -> Result<bool> {
        // Nobody moves a workspace between this look and the launch: see `Workspaces`.
        let workspaces = self.gpu.workspaces();
        let _still = workspaces.still();
        if workspaces.moves.load(Ordering::Relaxed) != self.moves {
            return Ok(false);
        }
        self.gpu.bind(OP)?;
        // SAFETY: the graph is executable; its addresses are live (see the module).
        let launch = || check(unsafe { ffi::qlora_graph_launch(self.exec, self.gpu.stream().cu_stream().cast()) });
        self.gpu.span(OP, || OP.to_owned(), launch)?;
        Ok(true)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.gpu.bind(OP);
        // SAFETY: made by `capture`, destroyed once; the driver keeps what a launch in flight needs.
        let _ = unsafe { ffi::qlora_graph_destroy(self.exec) };
    }
}
