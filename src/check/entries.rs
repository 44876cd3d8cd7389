//! One entry of a directory: its name, what it is, and what is wrong with it.

use std::io;
use std::sync::Arc;

use crate::crypto::LinkKey;
use crate::format::name::{self, DIRECTORY_ID, Entry, LongTarget, VOLUME_DIR};
use crate::storage::{Node, NodeKind, Timestamp};

use super::files::Pieces;
use super::finding::{Found, Kind, Mend, Place, Severity};
use super::places::{Dir, Name};
use super::{Checker, count};

/// A sealed target is 40 bytes longer than the plain one, of which there is at least one: in base64url.
const SHORTEST_TARGET: usize = 55;

/// What looking at an entry came to.
#[derive(Default)]
pub(super) struct Looked {
    pub(super) found: Found,
    /// When the entry, or the directory that it is in, last changed.
    pub(super) changed: Option<Timestamp>,
    /// It is a directory, which is to be walked.
    pub(super) directory: Option<Arc<Dir>>,
    /// It is a large file, whose pages are to be opened piece by piece.
    pub(super) pieces: Option<Pieces>,
}

impl Checker<'_> {
    /// Looks at the entry `entry` of `dir`. A large file's pages are left for later if `split`.
    pub(super) fn look(&self, dir: &Dir, entry: &str, split: bool) -> Looked {
        let mut looked = Looked::default();
        match name::classify(entry) {
            Entry::Ours if is_known(dir, entry) => {}
            Entry::LongNameLink => self.look_at_link_of_name(dir, entry, &mut looked),
            _ => self.look_at_entry(dir, entry, split, &mut looked),
        }
        looked
    }

    /// The symlink of a long name means something only with its entry.
    fn look_at_link_of_name(&self, dir: &Dir, link: &str, looked: &mut Looked) {
        let place = dir.place.entry(link, None);
        let entry = link.strip_suffix(".n").unwrap_or(link);
        let Ok(stat) = dir.node.lookup(link).and_then(|node| node.stat()) else { return };
        looked.changed = Some(stat.ctime);
        if stat.kind != NodeKind::Symlink {
            return stray(&place, &mut looked.found);
        }
        let Err(error) = dir.node.lookup(entry) else { return };
        if error.kind() == io::ErrorKind::NotFound {
            let what = "the symlink of a long name has no entry: making or removing that was interrupted";
            looked.found.add_mendable(&place, Kind::OrphanLink, Mend::Remove, what);
        }
    }

    fn look_at_entry(&self, dir: &Dir, entry: &str, split: bool, looked: &mut Looked) {
        let name = self.name_of(dir, entry);
        let place = match &name {
            Name::Plain(Some(plain)) => dir.place.entry(entry, Some(plain)),
            _ => dir.place.entry(entry, None),
        };
        let (node, stat) = match dir.node.lookup(entry).and_then(|node| Ok((node.stat()?, node))) {
            Ok((stat, node)) => (node, stat),
            // Somebody removed it meanwhile. A name that is no text cannot be looked up.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !entry.contains('\u{fffd}') => return,
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
                let what = "another filesystem is mounted here: it is no part of the volume";
                return looked.found.add(&place, Severity::Amiss, Kind::Stray, what);
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return looked.found.io(&place, &error),
            Err(_) => return stray(&place, &mut looked.found),
        };
        match name {
            Name::Stray => return stray(&place, &mut looked.found),
            Name::Broken(kind, what) => looked.found.add(&place, Severity::Damage, kind, what),
            Name::Plain(_) => {}
        }
        self.look_at_node(node.clone(), place, stat.kind, split, looked);
        // Asked after everything was read: a later change is a later time.
        let changed = |node: &Node| node.stat().ok().map(|stat| stat.ctime);
        looked.changed = changed(&node).zip(changed(&dir.node)).map(|(entry, above)| entry.max(above));
    }

    fn look_at_node(&self, node: Node, place: Place, kind: NodeKind, split: bool, looked: &mut Looked) {
        match kind {
            NodeKind::Directory => {
                count(&self.counts.directories);
                let dir = self.directory(node, place, &mut looked.found);
                if let (Some(volume), Some(id)) = (self.volume, dir.id) {
                    super::xattrs::check(volume, &dir.node, &id, &dir.place, &mut looked.found);
                }
                looked.directory = Some(Arc::new(dir));
            }
            NodeKind::File => looked.pieces = self.look_at_file(&node, &place, split, &mut looked.found),
            NodeKind::Symlink => {
                count(&self.counts.symlinks);
                self.look_at_symlink(&node, &place, &mut looked.found);
            }
            NodeKind::Fifo | NodeKind::Socket | NodeKind::CharDevice | NodeKind::BlockDevice => {
                count(&self.counts.others);
            }
        }
    }

    fn look_at_symlink(&self, node: &Node, place: &Place, found: &mut Found) {
        let text = match node.readlink_self() {
            Ok(text) => text,
            Err(error) => return found.io(place, &error),
        };
        if let Some(long) = LongTarget::parse(&text) {
            return self.look_at_long_target(long, place, found);
        }
        let sealed = name::decode(&text).filter(|_| text.len() >= SHORTEST_TARGET);
        let Some(sealed) = sealed else {
            return found.add(place, Severity::Damage, Kind::Link, "the link's target is malformed: it was changed");
        };
        let Some(volume) = self.volume else { return };
        match volume.links.open(&sealed) {
            Ok(target) if !target.is_empty() && !target.contains(&0) => {}
            _ => found.add(
                place,
                Severity::Damage,
                Kind::Link,
                "the link's target does not authenticate: it was changed, or comes from another volume",
            ),
        }
    }
}

impl Checker<'_> {
    /// The sealed target is in a file of the volume's own.
    fn look_at_long_target(&self, long: LongTarget, place: &Place, found: &mut Found) {
        let sealed = match self.directory.long_targets().and_then(|targets| targets.read(&long.file())) {
            Ok(sealed) => sealed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return found.add(place, Severity::Damage, Kind::Link, "the file with the link's target is gone");
            }
            Err(error) => return found.io(place, &error),
        };
        let good = match self.volume {
            None => sealed.len() == usize::from(long.len) + LinkKey::OVERHEAD,
            Some(volume) => volume
                .links
                .open_long(&long.id, &sealed)
                .is_ok_and(|target| target.len() == usize::from(long.len) && !target.contains(&0)),
        };
        if !good {
            let what = "the link's target, in a file of its own, does not authenticate: it was changed, or comes from another volume";
            found.add(place, Severity::Damage, Kind::Link, what);
        }
    }
}

fn stray(place: &Place, found: &mut Found) {
    let what = "no writer of a volume makes an entry of this name: something else put it here";
    found.add(place, Severity::Amiss, Kind::Stray, what);
}

/// What every directory has, and the root.
fn is_known(dir: &Dir, entry: &str) -> bool {
    [".", "..", DIRECTORY_ID].contains(&entry) || (dir.place.cipher.is_empty() && entry == VOLUME_DIR)
}
