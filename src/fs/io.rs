//! Reading, writing and syncing through an inode: content is kept per inode, so no handle is needed.

use std::sync::atomic::Ordering;

use crate::storage::Access;

use super::inode::Inode;
use super::{Error, Filesystem, InodeId};

impl Filesystem {
    /// Reads at `offset` into `plain`, and returns how many bytes there were.
    ///
    /// # Errors
    /// [`Error`]; the content of `plain` must then not be used.
    pub fn read(&self, id: InodeId, offset: u64, plain: &mut [u8]) -> Result<usize, Error> {
        let inode = self.inodes.get(id)?;
        self.on_content(&inode, Access::Read, |open| Ok(open.content.read(offset, plain)?))
    }

    /// Writes at `offset`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn write(&self, id: InodeId, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let inode = self.inodes.get(id)?;
        self.keep_mtime(&inode)?;
        self.on_content(&inode, Access::ReadWrite, |open| {
            self.ensure_keys(&open.content)?;
            Ok(open.content.write(offset, bytes)?)
        })
    }

    /// Makes a file durable: its content, and with `metadata` its attributes.
    ///
    /// # Errors
    /// [`Error`].
    pub fn sync(&self, id: InodeId, metadata: bool) -> Result<(), Error> {
        let inode = self.inodes.get(id)?;
        if metadata {
            drop(inode.write_late_mtime()?);
        }
        self.on_content(&inode, Access::Read, |open| Ok(open.content.sync(metadata)?))
    }

    /// A kernel that writes back later has set the modification time when the program wrote; this write must not set
    /// another one, even if the kernel found that its time had not changed and need not be sent.
    fn keep_mtime(&self, inode: &Inode) -> Result<(), Error> {
        if !self.kernel_sets_mtime.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut late = inode.late_mtime();
        if late.is_none() {
            *late = Some(inode.node.stat()?.mtime);
        }
        Ok(())
    }
}
