//! Sockets in the filesystem that are their owner's from the first moment.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::net::{bind, listen, socket_with};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that has no place yet. A process in its sandbox can make no other.
pub struct Unbound(OwnedFd);

impl Unbound {
    /// Makes one.
    ///
    /// # Errors
    /// Those of `socket(2)`.
    pub fn new() -> io::Result<Self> {
        Ok(Self(socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?))
    }

    /// Listens at `path` with mode 0600, whatever the umask is: an entry gets the mode of the socket that is bound to it.
    pub(super) fn listen_at(self, path: &Path) -> io::Result<UnixListener> {
        fchmod(&self.0, Mode::RUSR | Mode::WUSR)?;
        bind(&self.0, &SocketAddrUnix::new(path)?)?;
        listen(&self.0, BACKLOG)?;
        Ok(self.0.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_socket_is_its_owners_from_the_first_moment() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("socket");
        let _listener = Unbound::new().unwrap().listen_at(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
