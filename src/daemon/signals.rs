//! Signals that ask a mount to end.

use std::io;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// Ends the watching of signals when dropped; after that they are ignored.
pub struct SignalWatch {
    handle: Handle,
}

/// Calls `asked_to_end` in a thread of its own for each SIGTERM, SIGINT and SIGHUP.
///
/// # Errors
/// If handlers or the thread cannot be made.
pub fn on_end_request(mut asked_to_end: impl FnMut() + Send + 'static) -> io::Result<SignalWatch> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let handle = signals.handle();
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for _ in signals.forever() {
            asked_to_end();
        }
    })?;
    Ok(SignalWatch { handle })
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_hangup_asks_to_end() {
        let (asked, answer) = mpsc::channel();
        let watch = on_end_request(move || asked.send(()).unwrap_or(())).unwrap();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::HUP).unwrap();
        answer.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(watch);
    }
}
