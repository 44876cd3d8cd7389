//! Whether what lies in a cipher directory is whole: the structure without keys, everything with them; and mending,
//! salvaging.
//!
//! Reads beside a mount as well as without one. Invariants:
//! * looking changes nothing and takes no lock; what a writer beside it may have caused is looked at again, and again, before
//!   it is believed;
//! * a provider is asked only for headers whose MAC was checked; so many at a time, and each until it answers or has said
//!   nothing for a minute;
//! * mending removes only what means nothing, and writes only what is derived from something that authenticates;
//! * what is salvaged holds authenticated bytes, and zeros where the report says so.

mod entries;
mod files;
mod finding;
mod keys;
mod mend;
mod pages;
mod places;
mod salvage;
mod targets;
mod unfinished;
mod volume_files;
mod walk;
mod xattrs;

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use finding::{Finding, Kind, Mend, Severity};
pub use salvage::{Range, Salvaged};
pub use targets::{Target, TargetError};

use crate::content::Rules;
use crate::format::config::{ConfigError, VolumeConfig};
use crate::keys::{KeyError, Volume};
use crate::storage::{CipherDirectory, Node};

use keys::Patience;

/// A check of one volume.
pub struct Checker<'v> {
    root: Node,
    directory: &'v CipherDirectory,
    volume_id: [u8; 16],
    rules: Rules,
    /// The unlocked volume; none for its structure alone.
    volume: Option<&'v Volume>,
    settings: Settings,
    /// Inodes of files with several names that were looked at.
    seen: Mutex<HashSet<u64>>,
    /// Who has which id: the inode, and where it was found.
    ids: Mutex<HashMap<[u8; 16], (u64, String)>>,
    patience: Patience,
    counts: Counts,
    found: Mutex<Vec<Finding>>,
    /// What is to be looked at again before it is believed.
    suspects: Mutex<Vec<walk::Suspect>>,
    /// Names of the redo logs of files that were reported to be half way.
    half_way: Mutex<HashSet<String>>,
    /// All of the volume is checked.
    whole: AtomicBool,
    /// Files that are whole and whose disk size does not tell their plain size.
    unsettled: Mutex<Vec<String>>,
    /// Files that no name leads to, and that open.
    unreachable: Mutex<Vec<String>>,
}

/// How a check is made.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Files that are looked at at the same time: as many calls of a provider are under way.
    pub parallel: usize,
    /// Nobody else changes the cipher directory: what is found is believed at once. Its exclusive lock is held.
    pub alone: bool,
    /// Files that no name leads to are remembered, so that they can be salvaged.
    pub salvage: bool,
}

#[derive(Debug, Default)]
struct Counts {
    directories: AtomicU64,
    files: AtomicU64,
    symlinks: AtomicU64,
    others: AtomicU64,
    pages: AtomicU64,
    unsettled: AtomicU64,
    findings: AtomicU64,
}

/// How far a check is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Directories, the root among them.
    pub directories: u64,
    /// Regular files, each once whatever its links.
    pub files: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// FIFOs, sockets and devices.
    pub others: u64,
    /// Pages that were opened: 4096 bytes each.
    pub pages: u64,
    /// Files whose last page tells their size: a state like any other.
    pub unsettled: u64,
    /// Findings so far, some of which may turn out to be a writer's work under way.
    pub findings: u64,
}

impl<'v> Checker<'v> {
    /// A check of `directory`, whose config says `config`, with keys if `volume` is unlocked.
    ///
    /// # Errors
    /// [`ConfigError`] if the config has no valid volume id; never if the volume could be unlocked.
    pub fn new(
        directory: &'v CipherDirectory,
        config: &VolumeConfig,
        volume: Option<&'v Volume>,
        settings: Settings,
    ) -> Result<Self, CheckError> {
        Ok(Self {
            root: Node::of_directory(directory.root_fd())?,
            directory,
            volume_id: config.id()?,
            rules: Rules { holes: config.holes, end: config.end },
            volume,
            settings,
            seen: Mutex::default(),
            ids: Mutex::default(),
            patience: Patience::default(),
            counts: Counts::default(),
            found: Mutex::default(),
            suspects: Mutex::default(),
            half_way: Mutex::default(),
            whole: AtomicBool::new(false),
            unsettled: Mutex::default(),
            unreachable: Mutex::default(),
        })
    }

    /// The first failure of a provider, if there was one.
    #[must_use]
    pub fn key_failure(&self) -> Option<KeyError> {
        self.patience.failure()
    }

    /// How far it is; from any thread.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Progress {
            directories: read(&self.counts.directories),
            files: read(&self.counts.files),
            symlinks: read(&self.counts.symlinks),
            others: read(&self.counts.others),
            pages: read(&self.counts.pages),
            unsettled: read(&self.counts.unsettled),
            findings: read(&self.counts.findings),
        }
    }
}

/// Why a check cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The config has no volume id.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The cipher directory cannot be held.
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
