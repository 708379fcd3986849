//! Two-dimensional windows into memory: the arguments of every operation.
//!
//! A [`View`] is `rows x cols` elements; each row is contiguous, consecutive rows are `stride >= cols` elements apart.
//! Activations are `[tokens, width]`. A vector is a view of one row. [`ViewMut`] is the writable kind; the borrow
//! checker keeps two writable views apart, and [`ViewMut::split_cols`] cuts one into disjoint windows.
//!
//! On the CPU the elements are f32. Views of other devices get their own variant of the private data field; operations
//! ask for the representation they implement ([`View::host`]), which fails with the operation's name on any other.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

use crate::error::{Error, Result};

/// A read-only window of `rows x cols` elements.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    host: HostView<'a>,
}

/// A writable window of `rows x cols` elements.
#[derive(Debug)]
pub struct ViewMut<'a> {
    host: HostViewMut<'a>,
}

/// The CPU representation of a [`View`]: f32 rows.
#[derive(Clone, Copy, Debug)]
pub struct HostView<'a> {
    ptr: *const f32,
    rows: usize,
    cols: usize,
    stride: usize,
    memory: PhantomData<&'a [f32]>,
}

/// The CPU representation of a [`ViewMut`]: f32 rows.
#[derive(Debug)]
pub struct HostViewMut<'a> {
    ptr: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    memory: PhantomData<&'a mut [f32]>,
}

// SAFETY: a HostView is a shared borrow of f32 memory, as `&[f32]` is.
unsafe impl Send for HostView<'_> {}
// SAFETY: as above.
unsafe impl Sync for HostView<'_> {}
// SAFETY: a HostViewMut is the only access to its elements, as `&mut [f32]` is.
unsafe impl Send for HostViewMut<'_> {}
// SAFETY: a shared reference to it only gives reads.
unsafe impl Sync for HostViewMut<'_> {}

/// Panics unless `rows` rows of `cols` elements at `stride` lie within `len` elements: the constructors' one check, on
/// which the unsafe code below rests.
fn check_window(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(stride >= cols || rows <= 1, "row stride {stride} is less than the {cols} columns");
    let needed = match rows {
        0 => 0,
        _ => stride.checked_mul(rows - 1).and_then(|n| n.checked_add(cols)).expect("window size overflows"),
    };
    assert!(needed <= len, "a window of {rows} x {cols} (stride {stride}) does not fit {len} elements");
}

/// Panics unless `from` is one run of elements, as many as `to` has: the window then addresses the same memory.
fn check_reshape(from: [usize; 2], stride: usize, to: [usize; 2]) {
    let [rows, cols] = from;
    assert!(stride == cols || rows <= 1, "a window with gaps (stride {stride}, {cols} columns) cannot be reshaped");
    assert_eq!(to[0].checked_mul(to[1]), Some(rows * cols), "{from:?} cannot be reshaped to {to:?}");
}

impl<'a> View<'a> {
    /// `rows x cols` consecutive elements.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{} elements cannot be viewed as {rows} x {cols}", data.len());
        Self::strided(data, rows, cols, cols)
    }

    /// `rows x cols` elements whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the window does not fit `data`.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check_window(data.len(), rows, cols, stride);
        Self { host: HostView { ptr: data.as_ptr(), rows, cols, stride, memory: PhantomData } }
    }

    /// One row.
    pub fn vector(data: &'a [f32]) -> Self {
        Self::new(data, 1, data.len())
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.host.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.host.cols
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.host.rows, self.host.cols]
    }

    /// The rows in `range`.
    pub fn slice_rows(&self, range: Range<usize>) -> Self {
        Self { host: self.host.slice_rows(range) }
    }

    /// The columns in `range`.
    pub fn slice_cols(&self, range: Range<usize>) -> Self {
        Self { host: self.host.slice_cols(range) }
    }

    /// The same elements as `rows x cols`, row by row: `[tokens, heads * d]` becomes `[tokens * heads, d]`.
    ///
    /// # Panics
    /// If there are gaps between the rows, or the number of elements differs.
    pub fn reshape(&self, rows: usize, cols: usize) -> Self {
        Self { host: self.host.reshape(rows, cols) }
    }

    /// The CPU representation, or an error that names `op`.
    pub fn host(&self, op: &'static str) -> Result<HostView<'a>> {
        let _ = op;
        Ok(self.host)
    }

    /// An error that names `op` and `what` unless the shape is `rows x cols`.
    pub fn expect(&self, op: &'static str, what: &'static str, rows: usize, cols: usize) -> Result<()> {
        Error::check_shape(op, what, &self.shape(), &[rows, cols])
    }
}

impl<'a> ViewMut<'a> {
    /// `rows x cols` consecutive elements.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "{} elements cannot be viewed as {rows} x {cols}", data.len());
        Self::strided(data, rows, cols, cols)
    }

    /// `rows x cols` elements whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the window does not fit `data`.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check_window(data.len(), rows, cols, stride);
        Self { host: HostViewMut { ptr: data.as_mut_ptr(), rows, cols, stride, memory: PhantomData } }
    }

    /// One row.
    pub fn vector(data: &'a mut [f32]) -> Self {
        let len = data.len();
        Self::new(data, 1, len)
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.host.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.host.cols
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.host.rows, self.host.cols]
    }

    /// The same window, readable, for as long as `self` is not written.
    pub fn as_view(&self) -> View<'_> {
        View { host: self.host.as_view() }
    }

    /// The same window for a shorter time: what is handed to an operation that the caller goes on writing after.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { host: self.host.reborrow() }
    }

    /// The rows in `range`.
    pub fn slice_rows(self, range: Range<usize>) -> Self {
        Self { host: self.host.slice_rows(range) }
    }

    /// The columns in `range`.
    pub fn slice_cols(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.host.cols, "columns {range:?} of {}", self.host.cols);
        let (_, right) = self.host.split_cols(range.start);
        Self { host: right.split_cols(range.end - range.start).0 }
    }

    /// The columns before and from `at`, as two windows that can be written at the same time.
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        let (left, right) = self.host.split_cols(at);
        (Self { host: left }, Self { host: right })
    }

    /// The same elements as `rows x cols`, row by row: `[tokens, heads * d]` becomes `[tokens * heads, d]`.
    ///
    /// # Panics
    /// If there are gaps between the rows, or the number of elements differs.
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        Self { host: self.host.reshape(rows, cols) }
    }

    /// The CPU representation, or an error that names `op`.
    pub fn host(self, op: &'static str) -> Result<HostViewMut<'a>> {
        let _ = op;
        Ok(self.host)
    }

    /// An error that names `op` and `what` unless the shape is `rows x cols`.
    pub fn expect(&self, op: &'static str, what: &'static str, rows: usize, cols: usize) -> Result<()> {
        Error::check_shape(op, what, &self.shape(), &[rows, cols])
    }
}

impl<'a> HostView<'a> {
    /// `rows x cols` consecutive elements: memory that an operation itself holds.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        View::new(data, rows, cols).host
    }

    /// `rows x cols` elements whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the window does not fit `data`.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        View::strided(data, rows, cols, stride).host
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements between the starts of consecutive rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The first element.
    pub fn as_ptr(&self) -> *const f32 {
        self.ptr
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &'a [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the constructor checked that all rows lie within memory borrowed for 'a, and i is in range.
        unsafe { std::slice::from_raw_parts(self.ptr.add(i * self.stride), self.cols) }
    }

    /// All rows as one slice, if they follow each other without a gap.
    pub fn as_slice(&self) -> Option<&'a [f32]> {
        let gapless = self.stride == self.cols || self.rows <= 1;
        // SAFETY: the constructor checked that all rows lie within memory borrowed for 'a; without gaps they are one
        // run of rows * cols elements.
        gapless.then(|| unsafe { std::slice::from_raw_parts(self.ptr, self.rows * self.cols) })
    }

    /// The same elements as `rows x cols`.
    ///
    /// # Panics
    /// If there are gaps between the rows, or the number of elements differs.
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        check_reshape([self.rows, self.cols], self.stride, [rows, cols]);
        Self { rows, cols, stride: cols, ..self }
    }

    /// The rows in `range`.
    pub fn slice_rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let rows = range.end - range.start;
        // An empty window keeps the base pointer: the offset could lie outside the allocation.
        let offset = if rows == 0 { 0 } else { range.start * self.stride };
        // SAFETY: the offset is that of an existing row.
        Self { ptr: unsafe { self.ptr.add(offset) }, rows, ..self }
    }

    /// The columns in `range`.
    pub fn slice_cols(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        let offset = if self.rows == 0 { 0 } else { range.start };
        // SAFETY: the offset lies within the first row (or at its end, for an empty range).
        Self { ptr: unsafe { self.ptr.add(offset) }, cols: range.end - range.start, ..self }
    }
}

impl<'a> HostViewMut<'a> {
    /// `rows x cols` consecutive elements: memory that an operation itself holds.
    ///
    /// # Panics
    /// If `data` has another length.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        ViewMut::new(data, rows, cols).host
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements between the starts of consecutive rows.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The first element.
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.ptr
    }

    /// The same window, readable.
    pub fn as_view(&self) -> HostView<'_> {
        HostView { ptr: self.ptr, rows: self.rows, cols: self.cols, stride: self.stride, memory: PhantomData }
    }

    /// The same window for a shorter time.
    pub fn reborrow(&mut self) -> HostViewMut<'_> {
        HostViewMut { ptr: self.ptr, rows: self.rows, cols: self.cols, stride: self.stride, memory: PhantomData }
    }

    /// Row `i`, readable.
    pub fn row(&self, i: usize) -> &[f32] {
        self.as_view().row_of_any_lifetime(i)
    }

    /// Row `i`.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the constructor checked that all rows lie within memory borrowed mutably for 'a, i is in range, and
        // the result borrows self.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(i * self.stride), self.cols) }
    }

    /// All rows as one slice, if they follow each other without a gap.
    pub fn as_mut_slice(&mut self) -> Option<&mut [f32]> {
        let gapless = self.stride == self.cols || self.rows <= 1;
        // SAFETY: as for row_mut; without gaps the rows are one run of rows * cols elements.
        gapless.then(|| unsafe { std::slice::from_raw_parts_mut(self.ptr, self.rows * self.cols) })
    }

    /// The same elements as `rows x cols`.
    ///
    /// # Panics
    /// If there are gaps between the rows, or the number of elements differs.
    pub fn reshape(self, rows: usize, cols: usize) -> Self {
        check_reshape([self.rows, self.cols], self.stride, [rows, cols]);
        Self { rows, cols, stride: cols, ..self }
    }

    /// The rows in `range`.
    pub fn slice_rows(self, range: Range<usize>) -> Self {
        let (_, rest) = self.split_rows(range.start);
        rest.split_rows(range.end.checked_sub(range.start).expect("range ends before it starts")).0
    }

    /// The rows before and from `at`.
    pub fn split_rows(self, at: usize) -> (Self, Self) {
        assert!(at <= self.rows, "row {at} of {}", self.rows);
        let offset = if at == self.rows { 0 } else { at * self.stride };
        // SAFETY: the offset is that of an existing row; the two windows share no row.
        let below = unsafe { self.ptr.add(offset) };
        let (cols, stride, memory) = (self.cols, self.stride, PhantomData);
        let upper = Self { ptr: self.ptr, rows: at, cols, stride, memory };
        (upper, Self { ptr: below, rows: self.rows - at, cols, stride, memory })
    }

    /// The columns before and from `at`.
    pub fn split_cols(self, at: usize) -> (Self, Self) {
        assert!(at <= self.cols, "column {at} of {}", self.cols);
        let offset = if self.rows == 0 { 0 } else { at };
        // SAFETY: the offset lies within the first row or at its end; the two windows share no column.
        let right = unsafe { self.ptr.add(offset) };
        let (rows, stride, memory) = (self.rows, self.stride, PhantomData);
        let left = Self { ptr: self.ptr, rows, cols: at, stride, memory };
        (left, Self { ptr: right, rows, cols: self.cols - at, stride, memory })
    }

    /// The rows, each with its index, in order.
    pub fn rows_mut(self) -> impl Iterator<Item = &'a mut [f32]> {
        let (ptr, cols, stride) = (self.ptr, self.cols, self.stride);
        // SAFETY: every row is handed out once, `self` is consumed, and stride >= cols keeps the rows apart.
        (0..self.rows).map(move |i| unsafe { std::slice::from_raw_parts_mut(ptr.add(i * stride), cols) })
    }

    /// The rows as a parallel iterator.
    pub fn par_rows_mut(self) -> impl IndexedParallelIterator<Item = &'a mut [f32]> {
        let window = self;
        let (cols, stride) = (window.cols, window.stride);
        let base = RowBase(window.ptr);
        (0..window.rows).into_par_iter().map(move |i| {
            let base = &base;
            // SAFETY: every row is handed out once, the window is consumed, and stride >= cols keeps the rows apart.
            unsafe { std::slice::from_raw_parts_mut(base.0.add(i * stride), cols) }
        })
    }
}

impl<'a> HostView<'a> {
    fn row_of_any_lifetime(self, i: usize) -> &'a [f32] {
        self.row(i)
    }
}

/// A pointer that may cross threads because the rows made from it never overlap.
struct RowBase(*mut f32);
// SAFETY: see par_rows_mut: disjoint rows of memory that is borrowed mutably.
unsafe impl Sync for RowBase {}
// SAFETY: as above.
unsafe impl Send for RowBase {}

#[cfg(test)]
mod tests {
    use super::*;

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
