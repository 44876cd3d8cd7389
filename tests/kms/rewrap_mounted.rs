//! `kmsfs rewrap` while the volume is mounted and programs work on it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, PermissionsExt as _};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::support::kms_mount::{KmsVolume, content};
use crate::support::{self, Argument, Volume};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Kills of the test that kills, unless this variable says more.
const KILLS: &str = "KMSFS_TEST_KILLS";

/// The words of a rewrap to the key `to`.
fn rewrap(volume: &Volume, to: &str) -> [OsString; 5] {
    ["rewrap".into(), volume.cipher.clone().into(), "--to".into(), to.into(), "--json".into()]
}

fn words(words: &[OsString; 5]) -> [Argument<'_>; 5] {
    words.each_ref().map(|word| word as Argument<'_>)
}

/// The keys that headers have records of.
fn keys_in_use(volume: &Volume) -> Vec<String> {
    let listed = volume.home.ok(&[&"keys", &"list", &volume.cipher, &"--files", &"--json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let keys = listed["keys"].as_array().unwrap().iter().filter(|key| key["files"] != 0);
    keys.map(|key| key["key"].as_str().unwrap().to_owned()).collect()
}

fn recipients(volume: &Volume) -> Vec<String> {
    let listed = volume.home.ok(&[&"recipients", &"list", &volume.cipher, &"--json"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    listed.as_array().unwrap().iter().map(|key| key["key"].as_str().unwrap().to_owned()).collect()
}

/// Makes, extends and moves files until it is stopped; each holds what its number says.
fn work(volume: &Volume, over: &AtomicBool, moving: &AtomicBool, made: &AtomicUsize) {
    let [one, other] = ["one", "other"].map(|name| volume.path(name));
    while !over.load(Ordering::Relaxed) {
        let n = made.load(Ordering::Relaxed);
        let (bytes, path) = (content(n, 6000), one.join(n.to_string()));
        let mut file = File::create(&path).unwrap();
        file.write_all(&bytes[..2500]).unwrap();
        file.sync_all().unwrap();
        file.write_all(&bytes[2500..]).unwrap();
        drop(file);
        let place = other.join(n.to_string());
        fs::copy(&path, &place).unwrap();
        if moving.load(Ordering::Relaxed) {
            fs::rename(&path, other.join(format!("{n}.moved"))).unwrap();
            fs::rename(&place, &path).unwrap();
            fs::rename(other.join(format!("{n}.moved")), &place).unwrap();
        }
        made.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn check_work(volume: &Volume, made: usize) {
    for place in ["one", "other"] {
        for n in 0..made {
            assert!(fs::read(volume.path(place).join(n.to_string())).unwrap() == content(n, 6000), "{place}/{n}");
        }
    }
}

#[test]
fn a_volume_moves_to_another_key_while_programs_work_on_it() {
    let kms = KmsVolume::new(&["--key-max-age", "30"]);
    let volume = &kms.volume;
    for name in ["one", "other", "rest"] {
        fs::create_dir(volume.path(name)).unwrap();
    }
    kms.files("rest/f", 200, 3000);
    // One that is open and has been written, one that has no header on disk yet, and one that lost its name.
    let [written, new, nameless] = ["written", "new", "nameless"]
        .map(|name| File::options().create_new(true).read(true).write(true).open(volume.path(name)).unwrap());
    written.write_all_at(b"before", 0).unwrap();
    nameless.write_all_at(b"before", 0).unwrap();
    fs::remove_file(volume.path("nameless")).unwrap();
    kms.server.set_latency(Duration::from_millis(5));
    let to = format!("aws-kms:{}", kms.server.create_key().arn);
    let (over, moving, made) = (AtomicBool::new(false), AtomicBool::new(true), AtomicUsize::new(0));
    let report = std::thread::scope(|scope| {
        scope.spawn(|| work(volume, &over, &moving, &made));
        support::eventually("there is work", || made.load(Ordering::Relaxed) > 5);
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(1500));
            moving.store(false, Ordering::Relaxed);
        });
        let report = volume.home.ok(&words(&rewrap(volume, &to)));
        let at = made.load(Ordering::Relaxed);
        support::eventually("it goes on", || made.load(Ordering::Relaxed) > at + 5);
        over.store(true, Ordering::Relaxed);
        report
    });
    let report: Value = serde_json::from_str(&report).unwrap();
    assert_eq!((&report["failed"], &report["wrapping_keys"]), (&json!(0), &json!([to])), "{report}");
    // Nobody can walk to a file without a name: it goes on under the old key.
    let mut bytes = [0; 12];
    kms.make_cold();
    nameless.read_exact_at(&mut bytes[..6], 0).unwrap();
    kms.set_enabled(false);
    kms.make_cold();
    nameless.read_exact_at(&mut bytes[..6], 0).unwrap_err();
    for file in [&written, &new] {
        file.write_all_at(b"after!", 6).unwrap();
        file.sync_all().unwrap();
    }
    written.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"beforeafter!");
    check_work(volume, made.load(Ordering::Relaxed));
    for n in 0..200 {
        assert!(fs::read(volume.path(format!("rest/f{n}"))).unwrap() == content(n, 3000), "{n}");
    }
    assert_eq!(volume.status()["wrapping_key"], json!(to));
    drop((written, new, nameless));
    assert_eq!(keys_in_use(volume), [to.as_str()]);
    volume.unmount();
    volume.mount();
    check_work(volume, made.load(Ordering::Relaxed));
}

#[test]
fn a_mount_that_cannot_use_the_new_key_keeps_the_volume_as_it_is() {
    let kms = KmsVolume::new(&[]);
    kms.files("f", 10, 100);
    let volume = &kms.volume;
    volume.unmount();
    let (old, new) = (format!("aws-kms:{}", kms.key.arn), kms.server.create_key());
    let to = format!("aws-kms:{}", new.arn);
    volume.home.ok(&[&"mount", &volume.cipher, &volume.plain, &"--expect-key", &old]);
    let said = volume.home.refused(6, &words(&rewrap(volume, &to)));
    assert!(said.contains("cannot take the new list") && said.contains(&new.arn), "{said}");
    assert_eq!((recipients(volume), keys_in_use(volume)), (vec![old.clone()], vec![old.clone()]));
    fs::write(volume.path("f10"), content(10, 100)).unwrap();
    // The same through a mount that expects both.
    volume.unmount();
    volume.home.ok(&[&"mount", &volume.cipher, &volume.plain, &"--expect-key", &old, &"--expect-key", &to]);
    volume.home.ok(&words(&rewrap(volume, &to)));
    assert_eq!(keys_in_use(volume), [to.as_str()]);
    for n in 0..11 {
        assert!(fs::read(volume.path(format!("f{n}"))).unwrap() == content(n, 100), "{n}");
    }
}

#[test]
fn a_keyring_is_replaced_under_a_mount_and_two_who_change_keys_do_not_meet() {
    // Beside the one that the mount began with: its sandbox reads keyrings nowhere else.
    let volume = Volume::new(&["--key", "local:old.toml"]);
    for n in 0..50 {
        fs::write(volume.path(format!("f{n}")), content(n, 5000)).unwrap();
    }
    let before = recipients(&volume);
    let to = "local:new.toml".to_owned();
    let command = rewrap(&volume, &to);
    volume.home.ok(&words(&command));
    assert_ne!(recipients(&volume), before);
    fs::write(volume.path("f50"), content(50, 5000)).unwrap();
    assert_eq!(keys_in_use(&volume), recipients(&volume));
    for n in 0..51 {
        assert!(fs::read(volume.path(format!("f{n}"))).unwrap() == content(n, 5000), "{n}");
    }
    let held = File::open(&volume.cipher).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let said = volume.home.refused(11, &words(&command));
    assert!(said.contains("another process is changing"), "{said}");
}

/// Killed at any moment under a mount that is in use, everything opens through that mount and the next one.
#[test]
fn a_rewrap_that_is_killed_under_a_mount_leaves_a_mount_that_works() {
    const FILES: usize = 60;
    let kills: usize = std::env::var(KILLS).map_or(10, |text| text.parse().unwrap());
    let kms = KmsVolume::with_init(&["--files-per-data-key", "2"], &["--no-prefetch", "--key-max-age", "2"]);
    kms.files("f", FILES, 300);
    let volume = &kms.volume;
    kms.server.set_latency(Duration::from_millis(4));
    let keys = [format!("aws-kms:{}", kms.key.arn), format!("aws-kms:{}", kms.server.create_key().arn)];
    let mut state = 1_u64;
    for round in 0..kills {
        let to = &keys[(round + 1) % 2];
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let running = volume.home.start("rewrap", &words(&rewrap(volume, to)));
        let (until, new) = (Instant::now() + Duration::from_millis((state >> 33) % 250), FILES + round);
        fs::write(volume.path(format!("f{new}")), content(new, 300)).unwrap();
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        running.signal(Signal::KILL);
        running.status();
        kms.make_cold();
        let check = || {
            for n in 0..=new {
                assert!(fs::read(volume.path(format!("f{n}"))).unwrap() == content(n, 300), "round {round}: f{n}");
            }
        };
        check();
        if round % 3 == 0 {
            volume.unmount();
            volume.mount();
            check();
        }
        volume.home.ok(&words(&rewrap(volume, to)));
        assert_eq!(keys_in_use(volume), [to.as_str()], "round {round}");
    }
}

/// Headers are written by the mount, which keeps set-id bits that it finds and gives none back.
#[test]
fn set_id_bits_that_programs_take_away_while_keys_change_stay_away() {
    const PROGRAM: &str = r#"
import os, sys
path, end = sys.argv[1:]
file = os.open(path, os.O_RDWR | os.O_CREAT)
ask, asked = os.pipe()
done, is_done = os.pipe()
if os.fork() == 0:
    os.close(asked)
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
    while os.read(ask, 1):
        os.pwrite(file, b"x", 0)
        os.write(is_done, b".")
    os._exit(0)
rounds = 0
while not os.path.exists(end):
    os.chmod(path, 0o6755)
    assert os.stat(path).st_mode & 0o7777 == 0o6755, "given"
    if rounds % 2:
        os.chmod(path, 0o755)
    else:
        os.write(asked, b"."); os.read(done, 1)
    for look in range(5):
        mode = os.stat(path).st_mode & 0o7777
        assert mode == 0o755, (rounds, look, oct(mode))
    rounds += 1
assert rounds > 20, rounds
"#;
    let volume = Volume::in_home(support::Home::new(), &[], &["-o", "allow_other"]);
    let end = volume.home.path("end");
    let program = volume.home.path("program.py");
    fs::write(&program, PROGRAM).unwrap();
    let paths: Vec<_> = (0..4).map(|n| volume.path(format!("s{n}"))).collect();
    let start = |path| std::process::Command::new("python3").arg(&program).arg(path).arg(&end).spawn().unwrap();
    let mut programs: Vec<_> = paths.iter().map(start).collect();
    support::eventually("all have begun", || paths.iter().all(|path| path.exists()));
    for round in 0..6 {
        let to = format!("local:{}", volume.home.path(format!("data/kmsfs/{round}.toml")).display());
        volume.home.ok(&words(&rewrap(&volume, &to)));
        volume.home.ok(&[&"rekey", &volume.cipher]);
    }
    fs::write(&end, "").unwrap();
    let ended: Vec<_> = programs.iter_mut().map(|program| program.wait().unwrap()).collect();
    assert!(ended.iter().all(|status| status.success()), "{ended:?}");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    for path in &paths {
        assert_eq!((mode(path), mode(&volume.behind(path.file_name().unwrap().to_str().unwrap()))), (0o755, 0o755));
    }
}

/// Records are made for a data key, and a path may have another file by the time that they are there.
#[test]
fn files_that_are_replaced_and_written_meanwhile_keep_their_keys_and_times() {
    const FILES: usize = 600;
    let volume = Volume::new(&["--files-per-data-key", "1000"]);
    let path = |n: usize| volume.path(format!("f{n}"));
    for n in 0..FILES {
        fs::write(path(n), content(n, 60)).unwrap();
    }
    // Another data key than that of those which take their places.
    volume.remount();
    let seen = std::sync::Mutex::new(vec![None; FILES]);
    let program = |round: usize| {
        for n in (0..150).map(|step| (round + 7 * step) % FILES) {
            let bytes = content(FILES * (round + 1) + n, 60);
            if n.is_multiple_of(2) {
                fs::write(volume.path("new"), &bytes).unwrap();
                fs::rename(volume.path("new"), path(n)).unwrap();
            } else {
                File::options().write(true).open(path(n)).unwrap().write_all_at(&bytes, 0).unwrap();
            }
            seen.lock().unwrap()[n] = Some((bytes, fs::metadata(path(n)).unwrap().modified().unwrap()));
        }
    };
    for round in 0..4 {
        let to = format!("local:{}", volume.home.path(format!("data/kmsfs/{round}.toml")).display());
        let command = rewrap(&volume, &to);
        std::thread::scope(|scope| {
            scope.spawn(|| program(round));
            // It may have to give up because of the moves: that is told.
            volume.home.kmsfs(&words(&command));
        });
        volume.home.ok(&words(&command));
        assert_eq!(recipients(&volume).len(), 1, "round {round}");
    }
    for _ in 0..2 {
        for (n, seen) in seen.lock().unwrap().iter().enumerate() {
            let expected = seen.clone().map_or_else(|| content(n, 60), |(bytes, _)| bytes);
            assert!(fs::read(path(n)).unwrap() == expected, "f{n}");
            if let Some((_, modified)) = seen {
                assert_eq!(fs::metadata(path(n)).unwrap().modified().unwrap(), *modified, "f{n}");
            }
        }
        volume.remount();
    }
    volume.unmount();
    volume.home.ok(&[&"check", &volume.cipher]);
}
