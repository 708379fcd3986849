//! The table of `qlora compare` as bars, drawn by plotters.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::Row;

const SIZE: (u32, u32) = (980, 560);
const FONT: &str = "Helvetica, Arial, sans-serif";
const BLUE: RGBColor = RGBColor(0x44, 0x77, 0xaa);

/// One quantity of every row.
struct Panel {
    title: &'static str,
    values: Vec<f64>,
    decimals: usize,
}

/// An SVG with a panel of bars for each quantity.
///
/// # Errors
/// If there is nothing to draw.
pub(super) fn picture(model: &str, rows: &[Row]) -> Result<String> {
    let of = |value: fn(&Row) -> f64| rows.iter().map(value).collect::<Vec<f64>>();
    let mut panels = vec![
        Panel { title: "memory, MB", values: of(|row| row.bytes as f64 / 1e6), decimals: 1 },
        Panel { title: "perplexity", values: of(|row| row.perplexity), decimals: 3 },
        Panel { title: "generation, tokens/s", values: of(|row| row.writing), decimals: 1 },
    ];
    // Where weights cannot be read back there is no error, which is not the same as none.
    if rows.iter().all(|row| row.error.is_some()) {
        let values = of(|row| 100.0 * row.error.unwrap_or_default());
        panels.insert(1, Panel { title: "error of the weights, %", values, decimals: 2 });
    }
    let names: Vec<&str> = rows.iter().map(|row| row.name).collect();
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let failed = |error: DrawingAreaErrorKind<std::io::Error>| anyhow!("the picture cannot be drawn: {error}");
        area.fill(&WHITE).map_err(failed)?;
        let title = model.rsplit('/').next().unwrap_or(model);
        let area = area.titled(title, (FONT, 18)).map_err(failed)?.margin(6, 6, 12, 12);
        for (area, panel) in area.split_evenly((2, 2)).iter().zip(&panels) {
            panel.draw(area, &names).map_err(failed)?;
        }
        area.present().map_err(failed)?;
    }
    Ok(svg)
}

impl Panel {
    fn draw<'a>(
        &self,
        area: &DrawingArea<SVGBackend<'a>, plotters::coord::Shift>,
        names: &[&str],
    ) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
        let largest = self.values.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let count = names.len() as f64;
        // Room for the figure behind the longest bar.
        let mut chart = ChartBuilder::on(area)
            .caption(self.title, (FONT, 14))
            .margin(6)
            .y_label_area_size(130)
            .build_cartesian_2d(0.0..1.3 * largest, count..0.0)?;
        let bar =
            |at: usize, value: f64| Rectangle::new([(0.0, at as f64 + 0.15), (value, at as f64 + 0.85)], BLUE.filled());
        chart.draw_series(self.values.iter().enumerate().map(|(at, &value)| bar(at, value)))?;
        let font = TextStyle::from((FONT, 12).into_font());
        for (at, (name, value)) in names.iter().zip(&self.values).enumerate() {
            let (_, y) = chart.backend_coord(&(0.0, at as f64 + 0.5));
            let (end, _) = chart.backend_coord(&(*value, 0.0));
            let (start, _) = chart.backend_coord(&(0.0, 0.0));
            let (left, top) = area.get_base_pixel();
            let figure = format!("{value:.*}", self.decimals);
            let before = font.clone().pos(Pos::new(HPos::Right, VPos::Center));
            let behind = font.clone().pos(Pos::new(HPos::Left, VPos::Center));
            area.draw_text(name, &before, (start - left - 6, y - top))?;
            area.draw_text(&figure, &behind, (end - left + 6, y - top))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_a_bar_in_every_panel() {
        let row =
            |name, error| Row { name, bytes: 5_000_000, bits: 4.1, error, perplexity: 9.5, reading: 1.0, writing: 2.0 };
        let svg = picture("org/<model>", &[row("NF4", Some(0.09)), row("none", Some(0.0))]).unwrap();
        assert_eq!(svg.matches("fill=\"#4477AA\"").count(), 8, "{svg}");
        assert!(svg.contains("&lt;model&gt;") && svg.contains("9.500"), "{svg}");
        // On a GPU weights are not read back.
        let svg = picture("m", &[row("NF4", None)]).unwrap();
        assert_eq!(svg.matches("fill=\"#4477AA\"").count(), 3, "{svg}");
        assert!(!svg.contains("error of"));
    }
}
