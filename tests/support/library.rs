//! A volume under a local keyring, used through the library without a kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use kmsfs::crypto::Suite;
use kmsfs::format::config::{self, End, Holes};
use kmsfs::fs::{Access, Attributes, Caller, Error, Filesystem, InodeId, NodeKind, Options, ROOT, XattrMode};
use kmsfs::keys::providers::{self, ProviderSettings};
use kmsfs::keys::volume::{self, NewVolume};
use kmsfs::keys::{KeyLimits, Provider, ProviderKind};
use kmsfs::storage::CipherDirectory;

pub(crate) const ME: Caller = Caller { uid: 0, gid: 0, pid: 0, umask: 0 };
/// No answer may take longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A volume, open or not.
pub(crate) struct Library {
    pub(crate) cipher: PathBuf,
    pub(crate) keyring: PathBuf,
    pub(crate) fs: Option<Arc<Filesystem>>,
    _directory: tempfile::TempDir,
}

/// What was found at a path: its kind and content, or why not.
pub(crate) type Found = Result<String, i32>;

impl Library {
    pub(crate) fn new(suite: Suite, holes: Holes, end: End) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (cipher, keyring) = (directory.path().join("cipher"), directory.path().join("keyring"));
        providers::create_local(&keyring, None).unwrap();
        let settings = NewVolume { suite, holes, end, files_per_data_key: 1 };
        let created = volume::create(&settings, open_keyring(&keyring).as_ref(), Some(&keyring)).unwrap();
        CipherDirectory::create(&cipher, &created.config_file, &created.root_directory_id).unwrap();
        let mut library = Self { cipher, keyring, fs: None, _directory: directory };
        library.open().unwrap();
        library
    }

    /// Opens the volume as a mount does. The error says only that there is one.
    pub(crate) fn open(&mut self) -> Result<(), String> {
        self.close();
        let directory = CipherDirectory::open(&self.cipher).map_err(|error| error.to_string())?;
        let config = directory.read_config().map_err(|error| error.to_string())?;
        let sealed = config::parse(&config).map_err(|error| error.to_string())?;
        let volume = volume::unlock(&sealed, open_keyring(&self.keyring), KeyLimits::default());
        let volume = volume.map_err(|error| error.to_string())?;
        let fs = Filesystem::open(directory, volume, Options::default()).map_err(|error| error.to_string())?;
        self.fs = Some(fs);
        Ok(())
    }

    /// Settles every file and closes the volume.
    pub(crate) fn close(&mut self) {
        if let Some(fs) = self.fs.take() {
            fs.shutdown().unwrap();
        }
    }

    pub(crate) fn fs(&self) -> &Arc<Filesystem> {
        self.fs.as_ref().expect("the volume is open")
    }

    pub(crate) fn walk(&self, path: &str) -> Result<Attributes, Error> {
        let parts = path.split('/').filter(|part| !part.is_empty());
        parts.into_iter().try_fold(self.fs().attributes(ROOT)?, |at, part| self.fs().lookup(at.id, part.as_bytes()))
    }

    /// The directory and the last part of a path.
    pub(crate) fn parent<'p>(&self, path: &'p str) -> (InodeId, &'p [u8]) {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        (self.walk(parent).unwrap().id, name.as_bytes())
    }

    pub(crate) fn mkdir(&self, path: &str) {
        let (parent, name) = self.parent(path);
        self.fs().mkdir(parent, name, 0o700, ME).unwrap();
    }

    /// Makes a file with this content, or gives it more.
    pub(crate) fn write(&self, path: &str, offset: u64, content: &[u8]) -> Result<(), Error> {
        let (parent, name) = self.parent(path);
        let id = match self.walk(path) {
            Ok(found) => {
                wait(|send| {
                    self.fs().open_file(found.id, Access::ReadWrite, Box::new(move |opened| tell(&send, opened)))
                })?;
                found.id
            }
            Err(_) => {
                wait(|send| self.fs().create(parent, name, 0o600, ME, Box::new(move |made| tell(&send, made))))?.id
            }
        };
        let written = self.fs().write(id, offset, content);
        self.fs().release(id);
        written
    }

    pub(crate) fn set_xattr(&self, path: &str, name: &str, value: &[u8]) {
        let id = self.walk(path).unwrap().id;
        let set = |send| {
            let answer = Box::new(move |set| tell(&send, set));
            self.fs().set_xattr(id, name.as_bytes(), value, XattrMode::Any, ME, answer);
        };
        wait(set).unwrap();
    }

    /// The content of a file: all of it, or the error of the first read that fails.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, Error> {
        let found = self.walk(path)?;
        self.read_file(found.id, 0, usize::try_from(found.size).unwrap() + 100)
    }

    pub(crate) fn read_file(&self, id: InodeId, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
        wait(|send| self.fs().open_file(id, Access::Read, Box::new(move |opened| tell(&send, opened))))?;
        // A size that lies costs an error, not memory.
        let mut plain = vec![0; len.min(1 << 20)];
        let read = self.fs().read(id, offset, &mut plain);
        self.fs().release(id);
        plain.truncate(read?);
        Ok(plain)
    }

    pub(crate) fn list(&self, id: InodeId) -> Result<Vec<String>, Error> {
        let handle = self.fs().open_directory(id)?;
        let mut names = Vec::new();
        let listed = self.fs().list(handle, 0, true, |entry| {
            names.push(String::from_utf8_lossy(entry.name).into_owned());
            true
        });
        self.fs().close_directory(handle);
        listed?;
        names.retain(|name| name != "." && name != "..");
        Ok(names)
    }

    /// Everything that can be seen, by path; extended attributes as `path@name`.
    pub(crate) fn tree(&self) -> BTreeMap<String, Found> {
        let mut found = BTreeMap::new();
        self.tree_below("", &mut found);
        found
    }

    fn tree_below(&self, path: &str, found: &mut BTreeMap<String, Found>) {
        let names = match self.walk(path).and_then(|directory| self.list(directory.id)) {
            Ok(names) => names,
            Err(error) => return drop(found.insert(format!("{path}/"), Err(error.errno()))),
        };
        for name in names {
            let child = format!("{path}/{name}");
            let what = self.walk(&child).and_then(|attributes| self.what(&child, &attributes, found));
            if what.as_ref().is_ok_and(|what| what == "directory") {
                self.tree_below(&child, found);
            }
            found.insert(child, what.map_err(|error| error.errno()));
        }
    }

    fn what(&self, path: &str, attributes: &Attributes, found: &mut BTreeMap<String, Found>) -> Result<String, Error> {
        if matches!(attributes.kind, NodeKind::File | NodeKind::Directory) {
            let names = self.fs().xattr_names(attributes.id, ME)?;
            for name in names.split(|byte| *byte == 0).filter(|name| name.starts_with(b"user.")) {
                let value = self.fs().xattr(attributes.id, name);
                let value = value.map(|value| format!("{value:?}")).map_err(|error| error.errno());
                found.insert(format!("{path}@{}", String::from_utf8_lossy(name)), value);
            }
        }
        Ok(match attributes.kind {
            NodeKind::Directory => "directory".to_owned(),
            NodeKind::Symlink => format!("-> {:?}", self.fs().readlink(attributes.id)?),
            NodeKind::File => {
                let len = usize::try_from(attributes.size).unwrap_or(usize::MAX).saturating_add(100);
                format!("file {:?}", self.read_file(attributes.id, 0, len)?)
            }
            other => format!("{other:?}"),
        })
    }

    /// The ciphertext behind a path.
    pub(crate) fn behind(&self, path: &str) -> PathBuf {
        use std::os::unix::fs::MetadataExt;
        let attributes = self.walk(path).unwrap();
        let same = |found: &PathBuf| fs::symlink_metadata(found).unwrap().ino() == attributes.id.0;
        entries(&self.cipher).into_iter().find(same).expect("a backing entry")
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.close();
    }
}

fn open_keyring(path: &Path) -> Arc<dyn Provider> {
    providers::open(ProviderKind::Local, "", Some(path), &ProviderSettings::default()).unwrap()
}

fn tell<T>(send: &Sender<T>, answer: T) {
    let _ = send.send(answer);
}

/// Waits for an answer, and not for ever.
pub(crate) fn wait<T>(ask: impl FnOnce(Sender<T>)) -> T {
    let (send, receive) = channel();
    ask(send);
    receive.recv_timeout(PATIENCE).expect("an answer in time")
}

/// All entries of a cipher directory, with those of our own, deepest last.
pub(crate) fn entries(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).unwrap().map(Result::unwrap) {
        found.push(entry.path());
        if entry.file_type().unwrap().is_dir() {
            found.extend(entries(&entry.path()));
        }
    }
    found
}
