//! Keys and values of the tokens seen so far, for generation.

use qlora_kernels::{Dtype, Matrix, View, Workspace};

use crate::error::{Error, Result};

/// The cache of a whole model for one sequence.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    capacity: usize,
}

/// The cache of one block: rotated keys and values, `[tokens, kv_heads * head_dim]` each.
///
/// On the model's device, in the type of its activations. The matrices have more rows than are used; they double when
/// they are full.
#[derive(Debug)]
pub struct LayerCache {
    keys: Matrix,
    values: Matrix,
    len: usize,
    width: usize,
    capacity: usize,
}

impl KvCache {
    /// Tokens that a cache has room for as soon as there is one.
    pub const FIRST_ROWS: usize = 64;

    /// An empty cache for at most `capacity` tokens; memory grows as tokens come.
    pub fn new(layers: usize, width: usize, capacity: usize) -> Self {
        let empty = || Matrix::from_vec(Vec::new(), 0, width);
        let layer = |_| LayerCache { keys: empty(), values: empty(), len: 0, width, capacity };
        Self { layers: (0..layers).map(layer).collect(), capacity }
    }

    /// The number of tokens in the cache.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most tokens the cache takes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that `tokens` tokens take with elements of type `dtype`.
    pub fn bytes(layers: usize, width: usize, tokens: usize, dtype: Dtype) -> usize {
        2 * layers * width * tokens * dtype.size()
    }

    /// Bytes that are held now.
    pub fn held_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.keys.bytes() + layer.values.bytes()).sum()
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn layers_mut(&mut self) -> &mut [LayerCache] {
        &mut self.layers
    }

    /// Counts tokens whose keys and values were written by other means than [`LayerCache::append`].
    #[cfg(feature = "cuda")]
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.layers.iter_mut().for_each(|layer| layer.len += tokens);
    }

    pub(crate) fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }
}

impl LayerCache {
    /// # Errors
    /// If the cache would hold more tokens than it was made for, or the memory cannot be had.
    pub(crate) fn append(&mut self, keys: View, values: View, workspace: &Workspace) -> Result<()> {
        let (len, total) = (self.len, self.len + keys.rows());
        for (stored, new) in self.with_room(keys.rows(), workspace)?.into_iter().zip([keys, values]) {
            stored.view_mut().slice_rows(len..total).copy_from(new)?;
        }
        self.len = total;
        Ok(())
    }

    /// Keys and values with room for more tokens behind those that are there.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub(crate) fn with_room(&mut self, tokens: usize, workspace: &Workspace) -> Result<[&mut Matrix; 2]> {
        let total = self.len + tokens;
        if total > self.capacity {
            return Err(Error::Invalid(format!(
                "the text has {total} tokens, the cache was made for {}: raise the maximum length",
                self.capacity
            )));
        }
        for stored in [&mut self.keys, &mut self.values] {
            if stored.rows() < total {
                let rows = total.next_power_of_two().clamp(KvCache::FIRST_ROWS, self.capacity.max(KvCache::FIRST_ROWS));
                let mut grown = workspace.matrix(rows, self.width)?;
                if self.len > 0 {
                    grown.view_mut().slice_rows(0..self.len).copy_from(stored.view().slice_rows(0..self.len))?;
                }
                *stored = grown;
            }
        }
        Ok([&mut self.keys, &mut self.values])
    }

    pub(crate) fn keys(&self) -> View<'_> {
        self.keys.view().slice_rows(0..self.len)
    }

    pub(crate) fn values(&self) -> View<'_> {
        self.values.view().slice_rows(0..self.len)
    }
}
