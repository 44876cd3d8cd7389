//! The bytes of one file, from one side to the other.

use crate::format::geometry::PAYLOAD_LEN;

use super::report::Progress;
use super::side::{OpenFile, Result, TransferError};

/// Bytes that are read at a time: whole pages.
pub(super) const CHUNK: usize = 256 * PAYLOAD_LEN;

/// Copies `size` bytes, and returns how many were no holes, which stay holes.
pub(super) fn copy_content(
    source: &impl OpenFile,
    target: &impl OpenFile,
    size: u64,
    progress: &Progress,
) -> Result<u64> {
    let mut moved = 0;
    let mut buffer = vec![0; CHUNK.min(usize::try_from(size).unwrap_or(CHUNK))];
    let mut at = 0;
    while at < size {
        let Some(data) = source.data_from(at)? else { break };
        at = data.start.max(at);
        while at < data.end.min(size) {
            let len = usize::try_from(data.end.min(size) - at).map_or(buffer.len(), |left| left.min(buffer.len()));
            let read = source.read_at(at, &mut buffer[..len])?;
            if read == 0 {
                return Err(TransferError::Changing);
            }
            target.write_at(at, &buffer[..read])?;
            at += read as u64;
            moved += read as u64;
            progress.moved(read as u64);
        }
    }
    target.set_size(size)?;
    Ok(moved)
}
