//! Unwrapping keys before they are asked for: when a program lists a directory and begins to open its files, the keys of
//! the files that come next in the listing are fetched in the background, so that reading a tree runs at the provider's
//! throughput and not at its latency. Near the end of a listing the files of the directory that comes next in the parent's
//! listing follow, before anybody has listed them.
//!
//! Listing alone fetches nothing: `ls -l` costs no call, and who opens a single file pays for few others: how far ahead is
//! looked doubles with each file that is opened, as long as few are left out. Only for providers that are far away, and
//! bounded: so many calls at a time, so many files ahead, so many listings remembered. A provider that gives none of
//! several keys in a row is left alone for a while.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::format::name::{self, Entry};
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::ops::backing_file::Found;
use crate::fs::state::inode::Inode;
use crate::fs::state::prefetch_listings::{Listing, Remembered};
use crate::fs::state::prefetch_window::PrefetchWindow;
use crate::keys::{Behalf, Reason};
use crate::storage::{Access, NodeKind};

/// Directories that are looked into before a program lists them.
const DIRECTORIES_AHEAD: usize = 16;
impl Filesystem {
    /// Somebody opens this file: the ones after it in its directory's listing will be wanted next, and then those of the
    /// directories that come after.
    pub(in crate::fs) fn prefetch_after(self: &Arc<Self>, inode: &Inode) {
        if !self.prefetches() {
            return;
        }
        let Some((listing, place)) = self.work.prefetch.find(inode.id) else { return };
        let opened = listing.opened.fetch_add(1, Ordering::Relaxed) + 1;
        let ahead = self.work.prefetch.window().ahead(place < 2 * opened, Instant::now());
        let left = self.fetch_from(&listing, place + 1, ahead);
        // A walk goes on; who looks at a few files may not.
        if ahead == PrefetchWindow::MOST_AHEAD {
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
            self.pools.prefetch.run(move |turn| {
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
        let Some((parent, entry)) = self.work.prefetch.directory_after(&listing) else { return };
        let fs = Arc::clone(self);
        self.pools.prefetch.run(move |turn| {
            if let Ok(next) = turn.and_then(|()| fs.look_into(&parent, &entry)) {
                let left = fs.fetch_from(&next, 0, ahead);
                fs.go_on_after(next, left, directories - 1);
            }
        });
    }

    /// Lists a directory that nobody has listed yet.
    fn look_into(&self, parent: &Inode, entry: &str) -> Result<Arc<Remembered>, Error> {
        let (directory, _) = self.learn(parent.node.lookup(entry)?)?;
        let listed =
            self.list_quietly(&directory).map(|listing| self.work.prefetch.remember(&directory, listing, true));
        self.forget(directory.id, 1);
        listed
    }

    fn list_quietly(&self, directory: &Inode) -> Result<Listing, Error> {
        let mut stream = directory.node.open_directory()?;
        let (mut listing, mut position) = (Listing::default(), 0);
        while let Some(entry) = stream.entry_at(position)? {
            if matches!(name::classify(&entry.name), Entry::Short(_) | Entry::Long(_)) {
                self.work.prefetch.note(&mut listing, entry.ino, entry.kind, &entry.name);
            }
            position = entry.next_position;
            stream.advance();
        }
        Ok(listing)
    }

    /// Whoever lists a directory with attributes knows its inodes already.
    fn fetch_key(&self, directory: &Inode, ino: u64, entry: &str) -> Result<(), Error> {
        if self.work.prefetch.window().is_paused(Instant::now()) {
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
            self.work.prefetch.window().note(!has_none, Instant::now());
            opened?;
        }
        Ok(())
    }
}
