//! The wrapping keys of a volume with their providers: whom to ask first, and whom not to wait for.
//!
//! Invariants: nothing is sorted out for ever: a provider that did not answer is asked last for a while, and one that could
//! not wrap is left out of new records for a while; of those who come when that is over, one asks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::crypto::DataKey;
use crate::format::header::Record;

use super::{EncryptionContext, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey};

/// So long a provider that did not answer is asked after the others, and one that could not wrap is not asked to.
const DOWN: Duration = Duration::from_secs(30);

/// A wrapping key on a volume's list.
#[derive(Clone)]
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
    /// That new files get no record of it was said.
    told: bool,
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

    /// The records that can be tried, with those first that cost least: whose provider answers, and is near. Of those that only
    /// wrap, one is tried if there is nobody else, for what it says.
    pub(super) fn to_unwrap<'r, 'w>(&'w self, records: &'r [Record]) -> Vec<(&'r Record, &'w Watched)> {
        let usable = records.iter().filter_map(|record| Some((record, self.of(record)?)));
        let (mut usable, wrap_only): (Vec<_>, Vec<_>) =
            usable.partition(|(_, watched)| watched.recipient.provider.can_unwrap());
        if usable.is_empty() {
            return wrap_only;
        }
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

    /// The only one that new data keys get a record of, if there is no other.
    pub(super) fn only_one_to_generate(&self) -> Option<&Watched> {
        let mut wrapping = self.0.iter().filter(|watched| watched.recipient.wraps_new);
        wrapping.next().filter(|_| wrapping.next().is_none())
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

    /// The record of a key that it has wrapped.
    pub(super) fn record(&self, wrapped: WrappedKey) -> Record {
        Record::of(self.recipient.kind.tag(), wrapped.key_id, wrapped.bytes)
    }

    fn made(&self, record: &Record) -> bool {
        record.provider == self.recipient.kind.tag() && record.key_id == self.recipient.key.as_bytes()
    }

    /// Whether it did not answer a short while ago.
    fn is_silent(&self) -> bool {
        self.health().silent.is_some_and(|at| at.elapsed() < DOWN)
    }

    /// A call is about to be made. If the provider was silent, others take it as silent until this call is answered.
    pub(super) fn begin(&self) {
        turn(&mut self.health().silent);
    }

    /// Takes note of what became of a call.
    pub(super) fn note<T>(&self, answer: &Result<T, ProviderError>) {
        // One that only wraps has nothing to say against wrapping when it does not unwrap.
        if !self.recipient.provider.can_unwrap() {
            return;
        }
        let silent = match answer {
            Err(error) => matches!(error.kind, ProviderErrorKind::Unavailable | ProviderErrorKind::Credentials),
            Ok(_) => false,
        };
        self.health().silent = silent.then(Instant::now);
    }

    /// Forgets that it did not answer.
    pub(super) fn forget_silence(&self) {
        self.health().silent = None;
    }

    /// A record of a new data key; none if it cannot be made, which is told once until one is made again.
    fn wrap_new(&self, data_key: &DataKey, context: &EncryptionContext) -> Option<Record> {
        let Recipient { kind, key, provider, .. } = &self.recipient;
        if turn(&mut self.health().does_not_wrap) {
            return None;
        }
        let wrapped = if self.is_silent() {
            Err(ProviderError::new(ProviderErrorKind::Unavailable, "its provider does not answer"))
        } else {
            self.begin();
            let wrapped = provider.wrap(key, data_key, context);
            self.note(&wrapped);
            wrapped
        };
        let mut health = self.health();
        health.does_not_wrap = wrapped.is_err().then(Instant::now);
        let told = std::mem::replace(&mut health.told, wrapped.is_err());
        drop(health);
        match wrapped {
            Ok(wrapped) => Some(self.record(wrapped)),
            Err(error) => {
                if !told {
                    tracing::warn!(
                        request_id = error.request_id,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Suite;
    use crate::format::config::{self, End, Holes};
    use crate::keys::providers::scripted::{Answer, Calls, ScriptedProvider};
    use crate::keys::volume::{self, NewVolume, Unlocked};
    use crate::keys::{KeyError, KeyLimits, Volume, Wanted};

    const SETTINGS: NewVolume =
        NewVolume { suite: Suite::Xaes256Gcm, holes: Holes::Allow, end: End::Lenient, files_per_data_key: 1 };

    /// A volume under two keys of two far providers.
    fn volume_of_two() -> ([Arc<ScriptedProvider>; 2], Volume) {
        let providers = ["a", "b"].map(|key| Arc::new(ScriptedProvider::new(key, true)));
        let created = volume::create(&SETTINGS, providers[0].as_ref(), None).unwrap();
        let sealed = config::parse(created.config_file.as_bytes()).unwrap();
        let mut unlocked = Unlocked::open(&sealed, providers[0].as_ref(), Some("a")).unwrap();
        let mut config = unlocked.config().clone();
        let second = unlocked.wrap(providers[1].as_ref(), "b").unwrap();
        config.wrapping_keys.push(config::WrappingKey {
            provider: second.provider.clone(),
            key: second.key.clone(),
            location: None,
        });
        config.volume_keys.push(second);
        let sealed = config::parse(unlocked.change(config).unwrap().as_bytes()).unwrap();
        // Each of the two opens it.
        Unlocked::open(&sealed, providers[1].as_ref(), Some("b")).unwrap();
        let recipients = ["a", "b"].into_iter().zip(&providers).map(|(key, provider)| Recipient {
            kind: provider.kind(),
            key: key.to_owned(),
            wraps_new: true,
            provider: provider.clone(),
        });
        (providers.clone(), unlocked.volume(recipients.collect(), KeyLimits::default()))
    }

    fn new_page(volume: &Volume) -> Box<header::HeaderPage> {
        volume.ring.new_file().unwrap().1
    }

    fn records(volume: &Volume, page: &header::HeaderPage) -> Vec<Vec<u8>> {
        let header = volume.ring.authenticate(page).unwrap().unwrap();
        header.header().records.iter().map(|record| record.key_id.clone()).collect()
    }

    fn open(volume: &Volume, page: &header::HeaderPage) -> Result<(), KeyError> {
        volume.ring.clear();
        volume.ring.open(&volume.ring.authenticate(page)?.unwrap()).map(drop)
    }

    /// Drops what was made ahead, and waits for what is being made: all calls from now on are the test's.
    fn quiet(volume: &Volume) {
        volume.ring.clear();
        let start = Instant::now();
        while volume.ring.measures().pool.calls > 0 {
            assert!(start.elapsed() < Duration::from_secs(10));
            std::thread::yield_now();
        }
    }

    use crate::format::header;

    #[test]
    fn a_provider_that_is_away_costs_one_wait_and_not_one_for_each_file() {
        let ([a, b], volume) = volume_of_two();
        let pages: Vec<_> = (0..20).map(|_| new_page(&volume)).collect();
        assert!(pages.iter().all(|page| records(&volume, page) == [b"a", b"b"]));
        quiet(&volume);
        let unwrapped = || [a.calls().unwrap, b.calls().unwrap];
        let [before, other] = unwrapped();
        open(&volume, &pages[0]).unwrap();
        assert_eq!(unwrapped(), [before + 1, other], "the first is asked while it answers");
        a.always(Answer::Fail(ProviderErrorKind::Unavailable));
        pages.iter().for_each(|page| open(&volume, page).unwrap());
        assert_eq!(unwrapped(), [before + 2, other + 20]);
        // If both are away, both are asked: what is silent is not gone.
        b.always(Answer::Fail(ProviderErrorKind::KeyUnusable));
        let error = open(&volume, &pages[3]).unwrap_err();
        assert_eq!(error.provider_kind(), Some(ProviderErrorKind::Unavailable), "not a refusal as long as one is away");
    }

    #[test]
    fn one_that_only_wraps_is_not_asked_for_more_and_goes_on_wrapping() {
        let ([a, b], volume) = volume_of_two();
        let page = new_page(&volume);
        let header = volume.ring.authenticate(&page).unwrap().unwrap();
        let of_b = volume.ring.next_page(&page, &header, &header.header().records[1..]).unwrap();
        b.only_wrap();
        let before = b.calls().unwrap;
        let kind = |page| open(&volume, page).unwrap_err().provider_kind();
        quiet(&volume);
        a.always(Answer::Fail(ProviderErrorKind::KeyUnusable));
        assert_eq!((kind(&page), b.calls().unwrap), (Some(ProviderErrorKind::KeyUnusable), before));
        a.always(Answer::Right);
        // Only where there is nobody else, for what it says; and it is not taken for one that is away.
        assert_eq!((kind(&of_b), b.calls().unwrap), (Some(ProviderErrorKind::Credentials), before + 1));
        assert_eq!(records(&volume, &new_page(&volume)), [b"a", b"b"]);
    }

    #[test]
    fn a_refusal_or_a_wrong_key_of_one_is_made_good_by_the_other() {
        let ([a, _], volume) = volume_of_two();
        let page = new_page(&volume);
        for answer in [Answer::Fail(ProviderErrorKind::KeyUnusable), Answer::WrongKey] {
            a.always(answer);
            open(&volume, &page).unwrap();
        }
    }

    #[test]
    fn new_files_go_on_without_the_first_and_rewrapping_adds_its_records() {
        let ([a, b], volume) = volume_of_two();
        a.always(Answer::Fail(ProviderErrorKind::Unavailable));
        // One that was made ahead may have both.
        let pages: Vec<_> = (0..30).map(|_| new_page(&volume)).collect();
        let last = pages.last().unwrap();
        assert_eq!(records(&volume, last), [b"b"]);
        let Calls { generate, wrap, .. } = a.calls();
        assert!(generate + wrap <= 10, "{generate} {wrap}: one for each thread that was under way");
        a.always(Answer::Right);
        let wanted = ["a", "b"].map(|key| Wanted { kind: a.kind(), key: key.to_owned() });
        let header = volume.ring.authenticate(last).unwrap().unwrap();
        assert!(!Wanted::are_all(&wanted, &header.header().records));
        let new = volume.ring.rewrapped(&header, &wanted).unwrap();
        assert!(Wanted::are_all(&wanted, &new));
        let page = volume.ring.next_page(last, &header, &new).unwrap();
        assert_eq!(page[..header::SLOT_LEN], last[..header::SLOT_LEN], "the slot in use is left alone");
        assert_eq!(volume.ring.authenticate(&page).unwrap().unwrap().header().generation, 2);
        b.always(Answer::Fail(ProviderErrorKind::KeyUnusable));
        open(&volume, &page).unwrap();
        // And once more: back in the first slot.
        let header = volume.ring.authenticate(&page).unwrap().unwrap();
        let again = volume.ring.next_page(&page, &header, &new[..1]).unwrap();
        assert_eq!(again[header::SLOT_LEN..], page[header::SLOT_LEN..]);
        assert_eq!(records(&volume, &again), [b"a"]);
    }

    #[test]
    fn records_of_unknown_providers_are_kept() {
        let (_, volume) = volume_of_two();
        let page = new_page(&volume);
        let header = volume.ring.authenticate(&page).unwrap().unwrap();
        let stranger = Record::of(99, "x".to_owned(), vec![1; 40]);
        let with_stranger = [header.header().records.clone(), vec![stranger.clone()]].concat();
        let page = volume.ring.next_page(&page, &header, &with_stranger).unwrap();
        let wanted = [Wanted { kind: ProviderKind::Local, key: "b".to_owned() }];
        let header = volume.ring.authenticate(&page).unwrap().unwrap();
        let new = volume.ring.rewrapped(&header, &wanted).unwrap();
        let page = volume.ring.next_page(&page, &header, &new).unwrap();
        let header = volume.ring.authenticate(&page).unwrap().unwrap();
        assert_eq!(header.header().records.last(), Some(&stranger));
        assert!(header.header().records.len() == 2 && Wanted::are_all(&wanted, &header.header().records));
    }
}
