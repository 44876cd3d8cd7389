//! Operations: what the kernel, or a command, asks of a filesystem.

pub(super) mod allocate;
mod attributes;
pub(super) mod backing_file;
mod content;
pub(super) mod directory;
mod fill;
mod headers;
mod io;
mod lock;
mod names;
mod namespace;
mod open;
mod redo;
pub(super) mod rekey;
mod resize;
mod setid;
mod settle;
mod shred;
pub(super) mod stats;
mod symlink;
mod wrapping_keys;
mod xattr;
