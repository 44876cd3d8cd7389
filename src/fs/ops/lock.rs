//! Dropping keys: of one file, or of all until somebody unlocks them.

use std::sync::Arc;
use std::time::Duration;

use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::Inode;

/// How long the kernel may take to write back what programs have written, before keys go.
const HAND_OVER: Duration = Duration::from_secs(10);

impl Filesystem {
    /// Wipes keys that are too old, and says in the log, once, if the kernel does not protect keys.
    pub fn sweep_keys(&self) {
        self.volume.ring.sweep();
    }

    /// Drops the keys of a file and what the kernel has of its content. Operations under way are waited for.
    pub(in crate::fs) fn drop_keys(&self, inode: &Inode) {
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
    pub(in crate::fs) fn write_back(self: &Arc<Self>) -> bool {
        if self.options.read_only || self.volume.ring.is_locked() {
            return true;
        }
        let (done, wait) = std::sync::mpsc::channel();
        let fs = Arc::clone(self);
        self.pools.renewals.run(move |_| {
            let open = fs.inodes.all().into_iter().filter(|inode| inode.slot().handles > 0);
            open.for_each(|inode| fs.kernel().invalidate(inode.id));
            // Who does not wait any more has gone on.
            let _ = done.send(());
        });
        wait.recv_timeout(HAND_OVER).is_ok()
    }

    pub(in crate::fs) fn lock_now(&self) {
        self.volume.ring.lock();
        for inode in self.inodes.all() {
            self.drop_keys(&inode);
        }
        tracing::info!("locked");
    }

    /// Lets keys be had again.
    pub fn unlock(&self) {
        self.work.last_use.note();
        self.volume.ring.unlock();
        tracing::info!("unlocked");
    }
}
