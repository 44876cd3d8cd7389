//! The wrapping keys of a volume as they are now. Their list can be changed while the volume is in use.
//!
//! Invariants: a list is replaced whole, and whoever works with one goes on with it to the end; a data key for new files
//! is of use only as long as the list that it was made under.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::format::header::Record;

use super::recipients::{Recipient, Recipients, Watched};

/// The keys that may wrap data keys of a volume, and whom to ask about them.
pub(super) struct KeyList {
    /// Tags and ids.
    pub(super) allowed: Vec<(u8, Vec<u8>)>,
    /// There is at least one.
    pub(super) recipients: Recipients,
}

impl KeyList {
    pub(super) fn allows(&self, record: &Record) -> bool {
        self.allowed.iter().any(|(tag, key_id)| *tag == record.provider && *key_id == record.key_id)
    }

    /// The keys that are asked, with their providers.
    pub(super) fn recipients(&self) -> Vec<Recipient> {
        self.recipients.all().map(Watched::recipient).cloned().collect()
    }

    /// Adds to a list that follows the keys of this one that it lacks. They wrap nothing new.
    pub(super) fn keep_in(&self, allowed: &mut Vec<(u8, Vec<u8>)>, recipients: &mut Vec<Recipient>) {
        let known = self.recipients();
        let gone = |old: &&Recipient| !recipients.iter().any(|new| (new.kind, &new.key) == (old.kind, &old.key));
        let gone: Vec<_> = known.iter().filter(gone).cloned().collect();
        recipients.extend(gone.into_iter().map(|old| Recipient { wraps_new: false, ..old }));
        let left: Vec<_> = self.allowed.iter().filter(|key| !allowed.contains(key)).cloned().collect();
        allowed.extend(left);
    }
}

/// The list that is in force.
pub(super) struct CurrentKeys {
    list: RwLock<Arc<KeyList>>,
    remote: AtomicBool,
    version: AtomicU64,
}

impl CurrentKeys {
    pub(super) fn new(list: KeyList) -> Self {
        let remote = AtomicBool::new(list.recipients.is_remote());
        Self { list: RwLock::new(Arc::new(list)), remote, version: AtomicU64::new(0) }
    }

    pub(super) fn get(&self) -> Arc<KeyList> {
        Arc::clone(&self.list.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn replace(&self, list: KeyList) {
        self.remote.store(list.recipients.is_remote(), Ordering::SeqCst);
        *self.list.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(list);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether a call may take a network's time.
    pub(super) fn is_remote(&self) -> bool {
        self.remote.load(Ordering::Relaxed)
    }

    /// Counts replacements.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::SeqCst)
    }
}
