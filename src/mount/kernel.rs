//! The kernel of one mount, for the filesystem that it is served from.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use fuser::{INodeNo, Notifier};

use crate::fs::{InodeId, Kernel};

use super::prune::Prune;

pub(super) struct MountedKernel {
    pub(super) notifier: Notifier,
    pub(super) prune: Prune,
    pub(super) threads: usize,
    /// It has a writeback cache.
    pub(super) writes_back: bool,
}

// A kernel that knows nothing of an inode or an entry has nothing to drop.
impl Kernel for MountedKernel {
    /// From the beginning to the end of the file.
    fn invalidate(&self, inode: InodeId) {
        drop(self.notifier.inval_inode(INodeNo(inode.0), 0, 0));
    }

    /// A negative offset means the attributes only: of the content nothing is dropped, and nothing waited for.
    fn forget_attributes(&self, inode: InodeId) {
        drop(self.notifier.inval_inode(INodeNo(inode.0), -1, 0));
    }

    fn forget_entry(&self, directory: InodeId, name: &[u8]) {
        drop(self.notifier.inval_entry(INodeNo(directory.0), OsStr::from_bytes(name)));
    }

    fn drop_unused(&self, inodes: &[InodeId]) -> bool {
        self.prune.drop_unused(inodes)
    }

    fn threads(&self) -> usize {
        self.threads
    }

    fn sets_mtime(&self) -> bool {
        self.writes_back
    }
}
