//! Matrices in 8 bits (e4m3) with a scale a row, as fp8 products take them ([`super::blas::fp8`]).

use std::ops::Range;
use std::sync::Arc;

use super::buffer::Buffer;
use super::ffi;
use super::gpu::Gpu;
use super::view::CudaView;
use crate::error::{Error, Result};

const OP: &str = "fp8";

/// Widths and heights of fp8 factors are multiples of this.
pub(crate) const MULTIPLE: usize = 16;

/// `rows x cols` values, gapless, and the rows' scales.
pub(crate) struct Fp8 {
    values: Buffer,
    scales: Buffer,
    rows: usize,
    cols: usize,
}

/// Some rows of one.
#[derive(Clone, Copy)]
pub(crate) struct Fp8View<'a> {
    pub(super) values: u64,
    pub(super) scales: u64,
    pub(super) rows: usize,
    pub(super) cols: usize,
    _memory: std::marker::PhantomData<&'a Fp8>,
}

impl Gpu {
    /// An error unless the GPU multiplies fp8 matrices with a scale a row.
    ///
    /// # Errors
    /// On every GPU but Hopper: cuBLASLt takes such scales nowhere else.
    pub fn check_fp8(&self) -> Result<()> {
        let capability = self.limits().capability;
        match capability == (9, 0) {
            true => Ok(()),
            false => {
                let (major, minor) = capability;
                let message = format!(
                    "frozen_compute = \"fp8\" needs a Hopper GPU (H100, H200, GH200: compute capability 9.0): only there cuBLASLt \
                     multiplies fp8 with a scale a row; {} has {major}.{minor}. Leave it out",
                    self.name()
                );
                Err(Error::invalid(OP, message))
            }
        }
    }
}

impl Fp8 {
    fn new(gpu: &Arc<Gpu>, rows: usize, cols: usize) -> Result<Self> {
        let (values, scales) = (Buffer::new(gpu, OP, rows * cols)?, Buffer::new(gpu, OP, 4 * rows)?);
        Ok(Self { values, scales, rows, cols })
    }

    /// `x`, with a scale for each row. Its columns are a multiple of [`MULTIPLE`].
    pub(crate) fn of_rows(x: CudaView) -> Result<Self> {
        let made = Self::new(&x.gpu().arc(), x.rows(), x.cols())?;
        // SAFETY: x is a live window of this shape, the target has as many bytes and a scale for each row.
        x.gpu().launch("fp8_rows", |stream| unsafe {
            ffi::qlora_fp8_rows(
                x.dtype().code(),
                x.ptr() as *const _,
                x.ld(),
                made.values.ptr() as *mut u8,
                made.scales.ptr() as *mut f32,
                x.rows() as i64,
                x.cols() as i64,
                x.gpu().early(),
                stream,
            )
        })?;
        Ok(made)
    }

    /// `x` transposed, with a scale for each of its columns. Its rows are a multiple of [`MULTIPLE`].
    pub(crate) fn of_columns(x: CudaView) -> Result<Self> {
        let made = Self::new(&x.gpu().arc(), x.cols(), x.rows())?;
        let absmax = Buffer::new(&x.gpu().arc(), OP, 4 * x.cols())?;
        // SAFETY: as above, transposed; the scratch memory has a float for each column.
        x.gpu().launch("fp8_columns", |stream| unsafe {
            ffi::qlora_fp8_columns(
                x.dtype().code(),
                x.ptr() as *const _,
                x.ld(),
                absmax.ptr() as *mut f32,
                made.values.ptr() as *mut u8,
                made.scales.ptr() as *mut f32,
                x.rows() as i64,
                x.cols() as i64,
                stream,
            )
        })?;
        Ok(made)
    }

    pub(crate) fn view(&self) -> Fp8View<'_> {
        self.rows(0..self.rows)
    }

    /// # Panics
    /// If there are not so many.
    pub(crate) fn rows(&self, range: Range<usize>) -> Fp8View<'_> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        Fp8View {
            values: self.values.ptr() + (range.start * self.cols) as u64,
            scales: self.scales.ptr() + 4 * range.start as u64,
            rows: range.len(),
            cols: self.cols,
            _memory: std::marker::PhantomData,
        }
    }
}
