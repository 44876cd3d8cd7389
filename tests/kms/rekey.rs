//! `kmsfs rekey`: new data keys for old files, mounted or not, and killed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::kms_mount::{KmsVolume, content};
use crate::support::{self, Argument, Volume, bytes, set_times, text, tree};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Kills of the test that kills, unless this variable says more.
const KILLS: &str = "KMSFS_TEST_KILLS";

fn rekey(volume: &Volume, more: &[&str]) -> Value {
    let mut words: Vec<Argument<'_>> = vec![&"rekey", &volume.cipher, &"--json"];
    words.extend(more.iter().map(|word| word as Argument<'_>));
    serde_json::from_str(&volume.home.ok(&words)).unwrap()
}

/// The header page of each ciphertext file with one, by its inode number.
fn headers(volume: &Volume) -> BTreeMap<u64, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![volume.cipher.clone()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() && entry.file_name() != ".kmsfs" {
                waiting.push(path);
            } else if kind.is_file() && fs::metadata(&path).unwrap().len() >= 4096 {
                found.insert(fs::metadata(&path).unwrap().ino(), fs::read(&path).unwrap()[..4096].to_vec());
            }
        }
    }
    found
}

/// The data key id in the slot with the highest generation.
fn data_key(page: &[u8]) -> Vec<u8> {
    let generation = |slot: &[u8]| u64::from_le_bytes(slot[8..16].try_into().unwrap());
    let slots = [&page[..2048], &page[2048..]];
    let valid = slots.into_iter().filter(|slot| slot.starts_with(b"KMSFS"));
    let newest = valid.max_by_key(|slot| generation(slot)).unwrap();
    newest[64..80].to_vec()
}

fn fill(volume: &Volume) {
    for (n, size) in [0, 1, 4047, 4048, 4049, 100_000, 3_000_000].into_iter().enumerate() {
        fs::write(volume.path(format!("{n}")), bytes(n as u64, size)).unwrap();
    }
    let sparse = File::create(volume.path("sparse")).unwrap();
    sparse.write_all_at(b"in the middle", 50_000_000).unwrap();
    sparse.set_len(90_000_001).unwrap();
    fs::create_dir(volume.path("d")).unwrap();
    fs::hard_link(volume.path("5"), volume.path("d").join("link")).unwrap();
    rustix::fs::setxattr(volume.path("5"), "user.note", b"bound to the file", rustix::fs::XattrFlags::empty()).unwrap();
    set_times(&volume.path("4"), 1_500_000_000, 7);
}

#[test]
fn every_file_gets_another_data_key_and_stays_what_it_was() {
    let volume = Volume::new(&[]);
    fill(&volume);
    let (expected, inode) = (tree(&volume.plain), fs::metadata(volume.path("5")).unwrap().ino());
    volume.unmount();
    let before = headers(&volume);
    let plan = rekey(&volume, &["--dry-run"]);
    assert_eq!((&plan["files"], &plan["calls"]), (&json!(7), &json!(0)), "{plan}");
    assert_eq!(headers(&volume), before);
    let report = rekey(&volume, &[]);
    assert_eq!((&report["files"], &report["failed"]), (&json!(7), &json!(0)), "{report}");
    let after = headers(&volume);
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>(), "the inodes stay");
    for (ino, page) in &before {
        assert_ne!(data_key(page), data_key(&after[ino]), "{ino}");
        assert_eq!(page[32..64], after[ino][32..64], "the file id stays");
    }
    volume.mount();
    support::assert_same("sealed anew", &tree(&volume.plain), &expected);
    assert_eq!(fs::metadata(volume.path("5")).unwrap().ino(), inode);
    let mut note = [0; 64];
    let len = rustix::fs::getxattr(volume.path("5"), "user.note", &mut note).unwrap();
    assert_eq!(&note[..len], b"bound to the file");
    assert!(fs::metadata(volume.path("sparse")).unwrap().blocks() < 1000, "holes stay holes");
    volume.home.ok(&[&"check", &volume.cipher]);
}

#[test]
fn programs_go_on_while_their_files_are_sealed_anew() {
    let kms = KmsVolume::new(&[]);
    let volume = &kms.volume;
    kms.files("f", 40, 30_000);
    let path = volume.path("used");
    let file = File::options().create_new(true).read(true).write(true).open(&path).unwrap();
    file.set_len(400_000).unwrap();
    let mapped = File::options().read(true).write(true).open(volume.path("f0")).unwrap();
    let before = headers(volume);
    let (over, written) = (AtomicBool::new(false), std::sync::Mutex::new(vec![0_u8; 400_000]));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut state = 7_u64;
            while !over.load(Ordering::Relaxed) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let (at, data) = ((state >> 33) as usize % 390_000, bytes(state, 5000));
                file.write_all_at(&data, at as u64).unwrap();
                written.lock().unwrap()[at..at + 5000].copy_from_slice(&data);
                if state.is_multiple_of(5) {
                    file.sync_data().unwrap();
                }
                let mut read = vec![0; 5000];
                file.read_exact_at(&mut read, at as u64).unwrap();
                assert!(read == data, "read back at {at}");
            }
        });
        for _ in 0..3 {
            let report = rekey(volume, &[]);
            assert_eq!((&report["files"], &report["failed"]), (&json!(41), &json!(0)), "{report}");
        }
        over.store(true, Ordering::Relaxed);
    });
    file.sync_all().unwrap();
    mapped.write_all_at(b"through an old handle", 0).unwrap();
    drop((file, mapped));
    for _ in 0..2 {
        kms.make_cold();
        assert!(fs::read(&path).unwrap() == *written.lock().unwrap());
        for n in 1..40 {
            assert!(fs::read(volume.path(format!("f{n}"))).unwrap() == content(n, 30_000), "{n}");
        }
        assert_eq!(&fs::read(volume.path("f0")).unwrap()[..21], b"through an old handle");
        volume.unmount();
        volume.mount();
    }
    let after = headers(volume);
    assert!(before.iter().all(|(ino, page)| data_key(page) != data_key(&after[ino])));
}

/// A write waits for the file that is being sealed, whose old time is put back: its own time counts.
#[test]
fn writes_that_wait_for_a_file_that_is_sealed_keep_their_times() {
    let volume = Volume::new(&[]);
    let path = |n: usize| volume.path(format!("f{n}"));
    for n in 0..2 {
        fs::write(path(n), bytes(n as u64, 6_000_000)).unwrap();
        set_times(&path(n), 1_500_000_000, 7);
    }
    let over = AtomicBool::new(false);
    let times = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|n| {
                let (path, over) = (path(n), &over);
                scope.spawn(move || {
                    let open = || File::options().write(true).open(&path).unwrap();
                    let held = (n == 0).then(open);
                    let mut last = None;
                    while !over.load(Ordering::Relaxed) {
                        // Of one file all handles are closed between two writes.
                        let again = (n == 1).then(open);
                        let file = held.as_ref().or(again.as_ref()).unwrap();
                        file.write_all_at(b"written", 4048 * 700).unwrap();
                        file.sync_all().unwrap();
                        let now = file.metadata().unwrap().modified().unwrap();
                        assert!(last.is_none_or(|last| now >= last), "f{n}: {now:?} after {last:?}");
                        last = Some(now);
                    }
                    last.unwrap()
                })
            })
            .collect();
        for _ in 0..6 {
            rekey(&volume, &[]);
        }
        over.store(true, Ordering::Relaxed);
        writers.into_iter().map(|writer| writer.join().unwrap()).collect::<Vec<_>>()
    });
    for _ in 0..2 {
        let found: Vec<_> = (0..2).map(|n| fs::metadata(path(n)).unwrap().modified().unwrap()).collect();
        assert_eq!(found, times);
        volume.remount();
    }
}

/// The process that seals is killed at any moment: every file opens, with the old or the new key.
#[test]
fn a_kill_leaves_every_file_whole_and_the_next_run_goes_on() {
    const FILES: usize = 40;
    let kills: usize = std::env::var(KILLS).map_or(20, |text| text.parse().unwrap());
    let volume = Volume::new(&[]);
    let path = |n: usize| -> PathBuf { volume.path(format!("f{n}")) };
    for n in 0..FILES {
        fs::write(path(n), content(n, 200_000 + n)).unwrap();
    }
    let check = |round: usize| {
        for n in 0..FILES {
            assert!(fs::read(path(n)).unwrap() == content(n, 200_000 + n), "round {round}: f{n}");
        }
    };
    let begun = Instant::now();
    rekey(&volume, &[]);
    let whole_run = u64::try_from(begun.elapsed().as_millis()).unwrap().max(1);
    let (mut state, mut logs, mut half) = (3_u64, 0, 0);
    for round in 0..kills {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mounted = round % 2 == 0;
        if !mounted {
            volume.unmount();
        }
        let pid = mounted.then(|| volume.pid());
        let running = volume.home.start("rekey", &[&"rekey", &volume.cipher, &"--json"]);
        std::thread::sleep(Duration::from_millis((state >> 33) % whole_run));
        if let Some(pid) = pid {
            // The mount is the one that seals.
            rustix::process::kill_process(pid, Signal::KILL).unwrap();
            support::eventually("it is dead", || support::is_dead(pid));
        }
        running.signal(Signal::KILL);
        running.status();
        let names = fs::read_dir(volume.cipher.join(".kmsfs/rekey"))
            .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>());
        let names = names.unwrap_or_default();
        logs += names.iter().filter(|name| !name.ends_with(".new")).count();
        half += usize::from(notes(&volume).is_some());
        volume.mount();
        check(round);
        if round % 3 == 0 {
            rekey(&volume, &[]);
            check(round);
        }
    }
    println!("{kills} kills: {logs} files were half way, {half} runs");
    assert!(half > 0, "no kill came between two files");
    assert_eq!(rekey(&volume, &[])["failed"], json!(0));
    check(kills);
    volume.unmount();
    volume.home.ok(&[&"check", &volume.cipher]);
}

/// The notes of an interrupted run, as the user's own directory has them.
fn notes(volume: &Volume) -> Option<PathBuf> {
    let mut entries = fs::read_dir(volume.home.path("data/kmsfs")).unwrap().map(|entry| entry.unwrap().path());
    entries.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("rekey-"))
}

fn logs(volume: &Volume) -> Vec<PathBuf> {
    let entries = fs::read_dir(volume.cipher.join(".kmsfs/rekey"));
    entries.map(|entries| entries.map(|entry| entry.unwrap().path()).collect()).unwrap_or_default()
}

/// Has all files sealed anew, and keeps the log of one beside them.
fn keep_log(volume: &Volume) -> (PathBuf, PathBuf) {
    let kept = volume.cipher.join(".kmsfs/kept");
    let running = volume.home.start("rekey", &[&"rekey", &volume.cipher]);
    let until = Instant::now() + Duration::from_secs(30);
    let name = loop {
        if let Some(log) = logs(volume).into_iter().find(|log| fs::hard_link(log, &kept).is_ok()) {
            break log;
        }
        assert!(Instant::now() < until, "no log is being made");
    };
    assert!(running.status().success());
    (kept, name.with_extension(""))
}

#[test]
fn a_log_that_was_applied_does_not_bring_old_content_back() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), bytes(1, 6_000_000)).unwrap();
    let (kept, log) = keep_log(&volume);
    let file = File::options().write(true).open(volume.path("a")).unwrap();
    file.write_all_at(&bytes(2, 6_000_000), 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    volume.unmount();
    // As if it could not be removed.
    fs::hard_link(&kept, &log).unwrap();
    fs::remove_file(&kept).unwrap();
    volume.mount();
    assert!(fs::read(volume.path("a")).unwrap() == bytes(2, 6_000_000));
    assert_eq!(logs(&volume), Vec::<PathBuf>::new());
    volume.unmount();
    volume.home.ok(&[&"check", &volume.cipher]);
}

/// As release 0.1.0 could leave it: with the header of the log, and pages from before.
#[test]
fn a_file_that_has_the_header_of_its_log_gets_the_pages_that_it_lacks() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), bytes(1, 6_000_000)).unwrap();
    let behind = volume.behind("a");
    volume.remount();
    let before = fs::read(&behind).unwrap();
    let (kept, log) = keep_log(&volume);
    volume.unmount();
    let file = File::options().write(true).open(&behind).unwrap();
    file.write_all_at(&before[40 * 4096..900 * 4096], 40 * 4096).unwrap();
    fs::rename(&kept, &log).unwrap();
    volume.mount();
    assert!(fs::read(volume.path("a")).unwrap() == bytes(1, 6_000_000));
    assert_eq!(logs(&volume), Vec::<PathBuf>::new());
}

#[test]
fn a_log_of_a_file_that_never_reached_the_disk_closes_nothing() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), bytes(1, 6_000_000)).unwrap();
    let (kept, log) = keep_log(&volume);
    let behind = volume.behind("a");
    volume.unmount();
    fs::rename(&kept, &log).unwrap();
    File::options().write(true).open(behind).unwrap().set_len(0).unwrap();
    volume.mount();
    assert_eq!(fs::read(volume.path("a")).unwrap(), b"");
    fs::write(volume.path("a"), "written again").unwrap();
    assert_eq!(logs(&volume), Vec::<PathBuf>::new());
}

/// As a power cut leaves it when the log counts and some pages have been written: told apart from damage, read, and finished.
#[test]
fn a_file_that_is_half_way_is_read_told_and_finished_without_a_mount() {
    let volume = Volume::new(&[]);
    let home = &volume.home;
    let content = bytes(1, 30 * 4048 + 77);
    for name in ["a", "b"] {
        fs::write(volume.path(name), &content).unwrap();
    }
    let behind = volume.behind("a");
    volume.unmount();
    let before = fs::read(&behind).unwrap();
    home.ok(&[&"rekey", &volume.cipher, &"a"]);
    let after = fs::read(&behind).unwrap();
    assert!(before.len() == after.len() && data_key(&before[..4096]) != data_key(&after[..4096]));
    let id = after[32..64].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let log = volume.cipher.join(format!(".kmsfs/rekey/{}-{id}", fs::metadata(&behind).unwrap().ino()));
    let file = File::options().write(true).open(&behind).unwrap();
    let half_way = |log_of: &[u8]| {
        fs::write(&log, log_of).unwrap();
        file.write_all_at(&after[4096..10 * 4096], 4096).unwrap();
        file.write_all_at(&before[10 * 4096..], 10 * 4096).unwrap();
        file.write_all_at(&before[..4096], 0).unwrap();
    };
    let check = |code: i32| {
        let output = home.kmsfs(&[&"check", &volume.cipher, &"--json"]);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let findings = report["findings"].as_array().unwrap().clone();
        let word = |finding: &Value, field: &str| finding[field].as_str().unwrap_or("").to_owned();
        (findings.iter().map(|f| (word(f, "kind"), word(f, "plain"))).collect::<Vec<_>>(), text(&output.stderr))
    };
    half_way(&after);
    let (found, said) = check(15);
    assert_eq!(found, [("unfinished".to_owned(), "a".to_owned())]);
    assert!(said.contains("--repair"), "{said}");

    // Where nothing may be written, the log is read.
    let as_it_was = support::tree(&volume.cipher);
    assert!(home.kmsfs(&[&"cat", &volume.cipher, &"a"]).stdout == content);
    home.ok(&[&"export", &volume.cipher, &"/", &"out"]);
    assert!(fs::read(home.path("out/a")).unwrap() == content && fs::read(home.path("out/b")).unwrap() == content);
    assert!(home.ok(&[&"ls", &volume.cipher, &"-l"]).contains(&content.len().to_string()));
    let base = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut another = std::process::Command::new(base.join(".venv/bin/python"));
    let decrypted = home.path("decrypted");
    let output = another.arg(base.join("scripts/decrypt.py")).arg(&volume.cipher).arg(&decrypted).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(fs::read(decrypted.join("a")).unwrap() == content);
    home.ok(&[&"mount", &volume.cipher, &volume.plain, &"--read-only"]);
    assert!(fs::read(volume.path("a")).unwrap() == content);
    volume.unmount();
    support::assert_same("by readers", &support::tree(&volume.cipher), &as_it_was);

    // A log that is damaged where the file needs it is damage, and one of other files is none of this one.
    let mut damaged = after.clone();
    damaged[20 * 4096 + 7] ^= 1;
    half_way(&damaged);
    assert_eq!(check(13).0, [("page".to_owned(), "a".to_owned()), ("unfinished".to_owned(), "a".to_owned())]);
    half_way(&after[..after.len() - 1]);
    let found = check(13).0;
    assert!(found.contains(&("page".to_owned(), "a".to_owned())), "of another size it means nothing: {found:?}");
    assert!(!found.contains(&("unfinished".to_owned(), "a".to_owned())), "{found:?}");

    half_way(&after);
    let said = home.ok(&[&"check", &volume.cipher, &"--repair"]);
    assert!(said.contains("half way to a new data key (repaired)") && !log.exists(), "{said}");
    assert_eq!(check(0).0, []);
    assert!(fs::read(&behind).unwrap() == after);
    // With the header of the log and pages from before, as release 0.1.0 could leave it.
    half_way(&after);
    file.write_all_at(&after[..4096], 0).unwrap();
    assert_eq!(check(15).0, [("unfinished".to_owned(), "a".to_owned())]);
    home.ok(&[&"check", &volume.cipher, &"--repair"]);
    volume.mount();
    assert!(fs::read(volume.path("a")).unwrap() == content && !log.exists());
}

/// The mount goes on with the file that it was told, and the second run waits for it.
#[test]
fn a_run_that_is_interrupted_can_be_done_again_at_once() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), bytes(1, 12_000_000)).unwrap();
    for round in 0..6 {
        let running = volume.home.start("rekey", &[&"rekey", &volume.cipher]);
        support::eventually("a log is being made", || !logs(&volume).is_empty());
        running.signal(Signal::INT);
        running.status();
        if round % 3 == 2 {
            let running = volume.home.start("again", &[&"rekey", &volume.cipher]);
            let until = Instant::now() + Duration::from_secs(30);
            // It is looked at as it is found: it does not count for long.
            let len = loop {
                let log = logs(&volume).into_iter().find(|log| log.extension().is_none());
                if let Some(Ok(log)) = log.map(fs::metadata) {
                    break log.len();
                }
                assert!(Instant::now() < until, "no log counts");
            };
            assert!(len > 12_000_000, "a log that counts is whole");
            let pid = volume.pid();
            rustix::process::kill_process(pid, Signal::KILL).unwrap();
            support::eventually("it is dead", || support::is_dead(pid));
            running.status();
            volume.mount();
        } else {
            assert_eq!(rekey(&volume, &[])["failed"], json!(0));
        }
        assert!(fs::read(volume.path("a")).unwrap() == bytes(1, 12_000_000), "round {round}");
    }
    volume.unmount();
    volume.home.ok(&[&"check", &volume.cipher]);
}

/// What the mount still seals for a client that has left is under a key of the volume when the old one goes.
#[test]
fn a_rewrap_after_an_interrupted_run_waits_for_what_is_being_sealed() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), bytes(1, 12_000_000)).unwrap();
    let running = volume.home.start("rekey", &[&"rekey", &volume.cipher]);
    support::eventually("a log is being made", || !logs(&volume).is_empty());
    running.signal(Signal::INT);
    running.status();
    let to = format!("local:{}", volume.home.path("data/kmsfs/other.toml").display());
    volume.home.ok(&[&"rewrap", &volume.cipher, &"--to", &to]);
    assert_eq!(logs(&volume), Vec::<PathBuf>::new(), "nothing is under way");
    volume.unmount();
    volume.mount();
    assert!(fs::read(volume.path("a")).unwrap() == bytes(1, 12_000_000));
}

#[test]
fn nobody_says_in_the_cipher_directory_that_a_file_was_sealed_anew() {
    let volume = Volume::new(&[]);
    for name in ["a", "b", "c"] {
        fs::write(volume.path(name), bytes(1, 9000)).unwrap();
    }
    let [a, c] = ["a", "c"].map(|name| volume.behind(name));
    volume.unmount();
    let before = fs::read(&a).unwrap();
    fs::create_dir(volume.cipher.join(".kmsfs/rekey")).unwrap();
    fs::write(volume.cipher.join(".kmsfs/rekey/done"), &before[32..64]).unwrap();
    // Nor does a file that fails keep the next run from the others.
    File::options().write(true).open(c).unwrap().write_all_at(&[1; 4096], 0).unwrap();
    for _ in 0..2 {
        let before = fs::read(&a).unwrap();
        let said = volume.home.refused(1, &[&"rekey", &volume.cipher]);
        assert!(said.contains("2 files done, 1 not"), "{said}");
        assert_ne!(data_key(&fs::read(&a).unwrap()[..4096]), data_key(&before[..4096]));
    }
    assert_eq!(notes(&volume), None);
}

#[test]
fn what_is_planted_among_the_logs_goes_and_closes_nothing() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("a"), bytes(1, 9000)).unwrap();
    fs::write(volume.path("b"), bytes(2, 9000)).unwrap();
    let (a, b) = (volume.behind("a"), volume.behind("b"));
    volume.unmount();
    let place = volume.cipher.join(".kmsfs/rekey");
    fs::create_dir(&place).unwrap();
    let [mut of_a, of_b] = [&a, &b].map(|file| fs::read(file).unwrap());
    let id = |page: &[u8]| page[32..64].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let ino = fs::metadata(&a).unwrap().ino();
    fs::write(place.join(format!("{ino}-{}", "7".repeat(64))), "").unwrap();
    of_a[100] ^= 1;
    fs::write(place.join(format!("{ino}-{}", id(&of_a))), &of_a).unwrap();
    fs::create_dir(place.join(format!("{ino}-{}", "8".repeat(64)))).unwrap();
    fs::create_dir(place.join("1.new")).unwrap();
    std::os::unix::fs::symlink(&a, place.join(format!("{ino}-{}", "9".repeat(64)))).unwrap();
    // They do not keep the volume's keys from being changed either.
    let to = format!("local:{}", volume.home.path("other.toml").display());
    volume.home.ok(&[&"rewrap", &volume.cipher, &"--to", &to]);
    // It says that a is to become b.
    fs::write(place.join(format!("{ino}-{}", id(&of_b))), &of_b).unwrap();
    volume.mount();
    assert!(fs::read(volume.path("a")).unwrap() == bytes(1, 9000));
    assert!(fs::read(volume.path("b")).unwrap() == bytes(2, 9000));
    fs::write(volume.path("a"), "x").unwrap();
    let left: Vec<_> = logs(&volume).into_iter().filter(|log| log.extension().is_none()).collect();
    assert_eq!(left, Vec::<PathBuf>::new());
}
