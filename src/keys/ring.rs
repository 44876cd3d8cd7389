//! From a header to the keys of a file, and to new headers for new files.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::crypto::{DataKey, FileKeys, HeaderKey, KeyMemory, ProvisionKey, Suite, commitment, random_array};
use crate::format::geometry::PAGE_LEN;
use crate::format::header::{self, Header, HeaderPage, Record};
use crate::format::hex;

use super::authentic::{AuthenticHeader, cache_key};
use super::cache::{Cache, CacheKey, Unwrapped};
use super::calls::CallCounts;
use super::flight::Flight;
use super::gate::{Gate, Pass};
use super::key_list::{CurrentKeys, KeyList};
use super::metered::{Budget, Metered};
use super::pool::{Minted, Pool};
use super::provisioned::{Mint, ProvisionedKeys, ProvisionedUse, Source};
use super::recipients::{Recipient, Recipients, Watched};
use super::refusals::Refusals;
use super::{Behalf, EncryptionContext, KeyError, KeyLimits, Moment, ProviderError, ProviderKind};

/// Opens headers and makes new ones, for one volume.
pub struct Ring {
    pub(super) volume_id: [u8; 16],
    suite: Suite,
    pub(super) header_key: HeaderKey,
    pub(super) keys: Arc<CurrentKeys>,
    pub(super) cache: Cache,
    flight: Flight,
    refusals: Refusals,
    pub(super) pool: Pool,
    pub(super) mint: Arc<Mint>,
    pub(super) limits: KeyLimits,
    gate: Arc<Gate>,
    /// That keys may be swapped out was said.
    warned: AtomicBool,
    pub(super) counts: Counts,
    pub(super) calls: Arc<CallCounts>,
    pub(super) budget: Arc<Budget>,
}

#[derive(Default)]
pub(super) struct Counts {
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
}

/// The keys of a file, and when the provider gave the data key behind them.
pub struct OpenedKeys {
    /// The file's keys.
    pub keys: FileKeys,
    /// When the provider last agreed.
    pub since: Moment,
}

/// What a ring is made of.
pub(super) struct RingParts {
    pub(super) volume_id: [u8; 16],
    pub(super) suite: Suite,
    pub(super) header_key: HeaderKey,
    pub(super) provision_key: ProvisionKey,
    pub(super) allowed: Vec<(u8, Vec<u8>)>,
    pub(super) recipients: Vec<Recipient>,
    pub(super) files_per_data_key: u32,
    pub(super) limits: KeyLimits,
}

impl Ring {
    pub(super) fn new(parts: RingParts) -> Self {
        let calls: Arc<CallCounts> = Arc::default();
        let budget = Arc::new(Budget::new(parts.limits.calls_per_second));
        let gate: Arc<Gate> = Arc::default();
        let recipients = parts.recipients.into_iter().map(|recipient| metered(recipient, &calls, &budget, &gate));
        let recipients = Recipients::new(recipients.collect());
        let keys = Arc::new(CurrentKeys::new(KeyList { allowed: parts.allowed, recipients }));
        let mint = Arc::new(Mint {
            volume_id: parts.volume_id,
            key: parts.provision_key,
            keys: Arc::clone(&keys),
            source: OnceLock::new(),
        });
        Self {
            volume_id: parts.volume_id,
            suite: parts.suite,
            header_key: parts.header_key,
            keys,
            pool: Pool::new(Arc::clone(&mint), parts.files_per_data_key, parts.limits, Arc::clone(&gate)),
            mint,
            cache: Cache::new(parts.limits),
            flight: Flight::default(),
            refusals: Refusals::new(parts.limits),
            limits: parts.limits,
            gate,
            warned: AtomicBool::new(false),
            counts: Counts::default(),
            calls,
            budget,
        }
    }

    /// Takes these as the volume's keys from now on. Those that are not among them open what they have wrapped for as long
    /// as this ring is used: a file may be open that has no name, and whose records nobody can bring along. Data keys that
    /// were made ahead are wiped; what an operation has already taken is of no use if [`Self::key_version`] was another then.
    pub fn change_keys(&self, mut allowed: Vec<(u8, Vec<u8>)>, mut recipients: Vec<Recipient>) {
        let known = self.recipients();
        self.keys.get().keep_in(&mut allowed, &mut recipients);
        let meter = |recipient: Recipient| {
            let is_metered = known.iter().any(|known| Arc::ptr_eq(&known.provider, &recipient.provider));
            if is_metered { recipient } else { metered(recipient, &self.calls, &self.budget, &self.gate) }
        };
        let recipients = Recipients::new(recipients.into_iter().map(meter).collect());
        self.keys.replace(KeyList { allowed, recipients });
        self.pool.clear();
        self.refusals.clear();
    }

    /// The keys that are asked, with their providers.
    #[must_use]
    pub fn recipients(&self) -> Vec<Recipient> {
        self.keys.get().recipients()
    }

    /// Counts changes of the list of keys.
    #[must_use]
    pub fn key_version(&self) -> u64 {
        self.keys.version()
    }

    /// The keys of the file, if its data key is in memory.
    ///
    /// # Errors
    /// [`KeyError::Commitment`] or [`KeyError::Locked`].
    pub fn cached(&self, header: &AuthenticHeader) -> Option<Result<OpenedKeys, KeyError>> {
        if let Err(locked) = self.check_unlocked() {
            return Some(Err(locked));
        }
        let unwrapped = self.cache.get(&header.cache_key, Moment::now())?;
        self.counts.hits.fetch_add(1, Ordering::Relaxed);
        Some(opened(header, &unwrapped))
    }

    /// The keys of the file; asks a provider, and so may take its deadline, if the data key is not in memory.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn open(&self, header: &AuthenticHeader) -> Result<OpenedKeys, KeyError> {
        if let Some(keys) = self.cached(header) {
            return keys;
        }
        self.counts.misses.fetch_add(1, Ordering::Relaxed);
        opened(header, &self.ask(header)?)
    }

    /// Asks the provider again for a key that is in use, unless it has agreed a short while ago. Returns when it last did.
    ///
    /// # Errors
    /// [`KeyError`]; the key is then gone from memory, unless the provider merely could not be reached: then it is for the
    /// caller to know how long an old key may do.
    pub fn renew(&self, header: &AuthenticHeader) -> Result<Moment, KeyError> {
        self.check_unlocked()?;
        if let Some(fresh) = self.cache.get_fresh(&header.cache_key, Moment::now()) {
            return Ok(fresh.since);
        }
        Ok(self.ask_now(header)?.since)
    }

    /// If the provider cannot be reached, an old key may do for a while.
    fn ask(&self, header: &AuthenticHeader) -> Result<Unwrapped, KeyError> {
        self.ask_now(header).or_else(|error| {
            let stale = || self.cache.get_stale(&header.cache_key, Moment::now());
            error.is_passing().then(stale).flatten().ok_or(error)
        })
    }

    /// One provider call, however many ask.
    fn ask_now(&self, header: &AuthenticHeader) -> Result<Unwrapped, KeyError> {
        let answer = match self.refusals.get(&header.cache_key, Moment::now()) {
            Some(refusal) => Err(refusal),
            None => self.flight.run(&header.cache_key, || self.unwrap(header)).inspect_err(|error| {
                if error.provider_kind().is_some() {
                    self.refusals.remember(&header.cache_key, error, Moment::now());
                }
            }),
        };
        answer.inspect_err(|error| {
            if !error.is_passing() {
                self.cache.remove(&header.cache_key);
            }
        })
    }

    /// Tries the records that it can; keeps the key only if it matches the header's commitment.
    fn unwrap(&self, header: &AuthenticHeader) -> Result<Unwrapped, KeyError> {
        let pass = self.pass()?;
        let (data_key, _) = self.unwrap_records(header).map_err(|error| self.check(pass).err().unwrap_or(error))?;
        let unwrapped = Unwrapped { key: Arc::new(data_key), since: Moment::now() };
        self.keep(header.cache_key.clone(), &unwrapped)?;
        Ok(unwrapped)
    }

    /// The data key of a header, checked against its commitment, and the record that it was in.
    pub(super) fn unwrap_records<'h>(&self, header: &'h AuthenticHeader) -> Result<(DataKey, &'h Record), KeyError> {
        let context = EncryptionContext::data_key(&self.volume_id, &header.header.data_key_id);
        let _file = Behalf::current().of_file(header.header.file_id).enter();
        let (mut failures, list) = (Vec::new(), self.keys.get());
        for (record, watched) in to_unwrap(&list, &header.header.records) {
            let key_id = String::from_utf8_lossy(&record.key_id);
            watched.begin();
            let answer = watched.provider().unwrap(&key_id, &record.wrapped, &context);
            watched.note(&answer);
            if answer.as_ref().is_err_and(|error| error.kind.is_end_of_key()) {
                self.pool.forget_made_by(record);
            }
            match answer.map_err(KeyError::from) {
                Ok(data_key) => match FileKeys::open(&header.verified, &data_key) {
                    Ok(_) => return Ok((data_key, record)),
                    Err(mismatch) => failures.push(mismatch.into()),
                },
                Err(error) => failures.push(error),
            }
        }
        Err(self.worst(failures, header))
    }

    /// What the failures of all records come to. As long as one provider merely was not reached, the key is not refused.
    fn worst(&self, failures: Vec<KeyError>, header: &AuthenticHeader) -> KeyError {
        let passing = failures.iter().position(KeyError::is_passing).unwrap_or(0);
        let messages: Vec<_> = failures.iter().map(KeyError::to_string).collect();
        match failures.into_iter().nth(passing) {
            None => KeyError::NoUsableRecord(describe(&header.header.records)),
            Some(KeyError::Provider(error)) => {
                let id = hex::encode_uuid(&header.header.data_key_id);
                ProviderError::new(error.kind, format!("{} (data key {id})", messages.join("; ")))
                    .of_request(error.request_id.as_deref())
                    .into()
            }
            Some(other) => other,
        }
    }

    /// A key that arrives after everything was locked is not kept.
    fn keep(&self, key: CacheKey, unwrapped: &Unwrapped) -> Result<(), KeyError> {
        self.cache.put(key, unwrapped.clone());
        self.check_unlocked().inspect_err(|_| self.cache.clear())
    }

    /// Wipes data keys that were made ahead: new files get others.
    pub fn forget_made_ahead(&self) {
        self.pool.clear();
    }

    /// Whether keys are given out.
    ///
    /// # Errors
    /// [`KeyError::Locked`].
    pub fn check_unlocked(&self) -> Result<(), KeyError> {
        self.pass().map(drop)
    }

    /// What is to begin now and may take some time.
    ///
    /// # Errors
    /// [`KeyError::Locked`].
    pub fn pass(&self) -> Result<Pass, KeyError> {
        self.gate.pass()
    }

    /// Whether nothing was locked since `pass` was given.
    ///
    /// # Errors
    /// [`KeyError::Locked`].
    pub fn check(&self, pass: Pass) -> Result<(), KeyError> {
        self.gate.check(pass)
    }

    /// Wipes every unwrapped key and what connections hold of them, and gives out none until [`Self::unlock`].
    pub fn lock(&self) {
        self.gate.shut();
        self.clear();
        self.keys.get().recipients.all().for_each(|watched| watched.provider().hang_up());
    }

    /// Lets keys be had again.
    pub fn unlock(&self) {
        self.refusals.clear();
        self.keys.get().recipients.all().for_each(Watched::forget_silence);
        self.gate.open();
    }

    /// Whether all keys are withheld.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.gate.is_shut()
    }

    /// Wipes keys that are too old for any use. Says so in the log, once, if the kernel does not protect keys.
    pub fn sweep(&self) {
        self.cache.sweep(Moment::now());
        self.pool.sweep();
        // Before there is a log nobody would hear it.
        if KeyMemory::in_use() == KeyMemory::Ordinary
            && tracing::enabled!(tracing::Level::WARN)
            && !self.warned.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(
                "keys are in ordinary memory, which may be swapped to disk: raise the limit of locked memory \
                 (LimitMEMLOCK=8M in a unit, `memlock` in /etc/security/limits.conf)"
            );
        }
    }

    /// How long a key may be used, and how much longer while its provider cannot be reached.
    #[must_use]
    pub fn limits(&self) -> KeyLimits {
        self.limits
    }

    /// Keys and a header page for a new file. Waits for a provider if no data key is ready.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new_file(&self) -> Result<(OpenedKeys, Box<HeaderPage>), KeyError> {
        self.seal_header(self.new_data_key()?)
    }

    /// The same, if a data key is ready.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new_file_at_once(&self) -> Option<Result<(OpenedKeys, Box<HeaderPage>), KeyError>> {
        if let Err(locked) = self.check_unlocked() {
            return Some(Err(locked));
        }
        Some(self.seal_header(self.pool.take_ready()?))
    }

    /// A data key for one file.
    pub(super) fn new_data_key(&self) -> Result<Minted, KeyError> {
        let pass = self.pass()?;
        let minted = self.pool.take();
        self.check(pass)?;
        minted
    }

    fn seal_header(&self, minted: Minted) -> Result<(OpenedKeys, Box<HeaderPage>), KeyError> {
        let file_id = random_array();
        let header = Header {
            suite: self.suite.id(),
            generation: 1,
            volume_id: self.volume_id,
            file_id,
            data_key_id: minted.data_key_id,
            records: minted.records,
            commitment: commitment(&minted.data_key, &file_id),
        };
        let signed = header.signed_bytes()?;
        let mut page = Box::new([0; PAGE_LEN]);
        header::put_slot(&mut page, 0, &signed, &self.header_key.mac(&signed));
        let keys = FileKeys::create(&minted.data_key, self.suite, &file_id);
        // Who reads what he has just written pays no call for it.
        if self.is_remote() {
            self.keep(cache_key(&header), &Unwrapped { key: minted.data_key, since: minted.since })?;
        }
        Ok((OpenedKeys { keys, since: minted.since }, page))
    }

    /// From now on new files may use the provisioned keys of `place`; only the first call counts.
    pub fn use_provisioned(&self, place: Box<dyn ProvisionedKeys>, when: ProvisionedUse) {
        if when != ProvisionedUse::Never {
            // A second place is of no use, and nobody gives one.
            let _ = self.mint.source.set(Source::new(place, when == ProvisionedUse::Only));
        }
    }

    /// Makes a provisioned key: the name and the bytes of its entry. One call of the provider.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn provision(&self) -> Result<(String, Vec<u8>), KeyError> {
        self.mint.provision()
    }

    /// Whether an entry is a provisioned key that this ring can use, by all that can be known without its provider.
    #[must_use]
    pub fn is_provisioned(&self, name: &str, bytes: &[u8]) -> bool {
        self.mint.is_good(name, bytes)
    }

    /// The record of a provisioned key that this ring can use.
    #[must_use]
    pub fn record_of_provisioned(&self, name: &str, bytes: &[u8]) -> Option<Record> {
        self.mint.check(name, bytes).ok().map(|key| key.record)
    }

    /// How many provisioned keys are left, good or not; `None` if none are used.
    #[must_use]
    pub fn provisioned_left(&self) -> Option<u64> {
        self.mint.count()
    }

    /// Whether a provider's call may take a network's time.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.keys.is_remote()
    }

    /// Wipes every unwrapped key that no open file uses.
    pub fn clear(&self) {
        self.cache.clear();
        self.pool.clear();
    }

    #[cfg(test)]
    pub(super) fn mac_for_tests(&self, signed: &[u8]) -> [u8; 32] {
        self.header_key.mac(signed)
    }
}

fn metered(recipient: Recipient, calls: &Arc<CallCounts>, budget: &Arc<Budget>, gate: &Arc<Gate>) -> Recipient {
    let provider = Metered::new(recipient.provider, Arc::clone(calls), Arc::clone(budget), Arc::clone(gate));
    let provider = Arc::new(provider);
    Recipient { provider, ..recipient }
}

/// A record counts only if its wrapping key is on the volume's list and its provider is known.
fn to_unwrap<'r, 'l>(list: &'l KeyList, records: &'r [Record]) -> Vec<(&'r Record, &'l Watched)> {
    let mut usable = list.recipients.to_unwrap(records);
    usable.retain(|(record, _)| list.allows(record));
    usable
}

fn opened(header: &AuthenticHeader, unwrapped: &Unwrapped) -> Result<OpenedKeys, KeyError> {
    Ok(OpenedKeys { keys: FileKeys::open(&header.verified, &unwrapped.key)?, since: unwrapped.since })
}

fn describe(records: &[Record]) -> String {
    let names = records.iter().map(|record| {
        let kind = ProviderKind::from_tag(record.provider).map_or("an unknown provider", ProviderKind::name);
        format!("{kind}:{}", String::from_utf8_lossy(&record.key_id).escape_debug())
    });
    names.collect::<Vec<_>>().join(", ")
}
