//! Limits of the mount's backing device info that throttle bulk readers and writers. Only root may lift them; without, the
//! mount works and is slower for bulk data.

use std::path::Path;

/// Bytes read ahead for one stream, in KiB.
const READ_AHEAD: &str = "1024";

/// Lifts the limits where this process may.
pub(super) fn lift_limits(mountpoint: &Path) {
    let Some(device) = device_of(mountpoint) else { return };
    for (limit, value) in [("read_ahead_kb", READ_AHEAD), ("strict_limit", "0"), ("max_ratio", "100")] {
        let path = format!("/sys/class/bdi/{device}/{limit}");
        if let Err(error) = std::fs::write(&path, value) {
            tracing::debug!("{path} stays as it is: {error}");
        }
    }
}

/// `major:minor` of the newest mount at this place, without asking the mount itself, which nobody serves yet.
fn device_of(mountpoint: &Path) -> Option<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    find_device(&table, mountpoint.to_str()?)
}

fn find_device(table: &str, mountpoint: &str) -> Option<String> {
    let place = mountpoint.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012");
    let line = table.lines().rev().find(|line| line.split(' ').nth(4) == Some(&place))?;
    line.split(' ').nth(2).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_mount_at_a_place_counts() {
        let table = "20 1 8:1 / / rw - ext4 a rw\n30 20 0:40 / /mnt/a\\040b rw - fuse x rw\n31 20 0:41 / /mnt/a\\040b rw - fuse x rw\n";
        assert_eq!(find_device(table, "/mnt/a b"), Some("0:41".to_owned()));
        assert_eq!(find_device(table, "/mnt/c"), None);
    }
}
