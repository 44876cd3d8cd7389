//! A key in SoftHSM, which behaves as a security module does: tokens, PINs, keys that do not leave.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmsfs::keys::providers::{Pkcs11Settings, ProviderSettings, open};
use kmsfs::keys::{Provider, ProviderErrorKind, ProviderKind};

use super::{context, keeps_its_promises, kind_of, serves_many_callers};

const PIN: &str = "1234";
pub(crate) const TOKEN: &str = "token=kms;object=app";

/// Where Debian has the module.
pub(crate) const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

/// Tokens in a directory of their own, with the AES keys `app` and `other` on the token `kms`.
pub(crate) struct Tokens {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) pin_file: PathBuf,
}

impl Tokens {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("tokens")).unwrap();
        let config = format!("directories.tokendir = {}/tokens\nlog.level = ERROR\n", directory.path().display());
        std::fs::write(directory.path().join("softhsm2.conf"), config).unwrap();
        let pin_file = directory.path().join("pin");
        std::fs::write(&pin_file, PIN).unwrap();
        let tokens = Self { directory, pin_file };
        tokens.run("softhsm2-util", &["--init-token", "--free", "--label", "kms", "--pin", PIN, "--so-pin", PIN]);
        tokens.new_key("app", "AES:32");
        tokens.new_key("other", "AES:32");
        tokens
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.directory.path().join("softhsm2.conf")
    }

    pub(crate) fn new_key(&self, label: &str, kind: &str) {
        let key = ["--login", "--pin", PIN, "--token-label", "kms", "--keygen", "--key-type", kind, "--label", label];
        self.run("pkcs11-tool", &[&["--module", MODULE][..], &key].concat());
    }

    fn run(&self, program: &str, arguments: &[&str]) {
        let output = Command::new(program).args(arguments).env("SOFTHSM2_CONF", self.config()).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}: .ci/run installs it"));
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A module reads its configuration once in a process, so all tests of this one share the tokens.
pub(crate) fn tokens() -> &'static Tokens {
    static TOKENS: std::sync::LazyLock<Tokens> = std::sync::LazyLock::new(|| {
        let tokens = Tokens::new();
        // SAFETY: this is the first thing that these tests do, and no other test reads the environment of this name.
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("SOFTHSM2_CONF", tokens.config());
        }
        tokens
    });
    &TOKENS
}

pub(crate) fn provider(key: &str, module: &Path, pin_file: Option<&Path>) -> Arc<dyn Provider> {
    let pkcs11 = Pkcs11Settings {
        module: Some(module.to_owned()),
        pin_file: pin_file.map(Path::to_owned),
        ..Pkcs11Settings::default()
    };
    open(ProviderKind::Pkcs11, key, None, &ProviderSettings { pkcs11, ..ProviderSettings::default() }).unwrap()
}

#[test]
fn a_key_on_a_token_keeps_the_promises_of_a_provider() {
    let pin = &tokens().pin_file;
    let provider = provider(TOKEN, Path::new(MODULE), Some(pin));
    assert!(provider.is_remote());
    keeps_its_promises(provider.as_ref());
    // One session may serve several keys of its token.
    let (data_key, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let other = "token=kms;object=other";
    let moved = provider.rewrap(TOKEN, &wrapped.bytes, other, &context(1)).unwrap();
    assert_eq!(provider.unwrap(other, &moved.bytes, &context(1)).unwrap().expose(), data_key.expose());
    assert_eq!(kind_of(provider.unwrap(TOKEN, &moved.bytes, &context(1))), ProviderErrorKind::Tampered);
    // What was changed did not break the sessions.
    assert!(provider.unwrap(TOKEN, &wrapped.bytes, &context(1)).is_ok());
    assert!(provider.describe(TOKEN).unwrap().to_string().contains("AES-256"));
}

#[test]
fn many_callers_get_their_own_keys() {
    let provider = provider(TOKEN, Path::new(MODULE), Some(&tokens().pin_file));
    serves_many_callers(provider.as_ref(), TOKEN);
}

#[test]
fn what_is_not_there_or_not_allowed_is_told_apart() {
    let tokens = tokens();
    let (module, pin) = (Path::new(MODULE), Some(tokens.pin_file.as_path()));
    let kind = |provider: Arc<dyn Provider>| kind_of(provider.generate_data_key(&context(1)));
    assert_eq!(kind(provider("token=none;object=app", module, pin)), ProviderErrorKind::KeyNotFound);
    assert_eq!(kind(provider("token=kms;object=none", module, pin)), ProviderErrorKind::KeyNotFound);
    assert_eq!(kind(provider(TOKEN, Path::new("/nonexistent.so"), pin)), ProviderErrorKind::Misconfigured);
    assert_eq!(kind(provider(TOKEN, module, Some(Path::new("/nonexistent")))), ProviderErrorKind::Credentials);
    tokens.new_key("twin", "AES:32");
    tokens.new_key("twin", "AES:32");
    assert_eq!(kind(provider("token=kms;object=twin", module, pin)), ProviderErrorKind::Misconfigured);
}

#[test]
fn a_module_that_hangs_holds_nobody_beyond_the_deadline() {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("hang.c");
    std::fs::write(
        &source,
        "#include <unistd.h>\nunsigned long C_GetFunctionList(void **list) { for (;;) sleep(1000); }\n",
    )
    .unwrap();
    let module = directory.path().join("hang.so");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&module).arg(&source).status();
    assert!(built.expect("cc is there, as Rust needs it").success());
    let pkcs11 = Pkcs11Settings {
        module: Some(module),
        operation_timeout: Duration::from_millis(300),
        ..Pkcs11Settings::default()
    };
    let settings = ProviderSettings { pkcs11, ..ProviderSettings::default() };
    let provider = open(ProviderKind::Pkcs11, TOKEN, None, &settings).unwrap();
    let start = Instant::now();
    // More callers than threads of the module.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let answer = provider.generate_data_key(&context(1));
                assert_eq!(kind_of(answer), ProviderErrorKind::Unavailable);
            });
        }
    });
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
}
