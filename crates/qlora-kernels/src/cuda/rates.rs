//! The driver's description of a GPU, and its speed in a measurement of some 50 ms: for plans.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::buffer::{Buffer, PinnedBuffer};
use super::gpu::{Gpu, cuda_error};
use crate::dtype::Dtype;
use crate::error::Result;
use crate::matrix::Workspace;
use crate::ops::matmul;

const OP: &str = "measuring rates";
/// A product of this size keeps every GPU busy: 137 GFLOP, 0.2 ms on an H100, 5 ms on a T4.
const SIDE: usize = 4096;
/// Copied on the device: larger than every cache.
const COPIED: usize = 256 << 20;
/// Copied from the host: 5 ms over the slowest usual link.
const PINNED: usize = 32 << 20;
/// The best of so many; the first only warms up.
const TIMES: usize = 4;

/// The driver's description of a GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct DeviceFacts {
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// Multiprocessors.
    pub processors: u32,
    /// Their clock, in Hz.
    pub clock: f64,
    /// Bytes a second to its memory, by that memory's clock and bus.
    pub bandwidth: f64,
    /// Bytes of memory.
    pub memory: u64,
}

/// The measured throughput of a GPU, in operations and bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct DeviceRates {
    /// Operations in a large 16-bit product.
    pub products: f64,
    /// Bytes read and written by a large copy.
    pub memory: f64,
    /// Bytes copied from page-locked memory of the host.
    pub host: f64,
}

impl Gpu {
    /// The driver's description of this GPU.
    ///
    /// # Errors
    /// If the driver fails.
    pub fn facts(&self) -> Result<DeviceFacts> {
        use sys::CUdevice_attribute as Attribute;
        let stream = self.stream();
        let context = stream.context();
        let number = |attribute| context.attribute(attribute).map(f64::from).map_err(|error| cuda_error(OP, error));
        let (major, minor) = context.compute_capability().map_err(|error| cuda_error(OP, error))?;
        let memory = context.total_mem().map_err(|error| cuda_error(OP, error))? as u64;
        let processors = number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let clock = 1e3 * number(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        // Two transfers a clock; bits to bytes.
        let memory_clock = 1e3 * number(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bandwidth = 2.0 * memory_clock * number(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)? / 8.0;
        let compute_capability = (major as u32, minor as u32);
        Ok(DeviceFacts { compute_capability, processors, clock, bandwidth, memory })
    }

    /// Measures this GPU with a product, a copy on it and copies from the host, each the best of three, in about 50 ms and with
    /// 370 MB of its memory, which go back to the system. Measured once: later calls give what the first found, so that plans of one
    /// process agree.
    ///
    /// # Errors
    /// If there is not so much memory, or the device fails.
    pub fn measure_rates(self: &Arc<Self>) -> Result<DeviceRates> {
        if let Some(rates) = self.measured().get() {
            return Ok(*rates);
        }
        let before = self.pool().peak()?;
        let rates = self.measure();
        self.synchronize(OP)?;
        self.pool().trim()?;
        self.pool().restore_peak(before)?;
        let rates = rates?;
        Ok(*self.measured().get_or_init(|| rates))
    }

    fn measure(self: &Arc<Self>) -> Result<DeviceRates> {
        let bf16 = self.limits().has_bf16();
        let workspace = Workspace::with_dtype(&self.device(), if bf16 { Dtype::Bf16 } else { Dtype::F16 })?;
        let (a, b) = (workspace.zeros(SIDE, SIDE)?, workspace.zeros(SIDE, SIDE)?);
        let mut c = workspace.matrix(SIDE, SIDE)?;
        let product = self.best(|| matmul::nt(a.view(), b.view(), c.view_mut(), 1.0, 0.0))?;

        let (from, to) = (Buffer::new(self, OP, COPIED / 2)?, Buffer::new(self, OP, COPIED / 2)?);
        let stream = self.stream().clone();
        let copy = self.best(|| {
            // SAFETY: both have so many bytes and live until the stream is synchronized.
            unsafe { result::memcpy_dtod_async(to.ptr(), from.ptr(), COPIED / 2, stream.cu_stream()) }
                .map_err(|error| cuda_error(OP, error))
        })?;

        let host = PinnedBuffer::new(self, OP, PINNED)?;
        let upload = self.best(|| {
            // SAFETY: as above; the host's memory lives until then too.
            unsafe { result::memcpy_htod_async(to.ptr(), host.as_bytes(), stream.cu_stream()) }
                .map_err(|error| cuda_error(OP, error))
        })?;
        let operations = 2.0 * (SIDE as f64).powi(3);
        Ok(DeviceRates { products: operations / product, memory: COPIED as f64 / copy, host: PINNED as f64 / upload })
    }

    /// Seconds of the fastest run of `work` but the first.
    fn best(&self, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
        self.time(&mut work)?;
        let mut least = f64::INFINITY;
        for _ in 1..TIMES {
            least = least.min(self.time(&mut work)? / 1e3);
        }
        Ok(least)
    }
}
