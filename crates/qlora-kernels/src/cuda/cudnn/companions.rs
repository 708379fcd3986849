//! Libraries that cuDNN itself opens at run time. It ends the process when one of them is missing, so they are
//! looked for, and kept open, before cuDNN is asked for anything.

use std::env;
use std::path::{Path, PathBuf};

use libloading::Library;

use super::api::Api;
use crate::platform::HAS_DLLS;

/// Opens cuBLASLt and the run-time compiler; says which of them is missing.
pub(super) fn open(api: &Api) -> std::result::Result<(), String> {
    if HAS_DLLS {
        return Ok(());
    }
    let major = api.cuda_major();
    for name in [format!("libcublasLt.so.{major}"), format!("libnvrtc.so.{major}")] {
        let found = places(&api.path, major, &name).into_iter().any(|path| {
            // SAFETY: NVIDIA's libraries only set up their own state when they are loaded.
            let library = unsafe { Library::new(path) };
            // Kept open: cuDNN's own attempt then finds it by name, wherever it lies.
            library.map(std::mem::forget).is_ok()
        });
        if !found {
            return Err(format!("{name}, which cuDNN needs, cannot be opened"));
        }
    }
    Ok(())
}

/// The dynamic loader's paths, the packages beside cuDNN's own, and the CUDA toolkit.
fn places(cudnn: &str, major: usize, name: &str) -> Vec<PathBuf> {
    let mut places = vec![PathBuf::from(name)];
    if let Some(packages) = Path::new(cudnn).ancestors().nth(3).filter(|path| !path.as_os_str().is_empty()) {
        let folders = [format!("cu{major}/lib"), "cublas/lib".to_owned(), "cuda_nvrtc/lib".to_owned()];
        places.extend(folders.iter().map(|folder| packages.join(folder).join(name)));
    }
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os).map(PathBuf::from);
    for toolkit in toolkits.chain([PathBuf::from("/usr/local/cuda")]) {
        places.extend(["lib64", "targets/x86_64-linux/lib"].map(|folder| toolkit.join(folder).join(name)));
    }
    places
}
