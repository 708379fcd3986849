//! Windows into device memory.

use std::marker::PhantomData;
use std::ops::Range;

use candle_core::cuda_backend::cudarc::driver::{result, sys};

use super::buffer::Buffer;
use super::gpu::{Gpu, cuda_error};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{HostView, check_reshape};

/// The CUDA representation of a [`crate::View`].
#[derive(Clone, Copy, Debug)]
pub struct CudaView<'a> {
    gpu: &'a Gpu,
    window: Window,
}

/// The CUDA representation of a [`crate::ViewMut`].
#[derive(Debug)]
pub struct CudaViewMut<'a> {
    gpu: &'a Gpu,
    window: Window,
    memory: PhantomData<&'a mut ()>,
}

/// Addresses and sizes of a window; the arithmetic that both kinds of view share.
#[derive(Clone, Copy, Debug)]
struct Window {
    ptr: sys::CUdeviceptr,
    dtype: Dtype,
    rows: usize,
    cols: usize,
    stride: usize,
    /// Columns after `cols` that belong to this window's rows alone and that operations may use for what goes along
    /// with the matrix (see `linear_group`).
    margin: usize,
    /// Whether the memory is candle's.
    foreign: bool,
}

/// An error unless everything is on `gpu`: its kernels run on its one stream, which waits for no other.
pub(super) fn one_gpu<'a>(op: &'static str, gpu: &Gpu, others: impl IntoIterator<Item = &'a Gpu>) -> Result<()> {
    match others.into_iter().find(|other| !std::ptr::eq(*other, gpu)) {
        None => Ok(()),
        Some(other) => {
            let message = format!("arguments are on {} and on {}, or on two devices of it", gpu.name(), other.name());
            Err(Error::invalid(op, message))
        }
    }
}

impl Window {
    fn offset(self, elements: usize) -> sys::CUdeviceptr {
        self.ptr + (elements * self.dtype.size()) as u64
    }

    fn slice_rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let rows = range.end - range.start;
        let ptr = if rows == 0 { self.ptr } else { self.offset(range.start * self.stride) };
        Self { ptr, rows, ..self }
    }

    fn slice_cols(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        let ptr = if self.rows == 0 { self.ptr } else { self.offset(range.start) };
        Self { ptr, cols: range.end - range.start, margin: 0, ..self }
    }

    fn reshape(self, rows: usize, cols: usize) -> Self {
        check_reshape([self.rows, self.cols], self.stride, [rows, cols]);
        Self { rows, cols, stride: cols, margin: 0, ..self }
    }

    /// The columns of the margin, `width` of them, alone.
    fn margin(self, width: usize) -> Self {
        assert!(width <= self.margin, "{width} columns of a margin of {}", self.margin);
        Self { ptr: self.offset(self.cols), cols: width, margin: 0, ..self }
    }

    /// With the first `width` columns of the margin.
    fn with_margin(self, width: usize) -> Self {
        assert!(width <= self.margin, "{width} columns of a margin of {}", self.margin);
        Self { cols: self.cols + width, margin: 0, ..self }
    }
}

macro_rules! accessors {
    ($type:ident) => {
        impl<'a> $type<'a> {
            /// The GPU.
            pub fn gpu(&self) -> &'a Gpu {
                self.gpu
            }

            /// The number of rows.
            pub fn rows(&self) -> usize {
                self.window.rows
            }

            /// The number of columns.
            pub fn cols(&self) -> usize {
                self.window.cols
            }

            /// Elements between the starts of consecutive rows.
            pub fn stride(&self) -> usize {
                self.window.stride
            }

            /// The type of the elements.
            pub fn dtype(&self) -> Dtype {
                self.window.dtype
            }

            /// Columns after the last one that belong to this window's rows alone.
            pub fn margin_width(&self) -> usize {
                self.window.margin
            }

            /// The address of the first element.
            pub(crate) fn ptr(&self) -> sys::CUdeviceptr {
                super::graph::reaches(self.window.ptr, self.window.foreign);
                self.window.ptr
            }

            /// The same, as memory that candle frees.
            pub(crate) fn of_candle(self) -> Self {
                Self { window: Window { foreign: true, ..self.window }, ..self }
            }

            /// The rows in `range`.
            pub fn slice_rows(self, range: Range<usize>) -> Self {
                Self { window: self.window.slice_rows(range), ..self }
            }

            /// The columns in `range`.
            pub fn slice_cols(self, range: Range<usize>) -> Self {
                Self { window: self.window.slice_cols(range), ..self }
            }

            /// The same elements as `rows x cols`.
            ///
            /// # Panics
            /// If there are gaps between the rows, or the number of elements differs.
            pub fn reshape(self, rows: usize, cols: usize) -> Self {
                Self { window: self.window.reshape(rows, cols), ..self }
            }

            /// `cudaStream`-side arguments: address, stride and sizes as the launchers take them.
            pub(super) fn ld(&self) -> i64 {
                self.window.stride as i64
            }
        }
    };
}

accessors!(CudaView);
accessors!(CudaViewMut);

impl<'a> CudaView<'a> {
    /// The first `width` columns of the margin.
    pub(crate) fn margin(self, width: usize) -> Self {
        Self { window: self.window.margin(width), ..self }
    }

    /// This window and the first `width` columns of its margin.
    pub(crate) fn with_margin(self, width: usize) -> Self {
        Self { window: self.window.with_margin(width), ..self }
    }

    /// # Safety
    /// `rows` rows of `cols + margin` elements of `dtype`, `stride` elements apart from `ptr` on, must be device memory
    /// that stays allocated and unwritten for `'a`.
    pub(crate) unsafe fn from_raw(
        gpu: &'a Gpu,
        ptr: sys::CUdeviceptr,
        dtype: Dtype,
        [rows, cols]: [usize; 2],
        stride: usize,
        margin: usize,
    ) -> Self {
        Self { gpu, window: Window { ptr, dtype, rows, cols, stride, margin, foreign: false } }
    }

    /// # Safety
    /// The buffer must have room for `rows` rows of `stride` elements of `dtype`.
    pub(crate) unsafe fn of_buffer(
        buffer: &'a Buffer,
        dtype: Dtype,
        shape: [usize; 2],
        stride: usize,
        margin: usize,
    ) -> Self {
        // SAFETY: the buffer is borrowed for 'a; the size is the caller's promise.
        unsafe { Self::from_raw(buffer.gpu(), buffer.ptr(), dtype, shape, stride, margin) }
    }

    /// The elements as f32, row by row, on the host.
    pub(crate) fn to_vec(self) -> Result<Vec<f32>> {
        const OP: &str = "copy to the host";
        let (rows, cols) = (self.rows(), self.cols());
        let mut values = vec![0f32; rows * cols];
        if values.is_empty() {
            return Ok(values);
        }
        // Gathered without gaps and as f32 first: one copy to the host.
        let bytes = rows * cols * 4;
        let memory = self.gpu.alloc(OP, bytes)?;
        // SAFETY: the memory was just allocated for these elements.
        let gathered = unsafe { CudaViewMut::from_raw(self.gpu, memory.ptr(), Dtype::F32, [rows, cols], cols, 0) };
        super::ops::cast(self, gathered)?;
        // SAFETY: source and destination have the same number of bytes; synchronized before the vector is read.
        unsafe { result::memcpy_dtoh_async(&mut values, memory.ptr(), self.gpu.stream().cu_stream()) }
            .map_err(|error| cuda_error(OP, error))?;
        self.gpu.synchronize(OP)?;
        Ok(values)
    }
}

impl<'a> CudaViewMut<'a> {
    /// # Safety
    /// As [`CudaView::from_raw`], and nothing else may access the memory for `'a`.
    pub(crate) unsafe fn from_raw(
        gpu: &'a Gpu,
        ptr: sys::CUdeviceptr,
        dtype: Dtype,
        [rows, cols]: [usize; 2],
        stride: usize,
        margin: usize,
    ) -> Self {
        Self { gpu, window: Window { ptr, dtype, rows, cols, stride, margin, foreign: false }, memory: PhantomData }
    }

    /// # Safety
    /// The buffer must have room for `rows` rows of `stride` elements of `dtype`.
    pub(crate) unsafe fn of_buffer(
        buffer: &'a mut Buffer,
        dtype: Dtype,
        shape: [usize; 2],
        stride: usize,
        margin: usize,
    ) -> Self {
        let ptr = buffer.ptr();
        // SAFETY: the buffer is borrowed mutably for 'a; the size is the caller's promise.
        unsafe { Self::from_raw(buffer.gpu(), ptr, dtype, shape, stride, margin) }
    }

    /// The same window, readable.
    pub fn as_view(&self) -> CudaView<'_> {
        CudaView { gpu: self.gpu, window: self.window }
    }

    /// The columns, readable, and the first `width` columns of the margin, writable: they share no element.
    pub(super) fn split_margin(&mut self, width: usize) -> (CudaView<'_>, CudaViewMut<'_>) {
        let columns = Window { margin: 0, ..self.window };
        let margin = CudaViewMut { gpu: self.gpu, window: self.window.margin(width), memory: PhantomData };
        (CudaView { gpu: self.gpu, window: columns }, margin)
    }

    /// The window, readable, while a call that reads and writes it (an addend that is the result) holds it.
    pub(super) fn alias(&self) -> CudaView<'a> {
        CudaView { gpu: self.gpu, window: self.window }
    }

    /// The same window for a shorter time.
    pub fn reborrow(&mut self) -> CudaViewMut<'_> {
        CudaViewMut { gpu: self.gpu, window: self.window, memory: PhantomData }
    }

    /// The columns before and from `at`.
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        let cols = self.cols();
        let margin = self.window.margin;
        let left = Self { window: self.window.slice_cols(0..at), ..self };
        let mut right = Self { window: self.window.slice_cols(at..cols), ..self };
        right.window.margin = margin;
        (left, right)
    }

    /// Copies host memory of the same shape, rounding to the elements' type.
    pub(crate) fn upload(self, from: HostView) -> Result<()> {
        const OP: &str = "copy to the GPU";
        let (rows, cols) = (self.rows(), self.cols());
        if rows * cols == 0 {
            return Ok(());
        }
        let gathered: Vec<f32>;
        let values = match from.as_slice() {
            Some(values) => values,
            None => {
                gathered = (0..rows).flat_map(|i| from.row(i)).copied().collect();
                &gathered
            }
        };
        let memory = self.gpu.alloc(OP, rows * cols * 4)?;
        // SAFETY: the memory has room for the values; from pageable memory the copy has read them when it returns.
        unsafe { result::memcpy_htod_async(memory.ptr(), values, self.gpu.stream().cu_stream()) }
            .map_err(|error| cuda_error(OP, error))?;
        // SAFETY: the memory holds these elements, without gaps.
        let view = unsafe { CudaView::from_raw(self.gpu, memory.ptr(), Dtype::F32, [rows, cols], cols, 0) };
        super::ops::cast(view, self)
    }
}
