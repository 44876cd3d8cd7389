//! A small, fast KMS of the tests' own: the JSON protocol over HTTP/1.1 with keep-alive, plain or under TLS; real
//! AES-256-GCM bound to the encryption context; key states, Regions and signatures enforced as KMS does.
//!
//! Invariants: an answer depends on the request, the keys and the settings of [`KmsServer`] only; every request is
//! counted, refused ones too; nothing outlives the server. A connection has a thread of its own, so that latency is
//! that of a call and not of a queue.
//!
//! Included by several test programs and an example with `#[path]`, each of which uses a part of it.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use aws_lc_rs::{digest, rand};
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use self::wire::{Request, Response};

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

    /// How many calls it has got.
    pub(crate) fn all_calls(&self) -> u64 {
        self.service.calls.iter().map(|(_, count)| count.load(Ordering::SeqCst)).sum()
    }

    /// How many calls it has refused with `code`.
    pub(crate) fn failures(&self, code: &str) -> u64 {
        locked(&self.service.failures).get(code).copied().unwrap_or(0)
    }
}

/// Runs `body` in a new process that executes only the test `name`, with the given environment and without the rest of
/// what configures the SDK: it takes credentials and trust from the environment, which a test program cannot change.
/// What stands before this call in the test runs in both processes.
pub(crate) fn isolated_in(environment: &[(&str, &str)], name: &str, body: impl FnOnce()) {
    const ISOLATED: &str = "KMSFS_TEST_ISOLATED";
    if std::env::var_os(ISOLATED).is_some() {
        return body();
    }
    let mut command = Command::new(std::env::current_exe().expect("a program"));
    command.args(["--exact", name, "--nocapture"]);
    for (variable, _) in std::env::vars_os() {
        let name = variable.to_string_lossy().to_ascii_uppercase();
        if name.starts_with("AWS_") || name.starts_with("SSL_CERT") || name.ends_with("_PROXY") {
            command.env_remove(variable);
        }
    }
    let output = command.env(ISOLATED, "1").envs(environment.iter().copied()).output().expect("a process");
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success() && stdout.contains("1 passed"), "{name}: {stdout}\n{stderr}");
}

/// A failure as KMS names it.
struct Failure {
    status: u16,
    code: &'static str,
    message: String,
}

type Outcome = Result<Value, Failure>;

fn failure(code: &'static str, message: impl Into<String>) -> Failure {
    let status = match code {
        "DryRunOperationException" => 412,
        "KMSInternalException" => 500,
        _ => 400,
    };
    Failure { status, code, message: message.into() }
}

fn invalid(message: impl Into<String>) -> Failure {
    failure("ValidationException", message)
}

/// The operations it knows; each is counted.
const OPERATIONS: [&str; 15] = [
    "CreateKey",
    "CreateAlias",
    "ReplicateKey",
    "GenerateDataKey",
    "GenerateDataKeyWithoutPlaintext",
    "Decrypt",
    "Encrypt",
    "ReEncrypt",
    "DescribeKey",
    "DisableKey",
    "EnableKey",
    "ScheduleKeyDeletion",
    "CancelKeyDeletion",
    "EnableKeyRotation",
    "GetKeyRotationStatus",
];

/// Another user than the one that every server knows.
struct User {
    secret: String,
    denied: BTreeSet<String>,
}

/// From a request to its answer.
struct Service {
    vault: RwLock<vault::Vault>,
    /// In nanoseconds.
    latency: AtomicU64,
    bucket: Mutex<Option<Bucket>>,
    denied: Mutex<BTreeSet<String>>,
    /// By access key.
    users: Mutex<BTreeMap<String, User>>,
    calls: [(&'static str, AtomicU64); OPERATIONS.len()],
    failures: Mutex<BTreeMap<&'static str, u64>>,
    requests: AtomicU64,
}

impl Service {
    fn new(options: Options) -> Self {
        Self {
            vault: RwLock::default(),
            latency: AtomicU64::new(nanoseconds(options.latency)),
            bucket: Mutex::new(options.rate.map(Bucket::full)),
            denied: Mutex::default(),
            users: Mutex::default(),
            calls: OPERATIONS.map(|operation| (operation, AtomicU64::new(0))),
            failures: Mutex::default(),
            requests: AtomicU64::new(0),
        }
    }

    /// Answers the requests of one connection until either side ends it.
    fn serve(&self, stream: impl Read + Write) -> io::Result<()> {
        let mut reader = BufReader::new(stream);
        while let Some(request) = Request::read(&mut reader)? {
            let started = Instant::now();
            let response = self.answer(&request);
            let latency = Duration::from_nanos(self.latency.load(Ordering::Relaxed));
            thread::sleep(latency.saturating_sub(started.elapsed()));
            reader.get_mut().write_all(&response.encode())?;
            reader.get_mut().flush()?;
            if request.is_last {
                break;
            }
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> Response {
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        let (status, body) = match self.outcome(request) {
            // Operations without a result answer nothing at all, as those of KMS.
            Ok(Value::Null) => (200, String::new()),
            Ok(answer) => (200, answer.to_string()),
            Err(Failure { status, code, message }) => {
                *locked(&self.failures).entry(code).or_default() += 1;
                (status, json!({ "__type": code, "message": message }).to_string())
            }
        };
        Response::new(status, &format!("00000000-0000-4000-8000-{id:012x}"), body.into_bytes())
    }

    /// The checks in the order of KMS: what is asked, by whom, how often, whether they may.
    fn outcome(&self, request: &Request) -> Outcome {
        let operation = request.operation().unwrap_or_default();
        let known = self.calls.iter().find(|(name, _)| *name == operation);
        let Some((_, count)) = known.filter(|_| request.method == "POST" && request.path == "/") else {
            return Err(failure("UnknownOperationException", ""));
        };
        count.fetch_add(1, Ordering::SeqCst);
        let (region, access_key) = sigv4::verify(request, |access_key| self.secret_of(access_key))?;
        if locked(&self.bucket).as_mut().is_some_and(|bucket| !bucket.take()) {
            let message = "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.";
            return Err(failure("ThrottlingException", message));
        }
        let users = locked(&self.users);
        let denied = users.get(&access_key).is_some_and(|user| user.denied.contains(operation));
        drop(users);
        if denied || locked(&self.denied).contains(operation) {
            let message =
                format!("User: arn:aws:iam::{ACCOUNT}:user/{access_key} is not authorized to perform: kms:{operation}");
            return Err(failure("AccessDeniedException", message));
        }
        let input = serde_json::from_slice(&request.body);
        let input = input.map_err(|error| failure("SerializationException", error.to_string()))?;
        self.perform(operation, &region, &input)
    }

    fn secret_of(&self, access_key: &str) -> Option<String> {
        if access_key == ACCESS_KEY {
            return Some(SECRET.to_owned());
        }
        locked(&self.users).get(access_key).map(|user| user.secret.clone())
    }

    fn perform(&self, operation: &str, region: &str, input: &Value) -> Outcome {
        let read = || self.vault.read().unwrap_or_else(PoisonError::into_inner);
        let write = || self.vault.write().unwrap_or_else(PoisonError::into_inner);
        match operation {
            "CreateKey" => write().create_key(region, input),
            "CreateAlias" => write().create_alias(region, input),
            "ReplicateKey" => write().replicate_key(region, input),
            "DisableKey" => write().set_enabled(region, input, false),
            "EnableKey" => write().set_enabled(region, input, true),
            "ScheduleKeyDeletion" => write().schedule_deletion(region, input),
            "CancelKeyDeletion" => write().cancel_deletion(region, input),
            "EnableKeyRotation" => write().enable_rotation(region, input),
            "GenerateDataKey" => read().generate_data_key(region, input, true),
            "GenerateDataKeyWithoutPlaintext" => read().generate_data_key(region, input, false),
            "Decrypt" => read().decrypt(region, input),
            "Encrypt" => read().encrypt(region, input),
            "ReEncrypt" => read().re_encrypt(region, input),
            "DescribeKey" => read().describe_key(region, input),
            "GetKeyRotationStatus" => read().rotation_status(region, input),
            _ => Err(failure("UnknownOperationException", operation)),
        }
    }
}

/// A token bucket that holds one second's worth.
struct Bucket {
    rate: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn full(rate: u32) -> Self {
        Self { rate: f64::from(rate), tokens: f64::from(rate), filled: Instant::now() }
    }

    fn take(&mut self) -> bool {
        let now = Instant::now();
        self.tokens = (self.tokens + self.rate * (now - self.filled).as_secs_f64()).min(self.rate);
        self.filled = now;
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }
}

/// Accepts connections and gives each a thread; on drop it stops, and its connections are shut down.
pub(crate) struct Acceptor {
    /// Where it listens.
    pub address: SocketAddr,
    open: Arc<Open>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Open {
    stopping: AtomicBool,
    /// By the address of the peer.
    streams: Mutex<BTreeMap<SocketAddr, TcpStream>>,
}

impl Acceptor {
    /// Listens on 127.0.0.1 and runs `serve` on each connection; it is closed when `serve` returns.
    ///
    /// # Errors
    /// The port is taken.
    pub(crate) fn start(
        port: u16,
        serve: impl Fn(TcpStream) -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", port))?;
        let address = listener.local_addr()?;
        let open = Arc::new(Open::default());
        let (accepting, serve) = (Arc::clone(&open), Arc::new(serve));
        let thread = thread::spawn(move || {
            while let Ok((stream, peer)) = listener.accept() {
                if accepting.stopping.load(Ordering::SeqCst) {
                    break;
                }
                let (accepting, serve) = (Arc::clone(&accepting), Arc::clone(&serve));
                // A client that hangs up early, or does not trust the certificate, is the client's business.
                thread::spawn(move || drop(accepting.serve(stream, peer, &*serve)));
            }
        });
        Ok(Self { address, open, thread: Some(thread) })
    }
}

impl Open {
    fn serve(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        serve: impl Fn(TcpStream) -> io::Result<()>,
    ) -> io::Result<()> {
        stream.set_nodelay(true)?;
        locked(&self.streams).insert(peer, stream.try_clone()?);
        let result = if self.stopping.load(Ordering::SeqCst) { Ok(()) } else { serve(stream) };
        locked(&self.streams).remove(&peer);
        result
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.open.stopping.store(true, Ordering::SeqCst);
        // Wakes the thread, whose listener then closes.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for stream in locked(&self.open.streams).values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> digest::Digest {
    digest::digest(&digest::SHA256, bytes)
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).expect("randomness");
    bytes
}

/// Requests and responses of HTTP/1.1 with known lengths: what the SDK sends and what servers of KMS answer.
pub(crate) mod wire {
    use super::{BufRead, Read, io};

    const MAX_LINE: u64 = 64 << 10;
    const MAX_BODY: u64 = 1 << 20;

    /// A request.
    #[derive(Clone, Debug, Default)]
    pub(crate) struct Request {
        /// `POST` for all that KMS offers.
        pub method: String,
        /// With the query.
        pub path: String,
        /// In order, names in lower case.
        pub headers: Vec<(String, String)>,
        /// The whole body.
        pub body: Vec<u8>,
        /// Whether the client wants the connection closed after the answer.
        pub is_last: bool,
    }

    impl Request {
        /// The next request, or `None` if the client is done.
        pub(crate) fn read(reader: &mut impl BufRead) -> io::Result<Option<Self>> {
            let Some(line) = line(reader)? else { return Ok(None) };
            let mut words = line.split(' ');
            let [method, path, version] = [(); 3].map(|()| words.next().unwrap_or_default().to_owned());
            let headers = headers(reader)?;
            let length = header(&headers, "content-length").unwrap_or("0");
            let body = body(reader, length.parse().map_err(|_| malformed("a length"))?)?;
            let is_last = version != "HTTP/1.1" || closes(&headers);
            Ok(Some(Self { method, path, headers, body, is_last }))
        }

        /// The value of a header, by its name in lower case.
        pub(crate) fn header(&self, name: &str) -> Option<&str> {
            header(&self.headers, name)
        }

        /// The operation of KMS that it asks for.
        pub(crate) fn operation(&self) -> Option<&str> {
            self.header("x-amz-target")?.strip_prefix("TrentService.")
        }

        /// As it goes over the wire.
        pub(crate) fn encode(&self) -> Vec<u8> {
            encode(&format!("{} {} HTTP/1.1", self.method, self.path), &self.headers, &self.body)
        }
    }

    /// A response.
    #[derive(Clone, Debug)]
    pub(crate) struct Response {
        /// The status.
        pub status: u16,
        /// In order, names in lower case.
        pub headers: Vec<(String, String)>,
        /// The whole body.
        pub body: Vec<u8>,
    }

    impl Response {
        /// An answer as KMS gives it.
        pub(crate) fn new(status: u16, request_id: &str, body: Vec<u8>) -> Self {
            let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amzn-requestid", request_id)];
            let mut response =
                Self { status, headers: headers.map(|(n, v)| (n.to_owned(), v.to_owned())).to_vec(), body: Vec::new() };
            response.set_body(body);
            response
        }

        /// The next response.
        pub(crate) fn read(reader: &mut impl BufRead) -> io::Result<Self> {
            let line = line(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
            let status = status.ok_or_else(|| malformed("a status"))?;
            let headers = headers(reader)?;
            let body = match header(&headers, "content-length").map(str::parse) {
                Some(Ok(length)) => body(reader, length)?,
                Some(Err(_)) => return Err(malformed("a length")),
                None => {
                    let mut body = Vec::new();
                    reader.take(MAX_BODY).read_to_end(&mut body)?;
                    body
                }
            };
            Ok(Self { status, headers, body })
        }

        /// Replaces the body, and its length.
        pub(crate) fn set_body(&mut self, body: Vec<u8>) {
            self.headers.retain(|(name, _)| name != "content-length");
            self.headers.push(("content-length".to_owned(), body.len().to_string()));
            self.body = body;
        }

        /// The value of a header, by its name in lower case.
        pub(crate) fn header(&self, name: &str) -> Option<&str> {
            header(&self.headers, name)
        }

        /// Whether the server closes the connection after it.
        pub(crate) fn is_last(&self) -> bool {
            closes(&self.headers) || self.header("content-length").is_none()
        }

        /// As it goes over the wire.
        pub(crate) fn encode(&self) -> Vec<u8> {
            encode(&format!("HTTP/1.1 {} Answer", self.status), &self.headers, &self.body)
        }
    }

    fn encode(first_line: &str, headers: &[(String, String)], body: &[u8]) -> Vec<u8> {
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        [first_line.as_bytes(), b"\r\n", headers.as_bytes(), b"\r\n", body].concat()
    }

    /// A line without its end, or `None` at the end of the stream.
    fn line(reader: &mut impl BufRead) -> io::Result<Option<String>> {
        let mut line = String::new();
        match reader.take(MAX_LINE).read_line(&mut line)? {
            0 => Ok(None),
            _ => line.strip_suffix("\r\n").map(|line| Some(line.to_owned())).ok_or_else(|| malformed("a line")),
        }
    }

    fn headers(reader: &mut impl BufRead) -> io::Result<Vec<(String, String)>> {
        let mut headers = Vec::new();
        loop {
            let line = line(reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            if line.is_empty() {
                return Ok(headers);
            }
            let (name, value) = line.split_once(':').ok_or_else(|| malformed("a header"))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    fn body(reader: &mut impl BufRead, length: u64) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        match reader.take(length.min(MAX_BODY)).read_to_end(&mut body)? as u64 {
            read if read == length => Ok(body),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
        headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn closes(headers: &[(String, String)]) -> bool {
        header(headers, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    fn malformed(what: &str) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, format!("{what} is malformed"))
    }
}

/// Signature Version 4, as a server checks it and a client makes it.
pub(crate) mod sigv4 {
    use aws_lc_rs::{constant_time, hmac};

    use super::wire::Request;
    use super::{ACCESS_KEY, Failure, failure, hex, now, sha256};

    const ALGORITHM: &str = "AWS4-HMAC-SHA256";
    /// How far the clocks may differ, in seconds.
    const MAX_SKEW: u64 = 300;
    /// What a signature must cover, or a request could be used for another operation, host or time.
    const REQUIRED: [&str; 3] = ["host", "x-amz-date", "x-amz-target"];

    /// Checks a request's signature, and returns the Region it was made for and the access key.
    pub(super) fn verify(
        request: &Request,
        secret_of: impl Fn(&str) -> Option<String>,
    ) -> Result<(String, String), Failure> {
        let missing = || failure("MissingAuthenticationTokenException", "Missing Authentication Token");
        let authorization = request.header("authorization").ok_or_else(missing)?;
        let incomplete = || failure("IncompleteSignatureException", "Authorization header is incomplete");
        let fields = authorization.strip_prefix(ALGORITHM).ok_or_else(incomplete)?;
        let field = |name: &str| fields.split(',').find_map(|field| field.trim().strip_prefix(name)?.strip_prefix('='));
        let [Some(credential), Some(signed), Some(signature)] = ["Credential", "SignedHeaders", "Signature"].map(field)
        else {
            return Err(incomplete());
        };
        let (access_key, scope) = credential.split_once('/').ok_or_else(incomplete)?;
        let unknown =
            || failure("UnrecognizedClientException", "The security token included in the request is invalid.");
        let secret = secret_of(access_key).ok_or_else(unknown)?;
        let invalid = |message: &str| failure("InvalidSignatureException", message);
        let [day, region, "kms", "aws4_request"] = scope.split('/').collect::<Vec<_>>()[..] else {
            return Err(invalid("Credential should be scoped to correct service: 'kms'."));
        };
        let signed: Vec<_> = signed.split(';').collect();
        if let Some(name) = REQUIRED.into_iter().find(|name| !signed.contains(name)) {
            return Err(invalid(&format!("'{name}' must be a 'SignedHeader' in the AWS Authorization.")));
        }
        let date = request.header("x-amz-date").unwrap_or_default();
        if date < &*timestamp(now() - MAX_SKEW) || date > &*timestamp(now() + MAX_SKEW) || !date.starts_with(day) {
            return Err(invalid(&format!("Signature expired: {date} is not near {}", timestamp(now()))));
        }
        let expected = signature_of(request, scope, &signed, &secret);
        if constant_time::verify_slices_are_equal(expected.as_bytes(), signature.as_bytes()).is_err() {
            return Err(invalid("The request signature we calculated does not match the signature you provided."));
        }
        Ok((region.to_owned(), access_key.to_owned()))
    }

    /// A signed request for an operation of KMS.
    pub(crate) fn request(host: &str, region: &str, secret: &str, operation: &str, body: &str) -> Request {
        let date = timestamp(now());
        let headers = [
            ("content-type", "application/x-amz-json-1.1"),
            ("host", host),
            ("x-amz-date", &date),
            ("x-amz-target", &format!("TrentService.{operation}")),
        ];
        let signed = headers.map(|(name, _)| name);
        let mut request = Request {
            method: "POST".to_owned(),
            path: "/".to_owned(),
            headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            body: body.into(),
            is_last: false,
        };
        let scope = format!("{}/{region}/kms/aws4_request", &date[..8]);
        let signature = signature_of(&request, &scope, &signed, secret);
        let signed = signed.join(";");
        let authorization =
            format!("{ALGORITHM} Credential={ACCESS_KEY}/{scope}, SignedHeaders={signed}, Signature={signature}");
        request.headers.push(("authorization".to_owned(), authorization));
        request.headers.push(("content-length".to_owned(), request.body.len().to_string()));
        request
    }

    /// The signature in hexadecimal. A query is not part of any request to KMS.
    pub(crate) fn signature_of(request: &Request, scope: &str, signed: &[&str], secret: &str) -> String {
        let header = |name: &&str| {
            let value = request.header(name).unwrap_or_default();
            format!("{name}:{}\n", value.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        let headers: String = signed.iter().map(header).collect();
        let (method, path, signed) = (&request.method, &request.path, signed.join(";"));
        let body = hex(sha256(&request.body).as_ref());
        let canonical = format!("{method}\n{path}\n\n{headers}\n{signed}\n{body}");
        let date = request.header("x-amz-date").unwrap_or_default();
        let text = format!("{ALGORITHM}\n{date}\n{scope}\n{}", hex(sha256(canonical.as_bytes()).as_ref()));
        let key = scope.split('/').fold(format!("AWS4{secret}").into_bytes(), |key, part| mac(&key, part));
        hex(&mac(&key, &text))
    }

    fn mac(key: &[u8], text: &str) -> Vec<u8> {
        hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text.as_bytes()).as_ref().to_vec()
    }

    /// Seconds since 1970 as `YYYYMMDDTHHMMSSZ`, which sorts by time. The date by Hinnant's `civil_from_days`.
    pub(crate) fn timestamp(seconds: u64) -> String {
        let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted + 2) / 5 + 1;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
    }
}

/// The keys, and what is done with them. Wrapped keys are as long as those of KMS: 167 bytes for a data key that it
/// made, 184 for one that it was given.
mod vault {
    use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    use base64::Engine as _;

    use super::{
        ACCOUNT, Arc, BASE64, BTreeMap, Failure, Outcome, Value, failure, hex, invalid, json, now, random, sha256,
    };

    const MAX_PLAINTEXT: usize = 4096;
    const MAX_CIPHERTEXT: usize = 6144;
    const HANDLE_LEN: usize = 32;
    const NONCE_LEN: usize = 12;
    const TAG_LEN: usize = 16;
    /// Before the handle: of what KMS made itself, and of what it was given.
    const GENERATED: [u8; 5] = [1, 1, 1, 0, 0x78];
    const GIVEN: [u8; 5] = [1, 2, 1, 0, 0x78];
    /// Between handle and nonce, in the place of the real one's ASN.1; zeros, and authenticated.
    const GENERATED_FILL: usize = 70;
    const GIVEN_FILL: usize = 87;

    /// Keys and aliases by Region.
    #[derive(Default)]
    pub(super) struct Vault {
        keys: BTreeMap<(String, String), Key>,
        aliases: BTreeMap<(String, String), String>,
    }

    struct Key {
        arn: String,
        id: String,
        state: State,
        is_rotated: bool,
        created: u64,
        material: Arc<Material>,
    }

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum State {
        Enabled,
        Disabled,
        PendingDeletion { at: u64 },
    }

    /// What replicas share.
    struct Material {
        /// Names the key in what it wrapped.
        handle: [u8; HANDLE_LEN],
        key: LessSafeKey,
    }

    impl Vault {
        pub(super) fn create_key(&mut self, region: &str, input: &Value) -> Outcome {
            if text(input, "KeySpec").is_some_and(|spec| spec != "SYMMETRIC_DEFAULT") {
                return Err(failure("UnsupportedOperationException", "only symmetric encryption keys"));
            }
            let id = if flag(input, "MultiRegion") { format!("mrk-{}", hex(&random::<16>())) } else { uuid() };
            let key = UnboundKey::new(&AES_256_GCM, &random::<32>()).map(LessSafeKey::new).expect("32 bytes");
            let handle = sha256(id.as_bytes()).as_ref().try_into().expect("32 bytes");
            Ok(json!({ "KeyMetadata": self.add(region, id, Arc::new(Material { handle, key })) }))
        }

        pub(super) fn replicate_key(&mut self, region: &str, input: &Value) -> Outcome {
            let replica = text(input, "ReplicaRegion").ok_or_else(|| invalid("ReplicaRegion is missing"))?.to_owned();
            let key = self.resolve(region, input, "KeyId")?;
            if !key.id.starts_with("mrk-") {
                return Err(failure("UnsupportedOperationException", format!("{} is not multi-Region", key.arn)));
            }
            let (id, material) = (key.id.clone(), Arc::clone(&key.material));
            if self.keys.contains_key(&(replica.clone(), id.clone())) {
                return Err(failure("AlreadyExistsException", format!("{id} exists in {replica}")));
            }
            Ok(json!({ "ReplicaKeyMetadata": self.add(&replica, id, material) }))
        }

        fn add(&mut self, region: &str, id: String, material: Arc<Material>) -> Value {
            let arn = format!("arn:aws:kms:{region}:{ACCOUNT}:key/{id}");
            let key = Key { arn, id: id.clone(), state: State::Enabled, is_rotated: false, created: now(), material };
            let metadata = key.metadata();
            self.keys.insert((region.to_owned(), id), key);
            metadata
        }

        pub(super) fn create_alias(&mut self, region: &str, input: &Value) -> Outcome {
            let alias = text(input, "AliasName").filter(|name| name.starts_with("alias/"));
            let alias = alias.ok_or_else(|| invalid("Invalid identifier"))?;
            let id = self.resolve(region, input, "TargetKeyId")?.id.clone();
            let name = (region.to_owned(), alias.to_owned());
            if self.aliases.contains_key(&name) {
                let message = format!("An alias with the name arn:aws:kms:{region}:{ACCOUNT}:{alias} already exists");
                return Err(failure("AlreadyExistsException", message));
            }
            self.aliases.insert(name, id);
            Ok(Value::Null)
        }

        pub(super) fn set_enabled(&mut self, region: &str, input: &Value, enabled: bool) -> Outcome {
            let key = self.resolve_mut(region, input)?;
            key.check_not_pending()?;
            key.state = if enabled { State::Enabled } else { State::Disabled };
            Ok(Value::Null)
        }

        pub(super) fn schedule_deletion(&mut self, region: &str, input: &Value) -> Outcome {
            let days = input.get("PendingWindowInDays").map_or(Some(30), Value::as_u64);
            let days = days.filter(|days| (7..=30).contains(days));
            let days = days.ok_or_else(|| invalid("PendingWindowInDays must be between 7 and 30"))?;
            let key = self.resolve_mut(region, input)?;
            key.check_not_pending()?;
            let at = now() + days * 86_400;
            key.state = State::PendingDeletion { at };
            let state = key.state.name();
            Ok(json!({ "KeyId": key.arn, "DeletionDate": at, "KeyState": state, "PendingWindowInDays": days }))
        }

        pub(super) fn cancel_deletion(&mut self, region: &str, input: &Value) -> Outcome {
            let key = self.resolve_mut(region, input)?;
            if key.check_not_pending().is_ok() {
                return Err(failure("KMSInvalidStateException", format!("{} is not pending deletion.", key.arn)));
            }
            key.state = State::Disabled;
            Ok(json!({ "KeyId": key.arn }))
        }

        pub(super) fn enable_rotation(&mut self, region: &str, input: &Value) -> Outcome {
            let key = self.resolve_mut(region, input)?;
            key.check_usable()?;
            key.is_rotated = true;
            Ok(Value::Null)
        }

        pub(super) fn rotation_status(&self, region: &str, input: &Value) -> Outcome {
            let key = self.resolve(region, input, "KeyId")?;
            key.check_not_pending()?;
            Ok(json!({ "KeyId": key.arn, "KeyRotationEnabled": key.is_rotated }))
        }

        pub(super) fn describe_key(&self, region: &str, input: &Value) -> Outcome {
            Ok(json!({ "KeyMetadata": self.resolve(region, input, "KeyId")?.metadata() }))
        }

        pub(super) fn generate_data_key(&self, region: &str, input: &Value, with_plaintext: bool) -> Outcome {
            let key = self.resolve(region, input, "KeyId")?;
            let length = match (text(input, "KeySpec"), input.get("NumberOfBytes").map(Value::as_u64)) {
                (Some("AES_256"), None) => 32,
                (Some("AES_128"), None) => 16,
                (None, Some(Some(length @ 1..=1024))) => usize::try_from(length).expect("at most 1024"),
                _ => return Err(invalid("Please specify either number of bytes or key spec.")),
            };
            key.check_usable()?;
            check_dry_run(input)?;
            let data_key = &random::<1024>()[..length];
            let wrapped = key.material.wrap(GENERATED, GENERATED_FILL, data_key, &context(input, "EncryptionContext")?);
            let mut answer = json!({ "KeyId": key.arn, "CiphertextBlob": BASE64.encode(wrapped) });
            if with_plaintext {
                answer["Plaintext"] = BASE64.encode(data_key).into();
            }
            Ok(answer)
        }

        pub(super) fn encrypt(&self, region: &str, input: &Value) -> Outcome {
            let key = self.resolve(region, input, "KeyId")?;
            let plaintext = bytes(input, "Plaintext", MAX_PLAINTEXT)?;
            key.check_usable()?;
            check_dry_run(input)?;
            let wrapped = key.material.wrap(GIVEN, GIVEN_FILL, &plaintext, &context(input, "EncryptionContext")?);
            let wrapped = BASE64.encode(wrapped);
            Ok(json!({ "KeyId": key.arn, "CiphertextBlob": wrapped, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT" }))
        }

        pub(super) fn decrypt(&self, region: &str, input: &Value) -> Outcome {
            let context = context(input, "EncryptionContext")?;
            let (key, plaintext) = self.unwrap(region, input, "KeyId", &context)?;
            check_dry_run(input)?;
            let plaintext = BASE64.encode(plaintext);
            Ok(json!({ "KeyId": key.arn, "Plaintext": plaintext, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT" }))
        }

        pub(super) fn re_encrypt(&self, region: &str, input: &Value) -> Outcome {
            let from = context(input, "SourceEncryptionContext")?;
            let to = context(input, "DestinationEncryptionContext")?;
            let destination = self.resolve(region, input, "DestinationKeyId")?;
            let (source, plaintext) = self.unwrap(region, input, "SourceKeyId", &from)?;
            destination.check_usable()?;
            check_dry_run(input)?;
            let wrapped = destination.material.wrap(GIVEN, GIVEN_FILL, &plaintext, &to);
            Ok(json!({
                "CiphertextBlob": BASE64.encode(wrapped),
                "SourceKeyId": source.arn,
                "KeyId": destination.arn,
                "SourceEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
                "DestinationEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
            }))
        }

        /// The key that wrapped the ciphertext in `input`, which must be the one that `name` names if it is given, and
        /// the plaintext.
        fn unwrap(&self, region: &str, input: &Value, name: &str, aad: &[u8]) -> Result<(&Key, Vec<u8>), Failure> {
            let wrapped = bytes(input, "CiphertextBlob", MAX_CIPHERTEXT)?;
            let asked = input.get(name).map(|_| self.resolve(region, input, name)).transpose()?;
            let handle = handle(&wrapped).ok_or_else(|| failure("InvalidCiphertextException", ""))?;
            let in_region = |key: &&Key| key.region() == region;
            let Some(key) = self.keys.values().filter(in_region).find(|key| key.material.handle == handle) else {
                let message = "The ciphertext refers to a customer master key that does not exist, does not exist in \
                               this region, or you are not allowed to access.";
                return Err(failure("AccessDeniedException", message));
            };
            if asked.is_some_and(|asked| asked.arn != key.arn) {
                let message = "The key ID in the request does not identify a CMK that can perform this operation.";
                return Err(failure("IncorrectKeyException", message));
            }
            key.check_usable()?;
            let plaintext =
                key.material.unwrap(wrapped, aad).ok_or_else(|| failure("InvalidCiphertextException", ""))?;
            Ok((key, plaintext))
        }

        /// The key that the field `name` names: by id, ARN, alias or alias ARN.
        fn resolve(&self, region: &str, input: &Value, name: &str) -> Result<&Key, Failure> {
            let id = self.id(region, input, name)?;
            let unknown = || {
                failure("NotFoundException", format!("Key 'arn:aws:kms:{region}:{ACCOUNT}:key/{id}' does not exist"))
            };
            self.keys.get(&(region.to_owned(), id.clone())).ok_or_else(unknown)
        }

        /// The key that `KeyId` names, to change it.
        fn resolve_mut(&mut self, region: &str, input: &Value) -> Result<&mut Key, Failure> {
            let id = self.resolve(region, input, "KeyId")?.id.clone();
            Ok(self.keys.get_mut(&(region.to_owned(), id)).expect("resolved"))
        }

        fn id(&self, region: &str, input: &Value, name: &str) -> Result<String, Failure> {
            let asked = text(input, name).filter(|asked| !asked.is_empty());
            let asked = asked.ok_or_else(|| invalid(format!("'{name}' must not be null")))?;
            let resource = match asked.split(':').collect::<Vec<_>>()[..] {
                [resource] => resource,
                ["arn", "aws", "kms", of, account, resource] => {
                    if (of, account) != (region, ACCOUNT) {
                        return Err(failure("NotFoundException", format!("Invalid arn {of}")));
                    }
                    resource.strip_prefix("key/").unwrap_or(resource)
                }
                _ => return Err(failure("NotFoundException", format!("Invalid keyId {asked}"))),
            };
            if !resource.starts_with("alias/") {
                return Ok(resource.to_owned());
            }
            let unknown = || {
                let message = format!("Alias arn:aws:kms:{region}:{ACCOUNT}:{resource} is not found.");
                failure("NotFoundException", message)
            };
            self.aliases.get(&(region.to_owned(), resource.to_owned())).cloned().ok_or_else(unknown)
        }
    }

    impl Key {
        fn region(&self) -> &str {
            self.arn.split(':').nth(3).unwrap_or_default()
        }

        fn check_usable(&self) -> Result<(), Failure> {
            match self.state {
                State::Enabled => Ok(()),
                State::Disabled => Err(failure("DisabledException", format!("{} is disabled.", self.arn))),
                State::PendingDeletion { .. } => self.check_not_pending(),
            }
        }

        fn check_not_pending(&self) -> Result<(), Failure> {
            match self.state {
                State::PendingDeletion { .. } => {
                    Err(failure("KMSInvalidStateException", format!("{} is pending deletion.", self.arn)))
                }
                State::Enabled | State::Disabled => Ok(()),
            }
        }

        fn metadata(&self) -> Value {
            let mut metadata = json!({
                "AWSAccountId": ACCOUNT,
                "KeyId": self.id,
                "Arn": self.arn,
                "CreationDate": self.created,
                "Enabled": self.state == State::Enabled,
                "Description": "",
                "KeyUsage": "ENCRYPT_DECRYPT",
                "KeyState": self.state.name(),
                "Origin": "AWS_KMS",
                "KeyManager": "CUSTOMER",
                "KeySpec": "SYMMETRIC_DEFAULT",
                "EncryptionAlgorithms": ["SYMMETRIC_DEFAULT"],
                "MultiRegion": self.id.starts_with("mrk-"),
            });
            if let State::PendingDeletion { at } = self.state {
                metadata["DeletionDate"] = at.into();
            }
            metadata
        }
    }

    impl State {
        fn name(self) -> &'static str {
            match self {
                Self::Enabled => "Enabled",
                Self::Disabled => "Disabled",
                Self::PendingDeletion { .. } => "PendingDeletion",
            }
        }
    }

    impl Material {
        /// `prefix | handle | fill | nonce | ciphertext and tag`; everything before the nonce is associated data, before
        /// the context.
        fn wrap(&self, prefix: [u8; 5], fill: usize, plaintext: &[u8], context: &[u8]) -> Vec<u8> {
            let mut wrapped = [&prefix[..], &self.handle, &vec![0; fill]].concat();
            let aad = [&wrapped, context].concat();
            let nonce = random::<NONCE_LEN>();
            let mut sealed = plaintext.to_vec();
            let nonce_of_key = Nonce::assume_unique_for_key(nonce);
            self.key.seal_in_place_append_tag(nonce_of_key, Aad::from(aad), &mut sealed).expect("a short plaintext");
            wrapped.extend_from_slice(&nonce);
            wrapped.append(&mut sealed);
            wrapped
        }

        fn unwrap(&self, wrapped: Vec<u8>, context: &[u8]) -> Option<Vec<u8>> {
            let (header, rest) = wrapped.split_at(header_len(&wrapped)?);
            let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>()?;
            let aad = Aad::from([header, context].concat());
            let mut sealed = sealed.to_vec();
            let opened = self.key.open_in_place(Nonce::assume_unique_for_key(*nonce), aad, &mut sealed);
            opened.ok().map(|plaintext| plaintext.to_vec())
        }
    }

    /// Where the nonce begins.
    fn header_len(wrapped: &[u8]) -> Option<usize> {
        let fill = match *wrapped.first_chunk()? {
            GENERATED => GENERATED_FILL,
            GIVEN => GIVEN_FILL,
            _ => return None,
        };
        let length = GENERATED.len() + HANDLE_LEN + fill;
        (wrapped.len() > length + NONCE_LEN + TAG_LEN).then_some(length)
    }

    fn handle(wrapped: &[u8]) -> Option<[u8; HANDLE_LEN]> {
        header_len(wrapped)?;
        wrapped.get(GENERATED.len()..)?.first_chunk().copied()
    }

    /// The encryption context as associated data: names and values in the order of the names, each after its length in
    /// 4 bytes.
    fn context(input: &Value, name: &str) -> Result<Vec<u8>, Failure> {
        let not_text = || failure("SerializationException", format!("{name} must map strings to strings"));
        let pairs = match input.get(name) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Object(pairs)) => pairs,
            Some(_) => return Err(not_text()),
        };
        let pairs = pairs.iter().map(|(name, value)| Ok((name.as_str(), value.as_str().ok_or_else(not_text)?)));
        let pairs: BTreeMap<_, _> = pairs.collect::<Result<_, Failure>>()?;
        let fields = pairs.into_iter().flat_map(|(name, value)| [name, value]);
        let prefixed = |field: &str| {
            let length = u32::try_from(field.len()).expect("a short request");
            [&length.to_be_bytes()[..], field.as_bytes()].concat()
        };
        Ok(fields.flat_map(prefixed).collect())
    }

    fn check_dry_run(input: &Value) -> Result<(), Failure> {
        match flag(input, "DryRun") {
            true => Err(failure("DryRunOperationException", "The request would have succeeded.")),
            false => Ok(()),
        }
    }

    fn bytes(input: &Value, name: &str, max: usize) -> Result<Vec<u8>, Failure> {
        let text = text(input, name).ok_or_else(|| invalid(format!("'{name}' must not be null")))?;
        let bytes = BASE64.decode(text).map_err(|error| failure("SerializationException", error.to_string()))?;
        match bytes.len() {
            length if (1..=max).contains(&length) => Ok(bytes),
            _ => Err(invalid(format!("'{name}' must have between 1 and {max} bytes"))),
        }
    }

    fn text<'a>(input: &'a Value, name: &str) -> Option<&'a str> {
        input.get(name)?.as_str()
    }

    fn flag(input: &Value, name: &str) -> bool {
        input.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    /// A random UUID.
    fn uuid() -> String {
        let digits = hex(&random::<16>());
        format!("{}-{}-4{}-8{}-{}", &digits[..8], &digits[8..12], &digits[13..16], &digits[17..20], &digits[20..])
    }
}

/// TLS with a certificate of its own for 127.0.0.1 and localhost, and a record of what clients offer.
pub(crate) mod tls {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
    use base64::Engine as _;
    use rustls::crypto::aws_lc_rs as provider;
    use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
    use rustls::server::{ClientHello, ResolvesServerCert};
    use rustls::sign::CertifiedKey;
    use rustls::{CipherSuite, NamedGroup, ServerConfig, ServerConnection, StreamOwned};

    use super::{Arc, BASE64, Mutex, TcpStream, io, locked, random};

    /// What a client offered, in its order.
    #[derive(Clone, Debug)]
    pub(crate) struct Offer {
        /// The cipher suites.
        pub suites: Vec<CipherSuite>,
        /// The groups for the key exchange.
        pub groups: Vec<NamedGroup>,
    }

    /// A certificate and its key.
    pub(super) struct Identity {
        pub(super) pem: String,
        resolver: Arc<Resolver>,
    }

    #[derive(Debug)]
    struct Resolver {
        key: Arc<CertifiedKey>,
        offers: Mutex<Vec<Offer>>,
    }

    impl ResolvesServerCert for Resolver {
        fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            let groups = hello.named_groups().unwrap_or_default().to_vec();
            locked(&self.offers).push(Offer { suites: hello.cipher_suites().to_vec(), groups });
            Some(Arc::clone(&self.key))
        }
    }

    impl Identity {
        pub(super) fn generate() -> Self {
            let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).expect("a key");
            let certificate = certificate(&key);
            let pem = pem(&certificate);
            let private = key.to_pkcs8v1().expect("an encoding");
            let private = PrivatePkcs8KeyDer::from(private.as_ref().to_vec()).into();
            let signing = provider::sign::any_ecdsa_type(&private).expect("a P-256 key");
            let key = Arc::new(CertifiedKey::new(vec![CertificateDer::from(certificate)], signing));
            Self { pem, resolver: Arc::new(Resolver { key, offers: Mutex::default() }) }
        }

        pub(super) fn config(&self) -> Arc<ServerConfig> {
            let builder = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()));
            let builder = builder.with_safe_default_protocol_versions().expect("known versions").with_no_client_auth();
            let resolver: Arc<dyn ResolvesServerCert> = Arc::clone(&self.resolver) as _;
            Arc::new(builder.with_cert_resolver(resolver))
        }

        pub(super) fn offers(&self) -> Vec<Offer> {
            locked(&self.resolver.offers).clone()
        }
    }

    /// The stream under TLS.
    pub(super) fn accept(
        config: &Arc<ServerConfig>,
        stream: TcpStream,
    ) -> io::Result<StreamOwned<ServerConnection, TcpStream>> {
        let connection = ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        Ok(StreamOwned::new(connection, stream))
    }

    /// A self-signed certificate in DER, RFC 5280 section 4.1. It is not a CA's: an end's own certificate may only be
    /// trusted directly.
    fn certificate(key: &EcdsaKeyPair) -> Vec<u8> {
        const ECDSA_WITH_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
        const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
        const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
        const COMMON_NAME: &[u8] = &[0x55, 4, 3];
        const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
        const INTEGER: u8 = 2;
        const BITS: u8 = 3;
        const OCTETS: u8 = 4;
        const OID: u8 = 6;
        const UTF8: u8 = 0xc;
        const TIME: u8 = 0x17;
        const SEQUENCE: u8 = 0x30;
        const SET: u8 = 0x31;
        let algorithm = der(SEQUENCE, &[&der(OID, &[ECDSA_WITH_SHA256])]);
        let attribute = der(SEQUENCE, &[&der(OID, &[COMMON_NAME]), &der(UTF8, &[b"a KMS for tests"])]);
        let name = der(SEQUENCE, &[&der(SET, &[&attribute])]);
        let validity = der(SEQUENCE, &[&der(TIME, &[b"250101000000Z"]), &der(TIME, &[b"491231235959Z"])]);
        let curve = der(SEQUENCE, &[&der(OID, &[EC_PUBLIC_KEY]), &der(OID, &[P256])]);
        let public = der(SEQUENCE, &[&curve, &der(BITS, &[&[0], key.public_key().as_ref()])]);
        let names = der(SEQUENCE, &[&der(0x82, &[b"localhost"]), &der(0x87, &[&[127, 0, 0, 1]])]);
        let extension = der(SEQUENCE, &[&der(OID, &[SUBJECT_ALT_NAME]), &der(OCTETS, &[&names])]);
        let extensions = der(0xa3, &[&der(SEQUENCE, &[&extension])]);
        let version = der(0xa0, &[&der(INTEGER, &[&[2]])]);
        // A leading 1 keeps the number positive and in its shortest form.
        let serial = der(INTEGER, &[&[1], &random::<8>()]);
        let body = der(SEQUENCE, &[&version, &serial, &algorithm, &name, &validity, &name, &public, &extensions]);
        let signature = key.sign(&aws_lc_rs::rand::SystemRandom::new(), &body).expect("a signature");
        der(SEQUENCE, &[&body, &algorithm, &der(BITS, &[&[0], signature.as_ref()])])
    }

    /// A value of `tag` with the given parts as its content.
    fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let length = u16::try_from(content.len()).expect("a short certificate").to_be_bytes();
        let length = match length {
            [0, length @ ..0x80] => vec![length],
            [0, length] => vec![0x81, length],
            [high, low] => vec![0x82, high, low],
        };
        [&[tag], &length[..], &content].concat()
    }

    fn pem(certificate: &[u8]) -> String {
        let text = BASE64.encode(certificate);
        let lines: Vec<_> = text.as_bytes().chunks(64).map(String::from_utf8_lossy).collect();
        format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
    }
}
