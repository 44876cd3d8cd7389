//! The backing tree: positioned file I/O, directory handles, and the cipher directory as a whole.
//!
//! Knows nothing of keys, pages or headers. Invariants:
//! * no path is walked after start: every operation is relative to a held descriptor and names one entry;
//! * symlinks are never followed and mounts below the cipher directory never entered;
//! * what is assumed of the disk is written down at [`RawFile`] and in `docs/FORMAT.md` section 1.

mod attributes;
pub mod cipher_directory;
mod config_repair;
mod directory;
mod file;
mod host;
mod key_stock;
mod lease_file;
mod long_targets;
mod memory;
mod node;
mod own_directory;
mod privileges;
mod redo_logs;
mod volume_lock;
mod written;
mod xattr;

pub use attributes::{FileSystemStat, NodeKind, SetTime, Stat, Timestamp};
pub use cipher_directory::CipherDirectory;
pub use directory::{DirEntry, DirStream};
pub use file::{DiskFile, RawFile};
pub use host::Host;
pub use key_stock::{Candidate, KeyStock};
pub use lease_file::{LeaseFile, Seen};
pub use long_targets::LongTargets;
pub use memory::{Change, MemoryFile, Recorded};
pub use node::{Access, Node, RenameMode};
pub use privileges::CAPABILITIES;
pub use redo_logs::{NotCommitted, OpenLog, RedoLogs, find_inodes};
pub use xattr::{LABEL, XattrMode, host_may_label};
