//! `kmsfs keys`: data keys that are made ahead by one identity, and a mount of another one that may only unwrap. A real
//! KMS server and real mounts.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use crate::support::kms_server::{self, CreatedKey, KmsServer};
use crate::support::moto;
use crate::support::{self, Argument, Home, Volume, errno, flip, text};

const MADE: &str = "GenerateDataKeyWithoutPlaintext";
/// May do nothing but unwrap.
const READER: (&str, &str) = ("reader", "reader-secret");
/// May not make data keys that it sees.
const PROVISIONER: (&str, &str) = ("provisioner", "provisioner-secret");

/// A volume under a key of a server with three identities: its owner, [`READER`] and [`PROVISIONER`].
struct Scene {
    server: KmsServer,
    home: Home,
}

impl Scene {
    fn new(init: &[&str]) -> Self {
        let server = KmsServer::start();
        let CreatedKey { arn, .. } = server.create_key();
        server.set_user(READER.0, READER.1, &["GenerateDataKey", MADE, "Encrypt", "ReEncrypt", "DescribeKey"]);
        server.set_user(PROVISIONER.0, PROVISIONER.1, &["GenerateDataKey", "Encrypt", "ReEncrypt"]);
        let mut home = Home::new();
        moto::environment().iter().for_each(|(name, value)| home.set(*name, *value));
        home.set("KMSFS_ENDPOINT_URL", server.endpoint());
        home.set("KMSFS_KMS_ATTEMPT_TIMEOUT", "20");
        home.set("KMSFS_KMS_OPERATION_TIMEOUT", "30");
        home.set("LANG", "C");
        let key = format!("aws-kms:{arn}");
        let mut arguments: Vec<Argument<'_>> = vec![&"init", &"cipher", &"--key", &key];
        arguments.extend(init.iter().map(|argument| argument as Argument<'_>));
        home.ok(&arguments);
        fs::create_dir(home.path("plain")).unwrap();
        Self { server, home }
    }

    /// All later commands are those of this identity.
    fn become_user(&mut self, (access_key, secret): (&str, &str)) {
        self.home.set("AWS_ACCESS_KEY_ID", access_key);
        self.home.set("AWS_SECRET_ACCESS_KEY", secret);
    }

    /// Fills the stock as [`PROVISIONER`], and goes on as [`READER`].
    fn provisioned(init: &[&str], count: u32) -> Self {
        let mut scene = Self::new(init);
        scene.become_user(PROVISIONER);
        scene.provision(count);
        scene.become_user(READER);
        scene
    }

    fn provision(&self, count: u32) {
        let said = self.home.ok(&[&"keys", &"provision", &"cipher", &"--count", &count.to_string()]);
        assert_eq!(said, "", "success is silent");
    }

    /// The files of provisioned keys.
    fn stock(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.home.path("cipher/.kmsfs/keys")).unwrap();
        let mut stock: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        stock.sort();
        stock
    }

    fn mount(&self, options: &[&str]) -> PathBuf {
        let plain = self.home.path("plain");
        let mut arguments: Vec<Argument<'_>> = vec![&"mount", &"cipher", &plain];
        arguments.extend(options.iter().map(|option| option as Argument<'_>));
        self.home.ok(&arguments);
        plain
    }

    fn unmount(&self) {
        self.home.ok(&[&"umount", &"plain"]);
    }

    fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.home.ok(&[&"status", &"--json", &"plain"])).unwrap()
    }
}

#[test]
fn a_host_that_may_only_unwrap_creates_files_until_the_stock_is_used_up() {
    let scene = Scene::provisioned(&[], 40);
    assert_eq!((scene.stock().len(), scene.server.calls(MADE)), (40, 40));
    let plain = scene.mount(&[]);
    for number in 0..10 {
        fs::write(plain.join(format!("{number}")), format!("content {number}")).unwrap();
    }
    scene.unmount();
    assert_eq!(scene.stock().len(), 30, "one for each file, and those that were taken ahead are back");
    let refused = scene.server.failures("AccessDeniedException");
    assert!((1..=10).contains(&refused), "the refusal is remembered: {refused}");

    let plain = scene.mount(&[]);
    for number in 0..10 {
        assert_eq!(fs::read_to_string(plain.join(format!("{number}"))).unwrap(), format!("content {number}"));
    }
    assert!(!plain.join(".kmsfs").exists());
    assert_eq!(fs::read_dir(&plain).unwrap().count(), 10, "nothing of the stock is seen through the mount");
    assert_eq!(scene.status()["provisioned_keys"], 30);
    let created = (10..).take_while(|number| fs::write(plain.join(format!("{number}")), "more").is_ok()).count();
    assert_eq!(created, 30);
    assert_eq!(errno(fs::write(plain.join("one too many"), "x")), Some(libc::EACCES));
    let log = scene.home.logs();
    for expected in [
        "the provider makes no data keys for this host",
        "provisioned keys are left: make more",
        "no provisioned key is left",
        "kmsfs keys provision",
    ] {
        assert!(log.contains(expected), "{expected}: {log}");
    }
    assert_eq!(log.matches("keys::provisioned: no provisioned key is left").count(), 1, "{log}");

    // The stock can be filled while the volume is mounted.
    let mut scene = scene;
    scene.become_user(PROVISIONER);
    scene.provision(5);
    fs::write(plain.join("again"), "there").unwrap();
    scene.become_user(READER);
    scene.unmount();
    let plain = scene.mount(&["--read-only"]);
    assert_eq!(fs::read_to_string(plain.join("again")).unwrap(), "there");
    assert_eq!(fs::read_to_string(plain.join("39")).unwrap(), "more");
    scene.unmount();
    assert_eq!(scene.stock().len(), 4);
}

#[test]
fn files_share_a_provisioned_key_as_they_share_others() {
    let scene = Scene::provisioned(&["--files-per-data-key", "10"], 3);
    let plain = scene.mount(&["--provisioned-keys", "only"]);
    for number in 0..30 {
        fs::write(plain.join(format!("{number}")), "x").unwrap();
    }
    assert_eq!(errno(fs::write(plain.join("30"), "x")), Some(libc::ENOKEY));
    scene.unmount();
    assert_eq!((scene.stock().len(), scene.server.calls("GenerateDataKey")), (0, 1), "that of init");
}

#[test]
fn what_was_tampered_with_is_left_alone_and_costs_no_call() {
    let scene = Scene::provisioned(&[], 4);
    let other = Scene::provisioned(&[], 1);
    let keys = scene.home.path("cipher/.kmsfs/keys");
    let stock = scene.stock();
    stock[..2].iter().for_each(|path| flip(path, 100));
    let foreign = &other.stock()[0];
    fs::copy(foreign, keys.join(foreign.file_name().unwrap())).unwrap();
    fs::copy(&stock[3], keys.join("0".repeat(32))).unwrap();
    let plain = scene.mount(&["--provisioned-keys", "only"]);
    let before = scene.server.calls("Decrypt");
    // Of the two keys that are good.
    let created = (0..).take_while(|number| fs::write(plain.join(format!("{number}")), "x").is_ok()).count();
    assert_eq!(created, 2);
    scene.unmount();
    assert_eq!(scene.server.calls("Decrypt") - before, 2);
    assert_eq!(scene.stock().len(), 4, "what is not understood is not removed");
    let log = scene.home.logs();
    assert_eq!(log.matches("does not authenticate").count(), 3, "{log}");
    assert_eq!(log.matches("is a copy under another name").count(), 1, "{log}");
}

#[test]
fn a_kill_never_makes_two_files_share_a_key() {
    let scene = Scene::provisioned(&[], 60);
    for round in 0..3 {
        let plain = scene.mount(&["--provisioned-keys", "only"]);
        for number in 0..5 {
            let mut file = fs::File::create(plain.join(format!("{round} {number}"))).unwrap();
            file.write_all(b"x").and_then(|()| file.sync_all()).unwrap();
        }
        let pid = scene.status()["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        support::eventually("the process is dead", || support::is_dead(pid));
    }
    // The next mount takes the dead one away, and has new keys.
    let plain = scene.mount(&[]);
    for entry in fs::read_dir(&plain).unwrap() {
        assert_eq!(fs::read(entry.unwrap().path()).unwrap(), b"x");
    }
    fs::write(plain.join("last"), "x").unwrap();
    scene.unmount();
    let mut ids = Vec::new();
    for path in support::walk(&scene.home.path("cipher")) {
        let found = fs::read(&path).ok().filter(|bytes| bytes.starts_with(b"KMSFS\x01"));
        ids.extend(found.map(|bytes| bytes[64..80].to_vec()));
    }
    let total = ids.len();
    ids.sort();
    ids.dedup();
    assert!(total == 16 && ids.len() == total, "{} keys for {total} files", ids.len());
    let hex = |id: &[u8]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let stock: Vec<_> = scene.stock().iter().map(|path| path.file_name().unwrap().to_owned()).collect();
    assert!(ids.iter().all(|id| !stock.contains(&hex(id).into())), "a key in use is in stock");
    assert!(stock.len() < 60 - 15 && !stock.is_empty(), "{}", stock.len());
}

#[test]
fn provisioning_tells_its_cost_and_goes_on_where_it_ended() {
    let mut scene = Scene::new(&[]);
    let before = scene.server.all_calls();
    let plan = scene.home.ok(&[&"keys", &"provision", &"cipher", &"--count", &"10000", &"--dry-run", &"--json"]);
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!((&plan["missing"], &plan["calls"]), (&10_000.into(), &10_001.into()));
    assert_eq!(format!("{:.4}", plan["dollars"].as_f64().unwrap()), "0.0300");
    assert_eq!(scene.server.all_calls(), before);

    scene.become_user(READER);
    let said = scene.home.refused(6, &[&"keys", &"provision", &"cipher", &"--count", &"20"]);
    assert!(said.contains("0 of 20 keys made") && said.contains("kms:GenerateDataKeyWithoutPlaintext"), "{said}");
    let refused = scene.home.kmsfs(&[&"keys", &"provision", &"cipher", &"--count", &"20", &"--json"]);
    let report: serde_json::Value = serde_json::from_str(&text(&refused.stdout)).unwrap();
    assert_eq!(report, serde_json::json!({"made": 0, "missing": 20, "in_stock": 0}));
    assert!(scene.server.calls(MADE) <= 32, "the first refusal ends it: {}", scene.server.calls(MADE));
    scene.become_user(PROVISIONER);
    scene.provision(20);
    let made = scene.server.calls(MADE);
    scene.provision(30);
    assert_eq!((scene.server.calls(MADE) - made, scene.stock().len()), (10, 30));
    // What does not authenticate does not count.
    flip(&scene.stock()[7], 100);
    scene.provision(30);
    assert_eq!(scene.stock().len(), 31);
    scene.provision(30);
    assert_eq!(scene.server.calls(MADE) - made, 11);

    // Throttling is waited for.
    scene.server.set_rate(Some(10));
    scene.provision(60);
    assert_eq!(scene.stock().len(), 61);
    scene.server.set_rate(None);
    let listed = scene.home.ok(&[&"keys", &"list", &"cipher", &"--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!((&listed["provisioned_keys"], &listed["keys"][0]["unlocks"]), (&61.into(), &true.into()));
    assert!(listed["keys"][0]["description"].as_str().unwrap().starts_with("enabled, rotation off"), "{listed}");
}

#[test]
fn a_local_volume_can_be_provisioned_too() {
    let volume = Volume::new(&[]);
    // On a terminal, which shows both streams, the report is one document too.
    let program = env!("CARGO_BIN_EXE_kmsfs");
    let command = format!("{program} keys provision {} --count 3 --json", volume.cipher.display());
    let shown = volume.home.shell(&format!("script -qec '{command}' /dev/null </dev/null"));
    let report: serde_json::Value = serde_json::from_str(&shown).unwrap_or_else(|error| panic!("{error}: {shown}"));
    assert_eq!(report, serde_json::json!({"made": 3, "missing": 0, "in_stock": 3}));
    volume.unmount();
    let only: [Argument<'_>; 5] = [&"mount", &volume.cipher, &volume.plain, &"--provisioned-keys", &"only"];
    volume.home.ok(&only);
    for name in ["a", "b", "c"] {
        fs::write(volume.path(name), name).unwrap();
    }
    assert_eq!(errno(fs::write(volume.path("d"), "d")), Some(libc::ENOKEY));
    volume.unmount();
    volume.mount();
    assert_eq!(fs::read_to_string(volume.path("c")).unwrap(), "c");
    fs::write(volume.path("d"), "d").unwrap();
}

#[test]
fn doctor_tells_of_the_stock_and_prints_the_policies() {
    let mut scene = Scene::new(&[]);
    let owner = (kms_server::ACCESS_KEY, kms_server::SECRET);
    scene.become_user(READER);
    let said = text(&scene.home.kmsfs(&[&"doctor", &"cipher"]).stdout);
    assert!(said.contains("FAIL  create") && said.contains("kmsfs keys provision"), "{said}");
    scene.become_user(owner);
    scene.provision(3);
    flip(&scene.stock()[0], 100);
    scene.become_user(READER);
    let said = scene.home.ok(&[&"doctor", &"cipher"]);
    assert!(said.contains("warn  create") && said.contains("2 provisioned ones are in stock"), "{said}");
    let policy = |role: &str| scene.home.ok(&[&"doctor", &"--policy", &role, &"cipher"]);
    let provisioner = policy("--provision");
    assert!(provisioner.contains(MADE) && !provisioner.contains("\"kms:GenerateDataKey\""), "{provisioner}");
    let reader = policy("--read-only");
    assert!(reader.contains("kms:Decrypt") && !reader.contains("Generate"), "{reader}");
}
