//! Directory ids that are to be put back.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::format::name::DIRECTORY_ID;
use crate::fs::kernel::InodeId;
use crate::storage::Node;

use super::inode::Inode;

/// Directories that stay although their id was taken away for removing them, and that could not get it back. Nothing is looked
/// up or made in one until it has its id again: names under an id that only memory knows are lost.
#[derive(Default)]
pub(crate) struct OwedIds {
    is_any: AtomicBool,
    /// The ids' texts.
    texts: Mutex<HashMap<InodeId, String>>,
}

impl OwedIds {
    fn texts(&self) -> MutexGuard<'_, HashMap<InodeId, String>> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn owe(&self, directory: InodeId, text: String) {
        self.texts().insert(directory, text);
        self.is_any.store(true, Ordering::SeqCst);
    }

    /// Gives a directory what it is owed; false if that is nothing.
    pub(crate) fn settle(&self, directory: &Inode) -> io::Result<bool> {
        if !self.is_any.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let mut texts = self.texts();
        let Some(text) = texts.get(&directory.id) else { return Ok(false) };
        put_back(&directory.node, text)?;
        texts.remove(&directory.id);
        Ok(true)
    }
}

/// Gives a directory an id's text, unless it has one.
pub(crate) fn put_back(directory: &Node, text: &str) -> io::Result<()> {
    match directory.symlink(text, DIRECTORY_ID) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}
