//! Threads for jobs that may take long, as a network call does. They start when they are needed, up to a bound.
//!
//! Neither `rayon` nor `threadpool` fits: both start all their threads at once and let jobs wait without a deadline, and a
//! blocking job is what `rayon` forbids.
//!
//! Invariants: a job that was taken on runs exactly once, also when the pool is dropped; one that waited too long for a thread
//! learns that and must end at once; a job that panics ends no other; dropping waits for the threads, but not beyond
//! [`DROP_WAIT_MAX`].

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

/// How long dropping a pool waits for its threads.
const DROP_WAIT_MAX: Duration = Duration::from_secs(1);

/// Gets what its thread keeps from job to job, and whether its turn came in time.
pub(crate) type Job<W> = Box<dyn FnOnce(&mut W, Result<(), Late>) + Send>;

/// The job has waited for a thread longer than its pool allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no thread was free for it in time")]
pub(crate) struct Late;

/// A pool whose threads keep a `W` each from job to job. A job that panics costs its thread that `W`.
pub(crate) struct WorkerPool<W = ()> {
    shared: Arc<Shared<W>>,
}

struct Shared<W> {
    limits: Limits,
    make: Box<dyn Fn() -> W + Send + Sync>,
    state: Mutex<State<W>>,
    changed: Condvar,
}

/// How many threads there are, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// The threads' name.
    pub(crate) name: &'static str,
    /// Threads at most.
    pub(crate) threads: usize,
    /// A thread ends after so long without a job; without it, it stays.
    pub(crate) idle_max: Option<Duration>,
    /// A job that has waited for longer is [`Late`].
    pub(crate) wait_max: Duration,
}

struct State<W> {
    waiting: VecDeque<(Job<W>, Instant)>,
    threads: Vec<ThreadId>,
    busy: usize,
    is_closed: bool,
}

impl<W: 'static> WorkerPool<W> {
    /// Each thread begins with what `make` returns on it.
    pub(crate) fn new(limits: Limits, make: impl Fn() -> W + Send + Sync + 'static) -> Self {
        let state = State { waiting: VecDeque::new(), threads: Vec::new(), busy: 0, is_closed: false };
        let shared = Shared { limits, make: Box::new(make), state: Mutex::new(state), changed: Condvar::new() };
        Self { shared: Arc::new(shared) }
    }

    /// Runs `job` on one of the threads.
    ///
    /// # Errors
    /// There is no thread, and the system gives none: with the job, which did not run.
    pub(crate) fn run(&self, job: Job<W>) -> Result<(), Job<W>> {
        let mut state = self.shared.state.lock();
        state.waiting.push_back((job, Instant::now()));
        if state.threads.len() < self.shared.limits.threads.min(state.unfinished()) {
            let shared = Arc::clone(&self.shared);
            let name = self.shared.limits.name.to_owned();
            // It waits for the lock before it does anything.
            match std::thread::Builder::new().name(name).spawn(move || shared.serve()) {
                Ok(thread) => state.threads.push(thread.thread().id()),
                Err(_) if state.threads.is_empty() => {
                    return state.waiting.pop_back().map_or(Ok(()), |(job, _)| Err(job));
                }
                Err(_) => {}
            }
        }
        drop(state);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// How many jobs have not ended.
    pub(crate) fn unfinished(&self) -> usize {
        self.shared.state.lock().unfinished()
    }

    #[cfg(test)]
    pub(crate) fn threads(&self) -> usize {
        self.shared.state.lock().threads.len()
    }
}

impl<W> Drop for WorkerPool<W> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.is_closed = true;
        self.shared.changed.notify_all();
        let own = std::thread::current().id();
        let others_live = |state: &mut State<W>| state.threads.iter().any(|id| *id != own);
        self.shared.changed.wait_while_for(&mut state, others_live, DROP_WAIT_MAX);
    }
}

impl<W> State<W> {
    fn unfinished(&self) -> usize {
        self.waiting.len() + self.busy
    }
}

impl<W> Shared<W> {
    fn serve(&self) {
        let mut worker = None;
        let mut state = self.state.lock();
        loop {
            while let Some((job, since)) = self.next(&mut state) {
                state.busy += 1;
                MutexGuard::unlocked(&mut state, || {
                    let turn = if since.elapsed() < self.limits.wait_max { Ok(()) } else { Err(Late) };
                    // The hook has told why it panicked. What it has left of the worker is not used again.
                    let whole = || job(worker.get_or_insert_with(&self.make), turn);
                    if catch_unwind(AssertUnwindSafe(whole)).is_err() {
                        worker = None;
                    }
                });
                state.busy -= 1;
            }
            MutexGuard::unlocked(&mut state, || worker = None);
            // A job that came meanwhile has counted on this thread.
            if state.waiting.is_empty() {
                break;
            }
        }
        let own = std::thread::current().id();
        state.threads.retain(|id| *id != own);
        self.changed.notify_all();
    }

    /// Waits for a job. None if the thread is to end.
    fn next(&self, state: &mut MutexGuard<'_, State<W>>) -> Option<(Job<W>, Instant)> {
        let since = Instant::now();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                return Some(job);
            }
            if state.is_closed {
                return None;
            }
            match self.limits.idle_max.map(|max| max.saturating_sub(since.elapsed())) {
                None => self.changed.wait(state),
                Some(Duration::ZERO) => return None,
                Some(left) => _ = self.changed.wait_for(state, left),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{self, Receiver, Sender};

    const LONG: Duration = Duration::from_secs(20);
    const LIMITS: Limits = Limits { name: "test", threads: 2, idle_max: None, wait_max: LONG };

    fn pool(limits: Limits) -> WorkerPool {
        WorkerPool::new(limits, || ())
    }

    /// Gives `pool` a job that says when it begins, then waits for a word, then says whether its turn came in time.
    fn gated(pool: &WorkerPool, begin: &Sender<bool>, end: &Sender<bool>) -> Sender<()> {
        let (go, gate) = mpsc::channel();
        let (begin, end) = (begin.clone(), end.clone());
        let job = move |_: &mut (), turn: Result<(), Late>| {
            begin.send(turn.is_ok()).unwrap();
            let _ = gate.recv();
            end.send(turn.is_ok()).unwrap();
        };
        assert!(pool.run(Box::new(job)).is_ok());
        go
    }

    fn nothing(said: &Receiver<bool>) -> bool {
        said.recv_timeout(Duration::from_millis(50)).is_err()
    }

    #[test]
    fn threads_come_with_the_jobs_and_no_more_than_wanted() {
        let pool = pool(LIMITS);
        assert_eq!(pool.threads(), 0);
        let ((begin, begun), (end, ended)) = (mpsc::channel(), mpsc::channel());
        let first = gated(&pool, &begin, &end);
        assert!(begun.recv_timeout(LONG).unwrap());
        assert_eq!((pool.threads(), pool.unfinished()), (1, 1));
        let others: Vec<_> = (0..4).map(|_| gated(&pool, &begin, &end)).collect();
        assert!(begun.recv_timeout(LONG).unwrap());
        assert!(nothing(&begun), "the queue is full: the rest waits");
        assert_eq!((pool.threads(), pool.unfinished()), (2, 5));
        drop((first, others));
        assert!((0..5).all(|_| ended.recv_timeout(LONG).unwrap()));
        let last = gated(&pool, &begin, &end);
        drop(last);
        assert!(ended.recv_timeout(LONG).unwrap());
        assert_eq!(pool.threads(), 2, "a thread that is there serves the next job");
    }

    #[test]
    fn a_job_that_waited_too_long_learns_it() {
        let wait_max = Duration::from_millis(20);
        let pool = pool(Limits { threads: 1, wait_max, ..LIMITS });
        let ((begin, begun), (end, ended)) = (mpsc::channel(), mpsc::channel());
        let first = gated(&pool, &begin, &end);
        assert!(begun.recv_timeout(LONG).unwrap());
        drop(gated(&pool, &begin, &end));
        std::thread::sleep(2 * wait_max);
        drop(first);
        assert_eq!([ended.recv_timeout(LONG).unwrap(), ended.recv_timeout(LONG).unwrap()], [true, false]);
    }

    #[test]
    fn threads_without_a_job_end_and_come_again() {
        let pool = pool(Limits { idle_max: Some(Duration::from_millis(5)), ..LIMITS });
        let ((begin, _begun), (end, ended)) = (mpsc::channel(), mpsc::channel());
        for _ in 0..3 {
            drop((gated(&pool, &begin, &end), gated(&pool, &begin, &end)));
            assert!((0..2).all(|_| ended.recv_timeout(LONG).unwrap()));
            let start = Instant::now();
            while pool.threads() > 0 {
                assert!(start.elapsed() < LONG);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // Jobs that come just when a thread ends are not lost.
        for pause in 0..400 {
            drop(gated(&pool, &begin, &end));
            assert!(ended.recv_timeout(LONG).unwrap());
            std::thread::sleep(Duration::from_micros(4900 + pause));
        }
    }

    #[test]
    fn a_job_that_panics_takes_along_only_what_its_thread_kept() {
        let (made, makes) = mpsc::channel();
        let made = Mutex::new(made);
        let pool = WorkerPool::new(Limits { threads: 1, ..LIMITS }, move || {
            made.lock().send(()).unwrap();
            0_u32
        });
        let (tell, told) = mpsc::channel();
        for panics in [false, true, false, false] {
            let tell = tell.clone();
            let job = move |count: &mut u32, _| {
                *count += 1;
                assert!(!panics, "this job fails");
                tell.send(*count).unwrap();
            };
            assert!(pool.run(Box::new(job)).is_ok());
        }
        assert_eq!([1, 1, 2].map(|_: u32| told.recv_timeout(LONG).unwrap()), [1, 1, 2]);
        assert_eq!((makes.try_iter().count(), pool.threads()), (2, 1));
        drop(pool);
    }

    #[test]
    fn what_was_taken_on_runs_before_a_pool_is_gone() {
        let pool = pool(Limits { threads: 1, ..LIMITS });
        let ((begin, begun), (end, ended)) = (mpsc::channel(), mpsc::channel());
        let jobs: Vec<_> = (0..3).map(|_| gated(&pool, &begin, &end)).collect();
        assert!(begun.recv_timeout(LONG).unwrap());
        let ending = std::thread::spawn(move || drop(pool));
        assert!(nothing(&ended));
        drop((jobs, begin, end));
        ending.join().unwrap();
        assert_eq!(ended.iter().count(), 3, "and no thread is left");
    }

    #[test]
    fn a_job_that_hangs_or_drops_its_pool_keeps_nobody() {
        let hanging = pool(LIMITS);
        let ((begin, begun), (end, _ended)) = (mpsc::channel(), mpsc::channel());
        let go = gated(&hanging, &begin, &end);
        assert!(begun.recv_timeout(LONG).unwrap());
        let start = Instant::now();
        drop(hanging);
        assert!((DROP_WAIT_MAX..LONG).contains(&start.elapsed()), "{:?}", start.elapsed());
        drop(go);

        let pool = Arc::new(pool(LIMITS));
        let own = Arc::clone(&pool);
        let ((go, gate), (tell, told)) = (mpsc::channel::<()>(), mpsc::channel());
        let job = move |_: &mut (), _| {
            gate.recv().unwrap();
            let start = Instant::now();
            drop(own);
            tell.send(start.elapsed()).unwrap();
        };
        assert!(pool.run(Box::new(job)).is_ok());
        drop(pool);
        go.send(()).unwrap();
        assert!(told.recv_timeout(LONG).unwrap() < DROP_WAIT_MAX, "a thread does not wait for itself");
    }
}
