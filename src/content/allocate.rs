//! `fallocate`: space for what will be written, and zeros in place of what was. `docs/FORMAT.md` section 6.

use std::ops::RangeInclusive;

use crate::format::config::Holes;
use crate::format::geometry::{
    MAX_PLAIN_SIZE, PAGE_SIZE, PAYLOAD, PAYLOAD_LEN, PageIndex, PlainOffset, last_page, pages_of,
};

use super::file::DiskShape;
use super::ranges::Range;
use super::{Content, ContentError};

/// Pages of zeros written at a time where holes are denied.
const ZERO_PAGES: usize = 256;

impl Content {
    /// Gives the range space on the disk. With `grow` the file then reaches to its end at least.
    ///
    /// # Errors
    /// [`ContentError`]; [`ContentError::NoKey`] if the file is to grow and needs keys first.
    pub fn allocate(&self, offset: u64, len: u64, grow: bool) -> Result<(), ContentError> {
        let (offset, end, pages) = span(offset, len)?;
        let (_lock, shape) = self.lock_for_change(|shape| shape.end_range(offset.page().0))?;
        let grows = grow && end > shape.size;
        if grows {
            self.ledger.check_gap(shape.size.0..end.0)?;
            self.pay_end()?;
        }
        if let Some(pages) = pages {
            let first = PageIndex(*pages.start()).disk().0;
            self.file.allocate(first, PageIndex(*pages.end()).disk().0 + PAGE_SIZE - first)?;
        }
        if grows {
            self.grow(end).inspect_err(|_| self.shrink_back(shape.size))?;
            self.ledger.add_gap(shape.size.0..end.0);
        }
        Ok(())
    }

    /// Makes the range zeros, as far as the file reaches. Whole pages become holes where the volume has holes; with `keep`
    /// they keep their space on the disk.
    ///
    /// # Errors
    /// [`ContentError`]. What was not reached is as it was.
    pub fn zero(&self, offset: u64, len: u64, keep: bool) -> Result<(), ContentError> {
        let (offset, end, pages) = span(offset, len)?;
        let Some(pages) = pages else { return Ok(()) };
        let range = Range { first: *pages.start(), last: *pages.end() };
        let (_lock, shape) = self.lock_for_change(|shape| match end < shape.size {
            true => range,
            false => shape.end_range(range.first),
        })?;
        self.ledger.check(offset.0..end.0)?;
        let end = end.min(shape.size);
        if shape.disk == DiskShape::Headerless || offset >= end {
            return Ok(());
        }
        // The last page carries the end mark and its length: it never becomes a hole.
        let last = last_page(shape.size).map_or(0, |last| last.0);
        let whole = PageIndex(offset.0.div_ceil(PAYLOAD))..PageIndex((end.0 / PAYLOAD).min(last));
        if self.rules.holes == Holes::Deny || whole.is_empty() {
            return self.write_zeros(offset, end);
        }
        self.write_zeros(offset, whole.start.start())?;
        self.write_zeros(whole.end.start(), end)?;
        let (disk, len) = (whole.start.disk().0, whole.end.disk().0 - whole.start.disk().0);
        self.file.punch(disk, len)?;
        if keep {
            self.file.allocate(disk, len)?;
        }
        Ok(())
    }

    /// Writes sealed zeros within the file. Needs the exclusive lock of their pages.
    fn write_zeros(&self, start: PlainOffset, end: PlainOffset) -> Result<(), ContentError> {
        let len = usize::try_from(end.0.saturating_sub(start.0)).unwrap_or(usize::MAX);
        let zeros = vec![0; len.min(ZERO_PAGES * PAYLOAD_LEN)];
        let mut at = start;
        while at < end {
            let stop = end.0.min((at.page().0 + ZERO_PAGES as u64) * PAYLOAD);
            let len = usize::try_from(stop - at.0).map_err(|_| ContentError::TooLarge)?;
            self.overwrite(at, &zeros[..len])?;
            at = PlainOffset(stop);
        }
        Ok(())
    }
}

/// The checked range: its start, its end, and its pages.
fn span(offset: u64, len: u64) -> Result<(PlainOffset, PlainOffset, Option<RangeInclusive<u64>>), ContentError> {
    let end = offset.checked_add(len).filter(|end| *end <= MAX_PLAIN_SIZE).ok_or(ContentError::TooLarge)?;
    Ok((PlainOffset(offset), PlainOffset(end), pages_of(PlainOffset(offset), len)))
}
