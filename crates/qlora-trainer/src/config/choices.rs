//! The values of keys that are neither numbers nor plain strings.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The 4-bit data type of the base's linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum QuantType {
    /// Four-bit floating point.
    Fp4,
    /// NormalFloat: the quantiles of a normal distribution.
    Nf4,
}

/// The type of activations on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ComputeDtype {
    /// bfloat16.
    #[serde(alias = "bf16", alias = "torch.bfloat16")]
    Bfloat16,
    /// IEEE half.
    #[serde(alias = "fp16", alias = "torch.float16")]
    Float16,
    /// 32-bit.
    #[serde(alias = "fp32", alias = "torch.float32")]
    Float32,
}

/// Where the frozen linear layers are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum BasePlacement {
    /// The first of the others, in this order, with which a step fits the memory.
    #[default]
    Auto,
    /// All on every device.
    Resident,
    /// In shares on the devices of the ranks.
    Sharded,
    /// In host memory.
    Streamed,
}

/// The arithmetic of the products with frozen weights on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FrozenCompute {
    /// 8-bit floating point (e4m3).
    #[serde(alias = "float8", alias = "float8_e4m3fn", alias = "e4m3")]
    Fp8,
}

impl From<FrozenCompute> for qlora_kernels::weight::FrozenCompute {
    fn from(compute: FrozenCompute) -> Self {
        match compute {
            FrozenCompute::Fp8 => Self::Fp8,
        }
    }
}

impl From<ComputeDtype> for qlora_kernels::Dtype {
    fn from(dtype: ComputeDtype) -> Self {
        match dtype {
            ComputeDtype::Bfloat16 => Self::Bf16,
            ComputeDtype::Float16 => Self::F16,
            ComputeDtype::Float32 => Self::F32,
        }
    }
}

/// Whether the backward recomputes activations instead of keeping them: `"auto"`, `true` or `false`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "CheckpointingValue", into = "CheckpointingValue")]
#[non_exhaustive]
pub enum GradientCheckpointing {
    /// The fastest choice that fits into the available memory.
    #[default]
    Auto,
    /// Every block recomputes.
    On,
    /// Nothing is recomputed; a batch that does not fit is refused.
    Off,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected \"auto\", true or false")]
enum CheckpointingValue {
    Flag(bool),
    Word(CheckpointingWord),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CheckpointingWord {
    Auto,
}

impl From<CheckpointingValue> for GradientCheckpointing {
    fn from(value: CheckpointingValue) -> Self {
        match value {
            CheckpointingValue::Flag(true) => Self::On,
            CheckpointingValue::Flag(false) => Self::Off,
            CheckpointingValue::Word(CheckpointingWord::Auto) => Self::Auto,
        }
    }
}

impl From<GradientCheckpointing> for CheckpointingValue {
    fn from(value: GradientCheckpointing) -> Self {
        match value {
            GradientCheckpointing::On => Self::Flag(true),
            GradientCheckpointing::Off => Self::Flag(false),
            GradientCheckpointing::Auto => Self::Word(CheckpointingWord::Auto),
        }
    }
}

/// The optimizer, by transformers' names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Optim {
    /// AdamW with moments of 32 bits.
    #[serde(alias = "adamw_torch_fused", alias = "paged_adamw_32bit", alias = "paged_adamw", alias = "adamw_hf")]
    #[serde(alias = "adamw", alias = "adamw_apex_fused")]
    AdamwTorch,
    /// AdamW with moments of 8 bits: a quarter of the memory, close to the same steps.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit", alias = "paged_adamw_8bit")]
    Adamw8bit,
}

/// The learning rate schedule after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scheduler {
    /// Stays, without warmup.
    Constant,
    /// Stays, after the warmup.
    ConstantWithWarmup,
    /// Half a cosine down to zero. With one cycle, the default, transformers' "cosine_with_restarts" is the same.
    #[serde(alias = "cosine_with_restarts")]
    Cosine,
    /// A straight line down to zero.
    Linear,
}

/// The treatment of a document of more than `max_length` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnOverlong {
    /// It is left out.
    Drop,
    /// The run stops.
    Error,
    /// Its start is kept.
    Truncate,
}

/// The treatment of a row that has no token to train on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum OnUntrained {
    /// The run stops.
    Error,
    /// It is left out.
    Skip,
}

/// The order of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum SamplingStrategy {
    /// Shuffled, another way in each epoch.
    Random,
    /// As in the files.
    Sequential,
}

/// One path or a list of paths.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub enum Paths {
    /// One.
    One(PathBuf),
    /// Any number.
    Many(Vec<PathBuf>),
}

impl Paths {
    /// The paths.
    pub fn as_slice(&self) -> &[PathBuf] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }
}

/// No path.
impl Default for Paths {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl From<&Path> for Paths {
    fn from(path: &Path) -> Self {
        Self::One(path.to_owned())
    }
}

/// The prompts that are answered while training: a JSONL file, or texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of prompts, or the path of a JSONL file")]
#[non_exhaustive]
pub enum SamplePrompts {
    /// Rows with `messages` or `prompt`.
    File(PathBuf),
    /// What a user says.
    Texts(Vec<String>),
}

impl SamplePrompts {
    /// Whether none are given.
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Texts(texts) if texts.is_empty())
    }
}

/// No prompt.
impl Default for SamplePrompts {
    fn default() -> Self {
        Self::Texts(Vec::new())
    }
}

/// The linear layers that get an adapter, as PEFT reads `target_modules`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected \"all-linear\", a regular expression or a list of module names")]
#[non_exhaustive]
pub enum Targets {
    /// `"all-linear"`, or a regular expression that must match a module's whole name.
    Pattern(String),
    /// Module names, whole or the part after a dot.
    List(Vec<String>),
}

/// Whether a run goes on from a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, from = "ResumeValue", into = "ResumeValue")]
#[non_exhaustive]
pub enum Resume {
    /// It starts anew.
    No,
    /// From the latest in `output_dir`.
    Latest,
    /// From this folder.
    From(PathBuf),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or the path of a checkpoint")]
enum ResumeValue {
    Flag(bool),
    Path(PathBuf),
}

impl From<ResumeValue> for Resume {
    fn from(value: ResumeValue) -> Self {
        match value {
            ResumeValue::Flag(false) => Self::No,
            ResumeValue::Flag(true) => Self::Latest,
            ResumeValue::Path(path) => Self::From(path),
        }
    }
}

impl From<Resume> for ResumeValue {
    fn from(value: Resume) -> Self {
        match value {
            Resume::No => Self::Flag(false),
            Resume::Latest => Self::Flag(true),
            Resume::From(path) => Self::Path(path),
        }
    }
}

/// Further arguments of the chat template: a table, or (on a command line) a text with a JSON object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "TemplateKwargsValue")]
pub struct TemplateKwargs(Map<String, Value>);

impl TemplateKwargs {
    /// The arguments by name.
    pub fn as_map(&self) -> &Map<String, Value> {
        &self.0
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Map<String, Value>> for TemplateKwargs {
    fn from(map: Map<String, Value>) -> Self {
        Self(map)
    }
}

/// A JSON object as text, such as `{"enable_thinking": false}`.
impl FromStr for TemplateKwargs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => TemplateKwargsValue::Table(map).try_into(),
            Ok(_) => Err("expected a JSON object, such as {\"enable_thinking\": false}".to_owned()),
            Err(error) => Err(format!("expected a JSON object, such as {{\"enable_thinking\": false}} ({error})")),
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a table, such as { enable_thinking = false }")]
enum TemplateKwargsValue {
    Table(Map<String, Value>),
    Text(String),
}

/// The key under which a TOML date arrives.
const TOML_DATE: &str = "$__toml_private_datetime";

impl TryFrom<TemplateKwargsValue> for TemplateKwargs {
    type Error = String;

    fn try_from(value: TemplateKwargsValue) -> Result<Self, String> {
        /// Without nulls, which TOML does not have, and with dates as texts.
        fn plain(value: Value) -> Value {
            match value {
                Value::Object(mut map) => match map.shift_remove(TOML_DATE) {
                    Some(date) => date,
                    None => Value::Object(
                        map.into_iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k, plain(v))).collect(),
                    ),
                },
                Value::Array(list) => Value::Array(list.into_iter().map(plain).collect()),
                other => other,
            }
        }
        match value {
            TemplateKwargsValue::Text(text) => text.parse(),
            TemplateKwargsValue::Table(map) => match plain(Value::Object(map)) {
                Value::Object(map) => Ok(Self(map)),
                _ => Err("expected a table, such as { enable_thinking = false }".to_owned()),
            },
        }
    }
}
