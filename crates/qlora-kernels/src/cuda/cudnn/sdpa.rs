//! The graphs of attention, forward and backward, in the form that cuDNN's fused attention engines recognise.
//!
//! With `S = scale * Q K^T` under the causal mask and `L = logsumexp(S)` by row:
//!
//! ```text
//! forward:  O  = softmax(S) V,                        stats = L
//! backward: D  = rowsum(dO * O)
//!           P  = exp(S - L),                          dV = P^T dO   (summed over the q heads of a k/v head)
//!           dS = P * (dO V^T - D) * scale,            dK = dS^T Q   (summed likewise),   dQ = dS K
//! ```
//!
//! cuDNN matches the graph as a whole, operation by operation, so the order and the types below are not free.

use super::api::{Api, DataType, Pointwise, Reduce};
use super::error::Result;
use super::graph::{Dims, Graph, Overrides, Place, Tensor, packed, transposed};
use super::shape::{SdpaShape, Strides};

/// The tensors of a graph that must be bound at execution. Those that a pass does not have are `None`.
#[derive(Clone, Debug, Default)]
pub(super) struct Ports {
    pub(super) q: Option<Tensor>,
    pub(super) k: Option<Tensor>,
    pub(super) v: Option<Tensor>,
    pub(super) o: Option<Tensor>,
    pub(super) stats: Option<Tensor>,
    pub(super) d_o: Option<Tensor>,
    pub(super) dq: Option<Tensor>,
    pub(super) dk: Option<Tensor>,
    pub(super) dv: Option<Tensor>,
    /// f32 in the workspace: `D` of the backward.
    pub(super) row_sum: Option<Tensor>,
    /// f32 in the workspace: `dQ` while it is summed up. Absent when the result must be deterministic.
    pub(super) dq_sum: Option<Tensor>,
    pub(super) scale: Option<Tensor>,
    pub(super) minus_infinity: Vec<Tensor>,
    pub(super) one: Option<Tensor>,
    /// Actual lengths of the sequences, i32 `[batch]`.
    pub(super) lengths: Option<Tensor>,
    /// Offsets of the sequences, i64 `[batch + 1]`, by the row stride that they belong to.
    pub(super) offsets: Vec<(i64, Tensor)>,
}

/// The state of building an attention graph.
struct Builder<'a> {
    graph: Graph,
    ports: Ports,
    shape: &'a SdpaShape,
}

/// The graph of the forward.
pub(super) fn forward(api: &'static Api, shape: &SdpaShape, strides: &Strides) -> Result<(Graph, Ports)> {
    let mut b = Builder::new(api, shape)?;
    let (dtype, lengths) = (shape.dtype.cudnn(), b.ports.lengths);
    let (heads, kv_heads) = (shape.heads, shape.kv_heads);

    let q = b.rows(strides.q, heads, false)?;
    let k_transposed = b.rows(strides.k, kv_heads, true)?;
    let v = b.rows(strides.v, kv_heads, false)?;
    let o = b.rows(strides.o, heads, false)?;
    let stats = b.stats()?;
    let scale = b.graph.value()?;

    let scores = b.scores(q, k_transposed, scale)?;
    let scores = b.padding_mask(scores)?;
    let scores = b.causal_mask(scores)?;

    // softmax, and its logarithm of the sum
    let row: Dims = [shape.batch, heads, shape.seq, 1];
    let maximum = b.graph.between(DataType::Float, row)?;
    b.graph.reduce_into(Reduce::Max, scores, maximum)?;
    let centred = b.graph.pointwise(Pointwise::Sub, &[scores, maximum])?;
    let exponentials = b.graph.pointwise(Pointwise::Exp, &[centred])?;
    let sum = b.graph.between(DataType::Float, row)?;
    b.graph.reduce_into(Reduce::Add, exponentials, sum)?;
    let logarithm = b.graph.pointwise(Pointwise::Log, &[sum])?;
    b.graph.pointwise_into(Pointwise::Add, DataType::Float, &[maximum, logarithm], stats, None)?;
    let weights = b.graph.between(dtype, b.square())?;
    b.graph.pointwise_into(Pointwise::Div, DataType::Float, &[exponentials, sum], weights, None)?;

    b.graph.matmul_into(weights, v, o, Overrides { m: lengths, n: None, k: lengths })?;

    b.ports.q = Some(q);
    b.ports.k = Some(k_transposed);
    b.ports.v = Some(v);
    b.ports.o = Some(o);
    b.ports.stats = Some(stats);
    b.ports.scale = Some(scale);
    Ok((b.graph, b.ports))
}

/// The graph of the backward. `padding_first`: the mask of packed sequences comes before `L` is subtracted, as NVIDIA's own
/// front end has it for some versions, and not after.
pub(super) fn backward(
    api: &'static Api,
    shape: &SdpaShape,
    strides: &Strides,
    padding_first: bool,
) -> Result<(Graph, Ports)> {
    let mut b = Builder::new(api, shape)?;
    let (dtype, lengths) = (shape.dtype.cudnn(), b.ports.lengths);
    let (heads, kv_heads) = (shape.heads, shape.kv_heads);
    let row: Dims = [shape.batch, heads, shape.seq, 1];
    let wide: Dims = [shape.batch, heads, shape.seq, shape.head_dim];

    let q = b.rows(strides.q, heads, false)?;
    let k_transposed = b.rows(strides.k, kv_heads, true)?;
    let v_transposed = b.rows(strides.v, kv_heads, true)?;
    let o = b.rows(strides.o, heads, false)?;
    let d_o = b.rows(strides.d_o, heads, false)?;
    let stats = b.stats()?;
    let dq = b.rows(strides.dq, heads, false)?;
    let dk = b.rows(strides.dk, kv_heads, false)?;
    let dv = b.rows(strides.dv, kv_heads, false)?;
    let scale = b.graph.value()?;
    let one = b.graph.value()?;

    // D = rowsum(dO * O), kept in memory. The factor one stands where dropout would scale.
    let products = b.graph.between(DataType::Float, wide)?;
    b.graph.pointwise_into(Pointwise::Mul, DataType::Float, &[d_o, o], products, None)?;
    let sum = b.graph.between(DataType::Float, row)?;
    b.graph.reduce_into(Reduce::Add, products, sum)?;
    let row_sum = b.row_tensor()?;
    b.graph.pointwise_into(Pointwise::Mul, DataType::Float, &[sum, one], row_sum, None)?;

    // P = exp(S - L); the masks come after the subtraction
    let mut scores = b.scores(q, k_transposed, scale)?;
    if padding_first {
        scores = b.padding_mask(scores)?;
    }
    scores = b.graph.pointwise(Pointwise::Sub, &[scores, stats])?;
    if !padding_first {
        scores = b.padding_mask(scores)?;
    }
    let scores = b.causal_mask(scores)?;
    let weights = b.graph.pointwise(Pointwise::Exp, &[scores])?;

    // dV = P^T dO
    let weights_transposed = b.transpose(weights, dtype)?;
    b.key_gradient(weights_transposed, d_o, dv)?;

    // dS = P * (dO V^T - D) * scale
    let dp = b.graph.between(DataType::Float, b.square())?;
    b.graph.matmul_into(d_o, v_transposed, dp, Overrides { m: lengths, n: lengths, k: None })?;
    let dp = b.graph.pointwise(Pointwise::Sub, &[dp, row_sum])?;
    let ds = b.graph.pointwise(Pointwise::Mul, &[dp, weights])?;
    let ds = b.graph.pointwise(Pointwise::Mul, &[ds, scale])?;

    // dK = dS^T Q
    let ds_transposed = b.transpose(ds, dtype)?;
    b.key_gradient(ds_transposed, q, dk)?;

    // dQ = dS K, summed in f32 in memory over the blocks of keys, unless the result must be deterministic
    let (dims, layout, offsets) = b.layout(strides.k, kv_heads)?;
    let k = b.graph.tensor(Place::Virtual, dtype, dims, layout, offsets)?;
    b.graph.reshape_into(k_transposed, k)?;
    let overrides = Overrides { m: lengths, n: None, k: lengths };
    if shape.deterministic {
        b.graph.matmul_into(ds, k, dq, overrides)?;
    } else {
        // Packed sequences: cuDNN takes the places of the sum to be those of dQ.
        let (dims, layout, offsets) = b.layout(strides.dq, heads)?;
        let layout = if shape.packed { layout } else { packed(dims) };
        let dq_sum = b.graph.tensor(Place::Device, DataType::Float, dims, layout, offsets)?;
        b.graph.matmul_into(ds, k, dq_sum, overrides)?;
        b.graph.pointwise_into(Pointwise::Identity, DataType::Float, &[dq_sum], dq, None)?;
        b.ports.dq_sum = Some(dq_sum);
    }

    b.ports.q = Some(q);
    b.ports.k = Some(k_transposed);
    b.ports.v = Some(v_transposed);
    b.ports.o = Some(o);
    b.ports.d_o = Some(d_o);
    b.ports.stats = Some(stats);
    b.ports.dq = Some(dq);
    b.ports.dk = Some(dk);
    b.ports.dv = Some(dv);
    b.ports.row_sum = Some(row_sum);
    b.ports.scale = Some(scale);
    b.ports.one = Some(one);
    Ok((b.graph, b.ports))
}

impl<'a> Builder<'a> {
    fn new(api: &'static Api, shape: &'a SdpaShape) -> Result<Self> {
        let mut graph = Graph::new(api);
        let mut ports = Ports::default();
        if shape.packed {
            let dims = [shape.batch, 1, 1, 1];
            ports.lengths = Some(graph.tensor(Place::Device, DataType::Int32, dims, [1; 4], None)?);
        }
        Ok(Self { graph, ports, shape })
    }

    /// Dimensions of the scores.
    fn square(&self) -> Dims {
        [self.shape.batch, self.shape.heads, self.shape.seq, self.shape.seq]
    }

    /// The offsets of packed sequences for rows of `stride` elements; `None` for sequences of equal length.
    fn offsets(&mut self, stride: i64) -> Result<Option<Tensor>> {
        if !self.shape.packed {
            return Ok(None);
        }
        if let Some((_, offsets)) = self.ports.offsets.iter().find(|(known, _)| *known == stride) {
            return Ok(Some(*offsets));
        }
        let dims = [self.shape.batch + 1, 1, 1, 1];
        let offsets = self.graph.tensor(Place::Device, DataType::Int64, dims, [1; 4], None)?;
        self.ports.offsets.push((stride, offsets));
        Ok(Some(offsets))
    }

    /// Dimensions, strides and offsets of a window of rows with `heads` heads: `[batch, heads, seq, head_dim]`.
    fn layout(&mut self, stride: i64, heads: i64) -> Result<(Dims, Dims, Option<Tensor>)> {
        let shape = self.shape;
        let dims = [shape.batch, heads, shape.seq, shape.head_dim];
        Ok((dims, [shape.seq * stride, shape.head_dim, stride, 1], self.offsets(stride)?))
    }

    /// A window of rows in device memory, or its transpose.
    fn rows(&mut self, stride: i64, heads: i64, transpose: bool) -> Result<Tensor> {
        let (dims, layout, offsets) = self.layout(stride, heads)?;
        let (dims, layout) = if transpose { (transposed(dims), transposed(layout)) } else { (dims, layout) };
        self.graph.tensor(Place::Device, self.shape.dtype.cudnn(), dims, layout, offsets)
    }

    /// One f32 by row and head in device memory: by sequence and head, or by token and head when packed.
    fn row_tensor(&mut self) -> Result<Tensor> {
        let shape = self.shape;
        let dims = [shape.batch, shape.heads, shape.seq, 1];
        let strides = if shape.packed { [shape.heads * shape.seq, 1, shape.heads, 1] } else { packed(dims) };
        let offsets = self.offsets(shape.heads)?;
        self.graph.tensor(Place::Device, DataType::Float, dims, strides, offsets)
    }

    fn stats(&mut self) -> Result<Tensor> {
        self.row_tensor()
    }

    /// `scale * Q K^T`.
    fn scores(&mut self, q: Tensor, k_transposed: Tensor, scale: Tensor) -> Result<Tensor> {
        let lengths = self.ports.lengths;
        let products = self.graph.between(DataType::Float, self.square())?;
        self.graph.matmul_into(q, k_transposed, products, Overrides { m: lengths, n: lengths, k: None })?;
        self.graph.pointwise(Pointwise::Mul, &[products, scale])
    }

    /// Replaces scores by minus infinity where `mask` does not hold.
    fn select(&mut self, scores: Tensor, mask: Tensor) -> Result<Tensor> {
        let minus_infinity = self.graph.value()?;
        self.ports.minus_infinity.push(minus_infinity);
        self.graph.pointwise(Pointwise::BinarySelect, &[scores, minus_infinity, mask])
    }

    /// Keeps row and column below the length of their sequence; nothing to do when all lengths are equal.
    fn padding_mask(&mut self, scores: Tensor) -> Result<Tensor> {
        let Some(lengths) = self.ports.lengths else { return Ok(scores) };
        let row = self.graph.index(scores, 2)?;
        let column = self.graph.index(scores, 3)?;
        let row = self.graph.logical(Pointwise::CmpLt, row, lengths)?;
        let column = self.graph.logical(Pointwise::CmpLt, column, lengths)?;
        let both = self.graph.logical(Pointwise::LogicalAnd, row, column)?;
        self.select(scores, both)
    }

    /// Keeps columns up to the row.
    fn causal_mask(&mut self, scores: Tensor) -> Result<Tensor> {
        let row = self.graph.index(scores, 2)?;
        let column = self.graph.index(scores, 3)?;
        let mask = self.graph.logical(Pointwise::CmpGe, row, column)?;
        self.select(scores, mask)
    }

    /// The scores' transpose in `dtype`.
    fn transpose(&mut self, scores: Tensor, dtype: DataType) -> Result<Tensor> {
        let dims = self.square();
        let turned = transposed(packed(dims));
        let y = self.graph.tensor(Place::Virtual, dtype, transposed(dims), turned, None)?;
        self.graph.reshape_into(scores, y)?;
        Ok(y)
    }

    /// `gradient = a b`, summed over the q heads that share a k/v head.
    fn key_gradient(&mut self, a: Tensor, b: Tensor, gradient: Tensor) -> Result<()> {
        let (shape, lengths) = (self.shape, self.ports.lengths);
        let overrides = Overrides { m: lengths, n: None, k: lengths };
        if shape.heads == shape.kv_heads {
            return self.graph.matmul_into(a, b, gradient, overrides);
        }
        let dims = [shape.batch, shape.heads, shape.seq, shape.head_dim];
        let by_head = self.graph.between(shape.dtype.cudnn(), dims)?;
        self.graph.matmul_into(a, b, by_head, overrides)?;
        self.graph.reduce_into(Reduce::Add, by_head, gradient)
    }
}
