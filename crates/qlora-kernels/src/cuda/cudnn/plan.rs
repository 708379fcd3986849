//! From a graph to something that can be run: heuristics, the execution plan, and its execution.

use std::ffi::c_void;

use super::api::{
    Api, HEURISTICS_A, HEURISTICS_FALLBACK, HEURISTICS_INSTANT, Handle, Kind, attribute as at, kind_of_value as kv,
};
use super::descriptor::Descriptor;
use super::error::{CudnnError, Result};
use super::graph::{Graph, Tensor};

/// The number of configurations of the heuristics that are tried before giving up.
const ATTEMPTS: usize = 8;

/// The target of a plan: a device that is present, or the description of one.
pub(super) enum Target {
    /// The device of a library handle.
    Handle(Handle),
    /// A device that is described only; nothing can be run.
    Properties(Descriptor),
}

impl Target {
    /// A description of a device, in cuDNN's JSON.
    pub(super) fn described(api: &'static Api, json: &str) -> Result<Self> {
        let mut properties = Descriptor::new(api, Kind::DeviceProperties)?;
        properties.set_text(at::DEVICEPROP_JSON_REPRESENTATION, json)?;
        properties.finalize()?;
        Ok(Self::Properties(properties))
    }
}

/// An execution plan with the descriptors that it was made from.
pub(super) struct Plan {
    api: &'static Api,
    plan: Descriptor,
    _config: Descriptor,
    _operations: Descriptor,
    _graph: Graph,
    workspace: usize,
    engine: i64,
}

impl Plan {
    /// Takes the first configuration that the heuristics offer and the library can build.
    pub(super) fn new(api: &'static Api, target: &Target, graph: Graph) -> Result<Self> {
        let mut operations = Descriptor::new(api, Kind::OperationGraph)?;
        operations.set_descriptors(at::OPERATIONGRAPH_OPS, &graph.operations())?;
        if let Target::Handle(handle) = target {
            operations.set_handle(at::OPERATIONGRAPH_HANDLE, *handle)?;
        }
        operations.finalize()?;

        let mut failure = None;
        for mode in [HEURISTICS_A, HEURISTICS_INSTANT, HEURISTICS_FALLBACK] {
            let configs = match heuristics(api, target, &operations, mode) {
                Ok(configs) => configs,
                Err(error) => {
                    failure.get_or_insert(error);
                    continue;
                }
            };
            for config in configs {
                match build(api, target, &config) {
                    Ok(plan) => {
                        let workspace = plan.get_i64(at::EXECUTION_PLAN_WORKSPACE_SIZE)?.max(0) as usize;
                        let engine = engine(&config)?;
                        return Ok(Self {
                            api,
                            plan,
                            _config: config,
                            _operations: operations,
                            _graph: graph,
                            workspace,
                            engine,
                        });
                    }
                    Err(error) => {
                        failure.get_or_insert(error);
                    }
                }
            }
        }
        Err(failure.unwrap_or_else(|| CudnnError::Unsupported("cuDNN offers no engine for this shape".to_owned())))
    }

    /// Bytes of device memory that an execution needs.
    pub(super) fn workspace(&self) -> usize {
        self.workspace
    }

    /// cuDNN's number of the engine.
    pub(super) fn engine(&self) -> i64 {
        self.engine
    }

    /// Launches the plan on the stream of `handle`.
    ///
    /// # Safety
    ///
    /// Every device tensor of the graph is bound to memory that is large enough for it, values are bound to host
    /// memory that lives until this function returns, and `workspace` has the promised size.
    pub(super) unsafe fn execute(
        &self,
        handle: Handle,
        bindings: &[(Tensor, *mut c_void)],
        workspace: *mut c_void,
    ) -> Result<()> {
        let uids: Vec<i64> = bindings.iter().map(|(tensor, _)| tensor.uid()).collect();
        let pointers: Vec<*mut c_void> = bindings.iter().map(|(_, pointer)| *pointer).collect();
        let mut pack = Descriptor::new(self.api, Kind::VariantPack)?;
        pack.set_i64(at::VARIANT_PACK_UNIQUE_IDS, &uids)?;
        pack.set_pointers(at::VARIANT_PACK_DATA_POINTERS, &pointers)?;
        pack.set_pointers(at::VARIANT_PACK_WORKSPACE, &[workspace])?;
        pack.finalize()?;
        // SAFETY: the plan and the pack are finalized; the caller vouches for the memory.
        let status = unsafe { (self.api.execute)(handle, self.plan.raw(), pack.raw()) };
        self.api.check(status, || "cudnnBackendExecute".to_owned())
    }
}

fn heuristics(api: &'static Api, target: &Target, operations: &Descriptor, mode: i32) -> Result<Vec<Descriptor>> {
    let mut heuristics = Descriptor::new(api, Kind::EngineHeuristics)?;
    heuristics.set_descriptors(at::ENGINEHEUR_OPERATION_GRAPH, &[operations.raw()])?;
    heuristics.set_enum(at::ENGINEHEUR_MODE, kv::HEUR_MODE, mode)?;
    if let Target::Properties(properties) = target {
        heuristics.set_descriptors(at::ENGINEHEUR_DEVICEPROP, &[properties.raw()])?;
    }
    heuristics.finalize()?;
    heuristics.get_descriptors(at::ENGINEHEUR_RESULTS, Kind::EngineConfig, ATTEMPTS)
}

fn build(api: &'static Api, target: &Target, config: &Descriptor) -> Result<Descriptor> {
    let mut plan = Descriptor::new(api, Kind::ExecutionPlan)?;
    plan.set_descriptors(at::EXECUTION_PLAN_ENGINE_CONFIG, &[config.raw()])?;
    match target {
        Target::Handle(handle) => plan.set_handle(at::EXECUTION_PLAN_HANDLE, *handle)?,
        Target::Properties(properties) => {
            plan.set_descriptors(at::EXECUTION_PLAN_DEVICEPROP, &[properties.raw()])?;
        }
    }
    plan.finalize()?;
    Ok(plan)
}

/// Number of the engine of a configuration.
fn engine(config: &Descriptor) -> Result<i64> {
    let engines = config.get_descriptors(at::ENGINECFG_ENGINE, Kind::Engine, 1)?;
    engines.first().map_or(Ok(-1), |engine| engine.get_i64(at::ENGINE_GLOBAL_INDEX))
}
