//! `kmsfs lock` and `kmsfs unlock`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use rustix::fs::{Mode, OFlags};

use crate::cli::error::CliError;
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

/// Locks. What programs have written so far is handed over first: without a key it would be lost.
pub(crate) fn lock(args: &LockArgs) -> Result<(), CliError> {
    let mountpoint = status::canonical(&args.mountpoint)?;
    // Nothing is handed over to what is no mount, or a dead one.
    status::connect(&mountpoint).map_err(|error| status::failure(&mountpoint, &error))?;
    write_back(&mountpoint)?;
    tell(&mountpoint, Ask::Lock)
}

/// Unlocks.
pub(crate) fn unlock(args: &UnlockArgs) -> Result<(), CliError> {
    tell(&status::canonical(&args.mountpoint)?, Ask::Unlock)
}

/// Has the kernel hand over what programs have written to a mount.
pub(super) fn write_back(mountpoint: &Path) -> Result<(), CliError> {
    let root = rustix::fs::open(mountpoint, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let synced = root.and_then(rustix::fs::syncfs);
    synced.map_err(|error| CliError::io(mountpoint.display(), &error.into()))
}

fn tell(mountpoint: &Path, ask: Ask) -> Result<(), CliError> {
    let told = status::connect(mountpoint).and_then(|client| client.tell(ask, DEADLINE));
    told.map(drop).map_err(|error| status::failure(mountpoint, &error))
}
