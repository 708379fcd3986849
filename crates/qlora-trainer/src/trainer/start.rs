//! The checks of a run's output folder and of the checkpoint it resumes from: everything that is known, and can be
//! wrong, before there is a model.

use std::path::{Path, PathBuf};

use crate::checkpoint::folder::{self, OutputFolder};
use crate::checkpoint::{self, Checkpoint};
use crate::comm::{Communicator, exchange, from_first};
use crate::config::{Resume, TrainingOptions};
use crate::error::{Error, Result};
use crate::preemption::Notice;
use crate::store::{self, Mirror};

/// The output folder, locked, and the checkpoint to go on from, read.
#[derive(Debug)]
pub(crate) struct Start {
    /// None on ranks that write nothing.
    pub(crate) output: Option<OutputFolder>,
    pub(crate) resumed: Option<Resumed>,
    /// The store to which checkpoints go, on the rank that writes.
    pub(crate) mirror: Option<Mirror>,
    /// The notice of preemption, watched since before the model was loaded.
    pub(crate) notice: Option<Notice>,
}

/// A checkpoint to go on from.
#[derive(Debug)]
pub(crate) struct Resumed {
    pub(crate) path: PathBuf,
    pub(crate) checkpoint: Checkpoint,
}

impl Start {
    /// Makes and locks the output folder, and reads the checkpoint if one is to be resumed. Nothing of an earlier run is
    /// touched.
    ///
    /// # Errors
    /// If the folder cannot be used, another run has it or it holds one that was not asked for, or the checkpoint is not there
    /// or damaged.
    pub(crate) fn open(options: &TrainingOptions) -> Result<Self> {
        let notice = options.preemption_file.as_deref().map(Notice::watch);
        let output = OutputFolder::open(&options.output_dir)?;
        let mirror = options.checkpoint_store.as_deref().map(store::open).transpose()?;
        let from = match &options.resume_from_checkpoint {
            Resume::No => None,
            Resume::From(path) if path.to_string_lossy().contains("://") => {
                return Err(Error::checkpoint(
                    path,
                    "a run is resumed from a store by checkpoint_store and resume_from_checkpoint = true, which takes its newest \
                     checkpoint",
                ));
            }
            Resume::From(path) => Some(path.clone()),
            Resume::Latest => newest(output.path(), mirror.as_ref())?,
        };
        let load = |path: PathBuf| -> Result<Resumed> {
            check_is_checkpoint(&path)?;
            let checkpoint = checkpoint::load(&path)?;
            Ok(Resumed { path, checkpoint })
        };
        let resumed = from.map(load).transpose()?;
        let earlier = folder::list(output.path())?.pop();
        let start = Self { resumed, output: Some(output), mirror, notice };
        if !start.goes_on_inside()
            && !options.overwrite_output_dir
            && let Some(mirror) = &start.mirror
            && let Some(newest) = mirror.steps()?.first()
        {
            return Err(Error::checkpoint(
                format!("{}/{}", mirror.url(), folder::name(*newest)),
                "the store holds an earlier run; set resume_from_checkpoint = true to go on with it, overwrite_output_dir = true \
                 to delete its checkpoints, or another checkpoint_store",
            ));
        }
        if !start.goes_on_inside()
            && !options.overwrite_output_dir
            && let Some((_, newest)) = earlier
        {
            return Err(Error::checkpoint(
                newest,
                "the output folder holds an earlier run; set resume_from_checkpoint = true to go on with it, \
                 overwrite_output_dir = true to delete its checkpoints, or another output_dir",
            ));
        }
        Ok(start)
    }

    /// [`Self::open`] on rank 0, which alone writes; the others get the checkpoint from it.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn open_on(options: &TrainingOptions, comm: &mut dyn Communicator) -> Result<Self> {
        if comm.size() == 1 {
            return Self::open(options);
        }
        let notice = options.preemption_file.as_deref().map(Notice::watch);
        let own = if comm.rank() == 0 { Some(Self::open(options)?) } else { None };
        let resumed = own.as_ref().and_then(|start| start.resumed.as_ref());
        let files = resumed.map(|resumed| checkpoint::read_files(&resumed.path)).transpose()?;
        let path = resumed.map(|resumed| resumed.path.display().to_string());
        let path: Option<String> = exchange(comm, "checkpoint", &path)?.swap_remove(0);
        let Some(path) = path.map(PathBuf::from) else {
            return Ok(own.unwrap_or(Self { output: None, resumed: None, mirror: None, notice }));
        };
        let (state, tensors) = files.unwrap_or_default();
        let state = from_first(comm, "state of the run", state)?;
        let tensors = from_first(comm, "state of the optimizer", tensors)?;
        match own {
            Some(own) => Ok(own),
            None => {
                let checkpoint = checkpoint::from_files(&path, &(state, tensors))?;
                Ok(Self { output: None, resumed: Some(Resumed { path, checkpoint }), mirror: None, notice })
            }
        }
    }

    /// Whether the run goes on from a checkpoint of its own output folder.
    pub(crate) fn goes_on_inside(&self) -> bool {
        match (&self.resumed, &self.output) {
            (Some(resumed), Some(output)) => is_in(&resumed.path, output.path()),
            _ => false,
        }
    }
}

/// The newest checkpoint of the folder, or of the store where that has a newer one, which is fetched.
fn newest(output: &Path, mirror: Option<&Mirror>) -> Result<Option<PathBuf>> {
    let local = folder::list(output)?.pop();
    let Some(mirror) = mirror else { return Ok(local.map(|(_, path)| path)) };
    let fetched = mirror.fetch_newest(output, local.as_ref().map(|(step, _)| *step))?;
    Ok(fetched.or(local.map(|(_, path)| path)))
}

/// Refuses folders that are mistaken for a checkpoint: the output folder, or an adapter.
fn check_is_checkpoint(path: &Path) -> Result<()> {
    let has = |name: &str| path.join(name).exists();
    if !path.is_dir() || has(checkpoint::STATE) || has(checkpoint::OPTIMIZER) {
        return Ok(());
    }
    if let Some(newest) = folder::latest(path)? {
        let newest = newest.display();
        return Err(Error::checkpoint(
            path,
            format!("this is an output folder; name one of its checkpoints: {newest}"),
        ));
    }
    if has(qlora_core::adapter::CONFIG_FILE) {
        return Err(Error::checkpoint(
            path,
            format!(
                "this is an adapter without the state of a run, which cannot be resumed; set adapter_name_or_path = {path:?} in \
                 [lora] to begin a new run from it"
            ),
        ));
    }
    Ok(())
}

fn is_in(path: &Path, folder: &Path) -> bool {
    match (path.canonicalize(), folder.canonicalize()) {
        (Ok(path), Ok(folder)) => path.parent() == Some(&folder),
        _ => false,
    }
}
