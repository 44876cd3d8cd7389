//! A ministack server, which plays KMS: key states, multi-Region keys. Installed by `scripts/test` in an environment of its own.

use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A running server on a port of its own; stopped on drop.
pub(crate) struct Ministack {
    process: Child,
    /// Where it listens.
    pub(crate) address: SocketAddr,
}

impl Ministack {
    /// Starts a server and returns when it listens.
    pub(crate) fn start() -> Self {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.expect("a free port");
        let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".venv-ministack/bin/ministack");
        let mut process = Command::new(&program)
            .env("GATEWAY_PORT", address.port().to_string())
            .env("BIND_HOST", "127.0.0.1")
            .env("SERVICES", "kms")
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
        let server = Self { process, address };
        let mut seen = Vec::new();
        while let Ok(line) = receive.recv_timeout(START_TIMEOUT) {
            if line.contains("Running on http://") {
                return server;
            }
            seen.push(line);
        }
        panic!("ministack did not start: {seen:?}: scripts/test installs it")
    }

    /// The URL for `endpoint` settings.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Ministack {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
