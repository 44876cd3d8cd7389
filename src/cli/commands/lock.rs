//! `kmsfs lock` and `kmsfs unlock`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use rustix::fs::{Mode, OFlags};

use crate::cli::error::{CliError, Exit};
use crate::daemon::control::Ask;

use super::status;

/// How long a mount may take: it waits for operations that are under way.
const DEADLINE: Duration = Duration::from_secs(30);

/// Drop all keys of a mount and what the kernel has cached; files answer ENOKEY until `kmsfs unlock`
#[derive(Debug, Args)]
pub(crate) struct LockArgs {
    /// The mount point
    mountpoint: PathBuf,
}

/// Let a locked mount have keys again
#[derive(Debug, Args)]
pub(crate) struct UnlockArgs {
    /// The mount point
    mountpoint: PathBuf,
}

/// Locks, whatever becomes of what programs have written so far. It is handed over first: without a key it would be lost.
pub(crate) fn lock(args: &LockArgs) -> Result<(), CliError> {
    let mountpoint = status::canonical(&args.mountpoint)?;
    // Nothing is handed over to what is no mount, or a dead one.
    status::connect(&mountpoint).map_err(|error| status::failure(&mountpoint, &error))?;
    let written = write_back(&mountpoint);
    tell(&mountpoint, Ask::Lock)?;
    written.map_err(|error| {
        let what = format_args!("{} is locked, and not all that was written to it is stored", mountpoint.display());
        CliError::new(Exit::Io, format_args!("{what}: {error}"))
    })
}

/// Unlocks.
pub(crate) fn unlock(args: &UnlockArgs) -> Result<(), CliError> {
    tell(&status::canonical(&args.mountpoint)?, Ask::Unlock)
}

/// Has the kernel hand over what programs have written to a mount.
pub(super) fn write_back(mountpoint: &Path) -> io::Result<()> {
    let root = rustix::fs::open(mountpoint, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    Ok(root.and_then(rustix::fs::syncfs)?)
}

fn tell(mountpoint: &Path, ask: Ask) -> Result<(), CliError> {
    let told = status::connect(mountpoint).and_then(|client| client.tell(ask, DEADLINE));
    told.map(drop).map_err(|error| status::failure(mountpoint, &error))
}
