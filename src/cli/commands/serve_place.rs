//! The place of a mount: what is there already, and who gets in.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::cli::error::{CliError, Exit};
use crate::cli::{mount_point, report};
use crate::mount;

/// A volume that is served at the mount point already; a dead one there is taken away.
pub(super) fn refuse_mounted(mountpoint: &Path, cipher_directory: &Path) -> Result<(), CliError> {
    let Some(found) = mount::mount_at(mountpoint).ok().flatten() else { return Ok(()) };
    if mount_point::is_dead_mount(mountpoint) {
        return Ok(());
    }
    let (volume, place) = (found.source.display(), found.place.display());
    if found.source == cipher_directory {
        return Err(CliError::new(Exit::Locked, format_args!("{volume} is mounted at {place} already"))
            .hint(format_args!("`kmsfs status {place}` shows how it fares")));
    }
    Err(CliError::new(
        Exit::MountPoint,
        format_args!("the mount point {place}: another volume, {volume}, is mounted there"),
    )
    .hint(format_args!("`kmsfs umount {place}` takes it away, or name another directory")))
}

/// `init` makes a directory of mode 0700, and the kernel holds other users to that mode at the root of the mount.
pub(super) fn advise_on_mode(cipher_directory: &Path, mountpoint: &Path) {
    let mode = std::fs::metadata(cipher_directory).map(|found| found.permissions().mode() & 0o7777);
    if let Ok(mode) = mode
        && mode & 0o011 == 0
    {
        let place = mountpoint.display();
        report::tell(&format!(
            "hint: allow_other alone lets nobody in: the root of the volume has mode {mode:04o}; `chmod 711 {place}` lets others pass"
        ));
    }
}
