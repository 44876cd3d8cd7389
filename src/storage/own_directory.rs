//! A directory of the volume's own, below `.kmsfs`, which need not exist.

use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, fsync, mkdirat, openat2};
use rustix::io::Errno;

#[derive(Debug)]
pub(super) struct OwnDirectory {
    /// The volume's own directory.
    volume: OwnedFd,
    name: &'static str,
}

impl OwnDirectory {
    pub(super) fn new(volume: OwnedFd, name: &'static str) -> Self {
        Self { volume, name }
    }

    /// The directory, once there is one.
    pub(super) fn open(&self) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat2(&self.volume, self.name, flags, Mode::empty(), beneath()) {
            Ok(directory) => Ok(Some(directory)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The directory, made durably if there is none.
    pub(super) fn open_or_make(&self) -> io::Result<OwnedFd> {
        match mkdirat(&self.volume, self.name, Mode::RWXU) {
            Ok(()) => fsync(&self.volume)?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.open()?.ok_or(io::ErrorKind::NotFound)?)
    }
}

/// How entries of such a directory are opened: nothing planted there leads out of it.
pub(super) fn beneath() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV
}
