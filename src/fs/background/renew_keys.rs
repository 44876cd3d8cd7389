//! How long the keys of open files may be used: a file is open on a lease from the key's provider.
//!
//! Before a lease ends the provider is asked again, in the background. If it agrees, nobody notices. If it refuses, or the
//! lease ends without an answer, the file's content is given up, its keys with it, and the kernel drops the pages it has
//! of the file; the next operation on it asks the provider and gets its answer. So a revoked key stops open files within
//! the key's greatest age, and one that is granted again works again without a remount.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::ops::backing_file::Found;
use crate::fs::state::descriptors::enter_background;
use crate::fs::state::inode::{Inode, OpenFile};
use crate::keys::{Behalf, Moment, Reason};
use crate::runtime::{Next, Periodic};

/// How often leases are looked at, at most.
const LONGEST_ROUND: Duration = Duration::from_secs(1);

pub(super) fn start(fs: &Arc<Filesystem>) -> io::Result<()> {
    let weak = Arc::downgrade(fs);
    let round = LONGEST_ROUND.min(fs.volume.ring.limits().max_age / 10).max(Duration::from_millis(10));
    let periodic = Periodic::start("kmsfs-leases", Next::After(round), move || {
        enter_background();
        let Some(fs) = weak.upgrade() else { return Next::Never };
        fs.look_after_leases(Moment::now());
        Next::After(round)
    })?;
    let _ = fs.work.renewals.thread.set(periodic);
    Ok(())
}

impl Filesystem {
    fn look_after_leases(self: &Arc<Self>, now: Moment) {
        self.lock_if_idle(now);
        self.sweep_keys();
        let limits = self.volume.ring.limits();
        for (inode, open) in self.work.renewals.in_use() {
            let term = *open.lease.term();
            let age = now.saturating_duration_since(term.since);
            let grace = if term.unreachable { limits.stale_grace } else { Duration::ZERO };
            if age >= limits.max_age + grace && !open.content.needs_keys() {
                self.drop_keys(&inode);
            } else if age >= limits.max_age * 3 / 4 && !term.renewing && !open.content.needs_keys() {
                open.lease.term().renewing = true;
                let fs = Arc::clone(self);
                self.pools.renewals.run(move |_| fs.renew(&inode, &open));
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
                self.drop_keys(inode);
            }
        }
    }

    fn lock_if_idle(self: &Arc<Self>, now: Moment) {
        let Some(idle_lock) = self.options.idle_lock else { return };
        let last_use = self.work.last_use.at();
        if now.saturating_duration_since(last_use) >= idle_lock && !self.volume.ring.is_locked() {
            if self.write_back() {
                return self.lock_now();
            }
            tracing::warn!("not locked yet: what programs have written is still being sealed");
            self.work.last_use.note();
        }
    }
}
