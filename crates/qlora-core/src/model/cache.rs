//! Keys and values of the tokens seen so far, for generation.

use qlora_kernels::View;

use crate::error::{Error, Result};

/// The cache of a whole model for one sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    layers: Vec<LayerCache>,
    capacity: usize,
}

/// The cache of one block: rotated keys and values, `[tokens, kv_heads * head_dim]` each.
#[derive(Clone, Debug)]
pub struct LayerCache {
    keys: Vec<f32>,
    values: Vec<f32>,
    width: usize,
    capacity: usize,
}

impl KvCache {
    /// An empty cache for at most `capacity` tokens; memory grows as tokens come.
    pub fn new(layers: usize, width: usize, capacity: usize) -> Self {
        let layer = LayerCache { keys: Vec::new(), values: Vec::new(), width, capacity };
        Self { layers: vec![layer; layers], capacity }
    }

    /// The number of tokens in the cache.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, LayerCache::len)
    }

    /// Whether no token has been seen.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most tokens the cache takes.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes that `tokens` tokens take.
    pub fn bytes(layers: usize, width: usize, tokens: usize) -> usize {
        2 * layers * width * tokens * size_of::<f32>()
    }

    /// Forgets all tokens from `len` on.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.keys.truncate(len * layer.width);
            layer.values.truncate(len * layer.width);
        }
    }

    pub(crate) fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }
}

impl LayerCache {
    fn len(&self) -> usize {
        self.keys.len() / self.width
    }

    /// # Errors
    /// If the cache would hold more tokens than it was made for.
    pub(crate) fn append(&mut self, keys: View, values: View) -> Result<()> {
        let total = self.len() + keys.rows();
        if total > self.capacity {
            return Err(Error::Invalid(format!(
                "the text has {total} tokens, the cache was made for {}: raise the maximum length",
                self.capacity
            )));
        }
        for (stored, new) in [(&mut self.keys, keys), (&mut self.values, values)] {
            let new = new.host("kv_cache")?;
            (0..new.rows()).for_each(|i| stored.extend_from_slice(new.row(i)));
        }
        Ok(())
    }

    pub(crate) fn keys(&self) -> View<'_> {
        View::new(&self.keys, self.len(), self.width)
    }

    pub(crate) fn values(&self) -> View<'_> {
        View::new(&self.values, self.len(), self.width)
    }
}
