//! What AWS KMS says of a key: DescribeKey, and GetKeyRotationStatus where the caller may ask for that.

use aws_sdk_kms::error::SdkError;
use aws_sdk_kms::operation::describe_key::{DescribeKeyError, DescribeKeyOutput};
use aws_sdk_kms::operation::get_key_rotation_status::{GetKeyRotationStatusError, GetKeyRotationStatusOutput};
use aws_sdk_kms::primitives::{DateTime, DateTimeFormat};
use aws_sdk_kms::types::{KeyMetadata, KeyState as AwsKeyState};

use super::super::{KeyDescription, KeyState, ProviderError};
use super::aws_kms::{AwsKmsProvider, Call};

/// Describes `key`. That its rotation is not told, for whatever reason, is no error.
pub(super) fn describe(provider: &AwsKmsProvider, key: &str) -> Result<KeyDescription, ProviderError> {
    let call = Call { operation: "DescribeKey", key };
    let answer = provider.call(&call, async |client| -> Result<DescribeKeyOutput, SdkError<DescribeKeyError>> {
        client.describe_key().key_id(key).send().await
    })?;
    let metadata = answer.key_metadata.ok_or_else(|| call.bad_answer("it describes no key"))?;
    let key_id = call.key_id(metadata.arn.clone())?;
    let rotation = rotation_status(provider, &key_id).ok();
    Ok(description(key_id, &metadata, rotation.as_ref()))
}

fn rotation_status(provider: &AwsKmsProvider, arn: &str) -> Result<GetKeyRotationStatusOutput, ProviderError> {
    let call = Call { operation: "GetKeyRotationStatus", key: arn };
    provider.call(&call, async |client| -> Result<_, SdkError<GetKeyRotationStatusError>> {
        client.get_key_rotation_status().key_id(arn).send().await
    })
}

fn description(
    key_id: String,
    metadata: &KeyMetadata,
    rotation: Option<&GetKeyRotationStatusOutput>,
) -> KeyDescription {
    let words = [metadata.key_usage().map(|usage| usage.as_str()), metadata.key_spec().map(|spec| spec.as_str())];
    let usage = words.into_iter().flatten().collect::<Vec<_>>().join(" with ");
    KeyDescription {
        key_id,
        state: state(metadata),
        rotation: rotation.map(rotation_text),
        origin: metadata.origin().map(|origin| origin.as_str().to_owned()),
        multi_region: metadata.multi_region().unwrap_or(false),
        usage: if usage.is_empty() { "an unknown use".to_owned() } else { usage },
    }
}

fn state(metadata: &KeyMetadata) -> KeyState {
    match metadata.key_state() {
        // A key that is being updated can be used.
        Some(AwsKeyState::Enabled | AwsKeyState::Updating) => KeyState::Enabled,
        Some(AwsKeyState::Disabled) => KeyState::Disabled,
        Some(AwsKeyState::PendingDeletion | AwsKeyState::PendingReplicaDeletion) => {
            KeyState::PendingDeletion(metadata.deletion_date().and_then(date_text))
        }
        Some(AwsKeyState::PendingImport | AwsKeyState::Unavailable) => KeyState::Unavailable,
        Some(other) => KeyState::Unknown(other.as_str().to_owned()),
        None => KeyState::Unknown("no state".to_owned()),
    }
}

fn rotation_text(status: &GetKeyRotationStatusOutput) -> String {
    if !status.key_rotation_enabled() {
        return "off".to_owned();
    }
    let mut text = "on".to_owned();
    if let Some(days) = status.rotation_period_in_days() {
        text.push_str(&format!(" every {days} days"));
    }
    if let Some(next) = status.next_rotation_date().and_then(date_text) {
        text.push_str(&format!(" (next {next})"));
    }
    text
}

fn date_text(date: &DateTime) -> Option<String> {
    date.fmt(DateTimeFormat::DateTime).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_kms::types::{KeySpec, KeyUsageType, OriginType};

    const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/mrk-1";

    fn metadata(state: &str) -> KeyMetadata {
        let metadata = KeyMetadata::builder().key_id("mrk-1").arn(ARN).key_state(state.into()).multi_region(true);
        let metadata = metadata.key_usage(KeyUsageType::EncryptDecrypt).key_spec(KeySpec::SymmetricDefault);
        let metadata = metadata.origin(OriginType::AwsKms).deletion_date(DateTime::from_secs(1_893_456_000));
        metadata.build().unwrap()
    }

    #[test]
    fn every_state_of_kms_is_told() {
        let deletion = || KeyState::PendingDeletion(Some("2030-01-01T00:00:00Z".to_owned()));
        for (text, expected) in [
            ("Enabled", KeyState::Enabled),
            ("Updating", KeyState::Enabled),
            ("Disabled", KeyState::Disabled),
            ("PendingDeletion", deletion()),
            ("PendingReplicaDeletion", deletion()),
            ("PendingImport", KeyState::Unavailable),
            ("Unavailable", KeyState::Unavailable),
            ("Creating", KeyState::Unknown("Creating".to_owned())),
            ("SomethingNew", KeyState::Unknown("SomethingNew".to_owned())),
        ] {
            assert_eq!(state(&metadata(text)), expected, "{text}");
        }
    }

    #[test]
    fn a_description_has_what_kms_tells() {
        let told = description(ARN.to_owned(), &metadata("Enabled"), None);
        assert_eq!((told.rotation, told.multi_region, told.origin.as_deref()), (None, true, Some("AWS_KMS")));
        assert_eq!(told.usage, "ENCRYPT_DECRYPT with SYMMETRIC_DEFAULT");
        let status = |on| GetKeyRotationStatusOutput::builder().key_rotation_enabled(on);
        assert_eq!(rotation_text(&status(false).build()), "off");
        let next = DateTime::from_secs(1_893_456_000);
        let full = status(true).rotation_period_in_days(365).next_rotation_date(next).build();
        assert_eq!(rotation_text(&full), "on every 365 days (next 2030-01-01T00:00:00Z)");
    }
}
