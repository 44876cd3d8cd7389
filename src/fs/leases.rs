//! How long the keys of open files may be used: a file is open on a lease from the key's provider.
//!
//! Before a lease ends the provider is asked again, in the background. If it agrees, nobody notices. If it refuses, or the
//! lease ends without an answer, the file's content is given up, its keys with it, and the kernel drops the pages it has
//! of the file; the next operation on it asks the provider and gets its answer. So a revoked key stops open files within
//! the key's greatest age, and one that is granted again works again without a remount.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use crate::keys::{Behalf, Moment, Reason};
use crate::runtime::{Next, Periodic};

use super::backing::Found;
use super::inode::{Inode, OpenFile};
use super::trim::is_in_background;
use super::{Error, Filesystem, InodeId};

/// How often leases are looked at, at most.
const LONGEST_ROUND: Duration = Duration::from_secs(1);
/// How long the kernel may take to write back what programs have written, before keys go.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Until when a file's keys may be used.
pub(super) struct Lease(Mutex<Term>);

#[derive(Clone, Copy)]
struct Term {
    /// When the provider last agreed.
    since: Moment,
    /// The provider is being asked.
    renewing: bool,
    /// The provider could not be reached when it was last asked.
    unreachable: bool,
}

impl Lease {
    pub(super) fn new(since: Moment) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Term { since, renewing: false, unreachable: false })))
    }

    /// The provider has agreed at `since`.
    pub(super) fn extend(&self, since: Moment) {
        *self.term() = Term { since, renewing: false, unreachable: false };
    }

    fn term(&self) -> MutexGuard<'_, Term> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks after the leases; stopped at shutdown.
#[derive(Default)]
pub(super) struct Keeper {
    /// Inodes whose content is in use, or was at the last look.
    watched: Mutex<HashMap<InodeId, Weak<Inode>>>,
    thread: OnceLock<Periodic>,
}

impl Keeper {
    pub(super) fn start(fs: &Arc<Filesystem>) -> std::io::Result<()> {
        let weak = Arc::downgrade(fs);
        let round = LONGEST_ROUND.min(fs.volume.ring.limits().max_age / 10).max(Duration::from_millis(10));
        let periodic = Periodic::start("kmsfs-leases", Next::After(round), move || {
            is_in_background();
            let Some(fs) = weak.upgrade() else { return Next::Never };
            fs.look_after_leases(Moment::now());
            Next::After(round)
        })?;
        let _ = fs.keeper.thread.set(periodic);
        Ok(())
    }

    /// Puts an inode whose content has just been opened on the list.
    pub(super) fn watch(&self, inode: &Arc<Inode>) {
        self.watched().insert(inode.id, Arc::downgrade(inode));
    }

    /// The inodes whose content is in use.
    pub(super) fn in_use(&self) -> Vec<(Arc<Inode>, OpenFile)> {
        let mut found = Vec::new();
        self.watched().retain(|_, inode| {
            let in_use = inode.upgrade().and_then(|inode| {
                let open = inode.slot().open.clone()?;
                Some((inode, open))
            });
            let keep = in_use.is_some();
            found.extend(in_use);
            keep
        });
        found
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<InodeId, Weak<Inode>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stop(&self) {
        self.thread.get().inspect(|thread| thread.stop());
    }
}

impl Filesystem {
    /// Wipes keys that are too old, and says in the log, once, if the kernel does not protect keys.
    pub fn sweep_keys(&self) {
        self.volume.ring.sweep();
    }

    fn look_after_leases(self: &Arc<Self>, now: Moment) {
        self.lock_if_idle(now);
        self.sweep_keys();
        let limits = self.volume.ring.limits();
        for (inode, open) in self.keeper.in_use() {
            let term = *open.lease.term();
            let age = now.saturating_duration_since(term.since);
            let grace = if term.unreachable { limits.stale_grace } else { Duration::ZERO };
            if age >= limits.max_age + grace && !open.content.needs_keys() {
                self.give_up(&inode);
            } else if age >= limits.max_age * 3 / 4 && !term.renewing && !open.content.needs_keys() {
                open.lease.term().renewing = true;
                let fs = Arc::clone(self);
                self.renewals.run(move |_| fs.renew(&inode, &open));
            }
        }
    }

    /// Asks the provider for a key that is in use.
    fn renew(&self, inode: &Inode, open: &OpenFile) {
        let _ahead = Behalf::ahead(Reason::Renewal).enter();
        let renewed = match self.find_header(inode, &open.file) {
            Ok(Found::Header(header)) => self.volume.ring.renew(&header).map_err(Error::from),
            // Not on disk yet: the key was given for this file, and its lease simply ends.
            Ok(Found::None) => return,
            Err(error) => Err(error),
        };
        match renewed {
            Ok(since) => open.lease.extend(since),
            Err(Error::Key(error)) if error.is_passing() => {
                let mut term = open.lease.term();
                (term.renewing, term.unreachable) = (false, true);
            }
            Err(error) => {
                self.report(inode, &error);
                self.give_up(inode);
            }
        }
    }

    /// Drops the keys of a file and what the kernel has of its content. Operations under way are waited for.
    fn give_up(&self, inode: &Inode) {
        inode.slot().close();
        self.kernel().invalidate(inode.id);
    }

    /// Drops every data key and every page of content that the kernel has. Until [`Self::unlock`], files cannot be opened, read
    /// or written; names and attributes stay. What programs have written is sealed first, as far as [`HAND_OVER`] is enough.
    /// Must not be called from an operation.
    pub fn lock(self: &Arc<Self>) {
        if !self.write_back() {
            tracing::error!("locked before all that was written could be sealed: what is left of it is lost");
        }
        self.lock_now();
    }

    /// Makes the kernel write back what programs have written to files that are open, while there are keys to seal it with. False
    /// if that takes too long.
    fn write_back(self: &Arc<Self>) -> bool {
        if self.read_only || self.volume.ring.is_locked() {
            return true;
        }
        let (done, wait) = std::sync::mpsc::channel();
        let fs = Arc::clone(self);
        self.renewals.run(move |_| {
            let open = fs.inodes.all().into_iter().filter(|inode| inode.slot().handles > 0);
            open.for_each(|inode| fs.kernel().invalidate(inode.id));
            // Who does not wait any more has gone on.
            let _ = done.send(());
        });
        wait.recv_timeout(HAND_OVER).is_ok()
    }

    fn lock_now(&self) {
        self.volume.ring.lock();
        for inode in self.inodes.all() {
            self.give_up(&inode);
        }
        tracing::info!("locked");
    }

    /// Lets keys be had again.
    pub fn unlock(&self) {
        self.note_use();
        self.volume.ring.unlock();
        tracing::info!("unlocked");
    }

    /// Notes that somebody uses a file's content.
    pub(super) fn note_use(&self) {
        let seconds = self.start.elapsed().as_secs();
        if self.last_use.load(Ordering::Relaxed) != seconds {
            self.last_use.store(seconds, Ordering::Relaxed);
        }
    }

    fn lock_if_idle(self: &Arc<Self>, now: Moment) {
        let Some(idle_lock) = self.options.idle_lock else { return };
        let last_use = self.start + Duration::from_secs(self.last_use.load(Ordering::Relaxed));
        if now.saturating_duration_since(last_use) >= idle_lock && !self.volume.ring.is_locked() {
            if self.write_back() {
                return self.lock_now();
            }
            tracing::warn!("not locked yet: what programs have written is still being sealed");
            self.note_use();
        }
    }
}
