//! Reading, writing and syncing through an inode: content is kept per inode, so no handle is needed.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::content::ContentError;
use crate::fs::caller::Caller;
use crate::fs::error::{Error, io_errno, lacks_descriptors};
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::{Answer, ReadAnswer};
use crate::fs::state::inode::Inode;
use crate::fs::state::sync_errors::Handle;
use crate::storage::{Access, RawFile};

use super::setid::drop_set_ids;

impl Filesystem {
    /// Reads at `offset` into `plain`, and returns how many bytes there were.
    ///
    /// # Errors
    /// [`Error`]; the content of `plain` must then not be used.
    pub fn read(&self, id: InodeId, offset: u64, plain: &mut [u8]) -> Result<usize, Error> {
        self.read_at(&self.inodes.get(id)?, offset, plain)
    }

    fn read_at(&self, inode: &Arc<Inode>, offset: u64, plain: &mut [u8]) -> Result<usize, Error> {
        self.work.last_use.note();
        self.on_content(inode, Access::Read, |open| Ok(open.content.read(offset, plain)?))
    }

    /// The first range from `offset` on that may hold anything but zeros; none if there is nothing else up to the end.
    ///
    /// # Errors
    /// [`Error`].
    pub fn data_from(&self, id: InodeId, offset: u64) -> Result<Option<Range<u64>>, Error> {
        let inode = self.inodes.get(id)?;
        self.on_content(&inode, Access::Read, |open| Ok(open.content.data_from(offset)?))
    }

    /// Makes everything durable that was changed so far, and lets all files that rest tell their sizes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync_everything(&self) -> Result<(), Error> {
        self.check_tenure()?;
        // Held from the beginning: it hears of every write that fails below, whoever else hears of it.
        let below = self.inodes.root().node.filesystem()?;
        self.flush_dir_syncs()?;
        // A first look settles, a second one closes.
        self.settle_rested(true)?;
        self.settle_rested(false)?;
        Ok(below.sync()?)
    }

    /// Writes at `offset`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn write(&self, id: InodeId, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.write_at(&self.inodes.get(id)?, offset, bytes)
    }

    fn write_at(&self, inode: &Arc<Inode>, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.work.last_use.note();
        self.check_tenure()?;
        self.keep_mtime(inode)?;
        self.on_content(inode, Access::ReadWrite, |open| {
            self.ensure_keys(inode, open)?;
            Ok(open.content.write(offset, bytes)?)
        })
    }

    /// Like [`Self::read`] for a thread that serves the kernel: `plain` is filled and answered at once, unless a provider far
    /// away has to be asked first; then the answer comes from another thread.
    pub fn answer_read(self: &Arc<Self>, id: InodeId, offset: u64, plain: &mut [u8], answer: ReadAnswer) {
        let inode = match self.inodes.get(id) {
            Ok(inode) => inode,
            Err(error) => return answer(Err(error)),
        };
        if !self.must_wait(&inode, Access::Read) {
            let read = self.read_at(&inode, offset, plain);
            return answer(read.map(|len| &plain[..len]));
        }
        let (fs, len) = (Arc::clone(self), plain.len());
        self.pools.keys.run(move |turn| {
            let mut plain = vec![0; len];
            let read = turn.and_then(|()| fs.read_at(&inode, offset, &mut plain));
            answer(read.map(|len| &plain[..len]));
        });
    }

    /// Like [`Self::write`] for a thread that serves the kernel; see [`Self::answer_read`]. The kernel names the process as
    /// `unprivileged` if it has found that this one may not keep set-id bits.
    pub fn answer_write(
        self: &Arc<Self>,
        id: InodeId,
        offset: u64,
        bytes: &[u8],
        unprivileged: Option<Caller>,
        answer: Answer<()>,
    ) {
        let found = self.inodes.get(id).and_then(|inode| {
            if let Some(caller) = unprivileged {
                drop_set_ids(&inode, caller)?;
            }
            self.drop_capabilities(&inode)?;
            Ok(inode)
        });
        match found {
            Ok(inode) => self.write_or_wait(inode, offset, bytes, answer),
            Err(error) => answer(Err(error)),
        }
    }

    fn write_or_wait(self: &Arc<Self>, inode: Arc<Inode>, offset: u64, bytes: &[u8], answer: Answer<()>) {
        if self.fills_before(&inode, offset, bytes.len()) {
            let (fs, same, bytes) = (Arc::clone(self), Arc::clone(&inode), bytes.to_vec());
            let write = move |filled: Result<(), Error>| match filled {
                Ok(()) => fs.write_or_wait(same, offset, &bytes, answer),
                Err(error) => answer(Err(error)),
            };
            return self.fill(inode, offset, Caller::KERNEL, Box::new(write));
        }
        if !self.must_wait(&inode, Access::ReadWrite) {
            return answer(self.write_at(&inode, offset, bytes));
        }
        let (fs, bytes) = (Arc::clone(self), bytes.to_vec());
        self.pools.keys.run(move |turn| answer(turn.and_then(|()| fs.write_at(&inode, offset, &bytes))));
    }

    /// Whether an operation on the content would wait for a provider that is far away.
    fn must_wait(&self, inode: &Arc<Inode>, access: Access) -> bool {
        self.volume.ring.is_remote() && matches!(self.open_at_once(inode, access), Ok(None))
    }

    /// Makes a file durable: its content, and with `metadata` its attributes. Needs no key.
    ///
    /// # Errors
    /// [`Error`].
    pub fn sync(&self, id: InodeId, metadata: bool) -> Result<(), Error> {
        self.sync_for(id, self.new_handle(), metadata)
    }

    /// Like [`Self::sync`] on behalf of `handle`, which hears every error of the disk that any sync has met since it was opened.
    ///
    /// # Errors
    /// [`Error`].
    pub fn sync_for(&self, id: InodeId, handle: Handle, metadata: bool) -> Result<(), Error> {
        self.check_tenure()?;
        let inode = self.inodes.get(id)?;
        self.tell_space(&inode, true);
        let synced = self.sync_inode(&inode, metadata);
        let unheard = inode.slot().errors().hear(handle, self.new_handle());
        match unheard {
            Some(error) if synced.is_ok() => Err(error.into()),
            _ => synced,
        }
    }

    fn sync_inode(&self, inode: &Inode, metadata: bool) -> Result<(), Error> {
        if metadata {
            drop(inode.write_late_mtime()?);
        }
        self.flush_dir_syncs()?;
        // The kernel has handed over what it had.
        inode.ledger.confirm();
        loop {
            let open = inode.slot().current();
            let synced = match open {
                Some(open) => open.content.sync(metadata).map_err(Error::from),
                None => {
                    let file = self.open_backing(inode, Access::Read)?;
                    let synced = file.sync(metadata);
                    inode.slot().note_told(&file);
                    synced.map_err(Error::from)
                }
            };
            if !matches!(synced, Err(Error::Content(ContentError::Retired))) {
                return synced;
            }
        }
    }

    /// Makes everything on the backing filesystem durable.
    pub(in crate::fs) fn sync_filesystem(&self) -> io::Result<()> {
        self.descriptors.with_reserve(|| self.inodes.root().node.sync_filesystem())
    }

    /// A number for a handle that is opened now.
    pub fn new_handle(&self) -> Handle {
        self.handles.next()
    }

    /// The disk has refused something that may belong to any file: everybody who has one open hears of it.
    pub(in crate::fs) fn note_for_all(&self, error: &io::Error) {
        if lacks_descriptors(error) {
            // The disk has not been asked.
            return;
        }
        let errno = io_errno(error);
        for inode in self.inodes.all() {
            let mut slot = inode.slot();
            if slot.handles > 0 {
                slot.errors().note(errno);
            }
        }
        self.handles.directories.note(errno);
    }

    /// A kernel that writes back later has set the modification time when the program wrote; this write must not set
    /// another one, even if the kernel found that its time had not changed and need not be sent.
    pub(in crate::fs) fn keep_mtime(&self, inode: &Inode) -> Result<(), Error> {
        if !self.kernel().sets_mtime() {
            return Ok(());
        }
        let mut late = inode.late_mtime();
        if late.is_none() {
            *late = Some(inode.node.stat()?.mtime);
        }
        Ok(())
    }
}
