//! The local provider: wrapping keys from a keyring file, so that everything works without a KMS.
//!
//! A wrapped key is `1 | key version u32 | nonce 24 | ciphertext 32 | tag 16`, little-endian, XAES-256-GCM under that
//! version of the wrapping key. Associated data: the first five bytes, the key id with a u16 length before it, and the
//! encryption context.
//!
//! Invariants: the keyring file is read once, when the provider opens, and only if nobody else can read it; a new one
//! appears whole, or not at all, and never in the place of another file.

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::super::{
    EncryptionContext, KeyDescription, Provider, ProviderError, ProviderErrorKind, ProviderKind, WrappedKey, describe,
};
use super::Passphrase;
use super::keyring::{Key, KeyState, Keyring, MAX_LEN};
use crate::crypto::{DataKey, NONCE_LEN, Secret, Suite, SuiteKey, TAG_LEN, random_array};
use crate::format::hex;

const WRAPPED_VERSION: u8 = 1;
/// The format's version and the key's.
const HEAD_LEN: usize = 5;
const WRAPPED_LEN: usize = HEAD_LEN + NONCE_LEN + 32 + TAG_LEN;

const NOT_WRAPPED_HERE: &str = "not a wrapped key of this provider: the file was changed";
const NO_SUCH_VERSION: &str = "wrapped by a version of the key that is not here: use the newest copy of the keyring";
const NOT_AUTHENTIC: &str = "the wrapped key or its context was changed, or it belongs to another volume";

/// Wrapping keys from a keyring file.
pub(super) struct LocalProvider {
    path: PathBuf,
    keys: Vec<WrappingKey>,
    /// The id of the key that wraps new data keys.
    current: String,
}

struct WrappingKey {
    id: String,
    state: KeyState,
    /// From the oldest to the newest.
    versions: Vec<VersionKey>,
}

/// One version of a wrapping key, ready for use.
pub(super) struct VersionKey {
    number: u32,
    key: SuiteKey,
}

impl LocalProvider {
    /// Opens the keyring at `path` for its key `id`, or for its newest enabled one if `id` is empty.
    ///
    /// # Errors
    /// `KeyNotFound` if there is no such file or key, `KeyUnusable` if no key is enabled, `Denied` if the file may not
    /// be read, `Misconfigured` if others may read it or it is malformed, `Credentials` for its passphrase.
    pub(super) fn open(path: &Path, id: &str, passphrase: Option<&Passphrase>) -> Result<Self, ProviderError> {
        let keyring = Keyring::decode(&read(path)?, passphrase).map_err(|error| at(path, &error))?;
        let keys: Vec<_> = keyring.keys.iter().map(WrappingKey::new).collect();
        let provider = Self { path: path.to_owned(), keys, current: id.to_owned() };
        let current = if id.is_empty() { provider.newest_enabled()? } else { provider.key(id)? }.id.clone();
        Ok(Self { current, ..provider })
    }

    fn newest_enabled(&self) -> Result<&WrappingKey, ProviderError> {
        let enabled = self.keys.iter().rfind(|key| key.state == KeyState::Enabled);
        enabled.ok_or_else(|| self.error(ProviderErrorKind::KeyUnusable, "every key is disabled: enable one"))
    }

    fn key(&self, id: &str) -> Result<&WrappingKey, ProviderError> {
        let missing = || {
            let ids: Vec<_> = self.keys.iter().map(|key| key.id.as_str()).collect();
            let message = format!("no key {id} here, only {}: is it the right keyring?", ids.join(", "));
            self.error(ProviderErrorKind::KeyNotFound, &message)
        };
        self.keys.iter().find(|key| key.id == id).ok_or_else(missing)
    }

    fn enabled(&self, id: &str) -> Result<&WrappingKey, ProviderError> {
        let key = self.key(id)?;
        match key.state {
            KeyState::Enabled => Ok(key),
            KeyState::Disabled => {
                let message = format!("the key {id} is disabled: enable it to use what it wraps");
                Err(self.error(ProviderErrorKind::KeyUnusable, &message))
            }
        }
    }

    fn error(&self, kind: ProviderErrorKind, message: &str) -> ProviderError {
        at(&self.path, &ProviderError::new(kind, message))
    }
}

impl Provider for LocalProvider {
    fn kind(&self) -> ProviderKind {
        ProviderKind::Local
    }

    fn is_remote(&self) -> bool {
        false
    }

    fn generate_data_key(&self, context: &EncryptionContext) -> Result<(DataKey, WrappedKey), ProviderError> {
        let data_key = DataKey::random();
        let wrapped = self.wrap(&self.current, &data_key, context)?;
        Ok((data_key, wrapped))
    }

    fn wrap(&self, key_id: &str, data_key: &DataKey, context: &EncryptionContext) -> Result<WrappedKey, ProviderError> {
        let key = self.enabled(key_id)?;
        let newest = key.versions.last();
        let newest = newest.ok_or_else(|| self.error(ProviderErrorKind::KeyUnusable, "the key has no version"))?;
        Ok(WrappedKey { key_id: key.id.clone(), bytes: newest.wrap(&key.id, data_key, context) })
    }

    fn unwrap(&self, key_id: &str, wrapped: &[u8], context: &EncryptionContext) -> Result<DataKey, ProviderError> {
        let key = self.enabled(key_id)?;
        let error = |kind, message: &str| self.error(kind, &format!("{message} (key {key_id})"));
        let number = version_number(wrapped).ok_or_else(|| error(ProviderErrorKind::Tampered, NOT_WRAPPED_HERE))?;
        let version = key.versions.iter().find(|version| version.number == number);
        let version = version.ok_or_else(|| error(ProviderErrorKind::KeyNotFound, NO_SUCH_VERSION))?;
        version.unwrap(key_id, wrapped, context).ok_or_else(|| error(ProviderErrorKind::Tampered, NOT_AUTHENTIC))
    }

    fn describe(&self, key_id: &str) -> Result<KeyDescription, ProviderError> {
        let key = self.key(key_id)?;
        let versions = key.versions.len();
        Ok(KeyDescription {
            key_id: key.id.clone(),
            state: match key.state {
                KeyState::Enabled => describe::KeyState::Enabled,
                KeyState::Disabled => describe::KeyState::Disabled,
            },
            rotation: Some(format!("by hand ({versions} version{})", if versions == 1 { "" } else { "s" })),
            origin: Some(format!("keyring {}", self.path.display())),
            multi_region: false,
            usage: "wrapping".to_owned(),
        })
    }
}

impl WrappingKey {
    fn new(key: &Key) -> Self {
        let versions = key.versions.iter().map(|version| VersionKey::new(version.number, &version.material));
        Self { id: key.id.clone(), state: key.state, versions: versions.collect() }
    }
}

impl VersionKey {
    /// Version `number` of a wrapping key.
    pub(super) fn new(number: u32, material: &Secret<32>) -> Self {
        Self { number, key: SuiteKey::new(Suite::Xaes256Gcm, material) }
    }

    /// `data_key` wrapped by the key `id`, bound to `context`.
    pub(super) fn wrap(&self, id: &str, data_key: &DataKey, context: &EncryptionContext) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = random_array();
        let mut wrapped = Vec::with_capacity(WRAPPED_LEN);
        wrapped.push(WRAPPED_VERSION);
        wrapped.extend_from_slice(&self.number.to_le_bytes());
        let bound_to = associated_data(&wrapped, id, context);
        wrapped.extend_from_slice(&nonce);
        let start = wrapped.len();
        wrapped.resize(start + data_key.expose().len(), 0);
        let tag = self.key.session().seal(&nonce, &bound_to, data_key.expose(), &mut wrapped[start..]);
        wrapped.extend_from_slice(&tag);
        wrapped
    }

    /// The data key in `wrapped`, if this key, `id` and `context` made it.
    pub(super) fn unwrap(&self, id: &str, wrapped: &[u8], context: &EncryptionContext) -> Option<DataKey> {
        let (head, rest) = wrapped.split_first_chunk::<HEAD_LEN>()?;
        let (nonce, rest) = rest.split_first_chunk::<NONCE_LEN>()?;
        let (cipher, tag) = rest.split_last_chunk::<TAG_LEN>()?;
        if version_number(wrapped) != Some(self.number) {
            return None;
        }
        let bound_to = associated_data(head, id, context);
        Secret::fill_with(|key| self.key.session().open(nonce, &bound_to, cipher, tag, key)).ok()
    }
}

/// The key version in `wrapped`, if it has the shape of a wrapped key.
fn version_number(wrapped: &[u8]) -> Option<u32> {
    let (version, rest) = wrapped.split_first()?;
    let (number, _) = rest.split_first_chunk()?;
    (*version == WRAPPED_VERSION && wrapped.len() == WRAPPED_LEN).then(|| u32::from_le_bytes(*number))
}

/// `head | u16 length of id | id | context`.
fn associated_data(head: &[u8], id: &str, context: &EncryptionContext) -> Vec<u8> {
    let length = u16::try_from(id.len()).unwrap_or(u16::MAX).to_le_bytes();
    [head, &length, id.as_bytes(), &context.associated_data()].concat()
}

/// The keyring file at `path`, which must be a regular file that only its owner may touch.
fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, ProviderError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| not_opened(path, error))?;
    let file = File::from(fd);
    let failed = |error: io::Error| failed(path, "cannot be read", &error);
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode();
    if !metadata.is_file() {
        return Err(misconfigured(path, "is not a regular file"));
    }
    if mode & 0o077 != 0 {
        let message = format!("has mode {:04o}, so that others can use its keys: chmod 600 it", mode & 0o7777);
        return Err(misconfigured(path, &message));
    }
    let limit = MAX_LEN as u64 + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_LEN + 1));
    file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

/// Writes a new keyring file at `path`.
///
/// # Errors
/// `Misconfigured` if `path` exists or cannot be written, `Denied` if that is not permitted.
pub(super) fn write_new(path: &Path, text: &str) -> Result<(), ProviderError> {
    let Some(name) = path.file_name() else {
        return Err(misconfigured(path, "is not the name of a file"));
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = |error: io::Error| failed(path, "cannot be created", &error);
    let is_new = !parent.exists();
    DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    let temporary = parent.join(format!(".{}.{}", name.to_string_lossy(), hex::encode(&random_array::<8>())));
    let written = write_temporary(&temporary, text).and_then(|()| publish(&temporary, path));
    if written.is_err() {
        // Nothing better can be done about a second failure than to report the first one.
        let _ = std::fs::remove_file(&temporary);
    }
    written.and_then(|()| sync_names(parent, is_new)).map_err(failed)
}

/// Makes the names in a directory durable, and if it is new, its own name and those of the new ones above it.
fn sync_names(directory: &Path, is_new: bool) -> io::Result<()> {
    let directory = File::open(directory)?;
    // Those above may be none that this user can open.
    if is_new { Ok(rustix::fs::syncfs(directory)?) } else { directory.sync_all() }
}

fn write_temporary(path: &Path, text: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let owner_only = Mode::RUSR | Mode::WUSR;
    let fd = rustix::fs::open(path, flags, owner_only)?;
    rustix::fs::fchmod(&fd, owner_only)?;
    let mut file = File::from(fd);
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

/// Gives `temporary` its name, which must be free.
fn publish(temporary: &Path, path: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
        // Not every filesystem knows the flag; a hard link does not replace either.
        Err(Errno::INVAL | Errno::NOSYS) => {
            rustix::fs::linkat(CWD, temporary, CWD, path, AtFlags::empty())?;
            std::fs::remove_file(temporary)
        }
        result => Ok(result?),
    }
}

fn not_opened(path: &Path, error: Errno) -> ProviderError {
    match error {
        Errno::LOOP => misconfigured(path, "is a symbolic link: name the file itself"),
        Errno::NOENT | Errno::NOTDIR => {
            let message = "does not exist: is its disk there, or is it elsewhere (--keyring)?";
            at(path, &ProviderError::new(ProviderErrorKind::KeyNotFound, message))
        }
        error => failed(path, "cannot be opened", &error.into()),
    }
}

fn failed(path: &Path, what: &str, error: &io::Error) -> ProviderError {
    match error.kind() {
        io::ErrorKind::AlreadyExists => misconfigured(path, "exists already, and a keyring is never overwritten"),
        io::ErrorKind::PermissionDenied => {
            at(path, &ProviderError::new(ProviderErrorKind::Denied, format!("{what}: {error}")))
        }
        _ => misconfigured(path, &format!("{what}: {error}")),
    }
}

fn misconfigured(path: &Path, message: &str) -> ProviderError {
    at(path, &ProviderError::new(ProviderErrorKind::Misconfigured, message))
}

/// `error` with the keyring's path.
fn at(path: &Path, error: &ProviderError) -> ProviderError {
    ProviderError::new(error.kind, format!("keyring {}: {}", path.display(), error.message))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::time::SystemTime;

    use tempfile::TempDir;

    use super::super::create_local;
    use super::*;

    fn context() -> EncryptionContext {
        EncryptionContext::data_key(&[1; 16], &[2; 16])
    }

    fn new_keyring() -> (TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys/keyring");
        create_local(&path, None).unwrap();
        (directory, path)
    }

    fn open(path: &Path) -> LocalProvider {
        LocalProvider::open(path, "", None).unwrap()
    }

    fn kind_of<T>(result: Result<T, ProviderError>) -> ProviderErrorKind {
        result.err().unwrap().kind
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    /// A keyring of an older enabled, a newer enabled and a disabled key; the ids in that order.
    fn three_keys() -> (TempDir, PathBuf, [String; 3]) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyring");
        let mut keys: Vec<Key> = (0..3).flat_map(|_| Keyring::generate(SystemTime::now()).keys).collect();
        keys[2].state = KeyState::Disabled;
        let ids = std::array::from_fn(|i| keys[i].id.clone());
        write_new(&path, &Keyring { keys }.encode(None).unwrap()).unwrap();
        (directory, path, ids)
    }

    #[test]
    fn round_trips_over_a_reopened_keyring() {
        let (_directory, path) = new_keyring();
        let (data_key, wrapped) = open(&path).generate_data_key(&context()).unwrap();
        assert_eq!(wrapped.bytes.len(), WRAPPED_LEN);
        let again = open(&path).unwrap(&wrapped.key_id, &wrapped.bytes, &context()).unwrap();
        assert_eq!(again.expose(), data_key.expose());
        let (other, other_wrapped) = open(&path).generate_data_key(&context()).unwrap();
        assert_ne!((other.expose(), other_wrapped.bytes), (data_key.expose(), wrapped.bytes));
    }

    #[test]
    fn keys_are_described_even_if_they_are_disabled() {
        let (_directory, path, [_, newer, disabled]) = three_keys();
        let provider = open(&path);
        let described = provider.describe(&newer).unwrap();
        assert_eq!((described.key_id.as_str(), described.state), (newer.as_str(), describe::KeyState::Enabled));
        assert_eq!(described.rotation.as_deref(), Some("by hand (1 version)"));
        assert_eq!(provider.describe(&disabled).unwrap().state, describe::KeyState::Disabled);
        assert_eq!(kind_of(provider.describe("k-0")), ProviderErrorKind::KeyNotFound);
    }

    #[test]
    fn a_sealed_keyring_opens_with_its_passphrase() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyring");
        let [right, wrong] = ["right", "wrong"].map(|text| Passphrase::new(text.into()));
        create_local(&path, Some(&right)).unwrap();
        assert!(LocalProvider::open(&path, "", Some(&right)).is_ok());
        let error = LocalProvider::open(&path, "", Some(&wrong)).err().unwrap();
        assert_eq!(error.kind, ProviderErrorKind::Credentials);
        assert!(error.message.ends_with("keyring: wrong passphrase, or the keyring was changed"), "{error}");
        assert_eq!(kind_of(LocalProvider::open(&path, "", None)), ProviderErrorKind::Credentials);
    }

    #[test]
    fn another_context_does_not_unwrap() {
        let (_directory, path) = new_keyring();
        let provider = open(&path);
        let (_, wrapped) = provider.generate_data_key(&context()).unwrap();
        for other in [
            EncryptionContext::data_key(&[1; 16], &[3; 16]),
            EncryptionContext::data_key(&[2; 16], &[2; 16]),
            EncryptionContext::volume_key(&[1; 16]),
        ] {
            let result = provider.unwrap(&wrapped.key_id, &wrapped.bytes, &other);
            assert_eq!(kind_of(result), ProviderErrorKind::Tampered);
        }
    }

    #[test]
    fn no_bit_of_a_wrapped_key_can_be_changed() {
        let (_directory, path) = new_keyring();
        let provider = open(&path);
        let (_, wrapped) = provider.generate_data_key(&context()).unwrap();
        for bit in 0..WRAPPED_LEN * 8 {
            let mut bytes = wrapped.bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let in_key_version = (1..HEAD_LEN).contains(&(bit / 8));
            let expected = if in_key_version { ProviderErrorKind::KeyNotFound } else { ProviderErrorKind::Tampered };
            assert_eq!(kind_of(provider.unwrap(&wrapped.key_id, &bytes, &context())), expected, "bit {bit}");
        }
        for length in [0, 1, 4, 5, 28, WRAPPED_LEN - 1] {
            let result = provider.unwrap(&wrapped.key_id, &wrapped.bytes[..length], &context());
            assert_eq!(kind_of(result), ProviderErrorKind::Tampered, "{length} bytes");
        }
        let longer = [wrapped.bytes.as_slice(), &[0]].concat();
        assert_eq!(kind_of(provider.unwrap(&wrapped.key_id, &longer, &context())), ProviderErrorKind::Tampered);
    }

    #[test]
    fn keys_are_told_apart() {
        let (_directory, path, [older, newer, disabled]) = three_keys();
        let (_, wrapped) = open(&path).generate_data_key(&context()).unwrap();
        assert_eq!(wrapped.key_id, newer);
        let provider = LocalProvider::open(&path, &older, None).unwrap();
        let (_, of_older) = provider.generate_data_key(&context()).unwrap();
        assert_eq!(of_older.key_id, older);
        let unwrap = |id: &str| provider.unwrap(id, &wrapped.bytes, &context());
        assert!(unwrap(&newer).is_ok());
        assert_eq!(kind_of(unwrap(&older)), ProviderErrorKind::Tampered);
        assert_eq!(kind_of(unwrap(&disabled)), ProviderErrorKind::KeyUnusable);
        assert_eq!(kind_of(unwrap("k-0000000000000000")), ProviderErrorKind::KeyNotFound);
        assert_eq!(kind_of(LocalProvider::open(&path, "k-0000000000000000", None)), ProviderErrorKind::KeyNotFound);
    }

    #[test]
    fn a_disabled_key_does_not_wrap() {
        let (_directory, path, [.., disabled]) = three_keys();
        let provider = LocalProvider::open(&path, &disabled, None).unwrap();
        assert_eq!(kind_of(provider.generate_data_key(&context())), ProviderErrorKind::KeyUnusable);
        let text = std::fs::read_to_string(&path).unwrap().replace("\"enabled\"", "\"disabled\"");
        std::fs::write(&path, text).unwrap();
        assert_eq!(kind_of(LocalProvider::open(&path, "", None)), ProviderErrorKind::KeyUnusable);
    }

    #[test]
    fn a_data_key_is_brought_to_another_key() {
        let (_directory, path, [a, b, disabled]) = three_keys();
        let provider = LocalProvider::open(&path, &a, None).unwrap();
        let (data_key, made) = provider.generate_data_key(&context()).unwrap();
        let further = provider.wrap(&b, &data_key, &context()).unwrap();
        let rewrapped = provider.rewrap(&a, &made.bytes, &b, &context()).unwrap();
        for wrapped in [further, rewrapped] {
            assert_eq!(wrapped.key_id, b);
            assert_eq!(provider.unwrap(&b, &wrapped.bytes, &context()).unwrap().expose(), data_key.expose());
        }
        let unusable = kind_of(provider.rewrap(&a, &made.bytes, &disabled, &context()));
        assert_eq!(unusable, ProviderErrorKind::KeyUnusable);
        let unseen = provider.generate_wrapped_key(&context()).unwrap();
        assert_ne!(provider.unwrap(&a, &unseen.bytes, &context()).unwrap().expose(), data_key.expose());
    }

    #[test]
    fn old_versions_unwrap_and_the_newest_wraps() {
        let id = "k-0000000000000001";
        let material = [Secret::random(), Secret::random()];
        let versions = || vec![VersionKey::new(1, &material[0]), VersionKey::new(5, &material[1])];
        let keys = vec![WrappingKey { id: id.to_owned(), state: KeyState::Enabled, versions: versions() }];
        let provider = LocalProvider { path: PathBuf::new(), keys, current: id.to_owned() };
        let (data_key, wrapped) = provider.generate_data_key(&context()).unwrap();
        assert_eq!(wrapped.bytes[1..5], [5, 0, 0, 0]);
        let old = versions()[0].wrap(id, &data_key, &context());
        assert_eq!(provider.unwrap(id, &old, &context()).unwrap().expose(), data_key.expose());
        let mut as_newer = old;
        as_newer[1] = 5;
        assert_eq!(kind_of(provider.unwrap(id, &as_newer, &context())), ProviderErrorKind::Tampered);
    }

    #[test]
    fn a_new_keyring_is_private_and_whole() {
        let (_directory, path) = new_keyring();
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
    }

    #[test]
    fn a_keyring_is_never_overwritten() {
        let (_directory, path) = new_keyring();
        let before = std::fs::read(&path).unwrap();
        let error = create_local(&path, None).unwrap_err();
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
        assert!(error.message.contains("exists already"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), before);
        assert_eq!(path.parent().unwrap().read_dir().unwrap().count(), 1);
        assert_eq!(kind_of(create_local(Path::new("/"), None)), ProviderErrorKind::Misconfigured);
    }

    #[test]
    fn only_the_owner_may_have_access() {
        let (_directory, path) = new_keyring();
        for mode in [0o640, 0o604, 0o620, 0o601, 0o660] {
            chmod(&path, mode);
            let error = LocalProvider::open(&path, "", None).err().unwrap();
            assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
            assert!(error.message.contains("chmod 600"), "{error}");
        }
        chmod(&path, 0o400);
        assert!(LocalProvider::open(&path, "", None).is_ok());
    }

    #[test]
    fn only_a_regular_file_is_read() {
        let (directory, path) = new_keyring();
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        assert_eq!(kind_of(LocalProvider::open(&link, "", None)), ProviderErrorKind::Misconfigured);
        assert_eq!(kind_of(LocalProvider::open(directory.path(), "", None)), ProviderErrorKind::Misconfigured);
        let absent = directory.path().join("absent");
        assert_eq!(kind_of(LocalProvider::open(&absent, "", None)), ProviderErrorKind::KeyNotFound);
        std::fs::write(&path, vec![b'#'; MAX_LEN + 1]).unwrap();
        assert_eq!(kind_of(LocalProvider::open(&path, "", None)), ProviderErrorKind::Misconfigured);
    }
}
