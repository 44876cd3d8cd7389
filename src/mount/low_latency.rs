//! `-o lowlatency`: the machine's CPUs do not sleep while requests follow each other closely.
//!
//! Each request wakes a thread of ours and then the program that waits for it, mostly on a CPU that has gone to sleep since. Where
//! waking it takes long, as in some virtual machines, that is most of what a request takes. Linux lets root say how long a
//! wake may take (`/dev/cpu_dma_latency`, PM QoS): here it is not to take any time, which keeps all CPUs awake.
//!
//! Invariants: it is said only while requests come closely, and taken back at most two [`LOOK`]s after; nothing of it is left
//! when the process ends, however it ends, since the kernel takes it back with the descriptor.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use super::MountError;

pub(super) const DEVICE: &str = "/dev/cpu_dma_latency";
/// Microseconds that a wake may take: none, and any, which is the kernel's own word for it.
const NONE: i32 = 0;
const ANY: i32 = 2_000_000_000;
/// So many requests within [`SOON`] are close. A program that makes small files one after the other sends 40 000 a second.
const MANY: u32 = 32;
const SOON: Duration = Duration::from_millis(8);
/// How often it looks whether they still come: fewer than [`FEW`] meanwhile are the end.
const LOOK: Duration = Duration::from_millis(10);
const FEW: u32 = 16;

/// Opens the kernel's device for it.
pub(super) fn open_device() -> Result<OwnedFd, MountError> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    device.map_err(|error| MountError::NoLatencyDevice(error.into()))
}

/// Ends with its mount.
pub(super) struct LowLatency(Arc<Shared>);

struct Shared {
    device: OwnedFd,
    requests: AtomicU32,
    /// The CPUs are kept awake.
    on: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    ended: bool,
    /// When the last [`MANY`] requests began.
    since: Instant,
}

impl LowLatency {
    /// Through the kernel's `device` for it.
    pub(super) fn new(device: OwnedFd) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            device,
            requests: AtomicU32::new(0),
            on: AtomicBool::new(false),
            state: Mutex::new(State { ended: false, since: Instant::now() }),
            changed: Condvar::new(),
        });
        let watch = Arc::clone(&shared);
        thread::Builder::new().name("kmsfs-latency".to_owned()).spawn(move || watch.look())?;
        Ok(Self(shared))
    }

    /// A request has come.
    pub(super) fn note(&self) {
        let shared = &self.0;
        let number = shared.requests.fetch_add(1, Ordering::Relaxed);
        if number.wrapping_add(1).is_multiple_of(MANY) && !shared.on.load(Ordering::Relaxed) {
            shared.note_many();
        }
    }
}

impl Shared {
    fn note_many(&self) {
        let mut state = self.lock();
        let now = Instant::now();
        let took = now - state.since;
        state.since = now;
        if took <= SOON && !self.on.load(Ordering::Relaxed) {
            self.say(NONE);
            self.on.store(true, Ordering::Relaxed);
            self.changed.notify_all();
        }
    }

    /// Takes back what was said when requests no longer come.
    fn look(&self) {
        let mut state = self.lock();
        let mut seen = 0;
        while !state.ended {
            if !self.on.load(Ordering::Relaxed) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                seen = self.requests.load(Ordering::Relaxed);
                continue;
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
            let requests = self.requests.load(Ordering::Relaxed);
            if requests.wrapping_sub(seen) < FEW {
                self.say(ANY);
                self.on.store(false, Ordering::Relaxed);
            }
            seen = requests;
        }
    }

    fn say(&self, microseconds: i32) {
        if let Err(error) = rustix::io::write(&self.device, &microseconds.to_ne_bytes()) {
            tracing::debug!("{DEVICE} cannot be written: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LowLatency {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was written last to a device that is a pipe; nothing before the deadline is none.
    fn said(pipe: &OwnedFd, within: Duration) -> Option<i32> {
        let mut bytes = [0; 4];
        let until = Instant::now() + within;
        loop {
            match rustix::io::read(pipe, &mut bytes[..]) {
                Ok(4) => return Some(i32::from_ne_bytes(bytes)),
                _ if Instant::now() > until => return None,
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn cpus_are_awake_while_requests_come_closely_and_no_longer() {
        let (told, device) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        let latency = LowLatency::new(device).unwrap();
        let (soon, late) = (Duration::from_millis(50), Duration::from_secs(10));
        for _ in 0..2 {
            for _ in 0..3 * MANY {
                latency.note();
                thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(said(&told, soon), None, "32 in 32 ms are not close");
            let until = Instant::now() + late;
            let first = loop {
                for _ in 0..3 * MANY {
                    latency.note();
                }
                match said(&told, Duration::ZERO) {
                    None if Instant::now() < until => {}
                    said => break said,
                }
            };
            assert_eq!(first, Some(NONE));
            assert_eq!(said(&told, late), Some(ANY));
        }
        drop(latency);
        let mut byte = [0];
        let until = Instant::now() + late;
        while rustix::io::read(&told, &mut byte[..]) != Ok(0) {
            assert!(Instant::now() < until, "the device is still held");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
