//! The bytes of a file or of standard input, decompressed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Error, Result};

/// The path that stands for standard input.
pub const STDIN: &str = "-";

/// A compression format of files.
struct Compression {
    name: &'static str,
    /// The file extensions.
    extensions: &'static [&'static str],
    /// The first bytes.
    magic: &'static [u8],
    open: fn(Bytes) -> io::Result<Box<dyn Read + Send>>,
}

static COMPRESSIONS: [Compression; 2] = [
    Compression {
        name: "gzip",
        extensions: &["gz", "gzip"],
        magic: b"\x1f\x8b",
        open: |bytes| Ok(Box::new(flate2::bufread::MultiGzDecoder::new(bytes))),
    },
    Compression {
        name: "zstd",
        extensions: &["zst", "zstd"],
        magic: b"\x28\xb5\x2f\xfd",
        // Frames that need a window of more than 128 MiB are refused.
        open: |bytes| Ok(Box::new(zstd::Decoder::with_buffer(bytes)?)),
    },
];

/// Says of an error that it is one of unpacking.
struct Unpacked {
    name: &'static str,
    bytes: Box<dyn Read + Send>,
}

impl Read for Unpacked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let explain = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("the file is compressed with {} and cannot be unpacked: {error}", self.name),
            )
        };
        self.bytes
            .read(buffer)
            .map_err(|error| if error.kind() == io::ErrorKind::Interrupted { error } else { explain(error) })
    }
}

pub(super) type Bytes = Box<dyn BufRead + Send>;

fn buffered(reader: impl Read + Send + 'static) -> Bytes {
    Box::new(BufReader::with_capacity(BUFFER, reader))
}

const BUFFER: usize = 256 << 10;
/// The number of bytes at the file's beginning that are inspected.
const PEEKED: usize = 4 << 10;

/// An opened file at its beginning.
pub(super) struct Input<'a> {
    pub(super) path: &'a Path,
    bytes: Bytes,
    /// Whether it is stored as it is read, so that one can go to a place in it.
    plain: bool,
    beginning: Vec<u8>,
}

impl<'a> Input<'a> {
    /// # Errors
    /// If the file cannot be opened or read.
    pub(super) fn open(path: &'a Path) -> Result<Self> {
        let io = |error| Error::io(path, error);
        let mut bytes: Bytes =
            if path == Path::new(STDIN) { buffered(io::stdin()) } else { buffered(File::open(path).map_err(io)?) };
        let mut plain = true;
        let head = bytes.fill_buf().map_err(io)?;
        if let Some(Compression { name, open, .. }) = COMPRESSIONS.iter().find(|known| head.starts_with(known.magic)) {
            bytes = buffered(Unpacked { name, bytes: open(bytes).map_err(io)? });
            plain = false;
        }
        let beginning = bytes.fill_buf().map_err(io)?;
        let beginning = beginning[..beginning.len().min(PEEKED)].to_vec();
        Ok(Self { path, bytes, plain, beginning })
    }

    pub(super) fn is_parquet(&self) -> bool {
        self.beginning.starts_with(b"PAR1")
    }

    /// Whether the first character that is no white space is this one.
    pub(super) fn begins_with(&self, character: u8) -> bool {
        let text = self.beginning.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.beginning);
        text.trim_ascii_start().first() == Some(&character)
    }

    /// The extension of the name without that of its compression, in lower case.
    pub(super) fn extension(&self) -> Option<String> {
        data_extension(self.path)
    }

    /// The bytes from a place on.
    pub(super) fn bytes_from(mut self, at: u64) -> Result<Bytes> {
        let io = |error| Error::io(self.path, error);
        if at > 0 && self.plain && self.path != Path::new(STDIN) {
            let mut file = File::open(self.path).map_err(io)?;
            file.seek(SeekFrom::Start(at)).map_err(io)?;
            return Ok(buffered(file));
        }
        let skipped = io::copy(&mut self.bytes.by_ref().take(at), &mut io::sink()).map_err(io)?;
        if skipped < at {
            return Err(Error::data(
                self.path,
                None,
                format!("it has {skipped} bytes, but {at} of them were read before: it is another file now"),
            ));
        }
        Ok(self.bytes)
    }
}

/// The extension of a file's name, without that of its compression; in lower case.
pub(crate) fn data_extension(path: &Path) -> Option<String> {
    let extension = |path: &Path| path.extension().map(|end| end.to_string_lossy().to_lowercase());
    let end = extension(path)?;
    if COMPRESSIONS.iter().any(|known| known.extensions.contains(&end.as_str())) {
        return path.file_stem().and_then(|stem| extension(Path::new(stem)));
    }
    Some(end)
}
