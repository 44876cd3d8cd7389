//! What copying needs of a tree of files, whichever side it is on.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use crate::content::ContentError;
use crate::fs;
use crate::storage::{NodeKind, Timestamp};

/// Why something was not copied.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The volume failed.
    #[error("in the volume: {0}")]
    Volume(#[from] fs::Error),
    /// The tree outside of the volume failed.
    #[error(transparent)]
    Plain(#[from] io::Error),
    /// A file changed each time that it was read.
    #[error("it changes again and again while it is read: copy it when it rests")]
    Changing,
    /// Something of another kind has the name that the copy is to have.
    #[error("a {0} is in its place: remove it or choose another place")]
    InTheWay(&'static str),
    /// The first name of a hard link was not copied.
    #[error("its first name, {0}, could not be copied")]
    LinkFailed(String),
    /// Reading back showed something else.
    #[error("what was written reads back differently: its {0}")]
    Differs(&'static str),
    /// Entries of a directory have names that do not decrypt.
    #[error("entries whose names do not decrypt were left out: `kmsfs check` says which")]
    Names,
    /// Files lack their ends, in a volume that lets that pass.
    #[error("files that were cut off (their end marks are missing) were copied as they are: `kmsfs check` says which")]
    EndMarks,
    /// A file to be shredded has another name.
    #[error("{0} has another name that is not among what is to be shredded: name that too, or remove this one instead")]
    NamedElsewhere(String),
    /// A path that cannot be used.
    #[error("a path that cannot be used: it has a `..` in it, or no name at its end")]
    Path,
    /// There is no such file or directory.
    #[error("there is no such file or directory")]
    NotFound,
    /// A file was asked for, or a directory.
    #[error("it is a {0}")]
    Kind(&'static str),
    /// A provider that gave no answer in time.
    #[error("no answer in time")]
    Late,
    /// So many keys in a row were refused that the rest was not tried.
    #[error("{0} files in a row had no key: the rest was not tried")]
    Refused(u32),
}

impl TransferError {
    /// Whether the same may succeed when it is tried again shortly after: somebody was writing, or a provider was away.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Volume(fs::Error::Key(error)) => error.is_passing(),
            Self::Volume(fs::Error::Content(error)) => !matches!(error, ContentError::TooLarge),
            Self::Volume(error) => {
                matches!(error, fs::Error::DirectoryId | fs::Error::NoHeader | fs::Error::LinkTarget)
            }
            Self::Changing | Self::Late => true,
            _ => false,
        }
    }

    /// Whether everything else would fail too.
    pub(super) fn is_final(&self) -> bool {
        let of = |error: &io::Error| {
            use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
            matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem)
        };
        match self {
            Self::Plain(error) | Self::Volume(fs::Error::Io(error) | fs::Error::Content(ContentError::Io(error))) => {
                of(error)
            }
            Self::Volume(fs::Error::ReadOnly) | Self::Refused(_) => true,
            _ => false,
        }
    }

    /// Whether a key was not to be had.
    pub(super) fn is_of_keys(&self) -> bool {
        matches!(self, Self::Volume(fs::Error::Key(error)) if error.provider_kind().is_some())
    }
}

/// The attributes of a file of either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Tells inodes apart: names with the same one are hard links of each other.
    pub inode: (u64, u64),
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
    /// The device that a device node stands for.
    pub rdev: u64,
    /// Plain size in bytes.
    pub size: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last modification.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
}

/// What a kind is called.
#[must_use]
pub fn kind_name(kind: NodeKind) -> &'static str {
    match kind {
        NodeKind::File => "regular file",
        NodeKind::Directory => "directory",
        NodeKind::Symlink => "symbolic link",
        NodeKind::Fifo => "FIFO",
        NodeKind::Socket => "socket",
        NodeKind::CharDevice => "character device",
        NodeKind::BlockDevice => "block device",
    }
}

/// What a new entry is to be, where that is no regular file.
pub(super) enum New {
    Directory,
    Symlink(Vec<u8>),
    /// A FIFO, socket or device.
    Special(NodeKind, u64),
}

pub(super) type Result<T> = std::result::Result<T, TransferError>;

/// Extended attributes by name.
pub(super) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// A tree that is read or written. An object pins its inode; every operation names one entry of a held directory.
pub(super) trait Side: Sync {
    type Object: Clone + Send + Sync;
    type Open<'s>: OpenFile
    where
        Self: 's;

    fn root(&self) -> Result<Self::Object>;
    /// The entry `name`; none if there is none.
    fn lookup(&self, directory: &Self::Object, name: &[u8]) -> Result<Option<Self::Object>>;
    /// All names but `.` and `..`.
    fn names(&self, directory: &Self::Object) -> Result<Vec<Vec<u8>>>;
    fn meta(&self, object: &Self::Object) -> Result<Meta>;
    fn readlink(&self, object: &Self::Object) -> Result<Vec<u8>>;
    /// The attributes that mean the same on both sides: programs' own, ACLs, capabilities.
    fn xattrs(&self, object: &Self::Object) -> Result<Xattrs>;
    /// Opens a regular file for reading.
    fn open<'s>(&'s self, object: &Self::Object) -> Result<Self::Open<'s>>;
    /// Makes an empty regular file that only its owner may touch, and opens it.
    fn create<'s>(&'s self, directory: &Self::Object, name: &[u8]) -> Result<(Self::Object, Self::Open<'s>)>;
    fn make(&self, directory: &Self::Object, name: &[u8], new: &New) -> Result<Self::Object>;
    fn link(&self, object: &Self::Object, directory: &Self::Object, name: &[u8]) -> Result<()>;
    /// Renames within a directory, over what is no directory.
    fn rename(&self, directory: &Self::Object, from: &[u8], to: &[u8]) -> Result<()>;
    fn unlink(&self, directory: &Self::Object, name: &[u8]) -> Result<()>;
    /// Sets owner (where that is allowed) and mode.
    fn set_owner_and_mode(&self, object: &Self::Object, meta: &Meta) -> Result<()>;
    fn set_times(&self, object: &Self::Object, meta: &Meta) -> Result<()>;
    fn set_xattr(&self, object: &Self::Object, name: &[u8], value: &[u8]) -> Result<()>;
    fn remove_xattr(&self, object: &Self::Object, name: &[u8]) -> Result<()>;
    /// Makes everything durable that was written so far.
    fn sync(&self, root: &Self::Object) -> Result<()>;
}

/// A regular file, open.
pub(super) trait OpenFile {
    /// Reads at `offset` until `buffer` is full or the file ends.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize>;
    /// The next range that may hold anything but zeros; it may reach past the end.
    fn data_from(&self, offset: u64) -> Result<Option<Range<u64>>>;
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;
    fn set_size(&self, size: u64) -> Result<()>;
    /// Whether what was read so far shows that it was cut off.
    fn lacks_end(&self) -> bool;
}

/// Whether an attribute means the same in another place: labels of the system do not, and privileges are root's to give.
pub(super) fn is_copied(name: &[u8], privileged: bool) -> bool {
    let acl = [&b"system.posix_acl_access"[..], b"system.posix_acl_default"].contains(&name);
    let root_only = name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay.");
    name.starts_with(b"user.") || acl || privileged && (root_only || name == b"security.capability")
}
