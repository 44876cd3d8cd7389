//! Threads for what may take a network's time, so that the threads that serve the kernel never wait for a provider.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

type Job = Box<dyn FnOnce() + Send>;

/// Threads that are started when they are first needed and stay.
pub(super) struct Lane {
    jobs: Sender<Job>,
    queue: Arc<Mutex<Receiver<Job>>>,
    threads: Mutex<usize>,
    most: usize,
}

impl Lane {
    /// With so many threads at most; each waits for one provider call at a time.
    pub(super) fn new(most: usize) -> Self {
        let (jobs, queue) = channel();
        Self { jobs, queue: Arc::new(Mutex::new(queue)), threads: Mutex::new(0), most }
    }

    /// Runs `job` on one of the threads; a job is never lost, and runs here if no thread can be had.
    pub(super) fn run(&self, job: Job) {
        self.grow();
        if let Err(refused) = self.jobs.send(job) {
            (refused.0)();
        }
    }

    fn grow(&self) {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        if *threads < self.most {
            let queue = Arc::clone(&self.queue);
            let started = std::thread::Builder::new().name("kmsfs-keys".to_owned()).spawn(move || serve(&queue));
            *threads += usize::from(started.is_ok());
        }
    }
}

fn serve(queue: &Mutex<Receiver<Job>>) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        match job {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}
