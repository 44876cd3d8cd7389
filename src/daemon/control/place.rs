//! Where control sockets lie: in a directory that only the user of the mount may enter, each under the device of its mount. Who
//! looks for one finds it in the places that follow from the user alone, and where the kernel says that there are sockets: the
//! session that mounted may have had another environment.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

use super::ControlError;

/// What the directories are called.
const NAME: &str = "kmsfs";
/// The kernel's list of sockets.
const SOCKETS: &str = "/proc/net/unix";
/// A path of so many bytes fits the address of a socket, and the longest name of one is so long.
const MAX_PATH: usize = 107;
const MAX_SOCKET: usize = 32;

/// Where this user's sockets lie, for a mount at `mountpoint`; made if it is missing.
///
/// # Errors
/// [`ControlError`] of the last place that there is.
pub fn directory(runtime_directory: Option<&Path>, mountpoint: &Path) -> Result<PathBuf, ControlError> {
    let user = rustix::process::geteuid().as_raw();
    let mut last = Err(ControlError::NoDirectory);
    // Below the mount it would not be found.
    for place in usual(user, runtime_directory).into_iter().filter(|place| !place.starts_with(mountpoint)) {
        last = check(&place).and_then(|()| make(&place)).map(|()| place);
        if last.is_ok() {
            break;
        }
    }
    last
}

/// Where sockets of `user` may lie.
pub(super) fn of_user(user: u32, runtime_directory: Option<&Path>) -> Vec<PathBuf> {
    let ours = runtime_directory.filter(|_| rustix::process::geteuid().as_raw() == user);
    let mut places = usual(user, ours);
    places.extend(listed(&fs::read_to_string(SOCKETS).unwrap_or_default()));
    places.retain(|place| is_private(place, user));
    places
}

/// Where this user's next mount has its socket, and the places that come before it with the reason why they do not serve.
/// Nothing is made.
///
/// # Errors
/// [`ControlError`] of each place if none serves.
pub fn find(runtime_directory: Option<&Path>) -> Result<(PathBuf, Vec<ControlError>), Vec<ControlError>> {
    let mut refused = Vec::new();
    for place in usual(rustix::process::geteuid().as_raw(), runtime_directory) {
        match check(&place) {
            Ok(()) => return Ok((place, refused)),
            Err(error) => refused.push(error),
        }
    }
    Err(refused)
}

/// Whether [`make`] can be expected to succeed, and a socket to be made there.
fn check(directory: &Path) -> Result<(), ControlError> {
    let io = |error: Errno| ControlError::Io { path: directory.to_owned(), error: error.into() };
    let may_write =
        |place: &Path| accessat(CWD, place, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).map_err(io);
    check_length(directory)?;
    match fs::symlink_metadata(directory) {
        Ok(_) => check_private(directory).and_then(|()| may_write(directory)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => may_write(directory.parent().unwrap_or(directory)),
        Err(error) => Err(ControlError::Io { path: directory.to_owned(), error }),
    }
}

fn usual(user: u32, runtime_directory: Option<&Path>) -> Vec<PathBuf> {
    if user == 0 {
        return vec![Path::new("/run").join(NAME)];
    }
    let runtime = runtime_directory.map(|path| path.join(NAME));
    let usual = [format!("/run/user/{user}/{NAME}"), format!("/tmp/{NAME}-{user}")];
    runtime.into_iter().chain(usual.map(PathBuf::from)).collect()
}

/// Directories of the kernel's list of sockets that are called as ours are.
fn listed(sockets: &str) -> Vec<PathBuf> {
    let places = sockets.lines().filter_map(|line| Path::new(&line[line.find(" /")? + 1..]).parent());
    let named =
        |place: &&Path| place.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(NAME.as_bytes()));
    let mut places: Vec<PathBuf> = places.filter(named).map(Path::to_owned).collect();
    places.dedup();
    places
}

fn is_private(directory: &Path, user: u32) -> bool {
    fs::symlink_metadata(directory)
        .is_ok_and(|found| found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0)
}

/// Makes the directory of the sockets if it is missing, and checks that it is only ours.
pub(super) fn make(directory: &Path) -> Result<(), ControlError> {
    let io = |error| ControlError::Io { path: directory.to_owned(), error };
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io(error)),
        _ => {}
    }
    check_private(directory)
}

fn check_private(directory: &Path) -> Result<(), ControlError> {
    let private = is_private(directory, rustix::process::geteuid().as_raw());
    if private { Ok(()) } else { Err(ControlError::UnsafeDirectory(directory.to_owned())) }
}

/// A socket with a longer path could not be bound, and not be connected to.
fn check_length(directory: &Path) -> Result<(), ControlError> {
    let fits = directory.as_os_str().len() + 1 + MAX_SOCKET <= MAX_PATH;
    if fits { Ok(()) } else { Err(ControlError::LongPath(directory.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn directories_of_ours_are_read_from_the_list_of_sockets() {
        let list = "Num RefCount Protocol Flags Type St Inode Path\n\
                    0: 00000002 00000000 00010000 0001 01 20 /run/user/7/kmsfs/0:40\n\
                    0: 00000002 00000000 00010000 0001 01 21 /a b/kmsfs/4711\n\
                    0: 00000002 00000000 00010000 0001 01 22 @abstract\n\
                    0: 00000002 00000000 00010000 0001 01 23 /run/other/kmsfs\n";
        assert_eq!(listed(list), [PathBuf::from("/run/user/7/kmsfs"), PathBuf::from("/a b/kmsfs")]);
    }

    #[test]
    fn a_place_is_judged_before_anything_is_made_there() {
        let home = tempfile::tempdir().unwrap();
        let place = home.path().join(NAME);
        check(&place).unwrap();
        assert!(!place.exists());
        make(&place).unwrap();
        check(&place).unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(check(&place), Err(ControlError::UnsafeDirectory(_))));
        assert!(matches!(check(&home.path().join("missing/kmsfs")), Err(ControlError::Io { .. })));
        let long = |len: usize| Path::new("/tmp").join("x".repeat(len - "/tmp/".len()));
        check(&long(MAX_PATH - 1 - MAX_SOCKET)).unwrap();
        assert!(matches!(check(&long(MAX_PATH - MAX_SOCKET)), Err(ControlError::LongPath(_))));
    }

    #[test]
    fn each_user_has_places_without_an_environment() {
        assert_eq!(usual(0, Some(Path::new("/r"))), [PathBuf::from("/run/kmsfs")]);
        assert_eq!(usual(7, None), ["/run/user/7/kmsfs", "/tmp/kmsfs-7"].map(PathBuf::from));
        assert_eq!(usual(7, Some(Path::new("/r")))[0], PathBuf::from("/r/kmsfs"));
    }
}
