//! A step of generation on a GPU: one new token for each sequence.
//!
//! The same block as in [`block`](super::block), with kernels for a few rows: 4-bit weights are read as they are stored,
//! the new keys and values of all sequences go to their caches in one launch, and one launch attends to all caches.

use qlora_kernels::cuda::decode::{DecodeTables, TableMemory};
use qlora_kernels::ops::linear_group::{Group, InputNorm};
use qlora_kernels::ops::rms_norm;
use qlora_kernels::{Dtype, Matrix};

use super::block::{Block, Pass, group};
use super::cache::KvCache;
use super::stack::Stack;
use crate::error::Result;

/// The caches of one step.
pub(super) struct Step<'a> {
    pub(super) tables: DecodeTables<'a>,
}

impl<'a> Step<'a> {
    /// For sequences of one new token each, if the kernels take this model and this pass, whose rows behind the sequences
    /// repeat the last of them. The caches have room for the tokens then.
    ///
    /// # Errors
    /// If a cache is full, or the memory cannot be had.
    pub(super) fn new(
        stack: &Stack,
        caches: &'a mut [&mut KvCache],
        pass: &Pass,
        table: Option<TableMemory>,
    ) -> Result<Option<Self>> {
        let Some(gpu) = pass.workspace.gpu() else { return Ok(None) };
        let dtype = pass.workspace.dtype();
        let single = pass.layout.uniform_len() == Some(1) && dtype != Dtype::F32;
        let taken = stack.blocks().iter().all(|block| DecodeTables::takes(&block.attention, dtype));
        if !single || !taken {
            return Ok(None);
        }
        let positions: Vec<u32> = caches.iter().map(|cache| cache.len() as u32).collect();
        let mut layers: Vec<Vec<[&mut Matrix; 2]>> = stack.blocks().iter().map(|_| Vec::new()).collect();
        for cache in caches.iter_mut() {
            for (layer, caches) in cache.layers_mut().iter_mut().zip(&mut layers) {
                caches.push(layer.with_room(1, pass.workspace)?);
            }
        }
        let tables = DecodeTables::new(gpu, layers, &positions, pass.layout.sequences().len(), table)?;
        stack.blocks().iter().try_for_each(|block| tables.expect(&block.attention, dtype))?;
        Ok(Some(Self { tables }))
    }

    /// Runs all blocks.
    pub(super) fn run(&mut self, stack: &Stack, x: Matrix, pass: &Pass) -> Result<Matrix> {
        let mut x = stack.enter(x)?;
        for (layer, block) in stack.blocks().iter().enumerate() {
            x = block.decode(x, layer, self, pass)?;
        }
        Ok(x)
    }
}

impl Block {
    /// Runs the block number `layer` on the new tokens of a step.
    fn decode(&self, x: Matrix, layer: usize, step: &mut Step, pass: &Pass) -> Result<Matrix> {
        let Pass { workspace, .. } = *pass;
        let adapter = pass.adapter.as_ref();
        let tokens = x.rows();
        let input_norm = |weight| InputNorm { weight: Matrix::view(weight), eps: self.eps };
        group!(qkv_group, self, pass, qkv, q, k, v);
        let mut qkv = workspace.matrix(tokens, qkv_group.outputs())?;
        let norm = input_norm(&self.input_norm);
        if !qkv_group.infer_normed(x.view(), &norm, adapter, qkv.view_mut(), false, workspace)? {
            let (mut n1, _) = self.norm(x.view(), &self.input_norm, 0, workspace)?;
            self.renorm("input_layernorm", x.view(), n1.view_mut(), pass)?;
            qkv_group.infer(n1.view_mut(), adapter, None, qkv.view_mut(), workspace)?;
        }
        if self.qk_norm.is_some() {
            self.norm_heads(&mut qkv, pass)?;
        }
        step.tables.append(layer, &self.attention, qkv.view_mut(), pass.rope.of(self))?;
        let mut attn = workspace.matrix(tokens, self.q.outputs())?;
        step.tables.attention(layer, &self.attention, qkv.view().slice_cols(0..self.q.outputs()), attn.view_mut())?;
        group!(o, self, pass, o, o);
        let mut mid = workspace.matrix(tokens, x.cols())?;
        o.infer(attn.view_mut(), adapter, Some(x.view()), mid.view_mut(), workspace)?;

        group!(gate_up_group, self, pass, gate_up, gate, up);
        let mut h = workspace.with_margin(tokens, self.gate.outputs(), pass.margin_of(&[self.down.member(None)]))?;
        let norm = input_norm(&self.post_attention_norm);
        if !gate_up_group.infer_normed(mid.view(), &norm, adapter, h.view_mut(), true, workspace)? {
            let (mut n2, _) = self.norm(mid.view(), &self.post_attention_norm, 0, workspace)?;
            self.renorm("post_attention_layernorm", mid.view(), n2.view_mut(), pass)?;
            if !gate_up_group.infer_swiglu(n2.view(), adapter, h.view_mut(), workspace)? {
                let mut gate_up = workspace.matrix(tokens, gate_up_group.outputs())?;
                gate_up_group.infer(n2.view_mut(), adapter, None, gate_up.view_mut(), workspace)?;
                let (gate, up) = gate_up.view_mut().split_cols(self.gate.outputs());
                qlora_kernels::ops::swiglu::forward(gate.as_view(), up.as_view(), h.view_mut())?;
            }
        }
        let mut y = x;
        group!(down, self, pass, down, down);
        down.infer(h.view_mut(), adapter, Some(mid.view()), y.view_mut(), workspace)?;
        Ok(y)
    }

    /// The norms on every head of q and k.
    fn norm_heads(&self, qkv: &mut Matrix, pass: &Pass) -> Result<()> {
        let Some((q_weight, k_weight)) = &self.qk_norm else { return Ok(()) };
        let (q, k) = (self.q.outputs(), self.k.outputs());
        let mut raw = pass.workspace.matrix(qkv.rows(), q + k)?;
        raw.view_mut().copy_from(qkv.view().slice_cols(0..q + k))?;
        for (columns, weight, heads, name) in [
            (0..q, q_weight, self.attention.heads, "self_attn.q_norm"),
            (q..q + k, k_weight, self.attention.kv_heads, "self_attn.k_norm"),
        ] {
            let mut rstd = pass.workspace.matrix_f32(raw.rows(), heads)?;
            let (x, mut y) = (raw.view().slice_cols(columns.clone()), qkv.view_mut().slice_cols(columns));
            rms_norm::forward(x, weight.view(), self.eps, y.reborrow(), rstd.view_mut())?;
            self.renorm(name, x, y, pass)?;
        }
        Ok(())
    }
}
