//! A volume as a tree to copy from or to: the filesystem that a mount serves, asked without a kernel.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use crate::fs::{
    Access, Answer, Attributes, Caller, Change, Error, Filesystem, InodeId, NodeKind, ROOT, RenameMode, SetTime,
    XattrMode,
};

use super::side::{Meta, New, OpenFile, Result, Side, TransferError, Xattrs, is_copied};

/// Longer than every deadline of a provider.
const PATIENCE: Duration = Duration::from_secs(120);

/// A volume's tree.
pub(super) struct VolumeSide {
    pub(super) fs: Arc<Filesystem>,
    me: Caller,
    privileged: bool,
}

/// A looked up inode, forgotten with the last clone.
#[derive(Clone)]
pub(super) struct Object(Arc<Held>);

struct Held {
    fs: Arc<Filesystem>,
    id: InodeId,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.fs.forget(self.id, 1);
    }
}

impl Object {
    pub(super) fn id(&self) -> InodeId {
        self.0.id
    }
}

/// An open file of a volume, released when it is dropped.
pub(super) struct VolumeFile<'s> {
    side: &'s VolumeSide,
    object: Object,
}

impl Drop for VolumeFile<'_> {
    fn drop(&mut self) {
        self.side.fs.release(self.object.id());
    }
}

impl VolumeSide {
    pub(super) fn new(fs: Arc<Filesystem>) -> Self {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        // What root makes gets its owner afterwards, whoever that is.
        let me = Caller { uid: uid.as_raw(), gid: gid.as_raw(), pid: std::process::id(), umask: 0 };
        Self { fs, me, privileged: uid.is_root() }
    }

    fn object(&self, found: &Attributes) -> Object {
        Object(Arc::new(Held { fs: Arc::clone(&self.fs), id: found.id }))
    }
}

/// Waits for an answer that may come from another thread.
fn wait<T: Send + 'static>(ask: impl FnOnce(Answer<T>)) -> Result<T> {
    let (send, receive): (SyncSender<std::result::Result<T, Error>>, _) = sync_channel(1);
    ask(Box::new(move |answer| {
        // Who does not wait any more has given up.
        let _ = send.send(answer);
    }));
    receive.recv_timeout(PATIENCE).map_or(Err(TransferError::Late), |answer| Ok(answer?))
}

impl Side for VolumeSide {
    type Object = Object;
    type Open<'s> = VolumeFile<'s>;

    fn root(&self) -> Result<Object> {
        let root = self.fs.attributes(ROOT)?;
        Ok(self.object(&root))
    }

    fn lookup(&self, directory: &Object, name: &[u8]) -> Result<Option<Object>> {
        match self.fs.lookup(directory.id(), name) {
            Err(Error::NoEntry) => Ok(None),
            found => Ok(Some(self.object(&found?))),
        }
    }

    fn names(&self, directory: &Object) -> Result<Vec<Vec<u8>>> {
        let handle = self.fs.open_directory(directory.id())?;
        let (mut names, mut position) = (Vec::new(), 0);
        let listed = loop {
            let before = position;
            // An error after the first entry is told only to the next call.
            let listed = self.fs.list(handle, position, false, |entry| {
                position = entry.next_position;
                if entry.name != b"." && entry.name != b".." {
                    names.push(entry.name.to_vec());
                }
                true
            });
            if listed.is_err() || position == before {
                break listed;
            }
        };
        self.fs.close_directory(handle);
        listed?;
        Ok(names)
    }

    fn meta(&self, object: &Object) -> Result<Meta> {
        let found = self.fs.attributes(object.id())?;
        Ok(Meta {
            inode: (0, found.id.0),
            kind: found.kind,
            mode: found.mode,
            nlink: found.nlink,
            uid: found.uid,
            gid: found.gid,
            rdev: found.rdev,
            size: found.size,
            atime: found.atime,
            mtime: found.mtime,
            ctime: found.ctime,
        })
    }

    fn readlink(&self, object: &Object) -> Result<Vec<u8>> {
        Ok(self.fs.readlink(object.id())?)
    }

    fn xattrs(&self, object: &Object) -> Result<Xattrs> {
        let names = self.fs.xattr_names(object.id(), self.me)?;
        let mut found = Xattrs::new();
        for name in names.split(|byte| *byte == 0).filter(|name| is_copied(name, self.privileged)) {
            found.insert(name.to_vec(), self.fs.xattr(object.id(), name)?);
        }
        Ok(found)
    }

    fn open<'s>(&'s self, object: &Object) -> Result<VolumeFile<'s>> {
        wait(|answer| self.fs.open_file(object.id(), Access::Read, answer))?;
        Ok(VolumeFile { side: self, object: object.clone() })
    }

    fn create<'s>(&'s self, directory: &Object, name: &[u8]) -> Result<(Object, VolumeFile<'s>)> {
        let made = wait(|answer| self.fs.create(directory.id(), name, 0o600, self.me, answer))?;
        let object = self.object(&made);
        Ok((object.clone(), VolumeFile { side: self, object }))
    }

    fn make(&self, directory: &Object, name: &[u8], new: &New) -> Result<Object> {
        let made = match new {
            New::Directory => self.fs.mkdir(directory.id(), name, 0o700, self.me)?,
            New::Symlink(target) => self.fs.symlink(directory.id(), name, target, self.me)?,
            New::Special(kind, rdev) => {
                wait(|answer| self.fs.mknod(directory.id(), name, (*kind, *rdev), 0o600, self.me, answer))?
            }
        };
        Ok(self.object(&made))
    }

    fn link(&self, object: &Object, directory: &Object, name: &[u8]) -> Result<()> {
        let linked = self.fs.link(object.id(), directory.id(), name)?;
        self.fs.forget(linked.id, 1);
        Ok(())
    }

    fn rename(&self, directory: &Object, from: &[u8], to: &[u8]) -> Result<()> {
        Ok(self.fs.rename(directory.id(), from, directory.id(), to, RenameMode::Replace)?)
    }

    fn unlink(&self, directory: &Object, name: &[u8]) -> Result<()> {
        Ok(self.fs.unlink(directory.id(), name)?)
    }

    fn set_owner_and_mode(&self, object: &Object, meta: &Meta) -> Result<()> {
        let (uid, gid) = if self.privileged { (Some(meta.uid), Some(meta.gid)) } else { (None, None) };
        let mode = (meta.kind != NodeKind::Symlink).then_some(meta.mode);
        self.fs.change(object.id(), &Change { mode, uid, gid, atime: SetTime::Keep, mtime: SetTime::Keep })?;
        Ok(())
    }

    fn set_times(&self, object: &Object, meta: &Meta) -> Result<()> {
        let (atime, mtime) = (SetTime::At(meta.atime), SetTime::At(meta.mtime));
        self.fs.change(object.id(), &Change { mode: None, uid: None, gid: None, atime, mtime })?;
        Ok(())
    }

    fn set_xattr(&self, object: &Object, name: &[u8], value: &[u8]) -> Result<()> {
        wait(|answer| self.fs.set_xattr(object.id(), name, value, XattrMode::Any, self.me, answer))
    }

    fn remove_xattr(&self, object: &Object, name: &[u8]) -> Result<()> {
        Ok(self.fs.remove_xattr(object.id(), name)?)
    }

    fn sync(&self, _root: &Object) -> Result<()> {
        Ok(self.fs.sync_everything()?)
    }
}

impl OpenFile for VolumeFile<'_> {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        Ok(self.side.fs.read(self.object.id(), offset, buffer)?)
    }

    fn data_from(&self, offset: u64) -> Result<Option<Range<u64>>> {
        Ok(self.side.fs.data_from(self.object.id(), offset)?)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.side.fs.write(self.object.id(), offset, bytes)?)
    }

    fn set_size(&self, size: u64) -> Result<()> {
        wait(|answer| self.side.fs.resize(self.object.id(), size, self.side.me, answer))
    }

    fn lacks_end(&self) -> bool {
        self.side.fs.lacks_end_mark(self.object.id())
    }
}
