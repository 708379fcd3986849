//! A profile of the GPU's time: an event before and after every launch while a profile is taken, summed by operation.
//!
//! Costs a few microseconds a launch while it runs and one atomic load otherwise.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::gpu::{Gpu, cuda_error};
use crate::error::Result;

/// The time of one kind of operation.
#[derive(Clone, Debug, PartialEq)]
pub struct ProfileEntry {
    /// The operation. Matrix products have the kind and, after it, the sizes.
    pub op: String,
    /// Launches.
    pub calls: usize,
    /// Milliseconds on the GPU's clock, in all.
    pub ms: f64,
}

/// The launches of the profile that is being taken.
#[derive(Debug, Default)]
pub(super) struct Profiler {
    on: AtomicBool,
    spans: Mutex<Vec<Span>>,
}

#[derive(Debug)]
struct Span {
    op: String,
    start: Event,
    end: Event,
}

#[derive(Debug)]
struct Event(sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `Gpu::event`, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Takes a profile until it is dropped.
struct Taking<'a>(&'a Profiler);

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        self.0.on.store(false, Ordering::Relaxed);
    }
}

impl Gpu {
    fn event(&self, op: &'static str) -> Result<Event> {
        let event =
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|error| cuda_error(op, error))?;
        let event = Event(event);
        // SAFETY: both are alive.
        unsafe { result::event::record(event.0, self.stream().cu_stream()) }.map_err(|error| cuda_error(op, error))?;
        Ok(event)
    }

    /// Enqueues something; while a profile is taken, between two events. `label` is asked for only then.
    pub(super) fn span<T>(
        &self,
        op: &'static str,
        label: impl FnOnce() -> String,
        enqueue: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if !self.profiler().on.load(Ordering::Relaxed) {
            return enqueue();
        }
        let start = self.event(op)?;
        let value = enqueue()?;
        let span = Span { op: label(), start, end: self.event(op)? };
        self.profiler().spans.lock().unwrap_or_else(PoisonError::into_inner).push(span);
        Ok(value)
    }

    /// Runs `work` and returns the times of its launches, the longest first: one profile at a time. For the rest of
    /// the work's time the GPU waited.
    ///
    /// # Errors
    /// The error of `work`, or a failure of the device.
    pub fn profile(&self, work: impl FnOnce() -> Result<()>) -> Result<Vec<ProfileEntry>> {
        const OP: &str = "profile";
        let profiler = self.profiler();
        self.bind(OP)?;
        profiler.on.store(true, Ordering::Relaxed);
        let taking = Taking(profiler);
        let done = work();
        drop(taking);
        let spans = std::mem::take(&mut *profiler.spans.lock().unwrap_or_else(PoisonError::into_inner));
        done?;
        self.synchronize(OP)?;
        let mut sums: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
        for Span { op, start, end } in &spans {
            // SAFETY: both events are alive and have happened.
            let ms = unsafe { result::event::elapsed(start.0, end.0) }.map_err(|error| cuda_error(OP, error))?;
            let sum = sums.entry(op).or_default();
            *sum = (sum.0 + 1, sum.1 + f64::from(ms));
        }
        let entry =
            |(op, (calls, ms)): (&&str, &(usize, f64))| ProfileEntry { op: (*op).to_owned(), calls: *calls, ms: *ms };
        let mut entries: Vec<ProfileEntry> = sums.iter().map(entry).collect();
        entries.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        Ok(entries)
    }
}
