//! Targets of symlinks: sealed into the backing symlink, or, where they are too long for one, into a file that it names.
//! `docs/FORMAT.md` section 7.4.

use crate::crypto::LinkKey;
use crate::format::geometry::plain_len_of_base64;
use crate::format::name::{self, LINK_TARGET_MAX, LongTarget, PATH_MAX};
use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::attributes::Attributes;
use crate::fs::state::inode::Inode;
use crate::storage::{Node, NodeKind, Stat};

use super::namespace::remove_new;

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

    fn seal_target(&self, target: &[u8]) -> Result<(String, Option<LongTarget>), Error> {
        if target.len() <= LINK_TARGET_MAX {
            return Ok((name::encode(&self.volume.links.seal(target)), None));
        }
        let len = u16::try_from(target.len()).map_err(|_| Error::NameTooLong)?;
        if target.len() >= PATH_MAX {
            return Err(Error::NameTooLong);
        }
        let long = LongTarget { id: LinkKey::new_id(), len };
        let sealed = self.volume.links.seal_long(&long.id, target);
        self.descriptors.retry_on_emfile(|| self.backing.long_targets.add(&long.file(), &sealed))?;
        Ok((long.text(), Some(long)))
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

    fn open_long_target(&self, long: LongTarget) -> Option<Vec<u8>> {
        let sealed = self.descriptors.retry_on_emfile(|| self.backing.long_targets.read(&long.file())).ok()?;
        let target = self.volume.links.open_long(&long.id, &sealed).ok()?;
        (target.len() == usize::from(long.len)).then_some(target)
    }

    /// The length of a symlink's target, as far as possible without reading it, which would change its access time.
    pub(in crate::fs) fn target_len(&self, inode: &Inode, stat: &Stat) -> u64 {
        let long = (stat.size == LongTarget::TEXT_LEN).then(|| inode.node.readlink_self().ok()).flatten();
        match long.and_then(|text| LongTarget::parse(&text)) {
            Some(long) => long.len.into(),
            None => plain_len_of_base64(stat.size, LinkKey::OVERHEAD),
        }
    }

    /// The node behind an entry that is to be removed, if it may be a symlink with a long target.
    pub(in crate::fs) fn long_target_victim(&self, directory: &Node, entry: &str) -> Option<Node> {
        let find = || self.descriptors.retry_on_emfile(|| directory.lookup(entry)).ok();
        self.backing.long_targets.in_use().then(find).flatten()
    }

    /// Removes the long target of a symlink that has lost its last name.
    pub(in crate::fs) fn drop_long_target(&self, victim: Option<&Node>) {
        let gone = victim.filter(|node| {
            let stat = node.stat();
            stat.is_ok_and(|stat| {
                stat.kind == NodeKind::Symlink && stat.size == LongTarget::TEXT_LEN && stat.nlink == 0
            })
        });
        let text = gone.and_then(|node| node.readlink_self().ok());
        if let Some(long) = text.and_then(|text| LongTarget::parse(&text)) {
            self.backing.long_targets.remove(&long.file());
        }
    }
}
