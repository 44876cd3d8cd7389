//! Power cuts, replayed: random work on a file, and for each moment of it images of what a disk may hold after a power cut. Each is
//! opened, and held against what `docs/SEMANTICS.md` section 4 promises.
//!
//! `KMSFS_CRASH_IMAGES` sets how many images are made, `KMSFS_CRASH_SEED` which: a failure names both.
#![allow(clippy::print_stdout)] // a run says how to repeat it

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::crash_disk_tests::{Disk, LeftOut, Random};
use super::crash_header_tests::Headers;
use super::*;
use crate::crypto::{FileKeys, Secret, Suite, random_array};
use crate::format::config::{End, Holes};
use crate::format::geometry::{PAGE_LEN, PAYLOAD_LEN};
use crate::storage::{MemoryFile, RawFile as _};

/// Images of a run, if the environment does not say.
const IMAGES: usize = 20_000;
/// So many at least, and then no more once this time is over, if the environment does not say.
const LEAST_IMAGES: usize = 2000;
const LONG: Duration = Duration::from_secs(15);
/// Images for each change of the backing file.
const IMAGES_PER_CHANGE: usize = 3;
/// Steps in the life of a file.
const STEPS: usize = 24;

#[derive(Clone, Copy, Debug)]
enum Step {
    Write(usize, usize),
    Append(usize),
    Resize(usize),
    Zero(usize, usize, bool),
    Allocate(usize, usize, bool),
    /// A write while so many bytes are left on the disk.
    Full(usize, usize, usize),
    Sync,
    Settle,
    /// The header is rewritten while nobody has the file open, and this is made durable or not.
    Rewrap(bool),
    Reopen,
    /// The power is cut, and the life goes on with what is left.
    Cut,
}

fn step(random: &mut Random) -> Step {
    let at = match random.below(3) {
        0 => random.below(5 * PAYLOAD_LEN),
        1 => (random.below(5) * PAYLOAD_LEN + random.below(5)).saturating_sub(2),
        _ => random.below(5) * PAGE_LEN,
    };
    let len = match random.below(4) {
        0 => 1 + random.below(300),
        1 => PAYLOAD_LEN - 3 + random.below(6),
        2 => PAGE_LEN,
        _ => 1 + random.below(3 * PAYLOAD_LEN),
    };
    match random.below(27) {
        0..6 => Step::Write(at, len),
        6..10 => Step::Append(len),
        10..14 => Step::Resize(at),
        14 | 15 => Step::Zero(at, len, random.one_in(2)),
        16 => Step::Allocate(at, len, !random.one_in(3)),
        17 => Step::Full(at, len, random.below(3) * PAGE_LEN),
        18 | 19 => Step::Sync,
        20 | 21 => Step::Settle,
        22 => Step::Reopen,
        23..26 => Step::Rewrap(random.one_in(2)),
        _ => Step::Cut,
    }
}

/// A file, the disk under it, and what it may read as after a power cut.
struct Life {
    opener: Opener,
    rules: Rules,
    file: Arc<MemoryFile>,
    content: Content,
    disk: Disk,
    /// The content at the last sync and after each step since.
    states: Vec<Vec<u8>>,
    /// The highest generation that the header has had since the last sync.
    newest: u64,
    left_out: LeftOut,
    images: usize,
}

/// What makes a file readable: it does not change when the power is cut.
struct Opener {
    headers: Headers,
    key: Secret<32>,
    suite: Suite,
}

impl Opener {
    fn new(suite: Suite) -> Self {
        Self { headers: Headers::new(), key: Secret::random(), suite }
    }

    fn keys(&self) -> FileKeys {
        FileKeys::create(&self.key, self.suite, &[1; 32])
    }

    /// The generation of a file's header; none if it has no header and need not have one.
    fn generation(&self, image: &[u8]) -> Result<Option<u64>, String> {
        match image.first_chunk::<PAGE_LEN>() {
            None if image.is_empty() => Ok(None),
            Some(header) if *header == [0; PAGE_LEN] => Ok(None),
            header => {
                let valid = header.and_then(|header| self.headers.valid(header));
                valid.map(|valid| Some(valid.generation)).ok_or_else(|| "neither slot of the header holds".to_owned())
            }
        }
    }

    fn keys_of(&self, image: &[u8]) -> Result<Option<FileKeys>, String> {
        Ok(self.generation(image)?.map(|_| self.keys()))
    }
}

impl Life {
    fn new(suite: Suite, rules: Rules, left_out: LeftOut) -> Self {
        Self::on(Vec::new(), Opener::new(suite), rules, left_out).expect("an empty file opens")
    }

    /// A life that begins with these bytes on the disk; `None` if a file may be refused that looks like this.
    fn on(bytes: Vec<u8>, opener: Opener, rules: Rules, left_out: LeftOut) -> Option<Self> {
        let disk = Disk::new(bytes.clone(), left_out);
        let file = Arc::new(MemoryFile::new(bytes.clone()));
        let keys = opener.keys_of(&bytes).ok()?;
        let content = Content::open(file.clone(), keys, rules, Arc::default()).ok()?;
        let newest = opener.generation(&bytes).ok()?.unwrap_or_default();
        let mut life = Self { opener, rules, file, content, disk, states: Vec::new(), newest, left_out, images: 0 };
        life.adopt();
        life.states = vec![life.all().ok()?];
        Some(life)
    }

    fn adopt(&self) {
        if self.content.needs_keys() {
            self.content.adopt(self.opener.keys(), self.opener.headers.first());
        }
        if self.rules.end == End::Strict {
            self.content.ensure_header().unwrap();
        }
    }

    fn all(&self) -> Result<Vec<u8>, ContentError> {
        let mut plain = vec![0xee; usize::try_from(self.content.size()).unwrap()];
        let len = self.content.read(0, &mut plain)?;
        assert_eq!(len, plain.len());
        Ok(plain)
    }

    fn model(&self) -> Vec<u8> {
        self.states[self.states.len() - 1].clone()
    }

    /// Takes a step and cuts the power at each moment of it.
    fn take(&mut self, number: usize, step: Step, random: &mut Random) -> Result<(), String> {
        let mut model = self.model();
        let failed = self.apply(number, step, &mut model).is_err();
        assert_eq!(failed, failed && matches!(step, Step::Full(..)), "{step:?}");
        self.states.push(model);
        if failed {
            self.states.push(self.all().map_err(|error| format!("after a full disk: {error}"))?);
        }
        for recorded in self.file.take_history() {
            if self.disk.happens(recorded) {
                let last = self.model();
                (self.states, self.newest) = (vec![last], 0);
            }
            self.newest = self.newest.max(self.opener.generation(self.disk.now())?.unwrap_or_default());
            for _ in 0..IMAGES_PER_CHANGE {
                self.images += 1;
                self.check(&self.disk.image(random))?;
            }
        }
        assert!(self.disk.now() == self.file.bytes(), "the history tells another story");
        if !self.all().is_ok_and(|all| all == self.model()) {
            return Err("without any cut".to_owned());
        }
        Ok(())
    }

    fn apply(&mut self, number: usize, step: Step, model: &mut Vec<u8>) -> Result<(), ContentError> {
        let bytes = |len: usize| {
            (0..len).map(|i| (number * 31 + i * 7 + i / 256 + 1).to_le_bytes()[0] | 1).collect::<Vec<u8>>()
        };
        let write = |at: usize, bytes: Vec<u8>, model: &mut Vec<u8>| {
            let result = self.content.write(at as u64, &bytes);
            model.resize(model.len().max(at + bytes.len()), 0);
            model[at..at + bytes.len()].copy_from_slice(&bytes);
            result
        };
        match step {
            Step::Write(at, len) => write(at, bytes(len), model),
            Step::Append(len) => write(model.len(), bytes(len), model),
            Step::Full(at, len, room) => {
                let used = self.file.bytes().len().next_multiple_of(PAGE_LEN);
                self.file.limit(Some(used + room));
                let result = write(at, bytes(len), model);
                self.file.limit(None);
                result
            }
            Step::Resize(size) => {
                model.resize(size, 0);
                self.content.resize(size as u64)
            }
            Step::Zero(at, len, keep) => {
                let end = model.len().min(at + len);
                model[at.min(end)..end].fill(0);
                self.content.zero(at as u64, len as u64, keep)
            }
            Step::Allocate(at, len, grow) => {
                model.resize(if grow { model.len().max(at + len) } else { model.len() }, 0);
                self.content.allocate(at as u64, len as u64, grow)
            }
            Step::Sync => self.content.sync(false),
            Step::Settle => match self.content.unsettled() {
                Some(found) => {
                    self.content.make_durable()?;
                    self.content.settle(found).map(drop)
                }
                None => Ok(()),
            },
            Step::Rewrap(durable) => {
                self.rewrap(durable)?;
                self.reopen()
            }
            Step::Reopen | Step::Cut => self.reopen(),
        }
    }

    /// What `kmsfs rewrap` does to a file: all that was written before is made durable, then the page is written.
    fn rewrap(&self, durable: bool) -> Result<(), ContentError> {
        if let Some(page) = self.file.bytes().first_chunk::<PAGE_LEN>().filter(|page| **page != [0; PAGE_LEN]) {
            if self.left_out != LeftOut::SyncsBeforeHeaders {
                self.file.sync(false)?;
            }
            self.file.write_at(&self.opener.headers.next(page)[..], 0)?;
            if durable {
                self.file.sync(false)?;
            }
        }
        Ok(())
    }

    fn reopen(&mut self) -> Result<(), ContentError> {
        let keys = self.opener.keys_of(&self.file.bytes()).expect("its header");
        self.content = Content::open(self.file.clone(), keys, self.rules, Arc::default())?;
        self.adopt();
        Ok(())
    }

    /// The header is one that the file had since the last sync, which may be none if none was synced.
    fn check_header(&self, image: &[u8]) -> Result<(), String> {
        let of = |file: &[u8]| self.opener.generation(file).map(Option::unwrap_or_default);
        let (synced, found) = (of(self.disk.durable())?, of(image)?);
        if (synced..=self.newest.max(synced)).contains(&found) {
            return Ok(());
        }
        Err(format!("the header has generation {found}, and had {synced} to {}", self.newest))
    }

    /// Holds what a power cut left against the promises.
    fn check(&self, image: &[u8]) -> Result<(), String> {
        self.check_header(image)?;
        let synced_header = self.opener.generation(self.disk.durable()).is_ok_and(|generation| generation.is_some());
        let open = |rules, keys| {
            let file = Arc::new(MemoryFile::new(image.to_vec()));
            Content::open(file, keys, rules, Arc::default())
        };
        let Some(keys) = self.opener.keys_of(image)? else {
            let ok = !synced_header && self.states.iter().any(Vec::is_empty);
            return ok.then_some(()).ok_or_else(|| "the header is gone".to_owned());
        };
        let lenient = Rules { end: End::Lenient, ..self.rules };
        let content = match open(self.rules, Some(keys)) {
            Ok(content) => content,
            Err(ContentError::NoEndMark { .. } | ContentError::Hole { .. })
                if self.rules.end == End::Strict && self.has_grown() =>
            {
                let keys = self.opener.keys_of(image)?;
                open(lenient, keys).map_err(|error| format!("does not open leniently: {error}"))?
            }
            Err(error) => return Err(format!("does not open: {error}")),
        };
        let size = usize::try_from(content.size()).unwrap();
        self.check_size(size)?;
        (0..size.div_ceil(PAYLOAD_LEN)).try_for_each(|page| self.check_page(&content, page, size))
    }

    /// Whether a step since the last sync has made the file longer.
    fn has_grown(&self) -> bool {
        self.states.windows(2).any(|pair| pair[0].len() < pair[1].len())
    }

    /// The size is one that the file had, or one of its pages' ends between those.
    fn check_size(&self, size: usize) -> Result<(), String> {
        let lens = || self.states.iter().map(Vec::len);
        let (least, most) = (lens().min().unwrap_or(0), lens().max().unwrap_or(0));
        let between = size.is_multiple_of(PAYLOAD_LEN) && (least..=most.next_multiple_of(PAYLOAD_LEN)).contains(&size);
        if between || lens().any(|len| len == size) {
            return Ok(());
        }
        Err(format!("{size} bytes, where it had {:?}", lens().collect::<Vec<_>>()))
    }

    /// The page is what it was at the last sync or after a step since. Past the end that the file had then come zeros, or, if the
    /// power was cut before a truncation was durable, what the truncation would have taken.
    fn check_page(&self, content: &Content, page: usize, size: usize) -> Result<(), String> {
        let start = page * PAYLOAD_LEN;
        let mut found = vec![0xee; PAYLOAD_LEN.min(size - start)];
        let was_absent = self.states.iter().any(|state| state.len() <= start);
        match content.read(start as u64, &mut found) {
            Ok(len) if len == found.len() => {}
            Err(ContentError::Hole { .. }) if was_absent && self.rules.holes == Holes::Deny => return Ok(()),
            other => return Err(format!("page {page} reads as {other:?}")),
        }
        let bytes_of = |state: &'_ Vec<u8>| {
            state.get(start..).unwrap_or_default().iter().copied().take(found.len()).collect::<Vec<u8>>()
        };
        let was = |at: usize| {
            let old = bytes_of(&self.states[at]);
            let (kept, past) = found.split_at(old.len());
            // Two truncations leave what the second one took, and zeros after it.
            let cut_later = |before: &Vec<u8>| {
                let before = bytes_of(before);
                let lost = before.get(old.len()..).unwrap_or_default();
                past.strip_prefix(lost).is_some_and(|rest| rest.iter().all(|byte| *byte == 0))
            };
            kept == old && self.states[..=at].iter().any(cut_later)
        };
        if (0..self.states.len()).any(was) { Ok(()) } else { Err(format!("page {page} of {size} bytes was never so")) }
    }
}

/// The rules and the suite of a life; all of them come up.
fn kind(number: u64) -> (Suite, Rules) {
    let suite = if number & 1 == 0 { Suite::Xaes256Gcm } else { Suite::XChaCha20Poly1305 };
    let holes = if number & 2 == 0 { Holes::Allow } else { Holes::Deny };
    let end = if number & 4 == 0 { End::Lenient } else { End::Strict };
    (suite, Rules { holes, end })
}

/// Lives through the steps. Returns how many images held, or what one of them broke.
fn live(seed: u64, steps: &[Step], left_out: LeftOut) -> (usize, Result<(), String>) {
    let (suite, rules) = kind(seed);
    let mut random = Random::new(seed);
    let mut life = Life::new(suite, rules, left_out);
    let mut images = 0;
    for (number, step) in steps.iter().enumerate() {
        if let Err(broken) = life.take(number, *step, &mut random) {
            return (images + life.images, Err(format!("step {number}, {step:?}: {broken}")));
        }
        if matches!(step, Step::Cut) {
            let image = life.disk.image(&mut random);
            images += std::mem::take(&mut life.images);
            life = match Life::on(image, life.opener, rules, left_out) {
                Some(next) => next,
                // Refused, as it may be: somebody restores it. The next file begins.
                None => Life::new(suite, rules, left_out),
            };
        }
    }
    (images + life.images, Ok(()))
}

fn steps_of(seed: u64) -> Vec<Step> {
    let mut random = Random::new(seed ^ 0x5eed);
    (0..STEPS).map(|_| step(&mut random)).collect()
}

/// The fewest steps that still break a promise.
fn minimised(seed: u64, mut steps: Vec<Step>, left_out: LeftOut) -> (Vec<Step>, String) {
    // Which image is made depends on all steps before it: each attempt gets some tries, all of the same kind.
    let broken = |steps: &[Step]| (0..40).find_map(|again| live(seed.wrapping_add(again * 8), steps, left_out).1.err());
    let mut why = live(seed, &steps, left_out).1.err().unwrap_or_default();
    let mut at = steps.len();
    while at > 0 {
        at -= 1;
        let mut fewer = steps.clone();
        fewer.remove(at);
        if let Some(error) = broken(&fewer) {
            (steps, why) = (fewer, error);
            at = at.min(steps.len());
        }
    }
    (steps, why)
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

#[test]
fn a_power_cut_leaves_old_or_new_pages_and_takes_nothing_that_was_synced() {
    let first = number_from("KMSFS_CRASH_SEED").unwrap_or_else(|| u64::from(u32::from_le_bytes(random_array())));
    let asked = number_from("KMSFS_CRASH_IMAGES").map(|number| usize::try_from(number).unwrap());
    let (wanted, begin) = (asked.unwrap_or(IMAGES), Instant::now());
    println!("KMSFS_CRASH_SEED={first} KMSFS_CRASH_IMAGES={wanted}");
    let (mut images, mut seed) = (0, first);
    // A machine that is busy with other things gets by with fewer.
    while images < wanted && (asked.is_some() || images < LEAST_IMAGES || begin.elapsed() < LONG) {
        let steps = steps_of(seed);
        let (held, result) = live(seed, &steps, LeftOut::Nothing);
        images += held;
        if let Err(broken) = result {
            let (steps, why) = minimised(seed, steps, LeftOut::Nothing);
            panic!("KMSFS_CRASH_SEED={seed}, {:?}: {broken}\nfewest steps: {steps:#?}\n{why}", kind(seed));
        }
        seed = seed.wrapping_add(1);
    }
    println!("{images} images of {} files", seed.wrapping_sub(first));
}

/// The replay would find it if a page were not pushed out before the size, if one were overwritten while it is dirty, or if a
/// header were rewritten before the last rewriting is durable.
#[test]
fn the_replay_finds_what_pushes_cleaning_and_syncs_are_for() {
    for left_out in [LeftOut::Pushes, LeftOut::Cleaning, LeftOut::SyncsBeforeHeaders] {
        let broken = (0..60).filter(|seed| live(*seed, &steps_of(*seed), left_out).1.is_err()).count();
        println!("without {left_out:?}: {broken} of 60 files broken");
        assert!(broken > 0, "{left_out:?}");
    }
}
