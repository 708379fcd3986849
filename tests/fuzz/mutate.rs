//! Mutations of bytes, of JSON and of texts made of words.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

pub(crate) type Rng = ChaCha8Rng;

/// A number below `n`, or 0 if there is none.
pub(crate) fn below(rng: &mut Rng, n: usize) -> usize {
    if n == 0 { 0 } else { rng.random_range(0..n) }
}

/// True in so many of a hundred cases.
pub(crate) fn chance(rng: &mut Rng, percent: usize) -> bool {
    below(rng, 100) < percent
}

pub(crate) fn pick<'a, T>(rng: &mut Rng, items: &'a [T]) -> &'a T {
    &items[below(rng, items.len())]
}

/// Numbers at the edges of types.
pub(crate) const EDGES: [u64; 16] = [
    0,
    1,
    2,
    7,
    8,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 53,
    i64::MAX as u64,
    u64::MAX,
];

/// One to four changes of bytes.
pub(crate) fn bytes(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let mut out = input.to_vec();
    for _ in 0..1 + below(rng, 4) {
        change_bytes(rng, &mut out, other);
    }
    out
}

pub(crate) fn change_bytes(rng: &mut Rng, out: &mut Vec<u8>, other: &[u8]) {
    let at = below(rng, out.len());
    let end = (at + 1 + below(rng, 40)).min(out.len());
    match below(rng, 9) {
        0 if !out.is_empty() => out[at] ^= 1 << below(rng, 8),
        1 if !out.is_empty() => out[at] = rng.random(),
        2 => out.truncate(at),
        3 => drop(out.drain(at..end)),
        4 => {
            let piece = out[at..end].to_vec();
            let to = below(rng, out.len() + 1);
            out.splice(to..to, piece);
        }
        5 => {
            let from = below(rng, other.len());
            let piece = other[from..(from + 1 + below(rng, 64)).min(other.len())].to_vec();
            out.splice(at..end, piece);
        }
        6 => write_number(rng, out, at),
        // An edge of a type, as digits.
        7 => drop(out.splice(at..end.min(at + 3), pick(rng, &EDGES).to_string().into_bytes())),
        _ => out.insert(at, *pick(rng, b"{}[]\",:\\%-0\n\xff\0")),
    }
}

/// Writes a number of 4 or 8 bytes, little-endian: an edge of a type, or near what is there.
pub(crate) fn write_number(rng: &mut Rng, out: &mut [u8], at: usize) {
    let width = *pick(rng, &[4, 8]);
    let Some(place) = out.get_mut(at..at + width) else { return };
    let mut old = [0; 8];
    old[..width].copy_from_slice(place);
    let old = u64::from_le_bytes(old);
    let new = match below(rng, 4) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old.wrapping_mul(1 << below(rng, 33)),
        _ => *pick(rng, &EDGES),
    };
    place.copy_from_slice(&new.to_le_bytes()[..width]);
}

/// JSON: mostly changes of the tree, which leave the syntax right, and sometimes changes of bytes.
pub(crate) fn json(rng: &mut Rng, input: &[u8], other: &[u8]) -> Vec<u8> {
    let (Ok(mut tree), Ok(donor)) = (serde_json::from_slice::<Value>(input), serde_json::from_slice::<Value>(other))
    else {
        return bytes(rng, input, other);
    };
    if chance(rng, 75) {
        change_json(rng, &mut tree, &donor);
    }
    let mut out = tree.to_string().into_bytes();
    if chance(rng, 25) {
        out = bytes(rng, &out, other);
    }
    out
}

/// One to four changes of a tree.
pub(crate) fn change_json(rng: &mut Rng, tree: &mut Value, donor: &Value) {
    for _ in 0..1 + below(rng, 4) {
        let at = below(rng, count(tree));
        let from = below(rng, count(donor));
        let graft = node(donor, &mut { from }).clone();
        let mut nodes = at;
        change_node(rng, node_mut(tree, &mut nodes), graft);
    }
}

fn count(tree: &Value) -> usize {
    1 + match tree {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// The node of that number, in the order of the text.
fn node<'a>(tree: &'a Value, number: &mut usize) -> &'a Value {
    let mut path = tree;
    'down: while *number > 0 {
        *number -= 1;
        let children: Vec<&Value> = match path {
            Value::Array(items) => items.iter().collect(),
            Value::Object(map) => map.values().collect(),
            _ => return path,
        };
        for child in children {
            let size = count(child);
            if *number < size {
                path = child;
                continue 'down;
            }
            *number -= size;
        }
        return path;
    }
    path
}

fn node_mut<'a>(tree: &'a mut Value, number: &mut usize) -> &'a mut Value {
    if *number == 0 || !(tree.is_array() || tree.is_object()) {
        return tree;
    }
    *number -= 1;
    let sizes: Vec<usize> = match &*tree {
        Value::Array(items) => items.iter().map(count).collect(),
        Value::Object(map) => map.values().map(count).collect(),
        _ => Vec::new(),
    };
    let mut index = 0;
    while index < sizes.len() && *number >= sizes[index] {
        *number -= sizes[index];
        index += 1;
    }
    match tree {
        Value::Array(items) => node_mut(&mut items[index], number),
        Value::Object(map) => {
            let child = map.values_mut().nth(index).expect("the index counts the values");
            node_mut(child, number)
        }
        leaf => leaf,
    }
}

fn change_node(rng: &mut Rng, node: &mut Value, graft: Value) {
    if chance(rng, 20) {
        *node = scalar(rng);
        return;
    }
    if chance(rng, 15) {
        *node = graft;
        return;
    }
    match node {
        Value::Object(map) => change_object(rng, map, graft),
        Value::Array(items) => {
            let at = below(rng, items.len());
            match below(rng, 5) {
                0 if !items.is_empty() => drop(items.remove(at)),
                1 if !items.is_empty() => items.insert(at, items[at].clone()),
                2 => items.push(graft),
                3 if !items.is_empty() => {
                    let to = below(rng, items.len());
                    items.swap(at, to);
                }
                _ => items.truncate(at),
            }
        }
        Value::String(text) => change_text(rng, text),
        Value::Number(number) => {
            let old = number.as_f64().unwrap_or(0.0);
            let whole = number.as_i64().unwrap_or(0);
            *node = match below(rng, 7) {
                0 => json!(whole.wrapping_add(1)),
                1 => json!(whole.wrapping_sub(1)),
                2 => json!(whole.wrapping_mul(1000)),
                3 => json!(whole.wrapping_neg()),
                4 => json!(old / 2.0),
                5 => json!(old * 1e30),
                _ => json!(number.to_string()),
            };
        }
        Value::Bool(flag) => *flag = !*flag,
        Value::Null => *node = graft,
    }
    if chance(rng, 3) {
        let inner = std::mem::take(node);
        // Beyond serde_json's own limit of 128, too.
        *node = (0..1 + below(rng, 150)).fold(inner, |inner, _| json!([inner]));
    }
}

fn change_object(rng: &mut Rng, map: &mut Map<String, Value>, graft: Value) {
    let keys: Vec<String> = map.keys().cloned().collect();
    if keys.is_empty() {
        map.insert("a".to_owned(), graft);
        return;
    }
    let key = pick(rng, &keys).clone();
    match below(rng, 5) {
        0 => drop(map.shift_remove(&key)),
        1 => {
            let value = map.shift_remove(&key).unwrap_or_default();
            let mut renamed = key;
            change_text(rng, &mut renamed);
            map.insert(renamed, value);
        }
        2 => {
            let other = pick(rng, &keys).clone();
            let (left, right) = (map[&key].clone(), map[&other].clone());
            map.insert(key, right);
            map.insert(other, left);
        }
        3 => drop(map.insert(key, graft)),
        _ => {
            map.insert(key, scalar(rng));
        }
    }
}

fn scalar(rng: &mut Rng) -> Value {
    match below(rng, 8) {
        0 => Value::Null,
        1 => json!(rng.random::<bool>()),
        2 => json!(*pick(rng, &EDGES)),
        3 => json!(-(below(rng, 1 << 20) as i64)),
        4 => json!(*pick(rng, &[0.5, -0.0, 1e-320, 1e308, -1e300, 0.1])),
        5 => json!(*pick(rng, &["", "a", "\0", "é", "\u{feff}", "😀", "{{ a }}", "null", "../a", "NaN"])),
        6 => json!("a ".repeat(below(rng, 3000))),
        _ => {
            if chance(rng, 50) {
                json!([])
            } else {
                json!({})
            }
        }
    }
}

/// A change of a text that leaves it UTF-8.
pub(crate) fn change_text(rng: &mut Rng, text: &mut String) {
    let letters: Vec<char> = text.chars().collect();
    let at = below(rng, letters.len());
    let mut out = letters.clone();
    match below(rng, 6) {
        0 if !out.is_empty() => drop(out.remove(at)),
        1 if !out.is_empty() => out.insert(at, out[at]),
        2 => out.insert(
            at,
            *pick(rng, &['a', '\0', '\n', '"', '\\', '{', '}', '%', '(', '*', 'é', '😀', '▁', 'Ġ', '\u{301}']),
        ),
        3 => out.truncate(at),
        4 if !out.is_empty() => {
            let to = below(rng, out.len());
            out.swap(at, to);
        }
        _ => out.extend_from_within(at..),
    }
    *text = out.into_iter().collect();
}

/// A text made of words and marks: words are dropped, doubled, moved, replaced by others of either text and by `edges`.
pub(crate) fn words(rng: &mut Rng, input: &[u8], other: &[u8], edges: &[&str]) -> Vec<u8> {
    let (text, donor) = (String::from_utf8_lossy(input), String::from_utf8_lossy(other));
    let mut pieces: Vec<&str> = split(&text);
    let donors = split(&donor);
    for _ in 0..1 + below(rng, 3) {
        let at = below(rng, pieces.len());
        match below(rng, 7) {
            0 if !pieces.is_empty() => drop(pieces.remove(at)),
            1 if !pieces.is_empty() => pieces.insert(at, pieces[at]),
            2 if !pieces.is_empty() => {
                let to = below(rng, pieces.len());
                pieces.swap(at, to);
            }
            3 if !donors.is_empty() && !pieces.is_empty() => pieces[at] = *pick(rng, &donors),
            4 if !donors.is_empty() => {
                let from = below(rng, donors.len());
                let to = (from + 1 + below(rng, 12)).min(donors.len());
                pieces.splice(at..at, donors[from..to].iter().copied());
            }
            5 if !pieces.is_empty() => pieces[at] = *pick(rng, edges),
            _ => pieces.insert(at, *pick(rng, edges)),
        }
    }
    let mut out = pieces.concat().into_bytes();
    if chance(rng, 10) {
        out = bytes(rng, &out, other);
    }
    out
}

/// Words of letters and digits, stretches of white space, and single marks.
fn split(text: &str) -> Vec<&str> {
    let kind = |c: char| {
        if c.is_alphanumeric() || c == '_' {
            0
        } else if c.is_whitespace() {
            1
        } else {
            2
        }
    };
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut last = None;
    for (at, c) in text.char_indices() {
        if last.is_some_and(|last| last != kind(c) || last == 2) {
            pieces.push(&text[start..at]);
            start = at;
        }
        last = Some(kind(c));
    }
    if start < text.len() {
        pieces.push(&text[start..]);
    }
    pieces
}
