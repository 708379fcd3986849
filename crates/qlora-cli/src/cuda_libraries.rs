//! The libraries of NVIDIA's that a program built with CUDA 13 uses, and what brings them.

use std::path::PathBuf;

use qlora::kernels::libraries::LibrarySearch;

/// A library that comes with the toolkit or with one of NVIDIA's Python packages.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CudaLibrary {
    /// The name that the loader asks for.
    pub(crate) file: &'static str,
    /// Its folder below `nvidia/` among Python's packages.
    pub(crate) folder: &'static str,
    /// The Python package, with the versions that have this file.
    package: &'static str,
}

/// What the program is linked to; it does not start without. `scripts/dist.sh` checks that a program needs no other.
#[cfg(not(feature = "cuda"))]
pub(crate) static LINKED: [CudaLibrary; 4] = [
    CudaLibrary { file: "libcudart.so.13", folder: "cu13", package: "nvidia-cuda-runtime==13.*" },
    CudaLibrary { file: "libcublas.so.13", folder: "cu13", package: "nvidia-cublas==13.*" },
    CudaLibrary { file: "libcublasLt.so.13", folder: "cu13", package: "nvidia-cublas==13.*" },
    CudaLibrary { file: "libcurand.so.10", folder: "cu13", package: "nvidia-curand==10.*" },
];

/// What is opened when it is there: by the program (cuDNN's attention, NCCL between several GPUs), and by cuDNN.
pub(crate) static OPENED: [CudaLibrary; 3] = [
    CudaLibrary { file: "libnvrtc.so.13", folder: "cu13", package: "nvidia-cuda-nvrtc==13.*" },
    CudaLibrary { file: "libcudnn.so.9", folder: "cudnn", package: "nvidia-cudnn-cu13==9.*" },
    CudaLibrary { file: "libnccl.so.2", folder: "nccl", package: "nvidia-nccl-cu13==2.*" },
];

impl CudaLibrary {
    /// The file, if it is there.
    pub(crate) fn find(&self, search: &LibrarySearch) -> Option<PathBuf> {
        search.find(self.file, self.folder)
    }
}

/// The names of libraries, for a sentence.
pub(crate) fn names(libraries: &[&CudaLibrary]) -> String {
    libraries.iter().map(|library| library.file).collect::<Vec<_>>().join(", ")
}

/// The command that brings libraries.
pub(crate) fn pip_command(search: &LibrarySearch, missing: &[&CudaLibrary]) -> String {
    let mut packages: Vec<String> = missing.iter().map(|library| format!("'{}'", library.package)).collect();
    packages.dedup();
    let pip = match search.python_beside() {
        Some(python) => format!("{} -m pip", python.display()),
        None => "pip".to_owned(),
    };
    format!("{pip} install {}", packages.join(" "))
}
