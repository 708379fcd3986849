//! A run as one HTML page: figures, curves, configuration. It needs no other file and no network.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use qlora_core::atomic::write_atomically;

use super::chart::{Chart, Series, Style};
use super::plot::{loss_svg, thinned};
use super::{Event, Observer};
use crate::metrics::LogEntry;
use crate::samples::Sample;
use crate::trainer::Outcome;

/// The most points of a curve.
const POINTS: usize = 1000;

/// The contents of the page besides the events of the run.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ReportFacts {
    /// The title: the base model's name.
    pub title: String,
    /// The configuration as TOML.
    pub configuration: String,
    /// The data: numbers of documents and tokens, and of those that were cut or left out.
    pub data: String,
    /// Stands for the data's tokens.
    pub data_fingerprint: String,
    /// The memory plan, on a GPU.
    pub memory_plan: Option<String>,
    /// The peak that the plan predicts, in bytes.
    pub planned_peak: Option<u64>,
}

/// Keeps a page up to date: written at every evaluation and checkpoint, and at the end.
#[derive(Clone, Debug)]
pub struct HtmlReport {
    path: PathBuf,
    facts: ReportFacts,
    log: Vec<LogEntry>,
    samples: Vec<Sample>,
    state: String,
    parameters: Option<usize>,
    resumed: bool,
}

impl HtmlReport {
    /// A page at `path` (an `.html` file in a folder that exists by the first evaluation or checkpoint).
    pub fn new(path: impl Into<PathBuf>, facts: ReportFacts) -> Self {
        let state = "not begun".to_owned();
        Self { path: path.into(), facts, log: Vec::new(), samples: Vec::new(), state, parameters: None, resumed: false }
    }

    fn write(&self) {
        let page = self.page();
        if let Err(error) = write_atomically(&self.path, |file| file.write_all(page.as_bytes())) {
            tracing::warn!("the report was not written: {error}");
        }
    }

    /// The page as it is now.
    pub fn page(&self) -> String {
        let mut body = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_figures(&mut body);
        let _ = self.write_curves(&mut body);
        let _ = self.write_samples(&mut body);
        let _ = write_text(&mut body, "Data", &self.facts.data);
        let _ = self.facts.memory_plan.iter().try_for_each(|plan| write_text(&mut body, "Memory plan", plan));
        let _ = write_text(&mut body, "Configuration", &self.facts.configuration);
        let title = escaped(&self.facts.title);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n\
             <body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
        )
    }

    fn write_figures(&self, body: &mut String) -> std::fmt::Result {
        let trained = self.log.iter().filter_map(|entry| match entry {
            LogEntry::Train(entry) => Some(entry),
            LogEntry::Eval(_) => None,
        });
        let evaluated = self.log.iter().filter_map(|entry| match entry {
            LogEntry::Eval(entry) => Some(entry),
            LogEntry::Train(_) => None,
        });
        let mut rows = vec![("state", self.state.clone())];
        if let (Some(first), Some(last)) = (trained.clone().next(), trained.clone().next_back()) {
            rows.push(("steps", last.step.to_string()));
            rows.push(("epochs", format!("{:.2}", last.epoch)));
            rows.push(("loss, first and last", format!("{:.4}, {:.4}", first.loss, last.loss)));
            rows.push(("tokens", last.num_tokens.to_string()));
            let mut speeds: Vec<f64> = trained.clone().map(|entry| entry.tokens_per_second).collect();
            speeds.sort_by(f64::total_cmp);
            rows.push(("tokens a second, median", format!("{:.0}", speeds[speeds.len() / 2])));
            let gigabytes = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
            rows.extend(last.gpu_peak_memory.map(|bytes| ("GPU memory, peak", gigabytes(bytes))));
            rows.extend(self.facts.planned_peak.map(|bytes| ("GPU memory, planned", gigabytes(bytes))));
            rows.extend(last.peak_memory.map(|bytes| ("memory of the process, peak", gigabytes(bytes))));
        }
        if let Some(best) = evaluated.clone().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)) {
            rows.push(("validation loss, best", format!("{:.4} (step {})", best.eval_loss, best.step)));
        }
        if let Some(last) = evaluated.clone().next_back() {
            rows.push(("validation loss, last", format!("{:.4} (step {})", last.eval_loss, last.step)));
        }
        rows.extend(self.parameters.map(|count| ("trained parameters", count.to_string())));
        if self.resumed {
            rows.push(("resumed", "from a checkpoint".to_owned()));
        }
        rows.push(("data fingerprint", self.facts.data_fingerprint.clone()));
        rows.push(("qlora", env!("CARGO_PKG_VERSION").to_owned()));
        writeln!(body, "<table>")?;
        for (name, value) in rows {
            writeln!(body, "<tr><th>{name}</th><td>{}</td></tr>", escaped(&value))?;
        }
        writeln!(body, "</table>")
    }

    fn write_curves(&self, body: &mut String) -> std::fmt::Result {
        writeln!(body, "<figure>{}</figure>", loss_svg("loss", &self.log))?;
        type Value = fn(&crate::metrics::TrainLog) -> Option<f64>;
        let curves: [(&str, &str, Value); 4] = [
            ("learning rate", "learning rate", |entry| Some(entry.learning_rate)),
            ("speed", "tokens a second", |entry| Some(entry.tokens_per_second)),
            ("gradient", "norm before clipping", |entry| Some(entry.grad_norm)),
            ("GPU memory", "GB, peak so far", |entry| entry.gpu_peak_memory.map(|bytes| bytes as f64 / 1e9)),
        ];
        for (title, y_label, value) in curves {
            let points: Vec<(f64, f64)> = self
                .log
                .iter()
                .filter_map(|entry| match entry {
                    LogEntry::Train(entry) => Some((entry.step as f64, value(entry)?)),
                    LogEntry::Eval(_) => None,
                })
                .collect();
            if !points.is_empty() {
                let series = vec![Series { label: title, style: Style::Thick, points: thinned(&points, POINTS) }];
                let svg = Chart { title, x_label: "optimizer step", y_label, series }.to_svg();
                writeln!(body, "<figure>{svg}</figure>")?;
            }
        }
        Ok(())
    }

    /// The first and the last answer to each prompt side by side; those between on demand.
    fn write_samples(&self, body: &mut String) -> std::fmt::Result {
        let Some((first, last)) = self.samples.first().zip(self.samples.last()) else { return Ok(()) };
        // Two rows of the validation data may ask the same: a prompt is known by its place, too.
        let mut rounds: BTreeMap<(usize, &str), Vec<&Sample>> = BTreeMap::new();
        for round in self.samples.chunk_by(|a, b| a.step == b.step) {
            for (place, sample) in round.iter().enumerate() {
                rounds.entry((place, &sample.prompt)).or_default().push(sample);
            }
        }
        let has_expected = self.samples.iter().any(|sample| sample.expected.is_some());
        let expected = if has_expected { "<th>in the data</th>" } else { "" };
        writeln!(body, "<h2>Answers</h2>\n<table class=\"answers\">")?;
        writeln!(body, "<tr><th>prompt</th><th>step {}</th><th>step {}</th>{expected}</tr>", first.step, last.step)?;
        for ((_, prompt), answers) in rounds {
            let (Some(before), Some(after)) = (answers.first(), answers.last()) else { continue };
            write!(body, "<tr><td>{}", escaped(prompt))?;
            if answers.len() > 2 {
                write!(body, "<details><summary>{} answers</summary>", answers.len())?;
                for answer in &answers {
                    write!(body, "<p>step {}: {}</p>", answer.step, escaped(&answer.completion))?;
                }
                write!(body, "</details>")?;
            }
            write!(body, "</td><td>{}</td><td>{}</td>", escaped(&before.completion), escaped(&after.completion))?;
            if has_expected {
                write!(body, "<td>{}</td>", escaped(after.expected.as_deref().unwrap_or_default()))?;
            }
            writeln!(body, "</tr>")?;
        }
        writeln!(body, "</table>")
    }
}

impl Observer for HtmlReport {
    fn observe(&mut self, event: &Event<'_>) {
        match event {
            Event::Started(info) => {
                self.log = info.history.to_vec();
                self.samples = info.samples.to_vec();
                self.parameters = Some(info.trainable_parameters);
                self.resumed = info.resumed_from.is_some();
                "running".clone_into(&mut self.state);
            }
            Event::Logged(entry) => {
                self.log.push((*entry).clone());
                if matches!(entry, LogEntry::Eval(_)) {
                    self.write();
                }
            }
            Event::Samples(samples) => {
                self.samples.extend_from_slice(samples);
                self.write();
            }
            Event::Checkpoint(_) => self.write(),
            Event::Finished(outcome) => {
                let state = if *outcome == Outcome::Interrupted { "interrupted" } else { "finished" };
                state.clone_into(&mut self.state);
                self.write();
            }
            _ => {}
        }
    }
}

fn write_text(body: &mut String, title: &str, text: &str) -> std::fmt::Result {
    writeln!(body, "<h2>{title}</h2>\n<pre>{}</pre>", escaped(text.trim_end()))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

const STYLE: &str = "\
body { font: 15px/1.5 system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; max-width: 900px; margin: 2em auto; padding: 0 1em; \
color: #1f2328 }\n\
h1 { font-size: 1.5em } h2 { font-size: 1.1em; margin-top: 2em }\n\
table { border-collapse: collapse } th { text-align: left; font-weight: normal; color: #59636e; padding: 2px 2em 2px 0 }\n\
.answers { width: 100%; table-layout: fixed } .answers td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; \
border-top: 1px solid #d1d9e0; padding: 6px 1em 6px 0; font-size: 13px }\n\
figure { margin: 1.5em 0 } svg { max-width: 100%; height: auto }\n\
pre { background: #f6f8fa; padding: 1em; overflow-x: auto; font-size: 13px }";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{EvalLog, TrainLog};

    fn train(step: u64) -> LogEntry {
        LogEntry::Train(TrainLog {
            step,
            epoch: step as f64 / 10.0,
            loss: 2.0 / step as f64,
            learning_rate: 2e-4,
            grad_norm: 1.0,
            tokens: 100,
            trained_tokens: 50,
            num_tokens: 100 * step,
            tokens_per_second: 1000.0 + step as f64,
            peak_memory: Some(1_500_000_000),
            gpu_peak_memory: Some(7_000_000_000 + step),
            anonymous_memory: None,
            loss_scale: None,
            skipped_steps: None,
            ranks: None,
            metrics: Default::default(),
        })
    }

    #[test]
    fn the_page_has_figures_curves_and_configuration() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        let facts = ReportFacts {
            title: "org/model <b>".into(),
            configuration: "[lora]\nr = 16 # <".into(),
            data: "20 documents".into(),
            data_fingerprint: "abcd".into(),
            memory_plan: Some("keep everything".into()),
            planned_peak: Some(7_100_000_000),
        };
        let mut report = HtmlReport::new(&path, facts);
        (1..=20).for_each(|step| report.observe(&Event::Logged(&train(step))));
        assert!(!path.exists());
        let eval = EvalLog {
            step: 20,
            epoch: 2.0,
            eval_loss: 0.3,
            eval_trained_tokens: 5,
            eval_runtime: 0.1,
            metrics: Default::default(),
        };
        report.observe(&Event::Logged(&LogEntry::Eval(eval)));
        report.observe(&Event::Finished(Outcome::Finished));
        let page = std::fs::read_to_string(&path).unwrap();
        assert_eq!(page.matches("<svg").count(), 5, "loss, learning rate, speed, gradient, memory");
        for part in
            ["finished", "2.0000, 0.1000", "0.3000 (step 20)", "7.00 GB", "7.10 GB", "r = 16 # &lt;", "abcd", "1011"]
        {
            assert!(page.contains(part), "{part}\n{page}");
        }
        assert!(
            page.contains("org/model &lt;b&gt;") && !page.contains("http://localhost") && !page.contains("<script")
        );
    }

    #[test]
    fn answers_before_and_after_stand_side_by_side() {
        let folder = tempfile::tempdir().unwrap();
        let sample = |step: u64, prompt: &str, completion: &str, expected: Option<&str>| Sample {
            step,
            epoch: 0.0,
            prompt: prompt.to_owned(),
            completion: completion.to_owned(),
            expected: expected.map(str::to_owned),
        };
        let mut report = HtmlReport::new(folder.path().join("report.html"), ReportFacts::default());
        assert!(!report.page().contains("Answers"));
        report.observe(&Event::Samples(&[sample(0, "1 + 1?", "<i>a", None), sample(0, "2 + 2?", "b", Some("four"))]));
        report.observe(&Event::Samples(&[sample(5, "1 + 1?", "2", None), sample(5, "2 + 2?", "5", Some("four"))]));
        let page = report.page();
        for part in [
            "<th>step 0</th><th>step 5</th><th>in the data</th>",
            "<td>1 + 1?</td><td>&lt;i&gt;a</td><td>2</td><td></td>",
            "<td>2 + 2?</td><td>b</td><td>5</td><td>four</td>",
        ] {
            assert!(page.contains(part), "{part}\n{page}");
        }
        report.observe(&Event::Samples(&[sample(9, "1 + 1?", "two", None), sample(9, "2 + 2?", "4", None)]));
        assert!(report.page().contains("3 answers</summary>"));
    }

    #[test]
    fn a_run_without_steps_has_a_page_too() {
        let report = HtmlReport::new("none.html", ReportFacts::default());
        let page = report.page();
        assert!(page.contains("not begun") && page.ends_with("</html>\n"));
    }
}
