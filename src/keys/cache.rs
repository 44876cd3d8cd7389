//! Unwrapped data keys, least recently used first out, limited by count and age. Evicting a key wipes it once the last
//! user is done with it.
//!
//! A large cache has several shards, so that openers of different files rarely wait for each other. Invariants:
//! * the limits of the shards add up to the limit of the cache: there are never more keys than that;
//! * each shard drops the least recently used of its own keys, so a large cache may drop a key when a few more than nine
//!   tenths of it are in use; one with fewer than [`SHARE`] keys for each of two shards has one, and is exact;
//! * only one shard's lock is held at a time.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;

use crate::crypto::DataKey;

use super::Moment;

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
    pub(super) since: Moment,
}

/// Shards at most.
const MAX_SHARDS: usize = 16;
/// Keys that make it worth having another shard.
const SHARE: usize = 1024;

pub(super) struct Cache {
    shards: Vec<Shard>,
    limits: KeyLimits,
}

type Shard = Mutex<LruCache<CacheKey, Unwrapped>>;
type Entries<'c> = MutexGuard<'c, LruCache<CacheKey, Unwrapped>>;

impl Cache {
    pub(super) fn new(limits: KeyLimits) -> Self {
        let all = limits.entries.get();
        let count = (all / SHARE).clamp(1, MAX_SHARDS);
        // As equal as they can be, and all of them together exactly.
        let share = |shard: usize| all / count + usize::from(shard < all % count);
        let shards = (0..count).map(|shard| NonZeroUsize::new(share(shard)).unwrap_or(NonZeroUsize::MIN));
        Self { shards: shards.map(|share| Mutex::new(LruCache::new(share))).collect(), limits }
    }

    /// The key, if it is there and young enough at `now`.
    pub(super) fn get(&self, key: &CacheKey, now: Moment) -> Option<Unwrapped> {
        self.younger_than(self.limits.max_age, key, now)
    }

    /// The key, if it may be used at `now` although its provider cannot be reached.
    pub(super) fn get_stale(&self, key: &CacheKey, now: Moment) -> Option<Unwrapped> {
        self.younger_than(self.limits.max_age + self.limits.stale_grace, key, now)
    }

    /// The key, if its provider gave it within the first half of its life.
    pub(super) fn get_fresh(&self, key: &CacheKey, now: Moment) -> Option<Unwrapped> {
        self.younger_than(self.limits.max_age / 2, key, now)
    }

    /// A key that is too old for any use is wiped on the way.
    fn younger_than(&self, age: Duration, key: &CacheKey, now: Moment) -> Option<Unwrapped> {
        let mut entries = self.shard_of(key);
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
        let evicted = self.shard_of(&key).push(key, unwrapped);
        // Its memory is wiped without the lock.
        drop(evicted);
    }

    /// Wipes a key that its provider has refused.
    pub(super) fn remove(&self, key: &CacheKey) {
        self.shard_of(key).pop(key);
    }

    /// Wipes what is too old for any use.
    pub(super) fn sweep(&self, now: Moment) {
        let oldest = self.limits.max_age + self.limits.stale_grace;
        for shard in &self.shards {
            let mut entries = locked(shard);
            let old: Vec<_> = entries
                .iter()
                .filter(|(_, entry)| now.saturating_duration_since(entry.since) >= oldest)
                .map(|(key, _)| key.clone())
                .collect();
            old.iter().for_each(|key| drop(entries.pop(key)));
        }
    }

    pub(super) fn len(&self) -> usize {
        self.shards.iter().map(|shard| locked(shard).len()).sum()
    }

    pub(super) fn clear(&self) {
        self.shards.iter().for_each(|shard| locked(shard).clear());
    }

    /// Ids of data keys are random, so their first bytes spread them evenly.
    fn shard_of(&self, key: &CacheKey) -> Entries<'_> {
        let [first, second, ..] = key.data_key_id;
        locked(&self.shards[usize::from(u16::from_le_bytes([first, second])) % self.shards.len()])
    }
}

fn locked(shard: &Shard) -> Entries<'_> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Secret;

    fn name(n: u8) -> CacheKey {
        CacheKey { data_key_id: [n; 16], records: [0; 32] }
    }

    fn unwrapped(since: Moment) -> Unwrapped {
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
        let (cache, start) = (Cache::new(limits(2)), Moment::now());
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

    /// Ids as the key path makes them.
    fn random_name() -> CacheKey {
        CacheKey { data_key_id: crate::crypto::random_array(), records: [0; 32] }
    }

    #[test]
    fn the_limits_of_the_shards_add_up() {
        for (entries, shards) in [(1, 1), (15, 1), (2047, 1), (2048, 2), (5000, 4), (16384, 16), (100_003, 16)] {
            let cache = Cache::new(limits(entries));
            let shares: Vec<usize> = cache.shards.iter().map(|shard| locked(shard).cap().get()).collect();
            assert_eq!((shares.len(), shares.iter().sum()), (shards, entries));
            assert!(shares.iter().max().unwrap() - shares.iter().min().unwrap() <= 1, "{shares:?}");
        }
    }

    #[test]
    fn a_cache_of_one_key_keeps_the_last_one() {
        let cache = Cache::new(limits(1));
        let start = Moment::now();
        for _ in 0..100 {
            let key = random_name();
            cache.put(key.clone(), unwrapped(start));
            assert!(cache.get(&key, start).is_some());
            assert_eq!(cache.len(), 1);
        }
    }

    #[test]
    fn a_sharded_cache_is_never_too_full_and_nearly_full() {
        let entries = 4096;
        let (cache, start) = (Cache::new(limits(entries)), Moment::now());
        for _ in 0..entries * 9 / 10 {
            cache.put(random_name(), unwrapped(start));
        }
        // Shares of 1024 that each get 922 keys, give or take 30: to exceed one is more than three times that.
        assert!(cache.len() >= entries * 9 / 10 - 20, "{}", cache.len());
        for _ in 0..2 * entries {
            cache.put(random_name(), unwrapped(start));
            assert!(cache.len() <= entries);
        }
        assert_eq!(cache.len(), entries);
        let last = random_name();
        cache.put(last.clone(), unwrapped(start));
        assert!(cache.get(&last, start).is_some());
        cache.remove(&last);
        assert!(cache.get(&last, start).is_none());
        cache.sweep(start + Duration::from_secs(15));
        assert_eq!(cache.len(), 0);
    }

    #[test]
    fn an_evicted_key_is_dropped_by_the_cache() {
        let cache = Cache::new(limits(1));
        let first = unwrapped(Moment::now());
        cache.put(name(1), first.clone());
        cache.put(name(2), unwrapped(Moment::now()));
        assert_eq!(Arc::strong_count(&first.key), 1);
        let third = unwrapped(Moment::now());
        cache.put(name(3), third.clone());
        cache.clear();
        assert_eq!(Arc::strong_count(&third.key), 1);
    }
}
