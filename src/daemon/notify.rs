//! What systemd is told of this process: sd_notify(3) over a datagram socket. Without systemd nothing is sent.
//!
//! Invariants: the socket is made before the sandbox; a manager that reads nothing holds nobody up for longer than
//! [`SEND_TIMEOUT`]. The crate `sd-notify` makes a socket for each message, and waits without end.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use crate::runtime::{Next, Periodic};

/// How long a message may wait for room in the manager's queue.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// The service manager that started this process, if it wants to hear of it.
pub struct Notifier {
    socket: Option<(UnixDatagram, SocketAddr)>,
    /// How often it must hear that all is well.
    watchdog: Option<Duration>,
}

impl Notifier {
    /// Reads `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` by way of `variable`.
    ///
    /// # Errors
    /// The socket's name is none, or there is no socket to send from.
    pub fn new(variable: impl Fn(&str) -> Option<OsString>) -> io::Result<Self> {
        let Some(name) = variable("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(Self { socket: None, watchdog: None });
        };
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        let for_us = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|_| for_us).map(Duration::from_micros);
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self { socket: Some((socket, address)), watchdog })
    }

    /// The service is up.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nMAINPID={}\nSTATUS={status}", std::process::id()));
    }

    /// The service is about to end.
    pub fn stopping(&self, status: &str) {
        self.tell(&format!("STOPPING=1\nSTATUS={status}"));
    }

    fn tell(&self, state: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(state.as_bytes(), address)
        {
            tracing::warn!("the service manager cannot be told: {error}");
        }
    }

    /// Tells twice in each watchdog interval that all is well, as long as `is_well` returns, and returns true, in time. A
    /// question without an answer ends the messages, and the manager then ends this process.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn watch(self: Arc<Self>, is_well: impl Fn() -> bool + Send + 'static) -> io::Result<Option<Watch>> {
        let Some(interval) = self.watchdog else { return Ok(None) };
        let periodic = Periodic::start("watchdog", Next::After(Duration::ZERO), move || {
            if is_well() {
                self.tell("WATCHDOG=1");
            }
            Next::After(interval / 2)
        })?;
        Ok(Some(Watch(periodic)))
    }
}

/// Dropped, it ends the messages to the watchdog.
pub struct Watch(#[allow(dead_code)] Periodic); // held, never read

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(socket: &UnixDatagram) -> String {
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut buffer = [0; 256];
        let len = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    #[test]
    fn without_a_manager_nothing_is_sent() {
        let notifier = Notifier::new(|_| None).unwrap();
        notifier.ready("mounted");
        assert!(Arc::new(notifier).watch(|| true).unwrap().is_none());
    }

    #[test]
    fn a_manager_hears_of_the_start_the_end_and_the_watchdog() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let variable = |name: &str| match name {
            "NOTIFY_SOCKET" => Some(path.clone().into_os_string()),
            "WATCHDOG_USEC" => Some("20000".into()),
            _ => None,
        };
        let notifier = Arc::new(Notifier::new(variable).unwrap());
        notifier.ready("mounted");
        let ready = receive(&manager);
        assert!(ready.starts_with("READY=1\nMAINPID=") && ready.ends_with("STATUS=mounted"), "{ready}");
        let watch = Arc::clone(&notifier).watch(|| true).unwrap().unwrap();
        assert_eq!((receive(&manager), receive(&manager)), ("WATCHDOG=1".to_owned(), "WATCHDOG=1".to_owned()));
        drop(watch);
        notifier.stopping("unmounting");
        while receive(&manager) != "STOPPING=1\nSTATUS=unmounting" {}
    }

    #[test]
    fn a_manager_that_reads_nothing_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let _manager = UnixDatagram::bind(&path).unwrap();
        let filler = UnixDatagram::unbound().unwrap();
        filler.set_nonblocking(true).unwrap();
        while filler.send_to(b"full", &path).is_ok() {}
        let (sender, sent) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let notifier = Notifier::new(|name| (name == "NOTIFY_SOCKET").then(|| path.clone().into_os_string()));
            notifier.unwrap().stopping("unmounting");
            sender.send(()).unwrap();
        });
        sent.recv_timeout(SEND_TIMEOUT * 20).unwrap();
    }

    #[test]
    fn a_process_that_is_not_well_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let variable = |name: &str| match name {
            "NOTIFY_SOCKET" => Some(path.clone().into_os_string()),
            "WATCHDOG_USEC" => Some("2000".into()),
            _ => None,
        };
        let _watch = Arc::new(Notifier::new(variable).unwrap()).watch(|| false).unwrap();
        manager.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(manager.recv(&mut [0; 64]).is_err());
    }
}
