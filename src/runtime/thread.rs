//! A thread that another can wait for with a deadline, which [`std::thread::JoinHandle`] has not.

use std::convert::Infallible;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::ThreadId;
use std::time::Duration;

use parking_lot::Mutex;

pub(super) struct Thread {
    id: ThreadId,
    /// The thread drops the other end last of all.
    ended: Mutex<Receiver<Infallible>>,
}

impl Thread {
    /// # Errors
    /// The system gives no thread.
    pub(super) fn start(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (alive, ended) = mpsc::channel();
        let whole = move || {
            let _alive = alive;
            run();
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(whole)?;
        Ok(Self { id: thread.thread().id(), ended: Mutex::new(ended) })
    }

    /// Waits for the end, but not longer than `longest`; the thread itself does not wait. Returns whether it has ended.
    pub(super) fn wait(&self, longest: Duration) -> bool {
        std::thread::current().id() != self.id
            && matches!(self.ended.lock().recv_timeout(longest), Err(RecvTimeoutError::Disconnected))
    }
}
