//! Operations on names: lookup, create, link, rename, remove.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::format::config::End;
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

/// Set-group-id: on a directory, new entries inherit its group.
const SETGID: u32 = 0o2000;
/// Set-user-id and set-group-id.
const SET_IDS: u32 = 0o6000;
/// What the owner needs to put a directory id into a new directory.
const OWNER_ALL: u32 = 0o700;
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

    /// Takes back lookups that the kernel no longer needs.
    pub fn forget(&self, id: InodeId, count: u64) {
        self.descriptors.note_given_up();
        if let Some(waiting) = self.inodes.forget(id, count) {
            // A file without a name that the kernel has forgotten is gone: it must not keep its space until the next look.
            if waiting.node.stat().is_ok_and(|stat| stat.nlink == 0) {
                self.work.unsettled.abandon(&self.inodes, &waiting);
            }
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

    /// Makes a FIFO, socket or device, or an empty file; counts as a lookup. The answer may come from another thread, since a
    /// file may need a header from its beginning.
    pub fn mknod(
        self: &Arc<Self>,
        directory: InodeId,
        name: &[u8],
        (kind, rdev): (NodeKind, u64),
        mode: u32,
        caller: Caller,
        answer: Answer<Attributes>,
    ) {
        if kind != NodeKind::File {
            return answer(self.make_special(directory, name, (kind, rdev), mode, caller));
        }
        if self.rules().end == End::Strict {
            return self.make_file(directory, name, mode, caller, answer, |fs, inode, _| {
                // Nobody has it open: its content goes when the settler looks next.
                fs.work.unsettled.watch(&fs.inodes, inode);
            });
        }
        let made =
            self.writable_directory(directory).and_then(|directory| self.create_node(&directory, name, mode, caller));
        answer(made.map(|(_, attributes)| attributes));
    }

    fn make_special(
        &self,
        directory: InodeId,
        name: &[u8],
        (kind, rdev): (NodeKind, u64),
        mode: u32,
        caller: Caller,
    ) -> Result<Attributes, Error> {
        let directory = self.writable_directory(directory)?;
        if matches!(kind, NodeKind::Directory | NodeKind::Symlink) {
            return Err(Error::WrongKind);
        }
        let stored = self.stored_name(&directory, name)?;
        let mode = mode_in(&directory, mode, caller);
        let node = self.with_long_name_link(&directory.node, &stored, |entry| {
            directory.node.mknod(entry, kind, self.first_mode(mode, caller), rdev)?;
            self.pin_new(&directory.node, entry).inspect_err(|_| drop(directory.node.unlink(entry)))
        })?;
        self.hand_over(&directory, &stored, &node, mode, caller)?;
        Ok(self.learn(node)?.1)
    }

    /// The node of an entry that was just made, and is to be removed again if it cannot be had.
    pub(in crate::fs) fn pin_new(&self, directory: &Node, entry: &str) -> io::Result<Node> {
        self.descriptors.retry_on_emfile(|| directory.lookup(entry))
    }

    /// Makes a regular file and learns it.
    pub(in crate::fs) fn create_node(
        &self,
        directory: &Inode,
        name: &[u8],
        mode: u32,
        caller: Caller,
    ) -> Result<(Arc<Inode>, Attributes), Error> {
        let stored = self.stored_name(directory, name)?;
        let mode = mode_in(directory, mode, caller);
        let node = self.with_long_name_link(&directory.node, &stored, |entry| {
            self.descriptors.retry_on_emfile(|| directory.node.create_file(entry, self.first_mode(mode, caller)))
        })?;
        self.hand_over(directory, &stored, &node, mode, caller)?;
        let (inode, attributes) = self.learn(node)?;
        inode.lacks_capabilities.store(true, Ordering::Relaxed);
        Ok((inode, attributes))
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

    pub(in crate::fs) fn writable_directory(&self, id: InodeId) -> Result<Arc<Inode>, Error> {
        self.check_writable()?;
        self.inodes.get(id)
    }

    /// Gives a new directory the owner, group and mode that it would have if its caller had made it.
    fn hand_over_directory(&self, parent: &Inode, node: &Node, mode: u32, caller: Caller) -> Result<(), Error> {
        self.own(parent, node, caller)?;
        if mode & OWNER_ALL != OWNER_ALL {
            node.set_mode(node.stat()?.mode & !(OWNER_ALL & !mode))?;
        }
        Ok(())
    }

    /// Gives a new file the owner, group and mode that it would have if its caller had made it, or removes it again: none stays
    /// that is the daemon's.
    fn hand_over(&self, parent: &Inode, stored: &Stored, node: &Node, mode: u32, caller: Caller) -> Result<(), Error> {
        let handed_over = self.own(parent, node, caller).and_then(|changed| {
            if changed && mode & SET_IDS != 0 {
                node.set_mode(node.stat()?.mode | mode & SET_IDS)?;
            }
            Ok(())
        });
        handed_over.inspect_err(|_| remove_new(&parent.node, stored))
    }

    /// The mode that a file has until it is its caller's: a set-id bit would be the daemon's.
    fn first_mode(&self, mode: u32, caller: Caller) -> u32 {
        if self.makes_for(caller) { mode & !SET_IDS } else { mode }
    }

    /// A privileged daemon makes files for others; one that is not makes all its files for itself.
    fn makes_for(&self, caller: Caller) -> bool {
        self.backing.is_privileged() && (caller.uid, caller.gid) != (0, 0)
    }

    /// Returns whether the owner was changed.
    pub(in crate::fs) fn own(&self, parent: &Inode, node: &Node, caller: Caller) -> Result<bool, Error> {
        if !self.makes_for(caller) {
            return Ok(false);
        }
        let inherits_group = parent.node.stat()?.mode & SETGID != 0;
        node.set_owner(Some(caller.uid), (!inherits_group).then_some(caller.gid))?;
        Ok(true)
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

/// Removes an entry that was just made and is not a directory.
pub(in crate::fs) fn remove_new(directory: &Node, stored: &Stored) {
    // Nothing more can be done about one that cannot be removed; it has no set-id bits.
    if directory.unlink(stored.entry()).is_ok() {
        remove_long_name_link(directory, stored);
    }
}

/// The mode that a new entry is made with: a default ACL of its directory, which the backing filesystem applies, stands in for
/// the umask.
fn mode_in(directory: &Inode, mode: u32, caller: Caller) -> u32 {
    if directory.default_acl.is_set(directory) { mode } else { mode & !caller.umask }
}
