//! A server in the place of KMS that gives the answers it was given, or none.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// A server that answers every request with the next of its answers, and then with the last one for ever. Its thread
/// ends with the test program.
pub(crate) struct FakeKms {
    endpoint: String,
    requests: Arc<AtomicUsize>,
}

/// In the place of a status: the request is never answered, and its connection stays open.
pub(crate) const STALL: u16 = 0;

/// An HTTP status and a body.
pub(crate) type Answer = (u16, String);

impl FakeKms {
    /// Starts it.
    pub(crate) fn start(answers: Vec<Answer>) -> Self {
        let (listener, endpoint) = listen();
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        thread::spawn(move || {
            let mut stalled = Vec::new();
            for stream in listener.incoming().map_while(Result::ok) {
                let at = count.fetch_add(1, Ordering::SeqCst).min(answers.len() - 1);
                if answers[at].0 == STALL {
                    stalled.push(stream);
                    continue;
                }
                // A client that hangs up early is the client's business.
                let _ = serve(stream, &answers[at]);
            }
        });
        Self { endpoint, requests }
    }

    /// Its URL.
    pub(crate) fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    /// How many requests it has got.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// The URL of a port where nobody listens.
pub(crate) fn refused() -> String {
    listen().1
}

fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
    (listener, endpoint)
}

/// Reads one request and answers it; one connection for each.
fn serve(stream: TcpStream, (status, body): &Answer) -> std::io::Result<()> {
    let mut reader = BufReader::new(&stream);
    let mut length = 0;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        line.clear();
    }
    reader.take(length).read_to_end(&mut Vec::new())?;
    write!(
        &stream,
        "HTTP/1.1 {status} Answer\r\nContent-Type: application/x-amz-json-1.1\r\nx-amzn-RequestId: request-1\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}
