//! The asking side of the control socket. Every wait has a deadline.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout, socket_peercred};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::{Ask, Ended, MAX_LINE, Request, place};

/// How long a process may take to accept a connection.
const CONNECTING: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process serves the mount point.
    #[error("no process answers for this mount")]
    NotServed,
    /// The process does not answer.
    #[error("the process behind the mount did not answer in time")]
    Deadline,
    /// The process went away, or says something else.
    #[error("the process behind the mount ended without an answer")]
    Broken,
    /// The socket fails.
    #[error("the control socket fails: {0}")]
    Io(io::Error),
}

/// A connection to the process behind a mount.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

/// A connection that waits for the mount's end.
#[derive(Debug)]
pub struct Waiting {
    client: Client,
    word: Option<Ended>,
}

impl Client {
    /// Connects to the process behind the mount with this device, which `user` has mounted.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(runtime_directory: Option<&Path>, device: &str, user: u32) -> Result<Self, ClientError> {
        Self::connect_in(&place::of_user(user, runtime_directory), device, user)
    }

    /// Whether the process with this number is there and has a socket of this user's in `directory`.
    #[must_use]
    pub fn is_there(directory: &Path, pid: i32) -> bool {
        Self::connect_in(&[directory.to_owned()], &pid.to_string(), rustix::process::geteuid().as_raw()).is_ok()
    }

    pub(super) fn connect_in(directories: &[PathBuf], name: &str, user: u32) -> Result<Self, ClientError> {
        let mut failure = ClientError::NotServed;
        for directory in directories {
            match connect(&directory.join(name)) {
                // Whoever answers must be whoever mounted.
                Ok(stream) if socket_peercred(&stream).is_ok_and(|peer| peer.uid.as_raw() == user) => {
                    return Ok(Self { stream: BufReader::new(stream) });
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {}
                Err(error) => failure = failed(error),
            }
        }
        Err(failure)
    }

    /// What the process says about itself, a JSON object, after it has done what it is asked.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn tell(mut self, ask: Ask, deadline: Duration) -> Result<String, ClientError> {
        let request = match ask {
            Ask::Status => Request::Status,
            Ask::Measures => Request::Measures,
            Ask::Lock => Request::Lock,
            Ask::Unlock => Request::Unlock,
            Ask::Sync => Request::Sync,
            Ask::Keys => Request::Keys,
            Ask::End => Request::End,
            Ask::Rekey { path, run } => Request::Rekey { path, run },
            Ask::Header { path, judged, new } => Request::Header { path, judged, new },
        };
        self.ask(request, deadline)
    }

    /// Waits for the mount's end: returns when the process knows it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn wait(mut self, deadline: Duration) -> Result<Waiting, ClientError> {
        let answer = self.ask(Request::Wait, deadline)?;
        if answer.contains("\"error\"") {
            return Err(ClientError::Broken);
        }
        Ok(Waiting { client: self, word: None })
    }

    fn ask(&mut self, request: Request, deadline: Duration) -> Result<String, ClientError> {
        let mut line = serde_json::to_vec(&request).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        self.stream.get_ref().set_write_timeout(Some(deadline)).map_err(failed)?;
        self.stream.get_mut().write_all(&line).map_err(failed)?;
        self.read_line(Instant::now() + deadline)
    }

    fn read_line(&mut self, until: Instant) -> Result<String, ClientError> {
        self.allow_until(until)?;
        let mut line = String::new();
        self.stream.by_ref().take(MAX_LINE).read_line(&mut line).map_err(failed)?;
        line.strip_suffix('\n').map(str::to_owned).ok_or(ClientError::Broken)
    }

    fn allow_until(&self, until: Instant) -> Result<(), ClientError> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.get_ref().set_read_timeout(Some(left)).map_err(failed)
    }
}

impl Waiting {
    /// How the mount ended; returns when the process is gone.
    ///
    /// # Errors
    /// [`ClientError`]; `Broken` if it died without a last word.
    pub fn ended(&mut self, deadline: Duration) -> Result<Ended, ClientError> {
        let until = Instant::now() + deadline;
        let ended = match &self.word {
            Some(ended) => ended.clone(),
            None => serde_json::from_str(&self.client.read_line(until)?).map_err(|_| ClientError::Broken)?,
        };
        self.word = Some(ended.clone());
        self.client.allow_until(until)?;
        match self.client.stream.read(&mut [0]) {
            Ok(_) => Ok(ended),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(ended),
            Err(error) => Err(failed(error)),
        }
    }
}

/// A process that takes no connections is not waited for.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECTING))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn failed(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Deadline,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Broken,
        _ => ClientError::Io(error),
    }
}
