//! Owned memory for activations and gradients, and the pool it comes from.

use std::fmt;
use std::sync::{Arc, Mutex};

use candle_core::Device;

use crate::error::{Error, Result};
use crate::view::{View, ViewMut};

/// `rows x cols` f32 elements, row-major. Its memory goes back to its [`Workspace`] when it is dropped.
pub struct Matrix {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    pool: Option<Arc<Pool>>,
}

/// Hands out [`Matrix`]es and takes their memory back for the next one.
///
/// A training step allocates the same few dozen shapes again and again; fresh pages from the operating system would
/// cost about a tenth of the matrix work. Cloning gives another handle to the same pool.
#[derive(Clone)]
pub struct Workspace {
    pool: Arc<Pool>,
}

struct Pool {
    poison: bool,
    state: Mutex<PoolState>,
}

#[derive(Default)]
struct PoolState {
    free: Vec<Vec<f32>>,
    /// Elements now in matrices.
    live: usize,
    /// Elements now in `free`.
    idle: usize,
    /// The largest `live` so far.
    peak: usize,
}

impl Workspace {
    /// A pool for `device`.
    ///
    /// # Errors
    /// If `device` is not the CPU.
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_poison(device, false)
    }

    /// A pool that fills every matrix it hands out with NaN, so that a result that was never written shows.
    pub fn poisoned() -> Self {
        Self::with_poison(&Device::Cpu, true).expect("the CPU is supported")
    }

    fn with_poison(device: &Device, poison: bool) -> Result<Self> {
        if !device.is_cpu() {
            return Err(Error::Device { op: "workspace", device: format!("{:?}", device.location()) });
        }
        Ok(Self { pool: Arc::new(Pool { poison, state: Mutex::default() }) })
    }

    /// `rows x cols` elements of unspecified (but initialized) content: for results that are written whole.
    pub fn matrix(&self, rows: usize, cols: usize) -> Matrix {
        let len = rows.checked_mul(cols).expect("matrix size overflows");
        let mut data = self.pool.take(len);
        if self.pool.poison {
            data.fill(f32::NAN);
        }
        Matrix { data, rows, cols, pool: Some(self.pool.clone()) }
    }

    /// `rows x cols` zeros.
    pub fn zeros(&self, rows: usize, cols: usize) -> Matrix {
        let mut matrix = self.matrix(rows, cols);
        matrix.data.fill(0.0);
        matrix
    }

    /// The most bytes that were in matrices of this pool at one time.
    pub fn peak_bytes(&self) -> usize {
        self.pool.lock().peak * size_of::<f32>()
    }

    /// Gives the memory that no matrix holds back to the operating system.
    pub fn trim(&self) {
        let mut state = self.pool.lock();
        state.free.clear();
        state.idle = 0;
    }
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, PoolState> {
        // A panic while the lock was held cannot leave the lists in a state that is unsafe to use.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn take(&self, len: usize) -> Vec<f32> {
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

    fn give(&self, data: Vec<f32>) {
        let mut state = self.lock();
        state.live -= data.len();
        state.idle += data.capacity();
        state.free.push(data);
    }
}

impl Matrix {
    /// Wraps elements that the caller made; they belong to no pool.
    ///
    /// # Panics
    /// If `data` does not have `rows * cols` elements.
    pub fn from_vec(data: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{} elements cannot be {rows} x {cols}", data.len());
        Self { data, rows, cols, pool: None }
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The whole matrix, readable.
    pub fn view(&self) -> View<'_> {
        View::new(&self.data, self.rows, self.cols)
    }

    /// The whole matrix, writable.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut::new(&mut self.data, self.rows, self.cols)
    }

    /// The elements, row by row.
    pub fn as_slice(&self) -> &[f32] {
        &self.data
    }

    /// The elements, row by row.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// The elements as a plain vector, which leaves the pool.
    pub fn into_vec(mut self) -> Vec<f32> {
        let data = std::mem::take(&mut self.data);
        if let Some(pool) = self.pool.take() {
            pool.lock().live -= data.len();
        }
        data
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.data.len() * size_of::<f32>()
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            pool.give(std::mem::take(&mut self.data));
        }
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} x {})", self.rows, self.cols)
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.pool.lock();
        write!(f, "Workspace({} elements live, {} idle)", state.live, state.idle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_and_counted() {
        let workspace = Workspace::new(&Device::Cpu).unwrap();
        let first = workspace.matrix(100, 100);
        let address = first.as_slice().as_ptr();
        drop(first);
        let second = workspace.matrix(99, 100);
        assert_eq!(second.as_slice().as_ptr(), address);
        let third = workspace.matrix(100, 100);
        assert_ne!(third.as_slice().as_ptr(), address);
        assert_eq!(workspace.peak_bytes(), (9_900 + 10_000) * 4);
    }

    #[test]
    fn idle_memory_stays_below_what_is_in_use() {
        let workspace = Workspace::new(&Device::Cpu).unwrap();
        for rows in (1..200).map(|i| i * 37) {
            drop(workspace.matrix(rows, 1000));
        }
        assert!(workspace.pool.lock().idle <= 2 * 200 * 37 * 1000);
    }

    #[test]
    fn a_poisoned_pool_shows_what_was_not_written() {
        assert!(Workspace::poisoned().matrix(2, 3).as_slice().iter().all(|x| x.is_nan()));
        assert!(Workspace::poisoned().zeros(2, 3).as_slice().iter().all(|&x| x == 0.0));
    }
}
