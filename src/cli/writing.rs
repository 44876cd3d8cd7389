//! The lease of a volume, for commands that have locked and unlocked it.

use std::sync::Arc;

use crate::cli::error::CliError;
use crate::cli::report;
use crate::keys::Volume;
use crate::keys::volume::Unlocked;
use crate::lease::{self, Seal, Tenure};
use crate::storage::cipher_directory::{LockMode, VolumeLock};

/// What makes and recognises the leases of `volume`.
pub(crate) fn seal(volume: &Volume) -> Seal {
    Seal::new(volume.id, Arc::clone(&volume.lease))
}

/// The same before the volume's list of keys is used.
pub(crate) fn seal_of(unlocked: &Unlocked) -> Seal {
    let (id, key) = unlocked.lease();
    Seal::new(id, key)
}

/// Takes the lease, or for a reader makes sure that nobody has it; tells of a wait before it begins.
pub(crate) fn hold(lock: &VolumeLock, mode: LockMode, seal: Seal) -> Result<Option<Tenure>, CliError> {
    let mut notice = |why: &str| report::tell(why);
    match mode {
        LockMode::Exclusive => Ok(lease::claim(lock, seal, &mut notice)?),
        LockMode::Shared => Ok(lease::look(lock, seal, &mut notice).map(|()| None)?),
    }
}
