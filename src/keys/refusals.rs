//! Refusals of a provider, remembered for a moment: who asks for the same key again gets the same answer without a call.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;

use super::cache::CacheKey;
use super::{KeyError, KeyLimits, Moment};

/// Refusals remembered at most.
const ENTRIES: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4095);
/// How long at most; shorter where keys live shorter, so that a key that is granted again is soon found.
const LONGEST: Duration = Duration::from_secs(2);

pub(super) struct Refusals {
    refused: Mutex<LruCache<CacheKey, (KeyError, Moment)>>,
    memory: Duration,
}

impl Refusals {
    pub(super) fn new(limits: KeyLimits) -> Self {
        Self { refused: Mutex::new(LruCache::new(ENTRIES)), memory: LONGEST.min(limits.max_age / 4) }
    }

    pub(super) fn get(&self, key: &CacheKey, now: Moment) -> Option<KeyError> {
        let mut refused = self.refused();
        let (error, since) = refused.get(key)?;
        if now.saturating_duration_since(*since) < self.memory {
            return Some(error.clone());
        }
        refused.pop(key);
        None
    }

    pub(super) fn remember(&self, key: &CacheKey, error: &KeyError, now: Moment) {
        self.refused().put(key.clone(), (error.clone(), now));
    }

    pub(super) fn clear(&self) {
        self.refused().clear();
    }

    fn refused(&self) -> MutexGuard<'_, LruCache<CacheKey, (KeyError, Moment)>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
