//! Telling a person at a terminal how far a command is.
//!
//! Invariants: nothing is written unless standard error is a terminal; a line fits it, and is gone when the work is done; a time left
//! is told only where the total is known, and is never zero before the end.

use std::io::{self, IsTerminal as _, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_millis(200);
/// The pace of so short a time says nothing.
const SETTLED: Duration = Duration::from_secs(1);
/// Of a terminal that does not tell its width.
const WIDTH: u16 = 80;
/// Back to the start of the line, which is cleared.
const CLEAR: &str = "\r\x1b[K";

static SHOWN: AtomicBool = AtomicBool::new(false);

/// How far it is.
pub(crate) struct Step {
    /// What was done, in words.
    pub(crate) text: String,
    /// How much was done, and of how much, in one unit; none if the total is not known.
    pub(crate) of: Option<(u64, u64)>,
}

/// Runs `work`, and shows what `step` says meanwhile.
pub(crate) fn show_while<R>(step: impl Fn() -> Step + Sync, work: impl FnOnce() -> R) -> R {
    let finished = Finished::default();
    std::thread::scope(|scope| {
        if is_watched() {
            scope.spawn(|| show(&step, &finished));
        }
        let _finished = Guard(&finished);
        work()
    })
}

/// Whether somebody sees what is shown.
pub(crate) fn is_watched() -> bool {
    io::stderr().is_terminal()
}

/// Says once to a person what a command did; a report in `json` says it already.
pub(crate) fn conclude(text: &str, json: bool) {
    if is_watched() && !json {
        super::report::tell(text);
    }
}

/// Makes room for a line of another kind.
pub(crate) fn clear() {
    if SHOWN.swap(false, Ordering::SeqCst) {
        let _ = write!(io::stderr(), "{CLEAR}");
    }
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

fn show(step: &impl Fn() -> Step, finished: &Finished) {
    let started = Instant::now();
    while !finished.within(INTERVAL) {
        let width = rustix::termios::tcgetwinsize(io::stderr()).map_or(WIDTH, |size| size.ws_col);
        let width = usize::from(if width == 0 { WIDTH } else { width });
        // A full line would wrap.
        let line: String = line(&step(), started.elapsed()).chars().take(width - 1).collect();
        SHOWN.store(true, Ordering::SeqCst);
        // What cannot be shown is not worth an error.
        let _ = write!(io::stderr(), "{CLEAR}{line}");
    }
    clear();
}

fn line(step: &Step, elapsed: Duration) -> String {
    let Step { text, of } = step;
    match of {
        Some((done, total)) if total > &0 => {
            let percent = u128::from(*done.min(total)) * 100 / u128::from(*total);
            let left = time_left(*done, *total, elapsed);
            let left = left.map_or_else(String::new, |left| format!(", about {} left", time_text(left)));
            format!("{text}, {percent} %{left}")
        }
        _ => format!("{text}, {}", time_text(elapsed)),
    }
}

/// At the pace so far.
fn time_left(done: u64, total: u64, elapsed: Duration) -> Option<Duration> {
    let left = u128::from(total.checked_sub(done).filter(|left| *left > 0)?);
    let millis = (elapsed.as_millis() * left).checked_div(u128::from(done)).filter(|_| elapsed >= SETTLED)?;
    Some(Duration::from_secs(u64::try_from(millis.div_ceil(1000)).ok()?.max(1)))
}

/// As `12 s`, `3 min 20 s` or `2 h 5 min`.
pub(crate) fn time_text(time: Duration) -> String {
    match time.as_secs() {
        seconds @ ..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// As `900 bytes`, `12 KiB` or `3.4 GiB`.
pub(crate) fn size_text(bytes: u64) -> String {
    let unit = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)].into_iter().find(|(_, shift)| bytes >> shift > 0);
    match unit {
        None => super::report::counted(bytes, "byte"),
        Some((unit, shift)) if bytes >> shift >= 10 => format!("{} {unit}", bytes >> shift),
        Some((unit, shift)) => format!("{}.{} {unit}", bytes >> shift, (bytes >> (shift - 10)) % 1024 * 10 / 1024),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_the_pace_and_is_not_zero_before_the_end() {
        let left =
            |done, total, seconds| time_left(done, total, Duration::from_secs(seconds)).map(|left| left.as_secs());
        assert_eq!(left(0, 10, 5), None);
        assert_eq!(left(5, 10, 0), None, "too early to tell");
        assert_eq!(left(100, 1000, 1), Some(9));
        assert_eq!(left(999_999, 1_000_000, 1), Some(1));
        assert_eq!((left(10, 10, 3), left(11, 10, 3)), (None, None));
        assert_eq!(left(u64::MAX - 1, u64::MAX, 1 << 40), Some(1));
    }

    #[test]
    fn lines_say_what_is_known() {
        let line = |of, seconds| line(&Step { text: "3 files".to_owned(), of }, Duration::from_secs(seconds));
        assert_eq!(line(None, 75), "3 files, 1 min 15 s");
        assert_eq!(line(Some((1, 4)), 60), "3 files, 25 %, about 3 min 0 s left");
        assert_eq!((line(Some((9, 4)), 2), line(Some((4, 4)), 2)), ("3 files, 100 %".into(), "3 files, 100 %".into()));
        assert_eq!(line(Some((0, 0)), 2), "3 files, 2 s");
        assert_eq!(time_text(Duration::from_secs(7500)), "2 h 5 min");
        assert_eq!(
            [0, 1023, 1024, 1536, 10 << 20].map(size_text),
            ["0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "10 MiB"]
        );
    }
}
