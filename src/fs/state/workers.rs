//! Threads for what may take a network's time, so that the threads that serve the kernel never wait for a provider.
//!
//! Invariant: a job runs for the caller whose request it serves, and one that never got a thread in time fails at once. A
//! provider that never answers thus keeps nobody waiting for the sum of all calls before.

use std::time::Duration;

use crate::keys::{Behalf, KeyError, ProviderError, ProviderErrorKind};
use crate::runtime::{Late, Limits, WorkerPool};

use crate::fs::error::Error;

use super::descriptors::enter_background;

/// The longest wait for a thread.
const WAIT_MAX: Duration = Duration::from_secs(5);

/// Threads for operations that wait for a provider.
const KEY_THREADS: usize = 16;
/// Threads that ask again for the keys of open files.
const RENEWAL_THREADS: usize = 8;
/// Threads for what may take long and asks no provider.
const CHORE_THREADS: usize = 4;
/// Calls for keys that are fetched ahead.
const PREFETCH_THREADS: usize = 96;

/// All of them.
pub(crate) struct Pools {
    /// For operations that wait for a provider.
    pub(crate) keys: Workers,
    /// Apart from those: the keys of open files are renewed although many wait to be opened.
    pub(crate) renewals: Workers,
    /// For what may take long and asks no provider.
    pub(crate) chores: Workers,
    pub(crate) prefetch: Workers,
}

impl Default for Pools {
    fn default() -> Self {
        Self {
            keys: Workers::new("kmsfs-keys", KEY_THREADS),
            renewals: Workers::new("kmsfs-renewals", RENEWAL_THREADS),
            chores: Workers::new("kmsfs-chores", CHORE_THREADS),
            prefetch: Workers::new("kmsfs-prefetch", PREFETCH_THREADS),
        }
    }
}

pub(crate) struct Workers(WorkerPool);

impl Workers {
    /// At most so many threads of this name, which stay once they have started.
    fn new(name: &'static str, threads: usize) -> Self {
        Self(WorkerPool::new(Limits { name, threads, idle_max: None, wait_max: WAIT_MAX }, enter_background))
    }

    /// Runs `job` on one of the threads, or on this one if the system gives none.
    pub(crate) fn run(&self, job: impl FnOnce(Result<(), Error>) + Send + 'static) {
        let behalf = Behalf::current();
        let job = move |(): &mut (), turn: Result<(), Late>| {
            let _behalf = behalf.enter();
            job(turn.map_err(Error::from));
        };
        if let Err(job) = self.0.run(Box::new(job)) {
            job(&mut (), Ok(()));
        }
    }

    /// Jobs that have not ended.
    pub(crate) fn unfinished(&self) -> usize {
        self.0.unfinished()
    }
}

impl From<Late> for Error {
    fn from(_: Late) -> Self {
        let message = "too many operations wait for the key's provider: check why it is slow, and try again later";
        KeyError::from(ProviderError::new(ProviderErrorKind::Throttled, message)).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_waited_too_long_times_out() {
        assert_eq!(Error::from(Late).errno(), libc::ETIMEDOUT);
    }
}
