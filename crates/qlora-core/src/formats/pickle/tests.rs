use super::*;

fn fixture(name: &str) -> Vec<u8> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/pickles").join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn both_layouts_hold_the_same_tensors() {
    let files = ["zip/pytorch_model.bin", "legacy/pytorch_model.bin"].map(fixture);
    let [zip, legacy] = files.each_ref().map(|file| tensors(file).unwrap());
    assert_eq!(zip.len(), 13);
    let block = "model.layers.0.";
    assert_eq!(zip[&format!("{block}self_attn.k_proj.weight")].strides, Some(vec![1, 8]));
    assert!(zip[&format!("{block}mlp.up_proj.weight")].start > zip[&format!("{block}mlp.gate_proj.weight")].start);
    for (name, place) in &zip {
        let other = &legacy[name];
        assert_eq!((place.dtype, &place.shape, &place.strides), (other.dtype, &other.shape, &other.strides), "{name}");
        assert_eq!(place.gather(&files[0]), other.gather(&files[1]), "{name}");
    }
    assert_eq!(zip["lm_head.weight"], zip["model.embed_tokens.weight"]);
}

#[test]
fn files_that_ask_for_more_than_tensors_are_refused_by_name() {
    let system = if cfg!(windows) { "nt.system" } else { "posix.system" };
    for (name, expected) in [
        ("executes", system),
        ("executes-legacy", system),
        ("nested", "a dictionary under \"state_dict\""),
        ("number", "a number under \"step\""),
        ("expanded", "does not fit its storage of 4 elements"),
        ("quantized", "torch._utils._rebuild_qtensor"),
        ("complex", "torch.ComplexFloatStorage"),
        ("module", "torch.nn.modules.linear.Linear"),
        ("list", "a list where a dictionary of tensors belongs"),
        ("compressed", "compressed"),
    ] {
        let error = tensors(&fixture(&format!("refused/{name}.bin"))).unwrap_err();
        assert!(error.contains(expected), "{name}: {error}");
    }
    assert!(tensors(b"version https://git-lfs.github.com/spec/v1\n").unwrap_err().contains("git lfs pull"));
    assert!(tensors(b"").unwrap_err().contains("not a file of torch.save"));
}

/// A file of the older layout whose third pickle is this one.
fn legacy_with(pickle: &[u8]) -> Vec<u8> {
    let version: &[u8] = b"\x80\x02M\xe9\x03.";
    let system: &[u8] = b"\x80\x02}X\x0d\0\0\0little_endian\x88s.";
    [&MAGIC, version, system, pickle, b"\x80\x02]."].concat()
}

#[test]
fn programs_that_only_want_memory_get_none() {
    assert!(tensors(&legacy_with(b"\x80\x02}.")).unwrap().is_empty());
    // Each tuple holds the one before it twice: 2^40 copies, if references were copies.
    let mut doubling = b"\x80\x02)q\0".to_vec();
    for _ in 0..40 {
        doubling.extend(b"h\0h\0\x86q\0");
    }
    doubling.push(b'.');
    assert!(tensors(&legacy_with(&doubling)).unwrap_err().contains("a tuple where a dictionary"));
    // A million tuples within each other: nothing here is recursive.
    let mut deep = b"\x80\x02)".to_vec();
    deep.extend(vec![0x85; 1_000_000]);
    deep.push(b'.');
    assert!(tensors(&legacy_with(&deep)).unwrap_err().contains("a tuple where"));
    let mut many = b"\x80\x02".to_vec();
    many.extend(vec![b')'; 5_000_000]);
    assert!(tensors(&legacy_with(&many)).unwrap_err().contains("objects"));
    // Two bytes that ask for four, again and again.
    let mut long = b"\x80\x02)q\0".to_vec();
    long.extend(b"h\0".repeat(MAX_PICKLE as usize / 2));
    assert!(tensors(&legacy_with(&long)).unwrap_err().contains("longer than"));
    for (pickle, expected) in [
        (&b"\x80\x04}."[..], "protocol 4"),
        (b"\x80\x02X\xff\xff\xff\xffa", "cut short"),
        (b"\x80\x02.", "nothing is left"),
        (b"\x80\x02)(0.", "opcode 0x30"),
        (b"\x80\x02)(.", "nothing is left"),
        (b"\x80\x02}K\x01(K\x02u.", "items for a number"),
        (b"\x80\x02}(K\x02u.", "a key without a value"),
        (b"\x80\x02h\x07.", "remembered under 7"),
        (b"\x80\x02ccollections\nOrderedDict\nN\x85R.", "1 arguments"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "0 arguments"),
        (b"\x80\x02)Q.", "no storage"),
        (b"\x80\x02}N}b.", "the state of None"),
        (b"\x80\x02\x8a\x11aaaaaaaaaaaaaaaaa.", "more than 16 bytes"),
        (b"\x80\x02K\x01)R.", "calls a number"),
    ] {
        let error = tensors(&legacy_with(pickle)).unwrap_err();
        assert!(error.contains(expected), "{}: {error}", pickle.escape_ascii());
    }
}

/// Tensors that are read must lie in the file: reading them all is the check.
fn read_all(file: &[u8]) -> bool {
    let Ok(places) = tensors(file) else { return false };
    places.values().for_each(|place| assert_eq!(place.gather(file).len(), place.len()));
    to_safetensors(file).is_ok()
}

#[test]
fn damage_is_an_error_and_never_a_panic() {
    for name in ["zip/pytorch_model.bin", "legacy/pytorch_model.bin"] {
        let whole = fixture(name);
        assert!(read_all(&whole));
        let mut refused = 0;
        // Every eleventh byte: all of them take minutes without optimization.
        for at in (0..whole.len()).step_by(11) {
            assert!(!read_all(&whole[..at]), "{name} cut to {at}");
            for change in [0x01, 0xff] {
                let mut damaged = whole.clone();
                damaged[at] ^= change;
                refused += usize::from(!read_all(&damaged));
            }
        }
        // The rest are changes of values.
        assert!(refused > 40, "{name}: {refused}");
    }
}

#[test]
fn shapes_that_lie_are_refused() {
    let tensor = |len: usize, offset, shape: &[usize], strides: &[usize]| machine::Tensor {
        storage: Storage { dtype: Dtype::F32, key: 0, len },
        offset,
        shape: shape.to_vec(),
        strides: strides.to_vec(),
    };
    for (fits, tensor) in [
        (true, tensor(6, 0, &[2, 3], &[3, 1])),
        (true, tensor(6, 5, &[], &[])),
        (true, tensor(0, 0, &[0, usize::MAX], &[1, 1])),
        (false, tensor(6, 6, &[], &[])),
        (false, tensor(6, 1, &[2, 3], &[3, 1])),
        (false, tensor(6, 0, &[2, 3], &[3])),
        (false, tensor(6, 0, &[7], &[0])),
        (false, tensor(6, 0, &[usize::MAX, 2], &[0, 0])),
        (false, tensor(6, 0, &[2, 2], &[usize::MAX, 1])),
        (false, tensor(6, usize::MAX, &[2], &[1])),
    ] {
        assert_eq!(tensor.check().is_ok(), fits, "{tensor:?}");
    }
}
