//! Settling: a file whose end has come to rest gets a disk size that tells its plain size, once what was written is durable.
//! `docs/FORMAT.md` section 6.

use std::io;
use std::sync::PoisonError;

use crate::content::{ContentError, Unsettled};
use crate::fs::error::{Error, lacks_descriptors};
use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::OpenFile;
use crate::fs::state::unsettled::{Action, Watched};

/// With more files than this, the whole backing filesystem is made durable at once instead of file by file.
const SYNC_SINGLY: usize = 8;

impl Filesystem {
    /// Settles every watched file whose end has not moved since the last look, or with `all` every one. A file that is not
    /// settled keeps its content, and says why in the log.
    ///
    /// # Errors
    /// Why a file could not be made durable.
    pub(in crate::fs) fn settle_rested(&self, all: bool) -> Result<(), Error> {
        self.check_tenure()?;
        let _one_at_a_time = self.work.unsettled.round.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut keep, mut batch, mut done) = (Vec::new(), Vec::new(), Vec::new());
        for mut watched in self.work.unsettled.take() {
            if all {
                watched.inode.try_late_mtime();
            }
            match watched.decide(all) {
                Action::Wait => keep.push(watched),
                Action::Settle(open, found) => batch.push((watched, open, found)),
                Action::Done => done.push(watched.inode),
            }
        }
        let mut result = Ok(());
        for ((watched, open, found), durable) in batch.iter().zip(self.make_durable(&batch)) {
            let place = || watched.inode.node.describe();
            // Making so many durable may have taken long.
            let durable = durable.and_then(|()| Ok(self.check_permit().map_err(std::io::Error::from)?));
            match durable.map(|()| watched.settle(open, *found)) {
                // Somebody else has taken it over, and settles it.
                Ok(Ok(_) | Err(ContentError::Retired)) | Err(ContentError::Retired) => {}
                Ok(Err(error)) => self.alarm("settling a file", || format!("{} cannot be settled: {error}", place())),
                Err(error) => {
                    let what = || format!("{} cannot be made durable: {error}", place());
                    match &error {
                        // It is so for every file, until some are closed.
                        ContentError::Io(io) if lacks_descriptors(io) => self.alarm("settling", what),
                        _ => tracing::warn!("{}", what()),
                    }
                    result = Err(error.into());
                }
            }
        }
        keep.extend(batch.into_iter().map(|(watched, ..)| watched));
        self.work.unsettled.put_back(keep);
        done.iter().for_each(|inode| self.work.unsettled.end_watch(&self.inodes, inode));
        result
    }

    /// Makes every file of a batch durable, and says which are. If the whole filesystem cannot be synced at once, the files are
    /// asked one by one: where none of them is to blame, everybody hears of it.
    fn make_durable(&self, batch: &[(Watched, OpenFile, Unsettled)]) -> Vec<Result<(), ContentError>> {
        if batch.is_empty() {
            return Vec::new();
        }
        let mut refused = None;
        if batch.len() > SYNC_SINGLY {
            match self.sync_filesystem() {
                Ok(()) => return batch.iter().map(|_| Ok(())).collect(),
                Err(error) => refused = Some(error),
            }
        }
        let ordered = self.flush_dir_syncs();
        let sync = |(_, open, _): &(Watched, OpenFile, Unsettled)| match &ordered {
            Ok(()) => open.content.make_durable(),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string()).into()),
        };
        let durable: Vec<_> = batch.iter().map(sync).collect();
        if let Some(error) = refused.filter(|_| durable.iter().all(Result::is_ok)) {
            self.note_for_all(&error);
        }
        durable
    }
}
