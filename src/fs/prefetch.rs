//! Unwrapping keys before they are asked for: when a program lists a directory and begins to open its files, the keys of
//! the files that come next in the listing are fetched in the background, so that reading a tree runs at the provider's
//! throughput and not at its latency. Near the end of a listing the files of the directory that comes next in the parent's
//! listing follow, before anybody has listed them.
//!
//! Listing alone fetches nothing: `ls -l` costs no call, and who opens a single file pays for few others: how far ahead is
//! looked doubles with each file that is opened, as long as few are left out. Only for providers that are far away, and
//! bounded: so many calls at a time, so many files ahead, so many listings remembered. A provider that gives none of
//! several keys in a row is left alone for a while.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::format::name::{self, Entry};
use crate::keys::{Behalf, Reason};
use crate::storage::{Access, NodeKind};

use super::backing::Found;
use super::inode::Inode;
use super::pace::Pace;
use super::workers::Workers;
use super::{Error, Filesystem, InodeId};

/// Calls at a time.
const THREADS: usize = 96;
/// Directories that are looked into before a program lists them.
const DIRECTORIES_AHEAD: usize = 16;
/// Listings remembered, entries of each, and bytes that all listings take, those included that have not ended.
const LISTINGS: usize = 64;
const ENTRIES: usize = 65536;
const MOST_BYTES: usize = 16 << 20;
/// Bytes that an entry takes beside its name: twice in a list as the list grows, and in the map of places.
const ENTRY: usize = 128;

/// What a directory holds that is of interest, in the order in which it was listed.
#[derive(Default)]
pub(super) struct Listing {
    files: Vec<(u64, String)>,
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

struct Remembered {
    directory: Arc<Inode>,
    listing: Listing,
    places: HashMap<u64, usize>,
    /// Files before this one have been dealt with.
    next: AtomicUsize,
    /// Files that were opened.
    opened: AtomicUsize,
    /// The directory that comes next was seen to.
    went_on: AtomicBool,
    /// No program has listed it yet.
    unasked: AtomicBool,
}

pub(super) struct Prefetch {
    lane: Workers,
    listings: Mutex<VecDeque<Arc<Remembered>>>,
    /// Bytes that all listings take.
    bytes: Arc<AtomicUsize>,
    pace: Mutex<Pace>,
}

impl Prefetch {
    pub(super) fn new() -> Self {
        Self {
            lane: Workers::new("kmsfs-prefetch", THREADS),
            listings: Mutex::default(),
            bytes: Arc::default(),
            pace: Mutex::new(Pace::new(Instant::now())),
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A directory that was looked into ahead of the program keeps what is known of it when the program comes: its files
    /// have been dealt with.
    fn remember(&self, listing: Remembered) -> Arc<Remembered> {
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
    pub(super) fn note(&self, listing: &mut Listing, ino: u64, kind: Option<NodeKind>, entry: &str) {
        listing.note(&self.bytes, ino, kind, entry);
    }

    /// The listing that has the file, and where.
    fn find(&self, id: InodeId) -> Option<(Arc<Remembered>, usize)> {
        let listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        listings.iter().find_map(|listing| Some((Arc::clone(listing), *listing.places.get(&id.0)?)))
    }

    /// The directory that a walk comes to after that of `listing`, as far as listings are known: its first child, or what
    /// comes after it or after one that it lies in.
    fn directory_after(&self, listing: &Remembered) -> Option<(Arc<Inode>, String)> {
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

impl Filesystem {
    pub(super) fn prefetches(&self) -> bool {
        self.options.prefetch && self.volume.ring.is_remote()
    }

    /// Remembers what was listed of a directory.
    pub(super) fn remember_listing(&self, directory: &Arc<Inode>, listing: Listing) {
        if listing.files.len() > 1 || !listing.directories.is_empty() {
            self.remember(directory, listing, false);
        }
    }

    fn remember(&self, directory: &Arc<Inode>, listing: Listing, unasked: bool) -> Arc<Remembered> {
        let places = listing.files.iter().enumerate().map(|(place, (ino, _))| (*ino, place)).collect();
        self.prefetch.remember(Remembered {
            directory: Arc::clone(directory),
            listing,
            places,
            next: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            went_on: AtomicBool::new(false),
            unasked: AtomicBool::new(unasked),
        })
    }

    /// Somebody opens this file: the ones after it in its directory's listing will be wanted next, and then those of the
    /// directories that come after.
    pub(super) fn prefetch_after(self: &Arc<Self>, id: InodeId) {
        if !self.prefetches() {
            return;
        }
        let Some((listing, place)) = self.prefetch.find(id) else { return };
        let opened = listing.opened.fetch_add(1, Ordering::Relaxed) + 1;
        let ahead = self.prefetch.pace().ahead(place < 2 * opened, Instant::now());
        let left = self.fetch_from(&listing, place + 1, ahead);
        // A walk goes on; who looks at a few files may not.
        if ahead == Pace::MOST_AHEAD {
            self.go_on_after(listing, left, DIRECTORIES_AHEAD);
        }
    }

    /// Fetches the keys of up to `ahead` files from `place` on; returns how many more could be fetched after the last.
    fn fetch_from(self: &Arc<Self>, listing: &Arc<Remembered>, place: usize, ahead: usize) -> usize {
        let files = &listing.listing.files;
        let end = (place + ahead).min(files.len());
        let begin = listing.next.fetch_max(end, Ordering::Relaxed).max(place);
        for place in begin..end {
            let (fs, listing) = (Arc::clone(self), Arc::clone(listing));
            self.prefetch.lane.run(move |turn| {
                // Whatever is wrong with the file, its opening will say.
                let (ino, entry) = &listing.listing.files[place];
                let _ = turn.and_then(|()| fs.fetch_key(&listing.directory, *ino, entry));
            });
        }
        (place + ahead).saturating_sub(files.len())
    }

    /// Goes on with the directories after that of `listing`, once for each.
    fn go_on_after(self: &Arc<Self>, listing: Arc<Remembered>, ahead: usize, directories: usize) {
        if ahead == 0 || directories == 0 || listing.went_on.swap(true, Ordering::Relaxed) {
            return;
        }
        let Some((parent, entry)) = self.prefetch.directory_after(&listing) else { return };
        let fs = Arc::clone(self);
        self.prefetch.lane.run(move |turn| {
            if let Ok(next) = turn.and_then(|()| fs.look_into(&parent, &entry)) {
                let left = fs.fetch_from(&next, 0, ahead);
                fs.go_on_after(next, left, directories - 1);
            }
        });
    }

    /// Lists a directory that nobody has listed yet.
    fn look_into(&self, parent: &Inode, entry: &str) -> Result<Arc<Remembered>, Error> {
        let (directory, _) = self.learn(parent.node.lookup(entry)?)?;
        let listed = self.list_quietly(&directory).map(|listing| self.remember(&directory, listing, true));
        self.forget(directory.id, 1);
        listed
    }

    fn list_quietly(&self, directory: &Inode) -> Result<Listing, Error> {
        let mut stream = directory.node.open_directory()?;
        let (mut listing, mut position) = (Listing::default(), 0);
        while let Some(entry) = stream.entry_at(position)? {
            if matches!(name::classify(&entry.name), Entry::Short(_) | Entry::Long(_)) {
                self.prefetch.note(&mut listing, entry.ino, entry.kind, &entry.name);
            }
            position = entry.next_position;
            stream.advance();
        }
        Ok(listing)
    }

    /// Whoever lists a directory with attributes knows its inodes already.
    fn fetch_key(&self, directory: &Inode, ino: u64, entry: &str) -> Result<(), Error> {
        if self.prefetch.pace().is_paused(Instant::now()) {
            return Ok(());
        }
        let _ahead = Behalf::ahead(Reason::Prefetch).enter();
        if let Some(known) = self.inodes.by_entry(ino) {
            return self.fetch_key_of(&known);
        }
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
            let opened = self.volume.ring.open(&header);
            let has_none = opened.as_ref().is_err_and(|error| error.provider_kind().is_some());
            self.prefetch.pace().note(!has_none, Instant::now());
            opened?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many directories are listed at a time, and however long their names are.
    #[test]
    fn listings_take_no_more_than_their_bound_and_give_it_back() {
        let prefetch = Prefetch::new();
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
