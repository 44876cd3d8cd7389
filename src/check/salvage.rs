//! Salvaging: what still opens of damaged files, and of files that no name leads to, copied out of the volume.
//!
//! Invariant: a copy holds bytes that authenticated, and zeros in the ranges that its report names.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::format::config::Holes;
use crate::format::geometry::{PAGE_LEN, PAYLOAD, PAYLOAD_LEN, PageIndex};
use crate::format::header::HeaderPage;
use crate::storage::{Access, DiskFile, NodeKind, RawFile};

use super::finding::{Finding, Kind, Place, Severity};
use super::pages::{HOLE, Sealed, claimed_len, claimed_size, whole_pages};
use super::places::Name;
use super::{Checker, locked};

/// Where copies go whose plain paths are known, and where the others.
const NAMED: &str = "files";
const NAMELESS: &str = "unreachable";
/// Plain bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Range {
    /// From.
    pub offset: u64,
    /// How many.
    pub len: u64,
}

/// What became of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Salvaged {
    /// The path in the cipher directory.
    pub cipher: String,
    /// The path on a mount, if all names of it are known.
    pub plain: Option<String>,
    /// The copy; none if nothing of it opens.
    pub copy: Option<PathBuf>,
    /// Bytes in the copy.
    pub bytes: u64,
    /// What of them is zeros because it does not open.
    pub zeroed: Vec<Range>,
    /// Why there is no copy, or no whole one.
    pub why: Option<String>,
}

impl Checker<'_> {
    /// Copies what opens of the files in `findings`, and of those that no name leads to, to the empty directory `into`.
    ///
    /// # Errors
    /// Those of writing the copies; those of reading are in the report.
    pub fn salvage(&self, findings: &[Finding], into: &Path) -> io::Result<Vec<Salvaged>> {
        let damaged = findings.iter().filter(|finding| {
            matches!(finding.severity, Severity::Damage | Severity::Io)
                && !matches!(finding.kind, Kind::Xattr | Kind::SameId | Kind::DirectoryId)
        });
        let mut ciphers: BTreeSet<String> = damaged.map(|finding| finding.cipher.clone()).collect();
        ciphers.extend(std::mem::take(&mut *locked(&self.unreachable)));
        let mut salvaged = Vec::new();
        for cipher in ciphers {
            salvaged.extend(self.salvage_one(&cipher, into)?);
        }
        Ok(salvaged)
    }

    /// Nothing if it is no file.
    fn salvage_one(&self, cipher: &str, into: &Path) -> io::Result<Option<Salvaged>> {
        let Ok((dir, entry)) = self.find_cipher(cipher) else { return Ok(None) };
        let plain = match self.name_of(&dir, &entry) {
            Name::Plain(plain) => plain,
            Name::Broken(..) | Name::Stray => None,
        };
        let place = dir.place.entry(&entry, plain.as_deref());
        let mut report = Salvaged {
            cipher: cipher.to_owned(),
            plain: place.plain.as_ref().map(|plain| String::from_utf8_lossy(plain).into_owned()),
            copy: None,
            bytes: 0,
            zeroed: Vec::new(),
            why: None,
        };
        let Ok(node) = dir.node.lookup(&entry) else { return Ok(None) };
        if node.stat().map_or(true, |stat| stat.kind != NodeKind::File) {
            return Ok(None);
        }
        let opened = node.open_file(Access::Read).and_then(|fd| self.open_for_salvage(DiskFile::readable(fd)));
        match opened {
            Err(why) => report.why = Some(why.to_string()),
            Ok((sealed, size)) => copy_out(&sealed, size, &place, into, &mut report)?,
        }
        Ok(Some(report))
    }

    fn open_for_salvage(&self, file: DiskFile) -> io::Result<(Sealed, u64)> {
        let volume = self.volume.ok_or_else(|| io::Error::other("there is no key"))?;
        let mut page: HeaderPage = [0; PAGE_LEN];
        let disk_size = file.size()?;
        if file.read_at(&mut page, 0)? < PAGE_LEN {
            return Err(io::Error::other("the file has no header"));
        }
        let header = volume.ring.authenticate(&page).map_err(io::Error::other)?;
        let header = header.ok_or_else(|| io::Error::other("the header is zeros"))?;
        let keys = self.patience.open(&volume.ring, &header).map_err(io::Error::other)?.keys;
        let pages = whole_pages(disk_size);
        let size = match claimed_size(&file, disk_size) {
            Ok(Some(size)) => size.0,
            // Whatever the end was, whole pages are there.
            _ => match pages.checked_sub(1) {
                None => 0,
                Some(last) => {
                    let len = claimed_len(&file, PageIndex(last))?.unwrap_or(PAYLOAD_LEN);
                    last * PAYLOAD + len as u64
                }
            },
        };
        Ok((Sealed { file, keys, rules: self.rules(), pages }, size))
    }
}

/// Copies the pages that open; a file of which none does leaves no copy.
fn copy_out(sealed: &Sealed, size: u64, place: &Place, into: &Path, report: &mut Salvaged) -> io::Result<()> {
    let path = path_for(place, into);
    let copy = create(&path)?;
    let data = sealed.data()?;
    let len_of = |pages: &std::ops::Range<u64>| {
        let (start, end) = (size.min(pages.start * PAYLOAD), size.min(pages.end * PAYLOAD));
        end - start
    };
    if let Err(error) = copy.set_len(size) {
        std::fs::remove_file(&path)?;
        report.why = Some(format!("a copy cannot be of {size} bytes: {error}"));
        return Ok(());
    }
    let (mut opened, mut written) = (0_u64, Ok(()));
    // What takes no space in the file takes none in the copy.
    for hole in sealed.holes(&data) {
        if sealed.rules.holes == Holes::Deny {
            add_range(&mut report.zeroed, hole.start * PAYLOAD, len_of(&hole));
            report.why.get_or_insert_with(|| HOLE.to_owned());
        } else {
            opened += 1;
        }
    }
    for run in data {
        sealed.visit(run, |page, plain, fault| {
            let (offset, len) = (page * PAYLOAD, len_of(&(page..page + 1)));
            let short = usize::try_from(len).unwrap_or(0);
            let lost = fault.as_ref().is_some_and(|fault| fault.kind != Kind::EndMark);
            if let (Ok(()), false, Some(plain)) = (&written, lost, plain) {
                written = copy.write_all_at(&plain[..short], offset);
            }
            if lost {
                add_range(&mut report.zeroed, offset, len);
            } else {
                opened += 1;
            }
            if let Some(fault) = fault {
                report.why.get_or_insert(fault.what);
            }
        });
    }
    report.zeroed.sort_unstable_by_key(|range| range.offset);
    written?;
    if opened == 0 && sealed.pages > 0 {
        drop(copy);
        std::fs::remove_file(&path)?;
        report.zeroed.clear();
        return Ok(());
    }
    copy.sync_all()?;
    report.bytes = size;
    report.copy = Some(path);
    Ok(())
}

fn add_range(ranges: &mut Vec<Range>, offset: u64, len: u64) {
    match ranges.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len += len,
        _ => ranges.push(Range { offset, len }),
    }
}

/// Plain names hold no `/` and are not `..`; entries neither.
fn path_for(place: &Place, into: &Path) -> PathBuf {
    match &place.plain {
        Some(plain) => into.join(NAMED).join(OsStr::from_bytes(plain)),
        None => into.join(NAMELESS).join(&place.cipher),
    }
}

fn create(path: &Path) -> io::Result<File> {
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one() {
        let mut ranges = Vec::new();
        for (offset, len) in [(0, 4048), (4048, 4048), (12144, 7)] {
            add_range(&mut ranges, offset, len);
        }
        assert_eq!(ranges, [Range { offset: 0, len: 8096 }, Range { offset: 12144, len: 7 }]);
    }
}
