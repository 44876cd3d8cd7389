//! The inodes that the kernel knows.
//!
//! Invariants: an inode in the table is pinned by its node, so its number cannot be reused; the root is always in it; the
//! table's lock is never held across I/O.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::fs::error::Error;
use crate::fs::kernel::{InodeId, ROOT};
use crate::storage::{Node, NodeKind, Stat};

use super::inode::Inode;

/// Numbers of inodes that cannot keep their backing number begin here.
const SPILL: u64 = 1 << 63;

/// Keyed by the number that the kernel uses, which is the backing inode number for all but a few.
pub(crate) struct InodeTable {
    device: u64,
    root: Arc<Inode>,
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
    pub(crate) fn new(root: Node, stat: &Stat) -> Self {
        let root = Arc::new(Inode::new(ROOT, root, NodeKind::Directory));
        root.lookups.store(1, Ordering::Relaxed);
        let known =
            Known { by_id: HashMap::from([(ROOT, Arc::clone(&root))]), spilled: HashMap::new(), next_spilled: SPILL };
        Self { device: stat.dev, root, known: Mutex::new(known), clock: AtomicU64::new(0) }
    }

    pub(crate) fn root(&self) -> &Arc<Inode> {
        &self.root
    }

    pub(crate) fn get(&self, id: InodeId) -> Result<Arc<Inode>, Error> {
        self.known().by_id.get(&id).cloned().ok_or(Error::UnknownInode)
    }

    /// The inode whose backing number a directory entry names, if it is known: pinned, so it is still that one.
    pub(crate) fn by_entry(&self, ino: u64) -> Option<Arc<Inode>> {
        let id = InodeId(ino);
        (id > ROOT && ino < SPILL).then(|| self.known().by_id.get(&id).cloned()).flatten()
    }

    /// Counts a lookup of the inode behind `node`, which becomes known if it was not.
    pub(crate) fn learn(&self, node: Node, stat: &Stat) -> Arc<Inode> {
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
    pub(crate) fn known_as(&self, stat: &Stat) -> Option<Arc<Inode>> {
        if self.root.node.stat().is_ok_and(|root| (root.dev, root.ino) == (stat.dev, stat.ino)) {
            return Some(Arc::clone(&self.root));
        }
        let known = self.known();
        let spilled = known.spilled.get(&(stat.dev, stat.ino)).copied();
        let id = spilled.or_else(|| (stat.dev == self.device).then_some(InodeId(stat.ino)))?;
        known.by_id.get(&id).cloned()
    }

    /// Counts another lookup of an inode that was known a moment ago.
    pub(crate) fn count_lookup(&self, inode: &Arc<Inode>) -> Arc<Inode> {
        let mut known = self.known();
        self.count(known.by_id.entry(inode.id).or_insert_with(|| Arc::clone(inode)))
    }

    /// Takes back `count` lookups. An inode that the kernel no longer knows goes, unless it is watched: then it is returned.
    pub(crate) fn forget(&self, id: InodeId, count: u64) -> Option<Arc<Inode>> {
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
    pub(crate) fn watch(&self, inode: &Inode) -> bool {
        let _known = self.known();
        !inode.watched.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn unwatch(&self, inode: &Inode) {
        let mut known = self.known();
        inode.watched.store(false, Ordering::Relaxed);
        known.drop_unused(inode.id);
    }

    /// Every known inode.
    pub(crate) fn all(&self) -> Vec<Arc<Inode>> {
        self.known().by_id.values().cloned().collect()
    }

    /// How many files have an open handle.
    pub(crate) fn open_files(&self) -> u64 {
        self.all().iter().filter(|inode| inode.slot().handles > 0).count() as u64
    }

    pub(crate) fn len(&self) -> usize {
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
