//! What the key path has done, and how it fares.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::crypto::KeyMemory;

use super::Ring;
use super::calls::{CallMeasure, CallsByOperation};
use super::pool::PoolMeasure;

/// What the key path has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyStats {
    /// Openings answered from memory.
    pub hits: u64,
    /// Openings that needed a provider.
    pub misses: u64,
    /// Calls of providers.
    pub calls: CallsByOperation,
    /// Calls that failed.
    pub failures: u64,
    /// Unwrapped keys in memory.
    pub entries: u64,
    /// What kind of memory keys are in, in this process.
    pub memory: KeyMemory,
}

/// How the key path fares, in numbers that change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KeyMeasures {
    /// Calls of providers.
    pub calls: Vec<CallMeasure>,
    /// Calls a second that may be made now; `None` is as many as are wanted.
    pub calls_per_second: Option<f64>,
    /// Unwrapped keys in memory at most.
    pub cache_limit: u64,
    /// Data keys for new files.
    pub pool: PoolMeasure,
}

impl Ring {
    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> KeyStats {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        KeyStats {
            hits: read(&self.counts.hits),
            misses: read(&self.counts.misses),
            calls: self.calls.calls(),
            failures: self.calls.failures(),
            entries: self.cache.len() as u64,
            memory: KeyMemory::in_use(),
        }
    }

    /// The same and more for those who watch it.
    #[must_use]
    pub fn measures(&self) -> KeyMeasures {
        KeyMeasures {
            calls: self.calls.read(),
            calls_per_second: self.budget.rate(),
            cache_limit: self.limits.entries.get() as u64,
            pool: self.pool.read(),
        }
    }
}
