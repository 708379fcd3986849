//! Matrices in 8 bits (e4m3) with a scale a row, as fp8 products take them ([`super::blas::fp8`]).

use std::sync::Arc;

use super::buffer::Buffer;
use super::ffi;
use super::gpu::Gpu;
use super::view::CudaView;
use super::weight::CudaWeight;
use crate::error::{Error, Result};
use crate::weight::{FrozenCompute, FrozenWeight};

const OP: &str = "fp8";

/// Widths and heights of fp8 factors are multiples of this.
pub(crate) const MULTIPLE: usize = 16;

/// The most weights that are multiplied together: q, k and v.
const MEMBERS: usize = 3;

/// `rows x cols` values, gapless, and the rows' scales.
pub(crate) struct Fp8 {
    values: Buffer,
    scales: Buffer,
    rows: usize,
    cols: usize,
}

/// One that is read.
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
    /// On every GPU but Hopper (cuBLASLt takes such scales nowhere else), and with a cuBLASLt older than CUDA 12.9's.
    pub fn check_fp8(&self) -> Result<()> {
        let (major, minor) = self.limits().capability;
        if (major, minor) != (9, 0) {
            let has = format!("{} has {major}.{minor}", self.name());
            return Err(Error::invalid(OP, FrozenCompute::fp8_is_not_for(&has)));
        }
        let version = super::blas::fp8::library_version();
        if version < super::blas::fp8::LEAST_VERSION {
            let message = format!(
                "frozen_compute = \"fp8\" needs cuBLASLt of CUDA 12.9 or newer; this program runs with version {version}. Leave it \
                 out, or install a newer CUDA"
            );
            return Err(Error::invalid(OP, message));
        }
        Ok(())
    }
}

/// The weights as the kernels take them, and the shape of all together.
fn bits4(weights: &[&CudaWeight]) -> Option<(Vec<ffi::Bits4>, [usize; 2])> {
    let in_rows = |weight: &&CudaWeight| weight.row_blocks_of_4bit().and_then(|_| weight.bits4());
    let parts: Vec<ffi::Bits4> = weights.iter().map(in_rows).collect::<Option<_>>()?;
    let first = parts.first()?;
    let alike = |part: &ffi::Bits4| part.cols == first.cols && part.blocksize == first.blocksize;
    let fits = |part: &ffi::Bits4| part.rows % MULTIPLE as i64 == 0;
    let rows = parts.iter().map(|part| part.rows as usize).sum();
    let shape = [rows, first.cols as usize];
    let few = parts.len() <= MEMBERS;
    (few && parts.iter().all(|part| alike(part) && fits(part))).then_some((parts, shape))
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

    /// 4-bit weights below each other, straight from their codes, with a scale for each row; none if one of them is of another
    /// kind or has blocks that cross its rows.
    pub(crate) fn of_bits4(weights: &[&CudaWeight]) -> Result<Option<Self>> {
        let Some((parts, [rows, cols])) = bits4(weights) else { return Ok(None) };
        let made = Self::new(weights[0].gpu(), rows, cols)?;
        let mut row = 0;
        for part in &parts {
            let (values, scales) = (made.values.ptr() + (row * cols) as u64, made.scales.ptr() + 4 * row as u64);
            // SAFETY: the weight is live; its rows have their place in the values and in the scales.
            made.values.gpu().launch("fp8_4bit_rows", |stream| unsafe {
                let early = made.values.gpu().early();
                ffi::qlora_fp8_4bit_rows(part, values as *mut u8, scales as *mut f32, early, stream)
            })?;
            row += part.rows as usize;
        }
        Ok(Some(made))
    }

    /// The same, transposed: `[cols, rows of all]`, with one scale for the columns of a block.
    pub(crate) fn of_bits4_transposed(weights: &[&CudaWeight]) -> Result<Option<Self>> {
        let Some((parts, [rows, cols])) = bits4(weights) else { return Ok(None) };
        let gpu = weights[0].gpu();
        let made = Self::new(gpu, cols, rows)?;
        let mut most = [std::ptr::null(); MEMBERS];
        for (most, weight) in most.iter_mut().zip(weights) {
            *most = weight.column_most()?.as_ptr();
        }
        let mut row = 0;
        for part in &parts {
            let values = made.values.ptr() + row as u64;
            // SAFETY: as above; the weight's rows are columns of the values, which are `rows` bytes apart; the largest
            // magnitudes are kept by the weights.
            gpu.launch("fp8_4bit_columns", |stream| unsafe {
                let scales = made.scales.ptr() as *mut f32;
                let [first, second, third] = most;
                let (values, ld) = (values as *mut u8, rows as i64);
                ffi::qlora_fp8_4bit_columns(part, first, second, third, values, ld, scales, stream)
            })?;
            row += part.rows as usize;
        }
        Ok(Some(made))
    }

    pub(crate) fn view(&self) -> Fp8View<'_> {
        Fp8View {
            values: self.values.ptr(),
            scales: self.scales.ptr(),
            rows: self.rows,
            cols: self.cols,
            _memory: std::marker::PhantomData,
        }
    }
}
