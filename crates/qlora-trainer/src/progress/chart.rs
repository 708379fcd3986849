//! A line chart as SVG text, drawn by plotters. Any browser shows it.

use plotters::coord::Shift;
use plotters::prelude::*;

const SIZE: (u32, u32) = (860, 420);
const FONT: &str = "Helvetica, Arial, sans-serif";

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

/// The look of a series.
#[derive(Clone, Copy)]
pub(super) enum Style {
    Dots,
    Thick,
    Thin,
}

impl Style {
    fn line(self) -> ShapeStyle {
        let (color, width) = match self {
            Self::Dots => (RGBColor(0xd9, 0x5f, 0x02), 2),
            Self::Thick => (RGBColor(0x1f, 0x5f, 0xa8), 3),
            Self::Thin => (RGBColor(0x9d, 0xc3, 0xe6), 1),
        };
        color.stroke_width(width)
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Failure = DrawingAreaErrorKind<std::io::Error>;

impl Chart<'_> {
    /// The picture.
    pub(super) fn to_svg(&self) -> String {
        let mut svg = String::new();
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        self.draw(&area).expect("drawing into a string does not fail");
        drop(area);
        svg
    }

    fn draw(&self, area: &Area<'_>) -> Result<(), Failure> {
        let points = self.series.iter().flat_map(|series| &series.points);
        let last = points.clone().map(|point| point.0).filter(|x| x.is_finite()).fold(1.0, f64::max);
        let (low, high) = range(points.map(|point| point.1));
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 18))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(76)
            .build_cartesian_2d(0.0..last, low..high)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .x_labels(8)
            .y_labels(7)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&number)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 13))
            .draw()?;
        for series in self.series.iter().filter(|series| !series.points.is_empty()) {
            let style = series.style.line();
            let finite = || series.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite());
            chart
                .draw_series(LineSeries::new(finite(), style))?
                .label(series.label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 26, y)], style));
            if let Style::Dots = series.style {
                chart.draw_series(finite().map(|point| Circle::new(point, 4, style.filled())))?;
            }
        }
        if self.series.iter().filter(|series| !series.points.is_empty()).count() > 1 {
            chart
                .configure_series_labels()
                .label_font((FONT, 13))
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .draw()?;
        }
        area.present()
    }
}

/// From below the smallest to above the largest finite value; something to draw an axis with where there is none.
fn range(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite());
    let low = finite.clone().fold(f64::INFINITY, f64::min);
    let high = finite.fold(f64::NEG_INFINITY, f64::max);
    if low > high {
        return (0.0, 1.0);
    }
    // A constant gets some room, too.
    let room = if high > low { 0.04 * (high - low) } else { (0.05 * high.abs()).max(1e-12) };
    (low - room, high + room)
}

/// A number on an axis: learning rates of 1e-5 and memory of 1e10 have to be readable.
fn number(value: &f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        1e5.. => format!("{value:.1e}"),
        100.0.. => format!("{value:.0}"),
        0.01.. => format!("{value:.2}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_data_gives_finite_axes() {
        for values in [vec![], vec![0.0], vec![3.0, 3.0], vec![f64::NAN], vec![1e-9, 2e-9], vec![1e12, 2e12]] {
            let (low, high) = range(values.iter().copied());
            assert!(high > low && low.is_finite() && high.is_finite(), "{values:?}");
            let points = values.iter().map(|&value| (1.0, value)).collect();
            let series = vec![Series { label: "a", style: Style::Dots, points }];
            let svg = Chart { title: "t", x_label: "x", y_label: "y", series }.to_svg();
            assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn numbers_are_short() {
        let texts = [0.0, 2e-4, 0.35, 12.5, 4_321.0, 17_376.0, 4.6e10].map(|value| number(&value));
        assert_eq!(texts, ["0", "2.0e-4", "0.35", "12.50", "4321", "17376", "4.6e10"]);
    }
}
