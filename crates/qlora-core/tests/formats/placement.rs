//! A base that is in shares of several ranks, or in host memory: the logits of one that is whole, and the bytes that were predicted.

use std::sync::{Arc, Barrier, Mutex};

use candle_core::DType;
use qlora_core::formats::HfDirectory;
use qlora_core::model::placement::{OtherShares, OwnShare, Peers, forms};
use qlora_core::model::{AdapterChoice, BaseMemory, BasePlacement, CausalLm, LoadOptions, PlacementKind, Quantization};
use qlora_core::source::WeightSource;
use qlora_kernels::SequenceLayout;
use qlora_kernels::quant::QuantConfig;

use crate::common::{FOLDERS, quantized};

/// Ranks as threads.
#[derive(Default)]
struct Board {
    messages: Mutex<Vec<Vec<u8>>>,
    shares: Mutex<Vec<Option<Arc<dyn OwnShare>>>>,
}

struct ThreadRank<'a> {
    rank: usize,
    size: usize,
    board: &'a Arc<Board>,
    barrier: &'a Barrier,
}

impl Peers for ThreadRank<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn exchange(&mut self, _: &'static str, mine: Vec<u8>) -> qlora_core::Result<Vec<Vec<u8>>> {
        self.board.messages.lock().unwrap().resize(self.size, Vec::new());
        self.barrier.wait();
        self.board.messages.lock().unwrap()[self.rank] = mine;
        self.barrier.wait();
        let all = self.board.messages.lock().unwrap().clone();
        self.barrier.wait();
        Ok(all)
    }

    fn serve(&mut self, own: Arc<dyn OwnShare>) -> qlora_core::Result<Arc<dyn OtherShares>> {
        self.board.shares.lock().unwrap().resize_with(self.size, || None);
        self.barrier.wait();
        self.board.shares.lock().unwrap()[self.rank] = Some(own);
        self.barrier.wait();
        Ok(Arc::new(Shares { of: self.rank, board: self.board.clone() }))
    }
}

struct Shares {
    of: usize,
    board: Arc<Board>,
}

impl OtherShares for Shares {
    fn read(&self, rank: usize, number: usize, out: &mut Vec<u8>) -> qlora_kernels::Result<()> {
        assert_ne!(rank, self.of, "a rank's own tensors do not travel");
        let share = self.board.shares.lock().unwrap()[rank].clone().unwrap();
        out.extend(share.piece(number).unwrap());
        Ok(())
    }
}

impl std::fmt::Debug for Shares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shares({})", self.of)
    }
}

fn load(source: &dyn WeightSource, quantization: Quantization, placement: BasePlacement<'_>) -> CausalLm {
    CausalLm::load(source, LoadOptions { quantization, placement, ..LoadOptions::default() }).unwrap()
}

fn logits(model: &CausalLm) -> Vec<u32> {
    let ids = [3, 14, 15, 9, 2, 6];
    let logits = model.logits(&ids, &SequenceLayout::from_lengths(&[ids.len()]), AdapterChoice::Active).unwrap();
    let values: Vec<f32> = logits.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

fn check(source: &(dyn WeightSource + Sync), quantization: Quantization, name: &str) {
    let whole = load(source, quantization, BasePlacement::Resident);
    assert!(whole.base_memory().is_none());
    let expected = logits(&whole);
    let forms = forms(source, quantization, None).unwrap();

    let streamed = load(source, quantization, BasePlacement::Streamed);
    let predicted = BaseMemory::predict(&forms, PlacementKind::Streamed, 0, 1);
    assert_eq!(streamed.base_memory(), Some(&predicted), "{name}");
    assert_eq!((streamed.memory().projections, streamed.memory().slots as u64), (0, predicted.slots), "{name}");
    for _ in 0..2 {
        assert_eq!(logits(&streamed), expected, "{name}: streamed");
    }
    for size in [2, 3, 5] {
        let (board, barrier) = (Arc::new(Board::default()), Barrier::new(size));
        let own = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for rank in 0..size {
                let (board, barrier, own, forms, expected) = (&board, &barrier, &own, &forms, &expected);
                scope.spawn(move || {
                    let mut peers = ThreadRank { rank, size, board, barrier };
                    let model = load(source, quantization, BasePlacement::Sharded(&mut peers));
                    let predicted = BaseMemory::predict(forms, PlacementKind::Sharded, rank, size);
                    assert_eq!(model.base_memory(), Some(&predicted), "{name}, rank {rank} of {size}");
                    assert_eq!(logits(&model), *expected, "{name}: rank {rank} of {size}");
                    own.lock().unwrap().push(predicted.own);
                });
            }
        });
        assert_eq!(own.into_inner().unwrap().iter().sum::<u64>(), predicted.whole, "{name}: {size} shares");
    }
}

#[test]
fn logits_do_not_depend_on_where_the_base_is_and_bytes_are_as_predicted() {
    let mut refused = Vec::new();
    for name in FOLDERS {
        let source = HfDirectory::open(quantized(name)).unwrap();
        if name.starts_with("bnb_nf4") || name.starts_with("bnb_fp4") {
            check(&source, Quantization::None, name);
            continue;
        }
        let options = LoadOptions { placement: BasePlacement::Streamed, ..LoadOptions::default() };
        let error = CausalLm::load(&source, options).unwrap_err().to_string();
        assert!(error.contains("weights are whole on every device: only 4-bit"), "{name}: {error}");
        refused.push(name);
    }
    assert_eq!(refused.len(), 6);
}

#[test]
fn plain_weights_travel_quantized_or_not() {
    let source = HfDirectory::open(crate::common::fixtures().join("pickles/model")).unwrap();
    check(&source, Quantization::None, "plain");
    check(&source, Quantization::Bits4(QuantConfig::default()), "quantized while loading");
    let options =
        LoadOptions { quantization: Quantization::Int8, placement: BasePlacement::Streamed, ..Default::default() };
    let error = CausalLm::load(&source, options).unwrap_err().to_string();
    assert!(error.contains("LLM.int8 weights are whole on every device"), "{error}");
}
