//! How far ahead of a walk keys are fetched.

use std::time::{Duration, Instant};

/// After so long without a file that was listed and opened, the walk begins anew; a provider is left alone for so long.
const REST: Duration = Duration::from_secs(1);
/// Keys in a row that a provider did not give, until it is left alone.
const FAILURES: usize = 8;

/// Grows while a walk takes what was fetched for it, and stops at a provider that gives nothing.
pub(crate) struct PrefetchWindow {
    ahead: usize,
    /// When a file was opened last.
    since: Instant,
    /// Keys in a row that were not to be had.
    failed: usize,
    until: Instant,
}

impl PrefetchWindow {
    /// Files ahead of the one that is opened, at first.
    const FIRST_AHEAD: usize = 8;
    /// And at most.
    pub(crate) const MOST_AHEAD: usize = 256;

    pub(crate) fn new(now: Instant) -> Self {
        Self { ahead: Self::FIRST_AHEAD, since: now, failed: 0, until: now }
    }

    /// How many files ahead to look now that one is opened; whether the walk `takes` most of what it has listed says how
    /// many it will be the next time.
    pub(crate) fn ahead(&mut self, takes: bool, now: Instant) -> usize {
        if self.is_paused(now) {
            return 0;
        }
        let ahead = if now.duration_since(self.since) > REST { Self::FIRST_AHEAD } else { self.ahead };
        let next = if takes { 2 * ahead } else { ahead / 2 };
        (self.ahead, self.since) = (next.clamp(Self::FIRST_AHEAD, Self::MOST_AHEAD), now);
        ahead
    }

    /// Whether nothing is to be asked of the provider now.
    pub(crate) fn is_paused(&self, now: Instant) -> bool {
        now < self.until
    }

    /// Notes whether a key was to be had.
    pub(crate) fn note(&mut self, was_had: bool, now: Instant) {
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
        let mut window = PrefetchWindow::new(now);
        let seen: Vec<usize> = (0..7).map(|_| window.ahead(true, now)).collect();
        assert_eq!(seen, [8, 16, 32, 64, 128, 256, 256]);
        assert_eq!([window.ahead(false, now), window.ahead(true, now)], [256, 128], "who leaves out many pays for few");
        assert_eq!(window.ahead(true, now + 2 * REST), 8);
    }

    #[test]
    fn a_provider_that_gives_nothing_is_left_alone_for_a_while() {
        let now = Instant::now();
        let mut window = PrefetchWindow::new(now);
        let _ = (window.ahead(true, now), window.ahead(true, now));
        for had in [&[false; FAILURES - 1][..], &[true], &[false; FAILURES - 1]].concat() {
            window.note(had, now);
        }
        assert_eq!(window.ahead(true, now), 32, "some keys are refused, not all");
        window.note(false, now);
        assert_eq!((window.is_paused(now), window.ahead(true, now)), (true, 0));
        let later = now + REST;
        assert_eq!((window.is_paused(later), window.ahead(true, later)), (false, 8));
        window.note(false, later);
        assert!(window.is_paused(later), "the next one that is refused says that nothing has changed");
        window.note(true, later);
        assert_eq!(window.ahead(true, later + REST), 8);
    }
}
