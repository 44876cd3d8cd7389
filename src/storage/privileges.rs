//! Set-id bits and file capabilities of backing files.
//!
//! The kernel takes them away from a file that is written, whoever writes it. Here most writes are not those of a program: a
//! file is settled, written back, or gets a new header, long after somebody made it set-user-id or gave it capabilities. When a
//! program's write is to take them away, that is asked for by itself. So a write here leaves them as they are.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Mode, XattrFlags, fchmod, fgetxattr, fsetxattr, fstat};

/// The attribute that holds a program's capabilities.
pub const CAPABILITIES: &str = "security.capability";
/// Bytes of its value at most: version 3.
const LONGEST: usize = 24;
/// Set-user-id and set-group-id.
const SET_IDS: u32 = 0o6000;

/// Whether an open file has any.
#[derive(Default)]
pub(super) struct Privileges {
    state: AtomicU8,
    /// Held by whoever changes them, and by writes that keep them.
    changing: Mutex<()>,
}

impl Privileges {
    const UNKNOWN: u8 = 0;
    const NONE: u8 = 1;
    const SOME: u8 = 2;

    /// Runs a `change` of the content of `file`, which keeps its privileges. A file without any costs nothing more.
    pub(super) fn keep<T>(&self, file: &OwnedFd, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.state.load(Ordering::Relaxed) == Self::UNKNOWN {
            // Looks while nobody changes them.
            self.change(file, || Ok(()))?;
        }
        if self.state.load(Ordering::Relaxed) == Self::NONE {
            return change();
        }
        let _unchanged = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = Found::of(file);
        let result = change();
        before.restore(file);
        result
    }

    /// Runs a `change` of the privileges of `file`.
    pub(super) fn change<T>(&self, file: &OwnedFd, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _alone = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change();
        self.look(file);
        result
    }

    /// Looks whether `file` has any.
    fn look(&self, file: &OwnedFd) {
        let state = if Found::of(file).is_none() { Self::NONE } else { Self::SOME };
        self.state.store(state, Ordering::Relaxed);
    }
}

/// What a file has.
struct Found {
    mode: u32,
    capabilities: Option<Vec<u8>>,
}

impl Found {
    fn of(file: &OwnedFd) -> Self {
        let mut value = [0; LONGEST];
        let len = fgetxattr(file, CAPABILITIES, &mut value[..]);
        let mode = fstat(file).map_or(0, |stat| stat.st_mode);
        Self { mode: mode & 0o7777, capabilities: len.ok().map(|len| value[..len].to_vec()) }
    }

    fn is_none(&self) -> bool {
        self.mode & SET_IDS == 0 && self.capabilities.is_none()
    }

    /// Gives back what the kernel has taken away. Who may not do that could not have given it either.
    fn restore(self, file: &OwnedFd) {
        let left = Self::of(file);
        let lost = self.mode & SET_IDS & !left.mode;
        if lost != 0 {
            let _ = fchmod(file, Mode::from_raw_mode(left.mode | lost));
        }
        if let Some(value) = self.capabilities.filter(|_| left.capabilities.is_none()) {
            let _ = fsetxattr(file, CAPABILITIES, &value, XattrFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{DiskFile, RawFile};
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;

    /// A program of the machine's own user, and whether it has set-id bits and capabilities.
    fn has(path: &std::path::Path) -> (u32, bool) {
        let mut value = [0; LONGEST];
        let mode = fs::metadata(path).unwrap().permissions().mode() & SET_IDS;
        (mode, rustix::fs::getxattr(path, CAPABILITIES, &mut value[..]).is_ok())
    }

    #[test]
    fn writes_keep_what_a_file_has_and_changes_count() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        let plain = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let file = DiskFile::writable(Arc::new(plain.into()));
        file.write_at(b"one", 0).unwrap();
        assert_eq!(has(&path), (0, false));
        let privileged = rustix::process::geteuid().is_root();
        let give = || {
            fs::set_permissions(&path, Permissions::from_mode(0o6755))?;
            let value = [[1, 0, 0, 2], [0, 0x20, 0, 0], [0; 4], [0; 4], [0; 4]].concat();
            let given = rustix::fs::setxattr(&path, CAPABILITIES, &value, XattrFlags::empty());
            assert!(given.is_ok() || !privileged);
            Ok(())
        };
        file.change_privileges(give).unwrap();
        file.write_at(b"two", 0).unwrap();
        file.set_size(8192).unwrap();
        file.set_size_quietly(4096).unwrap();
        file.allocate(0, 8192).unwrap();
        file.punch(0, 4096).unwrap();
        assert_eq!(has(&path), (SET_IDS, privileged));
        // One that is opened later finds out by itself.
        let again = File::options().read(true).write(true).open(&path).unwrap();
        DiskFile::writable(Arc::new(again.into())).write_at(b"three", 0).unwrap();
        assert_eq!(has(&path), (SET_IDS, privileged));
        let take = || {
            let _ = rustix::fs::removexattr(&path, CAPABILITIES);
            fs::set_permissions(&path, Permissions::from_mode(0o755))
        };
        file.change_privileges(take).unwrap();
        file.write_at(b"four", 0).unwrap();
        assert_eq!(has(&path), (0, false));
    }
}
