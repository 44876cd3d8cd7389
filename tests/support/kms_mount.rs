//! A volume under a key of the tests' own KMS, mounted through the proxy that breaks calls.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::fault_proxy::FaultProxy;
use super::kms_server::{ACCESS_KEY, CreatedKey, KmsServer, REGION, SECRET};
use super::{Home, Volume, bytes};

/// The longest that an open may take: its turn in the queue and all attempts of its call ([`KmsVolume::new`] sets no
/// timeouts, so the defaults hold), and some time for a busy machine. `docs/SEMANTICS.md` section 6 says 12 seconds.
pub(crate) const LONGEST_OPEN: Duration = Duration::from_secs(16);

/// See the module.
pub(crate) struct KmsVolume {
    pub(crate) volume: Volume,
    pub(crate) proxy: FaultProxy,
    pub(crate) server: KmsServer,
    pub(crate) key: CreatedKey,
}

impl KmsVolume {
    /// A new volume with one file per data key, mounted always with these arguments.
    pub(crate) fn new(mount: &[&str]) -> Self {
        Self::with_init(&[], mount)
    }

    /// The same with more arguments for `init`.
    pub(crate) fn with_init(init: &[&str], mount: &[&str]) -> Self {
        let server = KmsServer::start();
        let key = server.create_key();
        let proxy = FaultProxy::start(&server.endpoint());
        let mut home = Home::new();
        for (name, value) in [
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", REGION),
            ("AWS_CONFIG_FILE", "/dev/null"),
            ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("NO_PROXY", "127.0.0.1"),
        ] {
            home.set(name, value);
        }
        home.set("KMSFS_ENDPOINT_URL", proxy.endpoint());
        let name = format!("aws-kms:{}", key.arn);
        let init = [&["--key", &name], init].concat();
        let volume = Volume::in_home(home, &init, mount);
        Self { volume, proxy, server, key }
    }

    /// Makes files of `len` bytes, as [`content`] has them, and returns their paths.
    pub(crate) fn files(&self, prefix: &str, count: usize, len: usize) -> Vec<PathBuf> {
        let paths: Vec<_> = (0..count).map(|n| self.volume.path(format!("{prefix}{n}"))).collect();
        for (n, path) in paths.iter().enumerate() {
            std::fs::write(path, content(n, len)).unwrap();
        }
        paths
    }

    /// Drops all keys and what the kernel has cached.
    pub(crate) fn make_cold(&self) {
        for command in ["lock", "unlock"] {
            self.volume.home.ok(&[&command, &self.volume.plain]);
        }
    }

    /// Disables or enables the key.
    pub(crate) fn set_enabled(&self, enabled: bool) {
        let operation = if enabled { "EnableKey" } else { "DisableKey" };
        self.server.administer(operation, &json!({ "KeyId": self.key.id }));
    }

    /// A number in `kmsfs status`.
    pub(crate) fn status(&self, field: &str) -> u64 {
        self.volume.status()[field].as_u64().unwrap_or_else(|| panic!("no {field} in the status"))
    }
}

/// What the `n`th file holds.
pub(crate) fn content(n: usize, len: usize) -> Vec<u8> {
    bytes(n as u64 + 1, len)
}

/// What became of one `open`.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) result: io::Result<()>,
    pub(crate) took: Duration,
}

/// Opens each path once, so many at a time; in their order.
pub(crate) fn open_all(paths: &[PathBuf], threads: usize) -> Vec<Opened> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads.min(paths.len()) {
            scope.spawn(|| {
                while let Some((n, path)) =
                    Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, paths.get(n)?)))
                {
                    let started = Instant::now();
                    let result = File::open(path).map(drop);
                    results.lock().unwrap().push((n, Opened { result, took: started.elapsed() }));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort_by_key(|(n, _)| *n);
    results.into_iter().map(|(_, opened)| opened).collect()
}

/// The middle one.
pub(crate) fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values[values.len() / 2]
}
