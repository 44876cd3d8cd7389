//! Unwrapped data keys, least recently used first out, limited by count and age. Evicting a key wipes it once the last
//! user is done with it.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::crypto::DataKey;

/// How many unwrapped keys are kept, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLimits {
    /// Keys at most.
    pub entries: NonZeroUsize,
    /// Age at most, since the provider gave the key.
    pub max_age: Duration,
}

impl Default for CacheLimits {
    /// 16384 keys for five minutes.
    fn default() -> Self {
        Self { entries: NonZeroUsize::MIN.saturating_add(16383), max_age: Duration::from_secs(300) }
    }
}

/// Names a wrapped key: the data key's id and a digest of its records, so that no other ciphertext can stand in for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct CacheKey {
    pub(super) data_key_id: [u8; 16],
    pub(super) records: [u8; 32],
}

struct Entry {
    key: Arc<DataKey>,
    since: Instant,
}

pub(super) struct Cache {
    entries: Mutex<LruCache<CacheKey, Entry>>,
    max_age: Duration,
}

impl Cache {
    pub(super) fn new(limits: CacheLimits) -> Self {
        Self { entries: Mutex::new(LruCache::new(limits.entries)), max_age: limits.max_age }
    }

    /// The key, if it is there and young enough at `now`.
    pub(super) fn get(&self, key: &CacheKey, now: Instant) -> Option<Arc<DataKey>> {
        let mut entries = self.entries();
        let entry = entries.get(key)?;
        if now.saturating_duration_since(entry.since) < self.max_age {
            return Some(Arc::clone(&entry.key));
        }
        entries.pop(key);
        None
    }

    pub(super) fn put(&self, key: CacheKey, data_key: Arc<DataKey>, now: Instant) {
        self.entries().put(key, Entry { key: data_key, since: now });
    }

    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    pub(super) fn clear(&self) {
        self.entries().clear();
    }

    fn entries(&self) -> MutexGuard<'_, LruCache<CacheKey, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Secret;

    fn name(n: u8) -> CacheKey {
        CacheKey { data_key_id: [n; 16], records: [0; 32] }
    }

    #[test]
    fn count_and_age_limit_it() {
        let limits = CacheLimits { entries: NonZeroUsize::new(2).unwrap(), max_age: Duration::from_secs(10) };
        let (cache, start) = (Cache::new(limits), Instant::now());
        for n in 0..3 {
            cache.put(name(n), Arc::new(Secret::random()), start);
        }
        assert!(cache.get(&name(0), start).is_none());
        assert!(cache.get(&name(2), start + Duration::from_secs(9)).is_some());
        assert!(cache.get(&name(2), start + Duration::from_secs(10)).is_none());
        assert_eq!(cache.len(), 1);
        cache.clear();
        assert!(cache.get(&name(1), start).is_none());
    }

    #[test]
    fn an_evicted_key_is_dropped_by_the_cache() {
        let cache = Cache::new(CacheLimits { entries: NonZeroUsize::MIN, ..CacheLimits::default() });
        let key = Arc::new(Secret::random());
        cache.put(name(1), Arc::clone(&key), Instant::now());
        cache.put(name(2), Arc::new(Secret::random()), Instant::now());
        assert_eq!(Arc::strong_count(&key), 1);
    }
}
