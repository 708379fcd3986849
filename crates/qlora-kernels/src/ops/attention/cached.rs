//! [`attention`](super) of new tokens to a cache: the attention of generation.

use std::ops::Range;

use super::forward::{Running, Tile};
use super::{AttentionConfig, Columns, map};
use crate::error::{Error, Result};
use crate::matrix::{Matrix, Workspace};
use crate::view::{View, ViewMut};

/// With at most this many queries, the keys are split over the threads.
const FEW_QUERIES: usize = 16;

/// Keys to a piece then. Fixed, so that the sums do not depend on the number of threads.
const PIECE: usize = 512;

/// The attention of the last `t` of `n` positions: `q`, `out` `[t, heads * head_dim]`; `k`, `v`
/// `[n, kv_heads * head_dim]`. Query `i` is at position `n - t + i`.
///
/// # Errors
/// If a shape does not fit, `t > n`, or `cfg` describes no attention.
pub fn cached(cfg: &AttentionConfig, q: View, k: View, v: View, out: ViewMut, workspace: &Workspace) -> Result<()> {
    const OP: &str = "attention_cached";
    cfg.check(OP)?;
    let (t, n, d) = (q.rows(), k.rows(), cfg.head_dim);
    q.expect(OP, "q", t, cfg.heads * d)?;
    out.expect(OP, "out", t, cfg.heads * d)?;
    k.expect(OP, "k", n, cfg.kv_heads * d)?;
    v.expect(OP, "v", n, cfg.kv_heads * d)?;
    if t > n {
        return Err(Error::invalid(OP, format!("{t} queries are more than the {n} positions")));
    }
    #[cfg(feature = "cuda")]
    if out.gpu().is_some() {
        return crate::cuda::attention::cached(OP, cfg, q, k, v, out);
    }
    let (q, k, v, mut out) = (q.host(OP)?, k.host(OP)?, v.host(OP)?, out.host(OP)?);
    let mut tiles = Vec::new();
    for first in (0..t).step_by(cfg.tile_queries()) {
        let rows = first..t.min(first + cfg.tile_queries());
        let positions = n - t + rows.start..n - t + rows.end;
        let keys = cfg.visible(&positions);
        let out_rows;
        (out_rows, out) = out.split_rows(rows.len());
        let (k, v) = (k.slice_rows(keys.clone()), v.slice_rows(keys));
        tiles.extend(Tile::of_heads(cfg, q.slice_rows(rows), k, v, out_rows, None));
    }
    let work = cfg.pairs(n - t..n) * cfg.heads * 2 * d;
    if t > FEW_QUERIES {
        map(tiles, work, |tile| tile.run(cfg, workspace));
    } else {
        run_in_pieces(cfg, tiles, work, workspace);
    }
    Ok(())
}

fn run_in_pieces(cfg: &AttentionConfig, tiles: Vec<Tile>, work: usize, workspace: &Workspace) {
    let pieces_of = |tile: &Tile| {
        let n = tile.k.rows();
        (0..n).step_by(PIECE).map(move |from| from..n.min(from + PIECE))
    };
    let columns = |tile: &Tile| Columns::new(cfg, tile.q.rows());
    let pieces: Vec<_> = tiles.iter().flat_map(|tile| pieces_of(tile).map(move |keys| (tile, keys))).collect();
    let memory =
        |(tile, keys): &(&Tile, Range<usize>)| workspace.scratch(1, Running::elements(&columns(tile), keys.len()));
    let mut memories: Vec<Matrix> = pieces.iter().map(memory).collect();
    let pieces = pieces.into_iter().zip(&mut memories).collect();
    let states = map(pieces, work, |((tile, keys), memory)| {
        let mut state = Running::new(columns(tile), tile.q, cfg.scale, memory.as_mut_slice());
        let (k, v) = (tile.k.slice_rows(keys.clone()), tile.v.slice_rows(keys.clone()));
        state.attend(k, v, keys.start, tile.first_query(), cfg.window);
        state
    });
    let mut states = states.into_iter();
    for mut tile in tiles {
        let mut of_tile = states.by_ref().take(pieces_of(&tile).count());
        let mut state = of_tile.next().expect("a query sees at least its own position");
        of_tile.for_each(|other| state.merge(&other));
        state.write_out(&mut tile.out);
    }
}
