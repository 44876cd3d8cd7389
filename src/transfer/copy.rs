//! Copying a tree from one side to the other, with many threads.
//!
//! Invariants: nothing is under its own name before all of it is there and durable: a file is written under a name of ours
//! beside its place, many of them are made durable together, and then renamed; so an interrupted run leaves whole files and
//! files of ours, and the next run goes on. What fails is noted and the rest is copied; what cannot succeed any more ends the
//! run. A source that changes while it is read is read again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::runtime::WorkQueue;
use crate::storage::NodeKind;

use super::content::copy_content;
use super::report::{Failure, Progress, Settings};
use super::side::{Meta, New, OpenFile, Result, Side, TransferError, Xattrs, kind_name};

/// What the names of files begin with that are not finished.
pub(super) const PARTIAL: &[u8] = b".kmsfs-partial-";
/// Files, and bytes, that are made durable together.
const BATCH: (usize, u64) = (128, 256 << 20);
/// The waits before something is tried again that somebody may be writing.
pub(super) const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];
/// What has not changed for so long is not being written now.
const AT_REST: Duration = Duration::from_secs(30);
/// A provider that throttles or is away is asked again for so long after it last gave a key.
const PATIENCE: Duration = Duration::from_secs(60);
/// So many files in a row without a key are enough.
const REFUSALS: u32 = 64;

/// A directory of both sides.
pub(super) struct Pair<S: Side, T: Side> {
    pub(super) source: S::Object,
    pub(super) target: T::Object,
    /// From where the copy began.
    pub(super) path: Vec<u8>,
    /// The name that an entry gets, if it is another one: only where the copy begins.
    pub(super) renamed: Option<Vec<u8>>,
}

impl<S: Side, T: Side> Pair<S, T> {
    pub(super) fn target_name<'n>(&'n self, name: &'n [u8]) -> &'n [u8] {
        self.renamed.as_deref().unwrap_or(name)
    }

    pub(super) fn path_of(&self, name: &[u8]) -> Vec<u8> {
        if self.path.is_empty() { name.to_vec() } else { [&self.path, &b"/"[..], name].concat() }
    }
}

pub(super) enum Task<S: Side, T: Side> {
    Entry(Arc<Pair<S, T>>, Vec<u8>),
    List(Arc<Pair<S, T>>),
}

/// A finished file that has not got its name yet.
struct Pending<S: Side, T: Side> {
    pair: Arc<Pair<S, T>>,
    name: Vec<u8>,
    partial: Vec<u8>,
    kind: NodeKind,
    /// Without holes.
    bytes: u64,
}

struct Batch<S: Side, T: Side> {
    files: Vec<Pending<S, T>>,
    bytes: u64,
}

/// What tells inodes apart.
type Inode = (u64, u64);

/// A copy under way.
pub(super) struct Copy<'a, S: Side, T: Side> {
    pub(super) source: &'a S,
    pub(super) target: &'a T,
    pub(super) settings: Settings,
    pub(super) progress: &'a Progress,
    pub(super) base: Arc<Pair<S, T>>,
    pub(super) privileged: bool,
    batch: Mutex<Batch<S, T>>,
    /// The first name of each inode that has several.
    pub(super) first_names: Mutex<HashMap<Inode, Vec<u8>>>,
    /// Further names: of which inode.
    pub(super) links: Mutex<Vec<(Vec<u8>, Inode)>>,
    /// Directories, whose attributes are set in the end.
    pub(super) directories: Mutex<Vec<Vec<u8>>>,
    failures: Mutex<Vec<Failure>>,
    /// A file that rested while it was read lacks its end.
    is_cut_off: AtomicBool,
    stopped: AtomicBool,
    refusals: AtomicU32,
    last_success: Mutex<Instant>,
}

impl<'a, S: Side, T: Side> Copy<'a, S, T> {
    pub(super) fn new(
        source: &'a S,
        target: &'a T,
        base: Pair<S, T>,
        settings: Settings,
        progress: &'a Progress,
    ) -> Self {
        Self {
            source,
            target,
            settings,
            progress,
            base: Arc::new(base),
            privileged: rustix::process::geteuid().is_root(),
            batch: Mutex::new(Batch { files: Vec::new(), bytes: 0 }),
            first_names: Mutex::default(),
            links: Mutex::default(),
            directories: Mutex::default(),
            failures: Mutex::default(),
            is_cut_off: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            refusals: AtomicU32::new(0),
            last_success: Mutex::new(Instant::now()),
        }
    }

    /// Copies the entry `name` of where the copy begins, or with none everything in it; returns what failed.
    pub(super) fn run(self, name: Option<&[u8]>) -> Vec<Failure> {
        let base = Arc::clone(&self.base);
        let first = match name {
            Some(name) => Task::Entry(base, name.to_vec()),
            None => {
                if let Err(error) = self.remove_partial(&base.target) {
                    self.fail(b".", error);
                }
                locked(&self.directories).push(Vec::new());
                Task::List(base)
            }
        };
        let queue = WorkQueue::new(vec![first]);
        queue.run(self.settings.parallel, |task| self.work(task, &queue));
        self.commit();
        if !self.is_stopped() {
            self.finish();
        }
        if self.settings.verify && !self.is_stopped() {
            self.verify(name);
        }
        if self.is_cut_off.load(Ordering::Relaxed) {
            locked(&self.failures).push(Failure { path: b".".to_vec(), error: TransferError::EndMarks });
        }
        locked(&self.failures).drain(..).collect()
    }

    fn work(&self, task: Task<S, T>, queue: &WorkQueue<Task<S, T>>) {
        if self.is_stopped() {
            return;
        }
        match task {
            Task::Entry(pair, name) => {
                if let Some(directory) = self.try_entry(&pair, &name) {
                    queue.push(Task::List(directory));
                }
            }
            Task::List(pair) => match self.source.names(&pair.source) {
                Err(error) => self.fail(&pair.path, error),
                Ok(names) => {
                    for name in names {
                        if let Some(task) = queue.offer(Task::Entry(Arc::clone(&pair), name)) {
                            self.work(task, queue);
                        }
                    }
                }
            },
        }
    }

    /// Copies an entry, again if that may help; returns a directory whose entries are to be copied.
    fn try_entry(&self, pair: &Arc<Pair<S, T>>, name: &[u8]) -> Option<Arc<Pair<S, T>>> {
        let mut pauses = PAUSES.iter();
        loop {
            let error = match self.entry(pair, name) {
                Ok(directory) => {
                    self.refusals.store(0, Ordering::Relaxed);
                    *locked(&self.last_success) = Instant::now();
                    return directory;
                }
                Err(error) => error,
            };
            let pause = match error.is_of_keys() {
                true => PAUSES.first().filter(|_| locked(&self.last_success).elapsed() < PATIENCE),
                false => pauses.next().filter(|_| self.is_recent(pair, name)),
            };
            match pause.filter(|_| error.may_pass() && !self.is_stopped()) {
                Some(pause) => std::thread::sleep(*pause),
                None => {
                    self.fail(&pair.path_of(name), error);
                    return None;
                }
            }
        }
    }

    fn is_recent(&self, pair: &Pair<S, T>, name: &[u8]) -> bool {
        let object = self.source.lookup(&pair.source, name).ok().flatten();
        let recent = |object| self.source.meta(object).is_ok_and(|meta| is_recent(&meta));
        object.as_ref().is_some_and(recent) || recent(&pair.source)
    }

    fn entry(&self, pair: &Arc<Pair<S, T>>, name: &[u8]) -> Result<Option<Arc<Pair<S, T>>>> {
        // Somebody removed it meanwhile.
        let Some(source) = self.source.lookup(&pair.source, name)? else { return Ok(None) };
        let meta = self.source.meta(&source)?;
        let existing = self.target.lookup(&pair.target, pair.target_name(name))?;
        let existing =
            existing.map(|object| Ok::<_, TransferError>((self.target.meta(&object)?, object))).transpose()?;
        let path = pair.path_of(name);
        if meta.kind == NodeKind::Directory {
            return self.directory(pair, name, source, existing).map(Some);
        }
        if let Some((existing, _)) = existing {
            if existing.kind == NodeKind::Directory {
                return Err(TransferError::InTheWay(kind_name(existing.kind)));
            }
            if (meta.nlink < 2 || self.is_first_name(&meta, &path)) && self.is_same(&meta, &existing) {
                self.progress.kept(meta.size);
                return Ok(None);
            }
        }
        if meta.nlink > 1 && !self.is_first_name(&meta, &path) {
            locked(&self.links).push((path, meta.inode));
            return Ok(None);
        }
        let (partial, bytes) = self.write(pair, &source, &meta)?;
        let pair = Arc::clone(pair);
        self.publish(Pending { pair, name: name.to_vec(), partial, kind: meta.kind, bytes });
        Ok(None)
    }

    fn directory(
        &self,
        pair: &Pair<S, T>,
        name: &[u8],
        source: S::Object,
        existing: Option<(Meta, T::Object)>,
    ) -> Result<Arc<Pair<S, T>>> {
        let target = match existing {
            None => self.target.make(&pair.target, pair.target_name(name), &New::Directory)?,
            Some((meta, target)) if meta.kind == NodeKind::Directory => {
                self.remove_partial(&target)?;
                target
            }
            Some((meta, _)) => return Err(TransferError::InTheWay(kind_name(meta.kind))),
        };
        self.progress.copied(NodeKind::Directory, 0);
        let path = pair.path_of(name);
        locked(&self.directories).push(path.clone());
        Ok(Arc::new(Pair { source, target, path, renamed: None }))
    }

    /// What an interrupted run left unfinished.
    fn remove_partial(&self, target: &T::Object) -> Result<()> {
        let names = self.target.names(target)?;
        names.iter().filter(|name| name.starts_with(PARTIAL)).try_for_each(|name| self.target.unlink(target, name))
    }

    /// Whether `path` is the name by which the inode is copied; the first one to ask is.
    fn is_first_name(&self, meta: &Meta, path: &[u8]) -> bool {
        locked(&self.first_names).entry(meta.inode).or_insert_with(|| path.to_vec()) == path
    }

    /// Whether the copy is there already: what is renamed to its name has all of these.
    pub(super) fn is_same(&self, source: &Meta, target: &Meta) -> bool {
        let owner = |meta: &Meta| self.privileged.then_some((meta.uid, meta.gid));
        let mode = |meta: &Meta| (meta.kind != NodeKind::Symlink).then_some(meta.mode);
        let size = |meta: &Meta| matches!(meta.kind, NodeKind::File | NodeKind::Symlink).then_some(meta.size);
        let all = |meta: &Meta| (meta.kind, meta.mtime, meta.rdev, owner(meta), mode(meta), size(meta));
        all(source) == all(target)
    }

    /// Makes the copy under a name of ours, with everything that belongs to it; returns the name, and the bytes without holes.
    fn write(&self, pair: &Pair<S, T>, source: &S::Object, meta: &Meta) -> Result<(Vec<u8>, u64)> {
        let partial = [PARTIAL, format!("{:x}-{:x}", meta.inode.0, meta.inode.1).as_bytes()].concat();
        let written = self.write_as(&partial, pair, source, meta);
        if written.is_err() {
            // What is left of it is removed by the next run.
            let _ = self.target.unlink(&pair.target, &partial);
        }
        written.map(|bytes| (partial, bytes))
    }

    fn write_as(&self, partial: &[u8], pair: &Pair<S, T>, source: &S::Object, meta: &Meta) -> Result<u64> {
        if self.target.lookup(&pair.target, partial)?.is_some() {
            self.target.unlink(&pair.target, partial)?;
        }
        let (mut lacks_end, mut bytes) = (false, 0);
        let made = match meta.kind {
            NodeKind::File => {
                let (made, file) = self.target.create(&pair.target, partial)?;
                let original = self.source.open(source)?;
                bytes = copy_content(&original, &file, meta.size, self.progress)?;
                lacks_end = original.lacks_end();
                made
            }
            NodeKind::Symlink => {
                let target = self.source.readlink(source)?;
                self.target.make(&pair.target, partial, &New::Symlink(target))?
            }
            kind => self.target.make(&pair.target, partial, &New::Special(kind, meta.rdev))?,
        };
        self.give_attributes(source, &made, meta)?;
        // Asked last: what changed while it was read is read again.
        let after = self.source.meta(source)?;
        if (after.size, after.mtime, after.ctime) != (meta.size, meta.mtime, meta.ctime) {
            return Err(TransferError::Changing);
        }
        self.is_cut_off.fetch_or(lacks_end, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Owner, mode, extended attributes and times, in the order in which none undoes another.
    pub(super) fn give_attributes(&self, source: &S::Object, target: &T::Object, meta: &Meta) -> Result<()> {
        self.target.set_owner_and_mode(target, meta)?;
        if self.settings.xattrs && meta.kind != NodeKind::Symlink {
            let wanted = self.source.xattrs(source)?;
            let found = self.target.xattrs(target)?;
            self.give_xattrs(target, &wanted, &found)?;
        }
        self.target.set_times(target, meta)
    }

    fn give_xattrs(&self, target: &T::Object, wanted: &Xattrs, found: &Xattrs) -> Result<()> {
        for name in found.keys().filter(|name| !wanted.contains_key(*name)) {
            self.target.remove_xattr(target, name)?;
        }
        for (name, value) in wanted.iter().filter(|(name, value)| found.get(*name) != Some(*value)) {
            self.target.set_xattr(target, name, value)?;
        }
        Ok(())
    }

    /// Gives a finished file its name, with many others.
    fn publish(&self, file: Pending<S, T>) {
        let mut batch = locked(&self.batch);
        batch.bytes += file.bytes;
        batch.files.push(file);
        let full = batch.files.len() >= BATCH.0 || batch.bytes >= BATCH.1;
        drop(batch);
        if full {
            self.commit();
        }
    }

    /// Makes finished files durable and gives them their names.
    pub(super) fn commit(&self) {
        let files = {
            let mut batch = locked(&self.batch);
            batch.bytes = 0;
            std::mem::take(&mut batch.files)
        };
        if files.is_empty() {
            return;
        }
        let synced = self.target.sync(&self.base.target);
        for Pending { pair, name, partial, kind, bytes } in files {
            if synced.is_err() {
                // It may not be whole, and takes space. What is left of it is removed by the next run.
                let _ = self.target.unlink(&pair.target, &partial);
                continue;
            }
            match self.target.rename(&pair.target, &partial, pair.target_name(&name)) {
                Ok(()) => self.progress.copied(kind, bytes),
                Err(error) => self.fail(&pair.path_of(&name), error),
            }
        }
        if let Err(error) = synced {
            self.fail(b".", error);
            self.stop();
        }
    }

    pub(super) fn fail(&self, path: &[u8], error: TransferError) {
        self.progress.failed();
        let refused = if error.is_of_keys() { self.refusals.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        if error.is_final() {
            self.stop();
        }
        let mut failures = locked(&self.failures);
        failures.push(Failure { path: path.to_vec(), error });
        if refused == REFUSALS {
            self.stop();
            failures.push(Failure { path: b".".to_vec(), error: TransferError::Refused(refused) });
        }
    }

    /// Paths that failed.
    pub(super) fn has_failed(&self, path: &[u8]) -> bool {
        locked(&self.failures).iter().any(|failure| failure.path == path)
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.progress.stopped();
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

pub(super) fn is_recent(meta: &Meta) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let changed = u64::try_from(meta.ctime.seconds).unwrap_or(0);
    now.saturating_sub(changed) <= AT_REST.as_secs()
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
