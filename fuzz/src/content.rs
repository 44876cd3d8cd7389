//! What a sealed file reads as, byte by byte, and what may become of it when it is changed.

use std::sync::Arc;

use kmsfs::content::{Content, ContentError, Rules};
use kmsfs::crypto::{FileKeys, Suite};
use kmsfs::format::config::{End, Holes};
use kmsfs::format::geometry::PAYLOAD_LEN;
use kmsfs::storage::MemoryFile;

use super::input::Input;
use super::volume::data_key;

/// The largest offset that a change begins at, and so about the largest file.
const FAR: usize = 8 * PAYLOAD_LEN;
/// A byte that must not be read: nobody wrote what lies there.
const REFUSED: u16 = 256;
/// A byte of which nothing is known: a change of it failed.
const ANY: u16 = 257;

/// The rules that a number stands for.
pub fn rules(number: u8) -> Rules {
    Rules {
        holes: if number & 1 == 0 { Holes::Allow } else { Holes::Deny },
        end: if number & 2 == 0 { End::Lenient } else { End::Strict },
    }
}

/// The keys of the file with this id.
pub fn file_keys(suite: Suite, file_id: u8) -> FileKeys {
    FileKeys::create(&data_key(), suite, &[file_id; 32])
}

/// The bytes of a page that count.
pub fn read_page(content: &Content, page: usize) -> Result<Vec<u8>, ContentError> {
    let size = usize::try_from(content.size()).expect("a small file");
    let start = page * PAYLOAD_LEN;
    let mut plain = vec![0xee; PAYLOAD_LEN.min(size - start)];
    let read = content.read(start as u64, &mut plain)?;
    assert_eq!(read, plain.len(), "a read is short inside the file");
    Ok(plain)
}

/// What a file reads as.
pub struct View(Vec<u16>);

impl View {
    /// What it reads as now.
    pub fn of(content: &Content) -> Self {
        let size = usize::try_from(content.size()).expect("a small file");
        let mut bytes = Vec::with_capacity(size);
        for page in 0..size.div_ceil(PAYLOAD_LEN) {
            match read_page(content, page) {
                Ok(plain) => bytes.extend(plain.into_iter().map(u16::from)),
                Err(_) => bytes.resize(size.min((page + 1) * PAYLOAD_LEN), REFUSED),
            }
        }
        Self(bytes)
    }

    /// Holds the file against it.
    fn check(&self, content: &Content, what: &str) {
        assert_eq!(content.size(), self.0.len() as u64, "{what}: the size");
        for (page, expected) in self.0.chunks(PAYLOAD_LEN).enumerate() {
            match read_page(content, page) {
                Ok(plain) => {
                    let holds = |(byte, expected): (&u8, &u16)| *expected == ANY || u16::from(*byte) == *expected;
                    assert!(plain.iter().zip(expected).all(holds), "{what}: page {page} reads as something else");
                }
                Err(error) => {
                    assert!(expected.iter().any(|byte| *byte >= REFUSED), "{what}: page {page} is lost: {error}");
                }
            }
        }
    }

    fn is_whole(&self) -> bool {
        self.0.iter().all(|byte| *byte < REFUSED)
    }

    fn fill(&mut self, start: usize, end: usize, with: impl Fn(usize) -> u16) {
        let len = self.0.len();
        for at in start.min(len)..end.min(len) {
            self.0[at] = with(at - start);
        }
    }

    fn resize(&mut self, size: usize) {
        self.0.resize(size, 0);
    }
}

enum Change {
    Write(usize, Vec<u8>),
    Resize(usize),
    Zero(usize, usize, bool),
    Allocate(usize, usize, bool),
    Sync,
    Settle,
    Reopen,
}

impl Change {
    fn of(input: &mut Input<'_>) -> Self {
        let place = |input: &mut Input<'_>| match input.byte() % 3 {
            0 => PAYLOAD_LEN * input.below(8),
            1 => (PAYLOAD_LEN * input.below(8) + input.below(5)).saturating_sub(2),
            _ => input.below(FAR),
        };
        let len = |input: &mut Input<'_>| if input.flag() { PAYLOAD_LEN } else { 1 + input.below(2 * PAYLOAD_LEN) };
        match input.byte() % 10 {
            0..=2 => {
                let (at, len, fill) = (place(input), len(input), input.byte());
                let bytes = (0..len).map(|at| fill.wrapping_add(u8::try_from(at % 251).unwrap_or(0)) | 1);
                Self::Write(at, bytes.collect())
            }
            3 | 4 => Self::Resize(place(input)),
            5 => Self::Zero(place(input), len(input), input.flag()),
            6 => Self::Allocate(place(input), len(input), input.flag()),
            7 => Self::Sync,
            8 => Self::Settle,
            _ => Self::Reopen,
        }
    }

    /// Where it begins to change anything, the end of the file included.
    fn begins(&self, size: usize) -> usize {
        let end = size.saturating_sub(1) / PAYLOAD_LEN * PAYLOAD_LEN;
        match self {
            Self::Write(at, _) | Self::Zero(at, ..) | Self::Allocate(at, ..) => end.min(at / PAYLOAD_LEN * PAYLOAD_LEN),
            Self::Resize(new) => end.min(new / PAYLOAD_LEN * PAYLOAD_LEN),
            Self::Sync | Self::Settle | Self::Reopen => size,
        }
    }

    fn apply(&self, content: &Content, view: &mut View) -> Result<(), ContentError> {
        let size = view.0.len();
        match self {
            Self::Write(at, bytes) => {
                content.write(*at as u64, bytes)?;
                view.resize(size.max(at + bytes.len()));
                view.fill(*at, at + bytes.len(), |at| bytes[at].into());
            }
            Self::Resize(new) => {
                content.resize(*new as u64)?;
                view.resize(*new);
            }
            Self::Zero(at, len, keep) => {
                content.zero(*at as u64, *len as u64, *keep)?;
                view.fill(*at, at + len, |_| 0);
            }
            Self::Allocate(at, len, grow) => {
                content.allocate(*at as u64, *len as u64, *grow)?;
                view.resize(if *grow { size.max(at + len) } else { size });
            }
            Self::Sync => content.sync(true)?,
            Self::Settle => {
                if let Some(found) = content.unsettled() {
                    content.make_durable()?;
                    assert!(content.settle(found)?, "nobody else changes it");
                }
            }
            Self::Reopen => {}
        }
        Ok(())
    }
}

/// Changes a file, damaged or not, and reads all of it after each change: what was read before is read again, what was written is
/// read, and what did not open does not open unless it was written over.
pub fn change(file: &Arc<MemoryFile>, open: impl Fn() -> Result<Content, ContentError>, input: &mut Input<'_>) {
    let Ok(mut content) = open() else { return };
    let mut view = View::of(&content);
    for _ in 0..6 {
        if input.is_over() {
            return;
        }
        let change = Change::of(input);
        let before = view.0.len();
        if change.apply(&content, &mut view).is_err() {
            assert!(!view.is_whole(), "a change of a file that is whole fails");
            view.resize(usize::try_from(content.size()).expect("a small file"));
            view.fill(change.begins(before), usize::MAX, |_| ANY);
        }
        view.check(&content, "after a change");
        assert!(file.bytes().len() < 40 * PAYLOAD_LEN, "the file grows without end");
        if matches!(change, Change::Reopen) {
            content = match open() {
                Ok(content) => content,
                Err(error) => {
                    assert!(!view.is_whole(), "a file that is whole does not open again: {error}");
                    return;
                }
            };
            if view.is_whole() {
                view.check(&content, "after opening it again");
            } else {
                view = View::of(&content);
            }
        }
    }
}
