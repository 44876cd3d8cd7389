//! Targets of symlinks that are too long for one: each lies in a file that the symlink names.

use crate::crypto::LinkKey;
use crate::format::geometry::plain_len_of_base64;
use crate::format::name::{self, LINK_TARGET_MAX, LongTarget, PATH_MAX};
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::Inode;
use crate::storage::{Node, NodeKind, Stat};

impl Filesystem {
    pub(in crate::fs) fn seal_target(&self, target: &[u8]) -> Result<(String, Option<LongTarget>), Error> {
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

    pub(in crate::fs) fn open_long_target(&self, long: LongTarget) -> Option<Vec<u8>> {
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
