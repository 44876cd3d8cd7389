//! The kernel, as far as a filesystem asks it for anything by itself.

/// Names an inode towards the kernel; what `stat` shows as inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(pub u64);

/// The root of the mount.
pub const ROOT: InodeId = InodeId(1);

/// The kernel of a mount.
pub trait Kernel: Send + Sync {
    /// Drops the content of a file. Must not be called from an operation.
    fn invalidate(&self, inode: InodeId);

    /// Asks for the attributes of an inode again. May be called from an operation.
    fn forget_attributes(&self, inode: InodeId);

    /// Forgets an entry of a directory. Must not be called from an operation.
    fn forget_entry(&self, directory: InodeId, name: &[u8]);

    /// Drops inodes as far as nobody uses them; false if the kernel does not know how. Must not be called from an operation.
    fn drop_unused(&self, inodes: &[InodeId]) -> bool;

    /// Threads that serve it: the last of them never waits for descriptors.
    fn threads(&self) -> usize;

    /// Whether it has a writeback cache: then it notes the modification time when a program writes, and sets it. Programs take
    /// for written what was not handed over yet.
    fn sets_mtime(&self) -> bool;
}

/// Before a mount, and without one, nobody has anything of the filesystem.
pub(super) struct NoKernel;

impl Kernel for NoKernel {
    fn invalidate(&self, _inode: InodeId) {}

    fn forget_attributes(&self, _inode: InodeId) {}

    fn forget_entry(&self, _directory: InodeId, _name: &[u8]) {}

    fn drop_unused(&self, _inodes: &[InodeId]) -> bool {
        true
    }

    fn threads(&self) -> usize {
        1
    }

    fn sets_mtime(&self) -> bool {
        false
    }
}
