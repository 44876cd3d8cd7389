//! A moto server, which plays KMS: real AES-GCM, encryption contexts enforced, keys gone when it stops.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// The Region that [`environment`] names and keys are made in.
pub(crate) const REGION: &str = "us-east-1";
const START_TIMEOUT: Duration = Duration::from_secs(60);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A running server on a port of its own; stopped on drop.
pub(crate) struct Moto {
    process: Child,
    address: String,
}

/// A key of the server.
pub(crate) struct Key {
    /// Its ARN.
    pub arn: String,
    /// Its id, the end of the ARN.
    pub id: String,
}

impl Moto {
    /// Starts a server and returns when it listens.
    pub(crate) fn start() -> Self {
        let program = program();
        let mut process = Command::new(&program)
            .args(["-H", "127.0.0.1", "-p", "0"])
            .env("PYTHONUNBUFFERED", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}: scripts/test installs it", program.display()));
        let stderr = process.stderr.take().expect("piped");
        let (send, receive) = mpsc::channel();
        // Reads to the end, so that the server never waits for a full pipe.
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).for_each(|line| drop(send.send(line)))
        });
        let mut moto = Self { process, address: String::new() };
        moto.address = listening_address(&receive);
        moto
    }

    /// The URL for `endpoint` settings and `AWS_ENDPOINT_URL_KMS`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A new key.
    pub(crate) fn create_key(&self) -> Key {
        let answer = self.post("CreateKey", "{}");
        let field = |name: &str| answer["KeyMetadata"][name].as_str().expect("a string").to_owned();
        Key { arn: field("Arn"), id: field("KeyId") }
    }

    /// Gives `key` the name `alias`, which begins with `alias/`.
    pub(crate) fn create_alias(&self, alias: &str, key: &Key) {
        self.post("CreateAlias", &format!(r#"{{"AliasName":"{alias}","TargetKeyId":"{}"}}"#, key.id));
    }

    /// Calls an operation of KMS and returns its answer, which may be empty.
    pub(crate) fn post(&self, operation: &str, body: &str) -> serde_json::Value {
        let mut stream = TcpStream::connect(&self.address).expect("moto listens");
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout");
        let length = body.len();
        let request = format!(
            "POST / HTTP/1.0\r\nHost: kms.{REGION}.amazonaws.com\r\nContent-Type: application/x-amz-json-1.1\r\n\
             X-Amz-Target: TrentService.{operation}\r\nContent-Length: {length}\r\nAuthorization: AWS4-HMAC-SHA256 \
             Credential=test/20260101/{REGION}/kms/aws4_request, SignedHeaders=host, Signature=0\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).expect("moto reads");
        let mut response = String::new();
        stream.read_to_string(&mut response).expect("moto answers");
        let (head, body) = response.split_once("\r\n\r\n").expect("an HTTP response");
        assert!(head.split(' ').nth(1) == Some("200"), "{operation}: {response}");
        serde_json::from_str(body).unwrap_or_default()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a program that is to use the server, or no server at all, needs in its environment: any credentials, a Region,
/// and nothing from the files and the network of the machine that runs the test. The endpoint is up to the test.
pub(crate) fn environment() -> [(&'static str, &'static str); 7] {
    [
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", REGION),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("NO_PROXY", "127.0.0.1"),
    ]
}

fn program() -> PathBuf {
    let installed = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/moto_server");
    std::env::var_os("KMSFS_MOTO").map_or_else(installed, PathBuf::from)
}

/// The address in the server's message that it runs.
fn listening_address(lines: &mpsc::Receiver<String>) -> String {
    let mut seen = Vec::new();
    while let Ok(line) = lines.recv_timeout(START_TIMEOUT) {
        if let Some((_, address)) = line.split_once("Running on http://") {
            return address.trim().to_owned();
        }
        seen.push(line);
    }
    panic!("moto did not start: {seen:?}: scripts/test installs it")
}
