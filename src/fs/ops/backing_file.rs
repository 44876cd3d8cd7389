//! The backing file of an inode, and the header in it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::content::ContentError;
use crate::format::config::End;
use crate::format::geometry::{ImpossibleSize, PAGE_LEN};
use crate::format::header::HeaderPage;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::state::inode::Inode;
use crate::keys::AuthenticHeader;
use crate::storage::{Access, DiskFile, NodeKind, RawFile};

/// What was found of a file's header.
pub(in crate::fs) enum Found {
    /// The file is empty and has none.
    None,
    /// One that authenticates.
    Header(Box<AuthenticHeader>),
}

impl Filesystem {
    /// Reads the header and checks its MAC.
    pub(in crate::fs) fn find_header(&self, inode: &Inode, file: &DiskFile) -> Result<Found, Error> {
        if inode.node.is_new() && file.size()? == 0 {
            return Ok(Found::None);
        }
        let mut page: HeaderPage = [0; PAGE_LEN];
        let header = match file.read_at(&mut page, 0)? {
            0 => None,
            PAGE_LEN => self.authenticate(inode, &page)?,
            len => return Err(ContentError::from(ImpossibleSize(len as u64)).into()),
        };
        match header {
            Some(header) => Ok(Found::Header(Box::new(header))),
            None if self.rules().end == End::Strict => Err(Error::NoHeader),
            None => Ok(Found::None),
        }
    }

    fn authenticate(&self, inode: &Inode, page: &HeaderPage) -> Result<Option<AuthenticHeader>, Error> {
        let header = self.volume.ring.authenticate(page)?;
        if header.is_none() && !inode.has_zero_header.swap(true, Ordering::Relaxed) {
            inode.is_without_size.store(self.kernel().sets_mtime(), Ordering::Relaxed);
            let place = || inode.node.describe();
            self.alarm("header", || format!("{}: a header of zeros never became durable: the file is empty", place()));
        }
        Ok(header)
    }

    /// Opens the backing file: for writing wherever that is possible, since with a writeback cache the kernel writes through
    /// any handle of a file.
    pub(in crate::fs) fn open_backing(&self, inode: &Inode, access: Access) -> Result<Arc<DiskFile>, Error> {
        if inode.kind != NodeKind::File {
            return Err(Error::WrongKind);
        }
        let open = |access| self.descriptors.retry_on_emfile(|| inode.node.open_file(access));
        let file = if self.options.read_only {
            match self.log_instead(inode)? {
                Some(log) => log,
                None => DiskFile::readable(open(Access::Read)?),
            }
        } else {
            match (open(Access::ReadWrite), access) {
                (Ok(fd), _) => DiskFile::writable(fd),
                (Err(_), Access::Read) => DiskFile::readable(self.open_unreadable(inode, Access::Read)?),
                (Err(_), Access::ReadWrite) => DiskFile::writable(self.open_unreadable(inode, Access::ReadWrite)?),
            }
        };
        Ok(Arc::new(file))
    }

    /// The owner may write a file that its mode keeps them from reading; a page is read before it is written.
    fn open_unreadable(&self, inode: &Inode, access: Access) -> io::Result<Arc<OwnedFd>> {
        match inode.node.open_file(access) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                // A mode that a program sets meanwhile must not be undone.
                let _as_found = inode.own_privileges();
                let stat = inode.node.stat()?;
                if stat.uid != self.backing.user { Err(error) } else { inode.node.open_own_file(stat.mode) }
            }
            result => result,
        }
    }

    /// What is to be read in the place of a file that is half way, where nothing may be written.
    fn log_instead(&self, inode: &Inode) -> Result<Option<DiskFile>, Error> {
        if !self.rekeying.pending.is_any() {
            return Ok(None);
        }
        let log = self.rekeying.pending.logs().instead.get(&inode.id).copied();
        // A mount beside this process may have finished the file meanwhile.
        log.map_or(Ok(None), |log| Ok(self.backing.redo_logs.read(&log)?))
    }
}
