//! A step of generation on a GPU: one new token for each of several sequences, whose earlier keys and values lie in caches
//! of their own.
//!
//! [`DecodeTables`] tells the kernels where the caches of all layers are, by one copy to the device a step.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::attention::takes;
use super::buffer::Buffer;
use super::few_tokens::with_zeroed;
use super::ffi;
use super::gpu::Gpu;
use super::graph;
use super::view::{CudaView, one_gpu};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::ops::attention::AttentionConfig;
use crate::ops::rope::RopeTable;
use crate::view::{View, ViewMut};

const OP: &str = "decode";

/// The addresses of the keys and values of all layers and sequences, and the sequences' new positions.
#[derive(Debug)]
pub struct DecodeTables<'a> {
    /// `[layers][sequences]` addresses of keys, then of values, then the positions as u32.
    table: Arc<Buffer>,
    /// Whether the caches that the table names are there: graphs look at it.
    lives: Arc<AtomicBool>,
    layers: usize,
    positions: Vec<u32>,
    /// Rows of the largest cache: each has room for its position, which was checked.
    capacity: usize,
    width: usize,
    dtype: Dtype,
    /// The kernels write there.
    caches: PhantomData<&'a mut Matrix>,
}

/// The memory of a [`DecodeTables`].
#[derive(Clone, Debug)]
pub struct TableMemory(Arc<Buffer>, Arc<AtomicBool>);

impl<'a> DecodeTables<'a> {
    /// Whether the kernels take this attention.
    pub fn takes(cfg: &AttentionConfig, dtype: Dtype) -> bool {
        takes(cfg, dtype)
    }

    /// Of `layers[layer][sequence] = [keys, values]`, each `[capacity, kv_heads * head_dim]`, and the position of each
    /// sequence's new token: the tokens before it are in the caches. A step has `rows` rows; those behind the sequences
    /// repeat the last of them, and write its key and value once more.
    ///
    /// `memory` is an earlier table's ([`Self::memory`]), to be written again if it is large enough.
    ///
    /// # Errors
    /// If the caches differ in width or type, are not on this GPU, or have no room for a position.
    pub fn new(
        gpu: &Arc<Gpu>,
        layers: Vec<Vec<[&'a mut Matrix; 2]>>,
        positions: &[u32],
        rows: usize,
        memory: Option<TableMemory>,
    ) -> Result<Self> {
        let repeated = rows.saturating_sub(positions.len());
        let mut addresses = [Vec::new(), Vec::new()];
        let mut first: Option<(usize, Dtype)> = None;
        let mut capacity = 0;
        let count = layers.len();
        for caches in layers {
            if caches.len() != positions.len() {
                return Err(Error::invalid(OP, format!("{} caches for {} sequences", caches.len(), positions.len())));
            }
            let start = addresses[0].len();
            for (caches, &position) in caches.into_iter().zip(positions) {
                for (matrix, addresses) in caches.into_iter().zip(&mut addresses) {
                    let room = matrix.rows();
                    let view = matrix.view_mut().cuda(OP)?;
                    let kind = *first.get_or_insert((view.cols(), view.dtype()));
                    one_gpu(OP, gpu, [view.gpu()])?;
                    let gapless = view.stride() == view.cols();
                    if kind != (view.cols(), view.dtype()) || !gapless || !view.ptr().is_multiple_of(16) {
                        return Err(Error::invalid(OP, "the caches are not alike"));
                    }
                    if position as usize >= room {
                        return Err(Error::invalid(OP, format!("position {position} in a cache of {room} tokens")));
                    }
                    capacity = capacity.max(room);
                    addresses.push(view.ptr());
                }
            }
            for addresses in addresses.iter_mut().filter(|addresses| addresses.len() > start) {
                let last = addresses[addresses.len() - 1];
                addresses.resize(addresses.len() + repeated, last);
            }
        }
        let Some((width, dtype)) = first else { return Err(Error::invalid(OP, "no sequence")) };
        let mut positions = positions.to_vec();
        positions.resize(positions.len() + repeated, positions[positions.len() - 1]);
        let [mut table, values] = addresses;
        table.extend(values);
        for pair in positions.chunks(2) {
            table.push(u64::from(pair[0]) | u64::from(*pair.get(1).unwrap_or(&0)) << 32);
        }
        let (table, lives) = match memory.filter(|memory| memory.0.bytes() == size_of_val(&*table)) {
            Some(TableMemory(memory, lives)) => {
                memory.overwrite(OP, &table)?;
                (memory, lives)
            }
            None => (Arc::new(Buffer::upload(gpu, OP, &table)?), Arc::default()),
        };
        lives.store(true, Ordering::SeqCst);
        Ok(Self { table, lives, layers: count, positions, capacity, width, dtype, caches: PhantomData })
    }

    /// An error unless the caches are of this attention, in this type: what launches that are recorded do not look at again.
    ///
    /// # Errors
    /// See above.
    pub fn expect(&self, cfg: &AttentionConfig, dtype: Dtype) -> Result<()> {
        match cfg.kv_heads * cfg.head_dim == self.width && dtype == self.dtype && takes(cfg, dtype) {
            true => Ok(()),
            false => Err(Error::invalid(OP, "the caches are for another attention")),
        }
    }

    /// The memory of the table: launches that are recorded with it find the next table there.
    pub fn memory(&self) -> TableMemory {
        TableMemory(self.table.clone(), self.lives.clone())
    }

    /// Rows of the largest cache, which the launches depend on.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    fn sequences(&self) -> usize {
        self.positions.len()
    }

    /// The addresses of a layer's keys (0) or values (1).
    fn caches<T>(&self, layer: usize, kind: usize) -> *const T {
        graph::needs(&self.lives);
        let at = (kind * self.layers + layer) * self.sequences() * size_of::<u64>();
        self.table.as_ptr::<u8>().wrapping_add(at).cast()
    }

    fn device_positions(&self) -> *const u32 {
        self.caches(0, 2)
    }

    fn check(&self, layer: usize, cfg: &AttentionConfig, q: View, columns: usize) -> Result<()> {
        q.expect(OP, "the new tokens' columns", self.sequences(), columns)?;
        let cuda = q.cuda(OP)?;
        one_gpu(OP, self.table.gpu(), [cuda.gpu()])?;
        let fits = layer < self.layers && cfg.kv_heads * cfg.head_dim == self.width && cuda.dtype() == self.dtype;
        match fits && takes(cfg, self.dtype) && cuda.ptr().is_multiple_of(16) && cuda.stride().is_multiple_of(8) {
            true => Ok(()),
            false => Err(Error::invalid(OP, "the caches are for another attention")),
        }
    }

    /// Rotates the new tokens' q and k in place and puts k and v into the caches of `layer`. `qkv`: `[sequences, (heads +
    /// 2 kv_heads) * head_dim]`.
    ///
    /// # Errors
    /// If a size does not fit, or a position is beyond the table.
    pub fn append(&mut self, layer: usize, cfg: &AttentionConfig, qkv: ViewMut, table: &RopeTable) -> Result<()> {
        self.check(layer, cfg, qkv.as_view(), (cfg.heads + 2 * cfg.kv_heads) * cfg.head_dim)?;
        Error::check_shape(OP, "the table's heads", &[table.head_dim()], &[cfg.head_dim])?;
        if let Some(position) = self.positions.iter().find(|position| **position as usize >= table.max_positions()) {
            return Err(Error::invalid(OP, format!("position {position} is beyond the rotation table")));
        }
        let qkv = qkv.cuda(OP)?;
        let [cos, sin] = table.on_device(qkv.gpu())?;
        // SAFETY: the caches are borrowed by `self`, have `capacity` rows of `width` elements and room for the positions;
        // the other windows are live and have the sizes passed.
        qkv.gpu().launch(OP, |stream| unsafe {
            ffi::qlora_decode_rope_append(
                self.dtype.code(),
                qkv.ptr() as *mut _,
                qkv.ld(),
                cos.as_ptr(),
                sin.as_ptr(),
                self.device_positions(),
                self.caches(layer, 0),
                self.caches(layer, 1),
                self.width as i64,
                self.sequences() as i64,
                1,
                self.capacity as i64,
                cfg.heads as i64,
                cfg.kv_heads as i64,
                cfg.head_dim as i64,
                qkv.gpu().early(),
                stream,
            )
        })
    }

    /// The attention of the new tokens, whose keys and values are in the caches: `q`, `out`: `[sequences, heads *
    /// head_dim]`.
    ///
    /// # Errors
    /// If a size does not fit.
    pub fn attention(&self, layer: usize, cfg: &AttentionConfig, q: View, out: ViewMut) -> Result<()> {
        let columns = cfg.heads * cfg.head_dim;
        self.check(layer, cfg, q, columns)?;
        self.check(layer, cfg, out.as_view(), columns)?;
        let (q, out) = (q.cuda(OP)?, out.cuda(OP)?);
        let gpu = out.gpu();
        let [sequences, heads, kv_heads, head_dim, capacity] =
            [self.sequences(), cfg.heads, cfg.kv_heads, cfg.head_dim, self.capacity].map(|size| size as i64);
        // SAFETY: a pure function of its arguments.
        let bytes = unsafe {
            let limits = gpu.launch_limits();
            ffi::qlora_decode_attention_workspace(sequences, 1, heads, kv_heads, head_dim, capacity, limits)
        };
        let launch = |scratch: *mut u8| {
            // SAFETY: as in `append`; the workspace has the size asked for and was zero before its first use.
            gpu.launch("decode_attention", |stream| unsafe {
                ffi::qlora_decode_attention(
                    self.dtype.code(),
                    q.ptr() as *const _,
                    q.ld(),
                    self.caches(layer, 0),
                    self.caches(layer, 1),
                    self.width as i64,
                    self.device_positions(),
                    out.ptr() as *mut _,
                    out.ld(),
                    sequences,
                    1,
                    heads,
                    kv_heads,
                    head_dim,
                    capacity,
                    cfg.scale,
                    cfg.window.map_or(0, |window| window as i64),
                    gpu.early(),
                    scratch.cast(),
                    gpu.launch_limits(),
                    stream,
                )
            })
        };
        with_zeroed(gpu, OP, &gpu.workspaces().attention, bytes as usize, launch)
    }
}

impl Drop for DecodeTables<'_> {
    /// The caches may go now: graphs that find them through the table must not run any more.
    fn drop(&mut self) {
        self.lives.store(false, Ordering::SeqCst);
    }
}

pub(crate) fn argmax(op: &'static str, x: CudaView) -> Result<Vec<Option<u32>>> {
    let gpu = x.gpu().arc();
    let mut out = Buffer::new(&gpu, op, 4 * x.rows())?;
    let target = out.as_mut_ptr::<u32>();
    // SAFETY: the window is live; the result has an element a row.
    gpu.launch(op, |stream| unsafe {
        ffi::qlora_argmax(
            x.dtype().code(),
            x.ptr() as *const _,
            x.ld(),
            x.rows() as i64,
            x.cols() as i64,
            target,
            stream,
        )
    })?;
    let columns: Vec<u32> = out.download()?;
    Ok(columns.into_iter().map(|column| (column != u32::MAX).then_some(column)).collect())
}
