//! What a failed write leaves of a file whose writer was told before that all is written.

use std::sync::Arc;

use super::*;
use crate::crypto::{FileKeys, Secret, Suite};
use crate::format::config::{End, Holes};
use crate::format::geometry::{MAX_PLAIN_SIZE, PAGE_LEN};
use crate::storage::{MemoryFile, RawFile};

const RULES: Rules = Rules { holes: Holes::Allow, end: End::Lenient };

struct Bench {
    key: Secret<32>,
    disk: Arc<MemoryFile>,
    ledger: Arc<Ledger>,
    content: Content,
}

impl Bench {
    /// A file of 100 bytes `a`, which a kernel writes that writes back later.
    fn new() -> Self {
        let (key, disk, ledger) = (Secret::random(), Arc::new(MemoryFile::default()), Arc::new(Ledger::default()));
        ledger.believe();
        let content = Content::open(disk.clone(), None, RULES, Arc::default()).unwrap();
        let content = content.with_ledger(Arc::clone(&ledger));
        content.adopt(FileKeys::create(&key, Suite::Xaes256Gcm, &[1; 32]), Box::new([0x5a; PAGE_LEN]));
        content.write(0, &[b'a'; 100]).unwrap();
        Self { key, disk, ledger, content }
    }

    /// What somebody finds who knows nothing of it.
    fn anew(&self) -> Vec<u8> {
        let keys = FileKeys::create(&self.key, Suite::Xaes256Gcm, &[1; 32]);
        let content = Content::open(self.disk.clone(), Some(keys), RULES, Arc::default()).unwrap();
        let mut plain = vec![0xee; usize::try_from(content.size()).unwrap()];
        content.read(0, &mut plain).unwrap();
        plain
    }

    /// From now on no page more fits on the disk.
    fn fill(&self) {
        self.disk.limit(Some(usize::try_from(self.disk.size().unwrap()).unwrap()));
    }

    fn read(&self, offset: u64, len: usize) -> Result<usize, ContentError> {
        self.content.read(offset, &mut vec![0; len])
    }
}

#[test]
fn what_is_lost_is_neither_read_nor_jumped_over_until_it_is_written() {
    let bench = Bench::new();
    bench.fill();
    assert!(bench.content.write(100, &[b'b'; 20_000]).is_err());
    bench.disk.limit(None);
    assert!(matches!(bench.read(0, 101), Err(ContentError::Lost { offset: 100 })));
    assert_eq!(bench.read(0, 100).unwrap(), 100);
    assert!(bench.content.write(20_100, b"c").is_err(), "a hole that nobody made");
    assert!(bench.content.resize(10_000).is_err() && bench.content.allocate(9000, 10, true).is_err());
    assert_eq!(bench.anew(), [b'a'; 100]);
    bench.content.write(100, &[b'B'; 20_000]).unwrap();
    bench.content.write(20_100, b"c").unwrap();
    assert!(!bench.ledger.has_lost());
    assert_eq!(bench.read(0, 30_000).unwrap(), 20_101);
}

#[test]
fn the_reason_is_told_until_the_next_sync() {
    let bench = Bench::new();
    bench.fill();
    assert!(bench.content.write(100, &[b'b'; 20_000]).is_err());
    bench.disk.limit(None);
    bench.ledger.lose(20_100..20_101, 100, Some(28));
    assert!(
        matches!(bench.content.write(30_000, b"c"), Err(ContentError::Io(error)) if error.raw_os_error() == Some(28))
    );
    bench.ledger.confirm();
    assert!(matches!(bench.content.write(30_000, b"c"), Err(ContentError::Lost { .. })));
}

#[test]
fn cutting_before_what_is_lost_makes_all_well() {
    for size in [100, 50, 0] {
        let bench = Bench::new();
        bench.content.lose(100..9000).unwrap();
        bench.content.resize(size).unwrap();
        assert!(!bench.ledger.has_lost());
        bench.content.write(9000, b"c").unwrap();
        assert_eq!(bench.read(0, 10_000).unwrap(), 9001);
    }
}

#[test]
fn a_page_that_fails_after_one_behind_it_takes_that_one_back() {
    let bench = Bench::new();
    bench.content.write(50_000, &[b'c'; 100]).unwrap();
    bench.content.lose(4096..8192).unwrap();
    assert!(bench.read(0, 101).is_err() && bench.read(50_000, 1).is_err());
    assert_eq!(bench.anew(), [b'a'; 100]);
}

/// The last page is a hole: a clean end would need space for it.
#[test]
fn a_full_disk_takes_back_what_was_grown_over_what_is_lost() {
    let bench = Bench::new();
    bench.content.resize(20_001).unwrap();
    bench.disk.fail_writes(true);
    assert!(bench.content.write(100, &[b'b'; 9000]).is_err());
    bench.disk.fail_writes(false);
    assert_eq!(bench.anew(), [b'a'; 100]);
}

#[test]
fn a_hole_that_was_there_at_a_sync_stays_one() {
    let bench = Bench::new();
    bench.content.write(50_000, &[b'c'; 100]).unwrap();
    bench.ledger.confirm();
    bench.content.lose(4096..8192).unwrap();
    assert!(!bench.ledger.has_lost());
    assert_eq!(bench.read(0, 60_000).unwrap(), 50_100);
}

#[test]
fn a_hole_that_a_program_makes_is_one() {
    let bench = Bench::new();
    bench.content.write(50_000, b"c").unwrap();
    bench.content.resize(60_000).unwrap();
    bench.content.allocate(60_000, 5000, true).unwrap();
    assert_eq!(bench.read(0, 70_000).unwrap(), 65_000);
}

/// Neither the new end nor the old one could be made.
#[test]
fn an_end_that_cannot_be_put_back_is_put_back_before_it_counts() {
    let bench = Bench::new();
    bench.disk.limit(Some(4 * PAGE_LEN));
    bench.disk.keep_size(true);
    assert!(bench.content.write(100, &[b'b'; 20_000]).is_err());
    assert_eq!(bench.content.size(), 100);
    assert!(bench.content.sync(false).is_err(), "the size on the disk is wrong");
    bench.disk.limit(None);
    assert!(bench.content.write(100, b"b").is_err() && bench.content.resize(50).is_err());
    bench.disk.keep_size(false);
    bench.content.sync(false).unwrap();
    assert_eq!(bench.anew(), [b'a'; 100]);
    bench.content.write(100, b"b").unwrap();
    assert_eq!(bench.anew(), [&[b'a'; 100][..], b"b"].concat());
}

/// The old end is gone, so the file has the new one, and is not durable before the disk has it too.
#[test]
fn a_shrink_that_is_refused_half_way_has_happened() {
    for size in [0, 50, 5000] {
        let bench = Bench::new();
        bench.content.write(100, &[b'a'; 60_000]).unwrap();
        bench.disk.tear_shrinks(true);
        bench.content.resize(size).unwrap();
        assert_eq!(bench.content.size(), size);
        assert!(bench.content.sync(false).is_err(), "the size on the disk is wrong");
        bench.disk.tear_shrinks(false);
        bench.content.sync(false).unwrap();
        assert_eq!(bench.anew(), vec![b'a'; usize::try_from(size).unwrap()]);
        bench.content.write(size, b"b").unwrap();
        assert!(bench.anew().ends_with(b"b"));
    }
}

/// Requests of the kernel are whole pages, and may reach past the greatest size.
#[test]
fn a_read_that_reaches_past_the_greatest_size_is_asked_of_the_disk() {
    let bench = Bench::new();
    assert_eq!(bench.read(MAX_PLAIN_SIZE - 100, 4096).unwrap(), 0);
    bench.content.lose(MAX_PLAIN_SIZE - 50..MAX_PLAIN_SIZE).unwrap();
    assert!(bench.read(MAX_PLAIN_SIZE - 100, 4096).is_err());
}
