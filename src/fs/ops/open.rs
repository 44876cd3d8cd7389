//! Opening, making and closing regular files.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::Answer;
use crate::fs::state::inode::{Inode, OpenFile};
use crate::storage::{Access, RawFile};

impl Filesystem {
    /// Opens a regular file; the answer may come from another thread.
    pub fn open_file(self: &Arc<Self>, id: InodeId, access: Access, answer: Answer<()>) {
        let opened = self.inodes.get(id).and_then(|inode| {
            if access == Access::ReadWrite {
                self.check_writable()?;
            }
            inode.check_is_fresh()?;
            Ok(inode)
        });
        match opened {
            Err(error) => answer(Err(error)),
            Ok(inode) => {
                self.prefetch_after(&inode);
                let was_in_use = inode.slot().open.is_some();
                self.with_content(inode, access, answer, move |fs, inode, open| {
                    if inode.is_without_size.load(Ordering::Relaxed) {
                        // What was found out must outlive that the kernel forgets the inode.
                        fs.work.unsettled.watch(&fs.inodes, inode);
                        inode.check_is_fresh()?;
                    }
                    fs.count_open(inode, open, access);
                    if access == Access::ReadWrite {
                        fs.tell_that_it_may_be_written(inode);
                    } else if was_in_use {
                        // The kernel may have the content, so that no read comes: opening is reading, as where the header has to be
                        // read. If the time stays, nothing else is wrong.
                        let _ = open.file.read_at(&mut [0], 0);
                    }
                    Ok(())
                });
            }
        }
    }

    pub(in crate::fs) fn count_open(&self, inode: &Arc<Inode>, open: &OpenFile, access: Access) {
        self.work.last_use.note();
        inode.slot().handles += 1;
        if access == Access::ReadWrite || (open.file.is_writable() && open.content.unsettled().is_some()) {
            self.work.unsettled.watch(&self.inodes, inode);
            self.descriptors.request(|| self.descriptors_in_use());
        }
    }

    /// Whether a file that is open turned out to be cut off.
    #[must_use]
    pub fn lacks_end_mark(&self, id: InodeId) -> bool {
        self.inodes.get(id).is_ok_and(|inode| inode.slot().lacks_end_mark())
    }

    /// Closes one handle of a file. The content goes with the last one, unless it waits for being settled.
    pub fn release(&self, id: InodeId) {
        let Ok(inode) = self.inodes.get(id) else { return };
        let mut slot = inode.slot();
        slot.handles = slot.handles.saturating_sub(1);
        if slot.lacks_end_mark() {
            self.alarm("end", || format!("{}: the end of the file is missing: it was cut off", inode.node.describe()));
        }
        let is_condemned = inode.condemned.load(Ordering::Relaxed);
        // The kernel hands its pages over when a handle is closed.
        inode.ledger.confirm();
        let waits = |open: &OpenFile| inode.watched.load(Ordering::Relaxed) && open.content.unsettled().is_some();
        let last = slot.handles == 0;
        if last && !slot.open.as_ref().is_some_and(waits) {
            slot.close();
        }
        drop(slot);
        if last && is_condemned {
            self.work.unsettled.abandon(&self.inodes, &inode);
        }
        if last {
            self.descriptors.note_given_up();
            inode.try_late_mtime();
        }
    }
}
