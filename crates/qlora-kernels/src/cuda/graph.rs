//! Work that is enqueued once and then runs again and again as one CUDA graph: hundreds of short kernels without the gaps that
//! the launches of each leave between them.
//!
//! While [`Gpu::capture`] runs, this thread's launches go to a stream of their own, which records and does not run them; other
//! threads go on as before. Only launches can be recorded. Everything else (copies, products by cuBLAS, attention by cuDNN,
//! fresh memory) still goes to the GPU's own stream, where it does no harm, and makes the recording worthless: it is thrown
//! away then, and its caller runs the work as usual.
//!
//! A graph has the addresses of everything that was recorded, and may be launched long after what they belonged to is gone. So a
//! recording notes every address that an operation asks for, and [`Graph::launch`] says that the graph is out of date where one
//! of them was freed since, where a shared workspace has moved, or where a [`DecodeTables`](super::decode::DecodeTables) that
//! tells the kernels of caches is gone. Memory of candle's is freed without our knowing: a graph keeps the tensors that
//! [`Gpu::capture`] is given, and work that reads others cannot be recorded. The results are the caller's care: what was
//! recorded is written again by every launch, so temporary memory comes from a [`StepMemory`](super::StepMemory) that
//! has no other user in between.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::cuda_backend::cudarc::driver::{CudaStream, sys};

use super::counters::count;
use super::ffi;
use super::gpu::{Gpu, cuda_error, status_error};
use crate::error::{Error, Result};
use crate::tensor::DeviceTensor;

const OP: &str = "CUDA graph";

thread_local! {
    /// The stream that records this thread's launches, and the address of its GPU.
    static RECORDING: Cell<(sys::CUstream, usize)> = const { Cell::new((ptr::null_mut(), 0)) };
    /// Whether something was enqueued meanwhile that cannot be recorded.
    static SPOILT: Cell<bool> = const { Cell::new(false) };
    /// The memory that the recording of this thread has used so far.
    static NOTES: RefCell<Notes> = const { RefCell::new(Notes::new()) };
}

/// The memory that a recording uses.
struct Notes {
    addresses: Vec<sys::CUdeviceptr>,
    tables: Vec<Arc<AtomicBool>>,
    /// The memory of the tensors that the graph will keep.
    kept: Vec<Range<sys::CUdeviceptr>>,
}

impl Notes {
    const fn new() -> Self {
        Self { addresses: Vec::new(), tables: Vec::new(), kept: Vec::new() }
    }
}

/// The addresses that a graph has, and whether all of them are still what they were.
#[derive(Debug)]
struct Reached {
    /// In ascending order.
    addresses: Vec<sys::CUdeviceptr>,
    stale: AtomicBool,
}

/// All graphs there are: device addresses differ between the GPUs of a process.
static GRAPHS: Mutex<Vec<Weak<Reached>>> = Mutex::new(Vec::new());
/// Their number, so that freeing memory costs nothing where there is none.
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn graphs() -> MutexGuard<'static, Vec<Weak<Reached>>> {
    GRAPHS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_recording() -> bool {
    !RECORDING.get().0.is_null()
}

/// To be called by everything that hands out an address for a launch; `foreign`: of memory that is freed without
/// [`freed`].
pub(super) fn reaches(ptr: sys::CUdeviceptr, foreign: bool) {
    if !is_recording() {
        return;
    }
    NOTES.with_borrow_mut(|notes| match foreign {
        false => notes.addresses.push(ptr),
        true if notes.kept.iter().any(|range| range.contains(&ptr)) => {}
        true => SPOILT.set(true),
    });
}

/// To be called by everything that hands out a table of addresses: they are good while the flag is set.
pub(super) fn needs(table: &Arc<AtomicBool>) {
    if is_recording() {
        NOTES.with_borrow_mut(|notes| notes.tables.push(table.clone()));
    }
}

/// To be called before memory is freed. Until the guard is dropped, which is to be behind the free, nothing is launched.
pub(super) fn freed(ptr: sys::CUdeviceptr, bytes: usize) -> Option<MutexGuard<'static, impl Sized>> {
    // Memory that a recording used and freed itself is gone when the graph runs.
    spoil();
    if COUNT.load(Ordering::SeqCst) == 0 {
        return None;
    }
    let graphs = graphs();
    for reached in graphs.iter().filter_map(Weak::upgrade) {
        let first = reached.addresses.partition_point(|&address| address < ptr);
        if reached.addresses.get(first).is_some_and(|&address| address < ptr + bytes as u64) {
            reached.stale.store(true, Ordering::SeqCst);
        }
    }
    Some(graphs)
}

/// Recorded launches.
#[derive(Debug)]
pub struct Graph {
    exec: ffi::GraphExec,
    gpu: Arc<Gpu>,
    /// The state of the shared workspaces when it was recorded.
    moves: u64,
    reached: Arc<Reached>,
    tables: Vec<Arc<AtomicBool>>,
    /// candle's memory that it uses.
    _tensors: Vec<DeviceTensor>,
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
    /// Ends the recording; the executable graph, if it is to be kept and can be.
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
            NOTES.set(Notes::new());
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
    if is_recording() {
        SPOILT.set(true);
    }
}

/// Ends the work of a recording with an error, which its caller does not see: for what must not run half.
pub(super) fn refuse(op: &'static str) -> Result<()> {
    spoil();
    match is_recording() {
        false => Ok(()),
        true => Err(Error::invalid(op, "it cannot be recorded")),
    }
}

impl Gpu {
    /// Records what `work` launches, without running it, and gives its result too; none if something in it cannot be recorded.
    /// The graph keeps `tensors`, the only ones of candle's that `work` may read or write; see [`Graph::launch`] for all
    /// other memory.
    ///
    /// # Errors
    /// The error of `work`, or a failure of the device.
    pub fn capture<T, E: From<Error>>(
        self: &Arc<Self>,
        tensors: &[DeviceTensor],
        work: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<Option<(Graph, T)>, E> {
        self.bind(OP)?;
        let kept = tensors.iter().map(DeviceTensor::range).collect();
        let moves = self.workspaces().moves.load(Ordering::Relaxed);
        let stream = self.stream().context().new_stream().map_err(|error| cuda_error(OP, error))?;
        // SAFETY: the stream is new and this thread's alone.
        check(unsafe { ffi::qlora_graph_begin(stream.cu_stream().cast()) })?;
        NOTES.set(Notes { kept, ..Notes::new() });
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
        let Some(exec) = exec else { return Ok(None) };
        count(&self.counting().graphs);
        let Notes { mut addresses, mut tables, .. } = NOTES.replace(Notes::new());
        addresses.sort_unstable();
        addresses.dedup();
        tables.sort_unstable_by_key(|table| Arc::as_ptr(table).addr());
        tables.dedup_by(|a, b| Arc::ptr_eq(a, b));
        let reached = Arc::new(Reached { addresses, stale: AtomicBool::new(false) });
        let mut graphs = graphs();
        graphs.push(Arc::downgrade(&reached));
        COUNT.store(graphs.len(), Ordering::SeqCst);
        drop(graphs);
        Ok(Some((Graph { exec, gpu: self.clone(), moves, reached, tables, _tensors: tensors.to_vec() }, value)))
    }
}

impl Graph {
    /// Enqueues everything; false if it is out of date and has to be recorded again: memory that was recorded has been freed
    /// or has moved, or a table of caches is gone.
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
        // Nobody frees memory between this look and the launch; what is freed afterwards is freed behind it on the stream.
        let _unfreed = graphs();
        let lives = self.tables.iter().all(|table| table.load(Ordering::SeqCst));
        if self.reached.stale.load(Ordering::SeqCst) || !lives {
            return Ok(false);
        }
        // SAFETY: the graph is executable; its addresses are live, as was just seen, and candle's are kept.
        let launch = || check(unsafe { ffi::qlora_graph_launch(self.exec, self.gpu.stream().cu_stream().cast()) });
        self.gpu.span(OP, || OP.to_owned(), launch)?;
        Ok(true)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let mut graphs = graphs();
        graphs.retain(|graph| !ptr::eq(graph.as_ptr(), Arc::as_ptr(&self.reached)));
        COUNT.store(graphs.len(), Ordering::SeqCst);
        drop(graphs);
        let _ = self.gpu.bind(OP);
        // SAFETY: made by `capture`, destroyed once; the driver keeps what a launch in flight needs.
        let _ = unsafe { ffi::qlora_graph_destroy(self.exec) };
    }
}
