//! Sealed targets of symlinks that are too long for a symlink of the backing filesystem: small files in a directory of the
//! volume's own. `docs/FORMAT.md` section 7.4.
//!
//! Invariant: a target is durable before the symlink that names it is made, and removed only after the last one is gone.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags, openat2, unlinkat};

use crate::format::name::{LONG_TARGETS_DIR, PATH_MAX};

use super::own_directory::{OwnDirectory, beneath};

/// More than any target has, so that a file that is too large is seen to be.
const MAX_READ: u64 = PATH_MAX as u64 + 4096;

/// The long targets of one volume.
#[derive(Debug)]
pub struct LongTargets {
    directory: OwnDirectory,
    in_use: AtomicBool,
}

impl LongTargets {
    pub(super) fn new(volume: OwnedFd) -> io::Result<Self> {
        let directory = OwnDirectory::new(volume, LONG_TARGETS_DIR);
        let in_use = AtomicBool::new(directory.open()?.is_some());
        Ok(Self { directory, in_use })
    }

    /// Whether the volume has, or had, any.
    #[must_use]
    pub fn in_use(&self) -> bool {
        self.in_use.load(Ordering::Relaxed)
    }

    /// Adds the target `name`, durably.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn add(&self, name: &str, sealed: &[u8]) -> io::Result<()> {
        let directory = self.directory.open_or_make()?;
        self.in_use.store(true, Ordering::Relaxed);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = openat2(&directory, name, flags, Mode::RUSR | Mode::WUSR, beneath())?;
        let mut file = File::from(file);
        let written = file.write_all(sealed).and_then(|()| file.sync_all());
        let written = written.and_then(|()| Ok(rustix::fs::fsync(&directory)?));
        written.inspect_err(|_| self.remove(name))
    }

    /// The target `name`.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        let directory = self.directory.open()?.ok_or(io::ErrorKind::NotFound)?;
        let file =
            openat2(&directory, name, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty(), beneath())?;
        let mut sealed = Vec::new();
        File::from(file).take(MAX_READ).read_to_end(&mut sealed)?;
        Ok(sealed)
    }

    /// Removes the target `name`. One that stays is in nobody's way.
    pub fn remove(&self, name: &str) {
        if let Ok(Some(directory)) = self.directory.open() {
            let _ = unlinkat(directory, name, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_added_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let open = || LongTargets::new(File::open(dir.path()).unwrap().into()).unwrap();
        let targets = open();
        assert!(!targets.in_use() && targets.read("a").is_err());
        targets.add("a", b"sealed").unwrap();
        assert!(targets.add("a", b"again").is_err());
        assert_eq!((open().in_use(), open().read("a").unwrap().as_slice()), (true, &b"sealed"[..]));
        targets.remove("a");
        assert!(targets.read("a").is_err());
    }
}
