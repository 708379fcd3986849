//! Loaded tensors on their way to their places, where the base is not whole on the device.
//!
//! A tensor is loaded as any other (read, checked, quantized on the GPU), one a thread at a time, and goes from there to its place at
//! once: a share, page-locked memory, or on the CPU a list. When all are placed, the ranks tell each other where theirs are, and
//! every tensor that is not on the device gets a weight that travels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use qlora_kernels::Workspace;
#[cfg(feature = "cuda")]
use qlora_kernels::cuda::{BaseShare, DeviceRing, Gpu, HostPiece, OtherShare, ShareHandle, Traveller};
use qlora_kernels::weight::FrozenWeight;
use qlora_kernels::weight::packed::PackedForm;
use qlora_kernels::weight::travel::{self, Home, HostRing};

use super::super::assemble::ModelPart;
use super::super::placement::{BaseMemory, BasePlacement, OtherShares, OwnShare, Peers, PlacementKind, forms, owners};
use super::Quantization;
use super::tensor::{Job, Place};
use super::threads::Parts;
use crate::error::{Error, Result};
use crate::source::WeightSource;

/// A tensor of a block.
#[derive(Clone, Debug)]
struct Seat {
    /// The weight's name.
    name: String,
    owner: usize,
}

/// The places of the blocks' linear layers.
pub(super) struct Placer {
    kind: PlacementKind,
    rank: usize,
    ranks: usize,
    /// By block; their numbers count on from block to block.
    blocks: Vec<Vec<Seat>>,
    numbers: HashMap<String, usize>,
    store: Store,
}

enum Store {
    Host(Mutex<HashMap<usize, Arc<dyn FrozenWeight>>>),
    #[cfg(feature = "cuda")]
    Pinned(Arc<Gpu>, Mutex<HashMap<usize, HostPiece>>),
    #[cfg(feature = "cuda")]
    Share(Arc<Gpu>, BaseShare, Mutex<Placed>),
}

/// The tensors in this rank's share.
#[derive(Default)]
#[cfg(feature = "cuda")]
struct Placed {
    used: usize,
    forms: HashMap<usize, (PackedForm, usize)>,
}

impl Placer {
    /// None for a base that is whole on the device.
    ///
    /// # Errors
    /// If the weights cannot travel, or there is no memory for a share.
    pub(super) fn new(
        placement: &BasePlacement<'_>,
        source: &dyn WeightSource,
        quantization: Quantization,
        workspace: &Workspace,
    ) -> Result<Option<Self>> {
        let (kind, rank, ranks) = placement.kind();
        if kind == PlacementKind::Resident {
            return Ok(None);
        }
        let dtype = (!workspace.device().is_cpu()).then(|| workspace.dtype());
        let forms = forms(source, quantization, dtype)?;
        let owners = owners(&forms, ranks);
        let spec = source.config().spec();
        let seats = spec.blocks.iter().zip(owners).map(|(block, owners)| -> Vec<Seat> {
            block.linear().zip(owners).map(|(module, owner)| Seat { name: module.weight_name(), owner }).collect()
        });
        let blocks: Vec<Vec<Seat>> = seats.collect();
        let numbers = blocks.iter().flatten().enumerate().map(|(number, seat)| (seat.name.clone(), number)).collect();
        #[cfg(feature = "cuda")]
        let store = match workspace.gpu() {
            None => Store::Host(Mutex::default()),
            Some(gpu) if kind == PlacementKind::Streamed => Store::Pinned(gpu.clone(), Mutex::default()),
            Some(gpu) => {
                let bytes = BaseMemory::predict(&forms, kind, rank, ranks).own as usize;
                Store::Share(gpu.clone(), BaseShare::new(gpu, bytes)?, Mutex::default())
            }
        };
        #[cfg(not(feature = "cuda"))]
        let store = Store::Host(Mutex::default());
        Ok(Some(Self { kind, rank, ranks, blocks, numbers, store }))
    }

    /// Whether this rank loads a tensor.
    pub(super) fn loads(&self, job: &Job) -> bool {
        let number = self.number(job);
        number.is_none_or(|number| self.blocks.iter().flatten().nth(number).is_some_and(|seat| self.is_own(seat)))
    }

    fn is_own(&self, seat: &Seat) -> bool {
        self.kind == PlacementKind::Streamed || seat.owner == self.rank
    }

    fn number(&self, job: &Job) -> Option<usize> {
        if job.place == Place::Projection { self.numbers.get(&job.name).copied() } else { None }
    }

    /// Brings a loaded tensor to its place; gives back what stays on the device as it is.
    ///
    /// # Errors
    /// If it cannot travel, or there is no room.
    pub(super) fn place(&self, job: &Job, part: ModelPart) -> Result<Option<ModelPart>> {
        let (Some(number), ModelPart::Weight(weight)) = (self.number(job), &part) else { return Ok(Some(part)) };
        match &self.store {
            Store::Host(weights) => {
                if weight.packed().is_none() {
                    return Err(Error::tensor(&job.name, "is stored in a way that cannot travel"));
                }
                lock(weights).insert(number, weight.clone());
            }
            #[cfg(feature = "cuda")]
            Store::Pinned(_, pieces) => {
                let piece = HostPiece::of(on_gpu(job, weight)?)?;
                lock(pieces).insert(number, piece);
            }
            #[cfg(feature = "cuda")]
            Store::Share(gpu, share, placed) => {
                let weight = on_gpu(job, weight)?;
                let form = weight.packed_form();
                let form = form.ok_or_else(|| Error::tensor(&job.name, "is stored in a way that cannot travel"))?;
                let at = {
                    let mut placed = lock(placed);
                    let at = placed.used;
                    placed.used += form.bytes();
                    placed.forms.insert(number, (form, at));
                    at
                };
                share.place(weight, at)?;
                // Its memory may be another thread's next.
                gpu.synchronize("share of the base")?;
            }
        }
        Ok(None)
    }

    /// The weights of all blocks, once every tensor of this rank is placed, as parts of the model.
    ///
    /// # Errors
    /// If another rank failed, or its tensors cannot be reached.
    pub(super) fn finish(self, placement: BasePlacement<'_>, parts: &mut Parts) -> Result<BaseMemory> {
        let Self { kind, rank, ranks, blocks, store, .. } = self;
        let names: Vec<String> = blocks.iter().flatten().map(|seat| seat.name.clone()).collect();
        let owners: Vec<usize> = blocks.iter().flatten().map(|seat| seat.owner).collect();
        let mut number = 0;
        let numbers: Vec<Vec<usize>> = blocks
            .iter()
            .map(|seats| {
                let block = (number..number + seats.len()).collect();
                number += seats.len();
                block
            })
            .collect();
        let mut add = |number: usize, weight: Arc<dyn FrozenWeight>| {
            parts.insert((names[number].clone(), Place::Projection), ModelPart::Weight(weight));
        };
        let missing = |number: usize| Error::tensor(&names[number], "was not placed by any rank");
        match (store, placement) {
            (Store::Host(weights), placement) => {
                let own = weights.into_inner().unwrap_or_else(PoisonError::into_inner);
                let mut forms: HashMap<usize, PackedForm> =
                    own.iter().filter_map(|(number, weight)| Some((*number, weight.packed()?.form))).collect();
                let own = Arc::new(HostShare { weights: own });
                let home: Arc<dyn Home> = match placement {
                    BasePlacement::Sharded(peers) => {
                        let mine = Listing { handle: [0; 64], bytes: 0, entries: entries(&forms, |_| 0) };
                        for theirs in exchange(peers, &mine)? {
                            forms.extend(theirs.entries.into_iter().map(|(number, form, _)| (number, form)));
                        }
                        let others = peers.serve(own.clone())?;
                        Arc::new(RemoteHome { owners: owners.clone(), others })
                    }
                    _ => own.clone(),
                };
                let stays = |number: usize| kind == PlacementKind::Sharded && owners[number] == rank;
                let form = |number: usize| forms.get(&number).copied().ok_or_else(|| missing(number));
                let whole = names.iter().enumerate().map(|(number, _)| form(number)).collect::<Result<Vec<_>>>()?;
                let by_block: Vec<Vec<PackedForm>> =
                    numbers.iter().map(|block| block.iter().map(|&number| whole[number]).collect()).collect();
                let memory = BaseMemory::predict(&by_block, kind, rank, ranks);
                let away: Vec<Vec<(PackedForm, usize)>> = numbers
                    .iter()
                    .map(|block| block.iter().filter(|n| !stays(**n)).map(|&n| (whole[n], n)).collect())
                    .collect();
                let travelling = away.clone();
                for (block, weights) in travelling.iter().zip(HostRing::weights(away, home)) {
                    block.iter().zip(weights).for_each(|((_, number), weight)| add(*number, weight));
                }
                own.weights.iter().filter(|(n, _)| stays(**n)).for_each(|(n, weight)| add(*n, weight.clone()));
                Ok(counted(memory, parts, &names))
            }
            #[cfg(feature = "cuda")]
            (Store::Pinned(gpu, pieces), _) => {
                let mut pieces = pieces.into_inner().unwrap_or_else(PoisonError::into_inner);
                let mut take = |number: usize| pieces.remove(&number).ok_or_else(|| missing(number));
                let block = |block: &Vec<usize>| block.iter().map(|&n| take(n)).collect::<Result<Vec<_>>>();
                let pieces = numbers.iter().map(block).collect::<Result<Vec<_>>>()?;
                let by_block: Vec<Vec<PackedForm>> =
                    pieces.iter().map(|block| block.iter().map(|piece| *piece.form()).collect()).collect();
                let memory = BaseMemory::predict(&by_block, kind, rank, ranks);
                let away = pieces.into_iter().map(|block| block.into_iter().map(Traveller::Host).collect()).collect();
                for (block, weights) in numbers.iter().zip(DeviceRing::weights(&gpu, away)?) {
                    block.iter().zip(weights).for_each(|(&number, weight)| add(number, Arc::new(weight)));
                }
                Ok(memory)
            }
            #[cfg(feature = "cuda")]
            (Store::Share(gpu, share, placed), BasePlacement::Sharded(peers)) => {
                let own = placed.into_inner().unwrap_or_else(PoisonError::into_inner).forms;
                let (handle, bytes) = (share.handle()?, share.bytes() as u64);
                let at = |number: usize| own.get(&number).map_or(0, |(_, at)| *at);
                let forms = own.iter().map(|(number, (form, _))| (*number, *form)).collect();
                let all = exchange(peers, &Listing { handle, bytes, entries: entries(&forms, at) })?;
                let mut places: HashMap<usize, (PackedForm, Option<Arc<OtherShare>>, usize)> = HashMap::new();
                for (of, theirs) in all.into_iter().enumerate() {
                    let open = || OtherShare::open(&gpu, &theirs.handle, theirs.bytes as usize).map(Arc::new);
                    let opened = if of == rank { None } else { Some(open().map_err(|error| of_rank(of, error))?) };
                    let entries = theirs.entries.into_iter();
                    places.extend(entries.map(|(number, form, at)| (number, (form, opened.clone(), at))));
                }
                let (mut away, mut travelling) = (Vec::new(), Vec::new());
                let mut by_block = Vec::new();
                for block in &numbers {
                    let (mut guests, mut of_guests, mut forms) = (Vec::new(), Vec::new(), Vec::new());
                    for &number in block {
                        let (form, other, at) = places.remove(&number).ok_or_else(|| missing(number))?;
                        forms.push(form);
                        match other {
                            None => add(number, Arc::new(share.weight(&form, at))),
                            Some(share) => {
                                guests.push(Traveller::Other { form, share, at });
                                of_guests.push(number);
                            }
                        }
                    }
                    away.push(guests);
                    travelling.push(of_guests);
                    by_block.push(forms);
                }
                for (block, weights) in travelling.iter().zip(DeviceRing::weights(&gpu, away)?) {
                    block.iter().zip(weights).for_each(|(&number, weight)| add(number, Arc::new(weight)));
                }
                Ok(BaseMemory::predict(&by_block, kind, rank, ranks))
            }
            #[cfg(feature = "cuda")]
            (Store::Share(..), _) => Err(Error::Invalid("a share of the base without other ranks".into())),
        }
    }
}

#[cfg(feature = "cuda")]
fn of_rank(rank: usize, error: qlora_kernels::Error) -> Error {
    Error::Invalid(format!("the share of rank {rank}: {error}"))
}

/// What the model holds, beside what was predicted of it.
fn counted(memory: BaseMemory, parts: &Parts, names: &[String]) -> BaseMemory {
    let held = |name: &String| match parts.get(&(name.clone(), Place::Projection)) {
        Some(ModelPart::Weight(weight)) if !weight.travels() => weight.packed().map_or(0, |packed| packed.form.bytes()),
        _ => 0,
    };
    BaseMemory { own: names.iter().map(held).sum::<usize>() as u64, ..memory }
}

#[cfg(feature = "cuda")]
fn on_gpu<'a>(job: &Job, weight: &'a Arc<dyn FrozenWeight>) -> Result<&'a qlora_kernels::cuda::CudaWeight> {
    weight.as_cuda().ok_or_else(|| Error::tensor(&job.name, "was loaded to the CPU"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This rank's tensors in host memory.
struct HostShare {
    weights: HashMap<usize, Arc<dyn FrozenWeight>>,
}

impl OwnShare for HostShare {
    fn piece(&self, number: usize) -> Option<Vec<u8>> {
        Some(self.weights.get(&number)?.packed()?.to_bytes())
    }
}

impl Home for HostShare {
    fn read(&self, number: usize, out: &mut Vec<u8>) -> qlora_kernels::Result<()> {
        let piece = self.piece(number);
        let missing = || qlora_kernels::Error::Invalid { op: "streamed base", message: format!("no tensor {number}") };
        out.extend(piece.ok_or_else(missing)?);
        Ok(())
    }
}

impl std::fmt::Debug for HostShare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostShare({} tensors)", self.weights.len())
    }
}

/// The other ranks' tensors.
#[derive(Debug)]
struct RemoteHome {
    owners: Vec<usize>,
    others: Arc<dyn OtherShares>,
}

impl travel::Home for RemoteHome {
    fn read(&self, number: usize, out: &mut Vec<u8>) -> qlora_kernels::Result<()> {
        self.others.read(self.owners[number], number, out)
    }
}

/// Where a rank's tensors are: the number, the form and the place in its share of each.
struct Listing {
    /// Of a GPU's share.
    handle: [u8; 64],
    /// Its size.
    bytes: u64,
    entries: Vec<(usize, PackedForm, usize)>,
}

#[cfg(feature = "cuda")]
const _: () = assert!(size_of::<ShareHandle>() == 64);

fn entries(forms: &HashMap<usize, PackedForm>, at: impl Fn(usize) -> usize) -> Vec<(usize, PackedForm, usize)> {
    forms.iter().map(|(&number, form)| (number, *form, at(number))).collect()
}

/// What every rank has.
fn exchange(peers: &mut dyn Peers, mine: &Listing) -> Result<Vec<Listing>> {
    let all = peers.exchange("shares of the base", mine.to_bytes())?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        Listing::from_bytes(bytes)
            .ok_or_else(|| Error::Invalid(format!("rank {rank} sent no list of its share of the base")))
    };
    all.iter().enumerate().map(read).collect()
}

impl Listing {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.handle.to_vec();
        bytes.extend(self.bytes.to_le_bytes());
        for (number, form, at) in &self.entries {
            let words = [*number as u64, *at as u64].into_iter().chain(form.to_words());
            bytes.extend(words.flat_map(u64::to_le_bytes));
        }
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (handle, rest) = bytes.split_first_chunk::<64>()?;
        let (words, rest) = rest.as_chunks::<8>();
        let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let (&total, words) = words.split_first()?;
        let (entries, more) = words.as_chunks::<10>();
        let entry = |entry: &[u64; 10]| {
            let [number, at, form @ ..] = *entry;
            Some((usize::try_from(number).ok()?, PackedForm::from_words(form).ok()?, usize::try_from(at).ok()?))
        };
        let entries = entries.iter().map(entry).collect::<Option<_>>()?;
        (rest.is_empty() && more.is_empty()).then_some(Self { handle: *handle, bytes: total, entries })
    }
}
