//! The function table of cuDNN's backend API, opened at run time, and the constants of that API that we use.
//!
//! The numbers are those of cuDNN 9's `cudnn_graph.h`; NVIDIA keeps them stable within a major version.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;

use libloading::Library;

use super::super::libraries::function_table;
use super::error::{CudnnError, Result};

/// `cudnnHandle_t`.
pub(super) type Handle = *mut c_void;
/// `cudnnBackendDescriptor_t`.
pub(super) type RawDescriptor = *mut c_void;
/// `cudaStream_t`.
pub(super) type Stream = *mut c_void;

/// `cudnnBackendDescriptorType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Kind {
    Pointwise = 0,
    Engine = 2,
    EngineConfig = 3,
    EngineHeuristics = 4,
    ExecutionPlan = 5,
    OperationPointwise = 13,
    OperationGraph = 15,
    VariantPack = 16,
    Tensor = 17,
    Matmul = 18,
    OperationMatmul = 19,
    Reduction = 21,
    OperationReduction = 22,
    OperationReshape = 31,
    DeviceProperties = 38,
}

/// `cudnnBackendAttributeName_t`.
pub(super) mod attribute {
    pub(crate) const POINTWISE_MODE: i32 = 0;
    pub(crate) const POINTWISE_MATH_PREC: i32 = 1;
    pub(crate) const POINTWISE_AXIS: i32 = 9;
    pub(crate) const ENGINEHEUR_MODE: i32 = 200;
    pub(crate) const ENGINEHEUR_OPERATION_GRAPH: i32 = 201;
    pub(crate) const ENGINEHEUR_RESULTS: i32 = 202;
    pub(crate) const ENGINEHEUR_DEVICEPROP: i32 = 204;
    pub(crate) const ENGINECFG_ENGINE: i32 = 300;
    pub(crate) const EXECUTION_PLAN_HANDLE: i32 = 400;
    pub(crate) const EXECUTION_PLAN_ENGINE_CONFIG: i32 = 401;
    pub(crate) const EXECUTION_PLAN_WORKSPACE_SIZE: i32 = 402;
    pub(crate) const EXECUTION_PLAN_DEVICEPROP: i32 = 407;
    pub(crate) const OPERATION_POINTWISE_PW_DESCRIPTOR: i32 = 750;
    pub(crate) const OPERATION_POINTWISE_XDESC: i32 = 751;
    pub(crate) const OPERATION_POINTWISE_BDESC: i32 = 752;
    pub(crate) const OPERATION_POINTWISE_YDESC: i32 = 753;
    pub(crate) const OPERATION_POINTWISE_TDESC: i32 = 758;
    pub(crate) const OPERATIONGRAPH_HANDLE: i32 = 800;
    pub(crate) const OPERATIONGRAPH_OPS: i32 = 801;
    pub(crate) const TENSOR_BYTE_ALIGNMENT: i32 = 900;
    pub(crate) const TENSOR_DATA_TYPE: i32 = 901;
    pub(crate) const TENSOR_DIMENSIONS: i32 = 902;
    pub(crate) const TENSOR_STRIDES: i32 = 903;
    pub(crate) const TENSOR_UNIQUE_ID: i32 = 906;
    pub(crate) const TENSOR_IS_VIRTUAL: i32 = 907;
    pub(crate) const TENSOR_IS_BY_VALUE: i32 = 908;
    pub(crate) const TENSOR_RAGGED_OFFSET_DESC: i32 = 913;
    pub(crate) const VARIANT_PACK_UNIQUE_IDS: i32 = 1000;
    pub(crate) const VARIANT_PACK_DATA_POINTERS: i32 = 1001;
    pub(crate) const VARIANT_PACK_WORKSPACE: i32 = 1003;
    pub(crate) const ENGINE_GLOBAL_INDEX: i32 = 1301;
    pub(crate) const MATMUL_COMP_TYPE: i32 = 1500;
    pub(crate) const OPERATION_MATMUL_ADESC: i32 = 1520;
    pub(crate) const OPERATION_MATMUL_BDESC: i32 = 1521;
    pub(crate) const OPERATION_MATMUL_CDESC: i32 = 1522;
    pub(crate) const OPERATION_MATMUL_DESC: i32 = 1523;
    pub(crate) const OPERATION_MATMUL_M_OVERRIDE_DESC: i32 = 1525;
    pub(crate) const OPERATION_MATMUL_N_OVERRIDE_DESC: i32 = 1526;
    pub(crate) const OPERATION_MATMUL_K_OVERRIDE_DESC: i32 = 1527;
    pub(crate) const REDUCTION_OPERATOR: i32 = 1600;
    pub(crate) const REDUCTION_COMP_TYPE: i32 = 1601;
    pub(crate) const OPERATION_REDUCTION_XDESC: i32 = 1610;
    pub(crate) const OPERATION_REDUCTION_YDESC: i32 = 1611;
    pub(crate) const OPERATION_REDUCTION_DESC: i32 = 1612;
    pub(crate) const OPERATION_RESHAPE_XDESC: i32 = 2200;
    pub(crate) const OPERATION_RESHAPE_YDESC: i32 = 2201;
    pub(crate) const DEVICEPROP_JSON_REPRESENTATION: i32 = 2702;
}

/// `cudnnBackendAttributeType_t`.
pub(super) mod kind_of_value {
    pub(crate) const HANDLE: i32 = 0;
    pub(crate) const DATA_TYPE: i32 = 1;
    pub(crate) const BOOLEAN: i32 = 2;
    pub(crate) const INT64: i32 = 3;
    pub(crate) const VOID_PTR: i32 = 6;
    pub(crate) const HEUR_MODE: i32 = 8;
    pub(crate) const POINTWISE_MODE: i32 = 14;
    pub(crate) const BACKEND_DESCRIPTOR: i32 = 15;
    pub(crate) const REDUCTION_OPERATOR: i32 = 18;
    pub(crate) const CHAR: i32 = 24;
}

/// `cudnnDataType_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum DataType {
    Float = 0,
    Half = 2,
    Int32 = 4,
    Bfloat16 = 9,
    Int64 = 10,
    Boolean = 11,
}

/// `cudnnPointwiseMode_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Pointwise {
    Add = 0,
    Mul = 1,
    Div = 6,
    Sub = 9,
    Exp = 13,
    Log = 15,
    Identity = 21,
    CmpGe = 303,
    CmpLt = 304,
    LogicalAnd = 400,
    GenIndex = 501,
    BinarySelect = 601,
}

/// `cudnnReduceTensorOp_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Reduce {
    Add = 0,
    Max = 3,
}

/// `cudnnBackendHeurMode_t`: `INSTANT`, `FALLBACK` and `A`.
pub(super) const HEURISTICS_INSTANT: i32 = 0;
pub(super) const HEURISTICS_FALLBACK: i32 = 2;
pub(super) const HEURISTICS_A: i32 = 3;

function_table! {
    /// The functions of cuDNN that we call. The library behind them stays loaded until the process ends.
    struct Api;
    get_version: "cudnnGetVersion" = fn() -> usize;
    get_cudart_version: "cudnnGetCudartVersion" = fn() -> usize;
    get_error_string: "cudnnGetErrorString" = fn(c_int) -> *const c_char;
    get_last_error_string: "cudnnGetLastErrorString" = fn(*mut c_char, usize) -> ();
    create: "cudnnCreate" = fn(*mut Handle) -> c_int;
    destroy: "cudnnDestroy" = fn(Handle) -> c_int;
    set_stream: "cudnnSetStream" = fn(Handle, Stream) -> c_int;
    create_descriptor: "cudnnBackendCreateDescriptor" = fn(c_int, *mut RawDescriptor) -> c_int;
    destroy_descriptor: "cudnnBackendDestroyDescriptor" = fn(RawDescriptor) -> c_int;
    finalize: "cudnnBackendFinalize" = fn(RawDescriptor) -> c_int;
    set_attribute: "cudnnBackendSetAttribute" = fn(RawDescriptor, c_int, c_int, i64, *const c_void) -> c_int;
    get_attribute: "cudnnBackendGetAttribute" = fn(RawDescriptor, c_int, c_int, i64, *mut i64, *mut c_void) -> c_int;
    execute: "cudnnBackendExecute" = fn(Handle, RawDescriptor, RawDescriptor) -> c_int;
}

impl Api {
    /// Opens the library at `path` (a file, or a bare name for the dynamic loader) and keeps it for good: cuDNN holds
    /// CUDA state whose release at an arbitrary moment is not safe, so it is never unloaded.
    pub(super) fn open(path: &Path) -> std::result::Result<&'static Self, libloading::Error> {
        // SAFETY: loading cuDNN runs its initialisers, which only set up its own state.
        let library = unsafe { Library::new(path)? };
        let api = Self::resolve(&library, path.display().to_string())?;
        std::mem::forget(library);
        Ok(Box::leak(Box::new(api)))
    }

    /// The version as one number: 9.19.0 is 91900.
    pub(super) fn version(&self) -> usize {
        // SAFETY: takes nothing, returns a number.
        unsafe { (self.get_version)() }
    }

    /// The major version of CUDA that the library was built for.
    pub(super) fn cuda_major(&self) -> usize {
        // SAFETY: takes nothing, returns a number.
        unsafe { (self.get_cudart_version)() / 1000 }
    }

    /// Turns a status into a result; `call` says what was attempted.
    pub(super) fn check(&self, status: c_int, call: impl FnOnce() -> String) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: cuDNN returns a pointer to a static string for every number.
        let name = unsafe { CStr::from_ptr((self.get_error_string)(status)) }.to_string_lossy().into_owned();
        let mut text = [0u8; 2048];
        // SAFETY: cuDNN writes at most the given number of bytes, including the final zero.
        unsafe { (self.get_last_error_string)(text.as_mut_ptr().cast::<c_char>(), text.len()) };
        let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
        let detail = String::from_utf8_lossy(&text[..end]).trim().to_owned();
        Err(CudnnError::Call { call: call(), status, name, detail })
    }
}
