//! State of the work that goes on in the background.

use super::last_use::LastUse;
use super::losses::Losses;
use super::prefetch_listings::PrefetchListings;
use super::renewals::Renewals;
use super::unsettled::UnsettledFiles;

pub(crate) struct BackgroundWork {
    pub(crate) unsettled: UnsettledFiles,
    pub(crate) renewals: Renewals,
    pub(crate) losses: Losses,
    pub(crate) prefetch: PrefetchListings,
    pub(crate) last_use: LastUse,
}

impl BackgroundWork {
    pub(crate) fn new() -> Self {
        Self {
            unsettled: UnsettledFiles::default(),
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
