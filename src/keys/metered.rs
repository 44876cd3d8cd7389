//! A provider behind a meter: calls are counted, and kept under a rate that the operator sets and that gives way when the
//! provider throttles.

use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::crypto::DataKey;

use super::calls::CallCounts;
use super::gate::Gate;
use super::{
    EncryptionContext, Generated, Operation, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};

/// Calls may come in bursts of so many seconds' worth.
const BURST: f64 = 0.1;
/// A call that would wait longer for its turn is refused at once: the queue has an end.
const MAX_WAIT: Duration = Duration::from_secs(5);
/// The slowest rate that throttling leads to, in calls a second.
const SLOWEST: f64 = 1.0;
/// Beyond this rate, in calls a second, there is none, unless the operator set one.
const UNLIMITED: f64 = 20_000.0;
/// A provider that throttles is believed to grant so many calls a second at least, until it throttles again.
const LEAST_GRANTED: f64 = 20.0;
/// After each second without throttling the rate grows by so much.
const GROWTH: f64 = 1.25;
/// The rate is lowered once in so long: the refusals of one burst count once.
const SETTLE: Duration = Duration::from_millis(100);

/// A token bucket with a rate that adapts.
pub(super) struct Budget {
    /// What the operator set.
    limit: Option<f64>,
    bucket: Mutex<Bucket>,
}

struct Bucket {
    /// Calls a second; `None` is without limit.
    rate: Option<f64>,
    /// When the next call may begin.
    next: Option<Instant>,
    raised: Option<Instant>,
    lowered: Option<Instant>,
    window: Option<Window>,
}

/// Calls that succeeded in the second that began then, and in the one before.
#[derive(Clone, Copy)]
struct Window {
    begin: Instant,
    calls: u32,
    before: u32,
}

impl Window {
    fn count(window: Option<Self>, now: Instant) -> Self {
        let Some(window) = window else { return Self { begin: now, calls: 1, before: 0 } };
        match now.saturating_duration_since(window.begin).as_secs() {
            0 => Self { calls: window.calls.saturating_add(1), ..window },
            1 => Self { begin: now, calls: 1, before: window.calls },
            _ => Self { begin: now, calls: 1, before: 0 },
        }
    }
}

impl Budget {
    pub(super) fn new(limit: Option<NonZeroU32>) -> Self {
        let limit = limit.map(|limit| f64::from(limit.get()));
        Self {
            limit,
            bucket: Mutex::new(Bucket { rate: limit, next: None, raised: None, lowered: None, window: None }),
        }
    }

    /// Calls a second that may be made now; `None` is as many as are wanted.
    pub(super) fn rate(&self) -> Option<f64> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner).rate
    }

    /// How long a call that is wanted at `now` must wait for its turn; `None` if that would be too long.
    fn reserve(&self, now: Instant) -> Option<Duration> {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(rate) = bucket.rate else { return Some(Duration::ZERO) };
        let earliest = now.checked_sub(Duration::from_secs_f64(BURST)).unwrap_or(now);
        let turn = bucket.next.unwrap_or(earliest).max(earliest);
        let wait = turn.saturating_duration_since(now);
        if wait > MAX_WAIT {
            return None;
        }
        bucket.next = Some(turn + Duration::from_secs_f64(1.0 / rate));
        Some(wait)
    }

    /// Halves the rate, or what the provider granted of it, for a call that began at `began` and was refused at `now`: unless
    /// it began before the rate was lowered last, or just after.
    fn slow_down(&self, began: Instant, now: Instant) {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        if bucket.lowered.is_some_and(|lowered| began < lowered + SETTLE) {
            return;
        }
        let granted = bucket.window.map_or(0.0, |window| f64::from(window.calls.max(window.before)));
        let granted = granted.max(LEAST_GRANTED);
        let rate = bucket.rate.map_or(granted, |rate| rate.min(granted));
        bucket.rate = Some((rate / 2.0).max(SLOWEST));
        bucket.lowered = Some(now);
    }

    /// Counts a call that succeeded, and lets the rate grow back.
    fn speed_up(&self, now: Instant) {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        bucket.window = Some(Window::count(bucket.window, now));
        let (Some(rate), Some(_)) = (bucket.rate, bucket.lowered) else { return };
        if recent(bucket.lowered, now) || recent(bucket.raised, now) {
            return;
        }
        bucket.raised = Some(now);
        let faster = rate * GROWTH;
        (bucket.rate, bucket.lowered) = match self.limit {
            Some(limit) if faster >= limit => (Some(limit), None),
            None if faster >= UNLIMITED => (None, None),
            _ => (Some(faster), bucket.lowered),
        };
    }
}

/// Whether it was less than a second ago.
fn recent(then: Option<Instant>, now: Instant) -> bool {
    then.is_some_and(|then| now.saturating_duration_since(then) < Duration::from_secs(1))
}

/// See the module. A throttled call is tried again here and nowhere else, so that every attempt is counted and paced.
pub(super) struct Metered {
    provider: Arc<dyn Provider>,
    counts: Arc<CallCounts>,
    budget: Arc<Budget>,
    gate: Arc<Gate>,
}

impl Metered {
    pub(super) fn new(
        provider: Arc<dyn Provider>,
        counts: Arc<CallCounts>,
        budget: Arc<Budget>,
        gate: Arc<Gate>,
    ) -> Self {
        provider.leave_pace_to_caller();
        Self { provider, counts, budget, gate }
    }

    /// As [`Self::call`], for one that is answered with a key in clear: none is asked for while the gate is shut, unless it is
    /// that of the volume.
    fn call_for_key<T>(
        &self,
        operation: Operation,
        context: &EncryptionContext,
        call: impl Fn() -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        let is_of_data = context.data_key_id().is_some();
        self.call_if(|| !is_of_data || !self.gate.is_shut(), operation, call)
    }

    /// Waits for a turn and makes the call; a call that is throttled waits for another turn, as long as it may wait at all.
    fn call<T>(&self, operation: Operation, call: impl Fn() -> Result<T, ProviderError>) -> Result<T, ProviderError> {
        self.call_if(|| true, operation, call)
    }

    /// The same, as long as it `may` be made.
    fn call_if<T>(
        &self,
        may: impl Fn() -> bool,
        operation: Operation,
        call: impl Fn() -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        if !self.provider.is_remote() {
            return self.counted(operation, call);
        }
        let (start, mut refusal) = (Instant::now(), None);
        while start.elapsed() < MAX_WAIT {
            let Some(wait) = self.budget.reserve(Instant::now()) else { break };
            std::thread::sleep(wait);
            if !may() {
                return Err(locked());
            }
            match self.counted(operation, &call) {
                Err(error) if error.kind == ProviderErrorKind::Throttled => refusal = Some(error),
                answer => return answer,
            }
        }
        Err(refusal.unwrap_or_else(|| {
            let message = "too many calls wait for their turn (--kms-rate, or the provider throttles)";
            ProviderError::new(ProviderErrorKind::Throttled, message)
        }))
    }

    fn counted<T>(
        &self,
        operation: Operation,
        call: impl FnOnce() -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        let began = Instant::now();
        let answer = call();
        self.note(operation, began, &answer);
        answer
    }

    /// Counts a call that began at `began`.
    fn note<T>(&self, operation: Operation, began: Instant, answer: &Result<T, ProviderError>) {
        let ended = Instant::now();
        self.counts.count(operation, answer, ended.saturating_duration_since(began));
        match answer {
            Ok(_) => self.budget.speed_up(ended),
            Err(error) if error.kind == ProviderErrorKind::Throttled => self.budget.slow_down(began, ended),
            Err(_) => {}
        }
    }
}

/// No word of the provider: it was not asked.
fn locked() -> ProviderError {
    ProviderError::new(ProviderErrorKind::Throttled, "the mount was locked meanwhile")
}

impl Provider for Metered {
    fn kind(&self) -> ProviderKind {
        self.provider.kind()
    }

    fn is_remote(&self) -> bool {
        self.provider.is_remote()
    }

    fn can_unwrap(&self) -> bool {
        self.provider.can_unwrap()
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Generated {
        self.call_for_key(Operation::Generate, context, || self.provider.generate_data_key(context))
    }

    /// Under a rate each call has its turn.
    fn makes_many_at_once(&self) -> bool {
        self.budget.rate().is_none() && self.provider.makes_many_at_once()
    }

    /// One that is throttled is not made again.
    fn generate_data_keys(&self, contexts: &[EncryptionContext], each: &mut dyn FnMut(usize, Generated)) {
        if !self.makes_many_at_once() {
            contexts.iter().enumerate().for_each(|(place, context)| each(place, self.generate_data_key(context)));
            return;
        }
        let began = Instant::now();
        self.provider.generate_data_keys(contexts, &mut |place, answer| {
            self.note(Operation::Generate, began, &answer);
            each(place, answer);
        });
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        self.call_for_key(Operation::Unwrap, context, || self.provider.unwrap(key_id, wrapped, context))
    }

    fn generate_wrapped_key(&self, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        self.call(Operation::GenerateWrapped, || self.provider.generate_wrapped_key(context))
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        self.call(Operation::Wrap, || self.provider.wrap(key_id, data_key, context))
    }

    fn rewrap(
        &self,
        from: &str,
        wrapped: &[u8],
        to: &str,
        context: &EncryptionContext,
    ) -> Result<WrappedKey, ProviderError> {
        self.call(Operation::Rewrap, || self.provider.rewrap(from, wrapped, to, context))
    }

    fn hang_up(&self) {
        self.provider.hang_up();
    }

    fn describe(&self, key_id: &str) -> Result<super::KeyDescription, ProviderError> {
        self.call(Operation::Describe, || self.provider.describe(key_id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::CallsByOperation;
    use crate::keys::providers::scripted::{Answer, ScriptedProvider};

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[test]
    fn calls_are_spread_and_the_queue_has_an_end() {
        let (budget, start) = (Budget::new(NonZeroU32::new(10)), Instant::now());
        let waits: Vec<_> = (0..4).map(|_| budget.reserve(start).unwrap().as_millis()).collect();
        assert_eq!(waits, [0, 0, 100, 200]);
        assert_eq!(budget.reserve(after(start, 1000)), Some(Duration::ZERO));
        let granted = (0..1000).filter(|_| budget.reserve(after(start, 1000)).is_some()).count();
        assert!((45..=55).contains(&granted), "{granted}");
    }

    #[test]
    fn every_operation_is_counted_for_itself_and_within_the_budget() {
        use crate::keys::providers::scripted::{Answer, ScriptedProvider};
        let provider = Arc::new(ScriptedProvider::new("k", true));
        let (counts, budget) = (Arc::<CallCounts>::default(), Arc::new(Budget::new(NonZeroU32::new(1))));
        let metered = Metered::new(provider.clone(), Arc::clone(&counts), Arc::clone(&budget), Arc::default());
        let context = EncryptionContext::volume_key(&[1; 16]);
        let data_key = DataKey::random();
        let wrapped = provider.wrap_here(&data_key, &context).bytes;
        let all: [&dyn Fn() -> Option<ProviderErrorKind>; 6] = [
            &|| metered.generate_data_key(&context).err().map(|error| error.kind),
            &|| metered.generate_wrapped_key(&context).err().map(|error| error.kind),
            &|| metered.unwrap("k", &wrapped, &context).err().map(|error| error.kind),
            &|| metered.wrap("k", &data_key, &context).err().map(|error| error.kind),
            &|| metered.rewrap("k", &wrapped, "k", &context).err().map(|error| error.kind),
            &|| metered.describe("k").err().map(|error| error.kind),
        ];
        let reset = || *budget.bucket.lock().unwrap() = Budget::new(None).bucket.into_inner().unwrap();
        for (at, call) in all.iter().enumerate() {
            reset();
            assert_eq!(call(), None, "{at}");
            provider.then(Answer::Fail(ProviderErrorKind::Denied));
            assert_eq!(call(), Some(ProviderErrorKind::Denied), "{at}");
            // The queue is full: the provider is not asked.
            budget.bucket.lock().unwrap().rate = Some(1.0);
            budget.bucket.lock().unwrap().next = Some(Instant::now() + 2 * MAX_WAIT);
            assert_eq!(call(), Some(ProviderErrorKind::Throttled), "{at}");
        }
        let each = CallsByOperation { generate: 2, generate_wrapped: 2, unwrap: 2, wrap: 2, rewrap: 2, describe: 2 };
        assert_eq!((counts.calls(), counts.failures()), (each, 6));
        let calls = provider.calls();
        assert_eq!([calls.generate, calls.generate_wrapped, calls.unwrap, calls.wrap, calls.rewrap], [2; 5]);
    }

    #[test]
    fn many_keys_are_made_at_once_unless_there_is_a_rate_and_each_is_counted() {
        let provider = Arc::new(ScriptedProvider::new("k", true));
        provider.make_many_at_once();
        let metered = |limit| {
            let counts: Arc<CallCounts> = Arc::default();
            (Metered::new(provider.clone(), Arc::clone(&counts), Arc::new(Budget::new(limit)), Arc::default()), counts)
        };
        let contexts = [2, 3, 4].map(|id| EncryptionContext::data_key(&[1; 16], &[id; 16]));
        let kinds = |metered: &Metered| {
            let mut kinds = Vec::new();
            metered.generate_data_keys(&contexts, &mut |place, answer| {
                kinds.push((place, answer.err().map(|error| error.kind)));
            });
            kinds
        };
        let (free, counts) = metered(None);
        assert!(free.makes_many_at_once());
        provider.then(Answer::Right);
        provider.then(Answer::Fail(ProviderErrorKind::Throttled));
        assert_eq!(kinds(&free), [(0, None), (1, Some(ProviderErrorKind::Throttled)), (2, None)]);
        assert_eq!((counts.calls().generate, counts.failures()), (3, 1));
        assert!(!free.makes_many_at_once(), "the provider throttles");
        let (limited, counts) = metered(NonZeroU32::new(10));
        assert!(!limited.makes_many_at_once());
        let start = Instant::now();
        assert_eq!(kinds(&limited), [(0, None), (1, None), (2, None)]);
        assert!(start.elapsed() >= Duration::from_millis(90), "the third one waits for its turn");
        assert_eq!(counts.calls().generate, 3);
    }

    #[test]
    fn a_throttled_call_waits_for_another_turn_and_other_failures_do_not() {
        let provider = Arc::new(ScriptedProvider::new("k", true));
        let counts: Arc<CallCounts> = Arc::default();
        let metered = Metered::new(
            provider.clone(),
            Arc::clone(&counts),
            Arc::new(Budget::new(NonZeroU32::new(1000))),
            Arc::default(),
        );
        let context = EncryptionContext::data_key(&[1; 16], &[2; 16]);
        let call = || metered.generate_data_key(&context).err().map(|error| error.kind);
        let made = || counts.calls().total();
        provider.then(Answer::Fail(ProviderErrorKind::Throttled));
        assert_eq!((call(), made()), (None, 2));
        provider.then(Answer::Fail(ProviderErrorKind::Unavailable));
        assert_eq!((call(), made()), (Some(ProviderErrorKind::Unavailable), 3));
        provider.always(Answer::Fail(ProviderErrorKind::Throttled));
        let start = Instant::now();
        assert_eq!(call(), Some(ProviderErrorKind::Throttled));
        assert!(start.elapsed() < 3 * MAX_WAIT, "{:?}", start.elapsed());
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let (budget, start) = (Budget::new(None), Instant::now());
        assert!((0..1000).all(|_| budget.reserve(start) == Some(Duration::ZERO)));
    }

    #[test]
    fn a_provider_that_grants_little_is_soon_asked_no_more_than_that() {
        const GRANTED: u32 = 100;
        let (budget, start) = (Budget::new(None), Instant::now());
        // Just before, it granted ten times as much.
        (0..1000).for_each(|_| budget.speed_up(start));
        let (mut refused, mut tokens, mut last) = (0, 0.0, start);
        let mut now = start;
        while now < after(start, 10_000) {
            now += budget.reserve(now).unwrap().max(Duration::from_millis(1));
            tokens = (tokens + (now - last).as_secs_f64() * f64::from(GRANTED)).min(10.0);
            last = now;
            if tokens >= 1.0 {
                tokens -= 1.0;
                budget.speed_up(now);
            } else {
                refused += 1;
                budget.slow_down(now, now);
            }
        }
        assert!(refused <= 150, "{refused} of {} calls", 10 * GRANTED);
    }

    #[test]
    fn throttling_halves_the_rate_and_time_gives_it_back() {
        let (budget, start) = (Budget::new(None), Instant::now());
        for _ in 0..100 {
            budget.speed_up(start);
        }
        let rate = || budget.bucket.lock().unwrap().rate;
        budget.slow_down(start, start);
        assert_eq!(rate(), Some(50.0));
        budget.slow_down(after(start, 10), after(start, 20));
        budget.slow_down(start, after(start, 200));
        assert_eq!(rate(), Some(50.0), "one burst of refusals counts once");
        budget.speed_up(after(start, 500));
        assert_eq!(rate(), Some(50.0));
        budget.speed_up(after(start, 1000));
        assert_eq!(rate(), Some(62.5));
        (2..100).for_each(|second| budget.speed_up(after(start, second * 1000)));
        assert_eq!(rate(), None);
        let limited = Budget::new(NonZeroU32::new(40));
        limited.slow_down(start, start);
        (1..10).for_each(|second| limited.speed_up(after(start, second * 1000)));
        assert_eq!(limited.bucket.lock().unwrap().rate, Some(40.0));
    }
}
