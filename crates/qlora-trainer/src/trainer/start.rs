//! Where a run writes and what it goes on from: everything that is known, and can be wrong, before there is a model.

use std::path::{Path, PathBuf};

use crate::checkpoint::folder::{self, OutputFolder};
use crate::checkpoint::{self, Checkpoint};
use crate::config::{Resume, TrainingOptions};
use crate::error::{Error, Result};

/// The output folder, locked, and the checkpoint to go on from, read.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) output: OutputFolder,
    pub(crate) resumed: Option<Resumed>,
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
        let output = OutputFolder::open(&options.output_dir)?;
        let from = match &options.resume_from_checkpoint {
            Resume::No => None,
            Resume::From(path) => Some(path.clone()),
            Resume::Latest => folder::latest(output.path())?,
        };
        let load = |path: PathBuf| -> Result<Resumed> {
            check_is_checkpoint(&path)?;
            let checkpoint = checkpoint::load(&path)?;
            Ok(Resumed { path, checkpoint })
        };
        let start = Self { resumed: from.map(load).transpose()?, output };
        if !start.goes_on_inside()
            && !options.overwrite_output_dir
            && let Some((_, newest)) = folder::list(start.output.path())?.last()
        {
            return Err(Error::checkpoint(
                newest,
                "the output folder holds an earlier run; set resume_from_checkpoint = true to go on with it, \
                 overwrite_output_dir = true to delete its checkpoints, or another output_dir",
            ));
        }
        Ok(start)
    }

    /// Whether the run goes on from a checkpoint of its own output folder.
    pub(crate) fn goes_on_inside(&self) -> bool {
        self.resumed.as_ref().is_some_and(|resumed| is_in(&resumed.path, self.output.path()))
    }
}

/// What people give for a checkpoint that is none: the output folder, or an adapter.
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
