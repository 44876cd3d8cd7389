//! An in-memory twin of a backing file, for tests of the layers above.

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
    writes: u64,
}

impl MemoryFile {
    /// A file with these bytes.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Mutex::new(State { bytes, ..State::default() }))
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

    /// How many calls wrote to it.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.state().writes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        state.writes += 1;
        let start = position(offset)?;
        let end = start + bytes.len();
        let allowed = end.min(state.capacity.unwrap_or(end).max(state.bytes.len()));
        if allowed > start {
            let len = state.bytes.len().max(allowed);
            state.bytes.resize(len, 0);
            state.bytes[start..allowed].copy_from_slice(&bytes[..allowed - start]);
        }
        if allowed < end { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.state().bytes.len() as u64)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        let size = position(size)?;
        self.state().bytes.resize(size, 0);
        Ok(())
    }

    fn set_size_quietly(&self, size: u64) -> io::Result<()> {
        self.set_size(size)
    }

    fn sync(&self, _metadata: bool) -> io::Result<()> {
        Ok(())
    }

    fn await_writeback(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn push_out(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}
