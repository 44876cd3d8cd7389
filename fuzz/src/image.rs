//! A whole cipher file of any pages: junk, holes, pages of other places and other files, and pages that a holder of the key
//! sealed with any trailer; and of any size. What is read of it is known for each page.

use std::sync::Arc;

use kmsfs::content::{Content, Rules};
use kmsfs::crypto::Suite;
use kmsfs::format::config::{End, Holes};
use kmsfs::format::geometry::{
    DiskOffset, PAGE_LEN, PAYLOAD_LEN, PageIndex, PlainOffset, SizeHint, last_page, size_hint, size_with_last_page,
};
use kmsfs::format::page::{self, Page, Payload, Trailer, part};
use kmsfs::storage::MemoryFile;

use super::content::{change, file_keys, read_page, rules};
use super::input::Input;
use super::volume::suite;

const FILE: u8 = 1;

/// What a page on disk is.
enum Kind {
    Nothing,
    Hole,
    Sealed(Box<Payload>, Trailer),
}

/// Bytes: rules and suite, pages, the tail, changes.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let (rules, suite) = (rules(input.byte()), suite(input.flag()));
    let mut disk = vec![0x5a; PAGE_LEN];
    let mut pages = Vec::new();
    for index in 0..input.below(6) {
        let (bytes, kind) = page_of(&mut input, index as u64, suite);
        disk.extend_from_slice(&bytes);
        pages.push(kind);
    }
    if input.flag() {
        let tail = [if input.flag() { 0x77 } else { 0 }; PAGE_LEN];
        disk.extend_from_slice(&tail[..input.below(PAGE_LEN)]);
    }
    let size = disk.len();
    let file = Arc::new(MemoryFile::new(disk));
    let open = || Content::open(file.clone(), Some(file_keys(suite, FILE)), rules, Arc::default());
    let expected = expected_size(size, &pages, rules);
    let content = match (open(), expected) {
        (Ok(content), Some(size)) => {
            assert_eq!(content.size(), size.0);
            content
        }
        (Err(_), None) => return,
        (Ok(content), None) => panic!("it opens with {} bytes", content.size()),
        (Err(error), Some(size)) => panic!("it has {size:?} bytes and does not open: {error}"),
    };
    let size = usize::try_from(content.size()).expect("a small file");
    for (index, kind) in pages.iter().enumerate().take(size.div_ceil(PAYLOAD_LEN)) {
        let found = read_page(&content, index);
        let len = PAYLOAD_LEN.min(size - index * PAYLOAD_LEN);
        match (found, kind) {
            (Ok(plain), Kind::Sealed(payload, _)) => {
                assert!(plain == payload[..len], "page {index} reads as something else")
            }
            (Ok(plain), Kind::Hole) => {
                assert!(rules.holes == Holes::Allow && plain == vec![0; len], "page {index} is a hole")
            }
            (Ok(_), Kind::Nothing) => panic!("page {index} reads as something that nobody sealed"),
            (Err(_), Kind::Nothing) => {}
            (Err(_), Kind::Hole) => assert_eq!(rules.holes, Holes::Deny, "page {index} is a hole"),
            (Err(error), Kind::Sealed(..)) => panic!("page {index} is sealed and does not open: {error}"),
        }
    }
    assert!(matches!(content.read(size as u64, &mut [0; 9]), Ok(0)), "there is something past the end");
    change(&file, open, &mut input);
}

/// The page `index` on disk, and what it is.
fn page_of(input: &mut Input<'_>, index: u64, suite: Suite) -> (Page, Kind) {
    let mut disk = [0; PAGE_LEN];
    let choice = input.byte() % 8;
    match choice {
        0 => return (disk, Kind::Hole),
        1 => {
            let junk = input.field(PAGE_LEN);
            disk[PAGE_LEN - junk.len()..].copy_from_slice(junk);
            let kind = if page::is_hole(&disk) { Kind::Hole } else { Kind::Nothing };
            return (disk, kind);
        }
        _ => {}
    }
    let trailer = match input.byte() % 4 {
        0 => Trailer::INNER.encode(),
        1 | 2 => Trailer::last(1 + input.below(PAYLOAD_LEN)).encode(),
        _ => input.array(),
    };
    let mut payload = Box::new([input.byte(); PAYLOAD_LEN]);
    let text = input.field(40);
    payload[..text.len()].copy_from_slice(text);
    // Of another place in the file, or of another file.
    let place = if choice == 2 { index + 1 + input.below(3) as u64 } else { index };
    let keys = file_keys(suite, if choice == 3 { FILE + 1 } else { FILE });
    let nonce: [u8; 24] = [input.byte() | 1; 24];
    let data = page::associated_data(PageIndex(place), trailer);
    let tag = keys.session().seal(&nonce, &data, &payload[..], &mut disk[part::CIPHERTEXT]);
    disk[part::NONCE].copy_from_slice(&nonce);
    disk[part::TRAILER].copy_from_slice(&trailer);
    disk[part::TAG].copy_from_slice(&tag);
    let changed = choice == 4 && input.damage(&mut disk);
    let kind = match Trailer::parse(&disk) {
        Ok(trailer) if choice > 3 && !changed => Kind::Sealed(payload, trailer),
        _ => Kind::Nothing,
    };
    (disk, kind)
}

/// The size of a file that opens.
fn expected_size(disk: usize, pages: &[Kind], rules: Rules) -> Option<PlainOffset> {
    let size = match size_hint(DiskOffset(disk as u64)).ok()? {
        SizeHint::Known(size) => size,
        SizeHint::AskLastPage(last) => match pages.last()? {
            Kind::Nothing => return None,
            Kind::Hole => size_with_last_page(last, PAYLOAD_LEN),
            Kind::Sealed(_, trailer) => size_with_last_page(last, trailer.len.into()),
        },
    };
    let last = last_page(size).and_then(|last| pages.get(usize::try_from(last.0).ok()?));
    let good = match last {
        None => true,
        Some(Kind::Nothing) => false,
        Some(Kind::Hole) => rules.holes == Holes::Allow,
        Some(Kind::Sealed(_, trailer)) => trailer.last,
    };
    (good || rules.end == End::Lenient).then_some(size)
}
