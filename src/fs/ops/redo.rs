//! Redo logs that were left: by a crash, or because a file could not be overwritten when its log counted already.
//!
//! Invariants: a log is applied only to the file that it was made for, and only if that has not had it whole; a file whose log
//! counts and has not been applied is closed to everybody; its inode is held, so that its number is nobody else's. A log that does
//! not count closes nothing.

use std::io::ErrorKind;
use std::sync::Arc;

use crate::content::{apply_log, complete};
use crate::crypto::FileKeys;
use crate::format::geometry::PAGE_LEN;
use crate::format::header::{Header, HeaderPage};
use crate::format::name::RedoLog;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::inode::Inode;
use crate::storage::{Access, DiskFile, Node, OpenLog, RawFile, SetTime, find_inodes};

use super::backing_file::Found;

/// What a log means to the file that it names.
enum Meaning {
    /// Nothing: it is damaged, or older than the file, or was put there by something else.
    None,
    /// The file has had it whole.
    Applied,
    /// The file is to become what it says.
    ToApply,
}

impl Filesystem {
    /// Applies logs that a crash has left. A file that cannot be finished now is closed to everybody.
    pub(in crate::fs) fn finish_rekeying(&self) -> Result<(), Error> {
        if !self.options.read_only {
            self.check_permit()?;
            self.backing.redo_logs.tidy()?;
        }
        let mut logs = self.backing.redo_logs.all()?;
        logs.retain(|log| {
            let counts = self.counts(log);
            if !counts {
                self.drop_log(log);
            }
            counts
        });
        let root = self.inodes.root().node.clone();
        let found = find_inodes(&root, logs.iter().map(|log| log.ino).collect());
        let found =
            found.inspect_err(|error| tracing::error!("files that were getting new data keys are closed: {error}"));
        for log in logs {
            match found.as_ref().map(|nodes| nodes.get(&log.ino)) {
                Ok(Some(node)) => self.finish_found(node.clone(), &log)?,
                // Its file is gone.
                Ok(None) => self.drop_log(&log),
                Err(_) => self.close(InodeId(log.ino), log, None),
            }
        }
        Ok(())
    }

    fn finish_found(&self, node: Node, log: &RedoLog) -> Result<(), Error> {
        let (inode, _) = self.learn(node)?;
        if let Err(error) = self.finish(&inode, log) {
            tracing::error!("a file that was getting a new data key is closed ({}): {error}", log.text());
            self.close_until_finished(&inode, *log);
        }
        self.forget(inode.id, 1);
        Ok(())
    }

    /// Whether a log is one, by what it says itself. One that cannot be read now may be.
    fn counts(&self, log: &RedoLog) -> bool {
        match self.backing.redo_logs.open(log).map_err(Error::from).and_then(|open| self.header_in(open.file())) {
            Ok(header) => header.is_some_and(|header| header.file_id == log.file_id),
            Err(Error::Io(error)) => !matches!(error.kind(), ErrorKind::InvalidData | ErrorKind::NotFound),
            Err(_) => false,
        }
    }

    /// The header; none in what is too short for one, or was never durable.
    fn header_in(&self, file: &dyn RawFile) -> Result<Option<Header>, Error> {
        let mut page: HeaderPage = [0; PAGE_LEN];
        if file.read_at(&mut page, 0)? < PAGE_LEN {
            return Ok(None);
        }
        Ok(self.volume.ring.authenticate(&page)?.map(|header| header.header().clone()))
    }

    /// A log that means nothing goes, if this mount may write.
    fn drop_log(&self, log: &RedoLog) {
        if self.options.read_only || self.check_permit().is_err() {
            return;
        }
        match self.backing.redo_logs.remove(log) {
            Ok(()) => self.alarm("redo log", || format!("a redo log that does not count was removed: {}", log.text())),
            Err(error) => self.alarm("redo log", || {
                format!("a redo log that does not count cannot be removed: {}: {error}", log.text())
            }),
        }
    }

    /// Brings a file to where its log says, or finds that the log means nothing to it. The log is gone then.
    fn finish(&self, inode: &Arc<Inode>, log: &RedoLog) -> Result<(), Error> {
        let open = match self.backing.redo_logs.open(log) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            open => open?,
        };
        let access = if self.options.read_only { Access::Read } else { Access::ReadWrite };
        let file = self.open_backing(inode, access)?;
        match self.meaning(&open, file.as_ref())? {
            Meaning::None => self.drop_log(log),
            Meaning::Applied if self.options.read_only => {}
            Meaning::ToApply if self.options.read_only => self.read_instead(inode, *log),
            meaning => {
                let stat = inode.node.stat()?;
                self.check_permit()?;
                open.make_durable()?;
                match meaning {
                    Meaning::Applied => complete(open.file(), file.as_ref(), &self.keys_at(inode, &file)?)?,
                    _ => apply_log(open.file(), file.as_ref(), &|| Ok(self.check_permit()?))?,
                }
                inode.node.set_times(SetTime::At(stat.atime), SetTime::At(stat.mtime))?;
                tracing::info!("{}: has got its new data key", inode.node.describe());
                if open.remove().is_err() {
                    self.remove_later(*log);
                }
            }
        }
        Ok(())
    }

    /// The keys of a file that has a header.
    fn keys_at(&self, inode: &Inode, file: &DiskFile) -> Result<FileKeys, Error> {
        match self.find_header(inode, file)? {
            Found::Header(header) => Ok(self.volume.ring.open(&header)?.keys),
            Found::None => Err(Error::NoHeader),
        }
    }

    fn meaning(&self, log: &OpenLog, file: &dyn RawFile) -> Result<Meaning, Error> {
        let (Some(wanted), Some(there)) = (self.header_in(log.file())?, self.header_in(file)?) else {
            return Ok(Meaning::None);
        };
        let name = log.name();
        if (wanted.file_id, there.file_id) != (name.file_id, name.file_id) || wanted.suite != there.suite {
            return Ok(Meaning::None);
        }
        if wanted == there {
            return Ok(Meaning::Applied);
        }
        let follows = there.generation.checked_add(1) == Some(wanted.generation);
        let fits = follows && log.file().size()? == file.size()?;
        Ok(if fits { Meaning::ToApply } else { Meaning::None })
    }

    /// Has the log of a file read as long as it is there. The inode stays known, so that its number is nobody else's.
    fn read_instead(&self, inode: &Arc<Inode>, log: RedoLog) {
        if self.rekeying.pending.logs().instead.insert(inode.id, log).is_none() {
            self.inodes.count_lookup(inode);
        }
        self.rekeying.pending.set_any(true);
    }

    /// Closes a file to everybody until its log has been applied.
    pub(in crate::fs) fn close_until_finished(&self, inode: &Arc<Inode>, log: RedoLog) {
        self.close(inode.id, log, Some(inode));
    }

    fn close(&self, id: InodeId, log: RedoLog, inode: Option<&Arc<Inode>>) {
        // It stays known as long as it is closed: its keys have one owner.
        let inode = inode.map(|inode| self.inodes.count_lookup(inode));
        if self.rekeying.pending.logs().closed.insert(id, (log, inode)).is_some_and(|(_, before)| before.is_some()) {
            self.forget(id, 1);
        }
        self.rekeying.pending.set_any(true);
    }

    /// A log that could not be removed, of a file that has it whole.
    pub(in crate::fs) fn remove_later(&self, log: RedoLog) {
        self.rekeying.pending.logs().useless.push(log);
        self.rekeying.pending.set_any(true);
    }

    /// Tries again to finish a file that is closed. Its keys are the caller's.
    pub(in crate::fs) fn finish_if_rekey_pending(&self, inode: &Arc<Inode>) -> Result<(), Error> {
        let log = self.rekeying.pending.logs().closed.get(&inode.id).map(|(log, _)| *log);
        let Some(log) = log else { return Ok(()) };
        self.finish(inode, &log)?;
        let closed = self.rekeying.pending.logs().closed.remove(&inode.id);
        if closed.is_some_and(|(_, held)| held.is_some()) {
            self.forget(inode.id, 1);
        }
        Ok(())
    }

    /// Tries again what could not be done when it was to be: a disk that was full may have space again.
    pub(in crate::fs) fn finish_what_is_left(&self) {
        if self.options.read_only || !self.rekeying.pending.is_any() || self.check_permit().is_err() {
            return;
        }
        let (closed, useless) = {
            let mut unfinished = self.rekeying.pending.logs();
            (unfinished.closed.values().cloned().collect::<Vec<_>>(), std::mem::take(&mut unfinished.useless))
        };
        for (log, inode) in closed.into_iter().filter_map(|(log, inode)| Some((log, inode?))) {
            if self.has_space_for(&log) {
                let _owner = inode.own_keys();
                if let Err(error) = self.finish_if_rekey_pending(&inode) {
                    self.alarm("unfinished", || format!("{}: still closed: {error}", inode.node.describe()));
                }
            }
        }
        for log in useless {
            if self.backing.redo_logs.remove(&log).is_err() {
                self.remove_later(log);
            }
        }
        let unfinished = self.rekeying.pending.logs();
        self.rekeying.pending.set_any(!unfinished.closed.is_empty() || !unfinished.useless.is_empty());
    }

    /// Where overwriting takes new space, trying without it would only write the file again and again.
    fn has_space_for(&self, log: &RedoLog) -> bool {
        let needed = self.backing.redo_logs.open(log).and_then(|log| log.file().space());
        let free = self.space().map(|space| space.available.saturating_mul(space.block_size));
        !matches!((needed, free), (Ok(needed), Ok(free)) if needed > free)
    }
}
