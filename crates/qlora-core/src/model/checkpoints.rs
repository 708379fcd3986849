//! Storage of the blocks' saved activations between forward and backward, last in, first out.
//!
//! A block's saved activations may be offloaded: the large matrices then move to pinned host memory while the next
//! block runs, and come back while the block above runs its backward.

#[cfg(feature = "cuda")]
use std::sync::Arc;

use qlora_kernels::Workspace;
#[cfg(feature = "cuda")]
use qlora_kernels::cuda::{Arriving, Gpu, Leaving, Offloaded};

use super::block::{Keep, Saved};
use crate::error::Result;

/// One entry a block; none for the blocks below the first adapter, which have no backward.
#[derive(Debug)]
pub(crate) struct Checkpoints {
    entries: Vec<Option<Entry>>,
    #[cfg(feature = "cuda")]
    leaving: Vec<Leaving>,
    #[cfg(feature = "cuda")]
    arriving: Option<Vec<Arriving>>,
}

#[derive(Debug)]
enum Entry {
    Here(Saved),
    /// The activations that stayed on the device, with empty matrices for those that left, and the offloaded matrices.
    #[cfg(feature = "cuda")]
    Offloaded(Saved, Vec<Offloaded>),
}

impl Checkpoints {
    pub(crate) fn new(blocks: usize) -> Self {
        Self {
            entries: Vec::with_capacity(blocks),
            #[cfg(feature = "cuda")]
            leaving: Vec::new(),
            #[cfg(feature = "cuda")]
            arriving: None,
        }
    }

    /// Takes the activations that the next block saved.
    pub(crate) fn push(&mut self, saved: Option<Saved>, keep: Keep, workspace: &Workspace) -> Result<()> {
        // The block above the one that left has run: its copy is done, or nearly.
        self.settle()?;
        #[cfg(feature = "cuda")]
        let saved = match (workspace.gpu(), saved) {
            (Some(gpu), Some(saved)) if keep.is_offloaded() => return self.offload(saved, gpu, workspace),
            (_, saved) => saved,
        };
        let _ = (keep, workspace);
        self.entries.push(saved.map(Entry::Here));
        Ok(())
    }

    /// Starts to copy the large matrices to the host.
    #[cfg(feature = "cuda")]
    fn offload(&mut self, mut saved: Saved, gpu: &Arc<Gpu>, workspace: &Workspace) -> Result<()> {
        let mut offloaded = Vec::new();
        for matrix in saved.large() {
            let (there, leaving) = gpu.offload(std::mem::replace(matrix, workspace.matrix(0, 0)?))?;
            self.leaving.push(leaving);
            offloaded.push(there);
        }
        self.entries.push(Some(Entry::Offloaded(saved, offloaded)));
        Ok(())
    }

    /// Frees the device memory of matrices that are being copied out.
    pub(crate) fn settle(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        for leaving in self.leaving.drain(..) {
            leaving.retire()?;
        }
        Ok(())
    }

    /// Takes the saved activations of the last remaining block. The one below it starts to come back.
    #[cfg_attr(not(feature = "cuda"), allow(clippy::infallible_destructuring_match, reason = "one kind on the CPU"))]
    pub(crate) fn pop(&mut self) -> Result<Option<Saved>> {
        let Some(Some(entry)) = self.entries.pop() else { return Ok(None) };
        let saved = match entry {
            Entry::Here(saved) => saved,
            #[cfg(feature = "cuda")]
            Entry::Offloaded(mut saved, offloaded) => {
                let arriving = match self.arriving.take() {
                    Some(arriving) => arriving,
                    None => fetch(&offloaded)?,
                };
                for (matrix, arriving) in saved.large().into_iter().zip(arriving) {
                    *matrix = arriving.wait()?;
                }
                saved
            }
        };
        #[cfg(feature = "cuda")]
        if let Some(Some(Entry::Offloaded(_, next))) = self.entries.last() {
            self.arriving = Some(fetch(next)?);
        }
        Ok(Some(saved))
    }
}

#[cfg(feature = "cuda")]
fn fetch(offloaded: &[Offloaded]) -> Result<Vec<Arriving>> {
    offloaded.iter().map(|offloaded| Ok(offloaded.fetch()?)).collect()
}
