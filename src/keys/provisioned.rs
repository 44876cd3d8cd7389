//! Provisioned keys: wrapped data keys that were made ahead, so that a host which may only unwrap can create files.
//!
//! Invariants:
//! * a provider is asked only about a key whose MAC was checked, whose wrapping key is on the volume's list, and which
//!   this process alone has claimed;
//! * a key that was claimed and is not used goes back, as far as the place where it lies lets it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use crate::crypto::{ProvisionKey, random_array};
use crate::format::header::Record;
use crate::format::name;
use crate::format::provisioned::{self, ProvisionedKey};

use super::key_list::CurrentKeys;
use super::pool::Minted;
use super::recipients::Watched;
use super::{EncryptionContext, KeyError, Moment, ProviderError, ProviderErrorKind, ProviderKind};

/// After a refusal to make data keys the provider is not asked to make one for so long, while provisioned ones last.
const REFUSAL: Duration = Duration::from_secs(60);
/// With fewer than this an operator is told.
const LOW: usize = 32;
/// Entries that are of no use are logged one by one up to so many.
const LOGGED: u64 = 20;
/// Entries that one call looks at.
const LOOKED_AT: u32 = 10_000;

/// The place where provisioned keys lie. Each is a small file with a name; who claims it first has it.
pub trait ProvisionedKeys: Send + Sync {
    /// An entry that may be claimed, if there is one: its name, its bytes, and how many more are known of.
    ///
    /// # Errors
    /// Those of the place.
    fn next(&self) -> io::Result<Option<(String, Vec<u8>, usize)>>;

    /// Takes an entry away, durably; false if another was first.
    ///
    /// # Errors
    /// Those of the place.
    fn claim(&self, name: &str) -> io::Result<bool>;

    /// Puts an entry back that was claimed and not used.
    ///
    /// # Errors
    /// Those of the place.
    fn put_back(&self, name: &str, bytes: &[u8]) -> io::Result<()>;

    /// Never offers this entry again. Returns whether nobody else has rejected it before.
    fn reject(&self, name: &str) -> bool;

    /// How many entries there are, good or not.
    ///
    /// # Errors
    /// Those of the place.
    fn count(&self) -> io::Result<u64>;
}

/// When new files use provisioned keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProvisionedUse {
    /// If the provider refuses to make a data key.
    #[default]
    Fallback,
    /// Always: the provider is never asked to make one.
    Only,
    /// Not at all.
    Never,
}

/// An entry that was taken, so that it can be put back.
pub(super) type Origin = Arc<(String, Vec<u8>)>;

fn no_recipient() -> ProviderError {
    ProviderError::new(
        ProviderErrorKind::Misconfigured,
        "no wrapping key of the volume is one that this program can use",
    )
}

/// Makes data keys for new files: has the provider do it, or takes them from where provisioned ones lie.
pub(super) struct Mint {
    pub(super) volume_id: [u8; 16],
    pub(super) key: ProvisionKey,
    pub(super) keys: Arc<CurrentKeys>,
    pub(super) source: OnceLock<Source>,
}

/// Where provisioned keys come from.
pub(super) struct Source {
    place: Box<dyn ProvisionedKeys>,
    only: bool,
    /// When the provider last refused to make a data key.
    refused: Mutex<Option<Moment>>,
    told_low: AtomicBool,
    told_empty: AtomicBool,
    rejections: AtomicU64,
}

impl Source {
    pub(super) fn new(place: Box<dyn ProvisionedKeys>, only: bool) -> Self {
        Self {
            place,
            only,
            refused: Mutex::default(),
            told_low: AtomicBool::new(false),
            told_empty: AtomicBool::new(false),
            rejections: AtomicU64::new(0),
        }
    }

    /// Whether keys are taken from here now.
    fn is_first(&self) -> bool {
        let refused = *self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        self.only || refused.is_some_and(|at| at.elapsed() < REFUSAL)
    }

    fn set_refused(&self, refused: bool) {
        let before = {
            let mut last = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *last, refused.then(Moment::now))
        };
        if refused && before.is_none() {
            tracing::info!("the provider makes no data keys for this host: new files use provisioned ones");
        }
    }

    fn reject(&self, name: &str, why: &str) {
        if !self.place.reject(name) {
            return;
        }
        let number = self.rejections.fetch_add(1, Ordering::Relaxed);
        if number < LOGGED {
            tracing::warn!("the provisioned key {name} is left alone: {why}");
        } else if number == LOGGED {
            tracing::warn!("more provisioned keys are of no use; they are not named");
        }
    }

    fn tell(&self, left: Option<usize>) {
        match left {
            None if !self.told_empty.swap(true, Ordering::Relaxed) => {
                tracing::warn!("no provisioned key is left: make more with `kmsfs keys provision`");
            }
            Some(left) if left < LOW && !self.told_low.swap(true, Ordering::Relaxed) => {
                tracing::warn!("only {left} provisioned keys are left: make more with `kmsfs keys provision`");
            }
            Some(left) if left >= 2 * LOW => {
                self.told_empty.store(false, Ordering::Relaxed);
                self.told_low.store(false, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// Why there is no data key for new files.
pub(super) struct MintError {
    pub(super) error: ProviderError,
    /// There is no provisioned key to be had; others may have been taken a moment ago.
    pub(super) used_up: bool,
    /// [`Mint::mint`] may do better.
    pub(super) alone: bool,
}

impl From<ProviderError> for MintError {
    fn from(error: ProviderError) -> Self {
        Self { error, used_up: false, alone: false }
    }
}

impl Mint {
    /// A data key for new files.
    pub(super) fn mint(&self) -> Result<Minted, MintError> {
        let Some(source) = self.source.get() else { return Ok(self.generate()?) };
        if source.is_first()
            && let Some(minted) = self.take(source)?
        {
            return Ok(minted);
        }
        if source.only {
            let message = "no provisioned key is left: make more with `kmsfs keys provision`";
            let error = ProviderError::new(ProviderErrorKind::KeyNotFound, message);
            return Err(MintError { used_up: true, ..error.into() });
        }
        match self.generate() {
            Err(error) if error.kind == ProviderErrorKind::Denied => {
                source.set_refused(true);
                let used_up = || {
                    let none = "or make keys ahead with `kmsfs keys provision`: no provisioned key is left";
                    let error = ProviderError::new(error.kind, format!("{error}; {none}"));
                    MintError { used_up: true, ..error.into() }
                };
                self.take(source)?.ok_or_else(used_up)
            }
            Err(error) => Err(error.into()),
            Ok(minted) => {
                source.set_refused(false);
                Ok(minted)
            }
        }
    }

    /// Whether many data keys are made in the time of one.
    pub(super) fn makes_many_at_once(&self) -> bool {
        let list = self.keys.get();
        let only = list.recipients.only_one_to_generate();
        !self.is_thrifty() && only.is_some_and(|watched| watched.provider().makes_many_at_once())
    }

    /// Data keys for new files, as [`Self::mint`] makes them; `each` is told of every one as soon as it is there.
    pub(super) fn mint_many(&self, count: usize, each: &mut dyn FnMut(Result<Minted, MintError>)) {
        let list = self.keys.get();
        let Some(watched) = list.recipients.only_one_to_generate().filter(|_| count > 1) else {
            (0..count).for_each(|_| each(self.mint()));
            return;
        };
        let ids: Vec<[u8; 16]> = (0..count).map(|_| random_array()).collect();
        let contexts: Vec<_> = ids.iter().map(|id| EncryptionContext::data_key(&self.volume_id, id)).collect();
        watched.begin();
        watched.provider().generate_data_keys(&contexts, &mut |place, answer| {
            watched.note(&answer);
            let refused = answer.as_ref().is_err_and(|error| error.kind == ProviderErrorKind::Denied);
            if let Some(source) = self.source.get().filter(|_| refused || answer.is_ok()) {
                source.set_refused(refused);
            }
            each(match answer {
                Ok((data_key, wrapped)) => Ok(Minted::new(ids[place], data_key, vec![watched.record(wrapped)])),
                Err(error) => Err(MintError { alone: self.may_do_better(&error), ..error.into() }),
            });
        });
    }

    /// Whether a data key that is made alone may be had where one of many was not: it waits for its turn, or is taken from
    /// the provisioned ones.
    fn may_do_better(&self, error: &ProviderError) -> bool {
        match error.kind {
            ProviderErrorKind::Throttled => true,
            ProviderErrorKind::Denied => self.source.get().is_some(),
            _ => false,
        }
    }

    /// Whether a key that is made ahead is taken from the provisioned ones.
    pub(super) fn is_thrifty(&self) -> bool {
        self.source.get().is_some_and(Source::is_first)
    }

    /// A new data key under the first recipient that makes one, and the others' records of it.
    fn generate(&self) -> Result<Minted, ProviderError> {
        let data_key_id = random_array();
        let context = EncryptionContext::data_key(&self.volume_id, &data_key_id);
        let (mut failure, list) = (None, self.keys.get());
        for watched in list.recipients.to_generate() {
            watched.begin();
            let answer = watched.provider().generate_data_key(&context);
            watched.note(&answer);
            match answer {
                Ok((data_key, wrapped)) => {
                    let records = list.recipients.with_others(watched.record(wrapped), &data_key, &context);
                    return Ok(Minted::new(data_key_id, data_key, records));
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(no_recipient))
    }

    /// The next provisioned key, if there is one.
    fn take(&self, source: &Source) -> Result<Option<Minted>, ProviderError> {
        let failed = |error: io::Error| {
            ProviderError::new(ProviderErrorKind::Misconfigured, format!("the provisioned keys: {error}"))
        };
        for _ in 0..LOOKED_AT {
            let Some((name, bytes, more)) = source.place.next().map_err(failed)? else { break };
            let key = match self.check(&name, &bytes) {
                Ok(key) => key,
                Err(why) => {
                    source.reject(&name, why);
                    continue;
                }
            };
            if !source.place.claim(&name).map_err(failed)? {
                continue;
            }
            let minted = self.unwrap(key, Arc::new((name, bytes)));
            if minted.is_ok() {
                source.tell(Some(more));
            }
            return minted.map(Some);
        }
        source.tell(None);
        Ok(None)
    }

    fn unwrap(&self, key: ProvisionedKey, origin: Origin) -> Result<Minted, ProviderError> {
        let ProvisionedKey { data_key_id, record, .. } = key;
        let context = EncryptionContext::data_key(&self.volume_id, &data_key_id);
        let (key_id, list) = (String::from_utf8_lossy(&record.key_id), self.keys.get());
        let answer = match list.recipients.of(&record) {
            Some(watched) => watched.provider().unwrap(&key_id, &record.wrapped, &context),
            None => Err(no_recipient()),
        };
        match answer {
            Ok(data_key) => {
                let records = list.recipients.with_others(record, &data_key, &context);
                let (data_key, since) = (Arc::new(data_key), Moment::now());
                Ok(Minted { data_key, data_key_id, records, since, origin: Some(origin) })
            }
            Err(error) => {
                self.put_back(&origin);
                if let (ProviderErrorKind::Tampered, Some(source)) = (error.kind, self.source.get()) {
                    source.reject(&origin.0, &error.message);
                }
                Err(error)
            }
        }
    }

    /// Puts a key back that no file used.
    pub(super) fn put_back(&self, origin: &Origin) {
        let Some(source) = self.source.get() else { return };
        if let Err(error) = source.place.put_back(&origin.0, &origin.1) {
            tracing::warn!("the provisioned key {} is lost unused: {error}", origin.0);
        }
    }

    /// The key in an entry, if it is one of this volume that this process can use.
    pub(super) fn check(&self, name: &str, bytes: &[u8]) -> Result<ProvisionedKey, &'static str> {
        let parsed = provisioned::parse(bytes).ok_or("it is not the file of a provisioned key")?;
        if !self.key.is_authentic(parsed.signed, &parsed.mac) || parsed.content.volume_id != self.volume_id {
            return Err("it does not authenticate: it was changed, or is of another volume");
        }
        if name::provisioned(&parsed.content.data_key_id) != name {
            return Err("it is a copy under another name");
        }
        let (record, list) = (&parsed.content.record, self.keys.get());
        if !list.allows(record) {
            return Err("its wrapping key is not a key of this volume any more");
        }
        if list.recipients.of(record).is_none() {
            return Err("its provider is not one that this process uses");
        }
        Ok(parsed.content)
    }

    /// Whether an entry is good.
    pub(super) fn is_good(&self, name: &str, bytes: &[u8]) -> bool {
        self.check(name, bytes).is_ok()
    }

    /// A new provisioned key: the name and the bytes of its entry.
    pub(super) fn provision(&self) -> Result<(String, Vec<u8>), KeyError> {
        let data_key_id = random_array();
        let context = EncryptionContext::data_key(&self.volume_id, &data_key_id);
        let list = self.keys.get();
        let first: &Watched = list.recipients.to_generate().into_iter().next().ok_or_else(no_recipient)?;
        let wrapped = first.provider().generate_wrapped_key(&context)?;
        let kind: ProviderKind = first.recipient().kind;
        let record = Record::of(kind.tag(), wrapped.key_id.clone(), wrapped.bytes);
        if !list.allows(&record) {
            return Err(KeyError::NoUsableRecord(format!("{kind}:{}", wrapped.key_id)));
        }
        self.seal(ProvisionedKey { volume_id: self.volume_id, data_key_id, record })
    }

    /// The name and the bytes of the entry of a provisioned key.
    pub(super) fn seal(&self, key: ProvisionedKey) -> Result<(String, Vec<u8>), KeyError> {
        let signed = key.signed_bytes().ok_or_else(|| {
            ProviderError::new(ProviderErrorKind::BadAnswer, "the wrapped key is too long for any file's header")
        })?;
        let mac = self.key.mac(&signed);
        Ok((name::provisioned(&key.data_key_id), provisioned::seal(signed, &mac)))
    }

    #[cfg(test)]
    pub(super) fn for_tests(provider: Arc<dyn super::Provider>) -> Self {
        use super::Recipient;
        use super::key_list::KeyList;
        use super::recipients::Recipients;
        use crate::crypto::{DataKey, Suite, VolumeKeys};
        let volume_id = [1; 16];
        let key = VolumeKeys::derive(&DataKey::random(), &volume_id, Suite::Xaes256Gcm).provision;
        let allowed = vec![(provider.kind().tag(), b"k".to_vec())];
        let recipient = Recipient { kind: provider.kind(), key: "k".to_owned(), wraps_new: true, provider };
        let keys = CurrentKeys::new(KeyList { allowed, recipients: Recipients::new(vec![recipient]) });
        Self { volume_id, key, keys: Arc::new(keys), source: OnceLock::new() }
    }

    /// How many entries there are, good or not; none if they are not used.
    pub(super) fn count(&self) -> Option<u64> {
        self.source.get().map(|source| source.place.count().unwrap_or(0))
    }
}
