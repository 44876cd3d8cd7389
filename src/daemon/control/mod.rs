//! The control socket: one per mount, named after its device, on which the process behind it answers.
//!
//! A request is one line of JSON, `{"command":"status"}`, `measures`, `lock`, `unlock`, `sync`, `keys`, `end`, `rekey` (with a `path`, and a `run`), `header` (with a `path`, `judged` and `new`) or `wait`, and so is every answer. `wait` is
//! answered with one line at once and with a second one, [`Ended`], when the mount has ended; the connection then closes
//! with the process.
//!
//! Invariants:
//! * the directory of the sockets belongs to the user and is closed to others: who can connect may ask;
//! * no client can make the mount wait: each has a thread of its own, a bounded number of them, bounded lines and deadlines.

mod client;
mod place;
mod server;

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use client::{Client, ClientError, Waiting};
pub use place::{directory, find};
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
    End,
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
    /// To end, whoever still has the mount, once everything is durable.
    End,
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
    #[error("the mount would lie over every place for it")]
    NoDirectory,
    /// Its directory is not safe.
    #[error("{0} must be a directory of this user's that is closed to others (mode 0700)")]
    UnsafeDirectory(PathBuf),
    /// No socket in it could have an address.
    #[error("{0}: too long a path for a socket")]
    LongPath(PathBuf),
    /// It cannot be made.
    #[error("{path}: {error}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::own_socket::Unbound;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::time::Duration;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn socket(directory: &Path) -> ControlSocket {
        let socket =
            ControlSocket::bind(Unbound::new().unwrap(), directory, |_| r#"{"answer":42}"#.to_owned()).unwrap();
        socket.name("0:4711", Path::new("/mnt")).unwrap();
        socket
    }

    fn connect(directory: &Path) -> Result<Client, ClientError> {
        Client::connect_in(&[directory.to_owned()], "0:4711", rustix::process::geteuid().as_raw())
    }

    #[test]
    fn answers_what_the_handler_says() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let _socket = socket(&directory);
        let status = connect(&directory).unwrap().tell(Ask::Status, DEADLINE).unwrap();
        assert_eq!(status, r#"{"answer":42}"#);
        let other = Client::connect_in(std::slice::from_ref(&directory), "0:4712", rustix::process::geteuid().as_raw());
        assert!(matches!(other, Err(ClientError::NotServed)));
        let stranger =
            Client::connect_in(std::slice::from_ref(&directory), "0:4711", rustix::process::geteuid().as_raw() + 1);
        assert!(matches!(stranger, Err(ClientError::NotServed)));
    }

    #[test]
    fn waiting_ends_with_the_last_word_and_the_socket_is_gone() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let socket = socket(&directory);
        let mut waiting = connect(&directory).unwrap().wait(DEADLINE).unwrap();
        let ended = Ended { error: Some("disk on fire".into()) };
        let farewell = socket.finish(&ended);
        assert!(matches!(connect(&directory), Err(ClientError::NotServed)));
        drop(farewell);
        assert_eq!(waiting.ended(DEADLINE).unwrap(), ended);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn those_who_wait_are_bounded_and_those_who_have_left_do_not_count() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        let _socket = socket(&directory);
        let wait = || connect(&directory).unwrap().wait(DEADLINE);
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
        let mut waiting = connect(&directory).unwrap().wait(DEADLINE).unwrap();
        assert!(matches!(waiting.ended(Duration::from_millis(20)), Err(ClientError::Deadline)));
    }

    #[test]
    fn what_a_dead_process_left_is_replaced() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("kmsfs");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        for name in ["0:4711".to_owned(), std::process::id().to_string()] {
            drop(std::os::unix::net::UnixListener::bind(directory.join(name)).unwrap());
        }
        let first = socket(&directory);
        connect(&directory).unwrap();
        drop(first);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_open_to_others_is_refused() {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let bound = ControlSocket::bind(Unbound::new().unwrap(), home.path(), |_| String::new());
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
            let mut stream = std::os::unix::net::UnixStream::connect(directory.join("0:4711")).unwrap();
            // The server may stop reading an endless line before it is written.
            let _ = stream.write_all(nonsense);
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            assert!(answer.is_empty() || answer.starts_with(r#"{"error":"#), "{answer}");
        }
        connect(&directory).unwrap().tell(Ask::Status, DEADLINE).unwrap();
    }
}
