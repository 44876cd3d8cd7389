//! AWS Key Management Service, through the official SDK: TLS, credentials, errors and retries are the SDK's. How its
//! operations are called is in `aws_operations`.
//!
//! Invariants: every wait ends by the operation timeout and its grace; nothing of the SDK is built before the first call;
//! no lock is held across one.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::pin::pin;
use std::sync::Arc;

use aws_sdk_kms::Client;
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::operation::RequestId;
use tokio::runtime::{Builder, Runtime};

use super::super::uses::note_request_id;
use super::super::{ProviderError, ProviderErrorKind};
use super::AwsSettings;
use super::aws_client::{Clients, causes, explain_unsent};
use futures_util::future::{Either, select};

/// The longest name of a key that KMS takes.
const MAX_KEY_LEN: usize = 2048;

/// A key of AWS KMS.
pub(super) struct AwsKmsProvider {
    pub(super) key: String,
    pub(super) clients: Clients,
    /// `None` only while dropping.
    runtime: Option<Runtime>,
}

impl AwsKmsProvider {
    /// The provider of `key`: an id, an alias or an ARN. Makes no call.
    ///
    /// # Errors
    /// `Misconfigured` if `key` cannot be a KMS key or the settings exclude each other.
    pub(super) fn open(key: &str, settings: &AwsSettings) -> Result<Self, ProviderError> {
        check_key(key)?;
        let clients = Clients::new(settings)?;
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("kms").enable_all().build();
        let runtime = runtime.map_err(|error| misconfigured(format!("AWS KMS: no thread for it: {error}")))?;
        Ok(Self { key: key.to_owned(), clients, runtime: Some(runtime) })
    }

    /// Runs `send` on a client in the key's Region, and once more on a new one if the first one's credentials have
    /// expired. Must not be called from a thread of an async runtime.
    pub(super) fn call<T: RequestId, E: Failure>(
        &self,
        call: &Call<'_>,
        send: impl AsyncFn(&Client) -> Result<T, SdkError<E>>,
    ) -> Result<T, ProviderError> {
        self.run(self.send_in_time(call, send))?
    }

    /// Runs what waits for KMS. Must not be called from a thread of an async runtime.
    pub(super) fn run<T>(&self, work: impl Future<Output = T>) -> Result<T, ProviderError> {
        let closed = || misconfigured("AWS KMS: closed".to_owned());
        Ok(self.runtime.as_ref().ok_or_else(closed)?.block_on(work))
    }

    /// As [`Self::call`], for one that waits by itself.
    pub(super) async fn send_in_time<T: RequestId, E: Failure>(
        &self,
        call: &Call<'_>,
        send: impl AsyncFn(&Client) -> Result<T, SdkError<E>>,
    ) -> Result<T, ProviderError> {
        let deadline = self.clients.deadline();
        let late = |_| call.error(ProviderErrorKind::Unavailable, &format!("no answer within {deadline:?}"));
        let hung_up = self.clients.hung_up();
        let answer = tokio::time::timeout(deadline, self.send(call, send));
        match select(pin!(hung_up), pin!(answer)).await {
            Either::Left(_) => Err(call.error(ProviderErrorKind::Unavailable, "the connections were closed meanwhile")),
            Either::Right((answer, _)) => answer.map_err(late)?,
        }
    }

    async fn send<T: RequestId, E: Failure>(
        &self,
        call: &Call<'_>,
        send: impl AsyncFn(&Client) -> Result<T, SdkError<E>>,
    ) -> Result<T, ProviderError> {
        let mut client = self.client(call).await?;
        let mut result = send(&client).await;
        if result.as_ref().is_err_and(|error| classify(error) == ProviderErrorKind::Credentials) {
            self.clients.forget(call.key, &client);
            client = self.client(call).await?;
            result = send(&client).await;
        }
        note_request_id(match &result {
            Ok(answer) => answer.request_id(),
            Err(error) => error.request_id(),
        });
        result.map_err(|error| call.failure(&error))
    }

    async fn client(&self, call: &Call<'_>) -> Result<Arc<Client>, ProviderError> {
        self.clients.get(call.key).await.map_err(|why| call.error(ProviderErrorKind::Misconfigured, &why))
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

/// An operation on a key, for messages and checks.
pub(super) struct Call<'a> {
    pub(super) operation: &'static str,
    pub(super) key: &'a str,
}

impl Call<'_> {
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

    /// What a failure of the SDK means.
    fn failure<E: Failure>(&self, error: &SdkError<E>) -> ProviderError {
        let unsent = match error {
            SdkError::DispatchFailure(failure) => failure.as_connector_error().and_then(explain_unsent),
            _ => None,
        };
        let (kind, why) = unsent.unwrap_or_else(|| (classify(error), describe(error)));
        self.error(kind, &why).of_request(error.request_id())
    }

    /// An error that says what failed, `why`, and what to do.
    pub(super) fn error(&self, kind: ProviderErrorKind, why: &str) -> ProviderError {
        let message = format!("KMS {} with key {}: {why}: {}", self.operation, self.key, self.advice(kind));
        ProviderError::new(kind, message)
    }

    fn advice(&self, kind: ProviderErrorKind) -> String {
        match kind {
            ProviderErrorKind::Denied => {
                let permission = match self.operation {
                    "ReEncrypt" => "ReEncryptFrom and kms:ReEncryptTo",
                    operation => operation,
                };
                format!("allow kms:{permission} in the key's policy or in the caller's")
            }
            ProviderErrorKind::KeyUnusable => "enable the key or cancel its deletion, in the KMS console".to_owned(),
            ProviderErrorKind::KeyNotFound => "check the key's id, its account and its Region".to_owned(),
            ProviderErrorKind::Credentials => {
                "renew the AWS credentials, or choose others (AWS_PROFILE, AWS_ACCESS_KEY_ID, a role of this host)"
                    .to_owned()
            }
            ProviderErrorKind::Unavailable | ProviderErrorKind::Storage => {
                "check the network, and try again".to_owned()
            }
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

pub(super) fn check_key(key: &str) -> Result<(), ProviderError> {
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
    fn unknown_errors_are_judged_by_their_status() {
        assert_eq!(classify_code("SomethingNew", 503), ProviderErrorKind::Unavailable);
        assert_eq!(classify_code("SomethingNew", 400), ProviderErrorKind::BadAnswer);
        assert_eq!(classify_code("KMSInvalidStateException", 500), ProviderErrorKind::KeyUnusable);
        assert_eq!(classify_status(403), ProviderErrorKind::Denied);
    }
}
