//! Reading: map the range, one read, open, crop.

use crate::format::config::Holes;
use crate::format::geometry::{DiskOffset, MAX_PLAIN_SIZE, PAGE_LEN, PAYLOAD_LEN, PageIndex, PlainOffset, pages_of};
use crate::format::page::Page;

use super::buffers::{Plain, with_disk_buffer};
use super::pages;
use super::ranges::Range;
use super::{Content, ContentError};
use crate::crypto::AeadSession;

impl Content {
    /// Reads at `offset` into `plain` and returns how many bytes there were: fewer than asked for only at the end.
    ///
    /// # Errors
    /// [`ContentError`]; the content of `plain` must then not be used.
    pub fn read(&self, offset: u64, plain: &mut [u8]) -> Result<usize, ContentError> {
        // No file reaches further than the greatest size.
        let end = offset.saturating_add(plain.len() as u64).min(MAX_PLAIN_SIZE);
        let Some(asked) = pages_of(PlainOffset(offset), end.saturating_sub(offset)) else { return Ok(0) };
        let _lock = self.share(Range { first: *asked.start(), last: *asked.end() })?;
        self.ledger.check(offset..end)?;
        let left = self.size().saturating_sub(offset);
        let len = usize::try_from(left).map_or(plain.len(), |left| left.min(plain.len()));
        let Some(found) = pages_of(PlainOffset(offset), len as u64) else { return Ok(0) };
        let count = usize::try_from(found.end() - found.start() + 1).map_err(|_| ContentError::TooLarge)?;
        with_disk_buffer(count * PAGE_LEN, |disk| {
            self.read_pages(PageIndex(*found.start()), disk)?;
            self.open_into(PlainOffset(offset), disk, &mut plain[..len])
        })?;
        Ok(len)
    }

    /// The first plain range from `offset` on that may hold anything but zeros: whole pages, of which the last may reach past
    /// the end. `None` if the rest of the file is a hole. Where holes are denied everything is to be read.
    ///
    /// # Errors
    /// [`ContentError::Io`].
    pub fn data_from(&self, offset: u64) -> Result<Option<std::ops::Range<u64>>, ContentError> {
        let size = self.size();
        if offset >= size {
            return Ok(None);
        }
        if self.rules.holes == Holes::Deny {
            return Ok(Some(offset..size));
        }
        let first = PlainOffset(offset).page();
        let Some(disk) = self.file.data_from(first.disk().0)? else { return Ok(None) };
        let start = DiskOffset(disk.start).page_from(first);
        let end = DiskOffset(disk.end.saturating_sub(1)).page_from(first);
        let range = start.start().0.max(offset)..end.end().0.min(size);
        Ok(Some(range).filter(|range| !range.is_empty()))
    }

    /// Fills `disk` with the pages from `first` on.
    pub(super) fn read_pages(&self, first: PageIndex, disk: &mut [u8]) -> Result<(), ContentError> {
        let read = self.file.read_at(disk, first.disk().0)?;
        if read < disk.len() {
            return Err(ContentError::Cut { page: first.0 + (read / PAGE_LEN) as u64 });
        }
        Ok(())
    }

    /// Opens the pages in `disk`, the first of which holds `offset`, and puts what lies from `offset` on into `plain`.
    /// Whole pages are opened in place, the two at the edges by way of a payload.
    fn open_into(&self, offset: PlainOffset, disk: &[u8], plain: &mut [u8]) -> Result<(), ContentError> {
        let mut session = self.keys()?.session();
        let mut rest = plain;
        let mut skip = offset.in_page();
        for (index, page) in (offset.page().0..).map(PageIndex).zip(pages::each(disk)) {
            let len = rest.len().min(PAYLOAD_LEN - skip);
            let (part, after) = rest.split_at_mut(len);
            if len == PAYLOAD_LEN {
                self.open_checked(&mut session, index, page, part)?;
            } else {
                let mut whole = Plain::zeros();
                self.open_checked(&mut session, index, page, &mut whole[..])?;
                part.copy_from_slice(&whole[skip..skip + len]);
            }
            (rest, skip) = (after, 0);
        }
        Ok(())
    }

    pub(super) fn open_checked(
        &self,
        session: &mut AeadSession<'_>,
        index: PageIndex,
        page: &Page,
        plain: &mut [u8],
    ) -> Result<(), ContentError> {
        let opened = pages::open(session, index, page, plain).inspect_err(|error| self.count(error))?;
        self.check(index, opened)
    }
}
