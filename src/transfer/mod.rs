//! Volumes without a mount: looking at them, reading files, and copying whole trees out of them and into them.
//!
//! Uses what a mount serves, `fs`, without a kernel. Invariants: reading takes no lock and changes nothing, so it may go on
//! beside a mount; writing holds the volume's lock as a mount does; no byte that does not authenticate leaves a volume.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use kmsfs::crypto::Suite;
//! use kmsfs::format::config::{self, End, Holes};
//! use kmsfs::keys::providers::{self, ProviderSettings};
//! use kmsfs::keys::volume::{self, NewVolume};
//! use kmsfs::keys::{KeyLimits, ProviderKind};
//! use kmsfs::storage::cipher_directory::{CipherDirectory, LockMode};
//! use kmsfs::transfer::{Progress, Settings, Tree};
//!
//! # let home = tempfile::tempdir()?;
//! # let home = home.path();
//! # std::fs::create_dir(home.join("letters"))?;
//! # std::fs::write(home.join("letters/to-anna"), "The treasure is under the old oak.")?;
//! // A volume under a local keyring.
//! let (cipher, keyring) = (home.join("cipher"), home.join("keyring.toml"));
//! providers::create_local(&keyring, None)?;
//! let provider = providers::open(ProviderKind::Local, "", Some(&keyring), &ProviderSettings::default())?;
//! let choices = NewVolume { suite: Suite::Xaes256Gcm, holes: Holes::Allow, end: End::Lenient, files_per_data_key: 1 };
//! let made = volume::create(&choices, provider.as_ref(), Some(&keyring))?;
//! CipherDirectory::create(&cipher, &made.config_file, &made.root_directory_id)?;
//!
//! // A tree goes in, and is read back while it does.
//! let open = |to_write: bool| {
//!     let directory = CipherDirectory::open(&cipher)?;
//!     let lock = to_write.then(|| directory.lock(LockMode::Exclusive)).transpose()?;
//!     let sealed = config::parse(&directory.read_config()?)?;
//!     let volume = volume::unlock(&sealed, provider.clone(), KeyLimits::default())?;
//!     Ok::<_, Box<dyn std::error::Error>>(Tree::open(directory, volume, lock)?)
//! };
//! let settings = Settings { verify: true, ..Settings::default() };
//! let failures = open(true)?.import(&home.join("letters"), b"mail", settings, &Progress::default())?;
//! assert!(failures.is_empty());
//!
//! // A file is read, and everything comes out again.
//! let tree = open(false)?;
//! let mut letter = Vec::new();
//! tree.read(b"mail/to-anna", |bytes| {
//!     letter.extend_from_slice(bytes);
//!     Ok(())
//! })?;
//! assert_eq!(letter, b"The treasure is under the old oak.");
//! assert!(tree.export(b"", &home.join("plain"), settings, &Progress::default())?.is_empty());
//! assert_eq!(std::fs::read(home.join("plain/mail/to-anna"))?, letter);
//! # Ok(())
//! # }
//! ```

mod content;
mod copy;
mod finish;
mod plain;
mod report;
mod shred;
mod side;
mod verify;
mod volume;

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::sync::Arc;

pub use crate::storage::{NodeKind, Timestamp};
pub use report::{Counts, Failure, Progress, Settings};
pub use shred::Doomed;
pub use side::{Meta, TransferError, kind_name};

use crate::fs::{self, Filesystem};
use crate::keys::Volume;
use crate::lease::{self, Seal};
use crate::storage::CipherDirectory;
use crate::storage::cipher_directory::VolumeLock;

use content::CHUNK;
use copy::{Copy, PAUSES, Pair, is_recent};
use plain::Plain;
use side::{New, OpenFile, Side};
use volume::{Object, VolumeSide};

/// A name in a directory, and the attributes of what it names, or why they cannot be had.
pub type Entry = (Vec<u8>, Result<Meta, TransferError>);

/// An unlocked volume, open without a mount.
pub struct Tree {
    side: VolumeSide,
    _lock: Option<VolumeLock>,
}

impl Tree {
    /// Opens a volume: for writing if its exclusive lock is given, which was taken before the config was read, else for
    /// reading. To write it also takes the volume's lease, which may mean to wait for some time.
    ///
    /// # Errors
    /// [`fs::Error`] if the root cannot be read, or another writes the volume.
    pub fn open(directory: CipherDirectory, volume: Volume, lock: Option<VolumeLock>) -> Result<Self, fs::Error> {
        let options = fs::Options { read_only: lock.is_none(), ..fs::Options::default() };
        let seal = Seal::new(volume.id, Arc::clone(&volume.lease));
        let tenure = lock.as_ref().map(|lock| lease::claim(lock, seal, &mut |why| tracing::warn!("{why}")));
        let tenure = tenure.transpose()?.flatten();
        let fs = Filesystem::open_held(directory, volume, options, tenure)?;
        Ok(Self { side: VolumeSide::new(fs), _lock: lock })
    }

    /// The attributes of what is at `path`: names with `/` between them, from the root, which is the empty path. Symlinks are
    /// not followed.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn meta(&self, path: &[u8]) -> Result<Meta, TransferError> {
        self.side.meta(&self.find(path)?)
    }

    /// The entries of a directory, by name.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn list(&self, path: &[u8]) -> Result<Vec<Entry>, TransferError> {
        let directory = self.find(path)?;
        let kind = self.side.meta(&directory)?.kind;
        if kind != NodeKind::Directory {
            return Err(TransferError::Kind(kind_name(kind)));
        }
        let mut names = self.side.names(&directory)?;
        names.sort();
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            let found = self.side.lookup(&directory, &name).transpose();
            entries.extend(found.map(|object| (name, object.and_then(|object| self.side.meta(&object)))));
        }
        Ok(entries)
    }

    /// The target of a symlink.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn readlink(&self, path: &[u8]) -> Result<Vec<u8>, TransferError> {
        self.side.readlink(&self.find(path)?)
    }

    /// Hands the content of a regular file to `sink`, piece by piece, each after it has authenticated. Beside a mount, what is
    /// being written at the moment is read again.
    ///
    /// # Errors
    /// [`TransferError`]; what was handed over before is authentic, and not all.
    pub fn read(&self, path: &[u8], mut sink: impl FnMut(&[u8]) -> io::Result<()>) -> Result<(), TransferError> {
        let object = self.find(path)?;
        let kind = self.side.meta(&object)?.kind;
        if kind != NodeKind::File {
            return Err(TransferError::Kind(kind_name(kind)));
        }
        let (mut at, mut buffer) = (0, vec![0; CHUNK]);
        let mut file = self.side.open(&object)?;
        loop {
            let mut pauses = PAUSES.iter();
            let read = loop {
                let error = match file.read_at(at, &mut buffer) {
                    Ok(read) => break read,
                    Err(error) => error,
                };
                let again = error.may_pass() && (error.is_of_keys() || is_recent(&self.side.meta(&object)?));
                let Some(pause) = pauses.next().filter(|_| again) else { return Err(error) };
                std::thread::sleep(*pause);
                // The new one takes another look at the file's end.
                drop(file);
                file = self.side.open(&object)?;
            };
            if read == 0 {
                return Ok(());
            }
            sink(&buffer[..read])?;
            at += read as u64;
        }
    }

    /// Copies what is at `path` to `to` and returns what could not be copied. A directory's entries go into `to`, which is made
    /// if it is missing; a file becomes `to`. What is there already and looks the same (kind, size, times, mode, owner) is kept,
    /// so that an interrupted copy goes on; other files of the same names are replaced; what else is there stays.
    ///
    /// # Errors
    /// [`TransferError`] if nothing can be copied at all.
    pub fn export(
        &self,
        path: &[u8],
        to: &Path,
        settings: Settings,
        progress: &Progress,
    ) -> Result<Vec<Failure>, TransferError> {
        let source = self.find(path)?;
        let before = self.side.fs.stats();
        let mut failures = match self.side.meta(&source)?.kind {
            NodeKind::Directory => {
                if !to.is_dir() {
                    let (above, name) = above(to)?;
                    let parent = Plain::new(above)?;
                    directory_at(&parent, parent.root()?, name)?;
                }
                let target = Plain::new(to)?;
                let base = Pair { source, target: target.root()?, path: Vec::new(), renamed: None };
                Copy::new(&self.side, &target, base, settings, progress).run(None)
            }
            _ => {
                let (above, name) = above(to)?;
                let target = Plain::new(above)?;
                let (parent, last) = split(path);
                let (source, renamed) = (self.find(parent)?, Some(name.to_vec()));
                let base = Pair { source, target: target.root()?, path: Vec::new(), renamed };
                Copy::new(&self.side, &target, base, settings, progress).run(Some(last))
            }
        };
        let after = self.side.fs.stats();
        if after.undecryptable_names > before.undecryptable_names {
            failures.push(Failure { path: b".".to_vec(), error: TransferError::Names });
        }
        Ok(failures)
    }

    /// Copies `from` to `path` of a volume that is open for writing; as [`Self::export`] the other way.
    ///
    /// # Errors
    /// [`TransferError`] if nothing can be copied at all.
    pub fn import(
        &self,
        from: &Path,
        path: &[u8],
        settings: Settings,
        progress: &Progress,
    ) -> Result<Vec<Failure>, TransferError> {
        let is_directory = std::fs::metadata(from)?.is_dir();
        let (parent, last) = split(path);
        let parent = self.find(parent)?;
        if is_directory {
            let source = Plain::new(from)?;
            let place = if last.is_empty() { parent } else { directory_at(&self.side, parent, last)? };
            let base = Pair { source: source.root()?, target: place, path: Vec::new(), renamed: None };
            return Ok(Copy::new(&source, &self.side, base, settings, progress).run(None));
        }
        let (above, name) = above(from)?;
        if last.is_empty() {
            return Err(TransferError::Path);
        }
        let source = Plain::new(above)?;
        let base = Pair { source: source.root()?, target: parent, path: Vec::new(), renamed: Some(last.to_vec()) };
        Ok(Copy::new(&source, &self.side, base, settings, progress).run(Some(name)))
    }

    /// The path in the cipher directory of what is at `path`; `.` for the root.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn cipher_path(&self, path: &[u8]) -> Result<String, TransferError> {
        let mut entries = Vec::new();
        self.walk(path, |directory, name| {
            entries.push(self.side.fs.stored_entry(directory.id(), name)?);
            Ok(())
        })?;
        Ok(if entries.is_empty() { ".".to_owned() } else { entries.join("/") })
    }

    fn find(&self, path: &[u8]) -> Result<Object, TransferError> {
        self.walk(path, |_, _| Ok(()))
    }

    /// Calls `each` with every directory on the way and the name that is looked up in it.
    fn walk(
        &self,
        path: &[u8],
        mut each: impl FnMut(&Object, &[u8]) -> Result<(), TransferError>,
    ) -> Result<Object, TransferError> {
        let mut at = self.side.root()?;
        for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".") {
            if part == b".." {
                return Err(TransferError::Path);
            }
            if self.side.meta(&at)?.kind != NodeKind::Directory {
                return Err(TransferError::NotFound);
            }
            each(&at, part)?;
            at = self.side.lookup(&at, part)?.ok_or(TransferError::NotFound)?;
        }
        Ok(at)
    }
}

impl Drop for Tree {
    /// Settles every file and wipes every key; the lock goes after it. What was copied was durable before it got its name, and what
    /// fails here is logged.
    fn drop(&mut self) {
        let _ = self.side.fs.shutdown();
    }
}

/// The directory `name`, made if it is missing.
fn directory_at<A: Side>(side: &A, parent: A::Object, name: &[u8]) -> Result<A::Object, TransferError> {
    match side.lookup(&parent, name)? {
        None => side.make(&parent, name, &New::Directory),
        Some(found) => match side.meta(&found)?.kind {
            NodeKind::Directory => Ok(found),
            kind => Err(TransferError::InTheWay(kind_name(kind))),
        },
    }
}

/// The directory of a path outside, and the name in it.
fn above(path: &Path) -> Result<(&Path, &[u8]), TransferError> {
    let Some(Component::Normal(name)) = path.components().next_back() else { return Err(TransferError::Path) };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent, OsStr::as_bytes(name)))
}

/// The directory of a path in a volume, and the last name; that is empty for the root.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
    let path = &path[..end];
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}
