//! Set-id bits go when somebody without privileges changes a file: the kernel leaves it to us, and saves itself a question
//! before every write.

use std::io;
use std::sync::atomic::Ordering;

use crate::storage::CAPABILITIES;

use super::inode::Inode;
use super::{Caller, Error, Filesystem, InodeId};

const SET_USER_ID: u32 = 0o4000;
const SET_GROUP_ID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;

impl Filesystem {
    /// The content was written by a process that may not keep set-id bits, as the kernel has found.
    ///
    /// # Errors
    /// [`Error`].
    pub fn drop_set_ids(&self, id: InodeId, caller: Caller) -> Result<(), Error> {
        Ok(drop_from(self.inodes.get(id)?.as_ref(), caller, false)?)
    }

    /// The content is written on a mount without extended attributes, where the kernel does not take the capabilities of a
    /// program away by itself. Looked at once for each inode: nobody can set any meanwhile.
    ///
    /// # Errors
    /// [`Error`].
    pub fn drop_capabilities(&self, id: InodeId) -> Result<(), Error> {
        let inode = self.inodes.get(id)?;
        if !inode.lacks_capabilities.load(Ordering::Relaxed) {
            if inode.node.xattr(CAPABILITIES.as_bytes()).is_ok() {
                inode.change_privileges(|| inode.node.remove_xattr(CAPABILITIES.as_bytes()))?;
            }
            inode.lacks_capabilities.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Drops set-id bits from a file whose content `caller` changes, unless he may keep them.
pub(super) fn drop_unless_privileged(inode: &Inode, caller: Caller) -> io::Result<()> {
    drop_from(inode, caller, true)
}

/// A set-group-id bit without group execution marks mandatory locking, and stays for members of the group.
fn drop_from(inode: &Inode, caller: Caller, ask_for_privilege: bool) -> io::Result<()> {
    let stat = inode.node.stat()?;
    let group = match stat.mode & (SET_GROUP_ID | GROUP_EXECUTE) {
        SET_GROUP_ID if caller.is_in_group(stat.gid) => 0,
        mode => mode & SET_GROUP_ID,
    };
    let doomed = stat.mode & SET_USER_ID | group;
    if doomed == 0 || ask_for_privilege && caller.keeps_set_ids() {
        return Ok(());
    }
    inode.change_privileges(|| inode.node.set_mode(stat.mode & !doomed))
}
