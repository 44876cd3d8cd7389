//! The clock that keys age by: it goes on while the machine sleeps, which `std::time::Instant` does not.

use std::ops::Add;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment since this machine was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Duration);

impl Moment {
    /// This one.
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let [seconds, nanoseconds] = [now.tv_sec, now.tv_nsec].map(|part| u64::try_from(part).unwrap_or_default());
        Self(Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds))
    }

    /// How long it is after `earlier`; nothing if it is not.
    #[must_use]
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// How long ago it is.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }

    /// So much before it.
    #[cfg(test)]
    pub(crate) fn before(self, by: Duration) -> Self {
        Self(self.0.checked_sub(by).expect("a machine that has run for longer"))
    }
}

impl Add<Duration> for Moment {
    type Output = Self;

    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// A time namespace in which the machine has slept for some days.
    #[test]
    #[allow(clippy::print_stderr)] // why it was not run
    fn it_counts_the_time_asleep() {
        const ASLEEP: Duration = Duration::from_secs(1_000_000);
        if std::env::var_os("KMSFS_TEST_ASLEEP").is_some() {
            let awake = clock_gettime(ClockId::Monotonic);
            let ahead = Moment::now().0.as_secs().abs_diff(u64::try_from(awake.tv_sec).unwrap());
            assert!(ahead >= ASLEEP.as_secs(), "{ahead}");
            return;
        }
        let namespace =
            ["--user", "--map-root-user", "--time", "--boottime", &ASLEEP.as_secs().to_string()].map(str::to_owned);
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new("unshare");
        command
            .args(namespace)
            .arg("--fork")
            .arg(program)
            .args(["--exact", "keys::moment::tests::it_counts_the_time_asleep"]);
        match command.env("KMSFS_TEST_ASLEEP", "1").output() {
            Ok(output) if String::from_utf8_lossy(&output.stderr).contains("unshare:") => {
                eprintln!("not run: no time namespace here: {}", String::from_utf8_lossy(&output.stderr));
            }
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => eprintln!("not run: no unshare here: {error}"),
        }
    }
}
