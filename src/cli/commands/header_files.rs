//! The files of a cipher directory and their header pages, for commands that change wrapped keys and nothing else. The volume may be mounted.
//!
//! Invariants: everything is found from the directory's own descriptor and no symlink is followed; each inode comes once,
//! whatever its links; a page is replaced in one write, if it is still the one that was looked at, and the times that a file shows stay.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use super::header_writer::{HeaderWriter, Written};
use super::plain_names::PlainNames;
use crate::cli::error::{CliError, Exit};
use crate::format::geometry::PAGE_LEN;
use crate::format::header::HeaderPage;
use crate::format::name::{self, Entry};
use crate::keys::Volume;
use crate::lease::Permit;
use crate::storage::{Access, CipherDirectory, DiskFile, Node, NodeKind, RawFile, SetTime};

/// The most looks at a file that is replaced meanwhile.
const TRIES: u32 = 64;
/// The longest path that one system call is given.
const MAX_PATH: usize = 3000;

/// How far a walk goes.
pub(super) struct Bound {
    /// How many files more; none if all.
    files: Option<usize>,
    until: Option<Instant>,
    reached: bool,
}

impl Bound {
    fn none() -> Self {
        Self { files: None, until: None, reached: false }
    }

    /// At most `files`, within `time`.
    pub(super) fn new(files: usize, time: Duration) -> Self {
        Self { files: Some(files), until: Some(Instant::now() + time), reached: false }
    }

    /// Whether something was left out.
    pub(super) fn was_reached(&self) -> bool {
        self.reached
    }

    fn count(&mut self) {
        self.files = self.files.map(|files| files.saturating_sub(1));
    }

    fn is_over(&mut self) -> bool {
        self.is_enough(0)
    }

    /// Whether no more than the entries that are known of will be looked at.
    fn is_enough(&mut self, entries: usize) -> bool {
        let is_over =
            self.files.is_some_and(|files| files <= entries) || self.until.is_some_and(|at| Instant::now() >= at);
        self.reached |= is_over;
        is_over
    }
}

/// The tree of a cipher directory.
pub(super) struct HeaderFiles {
    root: Node,
}

impl HeaderFiles {
    pub(super) fn of(directory: &CipherDirectory) -> Result<Self, CliError> {
        let root = Node::of_directory(directory.root_fd());
        Ok(Self { root: root.map_err(|error| CliError::io(directory.path().display(), &error))? })
    }

    /// The path in the cipher directory of a plain path, both relative to the root.
    pub(super) fn cipher_path(&self, volume: &Volume, plain: &str) -> Result<String, CliError> {
        self.names(volume).cipher_path(plain.as_bytes())
    }

    /// The names in it.
    pub(super) fn names<'v>(&self, volume: &'v Volume) -> PlainNames<'v> {
        PlainNames::new(self.root.clone(), &volume.names)
    }

    /// Calls `each` with every regular file at or below `start`, and with what could not be looked at.
    pub(super) fn walk(&self, start: &str, mut each: impl FnMut(&str, io::Result<Option<Box<HeaderPage>>>)) {
        self.walk_with_sizes(start, |path, _, page| each(path, page));
    }

    /// The same, with the bytes that the file has on the disk.
    pub(super) fn walk_with_sizes(
        &self,
        start: &str,
        each: impl FnMut(&str, u64, io::Result<Option<Box<HeaderPage>>>),
    ) {
        self.walk_within(start, &mut Bound::none(), each);
    }

    /// The same, up to a bound.
    pub(super) fn walk_within(
        &self,
        start: &str,
        bound: &mut Bound,
        mut each: impl FnMut(&str, u64, io::Result<Option<Box<HeaderPage>>>),
    ) {
        let mut linked = HashSet::new();
        let mut waiting = vec![start.to_owned()];
        while let Some(path) = waiting.pop() {
            if bound.is_over() {
                return;
            }
            match self.visit(&path, &mut linked, &mut waiting, bound, &mut each) {
                // A program of a mount has removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => each(&path, 0, Err(error)),
                Ok(()) => {}
            }
        }
    }

    fn visit(
        &self,
        path: &str,
        linked: &mut HashSet<(u64, u64)>,
        waiting: &mut Vec<String>,
        bound: &mut Bound,
        each: &mut impl FnMut(&str, u64, io::Result<Option<Box<HeaderPage>>>),
    ) -> io::Result<()> {
        let node = self.node(path)?;
        let stat = node.stat()?;
        match stat.kind {
            NodeKind::Directory => {
                let mut stream = node.open_directory()?;
                let mut position = 0;
                while let Some(entry) = stream.entry_at(position)? {
                    position = entry.next_position;
                    if matches!(name::classify(&entry.name), Entry::Short(_) | Entry::Long(_)) {
                        if bound.is_enough(waiting.len()) {
                            break;
                        }
                        let prefix = if path.is_empty() { String::new() } else { format!("{path}/") };
                        waiting.push(format!("{prefix}{}", entry.name));
                    }
                    stream.advance();
                }
            }
            NodeKind::File if stat.nlink < 2 || linked.insert((stat.dev, stat.ino)) => {
                let page = if stat.size < PAGE_LEN as u64 {
                    Ok(None)
                } else {
                    open(&node, Access::Read).and_then(|file| read_page(&file)).map(Some)
                };
                bound.count();
                each(path, stat.blocks * 512, page);
            }
            _ => {}
        }
        Ok(())
    }

    /// Has `writer` replace the header page of a file by what `change` makes of it; nothing if it makes nothing. If the file got
    /// another header or is another file meanwhile, that one's is looked at. Not durable before [`Self::sync`].
    pub(super) fn update(
        &self,
        path: &str,
        writer: &HeaderWriter<'_>,
        mut change: impl FnMut(&HeaderPage) -> Result<Option<Box<HeaderPage>>, CliError>,
    ) -> Result<(), CliError> {
        let failed = |error: io::Error| CliError::io(path, &error);
        for _ in 0..TRIES {
            let node = match self.node(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                node => node.map_err(failed)?,
            };
            let judged = match open(&node, Access::Read).and_then(|file| read_page(&file)) {
                // A file without a header needs none.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                page => page.map_err(failed)?,
            };
            let Some(new) = change(&judged)? else { return Ok(()) };
            let directly = || replace(&node, &judged, &new, writer.permit(), path);
            match writer.write(path, &judged, &new, directly)? {
                Written::Done | Written::Gone => return Ok(()),
                Written::Changed => {}
                Written::Failed(why) => return Err(CliError::new(Exit::Other, why)),
            }
        }
        Err(CliError::new(Exit::Other, "it was replaced again and again"))
    }

    /// Makes everything durable that was written.
    pub(super) fn sync(&self) -> Result<(), CliError> {
        self.root.sync_filesystem().map_err(|error| CliError::io("the cipher directory", &error))
    }

    fn node(&self, path: &str) -> io::Result<Node> {
        if path.len() <= MAX_PATH {
            return self.root.lookup(if path.is_empty() { "." } else { path });
        }
        let mut node = self.root.clone();
        for part in path.split('/') {
            node = node.lookup(part)?;
        }
        Ok(node)
    }
}

/// The owner of a file may change its header whatever its mode.
fn open(node: &Node, access: Access) -> io::Result<DiskFile> {
    let opened = match node.open_file(access) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => node.open_own_file(node.stat()?.mode),
        other => other,
    };
    Ok(match access {
        Access::Read => DiskFile::readable(opened?),
        Access::ReadWrite => DiskFile::writable(opened?),
    })
}

/// Where no mount writes. The times stay.
fn replace(
    node: &Node,
    judged: &HeaderPage,
    new: &HeaderPage,
    permit: &Permit,
    path: &str,
) -> Result<Written, CliError> {
    let failed = |error: io::Error| CliError::io(path, &error);
    let stat = node.stat().map_err(failed)?;
    let file = open(node, Access::ReadWrite).map_err(failed)?;
    if *read_page(&file).map_err(failed)? != *judged {
        return Ok(Written::Changed);
    }
    // Last, since each step before may wait for a server.
    permit.check()?;
    file.write_at(new, 0).map_err(failed)?;
    node.set_times(SetTime::At(stat.atime), SetTime::At(stat.mtime)).map_err(failed)?;
    Ok(Written::Done)
}

fn read_page(file: &DiskFile) -> io::Result<Box<HeaderPage>> {
    let mut page = Box::new([0; PAGE_LEN]);
    if file.read_at(page.as_mut_slice(), 0)? < PAGE_LEN {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bounded_walk_says_whether_something_was_left_out() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("c");
        let directory = CipherDirectory::create(&path, "", "id").unwrap();
        for number in 0..20 {
            let below = path.join(format!("d{}", number % 2));
            std::fs::create_dir_all(&below).unwrap();
            std::fs::write(below.join(format!("f{number}")), [0; PAGE_LEN]).unwrap();
        }
        let seen = |mut bound: Bound| {
            let mut files = 0;
            HeaderFiles::of(&directory).unwrap().walk_within("", &mut bound, |_, _, page| {
                files += 1;
                page.unwrap().unwrap();
            });
            (files, bound.was_reached())
        };
        assert_eq!(seen(Bound::none()), (20, false));
        assert_eq!(seen(Bound::new(1000, Duration::from_secs(60))), (20, false));
        assert_eq!(seen(Bound::new(5, Duration::from_secs(60))), (5, true));
        assert_eq!(seen(Bound::new(1000, Duration::ZERO)), (0, true));
    }
}
