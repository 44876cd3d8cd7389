//! Operations on names: lookup, create, link, rename, remove.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::format::name::Stored;
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::Answer;
use crate::fs::state::attributes::Attributes;
use crate::fs::state::inode::Inode;
use crate::storage::{Node, NodeKind, RenameMode};

use super::names::{holds_nothing, remove_long_name_link, strip_directory};
use super::new_entry::{OWNER_ALL, mode_in};

/// How often, and how long, a backing filesystem is asked again to remove a directory in which a removed file is still open.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const UNTIL_CLOSED: Duration = Duration::from_secs(2);

impl Filesystem {
    /// The inode of an entry; counts as a lookup.
    ///
    /// # Errors
    /// [`Error::NoEntry`] if it is not there.
    pub fn lookup(&self, directory: InodeId, name: &[u8]) -> Result<Attributes, Error> {
        let directory = self.inodes.get(directory)?;
        let stored = self.stored_name(&directory, name)?;
        match self.descriptors.retry_on_emfile(|| directory.node.lookup(stored.entry())) {
            Ok(node) => {
                let (inode, attributes) = self.learn(node)?;
                inode.must_be_looked_up.store(false, Ordering::Relaxed);
                Ok(attributes)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoEntry),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a directory; counts as a lookup.
    ///
    /// # Errors
    /// [`Error`].
    pub fn mkdir(&self, directory: InodeId, name: &[u8], mode: u32, caller: Caller) -> Result<Attributes, Error> {
        let directory = self.writable_directory(directory)?;
        let stored = self.stored_name(&directory, name)?;
        let mode = mode_in(&directory, mode, caller);
        let node = self.with_long_name_link(&directory.node, &stored, |entry| {
            directory.node.mkdir(entry, mode | OWNER_ALL)?;
            self.pin_new(&directory.node, entry).inspect_err(|_| drop(directory.node.rmdir(entry)))
        })?;
        let finished = self.give_directory_id(&node).and_then(|id| {
            self.hand_over_directory(&directory, &node, mode, caller)?;
            Ok(id)
        });
        match finished {
            Ok(id) => {
                let (inode, attributes) = self.learn(node)?;
                let _ = inode.directory_id.set(id);
                Ok(attributes)
            }
            Err(error) => {
                // What stays is an empty directory, with an id or without.
                let _ = strip_directory(&node).and_then(|_| directory.node.rmdir(stored.entry()));
                remove_long_name_link(&directory.node, &stored);
                Err(error)
            }
        }
    }

    /// Gives an inode another name; counts as a lookup.
    ///
    /// # Errors
    /// [`Error`].
    pub fn link(&self, id: InodeId, directory: InodeId, name: &[u8]) -> Result<Attributes, Error> {
        let directory = self.writable_directory(directory)?;
        let inode = self.inodes.get(id)?;
        let stored = self.stored_name(&directory, name)?;
        let _move = self.telemetry.renames.begin();
        inode.condemned.store(false, Ordering::Relaxed);
        self.with_long_name_link(&directory.node, &stored, |entry| inode.node.link_as(&directory.node, entry))?;
        let inode = self.inodes.count_lookup(&inode);
        self.attributes_of(&inode, &inode.node.stat()?)
    }

    /// Removes an entry that is not a directory. Needs no key.
    ///
    /// # Errors
    /// [`Error`].
    pub fn unlink(&self, directory: InodeId, name: &[u8]) -> Result<(), Error> {
        self.unlink_from(self.inodes.get(directory)?.as_ref(), name)
    }

    pub(in crate::fs) fn unlink_from(&self, directory: &Inode, name: &[u8]) -> Result<(), Error> {
        self.check_writable()?;
        let stored = self.stored_name(directory, name)?;
        let victim = self.long_target_victim(&directory.node, stored.entry());
        self.let_go_of(&directory.node, stored.entry());
        directory.node.unlink(stored.entry())?;
        self.drop_long_target(victim.as_ref());
        remove_long_name_link(&directory.node, &stored);
        Ok(())
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// [`Error::NotEmpty`].
    pub fn rmdir(&self, directory: InodeId, name: &[u8]) -> Result<(), Error> {
        self.rmdir_from(self.inodes.get(directory)?.as_ref(), name)
    }

    fn rmdir_from(&self, directory: &Inode, name: &[u8]) -> Result<(), Error> {
        self.check_writable()?;
        let stored = self.stored_name(directory, name)?;
        let victim = self.descriptors.retry_on_emfile(|| directory.node.lookup(stored.entry()))?;
        self.with_emptied(&victim, || directory.node.rmdir(stored.entry()))?;
        remove_long_name_link(&directory.node, &stored);
        Ok(())
    }

    /// Removes an empty directory; the answer may come from another thread, after what was removed from it a moment ago and
    /// was still open has gone from the backing filesystem too.
    pub fn remove_directory(self: &Arc<Self>, directory: InodeId, name: &[u8], answer: Answer<()>) {
        let directory = match self.inodes.get(directory) {
            Ok(directory) => directory,
            Err(error) => return answer(Err(error)),
        };
        match self.rmdir_from(&directory, name) {
            // Nothing of ours is in it.
            Err(Error::Io(error))
                if self.backing.renames_what_is_open && error.kind() == io::ErrorKind::DirectoryNotEmpty =>
            {
                let (fs, name, start) = (Arc::clone(self), name.to_vec(), Instant::now());
                self.pools.chores.run(move |_| {
                    let removed = loop {
                        std::thread::sleep(LOOK_AGAIN);
                        let removed = fs.rmdir_from(&directory, &name);
                        if !matches!(&removed, Err(Error::Io(_))) || start.elapsed() > UNTIL_CLOSED {
                            break removed;
                        }
                    };
                    answer(removed);
                });
            }
            result => answer(result),
        }
    }

    /// An entry is about to lose its only name on a filesystem that gives it another one for as long as it is open: nobody but
    /// programs is to have it open then.
    fn let_go_of(&self, directory: &Node, entry: &str) {
        if !self.backing.renames_what_is_open {
            return;
        }
        let stat = directory.lookup(entry).and_then(|node| node.stat());
        let last = stat.ok().filter(|stat| stat.kind == NodeKind::File && stat.nlink == 1);
        if let Some(inode) = last.and_then(|stat| self.inodes.known_as(&stat)) {
            inode.condemned.store(true, Ordering::Relaxed);
            if inode.slot().handles == 0 {
                self.work.unsettled.abandon(&self.inodes, &inode);
            }
        }
    }

    /// Renames an entry.
    ///
    /// # Errors
    /// [`Error`].
    pub fn rename(
        &self,
        from: InodeId,
        name: &[u8],
        to: InodeId,
        new_name: &[u8],
        mode: RenameMode,
    ) -> Result<(), Error> {
        let (from, to) = (self.writable_directory(from)?, self.writable_directory(to)?);
        if from.id != to.id {
            // What is noted is in the order of the tree, and this may change the tree.
            self.flush_dir_syncs()?;
        }
        let (old, new) = (self.stored_name(&from, name)?, self.stored_name(&to, new_name)?);
        let victim = self.long_target_victim(&to.node, new.entry());
        if matches!(mode, RenameMode::Replace | RenameMode::WhiteOut) {
            self.let_go_of(&to.node, new.entry());
        }
        let _move = self.telemetry.renames.begin();
        self.with_long_name_link(&to.node, &new, |entry| {
            self.rename_over_empty_directory(&from.node, &old, &to.node, entry, mode)
        })?;
        self.drop_long_target(victim.as_ref());
        if mode != RenameMode::Exchange {
            remove_long_name_link(&from.node, &old);
        }
        Ok(())
    }

    /// A directory that looks empty still has its id, which keeps the backing filesystem from removing it: `remove` is run with
    /// the id taken away, and the id put back if that fails. Whoever owns a directory may remove it whatever its mode; taking
    /// the id away needs all permissions, which it gets for that moment.
    fn with_emptied(&self, victim: &Node, remove: impl Fn() -> io::Result<()>) -> Result<(), Error> {
        let stat = victim.stat()?;
        if stat.kind != NodeKind::Directory {
            return Ok(remove()?);
        }
        let lacks_permission = stat.uid == self.backing.user && stat.mode & OWNER_ALL != OWNER_ALL;
        match self.empty_and(victim, &remove) {
            Err(Error::Io(error)) if lacks_permission && error.kind() == io::ErrorKind::PermissionDenied => {
                victim.set_mode(stat.mode | OWNER_ALL)?;
                self.empty_and(victim, &remove).inspect_err(|_| drop(victim.set_mode(stat.mode)))
            }
            result => result,
        }
    }

    fn empty_and(&self, victim: &Node, remove: impl Fn() -> io::Result<()>) -> Result<(), Error> {
        if !self.descriptors.retry_on_emfile(|| holds_nothing(victim))? {
            return Err(Error::NotEmpty);
        }
        let id = self.descriptors.retry_on_emfile(|| strip_directory(victim))?;
        Ok(remove().inspect_err(|_| self.restore_directory_id(victim, id))?)
    }

    fn rename_over_empty_directory(
        &self,
        from: &Node,
        old: &Stored,
        to: &Node,
        entry: &str,
        mode: RenameMode,
    ) -> io::Result<()> {
        let rename = || from.rename(old.entry(), to, entry, mode);
        let may_replace = matches!(mode, RenameMode::Replace | RenameMode::WhiteOut);
        match rename() {
            Err(error) if may_replace && error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                let victim = self.descriptors.retry_on_emfile(|| to.lookup(entry))?;
                self.with_emptied(&victim, rename).map_err(|failure| match failure {
                    Error::Io(error) => error,
                    _ => error,
                })
            }
            result => result,
        }
    }
}
