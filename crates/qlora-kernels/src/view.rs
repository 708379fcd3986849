//! Two-dimensional windows into memory: the arguments of every operation.
//!
//! A [`View`] is `rows x cols` elements; each row is contiguous, consecutive rows are `stride >= cols` elements apart.
//! Activations are `[tokens, width]`. A vector is a view of one row. [`ViewMut`] is the writable kind; the borrow
//! checker keeps two writable views apart, and [`ViewMut::split_cols`] cuts one into disjoint windows.
//!
//! On the CPU the elements are f32, on CUDA they have the [`Dtype`] of their matrix. Operations ask for the
//! representation they implement ([`View::host`]), which fails with the operation's name on any other.

mod host;

use std::ops::Range;

#[cfg(feature = "cuda")]
pub(crate) use host::check_reshape;
pub use host::{HostView, HostViewMut};

#[cfg(feature = "cuda")]
use crate::cuda::{CudaView, CudaViewMut, Gpu};
use crate::dtype::Dtype;
use crate::error::{Error, Result};

/// A read-only window of `rows x cols` elements.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    repr: Repr<'a>,
}

/// A writable window of `rows x cols` elements.
#[derive(Debug)]
pub struct ViewMut<'a> {
    repr: ReprMut<'a>,
}

#[derive(Clone, Copy, Debug)]
enum Repr<'a> {
    Host(HostView<'a>),
    #[cfg(feature = "cuda")]
    Cuda(CudaView<'a>),
}

#[derive(Debug)]
enum ReprMut<'a> {
    Host(HostViewMut<'a>),
    #[cfg(feature = "cuda")]
    Cuda(CudaViewMut<'a>),
}

/// Evaluates the same expression for either representation of a read-only view.
macro_rules! each {
    ($view:expr, $v:ident => $body:expr) => {
        match $view.repr {
            Repr::Host($v) => $body,
            #[cfg(feature = "cuda")]
            Repr::Cuda($v) => $body,
        }
    };
}

/// Applies the same method to either representation and wraps the result again.
macro_rules! map {
    ($view:expr, $v:ident => $body:expr) => {
        match $view.repr {
            Repr::Host($v) => View { repr: Repr::Host($body) },
            #[cfg(feature = "cuda")]
            Repr::Cuda($v) => View { repr: Repr::Cuda($body) },
        }
    };
}

macro_rules! each_mut {
    ($repr:expr, $v:ident => $body:expr) => {
        match $repr {
            ReprMut::Host($v) => $body,
            #[cfg(feature = "cuda")]
            ReprMut::Cuda($v) => $body,
        }
    };
}

macro_rules! map_mut {
    ($repr:expr, $v:ident => $body:expr) => {
        match $repr {
            ReprMut::Host($v) => ViewMut { repr: ReprMut::Host($body) },
            #[cfg(feature = "cuda")]
            ReprMut::Cuda($v) => ViewMut { repr: ReprMut::Cuda($body) },
        }
    };
}

impl<'a> View<'a> {
    /// `rows x cols` consecutive elements of host memory.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { repr: Repr::Host(HostView::new(data, rows, cols)) }
    }

    /// `rows x cols` elements of host memory whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the window does not fit `data`.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self { repr: Repr::Host(HostView::strided(data, rows, cols, stride)) }
    }

    /// One row of host memory.
    pub fn vector(data: &'a [f32]) -> Self {
        Self::new(data, 1, data.len())
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        each!(self, v => v.rows())
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        each!(self, v => v.cols())
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows(), self.cols()]
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        match self.repr {
            Repr::Host(_) => Dtype::F32,
            #[cfg(feature = "cuda")]
            Repr::Cuda(v) => v.dtype(),
        }
    }

    /// The rows in `range`.
    pub fn slice_rows(&self, range: Range<usize>) -> Self {
        map!(self, v => v.slice_rows(range))
    }

    /// The columns in `range`.
    pub fn slice_cols(&self, range: Range<usize>) -> Self {
        map!(self, v => v.slice_cols(range))
    }

    /// The same elements as `rows x cols`, row by row: `[tokens, heads * d]` becomes `[tokens * heads, d]`.
    ///
    /// # Panics
    /// If there are gaps between the rows, or the number of elements differs.
    pub fn reshape(&self, rows: usize, cols: usize) -> Self {
        map!(self, v => v.reshape(rows, cols))
    }

    /// The CPU representation, or an error that names `op`.
    pub fn host(&self, op: &'static str) -> Result<HostView<'a>> {
        #[cfg(not(feature = "cuda"))]
        let _ = op;
        match self.repr {
            Repr::Host(v) => Ok(v),
            #[cfg(feature = "cuda")]
            Repr::Cuda(v) => Err(Error::Device { op, device: v.gpu().name() }),
        }
    }

    /// The elements as f32, row by row, copied to the host: for checks, checkpoints and small results.
    ///
    /// # Errors
    /// If the device fails.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        match self.repr {
            Repr::Host(v) => Ok((0..v.rows()).flat_map(|i| v.row(i)).copied().collect()),
            #[cfg(feature = "cuda")]
            Repr::Cuda(v) => v.to_vec(),
        }
    }

    /// An error that names `op` and `what` unless the shape is `rows x cols`.
    pub fn expect(&self, op: &'static str, what: &'static str, rows: usize, cols: usize) -> Result<()> {
        Error::check_shape(op, what, &self.shape(), &[rows, cols])
    }
}

impl<'a> ViewMut<'a> {
    /// `rows x cols` consecutive elements of host memory.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self { repr: ReprMut::Host(HostViewMut::new(data, rows, cols)) }
    }

    /// `rows x cols` elements of host memory whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the window does not fit `data`.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self { repr: ReprMut::Host(HostViewMut::strided(data, rows, cols, stride)) }
    }

    /// One row of host memory.
    pub fn vector(data: &'a mut [f32]) -> Self {
        let len = data.len();
        Self::new(data, 1, len)
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        each_mut!(&self.repr, v => v.rows())
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        each_mut!(&self.repr, v => v.cols())
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows(), self.cols()]
    }

    /// The type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.as_view().dtype()
    }

    /// The same window, readable, for as long as `self` is not written.
    pub fn as_view(&self) -> View<'_> {
        match &self.repr {
            ReprMut::Host(v) => View { repr: Repr::Host(v.as_view()) },
            #[cfg(feature = "cuda")]
            ReprMut::Cuda(v) => View { repr: Repr::Cuda(v.as_view()) },
        }
    }

    /// The same window for a shorter time: what is handed to an operation that the caller goes on writing after.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        map_mut!(&mut self.repr, v => v.reborrow())
    }

    /// The rows in `range`.
    pub fn slice_rows(self, range: Range<usize>) -> Self {
        map_mut!(self.repr, v => v.slice_rows(range))
    }

    /// The columns in `range`.
    pub fn slice_cols(self, range: Range<usize>) -> Self {
        map_mut!(self.repr, v => v.slice_cols(range))
    }

    /// The columns before and from `at`, as two windows that can be written at the same time.
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        match self.repr {
            ReprMut::Host(v) => {
                let (left, right) = v.split_cols(at);
                (Self { repr: ReprMut::Host(left) }, Self { repr: ReprMut::Host(right) })
            }
            #[cfg(feature = "cuda")]
            ReprMut::Cuda(v) => {
                let (left, right) = v.split_cols(at);
                (Self { repr: ReprMut::Cuda(left) }, Self { repr: ReprMut::Cuda(right) })
            }
        }
    }

    /// The same elements as `rows x cols`, row by row: `[tokens, heads * d]` becomes `[tokens * heads, d]`.
    ///
    /// # Panics
    /// If there are gaps between the rows, or the number of elements differs.
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        map_mut!(self.repr, v => v.reshape(rows, cols))
    }

    /// The CPU representation, or an error that names `op`.
    pub fn host(self, op: &'static str) -> Result<HostViewMut<'a>> {
        #[cfg(not(feature = "cuda"))]
        let _ = op;
        match self.repr {
            ReprMut::Host(v) => Ok(v),
            #[cfg(feature = "cuda")]
            ReprMut::Cuda(v) => Err(Error::Device { op, device: v.gpu().name() }),
        }
    }

    /// Writes every element with `value`, rounded to the elements' type.
    ///
    /// # Errors
    /// If the device fails.
    pub fn fill(self, value: f32) -> Result<()> {
        match self.repr {
            ReprMut::Host(mut v) => {
                for i in 0..v.rows() {
                    v.row_mut(i).fill(value);
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            ReprMut::Cuda(v) => crate::cuda::ops::fill(v, value),
        }
    }

    /// Copies `from`, of the same shape, from any device and type; f32 host memory is rounded to the elements' type.
    ///
    /// # Errors
    /// If the shapes differ, or the device fails.
    pub fn copy_from(self, from: View) -> Result<()> {
        const OP: &str = "copy";
        from.expect(OP, "the source", self.rows(), self.cols())?;
        match (self.repr, from.repr) {
            (ReprMut::Host(mut to), Repr::Host(from)) => {
                for i in 0..from.rows() {
                    to.row_mut(i).copy_from_slice(from.row(i));
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            (ReprMut::Host(mut to), Repr::Cuda(from)) => {
                let cols = from.cols();
                let values = from.to_vec()?;
                for (i, row) in values.chunks_exact(cols.max(1)).enumerate() {
                    to.row_mut(i).copy_from_slice(row);
                }
                Ok(())
            }
            #[cfg(feature = "cuda")]
            (ReprMut::Cuda(to), Repr::Host(from)) => to.upload(from),
            #[cfg(feature = "cuda")]
            (ReprMut::Cuda(to), Repr::Cuda(from)) => crate::cuda::ops::cast(from, to),
        }
    }

    /// An error that names `op` and `what` unless the shape is `rows x cols`.
    pub fn expect(&self, op: &'static str, what: &'static str, rows: usize, cols: usize) -> Result<()> {
        Error::check_shape(op, what, &self.shape(), &[rows, cols])
    }
}

#[cfg(feature = "cuda")]
impl<'a> View<'a> {
    /// The GPU the elements are on, if they are on one.
    pub fn gpu(&self) -> Option<&'a Gpu> {
        match self.repr {
            Repr::Host(_) => None,
            Repr::Cuda(v) => Some(v.gpu()),
        }
    }

    /// The CUDA representation, or an error that names `op`.
    pub fn cuda(&self, op: &'static str) -> Result<CudaView<'a>> {
        match self.repr {
            Repr::Host(_) => Err(Error::invalid(op, "an argument is on the CPU, the others are on the GPU")),
            Repr::Cuda(v) => Ok(v),
        }
    }
}

#[cfg(feature = "cuda")]
impl<'a> ViewMut<'a> {
    /// The GPU the elements are on, if they are on one.
    pub fn gpu(&self) -> Option<&'a Gpu> {
        match &self.repr {
            ReprMut::Host(_) => None,
            ReprMut::Cuda(v) => Some(v.gpu()),
        }
    }

    /// The CUDA representation, or an error that names `op`.
    pub fn cuda(self, op: &'static str) -> Result<CudaViewMut<'a>> {
        match self.repr {
            ReprMut::Host(_) => Err(Error::invalid(op, "an argument is on the CPU, the others are on the GPU")),
            ReprMut::Cuda(v) => Ok(v),
        }
    }
}

impl<'a> From<&'a [f32]> for View<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::vector(data)
    }
}

impl<'a> From<&'a Vec<f32>> for View<'a> {
    fn from(data: &'a Vec<f32>) -> Self {
        Self::vector(data)
    }
}

impl<'a, const N: usize> From<&'a [f32; N]> for View<'a> {
    fn from(data: &'a [f32; N]) -> Self {
        Self::vector(data)
    }
}

impl<'a> From<&'a mut [f32]> for ViewMut<'a> {
    fn from(data: &'a mut [f32]) -> Self {
        Self::vector(data)
    }
}

impl<'a> From<&'a mut Vec<f32>> for ViewMut<'a> {
    fn from(data: &'a mut Vec<f32>) -> Self {
        Self::vector(data)
    }
}

impl<'a, const N: usize> From<&'a mut [f32; N]> for ViewMut<'a> {
    fn from(data: &'a mut [f32; N]) -> Self {
        Self::vector(data)
    }
}

#[cfg(feature = "cuda")]
impl<'a> From<CudaView<'a>> for View<'a> {
    fn from(view: CudaView<'a>) -> Self {
        Self { repr: Repr::Cuda(view) }
    }
}

#[cfg(feature = "cuda")]
impl<'a> From<CudaViewMut<'a>> for ViewMut<'a> {
    fn from(view: CudaViewMut<'a>) -> Self {
        Self { repr: ReprMut::Cuda(view) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rayon::iter::ParallelIterator;

    #[test]
    fn windows_address_the_elements_they_name() {
        let data: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let view = View::new(&data, 4, 6).slice_rows(1..3).slice_cols(2..5);
        let host = view.host("test").unwrap();
        assert_eq!(host.row(0), [8.0, 9.0, 10.0]);
        assert_eq!(host.row(1), [14.0, 15.0, 16.0]);
        assert!(host.as_slice().is_none());
        assert_eq!(view.shape(), [2, 3]);
    }

    #[test]
    fn split_columns_are_written_independently() {
        let mut data = vec![0.0; 12];
        let (mut left, right) = ViewMut::new(&mut data, 3, 4).split_cols(1);
        right.host("test").unwrap().par_rows_mut().for_each(|row| row.fill(2.0));
        left.reborrow().host("test").unwrap().rows_mut().for_each(|row| row.fill(1.0));
        assert_eq!(data, [1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.0, 2.0]);
    }

    #[test]
    #[should_panic(expected = "does not fit")]
    fn a_window_outside_its_memory_is_refused() {
        View::strided(&[0.0; 10], 3, 4, 4);
    }

    #[test]
    fn a_window_without_gaps_can_be_reshaped() {
        let mut data: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let heads = View::new(&data, 2, 6).reshape(6, 2);
        assert_eq!(heads.shape(), [6, 2]);
        assert_eq!(heads.host("test").unwrap().row(4), [8.0, 9.0]);
        // One row has no gap, whatever the stride.
        assert_eq!(View::strided(&data, 1, 6, 100).reshape(3, 2).host("test").unwrap().row(2), [4.0, 5.0]);
        ViewMut::new(&mut data, 2, 6).reshape(3, 4).host("test").unwrap().row_mut(2).fill(-1.0);
        assert_eq!(data[7..], [7.0, -1.0, -1.0, -1.0, -1.0]);
    }

    #[test]
    #[should_panic(expected = "with gaps")]
    fn a_window_with_gaps_cannot_be_reshaped() {
        View::strided(&[0.0; 12], 2, 4, 6).reshape(4, 2);
    }

    #[test]
    #[should_panic(expected = "cannot be reshaped")]
    fn reshaping_keeps_the_number_of_elements() {
        ViewMut::new(&mut [0.0; 12], 2, 6).reshape(4, 4);
    }

    #[test]
    fn empty_windows_are_fine() {
        let view = View::new(&[], 0, 5).slice_cols(2..4);
        assert_eq!(view.shape(), [0, 2]);
        let mut data: [f32; 0] = [];
        ViewMut::new(&mut data, 0, 5).host("test").unwrap().par_rows_mut().for_each(|_| unreachable!());
    }
}
