//! Data keys for new files. One path for any number of files per data key: a data key serves so many files, for at most an
//! hour, and then the next one is taken.
//!
//! Where the provider is far away, data keys are made ahead of use, in parallel, so that creating a file does not wait for
//! the network while they last. How many are kept ready follows the demand: twice as many when somebody had to wait, as few
//! as at first after a rest, and never more than were taken lately. Invariants:
//! * no lock is held across a provider's call, and there are at most [`MAX_CALLS`] of them at a time;
//! * a key ages from when its provider gave it, in use or not: one that is too old is wiped and serves no file;
//! * when the provider refuses the wrapping key, what it made is wiped;
//! * [`Pool::clear`] wipes every key that is ready; one that was asked for before it is wiped when it arrives;
//! * while the gate is shut no call begins, and nobody waits.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::crypto::DataKey;
use crate::format::header::Record;

use super::demand::Demand;
use super::gate::Gate;
use super::provisioned::{Mint, MintError, Origin};
use super::{Behalf, KeyError, KeyLimits, Moment, ProviderError, ProviderErrorKind, Reason};

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
/// The longest wait for a key that is being made; a provider's own deadline is shorter.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A data key that new files may be sealed under.
#[derive(Clone)]
pub(super) struct Minted {
    pub(super) data_key: Arc<DataKey>,
    pub(super) data_key_id: [u8; 16],
    pub(super) records: Vec<Record>,
    /// When the provider gave it.
    pub(super) since: Moment,
    /// The entry that it was taken from, if it was provisioned.
    pub(super) origin: Option<Origin>,
}

impl Minted {
    /// One that the provider has just given.
    pub(super) fn new(data_key_id: [u8; 16], data_key: DataKey, records: Vec<Record>) -> Self {
        Self { data_key: Arc::new(data_key), data_key_id, records, since: Moment::now(), origin: None }
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
    gate: Arc<Gate>,
    state: Mutex<State>,
    changed: Condvar,
    /// Threads are wanted again.
    work: Condvar,
}

struct State {
    /// The data key in use, and how many more files it may serve.
    current: Option<(Minted, u32)>,
    ready: VecDeque<Minted>,
    /// Those that were ready for too long, for as long as they may be used while the provider cannot be reached.
    stale: VecDeque<Minted>,
    limits: KeyLimits,
    /// How many to keep ready, if so many are taken; 0 until somebody asks.
    depth: usize,
    demand: Demand,
    calls: usize,
    waiting: usize,
    /// Threads that wait for work, and the epochs of calls that were given to them.
    idle: usize,
    given: Vec<u64>,
    /// The last failed call.
    failure: Option<(ProviderError, Moment)>,
    /// Counts [`Pool::clear`]: a key that was asked for in another epoch is not kept.
    epoch: u64,
}

impl Pool {
    pub(super) fn new(mint: Arc<Mint>, files_per_data_key: u32, limits: KeyLimits, gate: Arc<Gate>) -> Self {
        let now = Moment::now();
        let state = State {
            current: None,
            ready: VecDeque::new(),
            stale: VecDeque::new(),
            limits,
            depth: 0,
            demand: Demand::new(now),
            calls: 0,
            waiting: 0,
            idle: 0,
            given: Vec::new(),
            failure: None,
            epoch: 0,
        };
        let (state, changed, work) = (Mutex::new(state), Condvar::new(), Condvar::new());
        Self { shared: Arc::new(Shared { mint, files_per_data_key, gate, state, changed, work }) }
    }

    /// A data key for one new file. Waits for the provider if none is ready.
    ///
    /// # Errors
    /// That of a call that failed while this waited, or [`KeyError::Locked`].
    pub(super) fn take(&self) -> Result<Minted, KeyError> {
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
        let unused = state.expire(Moment::now());
        let minted = state.take(self.shared.files_per_data_key);
        drop(state);
        self.shared.put_back(unused);
        let minted = minted?;
        self.fill();
        Some(minted)
    }

    /// Wipes what is too old for any use.
    pub(super) fn sweep(&self) {
        let unused = self.shared.state().expire(Moment::now());
        self.shared.put_back(unused);
    }

    fn wait(&self) -> Result<Minted, KeyError> {
        let start = Moment::now();
        let mut state = self.shared.state();
        state.ask(start);
        state.depth = (state.depth * 2).clamp(FIRST_DEPTH, MAX_DEPTH);
        state.waiting += 1;
        let locked = || self.shared.gate.is_shut().then_some(Err(KeyError::Locked));
        let files_per_data_key = self.shared.files_per_data_key;
        let answer = loop {
            if let Some(answer) = locked().or_else(|| state.answer(files_per_data_key, start)) {
                break answer;
            }
            drop(state);
            self.fill();
            state = self.shared.state();
            if let Some(answer) = locked().or_else(|| state.answer(files_per_data_key, start)) {
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
            [state.ready.len(), state.wanted(MAX_DEPTH), state.calls, state.waiting].map(|n| n as u64);
        PoolMeasure { ready, wanted, calls, waiting }
    }

    /// Wipes what is ready. Provisioned keys among it are put back.
    pub(super) fn clear(&self) {
        let mut state = self.shared.state();
        (state.current, state.depth) = (None, 0);
        let unused = state.drop_ready();
        state.epoch += 1;
        drop(state);
        // Whoever waits while the gate is shut has waited for nothing.
        self.shared.changed.notify_all();
        self.shared.put_back(unused);
    }

    /// Wipes what a wrapping key has made, which its provider refuses.
    pub(super) fn forget_made_by(&self, refused: &Record) {
        let is_its = |minted: &Minted| {
            minted.records.iter().any(|made| (made.provider, &made.key_id) == (refused.provider, &refused.key_id))
        };
        let mut state = self.shared.state();
        if state.current.as_ref().is_some_and(|(minted, _)| is_its(minted)) {
            state.current = None;
        }
        let is_of_any = state.ready.iter().chain(&state.stale).any(is_its);
        let unused = if is_of_any { state.drop_ready() } else { Vec::new() };
        drop(state);
        self.shared.put_back(unused);
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
        self.take_current(self.limits.max_age.min(MAX_SHARING)).or_else(|| {
            let minted = self.ready.pop_front()?;
            Some(self.put_in_use(minted, files_per_data_key))
        })
    }

    /// The same if the provider cannot be reached.
    fn take_stale(&mut self, files_per_data_key: u32) -> Option<Minted> {
        self.take_current(self.oldest()).or_else(|| {
            let minted = self.stale.pop_front()?;
            Some(self.put_in_use(minted, files_per_data_key))
        })
    }

    fn take_current(&mut self, oldest: Duration) -> Option<Minted> {
        let (minted, left) = self.current.as_mut()?;
        if *left == 0 || minted.since.elapsed() >= oldest {
            return None;
        }
        *left -= 1;
        Some(minted.clone())
    }

    fn oldest(&self) -> Duration {
        self.limits.max_age + self.limits.stale_grace
    }

    /// Wipes what is too old at `now`; returns what is to be put back. Keys are about as old as their places say.
    fn expire(&mut self, now: Moment) -> Vec<Minted> {
        let (max_age, oldest) = (self.limits.max_age, self.oldest());
        let is_older = |minted: &Minted, age| now.saturating_duration_since(minted.since) >= age;
        if self.current.as_ref().is_some_and(|(minted, left)| *left == 0 || is_older(minted, oldest)) {
            self.current = None;
        }
        while let Some(minted) = self.ready.pop_front_if(|minted| is_older(minted, max_age)) {
            self.stale.push_back(minted);
        }
        std::iter::from_fn(|| self.stale.pop_front_if(|minted| is_older(minted, oldest))).collect()
    }

    /// Empties what is ready, to be put back.
    fn drop_ready(&mut self) -> Vec<Minted> {
        self.stale.drain(..).chain(self.ready.drain(..)).collect()
    }

    /// Notes that somebody wants a key.
    fn ask(&mut self, now: Moment) {
        if self.demand.ask(now) {
            self.depth = self.depth.min(FIRST_DEPTH);
        }
    }

    /// How many to keep ready: no more than are used, so that a few files cost a few calls.
    fn wanted(&self, most: usize) -> usize {
        self.depth.min(most).min(self.demand.taken().max(FIRST_DEPTH))
    }

    /// What one who has waited since `start` gets, if it is settled.
    fn answer(&mut self, files_per_data_key: u32, start: Moment) -> Option<Result<Minted, KeyError>> {
        if let Some(minted) = self.take(files_per_data_key) {
            return Some(Ok(minted));
        }
        if let Some((error, _)) = self.failure.as_ref().filter(|(_, at)| *at >= start) {
            let error = KeyError::from(error.clone());
            let stale = if error.is_passing() { self.take_stale(files_per_data_key) } else { None };
            return Some(stale.ok_or(error));
        }
        let late = || ProviderError::new(ProviderErrorKind::Unavailable, "no data key was to be had in time");
        (start.elapsed() >= MAX_WAIT).then(|| Err(late().into()))
    }

    /// Takes the first use of a data key, and keeps it for the others.
    fn put_in_use(&mut self, minted: Minted, files_per_data_key: u32) -> Minted {
        self.ask(Moment::now());
        self.demand.take();
        self.current = (files_per_data_key > 1).then(|| (minted.clone(), files_per_data_key - 1));
        minted
    }

    /// Whether keys should be made: they are made many at a time, which wakes threads less often.
    fn is_low(&self, most: usize) -> bool {
        self.waiting > 0 || self.ready.len() + self.calls <= self.wanted(most) / 4
    }

    fn wants_another(&self, most: usize) -> bool {
        self.calls < MAX_CALLS && self.ready.len() + self.calls < self.wanted(most) + self.waiting
    }
}

impl Shared {
    /// Starts a call if one is missing, which starts the next.
    fn start_call(self: &Arc<Self>) {
        let most = self.most_ready();
        let mut state = self.state();
        if self.gate.is_shut() || !state.wants_another(most) {
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
            state.failure = Some((error, Moment::now()));
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Makes data keys for as long as some are missing; the first one was asked for in `epoch`.
    fn work(self: &Arc<Self>, mut epoch: u64) {
        let _ahead = Behalf::ahead(Reason::Pool).enter();
        let mut alone = false;
        loop {
            if self.gate.is_shut() {
                self.state().calls -= 1;
                match self.linger() {
                    Some(given) => epoch = given,
                    None => return,
                }
                continue;
            }
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
        let (mut unused, mut quiet) = (Vec::new(), false);
        match made {
            Ok(minted) if state.epoch == epoch => state.ready.push_back(minted),
            Ok(minted) => unused.push(minted),
            Err(MintError { alone: true, .. }) => quiet = true,
            // What was taken a moment ago may be enough for all who wait; the last of them tells if not.
            Err(MintError { used_up: true, .. }) if state.calls > 1 => quiet = true,
            Err(MintError { error, used_up, .. }) => {
                if error.kind.is_end_of_key() && !used_up {
                    state.current = None;
                    unused = state.drop_ready();
                }
                state.failure = Some((error, Moment::now()));
            }
        }
        state.calls -= 1;
        let is_awaited = state.waiting > 0;
        drop(state);
        self.put_back(unused);
        if is_awaited && !quiet {
            self.changed.notify_all();
        }
    }

    /// The epoch of the next call of a thread: now, if one is missing and the last ones did not fail, or else later. With
    /// none the thread ends.
    fn next_call(&self, failed: bool) -> Option<u64> {
        let most = self.most_ready();
        let mut state = self.state();
        if !failed && !self.gate.is_shut() && state.wants_another(most) {
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

    /// Wipes keys that no file used. Provisioned ones among them go back to where they lay.
    fn put_back(&self, unused: Vec<Minted>) {
        let origins: Vec<Origin> = unused.into_iter().filter_map(|minted| minted.origin).collect();
        origins.iter().for_each(|origin| self.mint.put_back(origin));
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
