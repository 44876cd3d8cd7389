//! Mount points: where one may be, and how its path is found without asking the filesystem behind it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, accessat, open};
use rustix::io::Errno;

use super::error::{CliError, Exit};

/// As many symlinks as the kernel follows.
const MAX_LINKS: usize = 40;
/// How long a mount may take to answer whether its process lives.
const ANSWER: Duration = Duration::from_secs(2);

/// The canonical path of `path`. Unlike [`fs::canonicalize`] it asks nothing of what is mounted at `path`, which may be
/// dead or slow.
pub(crate) fn canonical(path: &Path) -> io::Result<PathBuf> {
    let mut path = std::path::absolute(path)?;
    for _ in 0..MAX_LINKS {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return fs::canonicalize(&path) };
        let parent = fs::canonicalize(parent)?;
        let resolved = parent.join(name);
        match fs::read_link(&resolved) {
            Ok(target) => path = parent.join(target),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(resolved),
            Err(error) if is_dead(&error) => return Ok(resolved),
            Err(error) => return Err(error),
        }
    }
    Err(Errno::LOOP.into())
}

/// Whether an error says that a mount has no process behind it any more, or that it was lost while it was asked.
fn is_dead(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOTCONN | Errno::CONNABORTED))
}

/// Whether a directory has no entries but those that lead to directories of `ours`. The kernel may answer for the attributes of
/// a dead mount's root out of its cache, but not for the entries.
fn is_empty(path: &Path, ours: &[PathBuf]) -> io::Result<bool> {
    for entry in fs::read_dir(path)? {
        let entry = entry?.path();
        let leads = ours.iter().any(|ours| ours.starts_with(&entry));
        if !leads || (!ours.contains(&entry) && !is_empty(&entry, ours)?) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Holds the directory at a canonical path, and says whether it is empty.
fn hold(path: &Path, ours: &[PathBuf]) -> io::Result<(OwnedFd, bool)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let held = open(path, flags, Mode::empty())?;
    Ok((held, is_empty(path, ours)?))
}

/// A mount point that was checked, and the directory that was found there: who may change the path may put another one in its
/// place until something is mounted.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) path: PathBuf,
    pub(crate) directory: OwnedFd,
}

/// Checks that the volume at `cipher_directory` (canonical) can be mounted at `path`; returns the canonical mount point.
/// A dead mount there is taken away first with `unmount`. Directories of `ours` may lie below it: they are not looked for there
/// once it is mounted.
pub(crate) fn prepare(
    path: &Path,
    cipher_directory: &Path,
    ours: &[PathBuf],
    unmount: impl FnOnce(&Path) -> Result<(), CliError>,
) -> Result<Prepared, CliError> {
    let refuse = |why: &dyn std::fmt::Display| {
        CliError::new(Exit::MountPoint, format_args!("the mount point {}: {why}", path.display()))
    };
    let missing = |error: io::Error| {
        let is_missing = error.kind() == io::ErrorKind::NotFound && fs::symlink_metadata(path).is_err();
        let failure = refuse(&error);
        if is_missing { failure.hint(format_args!("make it: `mkdir -p {}`", path.display())) } else { failure }
    };
    let mountpoint = canonical(path).map_err(missing)?;
    // It may be dying just now, so nothing is asked of it but this.
    let mut found = hold(&mountpoint, ours);
    if found.as_ref().is_err_and(is_dead) {
        unmount(&mountpoint)?;
        found = hold(&mountpoint, ours);
    }
    if mountpoint == cipher_directory {
        return Err(refuse(&"it is the cipher directory itself"));
    }
    if mountpoint.starts_with(cipher_directory) {
        return Err(refuse(&"it lies inside the cipher directory"));
    }
    if cipher_directory.starts_with(&mountpoint) {
        return Err(refuse(&"the cipher directory lies inside it"));
    }
    match found {
        Ok((directory, true)) => {
            check_own(&mountpoint).map_err(|why| refuse(&why.0).hint(why.1))?;
            Ok(Prepared { path: mountpoint, directory })
        }
        Ok((_, false)) => Err(refuse(&"it is not empty")),
        Err(error) => Err(missing(error)),
    }
}

/// Whether this user may mount on a directory, and if not, why and what to do. Root may mount anywhere.
fn check_own(mountpoint: &Path) -> Result<(), (String, String)> {
    let user = rustix::process::geteuid();
    if user.is_root() {
        return Ok(());
    }
    let (place, user) = (mountpoint.display(), user.as_raw());
    let is_sticky_of_another =
        fs::metadata(mountpoint).is_ok_and(|found| found.mode() & 0o1000 != 0 && found.uid() != user);
    let hint = format!("`chown {user} {place}` as root, or name a directory of this user's");
    if is_sticky_of_another {
        return Err(("it has the sticky bit and belongs to another user".to_owned(), hint));
    }
    match accessat(CWD, mountpoint, Access::WRITE_OK, AtFlags::EACCESS) {
        Err(error) => Err((format!("user {user} may not write to it ({})", io::Error::from(error)), hint)),
        Ok(()) => Ok(()),
    }
}

/// Whether there is a mount at `path` whose process has ended. One that does not answer has not.
pub(crate) fn is_dead_mount(path: &Path) -> bool {
    let (tell, told) = mpsc::channel();
    let path = path.to_owned();
    let asked = thread::Builder::new().spawn(move || {
        let first = fs::read_dir(path).and_then(|mut entries| entries.next().transpose());
        tell.send(first.is_err_and(|error| is_dead(&error)))
    });
    asked.is_ok() && told.recv_timeout(ANSWER).unwrap_or(false)
}

/// The canonical path of a directory that may be missing (its parent may not).
pub(crate) fn canonical_or_new(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let path = std::path::absolute(path)?;
            match (path.parent(), path.file_name()) {
                (Some(parent), Some(name)) => Ok(fs::canonicalize(parent)?.join(name)),
                _ => Err(error),
            }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn no_unmount(_: &Path) -> Result<(), CliError> {
        panic!("nothing is mounted here")
    }

    #[test]
    fn only_an_empty_directory_apart_from_the_cipher_directory_will_do() {
        let home = tempfile::tempdir().unwrap();
        let home = fs::canonicalize(home.path()).unwrap();
        for directory in ["cipher/inside", "above/cipher", "full/entry", "good", "home/.local/share/kmsfs/x"] {
            fs::create_dir_all(home.join(directory)).unwrap();
        }
        fs::write(home.join("file"), "").unwrap();
        symlink("cipher/inside", home.join("link")).unwrap();
        let ours = [home.join("home/.local/share/kmsfs")];
        let refused = |mountpoint: &str, cipher: &str| {
            let error = prepare(&home.join(mountpoint), &home.join(cipher), &ours, no_unmount).unwrap_err();
            assert_eq!(error.code(), Exit::MountPoint as u8);
            error.to_string()
        };
        assert!(refused("cipher", "cipher").contains("itself"));
        assert!(refused("cipher/inside", "cipher").contains("lies inside the"));
        assert!(refused("link", "cipher").contains("lies inside the"));
        assert!(refused("above", "above/cipher").contains("lies inside it"));
        assert!(refused("full", "cipher").contains("not empty"));
        assert!(refused("missing", "cipher").contains("No such file"));
        assert!(refused("file", "cipher").contains("Not a directory"));
        // A name that begins like the cipher directory's is another directory.
        fs::create_dir(home.join("cipher2")).unwrap();
        let good =
            |mountpoint: &str| prepare(&home.join(mountpoint), &home.join("cipher"), &ours, no_unmount).unwrap().path;
        assert_eq!(good("cipher2"), home.join("cipher2"));
        assert_eq!(good("good/../good/."), home.join("good"));
        assert_eq!(good("home"), home.join("home"));
        fs::create_dir(home.join("home/.local/other")).unwrap();
        assert!(refused("home", "cipher").contains("not empty"));
    }

    #[test]
    fn canonical_paths_agree_with_the_kernels() {
        let home = tempfile::tempdir().unwrap();
        let home = fs::canonicalize(home.path()).unwrap();
        fs::create_dir_all(home.join("a/b")).unwrap();
        symlink("a", home.join("l1")).unwrap();
        symlink(home.join("l1/b"), home.join("l2")).unwrap();
        symlink("loop", home.join("loop")).unwrap();
        for path in ["a/b", "l1", "l1/b", "l2", "l2/..", "a/./b/", "l1/../l2"] {
            assert_eq!(canonical(&home.join(path)).unwrap(), fs::canonicalize(home.join(path)).unwrap(), "{path}");
        }
        assert_eq!(canonical(Path::new("/")).unwrap(), Path::new("/"));
        canonical(&home.join("loop")).unwrap_err();
        canonical(&home.join("missing")).unwrap_err();
        assert_eq!(canonical_or_new(&home.join("l1/new")).unwrap(), home.join("a/new"));
        canonical_or_new(&home.join("missing/new")).unwrap_err();
    }
}
