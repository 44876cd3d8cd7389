//! How many keys for new files are wanted: those that were taken lately.

use std::time::Duration;

use super::Moment;

/// After so long without a taker the demand begins anew; what was taken counts half after each.
const REST: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct Demand {
    taken: usize,
    /// Since when it is counted.
    since: Moment,
    last: Moment,
}

impl Demand {
    pub(super) fn new(now: Moment) -> Self {
        Self { taken: 0, since: now, last: now }
    }

    /// Somebody asks at `now`. Returns whether the demand begins anew.
    pub(super) fn ask(&mut self, now: Moment) -> bool {
        let rested = now.saturating_duration_since(self.last) >= REST;
        if rested || now.saturating_duration_since(self.since) >= REST {
            self.taken = if rested { 0 } else { self.taken / 2 };
            self.since = now;
        }
        self.last = now;
        rested
    }

    /// One is taken.
    pub(super) fn take(&mut self) {
        self.taken = self.taken.saturating_add(1);
    }

    pub(super) fn taken(&self) -> usize {
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fades_and_begins_anew_after_a_rest() {
        let start = Moment::now();
        let mut demand = Demand::new(start);
        for second in 0..59 {
            assert!(!demand.ask(start + Duration::from_secs(second)));
            demand.take();
        }
        assert_eq!(demand.taken(), 59);
        assert!(!demand.ask(start + REST) && demand.taken() == 29);
        assert!(!demand.ask(start + REST * 3 / 2) && demand.taken() == 29);
        assert!(demand.ask(start + 3 * REST) && demand.taken() == 0);
    }
}
