//! Helpers shared by the tests of the operations: random data, windows with poisoned surroundings, f64 gradients.

use rand::{RngExt, SeedableRng};

use crate::view::{View, ViewMut};

/// Row and column counts that exercise whole vectors, remainders and single elements.
pub(crate) const SHAPES: [(usize, usize); 8] = [(1, 1), (1, 7), (7, 1), (3, 7), (2, 64), (3, 123), (2, 576), (17, 33)];

/// A source of vectors with elements from the unit normal distribution.
pub(crate) fn random(seed: u64) -> impl FnMut(usize) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    move |len| {
        (0..len)
            .map(|_| {
                let (u, v): (f64, f64) = (rng.random_range(1e-12..1.0), rng.random_range(0.0..1.0));
                ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
            })
            .collect()
    }
}

/// The elements in f64.
pub(crate) fn to_f64(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// A matrix in the middle of a larger buffer: `gap` elements lie before the first row and after every row. They hold a
/// NaN of a certain bit pattern, so that reading them spoils the result and writing them is noticed.
#[derive(Clone)]
pub(crate) struct Window {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    gap: usize,
}

const MARGIN: u32 = 0x7fc0_abcd;

impl Window {
    /// A window that holds `data`.
    pub(crate) fn of(data: &[f32], rows: usize, cols: usize, gap: usize) -> Self {
        assert_eq!(data.len(), rows * cols);
        let mut window = Self::poisoned(rows, cols, gap);
        for (i, x) in data.iter().enumerate() {
            window.data[gap + i / cols * (cols + gap) + i % cols] = *x;
        }
        window
    }

    /// A window whose elements are NaN.
    pub(crate) fn poisoned(rows: usize, cols: usize, gap: usize) -> Self {
        Self { data: vec![f32::from_bits(MARGIN); gap + rows * (cols + gap)], rows, cols, gap }
    }

    pub(crate) fn view(&self) -> View<'_> {
        View::strided(&self.data[self.gap..], self.rows, self.cols, self.cols + self.gap)
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut::strided(&mut self.data[self.gap..], self.rows, self.cols, self.cols + self.gap)
    }

    /// The elements, after a check that the surroundings were not written.
    pub(crate) fn to_vec(&self) -> Vec<f32> {
        let width = self.cols + self.gap;
        let mut inside = Vec::new();
        for (i, &x) in self.data.iter().enumerate() {
            let column = (i + width - self.gap) % width;
            if i >= self.gap && column < self.cols {
                inside.push(x);
            } else {
                assert_eq!(x.to_bits(), MARGIN, "element {i} outside the window was written");
            }
        }
        inside
    }
}

/// The gradient of `sum_i dy[i] f(x)[i]`, one central difference for each element of `x`.
pub(crate) fn numeric_gradient(x: &[f64], dy: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let mut moved = x.to_vec();
    let mut loss = |i: usize, value: f64| {
        moved[i] = value;
        let y = f(&moved);
        assert_eq!(y.len(), dy.len());
        moved[i] = x[i];
        y.iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>()
    };
    (0..x.len())
        .map(|i| {
            // Balances truncation (h^2) against the rounding of the sum (1e-16 / h).
            let h = 1e-5 * x[i].abs().max(1.0);
            (loss(i, x[i] + h) - loss(i, x[i] - h)) / (2.0 * h)
        })
        .collect()
}

/// The largest `|got - want| / (|want| + rms(want))`: relative to the element, but not below the tensor's own scale.
pub(crate) fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let rms = (want.iter().map(|x| x * x).sum::<f64>() / want.len().max(1) as f64).sqrt();
    let error = |(&got, &want): (&f32, &f64)| match (f64::from(got) - want).abs() {
        0.0 => 0.0,
        difference => difference / (want.abs() + rms),
    };
    // Unlike f64::max, keeps NaN.
    got.iter().zip(want).map(error).fold(0.0, |worst, e| if e.is_nan() || e > worst { e } else { worst })
}

/// Panics, with the error, unless [`relative_error`] is at most `tolerance`.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    let error = relative_error(got, want);
    assert!(error <= tolerance, "{what} ({} elements): relative error {error:.2e} > {tolerance:.0e}", got.len());
}

#[test]
fn the_helpers_notice_what_they_are_for() {
    assert!(relative_error(&[1.0, f32::NAN, 2.0], &[1.0, 1.0, 2.0]).is_nan());
    assert!(relative_error(&[1.0, 2.1], &[1.0, 2.0]) > 1e-2);
    let gradient = numeric_gradient(&[3.0, -2.0], &[1.0, 0.5], |x| vec![x[0] * x[0], x[0] * x[1]]);
    assert!((gradient[0] - 5.0).abs() < 1e-8 && (gradient[1] - 1.5).abs() < 1e-8);
    let mut window = Window::of(&[1.0, 2.0, 3.0, 4.0], 2, 2, 3);
    assert_eq!(window.to_vec(), [1.0, 2.0, 3.0, 4.0]);
    window.data[5] = 0.0;
    assert!(std::panic::catch_unwind(|| window.to_vec()).is_err());
}
