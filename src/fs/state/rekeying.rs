//! Files that are getting new data keys, and redo logs that are left.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::format::config::VolumeConfig;
use crate::format::name::RedoLog;
use crate::fs::error::Error;
use crate::fs::kernel::InodeId;

use super::inode::Inode;

/// A run of `kmsfs rekey`.
pub type Run = [u8; 16];

pub(crate) struct Rekeying {
    pub(crate) pending: PendingRekeys,
    /// Held while a redo log begins to count, or the list of wrapping keys changes.
    committing: Mutex<()>,
    /// The run that was heard of last.
    pub(crate) run: Mutex<Option<Run>>,
    /// The first of the wrapping keys, as `status` names it.
    wrapping_key: Mutex<String>,
}

impl Rekeying {
    pub(crate) fn new(config: &VolumeConfig) -> Self {
        Self {
            pending: PendingRekeys::default(),
            committing: Mutex::default(),
            run: Mutex::default(),
            wrapping_key: Mutex::new(first_key(config)),
        }
    }

    /// Runs `work` while no log begins to count and the list of wrapping keys stays as it is.
    pub(crate) fn while_no_log_commits<T>(&self, work: impl FnOnce() -> T) -> T {
        let _nobody = self.committing.lock().unwrap_or_else(PoisonError::into_inner);
        work()
    }

    /// The volume has these wrapping keys now.
    pub(crate) fn take_wrapping_key(&self, config: &VolumeConfig) {
        *self.wrapping_key.lock().unwrap_or_else(PoisonError::into_inner) = first_key(config);
    }

    pub(crate) fn wrapping_key(&self) -> String {
        self.wrapping_key.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn first_key(config: &VolumeConfig) -> String {
    config.wrapping_keys.first().map(|key| format!("{}:{}", key.provider, key.key)).unwrap_or_default()
}

/// Redo logs that are still there.
#[derive(Default)]
pub(crate) struct PendingRekeys {
    is_any: AtomicBool,
    logs: Mutex<Logs>,
}

#[derive(Default)]
pub(crate) struct Logs {
    /// Those of files that are closed; none if the inode could not be found.
    pub(crate) closed: HashMap<InodeId, (RedoLog, Option<Arc<Inode>>)>,
    /// Those that are read in the place of their files, where nothing may be written.
    pub(crate) instead: HashMap<InodeId, RedoLog>,
    /// Those that are of no use any more.
    pub(crate) useless: Vec<RedoLog>,
}

impl PendingRekeys {
    /// Whether there may be any: asked before the lock is taken.
    pub(crate) fn is_any(&self) -> bool {
        self.is_any.load(Ordering::Relaxed)
    }

    pub(crate) fn set_any(&self, is_any: bool) {
        self.is_any.store(is_any, Ordering::SeqCst);
    }

    /// Fails if a file waits for its log to be applied.
    pub(crate) fn check(&self, inode: &Inode) -> Result<(), Error> {
        let is_closed = self.is_any() && self.logs().closed.contains_key(&inode.id);
        if is_closed { Err(Error::Unfinished) } else { Ok(()) }
    }

    pub(crate) fn logs(&self) -> MutexGuard<'_, Logs> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
