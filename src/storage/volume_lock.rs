//! The lock of a volume, between the processes of one host and, where the backing filesystem carries it, of several.
//!
//! Invariants:
//! * the directory `.kmsfs` is locked first: every process of this host that reaches it through the same mount is refused there, one of
//!   an earlier version too;
//! * then the file `.kmsfs/lock`, in both ways that there are: filesystems of several hosts carry `flock(2)` of files, or locks of
//!   ranges, or both, and neither for directories.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::format::lease::{self, Lease};
use crate::format::name::LOCK_FILE;

use super::Host;
use super::file::lock_whole_range;
use super::lease_file::LeaseFile;

/// How often a lock file may be replaced while it is being locked.
const ATTEMPTS: usize = 8;
/// Filesystems whose locks one kernel keeps: ext2 to ext4, XFS, btrfs, tmpfs, ramfs, ZFS, F2FS, bcachefs, overlayfs.
const OF_ONE_KERNEL: [rustix::fs::FsWord; 9] =
    [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x8584_58F6, 0x2FC1_2FC1, 0xF2F5_2010, 0xCA45_1A4E, 0x794C_7630];
/// SMB, where both kinds are locks of ranges, and the second conflicts with the first of the same process.
const ONE_KIND: [rustix::fs::FsWord; 3] = [0xFF53_4D42, 0xFE53_4D42, 0x517B];

/// How a volume is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// By its only writer.
    Exclusive,
    /// By one of any number of readers.
    Shared,
}

/// A locked volume; dropping it unlocks.
#[derive(Debug)]
pub struct VolumeLock {
    pub(super) directory: OwnedFd,
    _file: Option<OwnedFd>,
    host: Host,
}

/// Why a volume cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process of this host holds it.
    #[error("the volume {} is in use by {}", volume.display(), pid.map_or("another process".into(), |pid| format!("process {pid}")))]
    Held {
        /// The volume's cipher directory.
        volume: PathBuf,
        /// The process, if the kernel tells.
        pid: Option<i32>,
    },
    /// Somebody holds it who has reached it through another mount of the backing filesystem: another host, as a rule.
    #[error("the volume is in use elsewhere{}", said.as_ref().map_or(String::new(), |said| format!(": by {said}, as the lease says that lies there")))]
    Elsewhere {
        /// What the lease says, which is not authenticated here.
        said: Option<Box<Lease>>,
        /// The lease names a process of this host, and that has ended.
        gone: bool,
    },
    /// The filesystem does not lock.
    #[error("the volume cannot be locked: {0}")]
    Io(#[from] io::Error),
}

impl LockError {
    /// The same of the volume in this cipher directory.
    pub(super) fn of(self, path: &Path) -> Self {
        match self {
            Self::Held { pid, .. } => Self::Held { volume: path.to_owned(), pid },
            other => other,
        }
    }

    /// Before anybody has said which volume it is.
    fn held(pid: Option<i32>) -> Self {
        Self::Held { volume: PathBuf::new(), pid }
    }
}

impl VolumeLock {
    pub(super) fn take(directory: OwnedFd, mode: LockMode) -> Result<Self, LockError> {
        lock_directory(&directory, mode)?;
        let host = Host::of_process();
        let file = lock_file(directory.as_fd(), mode, &host)?;
        Ok(Self { directory, _file: file, host })
    }

    /// Who holds it.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Whether one kernel keeps the locks of this filesystem, so that no other host can hold this one.
    #[must_use]
    pub fn is_of_one_kernel(&self) -> bool {
        rustix::fs::fstatfs(&self.directory).is_ok_and(|found| OF_ONE_KERNEL.contains(&found.f_type))
    }

    /// The volume's lease.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn lease_file(&self) -> io::Result<LeaseFile> {
        lease_file(self.directory.as_fd())
    }
}

/// With a descriptor of its own, which must not keep the lock of the other.
fn lease_file(volume: BorrowedFd<'_>) -> io::Result<LeaseFile> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(LeaseFile::new(rustix::fs::openat(volume, ".", flags, Mode::empty())?))
}

/// Locks a directory, which holds on this host only.
pub(super) fn lock_directory(directory: &OwnedFd, mode: LockMode) -> Result<(), LockError> {
    match rustix::fs::flock(directory, operation(mode)) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(LockError::held(lock_holder(directory.as_fd()))),
        Err(error) if is_not_carried(error) => Ok(()),
        Err(error) => Err(LockError::Io(error.into())),
    }
}

fn operation(mode: LockMode) -> FlockOperation {
    match mode {
        LockMode::Exclusive => FlockOperation::NonBlockingLockExclusive,
        LockMode::Shared => FlockOperation::NonBlockingLockShared,
    }
}

/// A filesystem without locks is no error: the lease stays.
fn is_not_carried(error: Errno) -> bool {
    matches!(error, Errno::NOLCK | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL)
}

fn lock_file(volume: BorrowedFd<'_>, mode: LockMode, host: &Host) -> Result<Option<OwnedFd>, LockError> {
    for _ in 0..ATTEMPTS {
        let Some((file, writable)) = open_file(volume, mode)? else { return Ok(None) };
        match lock_both_ways(&file, mode, writable) {
            Err(Errno::WOULDBLOCK | Errno::ACCESS) => return Err(refused(volume, &file, host)),
            result => result.map_err(io::Error::from)?,
        }
        if is_named(volume, &file) {
            return Ok(Some(file));
        }
    }
    Err(LockError::Io(io::Error::other("somebody replaces .kmsfs/lock again and again")))
}

/// Who removes the file and makes another would lock that one.
fn is_named(volume: BorrowedFd<'_>, file: &OwnedFd) -> bool {
    let named = rustix::fs::statat(volume, LOCK_FILE, AtFlags::SYMLINK_NOFOLLOW);
    let locked = rustix::fs::fstat(file);
    matches!((named, locked), (Ok(a), Ok(b)) if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

fn lock_both_ways(file: &OwnedFd, mode: LockMode, writable: bool) -> rustix::io::Result<()> {
    let carried = |result: rustix::io::Result<()>| match result {
        Err(error) if is_not_carried(error) => Ok(()),
        result => result,
    };
    carried(rustix::fs::flock(file, operation(mode)))?;
    let exclusive = mode == LockMode::Exclusive;
    if (exclusive && !writable) || ONE_KIND.contains(&rustix::fs::fstatfs(file)?.f_type) {
        return Ok(());
    }
    carried(lock_whole_range(file.as_fd(), exclusive))
}

/// The lock file, made if it is missing, and whether it can be written. None where there is none and none can be made.
fn open_file(volume: BorrowedFd<'_>, mode: LockMode) -> io::Result<Option<(OwnedFd, bool)>> {
    let usual = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = |access| rustix::fs::openat(volume, LOCK_FILE, access | usual, Mode::empty());
    for _ in 0..ATTEMPTS {
        let opened = match mode {
            LockMode::Exclusive => match open(OFlags::RDWR) {
                Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) => open(OFlags::RDONLY).map(|file| (file, false)),
                result => result.map(|file| (file, true)),
            },
            LockMode::Shared => open(OFlags::RDONLY).map(|file| (file, false)),
        };
        match opened {
            Ok((file, _)) if !is_regular(&file)? => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, ".kmsfs/lock is not a regular file"));
            }
            Ok(found) => return Ok(Some(found)),
            Err(Errno::NOENT) => match make_like(volume, LOCK_FILE) {
                Ok(_) | Err(Errno::EXIST) => {}
                Err(Errno::ROFS | Errno::ACCESS | Errno::PERM | Errno::NOSPC | Errno::DQUOT) => return Ok(None),
                Err(error) => return Err(error.into()),
            },
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::Interrupted.into())
}

fn is_regular(file: &OwnedFd) -> io::Result<bool> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(file)?.st_mode) == FileType::RegularFile)
}

/// A new file for all who may change `directory`, whoever makes it.
pub(super) fn make_like(directory: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?;
    let of = rustix::fs::fstat(directory)?;
    // Not everybody may give files away; then it stays with who made it.
    let _ = rustix::fs::fchown(&file, Some(Uid::from_raw(of.st_uid)), Some(Gid::from_raw(of.st_gid)));
    let _ = rustix::fs::fchmod(&file, Mode::from_raw_mode(of.st_mode & 0o666));
    Ok(file)
}

/// Why the lock file cannot be had, as far as this host and the lease can tell.
fn refused(volume: BorrowedFd<'_>, file: &OwnedFd, host: &Host) -> LockError {
    if let Some(pid) = lock_holder(file.as_fd()) {
        return LockError::held(Some(pid));
    }
    let bytes = lease_file(volume).and_then(|file| file.read());
    let said = bytes.ok().flatten().and_then(|seen| lease::parse(&seen.bytes).map(|parsed| Box::new(parsed.content)));
    let gone = said.as_ref().is_some_and(|said| host.knows_ended(said));
    LockError::Elsewhere { said, gone }
}

/// The process that holds a lock on this inode, as `/proc/locks` tells. It does not on filesystems whose files show
/// another device than their lock (btrfs, overlayfs), and not across process namespaces.
fn lock_holder(file: BorrowedFd<'_>) -> Option<i32> {
    let stat = rustix::fs::fstat(file).ok()?;
    let device = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| flock_holder(line, device, stat.st_ino))
}

/// The process of a line such as `1: FLOCK  ADVISORY  WRITE 4711 fd:01:393217 0 EOF`, if it is about this inode.
fn flock_holder(line: &str, (major, minor): (u32, u32), inode: u64) -> Option<i32> {
    let mut fields = line.split_whitespace();
    fields.nth(1).filter(|kind| *kind == "FLOCK")?; // a waiter has "->" there
    let (pid, file) = (fields.nth(2)?, fields.next()?);
    (file == format!("{major:02x}:{minor:02x}:{inode}")).then(|| pid.parse().ok().filter(|pid| *pid > 0)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::CipherDirectory;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    #[test]
    fn locks_exclude_each_other() {
        let home = tempfile::tempdir().unwrap();
        let directory = CipherDirectory::create(&home.path().join("c"), "config", "id").unwrap();
        let again = CipherDirectory::open(directory.path()).unwrap();
        let lock = directory.lock(LockMode::Exclusive).unwrap();
        for mode in [LockMode::Exclusive, LockMode::Shared] {
            let Err(LockError::Held { pid, volume }) = again.lock(mode) else { panic!("two holders") };
            assert_eq!(volume, directory.path());
            assert!(pid.is_none_or(|pid| pid == rustix::process::getpid().as_raw_nonzero().get()));
        }
        drop(lock);
        let _first = directory.lock(LockMode::Shared).unwrap();
        let _second = again.lock(LockMode::Shared).unwrap();
        again.lock(LockMode::Exclusive).unwrap_err();
    }

    /// As a mount of an earlier version holds it, and as a host does that reaches the file and not the directory's lock.
    #[test]
    fn the_directory_and_the_file_each_exclude_by_themselves() {
        let home = tempfile::tempdir().unwrap();
        let directory = CipherDirectory::create(&home.path().join("c"), "config", "id").unwrap();
        let own = home.path().join("c/.kmsfs");
        drop(directory.lock(LockMode::Exclusive).unwrap());
        assert_eq!(fs::metadata(own.join("lock")).unwrap().permissions().mode() & 0o777, 0o600);
        let old = fs::File::open(&own).unwrap();
        rustix::fs::flock(&old, FlockOperation::LockExclusive).unwrap();
        assert!(matches!(directory.lock(LockMode::Exclusive), Err(LockError::Held { .. })));
        assert!(matches!(directory.lock(LockMode::Shared), Err(LockError::Held { .. })));
        drop(old);
        let file = fs::File::options().read(true).write(true).open(own.join("lock")).unwrap();
        for exclusive in [true, false] {
            lock_whole_range(file.as_fd(), exclusive).unwrap();
            directory.lock(LockMode::Exclusive).unwrap_err();
            assert_eq!(directory.lock(LockMode::Shared).is_err(), exclusive);
        }
        drop(file);
        let file = fs::File::open(own.join("lock")).unwrap();
        rustix::fs::flock(&file, FlockOperation::LockShared).unwrap();
        directory.lock(LockMode::Exclusive).unwrap_err();
        drop(directory.lock(LockMode::Shared).unwrap());
        drop(file);
        directory.lock(LockMode::Exclusive).unwrap();
    }

    #[test]
    fn what_is_no_lock_file_is_refused_and_never_followed() {
        let home = tempfile::tempdir().unwrap();
        let directory = CipherDirectory::create(&home.path().join("c"), "config", "id").unwrap();
        let lock = home.path().join("c/.kmsfs/lock");
        fs::remove_file(&lock).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &lock).unwrap();
        directory.lock(LockMode::Exclusive).unwrap_err();
        fs::remove_file(&lock).unwrap();
        fs::create_dir(&lock).unwrap();
        directory.lock(LockMode::Shared).unwrap_err();
        fs::remove_dir(&lock).unwrap();
        fs::set_permissions(home.path().join("c/.kmsfs"), fs::Permissions::from_mode(0o770)).unwrap();
        drop(directory.lock(LockMode::Shared).unwrap());
        let (made, above) = (fs::metadata(&lock).unwrap(), fs::metadata(lock.parent().unwrap()).unwrap());
        assert_eq!((made.mode() & 0o777, made.uid(), made.gid()), (0o660, above.uid(), above.gid()));
    }

    #[test]
    fn reads_the_holder_of_a_lock() {
        let line = "12: FLOCK  ADVISORY  WRITE 4711 fd:01:393217 0 EOF";
        assert_eq!(flock_holder(line, (0xfd, 1), 393_217), Some(4711));
        assert_eq!((flock_holder(line, (0xfd, 1), 8), flock_holder(line, (0xfd, 2), 393_217)), (None, None));
        assert_eq!(flock_holder("12: -> FLOCK  ADVISORY  WRITE 4711 fd:01:393217 0 EOF", (0xfd, 1), 393_217), None);
        assert_eq!(flock_holder("3: POSIX  ADVISORY  WRITE 4711 fd:01:393217 0 EOF", (0xfd, 1), 393_217), None);
    }
}
