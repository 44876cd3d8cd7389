//! From plain paths to paths in the cipher directory and back, without a mount.
//!
//! Invariants: everything is found from the directory's own descriptor, and no symlink is followed; a name is only given if it
//! authenticates.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cli::error::{CliError, Exit};
use crate::crypto::NameKey;
use crate::format::name::{self, DIRECTORY_ID, Entry, Stored};
use crate::storage::Node;
use crate::transfer::TransferError;

/// The longest path that one system call is given.
const MAX_PATH: usize = 3000;

/// The names of a volume.
pub(super) struct PlainNames<'v> {
    root: Node,
    key: &'v NameKey,
    /// Ids of directories, by their paths in the cipher directory.
    ids: Mutex<HashMap<String, Option<[u8; 16]>>>,
}

impl<'v> PlainNames<'v> {
    /// `root` is the cipher directory.
    pub(super) fn new(root: Node, key: &'v NameKey) -> Self {
        Self { root, key, ids: Mutex::default() }
    }

    /// The path in the cipher directory of the plain path `plain`, both relative to the root.
    pub(super) fn cipher_path(&self, plain: &[u8]) -> Result<String, CliError> {
        let shown = String::from_utf8_lossy(plain);
        let mut path = String::new();
        for part in plain.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
            let failed = |error: io::Error| match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                    CliError::from(TransferError::NotFound).about(&shown)
                }
                _ => CliError::io(format_args!("{shown} in the volume"), &error),
            };
            if part == b".." {
                return Err(CliError::from(TransferError::Path).about(&shown));
            }
            let id = self.id(&path).map_err(failed)?.ok_or_else(|| {
                CliError::new(Exit::Unauthentic, format_args!("{shown}: the id of a directory does not authenticate"))
            })?;
            let stored = Stored::new(&self.key.seal(&id, part), NameKey::digest);
            path = join(&path, stored.entry());
            self.node(&path).map_err(failed)?;
        }
        Ok(path)
    }

    /// The plain path of a path in the cipher directory; none if a name on it does not authenticate or cannot be read.
    pub(super) fn plain_path(&self, cipher: &str) -> Option<Vec<u8>> {
        let (mut plain, mut at) = (Vec::new(), String::new());
        for entry in cipher.split('/').filter(|entry| !entry.is_empty()) {
            if !plain.is_empty() {
                plain.push(b'/');
            }
            plain.extend(self.plain_name(&at, entry)?);
            at = join(&at, entry);
        }
        Some(plain)
    }

    fn plain_name(&self, directory: &str, entry: &str) -> Option<Vec<u8>> {
        let sealed = match name::classify(entry) {
            Entry::Ours | Entry::LongNameLink => return None,
            Entry::Short(entry) => name::decode(entry.as_bytes())?,
            Entry::Long(entry) => {
                let text = self.node(directory).ok()?.readlink(name::link_of(entry)).ok()?;
                name::decode(&text).filter(|sealed| Stored::new(sealed, NameKey::digest).entry() == entry)?
            }
        };
        let id = self.id(directory).ok()??;
        self.key.open(&id, &sealed).ok().filter(|plain| name::is_valid(plain))
    }

    /// The id of a directory; none if it does not authenticate.
    fn id(&self, directory: &str) -> io::Result<Option<[u8; 16]>> {
        if let Some(known) = self.known().get(directory) {
            return Ok(*known);
        }
        let text = self.node(directory)?.readlink(DIRECTORY_ID)?;
        let signed = name::decode(&text).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        let id = signed.and_then(|signed| self.key.directory_id(&signed).ok());
        self.known().insert(directory.to_owned(), id);
        Ok(id)
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Option<[u8; 16]>>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn node(&self, path: &str) -> io::Result<Node> {
        if path.len() <= MAX_PATH {
            return self.root.lookup(if path.is_empty() { "." } else { path });
        }
        path.split('/').try_fold(self.root.clone(), |node, part| node.lookup(part))
    }
}

fn join(directory: &str, entry: &str) -> String {
    if directory.is_empty() { entry.to_owned() } else { format!("{directory}/{entry}") }
}
