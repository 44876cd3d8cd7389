//! Data keys for new files. One path for any number of files per data key: a data key serves so many files, for at most an
//! hour, and then the next one is taken.
//!
//! Where the provider is far away, data keys are made ahead of use, in parallel, so that creating a file does not wait for
//! the network while they last. How many are kept ready follows the demand: twice as many when somebody had to wait, half
//! as many when nobody took one for a while. Invariants:
//! * no lock is held across a provider's call, and there are at most [`MAX_CALLS`] of them at a time;
//! * [`Pool::clear`] wipes every key that is ready; one that was asked for before it is wiped when it arrives.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::crypto::DataKey;
use crate::format::header::Record;

use super::provisioned::{Mint, MintError, Origin};
use super::{Behalf, ProviderError, ProviderErrorKind, Reason};

/// The longest time in which new files share a data key.
const MAX_SHARING: Duration = Duration::from_secs(3600);
/// Data keys kept ready at most, and at first.
const MAX_DEPTH: usize = 256;
const FIRST_DEPTH: usize = 4;
/// Provisioned keys kept ready at most.
const MAX_THRIFTY_DEPTH: usize = 16;
/// Provider calls under way at most.
const MAX_CALLS: usize = 48;
/// A thread without work waits so long for more before it ends.
const LINGER: Duration = Duration::from_secs(1);
/// After so long without a taker, half of what is kept ready is enough.
const IDLE: Duration = Duration::from_secs(60);
/// The longest wait for a key that is being made; a provider's own deadline is shorter.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A data key that new files may be sealed under.
#[derive(Clone)]
pub(super) struct Minted {
    pub(super) data_key: Arc<DataKey>,
    pub(super) data_key_id: [u8; 16],
    pub(super) records: Vec<Record>,
    /// When the provider gave it.
    pub(super) since: Instant,
    /// The entry that it was taken from, if it was provisioned.
    pub(super) origin: Option<Origin>,
}

/// Data keys for new files, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolMeasure {
    /// Ready for use.
    pub ready: u64,
    /// To be kept ready.
    pub wanted: u64,
    /// Being made.
    pub calls: u64,
    /// Operations that wait for one.
    pub waiting: u64,
}

pub(super) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    mint: Arc<Mint>,
    files_per_data_key: u32,
    state: Mutex<State>,
    changed: Condvar,
    /// Threads are wanted again.
    work: Condvar,
}

struct State {
    /// The data key in use, and how many more files it may serve.
    current: Option<(Minted, u32)>,
    ready: VecDeque<Minted>,
    /// How many to keep ready; 0 until somebody asks.
    depth: usize,
    calls: usize,
    waiting: usize,
    /// Threads that wait for work, and the epochs of calls that were given to them.
    idle: usize,
    given: Vec<u64>,
    last_taken: Instant,
    /// The last failed call.
    failure: Option<(ProviderError, Instant)>,
    /// Counts [`Pool::clear`]: a key that was asked for in another epoch is not kept.
    epoch: u64,
}

impl Pool {
    pub(super) fn new(mint: Arc<Mint>, files_per_data_key: u32) -> Self {
        let state = State {
            current: None,
            ready: VecDeque::new(),
            depth: 0,
            calls: 0,
            waiting: 0,
            idle: 0,
            given: Vec::new(),
            last_taken: Instant::now(),
            failure: None,
            epoch: 0,
        };
        let (state, changed, work) = (Mutex::new(state), Condvar::new(), Condvar::new());
        Self { shared: Arc::new(Shared { mint, files_per_data_key, state, changed, work }) }
    }

    /// A data key for one new file. Waits for the provider if none is ready.
    ///
    /// # Errors
    /// [`ProviderError`] of a call that failed while this waited.
    pub(super) fn take(&self) -> Result<Minted, ProviderError> {
        if let Some(minted) = self.take_ready() {
            return Ok(minted);
        }
        if self.shared.mint.keys.is_remote() {
            return self.wait();
        }
        let epoch = self.shared.state().epoch;
        let minted = self.shared.mint.mint().map_err(|failure| failure.error)?;
        let mut state = self.shared.state();
        Ok(if state.epoch == epoch { state.put_in_use(minted, self.shared.files_per_data_key) } else { minted })
    }

    /// A data key for one new file, if one is ready.
    pub(super) fn take_ready(&self) -> Option<Minted> {
        let mut state = self.shared.state();
        let minted = state.take(self.shared.files_per_data_key)?;
        drop(state);
        self.fill();
        Some(minted)
    }

    fn wait(&self) -> Result<Minted, ProviderError> {
        let start = Instant::now();
        let mut state = self.shared.state();
        state.depth = (state.depth * 2).clamp(FIRST_DEPTH, MAX_DEPTH);
        state.waiting += 1;
        let answer = loop {
            drop(state);
            self.fill();
            state = self.shared.state();
            if let Some(minted) = state.take(self.shared.files_per_data_key) {
                break Ok(minted);
            }
            if let Some((error, at)) = &state.failure
                && *at >= start
            {
                break Err(error.clone());
            }
            if start.elapsed() >= MAX_WAIT {
                break Err(ProviderError::new(ProviderErrorKind::Unavailable, "no data key was to be had in time"));
            }
            let waited = self.shared.changed.wait_timeout(state, MAX_WAIT);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waiting -= 1;
        drop(state);
        if answer.is_ok() {
            self.fill();
        }
        answer
    }

    /// Starts the calls that are missing, if they are many enough to be worth it.
    fn fill(&self) {
        if self.shared.mint.keys.is_remote() && self.shared.state().is_low(self.shared.most_ready()) {
            self.shared.start_call();
        }
    }

    /// How it fares.
    pub(super) fn read(&self) -> PoolMeasure {
        let state = self.shared.state();
        let [ready, wanted, calls, waiting] =
            [state.ready.len(), state.depth, state.calls, state.waiting].map(|n| n as u64);
        PoolMeasure { ready, wanted, calls, waiting }
    }

    /// Wipes what is ready. Provisioned keys among it are put back.
    pub(super) fn clear(&self) {
        let mut state = self.shared.state();
        (state.current, state.depth) = (None, 0);
        let ready = std::mem::take(&mut state.ready);
        state.epoch += 1;
        drop(state);
        let origins: Vec<Origin> = ready.into_iter().filter_map(|minted| minted.origin).collect();
        origins.iter().for_each(|origin| self.shared.mint.put_back(origin));
    }
}

impl Drop for Pool {
    /// A thread that still waits for work keeps no key.
    fn drop(&mut self) {
        self.clear();
    }
}

impl State {
    fn take(&mut self, files_per_data_key: u32) -> Option<Minted> {
        self.last_taken = Instant::now();
        match &mut self.current {
            Some((minted, left)) if *left > 0 && minted.since.elapsed() < MAX_SHARING => {
                *left -= 1;
                return Some(minted.clone());
            }
            _ => self.current = None,
        }
        let minted = self.ready.pop_front()?;
        Some(self.put_in_use(minted, files_per_data_key))
    }

    /// Takes the first use of a data key, and keeps it for the others.
    fn put_in_use(&mut self, minted: Minted, files_per_data_key: u32) -> Minted {
        self.current = (files_per_data_key > 1).then(|| (minted.clone(), files_per_data_key - 1));
        minted
    }

    /// Whether keys should be made: they are made many at a time, which wakes threads less often.
    fn is_low(&self, most: usize) -> bool {
        self.waiting > 0 || self.ready.len() + self.calls <= self.depth.min(most) / 4
    }

    fn wants_another(&self, most: usize) -> bool {
        self.calls < MAX_CALLS && self.ready.len() + self.calls < self.depth.min(most) + self.waiting
    }
}

impl Shared {
    /// Starts a call if one is missing, which starts the next.
    fn start_call(self: &Arc<Self>) {
        let most = self.most_ready();
        let mut state = self.state();
        if !state.wants_another(most) {
            return;
        }
        state.calls += 1;
        let epoch = state.epoch;
        if state.idle > state.given.len() {
            state.given.push(epoch);
            drop(state);
            self.work.notify_one();
            return;
        }
        drop(state);
        let shared = Arc::clone(self);
        let started = std::thread::Builder::new().name("kmsfs-pool".to_owned()).spawn(move || shared.work(epoch));
        if let Err(error) = started {
            let error = ProviderError::new(ProviderErrorKind::Unavailable, format!("no thread for a call: {error}"));
            let mut state = self.state();
            state.calls -= 1;
            state.failure = Some((error, Instant::now()));
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Makes data keys for as long as some are missing; the first one was asked for in `epoch`.
    fn work(self: &Arc<Self>, mut epoch: u64) {
        let _ahead = Behalf::ahead(Reason::Pool).enter();
        loop {
            self.start_call();
            let made = self.mint.mint();
            let most = self.most_ready();
            let mut state = self.state();
            let failed = made.is_err();
            let (mut unused, mut quiet) = (None, false);
            match made {
                Ok(minted) if state.epoch == epoch => state.ready.push_back(minted),
                Ok(minted) => unused = minted.origin,
                // What was taken a moment ago may be enough for all who wait; the last of them tells if not.
                Err(MintError { used_up: true, .. }) if state.calls > 1 => quiet = true,
                Err(MintError { error, .. }) => state.failure = Some((error, Instant::now())),
            }
            if state.last_taken.elapsed() > IDLE {
                state.depth /= 2;
            }
            state.calls -= 1;
            let go_on = !failed && state.wants_another(most);
            state.calls += usize::from(go_on);
            epoch = state.epoch;
            let is_awaited = state.waiting > 0;
            drop(state);
            if let Some(origin) = unused {
                self.mint.put_back(&origin);
            }
            if is_awaited && !quiet {
                self.changed.notify_all();
            }
            if !go_on {
                match self.linger() {
                    Some(given) => epoch = given,
                    None => return,
                }
            }
        }
    }

    /// Waits a while for more work, which saves a thread for every call; returns the epoch it was given in.
    fn linger(&self) -> Option<u64> {
        let mut state = self.state();
        state.idle += 1;
        let waited = self.work.wait_timeout_while(state, LINGER, |state| state.given.is_empty());
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.idle -= 1;
        state.given.pop()
    }

    /// How many keys may be ready. Provisioned ones are lost if this process dies.
    fn most_ready(&self) -> usize {
        if self.mint.is_thrifty() { MAX_THRIFTY_DEPTH } else { MAX_DEPTH }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::providers::scripted::{Answer, ScriptedProvider};

    fn pool(remote: bool, files_per_data_key: u32) -> (Arc<ScriptedProvider>, Pool) {
        let provider = Arc::new(ScriptedProvider::new("k", remote));
        let mint = Arc::new(Mint::for_tests(provider.clone()));
        (provider, Pool::new(mint, files_per_data_key))
    }

    fn until(pool: &Pool, holds: impl Fn(&State) -> bool) {
        let start = Instant::now();
        while !holds(&pool.shared.state()) {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_data_key_serves_as_many_files_as_it_may() {
        for remote in [false, true] {
            let (_, pool) = pool(remote, 3);
            let ids: Vec<_> = (0..7).map(|_| pool.take().unwrap().data_key_id).collect();
            assert!(ids[0] == ids[2] && ids[2] != ids[3] && ids[3] == ids[5] && ids[5] != ids[6]);
        }
    }

    #[test]
    fn a_near_provider_is_asked_for_what_is_needed_only() {
        let (provider, pool) = pool(false, 1);
        for _ in 0..5 {
            pool.take().unwrap();
        }
        assert_eq!(provider.calls().generate, 5);
    }

    #[test]
    fn keys_are_made_ahead_and_more_of_them_when_somebody_waits() {
        let (provider, pool) = pool(true, 1);
        pool.take().unwrap();
        until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
        provider.hold();
        for _ in 0..FIRST_DEPTH {
            assert!(pool.take_ready().is_some());
        }
        assert!(pool.take_ready().is_none());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.take().is_ok());
            until(&pool, |state| state.depth == 2 * FIRST_DEPTH);
            provider.release();
            assert!(waiting.join().unwrap());
        });
        until(&pool, |state| state.ready.len() == 2 * FIRST_DEPTH && state.calls == 0);
    }

    #[test]
    fn keys_are_made_when_few_are_left() {
        let (provider, pool) = pool(true, 1);
        pool.take().unwrap();
        until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
        for left in (FIRST_DEPTH / 4 + 1..FIRST_DEPTH).rev() {
            pool.take_ready().unwrap();
            let state = pool.shared.state();
            assert_eq!((state.ready.len(), state.calls), (left, 0));
        }
        let before = provider.calls().generate;
        pool.take_ready().unwrap();
        until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
        assert_eq!(provider.calls().generate, before + FIRST_DEPTH as u64 / 4 * 3);
    }

    #[test]
    fn a_thread_that_has_made_a_key_makes_the_next_one_too() {
        let (_, pool) = pool(true, 1);
        for _ in 0..20 {
            pool.take().unwrap();
            until(&pool, |state| state.ready.len() > FIRST_DEPTH / 4 && state.calls == 0);
        }
        let state = pool.shared.state();
        assert!(state.idle <= FIRST_DEPTH + 2 && state.given.is_empty(), "{} idle", state.idle);
    }

    #[test]
    fn a_failure_reaches_those_who_wait_and_no_later_ones() {
        let (provider, pool) = pool(true, 1);
        provider.always(Answer::Fail(ProviderErrorKind::Denied));
        assert_eq!(pool.take().err().unwrap().kind, ProviderErrorKind::Denied);
        until(&pool, |state| state.calls == 0);
        provider.always(Answer::Right);
        assert!(pool.take().is_ok());
    }

    #[test]
    fn what_is_ready_is_wiped_and_what_was_asked_for_before_is_not_kept() {
        let (provider, pool) = pool(true, 1);
        let taken = pool.take().unwrap();
        until(&pool, |state| state.ready.len() == FIRST_DEPTH && state.calls == 0);
        let ready = Arc::clone(&pool.shared.state().ready[0].data_key);
        provider.hold();
        assert!((0..FIRST_DEPTH / 4 * 3).all(|_| pool.take_ready().is_some()));
        provider.until_waiting(1);
        pool.clear();
        assert_eq!((Arc::strong_count(&taken.data_key), Arc::strong_count(&ready)), (1, 1));
        provider.release();
        until(&pool, |state| state.calls == 0);
        assert!(pool.shared.state().ready.is_empty());
    }
}
