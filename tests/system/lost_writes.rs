//! Writes that are lost after a program was told that they are done: it hears of them, and nobody reads or stores a zero in
//! their place.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::support::fault_proxy::Fault;
use crate::support::kms_mount;
use crate::support::refusal::Refusal;
use crate::support::{self, Home, Volume, bytes, errno, eventually, run};

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

/// The file is cut already: an error would leave programs with the old size.
#[test]
fn a_file_that_was_cut_has_its_new_size_although_its_times_are_refused() {
    support::needs_root();
    let volume = Volume::new(&[]);
    let path = volume.path("file");
    fs::write(&path, [b'A'; 50_000]).unwrap();
    volume.remount();
    let refused = Refusal::of(volume.pid(), &["utimensat:error=EIO"]);
    let script = "import os, sys; os.truncate(sys.argv[1], 20000)";
    run("python3", &[&"-c", &script, &path], Path::new("/"));
    drop(refused);
    assert_eq!(fs::read(&path).unwrap(), [b'A'; 20_000]);
    volume.remount();
    assert_eq!(fs::read(&path).unwrap(), [b'A'; 20_000]);
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

/// A program that writes: each knows what it may find (`support/writers.py`).
struct Writer {
    process: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    fn start(volume: &Volume, kind: &str, number: u64, seed: u64) -> Self {
        let mut program = Command::new("python3");
        program.arg(volume.home.path("writers.py")).arg(volume.path(kind)).arg(kind).arg(number.to_string());
        program.arg((seed * 100 + number).to_string()).arg(number_of_seconds().to_string());
        program.arg(volume.home.path("stop"));
        let mut process = program.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let answers = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, answers }
    }

    fn line(&mut self) -> String {
        self.answers.next().expect("it ends without a word").unwrap()
    }
}

fn number_of_seconds() -> u64 {
    number(SECONDS, 12)
}

/// Appenders, overwriters, programs that write far, truncate and map, while `fault` lets one layer after the other fail for a
/// while: it gets a number and that while, and returns what failed.
fn torment(volume: &Volume, mut fault: impl FnMut(u64, Duration) -> &'static str) {
    let seed = number(SEED, 1);
    fs::write(volume.home.path("writers.py"), include_str!("../support/writers.py")).unwrap();
    let kinds = ["append", "overwrite", "far", "truncate", "map"];
    let mut writers: Vec<_> =
        kinds.iter().zip(1..).map(|(kind, number)| Writer::start(volume, kind, number, seed)).collect();
    let (until, mut faults) = (Instant::now() + Duration::from_secs(number_of_seconds()), BTreeMap::new());
    let mut injected = 0;
    while Instant::now() < until {
        let pause = Duration::from_millis(bytes(seed + injected, 1)[0].into());
        *faults.entry(fault(injected, pause)).or_insert(0_u64) += 1;
        sleep(pause / 2);
        injected += 1;
    }
    fs::write(volume.home.path("stop"), "").unwrap();
    let mut told = 0;
    for writer in &mut writers {
        let line = writer.line();
        told += line.split(' ').nth(1).and_then(|count| count.parse::<u64>().ok()).unwrap_or_else(|| panic!("{line}"));
    }
    volume.remount();
    for writer in &mut writers {
        writeln!(writer.process.stdin.take().unwrap()).unwrap();
        assert_eq!(writer.line(), "well");
        assert!(writer.process.wait().unwrap().success());
    }
    println!("{injected} faults {faults:?}, and programs were told of {told} errors (seed {seed})");
    assert!(told > 0, "nothing failed");
}

/// A filesystem of its own for a cipher directory, and what takes its space.
fn disk(home: &Home, megabytes: u64, make: &[&str]) -> PathBuf {
    support::needs_root();
    let (image, disk) = (home.path("image"), home.path("cipher"));
    File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
    let mut arguments: Vec<support::Argument<'_>> = make[1..].iter().map(|word| word as _).collect();
    arguments.push(&image);
    run(make[0], &arguments, Path::new("/"));
    fs::create_dir(&disk).unwrap();
    run("mount", &[&"-o", &"loop", &image, &disk], Path::new("/"));
    let _ = fs::remove_dir(disk.join("lost+found"));
    disk
}

/// Which of a mount's system calls fail.
const CALLS: [&str; 4] =
    ["pwrite64:error=EIO", "ftruncate:error=EIO", "fdatasync:error=EIO", "sync_file_range:error=EIO"];

#[test]
fn no_full_disk_error_below_or_refused_key_leaves_a_zero_that_nobody_wrote() {
    let home = Home::new();
    let disk = disk(&home, 24, &["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0"]);
    let of = Revocable::in_home(home, "1");
    let ballast = File::create(disk.join(".ballast")).unwrap();
    torment(&of.volume, |number, pause| match number % 8 {
        7 => {
            of.set("disable");
            sleep(Duration::from_secs(1) + pause);
            of.set("enable");
            "key refused"
        }
        1 | 3 | 5 => {
            let call = CALLS[usize::try_from(number / 2).unwrap() % CALLS.len()];
            let refused = Refusal::of(of.volume.pid(), &[call]);
            sleep(pause);
            drop(refused);
            call
        }
        _ => {
            fill(&ballast);
            sleep(pause);
            ballast.set_len(0).unwrap();
            "disk full"
        }
    });
}

/// At its quota btrfs refuses changes that free space too.
#[test]
fn no_quota_that_is_used_up_leaves_a_zero_that_nobody_wrote() {
    let home = Home::new();
    let disk = disk(&home, 120, &["mkfs.btrfs", "-q", "-f"]);
    run("btrfs", &[&"quota", &"enable", &disk], Path::new("/"));
    run("btrfs", &[&"qgroup", &"limit", &"16M", &disk], Path::new("/"));
    let ballast = disk.join(".ballast");
    torment(&Volume::in_home(home, &[], &[]), |_, pause| {
        File::create(&ballast).iter().for_each(fill);
        sleep(pause);
        drop(fs::remove_file(&ballast));
        "quota used up"
    });
}

#[test]
fn no_provider_that_is_silent_throttles_or_refuses_leaves_a_zero_that_nobody_wrote() {
    let scene = kms_mount::KmsVolume::new(&["--key-max-age", "1"]);
    torment(&scene.volume, |number, pause| {
        let (what, fault) = [
            ("silent", Some(Fault::Stall)),
            ("throttled", Some(Fault::Exception(400, "ThrottlingException"))),
            ("refused", None),
            ("unreachable", Some(Fault::Reset)),
        ][usize::try_from(number).unwrap() % 4];
        match fault {
            Some(fault) => ["Decrypt", "GenerateDataKey"].iter().for_each(|call| scene.proxy.inject(call, .., fault)),
            None => scene.set_enabled(false),
        }
        sleep(Duration::from_secs(1) + 2 * pause);
        scene.proxy.heal();
        scene.set_enabled(true);
        what
    });
}
