//! The sum of two matrices: `y += x`.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};

use crate::error::Result;
use crate::parallel::rows_per_task;
use crate::view::{View, ViewMut};

/// Adds `x [rows, cols]` to `y`; the sum is rounded to the elements' type.
///
/// # Errors
/// If the shapes differ, or the device fails.
pub fn add(x: View, y: ViewMut) -> Result<()> {
    const OP: &str = "add";
    y.expect(OP, "y", x.rows(), x.cols())?;
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return crate::cuda::ops::add(OP, x.cuda(OP)?, y.cuda(OP)?);
    }
    let (x, cols) = (x.host(OP)?, y.cols());
    let rows = y.host(OP)?.par_rows_mut().enumerate().with_min_len(rows_per_task(cols));
    rows.for_each(|(i, row)| row.iter_mut().zip(x.row(i)).for_each(|(y, x)| *y += x));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SHAPES, Window, random};

    #[test]
    fn every_element_of_the_window_is_added() {
        for (rows, cols) in SHAPES {
            let (x, mut y) = (random(3)(rows * cols), random(4)(rows * cols));
            let mut sum = Window::of(&y, rows, cols, 3);
            add(Window::of(&x, rows, cols, 5).view(), sum.view_mut()).unwrap();
            y.iter_mut().zip(&x).for_each(|(y, x)| *y += x);
            assert_eq!(sum.to_vec(), y);
        }
    }
}
