//! Unwrapping keys before they are asked for: when a program lists a directory and begins to open its files, the keys of
//! the files that come next in the listing are fetched in the background, so that reading a tree runs at the provider's
//! throughput and not at its latency.
//!
//! Listing alone fetches nothing: `ls -l` costs no call. Only for providers that are far away, and bounded: so many calls
//! at a time, so many files ahead, so many listings remembered.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::storage::{Access, NodeKind};

use super::inode::Inode;
use super::lane::Lane;
use super::open::Found;
use super::{Error, Filesystem, InodeId};

/// Calls at a time.
const THREADS: usize = 32;
/// How far ahead of the file that is opened.
const AHEAD: usize = 128;
/// Listings remembered, and entries of each.
const LISTINGS: usize = 16;
const ENTRIES: usize = 65536;

/// The files of a directory in the order in which they were listed.
#[derive(Default)]
pub(super) struct Listing {
    files: Vec<(u64, String)>,
}

impl Listing {
    /// Notes an entry that was delivered.
    pub(super) fn note(&mut self, ino: u64, kind: Option<NodeKind>, entry: &str) {
        if self.files.len() < ENTRIES && kind.is_none_or(|kind| kind == NodeKind::File) {
            self.files.push((ino, entry.to_owned()));
        }
    }
}

struct Remembered {
    directory: Arc<Inode>,
    files: Vec<(u64, String)>,
    places: HashMap<u64, usize>,
    /// Files before this one have been dealt with.
    next: AtomicUsize,
}

pub(super) struct Prefetch {
    lane: Lane,
    listings: Mutex<VecDeque<Arc<Remembered>>>,
}

impl Prefetch {
    pub(super) fn new() -> Self {
        Self { lane: Lane::new("kmsfs-prefetch", THREADS), listings: Mutex::default() }
    }

    fn remember(&self, listing: Remembered) {
        let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.retain(|known| known.directory.id != listing.directory.id);
        listings.push_front(Arc::new(listing));
        listings.truncate(LISTINGS);
    }

    /// The listing that has the file, and where.
    fn find(&self, id: InodeId) -> Option<(Arc<Remembered>, usize)> {
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.iter().find_map(|listing| Some((Arc::clone(listing), *listing.places.get(&id.0)?)))
    }
}

impl Filesystem {
    pub(super) fn prefetches(&self) -> bool {
        self.options.prefetch && self.volume.ring.is_remote()
    }

    /// Remembers what was listed of a directory.
    pub(super) fn remember_listing(&self, directory: &Arc<Inode>, listing: Listing) {
        if listing.files.len() < 2 {
            return;
        }
        let places = listing.files.iter().enumerate().map(|(place, (ino, _))| (*ino, place)).collect();
        let (directory, files, next) = (Arc::clone(directory), listing.files, AtomicUsize::new(0));
        self.prefetch.remember(Remembered { directory, files, places, next });
    }

    /// Somebody opens this file: the ones after it in its directory's listing will be wanted next.
    pub(super) fn prefetch_after(self: &Arc<Self>, id: InodeId) {
        if !self.prefetches() {
            return;
        }
        let Some((listing, place)) = self.prefetch.find(id) else { return };
        let end = (place + 1 + AHEAD).min(listing.files.len());
        let begin = listing.next.fetch_max(end, Ordering::Relaxed).max(place + 1);
        for place in begin..end {
            let (fs, listing) = (Arc::clone(self), Arc::clone(&listing));
            self.prefetch.lane.run(Box::new(move |turn| {
                // Whatever is wrong with the file, its opening will say.
                let _ = turn.and_then(|()| fs.fetch_key(&listing.directory, &listing.files[place].1));
            }));
        }
    }

    fn fetch_key(&self, directory: &Inode, entry: &str) -> Result<(), Error> {
        let (inode, _) = self.learn(directory.node.lookup(entry)?)?;
        let fetched = self.fetch_key_of(&inode);
        self.forget(inode.id, 1);
        fetched
    }

    fn fetch_key_of(&self, inode: &Inode) -> Result<(), Error> {
        if inode.kind != NodeKind::File || inode.slot().open.is_some() {
            return Ok(());
        }
        let file = self.open_backing(inode, Access::Read)?;
        if let Found::Header(header) = self.find_header(inode, &file)? {
            self.volume.ring.open(&header)?;
        }
        Ok(())
    }
}
