//! The file of an audit log: appended to, never changed, by one process at a time.
//!
//! Invariants: what is appended is durable when [`LogFile::append`] returns; after a write that failed, what the file holds
//! beyond its last whole line is cut off, or, where that is not possible, known and told by the next line; a file that was
//! moved away is left alone, and the log goes on in a new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::record::{Line, MAX_LINE};

/// Why a file cannot be an audit log.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened or read.
    #[error("the audit log {path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another process writes it.
    #[error("the audit log {0} is in use by another mount: each needs one of its own")]
    InUse(PathBuf),
    /// It is something else.
    #[error("the audit log {0} is not a file of its own")]
    NotAFile(PathBuf),
    /// What is in it is no audit log.
    #[error("{0} is not an audit log: its last line is no record")]
    NotALog(PathBuf),
}

/// What came of appending.
#[derive(Debug)]
pub(super) struct Failure {
    /// Bytes of whole lines that are in the file nevertheless, durable or not.
    pub(super) kept: usize,
    pub(super) error: io::Error,
}

/// An open log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
    /// Bytes up to the end of the last whole line.
    len: u64,
    /// Bytes after that which could not be cut off.
    torn: u64,
    /// Where the last whole line begins.
    last_line: Vec<u8>,
    /// A file longer than this is set aside.
    most: Option<u64>,
    /// It was not there before.
    new: bool,
}

impl LogFile {
    /// Opens the log at `path`, or makes it with mode 0600. One longer than `most` bytes is set aside when it has become so.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open(path: &Path, most: Option<u64>) -> Result<Self, FileError> {
        let failed = |error| FileError::Io { path: path.to_owned(), error };
        let (file, new) = open_file(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            return Err(FileError::NotAFile(path.to_owned()));
        }
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error.into() {
            error if io::Error::kind(&error) == io::ErrorKind::WouldBlock => FileError::InUse(path.to_owned()),
            error => failed(error),
        })?;
        if new {
            sync_parent(path).map_err(failed)?;
        }
        let (len, last_line) = last_line(&file, found.len()).map_err(failed)?;
        if !last_line.is_empty() && Line::parse(&last_line).is_none() {
            return Err(FileError::NotALog(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), file, len, torn: found.len() - len, last_line, most, new })
    }

    /// Leaves nothing behind that was made for a log that never began.
    pub fn discard(self) {
        if self.new && self.len + self.torn == 0 {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// The last whole line; empty if there is none.
    pub(super) fn last_line(&self) -> &[u8] {
        &self.last_line
    }

    /// Bytes after the last whole line, which the next line must tell of.
    pub(super) fn torn(&self) -> u64 {
        self.torn
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Appends whole lines and makes them durable. The first of them has the number `seq`, which is in the name of a file that
    /// is set aside before it.
    pub(super) fn append(&mut self, lines: &[u8], seq: u64) -> Result<(), Failure> {
        let nothing = |error| Failure { kept: 0, error };
        self.follow().map_err(nothing)?;
        self.set_aside_if_long(lines.len(), seq).map_err(nothing)?;
        // What could not be cut off becomes a line of its own, of which the next one tells.
        let prefix: &[u8] = if self.torn > 0 { b"\n" } else { b"" };
        let (written, error) = write_as_far_as_possible(&mut self.file, &[prefix, lines].concat());
        let of_lines = written.saturating_sub(prefix.len());
        let kept = lines[..of_lines].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let mut rest = self.torn + written as u64;
        if kept > 0 {
            self.len += self.torn + (prefix.len() + kept) as u64;
            rest = (of_lines - kept) as u64;
            self.torn = 0;
        }
        let Some(error) = error else {
            return self.file.sync_data().map_err(|error| Failure { kept, error });
        };
        self.torn = if rest == 0 || self.file.set_len(self.len).is_ok() { 0 } else { rest };
        Err(Failure { kept, error })
    }

    /// Whether the file at the path is still the one that is open; else goes on in a new one.
    fn follow(&mut self) -> io::Result<()> {
        let open = self.file.metadata()?;
        match fs::symlink_metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (open.dev(), open.ino()) => {
                if open.len() < self.len + self.torn {
                    // Copied and cut to nothing, as `logrotate` may do it.
                    (self.len, self.torn) = (open.len(), 0);
                }
                Ok(())
            }
            Ok(_) => self.begin_new(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.begin_new(),
            Err(error) => Err(error),
        }
    }

    fn begin_new(&mut self) -> io::Result<()> {
        let next = Self::open(&self.path, self.most).map_err(io::Error::other)?;
        if next.len > 0 || next.torn > 0 {
            return Err(io::Error::other("the file that took its place is not empty: move it away"));
        }
        *self = next;
        Ok(())
    }

    fn set_aside_if_long(&mut self, more: usize, seq: u64) -> io::Result<()> {
        let Some(most) = self.most else { return Ok(()) };
        if self.len == 0 || self.len + more as u64 <= most {
            return Ok(());
        }
        let mut aside = self.path.clone().into_os_string();
        aside.push(format!(".{seq:012}"));
        let aside = PathBuf::from(aside);
        if fs::symlink_metadata(&aside).is_ok() {
            return Err(io::Error::other(format!("{} is in the way", aside.display())));
        }
        fs::rename(&self.path, aside)?;
        // Makes the directory durable too. If it fails, the next attempt finds no file at the path.
        self.begin_new()
    }
}

/// The file, and whether it is new.
fn open_file(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).map_err(io::Error::other)?;
    options.read(true).append(true).mode(0o600).custom_flags(flags);
    match options.clone().create_new(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok((options.open(path)?, false)),
        made => Ok((made?, true)),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

/// Where the last whole line of a file ends, and that line.
fn last_line(mut file: &File, len: u64) -> io::Result<(u64, Vec<u8>)> {
    let window = len.min(4 * MAX_LINE as u64);
    file.seek(SeekFrom::Start(len - window))?;
    let mut end = Vec::new();
    file.take(window).read_to_end(&mut end)?;
    let Some(last) = end.iter().rposition(|byte| *byte == b'\n') else {
        return if window == len { Ok((0, Vec::new())) } else { Err(io::Error::other("it has no lines at its end")) };
    };
    let begin = end[..last].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    Ok((len - window + last as u64 + 1, end[begin..last].to_vec()))
}

/// How much could be written, and why not all of it.
fn write_as_far_as_possible(file: &mut File, bytes: &[u8]) -> (usize, Option<io::Error>) {
    let mut written = 0;
    while written < bytes.len() {
        match file.write(&bytes[written..]) {
            Ok(0) => return (written, Some(io::ErrorKind::WriteZero.into())),
            Ok(more) => written += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (written, Some(error)),
        }
    }
    (written, None)
}
