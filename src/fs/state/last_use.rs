//! When content was last used.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::keys::Moment;

pub(crate) struct LastUse {
    start: Moment,
    /// Seconds since the start.
    seconds: AtomicU64,
}

impl LastUse {
    pub(crate) fn new() -> Self {
        Self { start: Moment::now(), seconds: AtomicU64::new(0) }
    }

    /// Somebody uses a file's content now.
    pub(crate) fn note(&self) {
        let seconds = self.start.elapsed().as_secs();
        if self.seconds.load(Ordering::Relaxed) != seconds {
            self.seconds.store(seconds, Ordering::Relaxed);
        }
    }

    pub(crate) fn at(&self) -> Moment {
        self.start + Duration::from_secs(self.seconds.load(Ordering::Relaxed))
    }
}
