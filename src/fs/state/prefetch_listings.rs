//! Listings of a moment ago: their files are probably opened next, in that order.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::fs::kernel::InodeId;
use crate::storage::NodeKind;

use super::inode::Inode;
use super::prefetch_window::PrefetchWindow;

/// Listings remembered, entries of each, and bytes that all listings take, those included that have not ended.
const LISTINGS: usize = 64;
const ENTRIES: usize = 65536;
const MOST_BYTES: usize = 16 << 20;
/// Bytes that an entry takes beside its name: twice in a list as the list grows, and in the map of places.
const ENTRY: usize = 128;

/// What a directory holds that is of interest, in the order in which it was listed.
#[derive(Default)]
pub(crate) struct Listing {
    pub(crate) files: Vec<(u64, String)>,
    directories: Vec<(u64, String)>,
    charge: Option<Charge>,
}

/// Bytes taken of what all listings may take, until this is dropped.
struct Charge {
    all: Arc<AtomicUsize>,
    own: usize,
}

impl Charge {
    /// False if so much is not left.
    fn take(&mut self, bytes: usize) -> bool {
        let taken = self.all.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.own += bytes;
        taken <= MOST_BYTES
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.all.fetch_sub(self.own, Ordering::Relaxed);
    }
}

impl Listing {
    /// Notes an entry that was delivered.
    fn note(&mut self, all: &Arc<AtomicUsize>, ino: u64, kind: Option<NodeKind>, entry: &str) {
        let list = match kind {
            None | Some(NodeKind::File) => &mut self.files,
            // A walk does not go into a directory itself, or up.
            Some(NodeKind::Directory) if [".", ".."].contains(&entry) => return,
            Some(NodeKind::Directory) => &mut self.directories,
            Some(_) => return,
        };
        let charge = self.charge.get_or_insert_with(|| Charge { all: Arc::clone(all), own: 0 });
        if list.len() < ENTRIES && all.load(Ordering::Relaxed) < MOST_BYTES && charge.take(ENTRY + entry.len()) {
            list.push((ino, entry.to_owned()));
        }
    }
}

pub(crate) struct Remembered {
    pub(crate) directory: Arc<Inode>,
    pub(crate) listing: Listing,
    places: HashMap<u64, usize>,
    /// Files before this one have been dealt with.
    pub(crate) next: AtomicUsize,
    /// Files that were opened.
    pub(crate) opened: AtomicUsize,
    /// The directory that comes next was seen to.
    pub(crate) went_on: AtomicBool,
    /// No program has listed it yet.
    unasked: AtomicBool,
}

pub(crate) struct PrefetchListings {
    listings: Mutex<VecDeque<Arc<Remembered>>>,
    /// Bytes that all listings take.
    bytes: Arc<AtomicUsize>,
    window: Mutex<PrefetchWindow>,
}

impl PrefetchListings {
    pub(crate) fn new() -> Self {
        Self {
            listings: Mutex::default(),
            bytes: Arc::default(),
            window: Mutex::new(PrefetchWindow::new(Instant::now())),
        }
    }

    pub(crate) fn window(&self) -> MutexGuard<'_, PrefetchWindow> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers what was listed of a directory.
    pub(crate) fn remember_listing(&self, directory: &Arc<Inode>, listing: Listing) {
        if listing.files.len() > 1 || !listing.directories.is_empty() {
            self.remember(directory, listing, false);
        }
    }

    /// The same of any listing; `unasked` says that no program has listed the directory.
    pub(crate) fn remember(&self, directory: &Arc<Inode>, listing: Listing, unasked: bool) -> Arc<Remembered> {
        let places = listing.files.iter().enumerate().map(|(place, (ino, _))| (*ino, place)).collect();
        self.put(Remembered {
            directory: Arc::clone(directory),
            listing,
            places,
            next: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            went_on: AtomicBool::new(false),
            unasked: AtomicBool::new(unasked),
        })
    }

    /// A directory that was looked into ahead of the program keeps what is known of it when the program comes: its files
    /// have been dealt with.
    fn put(&self, listing: Remembered) -> Arc<Remembered> {
        let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |known: &Arc<Remembered>| {
            known.directory.id == listing.directory.id
                && known.listing.files == listing.listing.files
                && known.unasked.swap(false, Ordering::Relaxed)
        };
        let place = listings.iter().position(same);
        let known = place.and_then(|place| listings.remove(place)).unwrap_or_else(|| Arc::new(listing));
        listings.retain(|other| other.directory.id != known.directory.id);
        listings.push_front(Arc::clone(&known));
        listings.truncate(LISTINGS);
        // Room for the next one.
        while listings.len() > 1 && self.bytes.load(Ordering::Relaxed) > MOST_BYTES / 2 {
            listings.pop_back();
        }
        known
    }

    /// Notes an entry of a listing.
    pub(crate) fn note(&self, listing: &mut Listing, ino: u64, kind: Option<NodeKind>, entry: &str) {
        listing.note(&self.bytes, ino, kind, entry);
    }

    /// The listing that has the file, and where.
    pub(crate) fn find(&self, id: InodeId) -> Option<(Arc<Remembered>, usize)> {
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.iter().find_map(|listing| Some((Arc::clone(listing), *listing.places.get(&id.0)?)))
    }

    /// The directory that a walk comes to after that of `listing`, as far as listings are known: its first child, or what
    /// comes after it or after one that it lies in.
    pub(crate) fn directory_after(&self, listing: &Remembered) -> Option<(Arc<Inode>, String)> {
        if let Some((_, child)) = listing.listing.directories.first() {
            return Some((Arc::clone(&listing.directory), child.clone()));
        }
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ino = listing.directory.id.0;
        loop {
            let (parent, place) = listings.iter().find_map(|parent| {
                let place = parent.listing.directories.iter().position(|(other, _)| *other == ino)?;
                Some((parent, place))
            })?;
            if let Some((_, next)) = parent.listing.directories.get(place + 1) {
                return Some((Arc::clone(&parent.directory), next.clone()));
            }
            ino = parent.directory.id.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many directories are listed at a time, and however long their names are.
    #[test]
    fn listings_take_no_more_than_their_bound_and_give_it_back() {
        let prefetch = PrefetchListings::new();
        let mut listings: Vec<Listing> = (0..70).map(|_| Listing::default()).collect();
        for listing in &mut listings {
            (0..5000).for_each(|ino| prefetch.note(listing, ino, None, &"n".repeat(60)));
        }
        let held: usize = listings.iter().map(|listing| listing.files.len() * (ENTRY + 60)).sum();
        let counted = prefetch.bytes.load(Ordering::Relaxed);
        assert!(held <= MOST_BYTES && counted >= held && counted <= MOST_BYTES + 1000, "{held} {counted}");
        assert!(held > MOST_BYTES / 2);
        drop(listings);
        assert_eq!(prefetch.bytes.load(Ordering::Relaxed), 0);
    }
}
