//! The AWS KMS provider against a moto server, and against servers that stall, lie or refuse.
//!
//! Each test runs in a process of its own, because the SDK takes credentials from the environment, and a test program
//! cannot change its own safely.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::fake_kms::{self, FakeKms};
use crate::support::isolated::isolated_in;
use crate::support::moto::{self, Moto};
use kmsfs::crypto::DataKey;
use kmsfs::keys::providers::{AwsSettings, ProviderSettings, open};
use kmsfs::keys::{
    EncryptionContext, KeyUse, KeyUses, Operation, Provider, ProviderError, ProviderErrorKind, ProviderKind, Trail,
    WrappedKey,
};

const ARN: &str = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
const OPERATION_TIMEOUT: Duration = Duration::from_secs(3);

fn isolated(name: &str, body: impl FnOnce()) {
    isolated_in(&moto::environment(), &format!("aws_kms::{name}"), body);
}

/// For servers that may be slow on a busy machine.
fn provider(key: &str, endpoint: String) -> Arc<dyn Provider> {
    provider_with(key, endpoint, Duration::from_secs(20), Duration::from_secs(30))
}

/// For servers that keep it waiting.
fn impatient(key: &str, endpoint: String) -> Arc<dyn Provider> {
    provider_with(key, endpoint, Duration::from_secs(1), OPERATION_TIMEOUT)
}

fn provider_with(
    key: &str,
    endpoint: String,
    attempt_timeout: Duration,
    operation_timeout: Duration,
) -> Arc<dyn Provider> {
    let aws = AwsSettings { endpoint: Some(endpoint), attempt_timeout, operation_timeout, ..AwsSettings::default() };
    open(ProviderKind::AwsKms, key, None, &ProviderSettings { aws, ..ProviderSettings::default() }).unwrap()
}

fn context() -> EncryptionContext {
    EncryptionContext::data_key(&[1; 16], &[2; 16])
}

fn generate_error(provider: &dyn Provider) -> ProviderError {
    provider.generate_data_key(&context()).err().expect("an error")
}

fn unwrap_error(provider: &dyn Provider, key: &str) -> ProviderError {
    provider.unwrap(key, &[1; 167], &context()).err().expect("an error")
}

/// Of every operation that makes a wrapped key, or takes one.
fn all_errors(provider: &dyn Provider) -> [(&'static str, ProviderError); 5] {
    let error = |answer: Result<WrappedKey, ProviderError>| answer.expect_err("an error");
    [
        ("GenerateDataKey", generate_error(provider)),
        ("Decrypt", unwrap_error(provider, ARN)),
        ("GenerateDataKeyWithoutPlaintext", error(provider.generate_wrapped_key(&context()))),
        ("Encrypt", error(provider.wrap(ARN, &DataKey::random(), &context()))),
        ("ReEncrypt", error(provider.rewrap(ARN, &[1; 167], ARN, &context()))),
    ]
}

/// An error as KMS sends it.
fn failure(status: u16, code: &str) -> fake_kms::Answer {
    (status, format!(r#"{{"__type":"{code}","message":"the service's words"}}"#))
}

fn stalled() -> fake_kms::Answer {
    (fake_kms::STALL, String::new())
}

/// 32 bytes, in an answer to every operation.
fn success(key_id: &str) -> fake_kms::Answer {
    let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    (200, format!(r#"{{"Plaintext":"{key}","KeyId":"{key_id}","SourceKeyId":"{key_id}","CiphertextBlob":"AQIDBA=="}}"#))
}

#[test]
fn what_is_generated_unwraps_in_its_context_only() {
    isolated("what_is_generated_unwraps_in_its_context_only", || {
        let moto = Moto::start();
        let key = moto.create_key();
        let provider = provider(&key.arn, moto.endpoint());
        assert!(provider.is_remote() && provider.kind() == ProviderKind::AwsKms);
        let (data_key, wrapped) = provider.generate_data_key(&context()).unwrap();
        assert_eq!(wrapped.key_id, key.arn);
        let again = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &context()).unwrap();
        assert_eq!(again.expose(), data_key.expose());

        let other = EncryptionContext::data_key(&[1; 16], &[3; 16]);
        let error = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &other).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Tampered, "{error}");
        for expected in ["Decrypt", &key.arn, "InvalidCiphertextException", "belongs to another volume"] {
            assert!(error.message.contains(expected), "{error}");
        }
        let mut changed = wrapped.bytes.clone();
        *changed.last_mut().unwrap() ^= 1;
        let error = provider.unwrap(&wrapped.key_id, &changed, &context()).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Tampered, "{error}");
    });
}

#[test]
fn a_key_goes_by_its_id_its_alias_and_its_arn() {
    isolated("a_key_goes_by_its_id_its_alias_and_its_arn", || {
        let moto = Moto::start();
        let key = moto.create_key();
        moto.create_alias("alias/kmsfs-test", &key);
        let alias_arn = key.arn.replace(&format!("key/{}", key.id), "alias/kmsfs-test");
        for name in [&key.id, &key.arn, "alias/kmsfs-test", &alias_arn] {
            let provider = provider(name, moto.endpoint());
            let (data_key, wrapped) = provider.generate_data_key(&context()).unwrap();
            assert_eq!(wrapped.key_id, key.arn, "{name}");
            for name in [&key.arn, name] {
                let again = provider.unwrap(name, &wrapped.bytes, &context()).unwrap();
                assert_eq!(again.expose(), data_key.expose(), "{name}");
            }
        }
    });
}

/// What is recorded of calls.
#[derive(Default)]
struct Kept(Mutex<Vec<KeyUse>>);

impl KeyUses for Kept {
    fn check(&self) -> Result<(), ProviderError> {
        Ok(())
    }

    fn note(&self, key_use: KeyUse) -> Result<(), ProviderError> {
        self.0.lock().unwrap().push(key_use);
        Ok(())
    }
}

#[test]
fn many_data_keys_at_once_have_each_their_own_context_and_request() {
    isolated("many_data_keys_at_once_have_each_their_own_context_and_request", || {
        let moto = Moto::start();
        let kept = Arc::new(Kept::default());
        let aws = AwsSettings { endpoint: Some(moto.endpoint()), ..AwsSettings::default() };
        let settings = ProviderSettings { aws, trail: Some(Trail(kept.clone())), ..ProviderSettings::default() };
        let provider = open(ProviderKind::AwsKms, &moto.create_key().arn, None, &settings).unwrap();
        assert!(provider.makes_many_at_once());
        let contexts: Vec<_> = (0..32).map(|n| EncryptionContext::data_key(&[1; 16], &[n; 16])).collect();
        let mut made: Vec<_> = contexts.iter().map(|_| None).collect();
        for _ in 0..2 {
            provider.generate_data_keys(&contexts, &mut |place, answer| made[place] = Some(answer.unwrap()));
        }
        for (place, context) in contexts.iter().enumerate() {
            let (data_key, wrapped) = made[place].as_ref().unwrap();
            let again = provider.unwrap(&wrapped.key_id, &wrapped.bytes, context).unwrap();
            assert_eq!(again.expose(), data_key.expose());
            let other = &contexts[(place + 1) % contexts.len()];
            assert!(provider.unwrap(&wrapped.key_id, &wrapped.bytes, other).is_err());
        }
        let kept = kept.0.lock().unwrap();
        let made: Vec<_> = kept.iter().filter(|key_use| key_use.operation == Operation::Generate).collect();
        let ids: BTreeSet<_> = made.iter().filter_map(|key_use| key_use.request_id.clone()).collect();
        let data_keys: BTreeSet<_> = made.iter().filter_map(|key_use| key_use.data_key.clone()).collect();
        assert_eq!((made.len(), ids.len(), data_keys.len()), (64, 64, 32));
    });
}

#[test]
fn calls_come_from_many_threads() {
    isolated("calls_come_from_many_threads", || {
        let moto = Moto::start();
        let provider = provider(&moto.create_key().arn, moto.endpoint());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let (data_key, wrapped) = provider.generate_data_key(&context()).unwrap();
                    let again = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &context()).unwrap();
                    assert_eq!(again.expose(), data_key.expose());
                });
            }
        });
    });
}

#[test]
fn an_unknown_key_is_not_found() {
    isolated("an_unknown_key_is_not_found", || {
        let moto = Moto::start();
        for name in [ARN, "alias/nothing", "1234abcd-12ab-34cd-56ef-1234567890ab"] {
            let error = generate_error(&*provider(name, moto.endpoint()));
            assert_eq!(error.kind, ProviderErrorKind::KeyNotFound, "{error}");
        }
    });
}

#[test]
fn a_server_that_is_down_is_unavailable_in_time() {
    isolated("a_server_that_is_down_is_unavailable_in_time", || {
        let moto = Moto::start();
        let key = moto.create_key();
        let provider = impatient(&key.arn, moto.endpoint());
        drop(moto);
        for endpoint in [None, Some(fake_kms::refused())] {
            let started = Instant::now();
            let provider = endpoint.map_or_else(|| Arc::clone(&provider), |endpoint| impatient(&key.arn, endpoint));
            let error = generate_error(&*provider);
            assert_eq!(error.kind, ProviderErrorKind::Unavailable, "{error}");
            assert!(started.elapsed() < OPERATION_TIMEOUT + Duration::from_secs(1), "{:?}", started.elapsed());
        }
    });
}

#[test]
fn a_stalled_server_is_unavailable_in_time() {
    isolated("a_stalled_server_is_unavailable_in_time", || {
        let provider = impatient(ARN, FakeKms::start(vec![stalled()]).endpoint());
        let started = Instant::now();
        let error = unwrap_error(&*provider, ARN);
        assert_eq!(error.kind, ProviderErrorKind::Unavailable, "{error}");
        assert!(started.elapsed() < OPERATION_TIMEOUT + Duration::from_secs(1), "{:?}", started.elapsed());
    });
}

/// An answer may hold a key in clear, and who has hung up wants none.
#[test]
fn hanging_up_ends_a_call_before_its_answer() {
    isolated("hanging_up_ends_a_call_before_its_answer", || {
        let server = FakeKms::start(vec![stalled()]);
        let provider = provider(ARN, server.endpoint());
        std::thread::scope(|scope| {
            let (began, waiting) = (Instant::now(), scope.spawn(|| generate_error(provider.as_ref())));
            while server.requests() == 0 {
                assert!(began.elapsed() < Duration::from_secs(20));
                std::thread::yield_now();
            }
            let hung_up = Instant::now();
            provider.hang_up();
            assert_eq!(waiting.join().unwrap().kind, ProviderErrorKind::Unavailable);
            assert!(hung_up.elapsed() < Duration::from_secs(10), "an attempt takes twice as long");
        });
        assert_eq!(server.requests(), 1, "and it is not tried again");
    });
}

#[test]
fn success_without_the_right_content_is_a_bad_answer() {
    isolated("success_without_the_right_content_is_a_bad_answer", || {
        let with = |from: &str, to: &str| success(ARN).1.replace(from, to);
        let short = with("HB0eHw==", "HB0e").replace("GBkaGxwdHh8=", "GBkaGxwdHg==");
        let other_key = with("1234abcd", "00000000");
        for body in
            ["{}".to_owned(), with("Plaintext", "Other"), short, with("KeyId", "Other"), other_key, "<html>".into()]
        {
            let provider = provider(ARN, FakeKms::start(vec![(200, body.clone())]).endpoint());
            for error in [generate_error(&*provider), unwrap_error(&*provider, ARN)] {
                assert_eq!(error.kind, ProviderErrorKind::BadAnswer, "{body}: {error}");
                assert!(!error.message.contains("AAEC") && !error.message.contains("000102"), "{error}");
            }
        }
        let large = "A".repeat(8196);
        for body in [with("CiphertextBlob", "Other"), with("AQIDBA==", ""), with("AQIDBA==", &large)] {
            let provider = provider(ARN, FakeKms::start(vec![(200, body)]).endpoint());
            assert_eq!(generate_error(&*provider).kind, ProviderErrorKind::BadAnswer);
            assert!(provider.unwrap(ARN, &[1; 167], &context()).is_ok());
            for error in [
                provider.generate_wrapped_key(&context()).unwrap_err(),
                provider.wrap(ARN, &DataKey::random(), &context()).unwrap_err(),
                provider.rewrap(ARN, &[1; 167], ARN, &context()).unwrap_err(),
            ] {
                assert_eq!(error.kind, ProviderErrorKind::BadAnswer, "{error}");
            }
        }
    });
}

/// Each operation by itself answers for the keys that it was given, and needs no plaintext that KMS does not send.
#[test]
fn every_operation_checks_the_keys_that_were_used() {
    isolated("every_operation_checks_the_keys_that_were_used", || {
        let other = ARN.replace("1234abcd", "00000000");
        let answered = |used: &str, source: &str| {
            let body = format!(r#"{{"KeyId":"{used}","SourceKeyId":"{source}","CiphertextBlob":"AQIDBA=="}}"#);
            FakeKms::start(vec![(200, body)])
        };
        for (used, source, wrapping, rewrapping) in [
            (ARN, ARN, None, Some(ProviderErrorKind::BadAnswer)),
            (ARN, &other, None, None),
            (&other, &other, Some(ProviderErrorKind::BadAnswer), Some(ProviderErrorKind::BadAnswer)),
            ("", "", Some(ProviderErrorKind::BadAnswer), Some(ProviderErrorKind::BadAnswer)),
        ] {
            let fake = answered(used, source);
            let provider = provider(ARN, fake.endpoint());
            let kind = |answer: Result<WrappedKey, ProviderError>| answer.err().map(|error| error.kind);
            assert_eq!(kind(provider.generate_wrapped_key(&context())), wrapping, "{used}");
            assert_eq!(kind(provider.wrap(ARN, &DataKey::random(), &context())), wrapping, "{used}");
            assert_eq!(kind(provider.rewrap(&other, &[1; 167], ARN, &context())), rewrapping, "{used} {source}");
        }
    });
}

#[test]
fn every_error_code_has_its_kind() {
    use ProviderErrorKind::{
        BadAnswer, Credentials, Denied, KeyNotFound, KeyUnusable, Misconfigured, Tampered, Throttled, Unavailable,
    };
    isolated("every_error_code_has_its_kind", || {
        for (status, code, kind) in [
            (400, "AccessDeniedException", Denied),
            (403, "AccessDenied", Denied),
            (400, "DisabledException", KeyUnusable),
            (400, "KMSInvalidStateException", KeyUnusable),
            (500, "KeyUnavailableException", KeyUnusable),
            (400, "InvalidKeyUsageException", KeyUnusable),
            (400, "NotFoundException", KeyNotFound),
            (400, "IncorrectKeyException", KeyNotFound),
            (400, "InvalidCiphertextException", Tampered),
            (400, "ExpiredTokenException", Credentials),
            (400, "UnrecognizedClientException", Credentials),
            (400, "InvalidSignatureException", Credentials),
            (400, "ThrottlingException", Throttled),
            (400, "LimitExceededException", Throttled),
            (500, "KMSInternalException", Unavailable),
            (503, "DependencyTimeoutException", Unavailable),
            (400, "ValidationException", Misconfigured),
            (400, "InvalidGrantTokenException", BadAnswer),
        ] {
            let provider = provider(ARN, FakeKms::start(vec![failure(status, code)]).endpoint());
            for (operation, error) in all_errors(&*provider) {
                assert_eq!(error.kind, kind, "{code}: {error}");
                for expected in [operation, ARN, code, "the service's words", "request-1"] {
                    assert!(error.message.contains(expected), "{expected}: {error}");
                }
            }
        }
    });
}

#[test]
fn a_passing_failure_is_tried_again() {
    isolated("a_passing_failure_is_tried_again", || {
        for passing in [
            failure(500, "KMSInternalException"),
            failure(400, "ThrottlingException"),
            (502, "<html>".to_owned()),
            stalled(),
        ] {
            let fake = FakeKms::start(vec![passing, success(ARN)]);
            assert!(impatient(ARN, fake.endpoint()).unwrap(ARN, &[1; 167], &context()).is_ok());
            assert!(fake.requests() >= 2);
        }
    });
}

#[test]
fn expired_credentials_are_looked_up_once_more() {
    isolated("expired_credentials_are_looked_up_once_more", || {
        let fake = FakeKms::start(vec![failure(400, "ExpiredTokenException"), success(ARN)]);
        assert!(provider(ARN, fake.endpoint()).unwrap(ARN, &[1; 167], &context()).is_ok());
        assert_eq!(fake.requests(), 2);
        let fake = FakeKms::start(vec![failure(400, "ExpiredTokenException")]);
        assert_eq!(unwrap_error(&*provider(ARN, fake.endpoint()), ARN).kind, ProviderErrorKind::Credentials);
        assert_eq!(fake.requests(), 2);
    });
}

#[test]
fn impossible_wrapped_keys_are_not_sent() {
    isolated("impossible_wrapped_keys_are_not_sent", || {
        let fake = FakeKms::start(vec![success(ARN)]);
        let provider = provider(ARN, fake.endpoint());
        for length in [0, 6145] {
            let error = provider.unwrap(ARN, &vec![1; length], &context()).err().unwrap();
            assert_eq!(error.kind, ProviderErrorKind::Tampered);
            let error = provider.rewrap(ARN, &vec![1; length], ARN, &context()).err().unwrap();
            assert_eq!(error.kind, ProviderErrorKind::Tampered);
        }
        assert!(provider.unwrap(ARN, &[1; 6144], &context()).is_ok());
        assert_eq!(fake.requests(), 1);
    });
}

#[test]
fn missing_credentials_are_named() {
    let environment: Vec<_> = moto::environment().into_iter().filter(|(name, _)| !name.contains("KEY")).collect();
    isolated_in(&environment, "aws_kms::missing_credentials_are_named", || {
        let fake = FakeKms::start(vec![success(ARN)]);
        let error = unwrap_error(&*provider(ARN, fake.endpoint()), ARN);
        assert_eq!(error.kind, ProviderErrorKind::Credentials, "{error}");
        assert!(error.message.contains("AWS_PROFILE"), "{error}");
        assert_eq!(fake.requests(), 0);
    });
}

#[test]
fn a_missing_region_is_named_and_an_arn_has_one() {
    let environment: Vec<_> = moto::environment().into_iter().filter(|(name, _)| *name != "AWS_REGION").collect();
    isolated_in(&environment, "aws_kms::a_missing_region_is_named_and_an_arn_has_one", || {
        let fake = FakeKms::start(vec![success(ARN)]);
        let error = generate_error(&*provider("alias/a", fake.endpoint()));
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured, "{error}");
        assert!(error.message.contains("AWS_REGION"), "{error}");
        assert!(provider(ARN, fake.endpoint()).generate_data_key(&context()).is_ok());
    });
}

#[test]
fn the_environment_names_the_endpoint_and_excludes_fips() {
    let fake = FakeKms::start(vec![success(ARN)]);
    let endpoint = fake.endpoint();
    let environment = [moto::environment().as_slice(), &[("AWS_ENDPOINT_URL_KMS", endpoint.as_str())]].concat();
    isolated_in(&environment, "aws_kms::the_environment_names_the_endpoint_and_excludes_fips", || {
        let settings = ProviderSettings::default();
        let provider = open(ProviderKind::AwsKms, ARN, None, &settings).unwrap();
        assert!(provider.generate_data_key(&context()).is_ok());
        let aws = AwsSettings { fips: true, ..AwsSettings::default() };
        let error = open(ProviderKind::AwsKms, ARN, None, &ProviderSettings { aws, ..settings }).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
        assert!(error.message.contains("AWS_ENDPOINT_URL_KMS"), "{error}");
    });
}
