//! Shredding: the headers of files are destroyed, so that nothing opens their content any more, and then they are removed.
//!
//! Invariants: everything is found before anything is destroyed; a file that has a name elsewhere too is not touched; every
//! header is destroyed durably before any name goes, so that an interrupted run can be done again.

use std::collections::HashMap;

use crate::runtime::WorkQueue;
use crate::storage::NodeKind;

use super::copy::locked;
use super::report::{Failure, Progress};
use super::side::{Result, Side, TransferError};
use super::{Tree, split};

/// What is to be shredded.
#[derive(Debug, Default)]
pub struct Doomed {
    /// Paths of regular files.
    pub files: Vec<Vec<u8>>,
    /// Symlinks, FIFOs, sockets and devices.
    pub others: Vec<Vec<u8>>,
    /// Those below come after those above.
    pub directories: Vec<Vec<u8>>,
    /// Plain bytes.
    pub bytes: u64,
}

impl Tree {
    /// Finds what is at and below `paths`, in a volume that is open for writing.
    ///
    /// # Errors
    /// [`TransferError::Path`] for the root; [`TransferError::NamedElsewhere`] if a file has a name that is not below `paths`;
    /// [`TransferError::Names`] if there are entries that cannot be found by their names.
    pub fn doom(&self, paths: &[&[u8]]) -> Result<Doomed> {
        let before = self.side.fs.stats().undecryptable_names;
        let (mut doomed, mut names) = (Doomed::default(), HashMap::new());
        let mut waiting = Vec::new();
        for path in paths {
            let path: Vec<_> =
                path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").collect();
            if path.is_empty() {
                return Err(TransferError::Path);
            }
            waiting.push(path.join(&b'/'));
        }
        waiting.sort();
        // One that is below another comes with that one.
        waiting.dedup_by(|later, earlier| is_below(later, earlier));
        while let Some(path) = waiting.pop() {
            let object = self.find(&path)?;
            let meta = self.side.meta(&object)?;
            match meta.kind {
                NodeKind::Directory => {
                    let below = self.side.names(&object)?;
                    waiting.extend(below.into_iter().map(|name| [&path, &b"/"[..], &name].concat()));
                    doomed.directories.push(path);
                }
                NodeKind::File => {
                    if meta.nlink > 1 {
                        let (left, _) = names.entry(meta.inode).or_insert_with(|| (meta.nlink, path.clone()));
                        *left -= 1;
                    }
                    doomed.bytes += meta.size;
                    doomed.files.push(path);
                }
                _ => doomed.others.push(path),
            }
        }
        if let Some((_, path)) = names.into_values().find(|(left, _)| *left > 0) {
            return Err(TransferError::NamedElsewhere(String::from_utf8_lossy(&path).into_owned()));
        }
        if self.side.fs.stats().undecryptable_names > before {
            return Err(TransferError::Names);
        }
        Ok(doomed)
    }

    /// Destroys the headers of all files with so many threads, then removes everything; returns what failed. A file whose
    /// header could not be destroyed keeps its name.
    #[must_use]
    pub fn shred(&self, doomed: &Doomed, parallel: usize, progress: &Progress) -> Vec<Failure> {
        let failures = std::sync::Mutex::new(Vec::new());
        let done = std::sync::Mutex::new(Vec::new());
        let attempt = |path: &Vec<u8>, result: Result<()>| match result {
            Ok(()) => true,
            Err(error) => {
                progress.failed();
                locked(&failures).push(Failure { path: path.clone(), error });
                false
            }
        };
        WorkQueue::new(doomed.files.iter().collect()).run(parallel, |path: &Vec<u8>| {
            let destroyed = self.find(path).and_then(|object| Ok(self.side.fs.destroy_header(object.id())?));
            if attempt(path, destroyed) {
                progress.copied(NodeKind::File, 0);
                locked(&done).push(path);
            }
        });
        for path in locked(&done).iter().copied().chain(&doomed.others) {
            let (above, name) = split(path);
            attempt(path, self.find(above).and_then(|above| self.side.unlink(&above, name)));
        }
        for path in doomed.directories.iter().rev() {
            let (above, name) = split(path);
            attempt(path, self.find(above).and_then(|above| Ok(self.side.fs.rmdir(above.id(), name)?)));
        }
        let synced = self.side.root().and_then(|root| self.side.sync(&root));
        attempt(&b".".to_vec(), synced);
        locked(&failures).drain(..).collect()
    }
}

fn is_below(path: &[u8], above: &[u8]) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}
