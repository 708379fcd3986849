//! Causal attention for training through cuDNN's fused engines: forward with log-sum-exp, and backward.
//!
//! cuDNN is NVIDIA's library and not ours to ship or to link: it is opened at run time where it happens to be
//! installed (with PyTorch, for example), and everything here may fail without harm. The caller has kernels of its
//! own for that case. It is worth the trouble: on an H100 it is 1.8 times as fast as FlashAttention-2.
//!
//! ```text
//! Cudnn::open()             once for each device; finds the library, checks its version, makes a handle
//! Cudnn::self_test(..)      once; compares forward and backward with a reference in f64
//! Cudnn::forward(..)        checks, finds the plan of the shape (the first time: builds it), gives a launch
//! SdpaLaunch::workspace()   bytes of device memory that the launch needs
//! SdpaLaunch::run(..)       launches on a stream
//! ```
//!
//! The modules: `search` finds the library and `companions` what it needs itself, `api` holds its functions and
//! constants, `descriptor` and `graph` wrap cuDNN's backend objects, `plan` turns graphs into plans, `sdpa` describes
//! attention as such a graph, `self_test` compares it with `reference`.

mod api;
mod companions;
mod descriptor;
mod error;
mod graph;
mod plan;
pub(crate) mod reference;
mod sdpa;
mod search;
pub(crate) mod self_test;
mod shape;

use std::ffi::c_void;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::{Api, Handle};
use plan::{Plan, Target};
use sdpa::Ports;
use shape::{Strides, check_rows};

use crate::lru::Lru;

pub use error::{CudnnError, Result};
pub use self_test::SelfTestDevice;
pub use shape::{PackedLayout, Packing, Rows, SdpaBackward, SdpaForward, SdpaShape, SdpaType};

/// The number of plans that are kept. A plan is some hundred kilobytes of host memory, a forward and a backward of each
/// shape in use.
const PLANS: usize = 64;

/// Rows behind those of packed sequences in the sums of the backward.
pub(super) const SPARE_ROWS: i64 = 128;

/// An open cuDNN with a handle for one device, and the plans that were used last.
///
/// The handle belongs to the CUDA context that is current when it is made, and the same context must be current on
/// every thread that launches. Launches of several threads follow one another.
pub struct Cudnn {
    api: &'static Api,
    /// `None` when plans are made for a device that is only described.
    handle: Option<Handle>,
    target: Target,
    /// Compute capability of the device, e.g. 90.
    capability: u32,
    plans: Mutex<Lru<Key, Result<Arc<SdpaPlan>>>>,
    /// Plans that had to go; work of theirs may still be under way.
    retired: Mutex<Vec<Arc<SdpaPlan>>>,
    made: AtomicU64,
    /// The form of packed backwards: see [`sdpa::backward`]. The self-test finds out.
    padding_first: AtomicBool,
    /// Held while the stream of the handle is set and work is launched on it.
    launching: Mutex<()>,
}

// SAFETY: cuDNN allows a handle to be used from any thread as long as uses do not overlap; `launching` and `plans`
// keep them apart.
unsafe impl Send for Cudnn {}
// SAFETY: as above.
unsafe impl Sync for Cudnn {}

/// The key of a cached plan: the shape, the strides, and forward or backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    shape: SdpaShape,
    strides: Strides,
    backward: bool,
    padding_first: bool,
}

/// A plan and the names of its tensors.
struct SdpaPlan {
    plan: Plan,
    ports: Ports,
}

impl Cudnn {
    /// Finds cuDNN and makes a handle for the device whose CUDA context is current on this thread. `capability` is the
    /// device's compute capability as one number: 90 for 9.0.
    ///
    /// Taken is what `QLORA_CUDNN_PATH` names (a file or a directory), otherwise the newest library among the dynamic
    /// loader's usual folders and the `nvidia/cudnn` packages of the Python installations that can be found.
    pub fn open(capability: u32) -> Result<Arc<Self>> {
        check_capability(capability)?;
        let api = search::open()?;
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: `handle` is a valid place for the result.
        api.check(unsafe { (api.create)(&mut handle) }, || "cudnnCreate".to_owned())?;
        Ok(Arc::new(Self::new(api, Some(handle), Target::Handle(handle), capability)))
    }

    /// A cuDNN that only makes plans, for a device described in cuDNN's JSON: shows without a GPU (but with the
    /// driver's library) which shapes are accepted, on which engine, and with how much workspace.
    pub fn planner(library: &Path, device: &str, capability: u32) -> Result<Arc<Self>> {
        check_capability(capability)?;
        let unavailable = |error: libloading::Error| CudnnError::NotAvailable(error.to_string());
        let api = Api::open(library).map_err(unavailable)?;
        companions::open(api).map_err(CudnnError::NotAvailable)?;
        let target = Target::described(api, device)?;
        Ok(Arc::new(Self::new(api, None, target, capability)))
    }

    fn new(api: &'static Api, handle: Option<Handle>, target: Target, capability: u32) -> Self {
        Self {
            api,
            handle,
            target,
            capability,
            plans: Mutex::new(Lru::new(PLANS)),
            retired: Mutex::default(),
            made: AtomicU64::new(0),
            padding_first: AtomicBool::new(false),
            launching: Mutex::default(),
        }
    }

    /// Version of the library, e.g. `9.19.0`.
    pub fn version(&self) -> String {
        search::version_text(self.api.version())
    }

    /// Path or name that the library was opened by.
    pub fn path(&self) -> &str {
        &self.api.path
    }

    /// Whether calls of this shape can be prepared at all; whether cuDNN has a plan for it, only preparing one tells.
    pub fn check(&self, shape: &SdpaShape) -> Result<()> {
        shape.check(self.capability, self.api.version())
    }

    /// The number of plans made so far, those included that could not be made; each takes about 0.05 s.
    pub fn plans_made(&self) -> u64 {
        self.made.load(Ordering::Relaxed)
    }

    /// The plans that are kept, the one used last at the end, in words.
    pub fn plans(&self) -> Vec<String> {
        let describe = |(key, plan): &(Key, Result<Arc<SdpaPlan>>)| {
            let Key { shape, strides, backward, .. } = key;
            let SdpaShape { batch, seq, heads, kv_heads, head_dim, dtype, packed, .. } = shape;
            let kind = if *packed { "packed, up to" } else { "uniform," };
            let pass = if *backward { "backward" } else { "forward" };
            let result = match plan {
                Ok(plan) => format!("engine {}, workspace {} bytes", plan.plan.engine(), plan.plan.workspace()),
                Err(error) => error.to_string(),
            };
            let rows = [strides.q, strides.o, strides.d_o, strides.dq];
            format!(
                "{pass} {kind} {batch} x {seq}, {heads}/{kv_heads} heads of {head_dim}, {dtype:?}, rows of {rows:?}: {result}"
            )
        };
        lock(&self.plans).iter().map(describe).collect()
    }

    /// Plans that were forgotten since the last call. Dropped, their kernels are unloaded: wait for the stream before.
    pub fn take_retired(&self) -> Retired {
        Retired(std::mem::take(&mut lock(&self.retired)))
    }

    /// Prepares a forward.
    pub fn forward(&self, shape: &SdpaShape, tensors: &SdpaForward<'_>) -> Result<SdpaLaunch<'_>> {
        let shape = normal(shape, false);
        self.check(&shape)?;
        check_rows("q", tensors.q, shape.heads, &shape)?;
        check_rows("k", tensors.k, shape.kv_heads, &shape)?;
        check_rows("v", tensors.v, shape.kv_heads, &shape)?;
        check_rows("o", tensors.o, shape.heads, &shape)?;
        let strides = Strides {
            q: tensors.q.stride,
            k: tensors.k.stride,
            v: tensors.v.stride,
            o: tensors.o.stride,
            ..Strides::default()
        };
        let plan = self.plan(Key { shape, strides, backward: false, padding_first: false })?;
        let mut bound = Bound::default();
        bound.device(plan.ports.q, tensors.q.pointer);
        bound.device(plan.ports.k, tensors.k.pointer);
        bound.device(plan.ports.v, tensors.v.pointer);
        bound.device(plan.ports.o, tensors.o.pointer);
        bound.device(plan.ports.stats, tensors.lse);
        bound.packing(&plan.ports, tensors.packing.as_ref())?;
        let workspace = plan.plan.workspace();
        Ok(SdpaLaunch { cudnn: self, plan, bound, scale: tensors.scale, carved: Vec::new(), workspace })
    }

    /// Prepares a backward.
    pub fn backward(&self, shape: &SdpaShape, tensors: &SdpaBackward<'_>) -> Result<SdpaLaunch<'_>> {
        let shape = normal(shape, true);
        self.check(&shape)?;
        let named = [
            ("q", tensors.q, shape.heads),
            ("k", tensors.k, shape.kv_heads),
            ("v", tensors.v, shape.kv_heads),
            ("o", tensors.o, shape.heads),
            ("the gradient of o", tensors.d_o, shape.heads),
            ("the gradient of q", tensors.dq, shape.heads),
            ("the gradient of k", tensors.dk, shape.kv_heads),
            ("the gradient of v", tensors.dv, shape.kv_heads),
        ];
        for (name, rows, heads) in named {
            check_rows(name, rows, heads, &shape)?;
        }
        let strides = Strides {
            q: tensors.q.stride,
            k: tensors.k.stride,
            v: tensors.v.stride,
            o: tensors.o.stride,
            d_o: tensors.d_o.stride,
            dq: tensors.dq.stride,
            dk: tensors.dk.stride,
            dv: tensors.dv.stride,
        };
        let padding_first = shape.packed && self.padding_first.load(Ordering::Relaxed);
        let plan = self.plan(Key { shape, strides, backward: true, padding_first })?;
        let ports = &plan.ports;
        let mut bound = Bound::default();
        let pairs = [
            (ports.q, tensors.q),
            (ports.k, tensors.k),
            (ports.v, tensors.v),
            (ports.o, tensors.o),
            (ports.d_o, tensors.d_o),
            (ports.dq, tensors.dq),
            (ports.dk, tensors.dk),
            (ports.dv, tensors.dv),
        ];
        for (port, rows) in pairs {
            bound.device(port, rows.pointer);
        }
        bound.device(ports.stats, tensors.lse);
        bound.packing(ports, tensors.packing.as_ref())?;

        // Behind cuDNN's own workspace lie the sums that the graph keeps in memory.
        // Packed ones get a tile more than there are rows, for whatever is written behind the last of them.
        let rows = tensors.packing.map_or(shape.batch * shape.seq, |packing| packing.tokens + SPARE_ROWS);
        let dq_width = if shape.packed { tensors.dq.stride } else { shape.heads * shape.head_dim };
        let mut end = aligned(plan.plan.workspace());
        let mut carved = Vec::new();
        for (port, width) in [(ports.row_sum, shape.heads), (ports.dq_sum, dq_width)] {
            if let Some(port) = port {
                carved.push((port, end));
                end = aligned(end + (rows * width) as usize * size_of::<f32>());
            }
        }
        Ok(SdpaLaunch { cudnn: self, plan, bound, scale: tensors.scale, carved, workspace: end })
    }

    /// The plan for `key`, made at its first use. Failures are remembered too: they cost as much as successes.
    fn plan(&self, key: Key) -> Result<Arc<SdpaPlan>> {
        let mut plans = lock(&self.plans);
        if let Some(known) = plans.get(&key) {
            return known.clone();
        }
        let make = || {
            let (graph, ports) = match key.backward {
                true => sdpa::backward(self.api, &key.shape, &key.strides, key.padding_first)?,
                false => sdpa::forward(self.api, &key.shape, &key.strides)?,
            };
            Ok(Arc::new(SdpaPlan { plan: Plan::new(self.api, &self.target, graph)?, ports }))
        };
        let made = make();
        self.made.fetch_add(1, Ordering::Relaxed);
        if let Some(Ok(forgotten)) = plans.insert(key, made.clone()) {
            lock(&self.retired).push(forgotten);
        }
        made
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        lock(&self.plans).clear();
        lock(&self.retired).clear();
        if let Some(handle) = self.handle {
            // SAFETY: made by us, and no plan of it is left. A failure leaves nothing to be done.
            let _ = unsafe { (self.api.destroy)(handle) };
        }
    }
}

/// Plans that are no longer found by their key.
pub struct Retired(Vec<Arc<SdpaPlan>>);

impl Retired {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// An attention call that is ready but for its workspace.
pub struct SdpaLaunch<'a> {
    cudnn: &'a Cudnn,
    plan: Arc<SdpaPlan>,
    bound: Bound,
    scale: f32,
    /// Tensors in the workspace, by their distance from its start.
    carved: Vec<(graph::Tensor, usize)>,
    workspace: usize,
}

impl SdpaLaunch<'_> {
    /// Bytes of device memory that [`SdpaLaunch::run`] needs; its contents do not matter.
    pub fn workspace(&self) -> usize {
        self.workspace
    }

    /// Engine and workspace of the plan, for logs.
    pub fn describe(&self) -> String {
        let plan = &self.plan.plan;
        format!("engine {}, workspace {} bytes", plan.engine(), self.workspace)
    }

    /// Launches on `stream` (a `cudaStream_t`) and returns without waiting.
    ///
    /// # Safety
    ///
    /// The CUDA context of the handle is current on this thread. All tensors of the call lie in memory of that device
    /// with the sizes and strides that were given, `workspace` is the address of at least
    /// [`SdpaLaunch::workspace`] bytes aligned to 256, and all of it stays valid until the stream has passed this
    /// work.
    pub unsafe fn run(&self, stream: *mut c_void, workspace: u64) -> Result<()> {
        let handle = self.cudnn.handle.ok_or_else(|| {
            CudnnError::Unsupported("plans for a device that is only described cannot be run".to_owned())
        })?;
        let ports = &self.plan.ports;
        let (mut scale, mut one, mut minus_infinity) = (self.scale, 1.0f32, f32::NEG_INFINITY);
        let mut bindings = self.bound.bindings.clone();
        bindings.extend(self.carved.iter().map(|(port, start)| (*port, device_pointer(workspace + *start as u64))));
        bindings.extend(ports.scale.map(|port| (port, (&raw mut scale).cast::<c_void>())));
        bindings.extend(ports.one.map(|port| (port, (&raw mut one).cast::<c_void>())));
        for port in &ports.minus_infinity {
            bindings.push((*port, (&raw mut minus_infinity).cast::<c_void>()));
        }

        let _launching = lock(&self.cudnn.launching);
        // SAFETY: the handle is alive and used by no one else now.
        let status = unsafe { (self.cudnn.api.set_stream)(handle, stream) };
        self.cudnn.api.check(status, || "cudnnSetStream".to_owned())?;
        // SAFETY: every port of the plan is bound above; the caller vouches for device memory, the values live here.
        unsafe { self.plan.plan.execute(handle, &bindings, device_pointer(workspace)) }
    }
}

/// Tensors with their addresses.
#[derive(Default)]
struct Bound {
    bindings: Vec<(graph::Tensor, *mut c_void)>,
}

impl Bound {
    fn device(&mut self, port: Option<graph::Tensor>, address: u64) {
        self.bindings.extend(port.map(|port| (port, device_pointer(address))));
    }

    fn packing(&mut self, ports: &Ports, packing: Option<&Packing<'_>>) -> Result<()> {
        match (ports.lengths, packing) {
            (None, None) => Ok(()),
            (Some(lengths), Some(packing)) => {
                self.device(Some(lengths), packing.lengths);
                for (stride, port) in &ports.offsets {
                    self.device(Some(*port), packing.offsets_of(*stride)?);
                }
                Ok(())
            }
            _ => Err(CudnnError::Unsupported("packed shapes and packings belong together".to_owned())),
        }
    }
}

/// The engines begin with Ampere.
fn check_capability(capability: u32) -> Result<()> {
    if capability < 80 {
        return Err(CudnnError::Unsupported(format!("compute capability {capability} is older than 80")));
    }
    Ok(())
}

fn device_pointer(address: u64) -> *mut c_void {
    address as usize as *mut c_void
}

/// The next multiple of 256, the alignment of CUDA's allocations.
fn aligned(bytes: usize) -> usize {
    bytes.next_multiple_of(256)
}

/// Determinism is a matter of the backward only; one forward plan serves both.
fn normal(shape: &SdpaShape, backward: bool) -> SdpaShape {
    SdpaShape { deterministic: shape.deterministic && backward, ..*shape }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
