//! The audit log: a trail of every use of a wrapping key, one JSON line each, chained and authenticated.
//!
//! Implements `docs/FORMAT.md` section 11. Imports `keys` (what a use is), `crypto` (what authenticates it) and `format`. Invariants:
//! * a record names the one before it by its hash and has the number after it; each has a MAC under a key of the volume: a
//!   record that was changed, left out, moved or put in shows; that the last ones are missing does not;
//! * a thread that needs a key never waits for the log's disk, unless the operator wants that (`--audit-required`);
//! * what could not be written is counted, and the count is a record of its own as soon as one can be written;
//! * no secret and no name or path of a file is in it.

mod file;
mod record;
#[cfg(test)]
mod tests;
mod trail;
mod verify;

pub use file::{FileError, LogFile};
pub use record::{Event, Line, MAX_LINE, Record, Use, time_text};
pub use trail::{AuditStatus, AuditTrail, BeginError};
pub use verify::{Fault, Report, VerifyError, each_record, verify};
