//! How far ahead of a walk keys are fetched.

use std::time::{Duration, Instant};

/// After so long without a file that was listed and opened, the walk begins anew; a provider is left alone for so long.
const REST: Duration = Duration::from_secs(1);
/// Keys in a row that a provider did not give, until it is left alone.
const FAILURES: usize = 8;

/// Grows while a walk takes what was fetched for it, and stops at a provider that gives nothing.
pub(super) struct Pace {
    ahead: usize,
    /// When a file was opened last.
    since: Instant,
    /// Keys in a row that were not to be had.
    failed: usize,
    until: Instant,
}

impl Pace {
    /// Files ahead of the one that is opened, at first.
    const FIRST_AHEAD: usize = 8;
    /// And at most.
    pub(super) const MOST_AHEAD: usize = 256;

    pub(super) fn new(now: Instant) -> Self {
        Self { ahead: Self::FIRST_AHEAD, since: now, failed: 0, until: now }
    }

    /// How many files ahead to look now that one is opened; whether the walk `takes` most of what it has listed says how
    /// many it will be the next time.
    pub(super) fn ahead(&mut self, takes: bool, now: Instant) -> usize {
        if self.is_paused(now) {
            return 0;
        }
        let ahead = if now.duration_since(self.since) > REST { Self::FIRST_AHEAD } else { self.ahead };
        let next = if takes { 2 * ahead } else { ahead / 2 };
        (self.ahead, self.since) = (next.clamp(Self::FIRST_AHEAD, Self::MOST_AHEAD), now);
        ahead
    }

    /// Whether nothing is to be asked of the provider now.
    pub(super) fn is_paused(&self, now: Instant) -> bool {
        now < self.until
    }

    /// Notes whether a key was to be had.
    pub(super) fn note(&mut self, was_had: bool, now: Instant) {
        self.failed = if was_had { 0 } else { self.failed + 1 };
        if self.failed >= FAILURES {
            (self.ahead, self.until) = (Self::FIRST_AHEAD, now + REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_a_walk_and_begins_anew_after_a_rest() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let seen: Vec<usize> = (0..7).map(|_| pace.ahead(true, now)).collect();
        assert_eq!(seen, [8, 16, 32, 64, 128, 256, 256]);
        assert_eq!([pace.ahead(false, now), pace.ahead(true, now)], [256, 128], "who leaves out many pays for few");
        assert_eq!(pace.ahead(true, now + 2 * REST), 8);
    }

    #[test]
    fn a_provider_that_gives_nothing_is_left_alone_for_a_while() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let _ = (pace.ahead(true, now), pace.ahead(true, now));
        for had in [&[false; FAILURES - 1][..], &[true], &[false; FAILURES - 1]].concat() {
            pace.note(had, now);
        }
        assert_eq!(pace.ahead(true, now), 32, "some keys are refused, not all");
        pace.note(false, now);
        assert_eq!((pace.is_paused(now), pace.ahead(true, now)), (true, 0));
        let later = now + REST;
        assert_eq!((pace.is_paused(later), pace.ahead(true, later)), (false, 8));
        pace.note(false, later);
        assert!(pace.is_paused(later), "the next one that is refused says that nothing has changed");
        pace.note(true, later);
        assert_eq!(pace.ahead(true, later + REST), 8);
    }
}
