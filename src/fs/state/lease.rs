//! How long the keys of a file may be used.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::keys::Moment;

/// Until when a file's keys may be used.
pub(crate) struct Lease(Mutex<Term>);

#[derive(Clone, Copy)]
pub(crate) struct Term {
    /// When the provider last agreed.
    pub(crate) since: Moment,
    /// The provider is being asked.
    pub(crate) renewing: bool,
    /// The provider could not be reached when it was last asked.
    pub(crate) unreachable: bool,
}

impl Lease {
    pub(crate) fn new(since: Moment) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Term { since, renewing: false, unreachable: false })))
    }

    /// The provider has agreed at `since`.
    pub(crate) fn extend(&self, since: Moment) {
        *self.term() = Term { since, renewing: false, unreachable: false };
    }

    pub(crate) fn term(&self) -> MutexGuard<'_, Term> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
