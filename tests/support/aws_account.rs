//! An AWS account of a test's own at one address of this machine: KMS, STS, and the two places that hand out
//! credentials, of containers (ECS, EKS) and of instances (IMDSv2).
//!
//! KMS is `kms_server`: a request is checked against the credentials that this account has handed out, and then passed
//! on, signed anew. STS is moto, where a test needs it. Invariants: a request with a wrong signature or session token
//! is refused; what is signed with expired credentials is refused as KMS does; every request is noted.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::json;

use super::kms_server::wire::{Request, Response};
use super::kms_server::{Acceptor, CreatedKey, KmsServer, SECRET, sigv4};

/// What a container has to show for credentials.
pub(crate) const CONTAINER_TOKEN: &str = "container-token";
/// The role of the instance.
const INSTANCE_ROLE: &str = "instance-role";
/// A session of the instance metadata service.
const SESSION: &str = "imds-session";
/// The Region that the instance metadata service names.
pub(crate) const INSTANCE_REGION: &str = super::kms_server::REGION;

/// The account; on drop it is gone.
pub(crate) struct AwsAccount {
    /// Where the keys are.
    pub(crate) kms: KmsServer,
    state: Arc<State>,
    acceptor: Acceptor,
}

/// A request that came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Of KMS and STS the operation, else method and path.
    pub(crate) what: String,
    /// The access key id that signed it, or nothing.
    pub(crate) access_key: String,
    /// The session token that came with it, or the web identity's, or nothing.
    pub(crate) token: String,
    /// The Region in the signature's scope, or nothing.
    pub(crate) region: String,
}

#[derive(Default)]
struct State {
    /// Secret and session token by access key id.
    known: Mutex<BTreeMap<String, (String, String)>>,
    expired: Mutex<BTreeSet<String>>,
    seen: Mutex<Vec<Seen>>,
    handed_out: Mutex<u32>,
    without_sessions: AtomicBool,
}

impl AwsAccount {
    /// An account without STS.
    pub(crate) fn start() -> Self {
        Self::with_sts(None)
    }

    /// An account whose STS is the moto server at this URL.
    pub(crate) fn with_sts(moto: Option<&str>) -> Self {
        let sts: Option<SocketAddr> = moto.map(|url| url.trim_start_matches("http://").parse().expect("a URL"));
        let kms = KmsServer::start();
        let state = Arc::new(State::default());
        let (serving, upstream) = (Arc::clone(&state), kms.address());
        let acceptor = Acceptor::start(0, move |stream| {
            let mut client = BufReader::new(stream);
            while let Some(request) = Request::read(&mut client)? {
                let answer = serving.answer(&request, upstream, sts)?;
                client.get_mut().write_all(&answer.encode())?;
                if request.is_last {
                    break;
                }
            }
            Ok(())
        });
        Self { kms, state, acceptor: acceptor.expect("a free port") }
    }

    /// The URL of all that the account offers.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.acceptor.address)
    }

    /// A new key.
    pub(crate) fn create_key(&self) -> CreatedKey {
        self.kms.create_key()
    }

    /// From now on these credentials are good.
    pub(crate) fn admit(&self, access_key: &str, secret: &str, token: &str) {
        self.state.admit(access_key, secret, token);
    }

    /// From now on KMS says of these that they have expired.
    pub(crate) fn expire(&self, access_key: &str) {
        locked(&self.state.expired).insert(access_key.to_owned());
    }

    /// From now on the instance metadata service knows its first version only.
    pub(crate) fn take_sessions_away(&self) {
        self.state.without_sessions.store(true, Ordering::SeqCst);
    }

    /// What came, in order.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        locked(&self.state.seen).clone()
    }

    /// What came of one kind.
    pub(crate) fn seen_of(&self, what: &str) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.what == what).collect()
    }
}

impl State {
    fn admit(&self, access_key: &str, secret: &str, token: &str) {
        locked(&self.known).insert(access_key.to_owned(), (secret.to_owned(), token.to_owned()));
    }

    fn answer(&self, request: &Request, kms: SocketAddr, sts: Option<SocketAddr>) -> io::Result<Response> {
        let (access_key, region) = signer(request);
        let form = String::from_utf8_lossy(&request.body).into_owned();
        let field = |name: &str| form.split('&').find_map(|field| field.strip_prefix(name));
        let action = field("Action=");
        let token = request.header("x-amz-security-token").or_else(|| field("WebIdentityToken="));
        let token = token.unwrap_or_default().to_owned();
        let what = match (request.operation(), action) {
            (Some(operation), _) => operation.to_owned(),
            (None, Some(action)) => action.to_owned(),
            (None, None) => format!("{} {}", request.method, request.path),
        };
        locked(&self.seen).push(Seen { what, access_key: access_key.clone(), token, region: region.clone() });
        match (request.operation(), action, sts) {
            (Some(operation), _, _) => self.kms(request, operation, &access_key, &region, kms),
            (None, Some(_), Some(sts)) => self.sts(request, &access_key, sts),
            (None, Some(_), None) => Ok(plain(503, "no STS")),
            (None, None, _) => Ok(self.credentials(request)),
        }
    }

    /// Whether the request is signed with credentials of this account.
    fn is_signed(&self, request: &Request, access_key: &str) -> bool {
        let known = locked(&self.known).get(access_key).cloned();
        let Some((secret, token)) = known else { return false };
        let authorization = request.header("authorization").unwrap_or_default();
        let field = |name: &str| {
            let found = authorization.split([',', ' ']).find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_default()
        };
        let signed: Vec<_> = field("SignedHeaders").split(';').collect();
        let scope = field("Credential").split_once('/').map_or("", |(_, scope)| scope);
        let has_token = token.is_empty() || signed.contains(&"x-amz-security-token");
        has_token
            && request.header("x-amz-security-token").unwrap_or_default() == token
            && sigv4::signature_of(request, scope, &signed, &secret) == field("Signature")
    }

    fn kms(
        &self,
        request: &Request,
        operation: &str,
        key: &str,
        region: &str,
        kms: SocketAddr,
    ) -> io::Result<Response> {
        let refused = |code: &str| {
            let body = json!({ "__type": code, "message": "refused by the tests' account" });
            Response::new(400, "request-1", body.to_string().into_bytes())
        };
        if locked(&self.expired).contains(key) {
            return Ok(refused("ExpiredTokenException"));
        }
        if !self.is_signed(request, key) {
            return Ok(refused("UnrecognizedClientException"));
        }
        let body = String::from_utf8_lossy(&request.body);
        call(kms, &sigv4::request(&kms.to_string(), region, SECRET, operation, &body))
    }

    /// Passes a request to STS, and admits the credentials in its answer.
    fn sts(&self, request: &Request, access_key: &str, sts: SocketAddr) -> io::Result<Response> {
        if request.header("authorization").is_some() && !self.is_signed(request, access_key) {
            return Ok(plain(403, "not signed with credentials of this account"));
        }
        let answer = call(sts, request)?;
        let text = String::from_utf8_lossy(&answer.body).into_owned();
        let field = |name: &str| text.split_once(&format!("<{name}>"))?.1.split_once('<').map(|(value, _)| value);
        if let [Some(key), Some(secret), Some(token)] = ["AccessKeyId", "SecretAccessKey", "SessionToken"].map(field) {
            self.admit(key, secret, token);
        }
        Ok(Response::new(answer.status, "request-1", answer.body))
    }

    /// What containers and instances are told.
    fn credentials(&self, request: &Request) -> Response {
        let without_sessions = self.without_sessions.load(Ordering::SeqCst);
        let session = without_sessions || request.header("x-aws-ec2-metadata-token") == Some(SESSION);
        match (request.method.as_str(), request.path.trim_end_matches('/')) {
            ("GET", "/container") if request.header("authorization") == Some(CONTAINER_TOKEN) => {
                self.hand_out("container")
            }
            ("PUT", "/latest/api/token") if !without_sessions => {
                match request.header("x-aws-ec2-metadata-token-ttl-seconds") {
                    None => plain(400, "no TTL"),
                    Some(ttl) => {
                        let mut answer = plain(200, SESSION);
                        answer.headers.push(("x-aws-ec2-metadata-token-ttl-seconds".to_owned(), ttl.to_owned()));
                        answer
                    }
                }
            }
            // The first version of the service asks for no session; it is off.
            ("GET", path) if path.starts_with("/latest/meta-data") && !session => plain(401, "no session"),
            ("GET", "/latest/meta-data/placement/region") => plain(200, INSTANCE_REGION),
            ("GET", "/latest/meta-data/iam/security-credentials") => plain(200, INSTANCE_ROLE),
            ("GET", path) if path == format!("/latest/meta-data/iam/security-credentials/{INSTANCE_ROLE}") => {
                self.hand_out("instance")
            }
            ("GET", "/container") => plain(403, "no authorization"),
            _ => plain(404, "not here"),
        }
    }

    /// New credentials, whose access key id is `TO-1` and so on.
    fn hand_out(&self, to: &str) -> Response {
        let mut count = locked(&self.handed_out);
        *count += 1;
        let (key, secret, token) = (format!("{to}-{count}"), format!("secret-{count}"), format!("token-{count}"));
        self.admit(&key, &secret, &token);
        let body = json!({
            "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-01T00:00:00Z",
            "AccessKeyId": key, "SecretAccessKey": secret, "Token": token, "Expiration": "2199-01-01T00:00:00Z",
        });
        plain(200, &body.to_string())
    }
}

/// The access key id and the Region of a signature.
fn signer(request: &Request) -> (String, String) {
    let authorization = request.header("authorization").unwrap_or_default();
    let credential = authorization.split_once("Credential=").map_or("", |(_, rest)| rest);
    let mut parts = credential.split('/').map(str::to_owned);
    (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default())
}

fn call(server: SocketAddr, request: &Request) -> io::Result<Response> {
    let mut connection = BufReader::new(TcpStream::connect(server)?);
    connection.get_mut().write_all(&request.encode())?;
    Response::read(&mut connection)
}

fn plain(status: u16, body: &str) -> Response {
    Response::new(status, "request-1", body.as_bytes().to_vec())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
