//! `kmsfs export` and `kmsfs import`: whole trees out of a volume and into one, without a mount.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use crate::cli::error::{CliError, Exit};
use crate::cli::progress::{self, Step};
use crate::cli::report::{self, counted, part};
use crate::transfer::{Counts, Failure, Progress, Settings};

use super::cat::named;
use super::check::parallel;
use super::tree_totals::Totals;
use super::unmounted::{self, UnlockArgs};

/// Failures that are told one by one.
const TOLD: usize = 1000;

/// Copy a tree out of a volume, decrypted, without a mount
///
/// With modes, times, hard links, symlinks, holes, extended attributes and ACLs, and as root with owners, devices and
/// capabilities. PATH is a plain path in the volume; a directory's entries go into DEST, a file becomes DEST. What is in DEST
/// already and has the same kind, size, modification time, mode and owner is kept, so that the same command goes on where it was
/// interrupted; a file has its name only once it is whole and durable. Other files of the same names are replaced, and what else
/// is in DEST stays. May run beside a mount: a file that is being written is read again, and what the kernel has not written out
/// yet is not seen. What cannot be read is told at the end.
#[derive(Debug, Args)]
#[command(override_usage = "kmsfs export [OPTIONS] <CIPHERDIR> [PATH] <DEST>")]
pub(crate) struct ExportArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// What to copy (without it, everything), and where to
    #[arg(value_name = "PATH DEST", num_args = 1..=2, required = true)]
    what: Vec<OsString>,
    #[command(flatten)]
    copy: CopyArgs,
}

/// Copy a tree into a volume, encrypted, without a mount
///
/// As `kmsfs export` the other way: a directory's entries go into PATH of the volume, which is made if it is missing, or into
/// its root; a file becomes PATH. The volume must not be mounted. Mounts below SRC are not entered.
#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The directory or file to copy
    #[arg(value_name = "SRC")]
    from: PathBuf,
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Where to in the volume [default: its root]
    #[arg(value_name = "PATH")]
    path: Option<OsString>,
    #[command(flatten)]
    copy: CopyArgs,
}

#[derive(Debug, Args)]
struct CopyArgs {
    /// Read everything back and compare it with its source: attributes, and every byte
    #[arg(long)]
    verify: bool,
    /// Leave extended attributes and ACLs out
    #[arg(long)]
    no_xattrs: bool,
    /// Copy so many files at the same time [default: 64 with a remote provider, else one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: Option<u8>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    unlock: UnlockArgs,
}

impl CopyArgs {
    fn settings(&self, is_remote: bool) -> Settings {
        Settings { parallel: parallel(self.parallel, is_remote), verify: self.verify, xattrs: !self.no_xattrs }
    }
}

/// What `--json` shows.
#[derive(Serialize)]
struct Report<'r> {
    complete: bool,
    /// The failure holds for all that is left, which was not tried.
    stopped: bool,
    files: u64,
    directories: u64,
    others: u64,
    hard_links: u64,
    kept: u64,
    bytes: u64,
    verified: u64,
    failures: &'r [FailureReport],
}

/// What failed, and why.
#[derive(Serialize)]
pub(super) struct FailureReport {
    path: String,
    error: String,
    exit_code: u8,
}

/// Copies out.
pub(crate) fn export(args: &ExportArgs) -> Result<(), CliError> {
    let (path, to) = match &args.what[..] {
        [path, to] => (path.as_bytes(), PathBuf::from(to)),
        [to] => (&b""[..], PathBuf::from(to)),
        _ => return Err(CliError::usage("export takes a path in the volume, and where to copy it")),
    };
    refuse_inside(&args.cipher_directory, &to)?;
    let volume = unmounted::open(&args.cipher_directory, &args.copy.unlock, false)?;
    let settings = args.copy.settings(volume.is_remote);
    // Entries below a plain path in the volume are not counted.
    let totals = if path.is_empty() { Totals::below(args.cipher_directory.clone()) } else { Totals::default() };
    conclude(&args.copy, &totals, |progress| {
        let about = || format!("{} to {}", in_volume(path), to.display());
        volume.tree.export(path, &to, settings, progress).map_err(|error| named(&about(), error))
    })
}

/// Copies in.
pub(crate) fn import(args: &ImportArgs) -> Result<(), CliError> {
    refuse_inside(&args.cipher_directory, &args.from)?;
    let path = args.path.as_ref().map_or(&b""[..], |path| path.as_bytes());
    let volume = unmounted::open(&args.cipher_directory, &args.copy.unlock, true)?;
    let settings = args.copy.settings(volume.is_remote);
    let totals = Totals::below(args.from.clone());
    conclude(&args.copy, &totals, |progress| {
        let about = || format!("{} to {}", args.from.display(), in_volume(path));
        volume.tree.import(&args.from, path, settings, progress).map_err(|error| named(&about(), error))
    })
}

/// A plain path as messages name it.
fn in_volume(path: &[u8]) -> String {
    if path.is_empty() { "the root of the volume".to_owned() } else { String::from_utf8_lossy(path).into_owned() }
}

/// A copy into its own source would find itself.
fn refuse_inside(cipher: &std::path::Path, plain: &std::path::Path) -> Result<(), CliError> {
    let canonical = |path: &std::path::Path| crate::cli::mount_point::canonical_or_new(path).ok();
    let Some((cipher, plain)) = canonical(cipher).zip(canonical(plain)) else { return Ok(()) };
    if plain.starts_with(&cipher) || cipher.starts_with(&plain) {
        return Err(CliError::usage(format_args!("{} and {} overlap", cipher.display(), plain.display())));
    }
    Ok(())
}

/// Runs the copy and says what became of it.
fn conclude(
    args: &CopyArgs,
    totals: &Totals,
    copy: impl FnOnce(&Progress) -> Result<Vec<Failure>, CliError>,
) -> Result<(), CliError> {
    let at = Progress::default();
    let step = || {
        let now = at.counts();
        let of = totals.step(now.files + now.kept, now.moved + now.kept_bytes).filter(|_| now.verified == 0);
        Step { text: text(&Counts { bytes: now.moved, ..now }, totals.files(), args.verify), of }
    };
    let started = Instant::now();
    let failures = progress::show_while(step, || copy(&at))?;
    let failures: Vec<FailureReport> = failures.into_iter().map(failure).collect();
    let now = at.counts();
    if args.json {
        report::print(&report(&now, &failures), true)?;
    } else {
        tell(&failures);
    }
    verdict(&failures, &now)?;
    let time = match started.elapsed() {
        short if short.as_secs() == 0 => String::new(),
        time => format!(" in {}", progress::time_text(time)),
    };
    progress::conclude(&format!("{}{time}", text(&now, None, args.verify)), args.json);
    Ok(())
}

fn report<'r>(now: &Counts, failures: &'r [FailureReport]) -> Report<'r> {
    Report {
        complete: failures.is_empty(),
        stopped: now.is_stopped,
        files: now.files,
        directories: now.directories,
        others: now.others,
        hard_links: now.links,
        kept: now.kept,
        bytes: now.bytes,
        verified: now.verified,
        failures,
    }
}

/// `12 of 20 files, 3.4 MiB copied, 5 there already`.
fn text(now: &Counts, of: Option<u64>, verify: bool) -> String {
    let files = of.map_or_else(|| counted(now.files, "file"), |all| part(now.files, all, "file"));
    let mut text = format!("{files}, {} copied", progress::size_text(now.bytes));
    let mut put = |count: u64, what: &str| {
        if count > 0 {
            text.push_str(&format!(", {count} {what}"));
        }
    };
    put(now.kept, "there already");
    put(now.failed, "failed");
    put(now.verified, if verify { "verified" } else { "" });
    text
}

pub(super) fn failure(failure: Failure) -> FailureReport {
    let path = report::printable(&String::from_utf8_lossy(&failure.path));
    let path = if path.is_empty() { ".".to_owned() } else { path };
    let error = CliError::from(failure.error);
    FailureReport { path, error: error.to_string(), exit_code: error.code() }
}

/// Who does not hear it still gets the exit code.
pub(super) fn tell(failures: &[FailureReport]) {
    let mut stderr = io::stderr().lock();
    for FailureReport { path, error, .. } in failures.iter().take(TOLD) {
        let _ = writeln!(stderr, "{path}: {error}");
    }
    if failures.len() > TOLD {
        let _ = writeln!(stderr, "{} more failed; they are not named (--json names all)", failures.len() - TOLD);
    }
}

fn verdict(failures: &[FailureReport], now: &Counts) -> Result<(), CliError> {
    let Some(code) = worst(failures) else { return Ok(()) };
    if now.is_stopped {
        let copied = counted(now.files, "file");
        let what = format!("stopped after {copied}: the rest was not tried");
        return Err(CliError::with_code(code, what).hint("mend the cause: the same command then goes on from here"));
    }
    let what = match failures.len() {
        1 => "one entry failed and the others were copied".to_owned(),
        failed => format!("{failed} of the entries failed and the others were copied"),
    };
    Err(CliError::with_code(code, what).hint("the same command goes on from here"))
}

/// The exit code that weighs most: what does not authenticate, then what cannot be read or written, then keys.
pub(super) fn worst(failures: &[FailureReport]) -> Option<u8> {
    let order = [Exit::Unauthentic, Exit::Io, Exit::KeyRefused, Exit::Credentials, Exit::ProviderUnreachable];
    let weight = |code: u8| order.iter().position(|exit| *exit as u8 == code).unwrap_or(order.len());
    failures.iter().map(|failure| failure.exit_code).min_by_key(|code| weight(*code))
}
