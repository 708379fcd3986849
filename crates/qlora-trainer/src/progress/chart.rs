//! A line chart as SVG text: axes with round numbers, a legend, nothing else. Any browser shows it; no fonts are needed to
//! make it.

use std::fmt::Write;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 52.0;
const BOTTOM: f64 = 58.0;

/// A chart of one or more series over the same axes.
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) x_label: &'a str,
    pub(super) y_label: &'a str,
    pub(super) series: Vec<Series<'a>>,
}

/// Points with a name; a series without points is not drawn.
pub(super) struct Series<'a> {
    pub(super) label: &'a str,
    pub(super) style: Style,
    pub(super) points: Vec<(f64, f64)>,
}

/// How a series looks.
#[derive(Clone, Copy)]
pub(super) enum Style {
    Dots,
    Thick,
    Thin,
}

impl Style {
    fn stroke(self) -> &'static str {
        match self {
            Self::Dots => r##"stroke="#d95f02" stroke-width="1.5""##,
            Self::Thick => r##"stroke="#1f5fa8" stroke-width="2.5""##,
            Self::Thin => r##"stroke="#9dc3e6" stroke-width="1""##,
        }
    }
}

/// An axis: what it covers, and where it has numbers.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
}

impl Axis {
    /// Covers all values, from and to a round number.
    fn around(values: impl Iterator<Item = f64> + Clone, ticks: f64) -> Self {
        let finite = values.filter(|value| value.is_finite());
        let low = finite.clone().fold(f64::INFINITY, f64::min);
        let high = finite.fold(f64::NEG_INFINITY, f64::max);
        if low > high {
            return Self { low: 0.0, high: 1.0, step: 0.2 };
        }
        // A constant gets some room, too.
        let room = if high > low { 0.0 } else { (0.05 * high.abs()).max(0.5) };
        let (low, high) = (low - room, high + room);
        let step = round_step((high - low) / ticks);
        Self { low: (low / step).floor() * step, high: (high / step).ceil() * step, step }
    }

    /// For steps, which are whole numbers from 0 on.
    fn of_steps(values: impl Iterator<Item = f64> + Clone) -> Self {
        let last = values.fold(1.0, f64::max);
        Self { low: 0.0, high: last, step: round_step(last / 8.0).max(1.0) }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        let count = ((self.high - self.low) / self.step + 1e-6).floor() as usize;
        (0..=count).map(|i| self.low + i as f64 * self.step)
    }

    fn label(&self, value: f64) -> String {
        let decimals = (-self.step.log10()).ceil().max(0.0) as usize;
        format!("{value:.decimals$}")
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is at least `step`.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= step * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

impl Chart<'_> {
    pub(super) fn to_svg(&self) -> String {
        let points = self.series.iter().flat_map(|series| &series.points);
        let x = Axis::of_steps(points.clone().map(|point| point.0));
        let y = Axis::around(points.map(|point| point.1), 7.0);
        let mut svg = String::new();
        self.draw(&mut svg, &x, &y).expect("writing to a string does not fail");
        svg
    }

    fn draw(&self, svg: &mut String, x: &Axis, y: &Axis) -> std::fmt::Result {
        let (right, bottom) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let px = |value: f64| LEFT + x.share(value) * (right - LEFT);
        let py = |value: f64| bottom - y.share(value) * (bottom - TOP);
        writeln!(
            svg,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="none">"#
        )?;
        writeln!(svg, r#"<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>"#)?;
        writeln!(svg, r##"<g fill="#333333">"##)?;
        let title = escaped(self.title);
        writeln!(svg, r#"<text x="{LEFT}" y="28" font-size="16" font-weight="bold">{title}</text>"#)?;
        for value in y.ticks() {
            let (at, label) = (py(value), y.label(value));
            writeln!(svg, r##"<path d="M{LEFT} {at:.1}H{right}" stroke="#e4e4e4"/>"##)?;
            writeln!(svg, r#"<text x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#, LEFT - 8.0, at + 4.5)?;
        }
        for value in x.ticks() {
            let (at, label) = (px(value), x.label(value));
            writeln!(svg, r##"<path d="M{at:.1} {bottom}v5" stroke="#333333"/>"##)?;
            writeln!(svg, r#"<text x="{at:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#, bottom + 20.0)?;
        }
        writeln!(svg, r##"<path d="M{LEFT} {TOP}V{bottom}H{right}" stroke="#333333" fill="none"/>"##)?;
        let (middle, label) = ((LEFT + right) / 2.0, escaped(self.x_label));
        writeln!(svg, r#"<text x="{middle:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#, HEIGHT - 14.0)?;
        let (middle, label) = ((TOP + bottom) / 2.0, escaped(self.y_label));
        writeln!(
            svg,
            r#"<text transform="translate(20 {middle:.1}) rotate(-90)" text-anchor="middle">{label}</text>"#
        )?;
        writeln!(svg, "</g>")?;
        for series in &self.series {
            series.draw(svg, px, py)?;
        }
        self.draw_legend(svg, right)
    }

    fn draw_legend(&self, svg: &mut String, right: f64) -> std::fmt::Result {
        let drawn = self.series.iter().filter(|series| !series.points.is_empty());
        for (i, series) in drawn.enumerate() {
            let (x, y) = (right - 170.0, TOP + 14.0 + 20.0 * i as f64);
            writeln!(svg, r#"<path d="M{x:.1} {y:.1}h28" {}/>"#, series.style.stroke())?;
            if let Style::Dots = series.style {
                writeln!(svg, r##"<circle cx="{:.1}" cy="{y:.1}" r="3.5" fill="#d95f02"/>"##, x + 14.0)?;
            }
            let label = escaped(series.label);
            writeln!(svg, r##"<text x="{:.1}" y="{:.1}" fill="#333333">{label}</text>"##, x + 36.0, y + 4.5)?;
        }
        svg.push_str("</svg>\n");
        Ok(())
    }
}

impl Series<'_> {
    fn draw(&self, svg: &mut String, px: impl Fn(f64) -> f64, py: impl Fn(f64) -> f64) -> std::fmt::Result {
        if self.points.is_empty() {
            return Ok(());
        }
        write!(svg, r#"<polyline {} stroke-linejoin="round" points=""#, self.style.stroke())?;
        for &(x, y) in &self.points {
            write!(svg, "{:.1},{:.1} ", px(x), py(y))?;
        }
        writeln!(svg, r#""/>"#)?;
        if let Style::Dots = self.style {
            for &(x, y) in &self.points {
                writeln!(svg, r##"<circle cx="{:.1}" cy="{:.1}" r="3.5" fill="#d95f02"/>"##, px(x), py(y))?;
            }
        }
        Ok(())
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_round_numbers_around_the_data() {
        let axis = Axis::around([0.43, 2.31].into_iter(), 7.0);
        assert!(axis.low <= 0.43 && axis.high >= 2.31);
        let labels: Vec<_> = axis.ticks().map(|value| axis.label(value)).collect();
        assert_eq!(labels, ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5"]);
        let steps = Axis::of_steps([1.0, 300.0].into_iter());
        assert_eq!(
            steps.ticks().map(|value| steps.label(value)).collect::<Vec<_>>(),
            ["0", "50", "100", "150", "200", "250", "300"]
        );
    }

    #[test]
    fn odd_data_gives_finite_axes() {
        for values in [vec![], vec![0.0], vec![3.0, 3.0], vec![f64::NAN], vec![1e-9, 2e-9], vec![1e12, 2e12]] {
            let axis = Axis::around(values.iter().copied(), 7.0);
            assert!(axis.high > axis.low && axis.step > 0.0, "{values:?}");
            assert!((2..20).contains(&axis.ticks().count()), "{values:?}");
        }
    }

    #[test]
    fn steps_are_rounded_up() {
        for (step, expected) in [(0.13, 0.2), (0.2, 0.2), (0.21, 0.5), (0.6, 1.0), (3.0, 5.0), (70.0, 100.0)] {
            assert!((round_step(step) / expected - 1.0).abs() < 1e-9, "{step}");
        }
    }
}
