//! The part of `kmsfs doctor` that makes a data key, as a mount does for a new file: the first recipient that makes one, and
//! the records of all the others. The key is dropped.

use crate::cli::error::{CliError, Exit};
use crate::cli::listed_key::name_of;
use crate::crypto::{DataKey, random_array};
use crate::format::config::WrappingKey;
use crate::keys::{EncryptionContext, Provider, ProviderError, ProviderErrorKind, Volume, WrappedKey, volume};
use crate::storage::KeyStock;

use super::doctor::Findings;
use super::doctor_keys::{Examined, Subject, cost, failed};

const CHECK: &str = "create";

/// A recipient, and the data key that it made or why it made none.
type Made<'a> = Result<(DataKey, WrappedKey), (&'a WrappingKey, ProviderError)>;

/// Makes one and drops it.
pub(super) fn check(subject: &Subject<'_>, examined: &[Examined<'_>], volume: &Volume, findings: &mut Findings) {
    let context = EncryptionContext::data_key(&volume.id, &random_array());
    let config = &subject.sealed.config;
    let listed = config.wrapping_keys.iter().filter(|key| volume::wraps_new(config, key));
    let recipients: Vec<_> =
        listed.filter_map(|key| examined.iter().find(|examined| std::ptr::eq(examined.key, key))).collect();
    let mut failures = Vec::new();
    for (number, recipient) in recipients.iter().enumerate() {
        let made = generate(recipient, &context);
        match made {
            Err(failure) => failures.push(failure),
            Ok((data_key, wrapped)) => {
                if !config.wrapping_keys.iter().any(|key| key.key == wrapped.key_id) {
                    let id = wrapped.key_id;
                    let what = format!("new data keys would be under {id}, which is not a key of this volume");
                    return findings.fail(CHECK, Exit::KeyRefused as u8, what, None);
                }
                tell_maker(recipient, &failures, findings);
                let others =
                    recipients.iter().enumerate().filter(|(other, _)| *other != number).map(|(_, other)| *other);
                others.for_each(|other| add_record(subject, other, &data_key, &context, &failures, findings));
                return;
            }
        }
    }
    match failures.into_iter().next() {
        Some((_, error)) if error.kind == ProviderErrorKind::Denied => denied(subject, volume, &error, findings),
        Some((_, error)) => failed(CHECK, &error, findings),
        None => findings.fail(CHECK, Exit::KeyRefused as u8, "no recipient makes data keys", None),
    }
}

fn generate<'a>(recipient: &Examined<'a>, context: &EncryptionContext) -> Made<'a> {
    let absent = |why: &str| ProviderError::new(ProviderErrorKind::Unavailable, why);
    let made = recipient.provider().map_err(absent).and_then(|provider| provider.generate_data_key(context));
    made.map_err(|error| (recipient.key, error))
}

fn tell_maker(maker: &Examined<'_>, failures: &[(&WrappingKey, ProviderError)], findings: &mut Findings) {
    let name = name_of(maker.key);
    for (key, error) in failures.iter().filter(|(_, error)| !is_silence(error)) {
        let what = format!("{} makes no data keys for new files, {name} does instead: {error}", name_of(key));
        findings.warn(CHECK, what, "allow it, unless the other key is meant to make them");
    }
    let calls = maker.provider().map(|provider| cost(provider, "GenerateDataKey")).unwrap_or_default();
    findings.ok(CHECK, format!("{name} makes data keys for new files ({calls})"));
}

/// Whether a mount asks the provider for nothing else for a while.
fn is_silence(error: &ProviderError) -> bool {
    matches!(error.kind, ProviderErrorKind::Unavailable | ProviderErrorKind::Credentials)
}

/// A provider that did not answer a moment ago is not asked again.
fn add_record(
    subject: &Subject<'_>,
    other: &Examined<'_>,
    data_key: &DataKey,
    context: &EncryptionContext,
    failures: &[(&WrappingKey, ProviderError)],
    findings: &mut Findings,
) {
    let before = failures.iter().find(|(key, error)| *key == other.key && is_silence(error));
    let name = name_of(other.key);
    let made = match (before, other.provider()) {
        (Some((_, error)), _) => Err(error.to_string()),
        (None, Err(why)) => Err(why.to_owned()),
        (None, Ok(provider)) => wrap(provider, other.key, data_key, context),
    };
    match made {
        Ok(calls) => findings.ok(CHECK, format!("{name} gets a record of each ({calls})")),
        Err(why) => {
            let mend = format!("then `kmsfs rewrap {}` adds what is missing", subject.directory.path().display());
            findings.warn(CHECK, format!("new files cannot be opened with {name}: {why}"), &mend);
        }
    }
}

fn wrap(
    provider: &dyn Provider,
    key: &WrappingKey,
    data_key: &DataKey,
    context: &EncryptionContext,
) -> Result<String, String> {
    provider.wrap(&key.key, data_key, context).map_err(|error| error.to_string())?;
    Ok(cost(provider, "Encrypt"))
}

/// Without the right to make data keys, files can be created for as long as provisioned ones last.
fn denied(subject: &Subject<'_>, volume: &Volume, error: &ProviderError, findings: &mut Findings) {
    let is_good =
        |stock: &KeyStock, name: &str| stock.read(name).is_some_and(|bytes| volume.ring.is_provisioned(name, &bytes));
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
