//! Limits of the mount's backing device info that throttle bulk readers and writers. Only root may lift them; without, the
//! mount works and is slower for bulk data.

use std::path::Path;

use super::table;
use super::wishes::MAX_REQUEST;

/// Lifts the limits where this process may.
pub(super) fn lift_limits(mountpoint: &Path) {
    let Some(device) = table::mounts_at(mountpoint).pop().map(|mount| mount.device) else { return };
    // What is read ahead for one stream is one request.
    let read_ahead = (MAX_REQUEST / 1024).to_string();
    for (limit, value) in [("read_ahead_kb", read_ahead.as_str()), ("strict_limit", "0"), ("max_ratio", "100")] {
        let path = format!("/sys/class/bdi/{device}/{limit}");
        if let Err(error) = std::fs::write(&path, value) {
            tracing::debug!("{path} stays as it is: {error}");
        }
    }
}
