//! An HTTP proxy in front of a KMS, moto or the tests' own, that breaks the calls it is told to: by operation, and by
//! how many calls of that operation came since it was told.
//!
//! Invariants: a call without a fault is passed on as it came, signature and all, and answered as the server answers;
//! every call is counted, broken or not; nothing outlives the proxy. Stands beside `kms_server`, whose wire it speaks.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use super::kms_server::Acceptor;
use super::kms_server::wire::{Request, Response};

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is passed on after this long.
    Latency(Duration),
    /// It is never answered; the connection stays open.
    Stall,
    /// Its connection is reset.
    Reset,
    /// It is answered with this status and a page of HTML, as a gateway does.
    Gateway(u16),
    /// It is answered with this status and an exception of KMS of this name.
    Exception(u16, &'static str),
    /// It is answered `200 {}`.
    Empty,
    /// It is passed on; the answer holds another 32-byte key.
    WrongKey,
    /// It is passed on; the answer holds a key that is one byte short.
    ShortKey,
    /// It is passed on; the answer names another key.
    OtherKeyId,
    /// It is passed on; the answer is the first half of the JSON, as if that were all.
    TruncatedJson,
    /// It is passed on; the connection ends in the middle of the answer.
    CutOff,
}

/// What the proxy says in exceptions of its own.
pub(crate) const MESSAGE: &str = "the proxy's words";
/// How the request ids of its own begin.
pub(crate) const REQUEST_ID: &str = "injected-";

/// A running proxy; on drop it stops, and its connections close.
pub(crate) struct FaultProxy {
    plan: Arc<Plan>,
    acceptor: Acceptor,
}

#[derive(Default)]
struct Plan {
    rules: Mutex<Vec<Rule>>,
    calls: Mutex<BTreeMap<String, u64>>,
    /// Those that the SDK made, which numbers its calls.
    calls_by_sdk: Mutex<BTreeMap<String, u64>>,
}

struct Rule {
    operation: &'static str,
    nth: (Bound<u64>, Bound<u64>),
    fault: Fault,
    seen: u64,
}

impl FaultProxy {
    /// A proxy in front of the server at `endpoint`, a URL without TLS.
    pub(crate) fn start(endpoint: &str) -> Self {
        let upstream = endpoint.strip_prefix("http://").and_then(|address| address.parse().ok());
        let upstream: SocketAddr = upstream.unwrap_or_else(|| panic!("{endpoint} is not a server's URL"));
        let plan = Arc::new(Plan::default());
        let relaying = Arc::clone(&plan);
        let acceptor = Acceptor::start(0, move |stream| relay(&relaying, stream, upstream)).expect("a free port");
        Self { plan, acceptor }
    }

    /// The URL for `endpoint` settings and `AWS_ENDPOINT_URL_KMS`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.acceptor.address)
    }

    /// From now on `fault` happens to the `nth` calls of `operation`, the next one being the first: `1..=1` is the next
    /// one only, `..` are all. Of several rules for a call, the latest holds.
    pub(crate) fn inject(&self, operation: &'static str, nth: impl RangeBounds<u64>, fault: Fault) {
        let nth = (nth.start_bound().cloned(), nth.end_bound().cloned());
        locked(&self.plan.rules).push(Rule { operation, nth, fault, seen: 0 });
    }

    /// From now on nothing happens to calls.
    pub(crate) fn heal(&self) {
        locked(&self.plan.rules).clear();
    }

    /// How many calls of `operation` came, broken ones included.
    pub(crate) fn calls(&self, operation: &str) -> u64 {
        locked(&self.plan.calls).get(operation).copied().unwrap_or(0)
    }

    /// How many of them the SDK made.
    pub(crate) fn calls_by_sdk(&self, operation: &str) -> u64 {
        locked(&self.plan.calls_by_sdk).get(operation).copied().unwrap_or(0)
    }
}

impl Plan {
    /// Counts a call and says what happens to it.
    fn next(&self, operation: &str) -> (u64, Option<Fault>) {
        let mut calls = locked(&self.calls);
        let count = calls.entry(operation.to_owned()).or_default();
        *count += 1;
        let mut fault = None;
        for rule in locked(&self.rules).iter_mut().filter(|rule| rule.operation == operation) {
            rule.seen += 1;
            if rule.nth.contains(&rule.seen) {
                fault = Some(rule.fault);
            }
        }
        (*count, fault)
    }
}

/// Serves one connection of a client until either side ends it.
fn relay(plan: &Plan, client: TcpStream, upstream: SocketAddr) -> io::Result<()> {
    let mut client = BufReader::new(client);
    let mut server = Upstream { address: upstream, connection: None };
    while let Some(request) = Request::read(&mut client)? {
        let operation = request.operation().unwrap_or_default();
        if request.header("amz-sdk-invocation-id").is_some() {
            *locked(&plan.calls_by_sdk).entry(operation.to_owned()).or_default() += 1;
        }
        let (count, fault) = plan.next(operation);
        let invented = |status, body: String| Response::new(status, &format!("{REQUEST_ID}{count}"), body.into_bytes());
        let answer = match fault {
            Some(Fault::Stall) => return io::copy(&mut client, &mut io::sink()).map(drop),
            // Closed with a linger time of zero, a connection is reset.
            Some(Fault::Reset) => {
                return Ok(rustix::net::sockopt::set_socket_linger(client.get_ref(), Some(Duration::ZERO))?);
            }
            Some(Fault::Gateway(status)) => gateway_page(invented(status, "<html>not KMS</html>".to_owned())),
            Some(Fault::Exception(status, code)) => {
                invented(status, format!(r#"{{"__type":"{code}","message":"{MESSAGE}"}}"#))
            }
            Some(Fault::Empty) => invented(200, "{}".to_owned()),
            Some(Fault::Latency(latency)) => {
                thread::sleep(latency);
                server.call(&request)?
            }
            Some(Fault::WrongKey) => altered(server.call(&request)?, |answer| answer["Plaintext"] = OTHER_KEY.into()),
            Some(Fault::ShortKey) => altered(server.call(&request)?, |answer| answer["Plaintext"] = SHORT_KEY.into()),
            Some(Fault::OtherKeyId) => altered(server.call(&request)?, name_other_key),
            Some(Fault::TruncatedJson) => halved(server.call(&request)?),
            Some(Fault::CutOff) => {
                let answer = server.call(&request)?.encode();
                return client.get_mut().write_all(&answer[..answer.len() - 8]);
            }
            None => server.call(&request)?,
        };
        client.get_mut().write_all(&answer.encode())?;
        if request.is_last || answer.is_last() {
            break;
        }
    }
    Ok(())
}

/// 32 bytes that no server made, and 31.
const OTHER_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
const SHORT_KEY: &str = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHg==";

fn gateway_page(mut response: Response) -> Response {
    response.headers.retain(|(name, _)| !["content-type", "x-amzn-requestid"].contains(&name.as_str()));
    response.headers.push(("content-type".to_owned(), "text/html".to_owned()));
    response
}

/// The answer with its JSON changed; one that is not JSON stays as it is.
fn altered(mut response: Response, change: impl FnOnce(&mut Value)) -> Response {
    if let Ok(mut answer) = serde_json::from_slice(&response.body) {
        change(&mut answer);
        response.set_body(answer.to_string().into_bytes());
    }
    response
}

/// Keeps the Region and the account of the ARN.
fn name_other_key(answer: &mut Value) {
    let arn = answer["KeyId"].as_str().unwrap_or_default();
    let (prefix, _) = arn.rsplit_once('/').unwrap_or((arn, ""));
    answer["KeyId"] = format!("{prefix}/00000000-0000-4000-8000-000000000000").into();
}

fn halved(mut response: Response) -> Response {
    let half = response.body.len() / 2;
    response.set_body(response.body[..half].to_vec());
    response
}

/// The way to the server; a new connection whenever the last one was closed.
struct Upstream {
    address: SocketAddr,
    connection: Option<BufReader<TcpStream>>,
}

impl Upstream {
    fn call(&mut self, request: &Request) -> io::Result<Response> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => BufReader::new(TcpStream::connect(self.address)?),
        };
        connection.get_mut().set_nodelay(true)?;
        connection.get_mut().write_all(&request.encode())?;
        let response = Response::read(&mut connection)?;
        if !response.is_last() {
            self.connection = Some(connection);
        }
        Ok(response)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
