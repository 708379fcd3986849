//! JSONL: one object a line.

use super::input::{Bytes, Input};
use super::{Content, Format, Mark, RawRow, RowPlace, RowReader};
use crate::data::lines::{Line, Lines};
use crate::error::Result;

pub(super) const FORMAT: Format = Format { name: "jsonl", extensions: &["jsonl", "ndjson"], open };

struct Reader {
    lines: Lines<Bytes>,
    rows: u64,
}

fn open(input: Input<'_>, from: Mark) -> Result<Box<dyn RowReader>> {
    let path = input.path;
    let lines = Lines::from_mark(path, input.bytes_from(from.bytes)?, (from.lines as usize, from.bytes));
    Ok(Box::new(Reader { lines, rows: from.rows }))
}

impl RowReader for Reader {
    fn next(&mut self, count: usize) -> Result<Vec<RawRow>> {
        let lines = self.lines.next(count)?;
        self.rows += lines.len() as u64;
        let row = |line: Line| RawRow { place: RowPlace::Line(line.number), content: Content::Line(line) };
        Ok(lines.into_iter().map(row).collect())
    }

    fn mark(&self) -> Mark {
        let (lines, bytes) = self.lines.mark();
        Mark { rows: self.rows, lines: lines as u64, bytes }
    }
}
