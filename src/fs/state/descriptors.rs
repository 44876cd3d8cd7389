//! Descriptors in use, and the threads that may wait for some.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A descriptor in use beside the one that pins the inode.
pub(crate) struct Held(Arc<AtomicUsize>);

impl Held {
    /// Counts one in `all`, until this is dropped.
    pub(super) fn count(all: &Arc<AtomicUsize>) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(all))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

thread_local! {
    /// This thread does not serve the kernel, so it may wait.
    static IN_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// Says that this thread does not serve the kernel.
pub(crate) fn enter_background() {
    IN_BACKGROUND.set(true);
}

/// Whether this thread does not serve the kernel.
pub(super) fn is_in_background() -> bool {
    IN_BACKGROUND.get()
}
