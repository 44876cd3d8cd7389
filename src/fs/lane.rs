//! Threads for what may take a network's time, so that the threads that serve the kernel never wait for a provider.
//!
//! Invariants: a job is never lost; one that has waited too long for a thread is told so and must end at once, so that a
//! provider that never answers keeps nobody waiting for the sum of all calls before his.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::keys::{Behalf, KeyError, ProviderError, ProviderErrorKind};

use super::Error;
use super::trim::is_in_background;

/// The longest wait for a thread.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Is told whether its turn came in time.
type Job = Box<dyn FnOnce(Result<(), Error>) + Send>;

/// Threads that are started when they are first needed and stay.
pub(super) struct Lane {
    jobs: Sender<Waiting>,
    queue: Arc<Queue>,
    threads: Mutex<usize>,
    most: usize,
    name: &'static str,
}

struct Waiting {
    job: Job,
    since: Instant,
    behalf: Behalf,
}

struct Queue {
    jobs: Mutex<Receiver<Waiting>>,
    /// Jobs that have not ended.
    unfinished: AtomicUsize,
}

impl Lane {
    /// With so many threads of this name at most; each waits for one provider call at a time.
    pub(super) fn new(name: &'static str, most: usize) -> Self {
        let (jobs, queue) = channel();
        let queue = Arc::new(Queue { jobs: Mutex::new(queue), unfinished: AtomicUsize::new(0) });
        Self { jobs, queue, threads: Mutex::new(0), most, name }
    }

    /// Runs `job` on one of the threads, or here if no thread can be had; on behalf of whom this thread works for.
    pub(super) fn run(&self, job: Job) {
        let unfinished = self.queue.unfinished.fetch_add(1, Ordering::Relaxed) + 1;
        let threads = self.grow(unfinished);
        let waiting = Waiting { job, since: Instant::now(), behalf: Behalf::current() };
        if threads == 0 {
            self.queue.run(waiting);
        } else if let Err(refused) = self.jobs.send(waiting) {
            self.queue.run(refused.0);
        }
    }

    /// How many jobs have not ended.
    pub(super) fn unfinished(&self) -> usize {
        self.queue.unfinished.load(Ordering::Relaxed)
    }

    /// Starts a thread if there are fewer than are `wanted`; returns how many there are.
    fn grow(&self, wanted: usize) -> usize {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if *threads < self.most.min(wanted) {
            let queue = Arc::clone(&self.queue);
            let started = std::thread::Builder::new().name(self.name.to_owned()).spawn(move || queue.serve());
            *threads += usize::from(started.is_ok());
        }
        *threads
    }
}

impl Queue {
    fn serve(&self) {
        is_in_background();
        loop {
            let waiting = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            match waiting {
                Ok(waiting) => self.run(waiting),
                Err(_) => return,
            }
        }
    }

    fn run(&self, waiting: Waiting) {
        let _behalf = waiting.behalf.enter();
        (waiting.job)(turn(waiting.since.elapsed()));
        self.unfinished.fetch_sub(1, Ordering::Relaxed);
    }
}

fn turn(waited: Duration) -> Result<(), Error> {
    if waited < MAX_WAIT {
        return Ok(());
    }
    let message = "too many operations wait for the key's provider: check why it is slow, and try again later";
    Err(KeyError::from(ProviderError::new(ProviderErrorKind::Throttled, message)).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn threads_come_with_the_jobs_and_no_more_than_wanted() {
        let lane = Lane::new("test", 2);
        let (end, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (tell, told) = mpsc::channel();
        for _ in 0..5 {
            let (gate, tell) = (Arc::clone(&gate), tell.clone());
            lane.run(Box::new(move |turn| {
                let _ = gate.lock().unwrap().recv();
                tell.send(turn.is_ok()).unwrap();
            }));
        }
        assert_eq!((*lane.threads.lock().unwrap(), lane.unfinished()), (2, 5));
        drop(end);
        assert!((0..5).all(|_| told.recv_timeout(Duration::from_secs(10)).unwrap()));
    }

    #[test]
    fn a_job_that_waited_too_long_is_told_so() {
        assert!(turn(Duration::ZERO).is_ok());
        assert_eq!(turn(MAX_WAIT).unwrap_err().errno(), libc::ETIMEDOUT);
    }
}
