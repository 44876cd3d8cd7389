//! `kmsfs cat`: files of a volume on standard output, without a mount.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;

use crate::cli::error::CliError;
use crate::transfer::TransferError;

use super::unmounted::{self, UnlockArgs};

/// Write files of a volume to standard output, without a mount
///
/// Paths are plain ones, from the root of the volume; symlinks are not followed. Each piece authenticates before it is
/// written. May run beside a mount: what programs have written shows once the kernel has written it out, as after an fsync.
#[derive(Debug, Args)]
pub(crate) struct CatArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Files in the volume
    #[arg(value_name = "PATH", required = true)]
    paths: Vec<OsString>,
    #[command(flatten)]
    unlock: UnlockArgs,
}

/// Writes them one after the other, up to the first that fails.
pub(crate) fn run(args: &CatArgs) -> Result<(), CliError> {
    let volume = unmounted::open(&args.cipher_directory, &args.unlock, false)?;
    let mut output = io::stdout().lock();
    for path in &args.paths {
        let mut closed = None;
        let read = volume.tree.read(path.as_bytes(), |bytes| {
            output.write_all(bytes).inspect_err(|error| closed = Some(io::Error::from(error.kind())))
        });
        match (read, closed) {
            (Ok(()), _) => {}
            // A reader that has seen enough is no failure.
            (Err(_), Some(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            (Err(error), Some(_)) => return Err(named("standard output", error)),
            (Err(error), None) => return Err(named(&path.to_string_lossy(), error)),
        }
    }
    output.flush().or_else(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(()),
        _ => Err(CliError::io("standard output", &error)),
    })
}

/// A failure with the path that it is about.
pub(super) fn named(path: &str, error: TransferError) -> CliError {
    CliError::from(error).about(if path.is_empty() { "the root of the volume" } else { path })
}
