//! `kmsfs export` and `kmsfs import`: whole trees out of a volume and into one, without a mount.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::cli::error::{CliError, Exit};
use crate::cli::{progress, report};
use crate::transfer::{Counts, Failure, Progress, Settings};

use super::cat::named;
use super::check::parallel;
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
    conclude(&args.copy, |progress| {
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
    conclude(&args.copy, |progress| {
        let about = || format!("{} to {}", args.from.display(), in_volume(path));
        volume.tree.import(&args.from, path, settings, progress).map_err(|error| named(&about(), error))
    })
}

fn in_volume(path: &[u8]) -> String {
    if path.is_empty() { "the root of the volume".to_owned() } else { String::from_utf8_lossy(path).into_owned() }
}

/// A copy into its own source would find itself.
fn refuse_inside(cipher: &std::path::Path, plain: &std::path::Path) -> Result<(), CliError> {
    let canonical = |path: &std::path::Path| crate::cli::mount_point::canonical_or_new(path).ok();
    let Some((cipher, plain)) = canonical(cipher).zip(canonical(plain)) else { return Ok(()) };
    if plain.starts_with(&cipher) || cipher.starts_with(&plain) {
        return Err(CliError::usage(format_args!("{} and {} lie in each other", cipher.display(), plain.display())));
    }
    Ok(())
}

/// Runs the copy and says what became of it.
fn conclude(args: &CopyArgs, copy: impl FnOnce(&Progress) -> Result<Vec<Failure>, CliError>) -> Result<(), CliError> {
    let at = Progress::default();
    let line = |seconds| {
        let Counts { files, kept, bytes, verified, failed, .. } = at.counts();
        let verified = if args.verify { format!(", {verified} verified") } else { String::new() };
        format!("{files} files, {} MiB, {kept} there already, {failed} failed{verified}, {seconds} s", bytes >> 20)
    };
    let failures = progress::show_while(line, || copy(&at))?;
    let failures: Vec<FailureReport> = failures.into_iter().map(failure).collect();
    let Counts { files, directories, others, links: hard_links, kept, bytes, verified, .. } = at.counts();
    if args.json {
        let complete = failures.is_empty();
        let failures = &failures[..];
        report::print(
            &Report { complete, files, directories, others, hard_links, kept, bytes, verified, failures },
            true,
        )?;
    } else {
        tell(&failures);
    }
    verdict(&failures)
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

fn verdict(failures: &[FailureReport]) -> Result<(), CliError> {
    let Some(code) = worst(failures) else { return Ok(()) };
    let what = format!("{} of the entries failed and the others were copied", failures.len());
    Err(CliError::with_code(code, what).hint("the same command goes on from here"))
}

/// The exit code that weighs most: what does not authenticate, then what cannot be read or written, then keys.
pub(super) fn worst(failures: &[FailureReport]) -> Option<u8> {
    let order = [Exit::Unauthentic, Exit::Io, Exit::KeyRefused, Exit::Credentials, Exit::ProviderUnreachable];
    let weight = |code: u8| order.iter().position(|exit| *exit as u8 == code).unwrap_or(order.len());
    failures.iter().map(|failure| failure.exit_code).min_by_key(|code| weight(*code))
}
