//! How often and how long: counters that many threads raise on the hot path, and what they have counted.
//!
//! Imports nothing of ours. Invariants: raising one takes no lock and waits for nobody; threads raise counters of their own
//! as far as there are enough, so that they do not take cache lines from each other; what is read while others count may
//! lack what they count at that moment, and never goes back.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Counters of one kind; threads share them if there are more threads.
const SHARDS: usize = 8;
/// Upper bounds of durations: 1 µs, 2 µs, 4 µs ... 33.6 s, and without end.
const BUCKETS: usize = 27;

thread_local! {
    static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Which of the counters this thread raises.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let known = SHARD.get();
    if known < SHARDS {
        return known;
    }
    let new = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    SHARD.set(new);
    new
}

/// A sum.
#[derive(Default)]
pub struct Counter([Line; SHARDS]);

/// Alone in its cache line, and in the one that the CPU fetches with it.
#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0[shard()].0.fetch_add(n, Ordering::Relaxed);
    }

    /// The sum.
    #[must_use]
    pub fn read(&self) -> u64 {
        self.0.iter().map(|line| line.0.load(Ordering::Relaxed)).sum()
    }
}

/// How long things took.
#[derive(Default)]
pub struct Histogram([Shard; SHARDS]);

#[derive(Default)]
#[repr(align(128))]
struct Shard {
    buckets: [AtomicU64; BUCKETS],
    nanos: AtomicU64,
}

impl Histogram {
    /// Counts one that took so long.
    pub fn note(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let shard = &self.0[shard()];
        shard.buckets[bucket(nanos)].fetch_add(1, Ordering::Relaxed);
        shard.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// What was counted.
    #[must_use]
    pub fn read(&self) -> Latency {
        let mut latency = Latency { buckets: vec![0; BUCKETS], nanos: 0 };
        for shard in &self.0 {
            for (sum, bucket) in latency.buckets.iter_mut().zip(&shard.buckets) {
                *sum += bucket.load(Ordering::Relaxed);
            }
            latency.nanos = latency.nanos.wrapping_add(shard.nanos.load(Ordering::Relaxed));
        }
        latency
    }
}

/// The first bucket whose bound is not below.
fn bucket(nanos: u64) -> usize {
    let micros = nanos.div_ceil(1000).max(1);
    ((u64::BITS - (micros - 1).leading_zeros()) as usize).min(BUCKETS - 1)
}

/// How long things took: how many of them in each power of two of microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// The `n`th counts what took up to 2^n µs and more than the one before; the last what took longer.
    pub buckets: Vec<u64>,
    /// All of them together, in nanoseconds.
    pub nanos: u64,
}

impl Latency {
    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The upper bound of the `n`th bucket; `None` is without end.
    #[must_use]
    pub fn bound(n: usize) -> Option<Duration> {
        (n + 1 < BUCKETS).then(|| Duration::from_micros(1 << n))
    }

    /// What was counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |n: usize| earlier.buckets.get(n).copied().unwrap_or(0);
        Self {
            buckets: self.buckets.iter().enumerate().map(|(n, now)| now.saturating_sub(before(n))).collect(),
            nanos: self.nanos.wrapping_sub(earlier.nanos),
        }
    }

    /// Both together.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let len = self.buckets.len().max(other.buckets.len());
        let of = |latency: &Self, n: usize| latency.buckets.get(n).copied().unwrap_or(0);
        Self {
            buckets: (0..len).map(|n| of(self, n) + of(other, n)).collect(),
            nanos: self.nanos.wrapping_add(other.nanos),
        }
    }

    /// The mean; zero of none.
    #[must_use]
    pub fn mean(&self) -> Duration {
        Duration::from_nanos(self.nanos.checked_div(self.count()).unwrap_or(0))
    }

    /// A bound that this part of all did not exceed, 0.99 for 99 of 100: at most twice too high. Zero of none.
    #[must_use]
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a rank among counts
    pub fn quantile(&self, part: f64) -> Duration {
        let rank = (self.count() as f64 * part).ceil() as u64;
        let mut sum = 0;
        for (n, count) in self.buckets.iter().enumerate() {
            sum += count;
            if sum >= rank.max(1) {
                return Self::bound(n).unwrap_or(Duration::from_micros(1 << n));
            }
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_below_the_bound_of_their_bucket_and_above_the_one_before() {
        for nanos in [0, 1, 999, 1000, 1001, 2000, 2001, 4000, 123_456, 1 << 30, 33_000_000_000] {
            let n = bucket(nanos);
            assert!(nanos <= u64::try_from(Latency::bound(n).unwrap().as_nanos()).unwrap(), "{nanos}");
            assert!(n == 0 || u128::from(nanos) > Latency::bound(n - 1).unwrap().as_nanos(), "{nanos}");
        }
        assert_eq!((bucket(u64::MAX), Latency::bound(BUCKETS - 1)), (BUCKETS - 1, None));
    }

    #[test]
    fn threads_lose_nothing() {
        let (counter, histogram) = (Counter::default(), Histogram::default());
        std::thread::scope(|scope| {
            for _ in 0..20 {
                scope.spawn(|| {
                    for _ in 0..1000 {
                        counter.add(3);
                        histogram.note(Duration::from_micros(3));
                    }
                });
            }
        });
        let read = histogram.read();
        assert_eq!((counter.read(), read.count(), read.nanos), (60_000, 20_000, 60_000_000));
        assert_eq!((read.buckets[2], read.mean()), (20_000, Duration::from_micros(3)));
    }

    #[test]
    fn quantiles_are_bounds() {
        let histogram = Histogram::default();
        (0..99).for_each(|_| histogram.note(Duration::from_micros(10)));
        histogram.note(Duration::from_millis(100));
        let all = histogram.read();
        assert_eq!([0.5, 0.99].map(|part| all.quantile(part)), [Duration::from_micros(16); 2]);
        assert_eq!(all.quantile(1.0), Duration::from_micros(1 << 17));
        assert_eq!(Latency::default().quantile(0.5), Duration::ZERO);
        assert_eq!(all.since(&all).count(), 0);
        assert_eq!(all.with(&all).count(), 200);
    }

    /// Prints what counting costs; run with `--nocapture`.
    #[test]
    #[allow(clippy::print_stdout)] // it is for people
    fn counting_costs_little() {
        const ROUNDS: u32 = 1_000_000;
        let histogram = Histogram::default();
        for threads in [1, 4] {
            let start = std::time::Instant::now();
            std::thread::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|| {
                        for _ in 0..ROUNDS {
                            let begin = std::time::Instant::now();
                            histogram.note(std::hint::black_box(begin.elapsed()));
                        }
                    });
                }
            });
            let each = start.elapsed() / ROUNDS;
            println!("{threads} threads: {each:?} for two looks at the clock and a count");
            assert!(each < Duration::from_micros(20), "{each:?}");
        }
    }
}
