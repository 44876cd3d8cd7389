//! Holding a lease: renewing it, and not writing without it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::format::hex;
use crate::format::lease::Lease;
use crate::runtime::{Next, Periodic};
use crate::storage::LeaseFile;

use super::{Pace, Seal};

/// A renewal that failed is tried again after so long, in renewals.
const SOONER: u32 = 10;

/// Why nothing may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// For good.
    #[error("another has taken the volume over")]
    ToAnother,
    /// Until the lease can be renewed.
    #[error("the volume's lease cannot be renewed")]
    NotRenewed,
}

impl From<Lost> for io::Error {
    fn from(lost: Lost) -> Self {
        Self::other(lost)
    }
}

/// Asked before each change of a volume. It outlives neither the lease nor the lock that it speaks for.
#[derive(Clone, Default)]
pub struct Permit {
    /// None where a lock alone keeps others out, or a mount asks for itself.
    held: Option<Arc<Held>>,
}

impl Permit {
    /// Whether the volume may be written. As a rule this looks at a clock only.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn check(&self) -> Result<(), Lost> {
        self.held.as_ref().map_or(Ok(()), |held| held.check())
    }
}

/// A lease that is held. Dropping it gives it back.
pub struct Tenure {
    held: Arc<Held>,
    /// `None` for one that is unattended.
    renewals: Option<Periodic>,
}

struct Held {
    file: LeaseFile,
    seal: Seal,
    local: bool,
    pace: Pace,
    /// As it was last written. Held while it is renewed.
    lease: Mutex<Lease>,
    /// The last renewal failed, which was told.
    failing: AtomicBool,
    /// Until when nothing need be looked at, in milliseconds since the boot, suspended or not.
    valid_until: AtomicU64,
    lost: AtomicBool,
    stopped: AtomicBool,
}

impl Tenure {
    /// Renews `lease`, which was put in its place after `began`, from now on.
    pub(super) fn begin(
        file: LeaseFile,
        seal: Seal,
        lease: Lease,
        local: bool,
        pace: Pace,
        began: Duration,
    ) -> io::Result<Self> {
        let mut tenure = Self::unattended(file, seal, lease, local, pace, began);
        let weak = Arc::downgrade(&tenure.held);
        tenure.renewals = Some(Periodic::start("kmsfs-lease", Next::After(pace.renew), move || keep(&weak))?);
        Ok(tenure)
    }

    fn unattended(file: LeaseFile, seal: Seal, lease: Lease, local: bool, pace: Pace, began: Duration) -> Self {
        let held = Arc::new(Held {
            file,
            seal,
            local,
            pace,
            lease: Mutex::new(lease),
            failing: AtomicBool::new(false),
            valid_until: AtomicU64::new(millis(began + pace.valid)),
            lost: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        });
        Self { held, renewals: None }
    }

    /// One whose process does nothing, as if it were stopped.
    #[cfg(test)]
    pub(super) fn begin_frozen(claim: super::Claim) -> Self {
        let (file, seal, host, local, pace) = claim.into_parts();
        let lease = seal.begin(&host, local);
        file.create(&seal.bytes(&lease)).unwrap();
        Self::unattended(file, seal, lease, local, pace, since_boot())
    }

    /// Whether the volume may be written. As a rule this looks at a clock only.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn check(&self) -> Result<(), Lost> {
        self.held.check()
    }

    /// What asks whether this lease still holds, and does not keep it.
    #[must_use]
    pub fn permit(&self) -> Permit {
        Permit { held: Some(Arc::clone(&self.held)) }
    }

    /// Gives the lease back.
    pub fn end(&self) {
        self.held.stopped.store(true, Ordering::SeqCst);
        self.renewals.iter().for_each(Periodic::stop);
        let lease = locked(&self.held.lease);
        if !self.held.lost.load(Ordering::SeqCst)
            && let Err(error) = self.held.file.remove(|bytes| self.held.is_own(&lease, bytes))
        {
            tracing::warn!("the volume's lease stays behind: {error}");
        }
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        self.end();
    }
}

impl Held {
    fn check(&self) -> Result<(), Lost> {
        if self.lost.load(Ordering::Relaxed) {
            return Err(Lost::ToAnother);
        }
        if millis(since_boot()) < self.valid_until.load(Ordering::Relaxed) { Ok(()) } else { self.renew() }
    }

    /// Renews the lease, unless it has just been renewed.
    fn renew(&self) -> Result<(), Lost> {
        let mut lease = locked(&self.lease);
        if self.lost.load(Ordering::SeqCst) {
            return Err(Lost::ToAnother);
        }
        let began = since_boot();
        let left = Duration::from_millis(self.valid_until.load(Ordering::SeqCst)).saturating_sub(began);
        if left > self.pace.valid.saturating_sub(self.pace.renew / SOONER) || self.stopped.load(Ordering::SeqCst) {
            return Ok(());
        }
        let next = Seal::renewed(&lease);
        match self.put(&lease, &next) {
            Ok(None) => {
                *lease = next;
                self.failing.store(false, Ordering::SeqCst);
                self.valid_until.store(millis(began + self.pace.valid), Ordering::SeqCst);
                Ok(())
            }
            Ok(Some(other)) => {
                self.lost.store(true, Ordering::SeqCst);
                tracing::error!(
                    "{other} has taken the volume over: nothing is written any more, and what was not yet written is lost. \
                     Its lease was not renewed here in time, as when this host was frozen or cut off, or was replaced; unmount, and \
                     mount again when the other has ended"
                );
                Err(Lost::ToAnother)
            }
            Err(error) => {
                if !self.failing.swap(true, Ordering::SeqCst) {
                    tracing::warn!("the lease of the volume cannot be renewed: .kmsfs/lease: {error}");
                }
                if !self.local {
                    return Err(Lost::NotRenewed);
                }
                // The lock that is held keeps everybody else out.
                self.valid_until.store(millis(began + self.pace.renew), Ordering::SeqCst);
                Ok(())
            }
        }
    }

    /// Puts `next` in its place; returns whose lease is there instead.
    fn put(&self, lease: &Lease, next: &Lease) -> io::Result<Option<Lease>> {
        let bytes = self.seal.bytes(next);
        let Some(seen) = self.file.renew(&bytes, |bytes| self.is_own(lease, bytes), !self.local)? else {
            tracing::warn!("somebody has removed .kmsfs/lease: it is made anew");
            return self.file.create(&bytes).map(|()| None);
        };
        match self.seal.open(&seen.bytes) {
            Some(found) if found.lease_id == lease.lease_id => Ok(None),
            Some(other) => Ok(Some(other)),
            None => {
                tracing::warn!(
                    "somebody has put something into .kmsfs/lease that is no lease of this volume: it is replaced"
                );
                self.file.replace(&bytes, &hex::encode(&lease.lease_id)).map(|()| None)
            }
        }
    }

    fn is_own(&self, lease: &Lease, bytes: &[u8]) -> bool {
        self.seal.open(bytes).is_some_and(|found| found.lease_id == lease.lease_id)
    }
}

/// Renews once.
fn keep(weak: &Weak<Held>) -> Next {
    let Some(held) = weak.upgrade() else { return Next::Never };
    match held.renew() {
        Ok(()) => Next::After(held.pace.renew),
        Err(Lost::NotRenewed) => Next::After(held.pace.renew / SOONER),
        Err(Lost::ToAnother) => Next::Never,
    }
}

/// A clock that goes on while the machine is suspended.
pub(super) fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

fn millis(since_boot: Duration) -> u64 {
    u64::try_from(since_boot.as_millis()).unwrap_or(u64::MAX)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
