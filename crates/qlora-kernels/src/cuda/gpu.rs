//! One GPU: its stream, its memory pool, its matrix library.
//!
//! Everything runs on one stream of our own, the one of the candle device. candle's default CUDA device uses the
//! per-thread default stream, whose meaning depends on the calling thread; memory would then be freed on another stream
//! than it is used on. Such a device is refused ([`device`] makes the right one). cudarc's event tracking is off: with
//! one stream it only costs time.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::{self, CudaContext, CudaStream, DevicePtrMut, result, sys};
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
use super::rates::DeviceRates;
use super::step_memory::Kept;
use crate::device_limits::{DeviceLimits, LIMITS_VARIABLE};
use crate::driver::{cuda_version, driver_number, is_too_old, too_old};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// The oldest architecture that the kernels are written for: Turing, whose tensor cores load fragments with `ldmatrix`.
const OLDEST: (u32, u32) = (7, 5);

/// A GPU as the operations use it.
pub struct Gpu {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    pool: Pool,
    blas: Blas,
    name: String,
    limits: DeviceLimits,
    for_launchers: ffi::DeviceLimits,
    deterministic: AtomicBool,
    peft_rounding: AtomicBool,
    attention: AttentionLibrary,
    offloader: Offloader,
    profiler: Profiler,
    workspaces: Workspaces,
    counting: Counting,
    rates: OnceLock<DeviceRates>,
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

/// The number of GPUs that this process can see; none if the driver is not there.
pub fn device_count() -> usize {
    CudaContext::device_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

fn describe_start(ordinal: usize, error: &candle_core::Error) -> Error {
    const OP: &str = "cuda device";
    let text = error.to_string();
    let too_old = ["INSUFFICIENT_DRIVER", "UNSUPPORTED_PTX", "SYSTEM_DRIVER_MISMATCH"];
    if too_old.iter().any(|name| text.contains(name)) {
        return Error::invalid(OP, format!("GPU {ordinal} cannot be used: {} ({text})", driver_too_old()));
    }
    let hint = if text.contains("NO_DEVICE") {
        "no NVIDIA GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    } else if text.contains("INVALID_DEVICE") {
        "there is no GPU with this number: nvidia-smi -L lists them"
    } else {
        "check that nvidia-smi works on this machine"
    };
    Error::invalid(OP, format!("GPU {ordinal} cannot be used: {hint} ({text})"))
}

/// Asks the driver for a device's limits.
fn ask_limits(context: &CudaContext) -> Result<DeviceLimits> {
    const OP: &str = "cuda device";
    use sys::CUdevice_attribute as Attribute;
    let ask = |attribute: Attribute| {
        let value = context.attribute(attribute).map_err(|error| cuda_error(OP, error))?;
        Ok::<u32, Error>(u32::try_from(value).unwrap_or(0))
    };
    let capability = (
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    Ok(DeviceLimits::new(
        capability,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
    ))
}

/// The architecture that the code which runs here was compiled for, and whether it has Hopper's instructions; an error if
/// the program has no code for this device.
fn probe(stream: &Arc<CudaStream>, name: &str, (major, minor): (u32, u32)) -> Result<[u32; 2]> {
    const OP: &str = "probe";
    let failed = |error: Error| {
        if matches!(error, Error::Cuda { code, .. } if is_too_old(code)) {
            let message = format!("{name} cannot be used: {} ({error})", driver_too_old());
            return Error::invalid("cuda device", message);
        }
        let message = format!(
            "the kernels in this program do not run on {name} (compute capability {major}.{minor}); build it with \
             CUDA_COMPUTE_CAP={major}{minor} ({error})"
        );
        Error::invalid("cuda device", message)
    };
    let cuda = |error| failed(cuda_error(OP, error));
    stream.context().bind_to_thread().map_err(cuda)?;
    let mut out = stream.alloc_zeros::<u32>(2).map_err(cuda)?;
    let code = {
        let (ptr, _sync) = out.device_ptr_mut(stream);
        // SAFETY: two elements are allocated, and the stream is alive.
        unsafe { ffi::qlora_probe(ptr as *mut u32, stream.cu_stream().cast()) }
    };
    if code != 0 {
        return Err(failed(status_error(OP, code)));
    }
    let values = stream.clone_dtoh(&out).map_err(cuda)?;
    stream.synchronize().map_err(cuda)?;
    Ok([values[0], values[1]])
}

/// The error message for a driver that is older than the toolkit of this program.
fn driver_too_old() -> String {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
    let mut version = 0;
    // SAFETY: the driver writes one number there; it can be asked before it is initialized.
    let status = unsafe { sys::cuDriverGetVersion(&raw mut version) };
    let supports = (status == sys::CUresult::CUDA_SUCCESS && version > 0).then(|| cuda_version(version.unsigned_abs()));
    too_old(driver_number(&text), supports, cuda_version(sys::CUDA_VERSION))
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
        let device_limits = ask_limits(&context)?;
        if device_limits.capability < OLDEST {
            let (major, minor) = device_limits.capability;
            let message = format!(
                "{name} has compute capability {major}.{minor}; the kernels' tensor-core instructions need 7.5 (Turing: \
                 T4, RTX 20) or later"
            );
            return Err(Error::invalid(OP, message));
        }
        let [architecture, wgmma] = probe(&stream, &name, device_limits.capability)?;
        let mut limits = device_limits.with_code(architecture, wgmma != 0);
        if let Ok(text) = std::env::var(LIMITS_VARIABLE) {
            limits = limits.lowered(&text).map_err(|message| Error::invalid(OP, message))?;
        }
        let capability = limits.capability;
        let blas = Blas::new(&stream)?;
        let id = device.id();
        let gpu = Arc::new_cyclic(|this| Self {
            device,
            stream,
            pool,
            blas,
            name,
            limits,
            for_launchers: limits.into(),
            deterministic: AtomicBool::new(false),
            peft_rounding: AtomicBool::new(false),
            attention: AttentionLibrary::new((10 * capability.0 + capability.1) as i32),
            offloader: Offloader::default(),
            profiler: Profiler::default(),
            workspaces: Workspaces::default(),
            counting: Counting::default(),
            rates: OnceLock::new(),
            this: this.clone(),
        });
        KNOWN.lock().unwrap_or_else(PoisonError::into_inner).push((id, gpu.clone()));
        Ok(gpu)
    }

    /// The limits of this GPU: asked once, when it was opened, and lowered by the code in the program and by
    /// [`LIMITS_VARIABLE`].
    pub fn limits(&self) -> &DeviceLimits {
        &self.limits
    }

    /// [`Self::limits`] as launchers take them; the address is good as long as the GPU.
    pub(super) fn launch_limits(&self) -> *const ffi::DeviceLimits {
        &raw const self.for_launchers
    }

    /// 1 if launches may begin before their predecessors have ended, as launchers take it.
    pub(super) fn early(&self) -> i32 {
        i32::from(self.limits.early_launches)
    }

    /// An error, which names the GPU and what to do, if it cannot compute in `dtype`.
    ///
    /// # Errors
    /// See above.
    pub fn check_dtype(&self, op: &'static str, dtype: Dtype) -> Result<()> {
        if dtype != Dtype::Bf16 || self.limits.has_bf16() {
            return Ok(());
        }
        let (major, minor) = self.limits.capability;
        let message = format!(
            "{} (compute capability {major}.{minor}) cannot compute in bfloat16, which needs 8.0 (Ampere) or later and \
             code for it in this program: compute in float16 (bnb_4bit_compute_dtype = \"float16\") or float32",
            self.name
        );
        Err(Error::invalid(op, message))
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

    /// The name of the GPU, with its number.
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

    /// The same, for what enqueues nothing there: addresses of candle's memory, which a recording may ask for.
    pub(crate) fn stream_at_rest(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(crate) fn blas(&self) -> &Blas {
        &self.blas
    }

    /// The UUID of the GPU, as hexadecimal digits; empty if the driver does not say.
    pub fn uuid(&self) -> String {
        let bytes = self.stream.context().uuid().map(|uuid| uuid.bytes);
        bytes.map_or_else(|_| String::new(), |bytes| bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
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

    pub(super) fn measured(&self) -> &OnceLock<DeviceRates> {
        &self.rates
    }

    pub(super) fn profiler(&self) -> &Profiler {
        &self.profiler
    }

    /// The use of cuDNN's attention.
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

    /// The milliseconds that the GPU spends on the launches of `work`, by its own clock.
    ///
    /// # Errors
    /// The error of `work`, or a failure of the device.
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

    /// The stream for this thread's launches: the GPU's own, or the one that records them.
    pub(super) fn launch_stream(&self) -> sys::CUstream {
        graph::recording(self).unwrap_or(self.stream.cu_stream())
    }

    /// Runs one launcher and turns its status into an error that names `op`.
    pub(super) fn launch(&self, op: &'static str, launch: impl FnOnce(ffi::Stream) -> i32) -> Result<()> {
        self.bind(op)?;
        let stream = self.launch_stream();
        let launch = || match launch(stream.cast()) {
            0 => Ok(()),
            code => Err(status_error(op, code)),
        };
        let launched = self.span(op, || op.to_owned(), launch);
        LAST.set(Some(op));
        launched
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
        // Memory that a recording uses must exist before it.
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
    /// Memory that was allocated on this stream and that no other owner frees.
    pub(super) fn from_ptr(ptr: sys::CUdeviceptr, bytes: usize, stream: Arc<CudaStream>) -> Self {
        Self { ptr, bytes, stream, home: None }
    }

    pub(crate) fn ptr(&self) -> sys::CUdeviceptr {
        graph::reaches(self.ptr, false);
        self.ptr
    }

    /// Gives the memory up without freeing it.
    pub(crate) fn into_ptr(self) -> sys::CUdeviceptr {
        let ptr = self.ptr;
        // Who gets it frees it without our knowing.
        drop(graph::freed(ptr, self.bytes));
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
        let _before = graph::freed(self.ptr, self.bytes);
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

thread_local! {
    /// The operation that this thread enqueued last, for errors that show later.
    static LAST: Cell<Option<&'static str>> = const { Cell::new(None) };
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
        code if is_too_old(code) => {
            "the NVIDIA driver is too old for the code in this program: update it, or build with an older CUDA toolkit"
        }
        46 => "the GPU is used exclusively by another process",
        701 => "the kernel needs more shared memory or registers than this GPU allows",
        801 => "this GPU cannot compute in this type: compute in float16 or float32",
        98 | 209 => "the program has no code for this GPU: build it with its CUDA_COMPUTE_CAP",
        214 => "an uncorrectable memory (ECC) error: the GPU needs a reset or repair",
        304 | 719 | 46_000 => "a kernel failed; the GPU's state is lost: restart the program from its last checkpoint",
        700 | 716 => "a kernel accessed memory outside its buffers; the GPU's state is lost: please report this",
        714 | 715 | 718 => {
            "a kernel ran an instruction that this GPU does not have; its state is lost: please report this"
        }
        702 => "a kernel ran too long and was stopped; the GPU's state is lost: restart from the last checkpoint",
        _ => "the GPU reports an error; restart the program from its last checkpoint",
    };
    Error::Cuda { op, code, what, last: LAST.get() }
}
