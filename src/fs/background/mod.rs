//! Work that a filesystem does by itself, on threads that serve nobody.

mod losses;
mod reclaim;
mod renew_keys;
mod settle;

use std::io;
use std::sync::Arc;

use crate::fs::filesystem::Filesystem;

/// Starts all of it, until `fs` is shut down or dropped.
pub(super) fn start(fs: &Arc<Filesystem>) -> io::Result<()> {
    if !fs.options.read_only {
        settle::start(fs)?;
    }
    renew_keys::start(fs)?;
    reclaim::start(fs)
}
