//! The cases of `tests/vectors`: each breaks one thing, or nothing, and says in a word what a reader must answer.
//!
//! They were made by another implementation (`tests/vectors/generate.py`), so an answer that agrees is agreed by two. The
//! test fails if a bad case is accepted, if it is refused for another reason, and if a good one gives other bytes.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use kmsfs::content::{Content, ContentError, Events, Rules};
use kmsfs::crypto::{DataKey, FileKeys, NameKey, Secret, Suite, VolumeKeys};
use kmsfs::format::config::{self, ConfigError, End, Holes, VolumeConfig, WrappedVolumeKey, WrappingKey};
use kmsfs::format::geometry::{DiskOffset, PAGE_SIZE, SizeHint, size_hint, size_with_last_page};
use kmsfs::format::header::HeaderError;
use kmsfs::format::name;
use kmsfs::keys::providers::{self, ProviderSettings};
use kmsfs::keys::{
    EncryptionContext, KeyError, KeyLimits, Provider, ProviderError, ProviderErrorKind, ProviderKind, Volume,
    WrappedKey, volume,
};
use kmsfs::storage::MemoryFile;
use sha2::{Digest as _, Sha256};

/// What a reader answers: the bytes that the case asks for, or why not.
type Answer = Result<Vec<u8>, &'static str>;

#[test]
fn every_case_is_answered_as_expected() {
    let (mut failures, mut kinds) = (Vec::new(), BTreeMap::<String, usize>::new());
    for path in cases() {
        let case = Case::read(&path);
        *kinds.entry(case.text("kind").to_owned()).or_default() += 1;
        let answer = case.run();
        let word = answer.as_ref().map_or_else(|word| *word, |_| "ok");
        if word != case.text("expect") {
            failures.push(format!("{}: {word} instead of {}", path.display(), case.text("expect")));
        } else if let (Ok(bytes), true) = (&answer, case.has("answer"))
            && *bytes != case.answer()
        {
            failures.push(format!("{}: accepted, but with other bytes", path.display()));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert_eq!(
        kinds.keys().map(String::as_str).collect::<Vec<_>>(),
        ["config", "directory", "file", "header", "link", "name", "size", "wrapped"],
        "a kind of case is missing"
    );
}

fn cases() -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut cases: Vec<_> = entries.filter(|path| path.extension().is_some_and(|ext| ext == "toml")).collect();
    cases.sort();
    cases
}

/// The fields of a case.
struct Case(toml::Table);

impl Case {
    fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        Self(text.parse().unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    fn has(&self, field: &str) -> bool {
        self.0.contains_key(field)
    }

    fn text(&self, field: &str) -> &str {
        self.0[field].as_str().unwrap_or_else(|| panic!("{field} is not text"))
    }

    fn bytes(&self, field: &str) -> Vec<u8> {
        BASE64.decode(self.text(field)).unwrap()
    }

    fn array<const N: usize>(&self, field: &str) -> [u8; N] {
        self.bytes(field).try_into().unwrap()
    }

    fn secret(&self, field: &str) -> DataKey {
        secret_of(&self.array(field))
    }

    fn number(&self, field: &str) -> u64 {
        self.0[field].as_integer().unwrap().try_into().unwrap()
    }

    fn suite(&self) -> Suite {
        Suite::from_name(self.text("suite")).unwrap()
    }

    /// Sizes are answered in decimal, because TOML integers end at 2^63 - 1; everything else in base64.
    fn answer(&self) -> Vec<u8> {
        if self.text("kind") == "size" { self.text("answer").into() } else { self.bytes("answer") }
    }

    fn run(&self) -> Answer {
        match self.text("kind") {
            "config" => self.config(),
            "directory" => self.directory(),
            "file" => self.file(),
            "header" => self.header(),
            "link" => self.link(),
            "name" => self.name(),
            "size" => self.size(),
            "wrapped" => self.wrapped(),
            other => panic!("no such kind of case: {other}"),
        }
    }

    fn volume_keys(&self, suite: Suite) -> VolumeKeys {
        VolumeKeys::derive(&self.secret("volume-key"), &self.array("volume-id"), suite)
    }

    fn config(&self) -> Answer {
        let provider = Scripted { volume_key: self.array("volume-key"), data_key: [0; 32] };
        let sealed = config::parse(self.text("file").as_bytes()).map_err(|error| word_of(&error.into()))?;
        unlock(&sealed, provider).map(|_| Vec::new())
    }

    /// Opens a header page, and seals a probe under the key that it gives.
    fn header(&self) -> Answer {
        let volume_id = self.array("volume-id");
        let provider = Scripted { volume_key: self.array("volume-key"), data_key: self.array("data-key") };
        let mut config = VolumeConfig::new(volume_id, Suite::Xaes256Gcm.name(), Holes::Allow, End::Lenient, 1);
        let (provider_name, key) = (ProviderKind::Local.name().to_owned(), self.text("key-id").to_owned());
        config.wrapping_keys.push(WrappingKey { provider: provider_name.clone(), key: key.clone(), location: None });
        config.volume_keys.push(WrappedVolumeKey { provider: provider_name, key, wrapped: String::new() });
        let body = config.body().unwrap();
        let seal = self.volume_keys(Suite::Xaes256Gcm).config_mac(body.as_bytes());
        let volume = unlock(&config::parse(config::seal(&body, &seal).as_bytes()).unwrap(), provider)?;

        let page = self.array("header");
        let header = volume.ring.authenticate(&page).map_err(|error| word_of(&error))?.ok_or("empty")?;
        let keys = volume.ring.open(&header).map_err(|error| word_of(&error))?;
        let mut probe = vec![0; 5];
        let tag = keys.keys.session().seal(&[0; 24], b"", b"probe", &mut probe);
        Ok([probe, tag.to_vec()].concat())
    }

    /// Reads a file to its end: the SHA-256 of the plaintext, and its size.
    fn file(&self) -> Answer {
        let keys = FileKeys::create(&self.secret("data-key"), self.suite(), &self.array("file-id"));
        let mut disk = vec![0; usize::try_from(PAGE_SIZE).unwrap()];
        disk.extend(self.bytes("pages"));
        disk.resize(usize::try_from(self.number("disk-size")).unwrap(), 0);
        let rules = Rules {
            holes: if self.text("holes") == "deny" { Holes::Deny } else { Holes::Allow },
            end: if self.text("end") == "strict" { End::Strict } else { End::Lenient },
        };
        let file = Arc::new(MemoryFile::new(disk));
        let content = Content::open(file, Some(keys), rules, Arc::new(Events::default())).map_err(word_of_content)?;
        let mut plain = vec![0; usize::try_from(content.size()).unwrap()];
        let read = content.read(0, &mut plain).map_err(word_of_content)?;
        assert_eq!(read, plain.len(), "the whole file is read");
        Ok([Sha256::digest(&plain).as_slice(), &content.size().to_le_bytes()].concat())
    }

    fn size(&self) -> Answer {
        let disk = DiskOffset(self.text("disk-size").parse().unwrap());
        let size = match size_hint(disk).map_err(|_| "impossible size")? {
            SizeHint::Known(size) => size,
            SizeHint::AskLastPage(last) => size_with_last_page(last, usize::try_from(self.number("len")).unwrap()),
        };
        Ok(size.0.to_string().into_bytes())
    }

    fn name(&self) -> Answer {
        let sealed = name::decode(self.text("text").as_bytes()).ok_or("name")?;
        let keys = self.volume_keys(Suite::Xaes256Gcm);
        let plain = keys.name.open(&self.array("directory"), &sealed).map_err(|_| "name")?;
        if name::is_valid(&plain) { Ok(plain) } else { Err("no name") }
    }

    fn directory(&self) -> Answer {
        let signed = name::decode(self.text("target").as_bytes()).ok_or("directory id")?;
        let signed: [u8; 32] = signed.try_into().map_err(|_| "directory id")?;
        let keys: NameKey = self.volume_keys(Suite::Xaes256Gcm).name;
        keys.directory_id(&signed).map(Vec::from).map_err(|_| "directory id")
    }

    fn link(&self) -> Answer {
        let sealed = name::decode(self.text("text").as_bytes()).ok_or("link")?;
        self.volume_keys(self.suite()).link.open(&sealed).map_err(|_| "link")
    }

    /// Unwraps with a real keyring file.
    fn wrapped(&self) -> Answer {
        let directory = tempfile::tempdir().unwrap();
        let keyring = directory.path().join("keyring");
        std::fs::write(&keyring, self.text("keyring")).unwrap();
        std::fs::set_permissions(&keyring, std::fs::Permissions::from_mode(0o600)).unwrap();
        let key_id = self.text("key-id");
        let provider =
            providers::open(ProviderKind::Local, key_id, Some(&keyring), &ProviderSettings::default()).unwrap();
        let context = EncryptionContext::data_key(&self.array("volume-id"), &self.array("data-key-id"));
        let data_key = provider.unwrap(key_id, &self.bytes("wrapped"), &context);
        data_key.map(|key| key.expose().to_vec()).map_err(|error| word_of(&error.into()))
    }
}

fn unlock(sealed: &config::SealedConfig, provider: Scripted) -> Result<Volume, &'static str> {
    volume::unlock(sealed, Arc::new(provider), KeyLimits::default()).map_err(|error| word_of(&error))
}

fn secret_of(bytes: &[u8; 32]) -> DataKey {
    Secret::fill_with(|secret| {
        secret.copy_from_slice(bytes);
        Ok::<_, std::convert::Infallible>(())
    })
    .unwrap()
}

fn word_of(error: &KeyError) -> &'static str {
    match error {
        KeyError::Config(ConfigError::NoSeal) => "no seal",
        KeyError::Config(ConfigError::UnknownVersion(_)) | KeyError::Header(HeaderError::UnknownVersion(_)) => {
            "unknown version"
        }
        KeyError::Config(ConfigError::Syntax(_) | ConfigError::Field { .. } | ConfigError::TooLarge) => "malformed",
        KeyError::BrokenSeal => "seal",
        KeyError::Header(HeaderError::NotAHeader) => "not a header",
        KeyError::Header(HeaderError::UnknownFlags(_)) => "unknown flags",
        KeyError::Header(HeaderError::Malformed(_)) => "malformed",
        KeyError::UnauthenticHeader => "header mac",
        KeyError::UnknownSuite(_) => "unknown suite",
        KeyError::NoUsableRecord(_) => "no usable record",
        KeyError::Commitment(_) => "commitment",
        KeyError::Provider(error) => match error.kind {
            ProviderErrorKind::Tampered => "wrapped key",
            ProviderErrorKind::KeyNotFound => "no such key",
            ProviderErrorKind::KeyUnusable => "key disabled",
            _ => "provider",
        },
        _ => "other",
    }
}

fn word_of_content(error: ContentError) -> &'static str {
    match error {
        ContentError::Unauthentic { .. } => "page",
        ContentError::BadTrailer { .. } => "trailer",
        ContentError::Hole { .. } => "hole",
        ContentError::NoEndMark { .. } => "end mark",
        ContentError::ImpossibleSize(_) => "impossible size",
        _ => "other",
    }
}

/// A provider that answers what the case says, whatever it is asked for.
struct Scripted {
    volume_key: [u8; 32],
    data_key: [u8; 32],
}

impl Provider for Scripted {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Local
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn generate_data_key(&self, _: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        Err(ProviderError::new(ProviderErrorKind::Denied, "a reader makes no keys"))
    }

    fn wrap(&self, _: &str, _: &DataKey, _: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        Err(ProviderError::new(ProviderErrorKind::Denied, "a reader wraps no keys"))
    }

    fn unwrap(&self, _: &str, _: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let is_volume = context.pairs().any(|pair| pair == ("kmsfs:purpose", "volume"));
        Ok(secret_of(if is_volume { &self.volume_key } else { &self.data_key }))
    }
}
