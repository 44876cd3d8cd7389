//! Files whose disk size may not tell their plain size yet. `docs/FORMAT.md` section 6.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::content::{ContentError, Unsettled};
use crate::fs::kernel::InodeId;
use crate::runtime::Periodic;

use super::inode::{Inode, OpenFile};
use super::inode_table::InodeTable;

/// The list of them; each inode on it is held.
#[derive(Default)]
pub(crate) struct UnsettledFiles {
    /// Held for a whole round, so that the last one at shutdown misses nothing.
    pub(crate) round: Mutex<()>,
    watched: Mutex<HashMap<InodeId, Watched>>,
    pub(crate) thread: OnceLock<Periodic>,
}

pub(crate) struct Watched {
    pub(crate) inode: Arc<Inode>,
    /// What was seen at the last look.
    seen: Option<Unsettled>,
}

/// What to do with a watched file.
pub(crate) enum Action {
    Wait,
    Settle(OpenFile, Unsettled),
    Done,
}

impl UnsettledFiles {
    /// Puts a file that may become unsettled on the list.
    pub(crate) fn watch(&self, inodes: &InodeTable, inode: &Arc<Inode>) {
        if inodes.watch(inode) {
            let watched = Watched { inode: Arc::clone(inode), seen: None };
            self.watched().insert(inode.id, watched);
        }
    }

    /// Nobody will ask for the file's size.
    pub(crate) fn abandon(&self, inodes: &InodeTable, inode: &Inode) {
        self.watched().remove(&inode.id);
        inode.slot().close();
        inodes.unwatch(inode);
    }

    /// Takes every file off the list; what is kept comes back by [`Self::put_back`].
    pub(crate) fn take(&self) -> Vec<Watched> {
        std::mem::take(&mut *self.watched()).into_values().collect()
    }

    pub(crate) fn put_back(&self, kept: Vec<Watched>) {
        self.watched().extend(kept.into_iter().map(|watched| (watched.inode.id, watched)));
    }

    /// Ends the watch. A file that was opened again a moment ago stays on the list.
    pub(crate) fn end_watch(&self, inodes: &InodeTable, inode: &Arc<Inode>) {
        inodes.unwatch(inode);
        if inode.slot().open.is_some() {
            self.watch(inodes, inode);
        }
    }

    /// Whether a file still has an end that was lost.
    pub(crate) fn owes_an_end(&self) -> bool {
        self.watched().values().any(|watched| watched.inode.ledger.owed().is_some())
    }

    /// How many files are known to be unsettled.
    pub(crate) fn count_unsettled(&self) -> u64 {
        let unsettled = |watched: &&Watched| {
            watched.inode.slot().open.as_ref().is_some_and(|open| open.content.unsettled().is_some())
        };
        self.watched().values().filter(unsettled).count() as u64
    }

    pub(crate) fn stop(&self) {
        self.thread.get().inspect(|thread| thread.stop());
    }

    /// Files on the list.
    pub(crate) fn len(&self) -> usize {
        self.watched().len()
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<InodeId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    pub(crate) fn settle(&self, open: &OpenFile, found: Unsettled) -> Result<bool, ContentError> {
        let times_stay = self.inode.write_late_mtime()?;
        let settled = open.content.settle(found);
        drop(times_stay);
        settled
    }

    pub(crate) fn decide(&mut self, all: bool) -> Action {
        let mut slot = self.inode.slot();
        let Some(open) = slot.open.clone() else {
            return if slot.handles > 0 { Action::Wait } else { Action::Done };
        };
        let found = open.content.unsettled();
        // A file without a name is gone with its last handle: nobody will ask for its size.
        let nameless = slot.handles == 0 && self.inode.node.stat().is_ok_and(|stat| stat.nlink == 0);
        // What the disk has refused is not on it: the size is told by pages, which are there or not.
        let refused = slot.errors().is_any();
        let Some(found) = found.filter(|_| !nameless && !refused) else {
            if slot.handles > 0 {
                self.seen = None;
                return Action::Wait;
            }
            slot.close();
            return Action::Done;
        };
        if all || self.seen == Some(found) {
            return Action::Settle(open, found);
        }
        self.seen = Some(found);
        Action::Wait
    }
}
