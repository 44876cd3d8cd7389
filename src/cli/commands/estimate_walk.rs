//! The part of `kmsfs estimate` that counts: files once each, whatever their links, and the data keys of a volume.

use std::collections::HashSet;
use std::fs::{self, DirEntry, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use serde::Serialize;

use crate::format::geometry::PAGE_LEN;
use crate::format::header::parse_page;
use crate::format::name::{self, Entry};

/// What a tree holds.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct Tree {
    /// Regular files.
    pub(super) files: u64,
    /// Those without content, which have no data key.
    pub(super) empty_files: u64,
    /// Of all files; in a volume, of their ciphertext.
    pub(super) bytes: u64,
    /// Of all files, without holes.
    #[serde(skip)]
    pub(super) allocated: u64,
    /// Files and directories that could not be looked at.
    pub(super) unreadable: u64,
    /// The different data keys of a volume.
    pub(super) data_keys: Option<u64>,
}

/// Counts what lies below `root`, which is a cipher directory if `volume`. Symlinks are not followed.
///
/// # Errors
/// If `root` itself cannot be read.
pub(super) fn count(root: &Path, volume: bool) -> io::Result<Tree> {
    let mut counter = Counter { volume, ..Counter::default() };
    counter.directory(root)?;
    while let Some(directory) = counter.waiting.pop() {
        if counter.directory(&directory).is_err() {
            counter.tree.unreadable += 1;
        }
    }
    counter.tree.data_keys = volume.then_some(counter.data_keys.len() as u64);
    Ok(counter.tree)
}

#[derive(Default)]
struct Counter {
    volume: bool,
    tree: Tree,
    waiting: Vec<PathBuf>,
    /// Device and inode of files with several names.
    linked: HashSet<(u64, u64)>,
    data_keys: HashSet<[u8; 16]>,
}

impl Counter {
    fn directory(&mut self, path: &Path) -> io::Result<()> {
        for entry in fs::read_dir(path)? {
            let looked_at = entry.and_then(|entry| self.entry(&entry));
            if looked_at.is_err() {
                self.tree.unreadable += 1;
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: &DirEntry) -> io::Result<()> {
        if self.volume && is_ours(entry) {
            return Ok(());
        }
        let kind = entry.file_type()?;
        if kind.is_dir() {
            self.waiting.push(entry.path());
        } else if kind.is_file() {
            let found = entry.metadata()?;
            if found.nlink() < 2 || self.linked.insert((found.dev(), found.ino())) {
                self.file(&entry.path(), &found)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, found: &Metadata) -> io::Result<()> {
        let data_key = if self.volume { data_key_of(path, found.len())? } else { None };
        let is_empty = if self.volume { data_key.is_none() } else { found.len() == 0 };
        self.data_keys.extend(data_key);
        self.tree.files += 1;
        self.tree.empty_files += u64::from(is_empty);
        self.tree.bytes += found.len();
        self.tree.allocated += found.len().min(found.blocks() * 512);
        Ok(())
    }
}

/// What of a cipher directory is not a file of the user's.
fn is_ours(entry: &DirEntry) -> bool {
    matches!(name::classify(&entry.file_name().to_string_lossy()), Entry::Ours | Entry::LongNameLink)
}

/// The data key that the newest header of a ciphertext file names; none if it has no header.
fn data_key_of(path: &Path, size: u64) -> io::Result<Option<[u8; 16]>> {
    if size < PAGE_LEN as u64 {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let mut page = [0; PAGE_LEN];
    file.read_exact_at(&mut page, 0)?;
    let headers = parse_page(&page).into_iter().flatten().map(|slot| slot.header);
    Ok(headers.max_by_key(|header| header.generation).map(|header| header.data_key_id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    use crate::format::header::{Header, Record, put_slot};

    fn ciphertext(generation: u64, data_key_id: [u8; 16]) -> Vec<u8> {
        let header = Header {
            suite: 1,
            generation,
            volume_id: [1; 16],
            file_id: [2; 32],
            data_key_id,
            records: vec![Record { provider: 1, key_id: b"k".to_vec(), wrapped: vec![9; 60] }],
            commitment: [4; 32],
        };
        let mut page = [0; PAGE_LEN];
        put_slot(&mut page, 0, &header.signed_bytes().unwrap(), &[5; 32]);
        page.to_vec()
    }

    #[test]
    fn counts_plain_files_once_and_follows_nothing() {
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name);
        fs::create_dir_all(path("a/.hidden")).unwrap();
        fs::write(path("a/one"), "123").unwrap();
        fs::write(path("a/.hidden/two"), "45").unwrap();
        fs::write(path("empty"), "").unwrap();
        fs::hard_link(path("a/one"), path("again")).unwrap();
        symlink("/", path("root")).unwrap();
        let expected = Tree { files: 3, empty_files: 1, bytes: 5, allocated: 5, unreadable: 0, data_keys: None };
        assert_eq!(count(home.path(), false).unwrap(), expected);
        assert!(count(&path("missing"), false).is_err());
    }

    #[test]
    fn counts_the_data_keys_of_a_volume() {
        let home = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(home.path().join(name), bytes).unwrap();
        fs::create_dir(home.path().join(".kmsfs")).unwrap();
        write(".kmsfs/volume.toml", b"config");
        write("first", &ciphertext(1, [1; 16]));
        write("~long", &ciphertext(2, [1; 16]));
        write("third", &ciphertext(1, [2; 16]));
        write("empty", b"");
        write("zeros", &[0; PAGE_LEN]);
        symlink("sealed name", home.path().join("~long.n")).unwrap();
        let bytes = 4 * PAGE_LEN as u64;
        let found = count(home.path(), true).unwrap();
        // Of zeros a filesystem may keep a hole.
        let allocated = found.allocated;
        let expected = Tree { files: 5, empty_files: 2, bytes, allocated, unreadable: 0, data_keys: Some(2) };
        assert_eq!(found, expected);
        assert!(allocated <= bytes);
    }
}
