//! What GUIDE says of services on a mount: databases whose key goes away, and podman's containers.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};

use crate::support::{Home, Volume, needs_root, python, text};

const PROGRAM: &str = env!("CARGO_BIN_EXE_kmsfs");

/// Whether all these programs can be run; says what is left out if not.
fn have(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| Command::new(program).arg("--version").output().is_err());
    if let Some(missing) = missing {
        println!("left out: {missing} is not installed");
    }
    missing.is_none()
}

/// Has SQLite write under this journal mode while the mount is locked, and after it.
fn write_while_locked(volume: &Volume, mode: &str) -> Output {
    const SCRIPT: &str = "import sqlite3, subprocess, sys
program, plain, mode = sys.argv[1:]
base = sqlite3.connect(plain + '/base', timeout=2, isolation_level=None)
base.execute('pragma journal_mode=' + mode)
base.execute('create table t (a)')
base.execute('insert into t values (1)')
subprocess.run([program, 'lock', plain], check=True)
try:
    base.execute('insert into t values (2)')
except sqlite3.OperationalError as error:
    print(error)
subprocess.run([program, 'unlock', plain], check=True)
base.execute('insert into t values (3)')";
    volume.home.command("python3").args(["-c", SCRIPT, PROGRAM]).arg(&volume.plain).arg(mode).output().unwrap()
}

fn rows(volume: &Volume) -> String {
    const SCRIPT: &str = "import sqlite3, sys
base = sqlite3.connect(sys.argv[1])
assert base.execute('pragma integrity_check').fetchall() == [('ok',)]
print([a for a, in base.execute('select a from t')])";
    python(SCRIPT, &[&volume.path("base")], &volume.plain)
}

#[test]
fn sqlite_reports_errors_while_a_mount_is_locked_and_goes_on() {
    let volume = Volume::new(&[]);
    let output = write_while_locked(&volume, "delete");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "disk I/O error\n");
    assert_eq!(rows(&volume), "[1, 3]\n");
}

#[test]
fn sqlite_with_a_mapped_file_is_ended_and_what_it_committed_is_there() {
    let volume = Volume::new(&[]);
    let output = write_while_locked(&volume, "wal");
    let bus = [Some(libc::SIGBUS), Some(128 + libc::SIGBUS)];
    assert!(bus.contains(&output.status.signal()) || bus.contains(&output.status.code()), "{output:?}");
    volume.home.ok(&[&"unlock", &volume.plain]);
    assert_eq!(rows(&volume), "[1]\n");
}

#[test]
fn redis_refuses_until_it_is_told_to_go_on() {
    if !have(&["redis-server", "redis-cli"]) {
        return;
    }
    let volume = Volume::in_home(Home::new(), &[], &["--key-max-age", "2"]);
    let script = format!(
        "mkdir plain/redis
         redis-server --port 0 --unixsocket $PWD/socket --dir $PWD/plain/redis --appendonly yes --save '' >log 2>&1 & server=$!
         trap 'kill $server; wait $server' EXIT
         cli() {{ redis-cli -s $PWD/socket \"$@\"; }}
         until_says() {{ for try in $(seq 300); do cli set a 1 >/dev/null || :; case $(cli ping) in \"$1\"*) return;; esac; sleep 0.1; done; cat log; false; }}
         until_says PONG
         key=$({PROGRAM} keys list --json | sed 's/.*\"key\":\"\\([^\"]*\\)\".*/\\1/')
         {PROGRAM} keys disable $key; until_says MISCONF
         {PROGRAM} keys enable $key; sleep 4; cli ping | head -c 7; echo
         cli config set appendonly no; cli ping; cli config set appendonly yes; sleep 2; cli set b 1; sleep 2; cli ping
         cli config set appendfsync always
         {PROGRAM} lock plain || :; cli set c 1 || :
         for try in $(seq 100); do kill -0 $server 2>/dev/null || break; sleep 0.1; done
         {PROGRAM} unlock plain; trap - EXIT; wait $server || echo ended"
    );
    assert_eq!(volume.home.shell(&script).trim_end(), "MISCONF\nOK\nPONG\nOK\nOK\nPONG\nOK\nended");
}

/// Without control groups, which the machine of a test may not give: they are no matter of the mount.
#[test]
fn podman_keeps_its_storage_on_a_mount() {
    needs_root();
    if !have(&["podman", "crun", "busybox"]) {
        return;
    }
    let volume = Volume::in_home(Home::new(), &[], &["-o", "suid,dev,allow_other,noatime"]);
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(1024);
    let script = format!(
        "exec 2>&1
         mount -t cgroup2 none /sys/fs/cgroup
         mkdir -p base/bin base/etc/d; cp $(command -v busybox) base/bin/busybox; ln -s busybox base/bin/sh
         echo lower >base/etc/f; echo deep >base/etc/d/x; tar -C base -cf base.tar .
         pod() {{ podman --root $PWD/plain/storage --runroot $PWD/podman --storage-driver overlay --cgroup-manager cgroupfs \"$@\"; }}
         echo word >pw; pod import -q base.tar base >/dev/null; pod secret create pw pw >/dev/null
         run() {{ pod run --rm --runtime crun --cgroups=disabled --network=none --ulimit nofile={limit}:{limit} --ulimit nproc=999:999 \"$@\"; }}
         run base busybox sh -c 'busybox rm /etc/f; busybox mv /etc/d /etc/e; busybox cat /etc/e/x; busybox ls /etc/f'  || :
         for mode in '' ,mode=0400; do run --secret pw$mode base busybox stat -L -c %a /run/secrets/pw; done
         printf 'FROM localhost/base\\nRUN busybox mv /etc/d /etc/e && busybox rm /etc/f\\n' >Containerfile
         pod build -q --isolation chroot -t built . >/dev/null; pod run --rm --cgroups=disabled --network=none --ulimit nofile={limit}:{limit} --ulimit nproc=999:999 built busybox cat /etc/e/x
         umount plain/storage/overlay 2>/dev/null || :"
    );
    let output = volume.home.command("unshare").args(["-m", "--propagation", "private", "sh", "-c", &script]).output();
    let said = text(&output.unwrap().stdout);
    assert_eq!(said, "deep\nls: /etc/f: No such file or directory\n444\n400\ndeep\n");
    volume.remount();
    volume.home.ok(&[&"check", &volume.cipher]);
}
