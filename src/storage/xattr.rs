//! Extended attributes of a held inode.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;

use rustix::fs::{self, XattrFlags};
use rustix::io::Errno;

use super::Node;

/// What setting an attribute requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XattrMode {
    /// Nothing.
    Any,
    /// It must not be there.
    Create,
    /// It must be there.
    Replace,
}

/// The attribute that holds a file's SELinux label.
pub const LABEL: &[u8] = b"security.selinux";

/// Whether this host may have SELinux; it has if that cannot be told. Looked at once.
#[must_use]
pub fn host_may_label() -> bool {
    static MAY: OnceLock<bool> = OnceLock::new();
    let look = || std::fs::read_to_string("/proc/filesystems").map_or(true, |known| known.contains("selinuxfs"));
    *MAY.get_or_init(look)
}

/// Most attributes are short.
const USUAL_LEN: usize = 256;

impl Node {
    /// The value of the attribute `name`.
    ///
    /// # Errors
    /// Those of `getxattr(2)`; `ENODATA` if there is none.
    pub fn xattr(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        let path = self.magic_path();
        grow_until_it_fits(|buffer| fs::getxattr(path.as_str(), name, buffer))
    }

    /// The names of all attributes, each ended by a NUL.
    ///
    /// # Errors
    /// Those of `listxattr(2)`.
    pub fn xattr_names(&self) -> io::Result<Vec<u8>> {
        let path = self.magic_path();
        grow_until_it_fits(|buffer| fs::listxattr(path.as_str(), buffer))
    }

    /// Sets the attribute `name`.
    ///
    /// # Errors
    /// Those of `setxattr(2)`.
    pub fn set_xattr(&self, name: &[u8], value: &[u8], mode: XattrMode) -> io::Result<()> {
        let flags = match mode {
            XattrMode::Any => XattrFlags::empty(),
            XattrMode::Create => XattrFlags::CREATE,
            XattrMode::Replace => XattrFlags::REPLACE,
        };
        Ok(fs::setxattr(self.magic_path().as_str(), name, value, flags)?)
    }

    /// Removes the attribute `name`.
    ///
    /// # Errors
    /// Those of `removexattr(2)`.
    pub fn remove_xattr(&self, name: &[u8]) -> io::Result<()> {
        Ok(fs::removexattr(self.magic_path().as_str(), name)?)
    }

    /// Leads to the pinned inode itself, a symlink too. A descriptor that only pins cannot be asked for attributes.
    fn magic_path(&self) -> String {
        format!("/proc/self/fd/{}", self.as_fd().as_raw_fd())
    }
}

/// What `read` gives may grow between asking for its length and reading it.
fn grow_until_it_fits(read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; USUAL_LEN];
    loop {
        match read(&mut buffer[..]) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(buffer);
            }
            Err(Errno::RANGE) => {
                let len = read(&mut [])?;
                buffer.resize(len.max(buffer.len() + 1), 0);
            }
            Err(error) => return Err(error.into()),
        }
    }
}
