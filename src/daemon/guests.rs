//! Connections that are served, at most so many: who has asked for nothing for longest makes room for the next.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long a thread may take to see that its connection was closed.
const LEAVING: Duration = Duration::from_secs(1);

/// Breaks a connection off, whatever its thread does with it.
pub(super) type HangUp = Box<dyn Fn() + Send>;

pub(super) struct Guests {
    most: usize,
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    last: u64,
    /// Those who came or asked last are at the end.
    here: Vec<(u64, HangUp)>,
}

impl Guests {
    pub(super) fn new(most: usize) -> Self {
        Self { most, state: Mutex::default(), left: Condvar::new() }
    }

    /// Lets a connection in and names it; none if nobody made room for it.
    pub(super) fn welcome(&self, hang_up: HangUp) -> Option<u64> {
        let mut state = self.state();
        if state.here.len() >= self.most {
            if let Some((_, hang_up)) = state.here.first() {
                hang_up();
            }
            let waited = self.left.wait_timeout_while(state, LEAVING, |state| state.here.len() >= self.most);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.here.len() >= self.most {
            return None;
        }
        state.last += 1;
        let name = state.last;
        state.here.push((name, hang_up));
        Some(name)
    }

    /// A connection has said what it wants: others make room first.
    pub(super) fn has_asked(&self, name: u64) {
        let mut state = self.state();
        if let Some(at) = state.here.iter().position(|(other, _)| *other == name) {
            let guest = state.here.remove(at);
            state.here.push(guest);
        }
    }

    /// A connection is closed.
    pub(super) fn leave(&self, name: u64) {
        self.state().here.retain(|(other, _)| *other != name);
        self.left.notify_all();
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.state().here.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
