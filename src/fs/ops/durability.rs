//! Making durable what belongs to no single file, and what follows where the disk refuses that.

use std::io;

use crate::fs::error::{io_errno, lacks_descriptors};
use crate::fs::filesystem::Filesystem;

impl Filesystem {
    /// Makes everything on the backing filesystem durable.
    pub(in crate::fs) fn sync_filesystem(&self) -> io::Result<()> {
        self.descriptors.with_reserve(|| self.inodes.root().node.sync_filesystem())
    }

    /// Makes durable what no sync may overtake.
    pub(in crate::fs) fn flush_dir_syncs(&self) -> io::Result<()> {
        let root = &self.inodes.root().node;
        let flushed = self.descriptors.retry_on_emfile(|| self.backing.dir_syncs.flush(root));
        flushed.inspect_err(|error| self.note_for_all(error))
    }

    /// The disk has refused something that may belong to any file: everybody who has one open hears of it.
    pub(in crate::fs) fn note_for_all(&self, error: &io::Error) {
        if lacks_descriptors(error) {
            // The disk has not been asked.
            return;
        }
        let errno = io_errno(error);
        for inode in self.inodes.all() {
            let mut slot = inode.slot();
            if slot.handles > 0 {
                slot.errors().note(errno);
            }
        }
        self.handles.directories.note(errno);
    }
}
