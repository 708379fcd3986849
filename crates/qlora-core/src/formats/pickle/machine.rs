//! The part of Python's pickle machine that files of tensors need: numbers, texts, tuples, lists and dictionaries, and the five
//! names that `torch.save` writes for a dictionary of tensors.
//!
//! A pickle is a program. Here nothing in it runs: a name ([`Global`]) is one of a fixed list or an error, and "calling" one means to
//! note down where a tensor lies. Objects live in one list and refer to each other by number, so that nothing is ever copied,
//! however often a program refers to it, and nothing is freed recursively, however deep it nests: memory grows with the bytes read.

use std::collections::HashMap;

use safetensors::Dtype;

/// The most objects of one pickle: ten times those of a checkpoint with 30,000 tensors.
const MAX_OBJECTS: usize = 4 << 20;
/// The most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// The number of an object.
pub(super) type Id = u32;

/// A name that a pickle may refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "DoubleStorage") => Self::Storage(Dtype::F64),
            ("torch", "FloatStorage") => Self::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Self::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Dtype::BF16),
            ("torch", "LongStorage") => Self::Storage(Dtype::I64),
            ("torch", "IntStorage") => Self::Storage(Dtype::I32),
            ("torch", "ShortStorage") => Self::Storage(Dtype::I16),
            ("torch", "CharStorage") => Self::Storage(Dtype::I8),
            ("torch", "ByteStorage") => Self::Storage(Dtype::U8),
            ("torch", "BoolStorage") => Self::Storage(Dtype::BOOL),
            _ => return None,
        })
    }
}

/// A block of elements that tensors lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Storage {
    pub(super) dtype: Dtype,
    /// Its key, a text.
    pub(super) key: Id,
    /// Elements.
    pub(super) len: usize,
}

/// A tensor: a view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) storage: Storage,
    /// The first element's index.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Steps of each dimension, in elements.
    pub(super) strides: Vec<usize>,
}

/// A value.
#[derive(Debug, PartialEq)]
pub(super) enum Object<'a> {
    None,
    Bool(bool),
    Int(i128),
    Float,
    Text(&'a str),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Storage),
    Tensor(Box<Tensor>),
}

impl Object<'_> {
    fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool(_) => "a bool",
            Self::Int(_) | Self::Float => "a number",
            Self::Text(_) => "a text",
            Self::Tuple(_) => "a tuple",
            Self::List(_) => "a list",
            Self::Dict(_) => "a dictionary",
            Self::Global(_) => "a name",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

/// The objects of one pickle.
pub(super) struct Objects<'a> {
    objects: Vec<Object<'a>>,
    /// The last one, which the others belong to.
    pub(super) root: Id,
}

impl<'a> Objects<'a> {
    pub(super) fn get(&self, id: Id) -> &Object<'a> {
        &self.objects[id as usize]
    }

    pub(super) fn text(&self, id: Id) -> Result<&'a str, String> {
        match self.get(id) {
            Object::Text(text) => Ok(text),
            other => Err(format!("{} where a text belongs", other.kind())),
        }
    }

    /// The entries of a dictionary of tensors.
    pub(super) fn tensors(&self) -> Result<Vec<(&'a str, &Tensor)>, String> {
        let Object::Dict(entries) = self.get(self.root) else {
            return Err(format!("it holds {} where a dictionary of tensors belongs", self.get(self.root).kind()));
        };
        let entry = |&(name, value): &(Id, Id)| {
            let name = self.text(name)?;
            match self.get(value) {
                Object::Tensor(tensor) => Ok((name, &**tensor)),
                other => Err(format!(
                    "it has {} under {:?}; only a dictionary of tensors is read (a state dict)",
                    other.kind(),
                    shown(name)
                )),
            }
        };
        entries.iter().map(entry).collect()
    }
}

/// A text of the file in messages.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(120).collect()
}

/// Reads the pickle that begins at `*at`, which is then behind it.
///
/// # Errors
/// If it is damaged, or more than a dictionary of tensors is made of; the place is in the message.
pub(super) fn read<'a>(file: &'a [u8], at: &mut usize) -> Result<Objects<'a>, String> {
    let start = *at;
    let mut machine =
        Machine { file, at: start, objects: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    let root = machine.run().map_err(|message| format!("{message} (in the pickle, byte {})", machine.at - start))?;
    *at = machine.at;
    Ok(Objects { objects: machine.objects, root })
}

struct Machine<'a> {
    file: &'a [u8],
    at: usize,
    objects: Vec<Object<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack.
    marks: Vec<u32>,
    memo: HashMap<u32, Id>,
}

type Step<T = ()> = Result<T, String>;

impl<'a> Machine<'a> {
    fn run(&mut self) -> Step<Id> {
        let start = self.at;
        loop {
            // Every byte can ask for a few bytes of memory, and in the older layout nothing else says where a pickle ends.
            if self.at - start > super::MAX_PICKLE as usize {
                return Err(format!("it is longer than {} bytes", super::MAX_PICKLE));
            }
            match self.byte()? {
                0x80 => match self.byte()? {
                    2 => {}
                    other => return Err(format!("pickle protocol {other}; torch.save writes 2")),
                },
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len() as u32),
                b'N' => self.push(Object::None)?,
                0x88 => self.push(Object::Bool(true))?,
                0x89 => self.push(Object::Bool(false))?,
                b'K' => {
                    let value = self.byte()?;
                    self.push(Object::Int(value.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.array()?);
                    self.push(Object::Int(value.into()))?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.array()?);
                    self.push(Object::Int(value.into()))?;
                }
                0x8a => {
                    let value = self.long()?;
                    self.push(Object::Int(value))?;
                }
                b'G' => {
                    self.take(8)?;
                    self.push(Object::Float)?;
                }
                b'X' | b'T' => {
                    let length = u32::from_le_bytes(self.array()?);
                    self.text(length as usize)?;
                }
                b'U' => {
                    let length = self.byte()?;
                    self.text(length.into())?;
                }
                b')' => self.push(Object::Tuple(Vec::new()))?,
                b']' => self.push(Object::List(Vec::new()))?,
                b'}' => self.push(Object::Dict(Vec::new()))?,
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Object::Tuple(items))?;
                }
                count @ 0x85..=0x87 => {
                    let items = self.above(usize::from(count - 0x84))?;
                    self.push(Object::Tuple(items))?;
                }
                b'a' => {
                    let items = self.above(1)?;
                    self.extend(items)?;
                }
                b'e' | b'u' => {
                    let items = self.since_mark()?;
                    self.extend(items)?;
                }
                b's' => {
                    let items = self.above(2)?;
                    self.extend(items)?;
                }
                b'q' => {
                    let key = self.byte()?;
                    self.remember(key.into())?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.remember(key)?;
                }
                b'h' => {
                    let key = self.byte()?;
                    self.recall(key.into())?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.recall(key)?;
                }
                b'c' => self.global()?,
                b'Q' => self.persistent()?,
                b'R' => self.call()?,
                // State of an object: PyTorch's module versions on an OrderedDict, which say nothing about the tensors.
                b'b' => {
                    self.pop()?;
                    if !matches!(self.top()?, Object::Dict(_)) {
                        return Err(format!("it sets the state of {}", self.top()?.kind()));
                    }
                }
                other => {
                    return Err(format!("pickle opcode {other:#04x}, which torch.save does not write for tensors"));
                }
            }
        }
    }

    fn take(&mut self, count: usize) -> Step<&'a [u8]> {
        let bytes = self.file[self.at..].get(..count).ok_or("cut short")?;
        self.at += count;
        Ok(bytes)
    }

    fn byte(&mut self) -> Step<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N)?;
        Ok(bytes.try_into().expect("as many bytes as asked for"))
    }

    fn long(&mut self) -> Step<i128> {
        let length = self.byte()?;
        let bytes = self.take(length.into())?;
        let mut wide = [if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xff } else { 0 }; 16];
        wide.get_mut(..bytes.len()).ok_or("an integer of more than 16 bytes")?.copy_from_slice(bytes);
        Ok(i128::from_le_bytes(wide))
    }

    fn text(&mut self, length: usize) -> Step {
        let text = str::from_utf8(self.take(length)?).map_err(|_| "a text that is not UTF-8")?;
        self.push(Object::Text(text))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.file[self.at..];
        let end = rest.iter().position(|&byte| byte == b'\n').ok_or("cut short")?;
        let line = str::from_utf8(self.take(end)?).map_err(|_| "a name that is not UTF-8")?;
        self.at += 1;
        Ok(line)
    }

    fn push(&mut self, object: Object<'a>) -> Step {
        if self.objects.len() >= MAX_OBJECTS {
            return Err(format!("more than {MAX_OBJECTS} objects"));
        }
        self.stack.push(self.objects.len() as Id);
        self.objects.push(object);
        Ok(())
    }

    /// The lowest height that what follows the last mark may fall to.
    fn floor(&self) -> usize {
        self.marks.last().map_or(0, |&mark| mark as usize)
    }

    fn pop(&mut self) -> Step<Id> {
        if self.stack.len() <= self.floor() {
            return Err("nothing is left on the stack".to_owned());
        }
        Ok(self.stack.pop().expect("the stack is higher than its floor"))
    }

    fn top(&self) -> Step<&Object<'a>> {
        let id = self.stack.last().filter(|_| self.stack.len() > self.floor()).ok_or("nothing is left on the stack")?;
        Ok(&self.objects[*id as usize])
    }

    fn above(&mut self, count: usize) -> Step<Vec<Id>> {
        let from = self.stack.len().checked_sub(count).filter(|&from| from >= self.floor());
        Ok(self.stack.split_off(from.ok_or("nothing is left on the stack")?))
    }

    fn since_mark(&mut self) -> Step<Vec<Id>> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        Ok(self.stack.split_off(mark as usize))
    }

    /// Puts items into the list or dictionary that is now on top.
    fn extend(&mut self, items: Vec<Id>) -> Step {
        let top =
            *self.stack.last().filter(|_| self.stack.len() > self.floor()).ok_or("nothing is left on the stack")?;
        match &mut self.objects[top as usize] {
            Object::List(list) => list.extend(items),
            Object::Dict(entries) => {
                let (pairs, rest) = items.as_chunks::<2>();
                if !rest.is_empty() {
                    return Err("a key without a value".to_owned());
                }
                entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
            }
            other => return Err(format!("items for {}", other.kind())),
        }
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Step {
        self.top()?;
        let top = *self.stack.last().expect("there is a top");
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Step {
        let id = *self.memo.get(&key).ok_or_else(|| format!("nothing is remembered under {key}"))?;
        self.stack.push(id);
        Ok(())
    }

    fn global(&mut self) -> Step {
        let (module, name) = (self.line()?, self.line()?);
        match Global::named(module, name) {
            Some(global) => self.push(Object::Global(global)),
            None => Err(format!(
                "it asks for {}.{}, which is not read: a file of weights needs tensors alone, and nothing in it is executed. If you \
                 trust it, load it in Python and save its tensors as safetensors",
                shown(module),
                shown(name)
            )),
        }
    }

    /// `('storage', type, key, device, elements)`, and in the older layout a sixth for views, always None since PyTorch 0.4.
    fn persistent(&mut self) -> Step {
        let id = self.pop()?;
        let bad = || "a persistent object that is no storage".to_owned();
        let Object::Tuple(items) = self.get(id) else { return Err(bad()) };
        let (&[tag, kind, key, _, len], view) = match items.len() {
            5 | 6 => (items.first_chunk::<5>().expect("five or more"), items.get(5)),
            _ => return Err(bad()),
        };
        let (Object::Text("storage"), &Object::Global(Global::Storage(dtype))) = (self.get(tag), self.get(kind)) else {
            return Err(bad());
        };
        if !matches!(self.get(key), Object::Text(_)) || view.is_some_and(|&view| *self.get(view) != Object::None) {
            return Err(bad());
        }
        let len = self.size(len)?;
        self.push(Object::Storage(Storage { dtype, key, len }))
    }

    fn get(&self, id: Id) -> &Object<'a> {
        &self.objects[id as usize]
    }

    fn size(&self, id: Id) -> Step<usize> {
        match self.get(id) {
            Object::Int(value) => usize::try_from(*value).map_err(|_| format!("{value} as a size")),
            other => Err(format!("{} as a size", other.kind())),
        }
    }

    fn sizes(&self, id: Id) -> Step<Vec<usize>> {
        match self.get(id) {
            Object::Tuple(items) if items.len() <= MAX_RANK => items.iter().map(|&item| self.size(item)).collect(),
            Object::Tuple(items) => Err(format!("a tensor of {} dimensions", items.len())),
            other => Err(format!("{} as a shape", other.kind())),
        }
    }

    fn call(&mut self) -> Step {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let &Object::Global(callee) = self.get(callee) else {
            return Err(format!("it calls {}", self.get(callee).kind()));
        };
        let Object::Tuple(arguments) = self.get(arguments) else {
            return Err("a call without a tuple of arguments".to_owned());
        };
        match (callee, &**arguments) {
            (Global::OrderedDict, []) => self.push(Object::Dict(Vec::new())),
            (Global::RebuildTensor, &[storage, offset, shape, strides, _, _, ..]) => {
                let &Object::Storage(storage) = self.get(storage) else {
                    return Err(format!("a tensor in {}", self.get(storage).kind()));
                };
                let (offset, shape, strides) = (self.size(offset)?, self.sizes(shape)?, self.sizes(strides)?);
                let tensor = Tensor { storage, offset, shape, strides };
                tensor.check()?;
                self.push(Object::Tensor(Box::new(tensor)))
            }
            (Global::RebuildParameter, &[data, _, _]) if matches!(self.get(data), Object::Tensor(_)) => {
                self.stack.push(data);
                Ok(())
            }
            _ => Err(format!("a call of {callee:?} with {} arguments that it does not have", arguments.len())),
        }
    }
}

impl Tensor {
    /// Elements.
    pub(super) fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether its elements lie one after the other, the last dimension's first.
    pub(super) fn is_contiguous(&self) -> bool {
        if self.len() == 0 {
            return true;
        }
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    }

    /// Checks that it lies within its storage, and has no more elements than that.
    pub(super) fn check(&self) -> Step {
        let Self { storage, offset, shape, strides } = self;
        let outside =
            || format!("a tensor of shape {shape:?} that does not fit its storage of {} elements", storage.len);
        if shape.len() != strides.len() {
            return Err(format!("a tensor with {} sizes and {} strides", shape.len(), strides.len()));
        }
        let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size)).ok_or_else(outside)?;
        if count == 0 {
            return Ok(());
        }
        let last = shape.iter().zip(strides).try_fold(*offset, |at, (&size, &stride)| {
            (size - 1).checked_mul(stride).and_then(|step| at.checked_add(step))
        });
        // A view that repeats elements (an expanded one) would ask for more memory than the file has.
        match last {
            Some(last) if last < storage.len && count <= storage.len => Ok(()),
            _ => Err(outside()),
        }
    }
}
