//! Who writes a volume, where no lock tells: a lease in the cipher directory, renewed as long as the volume is used.
//!
//! A lock keeps out whoever shares it. Between hosts not every filesystem carries one, so its holder also leaves a lease
//! (`docs/FORMAT.md` section 8.2). Invariants:
//! * clocks of two hosts are never compared: a lease is in force as long as it is seen to change;
//! * a lease is taken over only if its holder has certainly ended, or it did not change for [`Pace::watch`]; a holder that could not
//!   renew its own for [`Pace::valid`], which is less, does not write until it has;
//! * a holder that finds the lease of another never writes again;
//! * nothing is believed of a lease that does not authenticate.

mod claim;
mod seal;
mod tenure;
#[cfg(test)]
mod tests;

use std::io;
use std::time::Duration;

pub use claim::{Claim, Notice, claim, look};
pub use seal::Seal;
pub use tenure::{Lost, Permit, Tenure};

use crate::format::lease::Lease;

/// How leases are kept.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// A lease is renewed so often.
    pub renew: Duration,
    /// Its holder writes for so long after it began the last renewal that succeeded.
    pub valid: Duration,
    /// Others take it over when it did not change for so long.
    pub watch: Duration,
    /// Of two who take it over at once, each sees after so long which one has it.
    pub settle: Duration,
}

/// That of all hosts.
pub const PACE: Pace = Pace {
    renew: Duration::from_secs(10),
    valid: Duration::from_secs(25),
    watch: Duration::from_secs(45),
    settle: Duration::from_secs(2),
};

/// Why a volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// Another renews it.
    #[error("the volume is in use elsewhere: {0} renews the lease that lies in it")]
    Held(Box<Lease>),
    /// Something else than a lease changes under its name.
    #[error("something writes .kmsfs/lease again and again, and it is no lease of this volume")]
    Nonsense,
    /// It cannot be read or written.
    #[error(".kmsfs/lease: {0}")]
    Io(#[from] io::Error),
}
