//! The kernel, as far as a filesystem asks it for anything by itself.

/// Names an inode towards the kernel; what `stat` shows as inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(pub u64);

/// The root of the mount.
pub const ROOT: InodeId = InodeId(1);

/// The kernel of a mount. By default it is one that has nothing of the filesystem.
pub trait Kernel: Send + Sync {
    /// Drops the content of a file. Must not be called from an operation.
    fn invalidate(&self, _inode: InodeId) {}

    /// Asks for the attributes of an inode again. May be called from an operation.
    fn forget_attributes(&self, _inode: InodeId) {}

    /// Forgets an entry of a directory. Must not be called from an operation.
    fn forget_entry(&self, _directory: InodeId, _name: &[u8]) {}

    /// Drops inodes as far as nobody uses them; false if the kernel does not know how. Must not be called from an operation.
    fn drop_unused(&self, _inodes: &[InodeId]) -> bool {
        true
    }

    /// Threads that serve it: the last of them never waits for descriptors.
    fn threads(&self) -> usize {
        1
    }

    /// Whether it has a writeback cache: then it notes the modification time when a program writes, and sets it. Programs take
    /// for written what was not handed over yet.
    fn sets_mtime(&self) -> bool {
        false
    }
}

/// There is none before the mount.
pub(super) struct NoKernel;

impl Kernel for NoKernel {}
