//! What keeps others from a volume while its keys are changed: its lock, or a word with the mount that has it.
//!
//! Invariants: of those who change keys there is one at a time; every mount of the volume works with the new list before
//! the next step is taken.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cli::error::{CliError, Exit};
use crate::cli::{report, writing};
use crate::daemon::control::{Ask, ClientError};
use crate::fs::Stats;
use crate::lease::{Permit, Seal, Tenure};
use crate::storage::cipher_directory::{CipherDirectory, KeysLock, LockError, LockMode, VolumeLock};

use super::status;

/// How long a mount may take to ask the providers of new keys.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long files that a mount is sealing anew are waited for, and the wait before looking again.
const SEALING: Duration = Duration::from_secs(600);
const PAUSE: Duration = Duration::from_millis(100);
/// How long a mount may take to say how it fares.
const QUICK: Duration = Duration::from_secs(10);

/// Held while keys change.
pub(super) struct Hold {
    _change: KeysLock,
    /// The volume's lease, once it is unlocked; given back before its lock is.
    tenure: Option<Tenure>,
    seal: Option<Seal>,
    /// None while the volume is mounted.
    volume: Option<VolumeLock>,
    /// Held while only mounts have it that do not write: nor does one come that does.
    readers: Option<VolumeLock>,
}

impl Hold {
    /// Locks the volume, to change its list of keys or shared to have files sealed anew; if a mount of this host has it, that mount
    /// will be told of every step.
    pub(super) fn take(directory: &CipherDirectory, mode: LockMode) -> Result<Self, CliError> {
        let change = lock_keys(directory, mode)?;
        let volume = match directory.lock(LockMode::Exclusive) {
            Ok(lock) => Some(lock),
            Err(LockError::Held { .. }) if !served(directory.path()).is_empty() => None,
            Err(error) => return Err(error.into()),
        };
        let readers = if volume.is_none() { directory.lock(LockMode::Shared).ok() } else { None };
        Ok(Self { _change: change, tenure: None, seal: None, volume, readers })
    }

    /// Takes the lease too, now that the volume is unlocked, unless a mount that writes has it. Mounts that only read have none.
    pub(super) fn unlocked(&mut self, seal: Seal) -> Result<(), CliError> {
        if let Some(lock) = self.volume.as_ref().or(self.readers.as_ref()) {
            self.tenure = writing::hold(lock, LockMode::Exclusive, seal.clone())?;
        }
        self.seal = Some(seal);
        Ok(())
    }

    /// The lease, for who writes the volume.
    pub(super) fn hand_over(&mut self) -> Option<Tenure> {
        self.tenure.take()
    }

    /// Whether the volume is still ours to write, or a mount's, is asked before each change.
    pub(super) fn permit(&self) -> Permit {
        self.tenure.as_ref().map(Tenure::permit).unwrap_or_default()
    }

    /// Whether programs work on the volume meanwhile.
    pub(super) fn is_mounted(&self) -> bool {
        self.volume.is_none()
    }

    /// Whether no mount writes to the volume, nor will.
    pub(super) fn writes_alone(&self) -> bool {
        self.volume.is_some() || self.readers.is_some()
    }

    /// Has every mount read the list of keys, and prove that it can use what is new on it.
    pub(super) fn tell(&mut self, directory: &CipherDirectory) -> Result<(), CliError> {
        if self.volume.is_some() {
            return Ok(());
        }
        let mounts = served(directory.path());
        for mountpoint in &mounts {
            let answer = match status::connect(mountpoint).and_then(|client| client.tell(Ask::Keys, DEADLINE)) {
                Ok(answer) => answer,
                Err(ClientError::NotServed) => continue,
                Err(error) => return Err(status::failure(mountpoint, &error)),
            };
            if let Some(why) = status::error_in(&answer) {
                let what =
                    format_args!("the mount at {} cannot take the new list of keys: {why}", mountpoint.display());
                let hint = format_args!(
                    "`kmsfs umount {}`, then the same command: a mount keeps no passphrase, and reads keyrings only in the \
                     directories of those that it began with",
                    mountpoint.display()
                );
                return Err(CliError::new(Exit::KeyRefused, what).hint(hint));
            }
        }
        if mounts.is_empty() {
            // Unmounted meanwhile.
            self.readers = None;
            let lock = directory.lock(LockMode::Exclusive)?;
            let seal = self.seal.clone();
            self.tenure = seal.map_or(Ok(None), |seal| writing::hold(&lock, LockMode::Exclusive, seal))?;
            self.volume = Some(lock);
        }
        Ok(())
    }

    /// How many names have been moved in mounts of the volume so far; none if that cannot be told, as while one is being moved.
    pub(super) fn moves(&self, directory: &CipherDirectory) -> Option<u64> {
        if self.volume.is_some() {
            return Some(0);
        }
        let stats = served(directory.path()).into_iter().map(|mountpoint| {
            let answer = status::connect(&mountpoint).and_then(|client| client.tell(Ask::Status, QUICK)).ok()?;
            serde_json::from_str::<Stats>(&answer).ok().filter(|stats| stats.names_moving == 0)
        });
        stats.map(|stats| Some(stats?.names_moved)).sum()
    }
}

/// A mount goes on sealing the file that it was told to, although whoever told it has left: that is waited for.
fn lock_keys(directory: &CipherDirectory, mode: LockMode) -> Result<KeysLock, CliError> {
    let until = Instant::now() + SEALING;
    let mut told = false;
    loop {
        match directory.lock_keys(mode) {
            Ok(lock) => return Ok(lock),
            Err(LockError::Held { .. }) if Instant::now() < until && is_sealing(directory) => {}
            Err(LockError::Held { .. }) => {
                let what = "another process is changing the volume's keys: wait until it is done";
                return Err(CliError::new(Exit::Locked, what));
            }
            Err(error) => return Err(error.into()),
        }
        if !std::mem::replace(&mut told, true) {
            report::tell("a mount is still sealing files anew: this waits for it");
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether nobody but mounts holds the keys.
fn is_sealing(directory: &CipherDirectory) -> bool {
    let run = directory.redo_logs().and_then(|logs| logs.lock_run());
    directory.lock_keys(LockMode::Shared).is_ok() && run.is_ok_and(|run| run.is_some())
}

/// Where the volume is mounted by processes that answer.
#[cfg(feature = "mount")]
pub(super) fn served(cipher_directory: &Path) -> Vec<PathBuf> {
    let mut places = crate::mount::places_of(cipher_directory);
    places.retain(|place| status::connect(place).is_ok());
    places
}

#[cfg(not(feature = "mount"))]
pub(super) fn served(_: &Path) -> Vec<PathBuf> {
    Vec::new()
}
