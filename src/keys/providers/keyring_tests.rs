//! The keyring's format.

use super::*;

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.as_bytes().to_vec())
}

fn keyring() -> Keyring {
    let mut keyring = Keyring::generate(SystemTime::UNIX_EPOCH);
    let mut newer = Keyring::generate(SystemTime::now());
    newer.keys[0].state = KeyState::Disabled;
    newer.keys[0].versions.push(Version { number: 7, created: Some(8), material: Secret::random() });
    keyring.keys.append(&mut newer.keys);
    keyring
}

/// The file of a keyring under a passphrase.
fn sealed(mut keyring: Keyring, passphrase: &Passphrase, settings: KdfSettings) -> Zeroizing<String> {
    keyring.seal = Some(Arc::new(Seal::new(passphrase, settings).unwrap()));
    keyring.encode().unwrap()
}

type Facts = Vec<(String, KeyState, u64, Vec<(u32, [u8; 32])>)>;

fn facts(keyring: &Keyring) -> Facts {
    let versions = |key: &Key| key.versions.iter().map(|v| (v.number, *v.material.expose())).collect();
    keyring.keys.iter().map(|key| (key.id.clone(), key.state, key.created, versions(key))).collect()
}

fn refusal(file: &str, passphrase: Option<&Passphrase>) -> ProviderError {
    Keyring::decode(file.as_bytes(), passphrase).err().unwrap()
}

#[test]
fn an_unsealed_keyring_round_trips() {
    let keyring = keyring();
    let file = keyring.encode().unwrap();
    let again = Keyring::decode(file.as_bytes(), None).unwrap();
    assert_eq!(facts(&again), facts(&keyring));
    assert_eq!(*again.encode().unwrap(), *file);
}

#[test]
fn a_sealed_keyring_round_trips_and_shows_no_key() {
    let mut keyring = keyring();
    keyring.put_under(Some(&passphrase("right"))).unwrap();
    let file = keyring.encode().unwrap();
    assert_eq!(facts(&Keyring::decode(file.as_bytes(), Some(&passphrase("right"))).unwrap()), facts(&keyring));
    assert!(file.contains("memory-kib = 65536\npasses = 3\nlanes = 4\n"), "{}", *file);
    for (_, _, _, versions) in facts(&keyring) {
        assert!(versions.iter().all(|(_, material)| !file.contains(&BASE64.encode(material))));
    }
}

#[test]
fn a_sealed_keyring_needs_its_passphrase() {
    let file = sealed(keyring(), &passphrase("right"), KdfSettings::cheap());
    let wrong = refusal(&file, Some(&passphrase("wrong")));
    assert_eq!((wrong.kind, wrong.to_string()), (wrong_passphrase().kind, wrong_passphrase().to_string()));
    let missing = refusal(&file, None);
    assert_eq!(missing.kind, ProviderErrorKind::Credentials);
    assert!(missing.message.contains("--passphrase-file") && missing.message.contains("KMSFS_PASSPHRASE"));
    assert_eq!(refusal(&file, Some(&passphrase(""))).kind, ProviderErrorKind::Credentials);
    let empty = keyring().put_under(Some(&passphrase(""))).err().unwrap();
    assert_eq!(empty.kind, ProviderErrorKind::Credentials);
}

#[test]
fn no_byte_of_a_sealed_keyring_can_be_changed() {
    let file = sealed(keyring(), &passphrase("right"), KdfSettings::cheap());
    let right = passphrase("right");
    for at in 0..file.len() {
        let mut changed = file.as_bytes().to_vec();
        changed[at] ^= 1;
        assert!(Keyring::decode(&changed, Some(&right)).is_err(), "byte {at} of {}", *file);
        assert!(Keyring::decode(&file.as_bytes()[..at], Some(&right)).is_err(), "cut at {at}");
    }
}

#[test]
fn a_sealed_key_cannot_be_enabled_by_hand() {
    let file = sealed(keyring(), &passphrase("right"), KdfSettings::cheap());
    let changed = file.replace("disabled", "enabled");
    assert_eq!(refusal(&changed, Some(&passphrase("right"))), wrong_passphrase());
}

#[test]
fn costs_are_capped_before_they_are_paid() {
    let file = sealed(keyring(), &passphrase("right"), KdfSettings::cheap());
    for (from, to) in [
        ("memory-kib = 64", "memory-kib = 4294967295"),
        ("passes = 1", "passes = 4294967295"),
        ("passes = 1", "passes = 0"),
        ("lanes = 4", "lanes = 17"),
    ] {
        let error = refusal(&file.replace(from, to), Some(&passphrase("right")));
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured, "{to}");
    }
}

#[test]
fn every_defect_is_refused_and_no_key_is_repeated() {
    let keyring = keyring();
    let file = keyring.encode().unwrap();
    let material = BASE64.encode(keyring.keys[0].versions[0].material.expose());
    let cases = [
        ("format = 1", "format = 2", "newer kmsfs"),
        ("format = 1\n", "", "line 1 "),
        ("format = 1\n", "format = 1\nmore = 1\n", "line 3 "),
        ("state = \"enabled\"", "state = \"on\"", "line 6 "),
        ("k-", "K-", "key id"),
        (keyring.keys[1].id.as_str(), keyring.keys[0].id.as_str(), "key id"),
        ("number = 7", "number = 1", "rise"),
        ("number = 1", "number = 0", "rise"),
        (material.as_str(), "AAAA", "line 11 "),
        ("material", "number", "line"),
        ("\"\n\n[[key]]", "\n\n[[key]]", "line"),
    ];
    for (from, to, says) in cases {
        let changed = file.replacen(from, to, 1);
        assert_ne!(changed, *file, "{from}");
        let error = refusal(&changed, None);
        assert_eq!(error.kind, ProviderErrorKind::Misconfigured);
        assert!(error.message.contains(says) && !error.message.contains(&material), "{to}: {error}");
    }
    assert!(refusal("format = 1\nkey = []\n", None).message.contains("no key"));
    assert!(refusal(&" ".repeat(MAX_LEN + 1), None).message.contains("larger"));
    assert!(Keyring::decode(&[0xff], None).is_err());
}

#[test]
fn key_material_must_be_where_the_seal_says() {
    let (keyring, right) = (keyring(), passphrase("right"));
    let unsealed = keyring.encode().unwrap();
    let sealed = sealed(keyring, &right, KdfSettings::cheap());
    let (body, seal) = sealed.split_once(SEAL).unwrap();
    assert!(refusal(body, Some(&right)).message.contains("seal is missing"));
    assert!(refusal(&format!("{}{SEAL}{seal}", *unsealed), Some(&right)).message.contains("seal is damaged"));
    let without: String =
        unsealed.lines().filter(|line| !line.starts_with("material")).map(|l| format!("{l}\n")).collect();
    assert!(refusal(&without, None).message.contains("no key material"));
    assert!(refusal(&format!("{body}{SEAL}AAAA\"\n"), Some(&right)).message.contains("too short"));
}
