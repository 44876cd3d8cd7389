//! Settling: letting the disk size carry the plain size again, once the content is durable.

use std::io;

use crate::format::geometry::{PAGE_SIZE, PlainOffset, settled_size};
use crate::storage::RawFile;

use super::file::DiskShape;
use super::{Content, ContentError};

/// Says that a file needs settling, and at which of its versions that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsettled(u64);

/// The disk size that tells the plain size by itself.
#[must_use]
pub fn settled(size: u64) -> u64 {
    settled_size(PlainOffset(size)).0
}

/// Gives a file the disk size `disk`. Whole pages go first: where a shrink to a size inside of a page fails (btrfs at its quota), the
/// rest of that page may be zeros by then, and the page still there.
///
/// # Errors
/// Those of the backing file.
pub fn set_end(file: &dyn RawFile, disk: u64) -> io::Result<()> {
    let whole = disk / PAGE_SIZE * PAGE_SIZE;
    if whole < disk && file.size()? > disk {
        file.set_size(whole)?;
    }
    file.set_size(disk)
}

impl Content {
    /// Whether the disk size does not tell the plain size.
    #[must_use]
    pub fn unsettled(&self) -> Option<Unsettled> {
        let shape = self.shape();
        let is_aligned = shape.disk == DiskShape::Aligned && shape.partial_len().is_some();
        (is_aligned || self.ledger.owed().is_some()).then_some(Unsettled(shape.version))
    }

    /// Settles the file, unless its end has moved since `found`. Everything written before `found` must be durable by
    /// now: the other order would leave a file of zeros after a power cut. Returns whether it did. If the disk refuses a step, the
    /// file is what it has become there.
    ///
    /// # Errors
    /// [`ContentError::Io`].
    pub fn settle(&self, found: Unsettled) -> Result<bool, ContentError> {
        let (_lock, shape) = self.lock_for_change(|shape| shape.end_range(u64::MAX))?;
        if shape.version != found.0 {
            return Ok(false);
        }
        self.pay_end()?;
        if shape.disk == DiskShape::Headerless {
            return Ok(false);
        }
        let settled = settled_size(shape.size);
        let result = self.file.set_size_quietly(settled.0);
        if result.is_ok() || self.file.size()? == settled.0 {
            self.set_shape(shape.size, DiskShape::Settled, shape.tail);
        }
        Ok(result.map(|()| true)?)
    }
}
