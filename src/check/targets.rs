//! From a path to the directory and entry that it names.

use std::io;
use std::sync::Arc;

use crate::crypto::NameKey;
use crate::format::name::Stored;
use crate::storage::Node;

use super::Checker;
use super::finding::{Found, Place};
use super::places::{Dir, Name};

/// A part of a volume that is to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Entries of the cipher directory, one below the other; none is the root.
    Cipher(Vec<String>),
    /// Plain names, one below the other; none is the root.
    Plain(Vec<Vec<u8>>),
}

impl Target {
    /// Whether it is the whole volume.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        match self {
            Self::Cipher(path) => path.is_empty(),
            Self::Plain(path) => path.is_empty(),
        }
    }
}

/// Why a target cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// A name was given, and there is no key to find its entry with.
    #[error(
        "a path on a mount cannot be found without keys: name its entry in the cipher directory, or leave out --structure"
    )]
    NeedsKeys,
    /// A directory above it has no id.
    #[error("a directory above it has no valid id: name the entry in the cipher directory")]
    NoId,
    /// It is not there.
    #[error("{0}: {1}")]
    Io(String, io::Error),
}

impl Checker<'_> {
    /// The directory that a target is in, and its entry there.
    pub(super) fn find(&self, root: &Arc<Dir>, target: &Target) -> Result<(Arc<Dir>, String), TargetError> {
        let mut dir = Arc::clone(root);
        let depth = match target {
            Target::Cipher(path) => path.len(),
            Target::Plain(path) => path.len(),
        };
        for step in 0..depth {
            let entry = match target {
                Target::Cipher(path) => path[step].clone(),
                Target::Plain(path) => self.entry_for(&dir, &path[step])?,
            };
            let node = dir.node.lookup(&entry);
            let node = node.map_err(|error| TargetError::Io(dir.place.entry(&entry, None).cipher, error))?;
            if step + 1 == depth {
                return Ok((dir, entry));
            }
            dir = Arc::new(self.descend(&dir, &entry, node));
        }
        Ok((dir, ".".to_owned()))
    }

    fn entry_for(&self, dir: &Dir, name: &[u8]) -> Result<String, TargetError> {
        let volume = self.volume.ok_or(TargetError::NeedsKeys)?;
        let id = dir.id.ok_or(TargetError::NoId)?;
        Ok(Stored::new(&volume.names.seal(&id, name), NameKey::digest).entry().to_owned())
    }

    /// The directory and the entry at a path relative to the cipher directory.
    pub(super) fn find_cipher(&self, path: &str) -> Result<(Arc<Dir>, String), TargetError> {
        let place = Place { cipher: String::new(), plain: Some(Vec::new()) };
        let root = Arc::new(self.directory(self.root.clone(), place, &mut Found::default()));
        self.find(&root, &Target::Cipher(path.split('/').map(str::to_owned).collect()))
    }

    /// What is wrong on the way is not this path's finding.
    fn descend(&self, dir: &Dir, entry: &str, node: Node) -> Dir {
        let plain = match self.name_of(dir, entry) {
            Name::Plain(plain) => plain,
            Name::Broken(..) | Name::Stray => None,
        };
        self.directory(node, dir.place.entry(entry, plain.as_deref()), &mut Found::default())
    }

    /// The inode at a path relative to the cipher directory, whatever it means.
    pub(super) fn node_at(&self, path: &str) -> io::Result<Node> {
        path.split('/').filter(|entry| !entry.is_empty()).try_fold(self.root.clone(), |node, entry| node.lookup(entry))
    }
}
