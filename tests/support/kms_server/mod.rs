//! A small, fast KMS of the tests' own: the JSON protocol over HTTP/1.1 with keep-alive, plain or under TLS; real
//! AES-256-GCM bound to the encryption context; key states, Regions and signatures enforced as KMS does.
//!
//! Invariants: an answer depends on the request, the keys and the settings of [`KmsServer`] only; every request is
//! counted, refused ones too; nothing outlives the server. A connection has a thread of its own, so that latency is
//! that of a call and not of a queue.

mod acceptor;
mod failure;
mod input;
mod keys;
mod operations;
mod service;
pub(crate) mod sigv4;
pub(crate) mod tls;
pub(crate) mod wire;

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{digest, rand};
use serde_json::{Value, json};

pub(crate) use self::acceptor::Acceptor;
use self::service::{Bucket, Service, User};

/// The Region that [`KmsServer::create_key`] makes keys in.
pub(crate) const REGION: &str = "us-east-1";
/// The account that owns every key.
pub(crate) const ACCOUNT: &str = "111122223333";
/// The access key id that the server knows, as in `moto::environment`.
pub(crate) const ACCESS_KEY: &str = "test";
/// Its secret.
pub(crate) const SECRET: &str = "test";

/// What a server is started with. Latency and rate can be changed while it runs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    /// The port, or 0 for a free one.
    pub port: u16,
    /// How long every call takes at least.
    pub latency: Duration,
    /// Calls a second, beyond which it throttles; it saves up at most one second's worth.
    pub rate: Option<u32>,
    /// Whether to speak TLS.
    pub tls: bool,
}

/// A running server; on drop it stops, its connections close and its port refuses.
pub(crate) struct KmsServer {
    service: Arc<Service>,
    certificate: Option<tls::Identity>,
    acceptor: Acceptor,
}

/// A key of the server.
#[derive(Clone, Debug)]
pub(crate) struct CreatedKey {
    /// Its ARN.
    pub arn: String,
    /// Its id, the end of the ARN.
    pub id: String,
}

impl KmsServer {
    /// A server with the default options: plain, at full speed, on a free port.
    pub(crate) fn start() -> Self {
        Self::start_with(Options::default()).expect("a free port")
    }

    /// A server.
    ///
    /// # Errors
    /// The port is taken.
    pub(crate) fn start_with(options: Options) -> io::Result<Self> {
        let service = Arc::new(Service::new(options));
        let certificate = options.tls.then(tls::Identity::generate);
        let (answering, config) = (Arc::clone(&service), certificate.as_ref().map(tls::Identity::config));
        let acceptor = Acceptor::start(options.port, move |stream| match &config {
            None => answering.serve(stream),
            Some(config) => answering.serve(tls::accept(config, stream)?),
        })?;
        Ok(Self { service, certificate, acceptor })
    }

    /// The variables of an environment whose KMS it is.
    pub(crate) fn environment(&self) -> [(&'static str, String); 6] {
        [
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.to_owned()),
            ("AWS_REGION", REGION.to_owned()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
            ("NO_PROXY", "127.0.0.1".to_owned()),
            ("KMSFS_ENDPOINT_URL", self.endpoint()),
        ]
    }

    /// The URL for `endpoint` settings and `AWS_ENDPOINT_URL_KMS`.
    pub(crate) fn endpoint(&self) -> String {
        let scheme = if self.certificate.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.acceptor.address
    }

    /// Its certificate as PEM, which its clients have to trust.
    ///
    /// # Panics
    /// It does not speak TLS.
    pub(crate) fn certificate(&self) -> &str {
        &self.certificate.as_ref().expect("a server with TLS").pem
    }

    /// What each client offered that began a handshake.
    pub(crate) fn offers(&self) -> Vec<tls::Offer> {
        self.certificate.as_ref().map(tls::Identity::offers).unwrap_or_default()
    }

    /// A new key in [`REGION`].
    pub(crate) fn create_key(&self) -> CreatedKey {
        let created = self.administer("CreateKey", &json!({}));
        let field = |name: &str| created["KeyMetadata"][name].as_str().expect("a string").to_owned();
        CreatedKey { arn: field("Arn"), id: field("KeyId") }
    }

    /// Calls an operation in [`REGION`] as the owner of the account: not counted, delayed, throttled or denied.
    ///
    /// # Panics
    /// The operation fails.
    pub(crate) fn administer(&self, operation: &str, input: &Value) -> Value {
        match self.service.perform(operation, REGION, input) {
            Ok(answer) => answer,
            Err(failure) => panic!("{operation}: {}: {}", failure.code, failure.message),
        }
    }

    /// From now on every call takes this long at least.
    pub(crate) fn set_latency(&self, latency: Duration) {
        self.service.latency.store(nanoseconds(latency), Ordering::Relaxed);
    }

    /// From now on so many calls a second are answered; any number without one.
    pub(crate) fn set_rate(&self, rate: Option<u32>) {
        *locked(&self.service.bucket) = rate.map(Bucket::full);
    }

    /// From now on callers may not use `operation`.
    pub(crate) fn deny(&self, operation: &str) {
        locked(&self.service.denied).insert(operation.to_owned());
    }

    /// From now on callers may use `operation` again.
    pub(crate) fn allow(&self, operation: &str) {
        locked(&self.service.denied).remove(operation);
    }

    /// From now on it knows this access key too, whose owner may not use the `denied` operations.
    pub(crate) fn set_user(&self, access_key: &str, secret: &str, denied: &[&str]) {
        let denied = denied.iter().map(|operation| (*operation).to_owned()).collect();
        locked(&self.service.users).insert(access_key.to_owned(), User { secret: secret.to_owned(), denied });
    }

    /// How many calls of `operation` it has got, refused ones included.
    pub(crate) fn calls(&self, operation: &str) -> u64 {
        self.service.calls.iter().find(|(name, _)| *name == operation).map_or(0, |(_, n)| n.load(Ordering::SeqCst))
    }

    /// The actions that were used since this was asked last, each with the key as the caller named it; refused by a policy none.
    pub(crate) fn take_used(&self) -> BTreeSet<(String, String)> {
        std::mem::take(&mut *locked(&self.service.used))
    }

    /// How many calls it has got.
    pub(crate) fn all_calls(&self) -> u64 {
        self.service.calls.iter().map(|(_, count)| count.load(Ordering::SeqCst)).sum()
    }

    /// How many calls it has refused with `code`.
    pub(crate) fn failures(&self, code: &str) -> u64 {
        locked(&self.service.failures).get(code).copied().unwrap_or(0)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).expect("a nibble");
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn sha256(bytes: &[u8]) -> digest::Digest {
    digest::digest(&digest::SHA256, bytes)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("randomness");
    bytes
}
