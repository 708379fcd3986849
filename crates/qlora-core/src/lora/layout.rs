//! The layout of an adapter's values: all A and B of a model, back to back in one flat f32 buffer.
//!
//! For each module in layer order (head and embedding last) first A [r, in_features], then B [out_features, r], both row-major, then what its kind of
//! adapter has besides (DoRA: the magnitudes, one for each output), without gaps; then biases, rows of tokens and whole tables. One
//! buffer means that one loop does the optimizer step, the gradient's norm or a copy; gradients and moments have the
//! same layout.

use super::config::{Bias, LoraConfig};
use super::modules::LinearModule;
use crate::Result;
use crate::config::ModelConfig;
use crate::spec::{EMBEDDING, HEAD};
use qlora_kernels::{View, ViewMut};
use std::collections::HashMap;
use std::ops::Range;

/// The kind of an adapter's tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Which {
    /// A [r, in_features], applied first.
    A,
    /// B [out_features, r].
    B,
    /// DoRA's magnitudes `[out_features]`.
    Magnitude,
    /// A layer's bias in place of the base's, `[out_features]`. PEFT's name for it depends on whether the layer has A and B.
    Bias {
        /// Whether it has.
        adapted: bool,
    },
    /// Rows of tokens of the embedding or the head, in place of the base's, `[tokens, hidden]`.
    TokenRows,
    /// The whole embedding or head, in place of the base's, `[vocabulary, hidden]`.
    Table,
}

/// One matrix or vector in the flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The module that the adapter belongs to: `model.layers.3.self_attn.q_proj`.
    pub module: String,
    /// A, B or a further tensor.
    pub which: Which,
    /// Index of the first number in the buffer.
    pub offset: usize,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix; 1 for a vector.
    pub cols: usize,
}

impl Entry {
    /// The number of elements of the matrix.
    pub fn numel(&self) -> usize {
        self.rows * self.cols
    }

    /// The range of the elements in the buffer.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.numel()
    }

    /// The matrix inside a buffer of this layout.
    ///
    /// # Panics
    /// If the buffer is shorter than the layout.
    pub fn view<'a>(&self, flat: &'a [f32]) -> View<'a> {
        View::new(&flat[self.range()], self.rows, self.cols)
    }

    /// The tensor's name in PEFT's `adapter_model.safetensors`.
    pub fn tensor_name(&self) -> String {
        let end = match self.which {
            Which::A if self.module == EMBEDDING => "lora_embedding_A",
            Which::B if self.module == EMBEDDING => "lora_embedding_B",
            Which::A => "lora_A.weight",
            Which::B => "lora_B.weight",
            Which::Magnitude => "lora_magnitude_vector",
            Which::Bias { adapted: true } => "base_layer.bias",
            Which::Bias { adapted: false } => "bias",
            Which::TokenRows => "token_adapter.trainable_tokens_delta",
            Which::Table => "weight",
        };
        format!("base_model.model.{}.{end}", self.module)
    }

    /// The tensor's shape in that file.
    pub fn shape(&self) -> Vec<usize> {
        match self.which {
            Which::Magnitude | Which::Bias { .. } => vec![self.rows],
            _ => vec![self.rows, self.cols],
        }
    }
}

/// The two factors of one module's adapter, and what it has besides.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct AdapterPair<'a> {
    /// A [r, in_features].
    pub a: &'a Entry,
    /// B [out_features, r].
    pub b: &'a Entry,
    /// DoRA's magnitudes `[out_features]`.
    pub magnitude: Option<&'a Entry>,
}

impl AdapterPair<'_> {
    /// The adapter's rank.
    pub fn rank(&self) -> usize {
        self.a.rows
    }

    /// Both factors inside a buffer of this layout: `(A, B)`.
    ///
    /// # Panics
    /// If the buffer is shorter than the layout.
    pub fn views<'b>(&self, flat: &'b [f32]) -> (View<'b>, View<'b>) {
        (self.a.view(flat), self.b.view(flat))
    }

    /// Both factors inside a mutable buffer of this layout, for gradients: `(A, B)`.
    ///
    /// # Panics
    /// If the buffer is shorter than the layout.
    pub fn views_mut<'b>(&self, flat: &'b mut [f32]) -> (ViewMut<'b>, ViewMut<'b>) {
        // B follows A directly.
        let both = &mut flat[self.a.offset..self.b.range().end];
        let (a, b) = both.split_at_mut(self.a.numel());
        (ViewMut::new(a, self.a.rows, self.a.cols), ViewMut::new(b, self.b.rows, self.b.cols))
    }
}

/// All adapters of a model in one flat buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterLayout {
    entries: Vec<Entry>,
    len: usize,
    /// Index of a module's A; its B and its other entries follow.
    modules: HashMap<String, usize>,
}

impl AdapterLayout {
    /// The layout for `modules` in this order, each with A and B of rank `r`.
    ///
    /// # Panics
    /// If a module comes twice.
    pub fn new(modules: &[LinearModule], r: usize) -> Self {
        Self::of(modules, &LoraConfig { r, ..LoraConfig::default() })
    }

    /// The layout for `modules` in this order, with the ranks and the kind of `config`, whatever it targets.
    ///
    /// # Panics
    /// If a module comes twice.
    pub fn of(modules: &[LinearModule], config: &LoraConfig) -> Self {
        let mut layout = Self { entries: Vec::new(), len: 0, modules: HashMap::new() };
        for module in modules {
            let before = layout.modules.insert(module.name.clone(), layout.entries.len());
            assert!(before.is_none(), "{} comes twice", module.name);
            let (r, outputs) = (config.rank_of(&module.name), module.out_features);
            let factors = [(Which::A, r, module.in_features), (Which::B, outputs, r)];
            let magnitude = config.use_dora.then_some((Which::Magnitude, outputs, 1));
            for (which, rows, cols) in factors.into_iter().chain(magnitude) {
                layout.push(&module.name, which, rows, cols);
            }
        }
        layout
    }

    fn push(&mut self, module: &str, which: Which, rows: usize, cols: usize) {
        self.entries.push(Entry { module: module.to_owned(), which, offset: self.len, rows, cols });
        self.len += rows * cols;
    }

    /// The layout that `config` gives for `model`.
    ///
    /// # Errors
    /// Those of [`LoraConfig::resolve`]; also if rows of tokens or whole tables are asked for that the model does not have.
    pub fn for_model(config: &LoraConfig, model: &ModelConfig) -> Result<Self> {
        let mut layout = Self::of(&config.resolve(model)?, config);
        if config.bias != Bias::None {
            let spec = model.spec();
            for module in spec.linear().filter(|module| module.bias) {
                let adapted = layout.modules.contains_key(&module.name);
                if adapted || config.bias == Bias::All {
                    layout.push(&module.name, Which::Bias { adapted }, module.rows(), 1);
                }
            }
        }
        for (which, module, rows) in super::tables::tables(config, model)? {
            layout.push(module, which, rows, model.hidden_size);
        }
        Ok(layout)
    }

    /// The biases.
    pub fn biases(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| matches!(entry.which, Which::Bias { .. }))
    }

    /// The entries of the embedding and the head: rows of tokens and whole tables.
    pub fn tables(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| matches!(entry.which, Which::TokenRows | Which::Table))
    }

    /// The embedding that is trained whole, where the head of a tied model follows it.
    pub(crate) fn followed_by_head(&self, config: &LoraConfig) -> Option<&Entry> {
        let whole = |module: &str| self.tables().find(|entry| entry.which == Which::Table && entry.module == module);
        whole(EMBEDDING).filter(|_| config.ensure_weight_tying && whole(HEAD).is_none())
    }

    /// All tensors in the order in which they lie in the buffer.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The length of the buffer in f32 numbers: the number of trainable parameters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no adapter at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The names of the modules that have an adapter, in order.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter(|entry| entry.which == Which::A).map(|entry| entry.module.as_str())
    }

    /// The adapter of the module of this full name, if it has one.
    pub fn get(&self, module: &str) -> Option<AdapterPair<'_>> {
        let &first = self.modules.get(module)?;
        let magnitude = self.entries.get(first + 2).filter(|entry| entry.which == Which::Magnitude);
        Some(AdapterPair { a: &self.entries[first], b: &self.entries[first + 1], magnitude })
    }

    /// The tensor that holds the number at `index` of the buffer, if there is one, to name the place of a bad number.
    pub fn entry_at(&self, index: usize) -> Option<&Entry> {
        let after = self.entries.partition_point(|entry| entry.offset <= index);
        after.checked_sub(1).map(|i| &self.entries[i]).filter(|entry| entry.range().contains(&index))
    }
}

#[cfg(test)]
mod tests {
    use super::super::TargetModules;
    use super::super::modules::tests::tiny_model;
    use super::*;

    fn layout() -> AdapterLayout {
        let config =
            LoraConfig { r: 3, target_modules: TargetModules::list(["q_proj", "down_proj"]), ..Default::default() };
        AdapterLayout::for_model(&config, &tiny_model(2)).unwrap()
    }

    #[test]
    fn matrices_lie_back_to_back_in_layer_order() {
        let layout = layout();
        let shapes: Vec<_> = layout.entries().iter().map(|e| (e.which, e.rows, e.cols)).collect();
        let block = [(Which::A, 3, 64), (Which::B, 80, 3), (Which::A, 3, 96), (Which::B, 64, 3)];
        assert_eq!(shapes, [block, block].concat());
        let mut end = 0;
        for entry in layout.entries() {
            assert_eq!(entry.offset, end);
            end = entry.range().end;
        }
        assert_eq!(layout.len(), end);
        assert_eq!(end, 2 * 3 * (64 + 80 + 96 + 64));
        assert_eq!(layout.entries()[6].tensor_name(), "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight");
    }

    #[test]
    fn magnitudes_follow_their_factors_and_ranks_their_patterns() {
        let ranks = [("1.mlp.down_proj".to_owned(), 5)].into();
        let config = LoraConfig {
            r: 3,
            use_dora: true,
            rank_pattern: super::super::ByModule::new(ranks).unwrap(),
            target_modules: TargetModules::list(["q_proj", "down_proj"]),
            ..Default::default()
        };
        let layout = AdapterLayout::for_model(&config, &tiny_model(2)).unwrap();
        assert_eq!(layout.modules().count(), 4);
        let pair = layout.get("model.layers.1.mlp.down_proj").unwrap();
        let magnitude = pair.magnitude.unwrap();
        assert_eq!((pair.rank(), pair.b.range().end, magnitude.shape()), (5, magnitude.offset, vec![64]));
        assert_eq!(magnitude.tensor_name(), "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector");
        assert_eq!(magnitude.range().end, layout.len());
        assert_eq!(layout.get("model.layers.0.self_attn.q_proj").unwrap().rank(), 3);
    }

    #[test]
    fn modules_are_found_by_name_and_numbers_by_index() {
        let layout = layout();
        let pair = layout.get("model.layers.1.mlp.down_proj").unwrap();
        assert_eq!((pair.a, pair.b, pair.rank()), (&layout.entries()[6], &layout.entries()[7], 3));
        assert!(layout.get("model.layers.1.mlp.up_proj").is_none());
        for (i, entry) in layout.entries().iter().enumerate() {
            assert_eq!(layout.entry_at(entry.offset), Some(&layout.entries()[i]));
            assert_eq!(layout.entry_at(entry.range().end - 1), Some(&layout.entries()[i]));
        }
        assert_eq!(layout.entry_at(layout.len()), None);
    }

    #[test]
    fn views_show_the_buffer_at_the_entries_offsets() {
        let layout = layout();
        let mut flat: Vec<f32> = (0..layout.len()).map(|i| i as f32).collect();
        let pair = layout.get("model.layers.1.self_attn.q_proj").unwrap();
        let (a, b) = pair.views(&flat);
        assert_eq!((a.shape(), b.shape()), ([3, 64], [80, 3]));
        assert_eq!(a.host("test").unwrap().row(1)[0], (pair.a.offset + 64) as f32);
        assert_eq!(b.host("test").unwrap().row(79)[2], (pair.b.range().end - 1) as f32);
        let (a, b) = pair.views_mut(&mut flat);
        a.host("test").unwrap().row_mut(0)[0] = -1.0;
        b.host("test").unwrap().row_mut(0)[0] = -2.0;
        assert_eq!((flat[pair.a.offset], flat[pair.b.offset]), (-1.0, -2.0));
    }
}
