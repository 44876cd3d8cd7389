//! How much a command has before it: what lies below a directory, counted beside the work while somebody watches.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use crate::cli::progress;

use super::estimate_walk;

/// Making a file costs as much as so many bytes.
const PER_FILE: u64 = 512 << 10;

/// What work on so many files and bytes weighs, in bytes.
pub(super) fn weight(files: u64, bytes: u64) -> u64 {
    files.saturating_mul(PER_FILE).saturating_add(bytes)
}

/// Files and bytes below a directory, once they are counted.
#[derive(Clone, Default)]
pub(super) struct Totals(Arc<OnceLock<(u64, u64)>>);

impl Totals {
    /// Has them counted by a thread of its own, which nobody waits for. What cannot be read is left out.
    pub(super) fn below(path: PathBuf) -> Self {
        let totals = Self::default();
        if progress::is_watched() {
            let counted = totals.clone();
            std::thread::spawn(move || {
                if let Ok(tree) = estimate_walk::count(&path, false) {
                    // It is set once.
                    let _ = counted.0.set((tree.files, tree.allocated));
                }
            });
        }
        totals
    }

    /// The work that was done, and all of it, if that is known yet.
    pub(super) fn step(&self, files: u64, bytes: u64) -> Option<(u64, u64)> {
        let (all_files, all_bytes) = self.0.get()?;
        Some((weight(files, bytes), weight(*all_files, *all_bytes)))
    }

    /// How many files there are, if that is known yet.
    pub(super) fn files(&self) -> Option<u64> {
        self.0.get().map(|(files, _)| *files)
    }
}
