//! Directories that programs have open.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::fs::error::Error;
use crate::fs::kernel::InodeId;
use crate::storage::DirStream;

use super::descriptors::Held;
use super::inode::Inode;
use super::prefetch_listings::Listing;

/// Names an open directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DirectoryHandle(pub u64);

#[derive(Default)]
pub(crate) struct OpenDirectories {
    next: AtomicU64,
    open: RwLock<HashMap<DirectoryHandle, Arc<OpenDirectory>>>,
}

pub(crate) struct OpenDirectory {
    pub(crate) inode: Arc<Inode>,
    /// Opened when it is first read: many directories are only opened to be a place.
    pub(crate) stream: Mutex<Option<OpenStream>>,
    /// What was delivered since the beginning of the directory.
    pub(crate) listed: Mutex<Listing>,
    /// An error of the disk that the next sync has to tell; 0 if none.
    pub(crate) told: AtomicI32,
}

pub(crate) struct OpenStream {
    pub(crate) stream: DirStream,
    pub(crate) _held: Arc<Held>,
}

impl OpenDirectory {
    pub(crate) fn new(inode: Arc<Inode>) -> Self {
        Self { inode, stream: Mutex::default(), listed: Mutex::default(), told: AtomicI32::new(0) }
    }
}

impl OpenDirectories {
    pub(crate) fn insert(&self, directory: OpenDirectory) -> DirectoryHandle {
        let handle = DirectoryHandle(self.next.fetch_add(1, Ordering::Relaxed));
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(handle, Arc::new(directory));
        handle
    }

    /// Every directory that is open has to hear of an error of the disk.
    pub(crate) fn note(&self, errno: i32) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values().for_each(|directory| directory.told.store(errno, Ordering::Relaxed));
    }

    pub(crate) fn inodes(&self) -> HashSet<InodeId> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values().map(|directory| directory.inode.id).collect()
    }

    pub(crate) fn get(&self, handle: DirectoryHandle) -> Result<Arc<OpenDirectory>, Error> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.get(&handle).cloned().ok_or(Error::UnknownHandle)
    }

    pub(crate) fn remove(&self, handle: DirectoryHandle) {
        self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&handle);
    }
}
