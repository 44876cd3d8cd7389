//! Tells whether a file is written in small steps, each of which is synced: a log, a database.
//!
//! Such a file's pages may go to the disk as soon as they are written, since the sync that comes next waits for them
//! anyway. Any other file's pages are left to the kernel, which sends them later and together.

use std::sync::atomic::{AtomicU32, Ordering};

/// So many writes before a sync are still a small step.
const SMALL_STEP: u32 = 4;
/// So many small steps in a row, and the next one is expected to be one.
const EXPECTED: u32 = 3;

#[derive(Default)]
pub(super) struct Rhythm {
    writes: AtomicU32,
    steps: AtomicU32,
}

impl Rhythm {
    /// Notes a write. Returns whether a sync is expected soon.
    pub(super) fn write(&self) -> bool {
        let before = self.writes.fetch_add(1, Ordering::Relaxed);
        before < SMALL_STEP && self.steps.load(Ordering::Relaxed) >= EXPECTED
    }

    /// Notes a sync.
    pub(super) fn sync(&self) {
        match self.writes.swap(0, Ordering::Relaxed) {
            0 => {}
            1..=SMALL_STEP => self.steps.store(self.steps.load(Ordering::Relaxed).saturating_add(1), Ordering::Relaxed),
            _ => self.steps.store(0, Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_synced_steps_are_recognised_and_large_ones_end_them() {
        let rhythm = Rhythm::default();
        for _ in 0..EXPECTED {
            assert!(!rhythm.write());
            rhythm.sync();
        }
        assert!(rhythm.write());
        rhythm.sync();
        rhythm.sync();
        assert!((0..SMALL_STEP).all(|_| rhythm.write()));
        assert!(!rhythm.write());
        rhythm.sync();
        assert!(!rhythm.write());
    }
}
