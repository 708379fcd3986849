//! The rows of a set, encoded, in their order: from the cache as far as it has them, otherwise from the files.
//!
//! While one chunk is encoded on all cores, the one before it is handed on and the one behind it is read.

use super::cache::{CachedSet, Writer};
use super::encode::{EncodeOptions, TextEncoder};
use super::load::{CHUNK, EncodedRow, RowSet, encode_rows};
use super::rows::{RawRow, RowPosition, RowSource};
use crate::error::Result;

/// Gets the rows of one file (by its place in the set), in order.
pub(super) type Sink<'a> = dyn FnMut(usize, Vec<EncodedRow>) -> Result<()> + Send + 'a;

/// Where rows came from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Origins {
    /// Rows out of the cache.
    pub(super) cached: usize,
    /// Rows that were tokenized.
    pub(super) tokenized: usize,
    /// All of them are in the cache now.
    pub(super) kept: bool,
}

/// Rows that were read together.
struct Chunk {
    file: usize,
    rows: Vec<RawRow>,
    /// The position behind them.
    end: RowPosition,
}

/// The same, encoded.
struct EncodedChunk {
    file: usize,
    rows: Vec<Result<EncodedRow>>,
    end: RowPosition,
}

/// A set that is read.
pub(super) struct Pipeline<'a> {
    set: &'a RowSet,
    encoder: &'a dyn TextEncoder,
    options: &'a EncodeOptions,
    source: RowSource,
    /// Rows that may still be read.
    left: usize,
    origins: Origins,
}

/// Why tokenizing stopped.
enum Stop {
    /// There are no more rows.
    End,
    /// As many rows as were asked for.
    Enough,
    /// The cache goes on from here.
    Cached,
}

impl<'a> Pipeline<'a> {
    /// The first `most` rows of a set.
    pub(super) fn new(set: &'a RowSet, encoder: &'a dyn TextEncoder, options: &'a EncodeOptions, most: usize) -> Self {
        let source = RowSource::new(set.files.clone());
        Self { set, encoder, options, source, left: most, origins: Origins::default() }
    }

    /// Hands all rows to `sink`.
    ///
    /// # Errors
    /// The first problem of a file or a row, or that of `sink`, in the order of the rows.
    pub(super) fn run(mut self, mut cache: Option<CachedSet<'_>>, sink: &mut Sink<'_>) -> Result<Origins> {
        self.origins.kept = cache.is_some();
        while self.left > 0 {
            let at = self.source.position();
            if let Some((file, mut rows, end)) = cache.as_mut().and_then(|cache| cache.read(at)) {
                rows.truncate(self.left);
                self.left -= rows.len();
                self.origins.cached += rows.len();
                sink(file, rows)?;
                self.source.seek(end);
                continue;
            }
            if cache.as_ref().is_some_and(|cache| cache.ends_at(at)) {
                break;
            }
            let mut writer = cache.as_ref().and_then(|cache| cache.writer(at));
            let stop = self.tokenize(cache.as_ref(), &mut writer, sink)?;
            let Some(writer) = writer else {
                self.origins.kept = false;
                break;
            };
            let shards = writer.shards();
            self.origins.kept &= writer.finish(matches!(stop, Stop::End));
            match (stop, cache.as_mut()) {
                (Stop::Cached, Some(cache)) => cache.skip_to(shards),
                _ => break,
            }
        }
        Ok(self.origins)
    }

    fn read(source: &mut RowSource, count: usize) -> Result<Option<Chunk>> {
        if count == 0 {
            return Ok(None);
        }
        let chunk = source.next(count)?;
        Ok(chunk.map(|(file, rows)| Chunk { file, rows, end: source.position() }))
    }

    /// Encodes rows up to the end of the set, or until the cache goes on.
    fn tokenize(
        &mut self,
        cache: Option<&CachedSet<'_>>,
        writer: &mut Option<Writer>,
        sink: &mut Sink<'_>,
    ) -> Result<Stop> {
        let Self { set, encoder, options, source, left, origins } = self;
        // Those that are asked for come before those that are handed on.
        let mut unread = *left;
        let mut coming = Self::read(source, CHUNK.min(unread));
        let mut waiting: Option<EncodedChunk> = None;
        let mut hand_on = |chunk: EncodedChunk| -> Result<bool> {
            let mut problem = None;
            let whole = |row: Result<EncodedRow>| row.map_err(|error| problem = Some(error)).ok();
            let rows: Vec<EncodedRow> = chunk.rows.into_iter().map_while(whole).collect();
            if let Some(writer) = writer.as_mut().filter(|_| problem.is_none()) {
                writer.push(chunk.file, &rows, chunk.end);
            }
            (*left, origins.tokenized) = (*left - rows.len(), origins.tokenized + rows.len());
            sink(chunk.file, rows)?;
            problem.map_or(Ok(()), Err)?;
            Ok(match (cache, &*writer) {
                (Some(cache), Some(writer)) => cache.goes_on_with(writer.shards(), chunk.end),
                _ => false,
            })
        };
        loop {
            let chunk = match coming {
                Ok(Some(chunk)) => chunk,
                ended => {
                    waiting.map(&mut hand_on).transpose()?;
                    ended?;
                    return Ok(if unread == 0 { Stop::Enough } else { Stop::End });
                }
            };
            let Chunk { file, rows, end } = chunk;
            unread -= rows.len();
            let last = waiting.take();
            let last_end = last.as_ref().map(|chunk| chunk.end);
            let (rows, (cached, following)) = rayon::join(
                || encode_rows(&set.files[file].path, rows, &set.mapping, *encoder, options),
                || (last.map_or(Ok(false), &mut hand_on), Self::read(source, CHUNK.min(unread))),
            );
            if cached? {
                source.seek(last_end.expect("a chunk was handed on"));
                return Ok(Stop::Cached);
            }
            (waiting, coming) = (Some(EncodedChunk { file, rows, end }), following);
        }
    }
}
