//! The decoder stack: all blocks and the final norm, forward and backward as plain functions.
//!
//! `x [tokens, hidden]` is the embedding's output, the result is what the head reads: the final norm's output. Both can have a
//! factor ([`Stack::with_scales`]). The candle node over it is in
//! [`crate::autograd::stack`]; the trainer calls it directly.

use std::sync::{Arc, Mutex, PoisonError};

use qlora_kernels::ops::rope::{RopeConfig, RopeTable};
use qlora_kernels::ops::{rms_norm, scale};
use qlora_kernels::sequence::Positions;
use qlora_kernels::{Matrix, ViewMut, Workspace};

use super::block::{Block, Keep, Pass};
use super::cache::KvCache;
use super::checkpoints::Checkpoints;
use crate::adapter::kinds::dora::Adapted;
use crate::error::{Error, Result};

/// All blocks of a decoder and its final norm.
#[derive(Debug)]
pub(crate) struct Stack {
    blocks: Vec<Block>,
    final_norm: Matrix,
    eps: f32,
    keep: Vec<Keep>,
    rope: RopeTables,
    /// Factors of the input and of the output.
    scales: [f32; 2],
}

/// The activations that a forward of the stack saves for its backward.
#[derive(Debug)]
pub(crate) struct SavedStack {
    blocks: Checkpoints,
    last: Matrix,
    rstd: Matrix,
}

/// The rotation tables of a pass.
#[derive(Debug)]
pub(crate) struct Rotation {
    angles: Arc<RopeTable>,
    /// For blocks that are not rotated, where a kernel needs a table.
    identity: Option<Arc<RopeTable>>,
}

impl Rotation {
    /// The table for a kernel that rotates in any case.
    pub(super) fn of(&self, block: &Block) -> &RopeTable {
        match &self.identity {
            Some(identity) if !block.rotary => identity,
            _ => &self.angles,
        }
    }
}

/// Rotation angles, made as far as the sequences need them: a table to the longest position a model allows would take
/// more memory than a small model.
#[derive(Debug)]
struct RopeTables {
    config: RopeConfig,
    head_dim: usize,
    limit: usize,
    /// Whether some block is not rotated.
    identity: bool,
    current: Mutex<Option<Arc<Rotation>>>,
}

impl Stack {
    /// Puts a stack together; `limit` is the longest sequence it takes.
    pub(crate) fn new(
        blocks: Vec<Block>,
        final_norm: Matrix,
        eps: f32,
        rope: RopeConfig,
        limit: usize,
    ) -> Result<Self> {
        let Some(first) = blocks.first() else {
            return Err(Error::Invalid("a decoder needs at least one block".into()));
        };
        let head_dim = first.attention.head_dim;
        let identity = blocks.iter().any(|block| !block.rotary);
        let rope = RopeTables { config: rope, head_dim, limit, identity, current: Mutex::new(None) };
        let keep = vec![Keep::Everything; blocks.len()];
        Ok(Self { blocks, final_norm, eps, keep, rope, scales: [1.0; 2] })
    }

    /// The same stack with its input multiplied by `input` and its output by `output`.
    pub(crate) fn with_scales(self, input: f32, output: f32) -> Self {
        Self { scales: [input, output], ..self }
    }

    /// Scales the embedding's output to the first block's input.
    pub(super) fn enter(&self, mut x: Matrix) -> Result<Matrix> {
        scale::in_place(x.view_mut(), self.scales[0])?;
        Ok(x)
    }

    /// The blocks, from the embedding up.
    pub(crate) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The layers with an adapter that is trained, in the order of its layout.
    pub(crate) fn adapted(&self) -> impl Iterator<Item = Adapted<'_>> + Clone {
        self.blocks.iter().flat_map(Block::projections).filter_map(|projection| {
            let slot = projection.slot()?;
            Some(Adapted { name: projection.name(), weight: &**projection.weight(), slot })
        })
    }

    /// The weight of the last norm, one f32 row.
    pub(crate) fn final_norm(&self) -> &Matrix {
        &self.final_norm
    }

    /// The blocks, to give them adapters.
    pub(crate) fn blocks_mut(&mut self) -> &mut [Block] {
        &mut self.blocks
    }

    /// Whether blocks recompute their forward in the backward instead of keeping it.
    pub(crate) fn set_gradient_checkpointing(&mut self, on: bool) {
        self.keep.fill(if on { Keep::Input } else { Keep::Everything });
    }

    /// Sets the activations that each block keeps for its backward; all choices give the same gradients.
    ///
    /// # Errors
    /// If there is not one choice a block.
    pub(crate) fn set_keep(&mut self, keep: Vec<Keep>) -> Result<()> {
        if keep.len() != self.blocks.len() {
            return Err(Error::Invalid(format!("{} choices for {} blocks", keep.len(), self.blocks.len())));
        }
        self.keep = keep;
        Ok(())
    }

    /// The activations that each block keeps, by block.
    pub(crate) fn keep(&self) -> &[Keep] {
        &self.keep
    }

    /// The rotation for sequences of up to `tokens` tokens.
    ///
    /// # Errors
    /// If that is longer than the model allows.
    pub(crate) fn rope(&self, tokens: usize) -> Result<Arc<Rotation>> {
        self.rope.up_to(tokens)
    }

    /// Without a backward.
    pub(crate) fn infer(&self, x: Matrix, pass: &Pass) -> Result<Matrix> {
        let mut x = self.enter(x)?;
        for block in &self.blocks {
            x = block.forward(x, pass, Keep::Nothing)?.0;
        }
        self.infer_norm(&x, pass)
    }

    /// The next tokens of several sequences, as `pass.layout` cuts them; the earlier ones of each are in its cache.
    pub(crate) fn infer_cached(
        &self,
        x: Matrix,
        positions: &Positions,
        caches: &mut [&mut KvCache],
        pass: &Pass,
    ) -> Result<Matrix> {
        let mut x = self.enter(x)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let mut layers: Vec<_> = caches.iter_mut().map(|cache| cache.layer_mut(index)).collect();
            x = block.forward_cached(x, positions, &mut layers, pass)?;
        }
        self.infer_norm(&x, pass)
    }

    /// With what [`Self::backward`] needs. With `needs_dx`, the backward reaches the input.
    pub(crate) fn forward(&self, x: Matrix, pass: &Pass, needs_dx: bool) -> Result<(Matrix, SavedStack)> {
        let mut x = self.enter(x)?;
        let lowest = self.lowest_with_backward(needs_dx);
        let mut saved = Checkpoints::new(self.blocks.len());
        for (index, block) in self.blocks.iter().enumerate() {
            let keep = if index < lowest { Keep::Nothing } else { self.keep[index] };
            let (y, kept) = block.forward(x, pass, keep)?;
            saved.push(kept, keep, pass.workspace)?;
            x = y;
        }
        saved.settle()?;
        let (mut normed, rstd) = self.norm(&x, pass.workspace)?;
        scale::in_place(normed.view_mut(), self.scales[1])?;
        Ok((normed, SavedStack { blocks: saved, last: x, rstd }))
    }

    /// Adds the adapters' gradients to `gradient` and, with `needs_dx`, returns the input's.
    pub(crate) fn backward(
        &self,
        saved: SavedStack,
        mut dy: Matrix,
        pass: &Pass,
        mut gradient: ViewMut,
        needs_dx: bool,
    ) -> Result<Option<Matrix>> {
        let SavedStack { blocks: mut saved, last, rstd } = saved;
        let lowest = self.lowest_with_backward(needs_dx);
        let margin = self.blocks.iter().map(Block::residual_margin).max().unwrap_or(0);
        let mut dx = pass.workspace.with_margin(last.rows(), last.cols(), margin)?;
        scale::in_place(dy.view_mut(), self.scales[1])?;
        rms_norm::backward(last.view(), self.final_norm.view(), rstd.view(), dy.view(), dx.view_mut(), false)?;
        pass.workspace.round_gradient(dx.view_mut())?;
        drop((last, rstd, dy));
        let mut dx = Some(dx);
        for (index, block) in self.blocks.iter().enumerate().rev() {
            let (Some(kept), Some(dy)) = (saved.pop()?, dx.take()) else { break };
            dx = block.backward(kept, dy, pass, gradient.reborrow(), index > lowest || needs_dx)?;
            if let Some(dx) = &mut dx {
                pass.workspace.round_gradient(dx.view_mut())?;
            }
        }
        let Some(mut dx) = dx.filter(|_| needs_dx) else { return Ok(None) };
        scale::in_place(dx.view_mut(), self.scales[0])?;
        Ok(Some(dx))
    }

    /// The first block whose backward anything needs.
    fn lowest_with_backward(&self, needs_dx: bool) -> usize {
        if needs_dx {
            return 0;
        }
        self.blocks.iter().position(Block::is_trained).unwrap_or(self.blocks.len())
    }

    /// The last norm, with the weights of the rows' adapters.
    pub(super) fn infer_norm(&self, x: &Matrix, pass: &Pass) -> Result<Matrix> {
        let (mut normed, _) = self.norm(x, pass.workspace)?;
        if let Some(rows) = pass.adapter.and_then(|adapter| adapter.rows) {
            rows.renorm(|| "model.norm".to_owned(), x.view(), self.eps, normed.view_mut(), pass.workspace)?;
        }
        scale::in_place(normed.view_mut(), self.scales[1])?;
        Ok(normed)
    }

    fn norm(&self, x: &Matrix, workspace: &Workspace) -> Result<(Matrix, Matrix)> {
        let mut normed = workspace.matrix(x.rows(), x.cols())?;
        let mut rstd = workspace.matrix_f32(x.rows(), 1)?;
        rms_norm::forward(x.view(), self.final_norm.view(), self.eps, normed.view_mut(), rstd.view_mut())?;
        Ok((normed, rstd))
    }
}

impl RopeTables {
    fn up_to(&self, tokens: usize) -> Result<Arc<Rotation>> {
        if tokens > self.limit {
            return Err(Error::Invalid(format!(
                "a sequence of {tokens} tokens is longer than the model's max_position_embeddings ({})",
                self.limit
            )));
        }
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rotation) = current.as_ref().filter(|rotation| rotation.angles.max_positions() >= tokens) {
            return Ok(rotation.clone());
        }
        let size = tokens.next_power_of_two().clamp(256, self.limit.max(256));
        let angles = Arc::new(RopeTable::new(&self.config, self.head_dim, size)?);
        let identity = match self.identity {
            true => Some(Arc::new(RopeTable::identity(self.head_dim, size)?)),
            false => None,
        };
        let rotation = Arc::new(Rotation { angles, identity });
        *current = Some(rotation.clone());
        Ok(rotation)
    }
}
