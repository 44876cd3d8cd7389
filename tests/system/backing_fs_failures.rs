//! The backing filesystem fails: full, over quota, read-only, dead, gone, and no descriptors left. The errno is the right one, what
//! was there stays, a write that failed half way leaves a file that opens, and all works again when it is over.
//!
//! Needs root and loop devices, as `.ci/run` has.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::refusal::Refusal;
use crate::support::{
    self, Argument, Home, Volume, bytes, errno, eventually, flip, needs_root, python, run, text, walk,
};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Pid, Signal, kill_process};

/// Bytes of plaintext in a page.
const PAGE: usize = 4048;

/// A volume on a small filesystem of its own.
struct OnDisk {
    volume: Volume,
    image: PathBuf,
}

fn system(program: &str, arguments: &[Argument<'_>]) -> String {
    run(program, arguments, Path::new("/"))
}

impl OnDisk {
    /// `prepare` is run with the mounted filesystem before the volume is made on it.
    fn new(size: u64, make: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        needs_root();
        let home = Home::new();
        let (image, disk) = (home.path("image"), home.path("cipher"));
        File::create(&image).unwrap().set_len(size).unwrap();
        let mut arguments: Vec<Argument<'_>> = make[1..].iter().map(|word| word as Argument<'_>).collect();
        arguments.push(&image);
        system(make[0], &arguments);
        fs::create_dir(&disk).unwrap();
        system("mount", &[&"-o", &"loop", &image, &disk]);
        let _ = fs::remove_dir(disk.join("lost+found"));
        prepare(&disk);
        Self { volume: Volume::in_home(home, &[], &[]), image }
    }

    fn ext4() -> Self {
        Self::new(24 << 20, &["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0"], |_| {})
    }

    /// What a machine does after its disk has failed: everything is taken down and mounted again.
    fn start_again(&self) {
        self.volume.kill();
        self.volume.home.ok(&[&"umount", &self.volume.plain]);
        system("umount", &[&self.volume.cipher]);
        system("mount", &[&"-o", &"loop", &self.image, &self.volume.cipher]);
        self.volume.mount();
    }
}

fn synced(path: &Path, content: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(content).unwrap();
    file.sync_all().unwrap();
}

/// Writes all of it and syncs, as far as that goes.
fn written(path: &Path, offset: u64, content: &[u8]) -> io::Result<()> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    file.write_all_at(content, offset)?;
    file.sync_all()
}

/// Every file opens and reads to its end.
fn everything_opens(volume: &Volume) {
    for path in walk(&volume.plain).iter().filter(|path| path.is_file()) {
        let found = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(found.len() as u64, fs::metadata(path).unwrap().len(), "{}", path.display());
    }
}

/// The file ends where writing failed, and nothing in it is a zero that nobody wrote. What lies before `from` was there already.
fn a_part_of(found: &[u8], tried: &[u8], from: usize) {
    assert!((from..=tried.len()).contains(&found.len()), "{} bytes", found.len());
    assert!(found[..from] == tried[..from], "what was there before is lost");
    let wrong = found.iter().zip(tried).position(|(found, tried)| found != tried);
    assert_eq!(wrong, None, "not what was written");
}

/// Mounts anew. Everything opens. A filesystem that refuses even to cut a file (btrfs at its quota) leaves it too long: then the
/// unmount says so, and this is false.
fn leaves_nothing_uncut(volume: &Volume) -> bool {
    let mut said = String::new();
    eventually("nothing keeps the mount in use", || {
        let output = volume.home.kmsfs(&[&"umount", &volume.plain]);
        said = text(&output.stderr);
        output.status.success() || output.status.code() == Some(14)
    });
    assert!(said.is_empty() || said.contains("cannot be cut"), "{said}");
    volume.mount();
    everything_opens(volume);
    said.is_empty()
}

/// Fills a disk that says `full` when it is.
fn fills_up_and_recovers(on: &OnDisk, full: i32, larger_than_disk: usize) {
    let volume = &on.volume;
    let (kept, grown) = (bytes(1, 700_001), bytes(2, 300_003));
    let more = bytes(3, larger_than_disk);
    synced(&volume.path("kept"), &kept);
    synced(&volume.path("grown"), &grown);
    let open = File::create(volume.path("filler")).unwrap();
    open.write_all_at(&more, 0).unwrap();
    assert_eq!(errno(open.sync_all()), Some(full), "a new file");
    // The kernel counts what is lost in the size: who has the file open is told, unless the kernel still has what was written.
    let copy = volume.home.path("copy");
    let copied = Command::new("cp").arg(volume.path("filler")).arg(&copy).stderr(Stdio::null()).status();
    assert!(!copied.unwrap().success() || fs::read(&copy).unwrap() == more, "a copy with zeros in it");
    drop(open);
    let stored = || fs::read(volume.path("filler"));
    eventually("the kernel has the size that is stored", || stored().is_ok_and(|found| found.len() < more.len()));
    a_part_of(&stored().unwrap(), &more, 0);
    if leaves_nothing_uncut(volume) {
        a_part_of(&fs::read(volume.path("filler")).unwrap(), &more, 0);
    }
    // To the last block.
    let fill = |number: u64| written(&volume.path(format!("small-{number}")), 0, &bytes(number, 3 * PAGE));
    let failed = (0..20_000).find_map(|number| fill(number).err()).expect("the disk has an end");
    assert_eq!(failed.raw_os_error(), Some(full));
    assert_eq!(errno(written(&volume.path("grown"), grown.len() as u64, &more)), Some(full), "a file that grows");
    assert!(fs::read(volume.path("kept")).unwrap() == kept);
    let is_cut = leaves_nothing_uncut(volume);
    assert!(fs::read(volume.path("kept")).unwrap() == kept);
    let tried = [grown.as_slice(), &more].concat();
    let found = fs::read(volume.path("grown")).unwrap();
    a_part_of(if is_cut { &found } else { &found[..grown.len()] }, &tried, grown.len());
    // It is over.
    for path in walk(&volume.plain).iter().filter(|path| !path.ends_with("kept") && !path.ends_with("grown")) {
        fs::remove_file(path).unwrap();
    }
    system("sync", &[&"-f", &volume.cipher]);
    written(&volume.path("grown"), grown.len() as u64, &more[..50_000]).unwrap();
    synced(&volume.path("new"), &grown);
    volume.remount();
    assert!(fs::read(volume.path("grown")).unwrap()[..grown.len() + 50_000] == tried[..grown.len() + 50_000]);
    assert!(fs::read(volume.path("new")).unwrap() == grown);
    assert!(fs::read(volume.path("kept")).unwrap() == kept);
}

#[test]
fn a_full_disk_loses_nothing_and_tears_nothing() {
    fills_up_and_recovers(&OnDisk::ext4(), libc::ENOSPC, 30 << 20);
}

/// What the kernel writes back with a range lies in pages that were not asked for.
#[test]
fn what_was_allocated_can_be_written_on_a_full_disk() {
    let on = OnDisk::ext4();
    let volume = &on.volume;
    let lengths = [1, 2, 4047, 4048, 4049, 8096, 100_000];
    let ranges = lengths.iter().flat_map(|len| [0, 1, 4047, 4095, 4096, 10_000].map(|at| (at, *len)));
    let files: Vec<_> = ranges
        .flat_map(|(at, len)| [FallocateFlags::empty(), FallocateFlags::KEEP_SIZE].map(|flags| (at, len, flags)))
        .map(|(at, len, flags)| {
            let path = volume.path(format!("{at}-{len}-{flags:?}"));
            let file = OpenOptions::new().create_new(true).read(true).write(true).open(&path).unwrap();
            fallocate(&file, flags, at, len).unwrap();
            file.sync_all().unwrap();
            (file, path, at, usize::try_from(len).unwrap())
        })
        .collect();
    let full = (0..).find_map(|number| written(&on.volume.cipher.join("fill"), number << 20, &[1; 1 << 20]).err());
    assert_eq!(full.unwrap().raw_os_error(), Some(libc::ENOSPC));
    let single = |number: u64| written(&on.volume.cipher.join("fill-rest"), number << 12, &[1; 4096]).err();
    assert_eq!((0..).find_map(single).unwrap().raw_os_error(), Some(libc::ENOSPC));
    for (file, path, at, len) in files {
        let content = bytes(at, len);
        let done = file.write_all_at(&content, at).and_then(|()| file.sync_all());
        done.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut found = vec![0; len];
        file.read_exact_at(&mut found, at).unwrap();
        assert!(found == content);
    }
}

#[test]
fn a_quota_that_is_used_up_loses_nothing_and_tears_nothing() {
    let on = OnDisk::new(120 << 20, &["mkfs.btrfs", "-q", "-f"], |disk| {
        system("btrfs", &[&"quota", &"enable", &disk]);
        system("btrfs", &[&"qgroup", &"limit", &"16M", &disk]);
    });
    fills_up_and_recovers(&on, libc::EDQUOT, 20 << 20);
}

/// ext4 makes itself read-only when it finds an error, also under files that are open.
#[test]
fn a_backing_filesystem_that_becomes_read_only_refuses_changes_and_reads_on() {
    let on = OnDisk::ext4();
    let volume = &on.volume;
    let kept = bytes(1, 100_001);
    synced(&volume.path("kept"), &kept);
    let open = OpenOptions::new().read(true).write(true).open(volume.path("kept")).unwrap();
    system("mount", &[&"-o", &"remount,abort", &volume.cipher]);
    let late = open.write_all_at(b"late", 0).and_then(|()| open.sync_all());
    assert_eq!(errno(late), Some(libc::EROFS));
    assert_eq!(errno(File::create(volume.path("new"))), Some(libc::EROFS));
    assert_eq!(errno(fs::create_dir(volume.path("directory"))), Some(libc::EROFS));
    assert_eq!(errno(fs::rename(volume.path("kept"), volume.path("moved"))), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(volume.path("kept"))), Some(libc::EROFS));
    assert!(fs::read(volume.path("kept")).unwrap()[4..] == kept[4..]);
    drop(open);
    on.start_again();
    assert!(fs::read(volume.path("kept")).unwrap() == kept);
    synced(&volume.path("new"), &kept);
}

/// `EXT4_IOC_SHUTDOWN` without flushing the journal: from now on the disk answers everything with EIO, and what it had not
/// yet is lost.
fn shut_down(disk: &Path) {
    // EXT4_GOING_FLAGS_NOLOGFLUSH
    let script = "import fcntl, os, struct, sys\n\
                  fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
    python(script, &[&disk], Path::new("/"));
}

#[test]
fn what_kmsfs_sync_returned_for_is_there_after_the_disk_died_and_what_it_cannot_do_it_says() {
    let on = OnDisk::ext4();
    let (volume, long) = (&on.volume, "long".repeat(60));
    let content = |number: u64| bytes(number, 5000 + usize::try_from(number).unwrap());
    let path = |number: u64| volume.path(format!("{}/{long}-{number}", number % 3));
    (0..3).for_each(|number| fs::create_dir(volume.path(number.to_string())).unwrap());
    let mut open: Vec<_> = (0..30).map(|number| File::create(path(number)).unwrap()).collect();
    for (file, number) in open.iter_mut().zip(0..) {
        file.write_all(&content(number)).unwrap();
    }
    volume.home.ok(&[&"sync", &volume.plain]);
    shut_down(&volume.cipher);
    let said = volume.home.refused(14, &[&"sync", &volume.plain]);
    assert!(said.contains("not everything is durable"), "{said}");
    drop(open);
    on.start_again();
    everything_opens(volume);
    for number in 0..30 {
        assert!(fs::read(path(number)).unwrap() == content(number), "{number}");
    }
    volume.home.refused(12, &[&"sync", &volume.home.path("")]);
    volume.unmount();
    let of_nobody = Volume::in_home(Home::of_nobody(), &[], &[]);
    of_nobody.home.shell("echo kept > plain/file");
    of_nobody.home.ok(&[&"sync", &of_nobody.plain]);
    of_nobody.unmount();
}

/// Two hosts, as far as locks go: each has the directory through a filesystem of its own that carries none.
struct TwoHosts(Home);

impl TwoHosts {
    fn new() -> Self {
        needs_root();
        let home = Home::new();
        for place in ["base", "one", "two", "plain-one", "plain-two"] {
            fs::create_dir(home.path(place)).unwrap();
        }
        for host in ["one", "two"] {
            system("bindfs", &[&home.path("base"), &home.path(host)]);
        }
        Self(home)
    }

    fn mount(&self, host: &str) -> [PathBuf; 2] {
        [self.0.path(host).join("cipher"), self.0.path(format!("plain-{host}"))]
    }
}

impl Drop for TwoHosts {
    fn drop(&mut self) {
        for place in ["plain-one", "plain-two", "one", "two"] {
            let _ = rustix::mount::unmount(self.0.path(place), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// The lease says what no lock says; who is frozen for too long writes nothing over the other's work.
#[test]
fn two_hosts_without_locks_never_write_one_volume() {
    let hosts = TwoHosts::new();
    let home = &hosts.0;
    let ([cipher, plain], [other_cipher, other_plain]) = (hosts.mount("one"), hosts.mount("two"));
    home.ok(&[&"init", &cipher]);
    home.ok(&[&"mount", &cipher, &plain]);
    fs::write(plain.join("file"), "of one").unwrap();
    let mut open = File::create(plain.join("open")).unwrap();
    let ways: [&[Argument<'_>]; 3] = [
        &[&"mount", &other_cipher, &other_plain],
        &[&"mount", &"--read-only", &other_cipher, &other_plain],
        &[&"import", &plain, &other_cipher, &"into"],
    ];
    for way in ways {
        let said = home.refused(3, way);
        assert!(said.contains("in use elsewhere: process "), "{said}");
    }
    let status: serde_json::Value = serde_json::from_str(&home.ok(&[&"status", &"--json", &plain])).unwrap();
    let pid = Pid::from_raw(i32::try_from(status["pid"].as_i64().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let said = home.kmsfs(&[&"mount", &other_cipher, &other_plain]);
    kill_process(pid, Signal::CONT).unwrap();
    assert!(said.status.success(), "{}", support::text(&said.stderr));
    assert!(support::text(&said.stderr).contains("waiting 45 s"), "{}", support::text(&said.stderr));
    fs::write(other_plain.join("file"), "of two").unwrap();
    assert_eq!(errno(fs::write(plain.join("file"), "of one again")), Some(libc::EROFS));
    assert_eq!(errno(fs::remove_file(plain.join("file"))), Some(libc::EROFS));
    let late = open.write_all(b"late").and_then(|()| open.sync_all());
    assert_eq!(errno(late), Some(libc::EROFS));
    home.refused(14, &[&"sync", &plain]);
    drop(open);
    assert!(home.logs().contains("has taken the volume over"), "{}", home.logs());
    let said = home.refused(14, &[&"umount", &plain]);
    assert!(said.contains("another has taken the volume over") && !Home::is_mounted(&plain), "{said}");
    assert_eq!(fs::read_to_string(other_plain.join("file")).unwrap(), "of two");
    home.ok(&[&"umount", &other_plain]);
    home.ok(&[&"check", &cipher]);
    home.ok(&[&"mount", &cipher, &plain]);
    assert_eq!(fs::read_to_string(plain.join("file")).unwrap(), "of two");
    home.ok(&[&"umount", &plain]);
}

#[test]
fn a_disk_that_dies_is_an_input_output_error_and_what_was_synced_is_there_afterwards() {
    let on = OnDisk::ext4();
    let volume = &on.volume;
    let kept = bytes(1, 100_001);
    synced(&volume.path("kept"), &kept);
    synced(&volume.path("cold"), &kept);
    volume.remount();
    let open = OpenOptions::new().read(true).write(true).open(volume.path("kept")).unwrap();
    open.write_all_at(&bytes(2, 30_000), 50_000).unwrap();
    shut_down(&volume.cipher);
    assert_eq!(errno(open.sync_all()), Some(libc::EIO));
    assert_eq!(errno(fs::read(volume.path("cold"))), Some(libc::EIO));
    assert_eq!(errno(File::create(volume.path("new"))), Some(libc::EIO));
    assert_eq!(errno(fs::remove_file(volume.path("cold"))), Some(libc::EIO));
    drop(open);
    on.start_again();
    everything_opens(volume);
    assert!(fs::read(volume.path("cold")).unwrap() == kept);
    let found = fs::read(volume.path("kept")).unwrap();
    let mut newer = kept.clone();
    newer[50_000..80_000].copy_from_slice(&bytes(2, 30_000));
    assert_eq!(found.len(), kept.len());
    for (number, page) in found.chunks(PAGE).enumerate() {
        let range = number * PAGE..number * PAGE + page.len();
        assert!(page == &kept[range.clone()] || page == &newer[range], "page {number} is neither old nor new");
    }
    synced(&volume.path("new"), &kept);
}

#[test]
fn without_descriptors_an_open_fails_and_it_is_over_when_files_are_closed() {
    const FILES: u64 = 400;
    needs_root();
    let volume = Volume::new(&[]);
    for number in 0..FILES {
        fs::write(volume.path(format!("file-{number}")), bytes(number, 5000)).unwrap();
    }
    volume.unmount();
    let mut command = volume.home.command("prlimit");
    command.arg("--nofile=200:200").arg(volume.home.program()).args(volume.mount_arguments());
    assert!(command.status().unwrap().success());
    let open = |number| OpenOptions::new().read(true).write(true).open(volume.path(format!("file-{number}")));
    let mut held = Vec::new();
    let error = (0..FILES).find_map(|number| open(number).map(|file| held.push(file)).err());
    assert_eq!(error.expect("there is a limit").raw_os_error(), Some(libc::EMFILE));
    // Nobody is kept waiting for what is not to be had.
    let started = std::time::Instant::now();
    (FILES - 5..FILES).for_each(|number| assert_eq!(open(number).unwrap_err().raw_os_error(), Some(libc::EMFILE)));
    assert!(started.elapsed() < std::time::Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(held.len() > 20, "{} files fit", held.len());
    for (number, file) in (0..).zip(&held) {
        let mut found = vec![0; 5000];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == bytes(number, 5000));
        file.write_all_at(b"changed", 0).unwrap();
        file.sync_all().unwrap();
    }
    let changed = held.len() as u64;
    drop(held);
    // The kernel tells of closed files when it has time.
    eventually("a file opens again", || open(FILES - 1).is_ok());
    for number in 0..FILES {
        let mut expected = bytes(number, 5000);
        if number < changed {
            expected[..7].copy_from_slice(b"changed");
        }
        assert!(fs::read(volume.path(format!("file-{number}"))).unwrap() == expected, "file {number}");
    }
    fs::write(volume.path("new"), "works again").unwrap();
    volume.remount();
    assert_eq!(fs::read_to_string(volume.path("new")).unwrap(), "works again");
}

/// A program makes one file after the other, and each waits for being settled: what lets go of descriptors always has one.
#[test]
fn a_handful_of_descriptors_is_enough_for_many_files() {
    needs_root();
    let volume = Volume::new(&[]);
    volume.unmount();
    let mut command = volume.home.command("prlimit");
    command.arg("--nofile=64:64").arg(volume.home.program()).args(volume.mount_arguments());
    assert!(command.status().unwrap().success());
    let logged = volume.home.logs().len();
    (0..150).for_each(|number| fs::write(volume.path(format!("file-{number}")), bytes(number, 500)).unwrap());
    let said = volume.home.logs()[logged..].lines().filter(|line| line.contains(" WARN ")).count();
    assert!(said < 5, "{said} warnings");
    for number in 0..150 {
        assert!(fs::read(volume.path(format!("file-{number}"))).unwrap() == bytes(number, 500));
    }
}

#[test]
fn a_cipher_directory_that_goes_away_is_an_error_and_one_that_comes_back_is_mounted() {
    let volume = Volume::new(&[]);
    let kept = bytes(1, 50_000);
    fs::create_dir(volume.path("directory")).unwrap();
    synced(&volume.path("directory/kept"), &kept);
    synced(&volume.path("other"), &kept);
    volume.remount();
    // Moved away: a mount holds on to the directory, not to its name.
    let aside = volume.home.path("aside");
    fs::rename(&volume.cipher, &aside).unwrap();
    assert!(fs::read(volume.path("directory/kept")).unwrap() == kept);
    synced(&volume.path("later"), &kept);
    fs::rename(&aside, &volume.cipher).unwrap();
    // Removed, while a file in it is open.
    system("cp", &[&"-a", &volume.cipher, &aside]);
    let open = File::open(volume.path("other")).unwrap();
    fs::remove_dir_all(&volume.cipher).unwrap();
    let gone = [libc::ENOENT, libc::ESTALE, libc::EIO];
    let is_gone = |number: Option<i32>| assert!(number.is_some_and(|number| gone.contains(&number)), "{number:?}");
    is_gone(errno(File::create(volume.path("new"))));
    is_gone(errno(fs::create_dir(volume.path("new"))));
    is_gone(errno(File::create(volume.path("directory/new"))));
    let mut found = vec![0; kept.len()];
    open.read_exact_at(&mut found, 0).unwrap();
    assert!(found == kept);
    drop(open);
    assert!(volume.status()["pid"].is_i64(), "the process is well");
    volume.unmount();
    fs::rename(&aside, &volume.cipher).unwrap();
    volume.mount();
    assert!(fs::read(volume.path("directory/kept")).unwrap() == kept);
    assert!(fs::read(volume.path("later")).unwrap() == kept);
    synced(&volume.path("new"), &kept);
}

/// What is done to a file in the cipher directory.
type Damage = fn(&Path);

/// Neither `unlink` nor `rmdir` needs a key or content that makes sense.
#[test]
fn damaged_entries_can_be_removed_while_no_key_is_to_be_had() {
    let volume = Volume::new(&[]);
    let damage: [(&str, Damage); 6] = [
        ("header", |path| flip(path, 100)),
        ("page", |path| flip(path, 5000)),
        ("size", |path| cut(path, 5000)),
        ("short", |path| cut(path, 17)),
        ("page-end", |path| cut(path, 8192)),
        ("junk", |path| fs::write(path, "junk").unwrap()),
    ];
    for (name, _) in &damage {
        fs::write(volume.path(name), bytes(1, 9000)).unwrap();
    }
    symlink("target", volume.path("link")).unwrap();
    fs::create_dir(volume.path("no-id")).unwrap();
    fs::create_dir(volume.path("bad-id")).unwrap();
    fs::write(volume.path("n".repeat(200)), "long").unwrap();
    let behind = |name: &str| volume.behind(name);
    let (link, no_id, bad_id, long) = (behind("link"), behind("no-id"), behind("bad-id"), behind(&"n".repeat(200)));
    let files: Vec<PathBuf> = damage.iter().map(|(name, _)| volume.behind(name)).collect();
    volume.unmount();
    damage.iter().zip(&files).for_each(|((_, damage), file)| damage(file));
    let relink = |path: &Path| {
        fs::remove_file(path).unwrap();
        symlink("A".repeat(60), path).unwrap();
    };
    relink(&link);
    fs::remove_file(no_id.join(".kmsfs.dir")).unwrap();
    relink(&bad_id.join(".kmsfs.dir"));
    flip(&long, 10);
    volume.mount();
    volume.home.ok(&[&"lock", &volume.plain]);
    assert_eq!(errno(fs::read(volume.path("page"))), Some(libc::ENOKEY));
    for (name, _) in &damage {
        fs::remove_file(volume.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    fs::remove_file(volume.path("link")).unwrap();
    fs::remove_file(volume.path("n".repeat(200))).unwrap();
    fs::remove_dir(volume.path("no-id")).unwrap();
    fs::remove_dir(volume.path("bad-id")).unwrap();
    assert_eq!(fs::read_dir(&volume.plain).unwrap().count(), 0);
    volume.remount();
    let left = walk(&volume.cipher).into_iter().filter(|path| !path.starts_with(volume.cipher.join(".kmsfs")));
    assert_eq!(left.collect::<Vec<_>>(), [volume.cipher.join(".kmsfs.dir")], "nothing is left behind");
}

fn cut(path: &Path, size: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(size).unwrap();
}

/// Appends and hands it over to the mount, which the last `close` of a writer does.
fn appended(path: &Path, content: &[u8]) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(content).unwrap();
}

fn is_logged(volume: &Volume, what: &str) -> bool {
    volume.home.logs().contains(what)
}

/// The settler syncs by the one descriptor that all handles share, and the disk tells each error once.
#[test]
fn an_error_that_the_settler_has_met_is_told_to_each_handle_that_was_open() {
    needs_root();
    let volume = Volume::new(&[]);
    let names: Vec<_> = (0..10).map(|number| format!("file-{number}")).collect();
    // One file is synced by itself; of more than eight the filesystem is synced as a whole, and then each by itself.
    for names in [&names[..1], &names[1..]] {
        for name in names {
            synced(&volume.path(name), &bytes(1, 1000));
        }
        let open = || -> Vec<File> { names.iter().map(|name| File::open(volume.path(name)).unwrap()).collect() };
        let (first, second) = (open(), open());
        for name in names {
            appended(&volume.path(name), b"more");
        }
        let refused = Refusal::of(volume.pid(), &["fdatasync:error=EIO", "syncfs:error=EIO"]);
        let met = |name| is_logged(&volume, &format!("{} cannot be made durable", volume.behind(name).display()));
        eventually("the settler meets it", || names.iter().all(met));
        drop(refused);
        for (name, (first, second)) in names.iter().zip(first.iter().zip(&second)) {
            assert_eq!(errno(first.sync_all()), Some(libc::EIO), "{name}");
            let later = File::open(volume.path(name)).unwrap();
            assert_eq!(errno(second.sync_all()), Some(libc::EIO), "{name}");
            assert_eq!([first, second, &later].map(|file| errno(file.sync_data())), [None; 3], "{name}");
        }
    }
}

/// Where no file is to blame, it may have been any.
#[test]
fn what_the_whole_filesystem_refuses_is_told_to_everybody() {
    needs_root();
    let volume = Volume::new(&[]);
    for number in 0..10 {
        synced(&volume.path(number.to_string()), &bytes(1, 1000));
    }
    synced(&volume.path("other"), b"");
    let other = File::open(volume.path("other")).unwrap();
    let refused = Refusal::of(volume.pid(), &["syncfs:error=EIO:when=1"]);
    for number in 0..10 {
        appended(&volume.path(number.to_string()), b"more");
    }
    eventually("it is told", || errno(other.sync_all()) == Some(libc::EIO));
    other.sync_all().unwrap();
    drop(refused);
}

#[test]
fn an_unmount_that_makes_nothing_durable_says_so() {
    needs_root();
    let volume = Volume::new(&[]);
    fs::write(volume.path("file"), "content").unwrap();
    let refused = Refusal::of(volume.pid(), &["syncfs:error=EIO"]);
    let said = volume.home.refused(14, &[&"umount", &volume.plain]);
    assert!(said.contains("may not be durable"), "{said}");
    drop(refused);
    volume.mount();
    volume.unmount();
}

/// The size of a settled file is told by the disk, and the next write has to know.
#[test]
fn a_file_whose_times_cannot_be_put_back_is_settled_all_the_same() {
    needs_root();
    let volume = Volume::new(&[]);
    let content = bytes(1, 1500);
    let file = OpenOptions::new().create_new(true).write(true).open(volume.path("file")).unwrap();
    file.write_all_at(&content[..1000], 0).unwrap();
    file.sync_all().unwrap();
    let refused = Refusal::of(volume.pid(), &["utimensat:error=ENOSPC"]);
    eventually("it is settled", || is_logged(&volume, "cannot be settled"));
    drop(refused);
    file.write_all_at(&content[1000..], 1000).unwrap();
    file.sync_data().unwrap();
    volume.kill();
    drop(file);
    volume.mount();
    assert!(fs::read(volume.path("file")).unwrap() == content);
}

/// What is made in a directory without an id is lost with the memory of the mount.
#[test]
fn a_directory_that_cannot_be_removed_keeps_its_id_or_takes_nothing() {
    needs_root();
    let volume = Volume::new(&[]);
    let long = "l".repeat(200);
    for (refusals, over) in [
        (&["unlinkat:error=EIO:when=1"][..], false),
        (&["unlinkat:error=EIO:when=2", "symlinkat:error=ENOSPC"], false),
        (&["unlinkat:error=EIO:when=3", "symlinkat:error=ENOSPC"], false),
        (&["renameat2:error=EIO:when=2", "symlinkat:error=ENOSPC"], true),
    ] {
        let directory = volume.path("directory");
        fs::create_dir(&directory).unwrap();
        fs::create_dir(volume.path("another")).unwrap();
        // Leaves the symlink of a long name.
        fs::write(directory.join(&long), "").unwrap();
        let link = walk(&volume.behind("directory"))
            .into_iter()
            .find(|path| path.is_symlink() && !path.ends_with(".kmsfs.dir"));
        let (link, target) = link.map(|link| (link.clone(), fs::read_link(link).unwrap())).unwrap();
        fs::remove_file(directory.join(&long)).unwrap();
        symlink(target, link).unwrap();
        let refused = Refusal::of(volume.pid(), refusals);
        let change = || match over {
            true => fs::rename(volume.path("another"), &directory),
            false => fs::remove_dir(&directory),
        };
        assert_eq!(errno(change()), Some(libc::EIO), "{refusals:?}");
        let made = fs::write(directory.join("early"), "early");
        drop(refused);
        synced(&directory.join("late"), b"late");
        assert!(refusals.len() == 1 || errno(made) == Some(libc::ENOSPC) || directory.join("early").exists());
        volume.remount();
        assert_eq!(fs::read(directory.join("late")).unwrap(), b"late", "{refusals:?}");
        fs::remove_dir_all(&directory).unwrap();
        let _ = fs::remove_dir_all(volume.path("another"));
    }
}

/// Without keys nothing can be sealed: what programs have written comes first.
#[test]
fn what_is_written_is_sealed_before_an_idle_mount_locks_itself() {
    let volume = Volume::in_home(Home::new(), &[], &["--idle-lock", "1"]);
    synced(&volume.path("written"), &bytes(1, 8192));
    synced(&volume.path("mapped"), &bytes(1, 8192));
    let script = "import mmap, os, sys\n\
                  f = os.open(sys.argv[1] + '/written', os.O_RDWR)\n\
                  g = os.open(sys.argv[1] + '/mapped', os.O_RDWR)\n\
                  m = mmap.mmap(g, 8192)\n\
                  os.close(g)\n\
                  os.pwrite(f, b'B' * 8192, 0)\n\
                  m[:] = b'B' * 8192\n\
                  print(flush=True)\n\
                  sys.stdin.read()\n\
                  os.fsync(f)";
    let mut program = std::process::Command::new("python3");
    program.args(["-c", script]).arg(&volume.plain).stdin(std::process::Stdio::piped());
    let mut program = program.stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::io::Read::read_exact(program.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    eventually("it locks itself", || volume.status()["locked"] == true);
    drop(program.stdin.take());
    assert!(program.wait().unwrap().success(), "a sync needs no key");
    volume.home.ok(&[&"unlock", &volume.plain]);
    for name in ["written", "mapped"] {
        assert!(fs::read(volume.path(name)).unwrap() == [b'B'; 8192], "{name}");
    }
}
