//! Threads for what may take a network's time, so that the threads that serve the kernel never wait for a provider.
//!
//! Invariant: a job runs for the caller whose request it serves, and one that never got a thread in time fails at once. A
//! provider that never answers thus keeps nobody waiting for the sum of all calls before.

use std::time::Duration;

use crate::keys::{Behalf, KeyError, ProviderError, ProviderErrorKind};
use crate::runtime::{Late, Limits, WorkerPool};

use super::Error;
use super::trim::is_in_background;

/// The longest wait for a thread.
const WAIT_MAX: Duration = Duration::from_secs(5);

pub(super) struct Workers(WorkerPool);

impl Workers {
    /// At most so many threads of this name, which stay once they have started.
    pub(super) fn new(name: &'static str, threads: usize) -> Self {
        Self(WorkerPool::new(Limits { name, threads, idle_max: None, wait_max: WAIT_MAX }, is_in_background))
    }

    /// Runs `job` on one of the threads, or on this one if the system gives none.
    pub(super) fn run(&self, job: impl FnOnce(Result<(), Error>) + Send + 'static) {
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
    pub(super) fn unfinished(&self) -> usize {
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
