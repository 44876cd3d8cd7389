//! Every exit code of the documented table, and what ends with it.

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};

use crate::support::{Home, Volume, needs_root, text};

/// Runs each line in a shell, where `k` is the program: it must end with the code before it, and say why in one line.
fn check(home: &Home, rows: &[(i32, &str)]) -> BTreeSet<i32> {
    for (code, line) in rows {
        let output = home.command("sh").args(["-c", line]).output().unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{line}: {said}");
        let told = said.lines().filter(|line| line.starts_with("kmsfs: ")).count();
        assert!(told >= 1 || *code == 0 || *code == 15, "{line} says nothing: {said}");
    }
    rows.iter().map(|(code, _)| *code).collect()
}

/// A home where `k` runs the program.
fn with_program(mut home: Home) -> Home {
    std::fs::create_dir(home.path("bin")).unwrap();
    symlink(home.program(), home.path("bin/k")).unwrap();
    home.set("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", home.path("bin").display()));
    home
}

/// A volume with a file `f`, and things that will not do.
fn scene(mut home: Home) -> Volume {
    home.set("AWS_ACCESS_KEY_ID", "test");
    home.set("AWS_SECRET_ACCESS_KEY", "test");
    let volume = Volume::in_home(home, &[], &[]);
    volume.home.shell(
        "mkdir more; echo x >plain/f; k umount plain; cp -a cipher damaged; cp -a cipher odd; cp -a cipher broken; touch file odd/stranger
         echo 'regoin = 1' >bad.toml; : >empty; chmod 600 empty; sed -i 's/lenient/strict/' broken/.kmsfs/volume.toml*
         for f in damaged/[!.]*; do printf x | dd of=$f bs=1 seek=5000 conv=notrunc 2>/dev/null; done",
    );
    volume
}

const UNMOUNTED: [(i32, &str); 57] = [
    (0, "k ls cipher f"),
    (1, "k ls cipher nope"),
    (1, "k cat cipher nope"),
    (1, "k cat cipher f/x"),
    (1, "k export cipher nope out"),
    (1, "k rekey cipher nope"),
    (1, "k rekey cipher f/x"),
    (1, "k rewrap cipher nope"),
    (1, "k shred cipher nope --yes"),
    (1, "k import file cipher nope/x"),
    (2, "k mount cipher plain --config /nope"),
    (2, "KMSFS_CONFIG=/nope k ls cipher"),
    (2, "k ls cipher --config bad.toml"),
    (2, "k mount cipher plain --key-max-age 1x"),
    (2, "KMSFS_KMS_ATTEMPT_TIMEOUT=fast k ls cipher"),
    (2, "k mount cipher plain -o sneaky"),
    (2, "k ls cipher .."),
    (2, "k rekey cipher ../x"),
    (2, "k rewrap cipher ../x"),
    (2, "k shred cipher f"),
    (2, "k init new --key local:/etc/passwd"),
    (2, "k init new --key gpg:me"),
    (3, "k mount nope plain"),
    (3, "k ls nope"),
    (3, "k ls nope 2>/dev/full; c=$?; echo 'kmsfs: it ended' >&2; exit $c"),
    (3, "k estimate nope"),
    (3, "k check nope cipher"),
    (3, "k check cipher nope"),
    (3, "k init nope/a/b"),
    (3, "k mount --init nope/a/b plain"),
    (3, "k init file"),
    (3, "k rekey more"),
    (4, "k mount broken plain"),
    (4, "k ls broken"),
    (5, "k mount cipher plain --volume-id 00112233-4455-6677-8899-aabbccddeeff"),
    (5, "k mount cipher plain --expect-key local:k-0000000000000000"),
    (5, "k mount --init --expect-key local:k-0000000000000000 new plain"),
    (5, "k mount --init --key local:keys/of/mine.toml --volume-id 00112233-4455-6677-8899-aabbccddeeff new plain"),
    (6, "k ls cipher --keyring nope.toml"),
    (7, "k ls cipher --passphrase-file nope"),
    (7, "k init new --key local:new.toml --passphrase-file empty"),
    (8, "k init new --key aws-kms:alias/x --region us-east-1 --endpoint-url http://127.0.0.1:1"),
    (9, "k mount cipher nope"),
    (9, "k mount cipher file"),
    (9, "k mount cipher bin"),
    (9, "k mount --init new nope"),
    (12, "k umount plain"),
    (12, "k status plain"),
    (12, "k lock /proc"),
    (12, "k sync plain"),
    (12, "k mount cipher plain -o remount,ro"),
    (13, "k cat damaged f"),
    (14, "k mount cipher plain --log-file nope/x.log"),
    (14, "k mount --init --audit-log nope/x new plain"),
    (14, "k man nope"),
    (15, "k check odd"),
    (0, "k check cipher"),
];

const MOUNTED: [(i32, &str); 7] = [
    (11, "k mount cipher plain"),
    (11, "k mount cipher more"),
    (11, "k shred cipher f --yes"),
    (11, "k import file cipher file"),
    (11, "k check --repair cipher"),
    (9, "k mount odd plain"),
    (0, "k status plain"),
];

/// Of the table in the help.
fn documented(home: &Home) -> BTreeSet<i32> {
    let help = home.ok(&[&"--help"]);
    let (_, table) = help.split_once("Exit codes:\n").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    table.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

#[test]
fn each_command_line_ends_with_the_code_of_the_table() {
    needs_root();
    let volume = scene(with_program(Home::new()));
    let home = &volume.home;
    let mut seen = check(home, &UNMOUNTED);
    assert!(!home.path("new").exists() && !home.path("keys").exists(), "what failed left something behind");
    volume.mount();
    seen.extend(check(home, &MOUNTED));
    volume.unmount();
    // A disk that is full, and a system without FUSE.
    home.shell("mkdir full; mount -t tmpfs -o size=8k none full; head -c 8192 /dev/zero >full/zeros");
    seen.extend(check(
        home,
        &[
            (14, "k init new --key local:full/keyring.toml"),
            (14, "k rewrap cipher --to local:full/keyring.toml"),
            (10, "unshare -m sh -c 'mount -t tmpfs none /dev; k mount cipher plain'"),
            (10, "unshare -m sh -c 'mount -t tmpfs none /dev; k demo'"),
        ],
    ));
    assert!(!home.path("new").exists());
    seen.insert(at_the_prompt(home));
    assert_eq!(seen, documented(home));
}

/// What Ctrl-C at a passphrase prompt ends with.
fn at_the_prompt(home: &Home) -> i32 {
    const SCRIPT: &str = "import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execvp(sys.argv[1], sys.argv[1:])
said = b''
while not said.endswith(b': '):
    said += os.read(terminal, 1)
os.write(terminal, b'\\x03')
try:
    while os.read(terminal, 100): pass
except OSError: pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))";
    let arguments = ["k", "init", "new", "--key", "local:new.toml", "--passphrase"];
    home.command("python3").args(["-c", SCRIPT]).args(arguments).output().unwrap().status.code().unwrap()
}

#[test]
fn an_ordinary_user_is_told_of_what_is_anothers() {
    needs_root();
    let volume = scene(with_program(Home::of_nobody()));
    let home = &volume.home;
    let closed = home.path("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o755)).unwrap();
    check(home, &[(9, "k mount cipher closed"), (9, "k mount --init --key local:keys.toml new closed")]);
    let lets_others = std::fs::read_to_string("/etc/fuse.conf")
        .unwrap_or_default()
        .lines()
        .any(|line| line.trim() == "user_allow_other");
    if !lets_others {
        check(home, &[(2, "k mount --init --key local:keys.toml -o allow_other new plain")]);
    }
    check(home, &[(2, "k mount --init --key local:keys.toml -o lowlatency new plain")]);
    assert!(!home.path("new").exists() && !home.path("keys.toml").exists());
    let of_root = Volume::new(&[]);
    let place = of_root.plain.display();
    // Others must get to the mount point.
    std::fs::set_permissions(of_root.home.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    for command in ["status", "umount", "lock"] {
        let said = home.refused(1, &[&command, &of_root.plain]);
        assert!(said.contains(&format!("{place} is a mount of user 0")), "{said}");
    }
    assert!(Home::is_mounted(&of_root.plain));
}
