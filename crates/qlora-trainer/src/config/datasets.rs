//! `[[data.datasets]]`: sets of rows, in the names of TRL, Axolotl and LLaMA-Factory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Paths;

/// The files of a data set, and the roles of its columns. Of what is not given the rows say it themselves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct DatasetOptions {
    /// A file, a folder, a pattern such as `data/*.parquet`, `-` for standard input, or the id of a data set on the hub
    /// (`org/name`). Must be given.
    pub path: PathBuf,
    /// The configuration of a data set that has several (its `config_name`). Default: none.
    pub name: Option<String>,
    /// The split of a data set on the hub, or of a folder that is laid out as one. Default: none; on the hub `train`, of a folder
    /// all files.
    pub split: Option<String>,
    /// Branch, tag or commit on the hub. Default: none: the main branch, or, if that has no files that are read, the hub's export
    /// as Parquet (`refs/convert/parquet`).
    pub revision: Option<String>,
    /// A folder in the data set. Default: none.
    pub data_dir: Option<String>,
    /// Its files, as names or patterns. Default: none, those that its card or their names say.
    #[serde(skip_serializing_if = "Paths::is_empty")]
    pub data_files: Paths,
    /// The format: `"json"` (a list, or one object a line), `"jsonl"`, `"csv"`, `"tsv"`, `"parquet"` or `"text"`. Default: none,
    /// the file's name and content say it.
    pub ds_type: Option<String>,
    /// As many rows of the set, drawn at random; more than it has repeat some (LLaMA-Factory). Default: none, all.
    pub num_samples: Option<usize>,
    /// The set's share of the mixture: of each set the first rows, as many as the shares allow (TRL). All sets have one, or
    /// none. Default: none.
    pub fraction: Option<f64>,
    /// The roles of the columns, in LLaMA-Factory's names; columns that are not named are left out. Default: none.
    pub columns: Option<ColumnNames>,
    /// The keys and roles of the messages in `columns.messages`, in LLaMA-Factory's names. Default: none.
    pub tags: Option<TagNames>,
    /// The column with the messages (Axolotl). Default: none.
    pub field_messages: Option<String>,
    /// Keys of a message by what they mean: `{ role = "speaker", content = "said" }` (Axolotl). Default: none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub message_property_mappings: BTreeMap<String, String>,
    /// Roles by what they mean: `{ user = ["human", "customer"] }` (Axolotl). Default: none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, Vec<String>>,
    /// The key of a message that says whether it is trained (Axolotl). Default: none.
    pub message_field_training: Option<String>,
    /// The column with plain text (Axolotl). Default: none.
    pub field: Option<String>,
    /// The column with the instruction (Axolotl). Default: none.
    pub field_instruction: Option<String>,
    /// The column with the instruction's input (Axolotl). Default: none.
    pub field_input: Option<String>,
    /// The column with the answer (Axolotl). Default: none.
    pub field_output: Option<String>,
    /// The column with the system message (Axolotl). Default: none.
    pub field_system: Option<String>,
    /// The column with the tools (Axolotl). Default: none.
    pub field_tools: Option<String>,
}

/// A set without anything but its path.
impl From<&Path> for DatasetOptions {
    fn from(path: &Path) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }
}

/// `columns`: the roles of the columns, in LLaMA-Factory's names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ColumnNames {
    /// The instruction.
    pub prompt: Option<String>,
    /// Its input, which follows it on a new line.
    pub query: Option<String>,
    /// The answer.
    pub response: Option<String>,
    /// Earlier turns, pairs of instruction and answer.
    pub history: Option<String>,
    /// The messages of a conversation.
    pub messages: Option<String>,
    /// The system message.
    pub system: Option<String>,
    /// The tools.
    pub tools: Option<String>,
    /// The better answer of two.
    pub chosen: Option<String>,
    /// The worse answer of two.
    pub rejected: Option<String>,
}

/// `tags`: the keys and roles of messages, in LLaMA-Factory's names and with its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct TagNames {
    /// The key of the role. Default: from.
    pub role_tag: String,
    /// The key of the text. Default: value.
    pub content_tag: String,
    /// The user's role. Default: human.
    pub user_tag: String,
    /// The assistant's role. Default: gpt.
    pub assistant_tag: String,
    /// The role of a tool's answer. Default: observation.
    pub observation_tag: String,
    /// The role of a call of a tool. Default: function_call.
    pub function_tag: String,
    /// The role of the system message. Default: system.
    pub system_tag: String,
}

impl Default for TagNames {
    fn default() -> Self {
        let [role_tag, content_tag, user_tag, assistant_tag, observation_tag, function_tag, system_tag] =
            ["from", "value", "human", "gpt", "observation", "function_call", "system"].map(String::from);
        Self { role_tag, content_tag, user_tag, assistant_tag, observation_tag, function_tag, system_tag }
    }
}

/// The way several data sets are combined, in LLaMA-Factory's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MixStrategy {
    /// One behind the other.
    #[default]
    Concat,
    /// A row of one set, then of another, until the first set is used up.
    InterleaveUnder,
    /// The same until every set was seen whole; a set that is used up begins anew.
    InterleaveOver,
    /// The same until every set was seen whole; a set that is used up is left out.
    InterleaveOnce,
}
