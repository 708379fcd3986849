//! The records of a TensorBoard event file: protobuf messages (`tensorflow.Event`), each between its length and checksums.
//!
//! ```text
//! record  = length u64 | masked crc of the length u32 | event | masked crc of the event u32        (little endian)
//! Event   = 1 wall_time double | 2 step int64 | 3 file_version string | 5 summary | 7 session_log
//! Summary = 1 value*;  Value = 1 tag | 2 simple_value float | 8 tensor | 9 metadata
//! ```
//! Eight fields of a format that has not changed in ten years are written here by hand: a protobuf library and its code generator
//! would be most of the code for them.

use crc::{CRC_32_ISCSI, Crc};

/// CRC-32C, as the format wants it.
const CASTAGNOLI: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// What is added to a checksum that is stored beside its data.
const MASK: u32 = 0xa282_ead8;

/// `DT_STRING` of a tensor's type.
const STRING: u64 = 7;

/// `SessionLog.START`: the points of this step and later ones in earlier files are forgotten.
const START: u64 = 1;

/// An event at a time, in seconds since 1970.
pub(super) struct Event(Message);

impl Event {
    /// The first record of a file.
    pub(super) fn version(wall_time: f64) -> Self {
        Self(Message::at(wall_time).bytes(3, b"brain.Event:2"))
    }

    /// The run goes on before this step.
    pub(super) fn restart(wall_time: f64, step: u64) -> Self {
        Self(Message::at(wall_time).number(2, step).message(7, Message::default().number(1, START)))
    }

    /// Numbers after a step, by their tags.
    pub(super) fn scalars(wall_time: f64, step: u64, values: &[(String, f32)]) -> Self {
        let value = |(tag, value): &(String, f32)| Message::default().bytes(1, tag.as_bytes()).float(2, *value);
        Self::summary(wall_time, step, values.iter().map(value))
    }

    /// A text, as Markdown.
    pub(super) fn text(wall_time: f64, step: u64, tag: &str, markdown: &str) -> Self {
        let shape = Message::default().message(2, Message::default().number(1, 1));
        let tensor = Message::default().number(1, STRING).message(2, shape).bytes(8, markdown.as_bytes());
        let metadata = Message::default().message(1, Message::default().bytes(1, b"text"));
        let value = Message::default().bytes(1, format!("{tag}/text_summary").as_bytes());
        Self::summary(wall_time, step, [value.message(8, tensor).message(9, metadata)])
    }

    fn summary(wall_time: f64, step: u64, values: impl IntoIterator<Item = Message>) -> Self {
        let summary = values.into_iter().fold(Message::default(), |summary, value| summary.message(1, value));
        Self(Message::at(wall_time).number(2, step).message(5, summary))
    }

    /// The event as it stands in a file.
    pub(super) fn record(&self) -> Vec<u8> {
        let Message(event) = &self.0;
        let length = (event.len() as u64).to_le_bytes();
        [&length[..], &masked_crc(&length), event, &masked_crc(event)].concat()
    }
}

fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    CASTAGNOLI.checksum(bytes).rotate_right(15).wrapping_add(MASK).to_le_bytes()
}

/// A protobuf message, field by field.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    const VARINT: u64 = 0;
    const FIXED_64: u64 = 1;
    const BYTES: u64 = 2;
    const FIXED_32: u64 = 5;

    /// The beginning of an event.
    fn at(wall_time: f64) -> Self {
        let mut message = Self::default().key(1, Self::FIXED_64);
        message.0.extend(wall_time.to_le_bytes());
        message
    }

    fn number(self, field: u64, value: u64) -> Self {
        self.key(field, Self::VARINT).varint(value)
    }

    fn float(self, field: u64, value: f32) -> Self {
        let mut message = self.key(field, Self::FIXED_32);
        message.0.extend(value.to_le_bytes());
        message
    }

    fn bytes(self, field: u64, bytes: &[u8]) -> Self {
        let mut message = self.key(field, Self::BYTES).varint(bytes.len() as u64);
        message.0.extend(bytes);
        message
    }

    fn message(self, field: u64, Self(inner): Self) -> Self {
        self.bytes(field, &inner)
    }

    fn key(self, field: u64, kind: u64) -> Self {
        self.varint(field << 3 | kind)
    }

    /// Seven bits a byte, the lowest first; all bytes but the last have the highest bit set.
    fn varint(mut self, mut value: u64) -> Self {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Records that TensorBoard 2.21 reads (`scripts/check_tensorboard.py` reads those of a run).
    #[test]
    fn records_have_the_bytes_that_tensorboard_reads() {
        let time = 1_700_000_000.5;
        assert_eq!(CASTAGNOLI.checksum(b"123456789"), 0xe306_9283);
        assert_eq!(masked_crc(b"123456789"), 0xc78a_b0e5u32.to_le_bytes());
        assert_eq!(
            hex(&Event::version(time).record()),
            "1800000000000000a37f4b220900002040fc54d9411a0d627261696e2e4576656e743a322b353110"
        );
        assert_eq!(
            hex(&Event::scalars(time, 1, &[("train/loss".to_owned(), 0.25)]).record()),
            "200000000000000029eda9500900002040fc54d94110012a130a110a0a747261696e2f6c6f7373150000803e4775587e"
        );
    }

    #[test]
    fn long_numbers_and_texts_take_more_bytes() {
        let Message(bytes) = Message::default().number(2, 300).message(7, Message::default().number(1, START));
        assert_eq!(bytes, [0x10, 0xac, 0x02, 0x3a, 0x02, 0x08, 0x01]);
        let Message(bytes) = Message::default().bytes(8, &[b'a'; 200]);
        assert_eq!((&bytes[..3], bytes.len()), (&[0x42, 0xc8, 0x01][..], 203));
    }
}
