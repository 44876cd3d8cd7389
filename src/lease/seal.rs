//! Leases of one volume, to bytes and back, with their MAC.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::crypto::{LeaseKey, random_array};
use crate::format::lease::{self, EXCLUSIVE, Lease};
use crate::storage::Host;

/// Makes and recognises the leases of a volume.
#[derive(Clone)]
pub struct Seal {
    volume_id: [u8; 16],
    key: Arc<LeaseKey>,
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal").finish_non_exhaustive()
    }
}

impl Seal {
    /// For the volume `volume_id`.
    #[must_use]
    pub fn new(volume_id: [u8; 16], key: Arc<LeaseKey>) -> Self {
        Self { volume_id, key }
    }

    #[cfg(test)]
    pub(super) fn key(&self) -> &Arc<LeaseKey> {
        &self.key
    }

    /// A new lease for a process of `host`.
    pub(super) fn begin(&self, host: &Host, local: bool) -> Lease {
        let Host { machine_id, boot_id, process_namespace, process, start, name } = host.clone();
        Lease {
            mode: EXCLUSIVE,
            local,
            volume_id: self.volume_id,
            lease_id: random_array(),
            machine_id,
            boot_id,
            process_namespace,
            process,
            start,
            renewals: 0,
            time: now(),
            host: name,
        }
    }

    /// The next state of a lease.
    pub(super) fn renewed(lease: &Lease) -> Lease {
        Lease { renewals: lease.renewals + 1, time: now(), ..lease.clone() }
    }

    /// The file of a lease.
    pub(super) fn bytes(&self, lease: &Lease) -> Vec<u8> {
        let signed = lease.signed_bytes();
        let mac = self.key.mac(&signed);
        lease::seal(signed, &mac)
    }

    /// The lease in a file, if it is one of this volume.
    pub(super) fn open(&self, bytes: &[u8]) -> Option<Lease> {
        let parsed = lease::parse(bytes)?;
        let authentic = self.key.is_authentic(parsed.signed, &parsed.mac) && parsed.content.volume_id == self.volume_id;
        authentic.then_some(parsed.content)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())
}
