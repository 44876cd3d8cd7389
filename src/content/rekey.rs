//! Sealing a whole file anew, under keys of another data key. `docs/FORMAT.md` section 6.
//!
//! The new file is first written whole beside the old one, as a redo log, and made durable. Only then is the old one
//! overwritten, page by page, in place: its inode, names, holes and attributes stay. Whoever finds a log that was completed
//! applies it again, however often, before anything else is done with the file.

use std::io;

use crate::crypto::{FileKeys, random_array};
use crate::format::geometry::{PAGE_LEN, PAGE_SIZE, PageIndex};
use crate::format::header::HeaderPage;
use crate::format::page;
use crate::storage::RawFile;

use super::buffers::Plain;
use super::pages::{self, Opened};
use super::ranges::Range;
use super::{Content, ContentError};

/// Pages read, sealed and written at a time.
const BATCH: usize = 256;

/// What the keeper of a redo log does with it, while nobody uses the file.
pub trait KeepsLog {
    /// The log: an empty file that means nothing yet.
    fn file(&self) -> &dyn RawFile;

    /// Whether this host may still write: asked again and again, since a large file takes long.
    ///
    /// # Errors
    /// It may not.
    fn check(&self) -> io::Result<()>;

    /// Makes the log, whose content is durable, one that is found after a crash. If this fails it never is, or the file is closed
    /// to everybody.
    ///
    /// # Errors
    /// [`ContentError`].
    fn commit(&self) -> Result<(), ContentError>;

    /// The log has been applied: it is to go. Or it could not be, and the file is to be closed to everybody until it has been.
    fn applied(&self, applied: &io::Result<()>);
}

impl Content {
    /// Seals the file under `keys`, whose header page is `header`, by way of `log`. Nothing else is done with the file meanwhile,
    /// and once the log was to be committed this content ends: whether or not that succeeds, the file must be opened again.
    ///
    /// # Errors
    /// [`ContentError`]. Before the commit the file is as it was.
    pub fn rekey(&self, keys: &FileKeys, header: &HeaderPage, log: &dyn KeepsLog) -> Result<(), ContentError> {
        let (_nobody, _) = self.lock_for_change(|_| Range::ALL)?;
        // The log is durable before the file is touched; so must be what it says of the file's size and header.
        self.file.sync(true)?;
        self.seal_into(keys, header, log)?;
        log.file().sync(true)?;
        let applied = log.commit().and_then(|()| {
            let applied = apply_log(log.file(), self.file.as_ref(), &|| log.check());
            log.applied(&applied);
            Ok(applied?)
        });
        self.end();
        applied
    }

    fn seal_into(&self, keys: &FileKeys, header: &HeaderPage, keeper: &dyn KeepsLog) -> Result<(), ContentError> {
        let log = keeper.file();
        let size = self.file.size()?;
        log.set_size(size)?;
        log.write_at(&header[..], 0)?;
        let pages = (size / PAGE_SIZE).saturating_sub(1);
        let mut disk = vec![0; BATCH * PAGE_LEN];
        let mut plain = Plain::zeros();
        let (mut old, mut new) = (self.keys()?.session(), keys.session());
        let base: [u8; 24] = random_array();
        let mut first = 0;
        while first < pages {
            let count = usize::try_from(pages - first).map_or(BATCH, |left| left.min(BATCH));
            let disk = &mut disk[..count * PAGE_LEN];
            let offset = PageIndex(first).disk().0;
            if self.file.read_at(disk, offset)? < disk.len() {
                return Err(ContentError::Cut { page: first });
            }
            for (page, index) in pages::each_mut(disk).zip((first..).map(PageIndex)) {
                if let Opened::Sealed(trailer) = pages::open(&mut old, index, page, &mut plain[..])? {
                    pages::seal(&mut new, &page::nonce(&base, index.0), index, trailer, &plain[..], page);
                }
            }
            keeper.check()?;
            write_pages(log, disk, offset)?;
            first += count as u64;
        }
        Ok(())
    }
}

/// Makes `file` what `log` says. Of the same log it can be done any number of times. The header comes last, when all pages are
/// durable: a file that has the log's header needs the log no more, and may have been written since. `check` is asked before each write.
///
/// # Errors
/// Those of the backing filesystem and of `check`; then a part of it may have been done.
pub fn apply_log(log: &dyn RawFile, file: &dyn RawFile, check: &dyn Fn() -> io::Result<()>) -> io::Result<()> {
    let (mut disk, end) = (vec![0; BATCH * PAGE_LEN], log.size()?);
    let mut offset = PAGE_SIZE;
    while offset < end {
        let read = log.read_at(&mut disk, offset)?;
        // What comes after the last whole page is a hole that only makes the size.
        let whole = read / PAGE_LEN * PAGE_LEN;
        check()?;
        write_pages(file, &disk[..whole], offset)?;
        if read < disk.len() {
            break;
        }
        offset += whole as u64;
    }
    file.sync(true)?;
    if log.read_at(&mut disk[..PAGE_LEN], 0)? < PAGE_LEN {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    check()?;
    file.write_at(&disk[..PAGE_LEN], 0)?;
    file.sync(true)
}

/// Takes from `log` what `file`, which has its header and so these `keys`, has not got of it: an earlier release wrote the header
/// first. A page that opens may have been written since, and stays.
///
/// # Errors
/// [`ContentError::Io`].
pub fn complete(log: &dyn RawFile, file: &dyn RawFile, keys: &FileKeys) -> Result<(), ContentError> {
    let pages = (file.size()?.min(log.size()?) / PAGE_SIZE).saturating_sub(1);
    let (mut there, mut wanted) = ([0; PAGE_LEN], [0; PAGE_LEN]);
    let (mut session, mut plain) = (keys.session(), Plain::zeros());
    for index in (0..pages).map(PageIndex) {
        let offset = index.disk().0;
        if file.read_at(&mut there, offset)? < PAGE_LEN || log.read_at(&mut wanted, offset)? < PAGE_LEN {
            break;
        }
        let opened = pages::open(&mut session, index, &there, &mut plain[..]);
        if matches!(opened, Err(ContentError::Unauthentic { .. })) {
            file.write_at(&wanted, offset)?;
        }
    }
    Ok(file.sync(true)?)
}

/// Writes pages that are not holes; where they are, the file has holes.
fn write_pages(file: &dyn RawFile, disk: &[u8], offset: u64) -> io::Result<()> {
    let is_hole = |at: usize| disk[at..].first_chunk().is_some_and(page::is_hole);
    let mut at = 0;
    while at < disk.len() {
        let end = (at..disk.len()).step_by(PAGE_LEN).find(|at| is_hole(*at)).unwrap_or(disk.len());
        if end > at {
            file.write_at(&disk[at..end], offset + at as u64)?;
        }
        at = end + PAGE_LEN;
    }
    Ok(())
}
