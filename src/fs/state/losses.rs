//! Files that have lost something that programs take for written.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::fs::kernel::InodeId;
use crate::runtime::Periodic;

use super::inode::Inode;

/// The list of them.
#[derive(Default)]
pub(crate) struct Losses {
    state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    /// With each, whether the kernel still has pages of what is lost.
    pub(crate) files: HashMap<InodeId, (Weak<Inode>, bool)>,
    /// From the first loss on.
    pub(crate) thread: Option<Periodic>,
    pub(crate) is_stopped: bool,
}

impl Losses {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&self) {
        let mut state = self.state();
        state.is_stopped = true;
        state.thread.iter().for_each(Periodic::stop);
    }

    /// The files to look after, and which of them have lost something since the last look.
    pub(crate) fn files(&self) -> Vec<(Arc<Inode>, bool)> {
        let mut found = Vec::new();
        self.state().files.retain(|_, (inode, is_new)| {
            let inode = inode.upgrade().filter(|inode| *is_new || inode.ledger.has_lost());
            let stays = inode.is_some();
            found.extend(inode.map(|inode| (inode, std::mem::take(is_new))));
            stays
        });
        found
    }
}
