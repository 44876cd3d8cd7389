//! Making files, FIFOs, sockets and devices.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::format::config::End;
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::Answer;
use crate::fs::state::attributes::Attributes;
use crate::fs::state::inode::{Inode, OpenFile};
use crate::storage::{Access, NodeKind};

use super::attributes::BEING_WRITTEN;
use super::new_entry::mode_in;

impl Filesystem {
    /// Makes a regular file and opens it; counts as a lookup. The answer may come from another thread.
    pub fn create(
        self: &Arc<Self>,
        directory: InodeId,
        name: &[u8],
        mode: u32,
        caller: Caller,
        answer: Answer<Attributes>,
    ) {
        let shown = |made: Attributes| Attributes { blocks: made.blocks.max(BEING_WRITTEN), ..made };
        let answer = Box::new(move |made: Result<Attributes, Error>| answer(made.map(shown)));
        self.make_file(directory, name, mode, caller, answer, |fs, inode, open| {
            inode.told_blocks.store(BEING_WRITTEN, Ordering::Relaxed);
            fs.count_open(inode, open, Access::ReadWrite);
        });
    }

    /// Makes a FIFO, socket or device, or an empty file; counts as a lookup. The answer may come from another thread, since a
    /// file may need a header from its beginning.
    pub fn mknod(
        self: &Arc<Self>,
        directory: InodeId,
        name: &[u8],
        (kind, rdev): (NodeKind, u64),
        mode: u32,
        caller: Caller,
        answer: Answer<Attributes>,
    ) {
        if kind != NodeKind::File {
            return answer(self.make_special(directory, name, (kind, rdev), mode, caller));
        }
        if self.rules().end == End::Strict {
            return self.make_file(directory, name, mode, caller, answer, |fs, inode, _| {
                // Nobody has it open: its content goes when files are settled next.
                fs.work.unsettled.watch(&fs.inodes, inode);
            });
        }
        let made =
            self.writable_directory(directory).and_then(|directory| self.create_node(&directory, name, mode, caller));
        answer(made.map(|(_, attributes)| attributes));
    }

    /// Makes a regular file with a content, of which `opened` is told; counts as a lookup.
    fn make_file(
        self: &Arc<Self>,
        directory: InodeId,
        name: &[u8],
        mode: u32,
        caller: Caller,
        answer: Answer<Attributes>,
        opened: impl Fn(&Self, &Arc<Inode>, &OpenFile) + Send + 'static,
    ) {
        let created = self.writable_directory(directory).and_then(|directory| {
            let (inode, attributes) = self.create_node(&directory, name, mode, caller)?;
            Ok((directory, inode, attributes))
        });
        let (directory, inode, attributes) = match created {
            Ok(created) => created,
            Err(error) => return answer(Err(error)),
        };
        let (fs, name) = (Arc::clone(self), name.to_vec());
        let undo = Box::new(move |result: Result<Attributes, Error>| {
            // Without a key the file can hold nothing: the caller is told so, and finds no empty file left behind.
            if result.is_err() {
                if let Err(error) = fs.unlink_from(&directory, &name) {
                    tracing::warn!("an empty file that got no key cannot be removed: {error}");
                }
                fs.forget(attributes.id, 1);
            }
            answer(result);
        });
        self.with_content(inode, Access::ReadWrite, undo, move |fs, inode, open| {
            opened(fs, inode, open);
            Ok(attributes)
        });
    }

    fn make_special(
        &self,
        directory: InodeId,
        name: &[u8],
        (kind, rdev): (NodeKind, u64),
        mode: u32,
        caller: Caller,
    ) -> Result<Attributes, Error> {
        let directory = self.writable_directory(directory)?;
        if matches!(kind, NodeKind::Directory | NodeKind::Symlink) {
            return Err(Error::WrongKind);
        }
        let stored = self.stored_name(&directory, name)?;
        let mode = mode_in(&directory, mode, caller);
        let node = self.with_long_name_link(&directory.node, &stored, |entry| {
            directory.node.mknod(entry, kind, self.first_mode(mode, caller), rdev)?;
            self.pin_new(&directory.node, entry).inspect_err(|_| drop(directory.node.unlink(entry)))
        })?;
        self.hand_over(&directory, &stored, &node, mode, caller)?;
        Ok(self.learn(node)?.1)
    }

    /// Makes a regular file and learns it.
    fn create_node(
        &self,
        directory: &Inode,
        name: &[u8],
        mode: u32,
        caller: Caller,
    ) -> Result<(Arc<Inode>, Attributes), Error> {
        let stored = self.stored_name(directory, name)?;
        let mode = mode_in(directory, mode, caller);
        let node = self.with_long_name_link(&directory.node, &stored, |entry| {
            self.descriptors.retry_on_emfile(|| directory.node.create_file(entry, self.first_mode(mode, caller)))
        })?;
        self.hand_over(directory, &stored, &node, mode, caller)?;
        let (inode, attributes) = self.learn(node)?;
        inode.lacks_capabilities.store(true, Ordering::Relaxed);
        Ok((inode, attributes))
    }
}
