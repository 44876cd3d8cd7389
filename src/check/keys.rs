//! The keys of files, asked for with patience: a provider that throttles or is away for a moment fails no check.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::keys::{AuthenticHeader, KeyError, OpenedKeys, Ring};

use super::locked;

/// The wait before the next try.
const PAUSE: Duration = Duration::from_secs(1);
/// With no answer from the provider for so long nobody waits any more.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);

pub(super) struct Patience {
    /// When the provider last answered; the beginning counts.
    last_answer: Mutex<Instant>,
    /// The first failure of a provider.
    failure: Mutex<Option<KeyError>>,
}

impl Default for Patience {
    fn default() -> Self {
        Self { last_answer: Mutex::new(Instant::now()), failure: Mutex::default() }
    }
}

impl Patience {
    /// The keys of a file.
    pub(super) fn open(&self, ring: &Ring, header: &AuthenticHeader) -> Result<OpenedKeys, KeyError> {
        loop {
            let opened = ring.open(header);
            match &opened {
                Err(error) if error.is_passing() && locked(&self.last_answer).elapsed() < LONGEST_SILENCE => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(error) if error.is_passing() => {}
                _ => *locked(&self.last_answer) = Instant::now(),
            }
            return opened.inspect_err(|error| {
                if error.provider_kind().is_some() {
                    locked(&self.failure).get_or_insert_with(|| error.clone());
                }
            });
        }
    }

    pub(super) fn failure(&self) -> Option<KeyError> {
        locked(&self.failure).clone()
    }
}
