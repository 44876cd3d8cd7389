//! The way to a server of OpenBao or Vault: one blocking client of HTTP, and what its answers mean.
//!
//! Invariants: every request ends by the deadline that its caller gives; tokens and keys go over TLS, or in clear text to
//! this machine only; no redirect is followed, which would carry a token to where nobody named; bodies are wiped.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use ureq::http::Uri;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Proxy};
use zeroize::Zeroizing;

use super::super::{ProviderError, ProviderErrorKind};
use super::VaultSettings;
use super::endpoint::{check_url, goes_direct, is_own, read_bundle, resolve_own};

/// The longest wait for a connection and its TLS handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
const MAX_ATTEMPTS: u32 = 4;
const FIRST_BACKOFF: Duration = Duration::from_millis(50);
const LONGEST_BACKOFF: Duration = Duration::from_secs(1);
/// No answer about one key is longer; a description lists the versions of a key.
const MAX_ANSWER_LEN: u64 = 1 << 20;
/// What is repeated of the server's own words, in characters.
const MAX_WORDS: usize = 300;

/// Why a request came to nothing: what kind of failure, and in words.
pub(super) type Refusal = (ProviderErrorKind, String);

/// What is sent.
pub(super) enum Request<'a> {
    Get,
    /// A JSON object.
    Post(&'a [u8]),
}

/// A body with status 200 or 204, wiped on drop.
pub(super) type Body = Zeroizing<Vec<u8>>;

/// See the module.
pub(super) struct Client {
    address: String,
    namespace: Option<String>,
    ca_bundle: Option<PathBuf>,
    attempt_timeout: Duration,
    operation_timeout: Duration,
    /// Throttled requests are tried again by whoever makes them.
    paced_by_caller: AtomicBool,
    agent: Mutex<Option<Agent>>,
}

impl Client {
    /// Connects to nothing yet.
    ///
    /// # Errors
    /// `Misconfigured` if there is no address, or secrets cannot be sent there.
    pub(super) fn new(settings: &VaultSettings) -> Result<Self, ProviderError> {
        let misconfigured = |why: String| ProviderError::new(ProviderErrorKind::Misconfigured, format!("Vault: {why}"));
        let address = settings.address.as_deref().unwrap_or_default().trim_end_matches('/');
        if address.is_empty() {
            let why = "its address is not known: name it with --vault-address, BAO_ADDR or VAULT_ADDR";
            return Err(misconfigured(why.to_owned()));
        }
        check_address(address).map_err(misconfigured)?;
        let namespace =
            settings.namespace.as_deref().map(|name| name.trim_matches('/')).filter(|name| !name.is_empty());
        if namespace.is_some_and(|name| !name.bytes().all(|byte| byte.is_ascii_graphic())) {
            return Err(misconfigured("the namespace is not one: no spaces, no letters beyond ASCII".to_owned()));
        }
        Ok(Self {
            address: address.to_owned(),
            namespace: namespace.map(str::to_owned),
            ca_bundle: settings.ca_bundle.clone(),
            attempt_timeout: settings.attempt_timeout,
            operation_timeout: settings.operation_timeout,
            paced_by_caller: AtomicBool::new(false),
            agent: Mutex::default(),
        })
    }

    pub(super) fn leave_pace_to_caller(&self) {
        self.paced_by_caller.store(true, Ordering::Relaxed);
    }

    /// Drops idle connections with their buffers; those in use go when their request ends.
    pub(super) fn hang_up(&self) {
        let agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(agent);
    }

    /// When an operation that begins now is given up.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.operation_timeout
    }

    /// Sends a request and, if the server cannot serve it now, again: a few times, until `deadline`. Whatever is asked here may be
    /// asked twice.
    pub(super) fn send(
        &self,
        path: &str,
        token: Option<&str>,
        request: &Request<'_>,
        deadline: Instant,
    ) -> Result<Body, Refusal> {
        let mut backoff = FIRST_BACKOFF;
        for attempt in 1.. {
            let refusal = match self.attempt(path, token, request, deadline) {
                Ok(body) => return Ok(body),
                Err(refusal) => refusal,
            };
            let again = match refusal.0 {
                ProviderErrorKind::Unavailable => true,
                ProviderErrorKind::Throttled => !self.paced_by_caller.load(Ordering::Relaxed),
                _ => false,
            };
            if !again || attempt == MAX_ATTEMPTS || Instant::now() + backoff >= deadline {
                return Err(refusal);
            }
            std::thread::sleep(backoff);
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
        Err((ProviderErrorKind::Unavailable, "no attempt was made".to_owned()))
    }

    fn attempt(
        &self,
        path: &str,
        token: Option<&str>,
        request: &Request<'_>,
        deadline: Instant,
    ) -> Result<Body, Refusal> {
        let left = deadline.saturating_duration_since(Instant::now()).min(self.attempt_timeout);
        if left.is_zero() {
            return Err((ProviderErrorKind::Unavailable, "no answer in time".to_owned()));
        }
        let agent = self.agent()?;
        let url = format!("{}/v1/{path}", self.address);
        let headers = [("X-Vault-Token", token), ("X-Vault-Namespace", self.namespace.as_deref())];
        let headers = headers.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let sent = match request {
            Request::Get => {
                let builder = headers.fold(agent.get(&url), |builder, (name, value)| builder.header(name, value));
                builder.header("X-Vault-Request", "true").config().timeout_global(Some(left)).build().call()
            }
            Request::Post(body) => {
                let builder = headers.fold(agent.post(&url), |builder, (name, value)| builder.header(name, value));
                let builder = builder.header("X-Vault-Request", "true").header("Content-Type", "application/json");
                builder.config().timeout_global(Some(left)).build().send(*body)
            }
        };
        let mut answer = sent.map_err(|error| self.unsent(&error))?;
        let status = answer.status().as_u16();
        let length = answer.body().content_length().unwrap_or(4096).min(MAX_ANSWER_LEN);
        let mut body = Zeroizing::new(Vec::with_capacity(usize::try_from(length).unwrap_or_default() + 1));
        let read =
            std::io::Read::read_to_end(&mut answer.body_mut().with_config().limit(MAX_ANSWER_LEN).reader(), &mut body);
        read.map_err(|error| (ProviderErrorKind::Unavailable, format!("the answer broke off: {error}")))?;
        match status {
            200 | 204 => Ok(body),
            _ => Err(refused(status, &body)),
        }
    }

    fn agent(&self) -> Result<Agent, Refusal> {
        let existing = self.agent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(agent) = existing {
            return Ok(agent);
        }
        let agent = self.build().map_err(|why| (ProviderErrorKind::Misconfigured, why))?;
        let mut slot = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(slot.get_or_insert(agent).clone())
    }

    fn build(&self) -> Result<Agent, String> {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT.min(self.attempt_timeout)))
            .timeout_resolve(Some(CONNECT_TIMEOUT.min(self.attempt_timeout)))
            .input_buffer_size(16 << 10)
            .output_buffer_size(16 << 10)
            .max_idle_connections(16)
            .max_idle_connections_per_host(16)
            .user_agent(concat!("kmsfs/", env!("CARGO_PKG_VERSION")));
        if !self.is_tls() {
            let config = config.proxy(None).build();
            return Ok(Agent::with_parts(config, DefaultConnector::default(), Localhost(DefaultResolver::default())));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = TlsConfig::builder().root_certs(self.roots()?).unversioned_rustls_crypto_provider(provider).build();
        let proxy = if goes_direct(&self.address) { None } else { Proxy::try_from_env() };
        Ok(config.proxy(proxy).https_only(true).tls_config(tls).build().new_agent())
    }

    fn is_tls(&self) -> bool {
        self.address.get(..8).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https://"))
    }

    /// The certificates of the file that the settings name, or those that the system trusts.
    fn roots(&self) -> Result<RootCerts, String> {
        let certificates = match &self.ca_bundle {
            Some(path) => read_bundle(path).map_err(|why| format!("the CA bundle {}: {why}", path.display()))?.1,
            None => rustls_native_certs::load_native_certs().certs,
        };
        if certificates.is_empty() {
            return Err("no certificate is trusted here: name a file of them with --vault-ca-bundle".to_owned());
        }
        let certificates: Vec<_> = certificates.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
        Ok(RootCerts::new_with_certs(&certificates))
    }

    /// What it means that there is no answer.
    fn unsent(&self, error: &ureq::Error) -> Refusal {
        let inner = match error {
            ureq::Error::Rustls(error) => Some(error),
            ureq::Error::Io(error) => error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()),
            _ => None,
        };
        let why = match (error, inner) {
            (_, Some(rustls::Error::InvalidCertificate(reason))) => {
                let why = format!(
                    "the certificate of {} is not trusted ({reason:?}): if it should be, name a file with its issuer in \
                     --vault-ca-bundle, BAO_CACERT or VAULT_CACERT",
                    self.address
                );
                return (ProviderErrorKind::Misconfigured, why);
            }
            (ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl, _) => {
                let why = format!("{} cannot be used: {error}", self.address);
                return (ProviderErrorKind::Misconfigured, why);
            }
            (ureq::Error::Timeout(_), _) => format!("no answer of {} in time", self.address),
            (ureq::Error::HostNotFound, _) => format!("the name of {} is not found", self.address),
            _ => format!("{} is not reached: {error}", self.address),
        };
        (ProviderErrorKind::Unavailable, why)
    }
}

/// Finds this machine under its own name, whatever the system's resolver says.
#[derive(Debug)]
struct Localhost(DefaultResolver);

impl Resolver for Localhost {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let Some(own) = uri.host().and_then(resolve_own) else { return self.0.resolve(uri, config, timeout) };
        let mut addresses = self.empty();
        own.into_iter().for_each(|own| addresses.push(SocketAddr::new(own, uri.port_u16().unwrap_or(80))));
        Ok(addresses)
    }
}

fn check_address(address: &str) -> Result<(), String> {
    check_url(address, is_own).map_err(|why| format!("the address {address:?}: {why}"))?;
    let plain = address.bytes().all(|byte| byte.is_ascii_graphic() && !b"@?#\\%".contains(&byte));
    if plain {
        Ok(())
    } else {
        Err("the address has no user, query or fragment: https://HOST[:PORT][/PATH]".to_owned())
    }
}

#[derive(Deserialize)]
struct Errors {
    #[serde(default)]
    errors: Vec<String>,
}

/// What a status means, with the server's words for it.
fn refused(status: u16, body: &[u8]) -> Refusal {
    let errors = serde_json::from_slice::<Errors>(body).map(|body| body.errors).unwrap_or_default().join("; ");
    let kind = classify(status, &errors);
    let words = if errors.is_empty() { "no reason is given".to_owned() } else { tame(&errors) };
    let why = match status {
        300..=399 => {
            "it is a standby that sends elsewhere: name the active server, or a load balancer that finds it".to_owned()
        }
        404 if errors.is_empty() => "there is no such key (status 404)".to_owned(),
        503 => format!("it is sealed or down (status 503: {words})"),
        _ => format!("{words} (status {status})"),
    };
    (kind, why)
}

fn classify(status: u16, errors: &str) -> ProviderErrorKind {
    const WORDS: [(&str, ProviderErrorKind); 14] = [
        ("encryption key not found", ProviderErrorKind::KeyNotFound),
        ("no handler for route", ProviderErrorKind::KeyNotFound),
        ("unsupported path", ProviderErrorKind::KeyNotFound),
        // The key was deleted and made anew: what its former self wrapped is gone.
        ("version is too new", ProviderErrorKind::KeyNotFound),
        ("too old", ProviderErrorKind::KeyUnusable),
        ("soft-deleted", ProviderErrorKind::KeyUnusable),
        ("message authentication failed", ProviderErrorKind::Tampered),
        ("invalid ciphertext", ProviderErrorKind::Tampered),
        ("could not decode ciphertext", ProviderErrorKind::Tampered),
        ("unable to decrypt", ProviderErrorKind::Tampered),
        ("key derivation", ProviderErrorKind::Misconfigured),
        ("non-AEAD", ProviderErrorKind::Misconfigured),
        ("not support", ProviderErrorKind::Misconfigured),
        ("sealed", ProviderErrorKind::Unavailable),
    ];
    let named = || WORDS.iter().find(|(words, _)| errors.contains(words)).map(|(_, kind)| *kind);
    match status {
        401 | 403 => ProviderErrorKind::Denied,
        429 => ProviderErrorKind::Throttled,
        // A standby, or a server that is behind another, will know better in a moment.
        300..=399 | 408 | 412 | 472 | 473 | 501.. => ProviderErrorKind::Unavailable,
        500 => named().unwrap_or(ProviderErrorKind::Unavailable),
        404 => ProviderErrorKind::KeyNotFound,
        _ => named().unwrap_or(ProviderErrorKind::BadAnswer),
    }
}

/// Words of the server on one line, at most [`MAX_WORDS`] characters, without what would steer a terminal.
fn tame(words: &str) -> String {
    let line = words.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().filter(|c| !c.is_control()).take(MAX_WORDS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(address: &str) -> VaultSettings {
        VaultSettings { address: Some(address.to_owned()), ..VaultSettings::default() }
    }

    #[test]
    fn secrets_go_to_servers_under_tls_or_on_this_machine() {
        for good in ["https://bao.example.com:8200", "https://bao/", "http://127.0.0.1:8200", "http://[::1]:8200"] {
            assert!(Client::new(&settings(good)).is_ok(), "{good}");
        }
        for bad in
            ["", "bao:8200", "http://10.0.0.1:8200", "https://u@bao", "https://bao?x", "https://bao#x", "https://b o"]
        {
            let error = Client::new(&settings(bad)).err().unwrap();
            assert_eq!(error.kind, ProviderErrorKind::Misconfigured, "{bad}");
        }
        let namespace = VaultSettings { namespace: Some("a b".to_owned()), ..settings("https://bao") };
        assert!(Client::new(&namespace).is_err());
    }

    #[test]
    fn localhost_is_this_machine_without_a_resolver() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = Client::new(&settings(&format!("http://localhost:{}", listener.local_addr().unwrap().port())));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            let length = std::io::Read::read(&mut stream, &mut request).unwrap();
            std::io::Write::write_all(&mut stream, b"HTTP/1.1 204 X\r\nContent-Length: 0\r\n\r\n").unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let client = client.unwrap();
        assert!(client.send("sys/health", None, &Request::Get, client.deadline()).is_ok());
        let request = server.join().unwrap();
        assert!(request.starts_with("GET /v1/sys/health HTTP/1.1") && request.contains("localhost"), "{request}");
    }

    #[test]
    fn words_of_the_server_decide_where_its_status_does_not() {
        let refused = |status, error: &str| refused(status, format!("{{\"errors\":[\"{error}\"]}}").as_bytes()).0;
        for (error, kind) in [
            ("encryption key not found", ProviderErrorKind::KeyNotFound),
            ("invalid ciphertext: version is too new", ProviderErrorKind::KeyNotFound),
            ("invalid ciphertext: no prefix", ProviderErrorKind::Tampered),
            ("cipher: message authentication failed", ProviderErrorKind::Tampered),
            ("ciphertext or signature version is disallowed by policy (too old)", ProviderErrorKind::KeyUnusable),
            ("refusing to use soft-deleted key", ProviderErrorKind::KeyUnusable),
            ("'[0].associated_data' provided for non-AEAD cipher suite rsa-2048", ProviderErrorKind::Misconfigured),
            ("something new", ProviderErrorKind::BadAnswer),
        ] {
            assert_eq!(refused(400, error), kind, "{error}");
        }
        for (status, kind) in [
            (403, ProviderErrorKind::Denied),
            (429, ProviderErrorKind::Throttled),
            (503, ProviderErrorKind::Unavailable),
            (307, ProviderErrorKind::Unavailable),
            (404, ProviderErrorKind::KeyNotFound),
        ] {
            assert_eq!(refused(status, "x"), kind, "{status}");
        }
    }

    #[test]
    fn what_the_server_says_does_not_steer_the_terminal() {
        assert_eq!(
            tame("1 error occurred:\n\t* permission \u{1b}[2Jdenied\n\n"),
            "1 error occurred: * permission [2Jdenied"
        );
        assert_eq!(tame(&"x".repeat(1000)).len(), MAX_WORDS);
    }
}
