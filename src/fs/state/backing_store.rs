//! The cipher directory, and what was found of the filesystem that it is on.

use std::io;

use crate::storage::{CipherDirectory, LongTargets, Node, RedoLogs};

use super::dir_sync_queue::DirSyncQueue;
use super::owed_ids::OwedIds;

pub(crate) struct BackingStore {
    pub(crate) long_targets: LongTargets,
    pub(crate) redo_logs: RedoLogs,
    pub(crate) directory: CipherDirectory,
    pub(crate) dir_syncs: DirSyncQueue,
    pub(crate) owed_ids: OwedIds,
    /// See [`Node::renames_what_is_open`].
    pub(crate) renames_what_is_open: bool,
    /// The daemon's own user.
    pub(crate) user: u32,
}

impl BackingStore {
    pub(crate) fn new(directory: CipherDirectory, root: &Node) -> io::Result<Self> {
        Ok(Self {
            long_targets: directory.long_targets()?,
            redo_logs: directory.redo_logs()?,
            directory,
            dir_syncs: DirSyncQueue::new(root)?,
            owed_ids: OwedIds::default(),
            renames_what_is_open: root.renames_what_is_open()?,
            user: rustix::process::geteuid().as_raw(),
        })
    }

    /// The daemon may make files for other users.
    pub(crate) fn is_privileged(&self) -> bool {
        self.user == 0
    }
}
