//! Writing: lock, prepare the end if it moves, seal every page of the request, one write. `docs/FORMAT.md` section 6.

use std::ops::RangeInclusive;

use crate::crypto::random_array;
use crate::format::config::Holes;
use crate::format::geometry::{
    PAGE_LEN, PAYLOAD, PAYLOAD_LEN, PageIndex, PlainOffset, aligned_size, last_page, last_page_len, page_count,
    pages_of, settled_size,
};
use crate::format::page::{self, Page, Payload, Trailer};

use super::buffers::{Plain, with_disk_buffer};
use super::file::{DiskShape, Tail};
use super::pages;
use super::ranges::Range;
use super::settle::set_end;
use super::{Content, ContentError};

/// Pages of zeros written at a time where holes are denied.
const ZERO_BATCH: u64 = 256;

/// Edges of a request that fits in so many pages are read together.
const CLOSE_EDGES: usize = 8;

/// One request: these bytes at this offset, and the size of the file before and after.
struct Request<'s> {
    offset: PlainOffset,
    bytes: &'s [u8],
    pages: RangeInclusive<u64>,
    old_size: PlainOffset,
    new_size: PlainOffset,
    /// What the last page held, if the file grows and it is among `pages`.
    old_last: Option<Plain>,
}

impl Content {
    /// Writes `bytes` at `offset`; the file grows if they end past its end. A failed write that would have grown the file
    /// leaves its size as it was, and each page of it old or new. Of a failed write into a gap nothing stays behind the gap.
    ///
    /// # Errors
    /// [`ContentError`]; [`ContentError::NoKey`] if the file needs keys first.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), ContentError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let offset = PlainOffset(offset);
        let pages = pages_of(offset, bytes.len() as u64).ok_or(ContentError::TooLarge)?;
        let end = PlainOffset(offset.0 + bytes.len() as u64);
        let in_place = Range { first: *pages.start(), last: *pages.end() };
        let (lock, shape) = self.lock_for_change(|shape| match end <= shape.size {
            true => in_place,
            false => shape.end_range(in_place.first),
        })?;
        let written = match end <= shape.size {
            true => self.overwrite(offset, bytes),
            false => self.write_at_the_end(shape.size, offset, bytes),
        };
        let Err(error) = written else {
            self.ledger.stored(offset.0..end.0);
            return Ok(());
        };
        // Under the lock: whoever comes next must know.
        let gap = self.ledger.lose(offset.0..end.0, self.shape().size.0, error.os_error());
        drop(lock);
        if let Some(Err(why)) = gap.map(|start| self.take_back(PlainOffset(start))) {
            // What is lost stays inside the file, where nobody can read it.
            tracing::debug!("what lies behind lost bytes cannot be cut: {why}");
        }
        Err(error)
    }

    /// A write that moves the end; what lies between the old one and its begin becomes a hole. If it fails, the end is put back.
    fn write_at_the_end(&self, size: PlainOffset, offset: PlainOffset, bytes: &[u8]) -> Result<(), ContentError> {
        self.ledger.check_gap(size.0..offset.0)?;
        self.pay_end()?;
        let grown = self.prepare_to_grow(offset).and_then(|()| self.extend(offset, bytes));
        grown.inspect_err(|_| self.shrink_back(size))?;
        if size < offset {
            self.ledger.add_gap(size.0..offset.0);
        }
        Ok(())
    }

    /// What was to be written there, is not stored, because the write never came this far.
    ///
    /// # Errors
    /// [`ContentError`] if something that was stored behind it has to go and cannot: it is lost all the same.
    pub fn lose(&self, range: std::ops::Range<u64>) -> Result<(), ContentError> {
        let (lock, shape) = self.lock_for_change(|shape| shape.end_range(PlainOffset(range.start).page().0))?;
        let gap = self.ledger.lose(range, shape.size.0, None);
        drop(lock);
        gap.map_or(Ok(()), |start| self.take_back(PlainOffset(start)))
    }

    /// Cuts the file where a gap begins that was never filled. What is cut is lost.
    fn take_back(&self, start: PlainOffset) -> Result<(), ContentError> {
        let (_lock, shape) = self.lock_for_change(|shape| shape.end_range(start.page().0.saturating_sub(1)))?;
        if shape.size <= start {
            return Ok(());
        }
        self.ledger.lose(start.0..shape.size.0, start.0, None);
        // Where there is no space for a clean end, the disk size alone says where it is.
        self.shrink_back(start);
        self.ledger.end_at(start.0);
        Ok(())
    }

    /// A write within the file. Needs the exclusive lock of its pages.
    pub(super) fn overwrite(&self, offset: PlainOffset, bytes: &[u8]) -> Result<(), ContentError> {
        let pages = pages_of(offset, bytes.len() as u64).ok_or(ContentError::TooLarge)?;
        let size = self.shape().size;
        self.write_pages(&Request { offset, bytes, pages, old_size: size, new_size: size, old_last: None })
    }

    /// Takes back what a failed change has grown the file by.
    pub(super) fn shrink_back(&self, size: PlainOffset) {
        if self.shape().size > size && self.cut(size).is_err() {
            self.owe_end(size);
        }
    }

    /// Neither the old nor the new end could be made. The file ends at `size` all the same: the disk size alone will say so,
    /// now or before anything is believed of it again.
    pub(super) fn owe_end(&self, size: PlainOffset) {
        let disk = match self.shape().disk {
            DiskShape::Headerless => 0,
            DiskShape::Settled | DiskShape::Aligned => settled_size(size).0,
        };
        if disk > 0 {
            self.set_shape(size, DiskShape::Settled, Tail::Unknown);
        }
        self.ledger.owe(set_end(self.file.as_ref(), disk).is_err().then_some(disk));
    }

    /// Gives the file the disk size that it is owed, if it is. Needs the exclusive lock of the end.
    pub(super) fn pay_end(&self) -> Result<(), ContentError> {
        if let Some(disk) = self.ledger.owed() {
            set_end(self.file.as_ref(), disk)?;
            self.ledger.owe(None);
        }
        Ok(())
    }

    /// Makes the end ready to move to a write at `start`. Needs the exclusive lock of the end.
    fn prepare_to_grow(&self, start: PlainOffset) -> Result<(), ContentError> {
        if self.shape().disk == DiskShape::Headerless && start.page().0 > 0 {
            self.write_header()?;
        }
        self.align()?;
        if self.rules.holes == Holes::Deny {
            self.fill_with_zeros(start.page().start())?;
        }
        Ok(())
    }

    /// Puts a header on a file that has none, before its first page comes. A write that begins in page 0 brings its own.
    pub(super) fn write_header(&self) -> Result<(), ContentError> {
        let header = self.new_header()?;
        self.cut_junk()?;
        if let Err(error) = self.file.write_at(&header[..], 0) {
            let _ = self.file.set_size(0);
            return Err(error.into());
        }
        self.set_shape(PlainOffset(0), DiskShape::Aligned, Tail::Clean);
        Ok(())
    }

    /// What lies in a headerless file never belonged to a file that opens.
    fn cut_junk(&self) -> Result<(), ContentError> {
        if self.file.size()? > 0 {
            self.file.set_size(0)?;
        }
        Ok(())
    }

    /// Writes sealed zeros from the end of the file up to `stop`. Needs a header and the exclusive lock of the end.
    pub(super) fn fill_with_zeros(&self, stop: PlainOffset) -> Result<(), ContentError> {
        let zeros = [0; PAYLOAD_LEN];
        let mut batch = Vec::new();
        loop {
            let old = self.shape().size;
            if old >= stop {
                return Ok(());
            }
            let end = stop.0.min((old.page().0 + ZERO_BATCH) * PAYLOAD);
            let len = usize::try_from(end - old.0).map_err(|_| ContentError::TooLarge)?;
            if len <= zeros.len() {
                self.extend(old, &zeros[..len])?;
            } else {
                batch.resize(len, 0);
                self.extend(old, &batch)?;
            }
        }
    }

    /// A write that moves the end; the end is aligned and clean. If it fails, the end is put back.
    fn extend(&self, offset: PlainOffset, bytes: &[u8]) -> Result<(), ContentError> {
        let old_size = self.shape().size;
        let pages = pages_of(offset, bytes.len() as u64).ok_or(ContentError::TooLarge)?;
        let old_last = self.old_last_page(old_size, &pages)?;
        let new_size = PlainOffset(offset.0 + bytes.len() as u64);
        let request = Request { offset, bytes, pages, old_size, new_size, old_last };
        let result = self.write_pages(&request);
        match result {
            Ok(()) => self.set_shape(new_size, DiskShape::Aligned, Tail::Clean),
            Err(_) => self.put_back(&request),
        }
        result
    }

    /// The content of the last page, if it is among `pages`.
    fn old_last_page(&self, size: PlainOffset, pages: &RangeInclusive<u64>) -> Result<Option<Plain>, ContentError> {
        let Some(last) = last_page(size).filter(|last| pages.contains(&last.0)) else { return Ok(None) };
        let mut old = Plain::zeros();
        self.open_page(last, &mut old[..])?;
        Ok(Some(old))
    }

    /// Undoes a failed extension: cuts what it added, and puts the last page's length back.
    fn put_back(&self, request: &Request<'_>) {
        let headerless = self.shape().disk == DiskShape::Headerless;
        let disk = if headerless { 0 } else { aligned_size(request.old_size).0 };
        let cut = self.file.set_size(disk).map_err(ContentError::from);
        let undone = match (&request.old_last, last_page(request.old_size)) {
            (Some(old), Some(last)) => {
                cut.and_then(|()| self.write_page(last, Trailer::last(last_page_len(request.old_size)), old))
            }
            _ => cut,
        };
        if undone.is_err() {
            self.owe_end(request.old_size);
        }
    }

    /// Seals and writes one page in place.
    pub(super) fn write_page(&self, index: PageIndex, trailer: Trailer, plain: &Payload) -> Result<(), ContentError> {
        let mut disk: Page = [0; PAGE_LEN];
        pages::seal(&mut self.keys()?.session(), &random_array(), index, trailer, plain, &mut disk);
        self.file.clean(index.disk().0, PAGE_LEN as u64);
        Ok(self.file.write_at(&disk, index.disk().0)?)
    }

    /// Seals every page of the request into one buffer and writes it, with the header in front if the file has none. Pages that
    /// were written and may set out for the disk meanwhile go there first: half old, half new, none of them opens.
    fn write_pages(&self, request: &Request<'_>) -> Result<(), ContentError> {
        let header = match self.shape().disk {
            DiskShape::Headerless => Some(self.new_header()?),
            DiskShape::Settled | DiskShape::Aligned => None,
        };
        let lead = if header.is_some() { PAGE_LEN } else { 0 };
        let (first, last) = (PageIndex(*request.pages.start()), *request.pages.end());
        let count = usize::try_from(last - first.0 + 1).map_err(|_| ContentError::TooLarge)?;
        with_disk_buffer(lead + count * PAGE_LEN, |disk| {
            if let Some(header) = &header {
                self.cut_junk()?;
                disk[..lead].copy_from_slice(&header[..]);
            }
            self.seal_request(request, &mut disk[lead..])?;
            let existing = page_count(request.old_size).min(last + 1).saturating_sub(first.0);
            if existing > 0 {
                self.file.clean(first.disk().0, existing * PAGE_LEN as u64);
            }
            let offset = first.disk().0 - lead as u64;
            self.file.write_at(disk, offset)?;
            if self.rhythm.write() {
                self.file.start_writeback(offset, disk.len() as u64);
            }
            Ok(())
        })
    }

    fn seal_request(&self, request: &Request<'_>, disk: &mut [u8]) -> Result<(), ContentError> {
        let mut edges = self.old_edges(request, disk)?;
        let mut session = self.keys()?.session();
        let base: [u8; 24] = random_array();
        let mut rest = request.bytes;
        let mut skip = request.offset.in_page();
        for ((k, index), page) in (0..).zip(request.pages.clone().map(PageIndex)).zip(pages::each_mut(disk)) {
            let (part, after) = rest.split_at(rest.len().min(PAYLOAD_LEN - skip));
            let (trailer, nonce) = (request.trailer_of(index), page::nonce(&base, k));
            if part.len() == PAYLOAD_LEN {
                pages::seal(&mut session, &nonce, index, trailer, part, page);
            } else {
                let mut whole = edges.take(index);
                whole[skip..skip + part.len()].copy_from_slice(part);
                pages::seal(&mut session, &nonce, index, trailer, &whole[..], page);
            }
            (rest, skip) = (after, 0);
        }
        Ok(())
    }

    /// What the pages at the edges of the request held, as far as the request leaves something of it. Two edges that lie
    /// close together are read at once, by way of `disk`.
    fn old_edges(&self, request: &Request<'_>, disk: &mut [u8]) -> Result<Edges, ContentError> {
        let (first, last) = (PageIndex(*request.pages.start()), PageIndex(*request.pages.end()));
        let mut edges = Edges::default();
        if let (Some(old), Some(at)) = (&request.old_last, last_page(request.old_size)) {
            edges.put(at, Plain::copy_of(old));
        }
        let missing = |index| request.leaves_part_of(index) && !edges.holds(index);
        let (wants_first, wants_last) = (missing(first), first != last && missing(last));
        if wants_first && wants_last && disk.len() <= CLOSE_EDGES * PAGE_LEN {
            self.read_pages(first, disk)?;
            let mut session = self.keys()?.session();
            for (index, page) in [(first, pages::each(disk).next()), (last, pages::each(disk).last())] {
                let mut old = Plain::zeros();
                page.map_or(Ok(()), |page| self.open_checked(&mut session, index, page, &mut old[..]))?;
                edges.put(index, old);
            }
            return Ok(edges);
        }
        for index in [(wants_first, first), (wants_last, last)].iter().filter(|(wants, _)| *wants).map(|(_, i)| *i) {
            let mut old = Plain::zeros();
            self.open_page(index, &mut old[..])?;
            edges.put(index, old);
        }
        Ok(edges)
    }
}

/// The old content of at most three pages: two edges, and the last page of a file that grows.
#[derive(Default)]
struct Edges(Vec<(PageIndex, Plain)>);

impl Edges {
    fn put(&mut self, index: PageIndex, old: Plain) {
        self.0.push((index, old));
    }

    fn holds(&self, index: PageIndex) -> bool {
        self.0.iter().any(|(at, _)| *at == index)
    }

    /// The page's old content; zeros if there was none.
    fn take(&mut self, index: PageIndex) -> Plain {
        let at = self.0.iter().position(|(at, _)| *at == index);
        at.map_or_else(Plain::zeros, |at| self.0.swap_remove(at).1)
    }
}

impl Request<'_> {
    /// Whether the page existed and the request does not cover all of it.
    fn leaves_part_of(&self, index: PageIndex) -> bool {
        let end = self.offset.0 + self.bytes.len() as u64;
        index.0 < page_count(self.old_size) && (index.start() < self.offset || end < index.end().0)
    }

    fn trailer_of(&self, index: PageIndex) -> Trailer {
        match last_page(self.new_size) {
            Some(last) if last == index => Trailer::last(last_page_len(self.new_size)),
            _ => Trailer::INNER,
        }
    }
}
