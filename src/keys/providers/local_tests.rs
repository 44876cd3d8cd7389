//! The local provider.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::time::SystemTime;

use tempfile::TempDir;

use super::super::create_local;
use super::super::keyring::MAX_LEN;
use super::super::{KeyringChange, change_keyring};
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
    keyring_file::write_new(&path, &Keyring { keys, seal: None }.encode().unwrap()).unwrap();
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
    let keys = Arc::new(Keys { path: PathBuf::new(), keys });
    let loaded = Mutex::new(Loaded { keys, stamp: None, seal: None });
    let provider = LocalProvider { current: id.to_owned(), directory: None, loaded };
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

/// With a passphrase and without: what is changed in the file is changed here, and what is not the file's is not believed.
#[test]
fn a_changed_keyring_is_read_again() {
    let passphrase = Passphrase::new(b"right".to_vec());
    for under in [None, Some(&passphrase)] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyring");
        create_local(&path, under).unwrap();
        let provider = LocalProvider::open(&path, "", under).unwrap();
        let id = provider.current.clone();
        let (data_key, old) = provider.generate_data_key(&context()).unwrap();
        change_keyring(&path, under, &KeyringChange::NewVersion(None)).unwrap();
        let (_, new) = provider.generate_data_key(&context()).unwrap();
        assert_eq!((old.bytes[1], new.bytes[1]), (1, 2), "new keys are under the new version at once");
        let unwrap = || provider.unwrap(&id, &old.bytes, &context()).map(|key| *key.expose());
        assert_eq!(unwrap().unwrap(), *data_key.expose());
        change_keyring(&path, under, &KeyringChange::Disable(&id)).unwrap();
        assert_eq!(kind_of(unwrap()), ProviderErrorKind::KeyUnusable);
        change_keyring(&path, under, &KeyringChange::Enable(&id)).unwrap();
        assert!(unwrap().is_ok());
        std::fs::remove_file(&path).unwrap();
        assert!(unwrap().is_ok(), "the disk with the keyring may be taken away");
        create_local(&path, None).unwrap();
        assert_eq!(unwrap().is_ok(), under.is_some(), "a keyring that lost its passphrase is not believed");
    }
}
