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
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::ROOT;
use crate::fs::state::descriptors::enter_background;
use crate::fs::state::inode::Inode;
use crate::runtime::{Next, Periodic};
use crate::storage::NodeKind;

pub(super) fn start(fs: &Arc<Filesystem>) -> io::Result<()> {
    fs.descriptors.reserve(&fs.inodes.root().node);
    let weak = Arc::downgrade(fs);
    let periodic = Periodic::start("kmsfs-reclaim", Next::WhenWoken(Duration::ZERO), move || {
        enter_background();
        weak.upgrade().map_or(Next::Never, |fs| run(&fs))
    })?;
    let _ = fs.descriptors.thread.set(periodic);
    Ok(())
}

/// One round.
fn run(fs: &Filesystem) -> Next {
    let budget = &fs.descriptors;
    let before = budget.begin_round();
    let is_enough = fs.reclaim(budget.high() / 2);
    if fs.descriptors_in_use() < budget.critical() {
        budget.reserve(&fs.inodes.root().node);
    }
    budget.end_round(before, is_enough)
}

impl Filesystem {
    /// Asks for so many inodes to be forgotten that `keep` descriptors are left in use. False if too many stay in use.
    fn reclaim(&self, keep: usize) -> bool {
        if self.work.unsettled.len() > keep / 4 {
            // The first round settles, the second one closes what is settled. What fails is logged, and kept for those who sync.
            self.descriptors.while_settling(|| {
                let _ = self.settle_rested(true);
                let _ = self.settle_rested(true);
            });
        }
        let inodes = self.inodes.all();
        let descriptors = inodes.len() + self.descriptors.held();
        let excess = descriptors.saturating_sub(keep);
        let listed = self.handles.directories.inodes();
        let is_unused = |inode: &Arc<Inode>| is_at_rest(inode) && !listed.contains(&inode.id);
        let mut victims: Vec<_> = inodes.into_iter().filter(is_unused).collect();
        // A directory can go when nothing in it is known any more.
        victims.sort_by_cached_key(|inode| (is_directory(inode), inode.last_lookup.load(Ordering::Relaxed)));
        victims.truncate(excess);
        let is_enough = descriptors - victims.len() <= self.descriptors.critical();
        let ids: Vec<_> = victims.iter().map(|inode| inode.id).collect();
        if self.kernel().drop_unused(&ids) {
            tracing::debug!("asked the kernel to drop {} of {excess} inodes", ids.len());
            return is_enough;
        }
        self.descriptors.ask_by_entry();
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
}

fn is_directory(inode: &Arc<Inode>) -> bool {
    inode.kind == NodeKind::Directory
}

fn is_at_rest(inode: &Arc<Inode>) -> bool {
    inode.id != ROOT && !inode.watched.load(Ordering::Relaxed) && inode.slot().handles == 0
}
