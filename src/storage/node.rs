//! A held object of the backing tree: a descriptor that pins one inode, and every operation relative to it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::{self, AtFlags, CWD, Gid, Mode, OFlags, RenameFlags, ResolveFlags, StatxFlags, Timestamps, Uid};
use rustix::io::Errno;
use rustix::path::Arg;

use super::DirStream;
use super::attributes::{FileSystemStat, NodeKind, SetTime, Stat};
use super::file::stat_without_times;

/// How a file is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading.
    Read,
    /// For reading and writing: a partial page is read before it is written.
    ReadWrite,
}

/// What a rename does with an existing target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Replaces it.
    Replace,
    /// Fails.
    NoReplace,
    /// Swaps the two.
    Exchange,
    /// Replaces it, and leaves a whiteout (character device 0, 0) in the place of what was renamed.
    WhiteOut,
}

/// Filesystem types of ext2 to ext4, XFS, and tmpfs, which has nothing to lose. An ext4 without a journal promises nothing.
const ONE_JOURNAL: [fs::FsWord; 3] = [0xEF53, 0x5846_5342, 0x0102_1994];
/// Filesystem types of FUSE and NFS: what is removed while somebody has it open gets another name until it is closed.
const RENAME_WHAT_IS_OPEN: [fs::FsWord; 2] = [0x6573_5546, 0x6969];
/// Permission to read and write for the owner.
const OWNER_READ_WRITE: u32 = 0o600;

/// A held inode of the backing tree. `openable` tells whether the descriptor does I/O or only pins.
#[derive(Clone)]
pub struct Node {
    fd: Arc<OwnedFd>,
    openable: bool,
}

/// Descriptor that may be used as the base of relative operations.
impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Node {
    /// Pins the directory at `path`.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn open_root(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self::pin(fs::open(path, flags, Mode::empty())?))
    }

    /// The attributes of the directory at `path`, without pinning it: needs no descriptor.
    ///
    /// # Errors
    /// Those of `lstat(2)`.
    pub fn stat_directory(path: &Path) -> io::Result<Stat> {
        Stat::of(&fs::lstat(path)?)
    }

    /// Pins the directory that `fd` holds.
    ///
    /// # Errors
    /// Those of `dup(2)`.
    pub fn of_directory(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self::pin(fd.try_clone_to_owned()?))
    }

    fn pin(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd), openable: false }
    }

    /// Pins the entry `name` of this directory without opening it: devices and FIFOs do not notice.
    ///
    /// # Errors
    /// Those of `openat2(2)`; `EXDEV` for a mount point.
    pub fn lookup(&self, name: impl Arg) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        Ok(Self::pin(fs::openat2(&self.fd, name, flags, Mode::empty(), resolve)?))
    }

    /// Creates the regular file `name` and opens it for reading and writing; fails if the entry exists.
    ///
    /// # Errors
    /// Those of `openat(2)`.
    pub fn create_file(&self, name: impl Arg, mode: u32) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(&self.fd, name, flags, Mode::from_raw_mode(mode & 0o7777))?;
        Ok(Self { fd: Arc::new(fd), openable: true })
    }

    /// A descriptor of this regular file that does I/O; the pin itself if it can.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn open_file(&self, access: Access) -> io::Result<Arc<OwnedFd>> {
        if self.openable {
            return Ok(Arc::clone(&self.fd));
        }
        let flags = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        Ok(Arc::new(self.reopen(flags | OFlags::NONBLOCK)?))
    }

    /// Like [`Self::open_file`] for reading and writing, for the owner of a file that its mode keeps him from reading: the
    /// mode is widened for the moment of opening.
    ///
    /// # Errors
    /// Those of `open(2)` and `chmod(2)`.
    pub fn open_own_file(&self, mode: u32) -> io::Result<Arc<OwnedFd>> {
        self.set_mode(mode | OWNER_READ_WRITE)?;
        let opened = self.open_file(Access::ReadWrite);
        self.set_mode(mode)?;
        opened
    }

    /// A stream of this directory's entries.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn open_directory(&self) -> io::Result<DirStream> {
        Ok(DirStream::new(self.reopen(OFlags::RDONLY | OFlags::DIRECTORY)?))
    }

    /// The names in this directory but `.` and `..`, whatever bytes they are.
    ///
    /// # Errors
    /// Those of `open(2)` and `getdents(2)`.
    pub fn names(&self) -> io::Result<Vec<Vec<u8>>> {
        super::directory::names(&self.reopen(OFlags::RDONLY | OFlags::DIRECTORY)?)
    }

    fn reopen(&self, flags: OFlags) -> io::Result<OwnedFd> {
        Ok(fs::openat(own_descriptors()?, self.descriptor_name(), flags | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn descriptor_name(&self) -> String {
        self.fd.as_raw_fd().to_string()
    }

    /// Whether this process made the inode, and has held it since.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.openable
    }

    /// Where the inode is now, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let link = own_descriptors().and_then(|dir| Ok(fs::readlinkat(dir, self.descriptor_name(), Vec::new())?));
        link.map_or_else(|_| "(unknown)".to_owned(), |path| path.to_string_lossy().into_owned())
    }

    /// The inode's attributes.
    ///
    /// # Errors
    /// Those of `fstat(2)`.
    pub fn stat(&self) -> io::Result<Stat> {
        Stat::of(&fs::fstat(&self.fd)?)
    }

    /// The units of 512 bytes that the inode takes on the disk.
    ///
    /// # Errors
    /// Those of `statx(2)`.
    pub fn blocks(&self) -> io::Result<u64> {
        Ok(stat_without_times(&self.fd, StatxFlags::BLOCKS)?.stx_blocks)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// Those of `mkdirat(2)`.
    pub fn mkdir(&self, name: impl Arg, mode: u32) -> io::Result<()> {
        Ok(fs::mkdirat(&self.fd, name, Mode::from_raw_mode(mode & 0o7777))?)
    }

    /// Makes a symlink.
    ///
    /// # Errors
    /// Those of `symlinkat(2)`.
    pub fn symlink(&self, target: impl Arg, name: impl Arg) -> io::Result<()> {
        Ok(fs::symlinkat(target, &self.fd, name)?)
    }

    /// Makes a special file.
    ///
    /// # Errors
    /// Those of `mknodat(2)`.
    pub fn mknod(&self, name: impl Arg, kind: NodeKind, mode: u32, rdev: u64) -> io::Result<()> {
        Ok(fs::mknodat(&self.fd, name, kind.to_raw(), Mode::from_raw_mode(mode & 0o7777), rdev)?)
    }

    /// The target of the symlink `name`.
    ///
    /// # Errors
    /// Those of `readlinkat(2)`.
    pub fn readlink(&self, name: impl Arg) -> io::Result<Vec<u8>> {
        Ok(fs::readlinkat(&self.fd, name, Vec::with_capacity(256))?.into_bytes())
    }

    /// The target of this symlink.
    ///
    /// # Errors
    /// Those of `readlinkat(2)`.
    pub fn readlink_self(&self) -> io::Result<Vec<u8>> {
        self.readlink("")
    }

    /// Removes the entry `name`, which is not a directory.
    ///
    /// # Errors
    /// Those of `unlinkat(2)`.
    pub fn unlink(&self, name: impl Arg) -> io::Result<()> {
        Ok(fs::unlinkat(&self.fd, name, AtFlags::empty())?)
    }

    /// Removes the empty directory `name`.
    ///
    /// # Errors
    /// Those of `unlinkat(2)`.
    pub fn rmdir(&self, name: impl Arg) -> io::Result<()> {
        Ok(fs::unlinkat(&self.fd, name, AtFlags::REMOVEDIR)?)
    }

    /// Gives this inode another name.
    ///
    /// # Errors
    /// Those of `linkat(2)`.
    pub fn link_as(&self, directory: &Self, name: impl Arg) -> io::Result<()> {
        let from = own_descriptors()?;
        Ok(fs::linkat(from, self.descriptor_name(), &directory.fd, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Renames `from` of this directory to `to` of `directory`.
    ///
    /// # Errors
    /// Those of `renameat2(2)`.
    pub fn rename(&self, from: impl Arg, directory: &Self, to: impl Arg, mode: RenameMode) -> io::Result<()> {
        let flags = match mode {
            RenameMode::Replace => RenameFlags::empty(),
            RenameMode::NoReplace => RenameFlags::NOREPLACE,
            RenameMode::Exchange => RenameFlags::EXCHANGE,
            RenameMode::WhiteOut => RenameFlags::WHITEOUT,
        };
        Ok(fs::renameat_with(&self.fd, from, &directory.fd, to, flags)?)
    }

    /// Sets permission, set-id and sticky bits.
    ///
    /// # Errors
    /// Those of `chmod(2)`.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(fs::chmodat(own_descriptors()?, self.descriptor_name(), mode, AtFlags::empty())?)
    }

    /// Sets owner and group; `None` keeps them.
    ///
    /// # Errors
    /// Those of `fchownat(2)`.
    pub fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        Ok(fs::chownat(&self.fd, "", uid, gid, AtFlags::EMPTY_PATH)?)
    }

    /// Sets access and modification time.
    ///
    /// # Errors
    /// Those of `utimensat(2)`.
    pub fn set_times(&self, atime: SetTime, mtime: SetTime) -> io::Result<()> {
        let times = Timestamps { last_access: atime.to_timespec(), last_modification: mtime.to_timespec() };
        Ok(fs::utimensat(&self.fd, "", &times, AtFlags::EMPTY_PATH)?)
    }

    /// The backing filesystem's space.
    ///
    /// # Errors
    /// Those of `fstatvfs(3)`.
    pub fn filesystem_stat(&self) -> io::Result<FileSystemStat> {
        let stat = fs::fstatvfs(&self.fd)?;
        Ok(FileSystemStat {
            block_size: stat.f_frsize,
            blocks: stat.f_blocks,
            free: stat.f_bfree,
            available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
        })
    }

    /// Makes this directory's entries durable.
    ///
    /// # Errors
    /// Those of `open(2)` and `fsync(2)`.
    pub fn sync_directory(&self) -> io::Result<()> {
        match self.open_directory()?.sync() {
            // A filesystem that cannot sync directories keeps their order without.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            result => result,
        }
    }

    /// Whether the backing filesystem makes all changes of names durable in the order in which they were made, because they go
    /// through one journal. Of those that are not known to, the answer is no.
    ///
    /// # Errors
    /// Those of `fstatfs(2)`.
    pub fn keeps_name_order(&self) -> io::Result<bool> {
        Ok(ONE_JOURNAL.contains(&fs::fstatfs(&self.fd)?.f_type))
    }

    /// Whether the backing filesystem may give a file that is removed while it is open another name in the same directory.
    ///
    /// # Errors
    /// Those of `fstatfs(2)`.
    pub fn renames_what_is_open(&self) -> io::Result<bool> {
        Ok(RENAME_WHAT_IS_OPEN.contains(&fs::fstatfs(&self.fd)?.f_type))
    }

    /// Whether both hold the same descriptor.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.fd, &other.fd)
    }

    /// Makes everything on the backing filesystem durable.
    ///
    /// # Errors
    /// Those of `syncfs(2)`.
    pub fn sync_filesystem(&self) -> io::Result<()> {
        self.filesystem()?.sync()
    }

    /// The backing filesystem, to be synced. An error between this and the end of the sync is reported.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn filesystem(&self) -> io::Result<Below> {
        self.reopen(OFlags::RDONLY).map(Below)
    }
}

/// A backing filesystem, held open.
pub struct Below(OwnedFd);

impl Below {
    /// Makes everything on it durable.
    ///
    /// # Errors
    /// Those of `syncfs(2)`.
    pub fn sync(&self) -> io::Result<()> {
        Ok(fs::syncfs(&self.0)?)
    }
}

/// `/proc/self/fd`, from which a pinned inode is opened without a path walk through the tree.
fn own_descriptors() -> io::Result<BorrowedFd<'static>> {
    static DIRECTORY: OnceLock<Result<OwnedFd, Errno>> = OnceLock::new();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = DIRECTORY.get_or_init(|| fs::openat(CWD, "/proc/self/fd", flags, Mode::empty()));
    opened.as_ref().map(AsFd::as_fd).map_err(|error| (*error).into())
}
