//! Redo logs: what files are to become, in a directory of the volume's own. `docs/FORMAT.md` section 6.
//!
//! Invariants: a log under its name is whole and durable; one that is not has a name that ends in `.new` and means nothing.

use std::collections::HashSet;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::format::name::{REDO_LOGS_DIR, REKEYED, RedoLog};

use super::own_directory::{OwnDirectory, beneath};
use super::{DiskFile, Node};

/// The redo logs of one volume.
#[derive(Debug)]
pub struct RedoLogs {
    directory: OwnDirectory,
}

impl RedoLogs {
    pub(super) fn new(volume: OwnedFd) -> Self {
        Self { directory: OwnDirectory::new(volume, REDO_LOGS_DIR) }
    }

    /// An empty log that means nothing yet; one of that name that was left behind goes.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn create(&self, log: &RedoLog) -> io::Result<DiskFile> {
        let (directory, new) = (self.directory.open_or_make()?, new_name(log));
        remove(&directory, &new)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, new, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(DiskFile::writable(Arc::new(file)))
    }

    /// From now on the log, whose content is durable, counts.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn commit(&self, log: &RedoLog) -> io::Result<()> {
        let directory = self.directory.open_or_make()?;
        rustix::fs::renameat(&directory, new_name(log), &directory, log.text())?;
        Ok(rustix::fs::fsync(directory)?)
    }

    /// Drops a log that never counted.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn discard(&self, log: &RedoLog) -> io::Result<()> {
        self.directory.open()?.map_or(Ok(()), |directory| remove(&directory, &new_name(log)))
    }

    /// Drops a log that has been applied, durably.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn remove(&self, log: &RedoLog) -> io::Result<()> {
        let Some(directory) = self.directory.open()? else { return Ok(()) };
        remove(&directory, &log.text())?;
        Ok(rustix::fs::fsync(directory)?)
    }

    /// All logs that count.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn all(&self) -> io::Result<Vec<RedoLog>> {
        let Some(directory) = self.directory.open()? else { return Ok(Vec::new()) };
        let mut logs = Vec::new();
        for entry in Dir::read_from(&directory)? {
            logs.extend(entry?.file_name().to_str().ok().and_then(RedoLog::parse));
        }
        Ok(logs)
    }

    /// Removes what was begun and never counted. Nobody may be making one.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn tidy(&self) -> io::Result<()> {
        let Some(directory) = self.directory.open()? else { return Ok(()) };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            if entry.file_name().to_bytes().ends_with(b".new") {
                rustix::fs::unlinkat(&directory, entry.file_name(), AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// Notes that the file with this id needs no log any more in the run under way. Not durable: it saves work, nothing else.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn note_done(&self, file_id: &[u8; 32]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = self.directory.open_or_make()?;
        let file = rustix::fs::openat(&directory, REKEYED, flags, Mode::RUSR | Mode::WUSR)?;
        // Appended in one piece, by whatever thread.
        Ok(rustix::io::write(file, file_id).map(drop)?)
    }

    /// The files that were noted.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn done(&self) -> io::Result<HashSet<[u8; 32]>> {
        let Some(directory) = self.directory.open()? else { return Ok(HashSet::new()) };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match rustix::fs::openat2(directory.as_fd(), REKEYED, flags, Mode::empty(), beneath()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(HashSet::new()),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = Vec::new();
        std::fs::File::from(file).read_to_end(&mut bytes)?;
        Ok(bytes.as_chunks().0.iter().copied().collect())
    }

    /// Forgets all notes: the run is over.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn forget_done(&self) -> io::Result<()> {
        self.directory.open()?.map_or(Ok(()), |directory| remove(&directory, REKEYED))
    }

    /// Opens a log for reading.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn open(&self, log: &RedoLog) -> io::Result<DiskFile> {
        let directory = self.directory.open()?.ok_or(io::ErrorKind::NotFound)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::openat2(directory.as_fd(), log.text(), flags, Mode::empty(), beneath())?;
        Ok(DiskFile::readable(Arc::new(file)))
    }
}

/// The file below `directory` whose inode number is `ino`, by what directories say; none if there is none.
///
/// # Errors
/// Those of the backing filesystem.
pub fn find_inode(directory: &Node, ino: u64) -> io::Result<Option<Node>> {
    let mut waiting = vec![directory.clone()];
    while let Some(directory) = waiting.pop() {
        let (mut stream, mut position) = (directory.open_directory()?, 0);
        while let Some(entry) = stream.entry_at(position)? {
            position = entry.next_position;
            let is_link = entry.name == "." || entry.name == "..";
            let may_be_directory = entry.kind.is_none_or(|kind| kind == super::NodeKind::Directory);
            if !is_link && (entry.ino == ino || may_be_directory) {
                let node = directory.lookup(&entry.name)?;
                let stat = node.stat()?;
                match stat.kind {
                    super::NodeKind::File if stat.ino == ino => return Ok(Some(node)),
                    super::NodeKind::Directory => waiting.push(node),
                    _ => {}
                }
            }
            stream.advance();
        }
    }
    Ok(None)
}

fn new_name(log: &RedoLog) -> String {
    format!("{}.new", log.text())
}

fn remove(directory: &OwnedFd, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
