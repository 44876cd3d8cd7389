//! A new entry becomes its caller's: owner, group and mode are those that it would have if its caller had made it.

use std::io;

use crate::format::name::Stored;
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::Inode;
use crate::storage::Node;

use super::names::remove_long_name_link;

/// Set-group-id: on a directory, new entries inherit its group.
const SETGID: u32 = 0o2000;
/// Set-user-id and set-group-id.
const SET_IDS: u32 = 0o6000;
/// What the owner needs to put a directory id into a new directory.
pub(in crate::fs) const OWNER_ALL: u32 = 0o700;

impl Filesystem {
    /// The node of an entry that was just made, and is to be removed again if it cannot be had.
    pub(in crate::fs) fn pin_new(&self, directory: &Node, entry: &str) -> io::Result<Node> {
        self.descriptors.retry_on_emfile(|| directory.lookup(entry))
    }

    /// Gives a new directory the owner, group and mode that it would have if its caller had made it.
    pub(in crate::fs) fn hand_over_directory(
        &self,
        parent: &Inode,
        node: &Node,
        mode: u32,
        caller: Caller,
    ) -> Result<(), Error> {
        self.own(parent, node, caller)?;
        if mode & OWNER_ALL != OWNER_ALL {
            node.set_mode(node.stat()?.mode & !(OWNER_ALL & !mode))?;
        }
        Ok(())
    }

    /// Gives a new file the owner, group and mode that it would have if its caller had made it, or removes it again: none stays
    /// that is the daemon's.
    pub(in crate::fs) fn hand_over(
        &self,
        parent: &Inode,
        stored: &Stored,
        node: &Node,
        mode: u32,
        caller: Caller,
    ) -> Result<(), Error> {
        let handed_over = self.own(parent, node, caller).and_then(|changed| {
            if changed && mode & SET_IDS != 0 {
                node.set_mode(node.stat()?.mode | mode & SET_IDS)?;
            }
            Ok(())
        });
        handed_over.inspect_err(|_| remove_new(&parent.node, stored))
    }

    /// The mode that a file has until it is its caller's: a set-id bit would be the daemon's.
    pub(in crate::fs) fn first_mode(&self, mode: u32, caller: Caller) -> u32 {
        if self.makes_for(caller) { mode & !SET_IDS } else { mode }
    }

    /// A privileged daemon makes files for others; one that is not makes all its files for itself.
    pub(in crate::fs) fn makes_for(&self, caller: Caller) -> bool {
        self.backing.is_privileged() && (caller.uid, caller.gid) != (0, 0)
    }

    /// Returns whether the owner was changed.
    pub(in crate::fs) fn own(&self, parent: &Inode, node: &Node, caller: Caller) -> Result<bool, Error> {
        if !self.makes_for(caller) {
            return Ok(false);
        }
        let inherits_group = parent.node.stat()?.mode & SETGID != 0;
        node.set_owner(Some(caller.uid), (!inherits_group).then_some(caller.gid))?;
        Ok(true)
    }
}

/// Removes an entry that was just made and is not a directory.
pub(in crate::fs) fn remove_new(directory: &Node, stored: &Stored) {
    // Nothing more can be done about one that cannot be removed; it has no set-id bits.
    if directory.unlink(stored.entry()).is_ok() {
        remove_long_name_link(directory, stored);
    }
}

/// The mode that a new entry is made with: a default ACL of its directory, which the backing filesystem applies, stands in for
/// the umask.
pub(in crate::fs) fn mode_in(directory: &Inode, mode: u32, caller: Caller) -> u32 {
    if directory.default_acl.is_set(directory) { mode } else { mode & !caller.umask }
}
