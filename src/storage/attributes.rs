//! What an inode of the backing tree shows of itself, and what of that can be set.

use std::io;

use rustix::fs::{self, Timespec, UTIME_NOW, UTIME_OMIT};

/// What kind of object an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl NodeKind {
    fn new(kind: fs::FileType) -> io::Result<Self> {
        Ok(match kind {
            fs::FileType::RegularFile => Self::File,
            fs::FileType::Directory => Self::Directory,
            fs::FileType::Symlink => Self::Symlink,
            fs::FileType::Fifo => Self::Fifo,
            fs::FileType::Socket => Self::Socket,
            fs::FileType::CharacterDevice => Self::CharDevice,
            fs::FileType::BlockDevice => Self::BlockDevice,
            fs::FileType::Unknown => return Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// The kind that a readdir entry claims; `None` if the backing filesystem does not tell.
    #[must_use]
    pub(super) fn of_entry(kind: fs::FileType) -> Option<Self> {
        Self::new(kind).ok()
    }

    pub(super) fn to_raw(self) -> fs::FileType {
        match self {
            Self::File => fs::FileType::RegularFile,
            Self::Directory => fs::FileType::Directory,
            Self::Symlink => fs::FileType::Symlink,
            Self::Fifo => fs::FileType::Fifo,
            Self::Socket => fs::FileType::Socket,
            Self::CharDevice => fs::FileType::CharacterDevice,
            Self::BlockDevice => fs::FileType::BlockDevice,
        }
    }
}

/// Seconds since 1970 (negative before) and nanoseconds within the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    /// Seconds.
    pub seconds: i64,
    /// 0 to 999 999 999.
    pub nanoseconds: u32,
}

/// What to do with a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// Leave it.
    Keep,
    /// The backing filesystem's current time.
    Now,
    /// This one.
    At(Timestamp),
}

/// The attributes of an inode of the backing tree.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Kind.
    pub kind: NodeKind,
    /// Permission, set-id and sticky bits: `0o7777`.
    pub mode: u32,
    /// Hard links.
    pub nlink: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// The device a device node stands for.
    pub rdev: u64,
    /// Bytes on disk.
    pub size: u64,
    /// 512-byte units allocated.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last modification.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
}

/// What `statfs` tells of the backing filesystem, in units of `block_size` bytes.
#[derive(Clone, Copy, Debug)]
pub struct FileSystemStat {
    /// Bytes in a block.
    pub block_size: u64,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Free blocks that an ordinary user may use.
    pub available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
}

impl SetTime {
    pub(super) fn to_timespec(self) -> Timespec {
        match self {
            Self::Keep => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            Self::Now => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            Self::At(at) => Timespec { tv_sec: at.seconds, tv_nsec: at.nanoseconds.into() },
        }
    }
}

impl Stat {
    pub(super) fn of(stat: &fs::Stat) -> io::Result<Self> {
        let time = |seconds, nanoseconds| Timestamp { seconds, nanoseconds: u32::try_from(nanoseconds).unwrap_or(0) };
        Ok(Self {
            dev: stat.st_dev,
            ino: stat.st_ino,
            kind: NodeKind::new(fs::FileType::from_raw_mode(stat.st_mode))?,
            mode: stat.st_mode & 0o7777,
            nlink: stat.st_nlink,
            uid: stat.st_uid,
            gid: stat.st_gid,
            rdev: stat.st_rdev,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            blocks: u64::try_from(stat.st_blocks).unwrap_or(0),
            atime: time(stat.st_atime, stat.st_atime_nsec),
            mtime: time(stat.st_mtime, stat.st_mtime_nsec),
            ctime: time(stat.st_ctime, stat.st_ctime_nsec),
        })
    }
}
