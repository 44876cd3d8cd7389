//! Real mounts: programs find on a mount what they find on a plain directory, and find it again after the next mount.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::support::{
    self, Home, Volume, assert_same, bytes, errno, eventually, flip, is_dead, needs_root, python, run, set_times, text,
    tree,
};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::Signal;

/// Plain bytes of a page.
const PAGE: usize = 4048;

// ---- the same as a plain directory ----

/// What programs do, on `root`; the same on a mount and on a plain directory.
fn work(root: &Path) {
    fs::create_dir(root.join("sizes")).unwrap();
    for size in [0, 1, PAGE - 1, PAGE, PAGE + 1, 4095, 4096, 4097, 2 * PAGE, 3 * PAGE + 7, 300_000] {
        fs::write(root.join(format!("sizes/{size}")), bytes(size as u64, size)).unwrap();
    }
    names(root);
    links(root);
    renames(root);
    sizes(root);
    unlinked(root);
    appended(root);
    mapped(root);
    attributes(root);
}

fn names(root: &Path) {
    let base = root.join("names");
    fs::create_dir(&base).unwrap();
    // 175 bytes is the longest name that is kept in the entry itself.
    for length in [1, 174, 175, 176, 254, 255] {
        fs::write(base.join("x".repeat(length)), format!("{length}")).unwrap();
    }
    let odd =
        [b"\xff\xfe \n\t".as_slice(), "\u{e4}\u{1f600}".as_bytes(), b".hidden", b"~", b"~.n", b".kmsfs", b".kmsfs.dir"];
    for name in odd {
        fs::write(base.join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }
    let deep = base.join("y".repeat(255)).join("z".repeat(255));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("w".repeat(255)), "deep").unwrap();
    let long = "x".repeat(256);
    assert_eq!(errno(File::create(base.join(&long))), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(fs::create_dir(base.join(&long))), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(symlink("t", base.join(&long))), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(fs::rename(base.join("x"), base.join(&long))), Some(libc::ENAMETOOLONG));
    assert_eq!(rustix::fs::statvfs(&base).unwrap().f_namemax, 255);
}

fn links(root: &Path) {
    let base = root.join("links");
    fs::create_dir(&base).unwrap();
    for (name, target) in [("up", "../sizes/1"), ("nowhere", "/not/there"), ("odd", "a b\n\u{e4}")] {
        symlink(target, base.join(name)).unwrap();
    }
    symlink("t".repeat(3031), base.join("long")).unwrap();
    symlink("t".repeat(4095), base.join("longest")).unwrap();
    assert_eq!(fs::symlink_metadata(base.join("up")).unwrap().len(), 10);
    assert_eq!(fs::read(base.join("up")).unwrap(), bytes(1, 1));
    fs::write(base.join("one"), "first").unwrap();
    fs::hard_link(base.join("one"), base.join("two")).unwrap();
    fs::hard_link(base.join("one"), root.join("three")).unwrap();
    let [one, two] = ["one", "two"].map(|name| fs::metadata(base.join(name)).unwrap());
    assert_eq!((one.nlink(), one.ino()), (3, two.ino()));
    fs::write(base.join("two"), "through another name").unwrap();
    assert_eq!(fs::read_to_string(root.join("three")).unwrap(), "through another name");
    fs::remove_file(base.join("one")).unwrap();
    assert_eq!(fs::metadata(base.join("two")).unwrap().nlink(), 2);
    assert_eq!(errno(fs::hard_link(&base, root.join("directory"))), Some(libc::EPERM));
}

fn renames(root: &Path) {
    let base = root.join("renames");
    fs::create_dir(&base).unwrap();
    let at = |name: &str| base.join(name);
    let write = |name: &str| fs::write(at(name), name).unwrap();
    ["from", "over", "inside", "left", "right", "taken", "keeper", "moved"].iter().for_each(|name| write(name));
    fs::rename(at("from"), at("over")).unwrap();
    assert_eq!(fs::read_to_string(at("over")).unwrap(), "from");
    assert_eq!(errno(fs::metadata(at("from"))), Some(libc::ENOENT));

    for directory in ["d1", "empty", "full", "sub"] {
        fs::create_dir(at(directory)).unwrap();
    }
    fs::write(at("full/entry"), "kept").unwrap();
    fs::write(at("d1/entry"), "comes along").unwrap();
    assert_eq!(errno(fs::rename(at("d1"), at("full"))), Some(libc::ENOTEMPTY));
    assert_eq!(errno(fs::remove_dir(at("full"))), Some(libc::ENOTEMPTY));
    assert_eq!(errno(fs::rename(at("d1"), at("inside"))), Some(libc::ENOTDIR));
    assert_eq!(errno(fs::rename(at("inside"), at("d1"))), Some(libc::EISDIR));
    assert_eq!(errno(fs::rename(at("d1"), at("d1/below"))), Some(libc::EINVAL));
    fs::rename(at("d1"), at("empty")).unwrap();
    assert_eq!(fs::read_to_string(at("empty/entry")).unwrap(), "comes along");
    fs::rename(at("moved"), at("sub").join("m".repeat(200))).unwrap();

    let kept = renameat_with(CWD, at("taken"), CWD, at("keeper"), RenameFlags::NOREPLACE);
    assert_eq!(kept.map_err(|error| error.raw_os_error()), Err(libc::EEXIST));
    renameat_with(CWD, at("taken"), CWD, at("free"), RenameFlags::NOREPLACE).unwrap();
    renameat_with(CWD, at("left"), CWD, at("right"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(at("left")).unwrap(), "right");
    renameat_with(CWD, at("right"), CWD, at("empty"), RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read_to_string(at("right/entry")).unwrap(), "comes along");
}

fn sizes(root: &Path) {
    let path = root.join("truncated");
    let content = bytes(9, 5 * PAGE);
    fs::write(&path, &content).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mut expected = content;
    for size in [3 * PAGE + 10, 3 * PAGE, 3 * PAGE - 1, 100, 2 * PAGE, 2 * PAGE + 1, 0, 5, 4 * PAGE + 3] {
        file.set_len(size as u64).unwrap();
        expected.resize(size, 0);
        assert_eq!(file.metadata().unwrap().len(), size as u64);
        let mut found = vec![0xff; size];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected, "after a change of the size to {size}");
        // Bytes that a later growth must not bring back.
        let mark = size.saturating_sub(3).min(size);
        file.write_all_at(b"abc", mark as u64).unwrap();
        expected.resize(expected.len().max(mark + 3), 0);
        expected[mark..mark + 3].copy_from_slice(b"abc");
    }
    file.sync_all().unwrap();
    assert!(fs::read(&path).unwrap() == expected);

    let path = root.join("emptied");
    fs::write(&path, bytes(10, 10_000)).unwrap();
    assert_eq!(OpenOptions::new().write(true).truncate(true).open(&path).unwrap().metadata().unwrap().len(), 0);
    fs::write(&path, "shorter").unwrap();

    let path = root.join("gaps");
    let file = File::create(&path).unwrap();
    for page in [0, 7, 20] {
        file.write_all_at(&bytes(page, 100), page * PAGE as u64 + 50).unwrap();
    }
    File::open(root).unwrap().sync_all().unwrap();
}

fn unlinked(root: &Path) {
    let path = root.join("nameless");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    file.write_all(&bytes(1, 9000)).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(errno(fs::metadata(&path)), Some(libc::ENOENT));
    // A new file of the same name is another file.
    fs::write(&path, "named").unwrap();
    file.write_all(b"more").unwrap();
    file.sync_all().unwrap();
    let mut found = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut found).unwrap();
    assert!(found == [bytes(1, 9000).as_slice(), b"more"].concat());
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.set_len(10).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 10);
}

/// Two processes append at once, and no line is lost or torn.
fn appended(root: &Path) {
    let path = root.join("appended");
    let script = "import os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for i in range(400): os.write(file, f'{sys.argv[2]} {i:03} {\"-\" * 50}\\n'.encode())";
    let start = |who: &str| Command::new("python3").args(["-c", script]).arg(&path).arg(who).spawn().expect("python3");
    for mut process in [start("a"), start("b")] {
        assert!(process.wait().unwrap().success());
    }
    let found = fs::read_to_string(&path).unwrap();
    let mut lines: Vec<_> = found.lines().collect();
    for who in ["a", "b"] {
        let in_order = lines.iter().filter(|line| line.starts_with(who)).is_sorted();
        assert!(in_order, "the lines of {who}");
    }
    lines.sort_unstable();
    let expected = ["a", "b"].iter().flat_map(|who| (0..400).map(move |i| format!("{who} {i:03} {}", "-".repeat(50))));
    assert!(lines.iter().copied().eq(expected), "{} lines", lines.len());
    fs::write(&path, lines.join("\n")).unwrap();
}

fn mapped(root: &Path) {
    let path = root.join("mapped");
    fs::write(&path, bytes(5, 20_000)).unwrap();
    python(
        "import mmap, sys
with open(sys.argv[1], 'r+b') as file:
    shared = mmap.mmap(file.fileno(), 0)
    shared[4040:4060] = b'written across pages'
    shared[19995:] = b'[end]'
    shared.flush()
    private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    private[0:4] = b'lost'
    assert open(sys.argv[1], 'rb').read()[4040:4060] == b'written across pages'",
        &[&path],
        root,
    );
    let mut expected = bytes(5, 20_000);
    expected[4040..4060].copy_from_slice(b"written across pages");
    expected[19_995..].copy_from_slice(b"[end]");
    assert!(fs::read(&path).unwrap() == expected);
}

/// Last, because it settles all times.
fn attributes(root: &Path) {
    fs::write(root.join("modes"), "m").unwrap();
    for mode in [0o600, 0o444, 0o000, 0o4755, 0o640] {
        fs::set_permissions(root.join("modes"), fs::Permissions::from_mode(mode)).unwrap();
        assert_eq!(fs::metadata(root.join("modes")).unwrap().mode() & 0o7777, mode);
    }
    fs::create_dir(root.join("sticky")).unwrap();
    fs::set_permissions(root.join("sticky"), fs::Permissions::from_mode(0o1777)).unwrap();
    run("mkfifo", &[&root.join("fifo")], root);
    let mut paths = support::walk(root);
    paths.reverse();
    for (number, path) in (0_i64..).zip(&paths) {
        // Every third before 1970.
        let seconds = if number % 3 == 0 { -86_400 * 365 - number } else { 1_700_000_000 + number };
        set_times(path, seconds, 123_456_789 - number);
        let found = fs::symlink_metadata(path).unwrap();
        assert_eq!((found.mtime(), found.mtime_nsec()), (seconds, 123_456_789 - number), "{}", path.display());
        assert_eq!((found.atime(), found.atime_nsec()), (seconds, 123_456_789 - number), "{}", path.display());
    }
}

fn same_as_a_plain_directory(init: &[&str]) {
    let twin = tempfile::tempdir().unwrap();
    work(twin.path());
    let volume = Volume::new(init);
    work(&volume.plain);
    let expected = tree(twin.path());
    assert_same("the mount", &tree(&volume.plain), &expected);
    volume.remount();
    assert_same("after a remount", &tree(&volume.plain), &expected);
    // Settled and opened anew, everything can still be changed.
    for size in [1, PAGE, 300_000] {
        let path = volume.path(format!("sizes/{size}"));
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"+").unwrap();
        assert!(fs::read(&path).unwrap() == [bytes(size as u64, size).as_slice(), b"+"].concat());
    }
    let status = volume.status();
    assert_eq!(status["undecryptable_names"], 0, "{status}");
    assert_eq!(status["unauthentic_pages"], 0, "{status}");
    volume.unmount();
    let log = volume.home.logs();
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
}

#[test]
fn works_as_a_plain_directory_with_xaes() {
    same_as_a_plain_directory(&["--suite", "xaes-256-gcm"]);
}

#[test]
fn works_as_a_plain_directory_with_xchacha() {
    same_as_a_plain_directory(&["--suite", "xchacha20-poly1305", "--files-per-data-key", "5"]);
}

#[test]
fn works_as_a_plain_directory_without_holes() {
    same_as_a_plain_directory(&["--holes", "deny"]);
}

#[test]
fn works_as_a_plain_directory_with_strict_ends() {
    same_as_a_plain_directory(&["--holes", "deny", "--end", "strict"]);
}

#[test]
fn sparse_files_take_little_space_unless_holes_are_denied() {
    const SIZE: u64 = 1 << 30;
    let volume = Volume::new(&[]);
    let check = || {
        let found = fs::metadata(volume.path("sparse")).unwrap();
        assert_eq!(found.len(), SIZE + 3);
        assert!(found.blocks() < 100, "{} blocks", found.blocks());
        let file = File::open(volume.path("sparse")).unwrap();
        let mut part = [1; 10_000];
        file.read_exact_at(&mut part, SIZE / 2).unwrap();
        assert!(part.iter().all(|byte| *byte == 0));
        let mut end = [1; 6];
        file.read_exact_at(&mut end, SIZE - 3).unwrap();
        assert_eq!(&end, b"\0\0\0end");
    };
    let file = File::create(volume.path("sparse")).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(b"end", SIZE).unwrap();
    file.sync_all().unwrap();
    drop(file);
    check();
    volume.remount();
    check();

    let full = Volume::new(&["--holes", "deny"]);
    File::create(full.path("full")).unwrap().set_len(1 << 20).unwrap();
    assert!(fs::metadata(full.path("full")).unwrap().blocks() >= (1 << 20) / 512);
    full.remount();
    assert!(fs::read(full.path("full")).unwrap() == vec![0; 1 << 20]);
}

// ---- several mounts ----

#[test]
fn a_second_mount_is_refused_with_the_process_that_has_the_volume() {
    let volume = Volume::new(&[]);
    let other = volume.home.path("other");
    fs::create_dir(&other).unwrap();
    for options in [[].as_slice(), &["--read-only"]] {
        let mut arguments: Vec<support::Argument<'_>> = vec![&"mount", &volume.cipher, &other];
        arguments.extend(options.iter().map(|option| option as support::Argument<'_>));
        let said = volume.home.refused(11, &arguments);
        assert!(said.contains(&volume.pid().as_raw_nonzero().to_string()), "{said}");
    }
    assert!(!Home::is_mounted(&other));
    // The same place again is no better.
    volume.home.refused(11, &[&"mount", &volume.cipher, &volume.plain]);
    volume.unmount();
    volume.home.ok(&[&"mount", &volume.cipher, &other]);
}

#[test]
fn read_only_mounts_refuse_changes_and_stand_side_by_side() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("file"), "content").unwrap();
    symlink("file", volume.path("link")).unwrap();
    fs::create_dir(volume.path("directory")).unwrap();
    ["file", "link", "directory"].iter().for_each(|name| set_times(&volume.path(name), 1_700_000_000, 1));
    let before = tree(&volume.plain);
    volume.unmount();
    let ciphertext = tree(&volume.cipher);
    let other = volume.home.path("other");
    fs::create_dir(&other).unwrap();
    volume.home.ok(&[&"mount", &"--read-only", &volume.cipher, &volume.plain]);
    volume.home.ok(&[&"mount", &"-o", &"ro,noatime", &volume.cipher, &other]);
    for mount in [&volume.plain, &other] {
        assert_same("a read-only mount", &tree(mount), &before);
        let at = |name: &str| mount.join(name);
        let refused = [
            errno(File::create(at("new"))),
            errno(OpenOptions::new().append(true).open(at("file"))),
            errno(OpenOptions::new().write(true).truncate(true).open(at("file"))),
            errno(fs::remove_file(at("file"))),
            errno(fs::rename(at("file"), at("moved"))),
            errno(fs::create_dir(at("new"))),
            errno(fs::remove_dir(at("directory"))),
            errno(symlink("x", at("new"))),
            errno(fs::hard_link(at("file"), at("new"))),
            errno(fs::set_permissions(at("file"), fs::Permissions::from_mode(0o600))),
        ];
        assert_eq!(refused, [Some(libc::EROFS); 10]);
    }
    let third = volume.home.path("third");
    fs::create_dir(&third).unwrap();
    volume.home.refused(11, &[&"mount", &volume.cipher, &third]);
    volume.unmount();
    volume.home.ok(&[&"umount", &other]);
    assert_same("the cipher directory", &tree(&volume.cipher), &ciphertext);
    volume.mount();
    fs::write(volume.path("new"), "writable again").unwrap();
}

// ---- ends ----

#[test]
fn what_was_written_before_a_close_survives_kill_9() {
    let volume = Volume::new(&[]);
    let (big, small) = (bytes(1, 3_000_001), bytes(2, 77));
    fs::write(volume.path("big"), &big).unwrap();
    fs::write(volume.path("small"), &small).unwrap();
    let mut log = File::create(volume.path("log")).unwrap();
    log.write_all(b"synced").unwrap();
    log.sync_all().unwrap();
    drop(log);
    OpenOptions::new().append(true).open(volume.path("log")).unwrap().write_all(b" and closed").unwrap();
    volume.kill();
    assert_eq!(errno(fs::metadata(&volume.plain)), Some(libc::ENOTCONN), "a dead mount is left behind");
    // The next mount takes the dead one away.
    volume.mount();
    assert!(fs::read(volume.path("big")).unwrap() == big);
    assert!(fs::read(volume.path("small")).unwrap() == small);
    assert_eq!(fs::read(volume.path("log")).unwrap(), b"synced and closed");
    OpenOptions::new().append(true).open(volume.path("small")).unwrap().write_all(b"+").unwrap();
    volume.kill();
    // So does an unmount.
    volume.home.ok(&[&"umount", &volume.plain]);
    assert!(!Home::is_mounted(&volume.plain));
    volume.mount();
    assert!(fs::read(volume.path("small")).unwrap() == [small.as_slice(), b"+"].concat());
    volume.remount();
    assert!(fs::read(volume.path("small")).unwrap() == [small.as_slice(), b"+"].concat());
}

#[test]
fn a_mount_that_is_open_for_a_moment_is_unmounted() {
    let volume = Volume::new(&[]);
    let looked_at = File::open(&volume.plain).unwrap();
    let looking = thread::spawn(move || {
        thread::sleep(Duration::from_millis(300));
        drop(looked_at);
    });
    volume.home.ok(&[&"umount", &volume.plain]);
    assert!(!Home::is_mounted(&volume.plain));
    looking.join().unwrap();
}

#[test]
fn a_busy_mount_says_so_and_a_signal_ends_it_with_its_last_file() {
    for signal in [Signal::TERM, Signal::HUP] {
        let volume = Volume::new(&[]);
        let mut file = File::create(volume.path("open")).unwrap();
        file.write_all(b"before").unwrap();
        let said = volume.home.refused(1, &[&"umount", &volume.plain]);
        assert!(said.contains("in use") && said.contains("hint: "), "{said}");
        assert!(Home::is_mounted(&volume.plain));
        fs::write(volume.path("still"), "works").unwrap();

        let pid = volume.pid();
        rustix::process::kill_process(pid, signal).unwrap();
        eventually("the mount is detached", || !Home::is_mounted(&volume.plain));
        file.write_all(b" and after").unwrap();
        file.sync_all().unwrap();
        assert!(!is_dead(pid), "a file is open");
        drop(file);
        eventually("the process ends with its last file", || is_dead(pid));
        volume.mount();
        assert_eq!(fs::read(volume.path("open")).unwrap(), b"before and after");
        assert_eq!(fs::read(volume.path("still")).unwrap(), b"works");
    }
}

#[test]
fn unmounting_waits_until_the_process_has_settled_every_file_and_ended() {
    let volume = Volume::new(&[]);
    for number in 0..50 {
        fs::write(volume.path(number.to_string()), bytes(number, 1000)).unwrap();
    }
    let pid = volume.pid();
    volume.unmount();
    let sizes = support::walk(&volume.cipher).into_iter().map(|path| fs::symlink_metadata(path).unwrap());
    let settled = sizes.filter(|found| found.is_file() && found.len() == 8192 + 1000).count();
    assert_eq!(settled, 50);
    // The kernel takes a moment from the closing of its last descriptor to its end.
    eventually("the process has ended", || is_dead(pid));
}

#[test]
fn a_mount_in_the_foreground_logs_to_standard_error_and_ends_by_signal() {
    let volume = Volume::new(&[]);
    volume.unmount();
    let mount = volume.home.start("front", &[&"mount", &"--foreground", &volume.cipher, &volume.plain]);
    eventually("it is mounted", || volume.home.kmsfs(&[&"status", &volume.plain]).status.success());
    fs::write(volume.path("file"), "x").unwrap();
    mount.signal(Signal::INT);
    assert_eq!(mount.end(), Some(0));
    assert!(!Home::is_mounted(&volume.plain));
    let log = fs::read_to_string(volume.home.path("front.err")).unwrap();
    assert!(log.contains("mounted") && log.contains("unmounted"), "{log}");
}

// ---- users ----

#[test]
fn root_can_share_a_mount_and_modes_hold() {
    needs_root();
    let volume = Volume::in_home(Home::new(), &[], &["-o", "allow_other"]);
    // The way to it must be open for others as well.
    for place in ["", "plain"] {
        fs::set_permissions(volume.home.path(place), fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (uid, gid) = support::nobody();
    fs::write(volume.path("secret"), "root's").unwrap();
    fs::set_permissions(volume.path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(volume.path("public"), "everybody's").unwrap();
    fs::create_dir(volume.path("open")).unwrap();
    fs::set_permissions(volume.path("open"), fs::Permissions::from_mode(0o777)).unwrap();
    fs::create_dir(volume.path("group")).unwrap();
    std::os::unix::fs::chown(volume.path("group"), None, Some(12_345)).unwrap();
    fs::set_permissions(volume.path("group"), fs::Permissions::from_mode(0o2777)).unwrap();

    let as_nobody = |script: &str| {
        let mut command = Command::new("runuser");
        command.args(["-u", "nobody", "--", "sh", "-c", script]).current_dir(&volume.plain).stdin(Stdio::null());
        command.output().expect("runuser: .ci/run installs it")
    };
    let made = as_nobody(
        "umask 027; cat public && echo mine > open/file && mkdir open/directory && ln -s file open/link &&
         mkfifo open/fifo && echo mine > group/file && mkdir group/directory && echo deep > group/directory/file",
    );
    assert!(made.status.success(), "{}", text(&made.stderr));
    for refused in [
        "cat secret",
        "echo x >> secret",
        "rm secret",
        "echo x > new",
        "chmod 777 secret",
        "touch -d 2001-01-01 public",
    ] {
        let output = as_nobody(refused);
        assert!(
            !output.status.success() && text(&output.stderr).contains("not permitted")
                || text(&output.stderr).contains("denied"),
            "{refused}"
        );
    }
    let check = || {
        let owner = |name: &str| {
            let found = fs::symlink_metadata(volume.path(name)).unwrap();
            (found.uid(), found.gid())
        };
        for name in ["open/file", "open/directory", "open/link", "open/fifo"] {
            assert_eq!(owner(name), (uid, gid), "{name}");
        }
        for name in ["group/file", "group/directory", "group/directory/file"] {
            assert_eq!(owner(name), (uid, 12_345), "{name}");
        }
        let mode = |name: &str| fs::metadata(volume.path(name)).unwrap().mode() & 0o7777;
        assert_eq!(mode("group/directory"), 0o2750, "the set-group-id bit goes on");
        assert_eq!(mode("open/file"), 0o640, "the umask of whoever makes the file counts");
        assert_eq!(fs::read_to_string(volume.path("secret")).unwrap(), "root's");
    };
    check();
    volume.remount();
    check();
}

#[test]
fn a_mount_that_is_not_shared_keeps_others_out() {
    needs_root();
    let volume = Volume::new(&[]);
    fs::set_permissions(volume.home.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(volume.path("public"), "x").unwrap();
    let output = Command::new("runuser").args(["-u", "nobody", "--", "cat"]).arg(volume.path("public")).output();
    assert!(text(&output.expect("runuser: .ci/run installs it").stderr).contains("Permission denied"));
}

#[test]
fn an_ordinary_user_has_mounts_of_his_own() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    let (uid, gid) = support::nobody();
    let plain = volume.plain.display();
    let home = &volume.home;
    home.shell(&format!(
        "cd {plain}; echo content > file; mkdir directory; echo deep > directory/deep; ln -s file link; ln file hard
         seq 5000 > big
         # Written through the writeback cache, and given a time before that has happened.
         echo old > dated; touch -d '1969-07-20 20:17:40.123456789 UTC' dated
         exec 3> later; echo later >&3; touch -d '2001-02-03 04:05:06.987654321 UTC' later; exec 3>&-"
    ));
    // The owner may write what he may not read: a part of a page, a whole file, its end.
    home.shell(&format!(
        "cd {plain}; echo first > dropbox; chmod 0200 dropbox
         echo second >> dropbox; printf F | dd of=dropbox conv=notrunc bs=1 2>/dev/null
         ! cat dropbox 2>/dev/null
         echo gone > emptied; chmod 0200 emptied; echo new > emptied
         umask 0577; echo born > born"
    ));
    let check = || {
        let found = home.shell(&format!(
            "cd {plain}; cat file directory/deep link; stat -c '%h %u %g' file; tail -n 1 big
             TZ=UTC stat -c '%y' dated later; chmod 0600 dropbox emptied born; cat dropbox emptied born
             chmod 0200 dropbox emptied born"
        ));
        let expected = format!(
            "content\ndeep\ncontent\n2 {uid} {gid}\n5000\n1969-07-20 20:17:40.123456789 +0000\n\
             2001-02-03 04:05:06.987654321 +0000\nFirst\nsecond\nnew\nborn\n"
        );
        assert_eq!(found, expected);
    };
    check();
    volume.remount();
    home.shell(&format!(
        "echo third >> {plain}/dropbox; head -c 19 /dev/null > {plain}/empty; chmod 0200 {plain}/empty"
    ));
    home.shell(&format!("chmod 0600 {plain}/dropbox; head -n 2 {plain}/dropbox > {plain}/2; cat {plain}/2 > {plain}/dropbox; rm {plain}/2 {plain}/empty"));
    check();
    assert!(home.ok(&[&"status", &volume.plain]).contains("file"));
    volume.unmount();
    let owners = tree(&volume.cipher).into_values().map(|entry| entry.owner);
    assert!(owners.into_iter().all(|owner| owner == (uid, gid)));
}

/// What the kernel is asked to keep a wake below, in microseconds; none where it cannot be asked.
fn wake_limit() -> Option<i32> {
    let mut bytes = [0; 4];
    File::open("/dev/cpu_dma_latency").ok()?.read_exact_at(&mut bytes, 0).ok()?;
    Some(i32::from_ne_bytes(bytes))
}

#[test]
fn low_latency_lasts_as_long_as_requests_come_and_is_for_root() {
    needs_root();
    let Some(before) = wake_limit().filter(|limit| *limit != 0) else {
        return println!("left out: this machine's CPUs cannot be asked to stay awake, or are already");
    };
    let volume = Volume::in_home(Home::new(), &[], &["-o", "lowlatency"]);
    let work_until_awake = || {
        eventually("the CPUs are to stay awake", || {
            (0..500).for_each(|n| drop(fs::metadata(volume.path(format!("{n}/missing")))));
            (0..500).for_each(|n| drop(fs::write(volume.path("file"), format!("{n}"))));
            wake_limit() == Some(0)
        });
    };
    let asleep = || eventually("the CPUs may sleep", || wake_limit() == Some(before));
    work_until_awake();
    asleep();
    work_until_awake();
    volume.kill();
    asleep();
    volume.home.ok(&[&"umount", &volume.plain]);

    let home = Home::of_nobody();
    home.ok(&[&"init", &"cipher"]);
    home.shell("mkdir plain");
    let said = home.refused(2, &[&"mount", &"-o", &"lowlatency", &"cipher", &"plain"]);
    assert!(said.contains("-o lowlatency: /dev/cpu_dma_latency cannot be opened (Permission denied"), "{said}");
    assert!(!Home::is_mounted(&home.path("plain")));
}

/// Its size is in its last page, which its owner may not read.
#[test]
fn a_write_only_file_that_a_killed_process_left_unsettled_keeps_its_size() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    let file = volume.path("file");
    let path = file.display();
    volume.home.shell(&format!("echo first > {path}; chmod 0200 {path}"));
    volume.kill();
    volume.mount();
    assert_eq!(volume.home.shell(&format!("stat -c %s {path}")), "6\n");
    volume.home.shell(&format!("echo second >> {path}; chmod 0600 {path}"));
    assert_eq!(volume.home.shell(&format!("cat {path}")), "first\nsecond\n");
    volume.remount();
    assert_eq!(volume.home.shell(&format!("cat {path}")), "first\nsecond\n");
}

#[test]
fn the_time_of_a_write_is_the_same_after_a_remount() {
    let volume = Volume::new(&[]);
    // Made and written within one tick of the kernel's clock, the kernel sees no change of the time that it would tell.
    for number in 0..30 {
        fs::write(volume.path(number.to_string()), bytes(number, 500)).unwrap();
    }
    let before = tree(&volume.plain);
    volume.remount();
    assert_same("after a remount", &tree(&volume.plain), &before);
}

// ---- a writer of the cipher directory ----

#[test]
fn tampering_is_an_input_output_error_and_is_logged_with_its_place() {
    for suite in ["xaes-256-gcm", "xchacha20-poly1305"] {
        let volume = Volume::new(&["--suite", suite]);
        let content = bytes(3, 40 * PAGE);
        for name in ["page", "header", "swapped", "cut", "good"] {
            fs::write(volume.path(name), &content).unwrap();
        }
        symlink("target", volume.path("link")).unwrap();
        let behind = |name: &str| volume.behind(name);
        let [page, header, swapped, cut, link] = ["page", "header", "swapped", "cut", "link"].map(behind);
        volume.unmount();
        flip(&page, 4096 * 21 + 100);
        flip(&header, 40);
        let bytes_on_disk = fs::read(&swapped).unwrap();
        let backing = OpenOptions::new().write(true).open(&swapped).unwrap();
        backing.write_all_at(&bytes_on_disk[4096..8192], 8192).unwrap();
        OpenOptions::new().write(true).open(&cut).unwrap().set_len(4096 + 100).unwrap();
        let target = fs::read_link(&link).unwrap();
        let target = target.to_str().unwrap();
        fs::remove_file(&link).unwrap();
        let changed = if target.starts_with('A') { "B" } else { "A" };
        symlink(format!("{changed}{}", &target[1..]), &link).unwrap();
        volume.mount();

        assert_eq!(errno(fs::read(volume.path("page"))), Some(libc::EIO));
        let file = File::open(volume.path("page")).unwrap();
        let mut part = vec![0; 18 * PAGE];
        // The kernel's pages are larger than ours, so the two beside the bad one may not be readable either.
        file.read_exact_at(&mut part, 0).unwrap();
        assert!(part == content[..18 * PAGE]);
        file.read_exact_at(&mut part, 22 * PAGE as u64).unwrap();
        assert!(part == content[22 * PAGE..]);
        drop(file);
        assert_eq!(errno(File::open(volume.path("header"))), Some(libc::EIO));
        assert_eq!(errno(fs::read(volume.path("swapped"))), Some(libc::EIO));
        assert_eq!(errno(fs::read(volume.path("cut"))), Some(libc::EIO));
        assert_eq!(errno(fs::read_link(volume.path("link"))), Some(libc::EIO));
        assert!(fs::read(volume.path("good")).unwrap() == content);
        assert!(volume.status()["unauthentic_pages"].as_u64().unwrap() >= 2);
        volume.unmount();
        let log = volume.home.logs();
        assert!(log.contains(page.to_str().unwrap()), "{log}");
    }
}

#[test]
fn what_the_log_says_of_a_tampered_header_names_its_file() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("file"), "content").unwrap();
    let header = volume.behind("file");
    volume.unmount();
    flip(&header, 100);
    volume.mount();
    assert_eq!(errno(File::open(volume.path("file"))), Some(libc::EIO));
    assert!(volume.home.logs().contains(header.to_str().unwrap()), "{}", volume.home.logs());
}

#[test]
fn strict_volumes_refuse_what_was_cut_off_and_lenient_ones_read_it() {
    for (rules, strict) in [("strict", true), ("lenient", false)] {
        let volume = Volume::new(&["--end", rules]);
        let content = bytes(4, 3 * PAGE);
        fs::write(volume.path("cut"), &content).unwrap();
        fs::write(volume.path("whole"), &content).unwrap();
        let cut = volume.behind("cut");
        volume.unmount();
        OpenOptions::new().write(true).open(&cut).unwrap().set_len(4096 * 3).unwrap();
        volume.mount();
        if strict {
            assert_eq!(errno(fs::read(volume.path("cut"))), Some(libc::EIO));
        } else {
            assert!(fs::read(volume.path("cut")).unwrap() == content[..2 * PAGE]);
            assert_eq!(volume.status()["missing_end_marks"], 1);
        }
        assert!(fs::read(volume.path("whole")).unwrap() == content);
    }
}

// ---- a KMS ----

// ---- keys that are taken away ----

#[test]
fn a_locked_mount_keeps_names_and_gives_no_content() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("file"), bytes(1, 10_000)).unwrap();
    let mut open = File::options().read(true).write(true).open(volume.path("file")).unwrap();
    open.seek(SeekFrom::End(0)).unwrap();
    open.write_all(b"written, not yet synced").unwrap();
    assert!(fs::read(volume.path("file")).unwrap().len() == 10_023, "the kernel has its pages now");
    volume.home.ok(&[&"lock", &volume.plain]);
    assert_eq!(volume.status()["locked"], true);
    assert_eq!(errno(open.read_exact_at(&mut [0; 10], 5000)), Some(libc::ENOKEY), "not from the kernel's cache either");
    assert_eq!(errno(File::open(volume.path("file"))), Some(libc::ENOKEY));
    assert_eq!(errno(File::create(volume.path("new"))), Some(libc::ENOKEY));
    assert_eq!(fs::metadata(volume.path("file")).unwrap().len(), 10_023);
    assert_eq!(fs::read_dir(&volume.plain).unwrap().count(), 1);
    volume.home.ok(&[&"unlock", &volume.plain]);
    let all = [bytes(1, 10_000), b"written, not yet synced".to_vec()].concat();
    assert!(fs::read(volume.path("file")).unwrap() == all, "what was written before the lock is there");
    open.write_all(b"!").unwrap();
    drop(open);
    volume.remount();
    assert!(fs::read(volume.path("file")).unwrap() == [all, b"!".to_vec()].concat());
    volume.unmount();
    volume.home.refused(12, &[&"lock", &volume.plain]);
}

#[cfg(feature = "aws-kms")]
mod kms {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::support::{fake_kms, moto};

    /// What an operation may take with all its attempts, and some time for a busy machine.
    const ANSWER: Duration = Duration::from_secs(12);

    fn home(endpoint: &str) -> Home {
        let mut home = Home::new();
        for (name, value) in moto::environment() {
            home.set(name, value);
        }
        home.set("KMSFS_ENDPOINT_URL", endpoint);
        home
    }

    #[test]
    fn a_volume_under_a_kms_key_works_for_as_long_as_the_kms_is_there() {
        let moto = moto::Moto::start();
        let key = moto.create_key();
        moto.create_alias("alias/kmsfs", &key);
        let mut home = home(&moto.endpoint());
        home.set("KMSFS_KMS_ATTEMPT_TIMEOUT", "5");
        let volume = Volume::in_home(home, &["--key", "aws-kms:alias/kmsfs"], &[]);
        let shown = volume.home.ok(&[&"inspect", &volume.cipher]);
        assert!(shown.contains(&key.arn), "the alias is written down as what it names: {shown}");
        for name in ["a", "b"] {
            fs::write(volume.path(name), bytes(1, 10_000)).unwrap();
        }
        volume.remount();
        assert!(fs::read(volume.path("a")).unwrap() == bytes(1, 10_000));
        let status = volume.status();
        assert!(status["provider_calls"].as_u64().unwrap() >= 1, "{status}");
        let open = File::open(volume.path("a")).unwrap();

        drop(moto);
        let asked = Instant::now();
        assert_eq!(errno(File::open(volume.path("b"))), Some(libc::ETIMEDOUT));
        // The keys that were made ahead last for a while.
        let names = (0..1000).map(|n| volume.path(format!("new{n}")));
        let refused = names.map(|path| (errno(File::create(&path)), path)).find(|(errno, _)| errno.is_some());
        let (errno, path) = refused.expect("no more keys");
        assert_eq!(errno, Some(libc::ETIMEDOUT));
        assert!(asked.elapsed() < 2 * ANSWER, "{:?}", asked.elapsed());
        assert!(!path.exists(), "a file that cannot have a key leaves none behind");
        assert!(fs::read(volume.path("a")).unwrap() == bytes(1, 10_000), "its key is in memory");
        OpenOptions::new().append(true).open(volume.path("a")).unwrap().write_all(b"+").unwrap();
        let mut part = [0; 10];
        open.read_exact_at(&mut part, 5000).unwrap();
        fs::rename(volume.path("b"), volume.path("c")).unwrap();
        drop(open);
        volume.unmount();

        let asked = Instant::now();
        let said = volume.home.refused(8, &volume.mount_arguments());
        assert!(asked.elapsed() < ANSWER, "{:?}: {said}", asked.elapsed());
        assert!(!Home::is_mounted(&volume.plain));
    }

    #[test]
    fn a_kms_that_never_answers_does_not_hang_a_mount() {
        let moto = moto::Moto::start();
        let key = format!("aws-kms:{}", moto.create_key().arn);
        let volume = Volume::in_home(home(&moto.endpoint()), &["--key", &key], &[]);
        volume.unmount();
        let silent = fake_kms::FakeKms::start(vec![(fake_kms::STALL, String::new())]);
        let asked = Instant::now();
        let mut arguments = volume.mount_arguments();
        let endpoint = silent.endpoint();
        arguments.extend([&"--endpoint-url" as support::Argument<'_>, &endpoint]);
        volume.home.refused(8, &arguments);
        assert!(asked.elapsed() < ANSWER, "{:?}", asked.elapsed());
        assert!(silent.requests() > 0);
        volume.mount();
    }

    /// The key's greatest age ends while the KMS is away: the file that is open stops, from the kernel's cache too.
    #[test]
    fn an_open_file_stops_when_its_key_cannot_be_had_again() {
        let moto = moto::Moto::start();
        let key = format!("aws-kms:{}", moto.create_key().arn);
        let mut home = home(&moto.endpoint());
        home.set("KMSFS_KMS_ATTEMPT_TIMEOUT", "5");
        let volume = Volume::in_home(home, &["--key", &key], &["--key-max-age", "3"]);
        fs::write(volume.path("file"), bytes(1, 10_000)).unwrap();
        let open = File::open(volume.path("file")).unwrap();
        let read = || open.read_exact_at(&mut [0; 10], 5000);
        read().unwrap();
        drop(moto);
        eventually("the open file stops", || errno(read()) == Some(libc::ETIMEDOUT));
        assert_eq!(errno(File::open(volume.path("file"))), Some(libc::ETIMEDOUT));
        assert_eq!(fs::metadata(volume.path("file")).unwrap().len(), 10_000);
    }
}

/// As `mount -t kmsfs` and an fstab line call it.
#[test]
fn mount_8_has_a_helper() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("file"), "x").unwrap();
    volume.unmount();
    let helper = volume.home.path("mount.kmsfs");
    symlink(volume.home.program(), &helper).unwrap();
    let helper = |options: &str| {
        let mut command = volume.home.command(&helper);
        command.arg(&volume.cipher).arg(&volume.plain).args(["-o", options]).output().unwrap()
    };
    let output = helper("rw,_netdev,nofail,no_prefetch,key_max_age=60");
    assert!(output.status.success(), "{}", support::text(&output.stderr));
    assert_eq!(fs::read_to_string(volume.path("file")).unwrap(), "x");
    // As an administrator does who has changed /etc/fstab: umount(8) does not wait for the process, and mounting does.
    for number in 0..5 {
        fs::write(volume.path(format!("large{number}")), bytes(number, 4 << 20)).unwrap();
        let unmounted = volume.home.command("umount").arg(&volume.plain).status().unwrap();
        assert!(unmounted.success());
        let output = helper("rw");
        assert!(output.status.success(), "{}", support::text(&output.stderr));
        assert!(fs::read(volume.path(format!("large{number}"))).unwrap() == bytes(number, 4 << 20));
    }
    volume.unmount();
    // mount(8) keeps `suid` and `dev` to itself, hands on the rest of what it knows, and the kernel gets that.
    let flags = |options: &str| {
        let output = helper(options);
        assert!(output.status.success(), "{options}: {}", support::text(&output.stderr));
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        let line = table.lines().find(|line| line.contains(&*volume.plain.to_string_lossy())).unwrap();
        let flags: Vec<String> = line.split(' ').nth(3).unwrap().split(',').map(str::to_owned).collect();
        volume.unmount();
        move |flag: &str| flags.iter().any(|other| other == flag)
    };
    let root = rustix::process::geteuid().is_root();
    let has = flags("rw,nodiratime,strictatime,lazytime,sync,dirsync,nosymfollow,users,comment=x");
    for flag in ["nodiratime", "lazytime", "sync", "dirsync", "nosymfollow"] {
        assert!(has(flag), "{flag}");
    }
    assert!(!has("relatime") && has("nosuid") != root && has("nodev") != root);
    let has = flags("rw,nosuid,nodev,users");
    assert!(has("nosuid") && has("nodev"));
    let output = helper("rw,no_such_option=1");
    assert_eq!(output.status.code(), Some(2), "{}", support::text(&output.stderr));
    volume.mount();
}
