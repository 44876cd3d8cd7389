//! Names in a cipher directory: the entry for a plain name, the plain name of an entry, directory ids, and the symlinks of
//! long names. `docs/FORMAT.md` section 7.
//!
//! Order of steps: the symlink of a long name is made before its entry and removed after it, so that an entry's name can
//! always be read. A symlink without its entry is harmless. Where the disk may not keep that order, `state/dir_sync_queue.rs` does.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use crate::crypto::NameKey;
use crate::format::name::{self, DIRECTORY_ID, Entry, NAME_MAX, Stored};
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::inode::Inode;
use crate::fs::state::owed_ids::put_back;
use crate::storage::Node;

impl Filesystem {
    /// How `name` is stored in `directory`.
    pub(in crate::fs) fn stored_name(&self, directory: &Inode, name: &[u8]) -> Result<Stored, Error> {
        if name.len() > NAME_MAX {
            return Err(Error::NameTooLong);
        }
        let id = self.directory_id(directory)?;
        Ok(Stored::new(&self.volume.names.seal(&id, name), NameKey::digest))
    }

    /// The entry of the cipher directory that `name` in a directory is stored as, whether it is there or not.
    ///
    /// # Errors
    /// [`Error`] if the directory cannot be read.
    pub fn stored_entry(&self, directory: InodeId, name: &[u8]) -> Result<String, Error> {
        let directory = self.inodes.get(directory)?;
        Ok(self.stored_name(&directory, name)?.entry().to_owned())
    }

    /// The plain name of an entry; `None` if it is one of our own, or (counted) does not decrypt.
    pub(in crate::fs) fn plain_name(&self, directory: &Inode, entry: &str) -> Result<Option<Vec<u8>>, Error> {
        let sealed = match name::classify(entry) {
            Entry::Ours | Entry::LongNameLink => return Ok(None),
            Entry::Short(entry) => name::decode(entry.as_bytes()),
            Entry::Long(entry) => self.long_name(directory, entry),
        };
        let id = self.directory_id(directory)?;
        let plain =
            sealed.and_then(|sealed| self.volume.names.open(&id, &sealed).ok()).filter(|plain| name::is_valid(plain));
        if plain.is_none() {
            self.telemetry.undecryptable_names.fetch_add(1, Ordering::Relaxed);
            self.alarm("entry", || format!("{entry} in {} does not decrypt: left out", directory.node.describe()));
        }
        Ok(plain)
    }

    /// The encrypted name behind a long-name entry, if its symlink is there and is the one that the entry is a digest of.
    fn long_name(&self, directory: &Inode, entry: &str) -> Option<Vec<u8>> {
        let text = directory.node.readlink(name::link_of(entry)).ok()?;
        let sealed = name::decode(&text)?;
        (Stored::new(&sealed, NameKey::digest).entry() == entry).then_some(sealed)
    }

    /// The id of a directory, read once.
    pub(in crate::fs) fn directory_id(&self, directory: &Inode) -> Result<[u8; 16], Error> {
        if self.backing.owed_ids.settle(directory)? {
            self.backing.dir_syncs.note(&directory.node);
        }
        if let Some(id) = directory.directory_id.get() {
            return Ok(*id);
        }
        let id = match directory.node.readlink(DIRECTORY_ID) {
            Ok(text) => {
                let signed = name::decode(&text).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
                signed.and_then(|signed| self.volume.names.directory_id(&signed).ok()).ok_or(Error::DirectoryId)?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.adopt_empty_directory(directory)?,
            Err(error) => return Err(error.into()),
        };
        Ok(*directory.directory_id.get_or_init(|| id))
    }

    /// A crash between making a directory and giving it an id leaves an empty one without: it gets one now.
    fn adopt_empty_directory(&self, directory: &Inode) -> Result<[u8; 16], Error> {
        if self.options.read_only || !self.descriptors.retry_on_emfile(|| holds_nothing(&directory.node))? {
            return Err(Error::DirectoryId);
        }
        self.give_directory_id(&directory.node)
    }

    /// Puts back the id of a directory that could not be removed after all, now or when it is next used. One that is not known is
    /// empty, and gets another id.
    pub(in crate::fs) fn restore_directory_id(&self, directory: &Node, id: Option<Vec<u8>>) {
        let Some(text) = id.and_then(|id| String::from_utf8(id).ok()) else { return };
        let Err(error) = put_back(directory, &text) else { return self.backing.dir_syncs.note(directory) };
        tracing::warn!("{}: its id cannot be put back now: {error}", directory.describe());
        if let Some(known) = directory.stat().ok().and_then(|stat| self.inodes.known_as(&stat)) {
            self.backing.owed_ids.owe(known.id, text);
        }
    }

    /// Puts a new id on a directory.
    pub(in crate::fs) fn give_directory_id(&self, directory: &Node) -> Result<[u8; 16], Error> {
        let (id, signed) = self.volume.names.new_directory_id();
        directory.symlink(name::encode(&signed), DIRECTORY_ID)?;
        self.backing.dir_syncs.note(directory);
        Ok(id)
    }

    /// Runs `make` for the entry of `stored`, with the symlink of a long name in place before it. Removes the symlink again if
    /// `make` fails and nothing else needs it.
    pub(in crate::fs) fn with_long_name_link<T>(
        &self,
        directory: &Node,
        stored: &Stored,
        make: impl FnOnce(&str) -> io::Result<T>,
    ) -> io::Result<T> {
        let Stored::Long { entry, link, target } = stored else { return make(stored.entry()) };
        let added = match directory.symlink(target, link) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error),
        };
        self.backing.dir_syncs.note(directory);
        let made = make(entry);
        if made.is_err() && added {
            remove_long_name_link(directory, stored);
        }
        made
    }

    /// An entry that names the inode, if its directory is known.
    pub(in crate::fs) fn entry_of(&self, inode: &Inode) -> Option<(InodeId, Vec<u8>)> {
        let path = inode.node.describe();
        let path = Path::new(&path);
        let parent = Node::stat_directory(path.parent()?).ok()?;
        let directory = self.inodes.known_as(&parent)?;
        let name = self.plain_name(&directory, std::str::from_utf8(path.file_name()?.as_bytes()).ok()?).ok()??;
        Some((directory.id, name))
    }
}

/// Removes what is left of a long name once its entry is gone. A leftover is harmless, so a failure is too.
pub(in crate::fs) fn remove_long_name_link(directory: &Node, stored: &Stored) {
    if let Stored::Long { link, entry, .. } = stored
        && directory.lookup(entry).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    {
        let _ = directory.unlink(link);
    }
}

/// Whether a directory has no entries but a directory id and symlinks of long names that are gone.
pub(in crate::fs) fn holds_nothing(directory: &Node) -> io::Result<bool> {
    let mut stream = directory.open_directory()?;
    let mut position = 0;
    while let Some(entry) = stream.entry_at(position)? {
        if matches!(name::classify(&entry.name), Entry::Short(_) | Entry::Long(_)) {
            return Ok(false);
        }
        position = entry.next_position;
        stream.advance();
    }
    Ok(true)
}

/// Removes everything that [`holds_nothing`] overlooks, so that the directory can be removed. Its id goes last: if this fails, the
/// directory still has it. Returns the id's text, for putting it back.
pub(in crate::fs) fn strip_directory(directory: &Node) -> io::Result<Option<Vec<u8>>> {
    let id = match directory.readlink(DIRECTORY_ID) {
        // There is none, or something that is no symlink.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => None,
        id => Some(id?),
    };
    let mut leftovers = Vec::new();
    let mut stream = directory.open_directory()?;
    let mut position = 0;
    while let Some(entry) = stream.entry_at(position)? {
        if name::classify(&entry.name) == Entry::LongNameLink {
            leftovers.push(entry.name.clone());
        }
        position = entry.next_position;
        stream.advance();
    }
    leftovers.push(DIRECTORY_ID.to_owned());
    leftovers.iter().try_for_each(|entry| match directory.unlink(entry) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    })?;
    Ok(id)
}
