//! Making files durable. Needs no key.

use crate::content::ContentError;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::inode::Inode;
use crate::fs::state::sync_errors::Handle;
use crate::storage::{Access, RawFile};

impl Filesystem {
    /// Makes everything durable that was changed so far, and lets all files that rest tell their sizes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync_everything(&self) -> Result<(), Error> {
        self.check_tenure()?;
        // Held from the beginning: it hears of every write that fails below, whoever else hears of it.
        let below = self.inodes.root().node.filesystem()?;
        self.flush_dir_syncs()?;
        // A first look settles, a second one closes.
        self.settle_rested(true)?;
        self.settle_rested(false)?;
        Ok(below.sync()?)
    }

    /// Makes a file durable: its content, and with `metadata` its attributes. Needs no key.
    ///
    /// # Errors
    /// [`Error`].
    pub fn sync(&self, id: InodeId, metadata: bool) -> Result<(), Error> {
        self.sync_for(id, self.handles.next(), metadata)
    }

    /// Like [`Self::sync`] on behalf of `handle`, which hears every error of the disk that any sync has met since it was opened.
    ///
    /// # Errors
    /// [`Error`].
    pub fn sync_for(&self, id: InodeId, handle: Handle, metadata: bool) -> Result<(), Error> {
        self.check_tenure()?;
        let inode = self.inodes.get(id)?;
        self.tell_space(&inode, true);
        let synced = self.sync_inode(&inode, metadata);
        let unheard = inode.slot().errors().hear(handle, self.handles.next());
        match unheard {
            Some(error) if synced.is_ok() => Err(error.into()),
            _ => synced,
        }
    }

    fn sync_inode(&self, inode: &Inode, metadata: bool) -> Result<(), Error> {
        if metadata {
            drop(inode.write_late_mtime()?);
        }
        self.flush_dir_syncs()?;
        // The kernel has handed over what it had.
        inode.ledger.confirm();
        loop {
            let open = inode.slot().current();
            let synced = match open {
                Some(open) => open.content.sync(metadata).map_err(Error::from),
                None => {
                    let file = self.open_backing(inode, Access::Read)?;
                    let synced = file.sync(metadata);
                    inode.slot().note_told(&file);
                    synced.map_err(Error::from)
                }
            };
            if !matches!(synced, Err(Error::Content(ContentError::Retired))) {
                return synced;
            }
        }
    }
}
