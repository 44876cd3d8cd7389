//! A lock over ranges of pages: readers and writers of different pages of one file run in parallel.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Pages from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Range {
    pub(super) const ALL: Self = Self { first: 0, last: u64::MAX };

    /// From `first` on, without end: what a change of the file's end takes.
    pub(super) fn from(first: u64) -> Self {
        Self { first, last: u64::MAX }
    }

    pub(super) fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

#[derive(Clone, Copy)]
struct Claim {
    ticket: u64,
    range: Range,
    exclusive: bool,
}

impl Claim {
    fn conflicts(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive) && self.range.overlaps(other.range)
    }
}

/// Claims are granted in the order they were made: one waits only for earlier ones that conflict, so none starves.
#[derive(Default)]
pub(super) struct RangeLock {
    claims: Mutex<Claims>,
    released: Condvar,
}

#[derive(Default)]
struct Claims {
    next_ticket: u64,
    held: Vec<Claim>,
}

/// A granted claim; given back on drop. A thread holds at most one per file.
pub(super) struct RangeGuard<'l> {
    lock: &'l RangeLock,
    ticket: u64,
}

impl RangeLock {
    pub(super) fn shared(&self, range: Range) -> RangeGuard<'_> {
        self.claim(range, false)
    }

    pub(super) fn exclusive(&self, range: Range) -> RangeGuard<'_> {
        self.claim(range, true)
    }

    fn claim(&self, range: Range, exclusive: bool) -> RangeGuard<'_> {
        let mut claims = self.claims();
        let ticket = claims.next_ticket;
        claims.next_ticket += 1;
        let claim = Claim { ticket, range, exclusive };
        claims.held.push(claim);
        while claims.held.iter().any(|other| other.ticket < ticket && claim.conflicts(other)) {
            claims = self.released.wait(claims).unwrap_or_else(PoisonError::into_inner);
        }
        RangeGuard { lock: self, ticket }
    }

    fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut claims = self.lock.claims();
        claims.held.retain(|claim| claim.ticket != self.ticket);
        if !claims.held.is_empty() {
            self.lock.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn disjoint_and_shared_claims_run_together() {
        let lock = RangeLock::default();
        let _a = lock.exclusive(Range { first: 0, last: 1 });
        let _b = lock.exclusive(Range { first: 2, last: 3 });
        let _c = lock.shared(Range::from(4));
        let _d = lock.shared(Range { first: 5, last: 5 });
    }

    #[test]
    fn overlapping_writers_exclude_each_other() {
        let (lock, sum) = (Arc::new(RangeLock::default()), Arc::new(AtomicU64::new(0)));
        let threads: Vec<_> = (0..4)
            .map(|n| {
                let (lock, sum) = (Arc::clone(&lock), Arc::clone(&sum));
                std::thread::spawn(move || {
                    for _ in 0..1000 {
                        let _guard = lock.exclusive(Range::from(n));
                        let seen = sum.load(Ordering::Relaxed);
                        std::hint::spin_loop();
                        sum.store(seen + 1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(sum.load(Ordering::Relaxed), 4000);
    }
}
