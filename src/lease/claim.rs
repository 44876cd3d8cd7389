//! Getting the lease of a volume, or the certainty that nobody has it.

use std::io;
use std::thread;
use std::time::Duration;

use crate::format::lease::Lease;
use crate::storage::cipher_directory::VolumeLock;
use crate::storage::{Host, LeaseFile, Seen};

use super::tenure::{Tenure, since_boot};
use super::{LeaseError, PACE, Pace, Seal};

/// Hears why there is a wait, before it begins.
pub type Notice<'a> = &'a mut dyn FnMut(&str);

/// How many times a lease may come and go while it is being taken.
const ATTEMPTS: usize = 8;

/// What one look at a lease comes to.
enum Verdict {
    /// There is none.
    Free,
    /// Its holder has ended.
    Ended(Lease),
    /// Its holder may be at work; none if it is no lease of this volume.
    Unclear(Option<Lease>),
}

/// Somebody who wants to use a volume whose lock he holds.
pub struct Claim {
    file: LeaseFile,
    seal: Seal,
    host: Host,
    /// This host's kernel keeps the locks of the volume for everybody.
    local: bool,
    pace: Pace,
}

/// Takes the lease of the volume that `lock` has locked. None if it cannot be written and the lock holds for everybody.
///
/// # Errors
/// [`LeaseError`].
pub fn claim(lock: &VolumeLock, seal: Seal, notice: Notice<'_>) -> Result<Option<Tenure>, LeaseError> {
    Claim::new(lock, seal)?.take(notice)
}

/// Makes sure that nobody has the lease of the volume that `lock` has locked for reading.
///
/// # Errors
/// [`LeaseError`].
pub fn look(lock: &VolumeLock, seal: Seal, notice: Notice<'_>) -> Result<(), LeaseError> {
    Claim::new(lock, seal)?.wait_until_free(notice).map(drop)
}

impl Claim {
    /// For the holder of `lock`.
    ///
    /// # Errors
    /// [`LeaseError::Io`].
    pub fn new(lock: &VolumeLock, seal: Seal) -> Result<Self, LeaseError> {
        Ok(Self::with(lock.lease_file()?, seal, lock.host().clone(), lock.is_of_one_kernel(), PACE))
    }

    pub(super) fn with(file: LeaseFile, seal: Seal, host: Host, local: bool, pace: Pace) -> Self {
        Self { file, seal, host, local, pace }
    }

    #[cfg(test)]
    pub(super) fn into_parts(self) -> (LeaseFile, Seal, Host, bool, Pace) {
        (self.file, self.seal, self.host, self.local, self.pace)
    }

    pub(super) fn take(self, notice: Notice<'_>) -> Result<Option<Tenure>, LeaseError> {
        let lease = self.seal.begin(&self.host, self.local);
        for _ in 0..ATTEMPTS {
            let began = since_boot();
            let taken = match self.wait_until_free(notice)? {
                None => self.file.create(&self.seal.bytes(&lease)),
                Some(_) => self.replace(&lease),
            };
            match taken {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) if self.local || error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                    tracing::warn!("this use of the volume leaves no lease for other hosts: .kmsfs/lease: {error}");
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            }
            self.check_own(&lease)?;
            return Ok(Some(Tenure::begin(self.file, self.seal, lease, self.local, self.pace, began)?));
        }
        Err(LeaseError::Nonsense)
    }

    fn replace(&self, lease: &Lease) -> io::Result<()> {
        let replaced = self.file.replace(&self.seal.bytes(lease), &crate::format::hex::encode(&lease.lease_id));
        if replaced.is_ok() && !self.local {
            thread::sleep(self.pace.settle);
        }
        replaced
    }

    /// Of two who took a lease over at the same time only one has it.
    fn check_own(&self, lease: &Lease) -> Result<(), LeaseError> {
        match self.file.read()?.map(|seen| self.seal.open(&seen.bytes)) {
            Some(Some(found)) if found.lease_id == lease.lease_id => Ok(()),
            Some(Some(other)) => Err(LeaseError::Held(Box::new(other))),
            _ => Err(LeaseError::Nonsense),
        }
    }

    /// Waits as long as the holder of a lease may be at work. Returns the lease that was left behind, if there is one.
    pub(super) fn wait_until_free(&self, notice: Notice<'_>) -> Result<Option<Seen>, LeaseError> {
        let (mut first, mut changed) = (None, since_boot());
        let begin = changed;
        loop {
            let seen = self.file.read()?;
            let held = match (self.judge(seen.as_ref()), seen) {
                (Verdict::Free, _) | (_, None) => return Ok(None),
                (Verdict::Ended(lease), seen) => {
                    tracing::info!("{lease} left its lease behind: it is taken over");
                    return Ok(seen);
                }
                (Verdict::Unclear(lease), Some(seen)) => (lease, seen),
            };
            let now = since_boot();
            match (&first, held) {
                (None, (lease, seen)) => {
                    notice(&self.why_to_wait(lease.as_ref()));
                    first = Some(seen);
                }
                (Some(before), (_, seen)) if *before == seen => {
                    if now.saturating_sub(changed) >= self.pace.watch {
                        tracing::warn!(
                            "the lease of the volume was not renewed for {:?}: it is taken over",
                            self.pace.watch
                        );
                        return Ok(first);
                    }
                }
                (Some(_), (Some(lease), _)) => return Err(LeaseError::Held(Box::new(lease))),
                (Some(_), (None, seen)) => (first, changed) = (Some(seen), now),
            }
            if now.saturating_sub(begin) > self.pace.watch * 2 {
                return Err(LeaseError::Nonsense);
            }
            thread::sleep((self.pace.watch / 90).max(Duration::from_millis(1)));
        }
    }

    fn judge(&self, seen: Option<&Seen>) -> Verdict {
        let Some(seen) = seen else { return Verdict::Free };
        let Some(lease) = self.seal.open(&seen.bytes) else { return Verdict::Unclear(None) };
        // Both hold locks of one kernel: its holder would have kept us from this one, wherever the copy comes from.
        let excluded = self.local && lease.local;
        if excluded || self.host.knows_ended(&lease) { Verdict::Ended(lease) } else { Verdict::Unclear(Some(lease)) }
    }

    fn why_to_wait(&self, lease: Option<&Lease>) -> String {
        let who = lease.map_or_else(
            || "something that is no lease of it lies in its .kmsfs/lease".to_owned(),
            |lease| format!("{lease} has left a lease in it"),
        );
        format!(
            "the volume may be in use elsewhere: {who}; waiting {} s to see whether it is renewed",
            self.pace.watch.as_secs()
        )
    }
}
