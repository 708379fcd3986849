//! A curve as text: Braille characters, of which each has two by four dots.

/// The dots of a Braille character by column and row, as bits of its code point.
const DOTS: [[u32; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];

/// The first Braille character, which has no dots.
const EMPTY: u32 = 0x2800;

/// A mark over the curve.
pub(super) const MARK: char = '●';

/// The range of a curve's values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Range {
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Range {
    /// From the smallest to the largest finite value; none without one.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Option<Self> {
        values.filter(|value| value.is_finite()).fold(None, |range: Option<Self>, value| match range {
            None => Some(Self { low: value, high: value }),
            Some(Self { low, high }) => Some(Self { low: low.min(value), high: high.max(value) }),
        })
    }

    /// The place of a value, 0 at the top.
    fn row(self, value: f64, rows: usize) -> usize {
        let share = if self.high > self.low { (self.high - value) / (self.high - self.low) } else { 0.5 };
        (share * (rows - 1) as f64).round().clamp(0.0, (rows - 1) as f64) as usize
    }
}

/// The lines, from top to bottom, of a curve through points whose x goes from 0 to `last`; points that fall on the same dot column
/// are averaged. `marks` are drawn over it.
pub(super) fn curve(
    points: &[(f64, f64)],
    marks: &[(f64, f64)],
    last: f64,
    range: Range,
    (width, height): (usize, usize),
) -> Vec<String> {
    let (columns, rows) = (2 * width, 4 * height);
    let column = |x: f64, columns: usize| ((x / last.max(1.0)) * columns.saturating_sub(1) as f64).round() as usize;
    let mut sums = vec![(0.0, 0u32); columns];
    for &(x, y) in points.iter().filter(|(_, y)| y.is_finite()) {
        if let Some((sum, count)) = sums.get_mut(column(x, columns)) {
            (*sum, *count) = (*sum + y, *count + 1);
        }
    }
    let means = sums.iter().enumerate().filter(|(_, (_, count))| *count > 0);
    let means: Vec<(usize, usize)> =
        means.map(|(x, (sum, count))| (x, range.row(sum / f64::from(*count), rows))).collect();
    let mut cells = vec![vec![EMPTY; width]; height];
    let mut dot = |x: usize, y: usize| cells[y / 4][x / 2] |= DOTS[x % 2][y % 4];
    if let [(x, y)] = means[..] {
        dot(x, y);
    }
    for pair in means.windows(2) {
        let ((x0, y0), (x1, y1)) = (pair[0], pair[1]);
        let steps = (x1 - x0).max(y0.abs_diff(y1)).max(1);
        for i in 0..=steps {
            let between = |a: usize, b: usize| (a as f64 + (b as f64 - a as f64) * i as f64 / steps as f64).round();
            dot(between(x0, x1) as usize, between(y0, y1) as usize);
        }
    }
    let mut lines: Vec<Vec<char>> =
        cells.iter().map(|line| line.iter().filter_map(|&cell| char::from_u32(cell)).collect()).collect();
    for &(x, y) in marks.iter().filter(|(_, y)| y.is_finite()) {
        if let Some(cell) = lines[range.row(y, height)].get_mut(column(x, width)) {
            *cell = MARK;
        }
    }
    lines.into_iter().map(String::from_iter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_falling_line_goes_from_corner_to_corner() {
        let points: Vec<_> = (0..=8).map(|i| (f64::from(i), f64::from(8 - i))).collect();
        let range = Range::of(points.iter().map(|point| point.1)).unwrap();
        assert_eq!(range, Range { low: 0.0, high: 8.0 });
        assert_eq!(curve(&points, &[], 8.0, range, (4, 2)), ["⠑⢄⠀⠀", "⠀⠀⠑⢄"]);
        assert_eq!(curve(&points, &[(0.0, 0.0)], 8.0, range, (4, 2)), ["⠑⢄⠀⠀", "●⠀⠑⢄"]);
        // Half of the run: it ends in the middle, and is twice as steep.
        assert_eq!(curve(&points, &[], 16.0, range, (4, 2)), ["⠱⡀⠀⠀", "⠀⠱⡀⠀"]);
    }

    #[test]
    fn odd_values_are_left_out() {
        assert_eq!(Range::of([f64::NAN, f64::INFINITY].into_iter()), None);
        let range = Range::of([2.0].into_iter()).unwrap();
        let lines = curve(&[(0.0, f64::NAN), (1.0, 2.0)], &[(99.0, 2.0), (0.0, f64::NAN)], 1.0, range, (3, 1));
        assert_eq!(lines[0].chars().filter(|&c| c != '⠀').count(), 1, "{lines:?}");
    }
}
