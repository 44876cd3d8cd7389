//! Unwrapped data keys, least recently used first out, limited by count and age. Evicting a key wipes it once the last
//! user is done with it.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::crypto::DataKey;

/// How many unwrapped keys are kept, for how long, and how often a provider may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLimits {
    /// Keys at most.
    pub entries: NonZeroUsize,
    /// Age at most, since the provider gave the key. Then it is asked again, and its refusal counts, for open files too.
    pub max_age: Duration,
    /// How much longer a key may be used while the provider cannot be reached.
    pub stale_grace: Duration,
    /// Calls of providers a second at most; `None` is as many as are wanted.
    pub calls_per_second: Option<NonZeroU32>,
}

impl Default for KeyLimits {
    /// 16384 keys for five minutes and not a moment longer, and as many calls as are wanted.
    fn default() -> Self {
        Self {
            entries: NonZeroUsize::MIN.saturating_add(16383),
            max_age: Duration::from_secs(300),
            stale_grace: Duration::ZERO,
            calls_per_second: None,
        }
    }
}

/// Names a wrapped key: the data key's id and a digest of its records, so that no other ciphertext can stand in for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct CacheKey {
    pub(super) data_key_id: [u8; 16],
    pub(super) records: [u8; 32],
}

/// An unwrapped key, and when its provider gave it.
#[derive(Clone)]
pub(super) struct Unwrapped {
    pub(super) key: Arc<DataKey>,
    pub(super) since: Instant,
}

pub(super) struct Cache {
    entries: Mutex<LruCache<CacheKey, Unwrapped>>,
    limits: KeyLimits,
}

impl Cache {
    pub(super) fn new(limits: KeyLimits) -> Self {
        Self { entries: Mutex::new(LruCache::new(limits.entries)), limits }
    }

    /// The key, if it is there and young enough at `now`.
    pub(super) fn get(&self, key: &CacheKey, now: Instant) -> Option<Unwrapped> {
        self.younger_than(self.limits.max_age, key, now)
    }

    /// The key, if it may be used at `now` although its provider cannot be reached.
    pub(super) fn get_stale(&self, key: &CacheKey, now: Instant) -> Option<Unwrapped> {
        self.younger_than(self.limits.max_age + self.limits.stale_grace, key, now)
    }

    /// The key, if its provider gave it within the first half of its life.
    pub(super) fn get_fresh(&self, key: &CacheKey, now: Instant) -> Option<Unwrapped> {
        self.younger_than(self.limits.max_age / 2, key, now)
    }

    /// A key that is too old for any use is wiped on the way.
    fn younger_than(&self, age: Duration, key: &CacheKey, now: Instant) -> Option<Unwrapped> {
        let mut entries = self.entries();
        let entry = entries.get(key)?;
        let found = now.saturating_duration_since(entry.since);
        if found < age {
            return Some(entry.clone());
        }
        if found >= self.limits.max_age + self.limits.stale_grace {
            entries.pop(key);
        }
        None
    }

    pub(super) fn put(&self, key: CacheKey, unwrapped: Unwrapped) {
        self.entries().put(key, unwrapped);
    }

    /// Wipes a key that its provider has refused.
    pub(super) fn remove(&self, key: &CacheKey) {
        self.entries().pop(key);
    }

    /// Wipes what is too old for any use.
    pub(super) fn sweep(&self, now: Instant) {
        let oldest = self.limits.max_age + self.limits.stale_grace;
        let mut entries = self.entries();
        let old: Vec<_> = entries
            .iter()
            .filter(|(_, entry)| now.saturating_duration_since(entry.since) >= oldest)
            .map(|(key, _)| key.clone())
            .collect();
        old.iter().for_each(|key| drop(entries.pop(key)));
    }

    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    pub(super) fn clear(&self) {
        self.entries().clear();
    }

    fn entries(&self) -> MutexGuard<'_, LruCache<CacheKey, Unwrapped>> {
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

    fn unwrapped(since: Instant) -> Unwrapped {
        Unwrapped { key: Arc::new(Secret::random()), since }
    }

    fn limits(entries: usize) -> KeyLimits {
        KeyLimits {
            entries: NonZeroUsize::new(entries).unwrap(),
            max_age: Duration::from_secs(10),
            stale_grace: Duration::from_secs(5),
            calls_per_second: None,
        }
    }

    #[test]
    fn count_and_age_limit_it() {
        let (cache, start) = (Cache::new(limits(2)), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for n in 0..3 {
            cache.put(name(n), unwrapped(start));
        }
        assert!(cache.get(&name(0), start).is_none());
        assert!(cache.get_fresh(&name(2), at(4)).is_some() && cache.get_fresh(&name(2), at(5)).is_none());
        assert!(cache.get(&name(2), at(9)).is_some() && cache.get(&name(2), at(10)).is_none());
        assert!(cache.get_stale(&name(2), at(14)).is_some() && cache.get_stale(&name(2), at(15)).is_none());
        assert_eq!(cache.len(), 1);
        cache.sweep(at(14));
        assert_eq!(cache.len(), 1);
        cache.sweep(at(15));
        assert_eq!(cache.len(), 0);
    }

    #[test]
    fn an_evicted_key_is_dropped_by_the_cache() {
        let cache = Cache::new(limits(1));
        let first = unwrapped(Instant::now());
        cache.put(name(1), first.clone());
        cache.put(name(2), unwrapped(Instant::now()));
        assert_eq!(Arc::strong_count(&first.key), 1);
        let third = unwrapped(Instant::now());
        cache.put(name(3), third.clone());
        cache.clear();
        assert_eq!(Arc::strong_count(&third.key), 1);
    }
}
