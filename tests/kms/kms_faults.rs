//! The AWS KMS provider when the KMS throttles, stalls, lies or goes away: a real server behind a proxy that breaks
//! calls. For each fault: the kind of the error and what it says, that the deadline holds, how many attempts were made,
//! and that the same provider works again when the fault is over.
//!
//! Each test runs in a process of its own, because the SDK takes credentials from the environment.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::fault_proxy::{Fault, FaultProxy, MESSAGE, REQUEST_ID};
use crate::support::isolated::isolated_in;
use crate::support::kms_server::KmsServer;
use crate::support::moto::{self, Moto};
use kmsfs::crypto::DataKey;
use kmsfs::keys::providers::{AwsSettings, ProviderSettings, open};
use kmsfs::keys::{EncryptionContext, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey};

const GENERATE: &str = "GenerateDataKey";
const DECRYPT: &str = "Decrypt";
const OPERATIONS: [&str; 2] = [GENERATE, DECRYPT];
/// How much later than the operation timeout an answer may be: the provider's grace, and a busy machine.
const SLACK: Duration = Duration::from_secs(1);

/// How long one attempt and the whole operation may take.
#[derive(Clone, Copy)]
struct Timeouts {
    attempt: Duration,
    operation: Duration,
}

/// For faults that answer at once, on a machine that may be busy.
const PATIENT: Timeouts = Timeouts { attempt: Duration::from_secs(8), operation: Duration::from_secs(10) };
/// For faults that keep the caller waiting.
const HURRIED: Timeouts = Timeouts { attempt: Duration::from_secs(1), operation: Duration::from_millis(2500) };

/// A provider, the proxy it talks through, and what was wrapped while all was well.
struct Scene {
    proxy: FaultProxy,
    provider: Arc<dyn Provider>,
    timeouts: Timeouts,
    data_key: DataKey,
    wrapped: WrappedKey,
}

impl Scene {
    fn new(key: &str, server: &str, timeouts: Timeouts) -> Self {
        let proxy = FaultProxy::start(server);
        let aws = AwsSettings {
            endpoint: Some(proxy.endpoint()),
            attempt_timeout: timeouts.attempt,
            operation_timeout: timeouts.operation,
            ..AwsSettings::default()
        };
        let settings = ProviderSettings { aws, ..ProviderSettings::default() };
        let provider = open(ProviderKind::AwsKms, key, None, &settings).unwrap();
        let (data_key, wrapped) = provider.generate_data_key(&context()).unwrap();
        Self { proxy, provider, timeouts, data_key, wrapped }
    }

    /// Calls the provider for `operation`: the key that came, how many attempts were made, how long it took.
    fn call(&self, operation: &str) -> (Result<DataKey, ProviderError>, u64, Duration) {
        let (earlier, started) = (self.proxy.calls(operation), Instant::now());
        let result = match operation {
            GENERATE => self.provider.generate_data_key(&context()).map(|(key, _)| key),
            _ => self.provider.unwrap(&self.wrapped.key_id, &self.wrapped.bytes, &context()),
        };
        (result, self.proxy.calls(operation) - earlier, started.elapsed())
    }

    /// What must be so whatever the fault: an answer in time, and a message that helps and tells no secret.
    fn fails(&self, operation: &str, kind: ProviderErrorKind, attempts: &RangeInclusive<u64>) -> ProviderError {
        let (result, made, took) = self.call(operation);
        let error = result.err().unwrap_or_else(|| panic!("{operation} works"));
        assert_eq!(error.kind, kind, "{operation}: {error}");
        assert!(attempts.contains(&made), "{operation}: {made} attempts, not {attempts:?}: {error}");
        assert!(took < self.timeouts.operation + SLACK, "{operation} took {took:?}: {error}");
        for expected in [operation, &self.wrapped.key_id] {
            assert!(error.message.contains(expected), "{expected}: {error}");
        }
        error
    }

    /// That all is well, at the first attempt.
    fn works(&self, operation: &str) {
        let (result, attempts, _) = self.call(operation);
        let key = result.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(attempts, 1, "{operation}");
        assert!(operation != DECRYPT || key.expose() == self.data_key.expose());
    }
}

fn context() -> EncryptionContext {
    EncryptionContext::data_key(&[1; 16], &[2; 16])
}

fn isolated(name: &str, body: impl FnOnce()) {
    isolated_in(&moto::environment(), &format!("kms_faults::{name}"), body);
}

fn on_own_server(timeouts: Timeouts, body: impl FnOnce(&Scene)) {
    let server = KmsServer::start();
    let key = server.create_key();
    body(&Scene::new(&key.arn, &server.endpoint(), timeouts));
}

/// A fault that lasts: both operations fail, and work again when it is over.
fn lasting(fault: Fault, kind: ProviderErrorKind, attempts: RangeInclusive<u64>, timeouts: Timeouts) {
    on_own_server(timeouts, |scene| {
        for operation in OPERATIONS {
            scene.proxy.inject(operation, .., fault);
            let error = scene.fails(operation, kind, &attempts);
            if let Fault::Exception(_, code) = fault {
                for expected in [code, MESSAGE, REQUEST_ID] {
                    assert!(error.message.contains(expected), "{expected}: {error}");
                }
            }
            scene.proxy.heal();
            scene.works(operation);
        }
    });
}

/// A fault that hits one attempt: the SDK's next one works, and nobody notices.
fn passing(fault: Fault, timeouts: Timeouts) {
    on_own_server(timeouts, |scene| {
        for operation in OPERATIONS {
            scene.proxy.inject(operation, ..=1, fault);
            let (result, attempts, _) = scene.call(operation);
            assert!(result.is_ok(), "{operation}: {}", result.err().unwrap());
            assert_eq!(attempts, 2, "{operation}");
            scene.proxy.heal();
            scene.works(operation);
        }
    });
}

/// One test for each: its name, what happens, the kind of the error, the attempts, the timeouts.
macro_rules! lasting {
    ($($name:ident: $fault:expr => $kind:ident, $attempts:expr, $timeouts:ident;)*) => {$(
        #[test]
        fn $name() {
            isolated(stringify!($name), || lasting($fault, ProviderErrorKind::$kind, $attempts, $timeouts));
        }
    )*};
}

// Tried four times: what may pass. Tried once: what will be the same the next time. Tried twice: what new credentials
// may mend, on a new client each.
lasting! {
    a_stall_ends_by_the_deadline: Fault::Stall => Unavailable, 2..=4, HURRIED;
    an_answer_after_the_deadline_is_not_waited_for:
        Fault::Latency(Duration::from_secs(2)) => Unavailable, 2..=4, HURRIED;
    a_reset_connection: Fault::Reset => Unavailable, 4..=4, PATIENT;
    an_answer_cut_off: Fault::CutOff => Unavailable, 4..=4, PATIENT;
    a_gateway_500: Fault::Gateway(500) => Unavailable, 4..=4, PATIENT;
    a_gateway_503: Fault::Gateway(503) => Unavailable, 4..=4, PATIENT;
    an_internal_error: Fault::Exception(500, "KMSInternalException") => Unavailable, 4..=4, PATIENT;
    a_dependency_timeout: Fault::Exception(503, "DependencyTimeoutException") => Unavailable, 4..=4, PATIENT;
    throttling: Fault::Exception(400, "ThrottlingException") => Throttled, 4..=4, PATIENT;
    an_unavailable_key: Fault::Exception(500, "KeyUnavailableException") => KeyUnusable, 4..=4, PATIENT;
    denied_access: Fault::Exception(400, "AccessDeniedException") => Denied, 1..=1, PATIENT;
    a_disabled_key: Fault::Exception(400, "DisabledException") => KeyUnusable, 1..=1, PATIENT;
    an_invalid_state: Fault::Exception(400, "KMSInvalidStateException") => KeyUnusable, 1..=1, PATIENT;
    a_missing_key: Fault::Exception(400, "NotFoundException") => KeyNotFound, 1..=1, PATIENT;
    an_incorrect_key: Fault::Exception(400, "IncorrectKeyException") => KeyNotFound, 1..=1, PATIENT;
    an_expired_token: Fault::Exception(400, "ExpiredTokenException") => Credentials, 2..=2, PATIENT;
    an_unknown_client: Fault::Exception(400, "UnrecognizedClientException") => Credentials, 2..=2, PATIENT;
    success_without_content: Fault::Empty => BadAnswer, 1..=1, PATIENT;
    a_key_one_byte_short: Fault::ShortKey => BadAnswer, 1..=1, PATIENT;
    truncated_json: Fault::TruncatedJson => BadAnswer, 1..=1, PATIENT;
    the_key_id_of_another_key: Fault::OtherKeyId => BadAnswer, 1..=1, PATIENT;
}

/// The same for faults that are over at the second attempt.
macro_rules! passing {
    ($($name:ident: $fault:expr, $timeouts:ident;)*) => {$(
        #[test]
        fn $name() {
            isolated(stringify!($name), || passing($fault, $timeouts));
        }
    )*};
}

passing! {
    a_passing_stall: Fault::Stall, HURRIED;
    a_passing_reset: Fault::Reset, PATIENT;
    a_passing_cut: Fault::CutOff, PATIENT;
    a_passing_500: Fault::Gateway(500), PATIENT;
    a_passing_503: Fault::Exception(503, "DependencyTimeoutException"), PATIENT;
    passing_throttling: Fault::Exception(400, "ThrottlingException"), PATIENT;
    a_passing_expiry: Fault::Exception(400, "ExpiredTokenException"), PATIENT;
}

#[test]
fn a_slow_answer_is_waited_for() {
    isolated("a_slow_answer_is_waited_for", || {
        on_own_server(PATIENT, |scene| {
            let latency = Duration::from_millis(300);
            scene.proxy.inject(DECRYPT, .., Fault::Latency(latency));
            let (result, attempts, took) = scene.call(DECRYPT);
            assert!(result.is_ok() && attempts == 1 && took >= latency, "{attempts} attempts, {took:?}");
            scene.works(GENERATE);
        });
    });
}

/// The provider cannot know: above it, the commitment in the header must tell.
#[test]
fn wrong_key_bytes_pass_for_a_key() {
    isolated("wrong_key_bytes_pass_for_a_key", || {
        on_own_server(PATIENT, |scene| {
            scene.proxy.inject(DECRYPT, .., Fault::WrongKey);
            let (result, attempts, _) = scene.call(DECRYPT);
            assert_eq!(attempts, 1);
            assert!(result.is_ok_and(|key| key.expose() != scene.data_key.expose()));
            scene.proxy.heal();
            scene.works(DECRYPT);
        });
    });
}

/// No request of ours reaches a KMS but by the SDK, neither while all is well nor after trouble.
#[test]
fn the_sdk_makes_every_call() {
    isolated("the_sdk_makes_every_call", || {
        on_own_server(PATIENT, |scene| {
            let by_sdk = || OPERATIONS.map(|operation| scene.proxy.calls_by_sdk(operation));
            assert_eq!(by_sdk(), [1, 0], "the first call");
            for _ in 0..3 {
                OPERATIONS.into_iter().for_each(|operation| scene.works(operation));
            }
            assert_eq!(by_sdk(), [4, 3]);
            scene.proxy.inject(DECRYPT, .., Fault::Exception(400, "AccessDeniedException"));
            scene.fails(DECRYPT, ProviderErrorKind::Denied, &(1..=1));
            assert_eq!(by_sdk(), [4, 4], "a refusal is not asked again");
            scene.proxy.heal();
            scene.works(DECRYPT);
            scene.works(DECRYPT);
            assert_eq!(by_sdk(), [4, 6]);
            scene.proxy.inject(DECRYPT, ..=1, Fault::Gateway(503));
            let (result, attempts, _) = scene.call(DECRYPT);
            assert!(result.is_ok() && attempts == 2, "{attempts} attempts");
            assert_eq!(by_sdk(), [4, 8]);
            scene.works(GENERATE);
            assert_eq!(by_sdk(), [5, 8]);
        });
    });
}

/// A fault of one operation leaves the other alone, and the proxy passes on what it does not break, to either server.
#[test]
fn faults_are_of_one_operation_on_moto_too() {
    isolated("faults_are_of_one_operation_on_moto_too", || {
        let moto = Moto::start();
        let scene = Scene::new(&moto.create_key().arn, &moto.endpoint(), PATIENT);
        for (broken, whole) in [(GENERATE, DECRYPT), (DECRYPT, GENERATE)] {
            scene.proxy.inject(broken, .., Fault::Exception(400, "DisabledException"));
            scene.fails(broken, ProviderErrorKind::KeyUnusable, &(1..=1));
            scene.works(whole);
            scene.proxy.heal();
            scene.works(broken);
        }
    });
}

/// The same from the server itself, and at last from nobody.
#[test]
fn a_key_that_the_server_disables_heals_when_it_is_enabled() {
    isolated("a_key_that_the_server_disables_heals_when_it_is_enabled", || {
        let server = KmsServer::start();
        let key = server.create_key();
        let scene = Scene::new(&key.arn, &server.endpoint(), PATIENT);
        let input = serde_json::json!({ "KeyId": key.id });
        server.administer("DisableKey", &input);
        for operation in OPERATIONS {
            scene.fails(operation, ProviderErrorKind::KeyUnusable, &(1..=1));
        }
        server.administer("EnableKey", &input);
        OPERATIONS.into_iter().for_each(|operation| scene.works(operation));
        server.deny(DECRYPT);
        scene.fails(DECRYPT, ProviderErrorKind::Denied, &(1..=1));
        server.allow(DECRYPT);
        scene.works(DECRYPT);
        drop(server);
        scene.fails(DECRYPT, ProviderErrorKind::Unavailable, &(4..=4));
    });
}

/// A provider's budget of retries is not used up by the calls of a short outage, which each get all their attempts.
#[test]
fn a_short_outage_does_not_use_up_the_retries() {
    isolated("a_short_outage_does_not_use_up_the_retries", || {
        on_own_server(PATIENT, |scene| {
            scene.proxy.inject(DECRYPT, .., Fault::Gateway(503));
            for call in 0..40 {
                let (result, attempts, _) = scene.call(DECRYPT);
                assert_eq!(result.err().map(|error| error.kind), Some(ProviderErrorKind::Unavailable));
                assert_eq!(attempts, 4, "call {call}");
            }
            scene.proxy.heal();
            scene.works(DECRYPT);
        });
    });
}

/// It is a budget all the same: many calls in an outage are in the end not tried again, so that retries do not keep a
/// server down; and when it is over the first call works.
#[test]
fn a_long_outage_uses_up_the_retries() {
    const THREADS: u64 = 32;
    const CALLS: u64 = 30;
    isolated("a_long_outage_uses_up_the_retries", || {
        on_own_server(PATIENT, |scene| {
            scene.proxy.inject(DECRYPT, .., Fault::Gateway(503));
            let before = scene.proxy.calls(DECRYPT);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        for _ in 0..CALLS {
                            assert!(scene.call(DECRYPT).0.is_err());
                        }
                    });
                }
            });
            let attempts = scene.proxy.calls(DECRYPT) - before;
            assert!(attempts < THREADS * CALLS * 4, "every call was tried again: {attempts} attempts");
            scene.proxy.heal();
            scene.works(DECRYPT);
        });
    });
}
