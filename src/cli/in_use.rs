//! Who uses a volume that cannot be locked: the mount, where that can be told, or the process.

use std::path::Path;
#[cfg(feature = "mount")]
use std::path::PathBuf;

use super::error::{CliError, Exit};

/// The failure of a lock of the canonical cipher directory `volume`, which the process `pid` holds if the kernel tells.
pub(crate) fn held(volume: &Path, pid: Option<i32>) -> CliError {
    #[cfg(feature = "mount")]
    if let Some((what, end)) = by_mount(volume, pid) {
        return CliError::new(Exit::Locked, what).hint(format_args!("`{end}` ends that mount"));
    }
    let holder = pid.map_or("another process".to_owned(), described);
    CliError::new(Exit::Locked, format_args!("the volume {} is in use by {holder}", volume.display()))
        .hint("try again when it has ended")
}

/// `process 4711 (kmsfs)`.
fn described(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.trim_end();
    if name.is_empty() { format!("process {pid}") } else { format!("process {pid} ({name})") }
}

/// What is said of the mount of a volume whose lock `pid` holds, and the command that ends it.
#[cfg(feature = "mount")]
fn by_mount(volume: &Path, pid: Option<i32>) -> Option<(String, String)> {
    use super::commands::status::process_of;
    use super::mount_point::is_dead_mount;
    use crate::mount;

    let by = |pid: Option<i32>| pid.map_or(String::new(), |pid| format!(" by {}", described(pid)));
    let said = |place: PathBuf, who: &str| {
        format!("the volume {} is in use: it is mounted at {}{who}", volume.display(), place.display())
    };
    let is_volume = |mount: &mount::Found| mount.source == volume;
    // A command beside the mount may be what holds the lock, and a mount that does not answer may be a dead one.
    let holds = |mount: &mount::Found| match process_of(mount) {
        Some(found) => pid.is_none_or(|pid| found == i64::from(pid)),
        None => !is_dead_mount(&mount.place),
    };
    if let Some(mount) = mount::mounts().into_iter().find(|mount| is_volume(mount) && holds(mount)) {
        let end = format!("kmsfs umount {}", mount.place.display());
        return Some((said(mount.place, &by(pid)), end));
    }
    let holder = mount::holders(|mount| is_volume(mount) && holds(mount)).into_iter().next()?;
    let who = format!("{}, in the mount namespace of process {} ({})", by(pid), holder.pid, holder.name);
    let end = format!("kmsfs umount --force {}", holder.mount.place.display());
    Some((said(holder.mount.place, &who), end))
}
