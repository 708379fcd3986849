//! The choice of where the frozen base is, before it is loaded.

use qlora_core::adapter::TrainedOver;
use qlora_core::inspect::weights_in_training;
use qlora_core::lora::AdapterLayout;
use qlora_core::model::Planner;
use qlora_core::model::placement::forms;
use qlora_core::model::plan::{AttentionWorkspace, available_memory};
use qlora_core::model::{BaseMemory, PlacementKind, Quantization};
use qlora_core::source::WeightSource;
use qlora_kernels::Workspace;

use super::plan::largest_batch_of;
use crate::comm::{Communicator, exchange};
use crate::config::{BasePlacement, TrainConfig};
use crate::data::TrainingData;
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;

/// A run whose base is about to be loaded.
pub(super) struct Placing<'a> {
    pub(super) config: &'a TrainConfig,
    pub(super) source: &'a dyn WeightSource,
    pub(super) quantization: Quantization,
    pub(super) held: &'a TrainedOver,
    pub(super) layout: &'a AdapterLayout,
    pub(super) workspace: &'a Workspace,
    pub(super) training: &'a TrainingData,
}

impl Placing<'_> {
    /// The placement of the configuration; where it says `auto`, the first of whole, sharded and streamed with which the leanest step
    /// fits the memory of every rank. The same on all ranks.
    ///
    /// # Errors
    /// If the configured one is not possible.
    pub(super) fn choose(&self, comm: &mut dyn Communicator) -> Result<PlacementKind> {
        let asked = self.config.model.base_placement;
        let kind = match asked {
            BasePlacement::Resident => return Ok(PlacementKind::Resident),
            BasePlacement::Streamed => PlacementKind::Streamed,
            BasePlacement::Sharded if comm.size() == 1 => {
                return Err(Error::Invalid(
                    "base_placement = \"sharded\" shares the base between several ranks, and this is one: start one for each GPU \
                     (--nproc-per-node auto), or take \"streamed\""
                        .to_owned(),
                ));
            }
            BasePlacement::Sharded => PlacementKind::Sharded,
            BasePlacement::Auto => self.first_that_fits(comm)?,
        };
        if kind == PlacementKind::Sharded
            && let Err(why) = one_host(comm)?
        {
            return Err(Error::Invalid(format!("base_placement = \"sharded\": {why}: take \"streamed\"")));
        }
        if kind != PlacementKind::Resident {
            tracing::info!(memory = %self.memory(kind, comm)?, "placement of the base");
        }
        Ok(kind)
    }

    /// The bytes of a placed base on this rank.
    ///
    /// # Errors
    /// If the base cannot be placed otherwise than whole.
    pub(super) fn memory(&self, kind: PlacementKind, comm: &dyn Communicator) -> Result<BaseMemory> {
        let dtype = (!self.workspace.device().is_cpu()).then(|| self.workspace.dtype());
        let forms = forms(self.source, self.quantization, dtype)?;
        Ok(BaseMemory::predict(&forms, kind, comm.rank(), comm.size()))
    }

    /// Bytes of the GPU's memory that a run may take; none on the CPU, where a base is whole unless it is said otherwise.
    fn device_bytes(&self) -> Result<Option<u64>> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.workspace.gpu() {
            let budget = self.config.training.memory_budget.map_or(u64::MAX, |budget| (budget * 1e9) as u64);
            return Ok(Some(budget.min(gpu.pool().used()? + gpu.pool().available()?)));
        }
        Ok(None)
    }

    fn first_that_fits(&self, comm: &mut dyn Communicator) -> Result<PlacementKind> {
        let Some(there) = self.device_bytes()? else { return Ok(PlacementKind::Resident) };
        let options = &self.config.training;
        let batch = largest_batch_of(self.config, self.training)?;
        let model = self.source.config();
        let state = 4 * self.layout.len() + Optimizer::bytes_for(options, self.layout.len());
        let whole = weights_in_training(model, self.held, self.config.model.offload_embedding);
        let ranks = comm.size() as u64;
        let fits = |kind: PlacementKind| -> Result<bool> {
            let memory = self.memory(kind, comm)?;
            let resident = whole.saturating_sub(memory.whole) + memory.on_device() + state as u64;
            let attention = AttentionWorkspace::of_own_kernels(model, batch.tokens);
            let dtype = self.workspace.dtype();
            let planner = Planner::from_config(model, self.layout, dtype, batch, attention, resident);
            let leanest = planner.with_context_parallel(options.context_parallel_size).leanest();
            // As `Pool::plannable`: a share is one piece beside the pool.
            let beside = if kind == PlacementKind::Sharded { memory.own } else { 0 };
            let budget = beside + there.saturating_sub(beside) / 100 * 93;
            // Every rank of the host has its own copy there.
            let has_host = available_memory().is_none_or(|bytes| memory.host.saturating_mul(ranks) <= bytes / 10 * 9);
            tracing::debug!(?kind, %memory, peak = leanest.peak, budget, has_host, "placement of the base");
            Ok(leanest.peak <= budget && has_host)
        };
        // A base that cannot be placed otherwise is whole, and planning says what that takes.
        let mut mine = PlacementKind::Resident;
        if self.memory(PlacementKind::Streamed, comm).is_ok() && !fits(PlacementKind::Resident)? {
            let others: &[PlacementKind] = match comm.size() {
                1 => &[PlacementKind::Streamed],
                _ => &[PlacementKind::Sharded, PlacementKind::Streamed],
            };
            for &kind in others {
                if mine == PlacementKind::Resident && fits(kind)? {
                    mine = kind;
                }
            }
        }
        // The smallest of the cards decides for all.
        let order = [PlacementKind::Resident, PlacementKind::Sharded, PlacementKind::Streamed];
        let place = |kind| order.iter().position(|&of| of == kind).unwrap_or(0);
        let all = exchange(comm, "placement of the base", &place(mine))?;
        let chosen = order[all.into_iter().max().unwrap_or(0).min(order.len() - 1)];
        if chosen == PlacementKind::Sharded && one_host(comm)?.is_err() {
            return Ok(PlacementKind::Streamed);
        }
        Ok(chosen)
    }
}

/// Whether all ranks are on one host; if not, which is not.
fn one_host(comm: &mut dyn Communicator) -> Result<std::result::Result<(), String>> {
    // The kernel's name for its own start: containers of one host share it.
    let mine = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hosts = exchange(comm, "hosts", &mine)?;
    let other = (1..hosts.len()).find(|&rank| hosts[rank] != hosts[0]);
    Ok(other.map_or(Ok(()), |rank| {
        Err(format!("rank {rank} is on another host than rank 0, and shares are read within one"))
    }))
}

/// The bytes of weights on a card on which a base is streamed, of `weights` in all.
///
/// # Errors
/// If it cannot be streamed.
pub(super) fn streamed_weights(source: &dyn WeightSource, quantization: Quantization, weights: u64) -> Result<u64> {
    let forms = forms(source, quantization, None)?;
    let memory = BaseMemory::predict(&forms, PlacementKind::Streamed, 0, 1);
    Ok(weights.saturating_sub(memory.whole) + memory.slots)
}
