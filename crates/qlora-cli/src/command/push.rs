//! `qlora push`.

mod card;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use qlora::hub::{
    Existing, HubStatus, PushFile, PushOptions, PushStep, files_of, is_generated_card, marked_card, push,
};
use qlora::open::OpenOptions;
use qlora::trainer::TrainConfig;
use serde_json::json;

use crate::output::{self, line};

const CARD: &str = "README.md";

/// Uploads a folder or a file to the Hugging Face hub: an adapter, a merged model, GGUF files.
///
/// The repository is made if it does not exist. Only files that differ are sent, and after a transfer that broke off the same command
/// sends what is missing. The access token, with the right to write, is that of HF_TOKEN, or the one that `hf auth login` stored.
///
/// Of a folder, hidden files are left out, and what a run keeps for itself: its checkpoints (also superseded ones), samples.jsonl,
/// report.html and runs/, which show rows of the data, and the files of trackers (wandb/, mlruns/, wandb-run-id, mlflow-run-id). The
/// command names what it leaves out; to upload such a file, name it itself: `qlora push output/report.html me/my-adapter`.
///
/// A folder without README.md (or with one that `qlora train` wrote) gets a model card: base, data sets, how to use the model, options
/// and losses of the run. `--dry-run` shows it. In the repository it replaces a card that qlora wrote and nobody edited; any other card
/// stays, unless `--replace-card` is given.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  qlora push output me/my-adapter --private
  qlora push merged me/my-model --base HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0
  qlora push model-q4_k_m.gguf me/my-model-GGUF
  qlora push output me/my-adapter --dry-run")]
pub(crate) struct Args {
    /// The folder or file.
    path: PathBuf,
    /// The repository: owner/name; a name alone is one of the token's owner.
    repo_id: String,
    /// Makes a new repository a private one.
    #[arg(long)]
    private: bool,
    /// The branch.
    #[arg(long, default_value = "main")]
    revision: String,
    /// The commit's message.
    #[arg(long, value_name = "TEXT")]
    commit_message: Option<String>,
    /// The licence in the model card, as the hub names it: apache-2.0, mit, llama3.2.
    #[arg(long, value_name = "ID")]
    license: Option<String>,
    /// The base model in the model card; if not given, the one that the adapter names.
    #[arg(long, value_name = "ID")]
    base: Option<String>,
    /// Replaces the repository's model card also if a person wrote or edited it.
    #[arg(long, conflicts_with = "no_card")]
    replace_card: bool,
    /// Writes no model card.
    #[arg(long)]
    no_card: bool,
    /// Shows the files and the model card, and sends nothing.
    #[arg(long)]
    dry_run: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
    /// Files and folders that stay here.
    #[arg(skip)]
    keep_here: Vec<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let mut found = files_of(&args.path)?;
    found.leave_out(&args.keep_here);
    let (mut files, left_out) = (found.files, found.left_out);
    if files.is_empty() {
        bail!("{} holds no files to upload", args.path.display());
    }
    let card = if args.no_card { None } else { card_for(args, &files) };
    // The folder stays as it is.
    let place = tempfile::tempdir().context("a place for the model card")?;
    if let Some(card) = &card {
        let from = place.path().join(CARD);
        fs::write(&from, card).with_context(|| from.display().to_string())?;
        files.retain(|file| file.path != CARD);
        let mut file = PushFile::new(from, CARD);
        file.existing = match () {
            () if args.replace_card => Existing::Replaced,
            () if args.path.is_dir() => Existing::ReplacedIfGenerated,
            // A file joins a repository, whose card may be about the other files.
            () => Existing::Kept,
        };
        files.push(file);
    }
    if args.dry_run {
        return plan(args, &files, &left_out, card.as_deref());
    }
    if !left_out.is_empty() {
        output::remark(format!("left out: {}", left_out.join(", ")));
    }
    let mut options = PushOptions::default();
    options.private = args.private;
    options.revision = Some(args.revision.clone());
    options.commit_message.clone_from(&args.commit_message);
    let bar = output::bar("Uploading", "{bytes} of {total_bytes}");
    let pushed = push(&files, &args.repo_id, &options, &mut |step| {
        match step {
        PushStep::Hashing(file) => bar.set_message(file.to_owned()),
        PushStep::Sending(bytes) => bar.set_length(bytes),
        PushStep::Sent(_, bytes) => bar.inc(bytes),
        PushStep::AlreadyPublic(id) => bar.suspend(|| {
            output::remark(format!(
                "{id} was there before and is public: --private makes new repositories private alone. What is uploaded now can be read \
                 by everybody; to prevent that, stop here and make it private in its settings"
            ));
        }),
        PushStep::Again(what) => bar.suspend(|| output::remark(format!("{what}: trying again"))),
        _ => {}
    }
    });
    bar.finish_and_clear();
    let pushed = pushed?;
    if args.json {
        return Ok(output::print_json(&json!({
            "url": pushed.url, "commit": pushed.commit, "changed": pushed.changed, "unchanged": pushed.unchanged,
            "ignored": pushed.ignored, "kept": pushed.kept, "left_out": left_out,
        }))?);
    }
    for path in &pushed.ignored {
        output::remark(format!("{path} is left out: the repository's .gitignore names it"));
    }
    for path in &pushed.kept {
        output::remark(format!(
            "the repository's {path} stays: it was written or edited by a person, or covers more files; --replace-card replaces it"
        ));
    }
    match &pushed.commit {
        Some(commit) => {
            line!("{}: {} files in commit {commit}, {} unchanged", pushed.url, pushed.changed.len(), pushed.unchanged);
        }
        None => line!("{}: nothing to do, all {} files are there", pushed.url, pushed.unchanged),
    }
    Ok(())
}

/// Uploads the folder of a run that has ended.
///
/// # Errors
/// As `qlora push`; the message says that the run is safe, and the command that uploads it.
pub(crate) fn after_run(config: &TrainConfig, repo_id: &str) -> Result<()> {
    let (folder, private) = (&config.training.output_dir, config.training.hub_private_repo);
    let args = Args {
        path: folder.clone(),
        repo_id: repo_id.to_owned(),
        private,
        keep_here: config.places_of_rows(),
        revision: "main".to_owned(),
        commit_message: None,
        license: None,
        base: None,
        replace_card: false,
        no_card: false,
        dry_run: false,
        json: false,
    };
    run(&args).with_context(|| {
        let (folder, flag) = (folder.display(), if private { " --private" } else { "" });
        format!(
            "the run has ended well and is saved, but not uploaded (`qlora push {folder} {repo_id}{flag}` does that)"
        )
    })
}

/// Fails before a run whose adapter could not be uploaded at its end.
pub(crate) fn check_before_run() -> Result<()> {
    let status = HubStatus::of(&OpenOptions::default())?;
    if status.offline {
        bail!("push_to_hub in [training] needs the hub, and HF_HUB_OFFLINE says that it is not to be asked");
    }
    if status.token_source.is_none() {
        bail!(
            "push_to_hub in [training] needs an access token with the right to write: set HF_TOKEN, or run `hf auth login`"
        );
    }
    Ok(())
}

/// The model card of a folder that has none of a person's.
fn card_for(args: &Args, files: &[PushFile]) -> Option<String> {
    let folder = if args.path.is_dir() { &*args.path } else { args.path.parent().unwrap_or(Path::new(".")) };
    let own = files.iter().find(|file| file.path == CARD);
    if own.is_some_and(|file| !fs::read_to_string(&file.from).is_ok_and(|text| is_generated_card(&text))) {
        return None;
    }
    // A file alone gets a card only if it is one that the hub shows a model for.
    if !args.path.is_dir() && args.path.extension().is_none_or(|end| end != "gguf") {
        return None;
    }
    let paths: Vec<String> = files.iter().map(|file| file.path.clone()).collect();
    let text = card::text(folder, &paths, &args.repo_id, args.license.as_deref(), args.base.as_deref())?;
    Some(marked_card(&text))
}

fn plan(args: &Args, files: &[PushFile], left_out: &[String], card: Option<&str>) -> Result<()> {
    let sizes = files.iter().map(|file| Ok((&file.path, fs::metadata(&file.from)?.len())));
    let sizes: Vec<(&String, u64)> = sizes.collect::<std::io::Result<_>>()?;
    if args.json {
        let files: Vec<_> = sizes.iter().map(|(path, bytes)| json!({"path": path, "bytes": bytes})).collect();
        return Ok(output::print_json(
            &json!({"repo_id": args.repo_id, "files": files, "left_out": left_out, "card": card}),
        )?);
    }
    let visibility = if args.private { " (private, if it is new)" } else { "" };
    let mut text = format!("To {}{visibility}, branch {}:\n", args.repo_id, args.revision);
    for (path, bytes) in sizes {
        text += &format!("  {bytes:>14} bytes  {path}\n");
    }
    if !left_out.is_empty() {
        text += &format!("Left out: {}\n", left_out.join(", "));
    }
    if let Some(card) = card {
        let unless =
            if args.replace_card { "" } else { " (unless the repository has one that a person wrote or edited)" };
        text += &format!("\nModel card{unless}:\n\n{card}");
    }
    Ok(output::print(&text)?)
}
