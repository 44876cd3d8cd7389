//! The one table from what can go wrong to what the kernel is told. `docs/SEMANTICS.md` lists it for users.

use std::io;

use rustix::io::Errno;

use crate::content::ContentError;
use crate::keys::{KeyError, ProviderErrorKind};
use crate::lease::{LeaseError, Lost};

/// Why an operation of the filesystem failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The backing filesystem failed; its errno is passed on.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file's content failed.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// The file's key cannot be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The volume is no longer this mount's to write.
    #[error(transparent)]
    Lease(#[from] Lost),
    /// The volume may be another's to write.
    #[error(transparent)]
    InUse(#[from] LeaseError),
    /// There is no such entry.
    #[error("no such entry")]
    NoEntry,
    /// The entry is there already.
    #[error("the entry exists")]
    Exists,
    /// The directory still has entries.
    #[error("the directory is not empty")]
    NotEmpty,
    /// The inode is not one that the kernel knows.
    #[error("the inode is not known")]
    UnknownInode,
    /// The handle is not open.
    #[error("the handle is not open")]
    UnknownHandle,
    /// The name is longer than 255 bytes, or the link target longer than what can be sealed.
    #[error("the name is too long")]
    NameTooLong,
    /// The mount is read-only.
    #[error("the mount is read-only")]
    ReadOnly,
    /// The file is somebody else's.
    #[error("the file is somebody else's")]
    NotOwner,
    /// The operation does not fit the kind of file.
    #[error("not possible for this kind of file")]
    WrongKind,
    /// An entry with entries has no directory id, or one that does not authenticate.
    #[error("the directory's id is missing or does not authenticate: names in it cannot be read")]
    DirectoryId,
    /// A link target does not authenticate.
    #[error("the link's target does not authenticate")]
    LinkTarget,
    /// A file that was left half sealed under a new data key.
    #[error("the file was getting a new data key: the next mount that may write finishes it, or says why it cannot")]
    Unfinished,
    /// The list of wrapping keys is being changed, which new headers must wait for.
    #[error("the volume's keys are being changed: run the command again when that is done")]
    KeysChange,
    /// A file without a header in a volume where every file has one.
    #[error("the file has no header: it was cut off, or put there by something else")]
    NoHeader,
    /// The kernel does it by itself, or does without, and need not ask again.
    #[error("left to the kernel")]
    LeftToKernel,
    /// There is no such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// An extended attribute does not authenticate.
    #[error("an extended attribute does not authenticate: it was changed on disk, or belongs to another file")]
    Attribute,
    /// The value is longer than what the caller has room for.
    #[error("the value does not fit")]
    NoRoom,
    /// The operation is one that this filesystem does not have.
    #[error("not supported")]
    Unsupported,
    /// There is no such control operation.
    #[error("no such control operation")]
    NoControl,
}

impl Error {
    /// The errno, as a positive number.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Io(error) => io_errno(error),
            Self::Content(error) => content_errno(error),
            Self::Key(error) => key_errno(error),
            Self::NoEntry => Errno::NOENT.raw_os_error(),
            Self::Exists => Errno::EXIST.raw_os_error(),
            Self::NotEmpty => Errno::NOTEMPTY.raw_os_error(),
            Self::UnknownInode => Errno::STALE.raw_os_error(),
            Self::UnknownHandle => Errno::BADF.raw_os_error(),
            Self::NameTooLong => Errno::NAMETOOLONG.raw_os_error(),
            Self::ReadOnly | Self::Lease(Lost::ToAnother) => Errno::ROFS.raw_os_error(),
            Self::NotOwner => Errno::PERM.raw_os_error(),
            Self::WrongKind => Errno::INVAL.raw_os_error(),
            Self::DirectoryId
            | Self::LinkTarget
            | Self::Attribute
            | Self::NoHeader
            | Self::Unfinished
            | Self::InUse(_)
            | Self::Lease(Lost::NotRenewed) => Errno::IO.raw_os_error(),
            Self::KeysChange => Errno::BUSY.raw_os_error(),
            Self::LeftToKernel => Errno::NOSYS.raw_os_error(),
            Self::NoAttribute => Errno::NODATA.raw_os_error(),
            Self::NoRoom => Errno::RANGE.raw_os_error(),
            Self::Unsupported => Errno::OPNOTSUPP.raw_os_error(),
            Self::NoControl => Errno::NOTTY.raw_os_error(),
        }
    }

    /// Whether an operator should hear of it: something is wrong with the data or the keys, not with the request.
    #[must_use]
    pub fn is_alarming(&self) -> bool {
        match self {
            Self::Content(error) => {
                !matches!(error, ContentError::Io(_) | ContentError::TooLarge | ContentError::Lost { .. })
            }
            Self::Key(_)
            | Self::Lease(_)
            | Self::DirectoryId
            | Self::LinkTarget
            | Self::Attribute
            | Self::NoHeader
            | Self::Unfinished => true,
            _ => false,
        }
    }
}

/// No errno is greater; the kernel takes none above 133 from a filesystem.
pub(super) const MOST_ERRNO: usize = 133;

macro_rules! names {
    ($($name:ident)*) => { [$((Errno::$name.raw_os_error(), concat!("E", stringify!($name)))),*] };
}

/// The name of an errno, for people.
pub(super) fn errno_name(errno: usize) -> String {
    const NAMES: [(i32, &str); 38] = names!(
        PERM NOENT INTR IO NXIO BADF AGAIN NOMEM ACCESS BUSY EXIST XDEV NODEV NOTDIR ISDIR INVAL NFILE MFILE NOTTY TXTBSY
        FBIG NOSPC ROFS MLINK RANGE NAMETOOLONG NOTEMPTY LOOP NODATA OVERFLOW OPNOTSUPP TIMEDOUT STALE DQUOT CANCELED
        NOKEY KEYEXPIRED KEYREVOKED
    );
    let known = NAMES.iter().find(|(number, _)| usize::try_from(*number) == Ok(errno));
    match known {
        // The one that the library calls by another name.
        Some((_, "EACCESS")) => "EACCES".to_owned(),
        Some((_, name)) => (*name).to_owned(),
        None => format!("errno-{errno}"),
    }
}

/// Whether the process, or the machine, has no descriptor left.
pub(super) fn lacks_descriptors(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE))
}

/// Whether the disk has refused something, of which the kernel tells nobody again.
pub(super) fn is_of_disk(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::IO | Errno::NOSPC | Errno::DQUOT))
}

pub(super) fn io_errno(error: &io::Error) -> i32 {
    let of_kind = || match error.kind() {
        io::ErrorKind::StorageFull => Errno::NOSPC,
        io::ErrorKind::FileTooLarge => Errno::FBIG,
        io::ErrorKind::Interrupted => Errno::INTR,
        _ => Errno::IO,
    };
    match Errno::from_io_error(error) {
        // The kernel asks never again for what answers this: it lets every later `fsync` succeed by itself.
        Some(Errno::NOSYS) => Errno::OPNOTSUPP.raw_os_error(),
        Some(errno) => errno.raw_os_error(),
        None => of_kind().raw_os_error(),
    }
}

fn content_errno(error: &ContentError) -> i32 {
    match error {
        ContentError::Io(error) => io_errno(error),
        ContentError::TooLarge => Errno::FBIG.raw_os_error(),
        ContentError::NoKey => Errno::NOKEY.raw_os_error(),
        ContentError::Unauthentic { .. }
        | ContentError::BadTrailer { .. }
        | ContentError::Hole { .. }
        | ContentError::NoEndMark { .. }
        | ContentError::Cut { .. }
        | ContentError::Lost { .. }
        | ContentError::Retired
        | ContentError::ImpossibleSize(_) => Errno::IO.raw_os_error(),
    }
}

fn key_errno(error: &KeyError) -> i32 {
    let errno = match error {
        KeyError::Provider(error) => provider_errno(error.kind),
        KeyError::NoUsableRecord(_) | KeyError::NoVolumeRecord(_) | KeyError::Locked => Errno::NOKEY,
        KeyError::Header(_)
        | KeyError::UnauthenticHeader
        | KeyError::UnknownSuite(_)
        | KeyError::Commitment(_)
        | KeyError::Config(_)
        | KeyError::BrokenSeal => Errno::IO,
    };
    errno.raw_os_error()
}

fn provider_errno(kind: ProviderErrorKind) -> Errno {
    match kind {
        ProviderErrorKind::Denied => Errno::ACCESS,
        ProviderErrorKind::KeyUnusable => Errno::KEYREVOKED,
        ProviderErrorKind::KeyNotFound => Errno::NOKEY,
        ProviderErrorKind::Credentials => Errno::KEYEXPIRED,
        ProviderErrorKind::Unavailable | ProviderErrorKind::Throttled => Errno::TIMEDOUT,
        ProviderErrorKind::Tampered
        | ProviderErrorKind::BadAnswer
        | ProviderErrorKind::Misconfigured
        | ProviderErrorKind::Storage => Errno::IO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::ProviderError;

    #[test]
    fn no_error_from_below_has_the_kernel_stop_asking() {
        let missing = io::Error::from_raw_os_error(libc::ENOSYS);
        assert_eq!(Error::from(missing).errno(), libc::EOPNOTSUPP);
        assert_eq!(Error::from(io::Error::from_raw_os_error(libc::EIO)).errno(), libc::EIO);
    }

    /// The rows of the table in `docs/SEMANTICS.md` that concern keys.
    #[test]
    fn provider_failures_have_the_documented_errno() {
        let rows = [
            (ProviderErrorKind::Denied, libc::EACCES),
            (ProviderErrorKind::KeyUnusable, libc::EKEYREVOKED),
            (ProviderErrorKind::KeyNotFound, libc::ENOKEY),
            (ProviderErrorKind::Credentials, libc::EKEYEXPIRED),
            (ProviderErrorKind::Unavailable, libc::ETIMEDOUT),
            (ProviderErrorKind::Throttled, libc::ETIMEDOUT),
            (ProviderErrorKind::Tampered, libc::EIO),
            (ProviderErrorKind::BadAnswer, libc::EIO),
            (ProviderErrorKind::Misconfigured, libc::EIO),
            (ProviderErrorKind::Storage, libc::EIO),
        ];
        for (kind, errno) in rows {
            assert_eq!(Error::from(KeyError::from(ProviderError::new(kind, ""))).errno(), errno, "{kind:?}");
        }
    }

    #[test]
    fn backing_errors_pass_through() {
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EACCES, libc::EXDEV] {
            assert_eq!(Error::from(io::Error::from_raw_os_error(errno)).errno(), errno);
            assert_eq!(Error::from(ContentError::from(io::Error::from_raw_os_error(errno))).errno(), errno);
        }
    }
}
