//! What a power cut right after a sync leaves on ext4, XFS and btrfs themselves: the disk is copied at that moment, and the copy is
//! mounted, so that the filesystem replays its journal or log. What was synced is there under a name that decrypts.
//!
//! Needs root and loop devices, as `.ci/run` has. The disk is copied with all that it was told to write: what a device loses of its
//! own cache, `scripts/` has a rig for.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{self, Argument, Home, Volume, bytes, eventually, needs_root, python, run, tree, walk};

const EXT4: &[&str] = &["mkfs.ext4", "-q", "-F", "-b", "4096"];
const BTRFS: &[&str] = &["mkfs.btrfs", "-q", "-f"];

/// What must be there: the content, and the names under one of which it may be.
type Synced = BTreeMap<u64, Vec<String>>;

fn system(program: &str, arguments: &[Argument<'_>]) {
    run(program, arguments, Path::new("/"));
}

/// The process behind a mount may still be ending.
fn unmount(disk: &Path) {
    eventually("the disk is free", || Command::new("umount").arg(disk).output().unwrap().status.success());
}

fn content(number: u64) -> Vec<u8> {
    bytes(number, 9000)
}

fn sync(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

fn write_and_sync(volume: &Volume, path: &str, number: u64, synced: &mut Synced) {
    let mut file = File::create(volume.path(path)).unwrap();
    file.write_all(&content(number)).unwrap();
    file.sync_all().unwrap();
    synced.insert(number, vec![path.to_owned()]);
}

fn long(letter: &str) -> String {
    letter.repeat(220)
}

/// The steps after each of which the power is cut.
const STEPS: [fn(&Volume, &mut Synced); 6] = [
    |volume, synced| {
        fs::create_dir(volume.path("directory")).unwrap();
        write_and_sync(volume, "directory/file", 1, synced);
    },
    |volume, synced| write_and_sync(volume, &long("l"), 2, synced),
    |volume, synced| {
        let directory = format!("directory/{}", long("d"));
        fs::create_dir_all(volume.path(&directory).join("below")).unwrap();
        write_and_sync(volume, &format!("{directory}/below/{}", long("f")), 3, synced);
    },
    |volume, synced| {
        let (old, new) = ("directory/file".to_owned(), format!("directory/{}", long("r")));
        fs::rename(volume.path(&old), volume.path(&new)).unwrap();
        sync(&volume.path(&new));
        synced.insert(1, vec![old, new]);
    },
    |volume, synced| {
        // Durable by the directory alone.
        fs::create_dir(volume.path("other")).unwrap();
        fs::write(volume.path("other").join(long("o")), content(4)).unwrap();
        fs::hard_link(volume.path(long("l")), volume.path("other").join(long("h"))).unwrap();
        sync(&volume.path("other").join(long("o")));
        sync(&volume.path("other"));
        synced.insert(4, vec![format!("other/{}", long("o"))]);
    },
    |volume, synced| {
        // More directories than are synced one by one.
        for number in 0..50 {
            fs::create_dir(volume.path(format!("many-{number}"))).unwrap();
        }
        fs::remove_file(volume.path("other").join(long("h"))).unwrap();
        fs::remove_dir(volume.path("many-7")).unwrap();
        write_and_sync(volume, "many-31/file", 5, synced);
    },
];

/// A volume on a filesystem of its own, that of `make`.
struct Rig {
    volume: Volume,
    image: PathBuf,
    disk: PathBuf,
}

fn rig(make: &[&str], init: &[&str]) -> Rig {
    needs_root();
    let home = Home::new();
    let (image, disk) = (home.path("image"), home.path("cipher"));
    File::create(&image).unwrap().set_len(320 << 20).unwrap();
    let mut arguments: Vec<Argument<'_>> = make[1..].iter().map(|word| word as Argument<'_>).collect();
    arguments.push(&image);
    system(make[0], &arguments);
    fs::create_dir(&disk).unwrap();
    system("mount", &[&"-o", &"loop", &image, &disk]);
    let _ = fs::remove_dir(disk.join("lost+found"));
    let volume = Volume::in_home(home, init, &[]);
    Rig { volume, image, disk }
}

/// The disk as it is at this moment.
fn cut(rig: &Rig, name: &str) -> PathBuf {
    let copy = rig.volume.home.path(name);
    system("cp", &[&"--sparse=always", &rig.image, &copy]);
    copy
}

/// Nothing that does not authenticate, and nothing missing; what a crash leaves over is no damage.
fn check(volume: &Volume, what: &str) {
    let output = volume.home.kmsfs(&[&"check", &volume.cipher]);
    let said = support::text(&[output.stdout, output.stderr].concat());
    assert!(matches!(output.status.code(), Some(0 | 15)), "{what}: {said}");
}

fn cut_after_each_step(make: &[&str], init: &[&str]) {
    let rig = rig(make, init);
    let Rig { volume, disk, .. } = &rig;
    let mut synced = Synced::new();
    let mut cuts: Vec<(PathBuf, Synced)> = Vec::new();
    for (number, step) in STEPS.iter().enumerate() {
        step(volume, &mut synced);
        cuts.push((cut(&rig, &format!("cut-{number}")), synced.clone()));
    }
    volume.unmount();
    unmount(disk);
    for (number, (copy, synced)) in cuts.iter().enumerate() {
        system("mount", &[&"-o", &"loop", copy, disk]);
        check(volume, &format!("step {number}"));
        volume.mount();
        for path in walk(&volume.plain).into_iter().filter(|path| path.is_file()) {
            fs::read(&path).unwrap_or_else(|error| panic!("step {number}: {}: {error}", path.display()));
        }
        for (content_number, names) in synced {
            let found = names.iter().find_map(|name| fs::read(volume.path(name)).ok());
            assert!(found == Some(content(*content_number)), "step {number}: {names:?} is lost");
        }
        assert_eq!(volume.status()["undecryptable_names"], 0, "step {number}");
        volume.unmount();
        unmount(disk);
    }
}

/// A cut right after an unmount: whatever was written is there, synced or not.
fn cut_after_unmount(make: &[&str]) {
    let rig = rig(make, &["--end", "strict"]);
    let Rig { volume, disk, .. } = &rig;
    fs::write(volume.path("changed"), bytes(0, 10_000)).unwrap();
    volume.remount();
    File::options().write(true).open(volume.path("changed")).unwrap().write_all(&bytes(1, 5000)).unwrap();
    for (number, size) in [0, 1, 4048, 5000, 8096].into_iter().enumerate() {
        let directory = volume.path(format!("{number}")).join(long("d"));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(long("f")), bytes(2, size)).unwrap();
    }
    let contents = || tree(&volume.plain).into_iter().map(|(path, entry)| (path, entry.content)).collect::<Vec<_>>();
    let expected = contents();
    volume.unmount();
    let copy = cut(&rig, "cut");
    unmount(disk);
    system("mount", &[&"-o", &"loop", &copy, disk]);
    check(volume, "after an unmount");
    volume.mount();
    assert!(contents() == expected, "what was written before the unmount is not there");
    volume.unmount();
    unmount(disk);
}

/// A cut right after `kmsfs rewrap`: nothing needs the old key any more.
fn cut_after_rewrap(make: &[&str]) {
    let rig = rig(make, &["--key", "local:old"]);
    let Rig { volume, disk, .. } = &rig;
    let mut synced = Synced::new();
    STEPS.iter().for_each(|step| step(volume, &mut synced));
    for number in 0..200 {
        write_and_sync(volume, &format!("many-{}/file-{number}", 10 + number % 10), number + 100, &mut synced);
    }
    volume.unmount();
    volume.home.ok(&[&"rewrap", &volume.cipher, &"--to", &"local:new"]);
    let copy = cut(&rig, "cut");
    fs::remove_file(volume.home.path("old")).unwrap();
    unmount(disk);
    system("mount", &[&"-o", &"loop", &copy, disk]);
    check(volume, "after a rewrap");
    volume.mount();
    for (content_number, names) in &synced {
        let found = names.iter().find_map(|name| fs::read(volume.path(name)).ok());
        assert!(found == Some(content(*content_number)), "{names:?} is lost");
    }
    volume.unmount();
    unmount(disk);
}

#[test]
fn what_was_synced_on_ext4_has_its_name() {
    cut_after_each_step(EXT4, &[]);
}

#[test]
fn what_was_synced_in_a_strict_volume_on_ext4_opens() {
    cut_after_each_step(EXT4, &["--end", "strict"]);
}

#[test]
fn what_was_synced_in_a_strict_volume_on_btrfs_opens() {
    cut_after_each_step(BTRFS, &["--end", "strict", "--holes", "deny"]);
}

#[test]
fn what_was_written_before_an_unmount_is_durable_on_ext4() {
    cut_after_unmount(EXT4);
}

#[test]
fn what_was_written_before_an_unmount_is_durable_on_btrfs() {
    cut_after_unmount(BTRFS);
}

#[test]
fn a_rewrap_that_is_over_is_durable_on_ext4() {
    cut_after_rewrap(EXT4);
}

#[test]
fn a_rewrap_that_is_over_is_durable_on_btrfs() {
    cut_after_rewrap(BTRFS);
}

#[test]
fn what_was_synced_on_xfs_has_its_name() {
    cut_after_each_step(&["mkfs.xfs", "-q", "-f"], &[]);
}

/// Its log holds what was synced and nothing that is merely older.
#[test]
fn what_was_synced_on_btrfs_has_its_name() {
    cut_after_each_step(BTRFS, &[]);
}

/// What overwriting a page beside a dirty one relies on (`docs/FORMAT.md` 6.1).
#[test]
fn of_a_dirty_folio_only_the_written_page_is_sent() {
    // The sectors that reach the device for one page of a cached file, or nothing where the kernel keeps single pages.
    let script = "import ctypes, os, sys, time\n\
        libc = ctypes.CDLL(None)\n\
        fd, data = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), os.urandom(1 << 22)\n\
        os.pwrite(fd, data, 0); os.fsync(fd); os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)\n\
        os.pread(fd, 1 << 22, 0); os.pwrite(fd, data, 0); os.fsync(fd); os.sync(); time.sleep(1); os.sync()\n\
        major, minor = divmod(os.fstat(fd).st_dev, 256)\n\
        sent = lambda: int(open(f'/sys/dev/block/{major}:{minor}/stat').read().split()[6])\n\
        os.pwrite(fd, b'x' * 4096, 40960); before = sent()\n\
        libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(1 << 22), 7); print(sent() - before)";
    needs_root();
    for (make, megabytes) in [(EXT4, 64), (&["mkfs.xfs", "-q", "-f"], 320)] {
        let home = Home::new();
        let (image, disk) = (home.path("image"), home.path("disk"));
        File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        fs::create_dir(&disk).unwrap();
        let mut arguments: Vec<Argument<'_>> = make[1..].iter().map(|word| word as _).collect();
        arguments.push(&image);
        system(make[0], &arguments);
        system("mount", &[&"-o", &"loop,noatime", &image, &disk]);
        let sent = python(script, &[&disk.join("file")], Path::new("/"));
        unmount(&disk);
        assert_eq!(sent.trim(), "8", "sectors, by {}", make[0]);
    }
}
