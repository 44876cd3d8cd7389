//! Set-id bits go when somebody without privileges changes a file: the kernel leaves it to us, and saves itself a question
//! before every write. It says so by a change of attributes that names none, by a flag of a write, and, for a truncation, by a
//! flag that does not reach us: there the process is looked at.

use std::io;
use std::sync::atomic::Ordering;

use crate::fs::caller::Caller;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::Inode;
use crate::storage::{CAPABILITIES, NodeKind, Stat};

const SET_USER_ID: u32 = 0o4000;
const SET_GROUP_ID: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;

impl Filesystem {
    /// The content is to be changed. On a mount without extended attributes the kernel does not take the capabilities of a
    /// program away by itself. Looked at once for each inode: nobody can set any meanwhile.
    pub(in crate::fs) fn drop_capabilities(&self, inode: &Inode) -> io::Result<()> {
        if !self.options.xattrs && !inode.lacks_capabilities.load(Ordering::Relaxed) {
            if inode.node.xattr(CAPABILITIES.as_bytes()).is_ok() {
                inode.change_privileges(|| inode.node.remove_xattr(CAPABILITIES.as_bytes()))?;
            }
            inode.lacks_capabilities.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Drops set-id bits from a file whose content is written by `caller`, who may not keep them, as the kernel has found.
pub(in crate::fs) fn drop_set_ids(inode: &Inode, caller: Caller) -> io::Result<()> {
    drop_from(inode, caller, false)
}

/// Drops set-id bits from a file whose content `caller` changes, unless they may keep them.
pub(in crate::fs) fn drop_unless_privileged(inode: &Inode, caller: Caller) -> io::Result<()> {
    drop_from(inode, caller, true)
}

fn drop_from(inode: &Inode, caller: Caller, ask_for_privilege: bool) -> io::Result<()> {
    let found = doomed(&inode.node.stat()?, caller);
    if found == 0 || ask_for_privilege && caller.keeps_set_ids() {
        return Ok(());
    }
    inode.change_privileges(|| {
        // Another program may have changed the mode meanwhile.
        let stat = inode.node.stat()?;
        match doomed(&stat, caller) {
            0 => Ok(()),
            doomed => inode.node.set_mode(stat.mode & !doomed),
        }
    })
}

/// The set-id bits that a change by `caller` takes away. A set-group-id bit without group execution marks mandatory locking, and
/// stays for members of the group.
pub(in crate::fs) fn doomed(stat: &Stat, caller: Caller) -> u32 {
    let group = match stat.mode & (SET_GROUP_ID | GROUP_EXECUTE) {
        SET_GROUP_ID if caller.keeps_set_group_id(stat) => 0,
        mode => mode & SET_GROUP_ID,
    };
    stat.mode & SET_USER_ID | group
}

/// Changes the owner for `caller`, whom the backing filesystem does not know.
pub(in crate::fs) fn set_owner(
    inode: &Inode,
    uid: Option<u32>,
    gid: Option<u32>,
    caller: Option<Caller>,
) -> io::Result<()> {
    let doomed = match caller {
        Some(caller) if inode.kind != NodeKind::Directory => doomed(&inode.node.stat()?, caller),
        _ => 0,
    };
    inode.change_privileges(|| {
        inode.node.set_owner(uid, gid)?;
        match inode.node.stat()?.mode {
            mode if mode & doomed == 0 => Ok(()),
            mode => inode.node.set_mode(mode & !doomed),
        }
    })
}

/// An ACL that somebody outside of the group sets takes the set-group-id bit away, as `chmod` would.
pub(in crate::fs) fn drop_after_acl(inode: &Inode, caller: Caller) -> io::Result<()> {
    let loses = |stat: &Stat| stat.mode & SET_GROUP_ID != 0 && !caller.keeps_set_group_id(stat);
    if !loses(&inode.node.stat()?) {
        return Ok(());
    }
    inode.change_privileges(|| match inode.node.stat()? {
        stat if loses(&stat) => inode.node.set_mode(stat.mode & !SET_GROUP_ID),
        _ => Ok(()),
    })
}
