//! A share of the frozen base in the memory of one GPU, which the other processes of the host read directly.
//!
//! The memory is written once, while the base is loaded, and never again. So nobody has to be asked: a process copies what it needs
//! from the other GPU's memory by its own copy engine, over NVLink or PCIe, while both compute. CUDA can only show memory to other
//! processes that was not taken from a pool ([`Pool::beside`](super::Pool::beside) counts it).

use std::fmt;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::gpu::{Gpu, cuda_error};
use super::travel::PieceMemory;
use super::weight::CudaWeight;
use crate::error::{Error, Result};
use crate::weight::packed::PackedForm;

const OP: &str = "share of the base";

/// The bytes by which another process finds a share.
pub type ShareHandle = [u8; 64];

/// The weights that this process keeps for all.
pub struct BaseShare {
    memory: Arc<Own>,
    bytes: usize,
}

struct Own {
    ptr: sys::CUdeviceptr,
    bytes: usize,
    gpu: Arc<Gpu>,
}

/// The share of another process, readable from this GPU.
pub struct OtherShare {
    ptr: sys::CUdeviceptr,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl BaseShare {
    /// Memory for a share of `bytes` bytes.
    ///
    /// # Errors
    /// If the GPU, or the limit that was set, has not so much left.
    pub fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        gpu.bind(OP)?;
        // What the pool holds and nobody uses is not free for others.
        gpu.synchronize(OP)?;
        gpu.pool().trim()?;
        if bytes as u64 > gpu.pool().available()? {
            return Err(gpu.pool().out_of_memory(OP, bytes));
        }
        let mut ptr = 0;
        // SAFETY: a valid place for the result; freed in drop.
        match unsafe { sys::cuMemAlloc_v2(&raw mut ptr, bytes.max(1)) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(gpu.pool().out_of_memory(OP, bytes)),
            status => status.result().map_err(|error| cuda_error(OP, error))?,
        }
        gpu.pool().count_beside(bytes as u64, true);
        Ok(Self { memory: Arc::new(Own { ptr, bytes, gpu: gpu.clone() }), bytes })
    }

    /// The size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies a weight's piece to the bytes from `at` on.
    ///
    /// # Errors
    /// If the weight cannot travel or has no room there, or the device fails.
    pub fn place(&self, weight: &CudaWeight, at: usize) -> Result<()> {
        let (form, arrays) = weight.piece().ok_or_else(|| Error::invalid(OP, "a weight of integers cannot travel"))?;
        if at.checked_add(form.bytes()).is_none_or(|end| end > self.bytes) {
            return Err(Error::invalid(OP, format!("{} bytes from {at} on in {}", form.bytes(), self.bytes)));
        }
        let gpu = &self.memory.gpu;
        gpu.bind(OP)?;
        for (place, array) in form.arrays().into_iter().zip(arrays) {
            if array.bytes() != place.len() {
                return Err(Error::invalid(OP, format!("an array has {} bytes, not {}", array.bytes(), place.len())));
            }
            let to = self.memory.ptr + (at + place.start) as u64;
            // SAFETY: both sides have so many bytes, and the array lives at least as long as the stream's work so far.
            unsafe { result::memcpy_dtod_async(to, array.ptr(), place.len(), gpu.stream().cu_stream()) }
                .map_err(|error| cuda_error(OP, error))?;
        }
        Ok(())
    }

    /// The weight whose piece was placed at `at`: it is always there.
    pub fn weight(&self, form: &PackedForm, at: usize) -> CudaWeight {
        CudaWeight::of_piece(form, &self.piece_memory(), at, None)
    }

    fn piece_memory(&self) -> PieceMemory {
        let Own { ptr, bytes, gpu } = &*self.memory;
        PieceMemory { gpu: gpu.clone(), owner: self.memory.clone(), ptr: *ptr, bytes: *bytes }
    }

    /// What another process of this host opens the share with. Everything that was placed is there then.
    ///
    /// # Errors
    /// If the device fails, or cannot show its memory to others.
    pub fn handle(&self) -> Result<ShareHandle> {
        let gpu = &self.memory.gpu;
        gpu.synchronize(OP)?;
        gpu.bind(OP)?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: memory of `cuMemAlloc` that is alive, and a valid place for the result.
        unsafe { sys::cuIpcGetMemHandle(&raw mut handle, self.memory.ptr) }
            .result()
            .map_err(|error| cuda_error(OP, error))?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

impl OtherShare {
    /// Opens the share of another process of this host; `bytes` is its size there.
    ///
    /// # Errors
    /// If the GPUs cannot read each other's memory, or one of them is not visible here.
    pub fn open(gpu: &Arc<Gpu>, handle: &ShareHandle, bytes: usize) -> Result<Self> {
        gpu.bind(OP)?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as std::ffi::c_char) };
        let flags = sys::CUipcMem_flags_enum::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut ptr = 0;
        // SAFETY: a valid place for the result; closed in drop.
        let status = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut ptr, handle, flags) };
        status.result().map_err(|error| {
            Error::invalid(
                OP,
                format!(
                    "this GPU cannot read the other one's memory ({error}): all GPUs of the run must be visible to each rank \
                     (CUDA_VISIBLE_DEVICES) and reach each other (nvidia-smi topo -p2p r); base_placement = \"streamed\" needs \
                     neither"
                ),
            )
        })?;
        Ok(Self { ptr, bytes, gpu: gpu.clone() })
    }

    /// The address of `bytes` bytes from `at` on.
    pub(super) fn at(&self, at: usize, bytes: usize) -> Result<sys::CUdeviceptr> {
        match at.checked_add(bytes).is_some_and(|end| end <= self.bytes) {
            true => Ok(self.ptr + at as u64),
            false => Err(Error::invalid(OP, format!("{bytes} bytes from {at} on in {} of another GPU", self.bytes))),
        }
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = self.gpu.bind(OP);
        let _ = self.gpu.synchronize(OP);
        // SAFETY: allocated by `new`, freed once, behind everything that was enqueued.
        let _ = unsafe { sys::cuMemFree_v2(self.ptr) };
        self.gpu.pool().count_beside(self.bytes as u64, false);
    }
}

impl Drop for OtherShare {
    fn drop(&mut self) {
        let _ = self.gpu.bind(OP);
        // SAFETY: opened by `open`, closed once; the ring that copies from it has waited for its copies.
        let _ = unsafe { sys::cuIpcCloseMemHandle(self.ptr) };
    }
}

impl fmt::Debug for BaseShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BaseShare({} bytes)", self.bytes)
    }
}

impl fmt::Debug for OtherShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OtherShare({} bytes)", self.bytes)
    }
}
