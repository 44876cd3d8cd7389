//! Targets of symlinks: sealed into the backing symlink, or, where they are too long for one, into a file that it names.
//! `docs/FORMAT.md` section 7.4.

use crate::format::name::{self, LongTarget};
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::attributes::Attributes;

use super::new_entry::remove_new;

impl Filesystem {
    /// Makes a symlink; counts as a lookup.
    ///
    /// # Errors
    /// [`Error::NameTooLong`] if the target is longer than any path.
    pub fn symlink(&self, directory: InodeId, name: &[u8], target: &[u8], caller: Caller) -> Result<Attributes, Error> {
        let directory = self.writable_directory(directory)?;
        let stored = self.stored_name(&directory, name)?;
        let (text, elsewhere) = self.seal_target(target)?;
        let made = self.with_long_name_link(&directory.node, &stored, |entry| {
            directory.node.symlink(&text, entry)?;
            self.pin_new(&directory.node, entry).inspect_err(|_| drop(directory.node.unlink(entry)))
        });
        let owned = made.map_err(Error::from).and_then(|node| {
            self.own(&directory, &node, caller).inspect_err(|_| remove_new(&directory.node, &stored))?;
            Ok(node)
        });
        let node = owned.inspect_err(|_| {
            if let Some(long) = elsewhere {
                self.backing.long_targets.remove(&long.file());
            }
        })?;
        Ok(self.learn(node)?.1)
    }

    /// The target of a symlink.
    ///
    /// # Errors
    /// [`Error::LinkTarget`] if it does not authenticate.
    pub fn readlink(&self, id: InodeId) -> Result<Vec<u8>, Error> {
        let inode = self.inodes.get(id)?;
        let text = inode.node.readlink_self()?;
        let target = match LongTarget::parse(&text) {
            Some(long) => self.open_long_target(long),
            None => name::decode(&text).and_then(|sealed| self.volume.links.open(&sealed).ok()),
        };
        target.ok_or(Error::LinkTarget).inspect_err(|error| self.report(&inode, error))
    }
}
