//! Between candle tensors and views, without copies.

use std::ops::Deref;

use std::cell::RefCell;

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Shape, Storage, Tensor, op::BackpropOp};

use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::view::View;

/// A read lock on a tensor's storage, from which a [`View`] is borrowed.
///
/// The lock is not recursive: do not run candle operations on the same tensor while it is held.
pub struct TensorView<'a> {
    // Boxed because candle does not name the guard's type in its public interface.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    offset: usize,
    rows: usize,
    cols: usize,
}

impl<'a> TensorView<'a> {
    /// A contiguous f32 CPU tensor seen as `[product of the leading dimensions, last dimension]`.
    ///
    /// # Errors
    /// If the tensor is on another device, has another dtype or is not contiguous; the error names `op`.
    pub fn new(op: &'static str, tensor: &'a Tensor) -> Result<Self> {
        if !tensor.device().is_cpu() {
            return Err(Error::Device { op, device: device_name(tensor.device()) });
        }
        let cols = tensor.dims().last().copied().unwrap_or(1);
        let rows = tensor.elem_count().checked_div(cols).unwrap_or(0);
        let (storage, layout) = tensor.storage_and_layout();
        let Some((offset, _)) = layout.contiguous_offsets() else {
            return Err(Error::invalid(op, format!("a tensor of shape {:?} is not contiguous", tensor.dims())));
        };
        if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
            return Err(Error::invalid(op, format!("expects f32 tensors, got {:?}", tensor.dtype())));
        }
        Ok(Self { storage: Box::new(storage), offset, rows, cols })
    }

    /// The elements, row by row.
    pub fn as_slice(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.offset..self.offset + self.rows * self.cols],
            _ => unreachable!("checked in new"),
        }
    }

    /// The whole tensor.
    pub fn view(&self) -> View<'_> {
        View::new(self.as_slice(), self.rows, self.cols)
    }
}

impl Matrix {
    /// Turns the matrix into a candle tensor of `shape` (same number of elements); nothing is copied.
    pub fn into_tensor(self, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let storage = Storage::Cpu(self.into_storage(&shape)?);
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }

    /// The candle storage of a tensor of `shape`: what a custom op's forward returns.
    pub fn into_storage(self, shape: &Shape) -> Result<CpuStorage> {
        Error::check_shape("into_storage", "the matrix", &[self.rows() * self.cols()], &[shape.elem_count()])?;
        Ok(CpuStorage::F32(self.into_vec()))
    }
}

/// What a custom op's forward is given, seen as `[product of the leading dimensions, last dimension]`.
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

/// Lets `update` write a contiguous f32 CPU tensor's elements where they are: an optimizer's step on a `Var`.
///
/// # Errors
/// If the tensor is on another device, has another dtype or is not contiguous; the error names `op`.
pub fn update_in_place(op: &'static str, tensor: &Tensor, update: impl FnOnce(&mut [f32])) -> Result<()> {
    if !tensor.device().is_cpu() {
        return Err(Error::Device { op, device: device_name(tensor.device()) });
    }
    Ok(tensor.inplace_op1(&InPlace { op, update: RefCell::new(Some(update)) })?)
}

struct InPlace<F> {
    op: &'static str,
    update: RefCell<Option<F>>,
}

impl<F: FnOnce(&mut [f32])> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            return Err(Error::invalid(self.op, "expects a contiguous f32 tensor").into());
        };
        if let Some(update) = self.update.borrow_mut().take() {
            update(&mut data[start..end]);
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
        assert_eq!(view.as_slice()[0], 12.0);
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
        update_in_place("test", &tensor, |data| data[3] = 5.0).unwrap();
        assert_eq!(alias.to_vec2::<f32>().unwrap(), [[0.0, 0.0], [0.0, 5.0]]);
        assert!(update_in_place("test", &tensor.t().unwrap(), |_| ()).is_err());
    }

    #[test]
    fn a_matrix_becomes_a_tensor() {
        let tensor = Matrix::from_vec(vec![1.0, 2.0, 3.0, 4.0], 1, 4).into_tensor((2, 2)).unwrap();
        assert_eq!(tensor.to_vec2::<f32>().unwrap(), [[1.0, 2.0], [3.0, 4.0]]);
    }
}
