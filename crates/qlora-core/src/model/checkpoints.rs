//! What the blocks of a stack keep between forward and backward, last in, first out.
//!
//! A block's input may be offloaded: it then moves to pinned host memory while the next block runs, and comes back while
//! the block above runs its backward.

use qlora_kernels::Workspace;
#[cfg(feature = "cuda")]
use qlora_kernels::cuda::{Arriving, Leaving, Offloaded};

use super::block::{Keep, Saved};
use crate::error::Result;

/// One entry a block; none for the blocks below the first adapter, which have no backward.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    entries: Vec<Option<Entry>>,
    #[cfg(feature = "cuda")]
    leaving: Option<Leaving>,
    #[cfg(feature = "cuda")]
    arriving: Option<Arriving>,
}

#[derive(Debug)]
enum Entry {
    Here(Saved),
    #[cfg(feature = "cuda")]
    Offloaded(Offloaded),
}

impl Checkpoints {
    pub(crate) fn new(blocks: usize) -> Self {
        Self {
            entries: Vec::with_capacity(blocks),
            #[cfg(feature = "cuda")]
            leaving: None,
            #[cfg(feature = "cuda")]
            arriving: None,
        }
    }

    /// Takes what the next block kept.
    pub(crate) fn push(&mut self, saved: Option<Saved>, keep: Keep, workspace: &Workspace) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let (Keep::Offload, Some(gpu)) = (keep, workspace.gpu()) {
            self.settle()?;
            if let Some(Saved::Input(x)) = saved {
                let (offloaded, leaving) = gpu.offload(x)?;
                self.leaving = Some(leaving);
                self.entries.push(Some(Entry::Offloaded(offloaded)));
                return Ok(());
            }
        }
        let _ = (keep, workspace);
        self.entries.push(saved.map(Entry::Here));
        Ok(())
    }

    /// Frees the device memory of what is being copied out.
    pub(crate) fn settle(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Some(leaving) = self.leaving.take() {
            leaving.retire()?;
        }
        Ok(())
    }

    /// What the last block that is left kept. The one below it starts to come back.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::infallible_destructuring_match, reason = "one kind on the CPU"))]
    pub(crate) fn pop(&mut self) -> Result<Option<Saved>> {
        let Some(Some(entry)) = self.entries.pop() else { return Ok(None) };
        let saved = match entry {
            Entry::Here(saved) => saved,
            #[cfg(feature = "cuda")]
            Entry::Offloaded(offloaded) => {
                let arriving = match self.arriving.take() {
                    Some(arriving) => arriving,
                    None => offloaded.fetch()?,
                };
                Saved::Input(arriving.wait()?)
            }
        };
        #[cfg(feature = "cuda")]
        if let Some(Some(Entry::Offloaded(next))) = self.entries.last() {
            self.arriving = Some(next.fetch()?);
        }
        Ok(Some(saved))
    }
}
