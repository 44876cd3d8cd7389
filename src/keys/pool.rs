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
/// For so long after a failed call no call starts others.
const LULL: Duration = Duration::from_millis(100);
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

impl Minted {
    /// One that the provider has just given.
    pub(super) fn new(data_key_id: [u8; 16], data_key: DataKey, records: Vec<Record>) -> Self {
        Self { data_key: Arc::new(data_key), data_key_id, records, since: Instant::now(), origin: None }
    }
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
        let files_per_data_key = self.shared.files_per_data_key;
        let answer = loop {
            if let Some(answer) = state.answer(files_per_data_key, start) {
                break answer;
            }
            drop(state);
            self.fill();
            state = self.shared.state();
            if let Some(answer) = state.answer(files_per_data_key, start) {
                break answer;
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

    /// What one who has waited since `start` gets, if it is settled.
    fn answer(&mut self, files_per_data_key: u32, start: Instant) -> Option<Result<Minted, ProviderError>> {
        if let Some(minted) = self.take(files_per_data_key) {
            return Some(Ok(minted));
        }
        if let Some((error, at)) = &self.failure
            && *at >= start
        {
            return Some(Err(error.clone()));
        }
        let late = || ProviderError::new(ProviderErrorKind::Unavailable, "no data key was to be had in time");
        (start.elapsed() >= MAX_WAIT).then(|| Err(late()))
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
        let mut alone = false;
        loop {
            let calls = if alone { 1 } else { self.add_calls(epoch) };
            if !self.has_failed_lately() {
                self.start_call();
            }
            let mut failed = false;
            alone = false;
            self.mint.mint_many(calls, &mut |made| {
                let is_worse_alone = made.as_ref().is_err_and(|error| !error.alone);
                (failed, alone) = (failed | is_worse_alone, alone | (made.is_err() && !is_worse_alone));
                self.deliver(made, epoch);
            });
            match self.next_call(failed) {
                Some(given) => epoch = given,
                None => return,
            }
        }
    }

    /// Whether calls fail: then each is made for somebody who waits, and none starts another.
    fn has_failed_lately(&self) -> bool {
        self.state().failure.as_ref().is_some_and(|(_, at)| at.elapsed() < LULL)
    }

    /// Adds the calls that are missing to the one that a thread is about to make, if they are made in the same time;
    /// returns how many it is to make.
    fn add_calls(&self, epoch: u64) -> usize {
        if !self.mint.makes_many_at_once() {
            return 1;
        }
        let most = self.most_ready();
        let mut state = self.state();
        let before = state.calls;
        while state.epoch == epoch && state.wants_another(most) {
            state.calls += 1;
        }
        1 + state.calls - before
    }

    /// Takes what a call of `epoch` has come to.
    fn deliver(&self, made: Result<Minted, MintError>, epoch: u64) {
        let mut state = self.state();
        let (mut unused, mut quiet) = (None, false);
        match made {
            Ok(minted) if state.epoch == epoch => state.ready.push_back(minted),
            Ok(minted) => unused = minted.origin,
            Err(MintError { alone: true, .. }) => quiet = true,
            // What was taken a moment ago may be enough for all who wait; the last of them tells if not.
            Err(MintError { used_up: true, .. }) if state.calls > 1 => quiet = true,
            Err(MintError { error, .. }) => state.failure = Some((error, Instant::now())),
        }
        state.calls -= 1;
        let is_awaited = state.waiting > 0;
        drop(state);
        if let Some(origin) = unused {
            self.mint.put_back(&origin);
        }
        if is_awaited && !quiet {
            self.changed.notify_all();
        }
    }

    /// The epoch of the next call of a thread: now, if one is missing and the last ones did not fail, or else later. With
    /// none the thread ends.
    fn next_call(&self, failed: bool) -> Option<u64> {
        let most = self.most_ready();
        let mut state = self.state();
        if state.last_taken.elapsed() > IDLE {
            state.depth /= 2;
        }
        if !failed && state.wants_another(most) {
            state.calls += 1;
            return Some(state.epoch);
        }
        drop(state);
        self.linger()
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
#[path = "pool_tests.rs"]
mod tests;
