//! Limits of the mount's backing device info that throttle bulk readers and writers. Only root may lift them; without, the
//! mount works and is slower for bulk data.

use std::path::Path;

use super::table;

/// Bytes read ahead for one stream, in KiB.
const READ_AHEAD: &str = "1024";

/// Lifts the limits where this process may.
pub(super) fn lift_limits(mountpoint: &Path) {
    let Some(device) = table::mounts_at(mountpoint).pop().map(|mount| mount.device) else { return };
    for (limit, value) in [("read_ahead_kb", READ_AHEAD), ("strict_limit", "0"), ("max_ratio", "100")] {
        let path = format!("/sys/class/bdi/{device}/{limit}");
        if let Err(error) = std::fs::write(&path, value) {
            tracing::debug!("{path} stays as it is: {error}");
        }
    }
}
