//! The functions of NCCL that we call, opened at run time.
//!
//! Signatures and numbers are those of `nccl.h`, whose C ABI NVIDIA keeps stable from 2.18 on.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::Library;

use super::super::libraries::{folders, function_table};
use crate::error::{Error, Result};

/// `ncclComm_t`.
pub(super) type Comm = *mut c_void;

/// `ncclUniqueId`, which is passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; super::ID_BYTES]);

/// The first fields of `ncclConfig_t`, which have not changed since 2.17: the library reads as many bytes as `size` says, and
/// gives what `version` did not have yet its defaults.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
}

impl Config {
    /// Calls return before they are done, so that one that never will can be given up.
    pub(super) fn nonblocking() -> Self {
        /// "Not set".
        const DEFAULT: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: DEFAULT,
            min_ctas: DEFAULT,
            max_ctas: DEFAULT,
            net_name: std::ptr::null(),
            split_share: DEFAULT,
            traffic_class: DEFAULT,
        }
    }
}

/// `ncclSuccess`, `ncclInProgress`.
pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclUint8`, `ncclFloat32`, `ncclSum`.
pub(super) const BYTES: c_int = 1;
pub(super) const F32: c_int = 7;
pub(super) const SUM: c_int = 0;

/// Names the library, or the directory that holds it, and goes before all other places.
const VARIABLE: &str = "QLORA_NCCL_PATH";
/// The name that the loader knows the library by, whatever its version.
const FILE: &str = "libnccl.so.2";
/// 2.18, the first whose communicators can be given up while they are made.
const OLDEST: c_int = 21_800;

function_table! {
    /// The functions. The library behind them stays loaded until the process ends.
    struct Api;
    get_version: "ncclGetVersion" = fn(*mut c_int) -> c_int;
    get_unique_id: "ncclGetUniqueId" = fn(*mut UniqueId) -> c_int;
    init_rank: "ncclCommInitRankConfig" = fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
    all_reduce: "ncclAllReduce" = fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    send: "ncclSend" = fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    recv: "ncclRecv" = fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    group_start: "ncclGroupStart" = fn() -> c_int;
    group_end: "ncclGroupEnd" = fn() -> c_int;
    async_error: "ncclCommGetAsyncError" = fn(Comm, *mut c_int) -> c_int;
    abort: "ncclCommAbort" = fn(Comm) -> c_int;
    error_string: "ncclGetErrorString" = fn(c_int) -> *const c_char;
    last_error: "ncclGetLastError" = fn(Comm) -> *const c_char;
}

const OP: &str = "NCCL";

impl Api {
    /// The library, opened once.
    pub(super) fn get() -> Result<&'static Self> {
        static OPENED: OnceLock<std::result::Result<Api, String>> = OnceLock::new();
        OPENED.get_or_init(open).as_ref().map_err(|why| Error::invalid(OP, why.clone()))
    }

    /// The version as one number: 2.28.9 is 22809.
    pub(super) fn version(&self) -> c_int {
        let mut version = 0;
        // SAFETY: a valid place for the result.
        unsafe { (self.get_version)(&mut version) };
        version
    }

    /// The meaning of a status, with the cause if the library knows one. `comm` may be null.
    pub(super) fn describe(&self, call: &str, status: c_int, comm: Comm) -> Error {
        // SAFETY: both return pointers to texts that stay; the second takes null or a live communicator.
        let (name, cause) = unsafe { (text((self.error_string)(status)), text((self.last_error)(comm))) };
        let cause = if cause.is_empty() { String::new() } else { format!(": {cause}") };
        Error::invalid(OP, format!("{call} failed with {name} ({status}){cause}; NCCL_DEBUG=INFO says more"))
    }
}

/// # Safety
/// Null, or a text with a final zero.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: as the caller promises.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
}

fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        return vec![if path.is_dir() { path.join(FILE) } else { path }];
    }
    let found = folders("nccl").into_iter().map(|folder| folder.join(FILE)).filter(|path| path.is_file());
    found.chain([PathBuf::from(FILE)]).collect()
}

fn open() -> std::result::Result<Api, String> {
    let mut tried = Vec::new();
    for path in candidates() {
        match open_at(&path) {
            Ok(api) => return Ok(api),
            Err(why) => tried.push(format!("{}: {why}", path.display())),
        }
    }
    Err(format!(
        "{FILE}, which adds gradients between GPUs, cannot be used: {}. `pip install nvidia-nccl-cu13` brings it; {VARIABLE} \
         names a library or its folder",
        tried.join("; ")
    ))
}

fn open_at(path: &Path) -> std::result::Result<Api, String> {
    // SAFETY: loading NCCL runs its initialisers, which only set up its own state.
    let library = unsafe { Library::new(path) }.map_err(|error| error.to_string())?;
    let api = Api::resolve(&library, path.display().to_string()).map_err(|error| error.to_string())?;
    // Its threads may outlive every communicator.
    std::mem::forget(library);
    match api.version() {
        version if version < OLDEST => Err(format!("NCCL {} is older than 2.18", super::version_text(version))),
        _ => Ok(api),
    }
}
