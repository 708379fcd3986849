//! Rows of tokens (`trainable_token_indices`), an embedding or a head that is trained whole (`modules_to_save`), and A and B on
//! either: where their numbers lie and what they start as. The computation is in [`qlora_kernels::ops::trained_tables`].
//!
//! As in PEFT 0.21.2, rows and tables start as the base's rows, and of a tied model the rows of tokens are those of both ends.

use qlora_kernels::ops::embedding;
use qlora_kernels::ops::linear_group::{AdapterPass, LoraSlot, SlotKind};
use qlora_kernels::ops::trained_tables::{Table, TableChange};
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::{View, Workspace};

use super::{EMBEDDING, HEAD};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::lora::{AdapterLayout, Entry, LoraConfig, Which};

/// The head's stream of dropout: that of no layer, which are counted from 0.
const HEAD_STREAM: u64 = u64::MAX;

/// The parts of a model's two ends that an adapter holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct TrainedTables {
    pub(crate) embedding: TableChange,
    pub(crate) head: TableChange,
}

impl TrainedTables {
    /// The parts in this layout.
    ///
    /// # Errors
    /// If options and layout do not belong together or do not fit the model, or if `on_cpu` is false and a table is trained whole or has
    /// A and B.
    pub(crate) fn new(config: &LoraConfig, layout: &AdapterLayout, model: &ModelConfig, on_cpu: bool) -> Result<Self> {
        let mut tables = Self::default();
        for entry in layout.tables() {
            let wrong = |message: String| Error::tensor(entry.tensor_name(), message);
            let table = match entry.module.as_str() {
                EMBEDDING => &mut tables.embedding,
                HEAD => &mut tables.head,
                _ => return Err(wrong("is neither of the embedding nor of the head".to_owned())),
            };
            let rows = match entry.which {
                Which::TokenRows => config.trainable_token_indices.of(&entry.module).map_or(0, <[u32]>::len),
                _ => model.vocab_size,
            };
            if [entry.rows, entry.cols] != [rows, model.hidden_size] {
                let (got, expected) = ([entry.rows, entry.cols], [rows, model.hidden_size]);
                return Err(wrong(format!("has shape {got:?}, expected {expected:?}")));
            }
            if entry.which == Which::Table {
                if !on_cpu {
                    return Err(Error::Unsupported(format!(
                        "modules_to_save: {} can be trained whole on the CPU only; on a GPU name the new tokens in \
                         trainable_token_indices",
                        entry.module
                    )));
                }
                table.whole = Some(entry.range());
            }
            let ids = config.trainable_token_indices.of(&entry.module).unwrap_or_default();
            for (id, start) in ids.iter().zip(entry.range().step_by(entry.cols.max(1))) {
                if *id as usize >= model.vocab_size {
                    return Err(wrong(format!("token {id} is beyond the vocabulary of {}", model.vocab_size)));
                }
                table.tokens.insert(*id, start..start + entry.cols);
            }
        }
        let sizes = [(EMBEDDING, [model.vocab_size, model.hidden_size]), (HEAD, [model.hidden_size, model.vocab_size])];
        for (module, [inputs, outputs]) in sizes {
            let Some(pair) = layout.get(module) else { continue };
            let rank = pair.rank();
            if [pair.a.cols, pair.b.rows, pair.b.cols] != [inputs, outputs, rank] || pair.magnitude.is_some() {
                return Err(Error::tensor(
                    module,
                    format!("its A and B do not fit [{outputs}, {inputs}] with rank {rank}"),
                ));
            }
            if !on_cpu {
                return Err(Error::Unsupported(format!("target_modules: {module} can be trained on the CPU only")));
            }
            let scale = config.scaling_of(module) as f32;
            let (a, b) = (pair.a.range(), pair.b.range());
            let table = if module == EMBEDDING { &mut tables.embedding } else { &mut tables.head };
            table.lora = Some(LoraSlot { a, b, rank, scale, stream: HEAD_STREAM, kind: SlotKind::Lora });
        }
        if model.tie_word_embeddings {
            if !tables.embedding.tokens.is_empty() {
                tables.head.tokens.clone_from(&tables.embedding.tokens);
            }
            if config.ensure_weight_tying {
                tables.head.whole.clone_from(&tables.embedding.whole);
            }
        }
        Ok(tables)
    }

    /// Whether the adapter holds no part of either end.
    pub(crate) fn is_empty(&self) -> bool {
        self.embedding.is_empty() && self.head.is_empty()
    }

    /// The embedding over its frozen table, with the adapter's values.
    pub(crate) fn embedding<'a>(&'a self, weight: &'a dyn FrozenWeight, values: View<'a>) -> Table<'a> {
        table(&self.embedding, weight, values)
    }

    /// The head over its frozen weight, with the adapter's values, and the dropout of a training pass.
    pub(crate) fn head<'a>(
        &'a self,
        weight: &'a dyn FrozenWeight,
        values: View<'a>,
        dropout: Option<(f32, u64)>,
    ) -> Table<'a> {
        let pass = AdapterPass { dropout, ..AdapterPass::new(values) };
        let dropout = self.head.lora.as_ref().and_then(|slot| pass.dropout_of(slot));
        Table { dropout, ..table(&self.head, weight, values) }
    }
}

fn table<'a>(change: &'a TableChange, weight: &'a dyn FrozenWeight, values: View<'a>) -> Table<'a> {
    Table { weight, change: (!change.is_empty()).then_some((change, values)), dropout: None }
}

/// Writes the base's rows into `values`, where a fresh adapter begins; `weight` is the base's table of the entry's module.
///
/// # Errors
/// If the device fails.
pub(crate) fn start(
    entry: &Entry,
    config: &LoraConfig,
    weight: &dyn FrozenWeight,
    values: &mut [f32],
    workspace: &Workspace,
) -> Result<()> {
    let all: Vec<u32>;
    let ids = match entry.which {
        Which::TokenRows => config.trainable_token_indices.of(&entry.module).unwrap_or_default(),
        _ => {
            all = (0..entry.rows as u32).collect();
            &all
        }
    };
    // In pieces: a whole table may be large.
    const ROWS: usize = 4096;
    let values = &mut values[entry.range()];
    for (ids, out) in ids.chunks(ROWS).zip(values.chunks_mut(ROWS * entry.cols.max(1))) {
        let mut rows = workspace.matrix(ids.len(), entry.cols)?;
        embedding::forward(ids, weight, rows.view_mut())?;
        out.copy_from_slice(&rows.to_vec()?);
    }
    Ok(())
}
