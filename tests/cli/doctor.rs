//! `kmsfs doctor` and `kmsfs estimate`: what they find, the exit codes, and that they change nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::fake_kms::{self, Answer, FakeKms};
use crate::support::moto;
use crate::support::{Argument, Home, Volume, assert_same, text, tree};
use serde_json::Value;

const ARN: &str = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
/// A host must not wait longer than this for a KMS that is not there.
const PATIENCE: Duration = Duration::from_secs(15);

/// A home with a volume in `cipher`, never mounted.
fn with_volume(mut home: Home, init: &[&str]) -> Home {
    home.set("LANG", "C");
    let mut arguments: Vec<Argument<'_>> = vec![&"init", &"cipher"];
    arguments.extend(init.iter().map(|argument| argument as Argument<'_>));
    home.ok(&arguments);
    home
}

/// A home that reaches a KMS at `endpoint` with some credentials.
fn with_kms(endpoint: &str) -> Home {
    let mut home = Home::new();
    moto::environment().iter().for_each(|(name, value)| home.set(*name, *value));
    home.set("KMSFS_ENDPOINT_URL", endpoint);
    home
}

/// What doctor reports, with its exit code, after a check that nothing was changed.
struct Diagnosis {
    code: Option<i32>,
    report: Value,
    said: String,
}

impl Diagnosis {
    fn of(home: &Home, more: &[Argument<'_>]) -> Self {
        let mut arguments: Vec<Argument<'_>> = vec![&"doctor", &"--json", &"cipher"];
        arguments.extend(more);
        let before = tree(&home.path(""));
        let output = home.kmsfs(&arguments);
        assert_same("doctor changes nothing", &tree(&home.path("")), &before);
        let (report, said) = (text(&output.stdout), text(&output.stderr));
        let report = serde_json::from_str(&report).unwrap_or_else(|error| panic!("{error}: {report}{said}"));
        Self { code: output.status.code(), report, said }
    }

    /// The grade and the text of a check; the worst if there are several.
    fn check(&self, name: &str) -> (String, String) {
        let rank = |grade: &str| ["ok", "warn", "fail"].iter().position(|known| *known == grade).unwrap();
        let checks = self.report["checks"].as_array().unwrap().iter().filter(|check| check["check"] == name);
        let worst = checks.max_by_key(|check| rank(check["grade"].as_str().unwrap()));
        let worst = worst.unwrap_or_else(|| panic!("no check {name}: {self}"));
        let mend = worst["mend"].as_str().unwrap_or_default();
        (worst["grade"].as_str().unwrap().to_owned(), format!("{} {mend}", worst["what"].as_str().unwrap()))
    }

    fn failures(&self) -> Vec<&str> {
        let checks = self.report["checks"].as_array().unwrap().iter();
        checks.filter(|check| check["grade"] == "fail").map(|check| check["check"].as_str().unwrap()).collect()
    }

    fn assert_healthy(&self) {
        assert_eq!((self.code, self.failures()), (Some(0), vec![]), "{self}");
        assert_eq!((&self.report["healthy"], self.said.as_str()), (&Value::Bool(true), ""), "{self}");
    }

    /// Fails with this code, first at this check, and says why with this word.
    fn assert_first_failure(&self, code: i32, check: &str, word: &str) {
        assert_eq!((self.code, self.failures().first()), (Some(code), Some(&check)), "{self}");
        let (grade, what) = self.check(check);
        assert!(grade == "fail" && what.contains(word), "{word}: {self}");
        assert!(self.said.starts_with("kmsfs: ") && self.said.lines().count() == 1, "{self}");
    }
}

impl std::fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} {:#} {}", self.code, self.report, self.said)
    }
}

// ---- local volumes ----

#[test]
fn a_healthy_local_volume() {
    let home = with_volume(Home::new(), &[]);
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_healthy();
    for check in ["cipher directory", "config", "remembered", "provider", "key", "unwrap", "seal", "context", "create"]
    {
        assert_eq!(diagnosis.check(check).0, "ok", "{check}: {diagnosis}");
    }
    assert_eq!(diagnosis.check("core dumps").0, "ok");
    let (grade, what) = diagnosis.check("wakes");
    assert!(grade != "fail" && (what.contains("CPU is woken in ") || what.contains("one CPU")), "{what}");
    let people = home.ok(&[&"doctor", &"cipher"]);
    assert!(people.starts_with("ok    cipher directory  /") && !people.contains("FAIL"), "{people}");
    let keyring = fs::read_to_string(home.path("data/kmsfs/keyring.toml")).unwrap();
    let material = keyring.split_once("material = \"").unwrap().1.split('"').next().unwrap();
    assert!(!people.contains(material) && !diagnosis.to_string().contains(material), "a secret is shown");
    assert!(home.ok(&[&"doctor", &"--policy", &"cipher"]).contains("no policy"));

    // One that is remembered nowhere can be read all the same.
    fs::remove_file(home.path("data/kmsfs/known-volumes.toml")).unwrap();
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_healthy();
    assert_eq!(diagnosis.check("remembered").0, "warn");
}

#[test]
fn wrong_passphrases() {
    let mut home = Home::new();
    home.set("KMSFS_PASSPHRASE", "correct horse");
    let mut home = with_volume(home, &[]);
    Diagnosis::of(&home, &[]).assert_healthy();
    home.set("KMSFS_PASSPHRASE", "battery staple");
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_first_failure(7, "provider", "passphrase");
    assert!(!diagnosis.to_string().contains("battery"), "a secret is shown");
    home.unset("KMSFS_PASSPHRASE");
    Diagnosis::of(&home, &[]).assert_first_failure(7, "provider", "passphrase");
    Diagnosis::of(&home, &[&"--passphrase-file", &"missing"]).assert_first_failure(7, "passphrase", "missing");
}

#[test]
fn disabled_and_missing_keys() {
    let home = with_volume(Home::new(), &[]);
    let keyring = home.path("data/kmsfs/keyring.toml");
    let genuine = fs::read_to_string(&keyring).unwrap();
    fs::write(&keyring, genuine.replace("\"enabled\"", "\"disabled\"")).unwrap();
    Diagnosis::of(&home, &[]).assert_first_failure(6, "key", "enable");
    fs::remove_file(&keyring).unwrap();
    Diagnosis::of(&home, &[]).assert_first_failure(6, "provider", "keyring");
}

#[test]
fn tampered_and_foreign_volumes() {
    let home = with_volume(Home::new(), &[]);
    let config = home.path("cipher/.kmsfs/volume.toml");
    let genuine = fs::read_to_string(&config).unwrap();
    fs::write(&config, genuine.replace("holes = \"allow\"", "holes = \"deny\"")).unwrap();
    Diagnosis::of(&home, &[]).assert_first_failure(4, "seal", "does not authenticate");
    fs::write(&config, genuine.replace("# A kmsfs", "# a kmsfs")).unwrap();
    Diagnosis::of(&home, &[]).assert_first_failure(4, "seal", "does not authenticate");
    fs::write(&config, "nonsense").unwrap();
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_first_failure(4, "config", "volume.toml.1");
    // The host is looked at all the same.
    assert_eq!(diagnosis.check("/dev/fuse").0, "ok");
    home.ok(&[&"init", &"other"]);
    fs::copy(home.path("other/.kmsfs/volume.toml"), &config).unwrap();
    Diagnosis::of(&home, &[]).assert_first_failure(5, "remembered", "forget");
    fs::remove_dir_all(home.path("cipher")).unwrap();
    Diagnosis::of(&home, &[]).assert_first_failure(3, "cipher directory", "does not exist");
}

#[test]
fn a_mounted_volume_is_healthy_and_locked() {
    let volume = Volume::new(&[]);
    let output = volume.home.kmsfs(&[&"doctor", &"--json", &"cipher"]);
    let report: Value = serde_json::from_str(&text(&output.stdout)).unwrap();
    let lock = report["checks"].as_array().unwrap().iter().find(|check| check["check"] == "lock").unwrap();
    assert_eq!((output.status.code(), &lock["grade"]), (Some(0), &"warn".into()), "{report:#}");
    assert!(lock["what"].as_str().unwrap().contains("in use"), "{lock}");
}

#[test]
fn an_ordinary_user_without_access() {
    let home = Home::of_nobody();
    home.ok(&[&"init", &"cipher"]);
    Diagnosis::of(&home, &[]).assert_healthy();
    home.shell("chmod 500 cipher");
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_first_failure(14, "cipher directory", "--read-only");
    assert_eq!(diagnosis.check("fusermount3").0, "ok", "{diagnosis}");
    Diagnosis::of(&home, &[&"--read-only"]).assert_healthy();
    home.shell("chmod 700 cipher");
}

#[test]
fn a_mount_needs_a_place_for_its_control_socket() {
    let mut home = Home::of_nobody();
    home.ok(&[&"init", &"cipher"]);
    home.shell("mkdir plain");
    let place = home.path("run/kmsfs");
    let diagnosis = Diagnosis::of(&home, &[]);
    assert_eq!(diagnosis.check("control socket"), ("ok".to_owned(), format!("{} ", place.display())));

    // A place that does not serve is left out, by the mount too.
    home.set("XDG_RUNTIME_DIR", home.path("home").join("x".repeat(100)));
    let (grade, what) = Diagnosis::of(&home, &[]).check("control socket");
    assert!(grade == "ok" && what.contains("too long a path"), "{what}");
    home.ok(&[&"mount", &"cipher", &"plain"]);
    assert!(home.ok(&[&"status", &"plain"]).contains("mountpoint"));
    home.ok(&[&"umount", &"plain"]);

    // Somebody else has the last one.
    let user = home.shell("id -u");
    home.set("XDG_RUNTIME_DIR", "");
    let last = Planted::at(format!("/tmp/kmsfs-{}", user.trim()).into());
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_first_failure(2, "control socket", "closed to others");
    assert!(diagnosis.check("control socket").1.contains("export XDG_RUNTIME_DIR=$(mktemp -d)"), "{diagnosis}");
    let said = home.refused(2, &[&"mount", &"cipher", &"plain"]);
    assert!(said.contains("control socket") && said.contains("export XDG_RUNTIME_DIR=$(mktemp -d)"), "{said}");
    let healthy = home.shell("export XDG_RUNTIME_DIR=$(mktemp -d); $PWD/kmsfs doctor cipher; rmdir $XDG_RUNTIME_DIR");
    assert!(healthy.contains("ok    control socket"), "{healthy}");
    drop(last);
}

/// A directory of root's in the place of another user's, until this is dropped.
struct Planted {
    place: PathBuf,
    before: PathBuf,
}

impl Planted {
    fn at(place: PathBuf) -> Self {
        let before = place.with_extension("before");
        let _ = fs::rename(&place, &before);
        fs::create_dir(&place).unwrap();
        Self { place, before }
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.place);
        let _ = fs::rename(&self.before, &self.place);
    }
}

// ---- AWS KMS ----

#[test]
fn a_volume_under_moto() {
    let moto = moto::Moto::start();
    let key = moto.create_key();
    let mut home = with_kms(&moto.endpoint());
    for (name, value) in [("ATTEMPT", "10"), ("OPERATION", "20")] {
        home.set(format!("KMSFS_KMS_{name}_TIMEOUT"), value);
    }
    let mut home = with_volume(home, &["--key", &format!("aws-kms:{}", key.id)]);
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_healthy();
    for (check, word) in [
        ("provider", "credentials"),
        ("key", "enabled, rotation off"),
        ("unwrap", "1 call of Decrypt"),
        ("context", "is refused"),
        ("create", "1 call of GenerateDataKey"),
    ] {
        let (grade, what) = diagnosis.check(check);
        assert!(grade == "ok" && what.contains(word), "{check}: {diagnosis}");
    }
    moto.post("EnableKeyRotation", &format!(r#"{{"KeyId":"{}","RotationPeriodInDays":90}}"#, key.id));
    assert!(Diagnosis::of(&home, &[]).check("key").1.contains("rotation on"));

    moto.post("DisableKey", &format!(r#"{{"KeyId":"{}"}}"#, key.id));
    Diagnosis::of(&home, &[]).assert_first_failure(6, "key", "disabled");
    moto.post("ScheduleKeyDeletion", &format!(r#"{{"KeyId":"{}","PendingWindowInDays":7}}"#, key.id));
    let diagnosis = Diagnosis::of(&home, &[]);
    diagnosis.assert_first_failure(6, "key", "pending deletion at 20");
    assert!(diagnosis.check("key").1.contains("cancel the deletion"));

    let policy: Value = serde_json::from_str(&home.ok(&[&"doctor", &"--policy", &"cipher"])).unwrap();
    assert_eq!(policy["IamPolicy"]["Statement"][0]["Resource"][0], key.arn.as_str());

    home.set("AWS_ACCESS_KEY_ID", "");
    home.set("AWS_SECRET_ACCESS_KEY", "");
    Diagnosis::of(&home, &[]).assert_first_failure(7, "provider", "credentials");
}

#[test]
fn a_kms_that_is_not_there() {
    let kms = FakeKms::start(vec![everything()]);
    let mut home = with_volume(with_kms(&kms.endpoint()), &["--key", &format!("aws-kms:{ARN}")]);
    let stalled = FakeKms::start(vec![(fake_kms::STALL, String::new())]);
    for endpoint in [fake_kms::refused(), stalled.endpoint()] {
        home.set("KMSFS_ENDPOINT_URL", endpoint);
        let start = Instant::now();
        let diagnosis = Diagnosis::of(&home, &[]);
        assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
        diagnosis.assert_first_failure(8, "provider", "DescribeKey");
    }
    // A policy needs nobody.
    home.ok(&[&"doctor", &"--policy", &"cipher"]);
}

/// One answer that looks right to every operation.
fn everything() -> Answer {
    let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let metadata = format!(r#"{{"Arn":"{ARN}","KeyId":"{ARN}","KeyState":"Enabled"}}"#);
    (200, format!(r#"{{"Plaintext":"{key}","KeyId":"{ARN}","CiphertextBlob":"AQIDBA==","KeyMetadata":{metadata}}}"#))
}

fn failure(code: &str) -> Answer {
    (400, format!(r#"{{"__type":"{code}","message":"the service's words"}}"#))
}

/// What doctor finds with these answers for DescribeKey, GetKeyRotationStatus, two Decrypts and GenerateDataKey.
fn diagnose(answers: Vec<Answer>, more: &[Argument<'_>]) -> (Diagnosis, usize) {
    let kms = FakeKms::start(vec![everything()]);
    let mut home = with_volume(with_kms(&kms.endpoint()), &["--key", &format!("aws-kms:{ARN}")]);
    let kms = FakeKms::start(answers);
    home.set("KMSFS_ENDPOINT_URL", kms.endpoint());
    (Diagnosis::of(&home, more), kms.requests())
}

#[test]
fn what_the_caller_may_do() {
    let (refused, denied) = (failure("InvalidCiphertextException"), failure("AccessDeniedException"));
    let right = everything;
    let (healthy, calls) = diagnose(vec![right(), denied.clone(), right(), refused.clone(), right()], &[]);
    healthy.assert_healthy();
    assert!(healthy.check("key").1.contains("rotation unknown") && calls == 5, "{calls}: {healthy}");

    // Nothing needs DescribeKey.
    let (healthy, _) = diagnose(vec![denied.clone(), right(), refused.clone(), right()], &[]);
    healthy.assert_healthy();
    assert_eq!(healthy.check("key").0, "warn");

    let reader = vec![right(), right(), right(), refused.clone(), denied.clone()];
    let (diagnosis, _) = diagnose(reader.clone(), &[]);
    diagnosis.assert_first_failure(6, "create", "kms:GenerateDataKey");
    let (healthy, calls) = diagnose(reader, &[&"--read-only"]);
    healthy.assert_healthy();
    assert_eq!(calls, 4);

    let (diagnosis, calls) = diagnose(vec![right(), right(), denied], &[]);
    diagnosis.assert_first_failure(6, "unwrap", "kms:Decrypt");
    assert_eq!(calls, 3);
}

#[test]
fn a_kms_that_does_not_enforce_contexts() {
    let (diagnosis, _) = diagnose(vec![everything()], &[]);
    diagnosis.assert_first_failure(6, "context", "wrong context");
}

#[test]
fn a_clock_that_is_wrong() {
    let (diagnosis, _) = diagnose(vec![failure("InvalidSignatureException")], &[]);
    diagnosis.assert_first_failure(7, "provider", "clock");
}

// ---- estimate ----

fn estimate(home: &Home, arguments: &[Argument<'_>]) -> Value {
    let mut all: Vec<Argument<'_>> = vec![&"estimate", &"--json"];
    all.extend(arguments);
    serde_json::from_str(&home.ok(&all)).unwrap()
}

fn calls(report: &Value, files_per_data_key: u64, what: &str) -> u64 {
    let rows = report["estimates"].as_array().unwrap();
    let row = rows.iter().find(|row| row["files_per_data_key"] == files_per_data_key).unwrap();
    row[what]["calls"].as_u64().unwrap()
}

#[test]
fn a_volume_and_its_plain_files_cost_the_same() {
    let volume = Volume::new(&["--files-per-data-key", "3"]);
    let write = |name: &Path, content: &str| fs::write(volume.path(name), content).unwrap();
    fs::create_dir(volume.path("directory")).unwrap();
    for number in 0..7 {
        write(&PathBuf::from(format!("directory/{number}")), "content");
    }
    write(Path::new(&"x".repeat(255)), "a long name");
    write(Path::new("empty"), "");
    let plain = estimate(&volume.home, &[&"plain", &"--files-per-data-key", &"4", &"--kms-rate", &"1"]);
    assert_eq!((&plain["kind"], &plain["files"], &plain["empty_files"]), (&"directory".into(), &9.into(), &1.into()));
    volume.unmount();
    let cipher = estimate(&volume.home, &[&"cipher", &"--files-per-data-key", &"4"]);
    assert_eq!((&cipher["kind"], &cipher["files"], &cipher["empty_files"]), (&"volume".into(), &9.into(), &1.into()));
    assert_eq!((&cipher["data_keys"], &cipher["as_it_is"]["calls"]), (&3.into(), &3.into()), "{cipher:#}");
    for what in ["create", "cold_scan", "rewrap"] {
        for (number, expected) in [(1, 8), (4, 2), (10, 1), (10_000, 1)] {
            assert_eq!((calls(&plain, number, what), calls(&cipher, number, what)), (expected, expected), "{what}");
        }
        assert_eq!(calls(&cipher, 3, what), 3);
    }
    let people = volume.home.ok(&[&"estimate", &"cipher"]);
    assert!(people.contains("AWS KMS pricing") && people.contains("3 data keys as it is"), "{people}");
    volume.home.refused(3, &[&"estimate", &"cipher/.kmsfs/volume.toml"]);
    volume.home.refused(3, &[&"estimate", &"nowhere"]);
}
