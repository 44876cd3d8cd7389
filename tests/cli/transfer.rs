//! `kmsfs import`, `export`, `cat` and `ls`: a tree goes into a volume and comes out of it as it was, whatever interrupts it,
//! and as a mount shows it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{
    self, Home, Volume, assert_same, bytes, eventually, flip, needs_root, set_times, text, tree, walk,
};
use rustix::fs::{CWD, FileType, Gid, Mode, Uid, XattrFlags, setxattr};
use rustix::process::Signal;
use serde_json::Value;

const PAGE: usize = 4048;

/// Something of every kind.
fn fill(root: &Path) {
    fs::create_dir(root).unwrap();
    for size in [0, 1, PAGE - 1, PAGE, PAGE + 1, 4096, 2 * PAGE, 3_000_000] {
        fs::write(root.join(format!("{size}")), bytes(size as u64, size)).unwrap();
    }
    let deep = root.join("d".repeat(255)).join("e".repeat(176));
    fs::create_dir_all(&deep).unwrap();
    fs::write(deep.join("f".repeat(255)), bytes(7, 10_000)).unwrap();
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"no\xfftext\n")), "x").unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    fs::create_dir(root.join("shared")).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(&bytes(9, 5000), 30_000_000).unwrap();
    sparse.set_len(50_000_001).unwrap();
    symlink("1", root.join("link")).unwrap();
    symlink("../".repeat(1365), root.join("far")).unwrap();
    for name in ["again", "shared/again"] {
        fs::hard_link(root.join("3000000"), root.join(name)).unwrap();
    }
    let mode = Mode::RUSR | Mode::WUSR;
    for (name, kind) in [("fifo", FileType::Fifo), ("socket", FileType::Socket)] {
        rustix::fs::mknodat(CWD, root.join(name), kind, mode, 0).unwrap();
    }
    rustix::fs::mknodat(CWD, root.join("null"), FileType::CharacterDevice, mode, rustix::fs::makedev(1, 3)).unwrap();
    for name in ["1", "0", "shared"] {
        for attribute in ["user.colour", &format!("user.{}", "x".repeat(240))] {
            setxattr(root.join(name), attribute, b"red", XattrFlags::empty()).unwrap();
        }
    }
    support::run("setfacl", &[&"-m", &"u:1234:rw", &"4048"], root);
    support::run("setfacl", &[&"-d", &"-m", &"u:1234:rx", &"shared"], root);
    for (name, mode, owner) in
        [("1", 0o4751, 1000), ("4096", 0o444, 1001), ("empty", 0o1777, 1002), ("shared", 0o2750, 0)]
    {
        rustix::fs::chown(root.join(name), Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner))).unwrap();
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    for (name, seconds) in [("0", -3), ("1", 1), ("link", 2), ("fifo", 3), ("shared", 4), ("empty", 5), ("", 6)] {
        set_times(&root.join(name), seconds, 123_456_789);
    }
}

/// Fails unless rsync, with attributes, ACLs and hard links, sees no difference.
fn assert_rsync_sees_no_difference(home: &Home, left: &Path, right: &Path) {
    let script = format!("rsync -aHAXnc --delete -i '{}/' '{}/'", left.display(), right.display());
    assert_eq!(home.shell(&script), "");
}

/// A home with a volume that is not mounted.
fn volume(init: &[&str]) -> Volume {
    let volume = Volume::new(init);
    volume.unmount();
    volume
}

fn report(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)))
}

fn space(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_tree_comes_out_as_it_went_in_and_as_a_mount_shows_it() {
    needs_root();
    for init in [&["--holes", "allow"][..], &["--holes", "deny", "--end", "strict"]] {
        let volume = volume(init);
        let (source, out) = (volume.home.path("source"), volume.home.path("out"));
        fill(&source);
        let before = tree(&source);
        let imported = report(&volume.home.kmsfs(&[&"import", &"--verify", &"--json", &source, &volume.cipher]));
        assert_eq!((&imported["complete"], &imported["hard_links"]), (&Value::Bool(true), &2.into()), "{imported:#}");
        assert_eq!(imported["verified"], before.len() as u64 - 4, "all but directories: {imported:#}");
        volume.home.ok(&[&"check", &volume.cipher]);
        let exported = report(&volume.home.kmsfs(&[&"export", &"--verify", &"--json", &volume.cipher, &out]));
        assert_eq!(exported["complete"], true, "{exported:#}");
        assert_same("exported", &tree(&out), &before);
        assert_rsync_sees_no_difference(&volume.home, &source, &out);
        if init[1] == "allow" {
            assert!(space(&out.join("sparse")) < 100_000, "holes stay holes");
            assert!(imported["bytes"].as_u64().unwrap() < 4_000_000, "holes are not read: {imported:#}");
        }
        volume.mount();
        assert_same("mounted", &tree(&volume.plain), &before);
        assert_rsync_sees_no_difference(&volume.home, &source, &volume.plain);
        let rsynced = volume.home.path("rsynced");
        volume.home.shell("rsync -aHAXS plain/ rsynced/");
        assert_rsync_sees_no_difference(&volume.home, &rsynced, &out);
        // Beside the mount, and nothing is copied twice.
        let again = report(&volume.home.kmsfs(&[&"export", &"--json", &volume.cipher, &out]));
        assert_eq!((&again["files"], &again["hard_links"]), (&0.into(), &0.into()), "{again:#}");
        volume.unmount();
    }
}

#[test]
fn parts_of_a_volume_are_read_and_copied() {
    let volume = volume(&[]);
    let home = &volume.home;
    let source = home.path("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("a/b/c"), bytes(3, 5_000_000)).unwrap();
    fs::write(source.join("a/hi"), "hi\n").unwrap();
    symlink("hi", source.join("a/l")).unwrap();
    home.ok(&[&"import", &source, &volume.cipher, &"x"]);
    home.ok(&[&"import", &source.join("a/hi"), &volume.cipher, &"x/a/one"]);
    assert_eq!(home.ok(&[&"ls", &volume.cipher]), "x\n");
    assert_eq!(home.ok(&[&"ls", &"-R", &volume.cipher, &"x/a/"]), "b\nb/c\nhi\nl\none\n");
    assert_eq!(home.ok(&[&"ls", &"-0", &volume.cipher, &"/x/a/b"]), "c\0");
    let long = home.ok(&[&"ls", &"-l", &volume.cipher, &"x/a"]);
    let shown = long.lines().find(|line| line.contains(" l ")).unwrap();
    assert!(shown.starts_with("lrwxrwxrwx   1 ") && shown.ends_with(" l -> hi"), "{long}");
    assert!(long.lines().any(|line| line.starts_with("-rw-") && line.ends_with(" hi")), "{long}");
    let output = home.kmsfs(&[&"cat", &volume.cipher, &"x/a/one", &"x/a/b/c", &"x/a/hi"]);
    let expected = [&b"hi\n"[..], &bytes(3, 5_000_000), b"hi\n"].concat();
    assert!(output.status.success() && output.stdout == expected, "{}", text(&output.stderr));
    // A reader that has seen enough is no failure.
    home.shell(&format!("{} cat cipher x/a/b/c | head -c 1 > /dev/null", home.program().display()));
    home.ok(&[&"export", &volume.cipher, &"x/a/b", &home.path("b")]);
    assert_eq!(fs::read(home.path("b/c")).unwrap(), bytes(3, 5_000_000));
    home.ok(&[&"export", &volume.cipher, &"x/a/hi", &home.path("ho")]);
    assert_eq!(fs::read(home.path("ho")).unwrap(), b"hi\n");
}

#[test]
fn what_cannot_be_done_is_said() {
    let volume = volume(&[]);
    let home = &volume.home;
    let (cipher, source) = (&volume.cipher, home.path("source"));
    fs::create_dir_all(source.join("d")).unwrap();
    fs::write(source.join("f"), "f").unwrap();
    home.ok(&[&"import", &source, cipher]);
    let says = |code, arguments: &[support::Argument<'_>], words: &str| {
        let said = home.refused(code, arguments);
        assert!(said.contains(words), "{said}");
    };
    says(1, &[&"cat", cipher, &"nothing"], "nothing: there is no such file");
    says(1, &[&"cat", cipher, &"d"], "d: it is a directory");
    says(1, &[&"cat", cipher, &"f/x"], "f/x: ");
    says(2, &[&"cat", cipher, &"d/../f"], "`..`");
    says(1, &[&"ls", cipher, &"nothing"], "there is no such file");
    says(1, &[&"export", cipher, &"nothing", &home.path("out")], "there is no such file");
    says(14, &[&"export", cipher, &home.path("no/such/out")], "No such file");
    says(2, &[&"export", cipher, &cipher.join("out")], "overlap");
    says(2, &[&"import", cipher, cipher, &"x"], "overlap");
    says(14, &[&"import", &home.path("nothing"), cipher], "No such file");
    says(1, &[&"import", &source, cipher, &"no/such"], "there is no such file");
    says(2, &[&"import", &source.join("f"), cipher], "no name at its end");
    says(3, &[&"export", &source, &home.path("out")], "is not a volume");
    fs::write(home.path("file"), "").unwrap();
    says(1, &[&"export", cipher, &home.path("file")], "a regular file is in its place");
    // What is in the way of one entry keeps the others from nothing.
    fs::create_dir_all(home.path("out/f")).unwrap();
    says(1, &[&"export", cipher, &home.path("out")], "f: a directory is in its place");
    assert!(home.path("out/d").is_dir());
    volume.mount();
    says(11, &[&"import", &source, cipher], "in use");
    assert_eq!(home.ok(&[&"cat", cipher, &"f"]), "f", "reading may go on beside a mount");
}

#[test]
fn what_does_not_authenticate_is_left_out_and_told() {
    let volume = Volume::new(&[]);
    for name in ["a", "b", "c"] {
        fs::write(volume.path(name), bytes(1, 3 * PAGE)).unwrap();
    }
    fs::hard_link(volume.path("b"), volume.path("b2")).unwrap();
    let (damaged, renamed) = (volume.behind("b"), volume.behind("c"));
    volume.unmount();
    flip(&damaged, 4096 + 100);
    let out = volume.home.path("out");
    let said = volume.home.refused(13, &[&"export", &volume.cipher, &out]);
    // Either name may have come first.
    let (one, other) = if said.contains("b: page 0") { ("b", "b2") } else { ("b2", "b") };
    assert!(said.contains(&format!("{one}: page 0 does not authenticate")), "{said}");
    assert!(said.contains(&format!("{other}: its first name, {one}, could not be copied")), "{said}");
    let names = |path: &Path| walk(path).len();
    assert_eq!(names(&out), 2, "nothing is left of what failed");
    assert!(volume.home.refused(13, &[&"cat", &volume.cipher, &"b"]).contains("does not authenticate"));
    fs::rename(&renamed, renamed.with_file_name("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")).unwrap();
    let said = volume.home.refused(13, &[&"export", &volume.cipher, &volume.home.path("out2")]);
    assert!(said.contains("names do not decrypt"), "{said}");
}

/// Kills `command` when `begun` holds, until it has ended by itself; calls `check` after each.
fn kill_and_go_on(
    home: &Home,
    command: &[support::Argument<'_>],
    place: impl Fn() -> usize,
    check: impl Fn(),
) -> usize {
    let mut killed = 0;
    loop {
        let before = place();
        let mut running = home.start("copy", command);
        eventually("it gets on", || place() > before + 150 || !running.runs());
        if !running.runs() {
            assert_eq!(running.end(), Some(0));
            return killed;
        }
        running.signal(Signal::KILL);
        running.status();
        killed += 1;
        check();
    }
}

#[test]
fn a_killed_copy_has_nothing_half_and_goes_on() {
    let volume = volume(&[]);
    let home = &volume.home;
    let source = home.path("source");
    for directory in 0..30 {
        let directory = source.join(directory.to_string());
        fs::create_dir_all(&directory).unwrap();
        for file in 0..30 {
            fs::write(directory.join(file.to_string()), bytes(file, 100_000)).unwrap();
        }
    }
    let whole = |root: &Path| {
        let files = walk(root).into_iter().filter(|path| path.is_file());
        let named = files.filter(|path| !path.to_string_lossy().contains(".kmsfs-partial-"));
        for path in named {
            let file: u64 = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
            assert!(fs::read(&path).unwrap() == bytes(file, 100_000), "{} is half written", path.display());
        }
    };
    let count = |root: PathBuf| move || if root.exists() { walk(&root).len() } else { 0 };
    let killed = kill_and_go_on(home, &[&"import", &source, &volume.cipher], count(volume.cipher.clone()), || {
        volume.mount();
        whole(&volume.plain);
        volume.unmount();
    });
    assert!(killed > 0, "it was faster than this test");
    home.ok(&[&"check", &volume.cipher]);
    let out = home.path("out");
    let killed = kill_and_go_on(home, &[&"export", &volume.cipher, &out], count(out.clone()), || whole(&out));
    assert!(killed > 0, "it was faster than this test");
    assert_same("exported", &tree(&out), &tree(&source));
}

#[test]
fn an_export_says_that_a_file_was_cut_off_and_has_the_rest_of_it() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("whole"), bytes(1, 50_000)).unwrap();
    fs::write(volume.path("cut"), bytes(2, 50_000)).unwrap();
    let cut = volume.behind("cut");
    volume.unmount();
    File::options().write(true).open(cut).unwrap().set_len(4096 + 3 * 4096).unwrap();
    let out = volume.home.path("out");
    let output = volume.home.kmsfs(&[&"export", &volume.cipher, &out]);
    assert!(
        !output.status.success() && text(&output.stderr).contains("end marks are missing"),
        "{}",
        text(&output.stderr)
    );
    assert!(fs::read(out.join("cut")).unwrap() == bytes(2, 50_000)[..3 * PAGE]);
    assert!(fs::read(out.join("whole")).unwrap() == bytes(1, 50_000));
}

#[test]
fn an_export_beside_a_writer_has_what_rests() {
    let volume = Volume::new(&[]);
    for name in 0..50 {
        fs::write(volume.path(format!("rests-{name}")), bytes(name, 50_000)).unwrap();
    }
    let fsynced = File::create(volume.path("fsynced")).unwrap();
    (&fsynced).write_all(b"now").unwrap();
    fsynced.sync_all().unwrap();
    drop(fsynced);
    volume.home.shell("sync -f plain");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut busy = OpenOptions::new().append(true).create(true).open(volume.path("busy")).unwrap();
            while !stop.load(Ordering::Relaxed) {
                busy.write_all(&bytes(1, 10_000)).unwrap();
                busy.sync_data().unwrap();
                let name = volume.path("comes-and-goes");
                fs::write(&name, "x").unwrap();
                fs::remove_file(&name).unwrap();
            }
        });
        let out = volume.home.path("out");
        let output = volume.home.kmsfs(&[&"export", &volume.cipher, &out]);
        stop.store(true, Ordering::Relaxed);
        let said = text(&output.stderr);
        // The busy one may have been caught at rest.
        let busy_only = said
            .lines()
            .all(|line| ["busy: it changes", "kmsfs: 1 of", "hint: "].iter().any(|word| line.starts_with(word)));
        assert!(output.status.success() || output.status.code() == Some(1) && busy_only, "{said}");
        for name in 0..50 {
            assert!(fs::read(out.join(format!("rests-{name}"))).unwrap() == bytes(name, 50_000));
        }
        assert_eq!(fs::read(out.join("fsynced")).unwrap(), b"now");
    });
    volume.unmount();
}

#[test]
fn an_ordinary_user_copies_what_is_his() {
    let home = Home::of_nobody();
    let cipher = home.path("cipher");
    home.ok(&[&"init", &cipher]);
    home.shell(
        "mkdir source source/closed && echo x > source/x && echo y > source/closed/y && chmod 500 source/closed",
    );
    let (source, out) = (home.path("source"), home.path("out"));
    home.ok(&[&"import", &"--verify", &source, &cipher]);
    home.ok(&[&"export", &"--verify", &cipher, &out]);
    assert_same("exported", &tree(&out), &tree(&source));
    home.shell("chmod 000 source/x && rm -rf again");
    let said = home.refused(14, &[&"import", &source, &cipher, &"again"]);
    assert!(said.contains("x: Permission denied"), "{said}");
}

#[test]
fn a_full_disk_ends_an_export_and_more_room_lets_it_go_on() {
    needs_root();
    let volume = Volume::new(&[]);
    for name in 0..100 {
        fs::write(volume.path(name.to_string()), bytes(name, 100_000)).unwrap();
    }
    let expected = tree(&volume.plain);
    volume.unmount();
    let out = volume.home.path("out");
    volume.home.shell("mkdir out && mount -t tmpfs -o size=4m tmpfs out");
    let began = std::time::Instant::now();
    let said = volume.home.refused(14, &[&"export", &volume.cipher, &out]);
    assert!(said.contains("No space left"), "{said}");
    assert!(said.lines().count() < 20, "the rest is not tried: {said}");
    assert!(began.elapsed().as_secs() < 20);
    for path in walk(&out) {
        assert!(path.to_string_lossy().contains(".kmsfs-partial-") || fs::metadata(&path).unwrap().len() == 100_000);
    }
    volume.home.shell("mount -o remount,size=64m out");
    // Of a file that is not in the volume any more.
    fs::write(out.join(".kmsfs-partial-0-1"), "half").unwrap();
    volume.home.ok(&[&"export", &"--verify", &volume.cipher, &out]);
    assert_same("exported", &tree(&out), &expected);
    volume.home.shell("umount out");
}

/// What was copied is what is there, and the rest is told as not tried.
#[test]
fn a_full_volume_ends_the_import_and_its_counts_are_true() {
    needs_root();
    let home = Home::new();
    let (source, cipher) = (home.path("source"), home.path("small/cipher"));
    fs::create_dir(&source).unwrap();
    (0..100).for_each(|name| fs::write(source.join(name.to_string()), bytes(name, 100_000)).unwrap());
    home.shell("mkdir small && mount -t tmpfs -o size=4m tmpfs small");
    home.ok(&[&"init", &cipher]);
    let output = home.kmsfs(&[&"import", &"--json", &source, &cipher]);
    let imported = report(&output);
    assert_eq!(output.status.code(), Some(14), "{imported:#}");
    let listed = home.ok(&[&"ls", &cipher]).lines().count() as u64;
    assert!((1..100).contains(&listed), "{listed}");
    assert_eq!([&imported["complete"], &imported["stopped"]], [&Value::Bool(false), &Value::Bool(true)]);
    assert_eq!([&imported["files"], &imported["bytes"]], [&Value::from(listed), &(listed * 100_000).into()]);
    let said = text(&output.stderr);
    assert!(said.contains(&format!("stopped after {listed} files: the rest was not tried")), "{said}");
    assert!(imported.to_string().contains("No space left"), "{imported:#}");
    home.shell("mount -o remount,size=64m small");
    let again = report(&home.kmsfs(&[&"import", &"--json", &"--verify", &source, &cipher]));
    let expected = [Value::Bool(true), Value::Bool(false), (100 - listed).into(), listed.into()];
    assert_eq!(["complete", "stopped", "files", "kept"].map(|field| again[field].clone()), expected);
    home.shell("umount small");
}
