//! Making a file unreadable for good: what its content key is made of lies in its header and nowhere else.

use std::io;

use crate::format::geometry::{PAGE_LEN, PAGE_SIZE};
use crate::fs::error::Error;
use crate::fs::filesystem::Filesystem;
use crate::fs::kernel::InodeId;
use crate::storage::{Access, RawFile};

impl Filesystem {
    /// Destroys the header of a regular file, with its wrapped data key and the file id: the bytes are overwritten in place,
    /// that is made durable, and then they become a hole where the filesystem has holes. What the disk or the filesystem keeps
    /// elsewhere is not reached. The file must not be in use.
    ///
    /// # Errors
    /// [`Error`].
    pub fn destroy_header(&self, id: InodeId) -> Result<(), Error> {
        self.check_writable()?;
        let inode = self.inodes.get(id)?;
        inode.slot().close();
        let file = self.open_backing(&inode, Access::ReadWrite)?;
        let len = usize::try_from(file.size()?.min(PAGE_SIZE)).unwrap_or(PAGE_LEN);
        if len == 0 {
            return Ok(());
        }
        file.write_at(&[0x55; PAGE_LEN][..len], 0)?;
        file.sync(true)?;
        match file.punch(0, len as u64) {
            Err(error) if error.kind() != io::ErrorKind::Unsupported => return Err(error.into()),
            _ => {}
        }
        Ok(file.sync(true)?)
    }
}
