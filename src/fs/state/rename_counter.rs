//! Counts names that move, so that somebody who walks the cipher directory can tell whether he may have missed a file: one
//! that was moved from where he had not been yet to where he had.

use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Default)]
pub(crate) struct RenameCounter {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// A name that is being moved, until it is dropped.
pub(crate) struct Moving<'m>(&'m RenameCounter);

impl RenameCounter {
    pub(crate) fn begin(&self) -> Moving<'_> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        Moving(self)
    }

    pub(crate) fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// Asked before [`Self::begun`], so that a move in between counts there.
    pub(crate) fn under_way(&self) -> u64 {
        let ended = self.ended.load(Ordering::SeqCst);
        self.begun().saturating_sub(ended)
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}
