//! The control socket: one per mount, on which the process behind it answers.
//!
//! A request is one line of JSON, `{"command":"status"}`, `measures`, `lock`, `unlock`, `sync`, `keys`, `rekey` (with a `path`, and a `run`), `header` (with a `path`, `judged` and `new`) or `wait`, and so is every answer. `wait` is
//! answered with one line at once and with a second one, [`Ended`], when the mount has ended; the connection then closes
//! with the process.
//!
//! Invariants:
//! * the directory of the sockets belongs to the user and is closed to others: who can connect may ask;
//! * no client can make the mount wait: each has a thread of its own, a bounded number of them, bounded lines and deadlines.

mod client;
mod server;

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use client::{Client, ClientError, Waiting};
pub use server::{ControlSocket, Farewell};

/// The longest line of either side.
const MAX_LINE: u64 = 65536;

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
enum Request {
    Status,
    Measures,
    Lock,
    Unlock,
    Sync,
    Keys,
    Rekey {
        path: String,
        /// In hexadecimal.
        #[serde(default)]
        run: Option<String>,
    },
    Header {
        path: String,
        judged: String,
        new: String,
    },
    Wait,
}

/// What a mount is asked to do. It answers with its status after that, but for [`Self::Measures`], [`Self::Rekey`] and [`Self::Header`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Nothing but to tell its status.
    Status,
    /// To tell its status and everything that it counts.
    Measures,
    /// To drop all keys.
    Lock,
    /// To let keys be had again.
    Unlock,
    /// To make everything durable. The answer has an `error` if that failed.
    Sync,
    /// To read the volume's list of wrapping keys anew.
    Keys,
    /// To seal a file under a new data key. The answer is what became of it.
    Rekey {
        /// Its path in the cipher directory.
        path: String,
        /// What it is a part of, in hexadecimal.
        run: Option<String>,
    },
    /// To put a header page in the place of another. The answer is whether it did.
    Header {
        /// The file's path in the cipher directory.
        path: String,
        /// The page that it must have, in Base64.
        judged: String,
        /// The one that it is to have.
        new: String,
    },
}

/// How a mount ended; the last word to those who wait.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// What went wrong; nothing if every file has settled.
    pub error: Option<String>,
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// There is no place for it.
    #[error("XDG_RUNTIME_DIR is not set, and only root can do without it")]
    NoRuntimeDirectory,
    /// Its directory is not safe.
    #[error("{0} must be a directory of this user's that is closed to others (mode 0700)")]
    UnsafeDirectory(PathBuf),
    /// Another process answers on it.
    #[error("another process serves this mount point")]
    InUse,
    /// It cannot be made.
    #[error("{path}: {error}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Where this user's sockets lie: `/run/kmsfs` for root, else below the user's runtime directory.
///
/// # Errors
/// [`ControlError::NoRuntimeDirectory`].
pub fn directory(runtime_directory: Option<&Path>) -> Result<PathBuf, ControlError> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/run/kmsfs"));
    }
    runtime_directory.map(|path| path.join("kmsfs")).ok_or(ControlError::NoRuntimeDirectory)
}

/// The socket of the mount at the canonical path `mountpoint`.
fn socket_path(directory: &Path, mountpoint: &Path) -> PathBuf {
    let hash = Sha256::digest(mountpoint.as_os_str().as_bytes());
    let name: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    directory.join(name)
}

/// Makes the directory of the sockets if it is missing, and checks that it is only ours.
fn make_directory(directory: &Path) -> Result<(), ControlError> {
    let io = |error| ControlError::Io { path: directory.to_owned(), error };
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io(error)),
        _ => {}
    }
    let found = fs::symlink_metadata(directory).map_err(io)?;
    let ours = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o077 == 0;
    if ours { Ok(()) } else { Err(ControlError::UnsafeDirectory(directory.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn socket(directory: &Path) -> ControlSocket {
        ControlSocket::bind(directory, Path::new("/mnt"), |_| r#"{"answer":42}"#.to_owned()).unwrap()
    }

    #[test]
    fn answers_what_the_handler_says() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let _socket = socket(&directory);
        let status = Client::connect(&directory, Path::new("/mnt")).unwrap().tell(Ask::Status, DEADLINE).unwrap();
        assert_eq!(status, r#"{"answer":42}"#);
        assert!(matches!(Client::connect(&directory, Path::new("/other")), Err(ClientError::NotServed)));
    }

    #[test]
    fn waiting_ends_with_the_last_word_and_the_socket_is_gone() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let socket = socket(&directory);
        let waiting = Client::connect(&directory, Path::new("/mnt")).unwrap().wait(DEADLINE).unwrap();
        let ended = Ended { error: Some("disk on fire".into()) };
        let farewell = socket.finish(&ended);
        assert!(matches!(Client::connect(&directory, Path::new("/mnt")), Err(ClientError::NotServed)));
        drop(farewell);
        assert_eq!(waiting.ended(DEADLINE).unwrap(), ended);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn those_who_wait_are_bounded_and_those_who_have_left_do_not_count() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let _socket = socket(&directory);
        let wait = || Client::connect(&directory, Path::new("/mnt")).unwrap().wait(DEADLINE);
        for _ in 0..100 {
            drop(wait().unwrap());
        }
        let waiting: Vec<_> = std::iter::from_fn(|| wait().ok()).take(200).collect();
        assert!(waiting.len() < 200);
        drop(waiting);
        let until = std::time::Instant::now() + DEADLINE;
        while wait().is_err() {
            assert!(std::time::Instant::now() < until);
        }
    }

    #[test]
    fn waiting_has_a_deadline() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let _socket = socket(&directory);
        let waiting = Client::connect(&directory, Path::new("/mnt")).unwrap().wait(DEADLINE).unwrap();
        assert!(matches!(waiting.ended(Duration::from_millis(20)), Err(ClientError::Deadline)));
    }

    #[test]
    fn a_second_socket_is_refused_and_a_dead_one_replaced() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let first = socket(&directory);
        let second = ControlSocket::bind(&directory, Path::new("/mnt"), |_| String::new());
        assert!(matches!(second, Err(ControlError::InUse)));
        drop(first);
        // A socket file that nobody listens on, as a killed process leaves it.
        drop(std::os::unix::net::UnixListener::bind(socket_path(&directory, Path::new("/mnt"))).unwrap());
        drop(socket(&directory));
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let bound = ControlSocket::bind(home.path(), Path::new("/mnt"), |_| String::new());
        assert!(matches!(bound, Err(ControlError::UnsafeDirectory(_))));
    }

    #[test]
    fn nonsense_is_answered_and_does_no_harm() {
        use std::io::{Read, Write};
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let _socket = socket(&directory);
        for nonsense in [
            &b"nonsense\n"[..],
            b"{\"command\":\"format\"}\n",
            b"{\"command\":\"status\",\"all\":true}\n",
            b"{\"command\":\"lock\",\"path\":\"a\"}\n",
            b"\xff\n",
            &[b'x'; 70_000],
        ] {
            let mut stream =
                std::os::unix::net::UnixStream::connect(socket_path(&directory, Path::new("/mnt"))).unwrap();
            // The server may stop reading an endless line before it is written.
            let _ = stream.write_all(nonsense);
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            assert!(answer.is_empty() || answer.starts_with(r#"{"error":"#), "{answer}");
        }
        Client::connect(&directory, Path::new("/mnt")).unwrap().tell(Ask::Status, DEADLINE).unwrap();
    }
}
