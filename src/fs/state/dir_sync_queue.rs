//! The order of names on backing filesystems that do not keep it. `docs/FORMAT.md` sections 1.1 and 6.6.
//!
//! A directory's id must be durable before an entry in it is, and the symlink of a long name before its entry: what is there
//! without them cannot be read. btrfs makes a synced file durable with its own name and not with what was made before it. So
//! whoever syncs makes the directories durable first that got an id or the symlink of a long name since the last sync.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::storage::Node;

use crate::fs::error::is_of_disk;

/// Directories are remembered one by one up to this many (each holds a descriptor); beyond, the whole filesystem is synced.
const MOST: usize = 128;

/// Directories that must be durable before anything else is.
pub(crate) struct DirSyncQueue {
    kept_below: bool,
    /// Held while directories are synced: nobody else's sync may overtake them.
    syncing: Mutex<()>,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    /// In the order in which they were made: those above come before those below.
    directories: Vec<Node>,
    too_many: bool,
}

impl DirSyncQueue {
    /// For the filesystem that `root` is on.
    pub(crate) fn new(root: &Node) -> io::Result<Self> {
        Ok(Self::with(root.keeps_name_order()?))
    }

    fn with(kept_below: bool) -> Self {
        Self { kept_below, syncing: Mutex::default(), waiting: Mutex::default() }
    }

    /// Notes that `directory` has got something that must be durable before the next entry in it is. To be called between the
    /// two.
    pub(crate) fn note(&self, directory: &Node) {
        if self.kept_below {
            return;
        }
        let mut waiting = self.waiting();
        if waiting.too_many || waiting.directories.iter().any(|known| known.is(directory)) {
            return;
        }
        if waiting.directories.len() == MOST {
            *waiting = Waiting { directories: Vec::new(), too_many: true };
        } else {
            waiting.directories.push(directory.clone());
        }
    }

    /// Makes durable what was noted. Every sync begins with it. `root` is any node of the filesystem that can be opened.
    pub(crate) fn flush(&self, root: &Node) -> io::Result<()> {
        if self.kept_below {
            return Ok(());
        }
        let _one_at_a_time = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = std::mem::take(&mut *self.waiting());
        let mut refused = Ok(());
        let singly = !noted.too_many
            && noted.directories.iter().all(|directory| match directory.sync_directory() {
                Err(error) if is_of_disk(&error) => {
                    refused = Err(error);
                    false
                }
                synced => synced.is_ok(),
            });
        if singly {
            return Ok(());
        }
        // A directory may be gone, or not be ours to open.
        root.sync_filesystem().and(refused).inspect_err(|_| self.waiting().too_many = true)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn shape(&self) -> (usize, bool) {
        let waiting = self.waiting();
        (waiting.directories.len(), waiting.too_many)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn directories(home: &std::path::Path, count: usize) -> Vec<Node> {
        let root = Node::open_root(home).unwrap();
        (0..count)
            .map(|i| {
                fs::create_dir(home.join(i.to_string())).unwrap();
                root.lookup(i.to_string()).unwrap()
            })
            .collect()
    }

    #[test]
    fn each_directory_waits_once_and_until_the_next_sync() {
        let home = tempfile::tempdir().unwrap();
        let (root, made) = (Node::open_root(home.path()).unwrap(), directories(home.path(), 2));
        let queue = DirSyncQueue::with(false);
        for node in [&made[0], &made[1], &made[0].clone()] {
            queue.note(node);
        }
        assert_eq!(queue.shape(), (2, false));
        queue.flush(&root).unwrap();
        assert_eq!(queue.shape(), (0, false));
    }

    #[test]
    fn too_many_hold_no_descriptors() {
        let home = tempfile::tempdir().unwrap();
        let (root, made) = (Node::open_root(home.path()).unwrap(), directories(home.path(), MOST + 2));
        let queue = DirSyncQueue::with(false);
        made[..MOST].iter().for_each(|node| queue.note(node));
        assert_eq!(queue.shape(), (MOST, false));
        made[MOST..].iter().for_each(|node| queue.note(node));
        assert_eq!(queue.shape(), (0, true));
        queue.flush(&root).unwrap();
        assert_eq!(queue.shape(), (0, false));
    }

    #[test]
    fn a_directory_that_is_gone_stops_no_sync() {
        let home = tempfile::tempdir().unwrap();
        let (root, made) = (Node::open_root(home.path()).unwrap(), directories(home.path(), 1));
        let queue = DirSyncQueue::with(false);
        queue.note(&made[0]);
        fs::remove_dir(home.path().join("0")).unwrap();
        queue.flush(&root).unwrap();
    }

    #[test]
    fn what_could_not_be_made_durable_waits_on() {
        let home = tempfile::tempdir().unwrap();
        let made = directories(home.path(), 1);
        fs::write(home.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("nowhere", home.path().join("link")).unwrap();
        let root = Node::open_root(home.path()).unwrap();
        let queue = DirSyncQueue::with(false);
        queue.note(&root.lookup("file").unwrap());
        queue.note(&made[0]);
        // Neither is the file a directory, nor can a symlink be opened to sync the filesystem that it is on.
        queue.flush(&root.lookup("link").unwrap()).unwrap_err();
        assert_eq!(queue.shape(), (0, true));
    }

    #[test]
    fn nothing_waits_where_one_journal_keeps_the_order() {
        let home = tempfile::tempdir().unwrap();
        let made = directories(home.path(), 1);
        let queue = DirSyncQueue::with(true);
        queue.note(&made[0]);
        assert_eq!(queue.shape(), (0, false));
    }
}
