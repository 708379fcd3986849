//! Windows into host memory: f32 rows.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, ParallelIterator};

/// The CPU representation of a [`View`](crate::View): f32 rows.
#[derive(Clone, Copy, Debug)]
pub struct HostView<'a> {
    ptr: *const f32,
    rows: usize,
    cols: usize,
    stride: usize,
    memory: PhantomData<&'a [f32]>,
}

/// The CPU representation of a [`ViewMut`](crate::ViewMut): f32 rows.
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
pub(crate) fn check_window(len: usize, rows: usize, cols: usize, stride: usize) {
    assert!(stride >= cols || rows <= 1, "row stride {stride} is less than the {cols} columns");
    let needed = match rows {
        0 => 0,
        _ => stride.checked_mul(rows - 1).and_then(|n| n.checked_add(cols)).expect("window size overflows"),
    };
    assert!(needed <= len, "a window of {rows} x {cols} (stride {stride}) does not fit {len} elements");
}

/// Panics unless `from` is one run of elements, as many as `to` has: the window then addresses the same memory.
pub(crate) fn check_reshape(from: [usize; 2], stride: usize, to: [usize; 2]) {
    let [rows, cols] = from;
    assert!(stride == cols || rows <= 1, "a window with gaps (stride {stride}, {cols} columns) cannot be reshaped");
    assert_eq!(to[0].checked_mul(to[1]), Some(rows * cols), "{from:?} cannot be reshaped to {to:?}");
}

impl<'a> HostView<'a> {
    /// `rows x cols` consecutive elements: memory that an operation itself holds.
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
        Self { ptr: data.as_ptr(), rows, cols, stride, memory: PhantomData }
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
        assert_eq!(data.len(), rows * cols, "{} elements cannot be viewed as {rows} x {cols}", data.len());
        Self::strided(data, rows, cols, cols)
    }

    /// `rows x cols` elements whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If the window does not fit `data`.
    pub fn strided(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check_window(data.len(), rows, cols, stride);
        Self { ptr: data.as_mut_ptr(), rows, cols, stride, memory: PhantomData }
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

    /// The columns in `range`.
    pub fn slice_cols(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols, "columns {range:?} of {}", self.cols);
        let (_, right) = self.split_cols(range.start);
        right.split_cols(range.end - range.start).0
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
