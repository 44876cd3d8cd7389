//! The inodes that the kernel knows, and what is kept for each.
//!
//! Invariants: an inode in the table is pinned by its node, so its number cannot be reused; all handles and hard links of a
//! file share one inode here and so one content; the table's lock is never held across I/O.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::content::{Content, Ledger};
use crate::storage::{DiskFile, Node, NodeKind, SetTime, Stat, Timestamp};

use super::Error;
use super::fill::Filling;
use super::kernel::{InodeId, ROOT};
use super::leases::Lease;
use super::sync_errors::SyncErrors;
use super::trim::Held;
use super::xattrs::DefaultAcl;

/// Numbers of inodes that cannot keep their backing number begin here.
const SPILL: u64 = 1 << 63;

pub(super) struct Inode {
    pub(super) id: InodeId,
    pub(super) node: Node,
    pub(super) kind: NodeKind,
    /// Set once the directory's id was read and authenticated.
    pub(super) directory_id: OnceLock<[u8; 16]>,
    /// Set once the file's header was found.
    pub(super) file_id: OnceLock<[u8; 32]>,
    pub(super) default_acl: DefaultAcl,
    /// The file has no capabilities for programs, or has lost them; where nobody can set attributes that stays so.
    pub(super) lacks_capabilities: AtomicBool,
    pub(super) slot: Mutex<Slot>,
    /// What programs take for written and is not stored.
    pub(super) ledger: Arc<Ledger>,
    /// Towards the kernel, the inode of another generation is another one: nothing that it knew of the old one counts.
    pub(super) generation: AtomicU32,
    /// The kernel has not looked it up since its generation changed.
    pub(super) must_be_looked_up: AtomicBool,
    /// The header turned out to be zeros: the file is empty, and the kernel may have heard otherwise.
    pub(super) has_zero_header: AtomicBool,
    pub(super) is_without_size: AtomicBool,
    /// A modification time that the kernel has set on an open file and the disk has not. Held while times are set, so that
    /// settling does not put older ones back.
    late_mtime: Mutex<Option<Timestamp>>,
    /// The file is being sealed anew, which moves its modification time: that counts as late meanwhile. Changes under the guard
    /// of the late time.
    sealing: AtomicBool,
    /// Held by whoever gives the file another header.
    keys: Mutex<()>,
    /// Held while owner, mode or capabilities change, or one that was found is put back; after the slot's.
    privileges: Mutex<()>,
    /// See [`super::fill`].
    pub(super) filling: Mutex<Option<Filling>>,
    /// It has lost its last name, and the backing filesystem has given it another one while it is open.
    pub(super) condemned: AtomicBool,
    /// What the kernel was last told of the space that the file takes.
    pub(super) told_blocks: AtomicU64,
    /// The settler has it on its list.
    pub(super) watched: AtomicBool,
    lookups: AtomicU64,
    /// Orders inodes by when they were last looked up.
    pub(super) last_lookup: AtomicU64,
}

/// A file's content, while it is in use.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) open: Option<OpenFile>,
    /// Opened and not yet released by the kernel.
    pub(super) handles: u64,
    errors: SyncErrors,
}

#[derive(Clone)]
pub(super) struct OpenFile {
    pub(super) content: Arc<Content>,
    pub(super) file: Arc<DiskFile>,
    pub(super) lease: Arc<Lease>,
    /// None if the file is read and written through the descriptor that pins it.
    pub(super) _held: Option<Arc<Held>>,
}

impl Slot {
    /// Gives the content up. Operations under way are waited for, so that no second content of the file lives beside it.
    pub(super) fn close(&mut self) {
        if let Some(open) = self.open.take() {
            open.content.retire();
            self.note_told(&open.file);
        }
    }

    /// The content; one that ended by itself is none.
    pub(super) fn current(&mut self) -> Option<OpenFile> {
        if let Some(open) = self.open.take_if(|open| open.content.is_retired()) {
            self.note_told(&open.file);
        }
        self.open.clone()
    }

    /// Keeps what the disk has told of the file, by this descriptor of it.
    pub(super) fn note_told(&mut self, file: &DiskFile) {
        if let Some(errno) = file.take_told() {
            self.errors.note(errno);
        }
    }

    /// The errors of the disk that its handles have to hear of.
    pub(super) fn errors(&mut self) -> &mut SyncErrors {
        if let Some(open) = self.open.clone() {
            self.note_told(&open.file);
        }
        &mut self.errors
    }

    /// Whether the content turned out to be cut off.
    pub(super) fn lacks_end_mark(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.content.lacks_end_mark())
    }
}

impl Inode {
    fn new(id: InodeId, node: Node, kind: NodeKind) -> Self {
        Self {
            id,
            node,
            kind,
            directory_id: OnceLock::new(),
            file_id: OnceLock::new(),
            default_acl: DefaultAcl::default(),
            lacks_capabilities: AtomicBool::new(false),
            slot: Mutex::default(),
            ledger: Arc::default(),
            generation: AtomicU32::new(0),
            must_be_looked_up: AtomicBool::new(false),
            has_zero_header: AtomicBool::new(false),
            is_without_size: AtomicBool::new(false),
            late_mtime: Mutex::default(),
            sealing: AtomicBool::new(false),
            keys: Mutex::default(),
            privileges: Mutex::default(),
            filling: Mutex::default(),
            condemned: AtomicBool::new(false),
            told_blocks: AtomicU64::new(0),
            watched: AtomicBool::new(false),
            lookups: AtomicU64::new(0),
            last_lookup: AtomicU64::new(0),
        }
    }

    pub(super) fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes owner, mode or capabilities. Writes of the content keep those that they find, so no content begins meanwhile that
    /// does not know of the change.
    pub(super) fn change_privileges<T>(&self, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let slot = self.slot();
        let _alone = self.own_privileges();
        match &slot.open {
            Some(open) => open.file.change_privileges(change),
            None => change(),
        }
    }

    /// Keeps the privileges as they are, for who puts back what was found.
    pub(super) fn own_privileges(&self) -> MutexGuard<'_, ()> {
        self.privileges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn late_mtime(&self) -> MutexGuard<'_, Option<Timestamp>> {
        self.late_mtime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the disk the modification time that the kernel has set, if it lacks it. Times do not change while the guard is
    /// held.
    pub(super) fn write_late_mtime(&self) -> io::Result<MutexGuard<'_, Option<Timestamp>>> {
        let mut late = self.late_mtime();
        if let Some(mtime) = *late {
            self.put_mtime(mtime)?;
            if !self.is_sealing() {
                *late = None;
            }
        }
        Ok(late)
    }

    /// Does the same as far as that is possible, and says if it is not.
    pub(super) fn try_late_mtime(&self) {
        if let Err(error) = self.write_late_mtime() {
            tracing::warn!("{}: the modification time cannot be set: {error}", self.node.describe());
        }
    }

    /// Gives the disk a modification time that nobody has asked for. Of somebody else's file only its owner may set one: it
    /// keeps the disk's own, that of the last write.
    pub(super) fn put_mtime(&self, mtime: Timestamp) -> io::Result<()> {
        match self.node.set_times(SetTime::Keep, SetTime::At(mtime)) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            result => result,
        }
    }

    /// Makes the caller the only one who gives the file another header.
    pub(super) fn own_keys(&self) -> MutexGuard<'_, ()> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what is written to the file is nobody's write.
    pub(super) fn is_sealing(&self) -> bool {
        self.sealing.load(Ordering::Relaxed)
    }

    /// From now on the modification time is the one that the file has, or that programs set, whatever is written. The attributes.
    pub(super) fn begin_sealing(&self) -> io::Result<Stat> {
        let mut late = self.late_mtime();
        let stat = self.node.stat()?;
        late.get_or_insert(stat.mtime);
        self.sealing.store(true, Ordering::Relaxed);
        Ok(stat)
    }

    /// Ends that: the disk gets the time that counts. Who has pages of the file locked must not wait for the guard of the time.
    pub(super) fn end_sealing(&self, may_wait: bool) {
        let late = if may_wait { Some(self.late_mtime()) } else { self.late_mtime.try_lock().ok() };
        let Some(mut late) = late.filter(|_| self.sealing.swap(false, Ordering::Relaxed)) else { return };
        // What cannot be set now stays late.
        late.take_if(|mtime| self.node.set_times(SetTime::Keep, SetTime::At(*mtime)).is_ok());
    }
}

/// Keyed by the number that the kernel uses, which is the backing inode number for all but a few.
pub(super) struct InodeTable {
    device: u64,
    known: Mutex<Known>,
    /// Counts lookups of all inodes.
    clock: AtomicU64,
}

struct Known {
    by_id: HashMap<InodeId, Arc<Inode>>,
    /// Inodes of other devices, and the one whose number is that of the root.
    spilled: HashMap<(u64, u64), InodeId>,
    next_spilled: u64,
}

impl InodeTable {
    pub(super) fn new(root: Node, stat: &Stat) -> Self {
        let root = Arc::new(Inode::new(ROOT, root, NodeKind::Directory));
        root.lookups.store(1, Ordering::Relaxed);
        let known = Known { by_id: HashMap::from([(ROOT, root)]), spilled: HashMap::new(), next_spilled: SPILL };
        Self { device: stat.dev, known: Mutex::new(known), clock: AtomicU64::new(0) }
    }

    pub(super) fn get(&self, id: InodeId) -> Result<Arc<Inode>, Error> {
        self.known().by_id.get(&id).cloned().ok_or(Error::UnknownInode)
    }

    /// The inode whose backing number a directory entry names, if it is known: pinned, so it is still that one.
    pub(super) fn by_entry(&self, ino: u64) -> Option<Arc<Inode>> {
        let id = InodeId(ino);
        (id > ROOT && ino < SPILL).then(|| self.known().by_id.get(&id).cloned()).flatten()
    }

    /// Counts a lookup of the inode behind `node`, which becomes known if it was not.
    pub(super) fn learn(&self, node: Node, stat: &Stat) -> Arc<Inode> {
        let mut known = self.known();
        let id = self.id_of(&mut known, stat);
        self.count(known.by_id.entry(id).or_insert_with(|| Arc::new(Inode::new(id, node, stat.kind))))
    }

    fn count(&self, inode: &Arc<Inode>) -> Arc<Inode> {
        inode.lookups.fetch_add(1, Ordering::Relaxed);
        inode.last_lookup.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        Arc::clone(inode)
    }

    /// The known inode with these attributes.
    pub(super) fn known_as(&self, stat: &Stat) -> Option<Arc<Inode>> {
        let root = self.get(ROOT).ok()?;
        if root.node.stat().is_ok_and(|root| (root.dev, root.ino) == (stat.dev, stat.ino)) {
            return Some(root);
        }
        let known = self.known();
        let spilled = known.spilled.get(&(stat.dev, stat.ino)).copied();
        let id = spilled.or_else(|| (stat.dev == self.device).then_some(InodeId(stat.ino)))?;
        known.by_id.get(&id).cloned()
    }

    /// Counts another lookup of an inode that was known a moment ago.
    pub(super) fn count_lookup(&self, inode: &Arc<Inode>) -> Arc<Inode> {
        let mut known = self.known();
        self.count(known.by_id.entry(inode.id).or_insert_with(|| Arc::clone(inode)))
    }

    /// Takes back `count` lookups. An inode that the kernel no longer knows goes, unless it is watched: then it is returned.
    pub(super) fn forget(&self, id: InodeId, count: u64) -> Option<Arc<Inode>> {
        let mut known = self.known();
        let inode = Arc::clone(known.by_id.get(&id)?);
        let left = inode.lookups.load(Ordering::Relaxed).saturating_sub(count);
        inode.lookups.store(left, Ordering::Relaxed);
        known.drop_unused(id);
        drop(known);
        if left == 0 {
            inode.ledger.clear();
        }
        (left == 0 && inode.watched.load(Ordering::Relaxed)).then_some(inode)
    }

    /// Keeps the inode known until [`Self::unwatch`]. Returns whether it was not watched before.
    pub(super) fn watch(&self, inode: &Inode) -> bool {
        let _known = self.known();
        !inode.watched.swap(true, Ordering::Relaxed)
    }

    pub(super) fn unwatch(&self, inode: &Inode) {
        let mut known = self.known();
        inode.watched.store(false, Ordering::Relaxed);
        known.drop_unused(inode.id);
    }

    /// Every known inode.
    pub(super) fn all(&self) -> Vec<Arc<Inode>> {
        self.known().by_id.values().cloned().collect()
    }

    /// How many files have an open handle.
    pub(super) fn open_files(&self) -> u64 {
        self.all().iter().filter(|inode| inode.slot().handles > 0).count() as u64
    }

    pub(super) fn len(&self) -> usize {
        self.known().by_id.len()
    }

    fn id_of(&self, known: &mut Known, stat: &Stat) -> InodeId {
        if stat.dev == self.device && stat.ino > ROOT.0 && stat.ino < SPILL {
            return InodeId(stat.ino);
        }
        let next = InodeId(known.next_spilled);
        let id = *known.spilled.entry((stat.dev, stat.ino)).or_insert(next);
        known.next_spilled += u64::from(id == next);
        id
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn drop_unused(&mut self, id: InodeId) {
        let Some(inode) = self.by_id.get(&id) else { return };
        if id == ROOT || inode.lookups.load(Ordering::Relaxed) > 0 || inode.watched.load(Ordering::Relaxed) {
            return;
        }
        if id.0 >= SPILL {
            self.spilled.retain(|_, spilled| *spilled != id);
        }
        self.by_id.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> (tempfile::TempDir, InodeTable, Node) {
        let dir = tempfile::tempdir().unwrap();
        let root = Node::open_root(dir.path()).unwrap();
        let table = InodeTable::new(root.clone(), &root.stat().unwrap());
        (dir, table, root)
    }

    #[test]
    fn counts_lookups_and_forgets() {
        let (_dir, table, root) = table();
        let file = root.create_file("a", 0o600).unwrap();
        let stat = file.stat().unwrap();
        let first = table.learn(file.clone(), &stat);
        let second = table.learn(root.lookup("a").unwrap(), &stat);
        assert!(Arc::ptr_eq(&first, &second));
        assert_eq!(first.id, InodeId(stat.ino));
        table.forget(first.id, 1);
        assert!(table.get(first.id).is_ok());
        table.forget(first.id, 1);
        assert!(matches!(table.get(first.id), Err(Error::UnknownInode)));
        table.forget(ROOT, 1);
        assert!(table.get(ROOT).is_ok());
    }

    /// Else a file that waits for being settled could get a second content.
    #[test]
    fn a_watched_inode_stays_the_same_one() {
        let (_dir, table, root) = table();
        let file = root.create_file("a", 0o600).unwrap();
        let stat = file.stat().unwrap();
        let first = table.learn(file, &stat);
        assert!(table.watch(&first));
        assert!(!table.watch(&first));
        table.forget(first.id, 1);
        let again = table.learn(root.lookup("a").unwrap(), &stat);
        assert!(Arc::ptr_eq(&first, &again));
        table.forget(first.id, 1);
        table.unwatch(&first);
        assert!(table.get(first.id).is_err());
    }

    #[test]
    fn foreign_devices_get_numbers_of_their_own() {
        let (_dir, table, root) = table();
        let mut stat = root.stat().unwrap();
        stat.dev += 1;
        let a = table.learn(root.clone(), &stat);
        let again = table.learn(root.clone(), &stat);
        stat.ino += 1;
        let b = table.learn(root, &stat);
        assert_eq!((a.id, again.id, b.id), (InodeId(SPILL), InodeId(SPILL), InodeId(SPILL + 1)));
    }
}
