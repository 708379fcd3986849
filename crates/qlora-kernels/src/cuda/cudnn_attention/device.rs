//! The device as cuDNN's self-test uses it.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::result;

use super::OP;
use crate::cuda::buffer::Buffer;
use crate::cuda::cudnn::SelfTestDevice;
use crate::cuda::gpu::Gpu;
use crate::cuda::step_memory::lasting;

/// Its memory is freed with it.
pub(super) struct TestDevice {
    gpu: Arc<Gpu>,
    buffers: Vec<Buffer>,
}

impl TestDevice {
    pub(super) fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.arc(), buffers: Vec::new() }
    }
}

impl SelfTestDevice for TestDevice {
    fn stream(&self) -> *mut c_void {
        self.gpu.stream().cu_stream().cast()
    }

    fn allocate(&mut self, bytes: usize) -> std::result::Result<u64, String> {
        let buffer = lasting(|| Buffer::new(&self.gpu, OP, bytes)).map_err(|error| error.to_string())?;
        let ptr = buffer.ptr();
        self.buffers.push(buffer);
        Ok(ptr)
    }

    fn upload(&mut self, address: u64, bytes: &[u8]) -> std::result::Result<(), String> {
        self.gpu.bind(OP).map_err(|error| error.to_string())?;
        // SAFETY: the address was given out by `allocate` for at least so many bytes.
        unsafe { result::memcpy_htod_async(address, bytes, self.gpu.stream().cu_stream()) }
            .map_err(|error| format!("{error:?}"))
    }

    fn download(&mut self, address: u64, bytes: &mut [u8]) -> std::result::Result<(), String> {
        self.gpu.bind(OP).map_err(|error| error.to_string())?;
        // SAFETY: as above; synchronized before the bytes are read.
        unsafe { result::memcpy_dtoh_async(bytes, address, self.gpu.stream().cu_stream()) }
            .map_err(|error| format!("{error:?}"))?;
        self.gpu.synchronize(OP).map_err(|error| error.to_string())
    }
}
