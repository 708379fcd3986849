//! A step of generation on a GPU as one CUDA graph.
//!
//! Every step enqueues the same few hundred kernels; only the tokens, the positions and the caches' addresses differ, and these
//! lie in device memory that is written before the step. So the first step with given sizes runs as usual, from memory that is
//! kept for the next; the second is recorded; from then on a step is one launch. Operations that cannot be recorded (weights
//! that are dequantized for the step, an adapter that needs a copy from the host in every step) run as usual.
//!
//! Where answers end and others begin, the number of sequences changes from step to step. It is rounded up, so that few
//! numbers occur ([`padded`]), and the graphs of the last ones are kept.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use qlora_kernels::cuda::decode::TableMemory;
use qlora_kernels::cuda::{Graph, StepMemory};
use qlora_kernels::tensor::DeviceTensor;
use qlora_kernels::weight::FrozenCompute;
use qlora_kernels::{Matrix, SequenceLayout};

use super::adapters::{Chosen, Span};
use super::block::Pass;
use super::cache::KvCache;
use super::causal_lm::CausalLm;
use super::decode::Step;
use super::stack::Rotation;
use crate::error::Result;

/// The most graphs that are kept: each has some hundred nodes, and logits of its own.
const MOST_GRAPHS: usize = 8;

/// The rows of a step for so many sequences. The kernels' tiles have 8 tokens at least, so that further rows cost little.
fn padded(sequences: usize) -> usize {
    if sequences <= 16 { sequences } else { sequences.next_multiple_of(8) }
}

/// The state of decoding that a model keeps between steps: CUDA graphs and their memory.
#[derive(Debug, Default)]
pub(super) struct DecodeSteps(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    // Before the memory that they were recorded with. The last one used is the first.
    recent: Vec<Recent>,
    memory: Option<StepMemory>,
    disabled: bool,
}

/// The key of an earlier step, and its recorded graph.
#[derive(Debug)]
struct Recent {
    key: Key,
    /// None before the step was seen twice, or if it cannot be recorded.
    recorded: Option<Recorded>,
    impossible: bool,
    table: TableMemory,
}

/// The parameters that determine the launches of a decode step; a recorded graph is valid for one key.
#[derive(Debug, PartialEq)]
struct Key {
    rows: usize,
    capacity: usize,
    rope: usize,
    peft_rounding: bool,
    frozen_compute: FrozenCompute,
    /// Which rows, and the address of their adapter's values.
    spans: Vec<(Range<usize>, usize)>,
}

#[derive(Debug)]
struct Recorded {
    graph: Graph,
    x: Matrix,
    logits: Matrix,
    /// Has the angles that the graph reads.
    _rope: Arc<Rotation>,
}

impl DecodeSteps {
    /// To be called when the model changes.
    pub(super) fn forget(&mut self) {
        let kept = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        kept.recent.clear();
        kept.memory = None;
    }
}

impl CausalLm {
    /// Whether steps of generation on a GPU run as one CUDA graph where they can (they do by default).
    pub fn set_decode_graph(&mut self, on: bool) {
        let kept = self.steps.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        kept.recent.clear();
        kept.memory = None;
        kept.disabled = !on;
    }

    /// Whether the last step of generation ran as a graph.
    pub fn runs_decode_graph(&self) -> bool {
        let kept = self.steps.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.recent.first().is_some_and(|last| last.recorded.is_some())
    }

    /// The logits after one new token of each sequence; none if the kernels for that do not take this model.
    pub(super) fn decode_step(
        &self,
        tokens: &[u32],
        caches: &mut [&mut KvCache],
        rope: &Arc<Rotation>,
        spans: &[Span],
    ) -> Result<Option<Matrix>> {
        let Some(gpu) = self.workspace().gpu() else { return Ok(None) };
        let (sequences, rows) = (tokens.len(), padded(tokens.len()));
        let mut tokens = tokens.to_vec();
        tokens.resize(rows, tokens.last().copied().unwrap_or_default());
        let mut spans = spans.to_vec();
        if let Some((last, _)) = spans.last_mut() {
            last.end = last.end.max(rows);
        }
        let (tokens, spans) = (&*tokens, &*spans);
        let layout = &SequenceLayout::from_lengths(&vec![1; rows]);
        // While another thread generates with this model, without what is kept.
        let mut own = Kept { disabled: true, ..Kept::default() };
        let mut shared = match self.steps.0.try_lock() {
            Ok(kept) => Some(kept),
            Err(TryLockError::Poisoned(kept)) => Some(kept.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let kept = shared.as_deref_mut().unwrap_or(&mut own);
        let trained = spans.iter().any(|(_, chosen)| matches!(chosen, Chosen::Trained));
        let adapter = self.adapter().filter(|_| trained);
        // Its gains lie in other memory after every step of a training, which a recording would go on reading. Trained rows of the
        // head are run as they stand.
        if adapter.is_some_and(|adapter| adapter.config().use_dora || !adapter.tables().is_empty()) {
            return Ok(None);
        }
        // The trained adapter's values are candle's memory, which a recording keeps.
        let values = adapter.map(|adapter| adapter.flat.as_tensor());
        let values = values.map(|values| DeviceTensor::new("decode", values)).transpose()?;
        let logits = self.with_pass(spans, |adapter| {
            let pass = Pass { adapter, layout, share: None, rope, workspace: self.workspace() };
            let table = kept.recent.iter().find(|recent| recent.key.rows == rows).map(|recent| recent.table.clone());
            let Some(mut step) = Step::new(self.stack(), caches, &pass, table)? else { return Ok(None) };
            let key = self.key(rows, step.tables.capacity(), rope, spans);
            let body = |step: &mut Step, x: Matrix| -> Result<Matrix> {
                let y = step.run(self.stack(), x, &pass)?;
                self.head_logits(&self.stack().infer_norm(&y, &pass)?, spans)
            };
            // Not from the memory of steps: the caller may keep it.
            let mut logits = self.workspace().matrix(sequences, self.config().vocab_size)?;
            let seen = kept.recent.iter().position(|recent| recent.key == key).map(|at| kept.recent.remove(at));
            let is_new = seen.is_none();
            let mut last = seen.unwrap_or_else(|| Recent {
                key,
                recorded: None,
                // A graph would not wait for weights that travel.
                impossible: kept.disabled || self.base.is_some(),
                table: step.tables.memory(),
            });
            let memory = kept.memory.get_or_insert_with(|| StepMemory::new(gpu)).clone();
            if !is_new && !last.impossible && last.recorded.is_none() {
                let x = self.workspace().matrix(rows, self.config().hidden_size)?;
                let _reuse = memory.reuse();
                let recorded = gpu.capture(values.as_slice(), || {
                    let mut start = self.workspace().matrix(x.rows(), x.cols())?;
                    start.view_mut().copy_from(x.view())?;
                    body(&mut step, start)
                })?;
                last.impossible = recorded.is_none();
                last.recorded = recorded.map(|(graph, logits)| Recorded { graph, x, logits, _rope: rope.clone() });
            }
            // A step that runs without a graph keeps no memory: it may be much where weights are dequantized in every
            // step.
            let _reuse = (!last.impossible).then(|| memory.reuse());
            if last.impossible && kept.recent.iter().all(|recent| recent.recorded.is_none()) {
                kept.memory = None;
            }
            let x = self.embed_with(tokens, spans)?;
            let mut launched = false;
            if let Some(recorded) = &mut last.recorded {
                recorded.x.view_mut().copy_from(x.view())?;
                launched = recorded.graph.launch()?;
                if launched {
                    logits.view_mut().copy_from(recorded.logits.view().slice_rows(0..sequences))?;
                }
            }
            if !launched {
                last.recorded = None;
                logits.view_mut().copy_from(body(&mut step, x)?.view().slice_rows(0..sequences))?;
            }
            kept.recent.insert(0, last);
            kept.recent.truncate(MOST_GRAPHS);
            Ok(Some(logits))
        })?;
        if logits.is_some() {
            caches.iter_mut().for_each(|cache| cache.advance(1));
        }
        Ok(logits)
    }

    fn key(&self, rows: usize, capacity: usize, rope: &Arc<Rotation>, spans: &[Span]) -> Key {
        let address = |chosen: &Chosen| match chosen {
            Chosen::Base => 0,
            Chosen::Trained => 1,
            Chosen::Loaded(adapter) => std::ptr::from_ref(*adapter).addr(),
        };
        let spans = spans.iter().map(|(rows, chosen)| (rows.clone(), address(chosen))).collect();
        let peft_rounding = self.workspace().gpu().is_some_and(|gpu| gpu.peft_rounding());
        Key {
            rows,
            capacity,
            rope: Arc::as_ptr(rope).addr(),
            peft_rounding,
            frozen_compute: self.frozen_compute(),
            spans,
        }
    }
}
