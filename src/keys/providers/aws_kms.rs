//! AWS Key Management Service, through the official SDK: signing, TLS, credentials and retries are the SDK's.
//!
//! Invariants: every wait ends by the operation timeout and its grace; every answer is checked before it is used (32
//! bytes, the key that was asked for); no plaintext key is held across an await, formatted, or left unwiped; nothing of
//! the SDK is built before the first call; no lock is held across one.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, ConfigLoader, Region};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::{ProvideCredentials as _, SharedCredentialsProvider};
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId as _;
use aws_sdk_kms::operation::decrypt::{DecryptError, DecryptOutput};
use aws_sdk_kms::operation::generate_data_key::{GenerateDataKeyError, GenerateDataKeyOutput};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::DataKeySpec;
use tokio::runtime::{Builder, Runtime};
use zeroize::Zeroizing;

use super::super::{
    EncryptionContext, KeyDescription, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey,
};
use super::{AwsSettings, MAX_WRAPPED_LEN, aws_describe};
use crate::crypto::{DataKey, Secret};

/// The longest wait for a connection and its TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long after the operation timeout a call is given up whatever the SDK does. It also bounds the search for a
/// Region and for credentials, which the SDK's own timeout does not.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);
const MAX_ATTEMPTS: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// The longest name of a key that KMS takes.
const MAX_KEY_LEN: usize = 2048;

/// A key of AWS KMS.
pub(super) struct AwsKmsProvider {
    key: String,
    settings: AwsSettings,
    /// `None` only while dropping.
    runtime: Option<Runtime>,
    /// The connection of each Region; of the Region that the SDK finds by itself, under `None`.
    connections: Mutex<BTreeMap<Option<String>, Arc<Connection>>>,
}

struct Connection {
    client: Client,
    credentials: Option<SharedCredentialsProvider>,
}

impl AwsKmsProvider {
    /// The provider of `key`: an id, an alias or an ARN. Makes no call.
    ///
    /// # Errors
    /// `Misconfigured` if `key` cannot be a KMS key or the settings exclude each other.
    pub(super) fn open(key: &str, settings: &AwsSettings) -> Result<Self, ProviderError> {
        check_key(key)?;
        check_endpoint(settings, |name| std::env::var(name).ok())?;
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("kms").enable_all().build();
        let runtime = runtime.map_err(|error| misconfigured(format!("AWS KMS: no thread for it: {error}")))?;
        let connections = Mutex::default();
        Ok(Self { key: key.to_owned(), settings: settings.clone(), runtime: Some(runtime), connections })
    }

    /// Runs `send` on a connection to the key's Region, and once more on a new one if the first one's credentials have
    /// expired. Must not be called from a thread of an async runtime.
    pub(super) fn call<T, E: Failure>(
        &self,
        call: &Call<'_>,
        send: impl AsyncFn(&Client) -> Result<T, SdkError<E>>,
    ) -> Result<T, ProviderError> {
        let Some(runtime) = &self.runtime else {
            return Err(misconfigured("AWS KMS: closed".to_owned()));
        };
        let deadline = self.settings.operation_timeout + DEADLINE_GRACE;
        let late = |_| call.error(ProviderErrorKind::Unavailable, &format!("no answer within {deadline:?}"));
        runtime.block_on(async { tokio::time::timeout(deadline, self.send(call, send)).await.map_err(late)? })
    }

    async fn send<T, E: Failure>(
        &self,
        call: &Call<'_>,
        send: impl AsyncFn(&Client) -> Result<T, SdkError<E>>,
    ) -> Result<T, ProviderError> {
        let mut connection = self.connection(call).await?;
        let mut result = send(&connection.client).await;
        if result.as_ref().is_err_and(|error| classify(error) == ProviderErrorKind::Credentials) {
            self.forget(call, &connection);
            connection = self.connection(call).await?;
            result = send(&connection.client).await;
        }
        match result {
            Ok(answer) => Ok(answer),
            Err(error) => Err(connection.explain(call, &error).await),
        }
    }

    async fn connection(&self, call: &Call<'_>) -> Result<Arc<Connection>, ProviderError> {
        let region = self.region(call.key);
        if let Some(connection) = self.connections().get(&region) {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(self.connect(call, region.clone()).await?);
        Ok(Arc::clone(self.connections().entry(region).or_insert(connection)))
    }

    async fn connect(&self, call: &Call<'_>, region: Option<String>) -> Result<Connection, ProviderError> {
        let config = self.loader(region).load().await;
        if config.region().is_none() {
            return Err(call.error(ProviderErrorKind::Misconfigured, "no Region is known"));
        }
        let mut kms = aws_sdk_kms::config::Builder::from(&config);
        if let Some(endpoint) = &self.settings.endpoint {
            kms.set_endpoint_url(Some(endpoint.clone()));
        }
        Ok(Connection { client: Client::from_conf(kms.build()), credentials: config.credentials_provider() })
    }

    fn loader(&self, region: Option<String>) -> ConfigLoader {
        let attempt = self.settings.attempt_timeout;
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT.min(attempt))
            .read_timeout(attempt)
            .operation_attempt_timeout(attempt)
            .operation_timeout(self.settings.operation_timeout);
        let retries = RetryConfig::standard()
            .with_max_attempts(MAX_ATTEMPTS)
            .with_initial_backoff(FIRST_BACKOFF)
            .with_max_backoff(LONGEST_BACKOFF);
        let loader =
            aws_config::defaults(BehaviorVersion::v2026_01_12()).timeout_config(timeouts.build()).retry_config(retries);
        let loader = if self.settings.fips { loader.use_fips(true) } else { loader };
        match region {
            Some(region) => loader.region(Region::new(region)),
            None => loader,
        }
    }

    /// The Region that `key` or the settings name.
    fn region(&self, key: &str) -> Option<String> {
        region_of(key).map(str::to_owned).or_else(|| self.settings.region.clone())
    }

    /// Drops `connection`, unless another caller has replaced it already.
    fn forget(&self, call: &Call<'_>, connection: &Arc<Connection>) {
        let region = self.region(call.key);
        let mut connections = self.connections();
        if connections.get(&region).is_some_and(|current| Arc::ptr_eq(current, connection)) {
            connections.remove(&region);
        }
    }

    fn connections(&self) -> MutexGuard<'_, BTreeMap<Option<String>, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for AwsKmsProvider {
    /// Does not wait for what a name server or a peer may still owe.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Provider for AwsKmsProvider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::AwsKms
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let call = Call { operation: "GenerateDataKey", key: &self.key };
        let answer =
            self.call(&call, async |client| -> Result<GenerateDataKeyOutput, SdkError<GenerateDataKeyError>> {
                let request = client.generate_data_key().key_id(&self.key).key_spec(DataKeySpec::Aes256);
                let context = context.pairs().map(|(name, value)| (name.to_owned(), value.to_owned()));
                request.set_encryption_context(Some(context.collect())).send().await
            })?;
        let data_key = call.data_key(answer.plaintext)?;
        let key_id = call.key_id(answer.key_id)?;
        let bytes = answer.ciphertext_blob.map(Blob::into_inner).unwrap_or_default();
        if bytes.is_empty() || bytes.len() > MAX_WRAPPED_LEN {
            return Err(call.bad_answer(&format!("it holds a wrapped key of {} bytes", bytes.len())));
        }
        Ok((data_key, WrappedKey { key_id, bytes }))
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        check_key(key_id)?;
        let call = Call { operation: "Decrypt", key: key_id };
        if wrapped.is_empty() || wrapped.len() > MAX_WRAPPED_LEN {
            let message = format!("no wrapped key has {} bytes", wrapped.len());
            return Err(call.error(ProviderErrorKind::Tampered, &message));
        }
        let answer = self.call(&call, async |client| -> Result<DecryptOutput, SdkError<DecryptError>> {
            let request = client.decrypt().key_id(key_id).ciphertext_blob(Blob::new(wrapped));
            let context = context.pairs().map(|(name, value)| (name.to_owned(), value.to_owned()));
            request.set_encryption_context(Some(context.collect())).send().await
        })?;
        let data_key = call.data_key(answer.plaintext)?;
        call.key_id(answer.key_id)?;
        Ok(data_key)
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        check_key(key_id)?;
        aws_describe::describe(self, key_id)
    }
}

/// An operation on a key, for messages and checks.
pub(super) struct Call<'a> {
    pub(super) operation: &'static str,
    pub(super) key: &'a str,
}

impl Call<'_> {
    /// The data key in an answer. Wipes the answer's copy.
    fn data_key(&self, plaintext: Option<Blob>) -> Result<DataKey, ProviderError> {
        let bytes = Zeroizing::new(plaintext.map(Blob::into_inner).unwrap_or_default());
        let wrong = || self.bad_answer(&format!("it holds a data key of {} bytes, not 32", bytes.len()));
        let key: &[u8; 32] = bytes.as_slice().try_into().map_err(|_| wrong())?;
        Secret::fill_with(|secret| {
            secret.copy_from_slice(key);
            Ok(())
        })
    }

    /// The ARN of the key that an answer says was used, if that can be the key that was asked for.
    pub(super) fn key_id(&self, answered: Option<String>) -> Result<String, ProviderError> {
        match answered {
            Some(id) if names_same_key(self.key, &id) => Ok(id),
            Some(id) => Err(self.bad_answer(&format!("it used another key, {id}"))),
            None => Err(self.bad_answer("it does not name the key it used")),
        }
    }

    pub(super) fn bad_answer(&self, what: &str) -> ProviderError {
        self.error(ProviderErrorKind::BadAnswer, &format!("the answer cannot be right: {what}"))
    }

    /// An error that says what failed, `why`, and what to do.
    fn error(&self, kind: ProviderErrorKind, why: &str) -> ProviderError {
        let message = format!("KMS {} with key {}: {why}: {}", self.operation, self.key, self.advice(kind));
        ProviderError::new(kind, message)
    }

    fn advice(&self, kind: ProviderErrorKind) -> String {
        match kind {
            ProviderErrorKind::Denied => {
                format!("allow kms:{} in the key's policy or in the caller's", self.operation)
            }
            ProviderErrorKind::KeyUnusable => "enable the key or cancel its deletion, in the KMS console".to_owned(),
            ProviderErrorKind::KeyNotFound => "check the key's id, its account and its Region".to_owned(),
            ProviderErrorKind::Credentials => "renew the AWS credentials, or choose others (AWS_PROFILE)".to_owned(),
            ProviderErrorKind::Unavailable => "check the network, and try again".to_owned(),
            ProviderErrorKind::Throttled => "check the account's KMS quota, and try again later".to_owned(),
            ProviderErrorKind::Tampered => {
                "the wrapped key or its context was changed, or it belongs to another volume or key".to_owned()
            }
            ProviderErrorKind::BadAnswer => "check what answers in the place of KMS (endpoint, proxy)".to_owned(),
            ProviderErrorKind::Misconfigured => {
                "check the key's name, the endpoint, and the Region (--region, AWS_REGION, or a key ARN)".to_owned()
            }
        }
    }
}

impl Connection {
    /// What a failure means. That there are no credentials looks like a failure to send, so they are asked for.
    async fn explain<E: Failure>(&self, call: &Call<'_>, error: &SdkError<E>) -> ProviderError {
        if let SdkError::DispatchFailure(failure) = error
            && !(failure.is_io() || failure.is_timeout())
            && let Some(reason) = self.missing_credentials().await
        {
            return call.error(ProviderErrorKind::Credentials, &format!("no credentials: {reason}"));
        }
        call.error(classify(error), &describe(error))
    }

    async fn missing_credentials(&self) -> Option<String> {
        match &self.credentials {
            None => Some("none are configured".to_owned()),
            Some(provider) => provider.provide_credentials().await.err().map(|error| causes(&error)),
        }
    }
}

/// What an error of an operation can be asked.
pub(super) trait Failure: ProvideErrorMetadata + StdError + 'static {}

impl<E: ProvideErrorMetadata + StdError + 'static> Failure for E {}

fn classify<E: Failure>(error: &SdkError<E>) -> ProviderErrorKind {
    match (error, error.code()) {
        (SdkError::ServiceError(_), Some(code)) => classify_code(code, status(error)),
        (SdkError::ServiceError(_), None) => classify_status(status(error)),
        (SdkError::ConstructionFailure(_), _) => ProviderErrorKind::Misconfigured,
        _ => ProviderErrorKind::Unavailable,
    }
}

/// The kind of an error that KMS names. Many of them the SDK does not model, so the code decides.
fn classify_code(code: &str, status: u16) -> ProviderErrorKind {
    const PREFIXES: [(&str, ProviderErrorKind); 24] = [
        ("AccessDenied", ProviderErrorKind::Denied),
        ("NotAuthorized", ProviderErrorKind::Denied),
        ("Disabled", ProviderErrorKind::KeyUnusable),
        ("KMSInvalidState", ProviderErrorKind::KeyUnusable),
        ("KeyUnavailable", ProviderErrorKind::KeyUnusable),
        ("InvalidKeyUsage", ProviderErrorKind::KeyUnusable),
        ("NotFound", ProviderErrorKind::KeyNotFound),
        ("IncorrectKey", ProviderErrorKind::KeyNotFound),
        ("InvalidCiphertext", ProviderErrorKind::Tampered),
        ("ExpiredToken", ProviderErrorKind::Credentials),
        ("RequestExpired", ProviderErrorKind::Credentials),
        ("UnrecognizedClient", ProviderErrorKind::Credentials),
        ("InvalidClientTokenId", ProviderErrorKind::Credentials),
        ("InvalidSignature", ProviderErrorKind::Credentials),
        ("SignatureDoesNotMatch", ProviderErrorKind::Credentials),
        ("IncompleteSignature", ProviderErrorKind::Credentials),
        ("MissingAuthenticationToken", ProviderErrorKind::Credentials),
        ("Throttling", ProviderErrorKind::Throttled),
        ("TooManyRequests", ProviderErrorKind::Throttled),
        ("LimitExceeded", ProviderErrorKind::Throttled),
        ("DependencyTimeout", ProviderErrorKind::Unavailable),
        ("KMSInternal", ProviderErrorKind::Unavailable),
        ("InvalidArn", ProviderErrorKind::Misconfigured),
        ("Validation", ProviderErrorKind::Misconfigured),
    ];
    let known = PREFIXES.iter().find(|(prefix, _)| code.starts_with(prefix));
    known.map_or_else(|| classify_status(status), |(_, kind)| *kind)
}

/// The kind of an error that has no name, as a proxy makes it, or an unknown one.
fn classify_status(status: u16) -> ProviderErrorKind {
    match status {
        401 | 403 => ProviderErrorKind::Denied,
        429 => ProviderErrorKind::Throttled,
        408 | 500.. => ProviderErrorKind::Unavailable,
        _ => ProviderErrorKind::BadAnswer,
    }
}

fn status<E: Failure>(error: &SdkError<E>) -> u16 {
    error.raw_response().map_or(0, |response| response.status().as_u16())
}

/// The error in words: its code, message and request id if KMS sent it, its causes otherwise. Never the SDK's `Debug`,
/// which repeats the body of the response.
fn describe<E: Failure>(error: &SdkError<E>) -> String {
    let mut text = match (error, error.code()) {
        (_, Some(code)) => format!("{code}: {}", error.message().unwrap_or("no message")),
        (SdkError::ServiceError(_) | SdkError::ResponseError(_), None) => {
            format!("an answer with status {} that is not one of KMS", status(error))
        }
        _ => causes(error),
    };
    if let Some(id) = error.request_id() {
        // Writing to a string does not fail.
        let _ = write!(text, " (request id {id})");
    }
    text
}

/// An error and its causes.
fn causes(error: &(dyn StdError + 'static)) -> String {
    let chain = std::iter::successors(Some(error), |error| (*error).source());
    let mut texts: Vec<_> = chain.map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}

/// Whether the key that KMS `answered` can be the `asked` one. An alias may stand for any key.
fn names_same_key(asked: &str, answered: &str) -> bool {
    let is_alias = |name: &str| name.starts_with("alias/") || name.contains(":alias/");
    let is_arn = |name: &str| name.starts_with("arn:");
    match (is_alias(asked), is_arn(asked)) {
        _ if answered.is_empty() => false,
        (true, _) => true,
        (false, true) => asked == answered,
        (false, false) => answered.rsplit('/').next() == Some(asked),
    }
}

/// The Region in an ARN, `arn:PARTITION:kms:REGION:ACCOUNT:key/ID`.
fn region_of(key: &str) -> Option<&str> {
    key.strip_prefix("arn:")?.split(':').nth(2)
}

fn check_key(key: &str) -> Result<(), ProviderError> {
    let fields: Vec<_> = key.split(':').collect();
    let is_resource = |name: &str| name.starts_with("key/") || name.starts_with("alias/");
    let is_arn = matches!(fields[..], ["arn", partition, "kms", region, account, resource]
        if ![partition, region, account].contains(&"") && is_resource(resource));
    let is_name = key.is_ascii() && !key.contains(|c: char| c == ':' || c.is_ascii_control() || c == ' ');
    if key.is_empty() || key.len() > MAX_KEY_LEN || !(is_arn || is_name) {
        let message =
            format!("{key:?} is not a KMS key: give a key id, alias/NAME, or arn:aws:kms:REGION:ACCOUNT:key/ID");
        return Err(misconfigured(message));
    }
    Ok(())
}

/// The SDK refuses FIPS with any custom endpoint, but only in the middle of the first call.
fn check_endpoint(settings: &AwsSettings, environment: impl Fn(&str) -> Option<String>) -> Result<(), ProviderError> {
    let is_true = |name| environment(name).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let fips = settings.fips || is_true("AWS_USE_FIPS_ENDPOINT");
    let configured = || {
        ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"].into_iter().find(|name| {
            environment(name).is_some_and(|url| !url.is_empty()) && !is_true("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
        })
    };
    let source = settings.endpoint.as_ref().map(|_| "the endpoint setting").or_else(configured);
    match source {
        Some(source) if fips => Err(misconfigured(format!(
            "AWS KMS: FIPS endpoints are asked for, and {source} names another endpoint: use one or the other"
        ))),
        _ => Ok(()),
    }
}

fn misconfigured(message: String) -> ProviderError {
    ProviderError::new(ProviderErrorKind::Misconfigured, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

    #[test]
    fn names_of_keys_are_checked_before_use() {
        let gov_alias = "arn:aws-us-gov:kms:us-gov-west-1:1:alias/a";
        for good in [ARN, gov_alias, "alias/a", "1234abcd-12ab-34cd-56ef-1234567890ab", "mrk-12"] {
            assert_eq!(check_key(good), Ok(()), "{good}");
        }
        let long = "a".repeat(MAX_KEY_LEN + 1);
        for bad in ["", "arn:aws:s3:::bucket", "arn:aws:kms::1:key/a", "arn:aws:kms:r:1:secret/a", "a b", "a\n", &long]
        {
            assert_eq!(check_key(bad).unwrap_err().kind, ProviderErrorKind::Misconfigured, "{bad}");
        }
        assert_eq!(
            AwsKmsProvider::open("", &AwsSettings::default()).err().unwrap().kind,
            ProviderErrorKind::Misconfigured
        );
    }

    #[test]
    fn an_arn_names_its_region_and_anything_else_takes_the_setting() {
        let settings = AwsSettings { region: Some("us-east-1".to_owned()), ..AwsSettings::default() };
        let provider = AwsKmsProvider::open(ARN, &settings).unwrap();
        assert_eq!(provider.region(ARN).as_deref(), Some("eu-west-1"));
        assert_eq!(provider.region("alias/a").as_deref(), Some("us-east-1"));
    }

    #[test]
    fn only_the_key_that_was_asked_for_will_do() {
        let other = ARN.replace("1234abcd", "00000000");
        let id = "1234abcd-12ab-34cd-56ef-1234567890ab";
        for asked in [ARN, id, "alias/a", "arn:aws:kms:eu-west-1:111122223333:alias/a"] {
            assert!(names_same_key(asked, ARN), "{asked}");
            assert!(!names_same_key(asked, ""), "{asked}");
        }
        assert!(!names_same_key(ARN, &other) && !names_same_key(id, &other));
        assert!(!names_same_key(ARN, &ARN.replace("eu-west-1", "us-east-1")));
    }

    #[test]
    fn fips_excludes_other_endpoints() {
        let none = |_: &str| None;
        let one =
            |name: &'static str, value: &'static str| move |asked: &str| (asked == name).then(|| value.to_owned());
        let fips = AwsSettings { fips: true, ..AwsSettings::default() };
        let endpoint = AwsSettings { endpoint: Some("http://127.0.0.1:1".to_owned()), ..AwsSettings::default() };
        let both = AwsSettings { fips: true, ..endpoint.clone() };
        assert!(check_endpoint(&fips, none).is_ok() && check_endpoint(&endpoint, none).is_ok());
        assert!(check_endpoint(&both, none).is_err());
        assert!(check_endpoint(&fips, one("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1")).is_err());
        assert!(check_endpoint(&fips, one("AWS_ENDPOINT_URL", "http://127.0.0.1:1")).is_err());
        assert!(check_endpoint(&endpoint, one("AWS_USE_FIPS_ENDPOINT", "true")).is_err());
        let ignored = |name: &str| match name {
            "AWS_ENDPOINT_URL" => Some("http://127.0.0.1:1".to_owned()),
            "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS" => Some("true".to_owned()),
            _ => None,
        };
        assert!(check_endpoint(&fips, ignored).is_ok());
    }

    #[test]
    fn unknown_errors_are_judged_by_their_status() {
        assert_eq!(classify_code("SomethingNew", 503), ProviderErrorKind::Unavailable);
        assert_eq!(classify_code("SomethingNew", 400), ProviderErrorKind::BadAnswer);
        assert_eq!(classify_code("KMSInvalidStateException", 500), ProviderErrorKind::KeyUnusable);
        assert_eq!(classify_status(403), ProviderErrorKind::Denied);
    }
}
