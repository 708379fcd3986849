//! The limits of a GPU: its architecture, its shared memory, its processors. Every kernel chooses its tiles by these
//! numbers, which are asked once for each device when it is opened.
//!
//! # Another card's limits
//! The environment variable `QLORA_DEVICE_LIMITS` makes any GPU report the limits of a smaller one, so that what runs on a
//! consumer card can be tested on a data-centre one. It is read when a device is opened, and can only lower what the device
//! itself has. Its parts are separated by commas:
//!
//! | part | meaning |
//! |---|---|
//! | `8.6` or `sm=86` | all limits of that architecture (below) |
//! | `smem=99` | shared memory that a block may have, in KiB |
//! | `sms=28` | multiprocessors |
//! | `bf16=0` | no bf16 in the tensor cores |
//! | `wgmma=0` | no Hopper instructions |
//! | `pdl=0` | no launches that begin early (programmatic dependent launch) |
//!
//! `QLORA_DEVICE_LIMITS=sm=86,sms=28` is an RTX 3060. The instructions themselves come from the code in the program: a
//! binary with code for `compute_75` alone (`QLORA_CUDA_PTX_ONLY=75` when it is built) has no others.
//!
//! Source of the table: CUDA C++ Programming Guide 13, "Technical Specifications per Compute Capability".

use std::fmt;

/// The environment variable that lowers what devices report.
pub const LIMITS_VARIABLE: &str = "QLORA_DEVICE_LIMITS";

const KIB: u32 = 1024;

/// The limits of one GPU, as the kernels in this program may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceLimits {
    /// The compute capability, such as `(8, 6)`.
    pub capability: (u32, u32),
    /// Shared memory that one block may have, in bytes.
    pub shared_per_block: u32,
    /// Shared memory of a multiprocessor, which its blocks share, in bytes.
    pub shared_per_multiprocessor: u32,
    /// The number of multiprocessors.
    pub multiprocessors: u32,
    /// Whether the tensor cores take bf16: from 8.0 (Ampere) on.
    pub bf16: bool,
    /// Whether there are the tensor-core instructions of Hopper (9.0 and no other).
    pub wgmma: bool,
    /// Whether a launch may begin before its predecessor has ended: from 9.0 on.
    pub early_launches: bool,
}

/// Compute capability; KiB of shared memory of a block and of a multiprocessor.
const TABLE: [((u32, u32), u32, u32); 12] = [
    ((7, 5), 64, 64),
    ((8, 0), 163, 164),
    ((8, 6), 99, 100),
    ((8, 7), 163, 164),
    ((8, 9), 99, 100),
    ((9, 0), 227, 228),
    ((10, 0), 227, 228),
    ((10, 1), 227, 228),
    ((10, 3), 227, 228),
    ((11, 0), 227, 228),
    ((12, 0), 99, 100),
    ((12, 1), 99, 100),
];

impl DeviceLimits {
    /// The limits of a device of this compute capability with this many multiprocessors and bytes of shared memory.
    pub fn new(
        capability: (u32, u32),
        shared_per_block: u32,
        shared_per_multiprocessor: u32,
        multiprocessors: u32,
    ) -> Self {
        Self {
            capability,
            shared_per_block,
            shared_per_multiprocessor,
            multiprocessors,
            bf16: capability >= (8, 0),
            wgmma: capability == (9, 0),
            early_launches: capability >= (9, 0),
        }
    }

    /// The limits that all cards of an architecture share, with this many multiprocessors; none if it is not in the table.
    pub fn of_architecture(capability: (u32, u32), multiprocessors: u32) -> Option<Self> {
        let (_, block, all) = TABLE.iter().find(|(known, ..)| *known == capability)?;
        Some(Self::new(capability, block * KIB, all * KIB, multiprocessors))
    }

    /// The limits where the running code was compiled for `architecture`, such as 86, with Hopper's instructions or
    /// without: an older architecture's code has none of the newer instructions.
    #[must_use]
    pub fn with_code(mut self, architecture: u32, wgmma: bool) -> Self {
        self.bf16 &= architecture >= 80;
        self.wgmma &= wgmma;
        self.early_launches &= architecture >= 90;
        self
    }

    /// Whether activations can be bf16.
    pub fn has_bf16(&self) -> bool {
        self.bf16
    }

    /// These limits, lowered by what [`LIMITS_VARIABLE`] says.
    ///
    /// # Errors
    /// If the text is not as the module describes; the message names the part.
    pub fn lowered(self, text: &str) -> Result<Self, String> {
        let mut limits = self;
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or(("sm", part));
            let (key, value) = (key.trim(), value.trim());
            let number = || {
                let whole = || format!("{LIMITS_VARIABLE}: `{part}` needs a positive whole number");
                value.parse::<u32>().ok().filter(|number| *number > 0).ok_or_else(whole)
            };
            match key {
                "sm" => limits = limits.at_most(architecture(value)?),
                "smem" => limits = limits.with_shared(number()?.saturating_mul(KIB)),
                "sms" => limits.multiprocessors = limits.multiprocessors.min(number()?),
                "bf16" => limits.bf16 &= switch(part, value)?,
                "wgmma" => limits.wgmma &= switch(part, value)?,
                "pdl" => limits.early_launches &= switch(part, value)?,
                _ => {
                    return Err(format!("{LIMITS_VARIABLE}: `{key}` is not one of sm, smem, sms, bf16, wgmma, pdl"));
                }
            }
        }
        Ok(limits)
    }

    fn at_most(self, other: Self) -> Self {
        Self {
            capability: self.capability.min(other.capability),
            shared_per_block: self.shared_per_block.min(other.shared_per_block),
            shared_per_multiprocessor: self.shared_per_multiprocessor.min(other.shared_per_multiprocessor),
            multiprocessors: self.multiprocessors.min(other.multiprocessors),
            bf16: self.bf16 && other.bf16,
            wgmma: self.wgmma && other.wgmma,
            early_launches: self.early_launches && other.early_launches,
        }
    }

    /// A multiprocessor keeps what it has beyond one block's share: 1 KiB, but nothing on Turing.
    fn with_shared(mut self, bytes: u32) -> Self {
        let beyond = self.shared_per_multiprocessor.saturating_sub(self.shared_per_block);
        self.shared_per_block = self.shared_per_block.min(bytes);
        self.shared_per_multiprocessor = self.shared_per_multiprocessor.min(self.shared_per_block + beyond);
        self
    }
}

/// `8.6` or `86`.
fn architecture(text: &str) -> Result<DeviceLimits, String> {
    let parsed = match text.split_once('.') {
        Some((major, minor)) => major.parse().ok().zip(minor.parse().ok()),
        None => text.parse::<u32>().ok().map(|number| (number / 10, number % 10)),
    };
    let found = parsed.and_then(|capability| DeviceLimits::of_architecture(capability, u32::MAX));
    found.ok_or_else(|| {
        let known: Vec<String> = TABLE.iter().map(|((major, minor), ..)| format!("{major}.{minor}")).collect();
        format!("{LIMITS_VARIABLE}: `{text}` is not one of {}", known.join(", "))
    })
}

fn switch(part: &str, value: &str) -> Result<bool, String> {
    match value {
        "0" => Ok(false),
        "1" => Ok(true),
        _ => Err(format!("{LIMITS_VARIABLE}: `{part}` is neither 0 nor 1")),
    }
}

impl fmt::Display for DeviceLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        let (block, count) = (self.shared_per_block / KIB, self.multiprocessors);
        write!(f, "compute capability {major}.{minor}, {count} multiprocessors, {block} KiB of shared memory a block")?;
        for (there, name) in [(self.bf16, "bf16"), (self.wgmma, "wgmma"), (self.early_launches, "early launches")] {
            if !there {
                write!(f, ", no {name}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h200() -> DeviceLimits {
        DeviceLimits::of_architecture((9, 0), 132).unwrap()
    }

    #[test]
    fn an_architecture_lowers_everything() {
        let card = h200().lowered("8.6").unwrap();
        assert_eq!(card, h200().lowered("sm=86").unwrap());
        assert_eq!(card, DeviceLimits { multiprocessors: 132, ..DeviceLimits::new((8, 6), 101_376, 102_400, 132) });
        assert!(card.has_bf16() && !card.wgmma && !card.early_launches);
        let t4 = h200().lowered(" sm=7.5 , sms=40").unwrap();
        assert_eq!((t4.capability, t4.multiprocessors), ((7, 5), 40));
        assert_eq!((t4.shared_per_block, t4.shared_per_multiprocessor), (65_536, 65_536));
        assert!(!t4.has_bf16());
        // A newer card can be smaller: an RTX 50 has less shared memory than a Hopper, and none of its instructions.
        let rtx50 = h200().lowered("12.0").unwrap();
        assert_eq!((rtx50.capability, rtx50.shared_per_block), ((9, 0), 99 * KIB));
        assert!(rtx50.has_bf16() && !rtx50.wgmma && rtx50.early_launches);
    }

    #[test]
    fn single_limits_are_lowered_and_never_raised() {
        let limits = h200().lowered("sms=28,smem=99,wgmma=0,pdl=0").unwrap();
        assert_eq!((limits.multiprocessors, limits.shared_per_block), (28, 99 * KIB));
        assert_eq!((limits.shared_per_multiprocessor, limits.capability), (100 * KIB, (9, 0)));
        assert!(!limits.wgmma && !limits.early_launches && limits.bf16);
        assert_eq!(h200().lowered("sms=500,smem=500,wgmma=1,pdl=1,bf16=1").unwrap(), h200());
        assert_eq!(h200().lowered("").unwrap(), h200());
        let t4 = DeviceLimits::of_architecture((7, 5), 40).unwrap();
        assert_eq!(t4.lowered("9.0,bf16=1,wgmma=1,pdl=1").unwrap(), t4);
        assert_eq!(t4.lowered("smem=48").unwrap().shared_per_multiprocessor, 48 * KIB);
    }

    #[test]
    fn a_wrong_text_is_named() {
        let error = |text: &str| h200().lowered(text).unwrap_err();
        assert!(error("sm=77").contains("`77` is not one of 7.5, 8.0, 8.6"), "{}", error("sm=77"));
        assert!(error("fast").contains("`fast`"));
        assert!(error("8.6,cores=3").contains("`cores` is not one of sm, smem"));
        assert!(error("sms=0").contains("`sms=0` needs a positive"));
        assert!(error("smem=9k").contains("`smem=9k`"));
        assert!(error("wgmma=off").contains("`wgmma=off` is neither 0 nor 1"));
    }

    #[test]
    fn code_of_an_older_architecture_has_none_of_the_newer_instructions() {
        assert_eq!(h200().with_code(90, true), h200());
        let translated = h200().with_code(90, false);
        assert!(translated.bf16 && !translated.wgmma && translated.early_launches);
        let ampere = h200().with_code(86, false);
        assert!(ampere.bf16 && !ampere.wgmma && !ampere.early_launches);
        assert!(!h200().with_code(75, false).has_bf16());
        // The architecture of the device stays what it is, and with it its shared memory.
        assert_eq!(ampere.shared_per_block, h200().shared_per_block);
    }

    #[test]
    fn limits_are_told_in_words() {
        let card = h200().lowered("8.6,sms=28").unwrap().to_string();
        let expected = "compute capability 8.6, 28 multiprocessors, 99 KiB of shared memory a block, no wgmma, no early \
                        launches";
        assert_eq!(card, expected);
    }
}
