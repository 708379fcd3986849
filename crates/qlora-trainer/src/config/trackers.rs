//! `report_to`: the trackers that a run reports to.

use serde::{Deserialize, Serialize};

/// A program that shows the curves of runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Tracker {
    /// TensorBoard, by event files.
    TensorBoard,
}

/// The trackers of a run: `"none"`, `"tensorboard"`, `"all"`, or a list of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ReportValue")]
pub struct ReportTo(Vec<Tracker>);

impl ReportTo {
    /// Whether a run reports to this tracker.
    pub fn contains(&self, tracker: Tracker) -> bool {
        self.0.contains(&tracker)
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected \"tensorboard\", \"none\" or a list of these")]
enum ReportValue {
    Flag(bool),
    One(String),
    Many(Vec<String>),
}

impl TryFrom<ReportValue> for ReportTo {
    type Error = String;

    fn try_from(value: ReportValue) -> Result<Self, String> {
        let names = match value {
            ReportValue::Flag(false) => Vec::new(),
            ReportValue::Flag(true) => vec!["all".to_owned()],
            ReportValue::One(name) => vec![name],
            ReportValue::Many(names) => names,
        };
        let mut trackers = Vec::new();
        for name in names {
            match name.to_ascii_lowercase().as_str() {
                "" | "none" | "null" | "no" | "off" | "false" => {}
                "tensorboard" | "all" => trackers.push(Tracker::TensorBoard),
                _ => return Err(refusal(&name)),
            }
        }
        trackers.dedup();
        Ok(Self(trackers))
    }
}

fn refusal(name: &str) -> String {
    let sync = match name.to_ascii_lowercase().as_str() {
        "wandb" => ", which scripts/sync_wandb.py takes to Weights & Biases",
        "mlflow" => ", which scripts/sync_mlflow.py takes to MLflow",
        _ => "",
    };
    format!(
        "{name:?} is no tracker here; metrics go to metrics.jsonl in output_dir{sync}: write \"tensorboard\" or \"none\""
    )
}
