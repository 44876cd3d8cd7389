//! The part of `kmsfs doctor` that asks the providers: each wrapping key, and what the caller may do with it.

use std::path::Path;
use std::sync::Arc;

use crate::cli::error::{CliError, Exit};
use crate::cli::pins::{self, Pin};
use crate::crypto::random_array;
use crate::format::config::{SealedConfig, WrappingKey};
use crate::format::{hex, name};
use crate::keys::providers::{self, ProviderSettings};
use crate::keys::{
    EncryptionContext, KeyError, KeyLimits, KeyState, Provider, ProviderError, ProviderErrorKind, ProviderKind, Volume,
    volume,
};

use crate::storage::KeyStock;

use super::doctor::Findings;

/// What an error says when the host's clock may be wrong.
const CLOCK_SIGNS: [&str; 5] =
    ["Signature", "RequestExpired", "RequestTimeTooSkewed", "not yet current", "ExpiredToken"];
const CLOCK_ADVICE: &str = "if the credentials are right, set the clock (compare `date -u`; `timedatectl set-ntp true`): \
     AWS refuses requests whose time is more than 5 minutes off";

/// The volume that is examined.
pub(super) struct Subject<'a> {
    /// Its canonical path.
    pub(super) directory: &'a Path,
    /// Its provisioned keys, if their directory can be had.
    pub(super) stock: Option<&'a KeyStock>,
    pub(super) sealed: &'a SealedConfig,
    /// What is remembered of it.
    pub(super) pin: Option<&'a Pin>,
    pub(super) providers: &'a ProviderSettings,
    pub(super) read_only: bool,
}

/// A key that unlocks the volume.
struct Unlocked {
    provider: Arc<dyn Provider>,
    key: WrappingKey,
    volume: Volume,
}

/// Examines every key of the volume. One that unlocks it makes the failures of others warnings.
pub(super) fn check(subject: &Subject<'_>, findings: &mut Findings) {
    let mut keys: Vec<&WrappingKey> = subject.sealed.config.wrapping_keys.iter().collect();
    // In the order in which a mount tries them.
    keys.sort_by_key(|key| ProviderKind::from_name(&key.provider).map(ProviderKind::rank_to_unlock));
    let mut examined: Vec<_> = keys.into_iter().map(|key| check_key(subject, key)).collect();
    let unlocking = examined.iter().position(|(_, unlocked)| unlocked.is_some());
    for (number, (key_findings, _)) in examined.iter_mut().enumerate() {
        if unlocking.is_some_and(|first| first != number) {
            key_findings.soften();
        }
        findings.append(std::mem::take(key_findings));
    }
    let Some(unlocked) = unlocking.and_then(|first| examined.swap_remove(first).1) else { return };
    check_fingerprint(subject, &unlocked.volume, findings);
    check_context(subject, &unlocked, findings);
    if !subject.read_only {
        check_creating(subject, &unlocked, findings);
    }
}

fn check_key(subject: &Subject<'_>, key: &WrappingKey) -> (Findings, Option<Unlocked>) {
    let mut findings = Findings::default();
    let unlocked = connect(subject, key, &mut findings).and_then(|provider| {
        if is_usable(&*provider, key, &mut findings) { unlock(subject, key, provider, &mut findings) } else { None }
    });
    (findings, unlocked)
}

fn connect(subject: &Subject<'_>, key: &WrappingKey, findings: &mut Findings) -> Option<Arc<dyn Provider>> {
    let Some(kind) = ProviderKind::from_name(&key.provider) else {
        let what = format!("{}: this program does not know the provider", name_of(key));
        findings.fail("provider", Exit::KeyRefused as u8, what, Some("use a newer kmsfs"));
        return None;
    };
    let location = key.location.as_deref().map(Path::new);
    match providers::open(kind, &key.key, location, subject.providers) {
        Ok(provider) => Some(provider),
        Err(error) => {
            failed("provider", &error, findings);
            None
        }
    }
}

/// Whether it is worth to try the key. Its description is the first call, so it also tells of credentials and Region.
fn is_usable(provider: &dyn Provider, key: &WrappingKey, findings: &mut Findings) -> bool {
    let reached = if provider.is_remote() { "answers, and knows the credentials" } else { "its keyring opens" };
    let reached = format!("{}: {reached}", provider.kind());
    match provider.describe(&key.key) {
        Ok(description) => {
            findings.ok("provider", reached);
            let what = format!("{}: {description}", name_of(key));
            match (&description.state, description.state.advice()) {
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

/// Unwraps the volume key under this key alone, and checks the config's seal with it: one call.
fn unlock(
    subject: &Subject<'_>,
    key: &WrappingKey,
    provider: Arc<dyn Provider>,
    findings: &mut Findings,
) -> Option<Unlocked> {
    let mut sealed = subject.sealed.clone();
    sealed.config.volume_keys.retain(|record| record.provider == key.provider && record.key == key.key);
    if sealed.config.volume_keys.is_empty() {
        findings.warn("unwrap", format!("{} wraps files, but not the volume key", name_of(key)), "another key must");
        return None;
    }
    let works = format!("{} unwraps the volume key ({})", name_of(key), cost(&*provider, "Decrypt"));
    match volume::unlock(&sealed, Arc::clone(&provider), KeyLimits::default()) {
        Ok(volume) => {
            findings.ok("unwrap", works);
            findings.ok("seal", "the config is as it was sealed");
            Some(Unlocked { provider, key: key.clone(), volume })
        }
        Err(error @ KeyError::BrokenSeal) => {
            findings.ok("unwrap", works);
            findings.fail("seal", CliError::from(error.clone()).code(), error, None);
            None
        }
        Err(KeyError::Provider(error)) => {
            failed("unwrap", &error, findings);
            None
        }
        Err(error) => {
            findings.fail("unwrap", CliError::from(error.clone()).code(), error, None);
            None
        }
    }
}

fn check_fingerprint(subject: &Subject<'_>, volume: &Volume, findings: &mut Findings) {
    let Some(pin) = subject.pin else { return };
    let found = hex::encode(&volume.fingerprint);
    if let Err(error) = pins::check_remembered("key fingerprint", subject.directory, &pin.fingerprint, &found) {
        let mend = "if you replaced the volume yourself: `kmsfs forget CIPHERDIR`";
        findings.fail("remembered", error.code(), &error, Some(mend));
    }
}

/// The volume key must not unwrap in the context of a data key. That one has the right volume, so no policy is in the way.
fn check_context(subject: &Subject<'_>, unlocked: &Unlocked, findings: &mut Findings) {
    const CHECK: &str = "context";
    let records = &subject.sealed.config.volume_keys;
    let record = records.iter().find(|r| r.provider == unlocked.key.provider && r.key == unlocked.key.key);
    let Some(wrapped) = record.and_then(|record| name::decode(record.wrapped.as_bytes())) else { return };
    let wrong = EncryptionContext::data_key(&unlocked.volume.id, &random_array());
    let calls = cost(&*unlocked.provider, "Decrypt");
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

/// A new data key, as for a file; it is dropped.
fn check_creating(subject: &Subject<'_>, unlocked: &Unlocked, findings: &mut Findings) {
    const CHECK: &str = "create";
    let context = EncryptionContext::data_key(&unlocked.volume.id, &random_array());
    match unlocked.provider.generate_data_key(&context).map(|(_, wrapped)| wrapped.key_id) {
        Ok(key_id) if subject.sealed.config.wrapping_keys.iter().any(|key| key.key == key_id) => {
            let calls = cost(&*unlocked.provider, "GenerateDataKey");
            findings.ok(CHECK, format!("{} makes data keys for new files ({calls})", name_of(&unlocked.key)));
        }
        Ok(key_id) => {
            let what = format!("new data keys would be under {key_id}, which is not a key of this volume");
            findings.fail(CHECK, Exit::KeyRefused as u8, what, None);
        }
        Err(error) if error.kind == ProviderErrorKind::Denied => {
            denied_to_create(subject, unlocked, &error, findings);
        }
        Err(error) => failed(CHECK, &error, findings),
    }
}

/// Without the right to make data keys, files can be created for as long as provisioned ones last.
fn denied_to_create(subject: &Subject<'_>, unlocked: &Unlocked, error: &ProviderError, findings: &mut Findings) {
    const CHECK: &str = "create";
    let ring = &unlocked.volume.ring;
    let is_good =
        |stock: &KeyStock, name: &str| stock.read(name).is_some_and(|bytes| ring.is_provisioned(name, &bytes));
    let good = subject.stock.and_then(|stock| {
        let names = stock.names().ok()?;
        Some(names.iter().filter(|name| is_good(stock, name)).count())
    });
    match good {
        Some(good @ 1..) => findings.warn(
            CHECK,
            format!("data keys are not made for this host; {good} provisioned ones are in stock: {error}"),
            "fill the stock before it is used up: `kmsfs keys provision`, on a host that may",
        ),
        _ => {
            let mend = "if this host is only to read: `kmsfs doctor --read-only`; if it is to create files with \
                        kms:Decrypt alone: `kmsfs keys provision`, on a host that may";
            findings.fail(CHECK, CliError::from(error.clone()).code(), error, Some(mend));
        }
    }
}

/// A failure of a provider; its text says already what to do, but for the clock.
fn failed(check: &'static str, error: &ProviderError, findings: &mut Findings) {
    let clock = CLOCK_SIGNS.iter().any(|sign| error.message.contains(sign));
    findings.fail(check, CliError::from(error.clone()).code(), error, clock.then_some(CLOCK_ADVICE));
}

fn name_of(key: &WrappingKey) -> String {
    format!("{}:{}", key.provider, key.key)
}

fn cost(provider: &dyn Provider, operation: &str) -> String {
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
        let usable = is_usable(&provider, &key(), &mut findings);
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
