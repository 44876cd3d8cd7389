//! Keys of files are nowhere in the memory of a mount after lock, and before it in protected memory alone, whichever provider
//! gave them. What a module of PKCS #11 keeps of its answers while it is loaded is its own affair.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kmsfs::format::{header, hex};
use kmsfs::keys::providers::VaultSettings;
use kmsfs::keys::{EncryptionContext, Provider};

use super::bao::Bao;
use super::{age, pkcs11};
use crate::support::memory_scan::{Pattern, scan};
use crate::support::{Home, Volume, bytes, needs_root};

const FILES: usize = 30;
const DATA_KEY: &str = "data key";
const DATA_KEY_TEXT: &str = "data key in base64";

/// The data keys of all files, raw and in base64.
fn data_keys(volume: &Volume, provider: &dyn Provider) -> Vec<Pattern> {
    let config = fs::read_to_string(volume.cipher.join(".kmsfs/volume.toml")).unwrap();
    let id = config.split_once("volume-id = \"").unwrap().1.split('"').next().unwrap();
    let volume_id: [u8; 16] = hex::decode_uuid(id).unwrap();
    let of_file = |number: usize| {
        let sealed = fs::read(volume.behind(format!("f{number}"))).unwrap();
        let page: header::HeaderPage = sealed[..4096].try_into().unwrap();
        let header = header::parse_page(&page)[0].as_ref().unwrap().header.clone();
        let context = EncryptionContext::data_key(&volume_id, &header.data_key_id);
        let record = &header.records[0];
        let key = provider.unwrap(std::str::from_utf8(&record.key_id).unwrap(), &record.wrapped, &context).unwrap();
        // The last characters of base64 depend on what follows.
        let text = STANDARD.encode(key.expose()).as_bytes()[..42].to_vec();
        [Pattern { kind: DATA_KEY, bytes: key.expose().to_vec() }, Pattern { kind: DATA_KEY_TEXT, bytes: text }]
    };
    (0..FILES).flat_map(of_file).collect()
}

fn keeps_no_keys(volume: &Volume, provider: &dyn Provider) {
    needs_root();
    for number in 0..FILES {
        fs::write(volume.path(format!("f{number}")), bytes(number as u64 + 1, 5000)).unwrap();
    }
    volume.remount();
    for number in 0..FILES {
        assert!(fs::read(volume.path(format!("f{number}"))).unwrap() == bytes(number as u64 + 1, 5000));
    }
    let keys = data_keys(volume, provider);
    let open = scan(volume.pid(), &keys);
    let outside: Vec<_> = open.found.iter().filter(|found| found.kind == DATA_KEY && !found.locked).collect();
    assert!(open.searched > 1 << 20 && outside.is_empty(), "{:#?}", open.places(&[DATA_KEY]));
    volume.home.ok(&[&"lock", &volume.plain]);
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let left = scan(volume.pid(), &keys).places(&[DATA_KEY, DATA_KEY_TEXT]);
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < end, "keys are left after lock: {left:#?}");
    }
}

#[test]
fn the_answers_of_vault_leave_no_key() {
    let bao = Bao::start_tls();
    let mut home = Home::new();
    home.set("VAULT_ADDR", bao.address());
    home.set("VAULT_CACERT", bao.ca_bundle());
    home.set("VAULT_TOKEN", "root");
    let volume = Volume::in_home(home, &["--key", "vault:app"], &[]);
    let settings = VaultSettings { ca_bundle: Some(bao.ca_bundle()), ..bao.settings("root") };
    keeps_no_keys(&volume, bao.provider_with("app", settings).as_ref());
}

#[test]
fn an_identity_of_age_leaves_no_key() {
    let mut home = Home::new();
    let (identity, recipient) = age::new_identity(&home.path("home"), "id");
    home.set("KMSFS_AGE_IDENTITY", &identity);
    let volume = Volume::in_home(home, &["--key", &format!("age:{recipient}")], &[]);
    keeps_no_keys(&volume, age::provider(&recipient, Some(&identity)).as_ref());
}

#[test]
fn a_module_leaves_no_key() {
    let tokens = pkcs11::tokens();
    let mut home = Home::new();
    home.set("SOFTHSM2_CONF", tokens.config());
    home.set("KMSFS_PKCS11_MODULE", pkcs11::MODULE);
    home.set("KMSFS_PKCS11_PIN_FILE", &tokens.pin_file);
    let volume = Volume::in_home(home, &["--key", &format!("pkcs11:{}", pkcs11::TOKEN)], &[]);
    let provider = pkcs11::provider(pkcs11::TOKEN, Path::new(pkcs11::MODULE), Some(&tokens.pin_file));
    keeps_no_keys(&volume, provider.as_ref());
}
