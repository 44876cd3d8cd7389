//! Which pages of a file were written since it was last made durable. The kernel counts a whole folio dirty, up to hundreds of
//! pages, after one of them is written: it cannot tell.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of a page, the least that is written at a time.
const PAGE: u64 = 4096;
/// Pages of one bitmap.
const BLOCK: u64 = 4096;
const WORD: u64 = u64::BITS as u64;
/// With more bitmaps, half a megabyte of them, every page counts as written.
const MOST_BLOCKS: usize = 1024;

#[derive(Default)]
struct Pages {
    all: bool,
    blocks: HashMap<u64, Box<[u64; (BLOCK / WORD) as usize]>>,
}

impl Pages {
    fn bits(pages: Range<u64>) -> impl Iterator<Item = (u64, usize, u64)> {
        pages.map(|page| (page / BLOCK, usize::try_from(page % BLOCK / WORD).unwrap_or(0), 1 << (page % WORD)))
    }

    fn add(&mut self, pages: Range<u64>) {
        for (block, word, bit) in Self::bits(pages) {
            if self.all {
                return;
            }
            self.blocks.entry(block).or_insert_with(|| Box::new([0; _]))[word] |= bit;
            self.all = self.blocks.len() > MOST_BLOCKS;
        }
        if self.all {
            self.blocks = HashMap::new();
        }
    }

    fn has_any(&self, pages: Range<u64>) -> bool {
        let has = |(block, word, bit)| self.blocks.get(&block).is_some_and(|words| words[word] & bit != 0);
        self.all || Self::bits(pages).any(has)
    }

    fn merge(&mut self, other: Self) {
        for (block, words) in other.blocks {
            let mine = self.blocks.entry(block).or_insert_with(|| Box::new([0; _]));
            mine.iter_mut().zip(words.iter()).for_each(|(mine, word)| *mine |= word);
        }
        self.all |= other.all || self.blocks.len() > MOST_BLOCKS;
        if self.all {
            self.blocks = HashMap::new();
        }
    }
}

#[derive(Default)]
struct State {
    now: Pages,
    /// What the syncs that run cover, oldest first.
    syncing: Vec<(u64, Pages)>,
    syncs: u64,
    /// Whether somebody has looked for what was written before the file was opened.
    has_looked: bool,
}

/// Pages written through one open file, and those that were dirty before.
pub(super) struct Written(Mutex<State>);

impl Written {
    pub(super) fn unknown() -> Self {
        Self(Mutex::new(State { now: Pages { all: true, ..Pages::default() }, ..State::default() }))
    }

    /// Notes bytes that have been written: a sync that begins from now on covers them.
    pub(super) fn add(&self, offset: u64, len: u64) {
        self.state().now.add(pages(offset, len));
    }

    /// Whether a page of the range may be dirty. `is_clean` tells once whether the file had no dirty page when it was opened.
    pub(super) fn may_be_dirty(&self, offset: u64, len: u64, is_clean: impl FnOnce() -> bool) -> bool {
        let mut state = self.state();
        if !std::mem::replace(&mut state.has_looked, true) && is_clean() {
            (state.now, state.syncing) = (Pages::default(), Vec::new());
        }
        let pages = pages(offset, len);
        state.now.has_any(pages.clone()) || state.syncing.iter().any(|(_, syncing)| syncing.has_any(pages.clone()))
    }

    /// Runs a sync of the whole file.
    pub(super) fn sync<E>(&self, sync: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.state();
        state.syncs += 1;
        let number = state.syncs;
        let covered = std::mem::take(&mut state.now);
        state.syncing.push((number, covered));
        drop(state);
        let result = sync();
        let mut state = self.state();
        let (covered, later) = std::mem::take(&mut state.syncing).into_iter().partition(|(other, _)| *other <= number);
        state.syncing = later;
        if result.is_err() {
            covered.into_iter().for_each(|(_, covered)| state.now.merge(covered));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Written {
        let written = Written::unknown();
        assert!(!written.may_be_dirty(0, PAGE, || true));
        written
    }

    fn is_dirty(written: &Written, page: u64) -> bool {
        written.may_be_dirty(page * PAGE, PAGE, || panic!("it is asked once"))
    }

    #[test]
    fn pages_are_dirty_from_their_writing_to_the_end_of_a_sync_that_began_later() {
        let written = known();
        written.add(3 * PAGE + 1, 2 * PAGE);
        let found: Vec<_> = (0..9).filter(|page| is_dirty(&written, *page)).collect();
        assert_eq!(found, [3, 4, 5]);
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
        assert_eq!(written.sync(|| Err(5)), Err(5));
        assert!(is_dirty(&written, 0) && !is_dirty(&written, 1));
    }

    #[test]
    fn every_page_is_dirty_while_nothing_is_known_or_too_much_was_written() {
        let written = Written::unknown();
        assert!(written.may_be_dirty(0, PAGE, || false));
        assert!(is_dirty(&written, 1 << 40));
        written.sync(|| Ok::<_, ()>(())).unwrap();
        assert!(!is_dirty(&written, 0));
        (0..=MOST_BLOCKS as u64).for_each(|block| written.add(block * BLOCK * PAGE, PAGE));
        assert!(is_dirty(&written, 1));
    }
}
