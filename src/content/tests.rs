//! Content against a plain byte vector, and each promise about the end of a file by itself.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::crypto::{FileKeys, Secret, Suite};
use crate::format::config::{End, Holes};
use crate::format::geometry::{PAGE_LEN, PAYLOAD};
use crate::storage::{Change, MemoryFile, RawFile};

const RULES: Rules = Rules { holes: Holes::Allow, end: End::Lenient };
const HEADER: [u8; PAGE_LEN] = [0x5a; PAGE_LEN];

/// A file whose keys can be had again, for reopening.
struct Bench {
    key: Secret<32>,
    suite: Suite,
    rules: Rules,
    disk: Arc<MemoryFile>,
    content: Content,
}

impl Bench {
    fn new(suite: Suite, rules: Rules) -> Self {
        let key = Secret::random();
        let disk = Arc::new(MemoryFile::default());
        let content = Content::open(disk.clone(), None, rules, Arc::default()).unwrap();
        content.adopt(FileKeys::create(&key, suite, &[1; 32]), Box::new(HEADER));
        Self { key, suite, rules, disk, content }
    }

    fn keys(&self) -> FileKeys {
        FileKeys::create(&self.key, self.suite, &[1; 32])
    }

    fn reopened(&self) -> Result<Content, ContentError> {
        let keys = (self.disk.size().unwrap() > 0).then(|| self.keys());
        Content::open(self.disk.clone(), keys, self.rules, Arc::default())
    }

    fn reopen(&mut self) {
        self.content = self.reopened().unwrap();
        if self.content.needs_keys() {
            self.content.adopt(self.keys(), Box::new(HEADER));
        }
    }

    fn all(&self) -> Vec<u8> {
        let mut plain = vec![0xee; usize::try_from(self.content.size()).unwrap() + 10];
        let len = self.content.read(0, &mut plain).unwrap();
        plain.truncate(len);
        plain
    }

    fn flip(&self, at: usize) {
        let mut byte = [0];
        self.disk.read_at(&mut byte, at as u64).unwrap();
        self.disk.write_at(&[byte[0] ^ 1], at as u64).unwrap();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize),
    Read(u64, usize),
    Resize(u64),
    Settle,
    Reopen,
}

/// Offsets near page edges, where the errors are.
fn offsets() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..4 * PAYLOAD,
        (0..4_u64, -2..=2_i64).prop_map(|(page, off)| (page * PAYLOAD).saturating_add_signed(off)),
        (0..4_u64).prop_map(|page| page * 4096)
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let lens = prop_oneof![1..300_usize, 4040..4060_usize, 8090..8200_usize];
    let step = prop_oneof![
        4 => (offsets(), lens.clone()).prop_map(|(at, len)| Step::Write(at, len)),
        2 => (offsets(), lens).prop_map(|(at, len)| Step::Read(at, len)),
        2 => offsets().prop_map(Step::Resize),
        1 => Just(Step::Settle),
        1 => Just(Step::Reopen)
    ];
    proptest::collection::vec(step, 1..25)
}

fn apply(bench: &mut Bench, model: &mut Vec<u8>, number: u8, step: &Step) {
    match *step {
        Step::Write(at, len) => {
            let bytes: Vec<u8> = (0..len).map(|i| number.wrapping_mul(31).wrapping_add(i.to_le_bytes()[0])).collect();
            bench.content.write(at, &bytes).unwrap();
            let start = usize::try_from(at).unwrap();
            model.resize(model.len().max(start + len), 0);
            model[start..start + len].copy_from_slice(&bytes);
        }
        Step::Read(at, len) => {
            let mut plain = vec![0xee; len];
            let got = bench.content.read(at, &mut plain).unwrap();
            let start = usize::try_from(at).unwrap().min(model.len());
            assert!(plain[..got] == model[start..model.len().min(start + len)]);
        }
        Step::Resize(size) => {
            bench.content.resize(size).unwrap();
            model.resize(usize::try_from(size).unwrap(), 0);
        }
        Step::Settle => {
            if let Some(found) = bench.content.unsettled() {
                assert!(bench.content.settle(found).unwrap());
            }
        }
        Step::Reopen => bench.reopen(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    #[test]
    fn behaves_like_a_byte_vector(steps in steps(), xaes: bool, deny: bool, strict: bool) {
        let suite = if xaes { Suite::Xaes256Gcm } else { Suite::XChaCha20Poly1305 };
        let holes = if deny { Holes::Deny } else { Holes::Allow };
        let end = if strict && deny { End::Strict } else { End::Lenient };
        let mut bench = Bench::new(suite, Rules { holes, end });
        let mut model = Vec::new();
        for (number, step) in (0..).zip(&steps) {
            apply(&mut bench, &mut model, number, step);
            prop_assert_eq!(bench.content.size(), model.len() as u64);
        }
        prop_assert!(bench.all() == model);
        bench.reopen();
        prop_assert!(bench.all() == model);
    }

    /// A write that runs out of space leaves every byte old or new and the size as it was, on disk too.
    #[test]
    fn a_full_disk_tears_nothing(first in offsets(), second in offsets(), len in 1..9000_usize, room in 0..12000_usize) {
        let mut bench = Bench::new(Suite::Xaes256Gcm, RULES);
        bench.content.resize(first).unwrap();
        bench.content.write(0, &vec![7; usize::try_from(first).unwrap()]).unwrap();
        let before = bench.all();
        let used = usize::try_from(bench.disk.size().unwrap()).unwrap();
        bench.disk.limit(Some(used + room));
        let result = bench.content.write(second, &vec![9; len]);
        bench.disk.limit(None);
        if result.is_err() {
            let after = bench.all();
            prop_assert_eq!(after.len(), before.len());
            let mut bytes = after.iter().zip(&before).enumerate();
            let old_or_new = bytes.all(|(at, (new, old))| new == old || (*new == 9 && at as u64 >= second));
            prop_assert!(old_or_new);
            bench.reopen();
            prop_assert!(bench.all() == after);
        }
        bench.content.write(second, &vec![9; len]).unwrap();
        bench.reopen();
        prop_assert!(bench.all()[usize::try_from(second).unwrap()..][..len] == vec![9; len]);
    }
}

#[test]
fn the_first_write_brings_the_header_in_one_write() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    assert_eq!(bench.disk.bytes(), b"");
    bench.content.write(0, b"hello").unwrap();
    assert_eq!(bench.disk.take_log(), [Change::Write { offset: 0, len: 2 * PAGE_LEN as u64 }]);
    assert_eq!(bench.disk.bytes()[..PAGE_LEN], HEADER);
    assert_eq!(bench.all(), b"hello");
}

#[test]
fn without_keys_nothing_is_written() {
    let disk = Arc::new(MemoryFile::default());
    let content = Content::open(disk.clone(), None, RULES, Arc::default()).unwrap();
    assert!(matches!(content.write(0, b"x"), Err(ContentError::NoKey)));
    assert!(matches!(content.resize(1), Err(ContentError::NoKey)));
    assert_eq!(disk.bytes(), b"");
}

#[test]
fn no_changed_byte_is_read() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, &[7; 5000]).unwrap();
    for at in (PAGE_LEN..3 * PAGE_LEN).step_by(7) {
        bench.flip(at);
        let page = (at / PAGE_LEN - 1) as u64;
        let result = bench.content.read(page * PAYLOAD, &mut [0; 10]);
        assert!(matches!(result, Err(ContentError::Unauthentic { page: p }) if p == page), "{at}: {result:?}");
        bench.flip(at);
    }
    assert_eq!(bench.all(), [7; 5000]);
}

#[test]
fn a_moved_page_is_not_read() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, &[7; 8096]).unwrap();
    let bytes = bench.disk.bytes();
    bench.disk.write_at(&bytes[PAGE_LEN..2 * PAGE_LEN], 2 * PAGE_LEN as u64).unwrap();
    assert!(matches!(bench.content.read(4048, &mut [0; 10]), Err(ContentError::Unauthentic { page: 1 })));
}

#[test]
fn holes_read_as_zeros_or_are_denied() {
    for (holes, ok) in [(Holes::Allow, true), (Holes::Deny, false)] {
        let bench = Bench::new(Suite::Xaes256Gcm, Rules { holes, end: End::Lenient });
        bench.content.write(0, &[7; 8096]).unwrap();
        bench.disk.write_at(&[0; PAGE_LEN], PAGE_LEN as u64).unwrap();
        let mut plain = [1; 100];
        match bench.content.read(0, &mut plain) {
            Ok(100) if ok => assert_eq!(plain, [0; 100]),
            Err(ContentError::Hole { page: 0 }) if !ok => {}
            other => panic!("{holes:?}: {other:?}"),
        }
    }
}

#[test]
fn a_missing_end_mark_is_counted_or_refused() {
    for (end, ok) in [(End::Lenient, true), (End::Strict, false)] {
        let mut bench = Bench::new(Suite::Xaes256Gcm, Rules { holes: Holes::Allow, end });
        bench.content.write(0, &[7; 9000]).unwrap();
        bench.disk.set_size(3 * PAGE_LEN as u64).unwrap();
        let events: Arc<Events> = Arc::default();
        let opened = Content::open(bench.disk.clone(), Some(bench.keys()), bench.rules, events.clone());
        if !ok {
            assert!(matches!(opened.err(), Some(ContentError::NoEndMark { page: 1 })));
            continue;
        }
        bench.content = opened.unwrap();
        assert_eq!(bench.all(), [7; 8096]);
        assert_eq!(bench.all(), [7; 8096]);
        assert_eq!(events.missing_end_marks.load(std::sync::atomic::Ordering::Relaxed), 1);
    }
}

/// `docs/FORMAT.md` section 6: a crash may leave a remainder and a trailer that disagree; the remainder counts until the
/// file is changed, and the change does not lose by it.
#[test]
fn a_remainder_wins_over_the_trailer_and_is_mended_before_the_file_grows() {
    for (told, trailer) in [(100, 300), (300, 100)] {
        let mut bench = Bench::new(Suite::Xaes256Gcm, RULES);
        bench.content.write(0, &[7; 300]).unwrap();
        if trailer == 100 {
            bench.content.resize(100).unwrap();
        }
        bench.disk.set_size(2 * PAGE_LEN as u64 + told).unwrap();
        bench.reopen();
        assert_eq!(bench.content.size(), told);
        assert_eq!(bench.all(), vec![7; usize::try_from(told).unwrap()]);
        bench.content.write(told + 10, b"!").unwrap();
        bench.reopen();
        let mut expected = vec![7; usize::try_from(told).unwrap()];
        expected.extend([0; 10]);
        expected.push(b'!');
        assert_eq!(bench.all(), expected);
    }
}

#[test]
fn what_a_shrink_cut_does_not_come_back() {
    let mut bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, &[7; 3000]).unwrap();
    bench.content.resize(1000).unwrap();
    bench.reopen();
    bench.content.resize(9000).unwrap();
    let all = bench.all();
    assert_eq!((&all[..1000], &all[1000..]), (&[7; 1000][..], &[0; 8000][..]));
}

#[test]
fn settling_gives_way_to_a_change() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, b"one").unwrap();
    let found = bench.content.unsettled().unwrap();
    bench.content.write(3, b"two").unwrap();
    assert!(!bench.content.settle(found).unwrap());
    assert!(bench.content.settle(bench.content.unsettled().unwrap()).unwrap());
    assert_eq!(bench.content.unsettled(), None);
    assert_eq!(bench.disk.size().unwrap(), 2 * PAGE_LEN as u64 + 6);
    assert_eq!(bench.reopened().unwrap().size(), 6);
}

#[test]
fn impossible_sizes_are_refused() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, b"x").unwrap();
    for size in [PAGE_LEN as u64 + 1, 2 * PAGE_LEN as u64 + 4048] {
        bench.disk.set_size(size).unwrap();
        assert!(matches!(bench.reopened().err(), Some(ContentError::ImpossibleSize(_))), "{size}");
    }
    assert!(matches!(bench.content.write(u64::MAX, b"x"), Err(ContentError::TooLarge)));
    assert!(matches!(bench.content.resize(u64::MAX), Err(ContentError::TooLarge)));
}

#[test]
fn threads_on_one_file_do_not_lose_each_others_bytes() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let content = &bench.content;
            scope.spawn(move || {
                for slot in 0..200_u64 {
                    let byte = u8::try_from(thread + 1).unwrap();
                    content.write((slot * 4 + thread) * 100, &[byte; 100]).unwrap();
                }
            });
        }
    });
    let all = bench.all();
    for (slot, bytes) in all.chunks(100).enumerate() {
        assert!(bytes.iter().all(|byte| usize::from(*byte) == slot % 4 + 1), "{slot}");
    }
}

/// A header that never became durable, with pages that did.
#[test]
fn what_lies_behind_a_lost_header_does_not_come_back() {
    for offset in [0, 5000] {
        let mut bench = Bench::new(Suite::Xaes256Gcm, RULES);
        bench.disk.write_at(&[5; 3 * PAGE_LEN], PAGE_LEN as u64).unwrap();
        bench.content.write(offset, b"hello").unwrap();
        bench.reopen();
        assert_eq!(bench.content.size(), offset + 5);
        assert!(bench.all().ends_with(b"hello"));
    }
}

/// Growing leaves a hole as last page; overwriting it and then appending must not let the new disk size overtake it.
#[test]
fn the_disk_has_the_last_page_before_the_size_that_needs_it() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, b"x").unwrap();
    bench.content.resize(10000).unwrap();
    bench.content.write(9000, b"inside the last page").unwrap();
    let _ = bench.disk.take_log();
    bench.content.write(10000, b"append").unwrap();
    let (page, size) = (3 * PAGE_LEN as u64, 4 * PAGE_LEN as u64);
    let log = bench.disk.take_log();
    assert_eq!(log[..2], [Change::Push { offset: page, len: PAGE_LEN as u64 }, Change::Size(size)]);
}

#[test]
fn shrinking_pushes_the_last_page_out_before_the_size() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, &[7; 9000]).unwrap();
    let _ = bench.disk.take_log();
    bench.content.resize(5000).unwrap();
    let (offset, len) = (2 * PAGE_LEN as u64, PAGE_LEN as u64);
    let expected = [
        Change::Clean { offset, len },
        Change::Write { offset, len },
        Change::Push { offset, len },
        Change::Size(offset + len),
    ];
    assert_eq!(bench.disk.take_log(), expected);
}

#[test]
fn a_failed_extension_of_a_full_last_page_keeps_its_end_mark() {
    let mut bench = Bench::new(Suite::Xaes256Gcm, Rules { holes: Holes::Allow, end: End::Strict });
    bench.content.write(0, &[7; 4048]).unwrap();
    bench.disk.limit(Some(2 * PAGE_LEN));
    assert!(bench.content.write(100, &[8; 9000]).is_err());
    bench.reopen();
    assert_eq!(bench.content.size(), 4048);
}

#[test]
fn a_failed_write_past_a_gap_takes_the_gap_back() {
    let mut bench = Bench::new(Suite::Xaes256Gcm, Rules { holes: Holes::Deny, end: End::Lenient });
    bench.content.write(0, b"x").unwrap();
    bench.disk.limit(Some(4 * PAGE_LEN));
    assert!(bench.content.write(9000, &[8; 9000]).is_err());
    assert!(bench.content.resize(40000).is_err());
    assert_eq!(bench.all(), b"x");
    bench.reopen();
    assert_eq!(bench.all(), b"x");
}

#[test]
fn a_retired_content_waits_for_what_is_under_way_and_does_nothing_more() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    bench.content.write(0, b"before").unwrap();
    let found = bench.content.unsettled().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let content = &bench.content;
            scope.spawn(move || while content.write(thread * 5000, b"more").is_ok() {});
        }
        bench.content.retire();
    });
    let disk = bench.disk.bytes();
    assert!(matches!(bench.content.read(0, &mut [0; 5]), Err(ContentError::Retired)));
    assert!(matches!(bench.content.resize(3), Err(ContentError::Retired)));
    assert!(matches!(bench.content.sync(true), Err(ContentError::Retired)));
    assert!(matches!(bench.content.settle(found), Err(ContentError::Retired)));
    assert!(bench.disk.bytes() == disk);
    assert!(bench.reopened().unwrap().size() >= 6);
}

#[test]
fn a_log_that_is_synced_at_every_line_goes_to_the_disk_at_once() {
    let bench = Bench::new(Suite::Xaes256Gcm, RULES);
    for line in 0..10 {
        bench.content.write(line * 10, b"0123456789").unwrap();
        let log = bench.disk.take_log();
        assert_eq!(log.iter().any(|change| matches!(change, Change::Start { .. })), line >= 3, "{line}: {log:?}");
        bench.content.sync(false).unwrap();
    }
}

/// A large file takes long to seal anew: whoever may not write any more stops in the midst of it.
#[test]
fn a_log_is_applied_as_long_as_its_file_may_be_written() {
    const PAGES: usize = 600;
    let log = MemoryFile::new(vec![7; (1 + PAGES) * PAGE_LEN]);
    let applied = |most: usize| {
        let (file, asked) = (MemoryFile::new(vec![3; (1 + PAGES) * PAGE_LEN]), std::cell::Cell::new(0));
        let check = || {
            asked.set(asked.get() + 1);
            if asked.get() > most { Err(std::io::Error::other("lost")) } else { Ok(()) }
        };
        let whole = apply_log(&log, &file, &check).is_ok();
        (whole, file.bytes().iter().filter(|byte| **byte == 7).count() / PAGE_LEN)
    };
    assert_eq!(applied(0), (false, 0));
    assert_eq!(applied(1), (false, 256));
    assert_eq!(applied(3), (false, PAGES), "all but the header");
    assert_eq!(applied(4), (true, PAGES + 1));
}
