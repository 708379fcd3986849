//! Between candle tensors and views, without copies.

use std::cell::RefCell;
use std::ops::Deref;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Shape, Storage, Tensor, op::BackpropOp};

use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::view::{View, ViewMut};

/// A read lock on a tensor's storage, from which a [`View`] is borrowed.
///
/// The lock is not recursive: do not run candle operations on the same tensor while it is held.
pub struct TensorView<'a> {
    // Boxed because candle does not name the guard's type in its public interface.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    op: &'static str,
    offset: usize,
    rows: usize,
    cols: usize,
    #[cfg(feature = "cuda")]
    gpu: Option<std::sync::Arc<crate::cuda::Gpu>>,
}

impl<'a> TensorView<'a> {
    /// A contiguous tensor seen as `[product of the leading dimensions, last dimension]`: f32 on the CPU, f32, bf16 or
    /// f16 on a GPU.
    ///
    /// # Errors
    /// If the tensor is on a device that the operations do not run on, has another dtype or is not contiguous; the error
    /// names `op`.
    pub fn new(op: &'static str, tensor: &'a Tensor) -> Result<Self> {
        let cols = tensor.dims().last().copied().unwrap_or(1);
        let rows = tensor.elem_count().checked_div(cols).unwrap_or(0);
        #[cfg(feature = "cuda")]
        let gpu = match tensor.device() {
            Device::Cuda(_) => Some(crate::cuda::Gpu::of(tensor.device())?),
            _ => None,
        };
        let (storage, layout) = tensor.storage_and_layout();
        let Some((offset, _)) = layout.contiguous_offsets() else {
            return Err(Error::invalid(op, format!("a tensor of shape {:?} is not contiguous", tensor.dims())));
        };
        let supported = match &*storage {
            Storage::Cpu(CpuStorage::F32(_)) => true,
            Storage::Cpu(_) => false,
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => slice::dtype(storage).is_some(),
            _ => return Err(Error::Device { op, device: device_name(tensor.device()) }),
        };
        if !supported {
            return Err(Error::invalid(op, format!("expects f32 tensors, got {:?}", tensor.dtype())));
        }
        Ok(Self {
            storage: Box::new(storage),
            op,
            offset,
            rows,
            cols,
            #[cfg(feature = "cuda")]
            gpu,
        })
    }

    /// The elements of a CPU tensor, row by row.
    ///
    /// # Errors
    /// If the tensor is on a GPU.
    pub fn as_slice(&self) -> Result<&[f32]> {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => Ok(&data[self.offset..self.offset + self.rows * self.cols]),
            _ => Err(Error::Device { op: self.op, device: "a GPU".to_owned() }),
        }
    }

    /// The whole tensor.
    pub fn view(&self) -> View<'_> {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => {
                View::new(&data[self.offset..self.offset + self.rows * self.cols], self.rows, self.cols)
            }
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => {
                let gpu = self.gpu.as_deref().expect("set in new");
                slice::view(gpu, storage, self.offset, self.rows, self.cols)
            }
            _ => unreachable!("checked in new"),
        }
    }
}

/// A tensor on a GPU whose memory recorded launches may use ([`Gpu::capture`](crate::cuda::Gpu::capture)): they keep it.
#[cfg(feature = "cuda")]
#[derive(Clone, Debug)]
pub struct DeviceTensor {
    _tensor: Tensor,
    range: std::ops::Range<u64>,
}

#[cfg(feature = "cuda")]
impl DeviceTensor {
    /// Takes the tensor's lock for a moment: not while a [`TensorView`] of it is held.
    ///
    /// # Errors
    /// As [`TensorView::new`], or if the tensor is on the CPU.
    pub fn new(op: &'static str, tensor: &Tensor) -> Result<Self> {
        let view = TensorView::new(op, tensor)?;
        let window = view.view().cuda(op)?;
        let start = window.ptr();
        let bytes = (window.rows() * window.cols() * window.dtype().size()) as u64;
        drop(view);
        Ok(Self { _tensor: tensor.clone(), range: start..start + bytes })
    }

    /// Its addresses.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.range.clone()
    }
}

/// Access to the device memory behind candle's CUDA storage.
#[cfg(feature = "cuda")]
mod slice {
    use candle_core::CudaStorage;
    use candle_core::cuda_backend::CudaStorageSlice as Slice;
    use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};

    use crate::cuda::{Buffer, CudaView, CudaViewMut, Gpu};
    use crate::dtype::Dtype;
    use crate::view::{View, ViewMut};

    pub(super) fn dtype(storage: &CudaStorage) -> Option<Dtype> {
        match &storage.slice {
            Slice::F32(_) => Some(Dtype::F32),
            Slice::BF16(_) => Some(Dtype::Bf16),
            Slice::F16(_) => Some(Dtype::F16),
            _ => None,
        }
    }

    fn address<T>(slice: &CudaSlice<T>, gpu: &Gpu) -> u64 {
        // Without event tracking the guard has nothing to record; all work is on the one stream.
        slice.device_ptr(gpu.stream_at_rest()).0
    }

    fn start(gpu: &Gpu, storage: &CudaStorage, offset: usize) -> (u64, Dtype) {
        let dtype = dtype(storage).expect("checked by the caller");
        let ptr = match &storage.slice {
            Slice::F32(slice) => address(slice, gpu),
            Slice::BF16(slice) => address(slice, gpu),
            Slice::F16(slice) => address(slice, gpu),
            _ => unreachable!("checked by dtype"),
        };
        (ptr + (offset * dtype.size()) as u64, dtype)
    }

    pub(super) fn view<'a>(
        gpu: &'a Gpu,
        storage: &'a CudaStorage,
        offset: usize,
        rows: usize,
        cols: usize,
    ) -> View<'a> {
        let (ptr, dtype) = start(gpu, storage, offset);
        // SAFETY: candle's layout says that so many elements follow the offset; the storage is borrowed for 'a.
        unsafe { CudaView::from_raw(gpu, ptr, dtype, [rows, cols], cols, 0) }.of_candle().into()
    }

    pub(super) fn view_mut<'a>(
        gpu: &'a Gpu,
        storage: &'a mut CudaStorage,
        offset: usize,
        rows: usize,
        cols: usize,
    ) -> ViewMut<'a> {
        let (ptr, dtype) = start(gpu, storage, offset);
        // SAFETY: as above; the storage is borrowed mutably for 'a.
        unsafe { CudaViewMut::from_raw(gpu, ptr, dtype, [rows, cols], cols, 0) }.of_candle().into()
    }

    /// candle's storage around our memory: it is freed on the same stream.
    pub(super) fn wrap(buffer: Buffer, dtype: Dtype, len: usize) -> CudaStorage {
        let gpu = buffer.gpu().clone();
        let ptr = buffer.into_ptr();
        let stream = gpu.stream();
        let device = gpu.candle().clone();
        // SAFETY: the memory was allocated on this stream, has `len` elements of the type, and is given up here.
        let slice = unsafe {
            match dtype {
                Dtype::F32 => Slice::F32(stream.upgrade_device_ptr(ptr, len)),
                Dtype::Bf16 => Slice::BF16(stream.upgrade_device_ptr(ptr, len)),
                Dtype::F16 => Slice::F16(stream.upgrade_device_ptr(ptr, len)),
            }
        };
        CudaStorage { slice, device }
    }
}

impl Matrix {
    /// Turns the matrix into a candle tensor of `shape` (same number of elements); nothing is copied.
    ///
    /// # Errors
    /// If the number of elements differs, or the matrix has a margin.
    pub fn into_tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        Error::check_shape("into_tensor", "the matrix", &[self.rows() * self.cols()], &[shape.elem_count()])?;
        #[cfg(feature = "cuda")]
        let this = match self.into_buffer() {
            Ok((buffer, dtype)) => {
                let storage = Storage::Cuda(slice::wrap(buffer, dtype, shape.elem_count()));
                return Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false));
            }
            Err(this) => this,
        };
        #[cfg(not(feature = "cuda"))]
        let this = self;
        if this.margin() > 0 {
            return Err(Error::invalid("into_tensor", "the matrix has a margin"));
        }
        let storage = Storage::Cpu(this.into_storage(&shape)?);
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }

    /// The candle storage of a CPU tensor of `shape`: the result of a custom op's forward.
    pub fn into_storage(self, shape: &Shape) -> Result<CpuStorage> {
        Error::check_shape("into_storage", "the matrix", &[self.rows() * self.cols()], &[shape.elem_count()])?;
        Ok(CpuStorage::F32(self.into_vec()))
    }

    /// The candle storage of a GPU tensor of `shape`: the result of a custom op's forward.
    #[cfg(feature = "cuda")]
    pub fn into_cuda_storage(self, shape: &Shape) -> Result<CudaStorage> {
        const OP: &str = "into_storage";
        Error::check_shape(OP, "the matrix", &[self.rows() * self.cols()], &[shape.elem_count()])?;
        match self.into_buffer() {
            Ok((buffer, dtype)) => Ok(slice::wrap(buffer, dtype, shape.elem_count())),
            Err(_) => Err(Error::invalid(OP, "the matrix is on the CPU, or has a margin")),
        }
    }
}

/// The input of a custom op's forward as a matrix `[product of the leading dimensions, last dimension]`.
///
/// # Errors
/// If the storage is not contiguous f32; the error names `op`.
pub fn storage_view<'a>(op: &'static str, storage: &'a CpuStorage, layout: &Layout) -> Result<View<'a>> {
    let CpuStorage::F32(data) = storage else {
        return Err(Error::invalid(op, "expects f32 tensors"));
    };
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::invalid(op, format!("a tensor of shape {:?} is not contiguous", layout.dims())));
    };
    let cols = layout.dims().last().copied().unwrap_or(1);
    let rows = (end - start).checked_div(cols).unwrap_or(0);
    Ok(View::new(&data[start..end], rows, cols))
}

/// The input of a custom op's forward on a GPU: holds on to the GPU, so that views can be borrowed.
#[cfg(feature = "cuda")]
pub struct CudaStorageView<'a> {
    gpu: std::sync::Arc<crate::cuda::Gpu>,
    storage: &'a CudaStorage,
    offset: usize,
    rows: usize,
    cols: usize,
}

#[cfg(feature = "cuda")]
impl<'a> CudaStorageView<'a> {
    /// The storage seen as `[product of the leading dimensions, last dimension]`.
    ///
    /// # Errors
    /// If it is not contiguous f32, bf16 or f16; the error names `op`.
    pub fn new(op: &'static str, storage: &'a CudaStorage, layout: &Layout) -> Result<Self> {
        if slice::dtype(storage).is_none() {
            return Err(Error::invalid(op, "expects f32, bf16 or f16 tensors"));
        }
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::invalid(op, format!("a tensor of shape {:?} is not contiguous", layout.dims())));
        };
        let cols = layout.dims().last().copied().unwrap_or(1);
        let rows = (end - start).checked_div(cols).unwrap_or(0);
        let gpu = crate::cuda::Gpu::of(&Device::Cuda(storage.device.clone()))?;
        Ok(Self { gpu, storage, offset: start, rows, cols })
    }

    /// The whole storage.
    pub fn view(&self) -> View<'_> {
        slice::view(&self.gpu, self.storage, self.offset, self.rows, self.cols)
    }
}

/// Lets `update` write a contiguous tensor's elements where they are, as one row: an optimizer's step on a `Var`.
///
/// # Errors
/// If the tensor is on a device that the operations do not run on, has another dtype or is not contiguous (the error
/// names `op`), or whatever `update` returns.
pub fn update_in_place(op: &'static str, tensor: &Tensor, update: impl FnOnce(ViewMut) -> Result<()>) -> Result<()> {
    if tensor.device().is_metal() {
        return Err(Error::Device { op, device: device_name(tensor.device()) });
    }
    Ok(tensor.inplace_op1(&InPlace { op, update: RefCell::new(Some(update)) })?)
}

struct InPlace<F> {
    op: &'static str,
    update: RefCell<Option<F>>,
}

impl<F: FnOnce(ViewMut) -> Result<()>> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            return Err(Error::invalid(self.op, "expects a contiguous f32 tensor").into());
        };
        if let Some(update) = self.update.borrow_mut().take() {
            update(ViewMut::vector(&mut data[start..end]))?;
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let (Some(_), Some((start, end))) = (slice::dtype(storage), layout.contiguous_offsets()) else {
            return Err(Error::invalid(self.op, "expects a contiguous f32, bf16 or f16 tensor").into());
        };
        let gpu = crate::cuda::Gpu::of(&Device::Cuda(storage.device.clone()))?;
        if let Some(update) = self.update.borrow_mut().take() {
            update(slice::view_mut(&gpu, storage, start, 1, end - start))?;
        }
        Ok(())
    }
}

/// The device's name for messages.
pub fn device_name(device: &Device) -> String {
    format!("{:?}", device.location()).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn a_tensor_is_viewed_in_place() {
        let tensor = Tensor::arange(0f32, 24.0, &Device::Cpu).unwrap().reshape((2, 3, 4)).unwrap();
        let narrow = tensor.narrow(0, 1, 1).unwrap();
        let view = TensorView::new("test", &narrow).unwrap();
        assert_eq!(view.view().shape(), [3, 4]);
        assert_eq!(view.as_slice().unwrap()[0], 12.0);
    }

    #[test]
    fn what_cannot_be_viewed_says_why() {
        let tensor = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        assert!(TensorView::new("rms_norm", &tensor).err().unwrap().to_string().contains("rms_norm: expects f32"));
        let tensor = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap().t().unwrap();
        assert!(TensorView::new("rms_norm", &tensor).err().unwrap().to_string().contains("not contiguous"));
    }

    #[test]
    fn a_variable_is_updated_where_it_is() {
        let tensor = Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap();
        let alias = tensor.detach();
        update_in_place("test", &tensor, |data| {
            data.host("test")?.row_mut(0)[3] = 5.0;
            Ok(())
        })
        .unwrap();
        assert_eq!(alias.to_vec2::<f32>().unwrap(), [[0.0, 0.0], [0.0, 5.0]]);
        assert!(update_in_place("test", &tensor.t().unwrap(), |_| Ok(())).is_err());
    }

    #[test]
    fn a_matrix_becomes_a_tensor() {
        let tensor = Matrix::from_vec(vec![1.0, 2.0, 3.0, 4.0], 1, 4).into_tensor((2, 2)).unwrap();
        assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[1.0, 2.0], [3.0, 4.0]]);
    }
}
