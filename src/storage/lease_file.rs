//! The file of a volume's lease: reading it, putting one in its place, renewing it. `docs/FORMAT.md` section 8.2.
//!
//! Invariants: each look opens the file anew, so that a filesystem of several hosts asks its server; what is read is bounded and
//! is no symlink's target; a lease under its name was written whole, or nobody has renewed it yet.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use crate::format::lease::LEN;
use crate::format::name::LEASE_FILE;

use super::volume_lock::make_like;

/// What lies there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// As much of it as a lease has, and a byte more if there is more.
    pub bytes: Vec<u8>,
    /// The file, and when it was last written: another one is a change too.
    stamp: (u64, i64, i64),
}

/// The place of a lease.
#[derive(Debug)]
pub struct LeaseFile {
    volume: OwnedFd,
    /// Given up for the next look, so that one is possible when there is no descriptor left.
    spare: Mutex<Option<File>>,
}

impl LeaseFile {
    pub(super) fn new(volume: OwnedFd) -> Self {
        Self { volume, spare: Mutex::default() }
    }

    /// What lies there, as the server has it now.
    ///
    /// # Errors
    /// Those of `open(2)` and `read(2)`.
    pub fn read(&self) -> io::Result<Option<Seen>> {
        match self.open(OFlags::RDONLY) {
            Ok(file) => look(&file).map(Some),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts a lease where none is.
    ///
    /// # Errors
    /// `AlreadyExists` if there is one; others of the backing filesystem.
    pub fn create(&self, bytes: &[u8]) -> io::Result<()> {
        let file = self.keep_times(|| make_like(self.volume.as_fd(), LEASE_FILE)).map(File::from)?;
        let written = file.write_all_at(bytes, 0).and_then(|()| file.sync_all());
        if written.is_err() {
            // A file without a lease in it helps nobody.
            let _ = rustix::fs::unlinkat(&self.volume, LEASE_FILE, AtFlags::empty());
        }
        written?;
        Ok(rustix::fs::fsync(&self.volume)?)
    }

    /// Puts a lease in the place of whatever is there. `new` names the file while it is written.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn replace(&self, bytes: &[u8], new: &str) -> io::Result<()> {
        let new = format!("{LEASE_FILE}.{new}.new");
        let written = make_like(self.volume.as_fd(), &new).map_err(io::Error::from).and_then(|file| {
            let file = File::from(file);
            file.write_all_at(bytes, 0)?;
            file.sync_all()?;
            Ok(rustix::fs::renameat(&self.volume, &new, &self.volume, LEASE_FILE)?)
        });
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&self.volume, &new, AtFlags::empty());
        }
        written?;
        Ok(rustix::fs::fsync(&self.volume)?)
    }

    /// Overwrites what lies there with `bytes`, so that others see a change, if `is_own` says that it may be; returns what was
    /// there. With `sync` the change has left this host.
    ///
    /// # Errors
    /// Those of the backing filesystem, if it can neither be written nor marked as changed.
    pub fn renew(&self, bytes: &[u8], is_own: impl Fn(&[u8]) -> bool, sync: bool) -> io::Result<Option<Seen>> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        drop(spare.take());
        let file = match self.open(OFlags::RDWR) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let seen = look(&file)?;
        if is_own(&seen.bytes) {
            file.write_all_at(bytes, 0).or_else(|error| touch(&file).map_err(|_| error))?;
            if sync {
                file.sync_data()?;
            }
        }
        *spare = Some(file);
        Ok(Some(seen))
    }

    /// Removes the lease if `is_own` says that it may be.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn remove(&self, is_own: impl Fn(&[u8]) -> bool) -> io::Result<()> {
        if self.read()?.is_some_and(|seen| is_own(&seen.bytes)) {
            self.keep_times(|| rustix::fs::unlinkat(&self.volume, LEASE_FILE, AtFlags::empty()))?;
        }
        Ok(())
    }

    /// A lease that comes and goes does not make the directory one that was changed.
    fn keep_times<T>(&self, change: impl FnOnce() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
        let before = rustix::fs::fstat(&self.volume);
        let changed = change();
        if let Ok(before) = before {
            let last_modification = Timespec { tv_sec: before.st_mtime, tv_nsec: before.st_mtime_nsec as _ };
            let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
            let _ = rustix::fs::futimens(&self.volume, &Timestamps { last_access, last_modification });
        }
        changed
    }

    fn open(&self, access: OFlags) -> rustix::io::Result<File> {
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.volume, LEASE_FILE, flags, Mode::empty()).map(File::from)
    }
}

/// A full disk that writes every block to a new place may still take a time.
fn touch(file: &File) -> io::Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    Ok(rustix::fs::futimens(file, &Timestamps { last_access: now, last_modification: now })?)
}

fn look(file: &File) -> io::Result<Seen> {
    let stat = rustix::fs::fstat(file)?;
    let mut bytes = Vec::with_capacity(LEN + 1);
    file.take(LEN as u64 + 1).read_to_end(&mut bytes)?;
    let stamp = (stat.st_ino, stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0));
    Ok(Seen { bytes, stamp })
}
