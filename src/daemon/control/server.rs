//! The mount's side of the control socket.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use sha2::{Digest as _, Sha256};

use crate::daemon::own_socket::Unbound;
use crate::runtime::{Connection, ConnectionLimits, Listener};

use super::place;
use super::{Ask, ControlError, Ended, MAX_LINE, Request};

/// A client has so long to say what it wants, and as long again to take the answer.
const LIMITS: ConnectionLimits = ConnectionLimits { name: "control", most: 32, deadline: Duration::from_secs(5) };
/// No more than these wait for the end.
const MAX_WAITING: usize = 64;

/// A mount's control socket. Dropping it removes the socket. Its directory is held: the mount may lie over it.
pub struct ControlSocket {
    path: PathBuf,
    directory: OwnedFd,
    shared: Arc<Shared>,
    _listener: Listener,
}

/// The connections of those who wait for the end of the process.
#[must_use = "dropping it says that the process has ended"]
pub struct Farewell(#[allow(dead_code)] Vec<UnixStream>); // held, never read

struct Shared {
    answer: Box<dyn Fn(Ask) -> String + Send + Sync>,
    /// Those who wait for the end.
    waiting: Mutex<Vec<UnixStream>>,
}

impl ControlSocket {
    /// Answers from now on, under the number of this process: `answer` does what is asked and says how the mount fares, a JSON
    /// object in one line.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn bind(
        socket: Unbound,
        directory: &Path,
        answer: impl Fn(Ask) -> String + Send + Sync + 'static,
    ) -> Result<Self, ControlError> {
        place::make(directory)?;
        let path = directory.join(std::process::id().to_string());
        let failed = |error| ControlError::Io { path: path.clone(), error };
        let held = rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let held = held.map_err(|error| failed(error.into()))?;
        let shared = Arc::new(Shared { answer: Box::new(answer), waiting: Mutex::default() });
        let listener = listen(socket, &path, &shared).map_err(failed)?;
        Ok(Self { path, directory: held, shared, _listener: listener })
    }

    /// Answers under the device of the mount too, and under the place where it was mounted, for scripts that know only that.
    ///
    /// # Errors
    /// Those of `linkat(2)`.
    pub fn name(&self, device: &str, mountpoint: &Path) -> io::Result<()> {
        // No live mount has the device of another, and the last one at a place is the one that is seen there.
        [device, place_name(mountpoint).as_str()].into_iter().try_for_each(|name| {
            let _ = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty());
            let own = self.path.file_name().unwrap_or_default();
            Ok(rustix::fs::linkat(&self.directory, own, &self.directory, name, AtFlags::empty())?)
        })
    }

    /// Tells those who wait how the mount ended, and removes the socket. What is returned keeps their connections open:
    /// they see the end of the process when it is dropped.
    pub fn finish(self, ended: &Ended) -> Farewell {
        let word = line(ended);
        let mut waiting = std::mem::take(&mut *self.shared.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        for client in &mut waiting {
            // Who has left does not hear it.
            let _ = client.write_all(word.as_bytes());
        }
        Farewell(waiting)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let directory = PathBuf::from(format!("/proc/self/fd/{}", self.directory.as_raw_fd()));
        let own = directory.join(self.path.file_name().unwrap_or_default());
        let Ok(found) = fs::symlink_metadata(&own) else { return };
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.ino() == found.ino() {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// The first 16 bytes of the path's SHA-256 in hexadecimal.
fn place_name(mountpoint: &Path) -> String {
    let hash = Sha256::digest(mountpoint.as_os_str().as_bytes());
    hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Binds `path` and accepts there. What a dead process left at `path` is replaced.
fn listen(socket: Unbound, path: &Path, shared: &Arc<Shared>) -> io::Result<Listener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let shared = Arc::clone(shared);
    // A client that breaks off harms only itself.
    Listener::start(socket.listen_at(path)?, LIMITS, move |client| drop(serve(client, &shared)))
}

fn serve(mut stream: Connection, shared: &Shared) -> io::Result<()> {
    let mut request = Vec::new();
    BufReader::new((&mut stream).take(MAX_LINE)).read_until(b'\n', &mut request)?;
    stream.keep();
    match parse(&request) {
        Ok(Request::Status) => say(&mut stream, shared, Ask::Status),
        Ok(Request::Measures) => say(&mut stream, shared, Ask::Measures),
        Ok(Request::Lock) => say(&mut stream, shared, Ask::Lock),
        Ok(Request::Sync) => say(&mut stream, shared, Ask::Sync),
        Ok(Request::Unlock) => say(&mut stream, shared, Ask::Unlock),
        Ok(Request::Keys) => say(&mut stream, shared, Ask::Keys),
        Ok(Request::End) => say(&mut stream, shared, Ask::End),
        Ok(Request::Rekey { path, run }) => say(&mut stream, shared, Ask::Rekey { path, run }),
        Ok(Request::Header { path, judged, new }) => say(&mut stream, shared, Ask::Header { path, judged, new }),
        Ok(Request::Wait) => {
            // Told that it waits only once it is on the list, so that it cannot miss the last word.
            let mut waiting = shared.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // Who has left waits no more. One that is there has nothing to say.
            waiting.retain(|other| !has_left(other));
            if waiting.len() >= MAX_WAITING {
                return stream.write_all(line(&serde_json::json!({"error": "too many wait already"})).as_bytes());
            }
            stream.write_all(b"{\"waiting\":true}\n")?;
            waiting.push(stream.into_stream()?);
            Ok(())
        }
        Err(error) => stream.write_all(line(&serde_json::json!({"error": error.to_string()})).as_bytes()),
    }
}

/// A field that no command has is refused with those that it might have been meant for.
fn parse(line: &[u8]) -> Result<Request, serde_json::Error> {
    let request: Request = serde_json::from_slice(line)?;
    let (said, known) = (serde_json::from_slice::<serde_json::Value>(line)?, serde_json::to_value(&request)?);
    let fields = said.as_object().into_iter().flat_map(|said| said.keys());
    match fields.into_iter().find(|field| known.get(field.as_str()).is_none()) {
        Some(field) => Err(serde::de::Error::custom(format_args!("unknown field {field:?}"))),
        None => Ok(request),
    }
}

/// Whether a client that has nothing more to say has closed its connection.
fn has_left(client: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    matches!(recv(client, &mut [0_u8; 1], flags), Ok((_, 0)) | Err(Errno::CONNRESET))
}

fn say(stream: &mut Connection, shared: &Shared, ask: Ask) -> io::Result<()> {
    let answer = (shared.answer)(ask);
    stream.set_deadline(LIMITS.deadline);
    stream.write_all(format!("{answer}\n").as_bytes())
}

fn line(answer: &impl serde::Serialize) -> String {
    let mut line = serde_json::to_string(answer).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    line.push('\n');
    line
}
