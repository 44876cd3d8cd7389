//! Reading back what was copied, and comparing everything with its source.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::runtime::WorkQueue;
use crate::storage::NodeKind;

use super::content::CHUNK;
use super::copy::{Copy, Pair, Task, locked};
use super::side::{Meta, OpenFile, Result, Side, TransferError};

/// The copies' inodes by the sources': names that were one file must be one file.
type Inodes = Mutex<HashMap<(u64, u64), (u64, u64)>>;

impl<S: Side, T: Side> Copy<'_, S, T> {
    /// Compares the entry `name` of where the copy began, or everything; what differs is a failure.
    pub(super) fn verify(&self, name: Option<&[u8]>) {
        let first = match name {
            Some(name) => Task::Entry(Arc::clone(&self.base), name.to_vec()),
            None => Task::List(Arc::clone(&self.base)),
        };
        let (queue, inodes) = (WorkQueue::new(vec![first]), Inodes::default());
        queue.run(self.settings.parallel, |task| self.verify_task(task, &queue, &inodes));
    }

    fn verify_task(&self, task: Task<S, T>, queue: &WorkQueue<Task<S, T>>, inodes: &Inodes) {
        match task {
            Task::Entry(pair, name) => match self.verify_entry(&pair, &name, inodes) {
                Ok(None) => {}
                Ok(Some(directory)) => queue.push(Task::List(directory)),
                Err(error) => self.fail(&pair.path_of(&name), error),
            },
            Task::List(pair) => match self.source.names(&pair.source) {
                Err(error) => self.fail(&pair.path, error),
                Ok(names) => {
                    for name in names {
                        if let Some(task) = queue.offer(Task::Entry(Arc::clone(&pair), name)) {
                            self.verify_task(task, queue, inodes);
                        }
                    }
                }
            },
        }
    }

    fn verify_entry(&self, pair: &Pair<S, T>, name: &[u8], inodes: &Inodes) -> Result<Option<Arc<Pair<S, T>>>> {
        let path = pair.path_of(name);
        let Some(source) = self.source.lookup(&pair.source, name)? else { return Ok(None) };
        if self.has_failed(&path) {
            return Ok(None);
        }
        let target = self.target.lookup(&pair.target, pair.target_name(name))?.ok_or(TransferError::NotFound)?;
        let (left, right) = (self.source.meta(&source)?, self.target.meta(&target)?);
        self.compare_meta(&left, &right)?;
        if self.settings.xattrs
            && left.kind != NodeKind::Symlink
            && self.source.xattrs(&source)? != self.target.xattrs(&target)?
        {
            return Err(TransferError::Differs("extended attributes"));
        }
        match left.kind {
            NodeKind::Directory => return Ok(Some(Arc::new(Pair { source, target, path, renamed: None }))),
            NodeKind::Symlink if self.source.readlink(&source)? != self.target.readlink(&target)? => {
                return Err(TransferError::Differs("target"));
            }
            NodeKind::File => {
                let links = left.nlink > 1;
                let known = if links { locked(inodes).insert(left.inode, right.inode) } else { None };
                if known.is_some_and(|known| known != right.inode) {
                    return Err(TransferError::Differs("hard links"));
                }
                if known.is_none() {
                    compare_content(&self.source.open(&source)?, &self.target.open(&target)?, left.size)?;
                }
            }
            _ => {}
        }
        self.progress.verified();
        Ok(None)
    }

    fn compare_meta(&self, left: &Meta, right: &Meta) -> Result<()> {
        if self.is_same(left, right) {
            return Ok(());
        }
        let what = match () {
            () if left.kind != right.kind => "kind",
            () if left.mtime != right.mtime => "modification time",
            () if left.mode != right.mode => "mode",
            () if left.size != right.size && left.kind == NodeKind::File => "size",
            () => "owner or device",
        };
        Err(TransferError::Differs(what))
    }
}

fn compare_content(left: &impl OpenFile, right: &impl OpenFile, size: u64) -> Result<()> {
    let (mut a, mut b) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    while at < size {
        let read = left.read_at(at, &mut a)?;
        if read == 0 || right.read_at(at, &mut b[..read])? != read || a[..read] != b[..read] {
            return Err(TransferError::Differs("content"));
        }
        at += read as u64;
    }
    if right.read_at(size, &mut b)? == 0 { Ok(()) } else { Err(TransferError::Differs("size")) }
}
