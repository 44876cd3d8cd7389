//! From a request to its answer: who asks, how often, whether they may; then the operation.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, Read, Write};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::failure::{Failure, Outcome, failure};
use super::keys::Vault;
use super::wire::{Request, Response};
use super::{ACCESS_KEY, ACCOUNT, Options, SECRET, locked, nanoseconds, sigv4};

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
pub(super) struct User {
    pub(super) secret: String,
    pub(super) denied: BTreeSet<String>,
}

/// From a request to its answer.
pub(super) struct Service {
    vault: RwLock<Vault>,
    /// In nanoseconds.
    pub(super) latency: AtomicU64,
    pub(super) bucket: Mutex<Option<Bucket>>,
    pub(super) denied: Mutex<BTreeSet<String>>,
    /// By access key.
    pub(super) users: Mutex<BTreeMap<String, User>>,
    pub(super) calls: [(&'static str, AtomicU64); OPERATIONS.len()],
    pub(super) failures: Mutex<BTreeMap<&'static str, u64>>,
    /// The actions that callers may use and did, with the keys as they named them.
    pub(super) used: Mutex<BTreeSet<(String, String)>>,
    requests: AtomicU64,
}

impl Service {
    pub(super) fn new(options: Options) -> Self {
        Self {
            vault: RwLock::default(),
            latency: AtomicU64::new(nanoseconds(options.latency)),
            bucket: Mutex::new(options.rate.map(Bucket::full)),
            denied: Mutex::default(),
            users: Mutex::default(),
            calls: OPERATIONS.map(|operation| (operation, AtomicU64::new(0))),
            failures: Mutex::default(),
            used: Mutex::default(),
            requests: AtomicU64::new(0),
        }
    }

    /// Answers the requests of one connection until either side ends it.
    pub(super) fn serve(&self, stream: impl Read + Write) -> io::Result<()> {
        // Calls that end in the same millisecond end together, which takes less of a CPU that others measure on.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1_000_000));
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
        self.note(operation, &input);
        self.perform(operation, &region, &input)
    }

    /// Notes which action a policy must allow with which key.
    fn note(&self, operation: &str, input: &Value) {
        let fields: &[(&str, &str)] = match operation {
            "ReEncrypt" => &[("ReEncryptFrom", "SourceKeyId"), ("ReEncryptTo", "DestinationKeyId")],
            other => &[(other, "KeyId")],
        };
        for (action, field) in fields {
            let key = input[*field].as_str().unwrap_or_default().to_owned();
            locked(&self.used).insert((format!("kms:{action}"), key));
        }
    }

    fn secret_of(&self, access_key: &str) -> Option<String> {
        if access_key == ACCESS_KEY {
            return Some(SECRET.to_owned());
        }
        locked(&self.users).get(access_key).map(|user| user.secret.clone())
    }

    pub(super) fn perform(&self, operation: &str, region: &str, input: &Value) -> Outcome {
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
pub(super) struct Bucket {
    rate: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    pub(super) fn full(rate: u32) -> Self {
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
