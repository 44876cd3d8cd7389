//! `kmsfs shred`: makes files unreadable for good and removes them.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::cli::error::{CliError, Exit};
use crate::cli::progress::{self, Step};
use crate::cli::report;
use crate::transfer::Progress;

use super::cat::named;
use super::check::parallel;
use super::copy_trees::{FailureReport, failure, tell, worst};
use super::unmounted::{self, UnlockArgs};

/// Make files unreadable for good, and remove them: their wrapped keys are overwritten in the cipher directory
///
/// The volume must not be mounted. First the header of every file at and below each PATH is overwritten, with the wrapped data
/// key and the file's id, without which no key opens the content; then everything is removed. Nothing is reached that is
/// elsewhere: backups, snapshots, copies that the disk or a copy-on-write filesystem keeps. Names, sizes and attributes are
/// removed and not overwritten. `docs/GUIDE.md` says what remains.
#[derive(Debug, Args)]
pub(crate) struct ShredArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Files or directories in the volume, by their plain paths
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,
    /// Do it; without this, what would be shredded is shown and nothing is changed
    #[arg(long)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    unlock: UnlockArgs,
}

#[derive(Serialize)]
struct Report {
    shredded: bool,
    files: usize,
    directories: usize,
    others: usize,
    bytes: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failures: Vec<FailureReport>,
}

/// Finds, asks for a yes, and destroys.
pub(crate) fn run(args: &ShredArgs) -> Result<(), CliError> {
    let volume = unmounted::open(&args.cipher_directory, &args.unlock, true)?;
    let paths: Vec<_> = args.paths.iter().map(|path| path.as_bytes()).collect();
    let all = || args.paths.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let doomed = volume.tree.doom(&paths).map_err(|error| named(&all(), error))?;
    let mut report = Report {
        shredded: args.yes,
        files: doomed.files.len(),
        directories: doomed.directories.len(),
        others: doomed.others.len(),
        bytes: doomed.bytes,
        failures: Vec::new(),
    };
    if !args.yes {
        report::print(&report, args.json)?;
        return Err(CliError::new(Exit::Usage, "nothing was changed: --yes makes all of this unreadable for good"));
    }
    let at = Progress::default();
    let step = || {
        let (done, all) = (at.counts().files, doomed.files.len() as u64);
        Step { text: report::part(done, all, "file"), of: Some((done, all)) }
    };
    let failures = progress::show_while(step, || volume.tree.shred(&doomed, parallel(None, false), &at));
    report.failures = failures.into_iter().map(failure).collect();
    let failed = worst(&report.failures).map(|code| {
        let what =
            format!("{}; what is named may still be read", report::counted(report.failures.len() as u64, "failure"));
        CliError::with_code(code, what).hint("the same command goes on from here")
    });
    match args.json {
        true => report::print(&report, true)?,
        false => tell(&report.failures),
    }
    failed.map_or(Ok(()), Err)
}
