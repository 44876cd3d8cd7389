//! Handles that the kernel has.

use std::sync::atomic::{AtomicU64, Ordering};

use super::open_directories::OpenDirectories;
use super::sync_errors::Handle;

#[derive(Default)]
pub(crate) struct Handles {
    /// The last handle of a file that was given a number.
    last: AtomicU64,
    pub(crate) directories: OpenDirectories,
}

impl Handles {
    /// A number for a handle of a file that is opened now.
    pub(crate) fn next(&self) -> Handle {
        Handle(self.last.fetch_add(1, Ordering::Relaxed) + 1)
    }
}
