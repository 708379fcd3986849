//! The loss over the steps of a run as an SVG image.
//!
//! Thin: the training loss as logged; thick: its exponential moving average; dots: the evaluation loss.

use std::path::{Path, PathBuf};

use super::chart::{Chart, Series, Style};
use super::{Event, Observer};
use crate::error::Result;
use crate::metrics::LogEntry;
use qlora_core::atomic::write_atomically;

/// The most points of a line; longer logs are thinned out.
const POINTS: usize = 1000;

/// Draws the loss of a run.
///
/// The image shows `log` whole; more than a thousand entries are drawn as the means of neighbours.
pub fn loss_svg(title: &str, log: &[LogEntry]) -> String {
    let (mut train, mut eval) = (Vec::new(), Vec::new());
    for entry in log {
        match entry {
            LogEntry::Train(entry) => train.push((entry.step as f64, entry.loss)),
            LogEntry::Eval(entry) => eval.push((entry.step as f64, entry.eval_loss)),
        }
    }
    let smooth = smoothed(&train, (train.len() as f64 / 30.0).clamp(1.0, 50.0));
    let series = |label, style, points| Series { label, style, points };
    Chart {
        title,
        x_label: "optimizer step",
        y_label: "loss (nats per trained token)",
        series: vec![
            series("training", Style::Thin, thinned(&train, POINTS)),
            series("training, smoothed", Style::Thick, thinned(&smooth, POINTS)),
            series("validation", Style::Dots, eval),
        ],
    }
    .to_svg()
}

/// Writes [`loss_svg`] to a file.
///
/// # Errors
/// If the file cannot be written.
pub fn write_loss_svg(path: &Path, title: &str, log: &[LogEntry]) -> Result<()> {
    let svg = loss_svg(title, log);
    Ok(write_atomically(path, |file| file.write_all(svg.as_bytes()))?)
}

/// Keeps an image of the loss up to date: written at every evaluation and checkpoint, and at the end.
#[derive(Clone, Debug)]
pub struct LossPlot {
    path: PathBuf,
    title: String,
    log: Vec<LogEntry>,
}

impl LossPlot {
    /// An image at `path` (an `.svg` file in a folder that exists by the first evaluation or checkpoint).
    pub fn new(path: impl Into<PathBuf>, title: impl Into<String>) -> Self {
        Self { path: path.into(), title: title.into(), log: Vec::new() }
    }

    fn draw(&self) {
        if let Err(error) = write_loss_svg(&self.path, &self.title, &self.log) {
            tracing::warn!("the loss plot was not written: {error}");
        }
    }
}

impl Observer for LossPlot {
    fn observe(&mut self, event: &Event<'_>) {
        match event {
            Event::Started(info) => self.log = info.history.to_vec(),
            Event::Logged(entry) => {
                self.log.push((*entry).clone());
                if matches!(entry, LogEntry::Eval(_)) {
                    self.draw();
                }
            }
            Event::Checkpoint(_) | Event::Finished(_) => self.draw(),
            _ => {}
        }
    }
}

/// The exponential moving average over about `span` points, corrected for its start as in Adam.
fn smoothed(points: &[(f64, f64)], span: f64) -> Vec<(f64, f64)> {
    let decay = 1.0 - 1.0 / span;
    let (mut sum, mut weight) = (0.0, 0.0);
    let next = |&(x, y): &(f64, f64)| {
        sum = decay * sum + (1.0 - decay) * y;
        weight = decay * weight + (1.0 - decay);
        (x, sum / weight)
    };
    points.iter().map(next).collect()
}

/// At most `most` points: means of equally many neighbours.
pub(super) fn thinned(points: &[(f64, f64)], most: usize) -> Vec<(f64, f64)> {
    let group = points.len().div_ceil(most).max(1);
    let mean = |part: &[(f64, f64)]| {
        let n = part.len() as f64;
        (part.iter().map(|p| p.0).sum::<f64>() / n, part.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(group).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{EvalLog, TrainLog};

    fn log(steps: u64) -> Vec<LogEntry> {
        let mut log = Vec::new();
        for step in 1..=steps {
            let noise = f64::from((step as u32).wrapping_mul(2_654_435_761) >> 8) / f64::from(1 << 24);
            log.push(LogEntry::Train(TrainLog {
                step,
                epoch: 0.0,
                loss: 0.4 + 2.0 / (1.0 + step as f64 / 20.0) + 0.3 * (noise - 0.5),
                learning_rate: 0.0,
                grad_norm: 0.0,
                tokens: 0,
                trained_tokens: 0,
                num_tokens: 0,
                tokens_per_second: 0.0,
                peak_memory: None,
                gpu_peak_memory: None,
                loss_scale: None,
                skipped_steps: None,
                ranks: None,
                metrics: Default::default(),
                anonymous_memory: None,
            }));
            if step.is_multiple_of(50) {
                let eval_loss = 0.5 + 2.0 / (1.0 + step as f64 / 20.0);
                let entry = EvalLog {
                    step,
                    epoch: 0.0,
                    eval_loss,
                    eval_trained_tokens: 1,
                    eval_runtime: 0.0,
                    metrics: Default::default(),
                };
                log.push(LogEntry::Eval(entry));
            }
        }
        log
    }

    #[test]
    fn the_image_holds_all_three_series() {
        let svg = loss_svg("SmolLM2 & <friends>", &log(300));
        // Each once as a line and once in the legend.
        for color in ["#9DC3E6", "#1F5FA8", "#D95F02"] {
            assert!(svg.matches(&format!("stroke=\"{color}\"")).count() >= 2, "{color}");
        }
        assert_eq!(svg.matches("<circle").count(), 6);
        assert!(svg.contains("SmolLM2 &amp; &lt;friends&gt;"));
        if let Ok(path) = std::env::var("QLORA_PLOT_SAMPLE") {
            std::fs::write(path, svg).unwrap();
        }
    }

    #[test]
    fn long_and_short_logs_are_fine() {
        assert!(loss_svg("t", &log(20_000)).len() < 100_000);
        for steps in [0, 1, 2] {
            let svg = loss_svg("t", &log(steps));
            assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn smoothing_starts_at_the_first_value_and_follows() {
        let points: Vec<_> = (0..100).map(|i| (f64::from(i), if i < 50 { 1.0 } else { 3.0 })).collect();
        let smooth = smoothed(&points, 10.0);
        assert!((smooth[0].1 - 1.0).abs() < 1e-12 && (smooth[49].1 - 1.0).abs() < 1e-12);
        assert!(smooth[99].1 > 2.9 && smooth[60].1 < smooth[70].1);
        let thin = thinned(&points, 10);
        assert_eq!((thin.len(), thin[0], thin[9]), (10, (4.5, 1.0), (94.5, 3.0)));
    }

    #[test]
    fn the_observer_writes_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        let mut plot = LossPlot::new(&path, "run");
        let log = log(60);
        log.iter().for_each(|entry| plot.observe(&Event::Logged(entry)));
        assert!(path.exists());
        plot.observe(&Event::Finished(crate::trainer::Outcome::Finished));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), loss_svg("run", &log));
    }
}
