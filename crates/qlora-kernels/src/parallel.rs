//! The amount of work that a thread takes at a time.
//!
//! The split decides only who computes a value, never how: every row, and every element of a flat buffer, is computed
//! the same way whichever task it falls into, so results do not depend on the number of threads.

/// Elements of one task: some ten microseconds of work, far above the cost of handing it to another thread.
pub(crate) const TASK: usize = 1 << 14;

/// The least number of rows of `cols` elements worth a task of its own.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (TASK / cols.max(1)).max(1)
}
