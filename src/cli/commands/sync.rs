//! `kmsfs sync`: returns when everything that programs have written to a mount is on the disk.
//!
//! `syncfs(2)` and `sync(1)` make the kernel hand its dirty pages over, and before Linux 7.4 tell the process behind the mount
//! nothing: it is asked here.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use crate::cli::error::{CliError, Exit};
use crate::daemon::control::{Ask, ClientError};

use super::{lock, status};

/// How long all of it may take.
const DEADLINE: Duration = Duration::from_secs(600);

/// Make everything durable that was written to a mount so far; fails if some of it cannot be
#[derive(Debug, Args)]
pub(crate) struct SyncArgs {
    /// The mount point
    mountpoint: PathBuf,
}

/// First the kernel's dirty pages, then what the process behind the mount has not yet made durable.
pub(crate) fn run(args: &SyncArgs) -> Result<(), CliError> {
    let until = Instant::now() + DEADLINE;
    let mountpoint = status::canonical(&args.mountpoint)?;
    // A directory that is no mount would sync another filesystem.
    status::connect(&mountpoint).map_err(|error| status::failure(&mountpoint, &error))?;
    write_back(&mountpoint)?;
    let left = until.saturating_duration_since(Instant::now());
    match status::connect(&mountpoint).and_then(|client| client.tell(Ask::Sync, left)) {
        Ok(answer) => status::error_in(&answer).map_or(Ok(()), |error| Err(not_durable(&mountpoint, &error))),
        Err(ClientError::Deadline) => Err(late(&mountpoint)),
        Err(error) => Err(status::failure(&mountpoint, &error)),
    }
}

/// The kernel waits without a deadline, so this does in its place.
fn write_back(mountpoint: &Path) -> Result<(), CliError> {
    let (done, is_done) = mpsc::channel();
    let place = mountpoint.to_owned();
    let spawned = thread::Builder::new().spawn(move || done.send(lock::write_back(&place)));
    spawned.map_err(|error| CliError::io("starting a thread", &error))?;
    let written = is_done.recv_timeout(DEADLINE).map_err(|_| late(mountpoint))?;
    written.map_err(|error| not_durable(mountpoint, &error))
}

fn late(mountpoint: &Path) -> CliError {
    not_durable(mountpoint, &format!("not done after {DEADLINE:?}"))
}

fn not_durable(mountpoint: &Path, why: &impl std::fmt::Display) -> CliError {
    CliError::new(Exit::Io, format_args!("{}: not everything is durable: {why}", mountpoint.display()))
}
