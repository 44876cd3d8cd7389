//! The pages of one sealed file, opened in runs.

use std::io;
use std::ops::Range;

use crate::content::{ContentError, Opened, Rules, open_page};
use crate::crypto::{AeadSession, FileKeys};
use crate::format::config::{End, Holes};
use crate::format::geometry::{
    DiskOffset, ImpossibleSize, PAGE_LEN, PAGE_SIZE, PAYLOAD_LEN, PageIndex, PlainOffset, SizeHint, size_hint,
    size_with_last_page,
};
use crate::format::page::{Page, Payload, Trailer, is_hole};
use crate::storage::{DiskFile, RawFile};

use super::finding::{Kind, Severity};

/// Pages that are read at a time.
const RUN: u64 = 64;
/// A page that a writer may be writing is read again so often.
const TORN: usize = 3;

/// A file whose header gave its keys.
pub(super) struct Sealed {
    pub(super) file: DiskFile,
    pub(super) keys: FileKeys,
    pub(super) rules: Rules,
    /// How many whole pages there are.
    pub(super) pages: u64,
}

/// What a page of zeros is where there must be none.
pub(super) const HOLE: &str =
    "the page is a hole, and this volume denies holes: it was punched or never reached the disk";

/// What is wrong with a page.
pub(super) struct Fault {
    pub(super) page: u64,
    pub(super) severity: Severity,
    pub(super) kind: Kind,
    pub(super) what: String,
}

/// One page's plaintext, wiped when dropped.
pub(super) struct Plain(Box<Payload>);

impl Plain {
    pub(super) fn new() -> Self {
        Self(Box::new([0; PAYLOAD_LEN]))
    }

    pub(super) fn bytes(&self) -> &Payload {
        &self.0
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.0.fill(0);
        std::hint::black_box(&self.0);
    }
}

/// How many whole pages a file of this size has.
pub(super) fn whole_pages(size: u64) -> u64 {
    (size / PAGE_SIZE).saturating_sub(1)
}

/// The plain size as the size on disk tells it, or the trailer of the last page, which is not authenticated here; none if
/// that is no trailer.
///
/// # Errors
/// [`ImpossibleSize`], or those of reading.
pub(super) fn claimed_size(file: &DiskFile, size: u64) -> Result<Option<PlainOffset>, SizeError> {
    match size_hint(DiskOffset(size))? {
        SizeHint::Known(size) => Ok(Some(size)),
        SizeHint::AskLastPage(last) => Ok(claimed_len(file, last)?.map(|len| size_with_last_page(last, len))),
    }
}

/// The length that the page claims; of a hole it is all of it.
pub(super) fn claimed_len(file: &DiskFile, last: PageIndex) -> io::Result<Option<usize>> {
    let mut page: Page = [0; PAGE_LEN];
    if file.read_at(&mut page, last.disk().0)? < PAGE_LEN {
        return Ok(None);
    }
    Ok(if is_hole(&page) { Some(PAYLOAD_LEN) } else { Trailer::parse(&page).ok().map(|trailer| trailer.len.into()) })
}

/// Why there is no plain size.
#[derive(Debug, thiserror::Error)]
pub(super) enum SizeError {
    #[error(transparent)]
    Impossible(#[from] ImpossibleSize),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Sealed {
    /// The pages that take space on the disk, in runs. What lies between them are holes, of which a file may have more than anybody
    /// can read.
    pub(super) fn data(&self) -> io::Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut at = PAGE_SIZE;
        while let Some(bytes) = self.file.data_from(at)? {
            let run = bytes.start / PAGE_SIZE - 1..(bytes.end.div_ceil(PAGE_SIZE) - 1).min(self.pages);
            if run.start >= self.pages {
                break;
            }
            match runs.last_mut() {
                // Blocks of the backing filesystem may be smaller than pages.
                Some(last) if last.end >= run.start => last.end = run.end,
                _ => runs.push(run),
            }
            if bytes.end <= at {
                break;
            }
            at = bytes.end;
        }
        Ok(runs)
    }

    /// The runs of pages that are not in `data`.
    pub(super) fn holes(&self, data: &[Range<u64>]) -> Vec<Range<u64>> {
        let starts = std::iter::once(0).chain(data.iter().map(|run| run.end));
        let ends = data.iter().map(|run| run.start).chain([self.pages]);
        starts.zip(ends).map(|(start, end)| start..end).filter(|hole| !hole.is_empty()).collect()
    }

    /// Opens the pages of `range` one after the other and hands each to `visit`: its plaintext, or what is wrong with it.
    /// A page that a volume's rules refuse although it opens comes as both.
    pub(super) fn visit(&self, range: Range<u64>, mut visit: impl FnMut(u64, Option<&Payload>, Option<Fault>)) {
        let mut session = self.keys.session();
        let mut plain = Plain::new();
        let len = usize::try_from(RUN.min(range.end.saturating_sub(range.start))).unwrap_or(1);
        let mut disk = vec![0; len * PAGE_LEN];
        let mut first = range.start;
        while first < range.end {
            let count = usize::try_from((range.end - first).min(RUN)).unwrap_or(1);
            let read = self.file.read_at(&mut disk[..count * PAGE_LEN], PageIndex(first).disk().0);
            // What cannot be read as a whole is read page by page.
            let whole = read.map_or(0, |read| read / PAGE_LEN);
            for (page, at) in (first..).zip(0..count) {
                let buffer = disk[at * PAGE_LEN..].first_chunk_mut::<PAGE_LEN>();
                let Some(buffer) = buffer else { continue };
                let opened = if at < whole {
                    self.open(&mut session, page, buffer, &mut plain)
                } else {
                    self.read_again(page, buffer).and_then(|()| self.open(&mut session, page, buffer, &mut plain))
                };
                match opened {
                    Ok(opened) => visit(page, Some(plain.bytes()), self.judge(page, opened)),
                    Err(fault) => visit(page, None, Some(fault)),
                }
            }
            first += count as u64;
        }
    }

    fn read_again(&self, page: u64, buffer: &mut Page) -> Result<(), Fault> {
        match self.file.read_at(buffer, PageIndex(page).disk().0) {
            Ok(PAGE_LEN) => Ok(()),
            Ok(_) => Err(damage(page, Kind::Page, "the file ends before the page: it was cut".to_owned())),
            Err(error) => {
                let what = format!("the page cannot be read: {error}");
                Err(Fault { page, severity: Severity::Io, kind: Kind::Io, what })
            }
        }
    }

    fn open(
        &self,
        session: &mut AeadSession<'_>,
        page: u64,
        buffer: &mut Page,
        plain: &mut Plain,
    ) -> Result<Opened, Fault> {
        let mut attempt = 0;
        loop {
            match open_page(session, PageIndex(page), buffer, &mut plain.0[..]) {
                Ok(opened) => return Ok(opened),
                Err(_) if attempt < TORN => {
                    attempt += 1;
                    self.read_again(page, buffer)?;
                }
                Err(ContentError::BadTrailer { .. }) => {
                    let what = "the page has a trailer of another format version: use a newer kmsfs";
                    return Err(damage(page, Kind::Page, what.to_owned()));
                }
                Err(_) => {
                    let what = "the page does not authenticate: it was changed or moved on disk";
                    return Err(damage(page, Kind::Page, what.to_owned()));
                }
            }
        }
    }

    /// What the volume's rules say about a page that opened.
    fn judge(&self, page: u64, opened: Opened) -> Option<Fault> {
        match opened {
            Opened::Hole if self.rules.holes == Holes::Deny => Some(damage(page, Kind::Hole, HOLE.to_owned())),
            Opened::Sealed(trailer) if page + 1 == self.pages && !trailer.last => {
                let what = "the end of the file is missing after the page: it was cut off";
                let severity = if self.rules.end == End::Strict { Severity::Damage } else { Severity::Amiss };
                Some(Fault { page, severity, kind: Kind::EndMark, what: what.to_owned() })
            }
            _ => None,
        }
    }
}

fn damage(page: u64, kind: Kind, what: String) -> Fault {
    Fault { page, severity: Severity::Damage, kind, what }
}
