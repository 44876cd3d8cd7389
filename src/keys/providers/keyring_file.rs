//! The file that a keyring lies in: read only if nobody else can read it, made whole or not at all and never in the place of
//! another file, and replaced whole or not at all by one process at a time.

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, FlockOperation, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::super::{ProviderError, ProviderErrorKind};
use super::keyring::MAX_LEN;
use crate::crypto::random_array;
use crate::format::hex;

/// How every keyring begins.
const PREFACE: &[u8] = b"# A kmsfs keyring";
/// The longest wait for another process that changes the same keyring.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp(u64, u64, u64, [i64; 4]);

impl Stamp {
    fn new(found: &std::fs::Metadata) -> Self {
        let times = [found.mtime(), found.mtime_nsec(), found.ctime(), found.ctime_nsec()];
        Self(found.dev(), found.ino(), found.size(), times)
    }

    /// Of what is at `path` now, if there is something.
    pub(super) fn of(path: &Path) -> Option<Self> {
        std::fs::symlink_metadata(path).ok().as_ref().map(Self::new)
    }
}

/// The directory of the file at `path`.
pub(super) fn hold_directory(path: &Path) -> Option<OwnedFd> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Where the file that was at `path` is found in its held directory, whatever its path leads to now.
pub(super) fn within(directory: &OwnedFd, path: &Path) -> Option<PathBuf> {
    Some(Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(path.file_name()?))
}

/// The keyring file at `path`, which must be a regular file that only its owner may touch: this user or root.
///
/// # Errors
/// `KeyNotFound` if there is none, `Denied`, or `Misconfigured` if others may read it or it is no file.
pub(super) fn read(path: &Path) -> Result<(Zeroizing<Vec<u8>>, Stamp), ProviderError> {
    let file = open(path)?;
    let stamp = file.metadata().map_err(|error| failed(path, "cannot be read", &error))?;
    Ok((read_from(path, &file)?, Stamp::new(&stamp)))
}

fn open(path: &Path) -> Result<File, ProviderError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| not_opened(path, error))?;
    let file = File::from(fd);
    let failed = |error: io::Error| failed(path, "cannot be read", &error);
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode();
    if !metadata.is_file() {
        return Err(misconfigured(path, "is not a regular file"));
    }
    check_is_keyring(path, &file, mode)?;
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != user && owner != 0 {
        let message = format!("belongs to user {owner}, who can use its keys and put others in: chown {user} it");
        return Err(misconfigured(path, &message));
    }
    if mode & 0o077 != 0 {
        let message = format!("has mode {:04o}, so that others can use its keys: chmod 600 it", mode & 0o7777);
        return Err(misconfigured(path, &message));
    }
    Ok(file)
}

/// What anybody can read and does not begin as a keyring is none, and should not be closed to others.
fn check_is_keyring(path: &Path, file: &File, mode: u32) -> Result<(), ProviderError> {
    let mut begin = [0; PREFACE.len()];
    if mode & 0o077 == 0 || file.read_exact_at(&mut begin, 0).is_ok() && begin == *PREFACE {
        return Ok(());
    }
    Err(misconfigured(path, "is no keyring: name a file that `kmsfs init` made, or one that is missing"))
}

fn read_from(path: &Path, file: &File) -> Result<Zeroizing<Vec<u8>>, ProviderError> {
    let limit = MAX_LEN as u64 + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_LEN + 1));
    file.take(limit).read_to_end(&mut bytes).map_err(|error| failed(path, "cannot be read", &error))?;
    Ok(bytes)
}

/// Replaces the keyring file at `path` by what `change` makes of it: durable when this returns, and under a lock from reading
/// on, so that no change of another process is lost.
///
/// # Errors
/// As [`read`]; those of `change`; `Unavailable` if another process keeps the lock. The file is then as it was.
pub(super) fn replace<T>(
    path: &Path,
    change: impl FnOnce(&[u8]) -> Result<(Zeroizing<String>, T), ProviderError>,
) -> Result<T, ProviderError> {
    let locked = lock(path)?;
    let (text, result) = change(&read_from(path, &locked)?)?;
    let failed = |error: io::Error| failed(path, "cannot be changed", &error);
    remove_abandoned(path).map_err(failed)?;
    let owner = locked.metadata().map_err(failed)?;
    let (parent, temporary) = temporary_beside(path)?;
    let written = write_temporary(&temporary, &text, Some((owner.uid(), owner.gid())))
        .and_then(|()| Ok(rustix::fs::renameat(CWD, &temporary, CWD, path)?));
    if written.is_err() {
        // Nothing better can be done about a second failure than to report the first one.
        let _ = std::fs::remove_file(&temporary);
    }
    written.and_then(|()| File::open(parent)?.sync_all()).map_err(failed)?;
    Ok(result)
}

/// The file at `path`, locked; whoever had the lock before may have put another one in its place.
fn lock(path: &Path) -> Result<File, ProviderError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        let file = open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let same = file.metadata().ok().map(|found| Stamp::new(&found)) == Stamp::of(path);
                if same {
                    return Ok(file);
                }
            }
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(failed(path, "cannot be locked", &error.into())),
        }
        if Instant::now() >= deadline {
            let message = "is being changed by another process: try again";
            return Err(at(path, &ProviderError::new(ProviderErrorKind::Unavailable, message)));
        }
        std::thread::sleep(LOCK_PAUSE);
    }
}

/// Removes what killed processes left half written: it holds keys. Needs the lock.
fn remove_abandoned(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let prefix = format!(".{}.", name.to_string_lossy());
    for entry in std::fs::read_dir(parent)? {
        let entry = entry?;
        let ours = |name: &str| name.strip_prefix(&prefix).is_some_and(|rest| hex::decode::<8>(rest).is_some());
        if entry.file_name().to_str().is_some_and(ours) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The directory of `path`, and a new name in it.
fn temporary_beside(path: &Path) -> Result<(&Path, PathBuf), ProviderError> {
    let Some(name) = path.file_name() else {
        return Err(misconfigured(path, "is not the name of a file"));
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = format!(".{}.{}", name.to_string_lossy(), hex::encode(&random_array::<8>()));
    Ok((parent, parent.join(name)))
}

/// Writes a new keyring file at `path`.
///
/// # Errors
/// `Misconfigured` if `path` exists or cannot be a keyring's, `Denied` if writing is not permitted, `Storage` if it fails.
pub(super) fn write_new(path: &Path, text: &str) -> Result<(), ProviderError> {
    let (parent, temporary) = temporary_beside(path)?;
    let failed = |error: io::Error| failed(path, "cannot be created", &error);
    let is_new = !parent.exists();
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    let written = write_temporary(&temporary, text, None).and_then(|()| publish(&temporary, path));
    if written.is_err() {
        // Nothing better can be done about a second failure than to report the first one.
        let _ = std::fs::remove_file(&temporary);
    }
    written.and_then(|()| sync_names(parent, is_new)).map_err(failed)
}

/// Makes the names in a directory durable, and if it is new, its own name and those of the new ones above it.
fn sync_names(directory: &Path, is_new: bool) -> io::Result<()> {
    let directory = File::open(directory)?;
    // Those above may be none that this user can open.
    if is_new { Ok(rustix::fs::syncfs(directory)?) } else { directory.sync_all() }
}

fn write_temporary(path: &Path, text: &str, owner: Option<(u32, u32)>) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let owner_only = Mode::RUSR | Mode::WUSR;
    let fd = rustix::fs::open(path, flags, owner_only)?;
    rustix::fs::fchmod(&fd, owner_only)?;
    let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if let Some((uid, gid)) = owner.filter(|owner| *owner != me) {
        rustix::fs::fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    let mut file = File::from(fd);
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Gives `temporary` its name, which must be free.
fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
        // Not every filesystem knows the flag; a hard link does not replace either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(CWD, temporary, CWD, path, AtFlags::empty())?;
            std::fs::remove_file(temporary)
        }
        result => Ok(result?),
    }
}

fn not_opened(path: &Path, error: Errno) -> ProviderError {
    match error {
        Errno::LOOP => misconfigured(path, "is a symbolic link: name the file itself"),
        Errno::NOENT | Errno::NOTDIR => {
            let message = "does not exist: is its disk there, or is it elsewhere (--keyring)?";
            at(path, &ProviderError::new(ProviderErrorKind::KeyNotFound, message))
        }
        error => failed(path, "cannot be opened", &error.into()),
    }
}

fn failed(path: &Path, what: &str, error: &io::Error) -> ProviderError {
    match error.kind() {
        io::ErrorKind::AlreadyExists => misconfigured(path, "exists already, and a keyring is never overwritten"),
        io::ErrorKind::PermissionDenied => {
            at(path, &ProviderError::new(ProviderErrorKind::Denied, format!("{what}: {error}")))
        }
        // A path that cannot be one of a keyring.
        io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory | io::ErrorKind::InvalidFilename => {
            misconfigured(path, &format!("{what}: {error}"))
        }
        _ => at(path, &ProviderError::new(ProviderErrorKind::Storage, format!("{what}: {error}"))),
    }
}

fn misconfigured(path: &Path, message: &str) -> ProviderError {
    at(path, &ProviderError::new(ProviderErrorKind::Misconfigured, message))
}

/// `error` with the keyring's path.
pub(super) fn at(path: &Path, error: &ProviderError) -> ProviderError {
    ProviderError::new(error.kind, format!("keyring {}: {}", path.display(), error.message))
}
