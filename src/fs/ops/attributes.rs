//! Attributes: what `stat` shows, and what `chmod`, `chown`, `truncate` and `utimensat` change.

use std::io;
use std::sync::atomic::Ordering;

use crate::format::geometry::{
    DiskOffset, PAGE_LEN, PAGE_SIZE, PAYLOAD_LEN, PageIndex, SizeHint, size_hint, size_with_last_page,
};
use crate::format::page::{Trailer, part};
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::{InodeId, ROOT};
use crate::fs::state::attributes::{Attributes, Change};
use crate::fs::state::inode::Inode;
use crate::storage::{Access, FileSystemStat, NodeKind, RawFile, SetTime, Stat};

use super::setid::{doomed, drop_unless_privileged, set_owner};

/// Blocks of the header and a first page.
pub(in crate::fs) const BEING_WRITTEN: u64 = 2 * PAGE_SIZE / 512;

impl Filesystem {
    /// The attributes of an inode.
    ///
    /// # Errors
    /// [`Error`].
    pub fn attributes(&self, id: InodeId) -> Result<Attributes, Error> {
        let inode = self.inodes.get(id)?;
        self.attributes_of(&inode, &inode.node.stat()?)
    }

    pub(in crate::fs) fn attributes_of(&self, inode: &Inode, stat: &Stat) -> Result<Attributes, Error> {
        // The volume's own directory is not shown, so it does not count.
        let nlink = if inode.id == ROOT { stat.nlink.saturating_sub(1).max(2) } else { stat.nlink };
        Ok(Attributes {
            id: inode.id,
            generation: inode.generation.load(Ordering::Relaxed),
            kind: stat.kind,
            mode: stat.mode,
            nlink,
            uid: stat.uid,
            gid: stat.gid,
            rdev: stat.rdev,
            size: self.plain_size(inode, stat),
            blocks: tell_blocks(inode, stat),
            atime: stat.atime,
            mtime: inode.late_mtime().unwrap_or(stat.mtime),
            ctime: stat.ctime,
        })
    }

    /// Changes attributes other than the size, in the order owner, mode, times: a change of owner clears set-id bits.
    ///
    /// # Errors
    /// [`Error`].
    pub fn change(&self, id: InodeId, change: &Change) -> Result<Attributes, Error> {
        self.change_for(self.inodes.get(id)?.as_ref(), change, None)
    }

    /// Like [`Self::change`], for a process whose privileges matter.
    pub(in crate::fs) fn change_for(
        &self,
        inode: &Inode,
        change: &Change,
        caller: Option<Caller>,
    ) -> Result<Attributes, Error> {
        self.check_writable()?;
        if change.uid.is_some() || change.gid.is_some() {
            set_owner(inode, change.uid, change.gid, caller)?;
        }
        if let Some(mode) = change.mode {
            inode.change_privileges(|| inode.node.set_mode(mode))?;
        }
        set_times(inode, change, caller)?;
        let told = inode.told_blocks.load(Ordering::Relaxed);
        let attributes = self.attributes_of(inode, &inode.node.stat()?)?;
        if let Change { mode: None, uid: None, gid: None, atime: SetTime::Keep, mtime: SetTime::At(_) } = change {
            // The kernel hands over the time of a write, and does not look at the answer.
            inode.told_blocks.store(told, Ordering::Relaxed);
        }
        Ok(attributes)
    }

    /// A change of attributes that names none: the kernel's word that set-id bits or capabilities of a regular file go before its
    /// content changes, or, if it is to note the change or for another kind, `chown(-1, -1)`. It takes the mode from the answer,
    /// so what it shows and honours is right at once. Whose file loses only capabilities keeps his set-id bits.
    ///
    /// # Errors
    /// [`Error::NotOwner`] if somebody else's set-id bits would go with a `chown`.
    pub fn lose_privileges(&self, id: InodeId, notes_change: bool, caller: Caller) -> Result<Attributes, Error> {
        self.check_writable()?;
        let inode = self.inodes.get(id)?;
        if inode.kind == NodeKind::File && !notes_change {
            drop_unless_privileged(&inode, caller)?;
        } else {
            let stat = inode.node.stat()?;
            if inode.kind != NodeKind::Directory && doomed(&stat, caller) != 0 && !caller.is_owner_of(&stat) {
                return Err(Error::NotOwner);
            }
            set_owner(&inode, None, None, Some(caller))?;
        }
        self.attributes_of(&inode, &inode.node.stat()?)
    }

    /// The space of the backing filesystem.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn space(&self) -> Result<FileSystemStat, Error> {
        Ok(self.inodes.root().node.filesystem_stat()?)
    }
}

/// With a writeback cache the kernel sets the modification time of an open file before every sync of its data, which would
/// make the disk write an inode that the sync does not need. That time alone is kept, and written with the next sync of
/// metadata, with the last handle, or when the file is settled.
fn set_times(inode: &Inode, change: &Change, caller: Option<Caller>) -> Result<(), Error> {
    if (change.atime, change.mtime) == (SetTime::Keep, SetTime::Keep) {
        return Ok(());
    }
    if let (SetTime::Keep, SetTime::At(mtime)) = (change.atime, change.mtime)
        && inode.slot().handles > 0
    {
        *inode.late_mtime() = Some(mtime);
        return Ok(());
    }
    let mut late = inode.late_mtime();
    let mtime = match (change.mtime, *late) {
        (SetTime::Keep, Some(late)) => SetTime::At(late),
        (mtime, _) => mtime,
    };
    set_times_as_permitted(inode, change.atime, mtime, caller)?;
    *late = if inode.is_sealing() { Some(inode.node.stat()?.mtime) } else { None };
    Ok(())
}

/// The kernel lets only the owner choose a time, but every writer have that of now, which it decides. Of a file that is not the
/// daemon's the disk lets a writer have its own now; where another change has moved the time already, it stays.
fn set_times_as_permitted(inode: &Inode, atime: SetTime, mtime: SetTime, caller: Option<Caller>) -> Result<(), Error> {
    let Err(error) = inode.node.set_times(atime, mtime) else { return Ok(()) };
    let is_owner = |caller: Caller| inode.node.stat().is_ok_and(|stat| stat.uid == caller.uid);
    if error.kind() != io::ErrorKind::PermissionDenied || caller.is_none_or(is_owner) {
        return Err(error.into());
    }
    if atime == SetTime::Now {
        inode.node.set_times(SetTime::Now, SetTime::Now)?;
    }
    Ok(())
}

impl Filesystem {
    /// The plain size, without a key. Trusted no further than any other attribute: reading authenticates for itself.
    fn plain_size(&self, inode: &Inode, stat: &Stat) -> u64 {
        match stat.kind {
            NodeKind::File => open_size(inode).unwrap_or_else(|| self.size_at_rest(inode, stat)),
            NodeKind::Symlink => self.target_len(inode, stat),
            _ => stat.size,
        }
    }

    /// What the disk size says, or the trailer of the last page where the disk size does not. A disk size that no file has
    /// shows as it is; opening such a file says what is wrong.
    pub(in crate::fs) fn size_at_rest(&self, inode: &Inode, stat: &Stat) -> u64 {
        if inode.has_zero_header.load(Ordering::Relaxed) {
            return 0;
        }
        match size_hint(DiskOffset(stat.size)) {
            Ok(SizeHint::Known(size)) => size.0,
            Ok(SizeHint::AskLastPage(last)) => size_with_last_page(last, self.len_of_last_page(inode, last)).0,
            Err(_) => stat.size,
        }
    }

    /// The length in the trailer of a page; the whole page if it is a hole, or cannot be read.
    fn len_of_last_page(&self, inode: &Inode, last: PageIndex) -> usize {
        let read = || {
            let file = self.open_backing(inode, Access::Read).ok()?;
            let mut page = [0; PAGE_LEN];
            let trailer = &mut page[part::TRAILER];
            file.read_at(trailer, last.disk().0 + part::TRAILER.start as u64).ok()?;
            Trailer::parse(&page).ok()
        };
        read().map_or(PAYLOAD_LEN, |trailer| trailer.len.into())
    }
}

/// The kernel keeps what it was told while a file is written, although it still holds data of it. So a file that may be
/// written never seems to have none: programs would take it for a hole.
fn tell_blocks(inode: &Inode, stat: &Stat) -> u64 {
    let in_use = stat.kind == NodeKind::File && inode.slot().handles > 0;
    let blocks = if in_use { stat.blocks.max(BEING_WRITTEN) } else { stat.blocks };
    inode.told_blocks.store(blocks, Ordering::Relaxed);
    blocks
}

impl Filesystem {
    /// A file that is open, and that nobody has written: it takes space as soon as the kernel hands over what it holds of it.
    pub(in crate::fs) fn tell_that_it_may_be_written(&self, inode: &Inode) {
        if inode.told_blocks.load(Ordering::Relaxed) < BEING_WRITTEN {
            self.kernel().forget_attributes(inode.id);
        }
    }

    /// Has the kernel ask again for the attributes of an open file that takes more space than it was told, more than double with
    /// `roughly`.
    pub(in crate::fs) fn tell_space(&self, inode: &Inode, roughly: bool) {
        let told = inode.told_blocks.load(Ordering::Relaxed);
        let blocks = inode.node.blocks().ok().filter(|blocks| *blocks > told && !(roughly && blocks / 2 < told));
        if let Some(blocks) = blocks.filter(|_| inode.slot().handles > 0) {
            inode.told_blocks.store(blocks, Ordering::Relaxed);
            self.kernel().forget_attributes(inode.id);
        }
    }
}

fn open_size(inode: &Inode) -> Option<u64> {
    inode.slot().open.as_ref().map(|open| open.content.size())
}
