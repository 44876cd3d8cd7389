//! A regular file: its size, the slots of its header, its key, its attributes and its pages.

use std::ops::Range;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::content::Rules;
use crate::crypto::Suite;
use crate::format::config::{End, Holes};
use crate::format::geometry::{PAGE_LEN, PAYLOAD};
use crate::format::header::{HeaderError, HeaderPage, SLOT_LEN, parse_page};
use crate::keys::{AuthenticHeader, KeyError, Volume};
use crate::storage::{Access, DiskFile, Node, RawFile};

use super::finding::{Found, Kind, Mend, Place, Severity};
use super::pages::{HOLE, Sealed, SizeError, claimed_size, whole_pages};
use super::{Checker, count, locked};

/// A file with more pages than this is opened piece by piece, so that several threads share it.
const PIECE: u64 = 4096;

/// A large file whose pages are still to be opened.
pub(super) struct Pieces {
    pub(super) file: Arc<Large>,
    runs: Vec<Range<u64>>,
}

impl Pieces {
    /// The pieces, each for one thread.
    pub(super) fn each(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().flat_map(|run| {
            let starts = (0..pieces_in(run)).map(|n| run.start + n * PIECE);
            starts.map(|start| start..(start + PIECE).min(run.end))
        })
    }
}

fn pieces_in(run: &Range<u64>) -> u64 {
    (run.end - run.start).div_ceil(PIECE)
}

/// A file that several threads open the pages of.
pub(super) struct Large {
    pub(super) sealed: Sealed,
    pub(super) place: Place,
    /// What was found of it before, and of the pieces that are done.
    pub(super) found: Mutex<Found>,
    /// Pieces that are not done.
    left: AtomicU64,
    /// The file's shape on disk, for the end.
    unsettled: bool,
}

impl Large {
    /// Counts a piece as done; whether it was the last one.
    pub(super) fn finish(&self, found: Found) -> bool {
        locked(&self.found).0.extend(found.0);
        self.left.fetch_sub(1, Ordering::SeqCst) == 1
    }

    pub(super) fn is_unsettled(&self) -> bool {
        self.unsettled
    }
}

/// What a file's header page turned out to be.
pub(super) enum Head {
    /// It has none, and need not have one.
    None,
    /// None of its slots is valid.
    Broken,
    /// The slots parse, and no key is there to check them with.
    Parsed,
    Authentic(Box<AuthenticHeader>),
}

impl Checker<'_> {
    pub(super) fn look_at_file(&self, node: &Node, place: &Place, split: bool, found: &mut Found) -> Option<Pieces> {
        let stat = match node.stat() {
            Ok(stat) => stat,
            Err(error) => {
                found.io(place, &error);
                return None;
            }
        };
        if split && stat.nlink > 1 && !locked(&self.seen).insert(stat.ino) {
            return None;
        }
        if split {
            count(&self.counts.files);
        }
        let file = match node.open_file(Access::Read) {
            Ok(fd) => DiskFile::readable(fd),
            Err(error) => {
                found.io(place, &error);
                return None;
            }
        };
        match self.look_inside(node, file, place, split, found) {
            Ok(pieces) => pieces,
            Err(error) => {
                found.io(place, &error);
                None
            }
        }
    }

    fn look_inside(
        &self,
        node: &Node,
        file: DiskFile,
        place: &Place,
        split: bool,
        found: &mut Found,
    ) -> std::io::Result<Option<Pieces>> {
        let size = file.size()?;
        let unsettled = match claimed_size(&file, size) {
            Ok(Some(plain)) => {
                look_at_tail(&file, size, place, found)?;
                size > PAGE_LEN as u64 && size % PAGE_LEN as u64 == 0 && plain.0 % PAYLOAD != 0
            }
            // With keys the page itself will not open, or its trailer will be refused.
            Ok(None) if self.volume.is_some() => false,
            Ok(None) => {
                let last = whole_pages(size).saturating_sub(1);
                let what = "the trailer of the last page is malformed: it was changed";
                found.page(place, Severity::Damage, Kind::Page, last, what);
                false
            }
            Err(SizeError::Impossible(impossible)) => {
                found.add(place, Severity::Damage, Kind::Size, impossible.to_string());
                false
            }
            Err(SizeError::Io(error)) => return Err(error),
        };
        let header = match self.look_at_header(&file, size, place, found)? {
            Head::Authentic(header) => header,
            Head::None => {
                super::xattrs::check_lost(node, place, found);
                return Ok(None);
            }
            Head::Broken | Head::Parsed => {
                self.note_unsettled(unsettled && split, place, found);
                return Ok(None);
            }
        };
        let Some(volume) = self.volume else { return Ok(None) };
        super::xattrs::check(volume, node, &header.header().file_id, place, found);
        let keys = match self.patience.open(&volume.ring, &header) {
            Ok(opened) => opened.keys,
            Err(error) => {
                report_key(place, &error, found);
                return Ok(None);
            }
        };
        let log = self.log_of(volume, node, header.header(), size)?;
        let sealed = Sealed { file, keys, rules: self.rules, pages: whole_pages(size) };
        match log {
            Some(log) if !log.is_applied || self.lacks_pages(&sealed, place)? => {
                self.report_half_way(node, &log, place, found);
                let keys = match self.patience.open(&volume.ring, &log.header) {
                    Ok(opened) => opened.keys,
                    Err(error) => {
                        report_key(place, &error, found);
                        return Ok(None);
                    }
                };
                let wanted = Sealed { file: log.file, keys, ..sealed };
                Ok(self.open_pages(wanted, place, split, unsettled, found))
            }
            _ => Ok(self.open_pages(sealed, place, split, unsettled, found)),
        }
    }

    /// Whether some page does not open.
    fn lacks_pages(&self, sealed: &Sealed, place: &Place) -> std::io::Result<bool> {
        let mut found = Found::default();
        sealed.data()?.into_iter().for_each(|run| self.open_range(sealed, run, place, &mut found));
        Ok(found.0.iter().any(|finding| finding.kind == Kind::Page))
    }

    /// Opens all pages, or leaves them for several threads.
    fn open_pages(
        &self,
        sealed: Sealed,
        place: &Place,
        split: bool,
        unsettled: bool,
        found: &mut Found,
    ) -> Option<Pieces> {
        let runs = match sealed.data() {
            Ok(runs) => runs,
            Err(error) => {
                found.io(place, &error);
                return None;
            }
        };
        self.look_at_holes(&sealed, &runs, place, found);
        let left: u64 = runs.iter().map(pieces_in).sum();
        if split && left > 1 {
            let (left, found) = (AtomicU64::new(left), Mutex::new(std::mem::take(found)));
            let file = Arc::new(Large { sealed, place: place.clone(), found, left, unsettled });
            return Some(Pieces { file, runs });
        }
        runs.into_iter().for_each(|run| self.open_range(&sealed, run, place, found));
        if split {
            self.note_unsettled(unsettled, place, found);
            self.note_unreachable(place);
        }
        None
    }

    /// Holes need not be read: what the rules say of one page of zeros, they say of all.
    fn look_at_holes(&self, sealed: &Sealed, runs: &[Range<u64>], place: &Place, found: &mut Found) {
        for hole in sealed.holes(runs) {
            self.counts.pages.fetch_add(hole.end - hole.start, Ordering::Relaxed);
            if self.rules.holes == Holes::Deny {
                found.pages(place, Severity::Damage, Kind::Hole, hole.start..=hole.end - 1, HOLE);
            }
        }
    }

    /// Opens the pages of a range and reports those that do not hold.
    pub(super) fn open_range(&self, sealed: &Sealed, range: Range<u64>, place: &Place, found: &mut Found) {
        self.counts.pages.fetch_add(range.end.saturating_sub(range.start), Ordering::Relaxed);
        sealed.visit(range, |_, _, fault| {
            if let Some(fault) = fault {
                found.page(place, fault.severity, fault.kind, fault.page, fault.what);
            }
        });
    }

    /// A file that is whole but for its size on disk, which its writer had no time to set.
    pub(super) fn note_unsettled(&self, unsettled: bool, place: &Place, found: &Found) {
        if unsettled {
            count(&self.counts.unsettled);
            if self.settings.alone && found.0.is_empty() {
                locked(&self.unsettled).push(place.cipher.clone());
            }
        }
    }

    /// A file that opens, and that no name leads to.
    pub(super) fn note_unreachable(&self, place: &Place) {
        if self.settings.salvage && place.plain.is_none() {
            locked(&self.unreachable).push(place.cipher.clone());
        }
    }

    fn look_at_header(&self, file: &DiskFile, size: u64, place: &Place, found: &mut Found) -> std::io::Result<Head> {
        let mut page: HeaderPage = [0; PAGE_LEN];
        let strict = self.rules.end == End::Strict;
        let no_header = |found: &mut Found, severity, what: &str| {
            found.add(place, severity, Kind::NoHeader, what);
            Ok(Head::None)
        };
        match file.read_at(&mut page, 0)? {
            0 if size == 0 && strict => {
                return no_header(
                    found,
                    Severity::Damage,
                    "the file has no header, and this volume is strict: it was cut",
                );
            }
            0 => return Ok(Head::None),
            PAGE_LEN => {}
            // An impossible size, which has been reported.
            _ => return Ok(Head::Broken),
        }
        let slots = self.slots(&page);
        match slots {
            [Slot::Empty, Slot::Empty] => {
                let what = "the header is zeros: it never became durable, and the file is empty";
                let severity = if strict { Severity::Damage } else { Severity::Amiss };
                no_header(found, severity, what)
            }
            [Slot::Valid, ref other] | [ref other, Slot::Valid] => {
                let (this, valid) = if matches!(slots[0], Slot::Valid) { ("B", "A") } else { ("A", "B") };
                report_slot(place, this, valid, other, found);
                Ok(self.authentic(&page))
            }
            [Slot::Broken(what) | Slot::Newer(what), _] | [Slot::Empty, Slot::Broken(what) | Slot::Newer(what)] => {
                found.add(place, Severity::Damage, Kind::Header, what);
                Ok(Head::Broken)
            }
        }
    }

    fn authentic(&self, page: &HeaderPage) -> Head {
        let Some(volume) = self.volume else { return Head::Parsed };
        match volume.ring.authenticate(page) {
            Ok(Some(header)) => Head::Authentic(Box::new(header)),
            _ => Head::Broken,
        }
    }

    /// What each slot is, by itself.
    pub(super) fn slots(&self, page: &HeaderPage) -> [Slot; 2] {
        let mut number = 0;
        parse_page(page).map(|parsed| {
            let this = number;
            number += 1;
            match parsed {
                Err(HeaderError::Empty) => Slot::Empty,
                Err(error @ (HeaderError::UnknownVersion(_) | HeaderError::UnknownFlags(_))) => {
                    Slot::Newer(error.to_string())
                }
                Err(error) => Slot::Broken(error.to_string()),
                Ok(parsed) if parsed.header.volume_id != self.volume_id => {
                    Slot::Broken("the file belongs to another volume".to_owned())
                }
                Ok(parsed) if Suite::from_id(parsed.header.suite).is_none() => {
                    Slot::Newer(KeyError::UnknownSuite(parsed.header.suite.to_string()).to_string())
                }
                Ok(_) => self.volume.map_or(Slot::Valid, |volume| authenticate_alone(volume, page, this)),
            }
        })
    }

    pub(super) fn rules(&self) -> Rules {
        self.rules
    }
}

/// What one header slot is.
pub(super) enum Slot {
    Empty,
    /// Why.
    Broken(String),
    /// It claims to be of a later version, whose writer may have meant it.
    Newer(String),
    /// It authenticates; without keys, it parses.
    Valid,
}

/// Checks one slot by itself: the other one is blanked out.
fn authenticate_alone(volume: &Volume, page: &HeaderPage, slot: usize) -> Slot {
    let mut alone = *page;
    alone[(1 - slot) * SLOT_LEN..][..SLOT_LEN].fill(0);
    match volume.ring.authenticate(&alone) {
        Ok(_) => Slot::Valid,
        Err(KeyError::UnauthenticHeader) => Slot::Broken("the header does not authenticate: it was changed".to_owned()),
        Err(error) => Slot::Broken(error.to_string()),
    }
}

/// What lies after the last page is only a size: no writer writes there, and no reader looks.
fn look_at_tail(file: &DiskFile, size: u64, place: &Place, found: &mut Found) -> std::io::Result<()> {
    let len = usize::try_from(size % PAGE_LEN as u64).unwrap_or(0);
    let mut tail = [0; PAGE_LEN];
    if size > PAGE_LEN as u64 && len > 0 {
        let read = file.read_at(&mut tail[..len], size - len as u64)?;
        if tail[..read].iter().any(|byte| *byte != 0) {
            let what = "there are bytes after the last page, where no writer of a volume puts any: nobody reads them";
            found.add(place, Severity::Amiss, Kind::Stray, what);
        }
    }
    Ok(())
}

/// A slot that a newer program may have written is told, and left alone.
fn report_slot(place: &Place, slot: &str, valid: &str, state: &Slot, found: &mut Found) {
    let what = |why| format!("slot {slot} of the header is broken ({why}); slot {valid} is valid, and is used");
    match state {
        Slot::Broken(why) => found.add_mendable(place, Kind::HeaderSlot, Mend::CopySlot, what(why)),
        Slot::Newer(why) => found.add(place, Severity::Amiss, Kind::HeaderSlot, what(why)),
        Slot::Empty | Slot::Valid => {}
    }
}

fn report_key(place: &Place, error: &KeyError, found: &mut Found) {
    match error {
        KeyError::Provider(_) | KeyError::Locked => {
            found.add(place, Severity::Key, Kind::Key, format!("the key cannot be had: {error}"));
        }
        _ => found.add(place, Severity::Damage, Kind::WrongKey, error.to_string()),
    }
}
