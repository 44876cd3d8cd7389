//! Redo logs: what files are to become, in a directory of the volume's own. `docs/FORMAT.md` section 6.
//!
//! Invariants: a log under its name is whole and durable; one that is not has a name that ends in `.new` and means nothing.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::format::name::{REDO_LOGS_DIR, REKEYED, RedoLog};

use super::own_directory::{OwnDirectory, beneath};
use super::{DiskFile, Node, RawFile};

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
    pub fn create(&self, log: &RedoLog) -> io::Result<OpenLog> {
        let (directory, new) = (self.directory.open_or_make()?, new_name(log));
        remove(&directory, &new)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&directory, new, flags, Mode::RUSR | Mode::WUSR)?;
        Ok(OpenLog { log: *log, directory, file: DiskFile::writable(Arc::new(file)), is_new: AtomicBool::new(true) })
    }

    /// Opens a log that is there.
    ///
    /// # Errors
    /// Those of the backing filesystem; `InvalidData` for what is no regular file.
    pub fn open(&self, log: &RedoLog) -> io::Result<OpenLog> {
        let (directory, file) = self.find(log)?;
        Ok(OpenLog { log: *log, directory, file, is_new: AtomicBool::new(false) })
    }

    fn find(&self, log: &RedoLog) -> io::Result<(OwnedFd, DiskFile)> {
        let directory = self.directory.open()?.ok_or(io::ErrorKind::NotFound)?;
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match rustix::fs::openat2(directory.as_fd(), log.text(), flags, Mode::empty(), beneath()) {
            Ok(file) if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode).is_file() => file,
            Ok(_) | Err(Errno::LOOP | Errno::XDEV | Errno::NXIO) => return Err(io::ErrorKind::InvalidData.into()),
            Err(error) => return Err(error.into()),
        };
        Ok((directory, DiskFile::readable(Arc::new(file))))
    }

    /// What is in a log; none if there is no such log.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn read(&self, log: &RedoLog) -> io::Result<Option<DiskFile>> {
        match self.find(log) {
            Ok((_, file)) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Drops a log that is of no use: whoever finds it again finds that too.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn remove(&self, log: &RedoLog) -> io::Result<()> {
        self.directory.open()?.map_or(Ok(()), |directory| remove(&directory, &log.text()))
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

    /// Removes what was begun and never counted. Nobody may be making one. What cannot be removed is in nobody's way.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn tidy(&self) -> io::Result<()> {
        let Some(directory) = self.directory.open()? else { return Ok(()) };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            // An earlier release kept notes there.
            if name.ends_with(b".new") || name == REKEYED.as_bytes() {
                let _ = rustix::fs::unlinkat(&directory, entry.file_name(), AtFlags::empty());
            }
        }
        Ok(())
    }

    /// Makes the caller the only one who has files sealed anew, one after the other; none if another is. Held until it is dropped.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn lock_run(&self) -> io::Result<Option<OwnedFd>> {
        let directory = self.directory.open_or_make()?;
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(directory)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Why a log does not count, or may.
#[derive(Debug)]
pub enum NotCommitted {
    /// It does not, and never will.
    No(io::Error),
    /// It may after a crash: neither its name nor its end could be made durable.
    Unclear(io::Error),
}

/// An open log. Everything that is done with it after it counts needs no further descriptor.
pub struct OpenLog {
    log: RedoLog,
    directory: OwnedFd,
    file: DiskFile,
    /// It has the name of one that means nothing.
    is_new: AtomicBool,
}

impl OpenLog {
    /// Which file it is of.
    #[must_use]
    pub fn name(&self) -> RedoLog {
        self.log
    }

    /// What is in it.
    #[must_use]
    pub fn file(&self) -> &DiskFile {
        &self.file
    }

    /// From now on the log, whose content is durable, counts.
    ///
    /// # Errors
    /// [`NotCommitted`].
    pub fn commit(&self) -> Result<(), NotCommitted> {
        let renamed = rustix::fs::renameat(&self.directory, new_name(&self.log), &self.directory, self.log.text());
        renamed.map_err(|error| NotCommitted::No(error.into()))?;
        self.is_new.store(false, Ordering::SeqCst);
        rustix::fs::fsync(&self.directory).map_err(|error| match self.spoil() {
            Ok(()) => NotCommitted::No(error.into()),
            Err(_) => NotCommitted::Unclear(error.into()),
        })
    }

    /// Makes a name that is there durable: the log was found, and may count only since.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn make_durable(&self) -> io::Result<()> {
        self.file.sync(true)?;
        Ok(rustix::fs::fsync(&self.directory)?)
    }

    /// Empties the log durably: under whatever name it comes back, it does not count.
    fn spoil(&self) -> io::Result<()> {
        self.file.set_size(0)?;
        self.file.sync(true)?;
        remove(&self.directory, &self.log.text())
    }

    /// Drops the log, durably.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn remove(&self) -> io::Result<()> {
        remove(&self.directory, &self.log.text())?;
        Ok(rustix::fs::fsync(&self.directory)?)
    }
}

impl Drop for OpenLog {
    fn drop(&mut self) {
        if self.is_new.load(Ordering::SeqCst) {
            // The next one of that name, or the next mount, removes what stays.
            let _ = remove(&self.directory, &new_name(&self.log));
        }
    }
}

/// The files below `directory` with these inode numbers, by what directories say. Walks the tree once, and not at all for none.
///
/// # Errors
/// Those of the backing filesystem.
pub fn find_inodes(directory: &Node, mut inos: HashSet<u64>) -> io::Result<HashMap<u64, Node>> {
    let (mut waiting, mut found) = (vec![directory.clone()], HashMap::new());
    while let Some(directory) = waiting.pop().filter(|_| !inos.is_empty()) {
        let (mut stream, mut position) = (directory.open_directory()?, 0);
        while let Some(entry) = stream.entry_at(position)? {
            position = entry.next_position;
            let is_link = entry.name == "." || entry.name == "..";
            let may_be_directory = entry.kind.is_none_or(|kind| kind == super::NodeKind::Directory);
            if !is_link && (inos.contains(&entry.ino) || may_be_directory) {
                let node = match directory.lookup(&entry.name) {
                    Ok(node) => node,
                    // Another filesystem that is mounted there is no part of the tree.
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::XDEV) => {
                        stream.advance();
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let stat = node.stat()?;
                match stat.kind {
                    super::NodeKind::File if inos.remove(&stat.ino) => _ = found.insert(stat.ino, node),
                    super::NodeKind::Directory => waiting.push(node),
                    _ => {}
                }
            }
            stream.advance();
        }
    }
    Ok(found)
}

fn new_name(log: &RedoLog) -> String {
    format!("{}.new", log.text())
}

fn remove(directory: &OwnedFd, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        // Nothing of ours is a directory.
        Err(Errno::ISDIR) => Ok(rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR)?),
        Err(error) => Err(error.into()),
    }
}
