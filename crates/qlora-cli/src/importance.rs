//! `--imatrix`: an importance matrix that is there, or one that is made of a text.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use qlora::export::gguf::Importance;
use qlora::open::ModelFiles;
use qlora::source::WeightSource;
use qlora::trainer::config::{OnOverlong, OnUntrained};
use qlora::trainer::data::{EncodeOptions, load_jsonl};
use qlora::trainer::encoder::ModelEncoder;

use crate::output;

/// Options for the weights of matrix columns in quantization.
#[derive(clap::Args)]
pub(crate) struct ImportanceArgs {
    /// An importance matrix of llama.cpp (GGUF or .dat); or a text, or JSONL rows as for training, that the model reads to make one.
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Writes the importance matrix that was made, for llama.cpp and for the next time.
    #[arg(long, requires = "imatrix", value_name = "FILE")]
    imatrix_out: Option<PathBuf>,
    /// Most chunks of 512 tokens that are read.
    #[arg(long, default_value_t = 100, value_name = "N")]
    imatrix_chunks: usize,
}

impl ImportanceArgs {
    /// Whether there is one to come.
    pub(crate) fn is_given(&self) -> bool {
        self.imatrix.is_some()
    }

    /// The importance matrix for the weights of `source`, if one was asked for.
    pub(crate) fn of(&self, files: &ModelFiles, source: &dyn WeightSource) -> Result<Option<Importance>> {
        let Some(path) = &self.imatrix else { return Ok(None) };
        if is_importance(path)? {
            ensure!(
                self.imatrix_out.is_none(),
                "--imatrix-out is for one that is made; {} is one already",
                path.display()
            );
            return Ok(Some(Importance::open(path)?));
        }
        let mut texts = texts(path, files)?;
        texts.truncate(self.imatrix_chunks);
        let bar = output::bar("importance", "{pos} of {len} texts");
        let importance = Importance::measure(source, &texts, output::count_of(&bar));
        bar.finish_and_clear();
        let importance = importance.with_context(|| format!("an importance matrix from {}", path.display()))?;
        if let Some(out) = &self.imatrix_out {
            importance.write(out)?;
        }
        Ok(Some(importance))
    }
}

/// Whether a file is an importance matrix and no text.
fn is_importance(path: &Path) -> Result<bool> {
    let mut magic = Vec::new();
    let file = File::open(path).with_context(|| path.display().to_string())?;
    file.take(4).read_to_end(&mut magic).with_context(|| path.display().to_string())?;
    Ok(magic == b"GGUF" || path.extension().is_some_and(|end| end.eq_ignore_ascii_case("dat")))
}

/// Chunks of a text, or the rows of a JSONL file.
fn texts(path: &Path, files: &ModelFiles) -> Result<Vec<Vec<u32>>> {
    let is_rows = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl"));
    if !is_rows {
        let text = std::fs::read_to_string(path).with_context(|| format!("{}: no text", path.display()))?;
        // Every chunk begins as texts do for this tokenizer.
        let bos = files.tokenizer.bos_token_id();
        let begin =
            files.tokenizer.encode("", true)?.into_iter().take(1).filter(|id| Some(*id) == bos).collect::<Vec<_>>();
        let tokens = files.tokenizer.encode(&text, false)?;
        let chunks = tokens.chunks(Importance::CHUNK - begin.len());
        return Ok(chunks.map(|chunk| [&begin, chunk].concat()).collect());
    }
    let ends = &files.generation.eos_token_ids;
    let encoder = ModelEncoder::new(&files.tokenizer, files.chat_template.as_ref(), ends);
    let options = EncodeOptions {
        max_length: Importance::CHUNK,
        on_overlong: OnOverlong::Truncate,
        on_untrained: OnUntrained::Skip,
        completion_only_loss: false,
    };
    let data = load_jsonl(&[path.to_owned()], &encoder, &options)?;
    Ok((0..data.len()).map(|index| data.document(index).ids.to_vec()).collect())
}
