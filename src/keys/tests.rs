//! The key path as a whole, against a provider that does as it is told.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::providers::scripted::{Answer, ScriptedProvider};
use super::volume::{self, NewVolume, Volume};
use super::{KeyError, KeyLimits, ProviderErrorKind, ProvisionedKeys, ProvisionedUse};
use crate::crypto::Suite;
use crate::format::config::{self, End, Holes};
use crate::format::geometry::PAGE_LEN;
use crate::format::header::{self, Header, HeaderPage, Record, SLOT_LEN};

const SETTINGS: NewVolume =
    NewVolume { suite: Suite::Xaes256Gcm, holes: Holes::Allow, end: End::Lenient, files_per_data_key: 1 };

fn volume_of(provider: &Arc<ScriptedProvider>, limits: KeyLimits) -> Volume {
    let created = volume::create(&SETTINGS, provider.as_ref(), None).unwrap();
    let sealed = config::parse(created.config_file.as_bytes()).unwrap();
    volume::unlock(&sealed, provider.clone(), limits).unwrap()
}

fn new_volume() -> (Arc<ScriptedProvider>, Volume) {
    let provider = Arc::new(ScriptedProvider::new("k", false));
    let volume = volume_of(&provider, KeyLimits::default());
    (provider, volume)
}

/// Opens a header page the way `open` does.
fn open(volume: &Volume, page: &HeaderPage) -> Result<(), KeyError> {
    let header = volume.ring.authenticate(page)?.expect("a header");
    volume.ring.open(&header).map(|_| ())
}

/// `change` applied to the header in slot 0, authenticated again and put into `slot`.
fn with_header(volume: &Volume, page: &HeaderPage, slot: usize, change: impl FnOnce(&mut Header)) -> HeaderPage {
    let mut header = header::parse_page(page)[0].as_ref().unwrap().header.clone();
    change(&mut header);
    let (mut changed, signed) = (*page, header.signed_bytes().unwrap());
    header::put_slot(&mut changed, slot, &signed, &volume.ring.mac_for_tests(&signed));
    changed
}

#[test]
fn a_new_header_opens_again_and_the_second_time_without_a_call() {
    let (provider, volume) = new_volume();
    let (_, page) = volume.ring.new_file().unwrap();
    let before = provider.calls();
    open(&volume, &page).unwrap();
    open(&volume, &page).unwrap();
    assert_eq!(provider.calls().unwrap - before.unwrap, 1);
    let stats = volume.ring.stats();
    assert_eq!((stats.hits, stats.misses, stats.entries), (1, 1, 1));
    volume.ring.clear();
    open(&volume, &page).unwrap();
    assert_eq!(provider.calls().unwrap - before.unwrap, 2);
}

/// A tree that is made and then read costs no call for what was made, until its keys are too old.
#[test]
fn the_key_of_a_new_file_is_kept_if_its_provider_is_far_away() {
    for max_age in [KeyLimits::default().max_age, Duration::ZERO] {
        let provider = Arc::new(ScriptedProvider::new("k", true));
        let volume = volume_of(&provider, KeyLimits { max_age, ..KeyLimits::default() });
        let (_, page) = volume.ring.new_file().unwrap();
        let before = provider.calls().unwrap;
        open(&volume, &page).unwrap();
        assert_eq!(provider.calls().unwrap - before, u64::from(max_age.is_zero()));
        volume.ring.lock();
        assert_eq!(volume.ring.stats().entries, 0);
    }
}

#[test]
fn an_old_key_is_asked_for_again_and_a_refusal_counts() {
    let provider = Arc::new(ScriptedProvider::new("k", false));
    let volume = volume_of(&provider, KeyLimits { max_age: Duration::ZERO, ..KeyLimits::default() });
    let (_, page) = volume.ring.new_file().unwrap();
    open(&volume, &page).unwrap();
    provider.always(Answer::Fail(ProviderErrorKind::KeyUnusable));
    assert_eq!(open(&volume, &page).unwrap_err().provider_kind(), Some(ProviderErrorKind::KeyUnusable));
}

/// The second opening falls into the time in which the provider's silence is remembered.
#[test]
fn the_grace_holds_for_every_opening_while_the_provider_is_away() {
    let provider = Arc::new(ScriptedProvider::new("k", false));
    let (max_age, stale_grace) = (Duration::from_millis(400), Duration::from_secs(3600));
    let volume = volume_of(&provider, KeyLimits { max_age, stale_grace, ..KeyLimits::default() });
    let (_, page) = volume.ring.new_file().unwrap();
    open(&volume, &page).unwrap();
    std::thread::sleep(max_age);
    provider.always(Answer::Fail(ProviderErrorKind::Unavailable));
    for _ in 0..3 {
        open(&volume, &page).unwrap();
    }
}

#[test]
fn the_valid_slot_with_the_highest_generation_wins() {
    let (_, volume) = new_volume();
    let (_, page) = volume.ring.new_file().unwrap();
    let both = with_header(&volume, &page, 1, |header| header.generation = 2);
    let generation = |page: &HeaderPage| volume.ring.authenticate(page).unwrap().unwrap().header().generation;
    assert_eq!(generation(&both), 2);
    // A write torn at any byte of either slot leaves the other one.
    for at in (0..2 * SLOT_LEN).step_by(5) {
        let mut torn = both;
        torn[at] ^= 0xff;
        assert_eq!(generation(&torn), if at < SLOT_LEN { 2 } else { 1 }, "{at}");
    }
    let mut neither = both;
    neither[10] ^= 1;
    neither[SLOT_LEN + 10] ^= 1;
    assert!(matches!(volume.ring.authenticate(&neither), Err(KeyError::UnauthenticHeader)));
}

#[test]
fn a_page_of_zeros_is_no_header_and_no_error() {
    let (_, volume) = new_volume();
    assert!(volume.ring.authenticate(&[0; PAGE_LEN]).unwrap().is_none());
}

#[test]
fn nothing_foreign_reaches_a_provider() {
    let (provider, volume) = new_volume();
    let (_, page) = volume.ring.new_file().unwrap();
    let calls = provider.calls();
    let (_, other) = new_volume();
    assert!(matches!(open(&other, &page), Err(KeyError::UnauthenticHeader)));
    let foreign = with_header(&volume, &page, 0, |header| header.records[0].key_id = b"attacker".to_vec());
    assert!(matches!(open(&volume, &foreign), Err(KeyError::NoUsableRecord(_))));
    let suite = with_header(&volume, &page, 0, |header| header.suite = 77);
    assert!(matches!(open(&volume, &suite), Err(KeyError::UnknownSuite(_))));
    assert_eq!(provider.calls(), calls);
}

#[test]
fn unknown_providers_are_skipped_and_kept() {
    let (_, volume) = new_volume();
    let (_, page) = volume.ring.new_file().unwrap();
    let stranger = Record { provider: 99, key_id: b"x".to_vec(), wrapped: vec![1; 50] };
    let page = with_header(&volume, &page, 0, |header| header.records.insert(0, stranger));
    open(&volume, &page).unwrap();
}

#[test]
fn the_wrong_key_is_refused_and_not_kept() {
    let (provider, volume) = new_volume();
    let (_, page) = volume.ring.new_file().unwrap();
    provider.then(Answer::WrongKey);
    assert!(matches!(open(&volume, &page), Err(KeyError::Commitment(_))));
    assert_eq!(volume.ring.stats().entries, 0);
    open(&volume, &page).unwrap();
}

#[test]
fn a_changed_config_is_refused() {
    let provider = Arc::new(ScriptedProvider::new("k", false));
    let created = volume::create(&SETTINGS, provider.as_ref(), None).unwrap();
    for (from, to) in [("\"allow\"", "\"deny\""), ("\"lenient\"", "\"strict\""), ("= 1\n\n", "= 2\n\n")] {
        let file = created.config_file.replacen(from, to, 1);
        assert_ne!(file, created.config_file);
        let sealed = config::parse(file.as_bytes()).unwrap();
        let unlocked = volume::unlock(&sealed, provider.clone(), KeyLimits::default());
        assert!(matches!(unlocked.err(), Some(KeyError::BrokenSeal)), "{from}");
    }
}

/// A place for provisioned keys in memory.
#[derive(Clone, Default)]
struct Place(Arc<Mutex<Stock>>);

#[derive(Default)]
struct Stock {
    entries: BTreeMap<String, Vec<u8>>,
    rejected: Vec<String>,
}

impl Place {
    /// With keys that this volume makes.
    fn of(volume: &Volume, count: usize) -> Self {
        let place = Self::default();
        place.lock().entries.extend((0..count).map(|_| volume.ring.provision().unwrap()));
        place
    }

    fn lock(&self) -> MutexGuard<'_, Stock> {
        self.0.lock().unwrap()
    }
}

impl ProvisionedKeys for Place {
    fn next(&self) -> io::Result<Option<(String, Vec<u8>, usize)>> {
        let state = self.lock();
        let good = |name: &&String| !state.rejected.contains(name);
        let name = state.entries.keys().find(good);
        Ok(name.map(|name| (name.clone(), state.entries[name].clone(), state.entries.len() - 1)))
    }

    fn claim(&self, name: &str) -> io::Result<bool> {
        Ok(self.lock().entries.remove(name).is_some())
    }

    fn put_back(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.lock().entries.insert(name.to_owned(), bytes.to_owned());
        Ok(())
    }

    fn reject(&self, name: &str) -> bool {
        self.lock().rejected.push(name.to_owned());
        true
    }

    fn count(&self) -> io::Result<u64> {
        Ok(self.lock().entries.len() as u64)
    }
}

fn data_key_id(volume: &Volume, page: &HeaderPage) -> [u8; 16] {
    volume.ring.authenticate(page).unwrap().unwrap().header().data_key_id
}

#[test]
fn provisioned_keys_are_used_once_each_and_open_again() {
    let (provider, volume) = new_volume();
    let place = Place::of(&volume, 3);
    let before = provider.calls();
    assert_eq!((before.generate_wrapped, before.generate), (3, 1));
    volume.ring.use_provisioned(Box::new(place.clone()), ProvisionedUse::Only);
    let mut names: Vec<String> = place.lock().entries.keys().cloned().collect();
    for left in (0..3).rev() {
        let (_, page) = volume.ring.new_file().unwrap();
        open(&volume, &page).unwrap();
        let used = crate::format::name::provisioned(&data_key_id(&volume, &page));
        names.retain(|name| *name != used);
        let there = place.lock().entries.len();
        assert_eq!((names.len(), there, volume.ring.provisioned_left()), (left, left, Some(left as u64)));
    }
    let error = volume.ring.new_file().err().unwrap();
    assert_eq!(error.provider_kind(), Some(ProviderErrorKind::KeyNotFound), "{error}");
    assert_eq!(provider.calls().generate, before.generate);
}

#[test]
fn keys_that_are_refused_to_many_are_taken_from_the_provisioned_ones() {
    let provider = Arc::new(ScriptedProvider::new("k", true));
    let volume = volume_of(&provider, KeyLimits::default());
    let place = Place::of(&volume, 100);
    volume.ring.use_provisioned(Box::new(place.clone()), ProvisionedUse::Fallback);
    provider.make_many_at_once();
    let before = provider.calls().generate;
    provider.make_none();
    volume.ring.new_file().unwrap();
    let mut calls = 0;
    // What was begun before the refusal was known is still under way.
    while calls != provider.calls().generate {
        calls = provider.calls().generate;
        std::thread::sleep(Duration::from_millis(300));
    }
    assert!(calls - before >= 2, "many at once: {calls}");
    for _ in 0..40 {
        volume.ring.new_file().unwrap();
    }
    assert_eq!(provider.calls().generate, calls);
    assert!(place.lock().entries.len() <= 60, "{}", place.lock().entries.len());
}

#[test]
fn a_refused_provider_is_not_asked_again_while_provisioned_keys_last() {
    let (provider, volume) = new_volume();
    let place = Place::of(&volume, 3);
    volume.ring.use_provisioned(Box::new(place.clone()), ProvisionedUse::Fallback);
    assert!(volume.ring.new_file().is_ok());
    assert_eq!(place.lock().entries.len(), 3, "none is used while the provider makes keys");
    let before = provider.calls();
    provider.then(Answer::Fail(ProviderErrorKind::Denied));
    for _ in 0..3 {
        volume.ring.new_file().unwrap();
    }
    assert_eq!((place.lock().entries.len(), provider.calls().generate - before.generate), (0, 1));
    // The stock is empty, so the provider is asked; it agrees again.
    assert!(volume.ring.new_file().is_ok());
    provider.then(Answer::Fail(ProviderErrorKind::Denied));
    let error = volume.ring.new_file().err().unwrap();
    assert_eq!(error.provider_kind(), Some(ProviderErrorKind::Denied));
    assert!(error.to_string().contains("kmsfs keys provision"), "{error}");
}

#[test]
fn only_a_refusal_leads_to_the_provisioned_keys() {
    let (provider, volume) = new_volume();
    let place = Place::of(&volume, 1);
    volume.ring.use_provisioned(Box::new(place.clone()), ProvisionedUse::Fallback);
    for kind in [ProviderErrorKind::Unavailable, ProviderErrorKind::Throttled, ProviderErrorKind::KeyUnusable] {
        provider.then(Answer::Fail(kind));
        assert_eq!(volume.ring.new_file().err().unwrap().provider_kind(), Some(kind));
    }
    assert_eq!(place.lock().entries.len(), 1);
}

#[test]
fn what_cannot_be_used_costs_no_call_and_stays() {
    let (provider, volume) = new_volume();
    let (_, stranger) = new_volume();
    let place = Place::of(&volume, 2);
    let foreign = stranger.ring.provision().unwrap();
    let (good, bad) = {
        let mut state = place.lock();
        let names: Vec<String> = state.entries.keys().cloned().collect();
        let good = state.entries[&names[1]].clone();
        state.entries.get_mut(&names[0]).unwrap()[60] ^= 1;
        state.entries.extend([foreign, ("f".repeat(32), good), ("e".repeat(32), b"junk".to_vec())]);
        (names[1].clone(), 4)
    };
    volume.ring.use_provisioned(Box::new(place.clone()), ProvisionedUse::Only);
    let before = provider.calls();
    assert!(volume.ring.new_file().is_ok());
    assert!(volume.ring.new_file().is_err());
    assert_eq!(provider.calls().unwrap - before.unwrap, 1);
    let state = place.lock();
    assert_eq!((state.entries.len(), state.rejected.len(), state.entries.contains_key(&good)), (bad, bad, false));
}

#[test]
fn a_key_that_could_not_be_unwrapped_goes_back() {
    let (provider, volume) = new_volume();
    let place = Place::of(&volume, 1);
    volume.ring.use_provisioned(Box::new(place.clone()), ProvisionedUse::Only);
    for kind in [ProviderErrorKind::Unavailable, ProviderErrorKind::Denied, ProviderErrorKind::KeyUnusable] {
        provider.then(Answer::Fail(kind));
        assert_eq!(volume.ring.new_file().err().unwrap().provider_kind(), Some(kind));
        assert_eq!(place.lock().entries.len(), 1);
    }
    assert!(volume.ring.new_file().is_ok());
}

#[test]
fn keys_that_were_taken_ahead_and_not_used_go_back() {
    let provider = Arc::new(ScriptedProvider::new("k", true));
    let volume = volume_of(&provider, KeyLimits::default());
    let place = Place::of(&volume, 100);
    volume.ring.use_provisioned(Box::new(place.clone()), ProvisionedUse::Only);
    for _ in 0..10 {
        volume.ring.new_file().unwrap();
    }
    let left = || place.lock().entries.len();
    // Few are taken ahead: they are lost if the process dies.
    assert!(left() >= 100 - 10 - 16 - 32, "{}", left());
    volume.ring.clear();
    let start = std::time::Instant::now();
    while left() != 90 {
        assert!(start.elapsed() < Duration::from_secs(20), "{}", left());
        std::thread::yield_now();
    }
}
