//! Programs that connect to a socket: a thread accepts, and each connection has a thread of its own.
//!
//! Invariants: at most so many connections are open; the one that has asked for nothing for longest makes room for the next,
//! so that slow clients keep nobody out; no read or write of a connection outlasts its deadline; a listener that is dropped
//! accepts nothing more.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::net::{SocketFlags, accept_with, shutdown};

/// How long a thread may take to notice that its connection was closed.
const LEAVE_WAIT_MAX: Duration = Duration::from_secs(1);
/// Until the next try when a connection cannot be accepted, as without descriptors: it waits in the backlog.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How many connections there are, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionLimits {
    /// The accepting thread's name; those of connections add `client`.
    pub(crate) name: &'static str,
    /// Connections at most.
    pub(crate) most: usize,
    /// The deadline that a connection begins with.
    pub(crate) deadline: Duration,
}

/// Accepts connections until it is dropped.
pub(crate) struct Listener {
    socket: Arc<OwnedFd>,
    shared: Arc<Shared>,
}

type Serve = Box<dyn Fn(Connection) + Send + Sync>;

struct Shared {
    limits: ConnectionLimits,
    serve: Serve,
    is_closed: AtomicBool,
    open: Arc<Open>,
}

#[derive(Default)]
struct Open {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    last: u64,
    /// Those who came or asked last are at the end. One that is not to make room has no stream here.
    here: Vec<(u64, Option<UnixStream>)>,
}

impl Listener {
    /// Accepts at `socket`, which listens, and gives each connection to `serve` in a thread of its own.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn start(
        socket: impl Into<OwnedFd>,
        limits: ConnectionLimits,
        serve: impl Fn(Connection) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let (socket, is_closed, open) = (Arc::new(socket.into()), AtomicBool::new(false), Arc::default());
        let shared = Arc::new(Shared { limits, serve: Box::new(serve), is_closed, open });
        let accepting = (Arc::clone(&socket), Arc::clone(&shared));
        let name = limits.name.to_owned();
        std::thread::Builder::new().name(name).spawn(move || accept_all(&accepting.0, &accepting.1))?;
        Ok(Self { socket, shared })
    }

    #[cfg(test)]
    pub(crate) fn connections(&self) -> usize {
        self.shared.open.state.lock().here.len()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::Release);
        // It wakes the thread that accepts. A socket that is closed already is what is wanted.
        let _ = shutdown(&self.socket, rustix::net::Shutdown::Both);
    }
}

/// One connection, over a stream socket of any family.
pub(crate) struct Connection {
    stream: UnixStream,
    until: Instant,
    number: u64,
    open: Arc<Open>,
}

impl Connection {
    /// The client has said what it wants: others make room first.
    pub(crate) fn has_asked(&self) {
        let mut state = self.open.state.lock();
        if let Some(at) = state.here.iter().position(|(other, _)| *other == self.number) {
            let connection = state.here.remove(at);
            state.here.push(connection);
        }
    }

    /// The client waits for something that must not be broken off: it makes room for nobody.
    pub(crate) fn keep(&self) {
        let mut state = self.open.state.lock();
        state.here.iter_mut().filter(|(other, _)| *other == self.number).for_each(|(_, stream)| *stream = None);
    }

    /// Gives the rest of the connection so long.
    pub(crate) fn set_deadline(&mut self, left: Duration) {
        self.until = Instant::now() + left;
    }

    /// The socket, which counts as a connection no more.
    ///
    /// # Errors
    /// Without a descriptor for it.
    pub(crate) fn into_stream(self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    fn allow(&self) -> io::Result<()> {
        match self.until.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => {
                self.stream.set_read_timeout(Some(left))?;
                self.stream.set_write_timeout(Some(left))
            }
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.allow()?;
        self.stream.read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.allow()?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.state.lock().here.retain(|(other, _)| *other != self.number);
        self.open.left.notify_all();
    }
}

fn accept_all(socket: &OwnedFd, shared: &Arc<Shared>) {
    loop {
        let accepted = accept_with(socket, SocketFlags::CLOEXEC);
        if shared.is_closed.load(Ordering::Acquire) {
            return;
        }
        match accepted {
            Ok(stream) => {
                // A client without a thread is turned away; that is all that can be told to it.
                let _ = shared.spawn(stream.into());
            }
            Err(_) => std::thread::sleep(ACCEPT_RETRY),
        }
    }
}

impl Shared {
    fn spawn(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let Some(connection) = self.admit(stream)? else { return Ok(()) };
        let shared = Arc::clone(self);
        let name = format!("{} client", self.limits.name);
        std::thread::Builder::new().name(name).spawn(move || (shared.serve)(connection))?;
        Ok(())
    }

    /// Makes room for a connection; none if that does not come about.
    fn admit(&self, stream: UnixStream) -> io::Result<Option<Connection>> {
        let twin = stream.try_clone()?;
        let (mut state, most) = (self.open.state.lock(), self.limits.most);
        if state.here.len() >= most {
            if let Some(idle) = state.here.iter().find_map(|(_, stream)| stream.as_ref()) {
                let _ = idle.shutdown(Shutdown::Both);
            }
            self.open.left.wait_while_for(&mut state, |state| state.here.len() >= most, LEAVE_WAIT_MAX);
        }
        if state.here.len() >= most {
            return Ok(None);
        }
        state.last += 1;
        let number = state.last;
        state.here.push((number, Some(twin)));
        let until = Instant::now() + self.limits.deadline;
        Ok(Some(Connection { stream, until, number, open: Arc::clone(&self.open) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    const LIMITS: ConnectionLimits = ConnectionLimits { name: "test", most: 2, deadline: Duration::from_secs(20) };

    /// Answers each byte with the same byte.
    fn echo(mut client: Connection) {
        let mut byte = [0];
        while client.read_exact(&mut byte).is_ok() {
            client.has_asked();
            client.write_all(&byte).unwrap();
        }
    }

    fn started(limits: ConnectionLimits) -> (Listener, impl Fn() -> TcpStream) {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let listener = Listener::start(socket, limits, echo).unwrap();
        (listener, move || TcpStream::connect(address).unwrap())
    }

    fn is_answered(client: &mut TcpStream) -> bool {
        let mut byte = [0];
        client.write_all(b"x").is_ok() && client.read_exact(&mut byte).is_ok()
    }

    #[test]
    fn the_connection_that_asked_for_nothing_longest_makes_room() {
        let (listener, connect) = started(LIMITS);
        let (mut first, mut silent) = (connect(), connect());
        while listener.connections() < LIMITS.most {
            std::thread::yield_now();
        }
        assert!(is_answered(&mut first));
        for _ in 0..5 {
            let mut next = connect();
            assert!(is_answered(&mut next) && is_answered(&mut first));
            assert!(listener.connections() <= LIMITS.most);
        }
        assert!(!is_answered(&mut silent));
    }

    #[test]
    fn a_connection_that_is_kept_makes_no_room() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let keep = |client: Connection| {
            client.keep();
            echo(client);
        };
        let _listener = Listener::start(socket, LIMITS, keep).unwrap();
        let connect = || TcpStream::connect(address).unwrap();
        let mut kept = [connect(), connect()];
        assert!(kept.iter_mut().all(is_answered));
        assert!(!is_answered(&mut connect()));
        assert!(kept.iter_mut().all(is_answered));
    }

    #[test]
    fn a_silent_connection_ends_at_its_deadline() {
        let (_listener, connect) = started(ConnectionLimits { deadline: Duration::from_millis(50), ..LIMITS });
        assert_eq!(connect().read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn nobody_is_accepted_after_the_end() {
        let (listener, connect) = started(LIMITS);
        let mut here = connect();
        assert!(is_answered(&mut here));
        let shared = Arc::downgrade(&listener.shared);
        drop(listener);
        assert!(is_answered(&mut here), "it is served to its end");
        drop(here);
        while shared.strong_count() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
