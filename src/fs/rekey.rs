//! New data keys for old files: each is sealed anew, in place, while programs use it.
//!
//! Invariants: what a log is applied to has the header that the log was made for; a file whose log could not be applied is
//! closed to everybody until it is.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use crate::content::apply_log;
use crate::format::geometry::PAGE_LEN;
use crate::format::header::HeaderPage;
use crate::format::name::RedoLog;
use crate::storage::{Access, NodeKind, RawFile, SetTime, find_inode};

use super::inode::Inode;
use super::open::Found;
use super::{Error, Filesystem, InodeId, ROOT};

/// What became of a file that was to get a new data key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rekeyed {
    /// It has one. So many bytes were sealed anew.
    Done(u64),
    /// It has no data key: it is empty, or no regular file.
    NothingToDo,
}

impl Filesystem {
    /// Gives the file at `path`, relative to the root of the cipher directory, a new data key and seals it anew. Operations on
    /// it wait meanwhile. May take a provider's deadline, and as long as writing the file twice takes.
    ///
    /// # Errors
    /// [`Error`]. The file is as it was, or will be finished by the next mount.
    pub fn rekey(&self, path: &str) -> Result<Rekeyed, Error> {
        self.check_writable()?;
        let mut node = self.inodes.get(ROOT)?.node.clone();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            node = node.lookup(part)?;
        }
        let (inode, _) = self.learn(node)?;
        let rekeyed = self.rekey_inode(&inode);
        self.forget(inode.id, 1);
        rekeyed
    }

    fn rekey_inode(&self, inode: &Arc<Inode>) -> Result<Rekeyed, Error> {
        if inode.kind != NodeKind::File {
            return Ok(Rekeyed::NothingToDo);
        }
        loop {
            let open = self.open_now(inode, Access::Read)?;
            let Found::Header(old) = self.find_header(inode, &open.file)? else { return Ok(Rekeyed::NothingToDo) };
            if !open.file.is_writable() {
                return Err(std::io::Error::from(std::io::ErrorKind::PermissionDenied).into());
            }
            let mut page: HeaderPage = [0; PAGE_LEN];
            open.file.read_at(&mut page, 0)?;
            let (keys, header) = self.volume.ring.rekeyed(&page, &old)?;
            let stat = inode.node.stat()?;
            let log = RedoLog { ino: stat.ino, file_id: old.header().file_id };
            let logs = &self.redo_logs;
            let commit = || logs.commit(&log).inspect_err(|_| drop(logs.remove(&log)));
            let rekeyed = open.content.rekey(&keys, &header, &logs.create(&log)?, commit);
            let _ = logs.discard(&log);
            let committed = logs.all()?.contains(&log);
            if committed && rekeyed.is_err() {
                self.fence(InodeId(stat.ino));
            }
            inode.slot().close();
            match rekeyed {
                Err(crate::content::ContentError::Retired) => continue,
                result => result?,
            }
            logs.remove(&log)?;
            let late = inode.late_mtime();
            inode.node.set_times(SetTime::At(stat.atime), SetTime::At(late.unwrap_or(stat.mtime)))?;
            return Ok(Rekeyed::Done(stat.size));
        }
    }

    /// Applies logs that a crash has left. A file that cannot be finished now is closed to everybody.
    pub(super) fn finish_rekeying(&self) -> Result<(), Error> {
        if !self.read_only {
            self.redo_logs.tidy()?;
        }
        for log in self.redo_logs.all()? {
            let finished = if self.read_only { Err(Error::ReadOnly) } else { self.finish(&log) };
            if let Err(error) = finished {
                tracing::error!("a file that was getting a new data key is closed ({}): {error}", log.text());
                self.fence(InodeId(log.ino));
            }
        }
        Ok(())
    }

    fn finish(&self, log: &RedoLog) -> Result<(), Error> {
        let Some(node) = find_inode(&self.inodes.get(ROOT)?.node, log.ino)? else {
            // Its file is gone.
            return Ok(self.redo_logs.remove(log)?);
        };
        let (inode, _) = self.learn(node)?;
        let finished = self.finish_inode(&inode, log);
        self.forget(inode.id, 1);
        finished
    }

    fn finish_inode(&self, inode: &Inode, log: &RedoLog) -> Result<(), Error> {
        let (file, new) = (self.open_backing(inode, Access::ReadWrite)?, self.redo_logs.open(log)?);
        let of = |file| match self.find_header(inode, file)? {
            Found::Header(header) if header.header().file_id == log.file_id => Ok::<_, Error>(header),
            _ => Err(Error::NoHeader),
        };
        let (there, wanted) = (of(&file)?, of(&new)?);
        if file.size()? != new.size()? || there.header().generation > wanted.header().generation {
            return Err(Error::NoHeader);
        }
        let stat = inode.node.stat()?;
        apply_log(&new, file.as_ref())?;
        self.redo_logs.remove(log)?;
        inode.node.set_times(SetTime::At(stat.atime), SetTime::At(stat.mtime))?;
        tracing::info!("{}: has got its new data key", inode.node.describe());
        Ok(())
    }

    fn fence(&self, id: InodeId) {
        self.fenced().insert(id);
        self.has_fenced.store(true, Ordering::SeqCst);
    }

    /// Whether a file waits for its log to be applied.
    pub(super) fn check_fence(&self, inode: &Inode) -> Result<(), Error> {
        let fenced = self.has_fenced.load(Ordering::Relaxed) && self.fenced().contains(&inode.id);
        if fenced { Err(Error::Unfinished) } else { Ok(()) }
    }

    fn fenced(&self) -> std::sync::MutexGuard<'_, HashSet<InodeId>> {
        self.fenced.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
