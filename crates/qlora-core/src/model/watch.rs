//! Statistics of the projections' inputs, summed up: an importance matrix is made of them.

use std::sync::{Mutex, PoisonError};

use qlora_kernels::View;

use crate::error::Result;

/// Sums of the squares of a projection's inputs, a column.
#[derive(Debug)]
pub(crate) struct InputSquares {
    sums: Mutex<(Vec<f64>, u64)>,
}

impl InputSquares {
    pub(super) fn new(columns: usize) -> Self {
        Self { sums: Mutex::new((vec![0.0; columns], 0)) }
    }

    /// Adds rows of inputs in host memory.
    pub(super) fn add(&self, x: View) -> Result<()> {
        let (values, mut sums) = (x.to_vec()?, self.sums.lock().unwrap_or_else(PoisonError::into_inner));
        for row in values.chunks_exact(x.cols().max(1)) {
            sums.0.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
        }
        sums.1 += x.rows() as u64;
        Ok(())
    }

    /// The mean square of every column.
    pub(crate) fn means(&self) -> Vec<f32> {
        let sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.0.iter().map(|sum| (sum / sums.1.max(1) as f64) as f32).collect()
    }
}
