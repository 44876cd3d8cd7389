//! What the background looks after.

use super::last_use::LastUse;
use super::losses::Losses;
use super::prefetch_listings::PrefetchListings;
use super::renewals::Renewals;
use super::unsettled::Unsettled;

pub(crate) struct BackgroundWork {
    pub(crate) unsettled: Unsettled,
    pub(crate) renewals: Renewals,
    pub(crate) losses: Losses,
    pub(crate) prefetch: PrefetchListings,
    pub(crate) last_use: LastUse,
}

impl BackgroundWork {
    pub(crate) fn new() -> Self {
        Self {
            unsettled: Unsettled::default(),
            renewals: Renewals::default(),
            losses: Losses::default(),
            prefetch: PrefetchListings::new(),
            last_use: LastUse::new(),
        }
    }

    /// Nothing more begins.
    pub(crate) fn stop(&self) {
        self.renewals.stop();
        self.losses.stop();
        self.unsettled.stop();
    }
}
