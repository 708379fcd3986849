//! The options of Llama 3's rope scaling from the divisors of the frequencies, which are all that a GGUF file has of it.
//!
//! With the wavelength `w` of a frequency, its divisor `d` follows from
//!
//! ```text
//! 1 / d = 1 / factor + s (1 - 1 / factor)        s = (original / w - low) / (high - low), limited to 0..1
//! ```
//! Between the limits `1 / d` is linear in `1 / w`. A line has two numbers and the options are four, of which `original`, `low` and `high`
//! times any number are the same scaling. So several options give the same divisors; those of published models are tried first
//! (`low` 1 and `high` 4), and whatever is taken gives the file's divisors again.

use std::f64::consts::TAU;

use qlora_kernels::ops::rope::{RopeConfig, RopeScaling};

/// The bounds of every published model, and the length that Llama 3.1 to 3.3 were first trained for.
const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const LLAMA_3: f64 = 8192.0;
/// The share by which divisors may differ, which files have in f32.
const TOLERANCE: f64 = 1e-3;
/// A length that stands for one that is no whole number, with bounds as much larger.
const FINE: f64 = (1 << 20) as f64;

/// A frequency: its wavelength and divisor.
type Point = (f64, f64);

/// Options that may be the file's, with `low` as 1.
#[derive(Clone, Copy)]
struct Options {
    factor: f64,
    high: f64,
    original: f64,
}

impl Options {
    /// With the usual bounds, from a frequency between the limits.
    fn through((wavelength, divisor): Point, factor: f64) -> Self {
        let share = (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor);
        Self { factor, high: HIGH, original: wavelength * (LOW + share * (HIGH - LOW)) }
    }

    /// Those of a line `1 / d = slope / w + start`.
    fn on([slope, start]: [f64; 2], factor: f64) -> Self {
        let rest = 1.0 - 1.0 / factor;
        // s = a / w - b
        let (a, b) = (slope / rest, (1.0 / factor - start) / rest);
        // Bounds have few digits.
        Self { factor, high: (1e4 * (LOW + LOW / b)).round() / 1e4, original: LOW * a / b }
    }

    fn scaling(self) -> Option<RopeScaling> {
        let whole = self.original.round();
        let is_whole = (whole - self.original).abs() <= 1e-4 * self.original && whole >= 1.0;
        let (original, wider) = if is_whole { (whole, 1.0) } else { (FINE, FINE / self.original) };
        let usable = self.high > LOW && (1.0..1e9).contains(&original) && wider.is_finite() && wider > 0.0;
        usable.then_some(RopeScaling::Llama3 {
            factor: self.factor,
            low_freq_factor: LOW * wider,
            high_freq_factor: self.high * wider,
            original_max_position_embeddings: original as usize,
        })
    }
}

/// The scaling that gives these divisors of the frequencies of heads of `head_dim` elements, if one does.
pub(super) fn llama3(divisors: &[f64], theta: f64, head_dim: usize) -> Option<RopeScaling> {
    if !divisors.iter().all(|divisor| divisor.is_finite() && *divisor >= 1.0) {
        return None;
    }
    let wavelength = |i: usize| TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
    let points: Vec<Point> = divisors.iter().enumerate().map(|(i, divisor)| (wavelength(i), *divisor)).collect();
    candidates(&points).into_iter().find_map(|options| {
        let rope = RopeConfig { theta, scaling: Some(options.scaling()?) };
        let given = rope.llama3_divisors(head_dim)?;
        let same = |(divisor, given): (&f64, &f64)| (divisor - given).abs() <= TOLERANCE * given;
        divisors.iter().zip(&given).all(same).then_some(rope.scaling).flatten()
    })
}

/// Options that may give these divisors, the likelier first.
fn candidates(points: &[Point]) -> Vec<Options> {
    let is = |divisor: f64, limit: f64| (divisor - limit).abs() <= 1e-6 * limit;
    let factor = points.iter().map(|(_, divisor)| *divisor).fold(1.0, f64::max);
    let inside: Vec<Point> = points.iter().filter(|(_, d)| !is(*d, 1.0) && !is(*d, factor)).copied().collect();
    let kept = points.iter().rfind(|(_, divisor)| is(*divisor, 1.0)).copied();
    let scaled = points.iter().find(|(_, divisor)| is(*divisor, factor)).copied();
    let mut found = vec![Options { factor, high: HIGH, original: LLAMA_3 }];
    match (inside.first(), kept, scaled) {
        (Some(point), ..) => found.push(Options::through(*point, factor)),
        // A step: any length that puts it between the two.
        (None, Some((kept, _)), Some((scaled, _))) => {
            found.push(Options { factor, high: HIGH, original: (HIGH * kept * LOW * scaled).sqrt() });
        }
        _ => (),
    }
    // Other bounds: the line of the frequencies between the limits; where there is one or none, the flattest through it that reaches
    // both limits in time.
    if let Some(line) = line(&inside) {
        found.push(Options::on(line, factor));
    } else if let Some((wavelength, divisor)) = inside.first().copied().or(scaled) {
        let to = |limit: Option<Point>| {
            limit.map_or(0.0, |(other, of)| (1.0 / of - 1.0 / divisor) / (1.0 / other - 1.0 / wavelength))
        };
        let slope = to(kept).max(if inside.is_empty() { 0.0 } else { to(scaled) });
        found.push(Options::on([slope, 1.0 / divisor - slope / wavelength], factor));
    }
    // No frequency is divided by the whole factor: it is larger.
    let divided: Vec<Point> = points.iter().filter(|(_, divisor)| !is(*divisor, 1.0)).copied().collect();
    if let Some([slope, start]) = line(&divided) {
        // The one that the usual bounds need.
        let usual = HIGH / (start * (HIGH - LOW) + LOW);
        let factor = if usual > factor { (1e6 * usual).round() / 1e6 } else { factor };
        found.push(Options::on([slope, start], factor));
    } else if let Some(point) = divided.first() {
        found.push(Options::through(*point, 2.0 * factor));
    }
    found
}

/// Slope and start of `1 / divisor` over `1 / wavelength`, by the two frequencies that are farthest apart.
fn line(points: &[Point]) -> Option<[f64; 2]> {
    let [(w0, d0), .., (w1, d1)] = points else { return None };
    let slope = (1.0 / d1 - 1.0 / d0) / (1.0 / w1 - 1.0 / w0);
    Some([slope, 1.0 / d0 - slope / w0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, factor: f64, low: f64, high: f64, original: usize) -> RopeConfig {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_max_position_embeddings: original,
        };
        RopeConfig { theta, scaling: Some(scaling) }
    }

    /// What a file holds, and what is read of it.
    fn read(rope: &RopeConfig, head_dim: usize) -> Option<RopeScaling> {
        let stored = rope.llama3_divisors(head_dim).unwrap().into_iter().map(|divisor| f64::from(divisor as f32));
        llama3(&stored.collect::<Vec<_>>(), rope.theta, head_dim)
    }

    #[test]
    fn options_come_back_where_the_divisors_have_them() {
        for theta in [10_000.0, 500_000.0] {
            for factor in [2.0, 8.0, 32.0] {
                for original in [512, 2048, 4096, 8000, 8192] {
                    let rope = rope(theta, factor, 1.0, 4.0, original);
                    assert_eq!(read(&rope, 128), rope.scaling, "theta {theta}");
                }
            }
        }
        // Another width of the slope.
        let other = rope(500_000.0, 8.0, 1.0, 2.5, 4096);
        assert_eq!(read(&other, 64), other.scaling);
        // Options of the same divisors: all three twice as large.
        assert_eq!(read(&rope(500_000.0, 8.0, 2.0, 8.0, 8192), 64), rope(500_000.0, 8.0, 1.0, 4.0, 4096).scaling);
    }

    #[test]
    fn divisors_of_few_frequencies_and_long_lengths_come_back() {
        for head_dim in [4, 6, 8, 16, 64, 128] {
            for theta in [100.0, 10_000.0, 1e6] {
                for original in [8, 32, 100, 4096, 8192, 32_768, 131_072] {
                    for (low, high) in [(1.0, 4.0), (1.0, 2.0), (0.5, 4.0)] {
                        let rope = rope(theta, 8.0, low, high, original);
                        let expected = rope.llama3_divisors(head_dim).unwrap();
                        if expected.iter().all(|divisor| *divisor == 1.0) {
                            continue;
                        }
                        let case = format!("{head_dim} {theta} {low} {high} {original}: {expected:?}");
                        let scaling = Some(read(&rope, head_dim).unwrap_or_else(|| panic!("{case}")));
                        let got = RopeConfig { theta, scaling }.llama3_divisors(head_dim).unwrap();
                        for (got, expected) in got.iter().zip(&expected) {
                            assert!((got - expected).abs() <= TOLERANCE * expected, "{case} {got}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn other_divisors_are_none() {
        for divisors in [
            [1.0, 2.0, 3.0, 4.0],
            [4.0, 3.0, 2.0, 1.0],
            [1.0, 8.0, 1.0, 8.0],
            [0.5, 1.0, 2.0, 2.0],
            [1.0, f64::NAN, 2.0, 2.0],
            [1.0, 1.0, 1.0, f64::INFINITY],
            [0.0, 0.0, 0.0, 0.0],
        ] {
            assert_eq!(llama3(&divisors, 10_000.0, 8), None, "{divisors:?}");
        }
    }
}
