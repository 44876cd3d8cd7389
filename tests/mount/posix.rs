//! What POSIX programs rely on and encrypting filesystems tend to get wrong: owners, open files without a name, extended
//! attributes, ACLs, set-id bits, allocation, descriptors.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use rustix::fs::{FallocateFlags, XattrFlags, fallocate, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use crate::support::{self, Home, Volume, needs_root, nobody, python, run};

const CAPABILITIES: &str = "security.capability";

/// Mounted for all users, with set-id bits.
fn for_everybody() -> Volume {
    needs_root();
    let volume = Volume::in_home(Home::new(), &[], &["-o", "allow_other,suid,dev"]);
    fs::set_permissions(volume.home.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&volume.plain, fs::Permissions::from_mode(0o1777)).unwrap();
    volume
}

/// Eight processes of four users make, rename and read files at the same time.
#[test]
fn every_file_belongs_to_whoever_made_it() {
    let volume = for_everybody();
    let script = r#"
import os, sys
root, failures = sys.argv[1], 0
def work(worker, uid):
    os.setgroups([]); os.setgid(uid + 1); os.setuid(uid); os.umask(0o027)
    mine = f"{root}/u{uid}-w{worker}"
    os.mkdir(mine, 0o700)
    for i in range(120):
        name = f"{root}/shared-{worker}-{i}"
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        os.write(fd, str(uid).encode() * 50)
        st = os.fstat(fd)
        assert (st.st_uid, st.st_gid, st.st_mode & 0o777) == (uid, uid + 1, 0o640), (uid, st)
        os.close(fd)
        os.rename(name, f"{mine}/{i}")
        os.symlink("x", f"{mine}/l{i}"); os.mkfifo(f"{mine}/p{i}")
        for made in (f"l{i}", f"p{i}"):
            st = os.lstat(f"{mine}/{made}")
            assert (st.st_uid, st.st_gid) == (uid, uid + 1), (uid, made, st)
        for other in range(8):
            theirs = 2000 + 10 * (other % 4)
            if theirs == uid: continue
            try:
                os.listdir(f"{root}/u{theirs}-w{other}")
            except (PermissionError, FileNotFoundError):
                continue
            raise AssertionError("a private directory was listed")
    for i in range(120):
        assert open(f"{mine}/{i}").read() == str(uid) * 50
children = []
for worker in range(8):
    pid = os.fork()
    if pid == 0:
        try:
            work(worker, 2000 + 10 * (worker % 4)); os._exit(0)
        except BaseException as e:
            print(repr(e), flush=True); os._exit(1)
    children.append(pid)
for pid in children:
    failures += os.waitpid(pid, 0)[1] != 0
print("failures", failures)
"#;
    assert_eq!(python(script, &[&volume.plain], &volume.plain), "failures 0\n");
}

/// Every operation on a file that has no name any more, by its descriptor and by way of `/proc/self/fd`.
#[test]
fn a_file_without_a_name_is_a_whole_file() {
    let volume = for_everybody();
    let script = r#"
import ctypes, errno, fcntl, mmap, os, sys
root = sys.argv[1]
done = 0
def check(what, got, want=True):
    global done
    assert got == want, (what, got, want)
    done += 1
for deleted_by in ("unlink", "rename"):
    path = f"{root}/gone-{deleted_by}"
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.write(fd, b"before")
    if deleted_by == "unlink":
        os.unlink(path)
    else:
        open(f"{root}/other", "w").close()
        os.rename(f"{root}/other", path)
    magic = f"/proc/self/fd/{fd}"
    check("nlink", os.fstat(fd).st_nlink, 0)
    check("read", os.pread(fd, 100, 0), b"before")
    check("write", os.pwrite(fd, b"x" * 10000, 3), 10000)
    check("size", os.fstat(fd).st_size, 10003)
    os.ftruncate(fd, 5000); check("ftruncate", os.fstat(fd).st_size, 5000)
    os.truncate(magic, 6000); check("truncate by /proc", os.stat(magic).st_size, 6000)
    os.fsync(fd); os.fdatasync(fd); check("fsync", True)
    os.fchmod(fd, 0o640); check("fchmod", os.fstat(fd).st_mode & 0o777, 0o640)
    os.chmod(magic, 0o604); check("chmod by /proc", os.fstat(fd).st_mode & 0o777, 0o604)
    os.fchown(fd, 5, 6); check("fchown", (os.fstat(fd).st_uid, os.fstat(fd).st_gid), (5, 6))
    os.utime(fd, ns=(10**9 + 1, 2 * 10**9 + 2)); check("futimens", os.fstat(fd).st_mtime_ns, 2 * 10**9 + 2)
    os.setxattr(fd, "user.a", b"v"); check("fgetxattr", os.getxattr(fd, "user.a"), b"v")
    check("flistxattr", os.listxattr(fd), ["user.a"])
    os.removexattr(fd, "user.a"); check("fremovexattr", os.listxattr(fd), [])
    os.setxattr(magic, "user.b", b"w"); check("xattr by /proc", os.getxattr(magic, "user.b"), b"w")
    os.posix_fallocate(fd, 0, 20000); check("fallocate", os.fstat(fd).st_size, 20000)
    check("lseek", os.lseek(fd, 0, os.SEEK_END), 20000)
    check("SEEK_DATA", os.lseek(fd, 0, os.SEEK_DATA), 0)
    with mmap.mmap(fd, 20000) as m:
        m[0:4] = b"mmap"; m.flush()
    check("mmap", os.pread(fd, 4, 0), b"mmap")
    fcntl.flock(fd, fcntl.LOCK_EX); fcntl.lockf(fd, fcntl.LOCK_EX); check("locks", True)
    again = os.open(magic, os.O_RDWR); check("open by /proc", os.pread(again, 4, 0), b"mmap"); os.close(again)
    libc = ctypes.CDLL(None, use_errno=True)
    linked = libc.linkat(-100, magic.encode(), -100, f"{root}/linked".encode(), 0x400)
    check("linkat by /proc, as ext4 answers", (linked, ctypes.get_errno()), (-1, errno.ENOENT))
    other = os.open(f"{root}/copy-{deleted_by}", os.O_CREAT | os.O_RDWR)
    check("copy_file_range", os.copy_file_range(fd, other, 4, 0, 0), 4)
    check("copied", os.pread(other, 4, 0), b"mmap")
    os.close(fd)
d = os.open(root, os.O_RDONLY); os.mkdir(f"{root}/dir"); dd = os.open(f"{root}/dir", os.O_RDONLY); os.rmdir(f"{root}/dir")
check("nlink of a removed directory", os.fstat(dd).st_nlink, 0)
check("it is empty", os.listdir(dd), [])
try:
    os.open("x", os.O_CREAT | os.O_RDWR, dir_fd=dd); check("create in it", False)
except FileNotFoundError:
    check("create in it", True)
print(done)
"#;
    assert_eq!(python(script, &[&volume.plain], &volume.plain), "51\n");
    support::eventually("nothing stays open", || volume.status()["files_open"] == 0);
}

#[test]
fn extended_attributes_behave_and_are_sealed() {
    let volume = for_everybody();
    let file = volume.path("file");
    File::create(&file).unwrap();
    let before = fs::metadata(&file).unwrap().mtime_nsec();
    let long = format!("user.{}", "n".repeat(250));
    for name in ["user.colour", long.as_str()] {
        setxattr(&file, name, b"ultramarine", XattrFlags::CREATE).unwrap();
        assert_eq!(setxattr(&file, name, b"", XattrFlags::CREATE), Err(Errno::EXIST));
        let mut room = [0; 64];
        assert_eq!(getxattr(&file, name, &mut room[..]), Ok(11));
        assert_eq!(&room[..11], b"ultramarine");
        assert_eq!(getxattr(&file, name, &mut [0_u8; 10][..]), Err(Errno::RANGE));
    }
    assert_eq!(fs::metadata(&file).unwrap().mtime_nsec(), before, "an attribute is not content");
    assert_eq!(setxattr(&file, "user.none", b"", XattrFlags::REPLACE), Err(Errno::NODATA));
    assert_eq!(removexattr(&file, "user.none"), Err(Errno::NODATA));
    let mut names = [0; 1024];
    let len = listxattr(&file, &mut names[..]).unwrap();
    assert_eq!(len, "user.colour".len() + long.len() + 2);
    volume.remount();
    assert_eq!(getxattr(&file, long.as_str(), &mut [0_u8; 64][..]), Ok(11));
    // On disk there is neither name nor value.
    let behind = volume.behind("file");
    let stored = run("getfattr", &[&"-d", &"-m", &"-", &"--absolute-names", &behind], &volume.plain);
    assert!(stored.contains("user.kmsfs."), "{stored}");
    assert!(!stored.contains("colour") && !stored.contains("marine") && !stored.contains("nnnn"), "{stored}");
    // An attribute of one file means nothing on another.
    let name = stored.lines().find_map(|line| line.split_once('=')).unwrap().0.to_owned();
    let mut value = [0; 1024];
    let len = getxattr(&behind, name.as_str(), &mut value[..]).unwrap();
    fs::write(volume.path("thief"), "x").unwrap();
    setxattr(volume.behind("thief"), name.as_str(), &value[..len], XattrFlags::empty()).unwrap();
    assert_eq!(listxattr(volume.path("thief"), &mut names[..]), Ok(0));
    value[len - 1] ^= 1;
    setxattr(&behind, name.as_str(), &value[..len], XattrFlags::empty()).unwrap();
    let refused = ["user.colour", long.as_str()].map(|name| getxattr(&file, name, &mut [0_u8; 64][..]));
    assert!(refused.contains(&Err(Errno::IO)), "{refused:?}");
}

/// Version 2, with `CAP_NET_RAW` permitted and in effect.
fn capable() -> Vec<u8> {
    [[1, 0, 0, 2], [0, 0x20, 0, 0], [0; 4], [0; 4], [0; 4]].concat()
}

/// Settling, closing and headers write to files below, where every write takes capabilities away.
#[test]
fn programs_keep_what_they_were_given_until_they_are_written() {
    let volume = for_everybody();
    let has = |name: &str| {
        let capable = getxattr(volume.path(name), CAPABILITIES, &mut [0_u8; 64][..]);
        (capable, fs::metadata(volume.path(name)).unwrap().mode() & 0o6000)
    };
    let [with, without] = [(Ok(20), 0o6000), (Err(Errno::NODATA), 0)];
    for name in ["kept", "written", "cut"] {
        let mut file = File::create(volume.path(name)).unwrap();
        file.write_all(b"program").unwrap();
        file.sync_all().unwrap();
        fs::set_permissions(volume.path(name), fs::Permissions::from_mode(0o6777)).unwrap();
        setxattr(volume.path(name), CAPABILITIES, &capable(), XattrFlags::empty()).unwrap();
        setxattr(volume.path(name), "user.colour", b"blue", XattrFlags::empty()).unwrap();
        drop(file);
        assert_eq!(has(name), with);
    }
    support::eventually("all are settled", || volume.status()["unsettled_files"] == 0);
    volume.remount();
    assert!(["kept", "written", "cut"].iter().all(|name| has(name) == with));
    let change = "printf more >> written; truncate -s 3 cut; cat kept";
    assert_eq!(run("runuser", &[&"-u", &"nobody", &"--", &"sh", &"-c", &change], &volume.plain), "program");
    for _ in 0..2 {
        assert_eq!([has("kept"), has("written"), has("cut")], [with, without, without]);
        volume.remount();
    }
}

/// What is there stays, and cannot be used; a program that is written loses its capabilities.
#[test]
fn a_mount_without_attributes_has_none_and_loses_none() {
    let volume = for_everybody();
    let directory = volume.path("team");
    fs::create_dir(&directory).unwrap();
    run("setfacl", &[&"-m", &"d:u:daemon:rw,d:o::-", &directory], &volume.plain);
    for name in ["written", "read", "cut"] {
        fs::write(volume.path(name), "program").unwrap();
        setxattr(volume.path(name), "user.colour", b"blue", XattrFlags::empty()).unwrap();
        setxattr(volume.path(name), CAPABILITIES, &capable(), XattrFlags::empty()).unwrap();
    }
    let remount = |options: &str| {
        volume.unmount();
        volume.home.ok(&[&"mount", &"-o", &options, &volume.cipher, &volume.plain]);
    };
    remount("allow_other,noxattr");
    let read = volume.path("read");
    let mut room = [0; 64];
    for _ in 0..2 {
        assert_eq!(getxattr(&read, "user.colour", &mut room[..]), Err(Errno::OPNOTSUPP));
        assert_eq!(getxattr(&read, "system.posix_acl_access", &mut room[..]), Err(Errno::NODATA));
        assert_eq!(listxattr(&read, &mut room[..]), Err(Errno::OPNOTSUPP));
        assert_eq!(setxattr(&read, "user.colour", b"red", XattrFlags::empty()), Err(Errno::OPNOTSUPP));
        assert_eq!(removexattr(&read, "user.colour"), Err(Errno::OPNOTSUPP));
    }
    fs::OpenOptions::new().append(true).open(volume.path("written")).unwrap().write_all(b"more").unwrap();
    fs::OpenOptions::new().write(true).open(volume.path("cut")).unwrap().set_len(3).unwrap();
    assert_eq!(fs::read_to_string(&read).unwrap(), "program");
    fs::write(directory.join("file"), "made").unwrap();
    remount("allow_other,suid,dev");
    for (name, left) in [("written", Err(Errno::NODATA)), ("cut", Err(Errno::NODATA)), ("read", Ok(20))] {
        assert_eq!(getxattr(volume.path(name), "user.colour", &mut room[..]), Ok(4), "{name}");
        assert_eq!(getxattr(volume.path(name), CAPABILITIES, &mut room[..]), left, "{name}");
    }
    let made = run("getfacl", &[&"-cp", &directory.join("file")], &volume.plain);
    assert!(made.contains("user:daemon:rw-") && made.contains("other::---"), "{made}");
}

#[test]
fn a_host_without_selinux_has_no_labels_but_those_that_are_there() {
    if fs::read_to_string("/proc/filesystems").unwrap().contains("selinuxfs") {
        return println!("left out: this host has SELinux");
    }
    let volume = for_everybody();
    let (file, mut room) = (volume.path("file"), [0; 64]);
    fs::write(&file, "content").unwrap();
    let mut label = || getxattr(&file, "security.selinux", &mut room[..]);
    assert_eq!(label(), Err(Errno::OPNOTSUPP));
    setxattr(&file, "security.selinux", b"a:b:c:s0", XattrFlags::empty()).unwrap();
    assert_eq!(label(), Ok(8));
    removexattr(&file, "security.selinux").unwrap();
    assert_eq!(label(), Err(Errno::OPNOTSUPP));
    assert_eq!(getxattr(&file, "security.other", &mut room[..]), Err(Errno::NODATA));
}

#[test]
fn acls_are_inherited_and_enforced() {
    let volume = for_everybody();
    let (uid, _) = nobody();
    let directory = volume.path("team");
    fs::create_dir(&directory).unwrap();
    run(
        "setfacl",
        &[&"-m", &format!("u:{uid}:rwx"), &"-m", &format!("d:u:{uid}:rw,d:g::-,d:o::-"), &directory],
        &volume.plain,
    );
    // The default ACL takes the umask's place.
    run("sh", &[&"-c", &"umask 077; echo shared > team/file; mkdir team/below"], &volume.plain);
    let as_nobody = |script: &str| {
        let mut command = Command::new("runuser");
        command.args(["-u", "nobody", "--", "sh", "-c", script]).current_dir(&volume.plain);
        command.status().unwrap().success()
    };
    assert!(as_nobody("cat team/file && echo more >> team/file && ls team"));
    assert!(!as_nobody("test -e team/below/."), "rw is not enough to search a directory");
    let acl = run("getfacl", &[&"-cn", &"team/below"], &volume.plain);
    assert!(acl.contains(&format!("default:user:{uid}:rw-")), "{acl}");
    run("setfacl", &[&"-x", &format!("u:{uid}"), &"team/file"], &volume.plain);
    assert!(!as_nobody("cat team/file 2>/dev/null"));
    volume.remount();
    assert!(!as_nobody("cat team/file 2>/dev/null") && as_nobody("ls team"));
    fs::create_dir(volume.path("plain")).unwrap();
    run("sh", &[&"-c", &"umask 027; echo x > plain/file"], &volume.plain);
    assert_eq!(fs::metadata(volume.path("plain/file")).unwrap().mode() & 0o777, 0o640);
}

/// By root, an owner in and outside of the group, a member of it, a stranger, and a stranger who is root of a user namespace.
#[test]
fn set_id_bits_go_as_on_a_plain_directory() {
    let volume = for_everybody();
    let plain = volume.home.path("beside");
    fs::create_dir(&plain).unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o1777)).unwrap();
    let told = python(include_str!("../support/set_ids.py"), &[&volume.plain, &plain], &volume.plain);
    assert_eq!(told, "936 tried, 0 differ\n");
}

#[test]
fn allocated_and_punched_ranges_read_as_zeros() {
    let volume = for_everybody();
    let path = volume.path("file");
    let content = support::bytes(7, 200_000);
    fs::write(&path, &content).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.sync_all().unwrap();
    let full = fs::metadata(&path).unwrap().blocks();
    fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 5000, 150_000).unwrap();
    let mut expected = content;
    expected[5000..155_000].fill(0);
    assert!(fs::read(&path).unwrap() == expected);
    file.sync_all().unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() < full / 2, "the space was given back");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1_000_000).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 200_000);
    assert!(fs::metadata(&path).unwrap().blocks() > 1900, "the space was taken");
    fallocate(&file, FallocateFlags::ZERO_RANGE, 190_000, 20_000).unwrap();
    expected.truncate(190_000);
    expected.resize(210_000, 0);
    assert!(fs::read(&path).unwrap() == expected);
    assert_eq!(fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096), Err(Errno::OPNOTSUPP));
    drop(file);
    volume.remount();
    assert!(fs::read(&path).unwrap() == expected);
}

#[test]
fn what_is_being_written_takes_space() {
    let volume = for_everybody();
    let (new, empty) = (volume.path("new"), volume.path("empty"));
    File::create(&empty).unwrap();
    assert_eq!(fs::metadata(&empty).unwrap().blocks(), 0);
    for path in [&new, &empty] {
        let mut file = File::options().create(true).append(true).open(path).unwrap();
        file.write_all(b"x").unwrap();
        // The kernel holds it, and nobody else knows.
        assert!(fs::metadata(path).unwrap().blocks() > 0, "{}", path.display());
        file.write_all(&support::bytes(1, 5_000_000)).unwrap();
        file.sync_all().unwrap();
        assert!(fs::metadata(path).unwrap().blocks() * 512 > 5_000_000, "{}", path.display());
        file.write_all(&support::bytes(2, 100_000)).unwrap();
        drop(file);
        assert!(fs::metadata(path).unwrap().blocks() * 512 > 5_100_000, "{}", path.display());
    }
}

#[test]
fn opening_for_reading_moves_the_access_time() {
    let volume = for_everybody();
    let path = volume.path("file");
    fs::write(&path, "content").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"content");
    let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let accessed = || fs::metadata(&path).unwrap().accessed().unwrap();
    File::open(&path).unwrap().set_times(fs::FileTimes::new().set_accessed(long_ago)).unwrap();
    assert_eq!(accessed(), long_ago);
    // From the kernel's cache.
    assert_eq!(fs::read(&path).unwrap(), b"content");
    assert!(accessed() > long_ago);
}

/// An ordinary user mounts what somebody else owns and lets his group write.
#[test]
fn times_that_a_colleague_cannot_keep_are_no_error() {
    needs_root();
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    volume.home.shell(&format!("cd {0}; printf %5000s x >written; : >empty; : >new", volume.plain.display()));
    volume.unmount();
    let cipher = volume.cipher.display();
    run("sh", &[&"-c", &format!("chown -R root {cipher}; chmod -R g+rwX {cipher}")], Path::new("/"));
    volume.mount();
    let script = r#"
import os, sys, time
root = sys.argv[1]
os.chdir(root)
fd = os.open("written", os.O_RDWR)
os.pwrite(fd, b"y", 5000); os.fdatasync(fd); os.fsync(fd); os.close(fd)
os.utime("written"); os.truncate("written", 4000)
assert os.stat("written").st_size == 4000
assert abs(os.stat("written").st_mtime - time.time()) < 60
os.setxattr("new", "user.a", b"b")
os.truncate("empty", 100)
try:
    os.utime("written", (1, 1))
    sys.exit("only its owner chooses a time")
except PermissionError:
    pass
"#;
    let script_file = volume.home.path("script");
    fs::write(&script_file, script).unwrap();
    volume.home.shell(&format!("/usr/bin/python3 {} {}", script_file.display(), volume.plain.display()));
    volume.remount();
    assert_eq!(volume.home.shell(&format!("wc -c <{}/written", volume.plain.display())).trim(), "4000");
}

/// A write with asynchronous direct I/O that is complete is what a read through the cache finds, while others fill that cache.
#[test]
fn a_direct_write_that_is_complete_is_read() {
    let volume = for_everybody();
    let script = r#"
import ctypes, mmap, os, sys, threading
path, SIZE, COUNT = sys.argv[1], 4096, 64
libc = ctypes.CDLL(None, use_errno=True)
class Iocb(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64), ("key", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("code", ctypes.c_uint16),
        ("priority", ctypes.c_int16), ("fd", ctypes.c_uint32), ("buffer", ctypes.c_uint64), ("count", ctypes.c_uint64),
        ("offset", ctypes.c_int64), ("reserved", ctypes.c_uint64), ("more", ctypes.c_uint32), ("event", ctypes.c_uint32)]
context = ctypes.c_ulong(0)
assert libc.syscall(206, 4, ctypes.byref(context)) == 0
direct = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
read = os.open(path, os.O_RDONLY)
page = mmap.mmap(-1, SIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(page))
os.pwrite(direct, mmap.mmap(-1, SIZE * COUNT), 0)
stop = False
def reader():
    fd, at = os.open(path, os.O_RDONLY), 0
    while not stop:
        os.pread(fd, SIZE, at * SIZE)
        at = (at + 1) % COUNT
threads = [threading.Thread(target=reader) for _ in range(2)]
[thread.start() for thread in threads]
stale = 0
for round in range(1, 40):
    for at in range(COUNT):
        page[:] = bytes([round]) * SIZE
        block = Iocb(code=1, fd=direct, buffer=address, count=SIZE, offset=at * SIZE)
        events = ctypes.create_string_buffer(32)
        assert libc.syscall(209, context, 1, ctypes.byref(ctypes.pointer(block))) == 1
        assert libc.syscall(208, context, 1, 1, events, None) == 1
        stale += os.pread(read, 1, at * SIZE)[0] != round
stop = True
[thread.join() for thread in threads]
print(stale, "stale")
"#;
    assert_eq!(python(script, &[&volume.path("file")], &volume.plain), "0 stale\n");
}

/// Three thousand files through a process that may have six hundred descriptors.
/// Fewer than there are files.
const DESCRIPTORS: u64 = 600;

fn remount_with_few_descriptors(volume: &Volume) {
    volume.unmount();
    let mut command = volume.home.command("prlimit");
    command.arg(format!("--nofile={DESCRIPTORS}:{DESCRIPTORS}"));
    command.arg(volume.home.program()).args(volume.mount_arguments());
    assert!(command.status().unwrap().success());
}

#[test]
fn a_tree_may_have_more_files_than_there_are_descriptors() {
    let volume = for_everybody();
    for directory in 0..3 {
        fs::create_dir(volume.path(format!("d{directory}"))).unwrap();
        for file in 0..1000 {
            fs::write(volume.path(format!("d{directory}/{file}")), format!("{directory}/{file}")).unwrap();
        }
    }
    remount_with_few_descriptors(&volume);
    for _ in 0..2 {
        assert_eq!(run("sh", &[&"-c", &"ls -lR . | grep -c '^-'"], &volume.plain), "3000\n");
        let files = |path: &Path| fs::read_to_string(path).unwrap();
        for path in support::walk(&volume.plain).iter().map(|path| volume.path(path)).filter(|path| path.is_file()) {
            let expected = path.strip_prefix(&volume.plain).unwrap().to_string_lossy().replace('d', "");
            assert_eq!(files(&path), expected);
        }
    }
    let known = volume.status()["inodes_known"].as_u64().unwrap();
    assert!(known < DESCRIPTORS, "{known}");
}

#[test]
fn a_directory_may_have_more_files_than_there_are_descriptors() {
    const FILES: usize = 4000;
    let volume = for_everybody();
    for file in 0..FILES {
        fs::write(volume.path(format!("{file}")), format!("{file}")).unwrap();
    }
    remount_with_few_descriptors(&volume);
    // Listed with what `stat` says of each, as `find` and `du` do: each listing makes every file known.
    let list = || {
        let entries = fs::read_dir(&volume.plain).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len());
        assert_eq!(entries.filter(|length| *length > 0).count(), FILES);
    };
    list();
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(list))));
    let known = volume.status()["inodes_known"].as_u64().unwrap();
    assert!(known < DESCRIPTORS, "{known}");
}

/// Directories can be forgotten from Linux 6.18 on.
#[test]
fn a_tree_may_have_more_directories_than_there_are_descriptors() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let version: Vec<u32> = release.split('.').take(2).map_while(|part| part.parse().ok()).collect();
    if version < vec![6, 18] {
        println!("left out: Linux {} keeps directories that are known", release.trim());
        return;
    }
    let volume = for_everybody();
    for n in 0..1500 {
        fs::create_dir_all(volume.path(format!("{}/{n}/leaf", n % 10))).unwrap();
    }
    remount_with_few_descriptors(&volume);
    let mut inside = Command::new("sleep").arg("60").current_dir(volume.path("7/7/leaf")).spawn().unwrap();
    for _ in 0..2 {
        assert_eq!(run("sh", &[&"-c", &"find . -type d | wc -l"], &volume.plain), "3011\n");
    }
    let known = volume.status()["inodes_known"].as_u64().unwrap();
    assert!(known < DESCRIPTORS, "{known}");
    // One that is in use stays.
    let place = fs::read_link(format!("/proc/{}/cwd", inside.id())).unwrap();
    inside.kill().unwrap();
    inside.wait().unwrap();
    assert_eq!(place, volume.path("7/7/leaf"));
}

/// Twice as many threads as serve the kernel make things all the time.
#[test]
fn many_at_work_lack_no_descriptor() {
    let volume = for_everybody();
    remount_with_few_descriptors(&volume);
    let make = |worker: usize| {
        let own = volume.path(format!("{worker}"));
        fs::create_dir(&own).unwrap();
        for number in 0..300 {
            let path = |kind: &str| own.join(format!("{kind}{number}"));
            fs::create_dir(path("directory")).unwrap();
            fs::write(path("directory").join("file"), format!("{worker}/{number}")).unwrap();
            std::os::unix::fs::symlink("target", path("link")).unwrap();
            fs::rename(path("link"), path("renamed")).unwrap();
            fs::hard_link(path("directory").join("file"), path("hard")).unwrap();
        }
        for number in 0..300 {
            let path = |kind: &str| own.join(format!("{kind}{number}"));
            assert_eq!(fs::read_to_string(path("hard")).unwrap(), format!("{worker}/{number}"));
            fs::remove_file(path("directory").join("file")).unwrap();
            fs::remove_dir(path("directory")).unwrap();
        }
    };
    std::thread::scope(|scope| (0..8).for_each(|worker| drop(scope.spawn(move || make(worker)))));
}

/// Longer than a symlink on disk can hold when sealed.
#[test]
fn symlinks_lead_as_far_as_paths_go() {
    let volume = for_everybody();
    let stored = || fs::read_dir(volume.cipher.join(".kmsfs/links")).map_or(0, Iterator::count);
    let link = |name: &str, len: usize| std::os::unix::fs::symlink("t".repeat(len), volume.path(name));
    link("short", 3031).unwrap();
    assert_eq!(stored(), 0);
    for (name, len) in [("a", 3032), ("b", 4095), ("c", 4000)] {
        link(name, len).unwrap();
    }
    assert_eq!(support::errno(link("d", 4096)), Some(libc::ENAMETOOLONG));
    assert_eq!(support::errno(link("a", 4000)), Some(libc::EEXIST));
    assert_eq!(stored(), 3);
    fs::hard_link(volume.path("a"), volume.path("hard")).unwrap();
    fs::remove_file(volume.path("a")).unwrap();
    fs::rename(volume.path("b"), volume.path("short")).unwrap();
    fs::rename(volume.path("short"), volume.path("c")).unwrap();
    volume.remount();
    for (name, len) in [("hard", 3032), ("c", 4095)] {
        assert_eq!(fs::symlink_metadata(volume.path(name)).unwrap().len(), len as u64);
        assert_eq!(fs::read_link(volume.path(name)).unwrap(), Path::new(&"t".repeat(len)));
    }
    assert_eq!(stored(), 2);
    let sealed = fs::read_dir(volume.cipher.join(".kmsfs/links")).unwrap().next().unwrap().unwrap().path();
    support::flip(&sealed, 100);
    volume.remount();
    let read = ["hard", "c"].map(|name| support::errno(fs::read_link(volume.path(name))));
    assert!(read.contains(&Some(libc::EIO)) && read.contains(&None), "{read:?}");
    ["hard", "c"].iter().for_each(|name| fs::remove_file(volume.path(name)).unwrap());
    assert_eq!(stored(), 0);
}

#[test]
fn a_mount_becomes_read_only_and_writable_again() {
    let volume = for_everybody();
    fs::write(volume.path("file"), "x").unwrap();
    volume.home.ok(&[&"mount", &"-o", &"remount,ro", &volume.cipher, &volume.plain]);
    assert_eq!(support::errno(fs::write(volume.path("file"), "y")), Some(libc::EROFS));
    assert_eq!(support::errno(fs::create_dir(volume.path("new"))), Some(libc::EROFS));
    volume.home.ok(&[&"mount", &"-o", &"remount,rw", &volume.cipher, &volume.plain]);
    fs::write(volume.path("file"), "z").unwrap();
    volume.unmount();
    volume.home.ok(&[&"mount", &"-o", &"ro", &volume.cipher, &volume.plain]);
    let said = volume.home.refused(2, &[&"mount", &"-o", &"remount,rw", &volume.cipher, &volume.plain]);
    assert!(said.contains("mounted read-only"), "{said}");
    assert_eq!(fs::read_to_string(volume.path("file")).unwrap(), "z");
    let nowhere = volume.home.path("nowhere");
    fs::create_dir(&nowhere).unwrap();
    volume.home.refused(12, &[&"mount", &"-o", &"remount,ro", &volume.cipher, &nowhere]);
}

/// Another filesystem is mounted over one entry of the cipher directory, as a damaged inode would refuse to be looked at.
#[test]
fn an_entry_that_cannot_be_looked_at_hides_no_other() {
    let volume = for_everybody();
    fs::create_dir(volume.path("d")).unwrap();
    (0..40).for_each(|n| fs::write(volume.path(format!("d/f{n}")), "x").unwrap());
    let hidden = volume.behind("d/f20");
    volume.unmount();
    let cover = volume.home.path("cover");
    fs::write(&cover, "").unwrap();
    run("mount", &[&"--bind", &cover, &hidden], &volume.home.path(""));
    volume.mount();
    let listed = volume.home.command("ls").arg("-l").arg(volume.path("d")).output().unwrap();
    let names = fs::read_dir(volume.path("d")).unwrap().filter(Result::is_ok).count();
    let others = (0..40).filter(|n| fs::read(volume.path(format!("d/f{n}"))).is_ok_and(|content| content == b"x"));
    let others = others.count();
    let ours = volume.home.kmsfs(&[&"ls", &"-l", &volume.cipher, &"d"]);
    run("umount", &[&hidden], &volume.home.path(""));
    assert_eq!((names, others), (40, 39));
    let lines = |output: &[u8]| support::text(output).lines().filter(|line| line.contains(" f")).count();
    assert_eq!((lines(&listed.stdout), lines(&ours.stdout)), (40, 40));
    let marked = support::text(&ours.stdout).lines().find(|line| line.starts_with('?')).map(str::to_owned);
    assert!(marked.is_some_and(|line| line.ends_with(" f20")));
    assert!(support::text(&ours.stderr).contains("d/f20: "), "{}", support::text(&ours.stderr));
    assert_eq!(ours.status.code(), Some(14));
}

/// As Docker's and podman's storage uses it: what is removed or renamed of a lower layer leaves a whiteout.
#[test]
fn a_mount_is_the_upper_layer_of_an_overlay() {
    let volume = for_everybody();
    let long = "n".repeat(240);
    let script = format!(
        "mkdir l u w o l/d; echo lower > l/f; echo lower > l/{long}; echo deep > l/d/x
         mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w o
         trap 'umount o' EXIT
         rm o/f; mv o/{long} o/moved; rm -r o/d; mkdir o/d; echo new > o/d/y; echo upper > o/g; mv o/g o/h
         (cd o; ls); cat o/moved o/d/* o/h; stat -c %F u/f u/{long}"
    );
    let whiteout = "character special file\n";
    let expected = format!("d\nh\nmoved\nlower\nnew\nupper\n{whiteout}{whiteout}");
    assert_eq!(run("sh", &[&"-e", &"-c", &script], &volume.plain), expected);
    volume.remount();
    assert_eq!(run("stat", &[&"-c", &"%F", &"u/f", &format!("u/{long}")], &volume.plain), whiteout.repeat(2));
    assert_eq!(fs::read_to_string(volume.path("u/moved")).unwrap(), "lower\n");
}

/// A directory's id is in nobody's way, whatever the directory's mode.
#[test]
fn an_owner_removes_an_empty_directory_of_any_mode() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    let plain = volume.plain.display();
    volume.home.shell(&format!(
        "cd {plain}; for mode in 0000 0100 0200 0300 0400 0500 0555 0600; do mkdir -m $mode d; rmdir d; done
         mkdir a b; chmod 555 b; mv -T a b; test ! -e a; rmdir b
         mkdir -p t/leaf; chmod 555 t/leaf; rm -r t
         mkdir full; echo x > full/f; chmod 100 full; ! rmdir full 2>/dev/null; stat -c %a full | grep -qx 100
         chmod 700 full; cat full/f; rm -r full; ls"
    ));
    assert_eq!(cipher_names(&volume), 0);
}

/// What is removed while it is open gets another name on such filesystems: nobody but programs has it open, then.
#[test]
fn a_tree_is_removed_at_once_where_open_files_are_renamed() {
    needs_root();
    let home = Home::new();
    let (below, above, plain) = (home.path("below"), home.path("above"), home.path("plain"));
    [&below, &above, &plain].iter().for_each(|place| fs::create_dir(place).unwrap());
    if Command::new("bindfs").arg(&below).arg(&above).status().is_err() {
        println!("left out: there is no bindfs");
        return;
    }
    let cipher = above.join("cipher");
    home.ok(&[&"init", &cipher, &"--key", &format!("local:{}", home.path("keys").display())]);
    home.ok(&[&"mount", &cipher, &plain]);
    let script = "mkdir d; echo x > d/f; rm -r d
        mkdir d; echo x > d/f; echo y > d/g; mv d/g d/f; rm -r d
        mkdir d; exec 3> d/f; echo z >&3; rm d/f; exec 3>&-; rmdir d
        echo old > kept; ln kept second; rm kept; cat second; ls";
    let output = Command::new("sh").args(["-e", "-c", script]).current_dir(&plain).output().unwrap();
    home.ok(&[&"umount", &plain]);
    run("umount", &[&above], &home.path(""));
    assert_eq!((support::text(&output.stdout), support::text(&output.stderr)), ("old\nsecond\n".into(), String::new()));
}

/// Where holes are denied, growing is writing: it stops nobody else, can be ended, and takes no space for what does not fit.
#[test]
fn growing_without_holes_is_done_in_steps_and_can_be_ended() {
    needs_root();
    let volume = Volume::in_home(Home::new(), &["--holes", "deny"], &[]);
    let script = r#"
import errno, os, signal, sys, time
root = sys.argv[1]
def fails(what):
    try: what()
    except OSError as e: return errno.errorcode[e.errno]
free = lambda: os.statvfs(root).f_bavail * os.statvfs(root).f_bsize
fd = os.open(f"{root}/file", os.O_CREAT | os.O_RDWR); os.write(fd, b"begin"); os.fsync(fd)
before = free()
assert fails(lambda: os.ftruncate(fd, 1 << 50)) == "ENOSPC"
assert fails(lambda: os.posix_fallocate(fd, 0, 1 << 50)) == "ENOSPC"
os.pwrite(fd, b"far", 1 << 50)
assert fails(lambda: os.fsync(fd)) == "ENOSPC"
os.close(fd)
assert before - free() < 64 << 20, (before, free())
# In the mount's own view: the kernel has its own of a file that it could not write.
fd = os.open(f"{root}/other", os.O_CREAT | os.O_RDWR); os.write(fd, b"begin"); os.fsync(fd)
size, far = 50_000_000, 90_000_000
os.ftruncate(fd, size); assert os.fstat(fd).st_size == size
os.pwrite(fd, b"end", far); os.pwrite(fd, b"middle", far - 20_000_000); os.fsync(fd)
assert os.fstat(fd).st_size == far + 3
zeros = lambda start, end: os.pread(fd, end - start, start).count(0) == end - start
assert os.pread(fd, 9, 0) == b"begin\0\0\0\0" and os.pread(fd, 9, far) == b"end"
assert os.pread(fd, 6, far - 20_000_000) == b"middle" and zeros(5, far - 20_000_000) and zeros(far - 19_999_994, far)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
offset = lambda n: ctypes.c_longlong(n)
os.pwrite(fd, b"x" * 30_000_000, 10_000_000); os.fsync(fd)
ZERO, KEEP, PUNCH = 16, 1, 2
assert libc.fallocate(fd, ZERO | KEEP, offset(11_000_000), offset(28_000_000)) == 0, ctypes.get_errno()
assert os.pread(fd, 2, 10_999_999) == b"x\0" and os.pread(fd, 2, 38_999_999) == b"\0x" and zeros(11_000_000, 39_000_000)
assert libc.fallocate(fd, ZERO, offset(far - 1000), offset(40_000_000)) == 0, ctypes.get_errno()
assert os.fstat(fd).st_size == far - 1000 + 40_000_000 and zeros(far - 1000, far + 39_999_000)
os.close(fd)
child = os.fork()
if child == 0:
    fd = os.open(f"{root}/killed", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, min(free() // 2, 64 << 30)); os._exit(0)
while not os.path.exists(f"{root}/killed"): time.sleep(0.01)
slowest, end, n = 0, time.time() + 1, 0
while time.time() < end:
    start = time.time(); n += 1; os.path.exists(f"{root}/no{n}"); slowest = max(slowest, time.time() - start)
os.kill(child, signal.SIGKILL)
start = time.time(); status = os.waitpid(child, 0)[1]; took = time.time() - start
assert slowest < 3 and took < 10, (slowest, took)
print(status, os.stat(f"{root}/killed").st_size)
"#;
    assert_eq!(python(script, &[&volume.plain], &volume.plain), "9 0\n");
    volume.remount();
    assert_eq!(fs::metadata(volume.path("killed")).unwrap().len(), 0);
    assert_eq!(fs::metadata(volume.path("file")).unwrap().len(), 5);
}

/// Entries of the root that are not the volume's own.
fn cipher_names(volume: &Volume) -> usize {
    let names = fs::read_dir(&volume.cipher).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| !name.to_string_lossy().starts_with('.')).count()
}
