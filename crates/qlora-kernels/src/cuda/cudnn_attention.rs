//! cuDNN's attention as an optional, self-tested path.
//!
//! On an H100 it takes 0.26 ms forward and 0.94 ms backward where our kernels take 0.39 and 1.27 (4 x 2048 tokens, 32/8
//! heads of 128); with short sequences it gains less, and from some length on nothing. It serves bf16 and f16: sequences of one
//! length, and on Hopper sequences of any lengths one behind the other; `ops/attention/route.rs` has the rule. In
//! deterministic mode our own kernels run, because cuDNN then needs `2 * batch * heads * length^2` bytes.
//!
//! The library is opened at the first use. Before a kind of attention (head size, type, packed or not) runs for the first
//! time, a small one is compared with f64 on the card that runs. If the library is not there, refuses a shape, fails its
//! self-test or a call, our kernels run and [`AttentionLibrary::describe`] says why.

mod batch;
mod device;
mod launch;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::counters::count;
use super::cudnn::{Cudnn, SdpaShape, SdpaType};
use super::gpu::Gpu;
use super::view::CudaView;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::ops::attention::route::{self, Admission, BatchFacts, Bounds, KnownBounds, Offers};
use crate::ops::attention::{AttentionConfig, AttentionPath};
use crate::sequence::SequenceLayout;

pub(crate) use batch::{AttentionBatch, PackedBatch};
use launch::Failure;
pub(super) use launch::Task;

const OP: &str = "cudnn attention";

/// Columns that a gradient's buffer may have besides those of q, k and v: an adapter's factors.
const MARGIN: usize = 256;

/// The state of cuDNN's attention: whether it may be used, its library, and its failures.
pub struct AttentionLibrary {
    enabled: AtomicBool,
    capability: i32,
    state: Mutex<State>,
    calls: [AtomicU64; 3],
}

#[derive(Default)]
struct State {
    /// The library, or why it cannot be used.
    library: Option<std::result::Result<Arc<Cudnn>, String>>,
    /// The state of each kind of attention: its self-test's result, or the reason why a call failed later.
    kinds: HashMap<Kind, std::result::Result<f64, String>>,
    /// The reasons why single shapes are left to our own kernels, the first few.
    refusals: Vec<String>,
    asked: Option<AttentionPath>,
    admission: Admission,
    bounds: KnownBounds,
}

/// A kind of attention, which is tested once.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    head_dim: i64,
    dtype: SdpaType,
    packed: bool,
}

impl Kind {
    fn of(shape: &SdpaShape) -> Self {
        Self { head_dim: shape.head_dim, dtype: shape.dtype, packed: shape.packed }
    }
}

/// The number of attention calls, forward and backward, on each path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttentionCalls {
    /// Our own kernels.
    pub own: u64,
    /// cuDNN, sequences of one length.
    pub cudnn_uniform: u64,
    /// cuDNN, packed sequences.
    pub cudnn_packed: u64,
}

impl AttentionCalls {
    /// The calls since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            own: self.own.saturating_sub(earlier.own),
            cudnn_uniform: self.cudnn_uniform.saturating_sub(earlier.cudnn_uniform),
            cudnn_packed: self.cudnn_packed.saturating_sub(earlier.cudnn_packed),
        }
    }
}

impl AttentionLibrary {
    pub(super) fn new(capability: i32) -> Self {
        Self { enabled: AtomicBool::new(true), capability, state: Mutex::default(), calls: Default::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allows it (the default) or not.
    pub fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Relaxed);
    }

    /// Whether it is allowed.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Asks for one path instead of the fastest, for measurements and tests; our own kernels run where it cannot be had.
    pub fn set_path(&self, path: Option<AttentionPath>) {
        self.state().asked = path;
    }

    /// The number of calls on each path so far.
    pub fn calls(&self) -> AttentionCalls {
        let [own, cudnn_uniform, cudnn_packed] = self.calls.each_ref().map(|calls| calls.load(Ordering::Relaxed));
        AttentionCalls { own, cudnn_uniform, cudnn_packed }
    }

    pub(super) fn called(&self, path: AttentionPath) {
        count(&self.calls[path as usize]);
    }

    /// The number of plans that cuDNN made.
    pub(super) fn plans_made(&self) -> u64 {
        self.state().library.as_ref().and_then(|library| library.as_ref().ok()).map_or(0, |cudnn| cudnn.plans_made())
    }

    /// The plans that are kept, in words: their shapes, engines and workspaces.
    pub fn plans(&self) -> Vec<String> {
        let state = self.state();
        state.library.as_ref().and_then(|library| library.as_ref().ok()).map_or(Vec::new(), |cudnn| cudnn.plans())
    }

    /// The state of cuDNN's attention, in words.
    pub fn describe(&self) -> String {
        let state = self.state();
        match &state.library {
            _ if !self.enabled() => "own kernels (cuDNN is switched off)".to_owned(),
            None => "own kernels (cuDNN was not needed yet)".to_owned(),
            Some(Err(error)) => format!("own kernels ({error})"),
            Some(Ok(cudnn)) => {
                let mut text = format!("cuDNN {} ({})", cudnn.version(), cudnn.path());
                let mut failures: Vec<String> = (state.kinds.iter())
                    .filter_map(|(kind, result)| Some((kind, result.as_ref().err()?)))
                    .map(|(Kind { head_dim, dtype, packed }, error)| {
                        let kind = if *packed { "packed" } else { "uniform" };
                        format!("; own kernels for {kind} batches with heads of {head_dim} in {dtype:?}: {error}")
                    })
                    .collect();
                failures.sort();
                text.extend(failures);
                text.extend(state.refusals.iter().map(|refusal| format!("; own kernels for {refusal}")));
                text
            }
        }
    }

    /// The attention task of a batch for cuDNN; none if our own kernels run it. The windows of the call must allow it.
    pub(super) fn task<'a>(
        &self,
        gpu: &Gpu,
        cfg: &AttentionConfig,
        dtype: Dtype,
        layout: &'a SequenceLayout,
    ) -> Option<Task<'a>> {
        let facts = BatchFacts::of(layout);
        if !self.enabled() || facts.tokens == 0 {
            return None;
        }
        let mut state = self.state();
        let asked = state.asked;
        let mut offers = Offers { uniform: true, packed: true };
        loop {
            match route::choose(&facts, offers, asked) {
                AttentionPath::Own => return None,
                AttentionPath::CudnnUniform => {
                    let shape = uniform_shape(cfg, dtype, facts.sequences, facts.longest)?;
                    let admit = || state.admission.admits([facts.sequences, facts.longest]);
                    let admitted = asked.is_some() || layout.attention().admitted(admit);
                    if admitted && self.usable(&mut state, gpu, &shape) {
                        return Some(Task { shape, packed: None });
                    }
                    offers.uniform = false;
                }
                AttentionPath::CudnnPacked => {
                    if let Some(packed) = layout.attention().packed(layout, || state.bounds.pick(&facts)) {
                        let shape = packed_shape(cfg, dtype, packed.bounds)?;
                        if self.usable(&mut state, gpu, &shape) {
                            return Some(Task { shape, packed: Some(packed) });
                        }
                    }
                    offers.packed = false;
                }
            }
        }
    }

    /// Whether cuDNN is there, takes this kind of attention and passed its self-test.
    fn usable(&self, state: &mut State, gpu: &Gpu, shape: &SdpaShape) -> bool {
        let State { library, kinds, .. } = state;
        let open = || {
            gpu.bind(OP).map_err(|error| error.to_string())?;
            Cudnn::open(self.capability as u32).map_err(|error| error.to_string())
        };
        let Ok(cudnn) = library.get_or_insert_with(open) else { return false };
        let test = || {
            let mut device = device::TestDevice::new(gpu);
            cudnn.self_test(&mut device, shape).map_err(|error| error.to_string())
        };
        kinds.entry(Kind::of(shape)).or_insert_with(test).is_ok() && cudnn.check(shape).is_ok()
    }

    /// Remembers why a call did not run. After a failure its kind does without cuDNN.
    fn note(&self, shape: &SdpaShape, failure: Failure) {
        const FEW: usize = 4;
        let State { kinds, refusals, .. } = &mut *self.state();
        match failure {
            // The path that runs instead may need less, and says so if not.
            Failure::Memory => {}
            Failure::Refused(error) => {
                let kind = if shape.packed { "packed batches of up to" } else { "batches of" };
                let refusal = format!("{kind} {} x {}: {error}", shape.batch, shape.seq);
                if refusals.len() < FEW && !refusals.contains(&refusal) {
                    refusals.push(refusal);
                }
            }
            Failure::Failed(error) => drop(kinds.insert(Kind::of(shape), Err(error))),
        }
    }

    fn library(&self) -> Result<Arc<Cudnn>> {
        match &self.state().library {
            Some(Ok(cudnn)) => Ok(cudnn.clone()),
            _ => Err(Error::invalid(OP, "cuDNN was not opened")),
        }
    }

    /// Opens the library and tests its packed attention, which most runs take, so that nothing waits for it later: about two
    /// seconds, which a thread can spend while the model is loaded. Attention over sequences of one length is tested where it
    /// is needed.
    pub fn prepare(&self, gpu: &Gpu, cfg: &AttentionConfig, dtype: Dtype) {
        if !self.enabled() || gpu.deterministic() || !super::attention::takes(cfg, dtype) {
            return;
        }
        if let Some(shape) = packed_shape(cfg, dtype, Bounds::around(1, 128)) {
            self.usable(&mut self.state(), gpu, &shape);
        }
    }

    /// Bytes of workspace that cuDNN takes for batches of at most so many tokens, where it may run: of sequences that all
    /// have `uniform_len` tokens, or of any. Announces them, too.
    pub(super) fn workspace(
        &self,
        gpu: &Gpu,
        cfg: &AttentionConfig,
        dtype: Dtype,
        tokens: usize,
        sequences: usize,
        uniform_len: Option<usize>,
    ) -> [u64; 2] {
        let longest = uniform_len.unwrap_or(tokens / sequences.max(1)) as f64;
        let mut most = [0, 0];
        if !self.enabled() || longest < route::PACKED_FROM.min(route::UNIFORM_FROM) || tokens == 0 {
            return most;
        }
        let mut also = |bytes: [u64; 2]| most = [most[0].max(bytes[0]), most[1].max(bytes[1])];
        let mut state = self.state();
        // Not lengths of single documents that look met by chance.
        let chosen = |len: usize| len as f64 >= route::UNIFORM_FROM && (sequences > 1 || len.is_multiple_of(128));
        let chosen = uniform_len.filter(|&len| chosen(len));
        let uniform = chosen.and_then(|len| uniform_shape(cfg, dtype, sequences, len));
        let uniform = uniform.filter(|shape| self.usable(&mut state, gpu, shape));
        if let Some((shape, len)) = uniform.zip(chosen) {
            state.admission.announce([sequences, len]);
            // Where there is no plan, our own kernels are going to run.
            if let Some(Ok(cudnn)) = &state.library {
                also(launch::uniform_workspace(cudnn, &shape).unwrap_or_default());
            }
        }
        // One sequence a batch: the others are shorter than this longest one, most likely.
        if uniform.is_none() || sequences == 1 {
            let bounds = match uniform_len {
                Some(len) => Bounds::around(sequences, len),
                // Nobody knows the sequences yet. Their number plays no part here.
                None => Bounds { sequences: 1, len: route::most_rows(tokens) },
            };
            let shape = packed_shape(cfg, dtype, Bounds::around(1, 128));
            if shape.is_some_and(|shape| self.usable(&mut state, gpu, &shape)) {
                if uniform_len.is_none() {
                    state.bounds.expect(tokens);
                }
                let dq_stride = (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim + MARGIN;
                also(launch::packed_workspace(cfg, bounds.rows(), tokens, dq_stride));
            }
        }
        most
    }
}

impl std::fmt::Debug for AttentionLibrary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AttentionLibrary({})", self.describe())
    }
}

fn sdpa_type(dtype: Dtype) -> Option<SdpaType> {
    match dtype {
        Dtype::Bf16 => Some(SdpaType::Bf16),
        Dtype::F16 => Some(SdpaType::F16),
        Dtype::F32 => None,
    }
}

fn uniform_shape(cfg: &AttentionConfig, dtype: Dtype, sequences: usize, len: usize) -> Option<SdpaShape> {
    Some(SdpaShape {
        batch: sequences as i64,
        seq: len as i64,
        heads: cfg.heads as i64,
        kv_heads: cfg.kv_heads as i64,
        head_dim: cfg.head_dim as i64,
        dtype: sdpa_type(dtype)?,
        packed: false,
        deterministic: false,
    })
}

fn packed_shape(cfg: &AttentionConfig, dtype: Dtype, bounds: Bounds) -> Option<SdpaShape> {
    Some(SdpaShape { packed: true, ..uniform_shape(cfg, dtype, bounds.sequences, bounds.len)? })
}

impl Task<'_> {
    /// The path that it is.
    pub(super) fn path(&self) -> AttentionPath {
        if self.packed.is_some() { AttentionPath::CudnnPacked } else { AttentionPath::CudnnUniform }
    }

    /// Sequences of one length whose forward cuDNN has run.
    pub(super) fn after_uniform_forward(cfg: &AttentionConfig, dtype: Dtype, layout: &SequenceLayout) -> Option<Self> {
        let facts = BatchFacts::of(layout);
        let shape = uniform_shape(cfg, dtype, facts.sequences, facts.longest)?;
        facts.uniform.then_some(Task { shape, packed: None })
    }

    /// Whether cuDNN ran it; if not, all of `out` and `lse` are to be written by another path.
    pub(super) fn forward(self, cfg: &AttentionConfig, inputs: [CudaView; 3], out: CudaView, lse: CudaView) -> bool {
        let library = out.gpu().attention();
        let run = || launch::forward(&*library.library()?, self, cfg, inputs, out, lse);
        self.done(library, run())
    }

    /// Whether cuDNN ran it; if not, all gradients are to be written by another path.
    pub(super) fn backward(self, cfg: &AttentionConfig, inputs: [CudaView; 6], gradients: [CudaView; 3]) -> bool {
        let library = gradients[0].gpu().attention();
        let run = || launch::backward(&*library.library()?, self, cfg, inputs, gradients);
        self.done(library, run())
    }

    fn done(&self, library: &AttentionLibrary, outcome: std::result::Result<(), Failure>) -> bool {
        let ran = outcome.is_ok();
        match outcome {
            Ok(()) => library.called(self.path()),
            Err(failure) => library.note(&self.shape, failure),
        }
        ran
    }
}
