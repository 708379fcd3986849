//! The choice of the activations that a run keeps or recomputes, for its data and the available memory.

use qlora_core::model::plan::{AttentionWorkspace, available_memory};
use qlora_core::model::{BatchShape, MemoryPlan, Planner};
#[cfg(feature = "cuda")]
use qlora_kernels::cuda::Gpu;
#[cfg(feature = "cuda")]
use qlora_kernels::weight::FrozenCompute;

use super::Session;
use crate::comm::{exchange, or_tell_all};
use crate::config::{GradientCheckpointing, TrainConfig};
use crate::data::{LargestBatch, LoaderOptions, TrainingData};
use crate::error::Result;

impl Session {
    /// Chooses what each block keeps for its backward, for the largest batch of the run and the memory there is, and
    /// applies it. On the CPU there is no plan to show: blocks keep their activations if half of the free memory holds
    /// them. The same data is planned for once.
    ///
    /// # Errors
    /// If the data cannot be batched, or even the leanest plan needs more memory than there is; the message says how
    /// much.
    pub fn plan_memory(&mut self, training: &TrainingData) -> Result<Option<MemoryPlan>> {
        let planned = self.plan_of(training);
        let planned = or_tell_all(&mut *self.comm, planned)?;
        if self.comm.size() > 1 {
            let peak = planned.as_ref().map(|plan| plan.peak);
            self.peaks = exchange(&mut *self.comm, "planned peaks", &peak)?;
        }
        Ok(planned)
    }

    /// The peak that is predicted of each rank's memory, where they differ, for a line at the start of the run; once memory is planned.
    pub fn peaks_note(&self) -> Option<String> {
        let peaks: Vec<u64> = self.peaks.iter().copied().collect::<Option<_>>()?;
        let shown = |peak: &u64| format!("{:.2}", *peak as f64 / 1e9);
        let differ = peaks.iter().any(|peak| shown(peak) != shown(&peaks[0]));
        differ.then(|| {
            format!("predicted peaks of the ranks: {} GB", peaks.iter().map(shown).collect::<Vec<_>>().join(", "))
        })
    }

    fn plan_of(&mut self, training: &TrainingData) -> Result<Option<MemoryPlan>> {
        let batch = self.largest_batch(training)?;
        if let Some((_, plan)) = self.planned.as_ref().filter(|(of, _)| *of == batch) {
            return Ok(plan.clone());
        }
        let plan = self.plan_for(batch)?;
        self.planned = Some((batch, plan.clone()));
        Ok(plan)
    }

    fn plan_for(&mut self, batch: BatchShape) -> Result<Option<MemoryPlan>> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.model.workspace().gpu().cloned() {
            let host = self.share_of_host()?;
            let plan = self.fastest_on(&gpu, batch, host)?;
            let plan = self.agreed(&gpu, plan)?;
            self.fp8_gain = self.expected_gain_of_fp8(&gpu, batch, &plan);
            self.model.apply_plan(&plan)?;
            gpu.expect_tokens(batch.tokens.div_ceil(self.model.context_ranks()));
            tracing::debug!(%plan, "memory");
            return Ok(Some(plan));
        }
        let recompute = match self.config.training.gradient_checkpointing {
            GradientCheckpointing::On => true,
            GradientCheckpointing::Off => false,
            GradientCheckpointing::Auto => {
                let planner = Planner::new(&self.model, batch, AttentionWorkspace::default(), 0)?;
                let free = available_memory().unwrap_or(0) / 2;
                planner.plan_keeping(free).is_err()
            }
        };
        let recompute = match self.model.context_ranks() {
            1 => recompute,
            // A block that is computed again exchanges again.
            _ => exchange(&mut *self.comm, "recomputation", &recompute)?.contains(&true),
        };
        self.model.set_gradient_checkpointing(recompute)?;
        tracing::info!(recompute, "blocks on the CPU");
        Ok(None)
    }

    /// Half of the host's free memory by the ranks on it, where ranks share micro-batches: long sequences go to the host on all of them.
    #[cfg(feature = "cuda")]
    fn share_of_host(&mut self) -> Result<Option<u64>> {
        let context = self.model.context_ranks();
        let Some(free) = available_memory().filter(|_| context > 1) else { return Ok(None) };
        let mine = crate::comm::tcp::host();
        let here = exchange(&mut *self.comm, "hosts", &mine)?.into_iter().filter(|host| *host == mine).count();
        // A plan without other ranks is one for all on this host.
        Ok(Some(free / 2 / if self.comm.size() == 1 { context } else { here } as u64))
    }

    /// The plan of all ranks, where some share micro-batches: a block that is computed again exchanges again, so they have to keep the
    /// same. Of the ranks' own plans it is the one with the lowest peak.
    #[cfg(feature = "cuda")]
    fn agreed(&mut self, gpu: &Gpu, plan: MemoryPlan) -> Result<MemoryPlan> {
        if self.model.context_ranks() == 1 {
            return Ok(plan);
        }
        let budget = plan.budget;
        let plans = exchange(&mut *self.comm, "memory plans", &(plan, gpu.attention().enabled()))?;
        let leanest = plans.into_iter().min_by_key(|(plan, _)| plan.peak);
        let (plan, library) = leanest.expect("this rank's is one of them");
        gpu.attention().set_enabled(library);
        Ok(MemoryPlan { budget, ..plan })
    }

    /// The fastest plan, with cuDNN's attention or, where its workspace costs more than it gains, without. `host`: the pinned memory that
    /// it may take, if that is not what the planner assumes.
    #[cfg(feature = "cuda")]
    fn fastest_on(&self, gpu: &std::sync::Arc<Gpu>, batch: BatchShape, host: Option<u64>) -> Result<MemoryPlan> {
        let options = &self.config.training;
        let budget = gpu.pool().plannable(options.memory_budget.map(|budget| (budget * 1e9) as u64))?;
        let plan = |planner: &Planner| chosen(options.gradient_checkpointing, planner, budget);
        let rates = self.rates(gpu)?;
        let planner = || {
            let planner = Planner::on_gpu(&self.model, batch, self.optimizer_bytes())?.with_rates(rates);
            Ok::<_, qlora_core::Error>(match host {
                Some(bytes) => planner.with_host_memory(bytes),
                None => planner,
            })
        };
        let library = gpu.attention();
        if !library.enabled() {
            return Ok(plan(&planner()?)?);
        }
        let with = plan(&planner()?);
        library.set_enabled(false);
        let own = planner()?;
        let without = plan(&own);
        let prefers_own = match (&with, &without) {
            (Ok(with), Ok(without)) => without.overhead_us + own.own_attention_us() < with.overhead_us,
            (Err(_), _) => true,
            (Ok(_), Err(_)) => false,
        };
        library.set_enabled(!prefers_own);
        Ok(if prefers_own { without? } else { with? })
    }

    /// How many times as fast as by `plan` a step is expected to be in fp8; none where it is in fp8 already, or cannot be.
    #[cfg(feature = "cuda")]
    fn expected_gain_of_fp8(&self, gpu: &std::sync::Arc<Gpu>, batch: BatchShape, plan: &MemoryPlan) -> Option<f64> {
        let dora = self.model.adapter().is_some_and(|adapter| adapter.config().use_dora);
        let there = self.model.frozen_compute() == FrozenCompute::Fp8;
        if there || dora || !self.model.has_fp8_layers() || gpu.check_fp8().is_err() {
            return None;
        }
        let planner = Planner::on_gpu(&self.model, batch, self.optimizer_bytes()).ok()?;
        let fp8 = planner.clone().with_frozen_compute(FrozenCompute::Fp8);
        let faster = chosen(self.config.training.gradient_checkpointing, &fp8, plan.budget).ok()?;
        Some(planner.expected_speed(plan).seconds / fp8.expected_speed(&faster).seconds)
    }

    /// The rates that plans are ranked with: those of the GPU's model in the table of cards, corrected by a measurement. With
    /// `full_determinism` the table alone counts: a plan decides in which order some sums are made, and a run that is resumed must
    /// not plan otherwise because the GPU was warm. Without, a measurement takes effect in coarse steps only
    /// ([`Rates::corrected`](qlora_core::card::Rates::corrected)).
    #[cfg(feature = "cuda")]
    fn rates(&self, gpu: &std::sync::Arc<Gpu>) -> Result<qlora_core::card::Rates> {
        use qlora_core::card::{Card, MeasuredRates};

        let card = Card::of_gpu(gpu)?;
        if gpu.deterministic() {
            return Ok(card.rates());
        }
        let measured = match gpu.measure_rates() {
            Ok(rates) => MeasuredRates { products: rates.products, memory: rates.memory, host: rates.host },
            Err(error) => {
                tracing::debug!(%error, "rates were not measured");
                MeasuredRates::default()
            }
        };
        let rates = card.rates().corrected(measured);
        tracing::info!(card = card.name, ?measured, ?rates, "rates for the plan");
        Ok(rates)
    }

    fn largest_batch(&self, training: &TrainingData) -> Result<BatchShape> {
        largest_batch_of(&self.config, training)
    }

    /// The longest single sequence that a step fits into the memory there is, with the leanest plan; none on the CPU.
    ///
    /// # Errors
    /// If the device fails.
    pub fn longest_sequence(&self) -> Result<Option<usize>> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = self.model.workspace().gpu() {
            let options = &self.config.training;
            let budget = gpu.pool().plannable(options.memory_budget.map(|budget| (budget * 1e9) as u64))?;
            let state = self.optimizer_bytes();
            let planner_of = |tokens: usize| Planner::on_gpu(&self.model, BatchShape::uniform(1, tokens), state);
            let limit = self.model.config().max_position_embeddings;
            return Ok(Some(Planner::longest_sequence(limit, budget, planner_of)?));
        }
        Ok(None)
    }

    /// Gradient and moments, which are not there yet; the adapter's values are.
    #[cfg(feature = "cuda")]
    fn optimizer_bytes(&self) -> u64 {
        let trainable = self.model.adapter().map_or(0, |adapter| adapter.layout().len());
        crate::optimizer::Optimizer::bytes_for(&self.config.training, trainable) as u64
    }
}

/// The largest micro-batch that the configured steps over these data will have.
pub(super) fn largest_batch_of(config: &TrainConfig, training: &TrainingData) -> Result<BatchShape> {
    let options = LoaderOptions::from(config);
    let LargestBatch { tokens, trained_tokens, sequences, uniform_len } = training.largest_batch(config)?;
    // Of packed documents the bins count: those of other batches are filled in other ways.
    let sequences = options.packing.map_or(sequences, |_| options.batch_size);
    Ok(BatchShape { tokens, uniform_len, sequences, trained_tokens })
}

/// The plan that the configuration asks for.
pub(super) fn chosen(
    checkpointing: GradientCheckpointing,
    planner: &Planner,
    budget: u64,
) -> qlora_core::Result<MemoryPlan> {
    match checkpointing {
        GradientCheckpointing::Auto => planner.plan(budget),
        GradientCheckpointing::On => planner.plan_recomputing(budget),
        GradientCheckpointing::Off => planner.plan_keeping(budget),
    }
}
