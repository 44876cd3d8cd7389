//! A thread that does the same job again and again: after a time, or when somebody wakes it.
//!
//! Invariants: runs never overlap; a wake during a run leads to another run; nothing runs after [`Periodic::stop`] but the run
//! under way; dropping waits for that one, but not beyond [`STOP_WAIT_MAX`].

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::thread::Thread;

/// How long dropping waits for the run under way.
const STOP_WAIT_MAX: Duration = Duration::from_secs(1);

/// When the next run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// After this time, or at once when somebody wakes it.
    After(Duration),
    /// When somebody wakes it, but not before this time has passed.
    WhenWoken(Duration),
    /// Never: the thread ends.
    Never,
}

/// Stops its thread when it is dropped.
pub(crate) struct Periodic {
    /// `None` once it is stopped. The channel holds one wake: more of them mean the same.
    wake: Mutex<Option<SyncSender<()>>>,
    thread: Thread,
}

impl Periodic {
    /// Runs `job` on a thread of this name, for the first time at `first`, and then whenever the last run said.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(crate) fn start(name: &str, first: Next, job: impl FnMut() -> Next + Send + 'static) -> io::Result<Self> {
        let (wake, woken) = mpsc::sync_channel(1);
        let mut job = job;
        let thread = Thread::start(name, move || {
            let mut next = first;
            while next.comes(&woken) {
                next = job();
            }
        })?;
        Ok(Self { wake: Mutex::new(Some(wake)), thread })
    }

    /// Lets the next run begin, as [`Next`] says.
    pub(crate) fn wake(&self) {
        if let Some(wake) = &*self.wake.lock() {
            // A wake that waits already is as good, and a thread that has ended needs none.
            let _ = wake.try_send(());
        }
    }

    /// Lets no other run begin. Does not wait.
    pub(crate) fn stop(&self) {
        *self.wake.lock() = None;
    }

    /// Waits until the job has said [`Next::Never`], or has been stopped, but not longer than `longest`. Returns whether it has.
    pub(crate) fn wait(&self, longest: Duration) -> bool {
        self.thread.wait(longest)
    }
}

impl Drop for Periodic {
    fn drop(&mut self) {
        self.stop();
        self.wait(STOP_WAIT_MAX);
    }
}

impl Next {
    /// Waits for it. False if it does not come.
    fn comes(self, woken: &Receiver<()>) -> bool {
        match self {
            Self::After(time) => woken.recv_timeout(time) != Err(RecvTimeoutError::Disconnected),
            Self::WhenWoken(rest) => {
                let until = Instant::now() + rest;
                let mut is_woken = false;
                loop {
                    match woken.recv_timeout(until.saturating_duration_since(Instant::now())) {
                        Ok(()) => is_woken = true,
                        Err(RecvTimeoutError::Timeout) => return is_woken || woken.recv().is_ok(),
                        Err(RecvTimeoutError::Disconnected) => return false,
                    }
                }
            }
            Self::Never => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::mpsc::Sender;

    const LONG: Duration = Duration::from_secs(20);
    const NOW: Next = Next::After(Duration::ZERO);

    /// Says when a run begins, and waits within it for a word to go on.
    fn gated(next: Next) -> (Periodic, Receiver<()>, Sender<()>) {
        let (begin, begun) = mpsc::channel();
        let (go, gate) = mpsc::channel();
        let periodic = Periodic::start("test", Next::WhenWoken(Duration::ZERO), move || {
            begin.send(()).unwrap();
            let _ = gate.recv();
            next
        });
        (periodic.unwrap(), begun, go)
    }

    #[test]
    fn runs_follow_each_other_until_it_is_dropped() {
        let (ran, runs) = mpsc::channel();
        let periodic = Periodic::start("test", NOW, move || {
            ran.send(()).unwrap();
            NOW
        });
        for _ in 0..3 {
            runs.recv_timeout(LONG).unwrap();
        }
        drop(periodic.unwrap());
        while runs.try_recv().is_ok() {}
        assert_eq!(runs.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected), "the thread has ended");
    }

    #[test]
    fn one_that_waits_ends_at_once() {
        for wait in [Next::After(LONG), Next::WhenWoken(LONG), Next::WhenWoken(Duration::ZERO)] {
            let periodic = Periodic::start("test", wait, || panic!("nobody has woken it")).unwrap();
            let start = Instant::now();
            periodic.stop();
            assert!(periodic.wait(LONG) && start.elapsed() < LONG / 2, "{wait:?}");
            // And may be told twice.
            periodic.stop();
            periodic.wake();
        }
    }

    #[test]
    fn a_wake_during_a_run_leads_to_one_other() {
        let (periodic, begun, go) = gated(Next::WhenWoken(Duration::ZERO));
        periodic.wake();
        begun.recv_timeout(LONG).unwrap();
        periodic.wake();
        periodic.wake();
        go.send(()).unwrap();
        begun.recv_timeout(LONG).unwrap();
        go.send(()).unwrap();
        assert_eq!(begun.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
    }

    #[test]
    fn a_wake_shortens_a_time_but_no_rest() {
        let (periodic, begun, go) = gated(Next::After(LONG));
        periodic.wake();
        begun.recv_timeout(LONG).unwrap();
        let start = Instant::now();
        go.send(()).unwrap();
        periodic.wake();
        begun.recv_timeout(LONG).unwrap();
        assert!(start.elapsed() < LONG / 2);
        drop(go);
        let rest = Duration::from_millis(200);
        let (periodic, begun, go) = gated(Next::WhenWoken(rest));
        periodic.wake();
        begun.recv_timeout(LONG).unwrap();
        periodic.wake();
        let start = Instant::now();
        go.send(()).unwrap();
        begun.recv_timeout(LONG).unwrap();
        assert!(start.elapsed() >= rest);
        drop(go);
    }

    #[test]
    fn a_job_may_end_it_and_drop_it() {
        let slot: Arc<Mutex<Option<Periodic>>> = Arc::default();
        let own = Arc::clone(&slot);
        let (end, ended) = mpsc::channel();
        let periodic = Periodic::start("test", Next::WhenWoken(Duration::ZERO), move || {
            let start = Instant::now();
            drop(own.lock().take());
            end.send(start.elapsed()).unwrap();
            NOW
        });
        slot.lock().insert(periodic.unwrap()).wake();
        assert!(ended.recv_timeout(LONG).unwrap() < STOP_WAIT_MAX, "a thread does not wait for itself");
        assert_eq!(ended.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected), "no other run begins");
        let once = Periodic::start("test", NOW, || Next::Never).unwrap();
        assert!(once.wait(LONG));
        once.wake();
    }

    #[test]
    fn a_run_that_panics_or_hangs_keeps_nobody() {
        let panics = Periodic::start("test", NOW, || panic!("this run fails")).unwrap();
        assert!(panics.wait(LONG));
        panics.wake();
        let (periodic, begun, go) = gated(NOW);
        periodic.wake();
        begun.recv_timeout(LONG).unwrap();
        let start = Instant::now();
        drop(periodic);
        assert!((STOP_WAIT_MAX..LONG).contains(&start.elapsed()), "{:?}", start.elapsed());
        drop(go);
    }
}
