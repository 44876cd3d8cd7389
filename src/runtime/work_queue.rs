//! Work for many threads that makes more work. What was found last is done first, so that the directories whose entries
//! wait are few.
//!
//! Invariants: a piece of work is done once; [`WorkQueue::run`] returns when all of it is done; no thread waits for another
//! one's work to be taken.

use parking_lot::{Condvar, Mutex};

/// With more waiting than this, small pieces are done by the thread that found them.
const ENOUGH: usize = 4096;

pub(crate) struct WorkQueue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    waiting: Vec<T>,
    /// Threads that may still add work.
    busy: usize,
}

impl<T: Send> WorkQueue<T> {
    pub(crate) fn new(first: Vec<T>) -> Self {
        Self { state: Mutex::new(State { waiting: first, busy: 0 }), changed: Condvar::new() }
    }

    /// Adds work.
    pub(crate) fn push(&self, work: T) {
        self.state.lock().waiting.push(work);
        self.changed.notify_one();
    }

    /// Adds work, or gives it back if there is enough of it: then the caller does it.
    pub(crate) fn offer(&self, work: T) -> Option<T> {
        let mut state = self.state.lock();
        if state.waiting.len() >= ENOUGH {
            return Some(work);
        }
        state.waiting.push(work);
        drop(state);
        self.changed.notify_one();
        None
    }

    /// Does all of the work with so many threads.
    pub(crate) fn run(&self, threads: usize, work: impl Fn(T) + Sync) {
        std::thread::scope(|scope| {
            for _ in 0..threads.max(1) {
                scope.spawn(|| {
                    while let Some(next) = self.next() {
                        let _busy = Busy(self);
                        work(next);
                    }
                });
            }
        });
    }

    fn next(&self) -> Option<T> {
        let mut state = self.state.lock();
        loop {
            if let Some(next) = state.waiting.pop() {
                state.busy += 1;
                return Some(next);
            }
            if state.busy == 0 {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }
}

/// A thread at work; one that panics lets the others end.
struct Busy<'q, T: Send>(&'q WorkQueue<T>);

impl<T: Send> Drop for Busy<'_, T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.busy -= 1;
        if state.busy == 0 && state.waiting.is_empty() {
            drop(state);
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn work_that_makes_work_is_done_once() {
        // A binary tree of depth 14, more than the queue takes.
        let (queue, done, inline) = (WorkQueue::new(vec![14_u32]), AtomicU64::new(0), AtomicU64::new(0));
        fn visit(queue: &WorkQueue<u32>, depth: u32, done: &AtomicU64, inline: &AtomicU64) {
            done.fetch_add(1, Ordering::Relaxed);
            for _ in 0..2 * u32::from(depth > 0) {
                if let Some(mine) = queue.offer(depth - 1) {
                    inline.fetch_add(1, Ordering::Relaxed);
                    visit(queue, mine, done, inline);
                }
            }
        }
        queue.run(8, |depth| visit(&queue, depth, &done, &inline));
        assert_eq!(done.into_inner(), (1 << 15) - 1);
    }

    #[test]
    fn an_offer_is_refused_only_when_there_is_enough() {
        let queue = WorkQueue::new((0..ENOUGH).collect());
        assert_eq!(queue.offer(7), Some(7));
        queue.push(8);
        assert_eq!(queue.next(), Some(8));
    }
}
