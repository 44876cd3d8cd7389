//! Losses of bytes that programs take for written.
//!
//! The kernel counts lost bytes in the file's size and has them in its pages. It drops the pages when it is told, and the size
//! with the inode. Invariants:
//! * until then what is lost is neither read nor jumped over: see [`crate::content::Ledger`];
//! * a file that nobody has open is a new one to the kernel when it is next opened, with the size and content that are stored;
//! * nothing here costs anything while nothing is lost.

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::content;
use crate::content::ContentError;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::descriptors::enter_background;
use crate::fs::state::inode::Inode;
use crate::runtime::{Next, Periodic};
use crate::storage::Access;

/// How often the kernel is asked to drop a file that it may just have closed.
const ROUND: Duration = Duration::from_millis(20);
/// After so many rounds in which nothing new was lost the files that are left are in use, and asked after less often.
const ROUNDS: u32 = 50;
const SELDOM: Duration = Duration::from_secs(1);

impl Filesystem {
    /// The kernel was told that these bytes cannot be written, and has told programs before that it is.
    pub fn lose(self: &Arc<Self>, id: InodeId, offset: u64, len: usize) {
        let range = offset..offset.saturating_add(len as u64);
        if !self.kernel().sets_mtime() {
            return;
        }
        let Ok(inode) = self.inodes.get(id) else { return };
        loop {
            let open = inode.slot().current();
            let lost = match open {
                Some(open) => open.content.lose(range.clone()).map_err(Error::from),
                None => self.lose_unopened(&inode, range.clone()),
            };
            match lost {
                Err(Error::Content(ContentError::Retired)) => {}
                Ok(()) => break,
                Err(error) => {
                    self.alarm("lost", || format!("{}: what is lost cannot be cut: {error}", inode.node.describe()));
                    break;
                }
            }
        }
        self.alarm("lost", || format!("{}: a program has written what cannot be stored", inode.node.describe()));
        self.look_after(&inode);
    }

    /// Without its key, a file gets a shorter end by its disk size alone.
    fn lose_unopened(&self, inode: &Inode, range: Range<u64>) -> Result<(), Error> {
        let mut slot = inode.slot();
        if slot.current().is_some() {
            return Err(ContentError::Retired.into());
        }
        let size = self.size_at_rest(inode, &inode.node.stat()?);
        if let Some(start) = inode.ledger.lose(range, size, None) {
            let disk = content::settled(start);
            inode.ledger.owe(Some(disk));
            content::set_end(self.open_backing(inode, Access::ReadWrite)?.as_ref(), disk)?;
            inode.ledger.owe(None);
        }
        drop(slot);
        Ok(())
    }

    fn look_after(self: &Arc<Self>, inode: &Arc<Inode>) {
        let mut state = self.work.losses.state();
        state.files.insert(inode.id, (Arc::downgrade(inode), true));
        if state.is_stopped {
            return;
        }
        if state.thread.is_none() {
            let (weak, mut rounds) = (Arc::downgrade(self), 0);
            let first = Next::WhenWoken(Duration::ZERO);
            // Without a thread the next loss tries again.
            state.thread = Periodic::start("kmsfs-losses", first, move || run(&weak, &mut rounds)).ok();
        }
        state.thread.iter().for_each(Periodic::wake);
    }

    /// What the kernel may be told about files that have lost something, from a thread that does not serve it.
    fn tell_of_losses(&self, files: &[(Arc<Inode>, bool)]) {
        for (inode, _) in files.iter().filter(|(_, is_new)| *is_new) {
            self.kernel().invalidate(inode.id);
        }
        let is_unused = |inode: &Arc<Inode>| inode.ledger.has_lost() && inode.slot().handles == 0;
        let unused: Vec<_> = files.iter().filter(|(inode, _)| is_unused(inode)).collect();
        let ids: Vec<_> = unused.iter().map(|(inode, _)| inode.id).collect();
        if ids.is_empty() || self.kernel().drop_unused(&ids) {
            return;
        }
        for (inode, _) in unused {
            if let Some((directory, name)) = self.entry_of(inode) {
                self.kernel().forget_entry(directory, &name);
            }
        }
    }
}

fn run(weak: &Weak<Filesystem>, rounds: &mut u32) -> Next {
    enter_background();
    let Some(fs) = weak.upgrade() else { return Next::Never };
    let files = fs.work.losses.files();
    if files.is_empty() {
        return Next::WhenWoken(Duration::ZERO);
    }
    *rounds = if files.iter().any(|(_, is_new)| *is_new) { 0 } else { *rounds + 1 };
    fs.tell_of_losses(&files);
    Next::After(if *rounds < ROUNDS { ROUND } else { SELDOM })
}
