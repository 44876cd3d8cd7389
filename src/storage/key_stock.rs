//! The stock of provisioned keys: small files in a directory of the volume's own, each of which is taken by one process
//! and no other. `docs/FORMAT.md` section 8.1.
//!
//! Invariants:
//! * an entry appears whole, or not at all;
//! * of all who claim an entry one gets it, and then it is durably gone;
//! * what an entry says is not looked at here; at most so much of it is read, and so many entries at a time.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::format::name;

use super::own_directory::{OwnDirectory, beneath};

/// More than any entry has, so that the parser sees that a file is too large.
const MAX_READ: u64 = 4096;
/// Names that are remembered from one listing, and entries that are looked at for them.
const NAMES: usize = 4096;
const LOOKED_AT: usize = 100_000;
/// With fewer names than this the directory is listed again, if it has more.
const FEW: usize = 64;
/// A new file that is older than this was left by a crash.
const LEFT_BEHIND: Duration = Duration::from_secs(3600);

/// The stock of one volume.
#[derive(Debug)]
pub struct KeyStock {
    directory: OwnDirectory,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    names: Vec<String>,
    /// The last listing did not reach the end.
    has_more: bool,
    /// Names that are of no use.
    rejected: HashSet<String>,
}

/// An entry that may be claimed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub name: String,
    /// What is in it.
    pub bytes: Vec<u8>,
    /// How many more are known of.
    pub more: usize,
}

impl KeyStock {
    pub(super) fn new(volume: OwnedFd) -> Self {
        Self { directory: OwnDirectory::new(volume, name::PROVISIONED_DIR), state: Mutex::default() }
    }

    /// An entry that may be claimed, if there is one.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn next(&self) -> io::Result<Option<Candidate>> {
        let Some(directory) = self.directory.open()? else { return Ok(None) };
        loop {
            let mut state = self.state();
            if state.names.is_empty() || (state.has_more && state.names.len() < FEW) {
                state.list(&directory)?;
            }
            let Some(name) = state.names.pop() else { return Ok(None) };
            let more = state.names.len();
            drop(state);
            match read(&directory, &name) {
                Ok(bytes) => return Ok(Some(Candidate { name, bytes, more })),
                // Somebody else took it.
                Err(Errno::NOENT) => {}
                // Not a file that this process can read: it is none of ours.
                Err(Errno::ACCESS | Errno::LOOP | Errno::XDEV | Errno::NXIO | Errno::ISDIR) => _ = self.reject(&name),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes the entry out of the stock, durably; false if it was not there any more.
    ///
    /// # Errors
    /// Those of the backing filesystem; the entry may then be gone.
    pub fn claim(&self, name: &str) -> io::Result<bool> {
        let Some(directory) = self.directory.open()? else { return Ok(false) };
        match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) => rustix::fs::fsync(&directory)?,
            Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Never offers this entry again. Returns whether nobody else has rejected it before.
    pub fn reject(&self, name: &str) -> bool {
        let mut state = self.state();
        state.rejected.len() < LOOKED_AT && state.rejected.insert(name.to_owned())
    }

    /// Adds an entry. It is durable after [`Self::sync`].
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn add(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let directory = self.directory.open_or_make()?;
        let new = format!(".{name}.new");
        let written = write_new(&directory, &new, bytes)
            .and_then(|()| Ok(rustix::fs::renameat(&directory, &new, &directory, name)?));
        if written.is_err() {
            // That it cannot be removed either adds nothing to the first error.
            let _ = rustix::fs::unlinkat(&directory, &new, AtFlags::empty());
        }
        written
    }

    /// Puts an entry in the place of the one of that name. Nobody else may add that name meanwhile; what a process that was
    /// killed at the same has left is taken away. Durable after [`Self::sync`].
    ///
    /// # Errors
    /// Those of the backing filesystem; the entry is then the old one.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        if let Some(directory) = self.directory.open()? {
            match rustix::fs::unlinkat(&directory, format!(".{name}.new"), AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.add(name, bytes)
    }

    /// Makes everything that was added durable.
    ///
    /// # Errors
    /// Those of `fsync(2)`.
    pub fn sync(&self) -> io::Result<()> {
        self.directory.open()?.map_or(Ok(()), |directory| Ok(rustix::fs::fsync(directory)?))
    }

    /// Removes what crashes left behind.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn tidy(&self) -> io::Result<()> {
        let Some(directory) = self.directory.open()? else { return Ok(()) };
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if !(name.to_bytes().starts_with(b".") && name.to_bytes().ends_with(b".new")) {
                continue;
            }
            let modified = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| stat.st_mtime);
            let before = SystemTime::now().checked_sub(LEFT_BEHIND);
            let before = before.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            let before = before.and_then(|age| i64::try_from(age.as_secs()).ok());
            if let (Ok(modified), Some(before)) = (modified, before)
                && modified < before
            {
                // It is in nobody's way.
                let _ = rustix::fs::unlinkat(&directory, name, AtFlags::empty());
            }
        }
        Ok(())
    }

    /// The names of all entries.
    ///
    /// # Errors
    /// Those of the backing filesystem.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let Some(directory) = self.directory.open()? else { return Ok(Vec::new()) };
        Ok(list(&directory, usize::MAX, usize::MAX, |_| true)?.0)
    }

    /// What is in the entry `name`; nothing if it is gone, or no file that can be read.
    #[must_use]
    pub fn read(&self, name: &str) -> Option<Vec<u8>> {
        read(&self.directory.open().ok()??, name).ok()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn list(&mut self, directory: &OwnedFd) -> io::Result<()> {
        let rejected = &self.rejected;
        (self.names, self.has_more) = list(directory, NAMES, LOOKED_AT, |name| !rejected.contains(name))?;
        Ok(())
    }
}

/// The names of at most so many entries, of at most so many that are looked at; and whether there may be more.
fn list(
    directory: &OwnedFd,
    names: usize,
    looked_at: usize,
    wanted: impl Fn(&str) -> bool,
) -> io::Result<(Vec<String>, bool)> {
    let mut found = Vec::new();
    for (number, entry) in Dir::read_from(directory)?.enumerate() {
        if number >= looked_at || found.len() >= names {
            return Ok((found, true));
        }
        let entry = entry?;
        let name = entry.file_name().to_str().ok().filter(|name| name::is_provisioned(name));
        found.extend(name.filter(|name| wanted(name)).map(str::to_owned));
    }
    Ok((found, false))
}

/// Reads a regular file; anything else of that name is an error, and never blocks.
fn read(directory: &OwnedFd, name: &str) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat2(directory, name, flags, Mode::empty(), beneath())?);
    let errno = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    if !file.metadata().map_err(errno)?.is_file() {
        return Err(Errno::NXIO);
    }
    let mut bytes = Vec::new();
    file.take(MAX_READ).read_to_end(&mut bytes).map_err(errno)?;
    Ok(bytes)
}

fn write_new(directory: &OwnedFd, name: &str, bytes: &[u8]) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(directory.as_fd(), name, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::super::CipherDirectory;
    use super::*;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn stock() -> (tempfile::TempDir, CipherDirectory, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let directory = CipherDirectory::create(&home.path().join("c"), "config", "id").unwrap();
        let keys = directory.path().join(".kmsfs/keys");
        (home, directory, keys)
    }

    fn name(number: u8) -> String {
        format!("{number:032x}")
    }

    #[test]
    fn without_a_directory_there_is_nothing() {
        let (_home, directory, keys) = stock();
        let stock = directory.key_stock().unwrap();
        assert_eq!((stock.next().unwrap(), stock.names().unwrap().len()), (None, 0));
        assert!(!stock.claim(&name(1)).unwrap() && !keys.exists());
        stock.sync().unwrap();
        stock.tidy().unwrap();
    }

    #[test]
    fn an_entry_is_claimed_once_whoever_asks() {
        let (_home, directory, _) = stock();
        let stocks = [(); 2].map(|()| directory.key_stock().unwrap());
        for number in 0..200 {
            stocks[0].add(&name(number), &[number; 100]).unwrap();
        }
        let claimed = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for stock in [&stocks[0], &stocks[0], &stocks[1], &stocks[1]] {
                let claimed = &claimed;
                scope.spawn(move || {
                    while let Some(Candidate { name, bytes, .. }) = stock.next().unwrap() {
                        if stock.claim(&name).unwrap() {
                            claimed.lock().unwrap().push(bytes[0]);
                        }
                    }
                });
            }
        });
        let mut claimed = claimed.into_inner().unwrap();
        claimed.sort_unstable();
        assert_eq!(claimed, (0..200).collect::<Vec<u8>>());
        assert!(stocks[0].names().unwrap().is_empty());
    }

    #[test]
    fn what_is_put_back_is_offered_again_and_what_is_rejected_is_not() {
        let (_home, directory, _) = stock();
        let stock = directory.key_stock().unwrap();
        stock.add(&name(1), b"one").unwrap();
        assert!(stock.claim(&name(1)).unwrap() && stock.next().unwrap().is_none());
        stock.add(&name(1), b"one").unwrap();
        assert_eq!(stock.next().unwrap().unwrap().bytes, b"one");
        stock.reject(&name(1));
        assert_eq!(stock.next().unwrap(), None);
        assert_eq!(stock.names().unwrap(), [name(1)]);
    }

    #[test]
    fn only_small_regular_files_with_the_right_names_count() {
        let (_home, directory, keys) = stock();
        let stock = directory.key_stock().unwrap();
        stock.add(&name(1), &[7; 3]).unwrap();
        fs::write(keys.join("README"), "x").unwrap();
        fs::write(keys.join(format!(".{}.new", name(2))), "x").unwrap();
        fs::write(keys.join(name(3)), vec![0; 1 << 20]).unwrap();
        fs::create_dir(keys.join(name(4))).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", keys.join(name(5))).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            keys.join(name(6)),
            rustix::fs::FileType::Fifo,
            Mode::RUSR | Mode::WUSR,
            0,
        )
        .unwrap();
        let mut found = Vec::new();
        while let Some(candidate) = stock.next().unwrap() {
            found.push((candidate.name.clone(), candidate.bytes.len()));
            stock.reject(&candidate.name);
        }
        found.sort();
        assert_eq!(found, [(name(1), 3), (name(3), 4096)]);
    }

    #[test]
    fn an_entry_is_replaced_whatever_a_crash_left() {
        let (_home, directory, keys) = stock();
        let stock = directory.key_stock().unwrap();
        stock.add(&name(1), b"one").unwrap();
        fs::write(keys.join(format!(".{}.new", name(1))), "hal").unwrap();
        stock.replace(&name(1), b"other").unwrap();
        assert_eq!((stock.read(&name(1)).unwrap(), fs::read_dir(&keys).unwrap().count()), (b"other".to_vec(), 1));
    }

    #[test]
    fn crashes_leave_nothing_for_long() {
        let (_home, directory, keys) = stock();
        let stock = directory.key_stock().unwrap();
        stock.add(&name(1), b"one").unwrap();
        let [old, new] = [2, 3].map(|number| keys.join(format!(".{}.new", name(number))));
        for path in [&old, &new] {
            fs::write(path, "x").unwrap();
        }
        let long_ago = SystemTime::now() - 2 * LEFT_BEHIND;
        File::options().write(true).open(&old).unwrap().set_modified(long_ago).unwrap();
        stock.tidy().unwrap();
        assert_eq!((old.exists(), new.exists(), keys.join(name(1)).exists()), (false, true, true));
    }

    #[test]
    fn a_large_stock_is_listed_in_parts() {
        let (_home, directory, keys) = stock();
        fs::create_dir(&keys).unwrap();
        let total = NAMES + 2 * FEW;
        for number in 0..total {
            fs::write(keys.join(format!("{number:032x}")), "x").unwrap();
        }
        let stock = directory.key_stock().unwrap();
        let mut least = usize::MAX;
        for number in 0..total {
            let candidate = stock.next().unwrap().unwrap();
            // As another process does; claiming so many would take the disk's time.
            fs::remove_file(keys.join(&candidate.name)).unwrap();
            if number < total - FEW {
                least = least.min(candidate.more);
            }
        }
        assert!(least >= FEW - 1, "{least}");
        assert_eq!(stock.next().unwrap(), None);
        assert_eq!(fs::read_dir(Path::new(&keys)).unwrap().count(), 0);
    }
}
