//! Telling a person at a terminal how far a command is.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(200);

/// Runs `work`, and shows what `line` makes of the seconds since the start meanwhile, if standard error is a terminal.
pub(crate) fn show_while<R>(line: impl Fn(u64) -> String + Sync, work: impl FnOnce() -> R) -> R {
    let finished = Finished::default();
    std::thread::scope(|scope| {
        scope.spawn(|| show(&line, &finished));
        let _finished = Guard(&finished);
        work()
    })
}

#[derive(Default)]
struct Finished {
    is: Mutex<bool>,
    changed: Condvar,
}

/// Says so when it is dropped, after a panic too.
struct Guard<'f>(&'f Finished);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        *self.0.is.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }
}

impl Finished {
    fn within(&self, time: Duration) -> bool {
        let is = self.is.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(is, time, |is| !*is);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

fn show(line: &impl Fn(u64) -> String, finished: &Finished) {
    let mut terminal = io::stderr();
    if !terminal.is_terminal() {
        return;
    }
    let started = Instant::now();
    while !finished.within(INTERVAL) {
        // What cannot be shown is not worth an error.
        let _ = write!(terminal, "\r{} ", line(started.elapsed().as_secs()));
        let _ = terminal.flush();
    }
    let _ = writeln!(terminal);
}
