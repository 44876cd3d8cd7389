//! The wrapping keys of a volume with their providers: whom to ask first, and whom not to wait for.
//!
//! Invariants: nothing is sorted out for ever: a provider that did not answer is asked last for a while, and one that could
//! not wrap is left out of new records for a while; of those who come when that is over, one asks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::crypto::DataKey;
use crate::format::header::Record;

use super::{EncryptionContext, Provider, ProviderError, ProviderErrorKind, ProviderKind};

/// So long a provider that did not answer is asked after the others, and one that could not wrap is not asked to.
const DOWN: Duration = Duration::from_secs(30);

/// A wrapping key on a volume's list.
pub struct Recipient {
    /// Whose key it is.
    pub kind: ProviderKind,
    /// The key as its provider names it.
    pub key: String,
    /// New data keys get a record of it. A key that does not wrap opens what it has wrapped before.
    pub wraps_new: bool,
    /// Its provider.
    pub provider: Arc<dyn Provider>,
}

/// A recipient and how it fares.
pub(super) struct Watched {
    recipient: Recipient,
    health: Mutex<Health>,
}

#[derive(Default)]
struct Health {
    silent: Option<Instant>,
    does_not_wrap: Option<Instant>,
}

/// All of a volume, in its config's order.
pub(super) struct Recipients(Vec<Watched>);

impl Recipients {
    pub(super) fn new(recipients: Vec<Recipient>) -> Self {
        let watched = |recipient| Watched { recipient, health: Mutex::default() };
        Self(recipients.into_iter().map(watched).collect())
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Watched> {
        self.0.iter()
    }

    /// Whether a call may take a network's time.
    pub(super) fn is_remote(&self) -> bool {
        self.0.iter().any(|watched| watched.recipient.provider.is_remote())
    }

    /// The recipient whose key made a record.
    pub(super) fn of(&self, record: &Record) -> Option<&Watched> {
        self.0.iter().find(|watched| watched.made(record))
    }

    /// The records that can be tried, with those first that cost least: whose provider answers, and is near.
    pub(super) fn to_unwrap<'r>(&self, records: &'r [Record]) -> Vec<(&'r Record, &Watched)> {
        let mut usable: Vec<_> = records.iter().filter_map(|record| Some((record, self.of(record)?))).collect();
        if usable.len() > 1 {
            usable.sort_by_cached_key(|(_, watched)| (watched.is_silent(), watched.recipient.provider.is_remote()));
        }
        usable
    }

    /// Those that may make new data keys, in their order, but first those whose provider answers.
    pub(super) fn to_generate(&self) -> Vec<&Watched> {
        let mut wrapping: Vec<_> = self.0.iter().filter(|watched| watched.recipient.wraps_new).collect();
        if wrapping.len() > 1 {
            wrapping.sort_by_cached_key(|watched| watched.is_silent());
        }
        wrapping
    }

    /// The records of a data key of which `first` is one already, in the list's order. One that cannot be made now is left
    /// out: a file that all but one can open is worth more than none, and `kmsfs rewrap` adds what is missing.
    pub(super) fn with_others(&self, first: Record, data_key: &DataKey, context: &EncryptionContext) -> Vec<Record> {
        let mut first = Some(first);
        let mut records = Vec::new();
        for watched in self.0.iter().filter(|watched| watched.recipient.wraps_new) {
            if first.as_ref().is_some_and(|record| watched.made(record)) {
                records.extend(first.take());
            } else {
                records.extend(watched.wrap_new(data_key, context));
            }
        }
        // Made by a key that is not on the list: whoever writes the header refuses it or not.
        first.into_iter().chain(records).collect()
    }
}

impl Watched {
    pub(super) fn provider(&self) -> &Arc<dyn Provider> {
        &self.recipient.provider
    }

    pub(super) fn recipient(&self) -> &Recipient {
        &self.recipient
    }

    fn made(&self, record: &Record) -> bool {
        record.provider == self.recipient.kind.tag() && record.key_id == self.recipient.key.as_bytes()
    }

    /// Whether it did not answer a short while ago. One caller is told no when the while is over: he tries.
    fn is_silent(&self) -> bool {
        turn(&mut self.health().silent)
    }

    /// Takes note of what became of a call.
    pub(super) fn note<T>(&self, answer: &Result<T, ProviderError>) {
        let silent = match answer {
            Err(error) => matches!(error.kind, ProviderErrorKind::Unavailable | ProviderErrorKind::Credentials),
            Ok(_) => false,
        };
        self.health().silent = silent.then(Instant::now);
    }

    fn wrap_new(&self, data_key: &DataKey, context: &EncryptionContext) -> Option<Record> {
        if turn(&mut self.health().does_not_wrap) || self.is_silent() {
            return None;
        }
        let Recipient { kind, key, provider, .. } = &self.recipient;
        let wrapped = provider.wrap(key, data_key, context);
        self.note(&wrapped);
        let first_failure = {
            let mut health = self.health();
            let before = std::mem::replace(&mut health.does_not_wrap, wrapped.is_err().then(Instant::now));
            before.is_none()
        };
        match wrapped {
            Ok(wrapped) => Some(Record::of(kind.tag(), wrapped.key_id, wrapped.bytes)),
            Err(error) => {
                if first_failure {
                    tracing::warn!(
                        "new files get no record for the recipient {kind}:{key} (`kmsfs rewrap` adds them later): {error}"
                    );
                }
                None
            }
        }
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether `since` is a short while ago. If it is over, it begins again, and this caller is the one who asks.
fn turn(since: &mut Option<Instant>) -> bool {
    match since {
        Some(at) if at.elapsed() < DOWN => true,
        Some(at) => {
            *at = Instant::now();
            false
        }
        None => false,
    }
}
