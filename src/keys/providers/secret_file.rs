//! Files that hold one secret: a token, a PIN, an identity.
//!
//! Invariants: what is read is wiped when dropped and never part of a message; no more is read than such a secret can be.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use zeroize::Zeroizing;

use super::super::{ProviderError, ProviderErrorKind};

/// Who else than its owner may be able to read a file.
#[derive(Clone, Copy, PartialEq, Eq)]
#[allow(dead_code)] // each by some of the providers that may be left out
pub(super) enum Readers {
    /// Nobody: it holds a key.
    OwnerOnly,
    /// Whoever it was given to, as an agent or a service manager does.
    AsGiven,
}

/// All of the file at `path`, at most `limit` bytes. `what` says what it holds, as in "the PIN".
///
/// # Errors
/// `Credentials` if it cannot be read, `Misconfigured` if others can read it who must not.
pub(super) fn read(
    path: &Path,
    what: &str,
    limit: usize,
    readers: Readers,
) -> Result<Zeroizing<Vec<u8>>, ProviderError> {
    let fail = |kind, why: &str| ProviderError::new(kind, format!("{what}: {}: {why}", path.display()));
    let unreadable = |error: std::io::Error| fail(ProviderErrorKind::Credentials, &error.to_string());
    // Not blocking: opening a pipe that nobody writes to must not hang.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| unreadable(error.into()))?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(fail(ProviderErrorKind::Misconfigured, "is not a regular file"));
    }
    if readers == Readers::OwnerOnly && metadata.mode() & 0o077 != 0 {
        let why = format!("has mode {:04o}, so that others can use it: chmod 600 it", metadata.mode() & 0o7777);
        return Err(fail(ProviderErrorKind::Misconfigured, &why));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 1));
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > limit {
        return Err(fail(ProviderErrorKind::Misconfigured, &format!("is longer than {limit} bytes")));
    }
    Ok(bytes)
}

/// The one line that is all of the file at `path`, without the white space around it: printable, not empty.
///
/// # Errors
/// As [`read`], and `Credentials` if it is anything else.
#[cfg(any(feature = "pkcs11", feature = "vault"))]
pub(super) fn read_line(path: &Path, what: &str, limit: usize) -> Result<Zeroizing<String>, ProviderError> {
    let bytes = read(path, what, limit, Readers::AsGiven)?;
    let text = std::str::from_utf8(&bytes).unwrap_or_default().trim();
    if text.is_empty() || text.contains(char::is_control) {
        let message = format!("{what}: {}: expected one line of text", path.display());
        return Err(ProviderError::new(ProviderErrorKind::Credentials, message));
    }
    Ok(Zeroizing::new(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[cfg(any(feature = "pkcs11", feature = "vault"))]
    #[test]
    fn what_is_no_secret_is_refused_without_repeating_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        let line = || read_line(&path, "the token", 16).map(|line| line.to_string());
        assert_eq!(line().unwrap_err().kind, ProviderErrorKind::Credentials);
        for (content, expected) in
            [("s.abc\n", Some("s.abc")), (" s.abc ", Some("s.abc")), ("\n", None), ("a\nb", None)]
        {
            std::fs::write(&path, content).unwrap();
            assert_eq!(line().ok().as_deref(), expected, "{content:?}");
        }
        std::fs::write(&path, [b'!'; 17]).unwrap();
        let error = line().unwrap_err();
        assert!(error.kind == ProviderErrorKind::Misconfigured && !error.message.contains('!'), "{error}");
        assert_eq!(read_line(directory.path(), "x", 16).unwrap_err().kind, ProviderErrorKind::Misconfigured);
    }

    #[test]
    fn a_key_is_its_owners_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, "k").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(read(&path, "the key", 16, Readers::AsGiven).is_ok());
        assert!(read(&path, "the key", 16, Readers::OwnerOnly).unwrap_err().message.contains("0640"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(**read(&path, "the key", 16, Readers::OwnerOnly).unwrap(), *b"k");
    }
}
