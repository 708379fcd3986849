//! One message between two ranks, as bytes.
//!
//! ```text
//! "QLRA"  kind u8  length of the name u8  sequence u64  length of the content u64  CRC-32 of these 22 bytes u32
//! name  content  CRC-32 of both u32                                                                     (little-endian)
//! ```
//! TCP's own checksum of 16 bits lets one damaged packet in some ten thousand through: too many for gradients. The head has one of its
//! own because a damaged length would make a rank wait for bytes that never come.
//!
//! Sequence and name say which call a message belongs to: ranks that are at different places of the program find out instead
//! of waiting for each other.

use std::io::{self, Read, Write};

/// The bytes of a message before its name, the checksum of them included.
const HEAD: usize = 26;
/// The first bytes of a message, by which a stray client is told from a rank.
const MAGIC: [u8; 4] = *b"QLRA";
/// The most that is taken for granted: memory is taken as bytes come, not as they are announced.
const PIECE: u64 = 1 << 20;
/// The longest content that is copied rather than sent by itself.
const SMALL: usize = 1 << 12;
/// The longest content from a connection that is not known yet.
pub(super) const MOST_OF_STRANGERS: u64 = 1 << 16;
/// The longest content of a rank: a gradient of a billion parameters, with room.
pub(super) const MOST: u64 = 1 << 34;

/// The kinds of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// The introduction of a rank that connects.
    Hello = 1,
    /// Everybody is there.
    Welcome = 2,
    /// A refusal: a rank cannot take part, and the reason.
    Refused = 3,
    /// Nothing, but alive.
    Beat = 4,
    /// A part of a call.
    Data = 5,
    /// A rank fails, and why.
    Failed = 6,
    /// A rank is done.
    Left = 7,
}

impl Kind {
    const ALL: [Self; 7] =
        [Self::Hello, Self::Welcome, Self::Refused, Self::Beat, Self::Data, Self::Failed, Self::Left];
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) sequence: u64,
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

impl Frame {
    /// Writes a frame with this head and content.
    pub(super) fn write(to: &mut impl Write, kind: Kind, sequence: u64, name: &str, content: &[u8]) -> io::Result<()> {
        let name = &name.as_bytes()[..name.len().min(usize::from(u8::MAX))];
        let mut head = Vec::with_capacity(HEAD + name.len());
        head.extend(MAGIC);
        head.push(kind as u8);
        head.push(name.len() as u8);
        head.extend(sequence.to_le_bytes());
        head.extend((content.len() as u64).to_le_bytes());
        head.extend(crc32fast::hash(&head).to_le_bytes());
        head.extend(name);
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(name);
        checksum.update(content);
        let checksum = checksum.finalize().to_le_bytes();
        if content.len() <= SMALL {
            // One packet.
            head.extend(content);
            head.extend(checksum);
            to.write_all(&head)?;
        } else {
            to.write_all(&head)?;
            to.write_all(content)?;
            to.write_all(&checksum)?;
        }
        to.flush()
    }

    /// Reads a frame whose content has at most `most` bytes.
    pub(super) fn read(from: &mut impl Read, most: u64) -> io::Result<Self> {
        // A stranger may say less than a whole head, and then wait for an answer.
        let mut head = [0; HEAD];
        let (magic, rest) = head.split_at_mut(4);
        from.read_exact(magic)?;
        if magic != MAGIC {
            return Err(wrong(STRANGER));
        }
        from.read_exact(rest)?;
        let (head, checksum) = head.split_at(HEAD - 4);
        if checksum != crc32fast::hash(head).to_le_bytes() {
            return Err(wrong(DAMAGED));
        }
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u8 == head[4]);
        let kind = kind.ok_or_else(|| wrong("it is a message of another version of qlora"))?;
        let number = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let (sequence, length) = (number(6), number(14));
        if length > most {
            return Err(wrong("it is longer than any message"));
        }
        let mut name = vec![0; usize::from(head[5])];
        from.read_exact(&mut name)?;
        let mut content = Vec::new();
        while (content.len() as u64) < length {
            let piece = PIECE.min(length - content.len() as u64);
            if from.by_ref().take(piece).read_to_end(&mut content)? as u64 != piece {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let mut checksum = [0; 4];
        from.read_exact(&mut checksum)?;
        let mut expected = crc32fast::Hasher::new();
        expected.update(&name);
        expected.update(&content);
        if checksum != expected.finalize().to_le_bytes() {
            return Err(wrong(DAMAGED));
        }
        let name = String::from_utf8(name).map_err(|_| wrong("its name is no text"))?;
        Ok(Self { kind, sequence, name, content })
    }
}

const STRANGER: &str = "it is no message of qlora's";
const DAMAGED: &str =
    "a message was damaged on its way (its checksum does not fit): the network, or a proxy in it, changes bytes";

/// Whether an error of [`Frame::read`] is of a message that began as ours do, and cannot be read.
pub(super) fn is_of_a_rank(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData && error.to_string() != STRANGER
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(kind: Kind, sequence: u64, name: &str, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        Frame::write(&mut bytes, kind, sequence, name, content).unwrap();
        bytes
    }

    #[test]
    fn frames_come_back() {
        for kind in Kind::ALL {
            for length in [0, 1, PIECE as usize - 1, PIECE as usize, 2 * PIECE as usize + 3] {
                let content: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
                let bytes = bytes(kind, u64::MAX - 1, "sum of gradients", &content);
                let back = Frame::read(&mut &bytes[..], MOST).unwrap();
                assert_eq!((back.kind, back.sequence, back.name.as_str()), (kind, u64::MAX - 1, "sum of gradients"));
                assert!(back.content == content);
            }
        }
    }

    #[test]
    fn strangers_and_broken_frames_are_refused() {
        let whole = bytes(Kind::Data, 3, "x", &[7; 100]);
        for end in 0..whole.len() {
            assert!(Frame::read(&mut &whole[..end], MOST).is_err(), "{end} bytes");
        }
        let refused = |bytes: &[u8], part: &str| {
            let text = Frame::read(&mut &bytes[..], MOST_OF_STRANGERS).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        };
        refused(b"GET / HTTP/1.1\r\n\r\n", "no message of qlora's");
        let with_head = |at: usize, bytes: &[u8]| {
            let mut other = whole.clone();
            other[at..at + bytes.len()].copy_from_slice(bytes);
            let checksum = crc32fast::hash(&other[..HEAD - 4]);
            other[HEAD - 4..HEAD].copy_from_slice(&checksum.to_le_bytes());
            other
        };
        refused(&with_head(4, &[200]), "another version");
        // A length that nobody can hold is refused before any memory is taken.
        refused(&with_head(14, &u64::MAX.to_le_bytes()), "longer than any");
    }

    #[test]
    fn no_flipped_bit_passes() {
        let whole = bytes(Kind::Data, 3, "gradient", &[7; 100]);
        for bit in 0..8 * whole.len() {
            let mut other = whole.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            let text = Frame::read(&mut &other[..], MOST).unwrap_err().to_string();
            assert!(bit < 32 || text.contains("damaged"), "bit {bit}: {text}");
        }
    }
}
