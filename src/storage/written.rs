//! Which pages of a file may be dirty. The kernel counts a whole folio dirty, up to hundreds of pages, after one of them is written:
//! what was written since the file, or a part of it, was last seen clean tells more.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a page, the least that is written at a time.
const PAGE: u64 = 4096;
/// Pages of a block, of which the kernel is asked at once.
const BLOCK: u64 = 512;
const WORD: u64 = u64::BITS as u64;
/// When more blocks are known than these, which take about a megabyte, all are forgotten.
const MOST_BLOCKS: usize = 1 << 14;

/// One bit for each page of a block.
type Bits = [u64; (BLOCK / WORD) as usize];

struct Pages {
    blocks: HashMap<u64, Bits>,
    /// Whether pages of other blocks are dirty.
    others: bool,
}

impl Pages {
    const CLEAN: Bits = [0; _];

    fn all(dirty: bool) -> Self {
        Self { blocks: HashMap::new(), others: dirty }
    }

    fn bits(&self, block: u64) -> Bits {
        let others = if self.others { u64::MAX } else { 0 };
        self.blocks.get(&block).copied().unwrap_or([others; _])
    }

    fn set(&mut self, block: u64, bits: Bits) {
        if self.blocks.len() >= MOST_BLOCKS && !self.blocks.contains_key(&block) {
            *self = Self::all(true);
        }
        self.blocks.insert(block, bits);
    }

    fn add(&mut self, pages: Range<u64>) {
        for (block, mask) in masks(pages) {
            if !self.others || self.blocks.contains_key(&block) {
                self.set(block, union(self.bits(block), mask));
            }
        }
    }

    fn has_any(&self, block: u64, mask: &Bits) -> bool {
        self.bits(block).iter().zip(mask).any(|(word, mask)| word & mask != 0)
    }

    fn merge(&mut self, other: &Self) {
        let blocks: Vec<u64> = self.blocks.keys().chain(other.blocks.keys()).copied().collect();
        let bits = |block| (block, union(self.bits(block), other.bits(block)));
        let mut merged = Self::all(self.others || other.others);
        blocks.into_iter().map(bits).for_each(|(block, bits)| merged.set(block, bits));
        *self = merged;
    }
}

fn union(bits: Bits, other: Bits) -> Bits {
    std::array::from_fn(|word| bits[word] | other[word])
}

struct State {
    now: Pages,
    /// What the syncs that run cover, oldest first.
    syncing: Vec<(u64, Pages)>,
    syncs: u64,
}

impl State {
    fn all(&mut self) -> impl Iterator<Item = &mut Pages> {
        self.syncing.iter_mut().map(|(_, pages)| pages).chain([&mut self.now])
    }
}

/// Pages that may be dirty: those written through one open file, and all of which nothing is known.
pub(super) struct Written(Mutex<State>);

impl Written {
    pub(super) fn unknown() -> Self {
        Self(Mutex::new(State { now: Pages::all(true), syncing: Vec::new(), syncs: 0 }))
    }

    /// Notes bytes that have been written: a sync that begins from now on covers them.
    pub(super) fn add(&self, offset: u64, len: u64) {
        self.state().now.add(pages(offset, len));
    }

    /// Whether a page of the range may be dirty. `is_clean` asks the kernel about a range, given as offset and length: no page of
    /// it was written that is not noted here, or will be.
    pub(super) fn may_be_dirty(&self, offset: u64, len: u64, is_clean: impl Fn(u64, u64) -> bool) -> bool {
        // The lock is held meanwhile: what is written after the kernel has answered is noted after this.
        let mut state = self.state();
        masks(pages(offset, len)).any(|(block, mask)| {
            if !state.all().any(|pages| pages.has_any(block, &mask)) {
                return false;
            }
            let dirty = !is_clean(block * BLOCK * PAGE, BLOCK * PAGE);
            if !dirty {
                state.all().for_each(|pages| pages.set(block, Pages::CLEAN));
            }
            dirty
        })
    }

    /// Runs a sync of the whole file.
    pub(super) fn sync<E>(&self, sync: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.state();
        state.syncs += 1;
        let number = state.syncs;
        let covered = std::mem::replace(&mut state.now, Pages::all(false));
        state.syncing.push((number, covered));
        drop(state);
        let result = sync();
        let mut state = self.state();
        let (covered, later) = std::mem::take(&mut state.syncing).into_iter().partition(|(other, _)| *other <= number);
        state.syncing = later;
        if result.is_err() {
            covered.iter().for_each(|(_, covered)| state.now.merge(covered));
        }
        result
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pages(offset: u64, len: u64) -> Range<u64> {
    offset / PAGE..offset.saturating_add(len).div_ceil(PAGE)
}

/// The blocks that the pages lie in, and which of each they are.
fn masks(pages: Range<u64>) -> impl Iterator<Item = (u64, Bits)> {
    (pages.start / BLOCK..pages.end.div_ceil(BLOCK)).map(move |block| {
        let mut mask = Pages::CLEAN;
        for (word, first) in mask.iter_mut().zip((0..).map(|word| block * BLOCK + word * WORD)) {
            let from = pages.start.clamp(first, first + WORD) - first;
            let to = pages.end.clamp(first, first + WORD) - first;
            *word = below(to) & !below(from);
        }
        (block, mask)
    })
}

/// The lowest `count` bits of a word.
fn below(count: u64) -> u64 {
    if count < WORD { (1 << count) - 1 } else { u64::MAX }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_dirty(written: &Written, page: u64) -> bool {
        written.may_be_dirty(page * PAGE, PAGE, |_, _| false)
    }

    fn known() -> Written {
        let written = Written::unknown();
        written.sync(|| Ok::<_, ()>(())).unwrap();
        written
    }

    #[test]
    fn pages_are_dirty_from_their_writing_to_the_end_of_a_sync_that_began_later() {
        let written = known();
        written.add(3 * PAGE + 1, 2 * PAGE);
        written.add(510 * PAGE, 600 * PAGE);
        let found: Vec<_> = (0..2000).filter(|page| is_dirty(&written, *page)).collect();
        assert!(found.into_iter().eq((3..6).chain(510..1110)));
        let synced: Result<(), i32> = written.sync(|| {
            assert!(is_dirty(&written, 4));
            written.add(7 * PAGE, 1);
            // Another sync begins later and ends sooner: it covers what both do.
            written.sync(|| Ok::<_, i32>(()))?;
            assert!(!is_dirty(&written, 4) && !is_dirty(&written, 7));
            written.add(8 * PAGE, 1);
            Ok(())
        });
        assert_eq!(synced, Ok(()));
        assert!(is_dirty(&written, 8) && !is_dirty(&written, 7));
    }

    #[test]
    fn a_sync_that_fails_covers_nothing() {
        let written = known();
        written.add(0, PAGE);
        let failed = written.sync(|| {
            written.add(PAGE, PAGE);
            Err(5)
        });
        assert_eq!(failed, Err(5));
        assert!(is_dirty(&written, 0) && is_dirty(&written, 1) && !is_dirty(&written, 2));
    }

    #[test]
    fn a_block_that_the_kernel_calls_clean_is_clean_until_a_page_is_written() {
        let written = Written::unknown();
        let asked = Mutex::new(Vec::new());
        let ask = |page: u64, clean: bool| {
            written.may_be_dirty(page * PAGE, PAGE, |offset, len| {
                asked.lock().unwrap().push((offset / PAGE, len / PAGE));
                clean
            })
        };
        assert!(ask(600, false) && !ask(600, true) && !ask(601, false));
        assert!(ask(1, false), "of another block nothing is known");
        assert_eq!(*asked.lock().unwrap(), [(512, 512), (512, 512), (0, 512)]);
        written.add(600 * PAGE, PAGE);
        assert!(ask(600, false) && !ask(601, false));
        assert!(written.sync(|| Err(5)).is_err());
        assert!(ask(600, false) && !ask(601, false) && ask(1, false));
    }

    #[test]
    fn with_too_many_blocks_nothing_is_known() {
        let written = known();
        (0..MOST_BLOCKS as u64 + 1).for_each(|block| written.add(block * BLOCK * PAGE, PAGE));
        assert!(is_dirty(&written, 1));
        written.sync(|| Ok::<_, ()>(())).unwrap();
        assert!(!is_dirty(&written, 1));
    }
}
