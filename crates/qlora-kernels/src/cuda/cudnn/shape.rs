//! The description of an attention call: sizes, element type, and where the tensors lie.

use super::api::DataType;
use super::error::{CudnnError, Result};
use super::search::MASKS_THE_END;

/// Element type of Q, K, V, O and their gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SdpaType {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl SdpaType {
    pub(super) fn cudnn(self) -> DataType {
        match self {
            Self::Bf16 => DataType::Bfloat16,
            Self::F16 => DataType::Half,
        }
    }
}

/// Sizes of a causal attention with grouped k/v heads. Query and key lengths are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SdpaShape {
    /// Number of sequences.
    pub batch: i64,
    /// Length of each sequence, or a bound of the lengths when `packed`.
    pub seq: i64,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads; divides `heads`.
    pub kv_heads: i64,
    /// Elements of a head: a multiple of 8, at most 128.
    pub head_dim: i64,
    /// Element type.
    pub dtype: SdpaType,
    /// Sequences of different lengths, one after the other without gaps; see [`Packing`]. Hopper only.
    pub packed: bool,
    /// The backward gives the same bits each time, at the price of a workspace of about
    /// `2 * batch * heads * seq * seq` bytes and of up to a quarter of its speed.
    pub deterministic: bool,
}

impl SdpaShape {
    /// Checks the properties that cuDNN would refuse or, worse, not check.
    pub(super) fn check(&self, capability: u32, version: usize) -> Result<()> {
        let refuse = |text: &str| Err(CudnnError::Unsupported(format!("{text}: {self:?}")));
        if self.batch < 1 || self.seq < 2 || self.heads < 1 || self.kv_heads < 1 {
            return refuse("at least one sequence of two tokens and one head are needed");
        }
        if self.heads % self.kv_heads != 0 {
            return refuse("the number of k/v heads must divide that of q heads");
        }
        if self.head_dim < 8 || self.head_dim > 128 || self.head_dim % 8 != 0 {
            return refuse("head_dim must be a multiple of 8 up to 128");
        }
        if self.packed && capability / 10 != 9 {
            return refuse("packed sequences are right on Hopper only");
        }
        if !self.packed && version < MASKS_THE_END && self.seq % 128 != 0 {
            return refuse("lengths that are not a multiple of 128 need cuDNN 9.15.1");
        }
        Ok(())
    }
}

/// A tensor of token rows in device memory: element (token, head, d) lies `token * stride + head * head_dim + d`
/// elements behind `pointer`.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Device address, a multiple of 16 bytes.
    pub pointer: u64,
    /// Elements from one row to the next, a multiple of 8.
    pub stride: i64,
}

/// Tensors of the forward.
#[derive(Clone, Copy, Debug)]
pub struct SdpaForward<'a> {
    /// Queries, `heads` heads.
    pub q: Rows,
    /// Keys, `kv_heads` heads.
    pub k: Rows,
    /// Values, `kv_heads` heads.
    pub v: Rows,
    /// Output (written), `heads` heads.
    pub o: Rows,
    /// f32 log-sum-exp (written), `tokens * heads` elements: `[batch, heads, seq]`, or `[tokens, heads]` when packed.
    pub lse: u64,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// Lengths and offsets when the shape is packed.
    pub packing: Option<Packing<'a>>,
}

/// Tensors of the backward.
#[derive(Clone, Copy, Debug)]
pub struct SdpaBackward<'a> {
    /// Queries of the forward.
    pub q: Rows,
    /// Keys of the forward.
    pub k: Rows,
    /// Values of the forward.
    pub v: Rows,
    /// Output of the forward.
    pub o: Rows,
    /// Log-sum-exp of the forward, in the layout in which the forward wrote it.
    pub lse: u64,
    /// Gradient of the output.
    pub d_o: Rows,
    /// Gradient of the queries (written).
    pub dq: Rows,
    /// Gradient of the keys (written).
    pub dk: Rows,
    /// Gradient of the values (written).
    pub dv: Rows,
    /// Factor of the scores.
    pub scale: f32,
    /// Lengths and offsets when the shape is packed.
    pub packing: Option<Packing<'a>>,
}

/// The layout of packed sequences. All arrays are in device memory and may be shared by every layer of a step. Rows
/// that belong to no sequence are neither read nor written.
#[derive(Clone, Copy, Debug)]
pub struct Packing<'a> {
    /// Rows of all sequences together (a bound is enough): sizes the workspace of the backward.
    pub tokens: i64,
    /// Lengths of the sequences, i32 `[batch]`; each at most `seq`. A length may be zero.
    pub lengths: u64,
    /// For each row stride that occurs, the address of the offsets `[batch + 1]` in i64: first row of the sequence
    /// times the stride, and at the end all rows times the stride (see [`PackedLayout::offsets`]). Strides that occur
    /// are those of all tensors, and `heads` (for the log-sum-exp).
    pub offsets: &'a [(i64, u64)],
}

impl Packing<'_> {
    pub(super) fn offsets_of(&self, stride: i64) -> Result<u64> {
        let found = self.offsets.iter().find(|(known, _)| *known == stride);
        found.map(|(_, pointer)| *pointer).ok_or_else(|| {
            CudnnError::Unsupported(format!("packed sequences need the offsets for rows of {stride} elements"))
        })
    }
}

/// The host's side of a [`Packing`]: the arrays to upload, once for each batch.
///
/// Building the two plans of a new shape takes about a tenth of a second. So that few plans serve many batches, shapes have
/// room for more and longer sequences than a batch has; the sequences that do not exist have length zero. That costs hardly
/// any time, but the workspace of the backward grows with `batch * seq`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    /// [`SdpaShape::batch`].
    pub batch: i64,
    /// [`SdpaShape::seq`].
    pub seq: i64,
    /// [`Packing::tokens`].
    pub tokens: i64,
    /// [`Packing::lengths`].
    pub lengths: Vec<i32>,
    first_rows: Vec<i64>,
}

impl PackedLayout {
    /// Sequences of these lengths, one after the other, in a shape of `batch` sequences of at most `seq` tokens; more of them,
    /// or longer ones, than that must not be given.
    pub fn with_bounds(lengths: &[usize], batch: i64, seq: i64) -> Self {
        let mut padded: Vec<i32> = lengths.iter().map(|length| *length as i32).collect();
        padded.resize((batch as usize).max(lengths.len()), 0);
        let mut first_rows = vec![0];
        first_rows.extend(padded.iter().scan(0, |row, length| {
            *row += i64::from(*length);
            Some(*row)
        }));
        let tokens = lengths.iter().map(|length| *length as i64).sum();
        Self { batch: padded.len() as i64, seq, tokens, lengths: padded, first_rows }
    }

    /// The offsets for rows of `stride` elements, see [`Packing::offsets`].
    pub fn offsets(&self, stride: i64) -> Vec<i64> {
        self.first_rows.iter().map(|row| row * stride).collect()
    }
}

/// Row strides of all tensors of a call; zero for those that a forward does not have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Strides {
    pub(super) q: i64,
    pub(super) k: i64,
    pub(super) v: i64,
    pub(super) o: i64,
    pub(super) d_o: i64,
    pub(super) dq: i64,
    pub(super) dk: i64,
    pub(super) dv: i64,
}

/// Checks that rows can be addressed the way the plans assume: cuDNN does not look at pointers and strides itself,
/// misaligned ones give wrong results or faults.
pub(super) fn check_rows(name: &str, rows: Rows, heads: i64, shape: &SdpaShape) -> Result<()> {
    if !rows.pointer.is_multiple_of(16) || rows.stride % 8 != 0 || rows.stride < heads * shape.head_dim {
        return Err(CudnnError::Unsupported(format!(
            "{name} must be aligned to 16 bytes, with rows of at least {} elements in multiples of 8: {rows:?}",
            heads * shape.head_dim
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_that_do_not_exist_are_empty() {
        let layout = PackedLayout::with_bounds(&[1500, 3, 700], 4, 2048);
        assert_eq!((layout.batch, layout.seq, layout.tokens), (4, 2048, 2203));
        assert_eq!(layout.lengths, [1500, 3, 700, 0]);
        assert_eq!(layout.offsets(10), [0, 15_000, 15_030, 22_030, 22_030]);
    }

    #[test]
    fn shapes_that_cudnn_would_get_wrong_are_refused() {
        let good = SdpaShape {
            batch: 1,
            seq: 2048,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            dtype: SdpaType::Bf16,
            packed: true,
            deterministic: false,
        };
        assert!(good.check(90, 91_900).is_ok());
        assert!(good.check(80, 91_900).is_err());
        assert!(SdpaShape { packed: false, ..good }.check(80, 91_900).is_ok());
        assert!(SdpaShape { kv_heads: 5, ..good }.check(90, 91_900).is_err());
        assert!(SdpaShape { head_dim: 100, ..good }.check(90, 91_900).is_err());
        assert!(SdpaShape { seq: 1, ..good }.check(90, 91_900).is_err());
        let dense = SdpaShape { packed: false, seq: 200, ..good };
        assert!(dense.check(90, 91_400).is_err() && dense.check(90, 91_501).is_ok());
        let rows = |pointer, stride| check_rows("q", Rows { pointer, stride }, 32, &good).is_ok();
        assert!(rows(4096, 4096) && rows(4112, 6144));
        assert!(!rows(4104, 4096) && !rows(4096, 4100) && !rows(4096, 2048));
    }
}
