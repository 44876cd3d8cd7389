//! A tree outside of a volume.
//!
//! Invariants: no symlink is followed and no mount below the root is entered; every inode is reached from a held directory.

use std::io;
use std::ops::Range;
use std::path::Path;

use crate::storage::{Access, DiskFile, Node, RawFile, SetTime, XattrMode};
use crate::storage::{NodeKind, RenameMode};

use super::side::{Meta, New, OpenFile, Result, Side, Xattrs, is_copied};

/// A tree of the system.
pub(super) struct Plain {
    root: Node,
    privileged: bool,
}

impl Plain {
    pub(super) fn new(root: &Path) -> io::Result<Self> {
        Ok(Self { root: Node::open_root(root)?, privileged: rustix::process::geteuid().is_root() })
    }
}

impl Side for Plain {
    type Object = Node;
    type Open<'s> = DiskFile;

    fn root(&self) -> Result<Node> {
        Ok(self.root.clone())
    }

    fn lookup(&self, directory: &Node, name: &[u8]) -> Result<Option<Node>> {
        match directory.lookup(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            found => Ok(Some(found?)),
        }
    }

    fn names(&self, directory: &Node) -> Result<Vec<Vec<u8>>> {
        Ok(directory.names()?)
    }

    fn meta(&self, object: &Node) -> Result<Meta> {
        let stat = object.stat()?;
        Ok(Meta {
            inode: (stat.dev, stat.ino),
            kind: stat.kind,
            mode: stat.mode,
            nlink: stat.nlink,
            uid: stat.uid,
            gid: stat.gid,
            rdev: stat.rdev,
            size: stat.size,
            atime: stat.atime,
            mtime: stat.mtime,
            ctime: stat.ctime,
        })
    }

    fn readlink(&self, object: &Node) -> Result<Vec<u8>> {
        Ok(object.readlink_self()?)
    }

    fn xattrs(&self, object: &Node) -> Result<Xattrs> {
        let names = match object.xattr_names() {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(Xattrs::new()),
            names => names?,
        };
        let mut found = Xattrs::new();
        for name in names.split(|byte| *byte == 0).filter(|name| is_copied(name, self.privileged)) {
            found.insert(name.to_vec(), object.xattr(name)?);
        }
        Ok(found)
    }

    fn open(&self, object: &Node) -> Result<DiskFile> {
        Ok(DiskFile::readable(object.open_file(Access::Read)?))
    }

    fn create(&self, directory: &Node, name: &[u8]) -> Result<(Node, DiskFile)> {
        let made = directory.create_file(name, 0o600)?;
        let file = DiskFile::writable(made.open_file(Access::ReadWrite)?);
        Ok((made, file))
    }

    fn make(&self, directory: &Node, name: &[u8], new: &New) -> Result<Node> {
        match new {
            New::Directory => directory.mkdir(name, 0o700)?,
            New::Symlink(target) => directory.symlink(&target[..], name)?,
            New::Special(kind, rdev) => directory.mknod(name, *kind, 0o600, *rdev)?,
        }
        Ok(directory.lookup(name)?)
    }

    fn link(&self, object: &Node, directory: &Node, name: &[u8]) -> Result<()> {
        Ok(object.link_as(directory, name)?)
    }

    fn rename(&self, directory: &Node, from: &[u8], to: &[u8]) -> Result<()> {
        Ok(directory.rename(from, directory, to, RenameMode::Replace)?)
    }

    fn unlink(&self, directory: &Node, name: &[u8]) -> Result<()> {
        Ok(directory.unlink(name)?)
    }

    fn set_owner_and_mode(&self, object: &Node, meta: &Meta) -> Result<()> {
        if self.privileged {
            object.set_owner(Some(meta.uid), Some(meta.gid))?;
        }
        if meta.kind != NodeKind::Symlink {
            object.set_mode(meta.mode)?;
        }
        Ok(())
    }

    fn set_times(&self, object: &Node, meta: &Meta) -> Result<()> {
        Ok(object.set_times(SetTime::At(meta.atime), SetTime::At(meta.mtime))?)
    }

    fn set_xattr(&self, object: &Node, name: &[u8], value: &[u8]) -> Result<()> {
        Ok(object.set_xattr(name, value, XattrMode::Any)?)
    }

    fn remove_xattr(&self, object: &Node, name: &[u8]) -> Result<()> {
        Ok(object.remove_xattr(name)?)
    }

    fn sync(&self, root: &Node) -> Result<()> {
        Ok(root.sync_filesystem()?)
    }
}

impl OpenFile for DiskFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        Ok(RawFile::read_at(self, buffer, offset)?)
    }

    fn data_from(&self, offset: u64) -> Result<Option<Range<u64>>> {
        Ok(RawFile::data_from(self, offset)?)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(RawFile::write_at(self, bytes, offset)?)
    }

    fn set_size(&self, size: u64) -> Result<()> {
        Ok(RawFile::set_size(self, size)?)
    }

    fn lacks_end(&self) -> bool {
        false
    }
}
