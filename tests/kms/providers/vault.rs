//! The transit engine of a real server: what it keeps, what it refuses, and tokens that end.

use std::time::{Duration, Instant};

use kmsfs::keys::providers::{ProviderSettings, VaultSettings, open};
use kmsfs::keys::{KeyState, ProviderErrorKind, ProviderKind};
use rustix::process::Signal;

use super::bao::Bao;
use super::{context, keeps_its_promises, kind_of, serves_many_callers};

const USE_KEYS: &str = r#"
path "transit/encrypt/*" { capabilities = ["update"] }
path "transit/decrypt/*" { capabilities = ["update"] }
"#;

#[test]
fn the_engine_keeps_the_promises_of_a_provider() {
    let bao = Bao::start();
    let provider = bao.provider("app");
    assert!(provider.is_remote());
    keeps_its_promises(provider.as_ref());
    bao.admin(&["write", "transit/keys/chacha", "type=chacha20-poly1305"]);
    bao.admin(&["secrets", "enable", "-path=team/kms", "transit"]);
    bao.admin(&["write", "-f", "team/kms/keys/app"]);
    for key in ["transit/chacha", "team/kms/app"] {
        keeps_its_promises(bao.provider(key).as_ref());
    }
    // From one key to another, and no longer under the first.
    let (data_key, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let moved = provider.rewrap("transit/app", &wrapped.bytes, "transit/chacha", &context(1)).unwrap();
    assert_eq!(moved.key_id, "transit/chacha");
    let unwrap = |key: &str| provider.unwrap(key, &moved.bytes, &context(1));
    assert_eq!(unwrap("transit/chacha").unwrap().expose(), data_key.expose());
    assert_eq!(kind_of(unwrap("transit/app")), ProviderErrorKind::Tampered);
}

#[test]
fn rotation_keeps_old_versions_until_they_are_disallowed() {
    let bao = Bao::start();
    let provider = bao.provider("app");
    let (data_key, old) = provider.generate_data_key(&context(1)).unwrap();
    bao.admin(&["write", "-f", "transit/keys/app/rotate"]);
    let (_, new) = provider.generate_data_key(&context(1)).unwrap();
    assert!(old.bytes.starts_with(b"vault:v1:") && new.bytes.starts_with(b"vault:v2:"));
    let unwrap = |wrapped: &[u8]| provider.unwrap("transit/app", wrapped, &context(1));
    assert_eq!(unwrap(&old.bytes).unwrap().expose(), data_key.expose());
    assert!(provider.describe("transit/app").unwrap().to_string().contains("versions 1 to 2"));
    let renewed = provider.rewrap("transit/app", &old.bytes, "transit/app", &context(1)).unwrap();
    bao.admin(&["write", "transit/keys/app/config", "min_decryption_version=2"]);
    assert_eq!(kind_of(unwrap(&old.bytes)), ProviderErrorKind::KeyUnusable);
    assert_eq!(unwrap(&renewed.bytes).unwrap().expose(), data_key.expose());
}

#[test]
fn keys_that_are_gone_or_no_good_are_told_apart() {
    let bao = Bao::start();
    let provider = bao.provider("app");
    let (_, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let unwrap = || provider.unwrap("transit/app", &wrapped.bytes, &context(1));
    bao.admin(&["delete", "transit/keys/app/soft-delete"]);
    assert_eq!(kind_of(unwrap()), ProviderErrorKind::KeyUnusable);
    assert_eq!(kind_of(provider.generate_data_key(&context(1))), ProviderErrorKind::KeyUnusable);
    assert_eq!(provider.describe("transit/app").unwrap().state, KeyState::Disabled);
    bao.admin(&["write", "-f", "transit/keys/app/soft-delete-restore"]);
    unwrap().unwrap();
    bao.admin(&["write", "transit/keys/app/config", "deletion_allowed=true"]);
    bao.admin(&["delete", "transit/keys/app"]);
    assert_eq!(kind_of(unwrap()), ProviderErrorKind::KeyNotFound);
    // A mistyped name makes no key, although root may make one.
    let typo = bao.provider("typo");
    assert_eq!(kind_of(typo.generate_data_key(&context(1))), ProviderErrorKind::KeyNotFound);
    assert!(!bao.has_key("typo") && !bao.has_key("app"));
    assert_eq!(kind_of(bao.provider("nowhere/app").generate_data_key(&context(1))), ProviderErrorKind::KeyNotFound);
    for (name, arguments) in [("rsa", "type=rsa-2048"), ("derived", "derived=true"), ("signs", "type=ed25519")] {
        bao.admin(&["write", &format!("transit/keys/{name}"), arguments]);
        let answer = bao.provider(name).generate_data_key(&context(1));
        assert_eq!(kind_of(answer), ProviderErrorKind::Misconfigured, "{name}");
    }
}

#[test]
fn a_policy_without_the_right_and_a_token_without_a_life_are_told_apart() {
    let bao = Bao::start();
    bao.policy("user", USE_KEYS);
    let (_, wrapped) = bao.provider("app").generate_data_key(&context(1)).unwrap();
    let unwrap =
        |token: &str| bao.provider_with("app", bao.settings(token)).unwrap("transit/app", &wrapped.bytes, &context(1));
    unwrap(&bao.token(&["-policy=user"])).unwrap();
    assert_eq!(kind_of(unwrap(&bao.token(&["-policy=default"]))), ProviderErrorKind::Denied);
    assert_eq!(kind_of(unwrap("nonsense")), ProviderErrorKind::Credentials);
    let revoked = bao.token(&["-policy=user"]);
    bao.admin(&["token", "revoke", &revoked]);
    assert_eq!(kind_of(unwrap(&revoked)), ProviderErrorKind::Credentials);
    // Without the right to read the key it is believed to exist: that is the least privilege.
    bao.provider_with("app", bao.settings(&bao.token(&["-policy=user"]))).generate_data_key(&context(1)).unwrap();
    let none = VaultSettings { address: Some(bao.address().to_owned()), ..VaultSettings::default() };
    let missing = VaultSettings { token_file: Some("/nonexistent".into()), ..none };
    let answer = bao.provider_with("app", missing).generate_data_key(&context(1));
    assert_eq!(kind_of(answer), ProviderErrorKind::Credentials);
}

#[test]
fn a_token_is_renewed_while_nobody_uses_it_and_replaced_from_its_file() {
    let bao = Bao::start();
    bao.policy("user", USE_KEYS);
    let settings = bao.settings(&bao.token(&["-policy=user", "-period=6s"]));
    let provider = bao.provider_with("app", settings.clone());
    let (_, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let unwrap = || provider.unwrap("transit/app", &wrapped.bytes, &context(1));
    std::thread::sleep(Duration::from_secs(14));
    unwrap().unwrap();
    // One that cannot live longer.
    let short = bao.token(&["-policy=user", "-ttl=4s", "-explicit-max-ttl=4s"]);
    let file = settings.token_file.unwrap();
    let other = bao.provider_with("app", bao.settings(&short));
    other.unwrap("transit/app", &wrapped.bytes, &context(1)).unwrap();
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(kind_of(other.unwrap("transit/app", &wrapped.bytes, &context(1))), ProviderErrorKind::Credentials);
    // An agent that keeps the file fresh is heard without a restart.
    let old = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, bao.token(&["-policy=user"])).unwrap();
    bao.admin(&["token", "revoke", &old]);
    unwrap().unwrap();
}

#[test]
fn an_approle_logs_in_again_whenever_its_token_ends() {
    let bao = Bao::start();
    bao.policy("user", USE_KEYS);
    bao.admin(&["auth", "enable", "approle"]);
    let role = ["write", "auth/approle/role/kmsfs", "token_policies=user", "token_ttl=4s", "token_max_ttl=4s"];
    bao.admin(&role);
    let role_id = bao.admin(&["read", "-field=role_id", "auth/approle/role/kmsfs/role-id"]);
    let secret_id = bao.admin(&["write", "-f", "-field=secret_id", "auth/approle/role/kmsfs/secret-id"]);
    let login = |secret: &str, name: &str| VaultSettings {
        token_file: None,
        role_id: Some(role_id.clone()),
        secret_id_file: Some(bao.file(name, secret)),
        ..bao.settings("unused")
    };
    let provider = bao.provider_with("app", login(&secret_id, "secret-id"));
    let (_, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let start = Instant::now();
    // Many callers, and more than three lives of a token.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while start.elapsed() < Duration::from_secs(13) {
                    provider.unwrap("transit/app", &wrapped.bytes, &context(1)).unwrap();
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        }
    });
    // And from nowhere, as an administrator does.
    bao.admin(&["token", "revoke", "-mode=path", "auth/approle"]);
    provider.unwrap("transit/app", &wrapped.bytes, &context(1)).unwrap();
    let wrong = bao.provider_with("app", login("wrong", "wrong-secret-id"));
    let error = wrong.generate_data_key(&context(1)).err().unwrap();
    assert_eq!(error.kind, ProviderErrorKind::Credentials, "{error}");
    assert!(error.message.contains("AppRole"), "{error}");
}

#[test]
fn a_server_that_is_sealed_silent_or_busy_may_be_better_later() {
    let bao = Bao::start();
    let hasty = VaultSettings {
        attempt_timeout: Duration::from_millis(500),
        operation_timeout: Duration::from_secs(2),
        ..bao.settings("root")
    };
    let provider = bao.provider_with("app", hasty);
    let (_, wrapped) = provider.generate_data_key(&context(1)).unwrap();
    let unwrap = || provider.unwrap("transit/app", &wrapped.bytes, &context(1));
    bao.signal(Signal::STOP);
    let start = Instant::now();
    assert_eq!(kind_of(unwrap()), ProviderErrorKind::Unavailable);
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    bao.signal(Signal::CONT);
    unwrap().unwrap();
    bao.admin(&["write", "sys/quotas/rate-limit/few", "path=transit", "rate=2"]);
    provider.leave_pace_to_caller();
    let refused = (0..20).filter_map(|_| unwrap().err()).map(|error| error.kind).collect::<Vec<_>>();
    assert!(refused.contains(&ProviderErrorKind::Throttled), "{refused:?}");
    bao.admin(&["delete", "sys/quotas/rate-limit/few"]);
    provider.hang_up();
    unwrap().unwrap();
    bao.admin(&["operator", "seal"]);
    let error = unwrap().err().unwrap();
    assert_eq!(error.kind, ProviderErrorKind::Unavailable, "{error}");
    assert!(error.message.contains("sealed"), "{error}");
    drop(bao);
    assert_eq!(kind_of(unwrap()), ProviderErrorKind::Unavailable);
}

#[test]
fn a_server_is_believed_under_a_certificate_that_is_trusted() {
    let bao = Bao::start_tls();
    let trusting = VaultSettings { ca_bundle: Some(bao.ca_bundle()), ..bao.settings("root") };
    keeps_its_promises(bao.provider_with("app", trusting.clone()).as_ref());
    let error = bao.provider_with("app", bao.settings("root")).generate_data_key(&context(1)).err().unwrap();
    assert_eq!(error.kind, ProviderErrorKind::Misconfigured, "{error}");
    assert!(error.message.contains("--vault-ca-bundle"), "{error}");
    let no_bundle = VaultSettings { ca_bundle: Some(bao.file("empty.pem", "")), ..trusting };
    let answer = bao.provider_with("app", no_bundle).generate_data_key(&context(1));
    assert_eq!(kind_of(answer), ProviderErrorKind::Misconfigured);
    let clear = VaultSettings { address: Some("http://10.0.0.1:8200".to_owned()), ..VaultSettings::default() };
    let settings = ProviderSettings { vault: clear, ..ProviderSettings::default() };
    assert_eq!(kind_of(open(ProviderKind::Vault, "app", None, &settings)), ProviderErrorKind::Misconfigured);
}

#[test]
fn many_callers_share_connections() {
    let bao = Bao::start();
    let provider = bao.provider("app");
    serves_many_callers(provider.as_ref(), "transit/app");
}
