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
use qlora_kernels::weight::packed::PackedForm;

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
        if kind == PlacementKind::Resident {
            return Ok(kind);
        }
        // Words for what cannot travel, and for what is missing, before anything is loaded.
        let memory = BaseMemory::predict(&self.forms()?, kind, comm.rank(), comm.size());
        let hosts = hosts(comm)?;
        if kind == PlacementKind::Sharded
            && let Some(rank) = hosts.iter().position(|host| *host != hosts[0])
        {
            return Err(Error::Invalid(format!(
                "base_placement = \"sharded\": rank {rank} is on another host than rank 0, and shares are read within one: take \"streamed\""
            )));
        }
        let copies = hosts.iter().filter(|host| **host == hosts[comm.rank()]).count() as u64;
        let there = available_memory().filter(|_| !self.workspace.device().is_cpu());
        check_host(&memory, copies, there)?;
        tracing::info!(%memory, "placement of the base");
        Ok(kind)
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
        let mine = self.fitting(there, available_memory().unwrap_or(u64::MAX), comm.rank(), comm.size())?;
        // The smallest of the cards decides for all.
        let order = [PlacementKind::Resident, PlacementKind::Sharded, PlacementKind::Streamed];
        let place = |kind| order.iter().position(|&of| of == kind).unwrap_or(0);
        let all = exchange(comm, "placement of the base", &place(mine))?;
        let chosen = order[all.into_iter().max().unwrap_or(0).min(order.len() - 1)];
        let is_one_host = chosen != PlacementKind::Sharded || hosts(comm)?.windows(2).all(|pair| pair[0] == pair[1]);
        if !is_one_host {
            return Ok(PlacementKind::Streamed);
        }
        Ok(chosen)
    }

    /// The first placement with which the leanest step fits `there` bytes of a device, and the host's copies `host` bytes. Whole if none
    /// does, or none other is possible: planning then says what that takes.
    fn fitting(&self, there: u64, host: u64, rank: usize, ranks: usize) -> Result<PlacementKind> {
        let options = &self.config.training;
        let batch = largest_batch_of(self.config, self.training)?;
        let model = self.source.config();
        let state = 4 * self.layout.len() + Optimizer::bytes_for(options, self.layout.len());
        let whole = weights_in_training(model, self.held, self.config.model.offload_embedding);
        let dtype = self.workspace.dtype();
        let Ok(forms) = self.forms() else { return Ok(PlacementKind::Resident) };
        let fits = |kind: PlacementKind| {
            let memory = BaseMemory::predict(&forms, kind, rank, ranks);
            let resident = whole.saturating_sub(memory.whole) + memory.on_device() + state as u64;
            let attention = AttentionWorkspace::of_own_kernels(model, batch.tokens);
            let planner = Planner::from_config(model, self.layout, dtype, batch, attention, resident);
            let leanest = planner.with_context_parallel(options.context_parallel_size).leanest();
            // As `Pool::plannable`: a share is one piece beside the pool.
            let beside = if kind == PlacementKind::Sharded { memory.own } else { 0 };
            let budget = beside + there.saturating_sub(beside) / 100 * 93;
            // Every rank of the host has its own copy there.
            let has_host = memory.host.saturating_mul(ranks as u64) <= host / 10 * 9;
            tracing::debug!(?kind, %memory, peak = leanest.peak, budget, has_host, "placement of the base");
            leanest.peak <= budget && has_host
        };
        let kinds = [PlacementKind::Resident, PlacementKind::Sharded, PlacementKind::Streamed];
        let possible = kinds.into_iter().filter(|&kind| kind != PlacementKind::Sharded || ranks > 1);
        Ok(possible.into_iter().find(|&kind| fits(kind)).unwrap_or_default())
    }

    fn forms(&self) -> Result<Vec<Vec<PackedForm>>> {
        let dtype = (!self.workspace.device().is_cpu()).then(|| self.workspace.dtype());
        Ok(forms(self.source, self.quantization, dtype)?)
    }
}

/// The host of each rank.
fn hosts(comm: &mut dyn Communicator) -> Result<Vec<String>> {
    // The kernel's name for its own start: containers of one host share it.
    let mine = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    exchange(comm, "hosts", &mine)
}

/// Whether `there` bytes of host memory hold the base of each of `copies` ranks, where it is there.
fn check_host(memory: &BaseMemory, copies: u64, there: Option<u64>) -> Result<()> {
    let Some(there) = there.filter(|there| memory.host.saturating_mul(copies) > there / 100 * 95) else {
        return Ok(());
    };
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let of_ranks = if copies > 1 { format!(" for each of {copies} ranks") } else { String::new() };
    Err(Error::Invalid(format!(
        "base_placement = \"streamed\" needs {:.1} GB of host memory{of_ranks}, and {:.1} GB are there: start fewer ranks, or take \"sharded\"",
        gb(memory.host),
        gb(there)
    )))
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use qlora_core::config::ModelConfig;
    use qlora_core::source::PlainTensor;
    use qlora_kernels::quant::QuantConfig;

    use super::*;
    use crate::config::{Optim, Targets};
    use crate::data::{Dataset, Encoded};
    use crate::session::lora_config;

    /// The description of a model without its weights.
    #[derive(Debug)]
    struct Described(ModelConfig);

    impl WeightSource for Described {
        fn config(&self) -> &ModelConfig {
            &self.0
        }

        fn path(&self) -> &Path {
            Path::new("described")
        }

        fn file_of(&self, _: &str) -> Option<&Path> {
            None
        }

        fn names(&self) -> Vec<String> {
            Vec::new()
        }

        fn shape(&self, _: &str) -> Option<Vec<usize>> {
            None
        }

        fn read(&self, name: &str) -> qlora_core::Result<PlainTensor> {
            Err(qlora_core::Error::tensor(name, "is not there"))
        }
    }

    /// Llama 3.1 70B.
    fn shape_70b() -> ModelConfig {
        let text = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256,
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": false}"#;
        ModelConfig::from_json(text, Path::new("config.json")).unwrap()
    }

    #[test]
    fn the_first_placement_that_fits_is_taken() {
        let mut config = TrainConfig::default();
        config.lora.target_modules = Targets::Pattern("all-linear".to_owned());
        config.model.offload_embedding = true;
        config.training.optim = Optim::Adamw8bit;
        config.training.per_device_train_batch_size = 1;
        config.data.max_length = 2048;
        let source = Described(shape_70b());
        let layout = AdapterLayout::for_model(&lora_config(&config.lora).unwrap(), &source.0).unwrap();
        let document = Encoded { ids: vec![1; 2048], trained: vec![true; 2048] };
        let training = Dataset::from_encoded([document.clone(), document]).unwrap().into();
        let workspace = Workspace::cpu();
        let quant = QuantConfig::default();
        let placing = Placing {
            config: &config,
            source: &source,
            quantization: Quantization::Bits4(quant),
            held: &TrainedOver::Bits4 { config: quant, stored: false },
            layout: &layout,
            workspace: &workspace,
            training: &training,
        };
        let of = |gb: f64, host_gb: f64, ranks: usize| {
            placing.fitting((gb * 1e9) as u64, (host_gb * 1e9) as u64, 0, ranks).unwrap()
        };
        use PlacementKind::{Resident, Sharded, Streamed};
        assert_eq!(of(80.0, 500.0, 1), Resident);
        assert_eq!(of(80.0, 500.0, 2), Resident);
        assert_eq!(of(30.0, 500.0, 1), Streamed);
        assert_eq!(of(30.0, 500.0, 2), Sharded);
        assert_eq!(of(16.0, 500.0, 2), Streamed);
        // Neither the cards nor the host hold it: planning says what is missing.
        assert_eq!(of(30.0, 30.0, 1), Resident);
        assert_eq!(of(16.0, 60.0, 2), Resident);
        assert_eq!(of(16.0, 500.0, 8), Sharded);
        let memory = BaseMemory::predict(&placing.forms().unwrap(), Streamed, 0, 1);
        check_host(&memory, 1, Some(40_000_000_000)).unwrap();
        check_host(&memory, 2, None).unwrap();
        let error = check_host(&memory, 2, Some(64_000_000_000)).unwrap_err().to_string();
        assert!(error.contains("needs 35.3 GB of host memory for each of 2 ranks, and 64.0 GB are there"), "{error}");
        let other = Placing { quantization: Quantization::Int8, ..placing };
        assert_eq!(other.fitting(30_000_000_000, u64::MAX, 0, 2).unwrap(), Resident);
    }
}
