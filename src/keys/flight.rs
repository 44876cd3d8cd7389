//! Single flight: any number of threads that want the same key at the same time cost one call.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::cache::{CacheKey, Unwrapped};
use super::{KeyError, ProviderError, ProviderErrorKind};

type Answer = Result<Unwrapped, KeyError>;

type Call = OnceLock<Answer>;

#[derive(Default)]
pub(super) struct Flight {
    calls: Mutex<HashMap<CacheKey, Arc<Call>>>,
}

impl Flight {
    /// Runs `call` for the first thread that wants `key`, and hands its answer to all that ask meanwhile. The deadline of
    /// the wait is the provider's own.
    pub(super) fn run(&self, key: &CacheKey, call: impl FnOnce() -> Answer) -> Answer {
        let (shared, leads) = self.join(key);
        if !leads {
            return shared.wait().clone();
        }
        let landing = Landing { flight: self, key, call: &shared };
        let answer = call();
        landing.land(answer)
    }

    fn join(&self, key: &CacheKey) -> (Arc<Call>, bool) {
        let mut calls = self.calls();
        if let Some(call) = calls.get(key) {
            return (Arc::clone(call), false);
        }
        let call = Arc::new(Call::default());
        calls.insert(key.clone(), Arc::clone(&call));
        (call, true)
    }

    fn calls(&self) -> MutexGuard<'_, HashMap<CacheKey, Arc<Call>>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes the waiting threads whatever becomes of the leading one.
struct Landing<'f> {
    flight: &'f Flight,
    key: &'f CacheKey,
    call: &'f Call,
}

impl Landing<'_> {
    fn land(self, answer: Answer) -> Answer {
        self.call.get_or_init(|| answer).clone()
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.flight.calls().remove(self.key);
        self.call.get_or_init(|| {
            Err(ProviderError::new(ProviderErrorKind::BadAnswer, "the call for this key ended without an answer")
                .into())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Secret;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn many_threads_make_one_call() {
        let (flight, calls) = (Flight::default(), AtomicU32::new(0));
        let key = CacheKey { data_key_id: [1; 16], records: [2; 32] };
        let all_started = Barrier::new(8);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    all_started.wait();
                    let answer = flight.run(&key, || {
                        calls.fetch_add(1, Ordering::Relaxed);
                        // Lands only after the other seven have joined or could have: they hold the call's Arc.
                        while Arc::strong_count(&flight.calls()[&key]) < 9 {
                            std::thread::yield_now();
                        }
                        Ok(Unwrapped { key: Arc::new(Secret::random()), since: crate::keys::Moment::now() })
                    });
                    assert!(answer.is_ok());
                });
            }
        });
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert!(flight.calls().is_empty());
    }
}
