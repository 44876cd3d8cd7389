//! How many descriptors this process may have in use, and who waits when there are few left.
//!
//! Invariant: of the threads that serve the kernel one does not wait for descriptors, but while files are settled: it is told
//! there of inodes that the kernel forgets.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Resource;

use crate::fs::error::lacks_descriptors;
use crate::runtime::{Next, Periodic};
use crate::storage::Node;

use super::descriptors::{Held, is_in_background};

/// Limits above this are not used up: each inode costs the kernel memory too.
const MOST: u64 = 1 << 20;

/// How long an operation waits for descriptors if all seem to be in use, how long if some are being given up, and how long
/// when waiting was in vain a moment ago.
const SHORTLY: Duration = Duration::from_secs(1);
const ENOUGH: Duration = Duration::from_secs(5);
const HARDLY: Duration = Duration::from_millis(50);
/// How often it looks whether there are some.
const LOOK: Duration = Duration::from_millis(5);
/// How long an operation waits for a round to begin, when few descriptors are left, and how long the next round waits when the
/// last one has not found enough.
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

pub(crate) struct DescriptorBudget {
    /// With more descriptors in use than this some are given up.
    high: usize,
    /// With more than this nobody goes on before something was done about it.
    critical: usize,
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
    /// Gives descriptors up.
    pub(crate) thread: OnceLock<Periodic>,
}

#[derive(Default)]
struct State {
    /// Counts the rounds that have begun.
    begun: u64,
    at_work: bool,
    /// Files are settled, for which nobody is needed.
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
    fn should_wait(&mut self, start: Instant, progress: Progress) -> bool {
        if start.elapsed() > ENOUGH || progress.at.elapsed() > SHORTLY {
            self.in_vain = Some(Progress { at: Instant::now(), ..progress });
        }
        self.in_vain.is_none_or(|vain| vain.at.elapsed() > REST || vain.given_up != progress.given_up)
    }
}

/// When descriptors were last given up, as far as somebody has seen who waits.
#[derive(Clone, Copy)]
pub(crate) struct Progress {
    given_up: usize,
    at: Instant,
}

impl Progress {
    fn of(budget: &DescriptorBudget) -> Self {
        Self { given_up: budget.given_up.load(Ordering::Relaxed), at: Instant::now() }
    }

    fn last(&mut self, budget: &DescriptorBudget) -> Self {
        let now = Self::of(budget);
        if now.given_up != self.given_up {
            *self = now;
        }
        *self
    }
}

impl DescriptorBudget {
    pub(crate) fn new() -> Self {
        let limit = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(MOST).min(MOST);
        let all = usize::try_from(limit).unwrap_or(usize::MAX);
        let spares = SPARE.min(all / 16).max(2 * RESERVED);
        // What is open already stays open: nothing of it can be given up.
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        let usable = all.saturating_sub(open + spares + OWN);
        let [high, critical] = [5, 6].map(|eighths| usable / 8 * eighths);
        Self {
            high,
            critical,
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
    pub(crate) fn hold(&self) -> Arc<Held> {
        Arc::new(Held::count(&self.held))
    }

    /// Descriptors in use beside those that pin inodes.
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// With more in use than this some are given up.
    pub(crate) fn high(&self) -> usize {
        self.high
    }

    /// With more in use than this operations wait.
    pub(crate) fn critical(&self) -> usize {
        self.critical
    }

    /// Descriptors that this process may have.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Has some given up if too many `descriptors` are in use, and waits for that if there are few left. On a busy machine it may
    /// be a while until that has begun, and until its effect has been noticed.
    pub(crate) fn request(&self, descriptors: impl Fn() -> usize) {
        if descriptors() <= self.high {
            return;
        }
        let mut state = self.wake();
        if state.by_entry {
            // The kernel may need an answer from this thread before it can forget an entry.
            let before = state.begun;
            if descriptors() > self.critical {
                self.wait(state, START, |state| state.begun == before && !state.at_work);
            }
            return;
        }
        let start = Instant::now();
        let mut progress = Progress::of(self);
        while descriptors() > self.critical && state.should_wait(start, progress.last(self)) {
            if !self.wait(state, LOOK, |_| descriptors() > self.critical) {
                return;
            }
            state = self.wake();
        }
    }

    /// Waits as long as `condition` holds, but not longer than `longest`. False if this thread must go on at once.
    fn wait(&self, state: MutexGuard<'_, State>, longest: Duration, condition: impl Fn(&State) -> bool) -> bool {
        let mut state = state;
        let serves = !is_in_background();
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
    pub(crate) fn readdir_budget(&self, descriptors: usize) -> usize {
        match descriptors {
            many if many > self.critical => 1,
            many if many > self.high => ENTRIES_WHEN_TIGHT,
            _ => usize::MAX,
        }
    }

    /// Runs `find`; if there is no descriptor left for it, waits a little for some to become free and runs it again.
    pub(crate) fn retry_on_emfile<T>(&self, find: impl Fn() -> io::Result<T>) -> io::Result<T> {
        let start = Instant::now();
        let mut progress = None;
        loop {
            let error = match find() {
                Err(error) if lacks_descriptors(&error) => error,
                result => return result,
            };
            let progress = progress.get_or_insert_with(|| Progress::of(self)).last(self);
            let mut state = self.wake();
            let waits = state.should_wait(start, progress) || start.elapsed() < HARDLY;
            if !(waits && self.wait(state, LOOK, |_| true) || self.use_spare(RESERVED)) {
                return Err(error);
            }
        }
    }

    /// Runs `work`, which lets go of descriptors and needs one for that.
    pub(crate) fn with_reserve<T>(&self, work: impl Fn() -> io::Result<T>) -> io::Result<T> {
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
    pub(crate) fn note_given_up(&self) {
        self.given_up.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells how many threads serve the kernel.
    pub(crate) fn set_servers(&self, servers: usize) {
        self.servers.store(servers, Ordering::Relaxed);
    }

    /// Holds descriptors back, as far as there are any.
    pub(crate) fn reserve(&self, root: &Node) {
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

    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.changed.notify_all();
        self.thread.get().inspect(|thread| thread.stop());
    }

    /// A round begins, which gives descriptors up.
    pub(crate) fn begin_round(&self) -> Progress {
        let mut state = self.state();
        state.at_work = true;
        state.begun += 1;
        drop(state);
        let before = Progress::of(self);
        self.changed.notify_all();
        before
    }

    /// It has ended; the next one may begin then.
    pub(crate) fn end_round(&self, before: Progress, is_enough: bool) -> Next {
        let mut state = self.state();
        state.at_work = false;
        if is_enough {
            state.in_vain = None;
        } else if !state.by_entry {
            state.in_vain = Some(Progress { at: Instant::now(), ..before });
        }
        Next::WhenWoken(if is_enough { BETWEEN_ROUNDS } else { START })
    }

    /// Runs `settle`, for which nobody is needed who waits.
    pub(crate) fn while_settling(&self, settle: impl FnOnce()) {
        self.state().settling = true;
        settle();
        self.state().settling = false;
    }

    /// The kernel is asked entry by entry.
    pub(crate) fn ask_by_entry(&self) {
        self.state().by_entry = true;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
