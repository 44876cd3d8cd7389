//! Files whose content is in use: their keys are to be renewed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::fs::kernel::InodeId;
use crate::runtime::Periodic;

use super::inode::{Inode, OpenFile};

/// The list of them.
#[derive(Default)]
pub(crate) struct Renewals {
    /// Inodes whose content is in use, or was at the last look.
    watched: Mutex<HashMap<InodeId, Weak<Inode>>>,
    pub(crate) thread: OnceLock<Periodic>,
}

impl Renewals {
    /// Puts an inode whose content has just been opened on the list.
    pub(crate) fn watch(&self, inode: &Arc<Inode>) {
        self.watched().insert(inode.id, Arc::downgrade(inode));
    }

    /// The inodes whose content is in use.
    pub(crate) fn in_use(&self) -> Vec<(Arc<Inode>, OpenFile)> {
        let mut found = Vec::new();
        self.watched().retain(|_, inode| {
            let in_use = inode.upgrade().and_then(|inode| {
                let open = inode.slot().open.clone()?;
                Some((inode, open))
            });
            let keep = in_use.is_some();
            found.extend(in_use);
            keep
        });
        found
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<InodeId, Weak<Inode>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&self) {
        self.thread.get().inspect(|thread| thread.stop());
    }
}
