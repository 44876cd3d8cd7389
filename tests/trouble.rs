//! The backing filesystem fails: full, over quota, read-only, dead, gone, and no descriptors left. The errno is the right one, what
//! was there stays, a write that failed half way leaves a file that opens, and all works again when it is over.
//!
//! Needs root and loop devices, as `.ci/run` has.
#![cfg(feature = "mount")]
#![allow(clippy::unwrap_used)] // it is how a test fails

#[path = "support/mount.rs"]
mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{Argument, Home, Volume, bytes, errno, eventually, flip, needs_root, python, run, walk};

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
    // The kernel counts what is lost in the size: who has the file open is told.
    let copied = Command::new("cp").arg(volume.path("filler")).arg("/dev/null").stderr(Stdio::null()).status();
    assert!(!copied.unwrap().success(), "a copy with zeros in it");
    drop(open);
    let stored = || fs::read(volume.path("filler"));
    eventually("the kernel has the size that is stored", || stored().is_ok_and(|found| found.len() < more.len()));
    a_part_of(&stored().unwrap(), &more, 0);
    volume.remount();
    everything_opens(volume);
    a_part_of(&fs::read(volume.path("filler")).unwrap(), &more, 0);
    // To the last block.
    let fill = |number: u64| written(&volume.path(format!("small-{number}")), 0, &bytes(number, 3 * PAGE));
    let failed = (0..20_000).find_map(|number| fill(number).err()).expect("the disk has an end");
    assert_eq!(failed.raw_os_error(), Some(full));
    assert_eq!(errno(written(&volume.path("grown"), grown.len() as u64, &more)), Some(full), "a file that grows");
    assert!(fs::read(volume.path("kept")).unwrap() == kept);
    volume.remount();
    everything_opens(volume);
    assert!(fs::read(volume.path("kept")).unwrap() == kept);
    let tried = [grown.as_slice(), &more].concat();
    a_part_of(&fs::read(volume.path("grown")).unwrap(), &tried, grown.len());
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
    // EXT4_GOING_FLAGS_NOLOGFLUSH
    let script = "import fcntl, os, struct, sys\n\
                  fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
    python(script, &[&volume.cipher], Path::new("/"));
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
