//! The table of mounts, which tells of a mount point without asking what is mounted there.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    place: Vec<u8>,
    /// `major:minor`.
    pub(super) device: String,
    options: String,
    is_ours: bool,
    source: Vec<u8>,
}

/// The mounts of this process at `place`, the newest last; none if the table cannot be read.
pub(super) fn mounts_at(place: &Path) -> Vec<Mount> {
    mounts_in(&std::fs::read("/proc/self/mountinfo").unwrap_or_default(), place)
}

/// The options of the newest mount at `place`, if it is one of ours.
#[must_use]
pub fn options_at(place: &Path) -> Option<String> {
    options_of(&mounts_at(place))
}

/// Whether a mount of ours is at `place`.
#[must_use]
pub fn is_ours_at(place: &Path) -> bool {
    mounts_at(place).iter().any(|mount| mount.is_ours)
}

/// Where the volume of the canonical cipher directory `source` is mounted, as far as the table tells.
#[must_use]
pub fn places_of(source: &Path) -> Vec<PathBuf> {
    places_in(&std::fs::read("/proc/self/mountinfo").unwrap_or_default(), source)
}

fn places_in(table: &[u8], source: &Path) -> Vec<PathBuf> {
    let mounts = table.split(|byte| *byte == b'\n').filter_map(parse);
    let ours = mounts.filter(|mount| mount.is_ours && mount.source == source.as_os_str().as_bytes());
    ours.map(|mount| PathBuf::from(OsString::from_vec(mount.place))).collect()
}

fn options_of(mounts: &[Mount]) -> Option<String> {
    mounts.last().filter(|mount| mount.is_ours).map(|mount| mount.options.clone())
}

fn mounts_in(table: &[u8], place: &Path) -> Vec<Mount> {
    let mounts = table.split(|byte| *byte == b'\n').filter_map(parse);
    mounts.filter(|mount| mount.place == place.as_os_str().as_bytes()).collect()
}

/// A line such as `36 35 0:33 / /mnt rw,nosuid - fuse.kmsfs kmsfs rw`.
fn parse(line: &[u8]) -> Option<Mount> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let mut fields = line.split(|byte| *byte == b' ');
    let device = text(fields.nth(2)?);
    let place = unescape(fields.nth(1)?);
    let options = text(fields.next()?);
    let mut filesystem = fields.skip_while(|field| *field != b"-").skip(1);
    let is_ours = filesystem.next() == Some(b"fuse.kmsfs");
    let source = unescape(filesystem.next().unwrap_or_default());
    Some(Mount { place, device, options, is_ours, source })
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
        let is_ours = |line: &[u8], place: &str| mounts_in(line, Path::new(place)).iter().any(|mount| mount.is_ours);
        let line = br"36 35 0:33 / /mnt/a\040b\134c rw,nosuid shared:1 - fuse.kmsfs /c rw,user_id=0";
        assert!(is_ours(line, r"/mnt/a b\c"));
        assert!(!is_ours(line, "/mnt"));
        assert!(!is_ours(b"36 35 0:33 / /mnt rw - ext4 /dev/sda rw", "/mnt"));
        assert!(!is_ours(b"", "/mnt"));
    }

    #[test]
    fn a_volume_is_found_by_its_cipher_directory() {
        let table =
            b"30 20 0:40 / /mnt/a\\040b rw - fuse.kmsfs /c\\040d rw\n31 20 0:41 / /mnt/c rw - ext4 /c\\040d rw\n";
        assert_eq!(places_in(table, Path::new("/c d")), [PathBuf::from("/mnt/a b")]);
        assert_eq!(places_in(table, Path::new("/c")), Vec::<PathBuf>::new());
    }

    #[test]
    fn only_mounts_of_ours_have_options_to_change() {
        let table = b"30 20 0:40 / /mnt/a\\040b rw,nosuid - fuse.kmsfs x rw\n31 20 0:41 / /mnt/c rw - ext4 x rw\n";
        let options = |place: &str| options_of(&mounts_in(table, Path::new(place)));
        assert_eq!(options("/mnt/a b").as_deref(), Some("rw,nosuid"));
        assert_eq!(options("/mnt/c"), None);
        assert_eq!(options("/mnt"), None);
    }

    #[test]
    fn the_newest_mount_at_a_place_counts() {
        let table = b"20 1 8:1 / / rw - ext4 a rw\n30 20 0:40 / /mnt/a\\040b rw - fuse x rw\n31 20 0:41 / /mnt/a\\040b rw - fuse x rw\n";
        let device = |place: &str| mounts_in(table, Path::new(place)).pop().map(|mount| mount.device);
        assert_eq!(device("/mnt/a b"), Some("0:41".to_owned()));
        assert_eq!(device("/mnt/c"), None);
    }
}
