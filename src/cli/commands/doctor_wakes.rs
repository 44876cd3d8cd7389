//! How long this host takes to wake a thread, which every operation of a mount does twice: `kmsfs doctor`.

use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::pipe::pipe;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::doctor::Findings;

/// Times that two threads wake each other.
const ROUNDS: usize = 201;
/// Worth a word from here on. CPUs that are awake wake each other in some 2 us.
const SLOW: Duration = Duration::from_micros(15);

/// Measures it.
pub(super) fn check(findings: &mut Findings) {
    match median_wake() {
        Ok(Some(wake)) => judge(wake, findings),
        Ok(None) => findings.ok("wakes", "there is one CPU"),
        Err(error) => findings.warn("wakes", format!("cannot be measured: {error}"), "look at the limits of this user"),
    }
}

fn judge(wake: Duration, findings: &mut Findings) {
    let what = format!("a thread on another CPU is woken in {} us", wake.as_micros());
    if wake <= SLOW {
        return findings.ok("wakes", what);
    }
    let what = format!("{what}: idle CPUs sleep deeply here, and small files wait for them most of the time");
    findings.warn("wakes", what, "if their speed matters, mount with `-o lowlatency`, as root");
}

/// Half of what threads on two CPUs take to wake each other, in the middle of many times; none with one CPU.
fn median_wake() -> io::Result<Option<Duration>> {
    let allowed = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
    let (Some(one), Some(other)) = (cpus.next(), cpus.next()) else { return Ok(None) };
    let (asked, ask) = pipe()?;
    let (answered, answer) = pipe()?;
    // With a thread its ends of the pipes go, so that the other one does not wait for it.
    let answering = thread::Builder::new().spawn(move || {
        stay_on(other)?;
        (0..ROUNDS).try_for_each(|_| await_signal(&asked).and_then(|()| signal(&answer)))
    })?;
    let asking = thread::Builder::new().spawn(move || {
        stay_on(one)?;
        let mut times = Vec::with_capacity(ROUNDS);
        for _ in 0..ROUNDS {
            let start = Instant::now();
            signal(&ask)?;
            await_signal(&answered)?;
            times.push(start.elapsed() / 2);
        }
        times.sort_unstable();
        Ok(times[ROUNDS / 2])
    })?;
    let panicked = || io::Error::other("a thread has panicked");
    answering.join().map_err(|_| panicked())??;
    asking.join().map_err(|_| panicked())?.map(Some)
}

fn stay_on(cpu: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    Ok(sched_setaffinity(None, &cpus)?)
}

fn signal(pipe: &OwnedFd) -> io::Result<()> {
    rustix::io::write(pipe, &[0])?;
    Ok(())
}

fn await_signal(pipe: &OwnedFd) -> io::Result<()> {
    match rustix::io::read(pipe, &mut [0][..])? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_wake_is_worth_a_word() {
        let judged = |micros| {
            let mut findings = Findings::default();
            judge(Duration::from_micros(micros), &mut findings);
            format!("{findings:?}")
        };
        assert!(judged(4).contains("Ok") && judged(4).contains("in 4 us"));
        assert!(judged(31).contains("Warn") && judged(31).contains("lowlatency"));
        let wake = median_wake().unwrap();
        assert!(wake.is_none_or(|wake| !wake.is_zero() && wake < Duration::from_secs(1)), "{wake:?}");
    }
}
