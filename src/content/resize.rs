//! Moving the end: align, shrink, grow. `docs/FORMAT.md` section 6.

use std::cmp::Ordering;

use crate::format::config::Holes;
use crate::format::geometry::{
    MAX_PLAIN_SIZE, PAGE_SIZE, PAYLOAD_LEN, PageIndex, PlainOffset, aligned_size, last_page, last_page_len,
    settled_size,
};
use crate::format::page::{Payload, Trailer};

use super::buffers::Plain;
use super::file::{DiskShape, HEADER_LEN, Tail};
use super::pages::Opened;
use super::{Content, ContentError};

impl Content {
    /// Sets the plain size: cuts the file, or adds zeros.
    ///
    /// # Errors
    /// [`ContentError`]; [`ContentError::NoKey`] if the file needs keys first.
    pub fn resize(&self, size: u64) -> Result<(), ContentError> {
        if size > MAX_PLAIN_SIZE {
            return Err(ContentError::TooLarge);
        }
        let size = PlainOffset(size);
        let first = last_page(size).map_or(0, |last| last.0);
        let (_lock, shape) = self.lock_for_change(|shape| shape.end_range(first))?;
        self.pay_end()?;
        match size.cmp(&shape.size) {
            Ordering::Equal => {}
            Ordering::Less => self.cut(size)?,
            Ordering::Greater => {
                self.ledger.check_gap(shape.size.0..size.0)?;
                self.grow(size).inspect_err(|_| self.shrink_back(shape.size))?;
                self.ledger.cut(size.0);
                self.ledger.add_gap(shape.size.0..size.0);
                return Ok(());
            }
        }
        self.ledger.cut(size.0);
        Ok(())
    }

    /// Makes the file shorter. Needs the exclusive lock from the new last page on.
    pub(super) fn cut(&self, size: PlainOffset) -> Result<(), ContentError> {
        let result = match last_page(size) {
            None => self.empty(),
            Some(last) => self.shrink(size, last),
        };
        // btrfs at its quota refuses a shrink when it has done a part of it: the old end is gone, and only the new one can be had.
        if result.is_err() && self.file.size()? < aligned_size(self.shape().size).0 {
            self.owe_end(size);
            return Ok(());
        }
        result
    }

    /// Gives a file without one its header now, so that a crash cannot leave it without.
    ///
    /// # Errors
    /// [`ContentError`]; [`ContentError::NoKey`] if the file needs keys first.
    pub fn ensure_header(&self) -> Result<(), ContentError> {
        let (_lock, shape) = self.lock_for_change(|shape| shape.end_range(0))?;
        if shape.disk == DiskShape::Headerless { self.write_header() } else { Ok(()) }
    }

    fn empty(&self) -> Result<(), ContentError> {
        self.file.set_size(HEADER_LEN)?;
        self.set_shape(PlainOffset(0), DiskShape::Aligned, Tail::Clean);
        Ok(())
    }

    /// The page that becomes the last one gets its new length and keeps its bytes, and the disk has it before the size
    /// changes: a crash leaves the old file whole, or the new one.
    fn shrink(&self, size: PlainOffset, last: PageIndex) -> Result<(), ContentError> {
        self.align()?;
        let mut old = Plain::zeros();
        let opened = self.open_page(last, &mut old[..])?;
        let len = last_page_len(size);
        if opened != Opened::Hole || len < PAYLOAD_LEN {
            self.write_page_before_the_size(last, Trailer::last(len), &old)?;
        }
        self.file.set_size(aligned_size(size).0)?;
        self.set_shape(size, DiskShape::Aligned, Tail::Unknown);
        Ok(())
    }

    /// Within the last page, and wherever holes are denied, growing is writing zeros. Past it only the disk size changes:
    /// pages that are not there read as zeros.
    pub(super) fn grow(&self, size: PlainOffset) -> Result<(), ContentError> {
        let old = *self.shape();
        if old.disk == DiskShape::Headerless {
            self.write_header()?;
        }
        self.align()?;
        if self.rules.holes == Holes::Deny || last_page(size) == last_page(old.size) {
            return self.fill_with_zeros(size);
        }
        self.file.set_size(settled_size(size).0)?;
        self.set_shape(size, DiskShape::Settled, Tail::Unknown);
        Ok(())
    }

    /// Makes the trailer of the last page tell the size: cleans that page past its length, and removes the tail that
    /// carries the remainder. Needs the exclusive lock of the end.
    pub(super) fn align(&self) -> Result<(), ContentError> {
        let shape = *self.shape();
        let (Some(len), Some(last)) = (shape.partial_len(), last_page(shape.size)) else { return Ok(()) };
        if shape.tail != Tail::Clean {
            self.clean_tail(last, len)?;
        }
        if shape.disk == DiskShape::Settled {
            self.file.set_size(aligned_size(shape.size).0)?;
        }
        if (shape.disk, shape.tail) != (DiskShape::Aligned, Tail::Clean) {
            self.set_shape(shape.size, DiskShape::Aligned, Tail::Clean);
        }
        Ok(())
    }

    /// After a crash the trailer may disagree with a disk size that carries the remainder, after growing the page may be a
    /// hole on disk, and after a shrink it still holds what was cut. The disk has the clean page before the size changes.
    fn clean_tail(&self, last: PageIndex, len: usize) -> Result<(), ContentError> {
        let mut plain = Plain::zeros();
        let told = self.open_page(last, &mut plain[..])?.len();
        if told != len || plain[len..].iter().any(|byte| *byte != 0) {
            plain[len..].fill(0);
            self.write_page(last, Trailer::last(len), &plain)?;
        }
        Ok(self.file.push_out(last.disk().0, PAGE_SIZE)?)
    }

    /// Writes a page and waits until the disk has taken it, so that no later change of the size overtakes it.
    fn write_page_before_the_size(
        &self,
        index: PageIndex,
        trailer: Trailer,
        plain: &Payload,
    ) -> Result<(), ContentError> {
        self.write_page(index, trailer, plain)?;
        Ok(self.file.push_out(index.disk().0, PAGE_SIZE)?)
    }
}
