//! What a power cut may leave of one file on ext4, XFS or btrfs, as `docs/FORMAT.md` sections 1.1 and 6 assume: metadata up to some
//! moment, and of each page any version that its block may hold.

use crate::format::geometry::PAGE_LEN;
use crate::storage::{Change, Recorded};

const ZEROS: [u8; PAGE_LEN] = [0; PAGE_LEN];
/// Devices tear a page between two of these.
const SECTOR: usize = 512;

/// Numbers that a seed tells.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `end`, which is not 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }

    pub(super) fn one_in(&mut self, end: usize) -> bool {
        self.below(end) == 0
    }
}

/// What the replay leaves out of what the code did, to show that it would be found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum LeftOut {
    #[default]
    Nothing,
    /// No page is pushed out.
    Pushes,
    /// Dirty pages are overwritten as they are.
    Cleaning,
    /// Nothing is synced before headers are rewritten. This is left out by whoever rewrites them, and not here.
    SyncsBeforeHeaders,
}

/// A file on a disk that loses power.
pub(super) struct Disk {
    /// What the last sync made durable.
    durable: Vec<u8>,
    /// What was done since.
    since: Vec<Recorded>,
    /// What programs see.
    now: Vec<u8>,
    left_out: LeftOut,
}

/// The block that a page lies in as far as the durable metadata knows.
struct Block {
    /// What it may hold, oldest first; never empty.
    versions: Vec<Vec<u8>>,
    /// It may be on its way to the device.
    dirty: bool,
}

/// Which of the versions of its pages an image takes.
#[derive(Clone, Copy)]
enum Mood {
    Any,
    Oldest,
    Newest,
    OldestBut(usize),
    NewestBut(usize),
}

impl Disk {
    pub(super) fn new(durable: Vec<u8>, left_out: LeftOut) -> Self {
        Self { now: durable.clone(), durable, since: Vec::new(), left_out }
    }

    pub(super) fn durable(&self) -> &[u8] {
        &self.durable
    }

    pub(super) fn now(&self) -> &[u8] {
        &self.now
    }

    /// Lets one change happen. Returns whether it made everything before it durable.
    pub(super) fn happens(&mut self, recorded: Recorded) -> bool {
        let index = |at: u64| usize::try_from(at).unwrap();
        match recorded.change {
            Change::Write { offset, len } => {
                assert_eq!((offset % PAGE_LEN as u64, len % PAGE_LEN as u64), (0, 0), "a page is not written whole");
                let (start, end) = (index(offset), index(offset + len));
                self.now.resize(self.now.len().max(end), 0);
                self.now[start..end].copy_from_slice(&recorded.bytes);
            }
            Change::Size(size) => self.now.resize(index(size), 0),
            Change::Punch { offset, len } => {
                let end = index(offset + len).min(self.now.len());
                self.now[index(offset).min(end)..end].fill(0);
            }
            Change::Sync => {
                self.durable.clone_from(&self.now);
                self.since.clear();
                return true;
            }
            Change::Push { .. } | Change::Start { .. } | Change::Clean { .. } => {}
        }
        self.since.push(recorded);
        false
    }

    /// One of the files that a power cut at this moment may leave.
    pub(super) fn image(&self, random: &mut Random) -> Vec<u8> {
        // Changes of metadata before this one are durable, and no later ones.
        let cut = random.below(self.since.len() + 1);
        let size = self.size(cut, random);
        let pages = size.div_ceil(PAGE_LEN);
        let mood = match random.below(6) {
            0 => Mood::Oldest,
            1 => Mood::Newest,
            2 if pages > 0 => Mood::OldestBut(random.below(pages)),
            3 if pages > 0 => Mood::NewestBut(random.below(pages)),
            _ => Mood::Any,
        };
        let mut image = Vec::with_capacity(pages * PAGE_LEN);
        for page in 0..pages {
            match self.block(page, cut, random) {
                None => image.extend_from_slice(&ZEROS),
                Some(Block { versions, .. }) => {
                    let last = versions.len() - 1;
                    let taken = match mood {
                        Mood::Any => random.below(versions.len()),
                        Mood::Oldest => 0,
                        Mood::Newest => last,
                        Mood::OldestBut(other) => {
                            if other == page {
                                last
                            } else {
                                0
                            }
                        }
                        Mood::NewestBut(other) => {
                            if other == page {
                                0
                            } else {
                                last
                            }
                        }
                    };
                    image.extend_from_slice(&versions[taken]);
                }
            }
        }
        image.truncate(size);
        image
    }

    /// A size that is journaled by `cut`: a set one, or one that a write has moved on from it, page by page.
    fn size(&self, cut: usize, random: &mut Random) -> usize {
        let (mut least, mut most) = (self.durable.len(), self.durable.len());
        for (at, recorded) in self.since[..cut].iter().enumerate() {
            match recorded.change {
                Change::Write { offset, len } => most = most.max(usize::try_from(offset + len).unwrap()),
                Change::Size(size) => (least, most) = (usize::try_from(size).unwrap(), usize::try_from(size).unwrap()),
                Change::Push { offset, len } if self.pushed(at, cut) => {
                    least = least.max(most.min(usize::try_from(offset + len).unwrap()));
                }
                _ => {}
            }
        }
        let steps = most.div_ceil(PAGE_LEN) - least.div_ceil(PAGE_LEN);
        match random.below(steps + 1) {
            0 => least,
            step => ((least.div_ceil(PAGE_LEN) + step) * PAGE_LEN).min(most),
        }
    }

    /// The block of a page by the metadata that is journaled by `cut`, and what it may hold now.
    fn block(&self, page: usize, cut: usize, random: &mut Random) -> Option<Block> {
        let old = self.durable.get(page * PAGE_LEN..(page + 1) * PAGE_LEN).filter(|old| *old != ZEROS);
        let mut block = old.map(|old| Block { versions: vec![old.to_vec()], dirty: false });
        for (at, recorded) in self.since.iter().enumerate() {
            let journaled = at < cut;
            match recorded.change {
                Change::Write { offset, .. } if covers(recorded.change, page) => {
                    let start = page * PAGE_LEN - usize::try_from(offset).unwrap();
                    let new = recorded.bytes[start..start + PAGE_LEN].to_vec();
                    match &mut block {
                        Some(block) => {
                            // A header must not need its page to be written whole.
                            let is_rewritten_header = page == 0 && !block.dirty;
                            if is_rewritten_header || block.dirty && !self.cleaned(at, page) {
                                // Being on its way may have begun with any of them.
                                let before = block.versions[random.below(block.versions.len())].clone();
                                block.versions.push(torn(before, &new, random));
                            }
                            block.versions.push(new);
                            block.dirty = true;
                        }
                        // A new block may be known before its content has arrived.
                        None if journaled => {
                            block = Some(Block { versions: vec![ZEROS.to_vec(), new], dirty: true });
                        }
                        None => {}
                    }
                }
                Change::Size(_) | Change::Punch { .. } if covers(recorded.change, page) => {
                    if !journaled {
                        // What is written to the page from now on lies in another block.
                        break;
                    }
                    block = None;
                }
                Change::Push { .. } if covers(recorded.change, page) && self.left_out != LeftOut::Pushes => {
                    if let Some(block) = &mut block {
                        block.dirty = false;
                        if self.pushed(at, cut) {
                            block.versions.drain(..block.versions.len() - 1);
                        }
                    }
                }
                _ => {}
            }
        }
        block
    }

    /// Whether the metadata that is durable is younger than the push at `at`: the device's cache was flushed since.
    fn pushed(&self, at: usize, cut: usize) -> bool {
        cut > at + 1 && self.left_out != LeftOut::Pushes
    }

    /// Whether `page` was made clean just before the write at `at`.
    fn cleaned(&self, at: usize, page: usize) -> bool {
        let before = at.checked_sub(1).map(|before| self.since[before].change);
        self.left_out != LeftOut::Cleaning
            && before.is_some_and(|change| matches!(change, Change::Clean { .. }) && covers(change, page))
    }
}

/// Whether a change concerns a page. A size does if the page lies past it.
fn covers(change: Change, page: usize) -> bool {
    let (start, end) = ((page * PAGE_LEN) as u64, ((page + 1) * PAGE_LEN) as u64);
    match change {
        Change::Write { offset, len }
        | Change::Punch { offset, len }
        | Change::Push { offset, len }
        | Change::Clean { offset, len }
        | Change::Start { offset, len } => offset <= start && end <= offset + len,
        Change::Size(size) => size <= start,
        Change::Sync => true,
    }
}

/// A page that was changed on its way to the device.
fn torn(before: Vec<u8>, new: &[u8], random: &mut Random) -> Vec<u8> {
    let mut torn = before;
    let at = SECTOR * (1 + random.below(PAGE_LEN / SECTOR - 1));
    if random.one_in(2) {
        torn[at..].copy_from_slice(&new[at..]);
    } else {
        torn[..at].copy_from_slice(&new[..at]);
    }
    torn
}
