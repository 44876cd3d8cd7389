//! Errors of the disk, kept until every handle that was open has heard of them: what `errseq_t` is in the kernel.
//!
//! All handles of a file share one backing descriptor, and the kernel tells each error once to a descriptor, whoever syncs:
//! settling, a sync of one handle, a write that waits for pages on their way. So what was told is kept here.
//!
//! Invariants: a handle hears an error once; one that was opened after somebody has heard it does not hear it; an error that
//! nobody has heard yet is heard by the first that asks, whenever it was opened.

use std::collections::HashSet;
use std::io;

/// Names an open handle of a file. Greater ones were opened later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Handle(pub u64);

/// What is kept for one file: the last error.
#[derive(Default)]
pub(crate) struct SyncErrors(Option<Box<Latest>>);

struct Latest {
    errno: i32,
    /// No handle that was open before had a greater number.
    first_heard: Option<Handle>,
    heard: HashSet<Handle>,
}

impl SyncErrors {
    /// Keeps an error of the disk.
    pub(crate) fn note(&mut self, errno: i32) {
        self.0 = Some(Box::new(Latest { errno, first_heard: None, heard: HashSet::new() }));
    }

    /// The error that `handle` has not heard yet; `now` is greater than every handle so far.
    pub(crate) fn hear(&mut self, handle: Handle, now: Handle) -> Option<io::Error> {
        let latest = self.0.as_mut()?;
        let is_new = *latest.first_heard.get_or_insert(now) >= handle && latest.heard.insert(handle);
        is_new.then(|| io::Error::from_raw_os_error(latest.errno))
    }

    /// Whether the disk has refused something of the file.
    pub(crate) fn is_any(&self) -> bool {
        self.0.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks for `handle` when `now` was the last number.
    fn hears(errors: &mut SyncErrors, handle: u64, now: u64) -> Option<i32> {
        errors.hear(Handle(handle), Handle(now)).and_then(|error| error.raw_os_error())
    }

    #[test]
    fn each_handle_that_was_open_hears_an_error_once() {
        let mut errors = SyncErrors::default();
        assert_eq!(hears(&mut errors, 1, 9), None);
        errors.note(libc::EIO);
        assert_eq!([1, 2, 1, 2].map(|handle| hears(&mut errors, handle, 9)), [Some(libc::EIO), Some(5), None, None]);
        errors.note(libc::ENOSPC);
        assert_eq!([2, 1, 2].map(|handle| hears(&mut errors, handle, 9)), [Some(libc::ENOSPC), Some(28), None]);
    }

    #[test]
    fn a_handle_opened_later_hears_what_nobody_has_heard() {
        let mut errors = SyncErrors::default();
        errors.note(libc::EIO);
        assert_eq!([20, 1, 21].map(|handle| hears(&mut errors, handle, 20)), [Some(libc::EIO), Some(libc::EIO), None]);
    }
}
