//! Work that takes as long as a file is large, one piece at a time.

/// Work on a file that is under way.
pub(crate) struct Filling {
    /// The size of the file before.
    pub(crate) base: u64,
    /// What waits for its end.
    pub(crate) waiting: Vec<Box<dyn FnOnce() + Send>>,
}
