use std::path::PathBuf;

use half::f16;
use safetensors::SafeTensors;

use super::*;

fn fixture(name: &str) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/gguf").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn halves(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    tensor.data().as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).to_f32()).collect()
}

fn encode(kind: BlockType, values: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let (block, bytes) = kind.block();
    let mut out = vec![0xaa; values.len() / block * bytes];
    assert!(quantize(kind, values, 0, importance, &mut out));
    out
}

fn decode(kind: BlockType, bytes: &[u8]) -> Vec<f32> {
    let (block, size) = kind.block();
    let mut out = vec![f32::NAN; bytes.len() / size * block];
    dequantize(kind, bytes, &mut out);
    out
}

fn error(values: &[f32], read: &[f32], importance: &[f32]) -> f64 {
    let squares = values
        .iter()
        .zip(read)
        .enumerate()
        .map(|(i, (x, y))| f64::from(importance[i % importance.len()]) * (f64::from(*x) - f64::from(*y)).powi(2));
    squares.sum()
}

/// The measure: no larger error than ggml's own quantizer on the same values, with and without the same importance.
#[test]
fn errors_are_at_most_ggmls() {
    let (bytes, json) = (fixture("k_quants.safetensors"), fixture("k_quants.json"));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let expected: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let mut worst = Vec::new();
    let mut compared = 0;
    for (name, types) in expected.as_object().unwrap() {
        let (values, importance) = (halves(&file, name), halves(&file, &format!("{name}.importance")));
        for kind in BlockType::ALL {
            let theirs = &types[kind.name()];
            for (index, importance) in [None, Some(importance.as_slice())].into_iter().enumerate() {
                let theirs = theirs[index].as_f64().unwrap();
                let read = decode(kind, &encode(kind, &values, importance));
                let ours = error(&values, &read, importance.unwrap_or(&[1.0]));
                compared += 1;
                println!("{name:9} {} {index}: {ours:.4e} of {theirs:.4e}, {:.4}", kind.name(), ours / theirs);
                if ours > theirs {
                    worst.push(format!("{name} {} {index}: {ours:e} of {theirs:e}", kind.name()));
                }
            }
        }
    }
    assert_eq!(compared, 9 * 9 * 2);
    assert!(worst.is_empty(), "{worst:#?}");
}

#[test]
fn blocks_are_read_as_by_the_gguf_package() {
    let bytes = fixture("k_quants.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for kind in BlockType::ALL {
        let blocks = file.tensor(&format!("{}.blocks", kind.name())).unwrap();
        let values = file.tensor(&format!("{}.values", kind.name())).unwrap();
        let expected: Vec<u32> = values.data().as_chunks().0.iter().map(|x| u32::from_le_bytes(*x)).collect();
        assert_eq!(expected.len(), 1024);
        let got: Vec<u32> = decode(kind, blocks.data()).into_iter().map(f32::to_bits).collect();
        assert_eq!(got, expected, "{}", kind.name());
    }
}

#[test]
fn packing_keeps_every_number() {
    let bytes = fixture("k_quants.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    for kind in BlockType::ALL.into_iter().filter(|kind| kind.block().0 == SUPER) {
        let blocks = file.tensor(&format!("{}.blocks", kind.name())).unwrap().data().to_vec();
        for block in blocks.chunks(kind.block().1) {
            let mut again = vec![0xaa; block.len()];
            pack::pack(kind, &pack::unpack(kind, block), &mut again);
            assert_eq!(again, block, "{}", kind.name());
        }
    }
}

#[test]
fn zeros_stay_zeros_and_huge_values_are_refused() {
    for kind in BlockType::ALL {
        let (block, bytes) = kind.block();
        let read = decode(kind, &encode(kind, &vec![0.0; block], None));
        assert!(read.iter().all(|x| *x == 0.0), "{}", kind.name());
        let mut huge = vec![0.0; block];
        huge[3] = 3e38;
        huge[4] = -3e38;
        assert!(!quantize(kind, &huge, 0, None, &mut vec![0; bytes]), "{}", kind.name());
        // Smaller than f16's smallest number: nothing that is no number.
        let tiny: Vec<f32> = (0..block).map(|i| 1e-12 * (i as f32 - 9.0)).collect();
        assert!(decode(kind, &encode(kind, &tiny, None)).iter().all(|x| x.abs() < 1e-6), "{}", kind.name());
    }
}

#[test]
fn importance_goes_by_column_wherever_a_piece_begins() {
    let bytes = fixture("k_quants.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (values, importance) = (halves(&file, "normal"), halves(&file, "normal.importance"));
    for kind in BlockType::ALL {
        let whole = encode(kind, &values, Some(&importance));
        let (block, size) = kind.block();
        let at = 3 * 256;
        let mut part = vec![0; 256 / block * size];
        assert!(quantize(kind, &values[at..at + 256], at, Some(&importance), &mut part));
        assert_eq!(part, whole[at / block * size..][..part.len()], "{}", kind.name());
        assert_ne!(encode(kind, &values, None), whole, "{}", kind.name());
    }
}

#[test]
fn columns_without_importance_do_no_harm() {
    let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.37).sin()).collect();
    for kind in BlockType::ALL {
        assert_eq!(encode(kind, &values, Some(&[0.0; 512])), encode(kind, &values, None), "{}", kind.name());
    }
}
