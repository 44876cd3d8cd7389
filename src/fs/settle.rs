//! Settling in the background: files whose end has come to rest get a disk size that tells their plain size, once what was
//! written is durable. `docs/FORMAT.md` section 6.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use crate::content::Unsettled;
use crate::runtime::{Next, Periodic};

use super::error::lacks_descriptors;
use super::inode::{Inode, InodeTable, OpenFile};
use super::trim::is_in_background;
use super::{ContentError, Error, Filesystem, InodeId, ROOT};

/// How long the end of a file must have rested: at least one and at most two of these.
const REST: Duration = Duration::from_secs(5);
/// With more files than this, the whole backing filesystem is made durable at once instead of file by file.
const SYNC_SINGLY: usize = 8;

#[derive(Default)]
pub(super) struct Settler {
    /// Held for a whole round, so that the last one at shutdown misses nothing.
    round: Mutex<()>,
    watched: Mutex<HashMap<InodeId, Watched>>,
    thread: OnceLock<Periodic>,
}

struct Watched {
    inode: Arc<Inode>,
    /// What was seen at the last look.
    seen: Option<Unsettled>,
}

/// What to do with a watched file.
enum Verdict {
    Wait,
    Settle(OpenFile, Unsettled),
    Done,
}

impl Settler {
    /// Puts a file that may become unsettled on the list.
    pub(super) fn watch(&self, inodes: &InodeTable, inode: &Arc<Inode>) {
        if inodes.watch(inode) {
            let watched = Watched { inode: Arc::clone(inode), seen: None };
            self.watched().insert(inode.id, watched);
        }
    }

    /// Looks after the list of `fs` until it is stopped or dropped.
    pub(super) fn start(fs: &Arc<Filesystem>) -> std::io::Result<()> {
        let weak = Arc::downgrade(fs);
        let periodic = Periodic::start("kmsfs-settle", Next::After(REST), move || run(&weak))?;
        let _ = fs.settler.thread.set(periodic);
        Ok(())
    }

    pub(super) fn stop(&self) {
        self.thread.get().inspect(|thread| thread.stop());
    }

    /// Files on the list.
    pub(super) fn len(&self) -> usize {
        self.watched().len()
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<InodeId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(weak: &Weak<Filesystem>) -> Next {
    is_in_background();
    let Some(fs) = weak.upgrade() else { return Next::Never };
    // What fails is logged, and kept for those who sync.
    let _ = fs.settle_rested(false);
    fs.finish_what_is_left();
    fs.tell_space_of_open_files();
    Next::After(REST)
}

impl Filesystem {
    /// Settles every watched file whose end has not moved since the last look, or with `all` every one. A file that is not
    /// settled keeps its content, and says why in the log.
    ///
    /// # Errors
    /// Why a file could not be made durable.
    pub(super) fn settle_rested(&self, all: bool) -> Result<(), Error> {
        self.check_tenure()?;
        let _one_at_a_time = self.settler.round.lock().unwrap_or_else(PoisonError::into_inner);
        let watched = std::mem::take(&mut *self.settler.watched());
        let (mut keep, mut batch, mut done) = (Vec::new(), Vec::new(), Vec::new());
        for mut watched in watched.into_values() {
            if all {
                watched.inode.try_late_mtime();
            }
            match watched.judge(all) {
                Verdict::Wait => keep.push(watched),
                Verdict::Settle(open, found) => batch.push((watched, open, found)),
                Verdict::Done => done.push(watched.inode),
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
        let again = keep.into_iter().map(|watched| (watched.inode.id, watched));
        self.settler.watched().extend(again);
        done.iter().for_each(|inode| self.stop_watching(inode));
        result
    }

    /// A file that was opened again a moment ago stays on the list.
    fn stop_watching(&self, inode: &Arc<Inode>) {
        self.inodes.unwatch(inode);
        if inode.slot().open.is_some() {
            self.settler.watch(&self.inodes, inode);
        }
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
        let ordered = self.enforce_order();
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

    /// Makes everything on the backing filesystem durable.
    pub(super) fn sync_filesystem(&self) -> io::Result<()> {
        let root = self.inodes.get(ROOT).map_err(io::Error::other)?;
        self.trimmer.with_reserve(|| root.node.sync_filesystem())
    }

    /// A file without a name that the kernel has forgotten is gone: it must not keep its space until the next look.
    pub(super) fn drop_if_nameless(&self, inode: &Inode) {
        if inode.node.stat().is_ok_and(|stat| stat.nlink == 0) {
            self.settle_no_more(inode);
        }
    }

    /// Nobody will ask for the file's size.
    pub(super) fn settle_no_more(&self, inode: &Inode) {
        self.settler.watched().remove(&inode.id);
        inode.slot().close();
        self.inodes.unwatch(inode);
    }

    /// Whether a file still has an end that was lost.
    pub(super) fn owes_an_end(&self) -> bool {
        self.settler.watched().values().any(|watched| watched.inode.ledger.owed().is_some())
    }

    /// How many files are known to be unsettled.
    pub(super) fn unsettled_files(&self) -> u64 {
        let unsettled = |watched: &&Watched| {
            watched.inode.slot().open.as_ref().is_some_and(|open| open.content.unsettled().is_some())
        };
        self.settler.watched().values().filter(unsettled).count() as u64
    }
}

impl Watched {
    fn settle(&self, open: &OpenFile, found: Unsettled) -> Result<bool, ContentError> {
        let times_stay = self.inode.write_late_mtime()?;
        let settled = open.content.settle(found);
        drop(times_stay);
        settled
    }

    fn judge(&mut self, all: bool) -> Verdict {
        let mut slot = self.inode.slot();
        let Some(open) = slot.open.clone() else {
            return if slot.handles > 0 { Verdict::Wait } else { Verdict::Done };
        };
        let found = open.content.unsettled();
        // A file without a name is gone with its last handle: nobody will ask for its size.
        let nameless = slot.handles == 0 && self.inode.node.stat().is_ok_and(|stat| stat.nlink == 0);
        // What the disk has refused is not on it: the size is told by pages, which are there or not.
        let refused = slot.errors().is_any();
        let Some(found) = found.filter(|_| !nameless && !refused) else {
            if slot.handles > 0 {
                self.seen = None;
                return Verdict::Wait;
            }
            slot.close();
            return Verdict::Done;
        };
        if all || self.seen == Some(found) {
            return Verdict::Settle(open, found);
        }
        self.seen = Some(found);
        Verdict::Wait
    }
}
