//! Clients of AWS KMS: how each is configured, and when a new one is built.
//!
//! Invariants: nothing of the SDK is built before the first call; no lock is held across an await; every client has
//! timeouts; what credentials a client found is forgotten with it.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aws_config::identity::IdentityCache;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, ConfigLoader, Region};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::Client;
use aws_sdk_kms::config::retry::{RetryPartition, TokenBucket};
use aws_smithy_runtime_api::client::result::ConnectorError;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::super::{ProviderError, ProviderErrorKind};
use super::AwsSettings;
use super::aws_pace::Paced;
use super::aws_transport::{self, CA_BUNDLE};
use super::endpoint;

/// The longest wait for a connection and its TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long after the operation timeout a call is given up whatever the SDK does. It also bounds the search for a
/// Region, which the SDK's own timeout does not.
const DEADLINE_GRACE: Duration = Duration::from_millis(500);
const MAX_ATTEMPTS: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// What retries may cost, in the SDK's tokens: 5 for each, 10 after a timeout; a call that succeeds gives back what its
/// retries took. As much as all calls of a full pool and a prefetch need when one of the server's machines goes away.
const RETRY_TOKENS: usize = 5000;
/// Tokens that come back each second: in a long outage there are at most ten retries a second, and after it the budget
/// is whole again in two minutes.
const RETRY_TOKENS_EACH_SECOND: f32 = 50.0;

/// The clients of a provider: one for each Region, built when it is first needed.
pub(super) struct Clients {
    settings: AwsSettings,
    retries: RetryPartition,
    paced: Paced,
    /// The one of the Region that the SDK finds by itself, under `None`.
    by_region: Mutex<BTreeMap<Option<String>, Arc<Client>>>,
    hung_up: Notify,
}

impl Clients {
    /// Makes no client yet.
    ///
    /// # Errors
    /// `Misconfigured` if the settings and the environment exclude each other, or would send keys in clear text.
    pub(super) fn new(settings: &AwsSettings) -> Result<Self, ProviderError> {
        check_endpoint(settings, |name| std::env::var(name).ok())
            .map_err(|why| ProviderError::new(ProviderErrorKind::Misconfigured, format!("AWS KMS: {why}")))?;
        let tokens = TokenBucket::builder().capacity(RETRY_TOKENS).refill_rate(RETRY_TOKENS_EACH_SECOND).build();
        let retries = RetryPartition::custom("kmsfs").token_bucket(tokens).build();
        Ok(Self {
            settings: settings.clone(),
            retries,
            paced: Paced::default(),
            by_region: Mutex::default(),
            hung_up: Notify::new(),
        })
    }

    /// From now on throttled calls are tried again by whoever makes them.
    pub(super) fn leave_pace_to_caller(&self) {
        self.paced.set();
    }

    /// The longest wait for a call, with everything that it takes.
    pub(super) fn deadline(&self) -> Duration {
        self.settings.operation_timeout + DEADLINE_GRACE
    }

    /// A client in the Region of `key`.
    ///
    /// # Errors
    /// Why none can be made; the settings or the environment have to be changed.
    pub(super) async fn get(&self, key: &str) -> Result<Arc<Client>, String> {
        let region = self.region(key);
        if let Some(client) = self.by_region().get(&region) {
            return Ok(Arc::clone(client));
        }
        let client = Arc::new(self.build(region.clone()).await?);
        Ok(Arc::clone(self.by_region().entry(region).or_insert(client)))
    }

    /// Drops `client`, and with it the credentials that it found, unless another caller has replaced it already.
    pub(super) fn forget(&self, key: &str, client: &Arc<Client>) {
        let region = self.region(key);
        let mut clients = self.by_region();
        if clients.get(&region).is_some_and(|current| Arc::ptr_eq(current, client)) {
            clients.remove(&region);
        }
    }

    /// Ends when everything is hung up after this call: whoever waits for an answer then takes none.
    pub(super) fn hung_up(&self) -> Notified<'_> {
        self.hung_up.notified()
    }

    /// Drops all clients, and their connections with them.
    pub(super) fn hang_up(&self) {
        self.hung_up.notify_waiters();
        let clients = std::mem::take(&mut *self.by_region());
        // Their own threads close them; the lock is not held for it.
        drop(clients);
    }

    async fn build(&self, region: Option<String>) -> Result<Client, String> {
        let bundle = std::env::var_os(CA_BUNDLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        let http = aws_transport::client(bundle.as_deref())?;
        let for_credentials = aws_transport::guarded(http.clone(), aws_transport::is_own_or_link_local);
        let config = self.loader(region).http_client(for_credentials).load().await;
        if config.region().is_none() {
            return Err("no Region is known".to_owned());
        }
        let mut kms = aws_sdk_kms::config::Builder::from(&config)
            .http_client(aws_transport::guarded(http, endpoint::is_own))
            .retry_partition(self.retries.clone())
            .retry_classifier(self.paced.clone());
        if let Some(endpoint) = &self.settings.endpoint {
            kms.set_endpoint_url(Some(endpoint.clone()));
        }
        Ok(Client::from_conf(kms.build()))
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
        // Ends before the operation does, so that the error can say what was waited for.
        let credentials = IdentityCache::lazy().load_timeout(self.settings.operation_timeout.mul_f64(0.75));
        let loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
            .timeout_config(timeouts.build())
            .retry_config(retries)
            .identity_cache(credentials.build());
        let loader = if self.settings.fips { loader.use_fips(true) } else { loader };
        match region {
            Some(region) => loader.region(Region::new(region)),
            None => loader,
        }
    }

    /// The Region that `key` or the settings name.
    pub(super) fn region(&self, key: &str) -> Option<String> {
        region_of(key).map(str::to_owned).or_else(|| self.settings.region.clone())
    }

    fn by_region(&self) -> MutexGuard<'_, BTreeMap<Option<String>, Arc<Client>>> {
        self.by_region.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The Region in an ARN, `arn:PARTITION:kms:REGION:ACCOUNT:key/ID`.
fn region_of(key: &str) -> Option<&str> {
    key.strip_prefix("arn:")?.split(':').nth(2)
}

/// What can be known of the endpoint before the first call: the SDK refuses FIPS together with any custom endpoint, and
/// keys are not sent in clear text. A profile can name an endpoint too, which only the first call finds out.
fn check_endpoint(settings: &AwsSettings, environment: impl Fn(&str) -> Option<String>) -> Result<(), String> {
    let is_true = |name| environment(name).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let configured = || {
        let names = ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"].into_iter();
        names.filter(|_| !is_true("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")).find_map(|name| {
            let url = environment(name).filter(|url| !url.is_empty())?;
            Some((name, url))
        })
    };
    let setting = settings.endpoint.clone().map(|url| ("the endpoint setting", url));
    let Some((source, url)) = setting.or_else(configured) else { return Ok(()) };
    if settings.fips || is_true("AWS_USE_FIPS_ENDPOINT") {
        return Err(format!("FIPS endpoints are asked for, and {source} names another endpoint: use one or the other"));
    }
    endpoint::check_url(&url, endpoint::is_own).map_err(|why| format!("{source}: {why}"))
}

/// What a failure to send a request means if the network is not to blame: there are no credentials, the settings
/// cannot work, or the peer is not trusted. None for all others.
pub(super) fn explain_unsent(error: &ConnectorError) -> Option<(ProviderErrorKind, String)> {
    if let Some(credentials) = find::<CredentialsError>(error) {
        let why = match credentials {
            // Its causes are all the places that have none.
            CredentialsError::CredentialsNotLoaded(_) => NO_CREDENTIALS.to_owned(),
            _ => format!("no credentials: {}", causes(credentials)),
        };
        return Some((kind_of_missing(credentials), why));
    }
    if let Some(rustls::Error::InvalidCertificate(reason)) = find::<rustls::Error>(error) {
        let why = format!(
            "the server's certificate is not trusted ({reason}): if it should be, name a file with its issuer in \
             {CA_BUNDLE} or SSL_CERT_FILE"
        );
        return Some((ProviderErrorKind::Misconfigured, why));
    }
    let text = causes(error);
    if text.contains(LATE_CREDENTIALS) {
        return Some((ProviderErrorKind::Unavailable, format!("no credentials in time: {text}")));
    }
    (error.is_user() || text.contains(BAD_ENDPOINT)).then_some((ProviderErrorKind::Misconfigured, text))
}

/// That nothing gives credentials, not that what gives them failed.
const NO_CREDENTIALS: &str =
    "no credentials for AWS: none in the environment, the profile, a web identity, this container or this instance";
/// What the SDK says when credentials took longer than they may.
const LATE_CREDENTIALS: &str = "identity resolver timed out";
/// How the SDK's complaints of endpoints begin, such as of FIPS with one that a profile names.
const BAD_ENDPOINT: &str = "Invalid Configuration: ";

/// A source of credentials that could not be reached may be reached later.
fn kind_of_missing(error: &CredentialsError) -> ProviderErrorKind {
    let unreachable = || find::<ConnectorError>(error).is_some_and(|cause| cause.is_io() || cause.is_timeout());
    match error {
        CredentialsError::ProviderTimedOut(_) => ProviderErrorKind::Unavailable,
        CredentialsError::ProviderError(_) if unreachable() => ProviderErrorKind::Unavailable,
        _ => ProviderErrorKind::Credentials,
    }
}

/// The first `E` among an error and its causes.
fn find<'a, E: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a E> {
    chain(error).find_map(|cause| cause.downcast_ref())
}

/// An error and its causes in words, each once.
pub(super) fn causes(error: &(dyn StdError + 'static)) -> String {
    let mut texts: Vec<_> = chain(error).map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}

/// An error and its causes. That of an I/O error may be inside of it.
fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| match error.downcast_ref::<io::Error>() {
        Some(error) => error.get_ref().map(|inner| inner as &(dyn StdError + 'static)),
        None => error.source(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arn_names_its_region_and_anything_else_takes_the_setting() {
        const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
        let settings = AwsSettings { region: Some("us-east-1".to_owned()), ..AwsSettings::default() };
        let clients = Clients::new(&settings).unwrap();
        assert_eq!(clients.region(ARN).as_deref(), Some("eu-west-1"));
        assert_eq!(clients.region("alias/a").as_deref(), Some("us-east-1"));
    }

    fn one(name: &'static str, value: &'static str) -> impl Fn(&str) -> Option<String> {
        move |asked| (asked == name).then(|| value.to_owned())
    }

    #[test]
    fn fips_excludes_other_endpoints() {
        let none = |_: &str| None;
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
    fn keys_are_not_sent_in_clear_text() {
        let url = |url: &str| AwsSettings { endpoint: Some(url.to_owned()), ..AwsSettings::default() };
        let error = check_endpoint(&url("http://kms.example.com"), |_| None).unwrap_err();
        assert!(error.contains("the endpoint setting") && error.contains("clear text"), "{error}");
        assert!(check_endpoint(&url("https://kms.example.com"), |_| None).is_ok());
        let settings = AwsSettings::default();
        for name in ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"] {
            let error = check_endpoint(&settings, one(name, "http://10.0.0.1:8000")).unwrap_err();
            assert!(error.starts_with(name), "{error}");
            assert!(check_endpoint(&settings, one(name, "http://127.0.0.1:8000")).is_ok());
        }
    }
}
