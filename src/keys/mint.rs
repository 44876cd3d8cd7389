//! Data keys for new files: one for each N files, and none for longer than an hour.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::crypto::{DataKey, random_array};
use crate::format::header::Record;

use super::{EncryptionContext, Provider, ProviderError};

/// The longest time in which new files share a data key.
const MAX_SHARING: Duration = Duration::from_secs(3600);

/// A data key that new files may be sealed under.
#[derive(Clone)]
pub(super) struct Minted {
    pub(super) data_key: Arc<DataKey>,
    pub(super) data_key_id: [u8; 16],
    pub(super) records: Vec<Record>,
    /// When the provider gave it.
    pub(super) since: Instant,
}

/// A data key with uses left.
struct Current {
    minted: Minted,
    uses_left: u32,
}

pub(super) struct Mint {
    files_per_data_key: u32,
    current: Mutex<Option<Current>>,
}

impl Mint {
    pub(super) fn new(files_per_data_key: u32) -> Self {
        Self { files_per_data_key, current: Mutex::new(None) }
    }

    /// A data key for one new file: the current one while it has uses left, else a new one of `provider`.
    pub(super) fn take(
        &self,
        volume_id: &[u8; 16],
        provider: &dyn Provider,
        now: Instant,
    ) -> Result<Minted, ProviderError> {
        if let Some(minted) = self.take_current(now) {
            return Ok(minted);
        }
        let minted = generate(volume_id, provider, now)?;
        let uses_left = self.files_per_data_key - 1;
        if uses_left > 0 {
            let current = Current { minted: minted.clone(), uses_left };
            *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(current);
        }
        Ok(minted)
    }

    fn take_current(&self, now: Instant) -> Option<Minted> {
        let mut slot = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let current = slot.as_mut().filter(|current| now.saturating_duration_since(current.minted.since) < MAX_SHARING);
        let minted = current.as_ref().map(|current| current.minted.clone());
        match current {
            Some(current) if current.uses_left > 1 => current.uses_left -= 1,
            _ => *slot = None,
        }
        minted
    }

    pub(super) fn clear(&self) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn generate(volume_id: &[u8; 16], provider: &dyn Provider, since: Instant) -> Result<Minted, ProviderError> {
    let data_key_id = random_array();
    let (data_key, wrapped) = provider.generate_data_key(&EncryptionContext::data_key(volume_id, &data_key_id))?;
    let record =
        Record { provider: provider.kind().tag(), key_id: wrapped.key_id.into_bytes(), wrapped: wrapped.bytes };
    Ok(Minted { data_key: Arc::new(data_key), data_key_id, records: vec![record], since })
}
