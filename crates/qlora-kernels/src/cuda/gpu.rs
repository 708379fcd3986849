//! One GPU: its stream, its memory pool, its matrix library.
//!
//! Everything runs on one stream of our own, the one of the candle device. candle's default CUDA device uses the
//! per-thread default stream, whose meaning depends on the calling thread; memory would then be freed on another stream
//! than it is used on. Such a device is refused ([`device`] makes the right one). cudarc's event tracking is off: with
//! one stream it only costs time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{self, CudaStream, result, sys};
use candle_core::cuda_backend::{CudaDevice, DeviceId};

use super::blas::Blas;
use super::counters::Counting;
use super::cudnn_attention::AttentionLibrary;
use super::few_tokens::Workspaces;
use super::ffi;
use super::graph;
use super::offload::Offloader;
use super::pool::Pool;
use super::profile::Profiler;
use super::step_memory::Kept;
use crate::error::{Error, Result};

/// The oldest architecture that the kernels are written for: asynchronous copies and bf16 matrix instructions.
const OLDEST: (i32, i32) = (8, 0);

/// A GPU as the operations use it.
pub struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    pool: Pool,
    blas: Blas,
    name: String,
    deterministic: AtomicBool,
    peft_rounding: AtomicBool,
    attention: AttentionLibrary,
    offloader: Offloader,
    profiler: Profiler,
    workspaces: Workspaces,
    counting: Counting,
    this: Weak<Gpu>,
}

/// The candle device for GPU number `ordinal`, set up as this crate needs it: a stream of its own, no event tracking, a
/// memory pool that keeps what it has. With `memory_limit`, all memory that candle and this crate take on that GPU in
/// this process from now on is at most so many bytes, on devices that were opened before or will be opened without a
/// limit too; what they hold already does not count.
///
/// # Errors
/// If there is no such GPU, its driver is too old, its architecture is not supported, or the limit cannot be set.
pub fn device(ordinal: usize, memory_limit: Option<u64>) -> Result<Device> {
    let device = CudaDevice::new_with_stream(ordinal).map_err(|error| describe_start(ordinal, &error))?;
    // SAFETY: all work of this device is enqueued on its one stream, so no other stream can see memory too early.
    unsafe { device.disable_event_tracking() };
    let pool = Pool::open(device.cuda_stream().context().clone(), memory_limit)?;
    Gpu::new(device.clone(), pool)?;
    Ok(Device::Cuda(device))
}

fn describe_start(ordinal: usize, error: &candle_core::Error) -> Error {
    const OP: &str = "cuda device";
    let text = error.to_string();
    let hint = if text.contains("INSUFFICIENT_DRIVER") || text.contains("UNSUPPORTED_PTX") {
        "the NVIDIA driver is older than the CUDA version this program was built with: update the driver, or build with \
         an older CUDA toolkit"
    } else if text.contains("NO_DEVICE") {
        "no NVIDIA GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    } else if text.contains("INVALID_DEVICE") {
        "there is no GPU with this number: nvidia-smi -L lists them"
    } else {
        "check that nvidia-smi works on this machine"
    };
    Error::invalid(OP, format!("GPU {ordinal} cannot be used: {hint} ({text})"))
}

static KNOWN: Mutex<Vec<(DeviceId, Arc<Gpu>)>> = Mutex::new(Vec::new());

impl Gpu {
    /// The GPU behind a candle device.
    ///
    /// # Errors
    /// If the device is not one made by [`device`] (or `Device::new_cuda_with_stream`), or cannot run our kernels.
    pub fn of(device: &Device) -> Result<Arc<Self>> {
        const OP: &str = "cuda device";
        let Device::Cuda(device) = device else {
            return Err(Error::invalid(OP, "the device is not a GPU"));
        };
        let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, gpu)) = known.iter().find(|(id, _)| *id == device.id()) {
            return Ok(gpu.clone());
        }
        drop(known);
        // SAFETY: as in `device`; a stream of one's own is checked in `new`.
        unsafe { device.disable_event_tracking() };
        Self::new(device.clone(), Pool::open(device.cuda_stream().context().clone(), None)?)
    }

    fn new(device: CudaDevice, pool: Pool) -> Result<Arc<Self>> {
        const OP: &str = "cuda device";
        let stream = device.cuda_stream();
        let context = stream.context().clone();
        // 0, 1 and 2 stand for the default streams.
        if (stream.cu_stream() as usize) < 3 {
            let message =
                "the device uses CUDA's default stream; make it with qlora_kernels::cuda::device(ordinal, None)";
            return Err(Error::invalid(OP, message));
        }
        let name = context.name().map_err(|error| cuda_error(OP, error))?;
        let capability = context.compute_capability().map_err(|error| cuda_error(OP, error))?;
        if capability < OLDEST {
            let (major, minor) = capability;
            let message = format!(
                "{name} has compute capability {major}.{minor}; bf16 matrix instructions and asynchronous copies need \
                 8.0 (Ampere) or later"
            );
            return Err(Error::invalid(OP, message));
        }
        let blas = Blas::new(&stream)?;
        let id = device.id();
        let gpu = Arc::new_cyclic(|this| Self {
            device,
            stream,
            pool,
            blas,
            name,
            deterministic: AtomicBool::new(false),
            peft_rounding: AtomicBool::new(false),
            attention: AttentionLibrary::new(10 * capability.0 + capability.1),
            offloader: Offloader::default(),
            profiler: Profiler::default(),
            workspaces: Workspaces::default(),
            counting: Counting::default(),
            this: this.clone(),
        });
        gpu.check_kernels(capability)?;
        KNOWN.lock().unwrap_or_else(PoisonError::into_inner).push((id, gpu.clone()));
        Ok(gpu)
    }

    /// Whether the kernels in this program run on this architecture.
    fn check_kernels(&self, (major, minor): (i32, i32)) -> Result<()> {
        let probe = self.alloc("probe", 16)?;
        // SAFETY: 4 floats are allocated.
        let launched =
            self.launch("probe", |stream| unsafe { ffi::qlora_fill(0, probe.ptr() as *mut _, 4, 1, 4, 0.0, stream) });
        launched.and_then(|()| self.synchronize("probe")).map_err(|error| {
            let message = format!(
                "the kernels in this program do not run on {} (compute capability {major}.{minor}); build it with \
                 CUDA_COMPUTE_CAP={major}{minor} ({error})",
                self.name
            );
            Error::invalid("cuda device", message)
        })
    }

    /// A counted reference to this GPU.
    pub(crate) fn arc(&self) -> Arc<Self> {
        self.this.upgrade().expect("a GPU only exists behind an Arc")
    }

    /// The model of the GPU, as the driver calls it.
    pub fn model(&self) -> &str {
        &self.name
    }

    /// The compute capability that kernels are chosen for: (8, 6) for 8.6.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn compute_capability(&self) -> Result<(u32, u32)> {
        let capability = self.stream.context().compute_capability();
        let (major, minor) = capability.map_err(|error| cuda_error("cuda device", error))?;
        Ok((major.unsigned_abs(), minor.unsigned_abs()))
    }

    /// What the GPU is called, with its number.
    pub fn name(&self) -> String {
        format!("cuda:{} ({})", self.stream.context().ordinal(), self.name)
    }

    /// The candle device.
    pub fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    pub(crate) fn candle(&self) -> &CudaDevice {
        &self.device
    }

    /// The one stream.
    pub(crate) fn stream(&self) -> &Arc<CudaStream> {
        graph::spoil();
        &self.stream
    }

    pub(crate) fn blas(&self) -> &Blas {
        &self.blas
    }

    /// The memory pool, for its counters.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    pub(super) fn offloader(&self) -> &Offloader {
        &self.offloader
    }

    pub(super) fn workspaces(&self) -> &Workspaces {
        &self.workspaces
    }

    pub(super) fn counting(&self) -> &Counting {
        &self.counting
    }

    pub(super) fn profiler(&self) -> &Profiler {
        &self.profiler
    }

    /// Whether and how cuDNN's attention is used.
    pub fn attention(&self) -> &AttentionLibrary {
        &self.attention
    }

    /// Whether results have to be the same bits in every run. Off by default: the backward of attention is then faster
    /// and adds in no fixed order.
    pub fn set_deterministic(&self, on: bool) {
        self.deterministic.store(on, Ordering::Relaxed);
    }

    /// See [`Self::set_deterministic`].
    pub fn deterministic(&self) -> bool {
        self.deterministic.load(Ordering::Relaxed)
    }

    /// Whether layers with an adapter round as PEFT does: the base's product to the type of activations, then its sum with
    /// the adapter's product, then the sum with the residual. Off by default: one rounding of the whole sum is faster and
    /// nearer to f32. (A small adapter's product is lost when it is added to a rounded number: in bf16 PEFT's first losses on
    /// SmolLM2 lie 5 to 9% above those of f32.) For comparisons with PEFT; adapters that are loaded for inference and LLM.int8
    /// layers go on as without.
    pub fn set_peft_rounding(&self, on: bool) {
        self.peft_rounding.store(on, Ordering::Relaxed);
    }

    /// See [`Self::set_peft_rounding`].
    pub fn peft_rounding(&self) -> bool {
        self.peft_rounding.load(Ordering::Relaxed)
    }

    /// Waits until everything enqueued so far is done; asynchronous errors show here.
    ///
    /// # Errors
    /// If anything failed; the error names `op`.
    pub fn synchronize(&self, op: &'static str) -> Result<()> {
        self.stream.synchronize().map_err(|error| cuda_error(op, error))
    }

    /// The milliseconds that the GPU spends on what `work` enqueues, by its own clock.
    ///
    /// # Errors
    /// Whatever `work` returns, or if the device fails.
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        const OP: &str = "timing";
        self.bind(OP)?;
        let event = || -> Result<sys::CUevent> {
            let event =
                result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|error| cuda_error(OP, error))?;
            // SAFETY: both are alive.
            unsafe { result::event::record(event, self.stream.cu_stream()) }.map_err(|error| cuda_error(OP, error))?;
            Ok(event)
        };
        let start = event()?;
        let done = work().and_then(|()| event());
        self.synchronize(OP)?;
        let elapsed = done.and_then(|end| {
            // SAFETY: both events are alive and have happened; each is destroyed once.
            let elapsed = unsafe { result::event::elapsed(start, end) };
            // SAFETY: as above.
            let _ = unsafe { result::event::destroy(end) };
            elapsed.map_err(|error| cuda_error(OP, error))
        });
        // SAFETY: as above.
        let _ = unsafe { result::event::destroy(start) };
        Ok(f64::from(elapsed?))
    }

    /// Makes the GPU's context current on this thread.
    pub(crate) fn bind(&self, op: &'static str) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(|error| cuda_error(op, error))
    }

    /// Runs one launcher and turns its status into an error that names `op`.
    pub(super) fn launch(&self, op: &'static str, launch: impl FnOnce(ffi::Stream) -> i32) -> Result<()> {
        self.bind(op)?;
        let stream = graph::recording(self).unwrap_or(self.stream.cu_stream());
        let launch = || match launch(stream.cast()) {
            0 => Ok(()),
            code => Err(status_error(op, code)),
        };
        self.span(op, || op.to_owned(), launch)
    }

    /// Fresh memory; its content is unspecified.
    pub(crate) fn alloc(&self, op: &'static str, bytes: usize) -> Result<RawMemory> {
        self.bind(op)?;
        // The pool has no empty allocations.
        let bytes = bytes.max(16);
        let home = Kept::active(self);
        if let Some((bytes, ptr)) = home.as_ref().and_then(|home| home.take(bytes)) {
            return Ok(RawMemory { ptr, bytes, stream: self.stream.clone(), home });
        }
        // What a recording reaches must be there before it.
        graph::spoil();
        // SAFETY: the stream lives as long as self; the memory is freed on the same stream.
        let allocate = || unsafe { result::malloc_async(self.stream.cu_stream(), bytes) };
        let allocated = match allocate() {
            // The pool may hold enough, but in pieces: give back what nobody uses, so that it can be mapped anew.
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                self.synchronize(op)?;
                self.pool.trim()?;
                allocate()
            }
            other => other,
        };
        match allocated {
            Ok(ptr) => {
                // A question to the driver of some ten nanoseconds, beside an allocation of a microsecond.
                if let Ok(reserved) = self.pool.reserved() {
                    self.counting.pool_holds(reserved);
                }
                Ok(RawMemory { ptr, bytes, stream: self.stream.clone(), home })
            }
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(self.pool.out_of_memory(op, bytes)),
            Err(error) => Err(cuda_error(op, error)),
        }
    }
}

/// A piece of device memory that frees itself on its stream, or goes back to the steps' memory.
pub(crate) struct RawMemory {
    ptr: sys::CUdeviceptr,
    bytes: usize,
    stream: Arc<CudaStream>,
    home: Option<Arc<Kept>>,
}

impl RawMemory {
    /// Memory that was allocated on this stream and that nobody else frees.
    pub(super) fn from_ptr(ptr: sys::CUdeviceptr, bytes: usize, stream: Arc<CudaStream>) -> Self {
        Self { ptr, bytes, stream, home: None }
    }

    pub(crate) fn ptr(&self) -> sys::CUdeviceptr {
        self.ptr
    }

    /// Gives the memory up without freeing it.
    pub(crate) fn into_ptr(self) -> sys::CUdeviceptr {
        let ptr = self.ptr;
        let mut this = std::mem::ManuallyDrop::new(self);
        // Their handles are still released; only the free is skipped.
        // SAFETY: `this` is never used again.
        unsafe {
            std::ptr::drop_in_place(&raw mut this.stream);
            std::ptr::drop_in_place(&raw mut this.home);
        }
        ptr
    }
}

impl Drop for RawMemory {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            return home.keep(self.bytes, self.ptr);
        }
        // A failure here (a lost device) shows at the next call that can report it.
        let _ = self.stream.context().bind_to_thread();
        // SAFETY: allocated on this stream by `alloc`, freed once.
        let _ = unsafe { result::free_async(self.ptr, self.stream.cu_stream()) };
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.name())
    }
}

/// A driver error in words.
pub(crate) fn cuda_error(op: &'static str, error: driver::DriverError) -> Error {
    status_error(op, error.0 as i32)
}

/// `cudaError_t` and `CUresult` agree in the codes named here.
pub(super) fn status_error(op: &'static str, code: i32) -> Error {
    let what = match code {
        1 => "an argument is invalid for the kernel",
        2 => "out of GPU memory",
        35 => "the NVIDIA driver is too old for the CUDA version of this program: update it",
        46 => "the GPU is used exclusively by another process",
        98 | 209 => "the program has no code for this GPU: build it with its CUDA_COMPUTE_CAP",
        214 => "an uncorrectable memory (ECC) error: the GPU needs a reset or repair",
        304 | 719 | 46_000 => "a kernel failed; the GPU's state is lost: restart the program from its last checkpoint",
        700 => "a kernel accessed memory outside its buffers; the GPU's state is lost: please report this",
        702 => "a kernel ran too long and was stopped; the GPU's state is lost: restart from the last checkpoint",
        _ => "the GPU reports an error; restart the program from its last checkpoint",
    };
    Error::Cuda { op, code, what }
}
