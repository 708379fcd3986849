//! Ranks that share a micro-batch, as threads of one process.

use std::sync::{Arc, Barrier, Mutex};

use qlora::kernels::{View, ViewMut};
use qlora::model::context::SequenceExchange;

/// Ranks that are threads: what one sends another lies in the slot of both until it is taken.
#[derive(Debug)]
pub(crate) struct Threads {
    rank: usize,
    ranks: usize,
    slots: Arc<Vec<Mutex<Vec<f32>>>>,
    barrier: Arc<Barrier>,
}

impl Threads {
    pub(crate) fn group(ranks: usize) -> Vec<Arc<dyn SequenceExchange>> {
        let slots: Arc<Vec<_>> = Arc::new((0..ranks * ranks).map(|_| Mutex::default()).collect());
        let barrier = Arc::new(Barrier::new(ranks));
        let rank = |rank| Self { rank, ranks, slots: slots.clone(), barrier: barrier.clone() };
        (0..ranks).map(|number| Arc::new(rank(number)) as Arc<dyn SequenceExchange>).collect()
    }
}

impl SequenceExchange for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn all_to_all(&self, outgoing: &[View<'_>], incoming: Vec<ViewMut<'_>>) -> qlora::core::Result<()> {
        assert!(outgoing.len() == self.ranks && incoming.len() == self.ranks);
        assert_eq!((outgoing[self.rank].rows(), incoming[self.rank].rows()), (0, 0), "nothing is sent to itself");
        for (to, view) in outgoing.iter().enumerate() {
            *self.slots[self.rank * self.ranks + to].lock().unwrap() = view.to_vec()?;
        }
        self.barrier.wait();
        for (from, to) in incoming.into_iter().enumerate() {
            let values = self.slots[from * self.ranks + self.rank].lock().unwrap();
            let [rows, cols] = to.shape();
            to.copy_from(View::new(&values, rows, cols))?;
        }
        self.barrier.wait();
        Ok(())
    }
}

/// Runs `work` on every rank; its results in order.
pub(crate) fn on_ranks<T: Send>(ranks: usize, work: impl Fn(Arc<dyn SequenceExchange>) -> T + Sync) -> Vec<T> {
    let group = Threads::group(ranks);
    std::thread::scope(|scope| {
        let threads: Vec<_> = group.into_iter().map(|exchange| scope.spawn(|| work(exchange))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
