//! `kmsfs umount`: returns when the process behind the mount has made everything durable and is gone.

use std::path::PathBuf;

use clap::Args;

use crate::cli::error::CliError;

/// Unmount, and wait until everything is on disk
#[derive(Debug, Args)]
pub(crate) struct UmountArgs {
    /// The mount point
    mountpoint: PathBuf,
}

/// Unmounts.
#[cfg(not(feature = "mount"))]
pub(crate) fn run(args: &UmountArgs) -> Result<(), CliError> {
    Err(super::mount::not_built_in(&args.mountpoint))
}

/// Unmounts.
#[cfg(feature = "mount")]
pub(crate) fn run(args: &UmountArgs) -> Result<(), CliError> {
    with_mount::run(&args.mountpoint)
}

#[cfg(feature = "mount")]
mod with_mount {
    use std::path::Path;
    use std::time::Duration;

    use crate::cli::commands::status;
    use crate::cli::error::{CliError, Exit};
    use crate::daemon::control::{ClientError, Ended};
    use crate::mount::{self, MountError};

    /// How long the process may take to register a waiting client.
    const ANSWER: Duration = Duration::from_secs(10);
    /// How long it may take to settle every file and end.
    const SETTLING: Duration = Duration::from_secs(120);

    pub(super) fn run(path: &Path) -> Result<(), CliError> {
        let mountpoint = status::canonical(path)?;
        let waiting = match status::connect(&mountpoint).and_then(|client| client.wait(ANSWER)) {
            Ok(waiting) => Some(waiting),
            // A mount without a process, or one whose process answers nobody, can still be taken away.
            Err(ClientError::NotServed) if !mount::is_ours_at(&mountpoint) => return Err(not_mounted(&mountpoint)),
            Err(_) => None,
        };
        unmount(&mountpoint)?;
        let Some(waiting) = waiting else { return Ok(()) };
        match waiting.ended(SETTLING) {
            Ok(Ended { error: None }) => Ok(()),
            Ok(Ended { error: Some(error) }) => Err(CliError::new(Exit::Io, error)),
            Err(ClientError::Deadline) => Err(CliError::new(
                Exit::Other,
                format_args!("{} is unmounted, but its process is still busy after {SETTLING:?}", mountpoint.display()),
            )),
            Err(error) => Err(status::failure(&mountpoint, &error)),
        }
    }

    fn unmount(mountpoint: &Path) -> Result<(), CliError> {
        mount::unmount(mountpoint, false).map_err(|error| match error {
            MountError::Busy => CliError::new(Exit::Other, format_args!("{} is in use", mountpoint.display()))
                .hint("close what is open below it (`fuser -vm MOUNTPOINT` lists it) and try again"),
            other => CliError::from(other),
        })
    }

    fn not_mounted(mountpoint: &Path) -> CliError {
        CliError::new(Exit::NotMounted, format_args!("{} is not mounted", mountpoint.display()))
    }
}
