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
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
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
            Err(ClientError::NotServed) if !is_fuse_mount(&mountpoint) => return Err(not_mounted(&mountpoint)),
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

    /// Whether the mount table has a FUSE filesystem of ours at `mountpoint`.
    fn is_fuse_mount(mountpoint: &Path) -> bool {
        let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
        table.split(|byte| *byte == b'\n').any(|line| is_ours_at(line, mountpoint))
    }

    /// A line such as `36 35 0:33 / /mnt rw,nosuid - fuse.kmsfs kmsfs rw`.
    fn is_ours_at(line: &[u8], mountpoint: &Path) -> bool {
        let mut fields = line.split(|byte| *byte == b' ');
        let at = fields.nth(4).map(unescape);
        let kind = fields.skip_while(|field| *field != b"-").nth(1);
        at.as_deref() == Some(mountpoint.as_os_str().as_bytes()) && kind == Some(b"fuse.kmsfs")
    }

    /// Undoes the `\040` of spaces, tabs, newlines and backslashes.
    fn unescape(field: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(field.len());
        let mut rest = field;
        while let Some((first, after)) = rest.split_first() {
            let octal = after.get(..3).filter(|_| *first == b'\\');
            let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
            let escaped = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
            bytes.push(escaped.unwrap_or(*first));
            rest = if escaped.is_some() { &after[3..] } else { after };
        }
        bytes
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn reads_the_mount_table() {
            let line = br"36 35 0:33 / /mnt/a\040b\134c rw,nosuid shared:1 - fuse.kmsfs /c rw,user_id=0";
            assert!(is_ours_at(line, Path::new(r"/mnt/a b\c")));
            assert!(!is_ours_at(line, Path::new("/mnt")));
            assert!(!is_ours_at(b"36 35 0:33 / /mnt rw - ext4 /dev/sda rw", Path::new("/mnt")));
            assert!(!is_ours_at(b"", Path::new("/mnt")));
        }
    }
}
