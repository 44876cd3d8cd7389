//! `kmsfs doctor --policy`: for each role it allows exactly what the role's commands call, whichever key is away. A KMS of the
//! tests' own notes the calls; real mounts make them.

use std::collections::BTreeSet;
use std::fs;

use crate::support::kms_server::{CreatedKey, KmsServer};
use crate::support::moto;
use crate::support::{Argument, Home, Volume};
use serde_json::{Value, json};

/// Actions, each with the ARN of a key.
type Actions = BTreeSet<(String, String)>;

/// A volume under the first of two keys, not mounted.
struct Scene {
    server: KmsServer,
    volume: Volume,
    keys: [CreatedKey; 2],
}

impl Scene {
    fn new(options: &[&str]) -> Self {
        let server = KmsServer::start();
        let keys = [server.create_key(), server.create_key()];
        let mut home = Home::new();
        moto::environment().iter().for_each(|(name, value)| home.set(*name, *value));
        home.set("KMSFS_ENDPOINT_URL", server.endpoint());
        home.set("LANG", "C");
        let volume = Volume::in_home(home, &["--key", &keys[0].arn], options);
        volume.unmount();
        server.take_used();
        Self { server, volume, keys }
    }

    /// The same with another recipient.
    fn with_recipient(recipient: impl FnOnce(&Self) -> String) -> Self {
        let scene = Self::new(&[]);
        let recipient = recipient(&scene);
        scene.run(&["recipients", "add"], &[&recipient]);
        scene.server.take_used();
        scene
    }

    fn of_two_keys() -> Self {
        Self::with_recipient(|scene| scene.keys[1].arn.clone())
    }

    /// Runs a command on the cipher directory.
    fn run(&self, command: &[&str], more: &[&str]) -> String {
        let words = command.iter().map(|word| word as Argument<'_>);
        let all =
            words.chain([&self.volume.cipher as Argument<'_>]).chain(more.iter().map(|word| word as Argument<'_>));
        self.volume.home.ok(&all.collect::<Vec<_>>())
    }

    fn set_enabled(&self, key: usize, enabled: bool) {
        let operation = if enabled { "EnableKey" } else { "DisableKey" };
        self.server.administer(operation, &json!({ "KeyId": self.keys[key].id }));
    }

    /// Writes a file on a mount of its own, and reads it on the next one.
    fn write_and_read(&self, name: &str) {
        self.volume.mount();
        fs::write(self.volume.path(name), name).unwrap();
        self.volume.remount();
        assert_eq!(fs::read_to_string(self.volume.path(name)).unwrap(), name);
        self.volume.unmount();
    }

    /// The same while a key is away.
    fn write_and_read_without(&self, key: usize, name: &str) {
        self.set_enabled(key, false);
        self.write_and_read(name);
        self.set_enabled(key, true);
    }

    /// The actions that the role is allowed; its IAM policy and the keys' own policies agree.
    fn allowed(&self, role: &[&str]) -> Actions {
        let policy: Value = serde_json::from_str(&self.run(&["doctor", "--policy"], role)).unwrap();
        let is_use = |statement: &&Value| statement["Sid"].as_str().unwrap().starts_with("KmsfsVolume");
        let mut iam = Actions::new();
        for statement in policy["IamPolicy"]["Statement"].as_array().unwrap().iter().filter(is_use) {
            let arns: Vec<_> = words_of(&statement["Resource"]).collect();
            iam.extend(
                words_of(&statement["Action"])
                    .flat_map(|action| arns.iter().map(move |arn| (action.clone(), arn.clone()))),
            );
        }
        let mut own = Actions::new();
        for (arn, statements) in policy["KeyPolicyStatements"].as_object().unwrap() {
            for statement in statements.as_array().unwrap().iter().filter(is_use) {
                own.extend(words_of(&statement["Action"]).map(|action| (action, arn.clone())));
            }
        }
        assert_eq!(iam, own);
        iam
    }

    /// The role is allowed what was used since this was asked last, and nothing else.
    fn assert_used(&self, role: &[&str]) {
        assert_eq!(self.server.take_used(), self.allowed(role), "{role:?}");
    }

    /// The role is allowed these actions with the keys, in their order, as in "GenerateDataKey Decrypt".
    fn assert_allowed(&self, role: &[&str], expected: [&str; 2]) {
        let found = self.allowed(role);
        let expected = self
            .keys
            .iter()
            .zip(expected)
            .flat_map(|(key, words)| words.split_whitespace().map(|word| (format!("kms:{word}"), key.arn.clone())));
        assert_eq!(found, expected.collect::<Actions>(), "{role:?}");
    }
}

fn words_of(value: &Value) -> impl Iterator<Item = String> {
    value.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned())
}

#[test]
fn a_mount_and_a_rekey_of_one_key_and_the_audit_log_says_the_same() {
    let scene = Scene::new(&["--audit-log", "log"]);
    scene.write_and_read("one");
    let log = fs::read_to_string(scene.volume.home.path("log")).unwrap();
    let records = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let logged: Actions = records
        .filter_map(|record| Some((format!("kms:{}", text(&record["operation"])?), text(&record["key"])?)))
        .map(|(action, key)| (action, key.trim_start_matches("aws-kms:").to_owned()))
        .collect();
    assert_eq!(logged, scene.allowed(&[]));
    scene.assert_used(&[]);
    scene.run(&["rekey"], &[]);
    scene.assert_used(&[]);
    scene.assert_allowed(&[], ["GenerateDataKey Decrypt", ""]);
}

#[test]
fn a_mount_and_a_rekey_of_two_keys_whichever_is_away() {
    let scene = Scene::of_two_keys();
    scene.write_and_read("both");
    scene.write_and_read_without(0, "without the first");
    scene.write_and_read_without(1, "without the second");
    scene.assert_used(&[]);
    let mut used = Actions::new();
    for away in [0, 1] {
        scene.run(&["rewrap"], &[]);
        scene.server.take_used();
        scene.set_enabled(away, false);
        scene.run(&["rekey"], &[]);
        scene.set_enabled(away, true);
        used.append(&mut scene.server.take_used());
    }
    assert_eq!(used, scene.allowed(&[]));
    scene.assert_allowed(&[], ["GenerateDataKey Encrypt Decrypt"; 2]);

    // Doctor tries no more than that, and its own.
    scene.run(&["doctor"], &[]);
    let own = ["kms:DescribeKey", "kms:GetKeyRotationStatus"];
    let used: Actions =
        scene.server.take_used().into_iter().filter(|(action, _)| !own.contains(&action.as_str())).collect();
    assert!(used.is_subset(&scene.allowed(&[])), "{used:?}");
}

#[test]
fn doctor_tries_the_key_that_new_files_are_made_with() {
    let scene = Scene::with_recipient(|_| "local:recovery.toml".to_owned());
    let create = |denied: Option<&str>| {
        denied.into_iter().for_each(|operation| scene.server.deny(operation));
        let report: Value = serde_json::from_str(&scene.run(&["doctor", "--json"], &[])).unwrap();
        denied.into_iter().for_each(|operation| scene.server.allow(operation));
        let checks = report["checks"].as_array().unwrap().iter().filter(|check| check["check"] == "create");
        let line = |check: &Value| format!("{}: {}", check["grade"].as_str().unwrap(), check["what"].as_str().unwrap());
        checks.map(line).collect::<Vec<_>>()
    };
    let key = &scene.keys[0].arn;
    let [made, recorded] = &create(None)[..] else { panic!("two") };
    assert!(made.starts_with("ok: ") && made.contains(key) && made.contains("1 call of GenerateDataKey"), "{made}");
    assert!(recorded.starts_with("ok: local:k-") && recorded.contains("gets a record"), "{recorded}");
    let [denied, instead, recorded] = &create(Some("GenerateDataKey"))[..] else { panic!("three") };
    assert!(denied.starts_with("warn: ") && denied.contains("kms:GenerateDataKey"), "{denied}");
    assert!(instead.starts_with("ok: local:k-") && recorded.contains("1 call of Encrypt"), "{instead} {recorded}");

    // A further key that may not wrap leaves new files without it.
    let scene = Scene::of_two_keys();
    scene.server.deny("Encrypt");
    let said = scene.run(&["doctor"], &[]);
    let line = said.lines().find(|line| line.contains("new files cannot be opened with")).unwrap();
    assert!(line.starts_with("warn") && line.contains(&scene.keys[1].arn) && line.contains("kms:Encrypt"), "{said}");
}

#[test]
fn a_mount_of_a_key_and_a_keyring() {
    let scene = Scene::with_recipient(|_| "local:recovery.toml".to_owned());
    scene.write_and_read("both");
    scene.write_and_read_without(0, "without the key");
    fs::rename(scene.volume.home.path("recovery.toml"), scene.volume.home.path("away")).unwrap();
    scene.write_and_read("without the keyring");
    scene.assert_used(&[]);
    scene.assert_allowed(&[], ["GenerateDataKey Encrypt Decrypt", ""]);
}

#[test]
fn who_provisions_and_who_only_reads() {
    let scene = Scene::of_two_keys();
    scene.run(&["keys", "provision"], &["--count", "3"]);
    scene.set_enabled(0, false);
    let refused = scene.volume.home.refused(6, &[&"keys", &"provision", &scene.volume.cipher, &"--count", &"5"]);
    assert!(refused.contains("enable the key"), "{refused}");
    scene.set_enabled(0, true);
    scene.assert_used(&["--provision"]);
    scene.assert_allowed(&["--provision"], ["GenerateDataKeyWithoutPlaintext Decrypt", "Decrypt"]);

    let scene = Scene::new(&["--provisioned-keys", "only"]);
    scene.run(&["keys", "provision"], &["--count", "3"]);
    scene.server.take_used();
    scene.write_and_read("provisioned");
    scene.assert_used(&["--read-only"]);
}

#[test]
fn a_rewrap_for_all_recipients() {
    let scene = Scene::new(&[]);
    scene.write_and_read("of the first");
    scene.run(&["recipients", "add"], &[&scene.keys[1].arn]);
    scene.set_enabled(0, false);
    scene.volume.mount();
    fs::write(scene.volume.path("of the second"), "x").unwrap();
    scene.volume.unmount();
    scene.server.take_used();
    // It unlocks the volume with the second, and cannot bring along what is under the first.
    scene.volume.home.refused(6, &[&"rewrap", &scene.volume.cipher]);
    scene.set_enabled(0, true);
    scene.run(&["rewrap"], &[]);
    scene.assert_used(&["--rewrap"]);
    scene.assert_allowed(&["--rewrap"], ["Decrypt ReEncryptFrom ReEncryptTo"; 2]);
}

#[test]
fn a_rewrap_to_and_from_a_keyring() {
    let scene = Scene::new(&[]);
    scene.write_and_read("of the key");
    scene.run(&["recipients", "add"], &["local:recovery.toml"]);
    scene.set_enabled(0, false);
    scene.volume.mount();
    fs::write(scene.volume.path("of the keyring"), "x").unwrap();
    scene.volume.unmount();
    scene.set_enabled(0, true);
    scene.server.take_used();
    scene.run(&["rewrap"], &[]);
    scene.assert_used(&["--rewrap"]);
    scene.assert_allowed(&["--rewrap"], ["Encrypt Decrypt", ""]);
}

#[test]
fn a_move_to_another_key_with_the_old_one_kept() {
    let scene = Scene::new(&[]);
    scene.volume.mount();
    fs::write(scene.volume.path("old"), "old").unwrap();
    let old = scene.volume.behind("old");
    scene.volume.unmount();
    let copy = fs::read(&old).unwrap();
    let to = scene.keys[1].arn.clone();
    let role = ["--rewrap", "--to", &to];
    let allowed = scene.allowed(&role);
    scene.assert_allowed(&role, ["Decrypt ReEncryptFrom", "Encrypt Decrypt ReEncryptTo"]);
    scene.server.take_used();
    scene.run(&["rewrap"], &["--to", &to, "--keep-old"]);
    // An interrupted run is continued by the new key.
    scene.run(&["rewrap"], &["--to", &to, "--keep-old", "--from", &scene.keys[0].arn]);
    assert_eq!(scene.server.take_used(), allowed);

    // The kept key opens copies, and nothing else.
    fs::write(&old, copy).unwrap();
    scene.write_and_read("new");
    scene.volume.mount();
    assert_eq!(fs::read_to_string(scene.volume.path("old")).unwrap(), "old");
    scene.volume.unmount();
    scene.assert_used(&[]);
    scene.assert_allowed(&[], ["Decrypt", "GenerateDataKey Decrypt"]);
}
