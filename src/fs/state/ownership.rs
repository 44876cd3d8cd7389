//! Whether the volume is this filesystem's to write.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::lease::{Lost, Permit, Tenure};

pub(crate) struct Ownership {
    /// None where a lock says that nobody else writes the volume.
    tenure: Option<Tenure>,
    changed: AtomicBool,
}

impl Ownership {
    pub(crate) fn new(tenure: Option<Tenure>) -> Self {
        Self { tenure, changed: AtomicBool::new(false) }
    }

    pub(crate) fn permit(&self) -> Permit {
        self.tenure.as_ref().map(Tenure::permit).unwrap_or_default()
    }

    pub(crate) fn check(&self) -> Result<(), Lost> {
        self.tenure.as_ref().map_or(Ok(()), Tenure::check)
    }

    /// Something is changed now, or may be.
    pub(crate) fn note_change(&self) {
        self.changed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_changed(&self) -> bool {
        self.changed.load(Ordering::Relaxed)
    }

    /// Gives the volume back.
    pub(crate) fn end(&self) {
        self.tenure.iter().for_each(Tenure::end);
    }
}
