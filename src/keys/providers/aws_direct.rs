//! Calls of AWS KMS without most of the SDK, which takes several times the work of the call itself. While all is well, a
//! request is what the SDK's own last one was (host, connections, Region, credentials, headers), with another body and
//! signature.
//!
//! Invariants:
//! * the SDK decides: only what it did within [`FRESH`] is done again, and credentials that end soon are not used;
//! * the SDK judges: whatever is not plainly a success, an answer or a failure to get one, is given to it as the outcome of
//!   its own first attempt, so that errors, retries, clocks and expired credentials are its matter, and every attempt is one;
//! * requests pass the same guards, timeouts and connections as the SDK's, because they pass its connector.

use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_credential_types::Credentials;
use aws_sdk_kms::config::{ConfigBag, ResolveCachedIdentity, RuntimeComponents, SharedHttpClient, SharedIdentityCache};
use aws_sdk_kms::error::SdkError;
use aws_smithy_runtime_api::client::http::{
    HttpClient as _, HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn,
};
use aws_smithy_runtime_api::client::identity::{Identity, IdentityFuture, SharedIdentityResolver};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::byte_stream::ByteStream;
use serde::Serialize;

use super::AwsSettings;
use super::aws_answer::Answer;
use super::aws_signature::{self, Signer};

/// How long after the SDK's request it may be repeated. Each request of the SDK takes note of credentials that have
/// changed, and of the clock.
const FRESH: Duration = Duration::from_secs(60);
/// Credentials that end sooner are left to the SDK, which fetches others.
const LEAST_LEFT: Duration = Duration::from_secs(30);
/// If the SDK's clock is further from ours, it has found ours to be wrong, and makes the calls.
const MAX_SKEW: Duration = Duration::from_secs(30);

/// What came of an attempt.
type Outcome = Result<HttpResponse, ConnectorError>;

tokio::task_local! {
    /// What the next request of the SDK on this task has come to already.
    static MADE: Cell<Option<Outcome>>;
}

/// What the SDK did last for one client.
#[derive(Clone)]
pub(super) struct Direct {
    attempt_timeout: Duration,
    operation_timeout: Duration,
    last: Arc<Last>,
}

#[derive(Default)]
struct Last {
    identity: Mutex<Option<Identity>>,
    request: Mutex<Option<Arc<Pattern>>>,
}

/// A request of the SDK that succeeded, to be repeated.
struct Pattern {
    connector: SharedHttpConnector,
    uri: String,
    host: String,
    /// Those that are sent again and signed, in the order of their names.
    headers: Vec<(&'static str, String)>,
    user_agent: Option<String>,
    signer: Signer,
    /// When the SDK made it.
    at: Instant,
    expires: Option<SystemTime>,
}

impl Direct {
    /// Knows nothing yet.
    pub(super) fn new(settings: &AwsSettings) -> Self {
        let (attempt_timeout, operation_timeout) = (settings.attempt_timeout, settings.operation_timeout);
        Self { attempt_timeout, operation_timeout, last: Arc::default() }
    }

    /// Asks for `operation` with `input`: as the SDK did last, or else by way of `sdk`, which asks for the same.
    pub(super) async fn call<E>(
        &self,
        operation: &str,
        input: &impl Serialize,
        sdk: impl AsyncFnOnce() -> Result<Answer, SdkError<E>>,
    ) -> Result<Answer, SdkError<E>> {
        let began = Instant::now();
        let Some((pattern, request)) = self.request(operation, input) else { return sdk().await };
        let late = |_| Err(ConnectorError::timeout("no answer within the attempt timeout".into()));
        let attempt = tokio::time::timeout(self.attempt_timeout, attempt(&pattern, request));
        let outcome = attempt.await.unwrap_or_else(late);
        if let Some(answer) = outcome.as_ref().ok().and_then(Answer::of_response) {
            return Ok(answer);
        }
        self.last.forget(&pattern);
        let left = self.operation_timeout.saturating_sub(began.elapsed());
        let rest = MADE.scope(Cell::new(Some(outcome)), sdk());
        match tokio::time::timeout(left, rest).await {
            Ok(result) => result,
            Err(late) => Err(SdkError::timeout_error(late)),
        }
    }

    /// The request that is like the SDK's last one, if that can be repeated now.
    fn request(&self, operation: &str, input: &impl Serialize) -> Option<(Arc<Pattern>, HttpRequest)> {
        let pattern = self.last.request().clone()?;
        let request = pattern.is_fresh().then(|| pattern.request(operation, input)).flatten();
        if request.is_none() {
            self.last.forget(&pattern);
        }
        Some((pattern, request?))
    }

    /// `cache`, whose identities are noted.
    pub(super) fn noting_identities(&self, cache: SharedIdentityCache) -> SharedIdentityCache {
        SharedIdentityCache::new(Noting { inner: cache, last: Arc::clone(&self.last) })
    }

    /// `client`, whose requests are noted, and not made if their outcome is there.
    pub(super) fn noting_requests(&self, client: SharedHttpClient) -> SharedHttpClient {
        let last = Arc::clone(&self.last);
        http_client_fn(move |settings, components| {
            let inner = client.http_connector(settings, components);
            SharedHttpConnector::new(Noting { inner, last: Arc::clone(&last) })
        })
    }
}

/// With the whole body.
async fn attempt(pattern: &Pattern, request: HttpRequest) -> Outcome {
    let mut response = pattern.connector.call(request).await?;
    let body = ByteStream::new(response.take_body()).collect().await;
    let body = body.map_err(|error| ConnectorError::io(error.into()))?.into_bytes();
    Ok(response.map(|_| SdkBody::from(body.clone())))
}

impl Last {
    fn request(&self) -> MutexGuard<'_, Option<Arc<Pattern>>> {
        self.request.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn identity(&self) -> MutexGuard<'_, Option<Identity>> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the SDK make the next call, unless it has made one since.
    fn forget(&self, pattern: &Arc<Pattern>) {
        let mut request = self.request();
        if request.as_ref().is_some_and(|last| Arc::ptr_eq(last, pattern)) {
            *request = None;
        }
    }
}

impl Pattern {
    /// None if `request` is not as those of KMS are, or is not of `identity`.
    fn of(request: &HttpRequest, identity: &Identity, connector: &SharedHttpConnector) -> Option<Self> {
        let credentials = identity.data::<Credentials>()?;
        let headers = request.headers();
        let token = headers.get(aws_signature::TOKEN);
        let scope = aws_signature::scope_of(headers.get("authorization")?, credentials.access_key_id())?;
        let now = SystemTime::now();
        let [earliest, latest] = [now.checked_sub(MAX_SKEW)?, now.checked_add(MAX_SKEW)?].map(aws_signature::timestamp);
        let is_now = |date: &str| earliest.as_deref() <= Some(date) && Some(date) <= latest.as_deref();
        if request.method() != "POST"
            || token != credentials.session_token()
            || !headers.get("x-amz-date").is_some_and(is_now)
        {
            return None;
        }
        let again = |name: &'static str| Some((name, headers.get(name)?.to_owned()));
        Some(Self {
            connector: connector.clone(),
            uri: request.uri().to_owned(),
            host: aws_signature::host_of(request.uri())?,
            headers: ["content-type", aws_signature::TOKEN, "x-amz-user-agent"].into_iter().filter_map(again).collect(),
            user_agent: headers.get("user-agent").map(str::to_owned),
            signer: Signer::new(credentials, scope),
            at: Instant::now(),
            expires: identity.expiration(),
        })
    }

    fn is_fresh(&self) -> bool {
        let lasts = |end: SystemTime| end.duration_since(SystemTime::now()).is_ok_and(|left| left > LEAST_LEFT);
        self.at.elapsed() < FRESH && self.expires.is_none_or(lasts)
    }

    fn request(&self, operation: &str, input: &impl Serialize) -> Option<HttpRequest> {
        let body = serde_json::to_vec(input).ok()?;
        let (date, target) = (aws_signature::timestamp(SystemTime::now())?, format!("TrentService.{operation}"));
        let mut headers: Vec<(&'static str, &str)> =
            self.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        headers.extend([("host", &*self.host), ("x-amz-date", &date), ("x-amz-target", &target)]);
        headers.sort_unstable();
        let authorization = self.signer.authorization(&headers, &date, &body)?;
        let mut request = HttpRequest::new(SdkBody::from(body));
        request.set_method("POST").ok()?;
        request.set_uri(self.uri.as_str()).ok()?;
        for (name, value) in headers {
            request.headers_mut().try_insert(name, value.to_owned()).ok()?;
        }
        if let Some(user_agent) = &self.user_agent {
            request.headers_mut().try_insert("user-agent", user_agent.clone()).ok()?;
        }
        request.headers_mut().try_insert("authorization", authorization).ok()?;
        Some(request)
    }
}

/// Hands on what `inner` gives, and notes it.
struct Noting<T> {
    inner: T,
    last: Arc<Last>,
}

/// Says nothing of what was noted.
impl<T> std::fmt::Debug for Noting<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Noting")
    }
}

impl ResolveCachedIdentity for Noting<SharedIdentityCache> {
    fn resolve_cached_identity<'a>(
        &'a self,
        resolver: SharedIdentityResolver,
        components: &'a RuntimeComponents,
        config: &'a ConfigBag,
    ) -> IdentityFuture<'a> {
        IdentityFuture::new(async move {
            let identity = self.inner.resolve_cached_identity(resolver, components, config).await?;
            *self.last.identity() = Some(identity.clone());
            Ok(identity)
        })
    }
}

impl HttpConnector for Noting<SharedHttpConnector> {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        if let Ok(Some(outcome)) = MADE.try_with(Cell::take) {
            return HttpConnectorFuture::ready(outcome);
        }
        let identity = self.last.identity().clone();
        let pattern = identity.and_then(|identity| Pattern::of(&request, &identity, &self.inner));
        let (sent, last) = (self.inner.call(request), Arc::clone(&self.last));
        HttpConnectorFuture::new(async move {
            let response = sent.await?;
            if response.status().as_u16() == 200 {
                *last.request() = pattern.map(Arc::new);
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Debug)]
    struct Nowhere;

    impl HttpConnector for Nowhere {
        fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
            HttpConnectorFuture::ready(Err(ConnectorError::user("nowhere".into())))
        }
    }

    fn identity(key: &str, token: Option<&str>, left: Option<Duration>) -> Identity {
        let expires = left.map(|left| SystemTime::now() + left);
        Identity::new(Credentials::new(key, "secret", token.map(str::to_owned), expires, "test"), expires)
    }

    /// As the SDK sends it, but for its signature.
    fn sent() -> HttpRequest {
        let date = aws_signature::timestamp(SystemTime::now()).unwrap();
        let mut request = HttpRequest::new(SdkBody::empty());
        request.set_method("POST").unwrap();
        request.set_uri("https://kms.eu-west-1.amazonaws.com/").unwrap();
        let scope = format!("{}/eu-west-1/kms/aws4_request", &date[..8]);
        let authorization = format!("AWS4-HMAC-SHA256 Credential=A/{scope}, SignedHeaders=host, Signature=0");
        for (name, value) in [
            ("authorization", &*authorization),
            ("content-type", "application/x-amz-json-1.1"),
            ("user-agent", "agent"),
            (aws_signature::TOKEN, "token"),
            ("x-amz-date", &date),
            ("x-amz-target", "TrentService.Encrypt"),
            ("amz-sdk-invocation-id", "1"),
        ] {
            request.headers_mut().insert(name, value.to_owned());
        }
        request
    }

    fn pattern(request: &HttpRequest, identity: &Identity) -> Option<Pattern> {
        Pattern::of(request, identity, &SharedHttpConnector::new(Nowhere))
    }

    #[test]
    fn a_request_is_repeated_with_another_body_and_signature() {
        let identity = identity("A", Some("token"), None);
        let again = pattern(&sent(), &identity).unwrap().request("Decrypt", &json!({ "KeyId": "k" })).unwrap();
        assert_eq!((again.method(), again.uri()), ("POST", "https://kms.eu-west-1.amazonaws.com/"));
        assert_eq!(again.body().bytes(), Some(&br#"{"KeyId":"k"}"#[..]));
        let header = |name| again.headers().get(name).unwrap_or_default();
        assert_eq!((header("x-amz-target"), header(aws_signature::TOKEN)), ("TrentService.Decrypt", "token"));
        assert_eq!((header("user-agent"), header("amz-sdk-invocation-id")), ("agent", ""));
        let signed = "SignedHeaders=content-type;host;x-amz-date;x-amz-security-token;x-amz-target,";
        assert!(header("authorization").contains(signed), "{}", header("authorization"));
        assert!(pattern(&again, &identity).is_some());
    }

    #[test]
    fn what_is_not_this_identity_now_is_not_repeated() {
        let right = identity("A", Some("token"), None);
        for wrong in [identity("B", Some("token"), None), identity("A", Some("other"), None), identity("A", None, None)]
        {
            assert!(pattern(&sent(), &wrong).is_none());
        }
        for skew in [-1, 1] {
            let now =
                i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap();
            let then = SystemTime::UNIX_EPOCH + Duration::from_secs((now + skew * 240).unsigned_abs());
            let mut skewed = sent();
            skewed.headers_mut().insert("x-amz-date", aws_signature::timestamp(then).unwrap());
            assert!(pattern(&skewed, &right).is_none());
        }
        let mut elsewhere = sent();
        elsewhere.set_uri("https://kms.eu-west-1.amazonaws.com/path").unwrap();
        assert!(pattern(&elsewhere, &right).is_none());
    }

    #[test]
    fn old_requests_and_credentials_that_end_soon_are_not_used() {
        let fresh = |left: Option<u64>| pattern(&sent(), &identity("A", Some("token"), left.map(Duration::from_secs)));
        assert!(fresh(None).unwrap().is_fresh() && fresh(Some(60)).unwrap().is_fresh());
        assert!(!fresh(Some(20)).unwrap().is_fresh());
        let old = Instant::now().checked_sub(FRESH).unwrap();
        assert!(!Pattern { at: old, ..fresh(None).unwrap() }.is_fresh());
    }
}
