//! Inodes that the kernel learns of and forgets.

use std::sync::Arc;

use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::attributes::Attributes;
use crate::fs::state::inode::Inode;
use crate::storage::Node;

impl Filesystem {
    /// Attributes of a node that was just found, which counts as a lookup.
    pub(in crate::fs) fn learn(&self, node: Node) -> Result<(Arc<Inode>, Attributes), Error> {
        self.descriptors.request(|| self.descriptors_in_use());
        self.learn_at_once(node)
    }

    /// Like [`Self::learn`], however many inodes are known: for who holds others that the kernel cannot give up yet.
    pub(in crate::fs) fn learn_at_once(&self, node: Node) -> Result<(Arc<Inode>, Attributes), Error> {
        let stat = node.stat()?;
        let inode = self.inodes.learn(node, &stat);
        let attributes = self.attributes_of(&inode, &stat)?;
        Ok((inode, attributes))
    }

    /// Takes back lookups that the kernel no longer needs.
    pub fn forget(&self, id: InodeId, count: u64) {
        self.descriptors.note_given_up();
        if let Some(waiting) = self.inodes.forget(id, count) {
            // A file without a name that the kernel has forgotten is gone: it must not keep its space until the next look.
            if waiting.node.stat().is_ok_and(|stat| stat.nlink == 0) {
                self.work.unsettled.abandon(&self.inodes, &waiting);
            }
        }
    }
}
