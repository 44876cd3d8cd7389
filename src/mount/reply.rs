//! Answers to the kernel, from what an operation came to.

use std::time::{Duration, SystemTime};

use fuser::{FileHandle, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyEmpty, ReplyEntry, ReplyXattr};

use crate::fs::{Attributes, Error, Listed, NodeKind, UNREADABLE};

use super::convert;

/// Nobody but this mount changes the cipher directory, so the kernel may keep what it knows.
pub(super) const KEEP: Duration = Duration::from_secs(3600);

/// Files need no handle: content is kept per inode.
pub(super) const NO_HANDLE: FileHandle = FileHandle(0);

/// A lookup that found nothing is worth remembering too.
pub(super) fn reply_entry(reply: ReplyEntry, result: Result<Attributes, Error>) {
    match result {
        Ok(found) => reply.entry(&KEEP, &convert::attributes(&found), Generation(found.generation.into())),
        Err(Error::NoEntry) => reply.entry_with_ttls(&KEEP, &KEEP, &nothing(), Generation(0)),
        Err(error) => reply.error(convert::errno(&error)),
    }
}

/// The attributes of no inode: the kernel takes the number 0 for "not there".
fn nothing() -> fuser::FileAttr {
    let never = SystemTime::UNIX_EPOCH;
    fuser::FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: never,
        mtime: never,
        ctime: never,
        crtime: never,
        kind: fuser::FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// A file that was made is open.
pub(super) fn reply_created(reply: ReplyCreate, result: Result<Attributes, Error>) {
    match result {
        Ok(made) => {
            let generation = Generation(made.generation.into());
            reply.created(&KEEP, &convert::attributes(&made), generation, NO_HANDLE, FopenFlags::FOPEN_KEEP_CACHE);
        }
        Err(error) => reply.error(convert::errno(&error)),
    }
}

pub(super) fn reply_attributes(reply: ReplyAttr, result: Result<Attributes, Error>) {
    match result {
        Ok(found) => reply.attr(&KEEP, &convert::attributes(&found)),
        Err(error) => reply.error(convert::errno(&error)),
    }
}

/// A size of 0 asks how much room is needed.
pub(super) fn reply_xattr(reply: ReplyXattr, size: u32, result: Result<Vec<u8>, Error>) {
    let answer = result.and_then(|value| {
        let len = u32::try_from(value.len()).map_err(|_| Error::NoRoom)?;
        if size > 0 && len > size { Err(Error::NoRoom) } else { Ok((value, len)) }
    });
    match answer {
        Ok((_, len)) if size == 0 => reply.size(len),
        Ok((value, _)) => reply.data(&value),
        Err(error) => reply.error(convert::errno(&error)),
    }
}

pub(super) fn reply_empty(reply: ReplyEmpty, result: Result<(), Error>) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(convert::errno(&error)),
    }
}

/// What the kernel gets with an entry without attributes: it uses only the number and the kind of `.` and `..`, and of an
/// entry whose attributes are impossible.
pub(super) fn name_alone(entry: &Listed<'_>) -> fuser::FileAttr {
    let size = if entry.id == UNREADABLE { u64::MAX } else { 0 };
    let kind = convert::file_type(entry.kind.unwrap_or(NodeKind::File));
    fuser::FileAttr { ino: INodeNo(entry.id.0), kind, size, ..nothing() }
}
