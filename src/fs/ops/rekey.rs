//! New data keys for old files: each is sealed anew, in place, while programs use it.
//!
//! Invariants: one thread at a time has the keys of an inode, from before its log is made until after that is gone; a log counts
//! only under the list of wrapping keys that its header was made under; once it counts nothing fails that leaves the file in use.

use std::io;
use std::sync::{Arc, PoisonError};

use crate::content::{ContentError, KeepsLog};
use crate::format::geometry::PAGE_LEN;
use crate::format::header::HeaderPage;
use crate::format::name::RedoLog;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::Inode;
use crate::fs::state::rekeying::Run;
use crate::storage::cipher_directory::{LockError, LockMode};
use crate::storage::{Access, NodeKind, NotCommitted, OpenLog, RawFile, SetTime, Stat};

use super::backing_file::Found;

/// What became of a file that was to get a new data key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rekeyed {
    /// It has one.
    Done {
        /// So many were sealed anew.
        bytes: u64,
        /// The file.
        file_id: [u8; 32],
    },
    /// It has no data key: it is empty, or no regular file.
    NothingToDo,
}

impl Filesystem {
    /// Gives the file at `path`, relative to the root of the cipher directory, a new data key and seals it anew. Operations on
    /// it wait meanwhile. May take a provider's deadline, and as long as writing the file twice takes. No data key is used that
    /// was made ahead before `run` began.
    ///
    /// # Errors
    /// [`Error`]. The file is as it was, or will be finished by this mount or the next one.
    pub fn rekey(&self, path: &str, run: Option<Run>) -> Result<Rekeyed, Error> {
        self.check_writable()?;
        let mut node = self.inodes.root().node.clone();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            node = node.lookup(part)?;
        }
        // Held while the file is sealed, also when whoever asked for it has gone away.
        let _keys_stay = self.backing.directory.lock_keys(LockMode::Shared).map_err(|error| match error {
            LockError::Held { .. } | LockError::Elsewhere { .. } => Error::KeysChange,
            LockError::Io(error) => error.into(),
        })?;
        self.begin_run(run);
        let (inode, _) = self.learn(node)?;
        let rekeyed = self.rekey_inode(&inode);
        self.forget(inode.id, 1);
        rekeyed
    }

    /// What was made ahead may be known too.
    fn begin_run(&self, run: Option<Run>) {
        let mut last = self.rekeying.run.lock().unwrap_or_else(PoisonError::into_inner);
        if run.is_none() || *last != run {
            *last = run;
            self.volume.ring.forget_made_ahead();
            self.drop_unwritten_headers();
        }
    }

    fn rekey_inode(&self, inode: &Arc<Inode>) -> Result<Rekeyed, Error> {
        if inode.kind != NodeKind::File {
            return Ok(Rekeyed::NothingToDo);
        }
        let _owner = inode.own_keys();
        self.finish_if_rekey_pending(inode)?;
        loop {
            match self.try_to_rekey(inode) {
                Err(Error::Content(ContentError::Retired)) => {}
                result => return result,
            }
        }
    }

    fn try_to_rekey(&self, inode: &Arc<Inode>) -> Result<Rekeyed, Error> {
        let open = self.open_now(inode, Access::Read)?;
        let Found::Header(old) = self.find_header(inode, &open.file)? else { return Ok(Rekeyed::NothingToDo) };
        // A file may be open for reading only because its mode says so.
        if !open.file.is_writable() {
            open.file.make_writable_like(self.open_backing(inode, Access::ReadWrite)?.as_ref());
        }
        let mut page: HeaderPage = [0; PAGE_LEN];
        open.file.read_at(&mut page, 0)?;
        let version = self.volume.ring.key_version();
        let (keys, header) = self.volume.ring.rekeyed(&page, &old)?;
        let stat = inode.begin_sealing()?;
        let log_name = RedoLog { ino: stat.ino, file_id: old.header().file_id };
        let rekeyed = self.backing.redo_logs.create(&log_name).map_err(Error::from).and_then(|log| {
            let keeper = Keeper { fs: self, inode, log, version, stat };
            Ok(open.content.rekey(&keys, &header, &keeper)?)
        });
        inode.end_sealing(true);
        rekeyed.map(|()| Rekeyed::Done { bytes: stat.size, file_id: log_name.file_id })
    }
}

/// What a filesystem does with the log of one file.
struct Keeper<'a> {
    fs: &'a Filesystem,
    inode: &'a Arc<Inode>,
    log: OpenLog,
    /// Of the list of wrapping keys that the header in the log was made under.
    version: u64,
    stat: Stat,
}

impl KeepsLog for Keeper<'_> {
    fn file(&self) -> &dyn RawFile {
        self.log.file()
    }

    fn check(&self) -> io::Result<()> {
        Ok(self.fs.check_permit()?)
    }

    fn commit(&self) -> Result<(), ContentError> {
        self.check()?;
        let committed = self.fs.rekeying.while_no_log_commits(|| {
            // Else the header may name keys that nobody opens any more.
            (self.fs.volume.ring.key_version() == self.version).then(|| self.log.commit())
        });
        match committed {
            None => Err(ContentError::Retired),
            Some(Ok(())) => Ok(()),
            Some(Err(NotCommitted::No(error))) => Err(error.into()),
            Some(Err(NotCommitted::Unclear(error))) => {
                self.fs.close_until_finished(self.inode, self.log.name());
                Err(error.into())
            }
        }
    }

    fn applied(&self, applied: &io::Result<()>) {
        if let Err(error) = applied {
            tracing::error!(
                "{}: closed until it has got its new data key, which is tried again: {error}",
                self.inode.node.describe()
            );
            return self.fs.close_until_finished(self.inode, self.log.name());
        }
        self.inode.end_sealing(false);
        // The access time is the file's own affair: nothing of this is one.
        let _ = self.inode.node.set_times(SetTime::At(self.stat.atime), SetTime::Keep);
        if let Err(error) = self.log.remove() {
            tracing::warn!("the log of a file with a new data key cannot be removed, which is tried again: {error}");
            self.fs.remove_later(self.log.name());
        }
    }
}
