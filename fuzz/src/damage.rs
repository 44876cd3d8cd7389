//! A file that a mount wrote, header and all, damaged in any way: what is still read of it is what was written, in its place.

use std::sync::{Arc, OnceLock};

use kmsfs::content::{Content, ContentError, Rules};
use kmsfs::format::config::{End, Holes};
use kmsfs::format::geometry::{PAGE_LEN, PAYLOAD_LEN};
use kmsfs::keys::{KeyError, Volume};
use kmsfs::storage::{MemoryFile, RawFile as _};

use super::content::{change, read_page, rules};
use super::input::Input;
use super::volume::{standing, suite};

const SECTOR: usize = 512;

/// Bytes: rules and suite, the file, damages, changes.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (rules, volume) = (rules(input.byte()), standing(suite(input.flag())));
    let plain = plain_of(&mut input);
    let settled = input.flag();
    let original = written(volume, &plain, rules, settled);
    let other = other(volume);
    let mut disk = original.clone();
    for _ in 0..input.below(4) {
        damage(&mut disk, other, &mut input);
    }
    let untouched = disk == original;
    let file = Arc::new(MemoryFile::new(disk));
    let content = match open(volume, &file, rules) {
        Ok(Some(content)) => content,
        Ok(None) => {
            assert!(!untouched || plain.is_empty(), "the header is lost");
            return;
        }
        Err(error) => {
            assert!(!untouched, "a file that nobody damaged does not open: {error}");
            return;
        }
    };
    assert!(!untouched || content.size() == plain.len() as u64, "the size is lost");
    look(&content, &file, &plain, other, rules, untouched);
    let again =
        || open(volume, &file, rules).map(|found| found.expect("its header is there")).map_err(|_| ContentError::NoKey);
    change(&file, again, &mut input);
}

/// Content without zeros, in which no two pages are alike.
fn plain_of(input: &mut Input<'_>) -> Vec<u8> {
    let len = match input.byte() % 4 {
        0 => input.below(200),
        1 => PAYLOAD_LEN * input.below(4),
        _ => input.below(4 * PAYLOAD_LEN),
    };
    (0..len).map(|at| u8::try_from((at * 7 + at / 256 * 13) % 251).unwrap_or(0) + 1).collect()
}

/// Another file of the same volume, on disk.
fn other(volume: &Volume) -> &'static [u8] {
    static OTHERS: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    OTHERS[usize::from(volume.suite.id() - 1)].get_or_init(|| {
        let rules = Rules { holes: Holes::Allow, end: End::Lenient };
        written(volume, &[0xaa; 3 * PAYLOAD_LEN], rules, false)
    })
}

/// The file on disk.
fn written(volume: &Volume, plain: &[u8], rules: Rules, settled: bool) -> Vec<u8> {
    let file = Arc::new(MemoryFile::new(Vec::new()));
    let content = Content::open(file.clone(), None, rules, Arc::default()).expect("an empty file");
    let (opened, header) = volume.ring.new_file().expect("a new key");
    content.adopt(opened.keys, header);
    if rules.end == End::Strict {
        content.ensure_header().expect("there is room");
    }
    content.write(0, plain).expect("there is room");
    if let Some(found) = content.unsettled().filter(|_| settled) {
        content.sync(true).and_then(|()| content.settle(found)).expect("memory holds");
    }
    file.bytes()
}

fn damage(disk: &mut Vec<u8>, other: &[u8], input: &mut Input<'_>) {
    let pages = disk.len().div_ceil(PAGE_LEN).max(1);
    let (choice, from, to) = (input.byte() % 8, input.below(pages), input.below(pages));
    let size = disk.len();
    match choice {
        0 | 1 if size > 0 => {
            let at = to * PAGE_LEN + input.below(PAGE_LEN);
            disk[at % size] ^= input.byte();
        }
        2 => disk.truncate(input.below(size + 1)),
        3 => disk.truncate(to * PAGE_LEN),
        4 => disk.resize(size + input.below(2 * PAGE_LEN), input.byte()),
        // Whole pages or sectors of this file, or of another one.
        5 | 6 => {
            let unit = if choice == 5 { PAGE_LEN } else { SECTOR };
            let step = if choice == 5 { 0 } else { SECTOR * input.below(PAGE_LEN / SECTOR) };
            let source = if input.flag() { other } else { &disk.clone() };
            let (from, to) = (from * PAGE_LEN + step, to * PAGE_LEN + step);
            if let (Some(from), Some(to)) = (source.get(from..from + unit), disk.get_mut(to..to + unit)) {
                to.copy_from_slice(from);
            }
        }
        _ => {
            if let Some(page) = disk.get_mut(to * PAGE_LEN..(to + 1) * PAGE_LEN) {
                page.fill(0);
            }
        }
    }
}

/// Opens a file as a mount does: its size, its header, its key, its content. `None` if it has no header and need not have one.
fn open(volume: &Volume, file: &Arc<MemoryFile>, rules: Rules) -> Result<Option<Content>, String> {
    let mut page = [0; PAGE_LEN];
    let read = file.read_at(&mut page, 0).expect("memory holds");
    let header = match read {
        0 => None,
        PAGE_LEN => volume.ring.authenticate(&page).map_err(|error| error.to_string())?,
        _ => return Err("the size of no file".to_owned()),
    };
    let Some(header) = header else {
        return if rules.end == End::Strict { Err("no header".to_owned()) } else { Ok(None) };
    };
    let keys =
        volume.ring.open(&header).map_err(|error: KeyError| format!("a header authenticates, and its key: {error}"));
    let keys = keys.expect("whoever sealed the header had the key").keys;
    Content::open(file.clone(), Some(keys), rules, Arc::default()).map(Some).map_err(|error| error.to_string())
}

/// Every page that reads is what was written there, or, if it is a hole, zeros. The header may be another file's: then it is that
/// file which is read.
fn look(content: &Content, file: &MemoryFile, plain: &[u8], other: &[u8], rules: Rules, untouched: bool) {
    let (disk, size) = (file.bytes(), usize::try_from(content.size()).expect("a small file"));
    let is_other = disk[..PAGE_LEN] == other[..PAGE_LEN];
    for page in 0..size.div_ceil(PAYLOAD_LEN) {
        let start = page * PAYLOAD_LEN;
        let found = match read_page(content, page) {
            Ok(found) => found,
            Err(error) => {
                assert!(!untouched, "page {page} is lost: {error}");
                continue;
            }
        };
        let hole =
            disk.get((page + 1) * PAGE_LEN..(page + 2) * PAGE_LEN).is_some_and(|page| page.iter().all(|b| *b == 0));
        if hole {
            assert!(rules.holes == Holes::Allow && found.iter().all(|byte| *byte == 0), "page {page} is a hole");
            continue;
        }
        let mut expected =
            if is_other { vec![0xaa; PAYLOAD_LEN] } else { plain.get(start..).unwrap_or_default().to_vec() };
        // The size on disk may lie past the end; there is nothing there.
        expected.resize(found.len(), 0);
        assert!(found == expected, "page {page} reads as something that was not written there");
    }
}
