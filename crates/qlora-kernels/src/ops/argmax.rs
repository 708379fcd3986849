//! The column of the largest element of every row: the next tokens of greedy decoding. Of equal elements the first.

use crate::error::Result;
use crate::view::View;

/// The columns; none for a row that has no largest element: it holds a NaN or +infinity, or nothing but -infinity.
///
/// # Errors
/// If the device fails.
pub fn rows(x: View) -> Result<Vec<Option<u32>>> {
    const OP: &str = "argmax";
    #[cfg(feature = "cuda")]
    if x.gpu().is_some() {
        return crate::cuda::decode::argmax(OP, x.cuda(OP)?);
    }
    let x = x.host(OP)?;
    let of_row = |row: &[f32]| {
        let mut best: Option<(usize, f32)> = None;
        for (column, &value) in row.iter().enumerate() {
            if value.is_nan() || value == f32::INFINITY {
                return None;
            }
            if value > best.map_or(f32::NEG_INFINITY, |(_, best)| best) {
                best = Some((column, value));
            }
        }
        best.map(|(column, _)| column as u32)
    };
    Ok((0..x.rows()).map(|row| of_row(x.row(row))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_largest() {
        const INF: f32 = f32::INFINITY;
        let x = [1.0, 3.0, 3.0, -INF, 2.0, -INF, f32::NAN, 1.0, 0.0, INF, 1.0, 0.0, -INF, -INF, -INF, -5.0, -4.0, -6.0];
        let rows = rows(View::new(&x, 6, 3)).unwrap();
        assert_eq!(rows, [Some(1), Some(1), None, None, None, Some(1)]);
    }
}
