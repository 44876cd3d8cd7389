//! The plaintext view of one sealed file: read, write, resize, settle.
//!
//! Implements `docs/FORMAT.md` sections 2, 3 and 6. Knows neither providers nor inodes nor errno. Invariants:
//! * nothing is returned that did not authenticate, other than holes where the volume allows them;
//! * the size, and everything else about the file's end, changes only under the exclusive lock of the range that begins at
//!   its last page and never ends;
//! * a byte that a program has written and that is not stored is never read as a zero: see [`Ledger`];
//! * at every moment the bytes on disk are a file that opens, with the old content or the new.

mod allocate;
mod buffers;
#[cfg(test)]
mod crash_disk_tests;
#[cfg(test)]
mod crash_header_tests;
#[cfg(test)]
mod crash_tests;
mod file;
mod ledger;
#[cfg(test)]
mod ledger_tests;
mod pages;
mod ranges;
mod read;
mod rekey;
mod resize;
mod rhythm;
mod settle;
#[cfg(test)]
mod tests;
mod write;

pub use file::{Content, ContentError, Events, Rules};
pub use ledger::Ledger;
pub use pages::{Opened, open as open_page};
pub use rekey::{KeepsLog, apply_log, complete};
pub use settle::{Unsettled, set_end, settled};
