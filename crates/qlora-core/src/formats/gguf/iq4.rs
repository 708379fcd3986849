//! llama.cpp's 4-bit types with 16 uneven values, which candle does not read.
//!
//! | type | block |
//! |---|---|
//! | IQ4_NL | 32 elements: an f16 scale `d`, 16 bytes of codes; `w = d v[code]` |
//! | IQ4_XS | 256 elements in 8 groups: an f16 scale `d`, the high 2 bits of the groups' scales (u16), their low 4 bits, 128 bytes of codes; `w = d (s - 32) v[code]` |
//!
//! In each group of 32 elements the low nibbles of the 16 bytes are the first 16. Checked against the gguf package.

use half::f16;

/// The values of the 16 codes.
const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Dequantizes blocks of IQ4_NL.
pub(super) fn nl(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut().0) {
        group(f16::from_le_bytes([block[0], block[1]]).to_f32(), &block[2..], out);
    }
}

/// Dequantizes blocks of IQ4_XS.
pub(super) fn xs(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<136>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
        let high = u16::from_le_bytes([block[2], block[3]]);
        for (i, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
            let low = block[4 + i / 2] >> (4 * (i % 2)) & 0xf;
            let scale = i32::from(low) | i32::from(high >> (2 * i) & 3) << 4;
            group(d * (scale - 32) as f32, &block[8 + 16 * i..], out);
        }
    }
}

fn group(scale: f32, codes: &[u8], out: &mut [f32; 32]) {
    for (i, code) in codes[..16].iter().enumerate() {
        out[i] = scale * f32::from(VALUES[usize::from(code & 0xf)]);
        out[i + 16] = scale * f32::from(VALUES[usize::from(code >> 4)]);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::SafeTensors;

    #[test]
    fn blocks_are_read_as_by_the_gguf_package() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf/iq4.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, read) in [("iq4_nl", super::nl as fn(&[u8], &mut [f32])), ("iq4_xs", super::xs)] {
            let blocks = file.tensor(name).unwrap().data().to_vec();
            let expected: Vec<f32> = file
                .tensor(&format!("{name}.values"))
                .unwrap()
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|x| f32::from_le_bytes(*x))
                .collect();
            assert!(expected.len() >= 512);
            let mut got = vec![f32::NAN; expected.len()];
            read(&blocks, &mut got);
            assert_eq!(got, expected, "{name}");
        }
    }
}
