//! Kernel types to ours and back.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, OpenAccMode, OpenFlags, RenameFlags, Request, TimeOrNow};

use crate::fs::{
    Access, Allocate, Attributes, Caller, Error, InodeId, NodeKind, RenameMode, SetTime, Timestamp, XattrMode,
};

/// What `stat` shows as preferred I/O size.
const BLOCK_SIZE: u32 = 4096;

pub(super) fn inode(ino: INodeNo) -> InodeId {
    InodeId(ino.0)
}

pub(super) fn errno(error: &Error) -> Errno {
    Errno::from_i32(error.errno())
}

pub(super) fn caller(request: &Request) -> Caller {
    creator(request, 0)
}

/// The caller, with the bits that its new files do not get.
pub(super) fn creator(request: &Request, umask: u32) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid(), umask }
}

pub(super) fn xattr_mode(flags: i32) -> XattrMode {
    match flags {
        libc::XATTR_CREATE => XattrMode::Create,
        libc::XATTR_REPLACE => XattrMode::Replace,
        _ => XattrMode::Any,
    }
}

/// `None` for modes that need blocks to be moved.
pub(super) fn allocate(mode: i32) -> Option<Allocate> {
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    const ZERO_KEEP_SIZE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    Some(match mode {
        0 => Allocate::Extend,
        libc::FALLOC_FL_KEEP_SIZE => Allocate::KeepSize,
        PUNCH => Allocate::Punch,
        libc::FALLOC_FL_ZERO_RANGE => Allocate::Zero,
        ZERO_KEEP_SIZE => Allocate::ZeroKeepSize,
        _ => return None,
    })
}

pub(super) fn access(flags: OpenFlags) -> Access {
    match flags.acc_mode() {
        OpenAccMode::O_RDONLY => Access::Read,
        OpenAccMode::O_WRONLY | OpenAccMode::O_RDWR => Access::ReadWrite,
    }
}

/// `None` for flags that no backing filesystem is asked for.
pub(super) fn rename_mode(flags: RenameFlags) -> Option<RenameMode> {
    match flags {
        flags if flags.is_empty() => Some(RenameMode::Replace),
        RenameFlags::RENAME_NOREPLACE => Some(RenameMode::NoReplace),
        RenameFlags::RENAME_EXCHANGE => Some(RenameMode::Exchange),
        RenameFlags::RENAME_WHITEOUT => Some(RenameMode::WhiteOut),
        _ => None,
    }
}

pub(super) fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::File => FileType::RegularFile,
        NodeKind::Directory => FileType::Directory,
        NodeKind::Symlink => FileType::Symlink,
        NodeKind::Fifo => FileType::NamedPipe,
        NodeKind::Socket => FileType::Socket,
        NodeKind::CharDevice => FileType::CharDevice,
        NodeKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind in the file type bits of a mode; `None` if they name none.
pub(super) fn kind_of_mode(mode: u32) -> Option<NodeKind> {
    Some(match mode & libc::S_IFMT {
        0 | libc::S_IFREG => NodeKind::File,
        libc::S_IFIFO => NodeKind::Fifo,
        libc::S_IFSOCK => NodeKind::Socket,
        libc::S_IFCHR => NodeKind::CharDevice,
        libc::S_IFBLK => NodeKind::BlockDevice,
        _ => return None,
    })
}

pub(super) fn attributes(attributes: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(attributes.id.0),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attributes.kind),
        perm: u16::try_from(attributes.mode & 0o7777).unwrap_or(0),
        nlink: u32::try_from(attributes.nlink).unwrap_or(u32::MAX),
        uid: attributes.uid,
        gid: attributes.gid,
        // The kernel's 32-bit encoding is the low half of the C library's.
        rdev: u32::try_from(attributes.rdev & u64::from(u32::MAX)).unwrap_or(0),
        blksize: BLOCK_SIZE,
        flags: 0,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let nanoseconds = Duration::from_nanos(time.nanoseconds.into());
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    whole.and_then(|whole| whole.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}

pub(super) fn set_time(time: Option<TimeOrNow>) -> SetTime {
    match time {
        None => SetTime::Keep,
        Some(TimeOrNow::Now) => SetTime::Now,
        Some(TimeOrNow::SpecificTime(time)) => SetTime::At(timestamp(time)),
    }
}

/// fuser 0.18 subtracts the nanoseconds of a time before 1970 from its seconds instead of adding them: undone here.
fn timestamp(time: SystemTime) -> Timestamp {
    let split = |duration: Duration| (i64::try_from(duration.as_secs()).unwrap_or(i64::MAX), duration.subsec_nanos());
    let (seconds, nanoseconds) = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => split(after),
        Err(before) => {
            let (seconds, nanoseconds) = split(before.duration());
            (-seconds, nanoseconds)
        }
    };
    Timestamp { seconds, nanoseconds }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_are_shown_right() {
        let time = system_time(Timestamp { seconds: -2, nanoseconds: 250_000_000 });
        assert_eq!(UNIX_EPOCH.duration_since(time).unwrap(), Duration::from_millis(1750));
    }

    #[test]
    fn times_before_1970_as_fuser_decodes_them() {
        let decoded_by_fuser = UNIX_EPOCH - Duration::new(2, 250_000_000);
        assert_eq!(timestamp(decoded_by_fuser), Timestamp { seconds: -2, nanoseconds: 250_000_000 });
        let after = UNIX_EPOCH + Duration::new(2, 5);
        assert_eq!(timestamp(after), Timestamp { seconds: 2, nanoseconds: 5 });
    }
}
