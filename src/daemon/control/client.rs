//! The asking side of the control socket. Every wait has a deadline.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{Ask, Ended, MAX_LINE, Request, socket_path};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process serves the mount point.
    #[error("no process of this user serves this mount point")]
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
}

impl Client {
    /// Connects to the process behind the mount at the canonical path `mountpoint`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(directory: &Path, mountpoint: &Path) -> Result<Self, ClientError> {
        match UnixStream::connect(socket_path(directory, mountpoint)) {
            Ok(stream) => Ok(Self { stream: BufReader::new(stream) }),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Err(ClientError::NotServed)
            }
            Err(error) => Err(ClientError::Io(error)),
        }
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
        Ok(Waiting { client: self })
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
    pub fn ended(mut self, deadline: Duration) -> Result<Ended, ClientError> {
        let until = Instant::now() + deadline;
        let word = self.client.read_line(until)?;
        let ended = serde_json::from_str(&word).map_err(|_| ClientError::Broken)?;
        self.client.allow_until(until)?;
        match self.client.stream.read(&mut [0]) {
            Ok(_) => Ok(ended),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(ended),
            Err(error) => Err(failed(error)),
        }
    }
}

fn failed(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Deadline,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Broken,
        _ => ClientError::Io(error),
    }
}
