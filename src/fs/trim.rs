//! Keeps the descriptors that pin inodes within the process's limit: when there are many, the kernel is asked to forget the
//! files that were looked up longest ago. A tree may thus have any number of files.
//!
//! Linux 6.18 and later drop an inode that nobody uses when they are told its number. An earlier kernel is told the entry to
//! forget, and does so only while nobody looks one up in the same directory: a lookup must not wait for what it keeps from
//! happening, so what is forgotten first are files that were looked up longest ago, which are elsewhere if anything is.
//!
//! Invariants: the kernel is never asked from a thread that serves it; files with an open handle stay; directories are never
//! forgotten by their entry, since the kernel would show a process's working directory as removed.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::process::Resource;

use crate::storage::{Node, NodeKind};

use super::error::lacks_descriptors;
use super::inode::Inode;
use super::{Filesystem, InodeId, ROOT};

/// Limits above this are not used up: each inode costs the kernel memory too.
const MOST: u64 = 1 << 20;

/// How often, and how long, an operation waits for a descriptor.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);
/// How long an operation waits for the trimmer to begin, when few descriptors are left.
const START: Duration = Duration::from_millis(100);

/// Asks the kernel to forget an entry of a directory.
pub(super) type ForgetEntry = Box<dyn Fn(InodeId, &[u8]) + Send + Sync>;

/// Asks the kernel to drop inodes as far as nobody uses them; false if it does not know how.
pub(super) type DropUnused = Box<dyn Fn(&[InodeId]) -> bool + Send + Sync>;

/// Entries listed with attributes at a time while there are too many inodes: each makes one known, and a kernel that cannot
/// drop inodes forgets others of the directory only between two requests.
const ENTRIES_WHEN_TIGHT: usize = 16;

pub(super) struct Trimmer {
    /// With more descriptors in use than this some are given up.
    high: usize,
    /// With more than this nobody goes on before the trimmer has begun.
    brink: usize,
    limit: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    wanted: bool,
    /// Counts the rounds that have begun.
    begun: u64,
    at_work: bool,
    stopped: bool,
}

impl Trimmer {
    pub(super) fn new() -> Self {
        let limit = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(MOST).min(MOST);
        let [high, brink] = [6, 7].map(|eighths| usize::try_from(limit / 8 * eighths).unwrap_or(usize::MAX));
        Self { high, brink, limit, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Descriptors that this process may have.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Wakes the trimmer if too many descriptors are in use. On a busy machine it may be a while until it runs.
    pub(super) fn note(&self, descriptors: usize) {
        if descriptors > self.high {
            let state = self.wake();
            if descriptors > self.brink {
                let before = state.begun;
                let waits = |state: &mut State| state.begun == before && !state.at_work && !state.stopped;
                drop(self.changed.wait_timeout_while(state, START, waits));
            }
        }
    }

    fn wake(&self) -> MutexGuard<'_, State> {
        let mut state = self.state();
        if !state.wanted {
            state.wanted = true;
            self.changed.notify_all();
        }
        state
    }

    /// How many inodes may become known at once that nobody has asked for by name.
    pub(super) fn room(&self, descriptors: usize) -> usize {
        match descriptors {
            many if many > self.brink => 1,
            many if many > self.high => ENTRIES_WHEN_TIGHT,
            _ => usize::MAX,
        }
    }

    /// Runs `find`; if there is no descriptor left for it, waits a little for some to become free and runs it again.
    pub(super) fn with_patience<T>(&self, find: impl Fn() -> io::Result<T>) -> io::Result<T> {
        for _ in 0..ATTEMPTS {
            match find() {
                Err(error) if lacks_descriptors(&error) => {
                    drop(self.wake());
                    std::thread::sleep(PAUSE);
                }
                result => return result,
            }
        }
        find()
    }

    pub(super) fn start(fs: &Arc<Filesystem>) -> std::io::Result<()> {
        let (trimmer, weak) = (Arc::clone(&fs.trimmer), Arc::downgrade(fs));
        let run = move || trimmer.run(&weak);
        std::thread::Builder::new().name("kmsfs-trim".to_owned()).spawn(run).map(|_| ())
    }

    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
    }

    fn run(&self, weak: &Weak<Filesystem>) {
        loop {
            let state = self.state();
            let woken = self.changed.wait_while(state, |state| !state.wanted && !state.stopped);
            let mut state = woken.unwrap_or_else(PoisonError::into_inner);
            if state.stopped {
                return;
            }
            (state.wanted, state.at_work) = (false, true);
            state.begun += 1;
            drop(state);
            self.changed.notify_all();
            let Some(fs) = weak.upgrade() else { return };
            fs.trim(self.high / 2);
            self.state().at_work = false;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Filesystem {
    /// Tells how the kernel is asked to forget an entry of a directory.
    pub fn set_forget_entry(&self, forget: impl Fn(InodeId, &[u8]) + Send + Sync + 'static) {
        let _ = self.forget_entry.set(Box::new(forget));
    }

    /// Tells how the kernel is asked to drop inodes as far as nobody uses them. What is told answers false if the kernel does
    /// not know how.
    pub fn set_drop_unused(&self, drop_unused: impl Fn(&[InodeId]) -> bool + Send + Sync + 'static) {
        let _ = self.drop_unused.set(Box::new(drop_unused));
    }

    /// How many descriptors are in use, about: one for each inode, and another for the content of each file that is not
    /// settled.
    pub(super) fn descriptors(&self) -> usize {
        self.inodes.len() + self.settler.len()
    }

    /// Asks for so many files to be forgotten that `keep` inodes are left.
    fn trim(&self, keep: usize) {
        if self.settler.len() > keep / 4 {
            // The first round settles, the second one closes what is settled.
            self.settle_rested(true);
            self.settle_rested(true);
        }
        let inodes = self.inodes.all();
        let excess = inodes.len().saturating_sub(keep);
        let mut victims: Vec<_> = inodes.into_iter().filter(is_at_rest).collect();
        // A directory can go when nothing in it is known any more.
        victims.sort_by_cached_key(|inode| (is_directory(inode), inode.last_lookup.load(Ordering::Relaxed)));
        victims.truncate(excess);
        let ids: Vec<_> = victims.iter().map(|inode| inode.id).collect();
        if self.drop_unused.get().is_some_and(|drop_unused| drop_unused(&ids)) {
            tracing::debug!("asked the kernel to drop {} of {excess} inodes", ids.len());
            return;
        }
        let Some(forget) = self.forget_entry.get() else { return };
        let mut asked = 0_usize;
        for inode in victims.into_iter().filter(|inode| !is_directory(inode)) {
            if let Some((directory, name)) = self.entry_of(&inode) {
                drop(inode);
                forget(directory, &name);
                asked += 1;
            }
        }
        tracing::debug!("asked the kernel to forget {asked} of {excess} files");
    }

    /// An entry that names the inode, if its directory is known.
    fn entry_of(&self, inode: &Inode) -> Option<(InodeId, Vec<u8>)> {
        let path = inode.node.describe();
        let path = Path::new(&path);
        let parent = Node::stat_directory(path.parent()?).ok()?;
        let directory = self.inodes.known_as(&parent)?;
        let name = self.plain_name(&directory, std::str::from_utf8(path.file_name()?.as_bytes()).ok()?).ok()??;
        Some((directory.id, name))
    }
}

fn is_directory(inode: &Arc<Inode>) -> bool {
    inode.kind == NodeKind::Directory
}

fn is_at_rest(inode: &Arc<Inode>) -> bool {
    inode.id != ROOT && !inode.watched.load(Ordering::Relaxed) && inode.slot().handles == 0
}
