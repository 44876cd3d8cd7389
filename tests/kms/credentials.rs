//! Where AWS credentials and the Region come from: for each source, that calls of the program reach KMS signed with
//! what that source gave; and what happens when there are none or they expire.
//!
//! Each case runs the program itself, in an environment that holds that source and nothing else.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::aws_account::{AwsAccount, CONTAINER_TOKEN};
use crate::support::fake_kms::{self, FakeKms};
use crate::support::moto::{Moto, REGION};
use crate::support::{self, Home, Volume};

const ROLE: &str = "arn:aws:iam::123456789012:role/kmsfs";
/// The default deadline of a call is 6.5 s; the rest is for a busy machine.
const IN_TIME: Duration = Duration::from_secs(20);

/// A home whose KMS and STS are the account's, without any credentials or Region.
fn bare_home(account: &AwsAccount) -> Home {
    let mut home = Home::new();
    for (name, value) in [
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_ENDPOINT_URL_KMS", &account.url()),
        ("AWS_ENDPOINT_URL_STS", &account.url()),
    ] {
        home.set(name, value);
    }
    home
}

/// The same for a machine that may be busy.
fn home(account: &AwsAccount) -> Home {
    let mut home = bare_home(account);
    home.set("KMSFS_KMS_ATTEMPT_TIMEOUT", "20");
    home.set("KMSFS_KMS_OPERATION_TIMEOUT", "40");
    home
}

fn set_keys(home: &mut Home, access_key: &str, token: &str) {
    home.set("AWS_ACCESS_KEY_ID", access_key);
    home.set("AWS_SECRET_ACCESS_KEY", "environment-secret");
    if !token.is_empty() {
        home.set("AWS_SESSION_TOKEN", token);
    }
}

/// Writes a file and gives its path to the program.
fn set_file(home: &mut Home, variable: &str, content: &str) {
    let path = home.path(variable);
    fs::write(&path, content).unwrap();
    home.set(variable, path);
}

/// Makes a volume under `key` and examines it: GenerateDataKey and Decrypt.
fn init_and_doctor(home: &Home, key: &str) {
    home.ok(&[&"init", &"cipher", &"--key", &format!("aws-kms:{key}")]);
    home.ok(&[&"doctor", &"cipher"]);
}

/// That both operations came, always signed in the Region with a key that satisfies `is_right`, which gets the access
/// key id and the session token.
fn assert_signed(account: &AwsAccount, is_right: impl Fn(&str, &str) -> bool) {
    for operation in ["GenerateDataKey", "Decrypt"] {
        let seen = account.seen_of(operation);
        assert!(!seen.is_empty(), "no {operation}: {:?}", account.seen());
        for seen in seen {
            assert!(is_right(&seen.access_key, &seen.token) && seen.region == REGION, "{seen:?}");
        }
    }
}

#[test]
fn from_the_environment() {
    for token in ["", "environment-token"] {
        let account = AwsAccount::start();
        account.admit("environment-key", "environment-secret", token);
        let mut home = home(&account);
        set_keys(&mut home, "environment-key", token);
        home.set("AWS_REGION", REGION);
        init_and_doctor(&home, &account.create_key().id);
        assert_signed(&account, |key, with| (key, with) == ("environment-key", token));
    }
}

#[test]
fn a_wrong_secret_is_refused() {
    let account = AwsAccount::start();
    account.admit("environment-key", "another-secret", "");
    let mut home = home(&account);
    set_keys(&mut home, "environment-key", "");
    let key = format!("aws-kms:{}", account.create_key().arn);
    let said = home.refused(7, &[&"init", &"cipher", &"--key", &key]);
    assert!(said.contains("UnrecognizedClientException") && !said.contains("environment-secret"), "{said}");
}

#[test]
fn from_a_profile_with_its_region() {
    let account = AwsAccount::start();
    account.admit("profile-key", "profile-secret", "profile-token");
    let mut home = home(&account);
    set_file(
        &mut home,
        "AWS_CONFIG_FILE",
        &format!("[default]\nregion = eu-west-1\n[profile kms]\nregion = {REGION}\n"),
    );
    let keys =
        "aws_access_key_id = profile-key\naws_secret_access_key = profile-secret\naws_session_token = profile-token";
    set_file(&mut home, "AWS_SHARED_CREDENTIALS_FILE", &format!("[kms]\n{keys}\n"));
    home.set("AWS_PROFILE", "kms");
    init_and_doctor(&home, &account.create_key().id);
    assert_signed(&account, |key, token| (key, token) == ("profile-key", "profile-token"));
}

#[test]
fn from_a_process_that_a_profile_names() {
    let account = AwsAccount::start();
    account.admit("process-key", "process-secret", "process-token");
    let mut home = home(&account);
    let answer = r#"{"Version": 1, "AccessKeyId": "process-key", "SecretAccessKey": "process-secret", "SessionToken": "process-token"}"#;
    fs::write(home.path("answer"), answer).unwrap();
    let process = format!("[default]\nregion = {REGION}\ncredential_process = cat {}\n", home.path("answer").display());
    set_file(&mut home, "AWS_CONFIG_FILE", &process);
    init_and_doctor(&home, &account.create_key().id);
    assert_signed(&account, |key, token| (key, token) == ("process-key", "process-token"));
}

/// Whether it ends with success or not.
#[test]
fn what_a_process_says_is_not_repeated() {
    for end in ["", "; exit 1"] {
        let account = AwsAccount::start();
        let mut home = home(&account);
        let script = format!("echo '{{\"Version\": 1, \"SecretAccessKey\": \"process-secret\"'{end}\n");
        fs::write(home.path("script"), script).unwrap();
        let process = format!("[default]\ncredential_process = sh {} argument-secret\n", home.path("script").display());
        set_file(&mut home, "AWS_CONFIG_FILE", &process);
        home.set("KMSFS_LOG", "trace");
        let key = format!("aws-kms:{}", account.create_key().arn);
        let said = home.refused(7, &[&"init", &"cipher", &"--key", &key]);
        assert!(said.contains("no credentials") && !said.contains("-secret"), "{said}");
    }
}

#[test]
fn from_a_role_that_a_profile_assumes() {
    let moto = Moto::start();
    let account = AwsAccount::with_sts(Some(&moto.endpoint()));
    account.admit("base-key", "base-secret", "");
    let mut home = home(&account);
    let role = format!("[profile role]\nrole_arn = {ROLE}\nsource_profile = base\nregion = {REGION}\n");
    let base = "[profile base]\naws_access_key_id = base-key\naws_secret_access_key = base-secret\n";
    set_file(&mut home, "AWS_CONFIG_FILE", &format!("{role}{base}"));
    home.set("AWS_PROFILE", "role");
    init_and_doctor(&home, &account.create_key().id);
    assert!(account.seen_of("AssumeRole").iter().all(|seen| seen.access_key == "base-key"));
    assert_signed(&account, |key, token| key.starts_with("ASIA") && !token.is_empty());
}

fn set_web_identity(home: &mut Home, token: &str) {
    set_file(home, "AWS_WEB_IDENTITY_TOKEN_FILE", token);
    home.set("AWS_ROLE_ARN", ROLE);
    home.set("AWS_REGION", REGION);
}

#[test]
fn from_a_web_identity() {
    let moto = Moto::start();
    let account = AwsAccount::with_sts(Some(&moto.endpoint()));
    let mut home = home(&account);
    set_web_identity(&mut home, "identity-1");
    init_and_doctor(&home, &account.create_key().id);
    let asked = account.seen_of("AssumeRoleWithWebIdentity");
    assert!(asked.iter().all(|seen| (&*seen.access_key, &*seen.token) == ("", "identity-1")), "{asked:?}");
    assert_signed(&account, |key, token| key.starts_with("ASIA") && !token.is_empty());
}

/// STS and a container whose answers do not parse: what they hold is not shown.
#[test]
fn a_broken_answer_with_a_secret_is_not_repeated() {
    let xml = "<Other><SecretAccessKey>answered-secret</SecretAccessKey></Other>";
    let sts = FakeKms::start(vec![(200, xml.to_owned())]);
    let container =
        FakeKms::start(vec![(200, r#"{"AccessKeyId":"a","SecretAccessKey":"answered-secret","T"#.to_owned())]);
    for source in ["web identity", "container"] {
        let account = AwsAccount::start();
        let mut home = home(&account);
        match source {
            "container" => home.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", container.endpoint()),
            _ => set_web_identity(&mut home, "identity-secret"),
        }
        home.set("AWS_ENDPOINT_URL_STS", sts.endpoint());
        home.set("KMSFS_LOG", "trace");
        let key = format!("aws-kms:{}", account.create_key().arn);
        let output = home.kmsfs(&[&"init", &"cipher", &"--key", &key]);
        let said = support::text(&output.stderr);
        assert!(!output.status.success() && said.contains("no credentials"), "{source}: {said}");
        assert!(!said.contains("-secret"), "{source}: {said}");
    }
    assert!(sts.requests() > 0 && container.requests() > 0);
}

fn set_container(home: &mut Home, account: &AwsAccount) {
    home.set("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("{}/container", account.url()));
    home.set("AWS_REGION", REGION);
}

#[test]
fn from_a_container() {
    for in_file in [false, true] {
        let account = AwsAccount::start();
        let mut home = home(&account);
        set_container(&mut home, &account);
        match in_file {
            false => home.set("AWS_CONTAINER_AUTHORIZATION_TOKEN", CONTAINER_TOKEN),
            true => set_file(&mut home, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", CONTAINER_TOKEN),
        }
        init_and_doctor(&home, &account.create_key().id);
        assert_signed(&account, |key, token| key.starts_with("container-") && token.starts_with("token-"));
    }
}

#[test]
fn a_container_without_its_token_gets_nothing() {
    let account = AwsAccount::start();
    let mut home = home(&account);
    set_container(&mut home, &account);
    let key = format!("aws-kms:{}", account.create_key().arn);
    let said = home.refused(7, &[&"init", &"cipher", &"--key", &key]);
    assert!(said.contains("no credentials"), "{said}");
}

/// With the Region, which nothing else names.
#[test]
fn from_an_instance_in_a_session() {
    let account = AwsAccount::start();
    let mut home = home(&account);
    home.set("AWS_EC2_METADATA_DISABLED", "false");
    home.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", account.url());
    init_and_doctor(&home, &account.create_key().id);
    assert_signed(&account, |key, token| key.starts_with("instance-") && token.starts_with("token-"));
    assert_eq!(account.seen()[0].what, "PUT /latest/api/token");
    assert_eq!(account.seen_of("GET /latest/meta-data/placement/region").len(), 1, "doctor takes it from the ARN");
}

/// The first version of the instance metadata service, which any request that a server can be talked into reaches.
#[test]
fn an_instance_without_sessions_is_not_asked() {
    let account = AwsAccount::start();
    account.take_sessions_away();
    let mut home = home(&account);
    home.set("AWS_EC2_METADATA_DISABLED", "false");
    home.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", account.url());
    let key = format!("aws-kms:{}", account.create_key().arn);
    home.refused(7, &[&"init", &"cipher", &"--key", &key]);
    let seen = account.seen();
    assert!(!seen.is_empty() && seen.iter().all(|seen| seen.what == "PUT /latest/api/token"), "{seen:?}");
}

/// Off, not there, and there but silent.
#[test]
fn from_nowhere() {
    let silent = FakeKms::start(vec![(fake_kms::STALL, String::new())]);
    for service in [None, Some(fake_kms::refused()), Some(silent.endpoint())] {
        let account = AwsAccount::start();
        let mut home = bare_home(&account);
        if let Some(service) = &service {
            home.set("AWS_EC2_METADATA_DISABLED", "false");
            home.set("AWS_EC2_METADATA_SERVICE_ENDPOINT", service);
        }
        let key = format!("aws-kms:{}", account.create_key().arn);
        let started = Instant::now();
        let said = home.refused(7, &[&"init", &"cipher", &"--key", &key]);
        assert!(started.elapsed() < IN_TIME, "{service:?}: {:?}", started.elapsed());
        assert!(said.contains("no credentials") && said.contains("AWS_PROFILE"), "{service:?}: {said}");
        assert_eq!(account.seen_of("GenerateDataKey"), []);
    }
    assert!(silent.requests() > 0);
}

#[test]
fn what_is_not_built_in_is_named() {
    let account = AwsAccount::start();
    let mut home = home(&account);
    let profile = "[default]\nsso_session = s\nsso_account_id = 123456789012\nsso_role_name = r\n\
                   [sso-session s]\nsso_region = us-east-1\nsso_start_url = https://example.com\n";
    set_file(&mut home, "AWS_CONFIG_FILE", profile);
    let key = format!("aws-kms:{}", account.create_key().arn);
    let said = home.refused(7, &[&"init", &"cipher", &"--key", &key]);
    assert!(said.contains("sso"), "{said}");
}

/// STS is away: that may pass, and is not taken for a refusal.
#[test]
fn a_source_that_is_away_is_not_a_refusal() {
    let account = AwsAccount::start();
    let mut home = bare_home(&account);
    set_web_identity(&mut home, "identity-1");
    home.set("AWS_ENDPOINT_URL_STS", fake_kms::refused());
    let key = format!("aws-kms:{}", account.create_key().arn);
    let said = home.refused(8, &[&"init", &"cipher", &"--key", &key]);
    assert!(said.contains("no credentials"), "{said}");
}

// ---- mounts ----

/// Mounts a volume, writes a file, and reads it in another process of the mount.
fn mounted(home: Home, key: &str) -> Volume {
    let volume = Volume::in_home(home, &["--key", &format!("aws-kms:{key}")], &[]);
    FILES.iter().for_each(|file| fs::write(volume.path(file), "content").unwrap());
    volume.remount();
    read_another(&volume, 0);
    volume
}

/// Each has a data key of its own.
const FILES: [&str; 3] = ["first", "second", "third"];

/// Reads a file whose key is not in memory, so that KMS is called.
fn read_another(volume: &Volume, file: usize) {
    assert_eq!(fs::read_to_string(volume.path(FILES[file])).unwrap(), "content");
}

#[test]
fn the_process_behind_a_mount_has_the_environment() {
    let account = AwsAccount::start();
    account.admit("environment-key", "environment-secret", "environment-token");
    let mut home = home(&account);
    set_keys(&mut home, "environment-key", "environment-token");
    home.set("AWS_REGION", REGION);
    let volume = mounted(home, &account.create_key().id);
    assert_signed(&account, |key, token| (key, token) == ("environment-key", "environment-token"));
    volume.unmount();
}

/// The mount stays: the old credentials expire, new ones are fetched once, with the new token, and the read succeeds.
#[test]
fn a_web_identity_is_taken_anew_when_its_credentials_expire() {
    let moto = Moto::start();
    let account = AwsAccount::with_sts(Some(&moto.endpoint()));
    let mut home = home(&account);
    set_web_identity(&mut home, "identity-1");
    let volume = mounted(home, &account.create_key().arn);
    let asked = || account.seen_of("AssumeRoleWithWebIdentity");
    let earlier = asked().len();
    let old = account.seen_of("Decrypt").pop().unwrap().access_key;

    fs::write(volume.home.path("AWS_WEB_IDENTITY_TOKEN_FILE"), "identity-2").unwrap();
    account.expire(&old);
    read_another(&volume, 1);
    assert_eq!(asked().len(), earlier + 1);
    assert_eq!(asked().pop().unwrap().token, "identity-2");
    let new = account.seen_of("Decrypt").pop().unwrap().access_key;
    assert!(new != old && new.starts_with("ASIA"), "{new}");
    read_another(&volume, 2);
    assert_eq!(asked().len(), earlier + 1, "they are kept");
    volume.unmount();
}

#[test]
fn a_container_is_asked_anew_when_its_credentials_expire() {
    let account = AwsAccount::start();
    let mut home = home(&account);
    set_container(&mut home, &account);
    home.set("AWS_CONTAINER_AUTHORIZATION_TOKEN", CONTAINER_TOKEN);
    let volume = mounted(home, &account.create_key().arn);
    // One for init and one for each of the two mounts.
    assert_eq!(account.seen_of("GET /container").len(), 3);
    assert_eq!(account.seen_of("Decrypt").pop().unwrap().access_key, "container-3");
    account.expire("container-3");
    read_another(&volume, 1);
    assert_eq!(account.seen_of("GET /container").len(), 4);
    assert_eq!(account.seen_of("Decrypt").pop().unwrap().access_key, "container-4");
    volume.unmount();
}

/// The sandbox lets a mount start the program, which has the variables that it needs; the status says so.
#[test]
fn a_program_gives_credentials_to_a_mount() {
    let account = AwsAccount::start();
    let mut home = home(&account);
    let answer = r#"{"Version": 1, "AccessKeyId": "'$PROGRAM_NEEDS'", "SecretAccessKey": "s", "SessionToken": "t"}"#;
    account.admit("process-key", "s", "t");
    fs::write(home.path("script"), format!("echo '{answer}'\n")).unwrap();
    let process = format!("[default]\nregion = {REGION}\ncredential_process = sh {}\n", home.path("script").display());
    set_file(&mut home, "AWS_CONFIG_FILE", &process);
    home.set("PROGRAM_NEEDS", "process-key");
    let volume = mounted(home, &account.create_key().arn);
    account.expire("process-key");
    account.admit("process-key-2", "s", "t");
    let renewed = fs::read_to_string(volume.home.path("script")).unwrap().replace("NEEDS'", "NEEDS'-2");
    fs::write(volume.home.path("script"), renewed).unwrap();
    read_another(&volume, 1);
    assert_eq!(account.seen_of("Decrypt").pop().unwrap().access_key, "process-key-2");
    assert_eq!(volume.status()["sandbox_programs"], "any");
    volume.unmount();
}
