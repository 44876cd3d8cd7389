//! The state of one open file: its backing file, its keys, and what is known about its end.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::crypto::FileKeys;
use crate::format::config::{End, Holes};
use crate::format::geometry::{
    DiskOffset, ImpossibleSize, PAGE_LEN, PAGE_SIZE, PAYLOAD_LEN, PageIndex, PlainOffset, SizeHint, last_page,
    last_page_len, size_hint, size_with_last_page,
};
use crate::format::header::HeaderPage;
use crate::format::page::Page;
use crate::storage::RawFile;

use super::buffers::Plain;
use super::ledger::Ledger;
use super::pages::{self, Opened};
use super::ranges::{Range, RangeGuard, RangeLock};
use super::rhythm::Rhythm;

/// What the volume says about things that do not authenticate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// What a page of zeros means.
    pub holes: Holes,
    /// What a last page without an end mark means.
    pub end: End,
}

/// Counts what is worth an operator's attention. Shared by all files of a volume.
#[derive(Debug, Default)]
pub struct Events {
    /// Pages that did not authenticate.
    pub unauthentic_pages: AtomicU64,
    /// Files whose last page was found without an end mark.
    pub missing_end_marks: AtomicU64,
}

/// Why a file cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// The backing file failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A page is not what this file's key sealed at this place.
    #[error("page {page} does not authenticate: it was changed or moved on disk; restore it from a backup")]
    Unauthentic {
        /// Its index.
        page: u64,
    },
    /// A page authenticates, and says what no writer of this version writes.
    #[error("page {page} has a trailer of another format version: use a newer kmsfs")]
    BadTrailer {
        /// Its index.
        page: u64,
    },
    /// A hole in a volume that has none.
    #[error("page {page} is a hole, and this volume denies holes: it was punched or never reached the disk")]
    Hole {
        /// Its index.
        page: u64,
    },
    /// The last page lacks the end mark, in a volume that insists on it.
    #[error("the end of the file is missing after page {page}: it was cut off")]
    NoEndMark {
        /// The index of the page that is the last one now.
        page: u64,
    },
    /// What was to be written there was refused or failed, and the kernel was told before that it is written.
    #[error("what was written from byte {offset} on is lost: write it again, or open the file anew")]
    Lost {
        /// Where that begins.
        offset: u64,
    },
    /// The backing file ends before the page.
    #[error("the file ends before page {page}: it was cut while it was open")]
    Cut {
        /// The index of the page that is not there.
        page: u64,
    },
    /// No plain size has this disk size.
    #[error(transparent)]
    ImpossibleSize(#[from] ImpossibleSize),
    /// The offset or size is beyond what the format can express.
    #[error("the offset is beyond the largest file")]
    TooLarge,
    /// The content was given up while the operation waited for it: open the file again.
    #[error("the file was closed meanwhile")]
    Retired,
    /// A file without a header was used before it was given one.
    #[error("the file has no key yet")]
    NoKey,
}

impl ContentError {
    /// What the backing file said, if it was that.
    pub(super) fn os_error(&self) -> Option<i32> {
        match self {
            Self::Io(error) => error.raw_os_error(),
            _ => None,
        }
    }
}

/// One sealed file. Shared by all its handles and hard links.
pub struct Content {
    pub(super) file: Arc<dyn RawFile>,
    pub(super) rules: Rules,
    pub(super) ranges: RangeLock,
    pub(super) rhythm: Rhythm,
    pub(super) ledger: Arc<Ledger>,
    keys: OnceLock<FileKeys>,
    /// The header that goes to disk with the first write.
    new_header: Mutex<Option<Box<HeaderPage>>>,
    shape: Mutex<Shape>,
    events: Arc<Events>,
}

/// What is known about the end of the file. Changes only under the exclusive lock of the end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) size: PlainOffset,
    pub(super) disk: DiskShape,
    pub(super) tail: Tail,
    /// Counts changes of the end.
    pub(super) version: u64,
    /// The missing end mark was reported.
    end_mark_reported: bool,
    /// Nothing may be done any more: another content may take this one's place.
    retired: bool,
}

/// How the disk size tells the plain size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DiskShape {
    /// There is no header yet: the file is empty.
    Headerless,
    /// By its remainder.
    Settled,
    /// By the trailer of the last page.
    Aligned,
}

/// What the last page holds past its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    /// Not looked at yet.
    Unknown,
    /// Zeros, and the trailer's length agrees with the size.
    Clean,
}

impl Content {
    /// Opens a file whose header gave `keys`, or with `None` one that has no header yet.
    ///
    /// # Errors
    /// [`ContentError`].
    pub fn open(
        file: Arc<dyn RawFile>,
        keys: Option<FileKeys>,
        rules: Rules,
        events: Arc<Events>,
    ) -> Result<Self, ContentError> {
        let disk = if keys.is_some() { DiskShape::Settled } else { DiskShape::Headerless };
        let shape = Shape {
            size: PlainOffset(0),
            disk,
            tail: Tail::Unknown,
            version: 0,
            end_mark_reported: false,
            retired: false,
        };
        let content = Self {
            file,
            rules,
            ranges: RangeLock::default(),
            rhythm: Rhythm::default(),
            ledger: Arc::default(),
            keys: keys.map_or_else(OnceLock::new, OnceLock::from),
            new_header: Mutex::default(),
            shape: Mutex::new(shape),
            events,
        };
        if disk == DiskShape::Settled {
            content.find_size()?;
        }
        Ok(content)
    }

    /// The same with what is known of the file's losses, which outlives the content.
    #[must_use]
    pub fn with_ledger(self, ledger: Arc<Ledger>) -> Self {
        Self { ledger, ..self }
    }

    fn find_size(&self) -> Result<(), ContentError> {
        let hint = size_hint(DiskOffset(self.file.size()?))?;
        let (size, disk) = match hint {
            SizeHint::Known(size) => (size, DiskShape::Settled),
            SizeHint::AskLastPage(last) => {
                // Whatever the page is, its length is looked at only because it is the last one.
                let len = self.open_unchecked(last, &mut Plain::zeros()[..])?.len();
                (size_with_last_page(last, len), DiskShape::Aligned)
            }
        };
        let mut shape = self.shape();
        (shape.size, shape.disk) = (size, disk);
        drop(shape);
        if self.rules.end == End::Strict
            && let Some(last) = last_page(size)
        {
            self.open_page(last, &mut Plain::zeros()[..])?;
        }
        Ok(())
    }

    /// The plain size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shape().size.0
    }

    /// Whether the last page was found without an end mark: the file was cut off.
    #[must_use]
    pub fn lacks_end_mark(&self) -> bool {
        self.shape().end_mark_reported
    }

    /// Whether the file still needs a key before it can hold anything.
    #[must_use]
    pub fn needs_keys(&self) -> bool {
        self.keys.get().is_none()
    }

    /// Whether the file was given a header that is not on disk yet; then it is empty there.
    #[must_use]
    pub fn has_unwritten_header(&self) -> bool {
        self.lock_new_header().is_some()
    }

    /// Gives a headerless file its header and keys; it goes to disk with the first write. Of two calls the first one wins.
    pub fn adopt(&self, keys: FileKeys, header: Box<HeaderPage>) {
        let mut new_header = self.lock_new_header();
        if self.keys.set(keys).is_ok() {
            *new_header = Some(header);
        }
    }

    /// Makes the content durable, and with `metadata` times and modes too. No page of the file is written meanwhile.
    ///
    /// # Errors
    /// [`ContentError::Io`].
    pub fn sync(&self, metadata: bool) -> Result<(), ContentError> {
        if self.ledger.owed().is_some() {
            let _lock = self.lock_for_change(|shape| shape.end_range(u64::MAX))?;
            self.pay_end()?;
        }
        let _no_writer = self.share(Range::ALL)?;
        self.rhythm.sync();
        Ok(self.file.sync(metadata)?)
    }

    /// Makes the content durable on nobody's behalf, as before settling. No page of the file is written meanwhile.
    ///
    /// # Errors
    /// [`ContentError::Io`].
    pub fn make_durable(&self) -> Result<(), ContentError> {
        let _no_writer = self.share(Range::ALL)?;
        Ok(self.file.sync(false)?)
    }

    /// Waits for operations that are under way, and ends all later ones with [`ContentError::Retired`]. The keys go with
    /// the last reference.
    pub fn retire(&self) {
        let _nobody = self.ranges.exclusive(Range::ALL);
        self.end();
    }

    /// Ends all later operations. Needs the exclusive lock of everything.
    pub(super) fn end(&self) {
        self.shape().retired = true;
    }

    /// Whether the content was given up: the file must be opened again.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.shape().retired
    }

    /// A shared lock of `range`.
    pub(super) fn share(&self, range: Range) -> Result<RangeGuard<'_>, ContentError> {
        let guard = self.ranges.shared(range);
        if self.shape().retired { Err(ContentError::Retired) } else { Ok(guard) }
    }

    pub(super) fn keys(&self) -> Result<&FileKeys, ContentError> {
        self.keys.get().ok_or(ContentError::NoKey)
    }

    /// The header that a headerless file is to get.
    pub(super) fn new_header(&self) -> Result<Box<HeaderPage>, ContentError> {
        self.lock_new_header().clone().ok_or(ContentError::NoKey)
    }

    fn lock_new_header(&self) -> MutexGuard<'_, Option<Box<HeaderPage>>> {
        self.new_header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn shape(&self) -> MutexGuard<'_, Shape> {
        self.shape.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The exclusive lock of the range that `range` gives for the file's shape, and the shape, which then cannot change
    /// in a way that matters to that range.
    pub(super) fn lock_for_change(
        &self,
        range: impl Fn(&Shape) -> Range,
    ) -> Result<(RangeGuard<'_>, Shape), ContentError> {
        loop {
            let wanted = range(&self.shape());
            let guard = self.ranges.exclusive(wanted);
            let shape = *self.shape();
            if shape.retired {
                return Err(ContentError::Retired);
            }
            if wanted.covers(range(&shape)) {
                return Ok((guard, shape));
            }
        }
    }

    /// Records a change of the end; needs the exclusive lock of the end.
    pub(super) fn set_shape(&self, size: PlainOffset, disk: DiskShape, tail: Tail) {
        let mut shape = self.shape();
        if shape.disk == DiskShape::Headerless && disk != DiskShape::Headerless {
            *self.lock_new_header() = None;
        }
        (shape.size, shape.disk, shape.tail) = (size, disk, tail);
        shape.version += 1;
    }

    /// Reads and opens the page `index` by the volume's rules.
    pub(super) fn open_page(&self, index: PageIndex, plain: &mut [u8]) -> Result<Opened, ContentError> {
        let opened = self.open_unchecked(index, plain)?;
        self.check(index, opened)?;
        Ok(opened)
    }

    fn open_unchecked(&self, index: PageIndex, plain: &mut [u8]) -> Result<Opened, ContentError> {
        let mut disk: Page = [0; PAGE_LEN];
        if self.file.read_at(&mut disk, index.disk().0)? < disk.len() {
            return Err(ContentError::Cut { page: index.0 });
        }
        pages::open(&mut self.keys()?.session(), index, &disk, plain).inspect_err(|error| self.count(error))
    }

    /// Applies the volume's rules to a page that was opened.
    pub(super) fn check(&self, index: PageIndex, opened: Opened) -> Result<(), ContentError> {
        match opened {
            Opened::Hole if self.rules.holes == Holes::Deny => Err(ContentError::Hole { page: index.0 }),
            Opened::Sealed(trailer) if !trailer.last => self.check_end_mark(index),
            _ => Ok(()),
        }
    }

    fn check_end_mark(&self, index: PageIndex) -> Result<(), ContentError> {
        let mut shape = self.shape();
        if last_page(shape.size) != Some(index) {
            return Ok(());
        }
        if self.rules.end == End::Strict {
            return Err(ContentError::NoEndMark { page: index.0 });
        }
        if !shape.end_mark_reported {
            shape.end_mark_reported = true;
            self.events.missing_end_marks.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    pub(super) fn count(&self, error: &ContentError) {
        if matches!(error, ContentError::Unauthentic { .. }) {
            self.events.unauthentic_pages.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Shape {
    /// The page that a change of the end begins at.
    pub(super) fn end_page(&self) -> u64 {
        last_page(self.size).map_or(0, |last| last.0)
    }

    /// What must be locked to change the end, and pages from `first` on.
    pub(super) fn end_range(&self, first: u64) -> Range {
        Range::from(first.min(self.end_page()))
    }

    /// Bytes of the last page that count, if it is a partial one.
    pub(super) fn partial_len(&self) -> Option<usize> {
        Some(last_page_len(self.size)).filter(|len| (1..PAYLOAD_LEN).contains(len))
    }
}

/// Bytes of the header on disk.
pub(super) const HEADER_LEN: u64 = PAGE_SIZE;
