//! What is counted of every operation, for those who watch a mount.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::keys::KeyMeasures;
use crate::meter::{Counter, Histogram, Latency};

use super::error::{Error, MOST_ERRNO, errno_name};

/// An operation that the kernel asks for and that does something here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // they are the protocol's
pub enum Operation {
    Lookup,
    Getattr,
    Setattr,
    Readlink,
    Mknod,
    Mkdir,
    Unlink,
    Rmdir,
    Symlink,
    Rename,
    Link,
    Open,
    Create,
    Read,
    Write,
    Release,
    Fsync,
    Fallocate,
    Opendir,
    Readdir,
    Fsyncdir,
    Statfs,
    Getxattr,
    Listxattr,
    Setxattr,
    Removexattr,
}

impl Operation {
    /// All of them, in order.
    pub const ALL: [Self; 26] = [
        Self::Lookup,
        Self::Getattr,
        Self::Setattr,
        Self::Readlink,
        Self::Mknod,
        Self::Mkdir,
        Self::Unlink,
        Self::Rmdir,
        Self::Symlink,
        Self::Rename,
        Self::Link,
        Self::Open,
        Self::Create,
        Self::Read,
        Self::Write,
        Self::Release,
        Self::Fsync,
        Self::Fallocate,
        Self::Opendir,
        Self::Readdir,
        Self::Fsyncdir,
        Self::Statfs,
        Self::Getxattr,
        Self::Listxattr,
        Self::Setxattr,
        Self::Removexattr,
    ];

    /// Its name: that of the variant in small letters.
    #[must_use]
    pub fn name(self) -> String {
        format!("{self:?}").to_ascii_lowercase()
    }
}

/// How often those that end are looked after.
const PAUSE: Duration = Duration::from_millis(5);

/// Counts of all operations.
#[derive(Default)]
pub struct OperationCounts {
    under_way: AtomicU64,
    /// None begins any more.
    over: AtomicBool,
    latency: [Histogram; Operation::ALL.len()],
    errors: [Errors; Operation::ALL.len()],
    pub(super) read: Counter,
    pub(super) written: Counter,
}

/// By errno; what has a greater one counts as 0.
struct Errors([AtomicU64; MOST_ERRNO + 1]);

impl Default for Errors {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; MOST_ERRNO + 1])
    }
}

/// An operation that has begun. It is counted when it ends, wherever that is.
#[must_use = "an operation that does not end is not counted"]
pub struct Begun<C: Deref<Target = OperationCounts>> {
    operation: Operation,
    at: Instant,
    counts: C,
}

impl<C: Deref<Target = OperationCounts>> Begun<C> {
    /// It begins now. Once all is over it never does: its thread waits for the end of the process.
    pub(super) fn new(operation: Operation, counts: C) -> Self {
        counts.under_way.fetch_add(1, Ordering::SeqCst);
        if counts.over.load(Ordering::SeqCst) {
            counts.under_way.fetch_sub(1, Ordering::SeqCst);
            loop {
                thread::park();
            }
        }
        Self { operation, at: Instant::now(), counts }
    }

    /// It has ended so; the result is given back.
    ///
    /// # Errors
    /// That of the result.
    pub fn end<T>(self, result: Result<T, Error>) -> Result<T, Error> {
        self.counts.latency[self.operation as usize].note(self.at.elapsed());
        if let Err(error) = &result
            && !self.is_usual(error)
        {
            let errno = usize::try_from(error.errno()).ok().filter(|errno| *errno <= MOST_ERRNO);
            self.counts.errors[self.operation as usize].0[errno.unwrap_or(0)].fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    /// Whether it is an answer like any other: that there is no such name, or no such attribute, is what programs ask.
    fn is_usual(&self, error: &Error) -> bool {
        match error {
            Error::LeftToKernel => true,
            Error::NoEntry => self.operation == Operation::Lookup,
            // Its own, or that of the backing filesystem.
            other => other.errno() == Error::NoAttribute.errno(),
        }
    }

    /// The same for one that moves bytes: so many, if it went well.
    ///
    /// # Errors
    /// That of the result.
    pub fn end_moving<T>(self, result: Result<T, Error>, bytes: impl FnOnce(&T) -> usize) -> Result<T, Error> {
        if let Ok(moved) = &result {
            let counter = if self.operation == Operation::Read { &self.counts.read } else { &self.counts.written };
            counter.add(bytes(moved) as u64);
        }
        self.end(result)
    }
}

impl<C: Deref<Target = OperationCounts>> Drop for Begun<C> {
    fn drop(&mut self) {
        self.counts.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

/// One operation, since the mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationMetrics {
    /// Its name.
    pub operation: String,
    /// How many, and how long they took, from the kernel's request to the answer; failed ones too.
    pub latency: Latency,
    /// How many failed, by errno; without lookups that found nothing and attributes that are not there.
    pub errors: Vec<(String, u64)>,
}

/// How a mount fares, in numbers that change. Counts are since the mount.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// All operations.
    pub operations: Vec<OperationMetrics>,
    /// Plain bytes that the kernel was given.
    pub read_bytes: u64,
    /// Plain bytes that it gave.
    pub written_bytes: u64,
    /// The key path.
    pub keys: KeyMeasures,
    /// Descriptors in use.
    pub descriptors: u64,
    /// Descriptors that this process may have; files are forgotten before they are used up.
    pub descriptor_limit: u64,
}

impl OperationCounts {
    /// Lets none begin any more; whether those under way end within `patience`.
    pub(super) fn end(&self, patience: Duration) -> bool {
        self.over.store(true, Ordering::SeqCst);
        let until = Instant::now() + patience;
        while self.under_way.load(Ordering::SeqCst) > 0 {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(PAUSE);
        }
        true
    }

    pub(super) fn read_all(&self) -> Vec<OperationMetrics> {
        let metrics = |operation: Operation| {
            let errors = self.errors[operation as usize].0.iter().enumerate();
            let errors = errors.map(|(errno, count)| (errno, count.load(Ordering::Relaxed)));
            OperationMetrics {
                operation: operation.name(),
                latency: self.latency[operation as usize].read(),
                errors: errors.filter(|(_, count)| *count > 0).map(|(errno, n)| (errno_name(errno), n)).collect(),
            }
        };
        Operation::ALL.into_iter().map(metrics).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn once_all_is_over_none_begins_and_those_under_way_are_waited_for() {
        let counts = Arc::new(OperationCounts::default());
        let under_way = Begun::new(Operation::Write, Arc::clone(&counts));
        assert!(!counts.end(Duration::from_millis(20)));
        let (begins, begun) = std::sync::mpsc::channel();
        let for_thread = Arc::clone(&counts);
        thread::spawn(move || {
            let late = Begun::new(Operation::Read, for_thread);
            begins.send(()).unwrap();
            late.end(Ok(()))
        });
        thread::spawn(move || under_way.end(Ok(())));
        assert!(counts.end(Duration::from_secs(10)));
        assert!(begun.recv_timeout(Duration::from_millis(50)).is_err(), "it began");
    }

    #[test]
    fn each_operation_is_counted_for_itself() {
        let counts = Arc::new(OperationCounts::default());
        for (at, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, at);
            let begin = || Begun::new(operation, Arc::clone(&counts));
            begin().end(Ok(())).unwrap();
            begin().end::<()>(Err(Error::Exists)).unwrap_err();
            begin().end::<()>(Err(Error::NoAttribute)).unwrap_err();
            begin().end::<()>(Err(Error::LeftToKernel)).unwrap_err();
        }
        let begin = |operation| Begun::new(operation, &*counts);
        begin(Operation::Read).end_moving(Ok(5), |n| *n).unwrap();
        begin(Operation::Write).end_moving(Ok(7), |n| *n).unwrap();
        assert_eq!((counts.read.read(), counts.written.read()), (5, 7));
        for metrics in counts.read_all() {
            let moves = u64::from(["read", "write"].contains(&metrics.operation.as_str()));
            assert_eq!(metrics.latency.count(), 4 + moves, "{}", metrics.operation);
            assert_eq!(metrics.errors, [("EEXIST".to_owned(), 1)]);
        }
    }
}
