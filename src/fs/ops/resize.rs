//! Setting a file's size, alone or with other attributes.

use std::sync::Arc;

use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::Answer;
use crate::fs::state::attributes::{Attributes, Change};
use crate::fs::state::inode::Inode;
use crate::storage::{Access, SetTime};

use super::setid::drop_unless_privileged;

impl Filesystem {
    /// Sets the plain size of a file for `caller`; the answer may come from another thread.
    pub fn resize(self: &Arc<Self>, id: InodeId, size: u64, caller: Caller, answer: Answer<()>) {
        match self.inodes.get(id) {
            Ok(inode) => self.resize_inode(inode, size, caller, answer),
            Err(error) => answer(Err(error)),
        }
    }

    fn resize_inode(self: &Arc<Self>, inode: Arc<Inode>, size: u64, caller: Caller, answer: Answer<()>) {
        let ready = self.check_writable().and_then(|()| {
            self.drop_capabilities(&inode)?;
            Ok(drop_unless_privileged(&inode, caller)?)
        });
        if let Err(error) = ready {
            return answer(Err(error));
        }
        let (fs, same) = (Arc::clone(self), Arc::clone(&inode));
        let resize = move |filled: Result<(), Error>| match filled {
            Ok(()) => fs.resize_at_once(inode, size, answer),
            Err(error) => answer(Err(error)),
        };
        self.fill(same, size, caller, Box::new(resize));
    }

    fn resize_at_once(self: &Arc<Self>, inode: Arc<Inode>, size: u64, answer: Answer<()>) {
        self.with_content(inode, Access::ReadWrite, answer, move |fs, inode, open| {
            if size > 0 {
                fs.ensure_keys(inode, open)?;
            }
            let result = open.content.resize(size).map_err(Error::from);
            fs.work.unsettled.watch(&fs.inodes, inode);
            result.inspect_err(|error| fs.report(inode, error))
        });
    }

    /// Sets the size and then the other attributes; the answer may come from another thread.
    pub fn set_attributes(
        self: &Arc<Self>,
        id: InodeId,
        size: Option<u64>,
        change: Change,
        caller: Caller,
        answer: Answer<Attributes>,
    ) {
        let inode = match self.inodes.get(id) {
            Ok(inode) => inode,
            Err(error) => return answer(Err(error)),
        };
        let Some(size) = size else { return answer(self.change_for(&inode, &change, Some(caller))) };
        let (fs, same) = (Arc::clone(self), Arc::clone(&inode));
        let change =
            move || fs.change_for(&same, &change, Some(caller)).or_else(|error| fs.keep_times(&same, &change, error));
        let then = Box::new(move |resized: Result<(), Error>| answer(resized.and_then(|()| change())));
        self.resize_inode(inode, size, caller, then);
    }

    /// The size has changed, and its times are refused with `error`: an error would tell the kernel of the old size. They are set
    /// later.
    fn keep_times(&self, inode: &Inode, change: &Change, error: Error) -> Result<Attributes, Error> {
        let Change { mode: None, uid: None, gid: None, .. } = change else { return Err(error) };
        self.alarm("times", || format!("{}: its times cannot be set: {error}", inode.node.describe()));
        if let SetTime::At(mtime) = change.mtime {
            *inode.late_mtime() = Some(mtime);
        }
        self.attributes_of(inode, &inode.node.stat()?)
    }
}
