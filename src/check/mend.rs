//! Repairing: what finishes an interrupted step or removes what means nothing. The volume's exclusive lock is held.
//!
//! Invariant: nothing that authenticates, or that a key might still open, is written over or removed.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::content::Content;
use crate::format::geometry::PAGE_LEN;
use crate::format::header::{HeaderPage, SLOT_LEN};
use crate::format::name::{self, DIRECTORY_ID};
use crate::storage::{Access, DiskFile, Node, NodeKind, RawFile, SetTime};

use super::files::Slot;
use super::finding::{Finding, Kind, Mend};
use super::places::holds_nothing;
use super::{Checker, locked};

impl Checker<'_> {
    /// Repairs what can be, marks it, and settles files that are whole; returns how many it settled. `check` says before each
    /// change whether the volume is still the caller's to write.
    ///
    /// # Errors
    /// If what was done cannot be made durable.
    pub fn mend(&self, findings: &mut [Finding], check: &dyn Fn() -> io::Result<()>) -> io::Result<u64> {
        let lost = lost_names(findings);
        for finding in findings.iter_mut() {
            let Some(mend) = finding.mend else { continue };
            if finding.kind == Kind::OrphanLink && !self.may_remove_link(&finding.cipher, &lost) {
                finding.what.push_str("; not repaired: its entry may lie in another directory, and has no other name");
                continue;
            }
            match self.mend_one(&finding.cipher, mend, check) {
                Ok(true) => finding.repaired = true,
                Ok(false) => finding.what.push_str("; not repaired: it has changed meanwhile"),
                Err(error) => finding.what.push_str(&format!("; not repaired: {error}")),
            }
        }
        let unsettled = std::mem::take(&mut *locked(&self.unsettled));
        let mut settled = 0;
        for cipher in &unsettled {
            match self.settle(cipher, check) {
                Ok(done) => settled += u64::from(done),
                // It is complete as it is.
                Err(error) => tracing::warn!("{cipher} cannot be settled: {error}"),
            }
        }
        self.root.sync_filesystem()?;
        Ok(settled)
    }

    /// The symlink of a long name is all that is left of it if its entry was moved away without it.
    fn may_remove_link(&self, link: &str, lost: &HashSet<String>) -> bool {
        let entry = last_of(link).strip_suffix(".n");
        self.whole.load(Ordering::Relaxed) && entry.is_some_and(|entry| !lost.contains(entry))
    }

    fn mend_one(&self, cipher: &str, mend: Mend, check: &dyn Fn() -> io::Result<()>) -> io::Result<bool> {
        let (above, entry) = cipher.rsplit_once('/').unwrap_or(("", cipher));
        let directory = self.node_at(above)?;
        check()?;
        match mend {
            Mend::Remove => remove(&directory, entry),
            Mend::GiveId => self.give_id(&directory.lookup(entry)?),
            Mend::CopySlot => self.copy_slot(&directory.lookup(entry)?),
        }
    }

    fn give_id(&self, directory: &Node) -> io::Result<bool> {
        let Some(volume) = self.volume else { return Ok(false) };
        if !holds_nothing(directory)? {
            return Ok(false);
        }
        directory.symlink(name::encode(&volume.names.new_directory_id().1), DIRECTORY_ID)?;
        Ok(true)
    }

    /// The header is written whole, in one write of a page: however it tears, the valid slot is there.
    fn copy_slot(&self, node: &Node) -> io::Result<bool> {
        let stat = node.stat()?;
        let file = DiskFile::writable(node.open_file(Access::ReadWrite)?);
        let mut page: HeaderPage = [0; PAGE_LEN];
        if file.read_at(&mut page, 0)? < PAGE_LEN {
            return Ok(false);
        }
        let (from, to) = match self.slots(&page) {
            [Slot::Valid, Slot::Broken(_)] => (0, SLOT_LEN),
            [Slot::Broken(_), Slot::Valid] => (SLOT_LEN, 0),
            _ => return Ok(false),
        };
        page.copy_within(from..from + SLOT_LEN, to);
        file.write_at(&page, 0)?;
        file.sync(false)?;
        node.set_times(SetTime::At(stat.atime), SetTime::At(stat.mtime))?;
        Ok(true)
    }

    fn settle(&self, cipher: &str, check: &dyn Fn() -> io::Result<()>) -> io::Result<bool> {
        let Some(volume) = self.volume else { return Ok(false) };
        let file = Arc::new(DiskFile::writable(self.node_at(cipher)?.open_file(Access::ReadWrite)?));
        let mut page: HeaderPage = [0; PAGE_LEN];
        file.read_at(&mut page, 0)?;
        let opened = volume.ring.authenticate(&page).map_err(io::Error::other)?;
        let Some(header) = opened else { return Ok(false) };
        let keys = self.patience.open(&volume.ring, &header).map_err(io::Error::other)?.keys;
        let content = Content::open(file, Some(keys), self.rules(), Arc::default()).map_err(io::Error::other)?;
        let Some(unsettled) = content.unsettled() else { return Ok(false) };
        content.sync(false).map_err(io::Error::other)?;
        check()?;
        content.settle(unsettled).map_err(io::Error::other)
    }
}

/// Entries of long names that lack their symlink.
fn lost_names(findings: &[Finding]) -> HashSet<String> {
    let lost = findings.iter().filter(|finding| finding.kind == Kind::LongName);
    lost.map(|finding| last_of(&finding.cipher).to_owned()).collect()
}

fn last_of(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, last)| last)
}

/// Removes an entry that means nothing: the symlink of a long name only if it is one, and there still is no entry of that
/// name.
fn remove(directory: &Node, entry: &str) -> io::Result<bool> {
    if let Some(long) = entry.strip_suffix(".n")
        && (directory.lookup(long).is_ok() || directory.lookup(entry)?.stat()?.kind != NodeKind::Symlink)
    {
        return Ok(false);
    }
    directory.unlink(entry)?;
    Ok(true)
}
