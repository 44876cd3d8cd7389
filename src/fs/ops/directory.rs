//! Reading directories. Positions are the backing filesystem's own, so they stay valid while entries come and go.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::fs::error::{Error, lacks_descriptors};
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::attributes::Attributes;
use crate::fs::state::inode::Inode;
use crate::fs::state::open_directories::{DirectoryHandle, OpenDirectory, OpenStream};
use crate::fs::state::prefetch_listings::Listing;
use crate::storage::{DirEntry, DirStream, NodeKind};

/// An entry to be delivered.
pub struct Listed<'e> {
    /// Its plain name.
    pub name: &'e [u8],
    /// Its inode.
    pub id: InodeId,
    /// Its kind, if it is known without asking.
    pub kind: Option<NodeKind>,
    /// The position after it.
    pub next_position: u64,
    /// Its attributes, if they were asked for. Delivering it then counts as a lookup, unless it is `.` or `..`, or
    /// [`UNREADABLE`].
    pub attributes: Option<Attributes>,
}

/// Stands for the inode of an entry that is there and whose attributes cannot be had: no inode ever has it.
pub const UNREADABLE: InodeId = InodeId(u64::MAX);

impl Filesystem {
    /// Opens a directory for reading.
    ///
    /// # Errors
    /// [`Error::DirectoryId`] if names in it cannot be read.
    pub fn open_directory(&self, id: InodeId) -> Result<DirectoryHandle, Error> {
        let inode = self.inodes.get(id)?;
        self.directory_id(&inode).inspect_err(|error| self.report(&inode, error))?;
        Ok(self.handles.directories.insert(OpenDirectory::new(inode)))
    }

    /// Closes a directory.
    pub fn close_directory(&self, handle: DirectoryHandle) {
        self.handles.directories.remove(handle);
    }

    /// Hands entries from `position` on to `deliver`, until it says that it has no room for one or there are no more.
    ///
    /// # Errors
    /// [`Error`]; not after an entry was delivered.
    pub fn list(
        &self,
        handle: DirectoryHandle,
        position: u64,
        with_attributes: bool,
        mut deliver: impl FnMut(&Listed<'_>) -> bool,
    ) -> Result<(), Error> {
        let directory = self.handles.directories.get(handle)?;
        if with_attributes {
            self.descriptors.request(|| self.descriptors_in_use());
        }
        let mut stream = directory.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = self.stream_of(&directory.inode, &mut stream)?;
        let mut listed = directory.listed.lock().unwrap_or_else(PoisonError::into_inner);
        if position == 0 {
            *listed = Listing::default();
        }
        let (mut position, mut delivered) = (position, 0_usize);
        // The kernel can give up nothing of an answer that it does not have yet, so one must not wait for another.
        while delivered == 0
            || !with_attributes
            || delivered < self.descriptors.readdir_budget(self.descriptors_in_use())
        {
            let entry = match stream.entry_at(position) {
                Ok(Some(entry)) => entry,
                Ok(None) => {
                    self.work.prefetch.remember_listing(&directory.inode, std::mem::take(&mut *listed));
                    return Ok(());
                }
                Err(_) if delivered > 0 => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            position = entry.next_position;
            match self.deliver(&directory.inode, entry, with_attributes, delivered == 0, &mut deliver) {
                Delivery::Full => return Ok(()),
                Delivery::Done => {
                    delivered += 1;
                    if self.prefetches() {
                        self.work.prefetch.note(&mut listed, entry.ino, entry.kind, &entry.name);
                    }
                }
                Delivery::Skipped => {}
                Delivery::Later => return Ok(()),
            }
            stream.advance();
        }
        Ok(())
    }

    fn stream_of<'s>(&self, directory: &Inode, stream: &'s mut Option<OpenStream>) -> Result<&'s mut DirStream, Error> {
        let open = match stream.take() {
            Some(open) => open,
            None => OpenStream {
                stream: self.descriptors.retry_on_emfile(|| directory.node.open_directory())?,
                _held: self.descriptors.hold(),
            },
        };
        Ok(&mut stream.insert(open).stream)
    }

    fn deliver(
        &self,
        directory: &Inode,
        entry: &DirEntry,
        with_attributes: bool,
        is_first: bool,
        deliver: &mut impl FnMut(&Listed<'_>) -> bool,
    ) -> Delivery {
        let (id, next_position) = (InodeId(entry.ino), entry.next_position);
        if entry.name == "." || entry.name == ".." {
            let id = if entry.name == "." { directory.id } else { id };
            let kind = Some(NodeKind::Directory);
            let listed = Listed { name: entry.name.as_bytes(), id, kind, next_position, attributes: None };
            return Delivery::of(deliver(&listed));
        }
        let Ok(Some(name)) = self.plain_name(directory, &entry.name) else { return Delivery::Skipped };
        let mut listed = Listed { name: &name, id, kind: entry.kind, next_position, attributes: None };
        if !with_attributes {
            return Delivery::of(deliver(&listed));
        }
        let (inode, attributes) = match self.entry_attributes(directory, entry, is_first) {
            Ok(found) => found,
            Err(Error::NoEntry) => return Delivery::Skipped,
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::NotFound => return Delivery::Skipped,
            // The next answer begins with it, and has more patience.
            Err(Error::Io(error)) if lacks_descriptors(&error) && !is_first => return Delivery::Later,
            // The entry is there: leaving it out would be a lie, and what comes after it is none the worse.
            Err(error) => {
                let place = || format!("{} in {}: {error}", entry.name, directory.node.describe());
                self.alarm("entry without attributes", place);
                listed.id = UNREADABLE;
                return Delivery::of(deliver(&listed));
            }
        };
        (listed.id, listed.attributes) = (inode.id, Some(attributes));
        let delivery = Delivery::of(deliver(&listed));
        if matches!(delivery, Delivery::Full) {
            self.inodes.forget(inode.id, 1);
        }
        delivery
    }

    /// Attributes of an entry, counting a lookup. An inode that is known already is not opened again.
    fn entry_attributes(
        &self,
        directory: &Inode,
        entry: &DirEntry,
        is_first: bool,
    ) -> Result<(Arc<Inode>, Attributes), Error> {
        if let Some(known) = self.inodes.by_entry(entry.ino) {
            let inode = self.inodes.count_lookup(&known);
            let attributes = inode.node.stat().map_err(Error::from).and_then(|stat| self.attributes_of(&inode, &stat));
            if attributes.is_err() {
                self.inodes.forget(inode.id, 1);
            }
            return Ok((inode, attributes?));
        }
        let find = || directory.node.lookup(&entry.name);
        self.learn_at_once(if is_first { self.descriptors.retry_on_emfile(find) } else { find() }?)
    }

    /// Makes the entries of a directory durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync_directory(&self, handle: DirectoryHandle) -> Result<(), Error> {
        let directory = self.handles.directories.get(handle)?;
        let ordered = self.flush_dir_syncs();
        match directory.told.swap(0, Ordering::Relaxed) {
            0 => ordered?,
            errno => return Err(io::Error::from_raw_os_error(errno).into()),
        }
        let mut stream = directory.stream.lock().unwrap_or_else(PoisonError::into_inner);
        match self.stream_of(&directory.inode, &mut stream)?.sync() {
            // A filesystem that cannot sync directories keeps their order without.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            result => Ok(result?),
        }
    }
}

enum Delivery {
    Done,
    Full,
    /// It is gone, or none of ours.
    Skipped,
    /// Not in this answer.
    Later,
}

impl Delivery {
    fn of(room_left: bool) -> Self {
        if room_left { Self::Done } else { Self::Full }
    }
}
