//! Owned memory for activations and gradients, and the pool it comes from.

mod pool;

use std::fmt;
use std::sync::Arc;

use candle_core::Device;

use self::pool::Pool;
#[cfg(feature = "cuda")]
use crate::cuda::{Buffer, CudaView, CudaViewMut, Gpu};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::view::{View, ViewMut};

/// `rows x cols` elements, row-major, on the CPU (f32) or a GPU. Its memory goes back to where it came from when it is
/// dropped.
pub struct Matrix {
    storage: Storage,
    rows: usize,
    cols: usize,
}

enum Storage {
    Host {
        data: Vec<f32>,
        pool: Option<Arc<Pool>>,
    },
    #[cfg(feature = "cuda")]
    Cuda {
        buffer: Buffer,
        dtype: Dtype,
        margin: usize,
    },
}

/// Hands out [`Matrix`]es and takes their memory back for the next one.
///
/// On the CPU, a training step allocates the same few dozen shapes again and again; fresh pages from the operating system
/// would cost about a tenth of the matrix work. On a GPU, CUDA's own pool does this. Cloning gives another handle to the
/// same pool.
#[derive(Clone)]
pub struct Workspace {
    place: Place,
    /// The type to which gradients between operations are rounded; on a GPU that is the type they are stored in.
    gradients: Dtype,
}

#[derive(Clone)]
enum Place {
    Host(Arc<Pool>),
    #[cfg(feature = "cuda")]
    Cuda {
        gpu: Arc<Gpu>,
        dtype: Dtype,
        poison: bool,
    },
}

/// Elements from one row to the next of a matrix on a GPU with a margin: strides of whole 128 bytes keep rows aligned for
/// every kernel.
pub fn padded_cols(cols: usize, margin: usize) -> usize {
    if margin == 0 { cols } else { (cols + margin).next_multiple_of(64) }
}

impl Workspace {
    /// Memory on `device`. On a GPU, activations are bf16, or f16 where it has no bf16 (before Ampere); see
    /// [`Self::with_dtype`].
    ///
    /// # Errors
    /// If the device is not one that the operations run on.
    pub fn new(device: &Device) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() && !Gpu::of(device)?.limits().has_bf16() {
            return Self::with_dtype(device, Dtype::F16);
        }
        let dtype = if device.is_cpu() { Dtype::F32 } else { Dtype::Bf16 };
        Self::with_dtype(device, dtype)
    }

    /// Memory on `device` for activations of type `dtype`.
    ///
    /// # Errors
    /// If the device is not one that the operations run on, or has no operations for `dtype`.
    pub fn with_dtype(device: &Device, dtype: Dtype) -> Result<Self> {
        Self::build(device, dtype, false)
    }

    /// CPU memory that is filled with NaN when it is handed out, so that a result that was never written shows.
    pub fn poisoned() -> Self {
        Self::build(&Device::Cpu, Dtype::F32, true).expect("the CPU is supported")
    }

    /// [`Self::with_dtype`], filled with NaN.
    ///
    /// # Errors
    /// As there.
    pub fn poisoned_on(device: &Device, dtype: Dtype) -> Result<Self> {
        Self::build(device, dtype, true)
    }

    fn build(device: &Device, dtype: Dtype, poison: bool) -> Result<Self> {
        const OP: &str = "workspace";
        if device.is_cpu() {
            if dtype != Dtype::F32 {
                return Err(Error::invalid(OP, format!("the CPU computes in float32, not in {}", dtype.name())));
            }
            return Ok(Self { place: Place::Host(Arc::new(Pool::new(poison))), gradients: Dtype::F32 });
        }
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let gpu = Gpu::of(device)?;
            gpu.check_dtype(OP, dtype)?;
            return Ok(Self { place: Place::Cuda { gpu, dtype, poison }, gradients: dtype });
        }
        Err(Error::Device { op: OP, device: format!("{:?}", device.location()) })
    }

    /// CPU memory.
    pub fn cpu() -> Self {
        Self { place: Place::Host(Arc::new(Pool::new(false))), gradients: Dtype::F32 }
    }

    /// CPU memory with the range of `dtype` for gradients: those of the logits, of the head's input and between blocks
    /// are rounded to it, as a GPU stores them. Everything else is f32. It shows without a GPU what float16 loses.
    pub fn cpu_rounding_gradients(dtype: Dtype) -> Self {
        Self { gradients: dtype, ..Self::cpu() }
    }

    /// The type in which gradients pass from one operation to the next.
    pub fn gradient_dtype(&self) -> Dtype {
        self.gradients
    }

    /// Rounds a gradient to [`Self::gradient_dtype`] where its memory has another type; elsewhere it is stored so already.
    ///
    /// # Errors
    /// If it is not where this workspace is.
    pub fn round_gradient(&self, gradient: ViewMut) -> Result<()> {
        let round: fn(f32) -> f32 = match (&self.place, self.gradients) {
            (Place::Host(_), Dtype::F16) => |x| half::f16::from_f32(x).to_f32(),
            (Place::Host(_), Dtype::Bf16) => |x| half::bf16::from_f32(x).to_f32(),
            _ => return Ok(()),
        };
        gradient.host("round_gradient")?.rows_mut().for_each(|row| row.iter_mut().for_each(|x| *x = round(*x)));
        Ok(())
    }

    /// The candle device.
    pub fn device(&self) -> Device {
        match &self.place {
            Place::Host(_) => Device::Cpu,
            #[cfg(feature = "cuda")]
            Place::Cuda { gpu, .. } => gpu.device(),
        }
    }

    /// The type of activations.
    pub fn dtype(&self) -> Dtype {
        match &self.place {
            Place::Host(_) => Dtype::F32,
            #[cfg(feature = "cuda")]
            Place::Cuda { dtype, .. } => *dtype,
        }
    }

    /// The GPU, if the memory is on one.
    #[cfg(feature = "cuda")]
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match &self.place {
            Place::Host(_) => None,
            Place::Cuda { gpu, .. } => Some(gpu),
        }
    }

    /// `rows x cols` activations of unspecified (but initialized) content: for results that are written whole.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn matrix(&self, rows: usize, cols: usize) -> Result<Matrix> {
        self.with_margin(rows, cols, 0)
    }

    /// Host memory for the inside of an operation that runs on the CPU.
    ///
    /// # Panics
    /// If this is a GPU's workspace: the operation's arguments are then there too, and it runs there.
    pub(crate) fn scratch(&self, rows: usize, cols: usize) -> Matrix {
        match &self.place {
            Place::Host(pool) => Matrix::from_pool(pool, rows, cols),
            #[cfg(feature = "cuda")]
            Place::Cuda { .. } => panic!("a CPU operation was given the workspace of a GPU"),
        }
    }

    /// [`Self::matrix`] in f32, whatever the type of activations: statistics, losses, parameters.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn matrix_f32(&self, rows: usize, cols: usize) -> Result<Matrix> {
        self.allocate(rows, cols, Dtype::F32, 0)
    }

    /// [`Self::matrix`] whose rows have room for `margin` more elements (rounded up), which belong to no view's columns:
    /// the group of linear layers that reads the matrix puts its adapters' small factors there. On the CPU there is none.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn with_margin(&self, rows: usize, cols: usize, margin: usize) -> Result<Matrix> {
        self.allocate(rows, cols, self.dtype(), margin)
    }

    fn allocate(&self, rows: usize, cols: usize, dtype: Dtype, margin: usize) -> Result<Matrix> {
        match &self.place {
            Place::Host(pool) => {
                let _ = (dtype, margin);
                Ok(Matrix::from_pool(pool, rows, cols))
            }
            #[cfg(feature = "cuda")]
            Place::Cuda { gpu, poison, .. } => {
                let margin = padded_cols(cols, margin) - cols;
                let bytes = rows.checked_mul(cols + margin).and_then(|n| n.checked_mul(dtype.size()));
                let mut buffer = Buffer::new(gpu, "matrix", bytes.expect("matrix size overflows"))?;
                if *poison {
                    buffer.fill_bytes(0xff)?;
                }
                Ok(Matrix { storage: Storage::Cuda { buffer, dtype, margin }, rows, cols })
            }
        }
    }

    /// `rows x cols` zeros.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn zeros(&self, rows: usize, cols: usize) -> Result<Matrix> {
        let mut matrix = self.matrix(rows, cols)?;
        matrix.view_mut().fill(0.0)?;
        Ok(matrix)
    }

    /// `rows x cols` f32 zeros, whatever the type of activations.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn zeros_f32(&self, rows: usize, cols: usize) -> Result<Matrix> {
        let mut matrix = self.matrix_f32(rows, cols)?;
        matrix.view_mut().fill(0.0)?;
        Ok(matrix)
    }

    /// A copy of host memory, in f32.
    ///
    /// # Errors
    /// If the memory cannot be had.
    ///
    /// # Panics
    /// If `data` does not have `rows * cols` elements.
    pub fn upload(&self, data: &[f32], rows: usize, cols: usize) -> Result<Matrix> {
        let mut matrix = self.matrix_f32(rows, cols)?;
        matrix.view_mut().copy_from(View::new(data, rows, cols))?;
        Ok(matrix)
    }

    /// The most bytes that were in use at one time: in matrices of this pool on the CPU, in all of the GPU's pool there.
    pub fn peak_bytes(&self) -> usize {
        match &self.place {
            Place::Host(pool) => pool.peak() * size_of::<f32>(),
            #[cfg(feature = "cuda")]
            Place::Cuda { gpu, .. } => gpu.pool().peak().unwrap_or(0) as usize,
        }
    }

    /// Gives the memory that no matrix holds back to the operating system.
    pub fn trim(&self) {
        match &self.place {
            Place::Host(pool) => pool.trim(),
            #[cfg(feature = "cuda")]
            Place::Cuda { gpu, .. } => {
                let _ = gpu.release_pinned();
                let _ = gpu.pool().trim();
            }
        }
    }
}

impl Matrix {
    fn from_pool(pool: &Arc<Pool>, rows: usize, cols: usize) -> Self {
        let data = pool.take(rows.checked_mul(cols).expect("matrix size overflows"));
        Self { storage: Storage::Host { data, pool: Some(pool.clone()) }, rows, cols }
    }

    /// Wraps elements that the caller made, in host memory; they belong to no pool.
    ///
    /// # Panics
    /// If `data` does not have `rows * cols` elements.
    pub fn from_vec(data: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{} elements cannot be {rows} x {cols}", data.len());
        Self { storage: Storage::Host { data, pool: None }, rows, cols }
    }

    /// One row of host memory.
    pub fn vector(data: Vec<f32>) -> Self {
        let len = data.len();
        Self::from_vec(data, 1, len)
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        match &self.storage {
            Storage::Host { .. } => Dtype::F32,
            #[cfg(feature = "cuda")]
            Storage::Cuda { dtype, .. } => *dtype,
        }
    }

    /// Elements that each row has room for beyond its columns.
    pub fn margin(&self) -> usize {
        match &self.storage {
            Storage::Host { .. } => 0,
            #[cfg(feature = "cuda")]
            Storage::Cuda { margin, .. } => *margin,
        }
    }

    /// The whole matrix, readable.
    pub fn view(&self) -> View<'_> {
        match &self.storage {
            Storage::Host { data, .. } => View::new(data, self.rows, self.cols),
            #[cfg(feature = "cuda")]
            Storage::Cuda { buffer, dtype, margin } => {
                // SAFETY: the buffer was allocated for these sizes, and is borrowed as long as the view lives.
                unsafe { CudaView::of_buffer(buffer, *dtype, [self.rows, self.cols], self.cols + margin, *margin) }
                    .into()
            }
        }
    }

    /// The whole matrix, writable.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        match &mut self.storage {
            Storage::Host { data, .. } => ViewMut::new(data, self.rows, self.cols),
            #[cfg(feature = "cuda")]
            Storage::Cuda { buffer, dtype, margin } => {
                // SAFETY: as in `view`, and the buffer is borrowed mutably.
                unsafe { CudaViewMut::of_buffer(buffer, *dtype, [self.rows, self.cols], self.cols + *margin, *margin) }
                    .into()
            }
        }
    }

    /// The elements, row by row.
    ///
    /// # Panics
    /// If they are on a GPU; [`Self::to_vec`] copies them from there.
    pub fn as_slice(&self) -> &[f32] {
        match &self.storage {
            Storage::Host { data, .. } => data,
            #[cfg(feature = "cuda")]
            Storage::Cuda { .. } => panic!("the elements of this matrix are on a GPU"),
        }
    }

    /// The elements, row by row.
    ///
    /// # Panics
    /// If they are on a GPU.
    pub fn as_mut_slice(&mut self) -> &mut [f32] {
        match &mut self.storage {
            Storage::Host { data, .. } => data,
            #[cfg(feature = "cuda")]
            Storage::Cuda { .. } => panic!("the elements of this matrix are on a GPU"),
        }
    }

    /// A copy of the elements as f32, row by row.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.view().to_vec()
    }

    /// The elements as a plain vector, which leaves the pool.
    ///
    /// # Panics
    /// If they are on a GPU.
    pub fn into_vec(mut self) -> Vec<f32> {
        match &mut self.storage {
            Storage::Host { data, pool } => {
                let data = std::mem::take(data);
                if let Some(pool) = pool.take() {
                    pool.leave(data.len());
                }
                data
            }
            #[cfg(feature = "cuda")]
            Storage::Cuda { .. } => panic!("the elements of this matrix are on a GPU"),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::Host { data, .. } => size_of_val(data.as_slice()),
            #[cfg(feature = "cuda")]
            Storage::Cuda { buffer, .. } => buffer.bytes(),
        }
    }

    /// The device memory without a margin, and its element type; a host matrix is given back.
    #[cfg(feature = "cuda")]
    pub(crate) fn into_buffer(self) -> std::result::Result<(Buffer, Dtype), Self> {
        let this = std::mem::ManuallyDrop::new(self);
        match &this.storage {
            Storage::Cuda { buffer, dtype, margin: 0 } => {
                // SAFETY: `this` is not dropped, so the buffer is read out once.
                Ok((unsafe { std::ptr::read(buffer) }, *dtype))
            }
            _ => Err(std::mem::ManuallyDrop::into_inner(this)),
        }
    }
}

impl From<Vec<f32>> for Matrix {
    /// One row of host memory.
    fn from(data: Vec<f32>) -> Self {
        Self::vector(data)
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        match &mut self.storage {
            Storage::Host { data, pool } => {
                if let Some(pool) = pool.take() {
                    pool.give(std::mem::take(data));
                }
            }
            #[cfg(feature = "cuda")]
            Storage::Cuda { .. } => {}
        }
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Matrix({} x {}, {})", self.rows, self.cols, self.dtype().name())
    }
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Host(pool) => {
                let (live, idle) = pool.live_and_idle();
                write!(f, "Workspace({live} elements live, {idle} idle)")
            }
            #[cfg(feature = "cuda")]
            Place::Cuda { gpu, dtype, .. } => write!(f, "Workspace({}, {})", gpu.name(), dtype.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle(workspace: &Workspace) -> usize {
        match &workspace.place {
            Place::Host(pool) => pool.live_and_idle().1,
            #[cfg(feature = "cuda")]
            Place::Cuda { .. } => unreachable!("made for the CPU"),
        }
    }

    #[test]
    fn memory_is_reused_and_counted() {
        let workspace = Workspace::new(&Device::Cpu).unwrap();
        let first = workspace.matrix(100, 100).unwrap();
        let address = first.as_slice().as_ptr();
        drop(first);
        let second = workspace.matrix(99, 100).unwrap();
        assert_eq!(second.as_slice().as_ptr(), address);
        let third = workspace.matrix(100, 100).unwrap();
        assert_ne!(third.as_slice().as_ptr(), address);
        assert_eq!(workspace.peak_bytes(), (9_900 + 10_000) * 4);
    }

    #[test]
    fn idle_memory_stays_below_what_is_in_use() {
        let workspace = Workspace::new(&Device::Cpu).unwrap();
        for rows in (1..200).map(|i| i * 37) {
            drop(workspace.matrix(rows, 1000).unwrap());
        }
        assert!(idle(&workspace) <= 2 * 200 * 37 * 1000);
    }

    #[test]
    fn gradients_are_rounded_where_that_is_asked_for() {
        let values = [1e-8, 1.0 + 1e-4, 70_000.0];
        let rounded = |workspace: &Workspace| {
            let mut matrix = Matrix::from_vec(values.to_vec(), 1, 3);
            workspace.round_gradient(matrix.view_mut()).unwrap();
            matrix.as_slice().to_vec()
        };
        assert_eq!(rounded(&Workspace::cpu()), values);
        assert_eq!(rounded(&Workspace::cpu_rounding_gradients(Dtype::F16)), [0.0, 1.0, f32::INFINITY]);
        let workspace = Workspace::cpu_rounding_gradients(Dtype::Bf16);
        assert_eq!((workspace.dtype(), workspace.gradient_dtype()), (Dtype::F32, Dtype::Bf16));
        assert!((rounded(&workspace)[0] - 1e-8).abs() < 1e-10);
    }

    #[test]
    fn a_poisoned_pool_shows_what_was_not_written() {
        assert!(Workspace::poisoned().matrix(2, 3).unwrap().as_slice().iter().all(|x| x.is_nan()));
        assert!(Workspace::poisoned().zeros(2, 3).unwrap().as_slice().iter().all(|&x| x == 0.0));
    }
}
