//! Keeps the descriptors that pin inodes within the process's limit: when there are many, the kernel is asked to forget the
//! files that were looked up longest ago. A tree may thus have any number of files.
//!
//! Linux 6.18 and later drop an inode that nobody uses when they are told its number. An earlier kernel is told the entry to
//! forget, and does so only while nobody looks one up in the same directory: a lookup must not wait for what it keeps from
//! happening, so what is forgotten first are files that were looked up longest ago, which are elsewhere if anything is.
//!
//! Invariants: the kernel is never asked from a thread that serves it; files with an open handle stay; directories are never
//! forgotten by their entry, since the kernel would show a process's working directory as removed. Of the threads that serve
//! the kernel one does not wait for descriptors, but while files are settled: what the kernel forgets is told to one of them.

use std::cell::Cell;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Resource;

use crate::runtime::{Next, Periodic};
use crate::storage::{Node, NodeKind};

use super::error::lacks_descriptors;
use super::inode::Inode;
use super::{Filesystem, InodeId, ROOT};

/// Limits above this are not used up: each inode costs the kernel memory too.
const MOST: u64 = 1 << 20;

/// How long an operation waits for descriptors if all seem to be in use, how long if some are being given up, and how long
/// when waiting was in vain a moment ago.
const SHORTLY: Duration = Duration::from_secs(1);
const ENOUGH: Duration = Duration::from_secs(5);
const HARDLY: Duration = Duration::from_millis(50);
/// How often it looks whether there are some.
const LOOK: Duration = Duration::from_millis(5);
/// How long an operation waits for the trimmer to begin, when few descriptors are left, and the trimmer for its next round when
/// it has not found enough.
const START: Duration = Duration::from_millis(100);
/// For so long nobody is made to wait after it was in vain: what is left is in use.
const REST: Duration = Duration::from_secs(3);
/// From the end of one round to the next: what the kernel drops must be told to a thread that serves it.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(5);
/// Descriptors that are held back for the thread that must not wait, at most, and those of them that only those threads get
/// that let go of others.
const SPARE: usize = 32;
const RESERVED: usize = 2;
/// Descriptors that a mount opens for itself after its start.
const OWN: usize = 8;

/// Entries listed with attributes at a time while there are too many inodes: each makes one known, and a kernel that cannot
/// drop inodes forgets others of the directory only between two requests.
const ENTRIES_WHEN_TIGHT: usize = 16;

pub(super) struct Trimmer {
    /// With more descriptors in use than this some are given up.
    high: usize,
    /// With more than this nobody goes on before the trimmer has done something about it.
    brink: usize,
    limit: u64,
    /// Descriptors held back.
    spares: usize,
    /// Inodes that were forgotten and files that were closed, ever: their descriptors can be given up.
    given_up: AtomicUsize,
    /// Threads that serve the kernel.
    servers: AtomicUsize,
    /// Descriptors of contents and of directories that are read, beside those that pin inodes.
    held: Arc<AtomicUsize>,
    state: Mutex<State>,
    changed: Condvar,
    spare: Mutex<Vec<Node>>,
    thread: OnceLock<Periodic>,
}

#[derive(Default)]
struct State {
    /// Counts the rounds that have begun.
    begun: u64,
    at_work: bool,
    /// It settles files, for which it needs nobody.
    settling: bool,
    stopped: bool,
    /// The kernel is asked entry by entry.
    by_entry: bool,
    /// Threads that serve the kernel and wait.
    waiting: usize,
    /// Waiting was in vain then.
    in_vain: Option<Progress>,
}

impl State {
    /// Whether it is of use to wait on, for somebody who has waited since `start` and last saw `progress`. It is not for a while
    /// after it was in vain, unless something was given up since.
    fn may_hope(&mut self, start: Instant, progress: Progress) -> bool {
        if start.elapsed() > ENOUGH || progress.at.elapsed() > SHORTLY {
            self.in_vain = Some(Progress { at: Instant::now(), ..progress });
        }
        self.in_vain.is_none_or(|vain| vain.at.elapsed() > REST || vain.given_up != progress.given_up)
    }
}

/// When descriptors were last given up, as far as somebody has seen who waits.
#[derive(Clone, Copy)]
struct Progress {
    given_up: usize,
    at: Instant,
}

impl Progress {
    fn of(trimmer: &Trimmer) -> Self {
        Self { given_up: trimmer.given_up.load(Ordering::Relaxed), at: Instant::now() }
    }

    fn last(&mut self, trimmer: &Trimmer) -> Self {
        let now = Self::of(trimmer);
        if now.given_up != self.given_up {
            *self = now;
        }
        *self
    }
}

/// A descriptor in use beside the one that pins the inode.
pub(super) struct Held(Arc<AtomicUsize>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

thread_local! {
    /// This thread does not serve the kernel, so it may wait.
    static IN_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// Says that this thread does not serve the kernel.
pub(super) fn is_in_background() {
    IN_BACKGROUND.set(true);
}

impl Trimmer {
    pub(super) fn new() -> Self {
        let limit = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(MOST).min(MOST);
        let all = usize::try_from(limit).unwrap_or(usize::MAX);
        let spares = SPARE.min(all / 16).max(2 * RESERVED);
        // What is open already stays open: nothing of it can be given up.
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let usable = all.saturating_sub(open + spares + OWN);
        let [high, brink] = [5, 6].map(|eighths| usable / 8 * eighths);
        Self {
            high,
            brink,
            limit,
            spares,
            given_up: AtomicUsize::new(0),
            servers: AtomicUsize::new(1),
            held: Arc::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
            spare: Mutex::default(),
            thread: OnceLock::new(),
        }
    }

    /// Counts a descriptor, until what this returns is dropped.
    pub(super) fn hold(&self) -> Arc<Held> {
        self.held.fetch_add(1, Ordering::Relaxed);
        Arc::new(Held(Arc::clone(&self.held)))
    }

    /// Descriptors that this process may have.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Wakes the trimmer if too many descriptors are in use, and waits for it if there are few left. On a busy machine it may be
    /// a while until it has run, and until its effect has been noticed.
    pub(super) fn note(&self, descriptors: impl Fn() -> usize) {
        if descriptors() <= self.high {
            return;
        }
        let mut state = self.wake();
        if state.by_entry {
            // The kernel may need an answer from this thread before it can forget an entry.
            let before = state.begun;
            if descriptors() > self.brink {
                self.wait(state, START, |state| state.begun == before && !state.at_work);
            }
            return;
        }
        let start = Instant::now();
        let mut progress = Progress::of(self);
        while descriptors() > self.brink && state.may_hope(start, progress.last(self)) {
            if !self.wait(state, LOOK, |_| descriptors() > self.brink) {
                return;
            }
            state = self.wake();
        }
    }

    /// Waits as long as `condition` holds, but not longer than `longest`. False if this thread must go on at once.
    fn wait(&self, state: MutexGuard<'_, State>, longest: Duration, condition: impl Fn(&State) -> bool) -> bool {
        let mut state = state;
        let serves = !IN_BACKGROUND.get();
        let is_last = serves && state.waiting + 1 >= self.servers.load(Ordering::Relaxed);
        if state.stopped || is_last && !state.settling {
            return false;
        }
        state.waiting += usize::from(serves);
        let waited = self.changed.wait_timeout_while(state, longest, |state| !state.stopped && condition(state));
        waited.unwrap_or_else(PoisonError::into_inner).0.waiting -= usize::from(serves);
        true
    }

    fn wake(&self) -> MutexGuard<'_, State> {
        let state = self.state();
        self.thread.get().inspect(|thread| thread.wake());
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
        let start = Instant::now();
        let mut progress = None;
        loop {
            let error = match find() {
                Err(error) if lacks_descriptors(&error) => error,
                result => return result,
            };
            let progress = progress.get_or_insert_with(|| Progress::of(self)).last(self);
            let mut state = self.wake();
            let hopes = state.may_hope(start, progress) || start.elapsed() < HARDLY;
            if !(hopes && self.wait(state, LOOK, |_| true) || self.use_spare(RESERVED)) {
                return Err(error);
            }
        }
    }

    /// Runs `work`, which lets go of descriptors and needs one for that.
    pub(super) fn with_reserve<T>(&self, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
        loop {
            match work() {
                Err(error) if lacks_descriptors(&error) && self.use_spare(0) => {}
                result => return result,
            }
        }
    }

    /// Gives up a descriptor that was held back, if more than `keep` are left.
    fn use_spare(&self, keep: usize) -> bool {
        let mut spare = self.spare();
        spare.len() > keep && spare.pop().is_some()
    }

    /// Notes that the kernel has forgotten an inode or closed a file.
    pub(super) fn note_given_up(&self) {
        self.given_up.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells how many threads serve the kernel.
    pub(super) fn set_servers(&self, servers: usize) {
        self.servers.store(servers, Ordering::Relaxed);
    }

    /// Holds descriptors back, as far as there are any.
    fn put_aside(&self, root: &Node) {
        let mut spare = self.spare();
        while spare.len() < self.spares {
            match Node::of_directory(root.as_fd()) {
                Ok(node) => spare.push(node),
                Err(_) => return,
            }
        }
    }

    fn spare(&self) -> MutexGuard<'_, Vec<Node>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn start(fs: &Arc<Filesystem>) -> std::io::Result<()> {
        fs.trimmer.put_aside(&fs.inodes.get(ROOT).map_err(io::Error::other)?.node);
        let weak = Arc::downgrade(fs);
        let periodic = Periodic::start("kmsfs-trim", Next::WhenWoken(Duration::ZERO), move || {
            is_in_background();
            weak.upgrade().map_or(Next::Never, |fs| fs.trimmer.run(&fs))
        })?;
        let _ = fs.trimmer.thread.set(periodic);
        Ok(())
    }

    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
        self.thread.get().inspect(|thread| thread.stop());
    }

    /// One round.
    fn run(&self, fs: &Filesystem) -> Next {
        let mut state = self.state();
        state.at_work = true;
        state.begun += 1;
        drop(state);
        let before = Progress::of(self);
        self.changed.notify_all();
        let is_enough = fs.trim(self.high / 2);
        if fs.descriptors() < self.brink
            && let Ok(root) = fs.inodes.get(ROOT)
        {
            self.put_aside(&root.node);
        }
        let mut state = self.state();
        state.at_work = false;
        if is_enough {
            state.in_vain = None;
        } else if !state.by_entry {
            state.in_vain = Some(Progress { at: Instant::now(), ..before });
        }
        Next::WhenWoken(if is_enough { BETWEEN_ROUNDS } else { START })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Filesystem {
    /// How many descriptors are in use, about: one for each inode, another for each content that has one of its own, and one
    /// for each directory that is being read.
    pub(super) fn descriptors(&self) -> usize {
        self.inodes.len() + self.trimmer.held.load(Ordering::Relaxed)
    }

    /// Asks for so many inodes to be forgotten that `keep` descriptors are left in use. False if too many stay in use.
    fn trim(&self, keep: usize) -> bool {
        let unsettled = self.settler.len();
        if unsettled > keep / 4 {
            self.trimmer.state().settling = true;
            // The first round settles, the second one closes what is settled. What fails is logged, and kept for those who sync.
            let _ = self.settle_rested(true);
            let _ = self.settle_rested(true);
            self.trimmer.state().settling = false;
        }
        let inodes = self.inodes.all();
        let descriptors = inodes.len() + self.trimmer.held.load(Ordering::Relaxed);
        let excess = descriptors.saturating_sub(keep);
        let listed = self.directories.inodes();
        let is_unused = |inode: &Arc<Inode>| is_at_rest(inode) && !listed.contains(&inode.id);
        let mut victims: Vec<_> = inodes.into_iter().filter(is_unused).collect();
        // A directory can go when nothing in it is known any more.
        victims.sort_by_cached_key(|inode| (is_directory(inode), inode.last_lookup.load(Ordering::Relaxed)));
        victims.truncate(excess);
        let is_enough = descriptors - victims.len() <= self.trimmer.brink;
        let ids: Vec<_> = victims.iter().map(|inode| inode.id).collect();
        if self.kernel().drop_unused(&ids) {
            tracing::debug!("asked the kernel to drop {} of {excess} inodes", ids.len());
            return is_enough;
        }
        self.trimmer.state().by_entry = true;
        let mut asked = 0_usize;
        for inode in victims.into_iter().filter(|inode| !is_directory(inode)) {
            if let Some((directory, name)) = self.entry_of(&inode) {
                drop(inode);
                self.kernel().forget_entry(directory, &name);
                asked += 1;
            }
        }
        tracing::debug!("asked the kernel to forget {asked} of {excess} files");
        is_enough
    }

    /// An entry that names the inode, if its directory is known.
    pub(super) fn entry_of(&self, inode: &Inode) -> Option<(InodeId, Vec<u8>)> {
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
