//! Attributes as the kernel is told them, and changes of them.

use crate::fs::kernel::InodeId;
use crate::storage::{NodeKind, SetTime, Timestamp};

/// What `stat` shows.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// The inode.
    pub id: InodeId,
    /// Rises when the kernel has to forget what it knew of the inode.
    pub generation: u32,
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
    /// Plain size in bytes.
    pub size: u64,
    /// 512-byte units allocated on disk.
    pub blocks: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last modification.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
}

/// What to change; `None` and [`SetTime::Keep`] leave as is.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// Permission, set-id and sticky bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Last access.
    pub atime: SetTime,
    /// Last modification.
    pub mtime: SetTime,
}

impl Change {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_none(&self) -> bool {
        let owner_and_mode = [self.mode, self.uid, self.gid];
        owner_and_mode == [None; 3] && (self.atime, self.mtime) == (SetTime::Keep, SetTime::Keep)
    }
}
