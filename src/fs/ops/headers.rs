//! Other wrapped keys in a file's header, for `kmsfs rewrap`: the mount writes them, since it alone knows what else goes on.
//!
//! Invariant: a header takes the place of the one that it was made from and of no other, and says everything that that one said
//! but who wrapped the data key.

use std::sync::Arc;

use crate::format::geometry::PAGE_LEN;
use crate::format::header::{Header, HeaderPage};
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::Inode;
use crate::storage::{Access, NodeKind, RawFile};

impl Filesystem {
    /// Puts `new` in the place of the header page `judged` of the file at `path`, relative to the root of the cipher directory.
    /// Returns whether it did: not if the file has another one now. Times and set-id bits stay. Not durable.
    ///
    /// # Errors
    /// [`Error`].
    pub fn replace_header(&self, path: &str, judged: &HeaderPage, new: &HeaderPage) -> Result<bool, Error> {
        self.check_writable()?;
        let mut node = self.inodes.root().node.clone();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            node = node.lookup(part)?;
        }
        self.check_rewrapped(judged, new)?;
        let (inode, _) = self.learn(node)?;
        let _owner = inode.own_keys();
        let replaced = self.finish_if_rekey_pending(&inode).and_then(|()| {
            if inode.kind != NodeKind::File {
                return Ok(false);
            }
            inode.begin_sealing()?;
            let replaced = self.replace_header_of(&inode, judged, new);
            inode.end_sealing(true);
            replaced
        });
        self.forget(inode.id, 1);
        replaced
    }

    /// Whether `new` is `judged` with other records.
    fn check_rewrapped(&self, judged: &HeaderPage, new: &HeaderPage) -> Result<(), Error> {
        let header =
            |page| Ok::<_, Error>(self.volume.ring.authenticate(page)?.ok_or(Error::NoHeader)?.header().clone());
        let (old, new) = (header(judged)?, header(new)?);
        let follows = old.generation.checked_add(1) == Some(new.generation);
        let expected = Header { generation: new.generation, records: new.records.clone(), ..old };
        if follows && new == expected { Ok(()) } else { Err(Error::NoHeader) }
    }

    /// Under the slot's lock: nobody changes set-id bits meanwhile, and no content begins.
    fn replace_header_of(&self, inode: &Arc<Inode>, judged: &HeaderPage, new: &HeaderPage) -> Result<bool, Error> {
        let file = self.open_backing(inode, Access::ReadWrite)?;
        let mut slot = inode.slot();
        let file = match slot.current() {
            Some(open) => {
                open.file.make_writable_like(&file);
                open.file
            }
            None => file,
        };
        let mut page = [0; PAGE_LEN];
        if file.read_at(&mut page, 0)? < PAGE_LEN || page != *judged {
            return Ok(false);
        }
        file.write_at(new, 0)?;
        drop(slot);
        Ok(true)
    }
}
