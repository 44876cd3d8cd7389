//! The meaning of a filesystem, without the kernel's types: inodes, names, attributes, handles, and the errno table.
//!
//! Knows content, keys and storage; calls no cipher, and of crypto knows only the names of keys. Invariants:
//! * every operation names inodes by [`InodeId`] and entries by plain name, and reaches the disk through held nodes;
//! * nothing waits for a provider on the caller's thread while others could be served: see [`Filesystem::open`];
//! * every failure becomes an errno in one table: see [`Error::errno`].
//!
//! Floors, each of which knows those below it only: `error`, `caller`, `kernel` and `metrics`; `state`; `filesystem`; `ops`;
//! `background`; `lifecycle`.

mod background;
mod caller;
mod error;
mod filesystem;
mod kernel;
mod lifecycle;
mod metrics;
mod ops;
mod state;

pub use caller::Caller;
pub use error::Error;
pub use filesystem::{Filesystem, Options};
pub use kernel::{InodeId, Kernel, ROOT};
pub use metrics::{Begun, Metrics, Operation, OperationCounts, OperationMetrics};
pub use ops::allocate::Allocate;
pub use ops::directory::{Listed, UNREADABLE};
pub use ops::rekey::Rekeyed;
pub use ops::stats::Stats;
pub use state::answer::{Answer, ReadAnswer};
pub use state::attributes::{Attributes, Change};
pub use state::open_directories::DirectoryHandle;
pub use state::rekeying::Run;
pub use state::sync_errors::Handle;

pub use crate::storage::{Access, FileSystemStat, NodeKind, RenameMode, SetTime, Timestamp, XattrMode};
