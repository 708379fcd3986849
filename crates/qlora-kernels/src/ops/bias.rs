//! The gradient of a bias: `db[j] += sum over t of dy[t, j]`, f32, in the order of the rows.
//!
//! `dy [tokens, out]`, `db [1, out]`. The forward is part of the layer ([`super::linear_group`]). On CUDA it is a product with ones.

#[cfg(feature = "cuda")]
use super::matmul;
use crate::error::Result;
use crate::matrix::Workspace;
use crate::view::{View, ViewMut};

/// Adds the sums of the columns of `dy` to `db`.
///
/// # Errors
/// If `db` is not one row of as many elements as `dy` has columns, or the device fails.
pub fn backward(dy: View, db: ViewMut, workspace: &Workspace) -> Result<()> {
    const OP: &str = "bias";
    db.expect(OP, "db", 1, dy.cols())?;
    #[cfg(feature = "cuda")]
    if dy.gpu().is_some() {
        let mut ones = workspace.matrix(dy.rows(), 1)?;
        ones.view_mut().fill(1.0)?;
        return matmul::tn(ones.view(), dy, db, 1.0, 1.0);
    }
    let _ = workspace;
    let (dy, mut db) = (dy.host(OP)?, db.host(OP)?);
    let db = db.row_mut(0);
    for t in 0..dy.rows() {
        db.iter_mut().zip(dy.row(t)).for_each(|(sum, d)| *sum += d);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{SHAPES, Window, assert_close, random, to_f64};

    #[test]
    fn columns_are_summed_and_added() {
        for (rows, cols) in SHAPES {
            let mut random = random(2);
            let (dy, before) = (random(rows * cols), random(cols));
            let mut db = Window::of(&before, 1, cols, 3);
            backward(View::new(&dy, rows, cols), db.view_mut(), &Workspace::poisoned()).unwrap();
            let mut want = to_f64(&before);
            for row in dy.chunks_exact(cols) {
                want.iter_mut().zip(row).for_each(|(sum, &d)| *sum += f64::from(d));
            }
            assert_close("db", &db.to_vec(), &want, 1e-6);
        }
        let (dy, mut short) = ([0.0; 6], [0.0; 2]);
        let error = backward(View::new(&dy, 2, 3), ViewMut::vector(&mut short), &Workspace::poisoned());
        assert!(error.unwrap_err().to_string().contains("db has shape [1, 2], expected [1, 3]"));
    }
}
