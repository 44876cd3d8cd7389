//! Writes that are lost after a program was told that they are done: it hears of them, and nobody reads or stores a zero in
//! their place.
#![cfg(feature = "mount")]
#![allow(clippy::unwrap_used, clippy::print_stdout)] // how a test fails, and how it tells what it met

#[path = "support/mount.rs"]
mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use support::{Home, Volume, bytes, errno, eventually, run};

/// A volume under a keyring's key that can be taken away from it.
struct Revocable {
    volume: Volume,
    keyring: PathBuf,
    key: String,
}

impl Revocable {
    fn new() -> Self {
        Self::in_home(Home::new(), "2")
    }

    /// The key is asked for again after so many seconds.
    fn in_home(home: Home, age: &str) -> Self {
        let keyring = home.path("keyring");
        let key = format!("local:{}", keyring.display());
        let volume = Volume::in_home(home, &["--key", &key], &["--key-max-age", age]);
        let key = volume.home.ok(&[&"keys", &"list", &volume.cipher, &"--json"]);
        let start = key.find("k-").unwrap();
        Self { keyring, key: key[start..start + 18].to_owned(), volume }
    }

    fn set(&self, state: &str) {
        self.volume.home.ok(&[&"keys", &state, &self.key, &"--keyring", &self.keyring]);
    }

    /// Waits until the mount refuses what is done with the file `probe`.
    fn disable(&self) {
        self.set("disable");
        eventually("the key is refused", || fs::read(self.volume.path("probe")).is_err());
    }

    fn enable(&self) {
        self.set("enable");
        eventually("the key is given again", || fs::read(self.volume.path("probe")).is_ok());
    }
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).append(true).create(true).open(path).unwrap()
}

#[test]
fn a_log_whose_key_was_refused_goes_on_without_zeros() {
    let of = Revocable::new();
    let log = of.volume.path("log");
    fs::write(of.volume.path("probe"), "probe").unwrap();
    let mut open_log = open(&log);
    open_log.write_all(&[b'A'; 4000]).unwrap();
    open_log.sync_all().unwrap();
    of.disable();
    // The page is in the kernel already, or the write is refused itself.
    let lost = open_log.write_all(&[b'B'; 8192]).and_then(|()| open_log.sync_all());
    assert!(lost.is_err(), "nobody was told");
    of.enable();
    if let Ok(found) = fs::read(&log) {
        assert!(found.iter().all(|byte| [b'A', b'C'].contains(byte)), "a byte that nobody wrote");
    }
    drop(open_log.write_all(b"CCCC").and_then(|()| open_log.sync_all()));
    drop(open_log);
    eventually("the file is usable", || {
        let mut again = open(&log);
        again.write_all(b"DDDD").and_then(|()| again.sync_all()).is_ok()
    });
    of.volume.remount();
    let found = fs::read(&log).unwrap();
    assert!(
        found.starts_with(&[b'A'; 4000]) && found.ends_with(b"DDDD") && found.len() < 5000,
        "{} bytes",
        found.len()
    );
    assert!(!found.contains(&0), "zeros that nobody wrote");
}

#[test]
fn a_far_write_that_was_refused_leaves_no_hole_and_cutting_the_file_makes_it_usable() {
    let of = Revocable::new();
    let path = of.volume.path("far");
    fs::write(of.volume.path("probe"), "probe").unwrap();
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all_at(&[b'A'; 4096], 0).unwrap();
    file.sync_all().unwrap();
    of.disable();
    let lost = file.write_all_at(&[b'B'; 4096], 1 << 20).and_then(|()| file.sync_all());
    assert!(lost.is_err());
    of.enable();
    assert!(file.write_all_at(&[b'C'; 4096], 2 << 20).and_then(|()| file.sync_all()).is_err(), "it would store a hole");
    assert!(file.set_len(3 << 20).is_err(), "so would this");
    file.set_len(4096).unwrap();
    file.write_all_at(&[b'D'; 4096], 8192).unwrap();
    file.sync_all().unwrap();
    drop(file);
    of.volume.remount();
    let found = fs::read(&path).unwrap();
    let expected = [[b'A'; 4096], [0; 4096], [b'D'; 4096]].concat();
    assert!(found == expected, "the program itself has made this hole");
}

/// `docs/FORMAT.md` 4.5: it never became durable, and is empty.
#[test]
fn a_file_with_a_header_of_zeros_is_empty_and_begins_anew() {
    let volume = Volume::new(&[]);
    for name in ["read", "appended"] {
        fs::write(volume.path(name), [7; 10_000]).unwrap();
    }
    let behind = ["read", "appended"].map(|name| volume.behind(name));
    volume.unmount();
    for path in &behind {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(&[0; 4096], 0).unwrap();
    }
    volume.mount();
    assert_eq!(fs::read(volume.path("read")).unwrap(), b"");
    assert_eq!(fs::metadata(volume.path("read")).unwrap().len(), 0);
    open(&volume.path("appended")).write_all(b"more").unwrap();
    assert_eq!(fs::read(volume.path("appended")).unwrap(), b"more");
    volume.remount();
    assert_eq!(fs::read(volume.path("appended")).unwrap(), b"more");
    let said = volume.home.kmsfs(&[&"check", &volume.cipher]);
    assert!(support::text(&said.stdout).contains("the header is zeros"), "{}", support::text(&said.stdout));
}

/// Only XFS has files of that size.
#[test]
fn the_last_bytes_of_the_largest_file_are_what_was_written() {
    const MOST: u64 = 9_115_285_645_797_871_760;
    support::needs_root();
    let home = Home::new();
    let (image, disk) = (home.path("image"), home.path("cipher"));
    File::create(&image).unwrap().set_len(320 << 20).unwrap();
    run("mkfs.xfs", &[&"-q", &image], Path::new("/"));
    fs::create_dir(&disk).unwrap();
    run("mount", &[&"-o", &"loop", &image, &disk], Path::new("/"));
    let volume = Volume::in_home(home, &[], &[]);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(volume.path("large")).unwrap();
    file.write_all_at(&[b'z'; 100], MOST - 100).unwrap();
    file.sync_all().unwrap();
    volume.home.ok(&[&"lock", &volume.plain]);
    volume.home.ok(&[&"unlock", &volume.plain]);
    let mut found = [0; 100];
    file.read_exact_at(&mut found, MOST - 100).unwrap();
    assert_eq!(found, [b'z'; 100]);
    assert_eq!(errno(file.write_all_at(b"z", MOST).and_then(|()| file.sync_all())), Some(libc::EFBIG));
}

const SECONDS: &str = "KMSFS_FAULTS_SECONDS";
const SEED: &str = "KMSFS_FAULTS_SEED";

/// A number in the environment.
fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |value| value.parse().unwrap())
}

/// Takes all space that is left.
fn fill(ballast: &File) {
    let mut len = 32 << 20;
    while len >= 4096 {
        let end = ballast.metadata().unwrap().len();
        if rustix::fs::fallocate(ballast, rustix::fs::FallocateFlags::empty(), end, len).is_err() {
            len /= 2;
        }
    }
}

/// Appenders, overwriters, programs that write far, truncate and map, on a disk that fills up and under a key that is refused. Each
/// knows what it may find (`support/writers.py`).
#[test]
fn no_fault_leaves_a_zero_that_nobody_wrote() {
    support::needs_root();
    let (seconds, seed) = (number(SECONDS, 12), number(SEED, 1));
    let home = Home::new();
    let (image, disk, script, stop) =
        (home.path("image"), home.path("cipher"), home.path("writers.py"), home.path("stop"));
    File::create(&image).unwrap().set_len(24 << 20).unwrap();
    run("mkfs.ext4", &[&"-q", &"-F", &"-b", &"4096", &"-m", &"0", &image], Path::new("/"));
    fs::create_dir(&disk).unwrap();
    run("mount", &[&"-o", &"loop", &image, &disk], Path::new("/"));
    fs::remove_dir(disk.join("lost+found")).unwrap();
    fs::write(&script, include_str!("support/writers.py")).unwrap();
    let of = Revocable::in_home(home, "1");
    let ballast = OpenOptions::new().create(true).truncate(true).write(true).open(disk.join(".ballast")).unwrap();
    let mut writers: Vec<Child> = ["append", "overwrite", "far", "truncate", "map"]
        .iter()
        .zip(1..)
        .map(|(kind, n)| {
            let mut program = Command::new("python3");
            program.arg(&script).arg(of.volume.path(kind)).arg(kind).arg(n.to_string());
            program.arg((seed * 100 + n).to_string()).arg(seconds.to_string()).arg(&stop);
            program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let mut answers: Vec<_> =
        writers.iter_mut().map(|writer| BufReader::new(writer.stdout.take().unwrap()).lines()).collect();
    let (until, mut faults) = (Instant::now() + Duration::from_secs(seconds), 0_u64);
    while Instant::now() < until {
        faults += 1;
        let pause = Duration::from_millis(bytes(seed + faults, 1)[0].into());
        if faults % 8 == 0 {
            of.set("disable");
            sleep(Duration::from_secs(1) + pause);
            of.set("enable");
        } else {
            fill(&ballast);
            sleep(pause);
            ballast.set_len(0).unwrap();
        }
        sleep(pause);
    }
    fs::write(&stop, "").unwrap();
    let mut told = 0;
    for line in &mut answers {
        let line = line.next().unwrap().unwrap();
        told += line.split(' ').nth(1).and_then(|count| count.parse::<u64>().ok()).unwrap_or_else(|| panic!("{line}"));
    }
    of.volume.remount();
    for (writer, line) in writers.iter_mut().zip(&mut answers) {
        writeln!(writer.stdin.take().unwrap()).unwrap();
        assert_eq!(line.next().unwrap().unwrap(), "well");
        assert!(writer.wait().unwrap().success());
    }
    println!("{faults} faults, and programs were told of {told} errors (seed {seed})");
    assert!(told > 0, "nothing failed");
}
