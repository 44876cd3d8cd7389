//! Real mounts under keys of these providers: what programs see, and what operators do.

use std::fs::{self, File};

use rustix::process::Signal;

use super::age::new_identity;
use super::bao::Bao;
use super::pkcs11::{MODULE, Tokens};
use crate::support::{Home, Volume, errno, eventually, walk};

const POLICY: &str = r#"
path "transit/encrypt/*" { capabilities = ["update"] }
path "transit/decrypt/*" { capabilities = ["update"] }
path "transit/keys/*" { capabilities = ["read"] }
"#;

const NO_POLICY: &str = r#"path "elsewhere/*" { capabilities = ["read"] }"#;

/// A home that uses the server with this token.
fn home_with(bao: &Bao, token: &str) -> Home {
    let mut home = Home::new();
    home.set("VAULT_ADDR", bao.address());
    home.set("BAO_TOKEN", token);
    home
}

/// Drops all keys, and what the kernel has cached.
fn make_cold(volume: &Volume) {
    for command in ["lock", "unlock"] {
        volume.home.ok(&[&command, &volume.plain]);
    }
}

#[test]
fn a_volume_under_a_transit_key_opens_again_and_fails_as_it_should() {
    let bao = Bao::start();
    bao.policy("user", POLICY);
    let token = bao.token(&["-policy=user"]);
    let volume = Volume::in_home(home_with(&bao, &token), &["--key", "vault:app"], &["--no-prefetch"]);
    for number in 0..8 {
        fs::write(volume.path(format!("f{number}")), format!("content {number}")).unwrap();
    }
    volume.remount();
    assert_eq!(fs::read_to_string(volume.path("f0")).unwrap(), "content 0");
    let held = File::open(volume.path("f7")).unwrap();
    let open = |number: u8| errno(File::open(volume.path(format!("f{number}"))));

    bao.admin(&["delete", "transit/keys/app/soft-delete"]);
    assert_eq!(open(1), Some(libc::EKEYREVOKED), "deleted, but not for good");
    bao.admin(&["write", "-f", "transit/keys/app/soft-delete-restore"]);

    bao.policy("user", NO_POLICY);
    assert_eq!(open(2), Some(libc::EACCES), "not allowed any more");
    bao.policy("user", POLICY);

    bao.signal(Signal::STOP);
    assert_eq!(open(3), Some(libc::ETIMEDOUT), "silent");
    assert_eq!(open(0), None, "its key is here");
    bao.signal(Signal::CONT);
    eventually("the server is asked again", || open(3).is_none());
    eventually("all is well again", || open(1).is_none() && open(2).is_none());

    bao.admin(&["token", "revoke", &token]);
    assert_eq!(open(4), Some(libc::EKEYEXPIRED), "the token is gone");
    drop(held);
    let logs = volume.home.logs();
    assert!(logs.contains("vault") || logs.contains("Vault"), "{logs}");
    assert!(!logs.contains(&token), "the token is in the log");
}

#[test]
fn a_key_that_is_gone_for_good_is_no_key() {
    let bao = Bao::start();
    let volume = Volume::in_home(home_with(&bao, "root"), &["--key", "vault:transit/app"], &["--no-prefetch"]);
    fs::write(volume.path("f"), "x").unwrap();
    make_cold(&volume);
    bao.admin(&["write", "transit/keys/app/config", "deletion_allowed=true"]);
    assert!(volume.home.ok(&[&"doctor", &volume.cipher]).contains("its deletion is allowed"));
    bao.admin(&["delete", "transit/keys/app"]);
    assert_eq!(errno(File::open(volume.path("f"))), Some(libc::ENOKEY));
    assert_eq!(errno(File::create(volume.path("new"))), Some(libc::ENOKEY));
    assert!(!bao.has_key("app"), "and nobody made it anew");
    volume.unmount();
    volume.home.refused(6, &volume.mount_arguments());
}

#[test]
fn a_volume_moves_from_a_keyring_to_transit_and_on_and_a_recipient_of_age_recovers_it() {
    let bao = Bao::start();
    bao.admin(&["write", "-f", "transit/keys/next"]);
    let home = home_with(&bao, "root");
    let (identity, recipient) = new_identity(&home.path("home"), "id");
    let volume = Volume::in_home(home, &[], &[]);
    let home = &volume.home;
    for number in 0..5 {
        fs::write(volume.path(format!("f{number}")), format!("content {number}")).unwrap();
    }
    volume.unmount();
    for (to, from) in [("vault:app", None), ("vault:transit/next", Some("vault:transit/app"))] {
        home.ok(&[&"rewrap", &volume.cipher, &"--to", &to]);
        volume.mount();
        assert_eq!(fs::read_to_string(volume.path("f4")).unwrap(), "content 4");
        volume.unmount();
        if let Some(from) = from {
            assert!(!home.ok(&[&"recipients", &"list", &volume.cipher]).contains(from));
        }
    }
    home.ok(&[&"recipients", &"add", &volume.cipher, &format!("age:{recipient}")]);
    home.ok(&[&"rewrap", &volume.cipher]);
    volume.mount();
    fs::write(volume.path("new"), "with two records").unwrap();
    assert!(home.ok(&[&"inspect", &volume.behind("new")]).contains(&recipient));
    volume.unmount();
    // Without the identity the recipient is no obstacle, and without the server it is the way in.
    let doctor = home.ok(&[&"doctor", &volume.cipher]);
    assert!(doctor.contains("it only wraps"), "{doctor}");
    drop(bao);
    home.refused(8, &volume.mount_arguments());
    let identity = format!("--age-identity={}", identity.display());
    let mut arguments = volume.mount_arguments();
    arguments.push(&identity);
    home.ok(&arguments);
    assert_eq!(fs::read_to_string(volume.path("f3")).unwrap(), "content 3");
    assert_eq!(fs::read_to_string(volume.path("new")).unwrap(), "with two records");
    fs::write(volume.path("later"), "after the disaster").unwrap();
    volume.unmount();
    home.ok(&arguments);
    assert_eq!(fs::read_to_string(volume.path("later")).unwrap(), "after the disaster");
    volume.unmount();
}

#[test]
fn settings_come_from_a_file_too_and_mistakes_have_their_exit_codes() {
    let bao = Bao::start();
    let mut home = Home::new();
    let token = bao.file("token", "root\n");
    let settings = format!("[vault]\naddress = '{}'\ntoken-file = '{}'\n", bao.address(), token.display());
    fs::write(home.path("settings.toml"), settings).unwrap();
    home.refused(2, &[&"init", &"cipher", &"--key", &"vault:app"]);
    home.set("KMSFS_CONFIG", home.path("settings.toml"));
    home.ok(&[&"init", &"cipher", &"--key", &"vault:app"]);
    home.refused(6, &[&"init", &"other", &"--key", &"vault:none"]);
    home.refused(2, &[&"init", &"other", &"--key", &"vault:a/../b"]);
    home.refused(2, &[&"init", &"other", &"--key", &"vault:app", &"--vault-address", &"http://10.0.0.1:8200"]);
    home.refused(7, &[&"init", &"other", &"--key", &"vault:app", &"--vault-token-file", &"/nonexistent"]);
    home.refused(8, &[&"init", &"other", &"--key", &"vault:app", &"--vault-address", &"http://127.0.0.1:1"]);
    home.refused(2, &[&"init", &"other", &"--key", &"age:age1nonsense"]);
    home.refused(2, &[&"init", &"other", &"--key", &"pkcs11:object=app"]);
    home.refused(2, &[&"init", &"other", &"--key", &"pkcs11:token=a;object=b?pin-value=1"]);
    assert!(!home.path("other").exists() || walk(&home.path("other")).is_empty(), "a refused volume leaves nothing");
}

#[test]
fn a_volume_under_a_token_opens_in_the_background_and_a_wrong_pin_is_tried_once() {
    let tokens = Tokens::new();
    let mut home = Home::new();
    home.set("SOFTHSM2_CONF", tokens.config());
    let uri = format!("pkcs11:token=kms;object=app?module-path={MODULE}&pin-source=file:{}", tokens.pin_file.display());
    // The volume remembers the key, and not what it takes to load code.
    home.ok(&[&"init", &"cipher", &"--key", &uri]);
    let config = fs::read_to_string(home.path("cipher/.kmsfs/volume.toml")).unwrap();
    assert!(
        config.contains("token=kms;object=app") && !config.contains(MODULE) && !config.contains("pin-source"),
        "{config}"
    );
    fs::create_dir(home.path("plain")).unwrap();
    let said = home.refused(2, &[&"mount", &"cipher", &"plain"]);
    assert!(said.contains("--pkcs11-module"), "{said}");
    home.set("KMSFS_PKCS11_MODULE", MODULE);
    let wrong = home.path("wrong-pin");
    fs::write(&wrong, "4321").unwrap();
    for _ in 0..2 {
        home.refused(7, &[&"mount", &"cipher", &"plain", &"--pkcs11-pin-file", &wrong]);
    }
    home.set("KMSFS_PKCS11_PIN_FILE", &tokens.pin_file);
    home.ok(&[&"mount", &"cipher", &"plain"]);
    fs::write(home.path("plain/a"), "in a module").unwrap();
    for command in ["lock", "unlock"] {
        home.ok(&[&command, &"plain"]);
    }
    assert_eq!(fs::read_to_string(home.path("plain/a")).unwrap(), "in a module");
    home.ok(&[&"umount", &"plain"]);
    let doctor = home.ok(&[&"doctor", &"cipher"]);
    assert!(doctor.contains("AES-256") && doctor.contains("keys are bound to their volume"), "{doctor}");
    home.ok(&[&"rewrap", &"cipher", &"--to", &"pkcs11:object=other;token=kms"]);
    home.ok(&[&"mount", &"cipher", &"plain"]);
    assert_eq!(fs::read_to_string(home.path("plain/a")).unwrap(), "in a module");
    home.ok(&[&"umount", &"plain"]);
}
