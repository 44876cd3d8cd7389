//! `kmsfs rewrap` and `kmsfs recipients`: keyrings, a real KMS server, real mounts, and kills.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::fault_proxy::Fault;
use crate::support::kms_mount::{KmsVolume, content};
use crate::support::{self, Argument, Entry, Volume, bytes, errno, flip, set_times, text, tree};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Kills of the test that kills, unless this variable says more.
const KILLS: &str = "KMSFS_TEST_KILLS";

/// Runs the program with these words after the cipher directory's.
fn run(volume: &Volume, command: &[&str], more: &[&str]) -> String {
    let all = arguments(volume, command, more);
    volume.home.ok(&all.iter().map(|argument| argument as Argument<'_>).collect::<Vec<_>>())
}

fn refused(volume: &Volume, code: i32, command: &[&str], more: &[&str]) -> String {
    let all = arguments(volume, command, more);
    volume.home.refused(code, &all.iter().map(|argument| argument as Argument<'_>).collect::<Vec<_>>())
}

fn arguments(volume: &Volume, command: &[&str], more: &[&str]) -> Vec<String> {
    let cipher = volume.cipher.to_str().unwrap();
    command.iter().copied().chain([cipher]).chain(more.iter().copied()).map(str::to_owned).collect()
}

fn json_of(said: &str) -> Value {
    serde_json::from_str(said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// How many files have a record of each key, as `keys list --files` says.
fn files_by_key(volume: &Volume) -> BTreeMap<String, u64> {
    let listed = json_of(&run(volume, &["keys", "list"], &["--files", "--json"]));
    let keys = listed["keys"].as_array().unwrap().iter();
    keys.map(|key| (key["key"].as_str().unwrap().to_owned(), key["files"].as_u64().unwrap())).collect()
}

fn recipients(volume: &Volume) -> Vec<String> {
    let listed = json_of(&run(volume, &["recipients", "list"], &["--json"]));
    let keys = listed.as_array().unwrap().iter().filter(|key| key["recipient"] == true);
    keys.map(|key| key["key"].as_str().unwrap().to_owned()).collect()
}

/// What the files of the KMS volume hold, through a mount.
fn check_files(volume: &Volume, prefix: &str, count: usize, len: usize) {
    for n in 0..count {
        assert!(fs::read(volume.path(format!("{prefix}{n}"))).unwrap() == content(n, len), "{prefix}{n}");
    }
}

fn decrypted(volume: &Volume, out: &str) -> BTreeMap<PathBuf, Entry> {
    let base = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = volume.home.path(out);
    let mut command = Command::new(base.join(".venv/bin/python"));
    let output = command.arg(base.join("scripts/decrypt.py")).arg(&volume.cipher).arg(&out).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    tree(&out)
}

fn contents(tree: &BTreeMap<PathBuf, Entry>) -> BTreeMap<&PathBuf, &Vec<u8>> {
    tree.iter().map(|(path, entry)| (path, &entry.content)).collect()
}

#[test]
fn a_keyring_is_replaced_by_another_and_everything_opens_without_the_first() {
    let old = tempfile::tempdir().unwrap();
    let old_keyring = old.path().join("old.toml");
    let volume = Volume::new(&["--key", &format!("local:{}", old_keyring.display())]);
    for (n, size) in [0, 1, 4048, 100_000].into_iter().enumerate() {
        fs::write(volume.path(format!("{n}")), bytes(n as u64, size)).unwrap();
    }
    let deep = volume.path("d".repeat(255)).join("e".repeat(200));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("f".repeat(255)), "deep").unwrap();
    fs::hard_link(volume.path("1"), deep.join("link")).unwrap();
    let mut readonly = fs::metadata(volume.path("3")).unwrap().permissions();
    readonly.set_readonly(true);
    fs::set_permissions(volume.path("3"), readonly).unwrap();
    run(&volume, &["keys", "provision"], &["--count", "3"]);
    set_times(&volume.path("3"), 1_500_000_000, 7);
    let expected = tree(&volume.plain);
    let by_key = files_by_key(&volume);
    let (old_key, files) = by_key.first_key_value().unwrap();
    assert_eq!((by_key.len(), *files), (1, 4), "the empty file has no header, and the linked one is one");

    let said = volume.home.refused(11, &[&"rewrap", &volume.plain, &"--to", &"local:new.toml"]);
    assert!(said.contains("name its cipher directory"), "{said}");
    volume.unmount();
    let before = tree(&volume.cipher);
    let plan = json_of(&run(&volume, &["rewrap"], &["--to", "local:new.toml", "--dry-run", "--json"]));
    assert_eq!(
        (&plan["files_to_change"], &plan["provisioned_keys"], &plan["calls"]),
        (&json!(4), &json!(3), &json!(0)),
        "{plan}"
    );
    support::assert_same("a dry run", &tree(&volume.cipher), &before);
    assert!(!volume.home.path("new.toml").exists());

    // One directory first: then the old key is still needed.
    let directory = format!("{}/{}", "d".repeat(255), "e".repeat(200));
    run(&volume, &["rewrap"], &[&directory, "--to", "local:new.toml"]);
    let mixed = files_by_key(&volume);
    assert_eq!((mixed.len(), mixed[old_key]), (2, 2), "{mixed:?}");
    volume.mount();
    support::assert_same("mixed", &tree(&volume.plain), &expected);
    volume.unmount();
    run(&volume, &["rewrap"], &["--to", "local:new.toml"]);
    let moved = files_by_key(&volume);
    assert!(moved.len() == 1 && !moved.contains_key(old_key), "{moved:?}");
    let config = |name: &str| fs::read(volume.cipher.join(".kmsfs").join(name)).unwrap();
    assert_eq!(config("volume.toml.1"), config("volume.toml"), "the copy names the new key too");
    // There is nothing left to do, and that is no failure.
    assert_eq!(run(&volume, &["rewrap"], &["--to", "local:new.toml"]), "");

    drop(old);
    volume.home.ok(&[&"mount", &volume.cipher, &volume.plain, &"--provisioned-keys", &"only"]);
    support::assert_same("moved", &tree(&volume.plain), &expected);
    for name in ["a", "b", "c"] {
        fs::write(volume.path(name), "with a provisioned key that moved too").unwrap();
    }
    assert_eq!(errno(fs::write(volume.path("d"), "d")), Some(libc::ENOKEY));
    fs::remove_file(volume.path("d")).ok();
    let expected = tree(&volume.plain);
    volume.unmount();
    assert_eq!(contents(&decrypted(&volume, "decrypted")), contents(&expected));
}

#[test]
fn a_kms_key_is_replaced_by_one_call_for_each_data_key_and_the_first_can_be_disabled() {
    let kms = KmsVolume::with_init(&["--files-per-data-key", "10"], &[]);
    kms.files("f", 65, 5000);
    let volume = &kms.volume;
    volume.unmount();
    let new = kms.server.create_key();
    let to = format!("aws-kms:{}", new.arn);
    let count = |operation: &str| kms.server.calls(operation);
    let before = tree(&volume.cipher);
    let plan = json_of(&run(volume, &["rewrap"], &["--to", &to, "--dry-run", "--json", "--kms-rate", "100"]));
    assert_eq!(
        (&plan["files_to_change"], &plan["data_keys"], &plan["re_encrypt"], &plan["calls"]),
        (&json!(65), &json!(7), &json!(7), &json!(7))
    );
    assert!(plan["dollars"].as_f64().unwrap() > 0.0 && plan["hours"].as_f64().is_some(), "{plan}");
    support::assert_same("a dry run", &tree(&volume.cipher), &before);
    assert_eq!(count("ReEncrypt"), 0);

    let decrypts = count("Decrypt");
    let report = json_of(&run(volume, &["rewrap"], &["--to", &to, "--json"]));
    assert_eq!((&report["files_changed"], &report["failed"]), (&json!(65), &json!(0)), "{report}");
    assert_eq!((&report["re_encrypt"], &report["decrypt"], &report["encrypt"]), (&json!(7), &json!(0), &json!(0)));
    assert_eq!(report["wrapping_keys"], json!([to]));
    assert_eq!((count("ReEncrypt"), count("Decrypt") - decrypts), (7, 1), "and one for the volume key");
    kms.set_enabled(false);
    volume.mount();
    check_files(volume, "f", 65, 5000);
    fs::write(volume.path("new"), "file").unwrap();
    volume.unmount();
    assert_eq!(files_by_key(volume), BTreeMap::from([(to, 66)]));
}

#[test]
fn what_cannot_be_moved_is_told_and_keeps_its_key() {
    let kms = KmsVolume::new(&[]);
    kms.files("f", 30, 100);
    let damaged = kms.volume.behind("f3");
    let volume = &kms.volume;
    volume.unmount();
    let new = kms.server.create_key();
    let to = format!("aws-kms:{}", new.arn);
    kms.server.deny("ReEncrypt");
    let said = refused(volume, 6, &["rewrap"], &["--to", &to]);
    assert!(
        said.contains("0 files done, 30 not") && said.contains("kms:ReEncryptFrom") && said.contains("goes on"),
        "{said}"
    );
    assert_eq!(said.lines().filter(|line| line.contains("AccessDenied")).count(), 2, "one and the last: {said}");
    assert!(said.contains("29 more for the same reason"), "{said}");
    assert!((0..30).any(|n| said.starts_with(&format!("f{n}: "))), "by its plain name: {said}");
    kms.server.allow("ReEncrypt");
    volume.mount();
    check_files(volume, "f", 30, 100);
    volume.unmount();

    // A file that nothing opens keeps the old key on the list, and `recipients` can remove it.
    let page = fs::read(&damaged).unwrap();
    flip(&damaged, 40);
    let said = refused(volume, 13, &["rewrap"], &["--to", &to]);
    assert!(said.contains("29 files done, 1 not") && said.contains("does not authenticate"), "{said}");
    let old = format!("aws-kms:{}", kms.key.arn);
    assert_eq!(recipients(volume), [to.clone(), old.clone()]);
    fs::write(&damaged, page).unwrap();
    let said = refused(volume, 1, &["recipients", "remove"], &[&old]);
    assert!(said.contains("opens 1 of the files and provisioned keys"), "{said}");
    run(volume, &["rewrap"], &["--to", &to, "--keep-old"]);
    assert_eq!((recipients(volume), files_by_key(volume)[&old]), (vec![to.clone()], 0));
    run(volume, &["recipients", "remove"], &[&old]);
    let said = refused(volume, 2, &["recipients", "remove"], &[&to]);
    assert!(said.contains("last recipient"), "{said}");
    kms.set_enabled(false);
    volume.mount();
    check_files(volume, "f", 30, 100);
}

/// From one key to another and back; killed on the way, everything opens; continued, everything has moved.
#[test]
fn a_rewrap_that_is_killed_leaves_a_volume_that_opens_and_goes_on() {
    const FILES: usize = 60;
    let kills: usize = std::env::var(KILLS).map_or(30, |text| text.parse().unwrap());
    let kms = KmsVolume::with_init(&["--files-per-data-key", "2"], &["--no-prefetch"]);
    kms.files("f", FILES, 300);
    let volume = &kms.volume;
    volume.unmount();
    run(volume, &["keys", "provision"], &["--count", "5"]);
    kms.server.set_latency(Duration::from_millis(4));
    let keys = [format!("aws-kms:{}", kms.key.arn), format!("aws-kms:{}", kms.server.create_key().arn)];
    let (mut state, mut mixed) = (1_u64, 0);
    for round in 0..kills {
        let (from, to) = (&keys[round % 2], &keys[(round + 1) % 2]);
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let words = arguments(volume, &["rewrap"], &["--to", to, "--parallel", "2"]);
        let words: Vec<_> = words.iter().map(|word| word as Argument<'_>).collect();
        let running = volume.home.start("rewrap", &words);
        std::thread::sleep(Duration::from_millis((state >> 33) % 250));
        running.signal(Signal::KILL);
        running.status();
        let found = files_by_key(volume);
        mixed += u64::from(found.get(to).copied().unwrap_or(0) > 0 && found.get(from).copied().unwrap_or(0) > 0);
        volume.mount();
        check_files(volume, "f", FILES, 300);
        volume.unmount();
        run(volume, &["rewrap"], &["--to", to]);
        assert_eq!(files_by_key(volume), BTreeMap::from([(to.clone(), FILES as u64)]), "round {round}");
    }
    assert!(mixed > 0, "none of {kills} kills came between two files");
    volume.mount();
    check_files(volume, "f", FILES, 300);
}

/// As where this host was asleep or cut off, and another has mounted the volume meanwhile.
#[test]
fn a_rewrap_whose_volume_another_has_taken_over_writes_nothing_more() {
    const FILES: usize = 60;
    let kms = KmsVolume::new(&[]);
    kms.files("f", FILES, 300);
    let volume = &kms.volume;
    let lease = volume.cipher.join(".kmsfs/lease");
    let of_another = fs::read(&lease).unwrap();
    volume.unmount();
    let to = format!("aws-kms:{}", kms.server.create_key().arn);
    // One renewal of the lease comes before half of it is done.
    let words = arguments(volume, &["rewrap"], &["--to", &to, "--kms-rate", "3"]);
    let words: Vec<_> = words.iter().map(|word| word as Argument<'_>).collect();
    let running = volume.home.start("rewrap", &words);
    let moved = || files_by_key(volume).get(&to).copied().unwrap_or(0);
    let said = || text(&fs::read(volume.home.path("rewrap.err")).unwrap());
    support::eventually("the first headers are written", || moved() > 0);
    let taken = lease.with_file_name("lease.taken.new");
    fs::write(&taken, &of_another).unwrap();
    fs::rename(&taken, &lease).unwrap();
    support::eventually("the lease is found to be another's", || said().contains("has taken the volume over"));
    let (before, asked) = (tree(&volume.cipher), kms.server.calls("ReEncrypt"));
    assert_eq!(running.end(), Some(3), "{}", said());
    support::assert_same("after the lease was lost", &tree(&volume.cipher), &before);
    assert!(kms.server.calls("ReEncrypt") <= asked + 3, "who may not write asks for nothing");
    assert!(moved() < FILES as u64 && fs::read(&lease).unwrap() == of_another);
    assert!(said().contains("nothing more was written") && said().contains("goes on from here"), "{}", said());

    // That one has ended.
    run(volume, &["rewrap"], &["--to", &to]);
    assert_eq!(files_by_key(volume), BTreeMap::from([(to.clone(), FILES as u64)]));
    volume.mount();
    check_files(volume, "f", FILES, 300);
}

/// Mounts that only read have no lease, so the rewrap beside them takes it.
#[test]
fn a_rewrap_beside_a_mount_that_reads_holds_the_lease() {
    let kms = KmsVolume::new(&[]);
    kms.files("f", 12, 300);
    let volume = &kms.volume;
    volume.unmount();
    volume.home.ok(&[&"mount", &volume.cipher, &volume.plain, &"--read-only"]);
    let lease = volume.cipher.join(".kmsfs/lease");
    assert!(!lease.exists());
    let to = format!("aws-kms:{}", kms.server.create_key().arn);
    let words = arguments(volume, &["rewrap"], &["--to", &to, "--kms-rate", "4"]);
    let words: Vec<_> = words.iter().map(|word| word as Argument<'_>).collect();
    let running = volume.home.start("rewrap", &words);
    support::eventually("it has the lease", || lease.exists());
    assert!(files_by_key(volume).get(&to).copied().unwrap_or(0) < 12, "it is at work");
    assert_eq!(running.end(), Some(0), "{}", text(&fs::read(volume.home.path("rewrap.err")).unwrap()));
    assert!(!lease.exists());
    assert_eq!(files_by_key(volume), BTreeMap::from([(to, 12)]));
    check_files(volume, "f", 12, 300);
}

#[test]
fn a_second_recipient_takes_over_when_the_first_is_away() {
    const OPERATIONS: [&str; 4] = ["Decrypt", "GenerateDataKey", "Encrypt", "ReEncrypt"];
    let kms = KmsVolume::new(&["--key-max-age", "1"]);
    kms.files("old", 12, 100);
    let volume = &kms.volume;
    volume.unmount();
    let first = format!("aws-kms:{}", kms.key.arn);
    run(volume, &["recipients", "add"], &["local:recovery.toml"]);
    let both = recipients(volume);
    assert!(both.len() == 2 && both[0] == first && volume.home.path("recovery.toml").exists(), "{both:?}");
    refused(volume, 2, &["recipients", "add"], &["local:recovery.toml"]);
    volume.mount();
    kms.files("new", 12, 100);
    volume.unmount();
    assert_eq!(files_by_key(volume), BTreeMap::from([(first.clone(), 24), (both[1].clone(), 12)]));
    let said = refused(volume, 1, &["recipients", "remove"], &[&first]);
    assert!(said.contains("opens 12 of the files"), "{said}");
    run(volume, &["rewrap"], &[]);
    assert_eq!(files_by_key(volume), BTreeMap::from([(first.clone(), 24), (both[1].clone(), 24)]));

    // The KMS is away: mounting, reading and creating go on, and it is not asked again and again.
    OPERATIONS.iter().for_each(|operation| kms.proxy.inject(operation, .., Fault::Reset));
    volume.mount();
    check_files(volume, "old", 12, 100);
    check_files(volume, "new", 12, 100);
    kms.files("alone", 40, 100);
    let asked: u64 = OPERATIONS.iter().map(|operation| kms.proxy.calls(operation)).sum();
    kms.files("lonely", 40, 100);
    let again: u64 = OPERATIONS.iter().map(|operation| kms.proxy.calls(operation)).sum();
    // One try of a call may be three attempts; threads that make keys ahead may be several.
    assert!(again - asked <= 40, "{} calls for 40 files", again - asked);
    volume.unmount();
    let found = files_by_key(volume);
    assert_eq!((found[&first], found[&both[1]]), (24, 104));
    let log = volume.home.logs();
    assert!(log.contains("new files get no record for the recipient aws-kms:"), "{log}");
    volume.mount();
    let expected = tree(&volume.plain);
    volume.unmount();
    assert_eq!(contents(&decrypted(volume, "decrypted")), contents(&expected));

    // It is back: what is missing is added, and the other one can go.
    kms.proxy.heal();
    run(volume, &["rewrap"], &[]);
    assert_eq!(files_by_key(volume), BTreeMap::from([(first.clone(), 104), (both[1].clone(), 104)]));
    run(volume, &["recipients", "remove"], &[&both[1]]);
    run(volume, &["rewrap"], &[]);
    assert_eq!(files_by_key(volume), BTreeMap::from([(first, 104)]));
    fs::remove_file(volume.home.path("recovery.toml")).unwrap();
    volume.mount();
    support::assert_same("at the end", &tree(&volume.plain), &expected);
}
