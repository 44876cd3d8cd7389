//! Directories of the cipher directory while they are looked at: their ids, and the plain names of their entries.

use std::io;

use crate::crypto::NameKey;
use crate::format::name::{self, DIRECTORY_ID, Entry, Stored};
use crate::storage::Node;

use super::Checker;
use super::finding::{Found, Kind, Mend, Place, Severity};

/// An encrypted name is so much longer than the name.
const NAME_OVERHEAD: usize = 16;
/// An entry of a long name: `~` and a digest.
const LONG_ENTRY: usize = 44;
/// Texts up to this length are entries themselves.
const SHORT_TEXT: usize = 255;

/// A directory.
pub(super) struct Dir {
    pub(super) node: Node,
    pub(super) place: Place,
    /// None if it is missing or not authentic; without keys, what it claims to be.
    pub(super) id: Option<[u8; 16]>,
}

/// What is known of the name of an entry.
pub(super) enum Name {
    /// It is one of a file of the plain tree. Without keys its plain form is not known.
    Plain(Option<Vec<u8>>),
    /// It does not decrypt; what happened, in words.
    Broken(Kind, String),
    /// No name of ours at all.
    Stray,
}

/// Why a directory has no id.
pub(super) enum NoId {
    Missing,
    Unauthentic(&'static str),
    Io(io::Error),
}

impl Checker<'_> {
    /// The id of a directory.
    pub(super) fn id_of(&self, node: &Node) -> Result<[u8; 16], NoId> {
        let text = match node.readlink(DIRECTORY_ID) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(NoId::Missing),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                return Err(NoId::Unauthentic("`.kmsfs.dir` is not a symlink"));
            }
            Err(error) => return Err(NoId::Io(error)),
        };
        let signed = name::decode(&text).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        let signed = signed.ok_or(NoId::Unauthentic("the directory's id is malformed: it was changed"))?;
        let Some(volume) = self.volume else {
            let mut id = [0; 16];
            id.copy_from_slice(&signed[..16]);
            return Ok(id);
        };
        let changed = "the directory's id does not authenticate: it was changed, or comes from another volume";
        volume.names.directory_id(&signed).map_err(|_| NoId::Unauthentic(changed))
    }

    /// The directory behind `node`; what is wrong with its id goes to `found`.
    pub(super) fn directory(&self, node: Node, place: Place, found: &mut Found) -> Dir {
        let id = match self.id_of(&node) {
            Ok(id) => {
                self.note_id(id, &node, &place, found);
                Some(id)
            }
            Err(NoId::Unauthentic(what)) => {
                found.add(&place, Severity::Damage, Kind::DirectoryId, format!("{what}; no name in it can be read"));
                None
            }
            Err(NoId::Io(error)) => {
                found.io(&place, &error);
                None
            }
            Err(NoId::Missing) => {
                self.report_missing_id(&node, &place, found);
                None
            }
        };
        Dir { node, place, id }
    }

    fn report_missing_id(&self, node: &Node, place: &Place, found: &mut Found) {
        match holds_nothing(node) {
            Ok(true) if !place.cipher.is_empty() => {
                let what = "an empty directory has no id: its making or removing was interrupted";
                found.add_mendable(place, Kind::EmptyDirectory, Mend::GiveId, what);
            }
            Ok(_) => {
                let what = "the directory's id (`.kmsfs.dir`) is missing; no name in it can be read";
                found.add(place, Severity::Damage, Kind::DirectoryId, what);
            }
            Err(error) => found.io(place, &error),
        }
    }

    /// Two directories with one id: one was copied, or its id was.
    fn note_id(&self, id: [u8; 16], node: &Node, place: &Place, found: &mut Found) {
        let Ok(stat) = node.stat() else { return };
        let mut ids = super::locked(&self.ids);
        let (inode, first) = ids.entry(id).or_insert_with(|| (stat.ino, place.cipher.clone()));
        if *inode != stat.ino {
            let what = format!("the directory has the id of another one ({}): one of the two was copied", shown(first));
            found.add(place, Severity::Damage, Kind::SameId, what);
        }
    }

    /// The name of the entry `entry` of `dir`.
    pub(super) fn name_of(&self, dir: &Dir, entry: &str) -> Name {
        let sealed = match name::classify(entry) {
            Entry::Ours | Entry::LongNameLink => return Name::Stray,
            Entry::Short(entry) => match name::decode(entry.as_bytes()) {
                Some(sealed) if is_sealed_name(&sealed) => sealed,
                _ => return Name::Stray,
            },
            Entry::Long(entry) if entry.len() != LONG_ENTRY => return Name::Stray,
            Entry::Long(entry) => match long_name(dir, entry) {
                Ok(sealed) => sealed,
                Err(what) => return Name::Broken(Kind::LongName, what),
            },
        };
        let Some(volume) = self.volume else { return Name::Plain(None) };
        // Without an id no name can be read; that is the directory's finding, not the entry's.
        let Some(id) = dir.id else { return Name::Plain(None) };
        match volume.names.open(&id, &sealed) {
            Ok(plain) if name::is_valid(&plain) => Name::Plain(Some(plain)),
            Ok(_) => Name::Broken(Kind::Name, "the name decrypts to one that no file can have".to_owned()),
            Err(_) => {
                let what = "the name does not decrypt: the entry was moved here from another directory or renamed";
                Name::Broken(Kind::Name, what.to_owned())
            }
        }
    }
}

fn is_sealed_name(sealed: &[u8]) -> bool {
    (NAME_OVERHEAD + 1..=NAME_OVERHEAD + name::NAME_MAX).contains(&sealed.len())
}

/// The encrypted name behind a long-name entry, or what is wrong with its symlink.
fn long_name(dir: &Dir, entry: &str) -> Result<Vec<u8>, String> {
    let text = match dir.node.readlink(name::link_of(entry)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err("the symlink with the long name (`.n`) is missing: the name is lost".to_owned());
        }
        Err(error) => return Err(format!("the symlink with the long name (`.n`) cannot be read: {error}")),
    };
    let changed = || "the symlink with the long name (`.n`) is not this entry's: it was changed".to_owned();
    if text.len() <= SHORT_TEXT {
        return Err(changed());
    }
    let sealed = name::decode(&text).ok_or_else(changed)?;
    if Stored::new(&sealed, NameKey::digest).entry() != entry || !is_sealed_name(&sealed) {
        return Err(changed());
    }
    Ok(sealed)
}

/// Whether a directory has no entries but a directory id and symlinks of long names that are gone.
pub(super) fn holds_nothing(directory: &Node) -> io::Result<bool> {
    let mut nothing = true;
    each_entry(directory, |entry, _| {
        nothing &= !matches!(name::classify(entry), Entry::Short(_) | Entry::Long(_));
    })?;
    Ok(nothing)
}

/// Hands each entry's name and kind, if the backing filesystem tells, to `visit`.
pub(super) fn each_entry(
    directory: &Node,
    mut visit: impl FnMut(&str, Option<crate::storage::NodeKind>),
) -> io::Result<()> {
    let mut stream = directory.open_directory()?;
    let mut position = 0;
    while let Some(entry) = stream.entry_at(position)? {
        position = entry.next_position;
        visit(&entry.name, entry.kind);
        stream.advance();
    }
    Ok(())
}

/// A path as people see it: the root has a name.
fn shown(cipher: &str) -> &str {
    if cipher.is_empty() { "the root" } else { cipher }
}
