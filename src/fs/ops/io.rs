//! Reading, writing and syncing through an inode: content is kept per inode, so no handle is needed.

use std::ops::Range;
use std::sync::Arc;

use crate::fs::caller::Caller;
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::fs::state::answer::{Answer, ReadAnswer};
use crate::fs::state::inode::Inode;
use crate::fs::state::sync_errors::Handle;
use crate::storage::Access;

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

    /// A number for a handle that is opened now.
    pub fn new_handle(&self) -> Handle {
        self.handles.next()
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
