//! The table of mounts, which tells of a mount point without asking what is mounted there.
//!
//! What a mount is has a name that all mount namespaces share: the number of its device. What is mounted at a path, under
//! whatever name, is asked of the kernel in a way that even a dead filesystem answers.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};

/// Where the kernel shows the mounts that this process sees.
const TABLE: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    id: u64,
    place: Vec<u8>,
    /// `major:minor`.
    pub(super) device: String,
    options: String,
    kind: String,
    is_ours: bool,
    source: Vec<u8>,
    user: u32,
}

/// A mount of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where it is now.
    pub place: PathBuf,
    /// `major:minor`, which no other filesystem has as long as this one lives.
    pub device: String,
    /// Its options, of which only the kernel's flags.
    pub options: String,
    /// Its cipher directory, as whoever mounted it named it.
    pub source: PathBuf,
    /// Who mounted it.
    pub user: u32,
}

impl From<Mount> for Found {
    fn from(mount: Mount) -> Self {
        let path = |bytes| PathBuf::from(OsString::from_vec(bytes));
        let Mount { place, device, options, source, user, .. } = mount;
        Self { place: path(place), device, options, source: path(source), user }
    }
}

/// The mount of ours whose root is at `path`; none if there is another one, or none.
///
/// # Errors
/// Those of walking the path.
pub fn mount_at(path: &Path) -> io::Result<Option<Found>> {
    // Asked for nothing, the kernel asks no filesystem and lets everybody know.
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty())?;
    if !found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(None);
    }
    let table = fs::read(TABLE)?;
    Ok(ours(&table).find(|mount| mount.id == found.stx_mnt_id).map(Found::from))
}

/// What kind of filesystem is mounted at `path`; none if its root is not there.
#[must_use]
pub fn kind_at(path: &Path) -> Option<String> {
    let found = statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::empty()).ok()?;
    let is_root = found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    let table = is_root.then(|| fs::read(TABLE).ok()).flatten()?;
    table
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .find(|mount| mount.id == found.stx_mnt_id)
        .map(|mount| mount.kind)
}

/// All mounts of ours that this process sees.
#[must_use]
pub fn mounts() -> Vec<Found> {
    ours(&fs::read(TABLE).unwrap_or_default()).map(Found::from).collect()
}

/// Where the mount with this device is.
#[must_use]
pub fn places_of_device(device: &str) -> Vec<PathBuf> {
    mounts().into_iter().filter(|mount| mount.device == device).map(|mount| mount.place).collect()
}

/// A process in another mount namespace that has a mount of ours, and what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The process.
    pub pid: u32,
    /// What it is called.
    pub name: String,
    /// The mount, at its place there.
    pub mount: Found,
}

/// Processes that this one may look at, one of each other mount namespace, that have a mount of ours which `is_meant`.
#[must_use]
pub fn holders(is_meant: impl Fn(&Found) -> bool) -> Vec<Holder> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut seen: Vec<_> = namespace("self").into_iter().collect();
    let mut holders = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some((name, pid)) = entry.file_name().to_str().and_then(|name| Some((name.to_owned(), name.parse().ok()?)))
        else {
            continue;
        };
        let Some(space) = namespace(&name).filter(|space| !seen.contains(space)) else { continue };
        seen.push(space);
        let table = fs::read(entry.path().join("mountinfo")).unwrap_or_default();
        if let Some(mount) = ours(&table).map(Found::from).find(&is_meant) {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default().trim_end().to_owned();
            holders.push(Holder { pid, name, mount });
        }
    }
    holders
}

fn ours(table: &[u8]) -> impl Iterator<Item = Mount> + '_ {
    table.split(|byte| *byte == b'\n').filter_map(parse).filter(|mount| mount.is_ours)
}

/// The mounts of this process at `place`, the newest last; none if the table cannot be read.
pub(super) fn mounts_at(place: &Path) -> Vec<Mount> {
    mounts_in(&fs::read(TABLE).unwrap_or_default(), place)
}

/// The options of the newest mount at `place`, if it is one of ours.
#[must_use]
pub fn options_at(place: &Path) -> Option<String> {
    options_of(&mounts_at(place))
}

/// Where the volume of the canonical cipher directory `source` is mounted, as far as the table tells.
#[must_use]
pub fn places_of(source: &Path) -> Vec<PathBuf> {
    places_in(&fs::read(TABLE).unwrap_or_default(), source)
}

/// What is mounted below `place`, the newest first: each must be unmounted before it.
#[must_use]
pub fn mounts_below(place: &Path) -> Vec<PathBuf> {
    below(&fs::read(TABLE).unwrap_or_default(), place)
}

fn below(table: &[u8], place: &Path) -> Vec<PathBuf> {
    let mounts = table.split(|byte| *byte == b'\n').filter_map(parse);
    let places = mounts.map(|mount| PathBuf::from(OsString::from_vec(mount.place)));
    let mut below: Vec<_> = places.filter(|found| found != place && found.starts_with(place)).collect();
    below.reverse();
    below
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
    let id = text(fields.next()?).parse().ok()?;
    let device = text(fields.nth(1)?);
    let place = unescape(fields.nth(1)?);
    let options = text(fields.next()?);
    let mut filesystem = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = text(filesystem.next().unwrap_or_default());
    let is_ours = kind == "fuse.kmsfs";
    let source = unescape(filesystem.next().unwrap_or_default());
    let own = text(filesystem.next().unwrap_or_default());
    let user = own.split(',').find_map(|option| option.strip_prefix("user_id=")?.parse().ok()).unwrap_or(0);
    Some(Mount { id, place, device, options, kind, is_ours, source, user })
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
    fn the_last_one_below_a_place_comes_first() {
        let table = b"30 20 0:40 / /m rw - fuse.kmsfs /c rw\n31 30 0:41 / /m/a rw - tmpfs x rw\n\
                      32 31 0:42 / /m/a/b rw - tmpfs x rw\n33 20 0:43 / /mm rw - tmpfs x rw\n";
        assert_eq!(below(table, Path::new("/m")), ["/m/a/b", "/m/a"].map(PathBuf::from));
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
