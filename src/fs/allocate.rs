//! `fallocate`.

use std::sync::Arc;

use crate::storage::Access;

use super::set_ids::drop_unless_privileged;
use super::{Answer, Caller, Error, Filesystem, InodeId};

/// What to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocate {
    /// Give it space; the file then reaches to its end at least.
    Extend,
    /// Give it space, within the file and past its end, without changing the size.
    KeepSize,
    /// Make it zeros, and give its space back.
    Punch,
    /// Make it zeros that have space; the file then reaches to its end at least.
    Zero,
    /// Make it zeros that have space, as far as the file reaches.
    ZeroKeepSize,
}

impl Filesystem {
    /// Changes the space of a range for `caller`; the answer may come from another thread.
    pub fn allocate(
        self: &Arc<Self>,
        id: InodeId,
        what: Allocate,
        offset: u64,
        len: u64,
        caller: Caller,
        answer: Answer<()>,
    ) {
        let found = self.check_writable().and_then(|()| self.inodes.get(id)).and_then(|inode| {
            drop_unless_privileged(&inode, caller)?;
            self.keep_mtime(&inode)?;
            Ok(inode)
        });
        let inode = match found {
            Ok(inode) => inode,
            Err(error) => return answer(Err(error)),
        };
        self.with_content(inode, Access::ReadWrite, answer, move |fs, inode, open| {
            let grows = matches!(what, Allocate::Extend | Allocate::Zero);
            if grows {
                fs.ensure_keys(inode, open)?;
            }
            let content = &open.content;
            let zeroed = match what {
                Allocate::Extend | Allocate::KeepSize => Ok(()),
                Allocate::Punch => content.zero(offset, len, false),
                Allocate::Zero | Allocate::ZeroKeepSize => content.zero(offset, len, true),
            };
            let done = zeroed.and_then(|()| match what {
                Allocate::Punch => Ok(()),
                _ => content.allocate(offset, len, grows),
            });
            fs.settler.watch(&fs.inodes, inode);
            done.map_err(Error::from).inspect_err(|error| fs.report(inode, error))
        });
    }
}
