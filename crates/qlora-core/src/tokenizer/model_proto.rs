//! `tokenizer.model`: SentencePiece's `ModelProto`, as protocol buffers.
//!
//! Fields that are read (proto2 defaults in parentheses); all others are skipped, whatever they hold:
//!
//! | message | fields |
//! |---|---|
//! | ModelProto | 1 pieces, 2 trainer_spec, 3 normalizer_spec |
//! | SentencePiece | 1 piece, 2 score, 3 type (1) |
//! | TrainerSpec | 3 model_type (1), 24 treat_whitespace_as_suffix, 35 byte_fallback, 40 unk_id (0), 41 bos_id (1), 42 eos_id (2), 45 unk_piece, 46 bos_piece, 47 eos_piece |
//! | NormalizerSpec | 2 precompiled_charsmap, 3 add_dummy_prefix (true), 4 remove_extra_whitespaces (true), 5 escape_whitespaces (true) |

/// The kinds of pieces.
pub(super) mod piece_type {
    pub(crate) const NORMAL: u64 = 1;
    pub(crate) const CONTROL: u64 = 3;
    pub(crate) const USER_DEFINED: u64 = 4;
}

/// The algorithms that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Unigram,
    Bpe,
}

/// A token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Piece<'a> {
    pub(super) text: &'a str,
    pub(super) score: f32,
    pub(super) kind: u64,
}

/// A model: tokens and the rules around them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Model<'a> {
    /// Their index is their id.
    pub(super) pieces: Vec<Piece<'a>>,
    pub(super) algorithm: Algorithm,
    pub(super) byte_fallback: bool,
    pub(super) unknown: Option<usize>,
    pub(super) unknown_piece: &'a str,
    /// The text of BOS, if there is one.
    pub(super) bos: Option<&'a str>,
    /// The text of EOS, if there is one.
    pub(super) eos: Option<&'a str>,
    /// A table of replacements in SentencePiece's form; empty if nothing is replaced.
    pub(super) charsmap: &'a [u8],
    pub(super) add_dummy_prefix: bool,
    pub(super) remove_extra_whitespaces: bool,
    pub(super) escape_whitespaces: bool,
}

impl<'a> Model<'a> {
    /// Reads a file.
    ///
    /// # Errors
    /// If it is no such message, is damaged, or its algorithm is another one.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            unknown: Some(0),
            unknown_piece: "<unk>",
            bos: Some("<s>"),
            eos: Some("</s>"),
            charsmap: &[],
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        };
        for field in Fields(file) {
            match field? {
                (1, Value::Bytes(piece)) => model.pieces.push(piece_of(piece)?),
                (2, Value::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Value::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("it has no tokens".to_owned());
        }
        Ok(model)
    }

    fn read_trainer(&mut self, trainer: &'a [u8]) -> Result<(), String> {
        let (mut bos_id, mut eos_id, mut bos, mut eos) = (1, 2, "<s>", "</s>");
        for field in Fields(trainer) {
            match field? {
                (3, Value::Number(1)) => self.algorithm = Algorithm::Unigram,
                (3, Value::Number(2)) => self.algorithm = Algorithm::Bpe,
                (3, Value::Number(other)) => {
                    return Err(format!("model type {other} is not read; unigram (1) and BPE (2) are"));
                }
                (24, Value::Number(1)) => return Err("treat_whitespace_as_suffix is not read".to_owned()),
                (35, Value::Number(value)) => self.byte_fallback = value != 0,
                (40, Value::Number(id)) => self.unknown = id_of(id),
                (41, Value::Number(id)) => bos_id = id as i64,
                (42, Value::Number(id)) => eos_id = id as i64,
                (45, Value::Bytes(piece)) => self.unknown_piece = text_of(piece)?,
                (46, Value::Bytes(piece)) => bos = text_of(piece)?,
                (47, Value::Bytes(piece)) => eos = text_of(piece)?,
                _ => {}
            }
        }
        self.bos = (bos_id >= 0).then_some(bos);
        self.eos = (eos_id >= 0).then_some(eos);
        Ok(())
    }

    fn read_normalizer(&mut self, normalizer: &'a [u8]) -> Result<(), String> {
        for field in Fields(normalizer) {
            match field? {
                (2, Value::Bytes(table)) => {
                    // The size of a trie, the trie, the texts. The crate that reads it reserves what the size says.
                    let size = table.first_chunk::<4>().map(|size| u32::from_le_bytes(*size) as usize);
                    let fits = size.is_some_and(|size| size > 0 && size % 4 == 0 && size <= table.len() - 4);
                    if !table.is_empty() && !fits {
                        return Err("precompiled_charsmap is damaged: its trie does not fit into it".to_owned());
                    }
                    self.charsmap = table;
                }
                (3, Value::Number(value)) => self.add_dummy_prefix = value != 0,
                (4, Value::Number(value)) => self.remove_extra_whitespaces = value != 0,
                (5, Value::Number(value)) => self.escape_whitespaces = value != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

fn piece_of(message: &[u8]) -> Result<Piece<'_>, String> {
    let mut piece = Piece { text: "", score: 0.0, kind: piece_type::NORMAL };
    for field in Fields(message) {
        match field? {
            (1, Value::Bytes(text)) => piece.text = text_of(text)?,
            (2, Value::Word(bits)) => piece.score = f32::from_bits(bits),
            (3, Value::Number(kind)) => piece.kind = kind,
            _ => {}
        }
    }
    Ok(piece)
}

fn text_of(bytes: &[u8]) -> Result<&str, String> {
    str::from_utf8(bytes).map_err(|_| "it has a token that is not UTF-8".to_owned())
}

/// Negative ids mean that there is no such token; they are written as 64-bit two's complement.
fn id_of(id: u64) -> Option<usize> {
    usize::try_from(id as i64).ok()
}

/// A field's value in one of the four encodings.
enum Value<'a> {
    Number(u64),
    /// 64 bits, which no field here uses.
    Long,
    Bytes(&'a [u8]),
    Word(u32),
}

/// The fields of a message with their numbers. Ends after an error.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or("cut short")?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("not a SentencePiece model: a number of more than ten bytes".to_owned())
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], String> {
        let count = usize::try_from(count).ok().filter(|&count| count <= self.0.len()).ok_or("cut short")?;
        let (bytes, rest) = self.0.split_at(count);
        self.0 = rest;
        Ok(bytes)
    }

    fn field(&mut self) -> Result<(u64, Value<'a>), String> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Long
            }
            2 => {
                let length = self.varint()?;
                Value::Bytes(self.take(length)?)
            }
            5 => {
                let bytes = self.take(4)?;
                Value::Word(u32::from_le_bytes(bytes.try_into().expect("four bytes")))
            }
            other => return Err(format!("not a SentencePiece model: encoding {other}")),
        };
        Ok((key >> 3, value))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}
