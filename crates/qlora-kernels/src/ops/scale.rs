//! Multiplication by a number: `y *= factor`, in place. It is its own backward.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};

use crate::error::Result;
use crate::parallel::rows_per_task;
use crate::view::ViewMut;

/// Multiplies every element of `y [rows, cols]`; the product is rounded to the elements' type once. A factor of 1 runs
/// nothing.
///
/// # Errors
/// If the device fails.
pub fn in_place(y: ViewMut, factor: f32) -> Result<()> {
    const OP: &str = "scale";
    if factor == 1.0 {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if y.gpu().is_some() {
        return crate::cuda::ops::scale(OP, y.cuda(OP)?, factor);
    }
    let cols = y.cols();
    let rows = y.host(OP)?.par_rows_mut();
    rows.with_min_len(rows_per_task(cols)).for_each(|row| row.iter_mut().for_each(|x| *x *= factor));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SHAPES, Window, random};

    #[test]
    fn every_element_of_the_window_is_multiplied() {
        for (rows, cols) in SHAPES {
            let data = random(3)(rows * cols);
            for factor in [0.25, 12.0, 1.0, -0.7] {
                let mut y = Window::of(&data, rows, cols, 3);
                in_place(y.view_mut(), factor).unwrap();
                let want: Vec<f32> = data.iter().map(|x| x * factor).collect();
                assert_eq!(y.to_vec(), want);
            }
        }
    }
}
