//! Stand-ins for what other branches build, with their signatures; to be deleted on merge:
//! `adamw`, `grad_norm` -> `qlora_kernels::ops`, `atomic` -> `qlora_core::atomic`.

pub(crate) mod adamw {
    use qlora_kernels::Result;

    #[derive(Clone, Copy, Debug, PartialEq)]
    pub(crate) struct AdamW {
        pub(crate) lr: f64,
        pub(crate) beta1: f64,
        pub(crate) beta2: f64,
        pub(crate) eps: f64,
        pub(crate) weight_decay: f64,
    }

    pub(crate) fn step(
        config: &AdamW,
        step: u64,
        grad_scale: f32,
        param: &mut [f32],
        grad: &[f32],
        m: &mut [f32],
        v: &mut [f32],
    ) -> Result<()> {
        let decay = (1.0 - config.lr * config.weight_decay) as f32;
        let (mix, beta2, rest2) = ((1.0 - config.beta1) as f32, config.beta2 as f32, (1.0 - config.beta2) as f32);
        let step_size = (config.lr / (1.0 - config.beta1.powf(step as f64))) as f32;
        let root = (1.0 - config.beta2.powf(step as f64)).sqrt() as f32;
        for i in 0..param.len() {
            let g = grad[i] * grad_scale;
            param[i] *= decay;
            m[i] += mix * (g - m[i]);
            v[i] = beta2 * v[i] + rest2 * g * g;
            param[i] -= step_size * m[i] / (v[i].sqrt() / root + config.eps as f32);
        }
        Ok(())
    }
}

pub(crate) mod grad_norm {
    pub(crate) fn global_norm(grad: &[f32]) -> f64 {
        grad.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>().sqrt()
    }

    pub(crate) fn clip_coefficient(norm: f64, max_norm: f64) -> f32 {
        let coefficient = max_norm / (norm + 1e-6);
        if coefficient > 1.0 { 1.0 } else { coefficient as f32 }
    }

    pub(crate) fn first_non_finite(grad: &[f32]) -> Option<usize> {
        grad.iter().position(|g| !g.is_finite())
    }
}

pub(crate) mod atomic {
    use std::fs::{self, File};
    use std::io::{self, Write};
    use std::path::Path;

    use qlora_core::{Error, Result};

    pub(crate) fn write_atomically<T>(
        path: impl AsRef<Path>,
        write: impl FnOnce(&mut dyn Write) -> io::Result<T>,
    ) -> Result<T> {
        let path = path.as_ref();
        let at = |error| Error::io(path, error);
        let mut file = tempfile::NamedTempFile::new_in(path.parent().expect("a folder")).map_err(at)?;
        let value = write(&mut file).map_err(at)?;
        file.as_file().sync_all().map_err(at)?;
        file.persist(path).map_err(|error| at(error.error))?;
        Ok(value)
    }

    pub(crate) fn replace_directory<T>(path: impl AsRef<Path>, fill: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let path = path.as_ref();
        let (folder, name) = (path.parent().expect("a folder"), path.file_name().expect("a name"));
        let mut builder = tempfile::Builder::new();
        let prefix = format!("{}.tmp-", name.to_string_lossy());
        let temporary = builder.prefix(&prefix).tempdir_in(folder).map_err(|error| Error::io(folder, error))?;
        let value = fill(temporary.path())?;
        for entry in fs::read_dir(temporary.path()).map_err(|error| Error::io(path, error))? {
            let entry = entry.map_err(|error| Error::io(path, error))?;
            File::open(entry.path()).and_then(|file| file.sync_all()).map_err(|error| Error::io(path, error))?;
        }
        if path.exists() {
            fs::remove_dir_all(path).map_err(|error| Error::io(path, error))?;
        }
        fs::rename(temporary.path(), path).map_err(|error| Error::io(path, error))?;
        Ok(value)
    }
}
