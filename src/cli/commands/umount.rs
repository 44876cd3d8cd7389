//! `kmsfs umount`: returns when the process behind the mount has made everything durable and is gone.

use std::path::PathBuf;

use clap::Args;

use crate::cli::error::CliError;

/// Unmount, and wait until everything is on disk
#[derive(Debug, Args)]
pub(crate) struct UmountArgs {
    /// The mount point
    mountpoint: PathBuf,
    /// End the mount for everybody, also where files are open or another mount namespace has it: what was written is made
    /// durable first, and what is done from then on fails
    #[arg(long)]
    force: bool,
}

/// Unmounts.
#[cfg(not(feature = "mount"))]
pub(crate) fn run(args: &UmountArgs) -> Result<(), CliError> {
    Err(super::mount::not_built_in(&args.mountpoint))
}

/// Unmounts.
#[cfg(feature = "mount")]
pub(crate) fn run(args: &UmountArgs) -> Result<(), CliError> {
    with_mount::run(&args.mountpoint, args.force)
}

#[cfg(feature = "mount")]
mod with_mount {
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    use rustix::fs::{Mode, OFlags};

    use crate::cli::commands::status;
    use crate::cli::error::{CliError, Exit};
    use crate::cli::{mount_point, report};
    use crate::daemon::control::{Ask, ClientError, Ended, Waiting};
    use crate::mount::{self, Found, MountError};

    /// How long the process may take to register a waiting client.
    const ANSWER: Duration = Duration::from_secs(10);
    /// How long it may go on until it is told who else has the mount.
    const QUIET: Duration = Duration::from_secs(1);
    /// How long somebody else may have it: a program may be just starting, or ending.
    const ELSEWHERE: Duration = Duration::from_secs(9);
    /// How long a mount that is in use is tried again: its own process looks at it when it starts, and other programs look
    /// at all mounts.
    const GLANCE: Duration = Duration::from_secs(1);
    const BETWEEN: Duration = Duration::from_millis(20);
    /// How long it may take to settle every file and end.
    const SETTLING: Duration = Duration::from_secs(120);

    pub(super) fn run(path: &Path, force: bool) -> Result<(), CliError> {
        let mountpoint = status::canonical(path)?;
        let failed = |error| CliError::of(Exit::NotMounted, path.display(), &error);
        let Some(mount) = mount::mount_at(path).map_err(failed)? else { return run_elsewhere(&mountpoint, force) };
        if status::is_of_another(&mount) {
            return Err(status::not_served(&mountpoint));
        }
        // A mount without a process, or one whose process answers nobody, can still be taken away.
        let waiting = status::connect_to(&mount).and_then(|client| client.wait(ANSWER)).ok();
        if waiting.is_none() && mount_point::is_dead_mount(&mount.place) {
            return take_away(&mount);
        }
        if force {
            let written = write_back(&mount.place);
            end(&mount)?;
            let waiting = waiting.ok_or_else(|| not_durable(&mount.place, "no process answers for the mount"))?;
            finish(&mount, waiting, SETTLING)?;
            return written.map_err(|why| not_durable(&mount.place, &why));
        }
        unmount(&mount.place)?;
        waiting.map_or(Ok(()), |waiting| finish(&mount, waiting, QUIET))
    }

    /// Takes a mount away whose process has ended, and says so: nobody has made durable what was written last.
    fn take_away(mount: &Found) -> Result<(), CliError> {
        mount::unmount(&mount.place, true)?;
        let place = mount.place.display();
        CliError::warn(format_args!(
            "{place} was a dead mount: the process behind it had ended, and what programs had not synced may be lost"
        ));
        Ok(())
    }

    /// What is not mounted here may still be mounted there in another namespace, where an earlier unmount did not reach.
    fn run_elsewhere(mountpoint: &Path, force: bool) -> Result<(), CliError> {
        let Some(holder) = mount::holders(|mount| mount.place == mountpoint).into_iter().next() else {
            return Err(status::not_served(mountpoint));
        };
        if !force {
            return Err(held_elsewhere(&holder.mount).unwrap_or_else(|| still_busy(mountpoint)));
        }
        let waiting = status::connect_to(&holder.mount).and_then(|client| client.wait(ANSWER));
        let waiting = waiting.map_err(|error| status::failure(mountpoint, &error))?;
        let root = PathBuf::from(format!("/proc/{}/root", holder.pid));
        let written = write_back(&root.join(mountpoint.strip_prefix("/").unwrap_or(mountpoint)));
        end(&holder.mount)?;
        finish(&holder.mount, waiting, SETTLING)?;
        written.map_err(|why| not_durable(mountpoint, &why))
    }

    /// Hands over what programs have written, and says why it could not; a process that does not take it is not waited for.
    fn write_back(root: &Path) -> Result<(), String> {
        let root = root.to_owned();
        let (done, wait) = mpsc::channel();
        thread::spawn(move || {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            done.send(rustix::fs::open(root, flags, Mode::empty()).and_then(rustix::fs::syncfs))
        });
        let synced =
            wait.recv_timeout(SETTLING).map_err(|_| format!("the mount does not take it within {SETTLING:?}"))?;
        synced.map_err(|error| io::Error::from(error).to_string())
    }

    fn not_durable(place: &Path, why: &str) -> CliError {
        let what = format_args!("{} was ended, and not everything that was written is durable: {why}", place.display());
        CliError::new(Exit::Io, what)
    }

    /// Ends the mount, whoever has it.
    fn end(mount: &Found) -> Result<(), CliError> {
        let told = status::connect_to(mount).and_then(|client| client.tell(Ask::End, ANSWER));
        for place in mount::places_of_device(&mount.device) {
            mount::unmount(&place, true)?;
        }
        match told {
            Ok(_) | Err(ClientError::NotServed | ClientError::Broken) => Ok(()),
            Err(error) => Err(status::failure(&mount.place, &error)),
        }
    }

    /// Waits until the process has ended.
    fn finish(mount: &Found, mut waiting: Waiting, quiet: Duration) -> Result<(), CliError> {
        let mut ended = waiting.ended(quiet);
        if matches!(ended, Err(ClientError::Deadline)) {
            let held = held_elsewhere(mount);
            if let Some(error) = &held {
                report::tell(&format!("{error}: this waits a little"));
            }
            ended = waiting.ended(if held.is_some() { ELSEWHERE } else { SETTLING });
        }
        match ended {
            Ok(Ended { error: None }) => Ok(()),
            Ok(Ended { error: Some(error) }) => Err(CliError::new(Exit::Io, error)),
            Err(ClientError::Deadline) => Err(held_elsewhere(mount).unwrap_or_else(|| still_busy(&mount.place))),
            Err(error) => Err(status::failure(&mount.place, &error)),
        }
    }

    /// Where else the mount is, if that can be told.
    fn held_elsewhere(mount: &Found) -> Option<CliError> {
        let place = mount.place.display();
        let elsewhere = match mount::places_of_device(&mount.device).first() {
            Some(other) => format!("it is mounted at {} too", other.display()),
            None => {
                let holder = mount::holders(|other| other.device == mount.device).into_iter().next()?;
                format!("process {} ({}) has the mount in another mount namespace", holder.pid, holder.name)
            }
        };
        let what = format_args!("{place} is unmounted here, and the volume stays in use: {elsewhere}");
        Some(
            CliError::new(Exit::Other, what).hint(format_args!("`kmsfs umount --force {place}` ends it for everybody")),
        )
    }

    fn still_busy(place: &Path) -> CliError {
        let what = format_args!("{} is unmounted, but its process is still busy after {SETTLING:?}", place.display());
        CliError::new(Exit::Other, what)
    }

    fn unmount(mountpoint: &Path) -> Result<(), CliError> {
        let place = mountpoint.display();
        let until = Instant::now() + GLANCE;
        let mut result = mount::unmount(mountpoint, false);
        while matches!(result, Err(MountError::Busy)) && Instant::now() < until {
            thread::sleep(BETWEEN);
            result = mount::unmount(mountpoint, false);
        }
        result.map_err(|error| match error {
            MountError::Busy => {
                let hint = match mount::mounts_below(mountpoint).first() {
                    Some(inner) => format!("unmount what is mounted below it first: `umount {}`", inner.display()),
                    None => format!("close what is open below it (`fuser -vm {place}` lists it) and try again"),
                };
                CliError::new(Exit::Other, format_args!("{place} is in use")).hint(hint)
            }
            other => CliError::from(other),
        })
    }
}
