//! Which bytes of a file programs may take for written although they are not stored.
//!
//! A kernel that writes back later has told programs that their bytes are written, and counts them in the file's size. It
//! hands them over in any order, so one that lies further on may come first. Until all have come, what lies between is a
//! *gap*: nobody can tell it from a hole that a program has made. Once one of them is refused or fails, its range is *lost*.
//! Invariants:
//! * what is lost is neither read as zeros nor sealed as zeros;
//! * a range stops being lost when it is written, when the file is cut before it, and when the kernel has forgotten the file;
//! * a file without gaps and losses, as nearly all are, costs one look at a flag.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ContentError;

/// Gaps of one file that are remembered. What is forgotten counts as a hole.
const MOST_GAPS: usize = 1024;

/// Kept for each inode, longer than its content is.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Somebody believes that what is handed over is written: a kernel that writes back later.
    is_believed: AtomicBool,
    is_used: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    gaps: Ranges,
    lost: Ranges,
    /// What the first loss since the last sync came from.
    cause: Option<i32>,
    /// The disk size that the file must get before it is believed again: taking back what a failed write added has failed.
    owed: Option<u64>,
}

impl Ledger {
    /// From now on gaps and losses count.
    pub fn believe(&self) {
        self.is_believed.store(true, Ordering::Relaxed);
    }

    /// Whether anything is lost.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        self.is_used() && !self.state().lost.is_empty()
    }

    /// Everything handed over so far has come: gaps that are left are holes.
    pub fn confirm(&self) {
        if self.is_used() {
            let mut state = self.state();
            state.gaps = Ranges::default();
            state.cause = None;
            self.note(&state);
        }
    }

    /// Nobody believes anything of the file that is not so.
    pub fn clear(&self) {
        self.cut(0);
    }

    /// The disk size that the file is owed.
    pub fn owed(&self) -> Option<u64> {
        self.is_used().then(|| self.state().owed).flatten()
    }

    /// See [`Self::owed`].
    pub fn owe(&self, disk: Option<u64>) {
        let mut state = self.state();
        state.owed = disk;
        self.note(&state);
    }

    /// The file ends at `start`; what was behind it is lost and leaves no gap.
    pub(super) fn end_at(&self, start: u64) {
        let mut state = self.state();
        state.gaps.remove(start..u64::MAX);
        self.note(&state);
    }

    /// The file ends before `size`, and everybody knows.
    pub(super) fn cut(&self, size: u64) {
        if self.is_used() {
            let mut state = self.state();
            state.gaps.remove(size..u64::MAX);
            state.lost.remove(size..u64::MAX);
            self.note(&state);
        }
    }

    /// Refuses a range of which something is lost.
    pub(super) fn check(&self, range: Range<u64>) -> Result<(), ContentError> {
        match self.is_used().then(|| self.state().lost.first_in(&range)).flatten() {
            Some(lost) => Err(ContentError::Lost { offset: lost.start.max(range.start) }),
            None => Ok(()),
        }
    }

    /// Refuses a write that would make something lost a hole. As long as nobody has synced, for the reason of the loss.
    pub(super) fn check_gap(&self, gap: Range<u64>) -> Result<(), ContentError> {
        self.check(gap).map_err(|lost| match self.state().cause {
            Some(cause) => io::Error::from_raw_os_error(cause).into(),
            None => lost,
        })
    }

    /// The file reaches further than before, and nobody knows yet what comes into this part of it.
    pub(super) fn add_gap(&self, gap: Range<u64>) {
        if !self.is_believed.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state();
        state.gaps.add(gap);
        if state.gaps.0.len() > MOST_GAPS {
            state.gaps.0.pop_first();
        }
        self.note(&state);
    }

    /// The range is stored.
    pub(super) fn stored(&self, range: Range<u64>) {
        if self.is_used() {
            let mut state = self.state();
            state.gaps.remove(range.clone());
            state.lost.remove(range);
            self.note(&state);
        }
    }

    /// What was to be written there, is not stored, in a file of this size. Inside the file the old content stays, unless it
    /// is a gap: then this returns where the gap begins, and the file must end there.
    pub fn lose(&self, range: Range<u64>, size: u64, cause: Option<i32>) -> Option<u64> {
        if !self.is_believed.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state();
        let gap = state.gaps.first_in(&(range.start..range.end.min(size)));
        let start = gap.as_ref().map_or(size.max(range.start), |gap| gap.start);
        // What was stored behind the gap goes with it.
        state.lost.add(start..range.end.max(if gap.is_some() { size } else { start }));
        state.cause = state.cause.or(cause);
        self.note(&state);
        gap.map(|gap| gap.start)
    }

    fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Acquire)
    }

    fn note(&self, state: &State) {
        let is_used = !state.gaps.is_empty() || !state.lost.is_empty() || state.owed.is_some();
        self.is_used.store(is_used, Ordering::Release);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ranges that neither overlap nor touch: from their starts to their ends.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&s, &e)) = self.0.range(..=end).next_back().filter(|(_, e)| **e >= start) {
            self.0.remove(&s);
            (start, end) = (start.min(s), end.max(e));
        }
        self.0.insert(start, end);
    }

    fn remove(&mut self, range: Range<u64>) {
        while let Some(found) = self.first_in(&range) {
            self.0.remove(&found.start);
            if found.start < range.start {
                self.0.insert(found.start, range.start);
            }
            if found.end > range.end {
                self.0.insert(range.end, found.end);
            }
        }
    }

    /// The first range that shares a byte with `range`.
    fn first_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        let before = self.0.range(..=range.start).next_back().filter(|(_, end)| **end > range.start);
        let found = before.or_else(|| self.0.range(range.clone()).next());
        found.map(|(start, end)| *start..*end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_are_sets_of_bytes(steps in prop::collection::vec((any::<bool>(), 0..40_u64, 0..20_u64), 0..30)) {
            let (mut ranges, mut model) = (Ranges::default(), [false; 64]);
            for (adds, start, len) in steps {
                let range = start..start + len;
                if adds { ranges.add(range.clone()) } else { ranges.remove(range.clone()) }
                range.clone().for_each(|at| model[usize::try_from(at).unwrap()] = adds);
                for at in 0..64 {
                    let held = ranges.first_in(&(at..at + 1)).is_some();
                    prop_assert_eq!(held, model[usize::try_from(at).unwrap()]);
                }
            }
            let ends: Vec<_> = ranges.0.iter().collect();
            prop_assert!(ends.windows(2).all(|two| two[0].1 < two[1].0));
        }
    }

    #[test]
    fn what_is_lost_in_a_gap_takes_what_lies_behind_it() {
        let ledger = Ledger::default();
        ledger.believe();
        ledger.add_gap(100..500);
        assert_eq!(ledger.lose(300..400, 900, Some(28)), Some(100));
        assert!(ledger.check(0..100).is_ok() && ledger.check(99..101).is_err() && ledger.check(899..900).is_err());
        ledger.cut(100);
        assert!(!ledger.has_lost());
        assert_eq!(ledger.lose(50..150, 100, None), None);
        assert!(ledger.check(0..100).is_ok() && ledger.check(100..101).is_err() && ledger.check(150..151).is_ok());
        ledger.stored(100..150);
        assert!(!ledger.is_used());
        ledger.add_gap(0..10);
        ledger.confirm();
        assert_eq!(ledger.lose(5..6, 20, None), None);
    }
}
