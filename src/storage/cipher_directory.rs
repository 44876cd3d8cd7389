//! The cipher directory as a whole: making it, finding it, and its config file. `docs/FORMAT.md` section 8.
//!
//! Invariants:
//! * everything after [`CipherDirectory::open`] is relative to held descriptors; symlinks are not followed;
//! * the config changes by writing a new file beside it, making that durable and renaming it: a crash leaves the old or
//!   the new one, whole;
//! * what the config says is not looked at here, and no secret passes through.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::volume_lock::{lock_directory, make_like};
use super::{KeyStock, LongTargets, RedoLogs};
use crate::format::name::LOCK_FILE;

pub use super::volume_lock::{LockError, LockMode, VolumeLock};

/// The volume's own directory in the root of the cipher directory.
const VOLUME_DIRECTORY: &str = ".kmsfs";
/// The symlink whose target is a directory's id.
const DIRECTORY_ID: &str = ".kmsfs.dir";
pub(super) const CONFIG: &str = "volume.toml";
pub(super) const CONFIG_COPY: &str = "volume.toml.1";
/// One byte more than any config has, so that the parser sees that a file is too large.
const MAX_CONFIG_READ: u64 = 65536 + 1;

/// An existing cipher directory, held open.
#[derive(Debug)]
pub struct CipherDirectory {
    path: PathBuf,
    root: OwnedFd,
    pub(super) volume: OwnedFd,
}

/// The list of wrapping keys, locked; dropping it unlocks.
#[derive(Debug)]
pub struct KeysLock {
    _root: OwnedFd,
}

/// Why a cipher directory cannot be opened or made.
#[derive(Debug, thiserror::Error)]
pub enum CipherDirectoryError {
    /// There is nothing at the path.
    #[error("{0} does not exist")]
    NotFound(PathBuf),
    /// The path is not a directory's.
    #[error("{0} is not a directory")]
    NotADirectory(PathBuf),
    /// The directory holds no volume.
    #[error("{0} is not a volume (it has no .kmsfs/volume.toml)")]
    NotAVolume(PathBuf),
    /// The directory holds a volume without its config.
    #[error("{0} is a volume whose config .kmsfs/volume.toml is missing")]
    ConfigMissing(PathBuf),
    /// A volume can be made only in an empty directory.
    #[error("{0} is not empty")]
    NotEmpty(PathBuf),
    /// The directory is a volume already.
    #[error("{0} is a volume already")]
    AlreadyAVolume(PathBuf),
    /// The backing filesystem refused.
    #[error("{path}: {error}")]
    Io {
        /// Of what.
        path: PathBuf,
        /// How.
        error: io::Error,
    },
}

impl CipherDirectory {
    /// Opens the cipher directory at `path`.
    ///
    /// # Errors
    /// [`CipherDirectoryError`].
    pub fn open(path: &Path) -> Result<Self, CipherDirectoryError> {
        let directory = Self::open_without_config(path)?;
        let path = &directory.path;
        match rustix::fs::statat(&directory.volume, CONFIG, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile => Ok(directory),
            Ok(_) => Err(CipherDirectoryError::NotAVolume(path.clone())),
            Err(Errno::NOENT) => Err(CipherDirectoryError::ConfigMissing(path.clone())),
            Err(error) => Err(at(&path.join(VOLUME_DIRECTORY).join(CONFIG), error.into())),
        }
    }

    /// Opens what was a cipher directory, whether or not it still has its config.
    ///
    /// # Errors
    /// [`CipherDirectoryError`].
    pub fn open_without_config(path: &Path) -> Result<Self, CipherDirectoryError> {
        let path = fs::canonicalize(path).map_err(|error| at(path, error))?;
        let root = open_directory(rustix::fs::CWD, &path).map_err(|error| at(&path, error))?;
        let volume = match open_directory(root.as_fd(), Path::new(VOLUME_DIRECTORY)) {
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)) => {
                return Err(CipherDirectoryError::NotAVolume(path));
            }
            other => other.map_err(|error| at(&path.join(VOLUME_DIRECTORY), error))?,
        };
        Ok(Self { path, root, volume })
    }

    /// Whether a volume can be made at `path`: it does not exist (and its parent does), or it is an empty directory.
    ///
    /// # Errors
    /// [`CipherDirectoryError`] if not.
    pub fn check_vacant(path: &Path) -> Result<(), CipherDirectoryError> {
        match fs::read_dir(path) {
            Ok(mut entries) => match entries.next() {
                None => Ok(()),
                Some(_) if path.join(VOLUME_DIRECTORY).join(CONFIG).exists() => {
                    Err(CipherDirectoryError::AlreadyAVolume(path.to_owned()))
                }
                Some(_) if path.join(VOLUME_DIRECTORY).is_dir() => {
                    Err(CipherDirectoryError::ConfigMissing(path.to_owned()))
                }
                Some(_) => Err(CipherDirectoryError::NotEmpty(path.to_owned())),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = parent_of(path);
                fs::read_dir(parent).map(drop).map_err(|error| at(parent, error))
            }
            Err(error) => Err(at(path, error)),
        }
    }

    /// Makes a volume at `path` out of its config and the id of its root directory. A failure removes what was made.
    ///
    /// # Errors
    /// [`CipherDirectoryError`].
    pub fn create(path: &Path, config_file: &str, root_id_link: &str) -> Result<Self, CipherDirectoryError> {
        Self::check_vacant(path)?;
        let made_root = match fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(at(path, error)),
        };
        let filled = Self::fill(path, config_file, root_id_link);
        let made = filled.and_then(|()| Self::open(path)).and_then(|directory| {
            let synced = if made_root { fs::File::open(parent_of(path)).and_then(|p| p.sync_all()) } else { Ok(()) };
            synced.map(|()| directory).map_err(|error| at(path, error))
        });
        if made.is_err() {
            remove_what_was_made(path, made_root);
        }
        made
    }

    fn fill(path: &Path, config_file: &str, root_id_link: &str) -> Result<(), CipherDirectoryError> {
        let steps = || -> io::Result<()> {
            let root = open_directory(rustix::fs::CWD, path)?;
            rustix::fs::mkdirat(&root, VOLUME_DIRECTORY, Mode::RWXU)?;
            let volume = open_directory(root.as_fd(), Path::new(VOLUME_DIRECTORY))?;
            make_like(volume.as_fd(), LOCK_FILE)?;
            write_durably(volume.as_fd(), CONFIG, config_file.as_bytes())?;
            write_durably(volume.as_fd(), CONFIG_COPY, config_file.as_bytes())?;
            rustix::fs::symlinkat(root_id_link, &root, DIRECTORY_ID)?;
            Ok(rustix::fs::fsync(&root)?)
        };
        steps().map_err(|error| at(path, error))
    }

    /// The config file: all of it, or enough of it to show that it is too large.
    ///
    /// # Errors
    /// Those of `open(2)` and `read(2)`.
    pub fn read_config(&self) -> io::Result<Vec<u8>> {
        read_regular(self.volume.as_fd(), CONFIG)
    }

    /// Replaces the config file, and then its copy: at every moment one of the two is whole and unlocks the volume.
    ///
    /// # Errors
    /// Those of the backing filesystem; the config is then the old one. A copy that cannot be written is a warning.
    pub fn replace_config(&self, config_file: &str) -> io::Result<()> {
        write_durably(self.volume.as_fd(), CONFIG, config_file.as_bytes())?;
        if let Err(error) = write_durably(self.volume.as_fd(), CONFIG_COPY, config_file.as_bytes()) {
            tracing::warn!("{}: the copy {CONFIG_COPY} of the config is out of date: {error}", self.path.display());
        }
        Ok(())
    }

    /// Locks the volume against other processes (and other descriptors of this one), without waiting.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn lock(&self, mode: LockMode) -> Result<VolumeLock, LockError> {
        let volume = open_directory(self.root.as_fd(), Path::new(VOLUME_DIRECTORY))?;
        VolumeLock::take(volume, mode).map_err(|error| error.of(&self.path))
    }

    /// Keeps others from changing the list of wrapping keys, without waiting: exclusive while it changes, shared while files get
    /// new data keys.
    ///
    /// # Errors
    /// [`LockError`].
    pub fn lock_keys(&self, mode: LockMode) -> Result<KeysLock, LockError> {
        let root = open_directory(self.root.as_fd(), Path::new("."))?;
        lock_directory(&root, mode).map_err(|error| error.of(&self.path))?;
        Ok(KeysLock { _root: root })
    }

    /// The stock of provisioned keys.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn key_stock(&self) -> io::Result<KeyStock> {
        open_directory(self.root.as_fd(), Path::new(VOLUME_DIRECTORY)).map(KeyStock::new)
    }

    /// The redo logs of files that are sealed anew.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn redo_logs(&self) -> io::Result<RedoLogs> {
        open_directory(self.root.as_fd(), Path::new(VOLUME_DIRECTORY)).map(RedoLogs::new)
    }

    /// The targets of symlinks that are too long for the backing filesystem's.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn long_targets(&self) -> io::Result<LongTargets> {
        open_directory(self.root.as_fd(), Path::new(VOLUME_DIRECTORY)).and_then(LongTargets::new)
    }

    /// The canonical path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The root of the cipher directory.
    #[must_use]
    pub fn root_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

fn at(path: &Path, error: io::Error) -> CipherDirectoryError {
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT) => CipherDirectoryError::NotFound(path.to_owned()),
        Some(Errno::NOTDIR) => CipherDirectoryError::NotADirectory(path.to_owned()),
        _ => CipherDirectoryError::Io { path: path.to_owned(), error },
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn open_directory(parent: BorrowedFd<'_>, name: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Reads a regular file of the volume's own directory; anything else of that name is an error, and never blocks.
pub(super) fn read_regular(volume: BorrowedFd<'_>, name: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let file = fs::File::from(rustix::fs::openat2(volume, name, flags, Mode::empty(), beneath)?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG_READ).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Puts `bytes` at `name`, whole or not at all.
pub(super) fn write_durably(volume: BorrowedFd<'_>, name: &str, bytes: &[u8]) -> io::Result<()> {
    let new = format!("{name}.new");
    let written = write_new(volume, &new, bytes).and_then(|()| Ok(rustix::fs::renameat(volume, &new, volume, name)?));
    if written.is_err() {
        // What could not be written is of no use; that it cannot be removed either adds nothing to the first error.
        let _ = rustix::fs::unlinkat(volume, &new, AtFlags::empty());
    }
    written?;
    Ok(rustix::fs::fsync(volume)?)
}

fn write_new(volume: BorrowedFd<'_>, name: &str, bytes: &[u8]) -> io::Result<()> {
    match rustix::fs::unlinkat(volume, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = fs::File::from(rustix::fs::openat(volume, name, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(bytes)?;
    file.sync_all()
}

/// Undoes [`CipherDirectory::create`] as far as it came. The directory was empty before, so what has these names is ours.
fn remove_what_was_made(path: &Path, made_root: bool) {
    let _ = fs::remove_file(path.join(DIRECTORY_ID));
    for file in [CONFIG, CONFIG_COPY, LOCK_FILE] {
        let _ = fs::remove_file(path.join(VOLUME_DIRECTORY).join(file));
    }
    let _ = fs::remove_dir(path.join(VOLUME_DIRECTORY));
    if made_root {
        let _ = fs::remove_dir(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn entries(path: &Path) -> usize {
        fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn creates_what_it_opens() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("cipher");
        let created = CipherDirectory::create(&path, "config", "root id").unwrap();
        assert_eq!(created.read_config().unwrap(), b"config");
        assert_eq!(fs::read_link(path.join(DIRECTORY_ID)).unwrap(), Path::new("root id"));
        let mode = |name| fs::symlink_metadata(path.join(name)).unwrap().permissions().mode() & 0o777;
        let made = ["", ".kmsfs", ".kmsfs/volume.toml", ".kmsfs/volume.toml.1"];
        assert_eq!(made.map(mode), [0o700, 0o700, 0o600, 0o600]);
        assert_eq!(entries(&path.join(".kmsfs")), 3);
        assert_eq!(created.read_config_copy().unwrap(), b"config");
        let link = home.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(CipherDirectory::open(&link).unwrap().path(), fs::canonicalize(&path).unwrap());
    }

    #[test]
    fn refuses_what_is_not_vacant_and_leaves_it_alone() {
        let home = tempfile::tempdir().unwrap();
        let create = |name: &str| CipherDirectory::create(&home.path().join(name), "config", "id").unwrap_err();
        assert!(matches!(create("no/parent"), CipherDirectoryError::NotFound(_)));
        fs::write(home.path().join("file"), "").unwrap();
        assert!(matches!(create("file"), CipherDirectoryError::NotADirectory(_)));
        fs::create_dir_all(home.path().join("full/inner")).unwrap();
        assert!(matches!(create("full"), CipherDirectoryError::NotEmpty(_)));
        CipherDirectory::create(&home.path().join("volume"), "config", "id").unwrap();
        assert!(matches!(create("volume"), CipherDirectoryError::AlreadyAVolume(_)));
        assert_eq!((entries(home.path()), entries(&home.path().join("full"))), (3, 1));
    }

    #[test]
    fn a_failed_creation_leaves_nothing() {
        let home = tempfile::tempdir().unwrap();
        let too_long = "x".repeat(5000);
        CipherDirectory::create(&home.path().join("new"), "config", &too_long).unwrap_err();
        assert_eq!(entries(home.path()), 0);
        CipherDirectory::create(home.path(), "config", &too_long).unwrap_err();
        assert_eq!(entries(home.path()), 0);
    }

    #[test]
    fn opens_volumes_only() {
        let home = tempfile::tempdir().unwrap();
        let open = |name: &str| CipherDirectory::open(&home.path().join(name)).unwrap_err();
        assert!(matches!(open("missing"), CipherDirectoryError::NotFound(_)));
        fs::write(home.path().join("file"), "").unwrap();
        assert!(matches!(open("file"), CipherDirectoryError::NotADirectory(_)));
        assert!(matches!(open("."), CipherDirectoryError::NotAVolume(_)));
        symlink("elsewhere", home.path().join(".kmsfs")).unwrap();
        assert!(matches!(open("."), CipherDirectoryError::NotAVolume(_)));
        fs::remove_file(home.path().join(".kmsfs")).unwrap();
        fs::create_dir(home.path().join(".kmsfs")).unwrap();
        assert!(matches!(open("."), CipherDirectoryError::ConfigMissing(_)));
        fs::create_dir_all(home.path().join(".kmsfs/volume.toml")).unwrap();
        assert!(matches!(open("."), CipherDirectoryError::NotAVolume(_)));
    }

    #[test]
    fn replacing_the_config_replaces_its_copy() {
        let home = tempfile::tempdir().unwrap();
        let directory = CipherDirectory::create(&home.path().join("c"), "first", "id").unwrap();
        fs::write(home.path().join("c/.kmsfs/volume.toml.new"), "left by a crash").unwrap();
        for config in ["second", "third"] {
            directory.replace_config(config).unwrap();
            assert_eq!(directory.read_config().unwrap(), config.as_bytes());
            assert_eq!(directory.read_config_copy().unwrap(), config.as_bytes());
        }
        assert_eq!(entries(&home.path().join("c/.kmsfs")), 3);
        fs::create_dir(home.path().join("c/.kmsfs/volume.toml.1.new")).unwrap();
        directory.replace_config("fourth").unwrap();
        assert_eq!(directory.read_config().unwrap(), b"fourth", "a copy that cannot be written stops no change");
        fs::remove_dir(home.path().join("c/.kmsfs/volume.toml.1.new")).unwrap();
        directory.replace_config(&"x".repeat(100_000)).unwrap();
        assert_eq!(directory.read_config().unwrap().len(), 65537, "an oversized one is not read whole");
    }
}
