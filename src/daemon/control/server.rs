//! The mount's side of the control socket.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use sha2::{Digest as _, Sha256};

use crate::daemon::own_socket::{Unbound, close_to_clients};

use super::place;
use super::{Ask, ControlError, Ended, MAX_LINE, Request};

/// How long a client may take to say what it wants, and to take the answer.
const CLIENT_DEADLINE: Duration = Duration::from_secs(5);
/// More clients than this at once are turned away.
const MAX_CLIENTS: usize = 32;
/// No more than these wait for the end.
const MAX_WAITING: usize = 64;

/// A mount's control socket. Dropping it removes the socket. Its directory is held: the mount may lie over it.
pub struct ControlSocket {
    path: PathBuf,
    directory: OwnedFd,
    listener: Arc<UnixListener>,
    shared: Arc<Shared>,
}

/// The connections of those who wait for the end of the process.
#[must_use = "dropping it says that the process has ended"]
pub struct Farewell(#[allow(dead_code)] Vec<UnixStream>); // held, never read

struct Shared {
    answer: Box<dyn Fn(Ask) -> String + Send + Sync>,
    /// Those who wait for the end.
    waiting: Mutex<Vec<UnixStream>>,
    clients: AtomicUsize,
    closed: AtomicBool,
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
        let shared = Arc::new(Shared {
            answer: Box::new(answer),
            waiting: Mutex::default(),
            clients: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
        });
        let listener = listen(socket, &path, &shared).map_err(failed)?;
        Ok(Self { path, directory: held, listener, shared })
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
        self.shared.closed.store(true, Ordering::Release);
        close_to_clients(&self.listener);
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

/// Binds `path` and accepts in a thread of its own. What a dead process left at `path` is replaced.
fn listen(socket: Unbound, path: &Path, shared: &Arc<Shared>) -> io::Result<Arc<UnixListener>> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = Arc::new(socket.listen_at(path)?);
    let (shared, accepting) = (Arc::clone(shared), Arc::clone(&listener));
    thread::Builder::new().name("control".to_owned()).spawn(move || accept_all(&accepting, &shared))?;
    Ok(listener)
}

fn accept_all(listener: &UnixListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.closed.load(Ordering::Acquire) {
            return;
        }
        match accepted {
            Ok((stream, _)) => greet(stream, shared),
            // Out of descriptors: the backlog waits until there are some.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn greet(stream: UnixStream, shared: &Arc<Shared>) {
    if shared.clients.fetch_add(1, Ordering::AcqRel) >= MAX_CLIENTS {
        shared.clients.fetch_sub(1, Ordering::AcqRel);
        return;
    }
    let for_thread = Arc::clone(shared);
    let spawned = thread::Builder::new().name("control client".to_owned()).spawn(move || {
        // A client that breaks off harms only itself.
        let _ = serve(stream, &for_thread);
        for_thread.clients.fetch_sub(1, Ordering::AcqRel);
    });
    if spawned.is_err() {
        shared.clients.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(mut stream: UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_DEADLINE))?;
    stream.set_write_timeout(Some(CLIENT_DEADLINE))?;
    let mut request = Vec::new();
    BufReader::new(&stream).take(MAX_LINE).read_until(b'\n', &mut request)?;
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
            waiting.push(stream);
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

fn say(stream: &mut UnixStream, shared: &Shared, ask: Ask) -> io::Result<()> {
    let answer = (shared.answer)(ask);
    stream.write_all(format!("{answer}\n").as_bytes())
}

fn line(answer: &impl serde::Serialize) -> String {
    let mut line = serde_json::to_string(answer).unwrap_or_else(|error| format!("{{\"error\":\"{error}\"}}"));
    line.push('\n');
    line
}
