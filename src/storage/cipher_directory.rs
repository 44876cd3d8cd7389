//! stub
use std::os::fd::*;
/// stub
pub struct CipherDirectory(OwnedFd, std::path::PathBuf);
impl CipherDirectory {
    /// s
    pub fn root_fd(&self) -> BorrowedFd<'_> { self.0.as_fd() }
    /// s
    pub fn path(&self) -> &std::path::Path { &self.1 }
}
