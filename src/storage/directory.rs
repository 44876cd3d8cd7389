//! Reading a directory: entries in the backing filesystem's order, with its own positions.

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{RawDir, SeekFrom, fsync, seek};

use super::NodeKind;

/// Bytes of entries read from the backing filesystem at a time.
const BATCH: usize = 32 * 1024;

/// An entry of a backing directory.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// Its name.
    pub name: String,
    /// Its inode number.
    pub ino: u64,
    /// Its kind, if the backing filesystem tells.
    pub kind: Option<NodeKind>,
    /// The backing filesystem's position after this entry: opaque, valid while the directory exists.
    pub next_position: u64,
}

/// A directory being read. Positions are the backing filesystem's, so they stay valid while entries come and go.
pub struct DirStream {
    fd: OwnedFd,
    /// Entries read and not yet taken, the first of which is at `position`.
    pending: VecDeque<DirEntry>,
    position: u64,
}

impl DirStream {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd, pending: VecDeque::new(), position: 0 }
    }

    /// The entry at `position` (0 is the first one); `None` at the end. Entries whose names are not UTF-8 are not ours
    /// and come with a replacement character, which no encrypted name has.
    ///
    /// # Errors
    /// Those of `getdents(2)` and `lseek(2)`.
    pub fn entry_at(&mut self, position: u64) -> io::Result<Option<&DirEntry>> {
        if position != self.position {
            seek(&self.fd, SeekFrom::Start(position))?;
            self.pending.clear();
            self.position = position;
        }
        if self.pending.is_empty() {
            self.fill()?;
        }
        Ok(self.pending.front())
    }

    /// Goes past the entry that [`Self::entry_at`] returned.
    pub fn advance(&mut self) {
        if let Some(entry) = self.pending.pop_front() {
            self.position = entry.next_position;
        }
    }

    /// Makes the directory's entries durable.
    ///
    /// # Errors
    /// Those of `fsync(2)`.
    pub fn sync(&self) -> io::Result<()> {
        Ok(fsync(&self.fd)?)
    }

    fn fill(&mut self) -> io::Result<()> {
        let mut buffer = vec![MaybeUninit::uninit(); BATCH];
        let mut entries = RawDir::new(&self.fd, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            self.pending.push_back(DirEntry {
                name: entry.file_name().to_string_lossy().into_owned(),
                ino: entry.ino(),
                kind: NodeKind::of_entry(entry.file_type()),
                next_position: entry.next_entry_cookie(),
            });
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// The names in an open directory but `.` and `..`.
pub(super) fn names(directory: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let mut buffer = vec![MaybeUninit::uninit(); BATCH];
    let mut entries = RawDir::new(directory, &mut buffer);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    Ok(names)
}
