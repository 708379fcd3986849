//! Host memory that is used again: a training step allocates the same few dozen shapes over and over.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Vectors of elements, by best fit.
#[derive(Default)]
pub(super) struct Pool {
    /// Whether buffers are filled with NaN when they are handed out.
    poison: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: Vec<Vec<f32>>,
    /// Elements now in matrices.
    live: usize,
    /// Elements now in `free`.
    idle: usize,
    /// The largest `live` so far.
    peak: usize,
}

impl Pool {
    pub(super) fn new(poison: bool) -> Self {
        Self { poison, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock was held cannot leave the lists in a state that is unsafe to use.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many elements, of unspecified but initialized content.
    pub(super) fn take(&self, len: usize) -> Vec<f32> {
        let mut data = self.find(len);
        if self.poison {
            data.fill(f32::NAN);
        }
        data
    }

    fn find(&self, len: usize) -> Vec<f32> {
        let mut state = self.lock();
        state.live += len;
        state.peak = state.peak.max(state.live);
        // Best fit, but not more than twice what is asked: sequences differ in length from step to step.
        let fits = |data: &Vec<f32>| data.capacity() >= len && data.capacity() <= 2 * len.max(1024);
        let best = (0..state.free.len()).filter(|&i| fits(&state.free[i])).min_by_key(|&i| state.free[i].capacity());
        if let Some(index) = best {
            let mut data = state.free.swap_remove(index);
            state.idle -= data.capacity();
            data.resize(len, 0.0);
            return data;
        }
        // Nothing fits. Keep what is idle below what is in use, or changing shapes would pile up memory.
        while state.idle > state.live {
            let Some(dropped) = state.free.pop() else { break };
            state.idle -= dropped.capacity();
        }
        drop(state);
        vec![0.0; len]
    }

    /// Takes back a buffer that was handed out.
    pub(super) fn give(&self, data: Vec<f32>) {
        let mut state = self.lock();
        state.live -= data.len();
        state.idle += data.capacity();
        state.free.push(data);
    }

    /// So many elements that were handed out do not come back.
    pub(super) fn leave(&self, len: usize) {
        self.lock().live -= len;
    }

    /// Gives idle memory back to the operating system.
    pub(super) fn trim(&self) {
        let mut state = self.lock();
        state.free.clear();
        state.idle = 0;
    }

    /// Elements in use and idle.
    pub(super) fn live_and_idle(&self) -> (usize, usize) {
        let state = self.lock();
        (state.live, state.idle)
    }

    /// The most elements that were in use at one time.
    pub(super) fn peak(&self) -> usize {
        self.lock().peak
    }
}
