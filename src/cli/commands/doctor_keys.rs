//! The part of `kmsfs doctor` that asks the providers: each wrapping key, and what the caller may do with it.

use std::path::Path;
use std::sync::Arc;

use crate::cli::error::{CliError, Exit};
use crate::cli::listed_key::name_of;
use crate::cli::pins::Remembered;
use crate::crypto::random_array;
use crate::format::config::{SealedConfig, WrappingKey};
use crate::format::name;
use crate::keys::providers::{self, ProviderSettings};
use crate::keys::{
    EncryptionContext, KeyError, KeyLimits, KeyState, Provider, ProviderError, ProviderErrorKind, ProviderKind, Volume,
    volume,
};

use crate::storage::{CipherDirectory, KeyStock};

use super::doctor::{Findings, forget_hint};
use super::doctor_create;
use super::key_coverage::{self, Coverage};

/// What an error says when the host's clock may be wrong.
const CLOCK_SIGNS: [&str; 5] =
    ["Signature", "RequestExpired", "RequestTimeTooSkewed", "not yet current", "ExpiredToken"];
const CLOCK_ADVICE: &str = "if the credentials are right, set the clock (compare `date -u`; `timedatectl set-ntp true`): \
     AWS refuses requests whose time is more than 5 minutes off";

/// The volume that is examined.
pub(super) struct Subject<'a> {
    pub(super) directory: &'a CipherDirectory,
    /// Its provisioned keys, if their directory can be had.
    pub(super) stock: Option<&'a KeyStock>,
    pub(super) sealed: &'a SealedConfig,
    /// What is remembered of it.
    pub(super) remembered: Option<&'a Remembered>,
    pub(super) providers: &'a ProviderSettings,
    pub(super) read_only: bool,
}

/// A key of the volume, and what was found of it.
pub(super) struct Examined<'a> {
    pub(super) key: &'a WrappingKey,
    provider: Result<Arc<dyn Provider>, String>,
    findings: Findings,
    /// This host opens what it wraps, as far as is known.
    pub(super) works: bool,
    /// It unlocks the volume.
    volume: Option<Volume>,
}

impl Examined<'_> {
    /// Its provider, or why there is none.
    pub(super) fn provider(&self) -> Result<&dyn Provider, &str> {
        self.provider.as_deref().map_err(String::as_str)
    }
}

/// A key that unlocks the volume.
struct Unlocked<'a> {
    provider: &'a Arc<dyn Provider>,
    key: &'a WrappingKey,
    volume: &'a Volume,
}

/// Examines every key of the volume. One that unlocks it makes the failures of others warnings.
pub(super) fn check(subject: &Subject<'_>, findings: &mut Findings) {
    let mut keys: Vec<&WrappingKey> = subject.sealed.config.wrapping_keys.iter().collect();
    // In the order in which a mount tries them.
    keys.sort_by_key(|key| ProviderKind::from_name(&key.provider).map(ProviderKind::rank_to_unlock));
    let mut examined: Vec<_> = keys.into_iter().map(|key| check_key(subject, key)).collect();
    let unlocking = examined.iter().position(|key| key.volume.is_some());
    let mut code = None;
    for (number, key) in examined.iter_mut().enumerate() {
        if let Ok(provider) = &key.provider
            && !provider.can_unwrap()
        {
            only_wraps(key.key, unlocking.is_some(), &mut key.findings);
        }
        code = code.or(key.findings.first_failure());
        if unlocking.is_some_and(|first| first != number) {
            key.findings.soften();
        }
        findings.append(std::mem::take(&mut key.findings));
    }
    let unlocked = unlocking.map(|first| &examined[first]);
    let Some(Examined { key, provider: Ok(provider), volume: Some(volume), .. }) = unlocked else { return };
    let unlocked = Unlocked { provider, key, volume };
    check_fingerprint(subject, volume, findings);
    check_context(subject, &unlocked, findings);
    if !subject.read_only {
        doctor_create::check(subject, &examined, volume, findings);
    }
    check_files(subject, &examined, volume, code, findings);
}

/// A recipient whose identity is elsewhere is as it should be, if another key is here.
fn only_wraps(key: &WrappingKey, another_unlocks: bool, findings: &mut Findings) {
    let what = format!("{} only wraps here: its identity is not given", name_of(key));
    match another_unlocks {
        true => findings.ok("unwrap", what),
        false => findings.fail("unwrap", Exit::Credentials as u8, what, Some("give its file with --age-identity")),
    }
}

fn check_key<'a>(subject: &Subject<'_>, key: &'a WrappingKey) -> Examined<'a> {
    let mut findings = Findings::default();
    let provider = connect(subject, key, &mut findings);
    let (mut works, mut volume) = (false, None);
    if let Ok(provider) = &provider
        && is_usable(&**provider, key, &reached(&**provider, subject, key), &mut findings)
        && provider.can_unwrap()
    {
        (works, volume) = unlock(subject, key, Arc::clone(provider), &mut findings);
    }
    Examined { key, provider, findings, works, volume }
}

fn connect(subject: &Subject<'_>, key: &WrappingKey, findings: &mut Findings) -> Result<Arc<dyn Provider>, String> {
    let Some(kind) = ProviderKind::from_name(&key.provider) else {
        let what = format!("{}: this program does not know the provider", name_of(key));
        findings.fail("provider", Exit::KeyRefused as u8, &what, Some("use a newer kmsfs"));
        return Err(what);
    };
    let local = |key: &&WrappingKey| key.provider == ProviderKind::Local.name();
    let several = subject.sealed.config.wrapping_keys.iter().filter(local).count() > 1;
    let location = key.location.as_deref().map(Path::new);
    let opened = providers::open_listed(kind, &key.key, location, subject.providers, several);
    opened.map_err(|error| {
        failed("provider", &error, findings);
        error.to_string()
    })
}

/// The meaning of a description that arrives, in words.
fn reached(provider: &dyn Provider, subject: &Subject<'_>, key: &WrappingKey) -> String {
    let file = |path: Option<&Path>| path.map(|path| format!(" {}", path.display())).unwrap_or_default();
    match provider.kind() {
        ProviderKind::Local => {
            let keyring = subject.providers.keyring.as_deref().or(key.location.as_deref().map(Path::new));
            format!("local: the keyring{} opens", file(keyring))
        }
        ProviderKind::Age if provider.can_unwrap() => {
            format!("age: the file{} has the identity", file(subject.providers.age.identity_file.as_deref()))
        }
        ProviderKind::Age => "age: to wrap for a recipient takes no file and no server".to_owned(),
        kind => format!("{kind}: answers, and knows the credentials"),
    }
}

/// Whether it is worth to try the key. Its description is the first call, so it also tells of credentials and Region.
fn is_usable(provider: &dyn Provider, key: &WrappingKey, reached: &str, findings: &mut Findings) -> bool {
    match provider.describe(&key.key) {
        Ok(description) => {
            findings.ok("provider", reached);
            let what = format!("{}: {description}", name_of(key));
            match (&description.state, description.state.advice()) {
                (KeyState::Unknown(_), _) if !provider.can_unwrap() => findings.ok("key", what),
                (KeyState::Unknown(_), _) => findings.warn("key", what, "the checks that follow tell whether it works"),
                (_, None) => findings.ok("key", what),
                (_, Some(advice)) => findings.fail("key", Exit::KeyRefused as u8, what, Some(advice)),
            }
            description.state.advice().is_none()
        }
        Err(error) if [ProviderErrorKind::Denied, ProviderErrorKind::Throttled].contains(&error.kind) => {
            findings.ok("provider", reached);
            findings.warn("key", &error, "no mount needs this, but without it nobody sees a deletion coming");
            true
        }
        Err(error) => {
            let check = if error.kind == ProviderErrorKind::KeyNotFound { "key" } else { "provider" };
            failed(check, &error, findings);
            false
        }
    }
}

/// Tells how many of the volume's files each recipient opens.
fn check_files(
    subject: &Subject<'_>,
    examined: &[Examined<'_>],
    volume: &Volume,
    code: Option<u8>,
    findings: &mut Findings,
) {
    const CHECK: &str = "files";
    let coverage = match Coverage::look(subject.directory, Some(&volume.ring)) {
        Ok(coverage) => coverage,
        Err(error) => return findings.warn(CHECK, &error, "their keys cannot be told: run this as who may read them"),
    };
    let path = subject.directory.path();
    let recipients = examined.iter().filter(|key| volume::wraps_new(&subject.sealed.config, key.key));
    let mut all = true;
    for key in recipients {
        if let Some((what, how)) = key_coverage::lack(&coverage, key.key, path) {
            all = false;
            findings.warn(CHECK, what, &how);
        }
    }
    let working: Vec<_> = examined.iter().filter(|key| key.works).map(|key| key.key).collect();
    let closed = coverage.without_any(&working);
    let what = format!("{} need a key that does not work here", coverage.of_all(closed));
    let mend = "mend the key's failure above, or open the volume where the key works";
    match closed {
        0 if all => findings.ok(CHECK, format!("{} have a record of every recipient", coverage.of_all(coverage.files))),
        0 => {}
        closed if closed * 2 > coverage.files => {
            findings.fail(CHECK, code.unwrap_or(Exit::KeyRefused as u8), what, Some(mend));
        }
        _ => findings.warn(CHECK, what, mend),
    }
}

/// Unwraps the volume key under this key alone, and checks the config's seal with it: one call. Returns whether the key
/// unwraps, and the volume.
fn unlock(
    subject: &Subject<'_>,
    key: &WrappingKey,
    provider: Arc<dyn Provider>,
    findings: &mut Findings,
) -> (bool, Option<Volume>) {
    let mut sealed = subject.sealed.clone();
    sealed.config.volume_keys.retain(|record| record.provider == key.provider && record.key == key.key);
    if sealed.config.volume_keys.is_empty() {
        findings.ok("unwrap", format!("{} is kept for what it wrapped before", name_of(key)));
        return (true, None);
    }
    let works = format!("{} unwraps the volume key ({})", name_of(key), cost(&*provider, "Decrypt"));
    match volume::unlock(&sealed, Arc::clone(&provider), KeyLimits::default()) {
        Ok(volume) => {
            findings.ok("unwrap", works);
            findings.ok("seal", "the config is as it was sealed");
            (true, Some(volume))
        }
        Err(error @ KeyError::BrokenSeal) => {
            findings.ok("unwrap", works);
            findings.fail("seal", CliError::from(error.clone()).code(), error, None);
            (true, None)
        }
        Err(KeyError::Provider(error)) => {
            failed("unwrap", &error, findings);
            (false, None)
        }
        Err(error) => {
            findings.fail("unwrap", CliError::from(error.clone()).code(), error, None);
            (false, None)
        }
    }
}

fn check_fingerprint(subject: &Subject<'_>, volume: &Volume, findings: &mut Findings) {
    let Some(remembered) = subject.remembered else { return };
    if let Err(error) = remembered.check_fingerprint(subject.directory.path(), &volume.fingerprint) {
        findings.fail("remembered", error.code(), &error, Some(&forget_hint(subject.directory.path())));
    }
}

/// The volume key must not unwrap in the context of a data key. That one has the right volume, so no policy is in the way.
fn check_context(subject: &Subject<'_>, unlocked: &Unlocked<'_>, findings: &mut Findings) {
    const CHECK: &str = "context";
    let records = &subject.sealed.config.volume_keys;
    let record = records.iter().find(|r| r.provider == unlocked.key.provider && r.key == unlocked.key.key);
    let Some(wrapped) = record.and_then(|record| name::decode(record.wrapped.as_bytes())) else { return };
    let wrong = EncryptionContext::data_key(&unlocked.volume.id, &random_array());
    let calls = cost(&**unlocked.provider, "Decrypt");
    match unlocked.provider.unwrap(&unlocked.key.key, &wrapped, &wrong).err().map(|error| (error.kind, error)) {
        None => findings.fail(
            CHECK,
            Exit::KeyRefused as u8,
            format!("the provider unwraps in a wrong context too: keys are not bound to their volume ({calls})"),
            Some("use a KMS that enforces encryption contexts; check what answers in its place (endpoint, proxy)"),
        ),
        Some((ProviderErrorKind::Tampered, _)) => {
            findings.ok(CHECK, format!("a wrong one is refused: keys are bound to their volume ({calls})"));
        }
        Some((ProviderErrorKind::Denied, _)) => {
            findings.ok(CHECK, format!("a wrong one is refused by a policy, so the KMS was not asked ({calls})"));
        }
        Some((_, error)) => findings.warn(CHECK, format!("not known: {error}"), "try again"),
    }
}

/// A failure of a provider; its text says already what to do, but for the clock.
pub(super) fn failed(check: &'static str, error: &ProviderError, findings: &mut Findings) {
    let clock = CLOCK_SIGNS.iter().any(|sign| error.message.contains(sign));
    findings.fail(check, CliError::from(error.clone()).code(), error, clock.then_some(CLOCK_ADVICE));
}

pub(super) fn cost(provider: &dyn Provider, operation: &str) -> String {
    if provider.is_remote() { format!("1 call of {operation}") } else { "no call".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::providers::scripted::{Answer, ScriptedProvider};

    fn key() -> WrappingKey {
        WrappingKey { provider: "local".into(), key: "k".into(), location: None }
    }

    /// The answer of `is_usable`, and the grades of what it finds.
    fn usable(answer: Answer) -> (bool, String) {
        let provider = ScriptedProvider::new("k", true);
        provider.then(answer);
        let mut findings = Findings::default();
        let usable = is_usable(&provider, &key(), "reached", &mut findings);
        (usable, format!("{findings:?}"))
    }

    #[test]
    fn a_description_that_is_denied_stops_nothing() {
        assert!(usable(Answer::Right).0);
        for (kind, expected) in [
            (ProviderErrorKind::Denied, true),
            (ProviderErrorKind::Throttled, true),
            (ProviderErrorKind::Unavailable, false),
            (ProviderErrorKind::Credentials, false),
            (ProviderErrorKind::KeyNotFound, false),
        ] {
            let (usable, findings) = usable(Answer::Fail(kind));
            assert_eq!((usable, !findings.contains("Fail")), (expected, expected), "{findings}");
        }
    }

    #[test]
    fn bad_signatures_make_one_think_of_the_clock() {
        let hint = |message: &str| {
            let mut findings = Findings::default();
            failed("provider", &ProviderError::new(ProviderErrorKind::Credentials, message), &mut findings);
            format!("{findings:?}").contains("set the clock")
        };
        assert!(hint("KMS Decrypt: InvalidSignatureException: Signature expired"));
        assert!(!hint("KMS Decrypt: no credentials"));
    }
}
