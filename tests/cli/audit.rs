//! The audit log on real mounts: what is recorded of each use of a key, what shows when the log is changed, and what happens
//! when its disk is full.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::support::kms_mount::KmsVolume;
use crate::support::{self, Argument, Home, Volume, errno, eventually, run, text};
use serde_json::Value;

const LOG: &str = "audit.log";

fn records(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn uses(path: &Path, operation: &str) -> Vec<Value> {
    records(path).into_iter().filter(|record| record["operation"] == operation).collect()
}

/// What `kmsfs audit verify` says of files, with the volume's key; it must end with this code.
fn verify(volume: &Volume, code: i32, files: &[PathBuf]) -> Value {
    let mut arguments: Vec<Argument<'_>> = vec![&"audit", &"verify", &"--json", &"--volume", &volume.cipher];
    arguments.extend(files.iter().map(|file| file as Argument<'_>));
    let output = volume.home.kmsfs(&arguments);
    assert_eq!(output.status.code(), Some(code), "{}{}", text(&output.stdout), text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Waits until everything is written that was noted.
fn settled(volume: &Volume) -> Value {
    eventually("all records are written", || volume.status()["audit"]["waiting"] == 0);
    volume.status()["audit"].clone()
}

fn cold(volume: &Volume) {
    for command in ["lock", "unlock"] {
        volume.home.ok(&[&command, &volume.plain]);
    }
}

/// Who, which file, which request, what came of it: everything that the KMS knows, and nothing that it must not.
#[test]
fn each_call_of_a_kms_is_a_record_with_its_request() {
    let scene = KmsVolume::new(&["--audit-log", LOG, "--no-prefetch"]);
    let (volume, log) = (&scene.volume, scene.volume.home.path(LOG));
    let path = volume.path("treasure-map");
    fs::write(&path, "under the old oak").unwrap();
    let inspected = volume.home.ok(&[&"inspect", &"--json", &volume.behind("treasure-map")]);
    let inspected: Value = serde_json::from_str(inspected.lines().next().unwrap()).unwrap();
    scene.make_cold();
    fs::read(&path).unwrap();
    settled(volume);
    let begin = &records(&log)[0];
    assert_eq!((&begin["event"], &begin["seq"]), (&"begin".into(), &1.into()));
    // The volume's key first: it was used before there was a file to write to.
    let decrypted = uses(&log, "Decrypt");
    assert!(decrypted[0]["data_key"].is_null() && decrypted[0]["request_id"].is_string());
    let opened = decrypted.last().unwrap();
    let header = text(inspected.to_string().as_bytes());
    for field in ["data_key", "file"] {
        assert!(header.contains(opened[field].as_str().unwrap()), "{field} {opened} {header}");
    }
    assert_eq!((&opened["uid"], &opened["result"]), (&0.into(), &"ok".into()));
    assert!(opened["pid"].as_u64().is_some());
    assert_eq!(opened["key"], format!("aws-kms:{}", scene.key.arn));
    // The KMS of the tests numbers its requests: each is in the log once.
    let ids: Vec<_> = records(&log).iter().filter_map(|r| Some(r["request_id"].as_str()?.to_owned())).collect();
    let mut unique = ids.clone();
    unique.sort();
    unique.dedup();
    assert_eq!(ids.len(), unique.len());
    assert!(ids.iter().all(|id| id.starts_with("00000000-0000-4000-8000-")), "{ids:?}");
    let made = uses(&log, "GenerateDataKey");
    assert!(!made.is_empty() && made.iter().all(|made| made["reason"] == "pool"), "{made:?}");
    scene.server.deny("Decrypt");
    scene.make_cold();
    assert_eq!(errno(File::open(&path)), Some(libc::EACCES));
    settled(volume);
    let refused = uses(&log, "Decrypt").pop().unwrap();
    assert_eq!(refused["result"], "denied");
    assert!(refused["error"].as_str().unwrap().contains("AccessDenied") && refused["file"] == opened["file"]);
    scene.server.allow("Decrypt");
    volume.unmount();
    let whole = fs::read_to_string(&log).unwrap();
    assert!(!whole.contains("treasure") && !whole.contains(volume.plain.to_str().unwrap()));
    let report = verify(volume, 0, &[log]);
    assert_eq!((&report["ended"], &report["authenticated"], &report["lost"]), (&true.into(), &true.into(), &0.into()));
    assert_eq!(report["failed_uses"].as_u64().unwrap(), 1);
}

#[test]
fn whoever_makes_a_mount_ask_is_named() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &["--audit-log", LOG]);
    volume.home.shell(&format!("echo x > {}/f", volume.plain.display()));
    cold(&volume);
    let shown = volume.home.shell(&format!("sh -c 'echo $$; exec cat {0}/f'", volume.plain.display()));
    settled(&volume);
    let opened = uses(&volume.home.path(LOG), "Decrypt").pop().unwrap();
    let (nobody, _) = support::nobody();
    assert_eq!(opened["uid"], nobody);
    assert_eq!(opened["pid"].to_string(), shown.lines().next().unwrap());
}

#[test]
fn changes_gaps_and_strangers_show_and_a_cut_end_by_its_head_only() {
    let volume = Volume::in_home(Home::new(), &[], &["--audit-log", LOG]);
    let log = volume.home.path(LOG);
    (0..20).for_each(|n| fs::write(volume.path(format!("f{n}")), "x").unwrap());
    // A record that names a file.
    cold(&volume);
    fs::read(volume.path("f3")).unwrap();
    let head = settled(&volume)["head"].as_str().unwrap().to_owned();
    volume.unmount();
    let whole = fs::read_to_string(&log).unwrap();
    let lines: Vec<_> = whole.lines().collect();
    let put = |lines: &[&str]| fs::write(&log, lines.join("\n") + "\n").unwrap();
    let faults = |code| {
        let report = verify(&volume, code, std::slice::from_ref(&log));
        report["faults"].as_array().unwrap().iter().map(|fault| fault["line"].as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert!(faults(0).is_empty());
    let changed = lines[7].replace("\"uid\":0", "\"uid\":1");
    assert_ne!(changed, lines[7]);
    put(&[&lines[..7], &[changed.as_str()], &lines[8..]].concat());
    assert_eq!(faults(13)[0], 8);
    put(&[&lines[..7], &lines[9..]].concat());
    assert_eq!(faults(13), [8]);
    put(&[&lines[..7], &["{\"seq\":8}"], &lines[7..]].concat());
    assert_eq!(faults(13), [8]);
    // The end: the rest is a log, unless somebody has noted down how far it went.
    put(&lines[..10]);
    assert!(faults(0).is_empty());
    let report = verify(&volume, 0, std::slice::from_ref(&log));
    let said = ["ended", "whole", "may_be_cut_off", "authenticated"].map(|field| report[field].as_bool());
    assert_eq!(said, [Some(false), Some(true), Some(true), Some(true)]);
    let told = volume.home.ok(&[&"audit", &"verify", &"--volume", &volume.cipher, &log]);
    assert!(told.contains("whole up to its last record") && told.contains("may be cut off at its end"), "{told}");
    let told = volume.home.refused(13, &[&"audit", &"verify", &"--volume", &volume.cipher, &"--head", &head, &log]);
    assert!(told.contains("no record with the hash"), "{told}");
    fs::write(&log, &whole).unwrap();
    volume.home.ok(&[&"audit", &"verify", &"--volume", &volume.cipher, &"--head", &head, &log]);
    // Without a key, or with a wrong one.
    volume.home.ok(&[&"audit", &"verify", &"--hashes-only", &log]);
    volume.home.refused(2, &[&"audit", &"verify", &log]);
    let other = Volume::in_home(Home::new(), &[], &[]);
    let report = verify(&other, 13, std::slice::from_ref(&log));
    assert_eq!((&report["authenticated"], &report["whole"]), (&false.into(), &false.into()));
    let told = other.home.refused(13, &[&"audit", &"verify", &"--volume", &other.cipher, &log]);
    assert!(told.contains("the log of another volume"), "{told}");
    // Nor is another file a log.
    let report = verify(&other, 13, &["/etc/passwd".into()]);
    assert_eq!((&report["authenticated"], &report["whole"]), (&false.into(), &false.into()));
    for command in [&["audit", "verify", "--hashes-only", "/etc/passwd"][..], &["audit", "show", "/etc/passwd"]] {
        let command: Vec<Argument<'_>> = command.iter().map(|word| word as Argument<'_>).collect();
        let told = other.home.refused(13, &command);
        assert!(told.contains("no audit log: there is no record in it"), "{told}");
    }
    // Nor does a mount go on with it.
    other.unmount();
    let mut arguments = other.mount_arguments();
    let log_argument: Argument<'_> = &log;
    arguments.extend([&"--audit-log" as Argument<'_>, log_argument]);
    let told = other.home.refused(13, &arguments);
    assert!(told.contains("not of this volume") && !Home::is_mounted(&other.plain), "{told}");
    let shown = volume.home.ok(&[&"audit", &"show", &log]);
    assert!(shown.lines().count() == lines.len() && shown.contains("GenerateDataKey ok local:"), "{shown}");
    assert_eq!(volume.home.ok(&[&"audit", &"show", &"--failed", &log]), "");
    // With the volume's key, files have names.
    assert!(!shown.contains("path="), "{shown}");
    let named = volume.home.ok(&[&"audit", &"show", &"--names", &volume.cipher, &log]);
    assert!(named.contains("path=\"f3\""), "{named}");
}

#[test]
fn a_log_goes_on_after_a_kill_a_torn_line_and_a_rotation() {
    let volume = Volume::in_home(Home::new(), &[], &["--audit-log", LOG]);
    let log = volume.home.path(LOG);
    fs::write(volume.path("a"), "x").unwrap();
    settled(&volume);
    let busy: Vec<Argument<'_>> = vec![&"mount", &volume.cipher, &volume.plain, &"--audit-log", &log];
    volume.home.refused(11, &busy);
    volume.kill();
    let mut bytes = fs::read(&log).unwrap();
    bytes.extend_from_slice(b"{\"seq\":99,\"ti");
    fs::write(&log, bytes).unwrap();
    volume.mount();
    let moved = volume.home.path("audit.log.moved");
    fs::rename(&log, &moved).unwrap();
    fs::write(volume.path("b"), "x").unwrap();
    volume.unmount();
    let report = verify(&volume, 0, &[log.clone(), moved.clone()]);
    assert_eq!([&report["mounts"], &report["torn"], &report["ended"]], [&Value::from(2), &1.into(), &true.into()]);
    // What is not there shows, but for the oldest.
    verify(&volume, 0, std::slice::from_ref(&log));
    assert_eq!(uses(&log, "GenerateDataKey").len(), 1);
}

#[test]
fn two_mounts_do_not_share_a_log() {
    let volume = Volume::in_home(Home::new(), &[], &["--audit-log", LOG]);
    let other = Volume::in_home(Home::new(), &[], &[]);
    other.unmount();
    let log = volume.home.path(LOG);
    let told = other.home.refused(11, &[&"mount", &other.cipher, &other.plain, &"--audit-log", &log]);
    assert!(told.contains("in use by another mount"), "{told}");
    let told = other.home.refused(2, &[&"mount", &other.cipher, &other.plain, &"--audit-log", &"/dev/null"]);
    assert!(told.contains("not a file"), "{told}");
    other.home.refused(14, &[&"mount", &other.cipher, &other.plain, &"--audit-log", &"/nowhere/log"]);
    other.home.refused(2, &[&"mount", &other.cipher, &other.plain, &"--audit-required"]);
    // It would wait for itself.
    for place in [&other.cipher, &other.plain] {
        let (log, socket) = (place.join("x"), format!("unix:{}", place.join("x").display()));
        other.home.refused(2, &[&"mount", &other.cipher, &other.plain, &"--audit-log", &log]);
        other.home.refused(2, &[&"mount", &other.cipher, &other.plain, &"--metrics", &socket]);
    }
    // A mount that does not begin leaves nothing behind.
    let (log, socket) = (other.home.path("run/log"), format!("unix:{}", other.home.path("run/socket").display()));
    let watched: [Argument<'_>; 7] =
        [&"mount", &other.cipher, &other.plain, &"--audit-log", &log, &"--metrics", &socket];
    other.home.refused(6, &[&watched[..], &[&"--keyring", &volume.home.path("data/kmsfs/keyring.toml")]].concat());
    let left: Vec<_> = fs::read_dir(other.home.path("run")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name == "log" || name == "socket"), "{left:?}");
}

/// A volume whose audit log is on a disk of its own, which has room for this and not much more.
fn on_a_small_disk(arguments: &[&str]) -> Volume {
    support::needs_root();
    let home = Home::new();
    let disk = home.path("disk");
    fs::create_dir(&disk).unwrap();
    run("mount", &[&"-t", &"tmpfs", &"-o", &"size=64k", &"none", &disk], Path::new("/"));
    Volume::in_home(home, &[], &[&["--audit-log", "disk/audit.log"], arguments].concat())
}

fn fill(volume: &Volume) {
    let full = fs::write(volume.home.path("disk/ballast"), vec![1; 1 << 20]);
    assert_eq!(errno(full), Some(libc::ENOSPC));
}

#[test]
fn a_full_disk_holds_nobody_up_and_nothing_is_lost_that_fits_the_queue() {
    let volume = on_a_small_disk(&[]);
    fill(&volume);
    (0..40).for_each(|n| fs::write(volume.path(format!("f{n}")), "x").unwrap());
    eventually("the log fails", || volume.status()["audit"]["failing"].is_string());
    cold(&volume);
    (0..40).for_each(|n| assert_eq!(fs::read(volume.path(format!("f{n}"))).unwrap(), b"x"));
    let status = volume.status()["audit"].clone();
    assert!(status["waiting"].as_u64().unwrap() > 0 && status["lost"] == 0, "{status}");
    assert!(volume.home.logs().contains("cannot be written; uses of keys wait to be recorded"));
    fs::remove_file(volume.home.path("disk/ballast")).unwrap();
    let status = settled(&volume);
    assert!(status["failing"].is_null() && status["failures"].as_u64().unwrap() > 0, "{status}");
    volume.unmount();
    let report = verify(&volume, 0, &[volume.home.path("disk/audit.log")]);
    assert_eq!(report["uses"], 81, "the volume key, 40 made, 40 unwrapped: {report}");
}

#[test]
fn a_required_log_on_a_full_disk_lets_no_key_be_used() {
    let volume = on_a_small_disk(&["--audit-required"]);
    let file = volume.path("file");
    fs::write(&file, "x").unwrap();
    fill(&volume);
    // Until the last block is used up.
    let mut refused = None;
    for n in 0..200 {
        refused = errno(fs::write(volume.path(format!("f{n}")), "x"));
        if refused.is_some() {
            break;
        }
    }
    assert_eq!(refused, Some(libc::ETIMEDOUT));
    cold(&volume);
    assert_eq!(errno(File::open(&file)), Some(libc::ETIMEDOUT));
    assert!(volume.home.logs().contains("its use cannot be recorded"));
    fs::remove_file(volume.home.path("disk/ballast")).unwrap();
    eventually("it opens again", || fs::read(&file).is_ok());
    volume.unmount();
    verify(&volume, 0, &[volume.home.path("disk/audit.log")]);
}
