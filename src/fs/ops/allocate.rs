//! `fallocate`.

use std::sync::Arc;

use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::Answer;
use crate::fs::state::inode::Inode;
use crate::storage::Access;

use super::setid::drop_unless_privileged;

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
            self.drop_capabilities(&inode)?;
            drop_unless_privileged(&inode, caller)?;
            self.keep_mtime(&inode)?;
            Ok(inode)
        });
        let inode = match found {
            Ok(inode) => inode,
            Err(error) => return answer(Err(error)),
        };
        let end = offset.saturating_add(len);
        let (grows, zeroes) = (what.grows(), !matches!(what, Allocate::Extend | Allocate::KeepSize));
        let (fs, same) = (Arc::clone(self), Arc::clone(&inode));
        let then = move |zeroed: Result<bool, Error>| match zeroed {
            Err(error) => answer(Err(error)),
            Ok(is_zeroed) => {
                let (again, kept) = (Arc::clone(&fs), Arc::clone(&same));
                let rest = move |filled: Result<(), Error>| match filled {
                    Err(error) => answer(Err(error)),
                    Ok(()) => again.allocate_at_once(kept, (what, zeroes && !is_zeroed), (offset, len), answer),
                };
                fs.fill(same, if grows { end } else { 0 }, caller, Box::new(rest));
            }
        };
        if zeroes { self.zero_slowly(inode, (offset, end), caller, Box::new(then)) } else { then(Ok(false)) }
    }

    fn allocate_at_once(
        self: &Arc<Self>,
        inode: Arc<Inode>,
        (what, zeroes): (Allocate, bool),
        (offset, len): (u64, u64),
        answer: Answer<()>,
    ) {
        self.with_content(inode, Access::ReadWrite, answer, move |fs, inode, open| {
            if what.grows() {
                fs.ensure_keys(inode, open)?;
            }
            let content = &open.content;
            let zeroed = if zeroes { content.zero(offset, len, what != Allocate::Punch) } else { Ok(()) };
            let done = zeroed.and_then(|()| match what {
                Allocate::Punch => Ok(()),
                _ => content.allocate(offset, len, what.grows()),
            });
            fs.work.unsettled.watch(&fs.inodes, inode);
            done.map_err(Error::from).inspect_err(|error| fs.report(inode, error))
        });
    }
}

impl Allocate {
    fn grows(self) -> bool {
        matches!(self, Self::Extend | Self::Zero)
    }
}
