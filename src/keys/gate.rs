//! Whether data keys are given out. Every lock and unlock is counted, so that what began before a lock and comes after it is
//! told from what began since.

use std::sync::atomic::{AtomicU64, Ordering};

use super::KeyError;

/// Odd while it is shut.
#[derive(Default)]
pub(super) struct Gate(AtomicU64);

/// What began while the gate was open; it is good until the gate is shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass(u64);

impl Gate {
    pub(super) fn is_shut(&self) -> bool {
        self.0.load(Ordering::SeqCst) % 2 == 1
    }

    pub(super) fn shut(&self) {
        self.0.fetch_or(1, Ordering::SeqCst);
    }

    pub(super) fn open(&self) {
        // Nothing to do where it is open.
        let _ = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| (count % 2 == 1).then(|| count + 1));
    }

    pub(super) fn pass(&self) -> Result<Pass, KeyError> {
        let count = self.0.load(Ordering::SeqCst);
        if count % 2 == 1 { Err(KeyError::Locked) } else { Ok(Pass(count)) }
    }

    pub(super) fn check(&self, pass: Pass) -> Result<(), KeyError> {
        if self.0.load(Ordering::SeqCst) == pass.0 { Ok(()) } else { Err(KeyError::Locked) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_is_good_until_the_gate_is_shut_and_not_again() {
        let gate = Gate::default();
        gate.open();
        let pass = gate.pass().unwrap();
        assert!(gate.check(pass).is_ok() && !gate.is_shut());
        gate.shut();
        gate.shut();
        assert!(gate.is_shut() && gate.pass().is_err() && gate.check(pass).is_err());
        gate.open();
        assert!(!gate.is_shut() && gate.check(pass).is_err());
        assert!(gate.check(gate.pass().unwrap()).is_ok());
    }
}
