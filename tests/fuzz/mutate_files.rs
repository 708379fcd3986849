//! Mutations that know a file's format: safetensors, pickles, GGUF, TOML.

use super::mutate::{self, Rng, below, chance, pick};

/// A safetensors file: its header's JSON changes, and its length with it; sometimes the bytes of the tensors, too.
pub(crate) fn safetensors(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let (Some((header, data)), Some((donor, _))) = (parts(input), parts(other)) else {
        return mutate::bytes(rng, input, other);
    };
    let mut header = mutate::json(rng, header, donor);
    if chance(rng, 30) {
        header.resize(header.len().next_multiple_of(8), b' ');
    }
    let mut data = data.to_vec();
    match below(rng, 6) {
        0 => data.truncate(below(rng, data.len())),
        1 => data.resize(data.len() + below(rng, 64), 0),
        2 if !data.is_empty() => {
            // NaN and infinities among the values.
            let at = below(rng, data.len());
            let end = (at + 4).min(data.len());
            data[at..end].fill(0xff);
        }
        _ => {}
    }
    let mut length = (header.len() as u64).to_le_bytes();
    if chance(rng, 5) {
        mutate::write_number(rng, &mut length, 0);
    }
    [&length[..], &header, &data].concat()
}

/// A safetensors file's header and the rest, if it is long enough.
pub(crate) fn parts(file: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = file.split_first_chunk::<8>()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// A GGUF file: numbers, types, lengths and texts of the header change, mostly not its magic and version.
pub(crate) fn gguf(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    const FIXED: usize = 8;
    if chance(rng, 10) {
        return mutate::bytes(rng, input, other);
    }
    let mut out = input.to_vec();
    for _ in 0..1 + below(rng, 4) {
        // Most of what is interesting stands at the beginning.
        let reach = if chance(rng, 50) { out.len() } else { out.len().min(1 << (6 + below(rng, 8))) };
        let at = FIXED + below(rng, reach.saturating_sub(FIXED));
        if at >= out.len() {
            break;
        }
        match below(rng, 7) {
            0 | 1 => mutate::write_number(rng, &mut out, at),
            2 => out[at] = below(rng, 14) as u8,
            3 => out[at] ^= 1 << below(rng, 8),
            4 => {
                let (left, right) = (at, FIXED + below(rng, out.len() - FIXED));
                out.swap(left, right);
            }
            5 => {
                let from = below(rng, other.len());
                let length = (1 + below(rng, 64)).min(other.len() - from).min(out.len() - at);
                out[at..at + length].copy_from_slice(&other[from..from + length]);
            }
            _ if chance(rng, 30) => out.truncate(at),
            _ => {
                let end = (at + 1 + below(rng, 24)).min(out.len());
                let piece = out[at..end].to_vec();
                out.splice(at..at, piece);
            }
        }
    }
    out
}

/// Values of TOML, right and wrong for every key.
const VALUES: [&str; 26] = [
    "true",
    "false",
    "0",
    "1",
    "-1",
    "8",
    "1e300",
    "nan",
    "inf",
    "-0.0",
    "2e-4",
    "\"2e-4\"",
    "\"\"",
    "\"none\"",
    "\"all-linear\"",
    "[]",
    "[\"q_proj\"]",
    "[1, [2]]",
    "{}",
    "{ num_cycles = 1 }",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999",
    "1979-05-27",
    "'\\d+('",
    "\"\\u0000\"",
];

/// A file of `torch.save`: mostly changes before the tensors' bytes, which are most of the file.
pub(crate) fn pickle(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    // The last pickle of the older layout, a list.
    let end = input.windows(3).rposition(|bytes| bytes == b"\x80\x02]").unwrap_or(input.len());
    let (program, rest) = input.split_at(end);
    match chance(rng, 80) {
        true => [mutate::bytes(rng, program, other), rest.to_vec()].concat(),
        false => mutate::bytes(rng, input, other),
    }
}

/// A TOML file: keys move between lines and sections, values change places; the syntax mostly stays right.
pub(crate) fn toml(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let (text, donor) = (String::from_utf8_lossy(input), String::from_utf8_lossy(other));
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let donors: Vec<&str> = donor.lines().collect();
    for _ in 0..1 + below(rng, 4) {
        let at = below(rng, lines.len());
        if lines.is_empty() {
            break;
        }
        match below(rng, 6) {
            0 => drop(lines.remove(at)),
            1 => {
                let to = below(rng, lines.len());
                lines.swap(at, to);
            }
            2 if !donors.is_empty() => lines[at] = (*pick(rng, &donors)).to_owned(),
            3 => {
                let key = lines[at].split_once(" = ").map(|(key, _)| key.to_owned());
                if let Some(mut key) = key {
                    mutate::change_text(rng, &mut key);
                    lines[at] =
                        format!("{} = {}", key.replace(|c: char| !c.is_ascii_alphanumeric(), "_"), pick(rng, &VALUES));
                }
            }
            _ => {
                if let Some((key, _)) = lines[at].split_once(" = ") {
                    lines[at] = format!("{key} = {}", pick(rng, &VALUES));
                }
            }
        }
    }
    let out = lines.join("\n").into_bytes();
    if chance(rng, 20) { mutate::bytes(rng, &out, other) } else { out }
}
