//! Which ciphertext file, directory or volume a path of `kmsfs inspect` names: a path on the disk, a path on a mount, or, after a
//! cipher directory, a plain path in that volume.

use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::check::Target;
use crate::cli::error::CliError;
use crate::format::config::CONFIG_FILE;
use crate::format::name::VOLUME_DIR;
use crate::storage::{Access, Node};
use crate::transfer::{NodeKind, kind_name};

use super::check_paths::{self, Mounted};
use super::inspect::Volumes;
use super::inspect_file;

/// What is inspected.
#[derive(Debug)]
pub(super) enum Subject {
    /// The volume with this cipher directory.
    Volume(PathBuf),
    /// A config by itself.
    Config(PathBuf),
    /// Something below a cipher directory, or a file somewhere.
    Entry(Entry),
}

/// Something with ciphertext in it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) path: PathBuf,
    /// The cipher directory, if it lies in one.
    pub(super) root: Option<PathBuf>,
    /// The path from there, if it is one of the volume's tree.
    pub(super) below: Option<String>,
}

impl Entry {
    fn at(root: PathBuf, below: String) -> Self {
        Self { path: root.join(&below), root: Some(root), below: Some(below) }
    }

    /// What it is, if it is in a volume's tree and no regular file.
    pub(super) fn other_kind(&self) -> io::Result<Option<&'static str>> {
        let Some(node) = self.node()? else { return Ok(None) };
        let kind = node.stat()?.kind;
        Ok((kind != NodeKind::File).then(|| kind_name(kind)))
    }

    /// Opens the ciphertext file for reading.
    pub(super) fn open(&self) -> io::Result<File> {
        match self.node()? {
            Some(node) => Ok(node.open_file(Access::Read)?.try_clone()?.into()),
            None => inspect_file::open(&self.path),
        }
    }

    /// Found name by name: encrypted names may be too long for one path.
    fn node(&self) -> io::Result<Option<Node>> {
        let Some((root, below)) = self.root.as_ref().zip(self.below.as_ref()) else { return Ok(None) };
        let root = Node::open_root(root)?;
        below.split('/').filter(|part| !part.is_empty()).try_fold(root, |node, part| node.lookup(part)).map(Some)
    }
}

/// The subjects that the paths name, or why one names none. A cipher directory that only says where a plain path begins is none.
pub(super) fn subjects(paths: &[PathBuf], volumes: &mut Volumes) -> Vec<Result<Subject, CliError>> {
    let mounts = check_paths::all_mounts();
    let mut subjects = Vec::new();
    // The cipher directory that was named last, and where it is among the subjects if it is one so far.
    let mut last: Option<(PathBuf, Option<usize>)> = None;
    for path in paths {
        let known = match of_itself(path, &mounts, volumes) {
            Ok(known) => known,
            Err(error) => {
                subjects.push(Err(error));
                continue;
            }
        };
        match (known, &mut last) {
            (Some(subject), _) => {
                if let Subject::Volume(root) = &subject {
                    last = Some((root.clone(), Some(subjects.len())));
                }
                subjects.push(Ok(subject));
            }
            (None, None) => subjects.push(elsewhere(path).map(Subject::Entry)),
            (None, Some((root, named))) => match volumes.cipher_path(root, path.as_os_str().as_bytes()) {
                Ok(below) => {
                    if let Some(at) = named.take() {
                        drop(subjects.remove(at));
                    }
                    subjects.push(Ok(Subject::Entry(Entry::at(root.clone(), below))));
                }
                Err(error) => match elsewhere(path) {
                    Ok(entry) => subjects.push(Ok(Subject::Entry(entry))),
                    Err(_) => {
                        if let Some(at) = named.take() {
                            drop(subjects.remove(at));
                        }
                        subjects.push(Err(error));
                    }
                },
            },
        }
    }
    subjects
}

/// What the path names on the disk or on a mount; none if it is in no volume.
fn of_itself(path: &Path, mounts: &[Mounted], volumes: &mut Volumes) -> Result<Option<Subject>, CliError> {
    let name = path.file_name().unwrap_or_default().as_bytes();
    if name.starts_with(CONFIG_FILE.as_bytes()) && path.is_file() {
        return Ok(Some(Subject::Config(path.to_owned())));
    }
    let located = check_paths::locate(path, mounts).ok().or_else(|| by_name(path, mounts));
    let Some((root, target)) = located else { return Ok(None) };
    Ok(Some(match target {
        whole if whole.is_whole() => Subject::Volume(if is_on(path, mounts) { root } else { path.to_owned() }),
        Target::Plain(names) => {
            let below = volumes.cipher_path(&root, &names.join(&b'/'))?;
            Subject::Entry(Entry::at(root, below))
        }
        // Nothing below the cipher directory is there unless its path is UTF-8.
        Target::Cipher(entries) => {
            fs::symlink_metadata(path).map_err(|error| CliError::io(path.display(), &error))?;
            Subject::Entry(Entry { path: path.to_owned(), root: Some(root), below: Some(entries.join("/")) })
        }
    }))
}

/// A path on a mount that does not answer, as one whose keys are locked away.
fn by_name(path: &Path, mounts: &[Mounted]) -> Option<(PathBuf, Target)> {
    let path = std::path::absolute(path).ok()?;
    let (root, below) = mounts.iter().find_map(|mount| mount.below(&path))?;
    let names = below.components().map(|name| name.as_os_str().as_bytes().to_vec());
    Some((root.to_owned(), Target::Plain(names.collect())))
}

fn is_on(path: &Path, mounts: &[Mounted]) -> bool {
    let path = crate::cli::mount_point::canonical(path).unwrap_or_default();
    mounts.iter().any(|mount| mount.below(&path).is_some())
}

/// A file that is no part of a volume's tree; a symlink may lead to one that is.
fn elsewhere(path: &Path) -> Result<Entry, CliError> {
    let canonical = fs::canonicalize(path).map_err(|error| {
        let failure = CliError::io(path.display(), &error);
        // A denied permission has a hint of its own.
        if error.kind() == io::ErrorKind::PermissionDenied { failure } else { failure.hint(HINT) }
    })?;
    if let Ok((root, Target::Cipher(entries))) = check_paths::locate(&canonical, &[]) {
        return Ok(Entry { path: path.to_owned(), root: Some(root), below: Some(entries.join("/")) });
    }
    let root = canonical.ancestors().skip(1).find(|above| above.join(VOLUME_DIR).join(CONFIG_FILE).exists());
    Ok(Entry { path: path.to_owned(), root: root.map(Path::to_owned), below: None })
}

const HINT: &str = "name a ciphertext file, a path on a mount, or CIPHERDIR and a plain path in that volume";
