//! An in-memory twin of a backing file, for tests of the layers above: it keeps a log of what was done, and can be full.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::RawFile;

/// A file in memory that can be made to run out of space.
#[derive(Default)]
pub struct MemoryFile(Mutex<State>);

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    capacity: Option<usize>,
    keeps_size: bool,
    tears_shrinks: bool,
    fails_writes: bool,
    log: Vec<Recorded>,
}

/// A change, and the bytes that it brought: those of a write, as far as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// What was done.
    pub change: Change,
    /// What was written; nothing for other changes.
    pub bytes: Vec<u8>,
}

/// What was done to the file, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Bytes were written.
    Write {
        /// Where.
        offset: u64,
        /// How many.
        len: u64,
    },
    /// The size was set.
    Size(u64),
    /// A range became a hole.
    Punch {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// A range was pushed out to the disk.
    Push {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// No page of the range is dirty any more.
    Clean {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Sending a range to the disk was begun.
    Start {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// The content was made durable.
    Sync,
}

impl MemoryFile {
    /// A file with these bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(State { bytes, ..State::default() }))
    }

    /// Lets every change of the size by itself fail with `EIO`, until told otherwise.
    pub fn keep_size(&self, keeps: bool) {
        self.state().keeps_size = keeps;
    }

    /// Lets every shrink take one page and fail with `EDQUOT`, as btrfs does at its quota, until told otherwise.
    pub fn tear_shrinks(&self, tears: bool) {
        self.state().tears_shrinks = tears;
    }

    /// Lets every write fail with `ENOSPC`, until told otherwise.
    pub fn fail_writes(&self, fails: bool) {
        self.state().fails_writes = fails;
    }

    /// Lets the file grow to `capacity` bytes; a write beyond it writes what fits and fails with `ENOSPC`.
    pub fn limit(&self, capacity: Option<usize>) {
        self.state().capacity = capacity;
    }

    /// The content.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.state().bytes.clone()
    }

    /// What was done since the last call of this or of [`Self::take_history`].
    #[must_use]
    pub fn take_log(&self) -> Vec<Change> {
        self.take_history().into_iter().map(|recorded| recorded.change).collect()
    }

    /// What was done since the last call of this or of [`Self::take_log`], with the bytes.
    #[must_use]
    pub fn take_history(&self) -> Vec<Recorded> {
        std::mem::take(&mut self.state().log)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn record(&mut self, change: Change) {
        self.log.push(Recorded { change, bytes: Vec::new() });
    }
}

fn position(offset: u64) -> io::Result<usize> {
    usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge.into())
}

impl RawFile for MemoryFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let state = self.state();
        let rest = state.bytes.get(position(offset)?..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.state();
        if state.fails_writes {
            return Err(rustix::io::Errno::NOSPC.into());
        }
        let start = position(offset)?;
        let end = start + bytes.len();
        let allowed = end.min(state.capacity.unwrap_or(end).max(state.bytes.len()));
        let written = &bytes[..allowed.saturating_sub(start)];
        let change = Change::Write { offset, len: written.len() as u64 };
        state.log.push(Recorded { change, bytes: written.to_vec() });
        if allowed > start {
            let len = state.bytes.len().max(allowed);
            state.bytes.resize(len, 0);
            state.bytes[start..allowed].copy_from_slice(written);
        }
        if allowed < end { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.state().bytes.len() as u64)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        let mut state = self.state();
        if state.keeps_size {
            return Err(rustix::io::Errno::IO.into());
        }
        let (len, torn) = (position(size)?, state.bytes.len().saturating_sub(4096));
        if state.tears_shrinks && len < torn {
            state.record(Change::Size(torn as u64));
            state.bytes.truncate(torn);
            return Err(rustix::io::Errno::DQUOT.into());
        }
        state.record(Change::Size(size));
        state.bytes.resize(len, 0);
        Ok(())
    }

    fn set_size_quietly(&self, size: u64) -> io::Result<()> {
        self.set_size(size)
    }

    fn allocate(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.state();
        state.record(Change::Punch { offset, len });
        let end = position(offset + len)?.min(state.bytes.len());
        if let Some(range) = state.bytes.get_mut(position(offset)?..end) {
            range.fill(0);
        }
        Ok(())
    }

    fn sync(&self, _metadata: bool) -> io::Result<()> {
        self.state().record(Change::Sync);
        Ok(())
    }

    fn clean(&self, offset: u64, len: u64) {
        self.state().record(Change::Clean { offset, len });
    }

    fn start_writeback(&self, offset: u64, len: u64) {
        self.state().record(Change::Start { offset, len });
    }

    fn push_out(&self, offset: u64, len: u64) -> io::Result<()> {
        self.state().record(Change::Push { offset, len });
        Ok(())
    }
}
