//! What is asked of a copy, how far it is, and what became of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::storage::NodeKind;

use super::side::TransferError;

/// How a tree is copied.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Threads.
    pub parallel: usize,
    /// Read everything back and compare it.
    pub verify: bool,
    /// Copy extended attributes and ACLs.
    pub xattrs: bool,
}

impl Default for Settings {
    /// A thread for each CPU, with extended attributes, without reading back.
    fn default() -> Self {
        Self {
            parallel: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            verify: false,
            xattrs: true,
        }
    }
}

/// What could not be copied.
#[derive(Debug)]
pub struct Failure {
    /// Its path in the tree, from where the copy began; `.` for all of it.
    pub path: Vec<u8>,
    /// Why.
    pub error: TransferError,
}

/// How far a copy is; may be read while it runs.
#[derive(Debug, Default)]
pub struct Progress {
    files: AtomicU64,
    directories: AtomicU64,
    others: AtomicU64,
    links: AtomicU64,
    kept: AtomicU64,
    kept_bytes: AtomicU64,
    bytes: AtomicU64,
    moved: AtomicU64,
    verified: AtomicU64,
    failed: AtomicU64,
    is_stopped: AtomicBool,
}

/// The numbers of a [`Progress`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Regular files that were copied and have their names.
    pub files: u64,
    /// Directories that were made or entered.
    pub directories: u64,
    /// Symlinks, FIFOs, sockets and devices that were made.
    pub others: u64,
    /// Further names of files that were made.
    pub links: u64,
    /// Entries that were there already.
    pub kept: u64,
    /// Their sizes.
    pub kept_bytes: u64,
    /// Plain bytes of those files, without holes.
    pub bytes: u64,
    /// Plain bytes that were copied so far, also of files that have no names yet.
    pub moved: u64,
    /// Entries that were read back and found equal.
    pub verified: u64,
    /// Entries that failed.
    pub failed: u64,
    /// What failed fails for everything else too, which was not tried.
    pub is_stopped: bool,
}

impl Progress {
    /// The numbers now.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            files: of(&self.files),
            directories: of(&self.directories),
            others: of(&self.others),
            links: of(&self.links),
            kept: of(&self.kept),
            kept_bytes: of(&self.kept_bytes),
            bytes: of(&self.bytes),
            moved: of(&self.moved),
            verified: of(&self.verified),
            failed: of(&self.failed),
            is_stopped: self.is_stopped.load(Ordering::Relaxed),
        }
    }

    pub(super) fn copied(&self, kind: NodeKind, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let count = match kind {
            NodeKind::File => &self.files,
            NodeKind::Directory => &self.directories,
            _ => &self.others,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn moved(&self, bytes: u64) {
        self.moved.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn kept(&self, bytes: u64) {
        self.kept.fetch_add(1, Ordering::Relaxed);
        self.kept_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn stopped(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    pub(super) fn linked(&self) {
        self.links.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn verified(&self) {
        self.verified.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }
}
