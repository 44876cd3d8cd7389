//! `kmsfs keys` on a local keyring: rotating, disabling and enabling keys beside a mount, another passphrase, and what of the
//! keys files still need.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{Argument, Home, Volume, errno, eventually, text};
use rustix::process::Signal;
use serde_json::{Value, json};

fn json_of(home: &Home, arguments: &[Argument<'_>]) -> Value {
    serde_json::from_str(&home.ok(arguments)).unwrap()
}

/// The only key of the default keyring.
fn key(home: &Home) -> String {
    json_of(home, &[&"keys", &"list", &"--json"])["keys"][0]["key"].as_str().unwrap().to_owned()
}

/// Files by version of the first key of a volume.
fn files_by_version(found: &Value) -> Vec<(u64, u64)> {
    let versions = found["keys"][0]["versions"].as_array().unwrap();
    versions.iter().map(|v| (v["version"].as_u64().unwrap(), v["files"].as_u64().unwrap())).collect()
}

/// Nobody believes that a passphrase protects a keyring which has none.
#[test]
fn a_passphrase_that_protects_nothing_is_refused() {
    let home = Home::new();
    let made = home.kmsfs(&[&"init", &"first"]);
    assert!(made.status.success() && text(&made.stdout).lines().count() == 1, "{made:?}");
    let said = text(&made.stderr);
    let keyring = home.path("data/kmsfs/keyring.toml");
    assert!(said.contains(keyring.to_str().unwrap()) && said.contains("without a passphrase"), "{said}");
    assert!(said.ends_with("mount it: kmsfs mount first MOUNTPOINT\n"), "{said}");
    home.secret("pw", "secret");
    let said = home.refused(7, &[&"init", &"second", &"--passphrase-file", &"pw"]);
    assert!(said.contains("has no passphrase") && said.contains("kmsfs keys passphrase --keyring"), "{said}");
    assert!(!home.path("second").exists());
    for variable in ["KMSFS_PASSPHRASE", "KMSFS_PASSPHRASE_FILE"] {
        let run =
            home.command(home.program()).args(["init", "third", "--key", "local:new.toml"]).env(variable, "").output();
        let run = run.unwrap();
        assert_eq!(run.status.code(), Some(7), "{variable}");
        assert!(text(&run.stderr).contains(variable), "{}", text(&run.stderr));
        assert!(!home.path("third").exists() && !home.path("new.toml").exists());
    }
    let made = home.kmsfs(&[&"init", &"sealed", &"--key", &"local:sealed.toml", &"--passphrase-file", &"pw"]);
    let said = text(&made.stderr);
    assert!(made.status.success() && said.contains("(new, under the passphrase)"), "{said}");
    home.ok(&[&"init", &"again", &"--key", &"local:sealed.toml", &"--passphrase-file", &"pw"]);
}

#[test]
fn a_rotated_key_wraps_what_is_new_and_opens_what_is_old() {
    let volume = Volume::in_home(Home::new(), &[], &["--key-max-age", "1"]);
    let home = &volume.home;
    for name in ["a", "b", "c"] {
        fs::write(volume.path(name), name).unwrap();
    }
    volume.home.shell("sync -f plain");
    assert_eq!(home.ok(&[&"keys", &"rotate"]), format!("{} version 2\n", key(home)));
    // Keys that were made ahead for new files are of the old version: there are none with a local keyring.
    fs::write(volume.path("new"), "new").unwrap();
    volume.home.shell("sync -f plain");
    let found = json_of(home, &[&"status", &"--keys", &"--json", &volume.plain]);
    assert_eq!(files_by_version(&found), [(1, 3), (2, 1)], "while it is mounted: {found:#}");
    assert_eq!(found["keys"][0]["files"], 4);
    assert_eq!(json_of(home, &[&"keys", &"list", &"--files", &"--json", &volume.cipher]), found);
    volume.remount();
    for name in ["a", "new"] {
        assert_eq!(fs::read_to_string(volume.path(name)).unwrap(), name);
    }
    volume.unmount();
    home.ok(&[&"check", &volume.cipher]);
    let say = |due_after: &str| {
        json_of(home, &[&"keys", &"list", &"--json", &"--due-after", &due_after])["keys"][0]["rotation"].clone()
    };
    assert_eq!(say("30"), "due in 30 days");
    let keyring = home.path("data/kmsfs/keyring.toml");
    let old = fs::read_to_string(&keyring).unwrap();
    let aged: Vec<String> = old
        .lines()
        .map(|line| if line.starts_with("created") { "created = 86400".into() } else { line.to_owned() })
        .collect();
    fs::write(&keyring, aged.join("\n") + "\n").unwrap();
    assert!(say("30").as_str().unwrap().starts_with("due: the newest version is "), "{}", say("30"));
}

#[test]
fn a_disabled_key_stops_a_mount_and_an_enabled_one_goes_on() {
    let volume = Volume::in_home(Home::new(), &[], &["--key-max-age", "1"]);
    let home = &volume.home;
    fs::write(volume.path("file"), "content").unwrap();
    volume.home.shell("sync -f plain");
    let key = key(home);
    assert_eq!(home.ok(&[&"keys", &"disable", &key]), "");
    assert_eq!(json_of(home, &[&"keys", &"list", &"--json"])["keys"][0]["state"], "disabled");
    let began = Instant::now();
    eventually("the file stops", || errno(fs::read(volume.path("file"))) == Some(libc::EKEYREVOKED));
    assert!(began.elapsed() < Duration::from_secs(10), "within the age of keys and a little");
    assert_eq!(home.ok(&[&"keys", &"enable", &key]), "");
    eventually("the file is back", || fs::read(volume.path("file")).is_ok_and(|content| content == b"content"));
    home.ok(&[&"keys", &"disable", &key]);
    volume.unmount();
    assert!(home.refused(6, &volume.mount_arguments()).contains("disabled"));
}

#[test]
fn a_keyring_gets_another_passphrase_and_none() {
    let mut home = Home::new();
    home.secret("old", "old\n");
    home.secret("new", "new\n");
    home.secret("empty", "\n");
    home.set("KMSFS_PASSPHRASE_FILE", home.path("old"));
    let volume = Volume::in_home(home, &[], &[]);
    fs::write(volume.path("file"), "content").unwrap();
    volume.unmount();
    let Volume { mut home, cipher, .. } = volume;
    let keyring = home.path("data/kmsfs/keyring.toml");
    let (old, new, empty) = (home.path("old"), home.path("new"), home.path("empty"));
    let before = fs::read(&keyring).unwrap();
    let change = |to: &Path| -> Vec<String> {
        ["keys", "passphrase", "--new-passphrase-file", to.to_str().unwrap()].map(str::to_owned).to_vec()
    };
    let refused = |home: &Home, arguments: Vec<String>| {
        let arguments: Vec<Argument<'_>> = arguments.iter().map(|argument| argument as Argument<'_>).collect();
        home.refused(7, &arguments);
        assert_eq!(fs::read(&keyring).unwrap(), before, "it is as it was");
    };
    refused(&home, change(&empty));
    refused(&home, change(Path::new("/nonexistent")));
    home.set("KMSFS_PASSPHRASE_FILE", &new);
    refused(&home, change(&new));
    home.set("KMSFS_PASSPHRASE_FILE", &old);
    home.ok(&[&"keys", &"rotate"]);
    home.ok(&[&"keys", &"passphrase", &"--new-passphrase-file", &new]);
    home.refused(7, &[&"cat", &cipher, &"file"]);
    home.set("KMSFS_PASSPHRASE_FILE", &new);
    assert_eq!(home.ok(&[&"cat", &cipher, &"file"]), "content");
    home.ok(&[&"keys", &"passphrase", &"--remove"]);
    assert!(fs::read_to_string(&keyring).unwrap().contains("material"));
    assert_eq!(home.ok(&[&"cat", &cipher, &"file"]), "content");
    assert_eq!(fs::read_dir(keyring.parent().unwrap()).unwrap().count(), 2, "the keyring and known-volumes.toml");
}

#[test]
fn what_cannot_be_changed_is_said() {
    let home = Home::new();
    home.ok(&[&"init", &home.path("cipher")]);
    let key = key(&home);
    let says = |code, arguments: &[Argument<'_>], words: &str| {
        let said = home.refused(code, arguments);
        assert!(said.contains(words), "{said}");
    };
    says(6, &[&"keys", &"disable", &"k-0000000000000000"], "only k-");
    says(6, &[&"keys", &"rotate", &"nothing"], "no key \"nothing\" here");
    says(6, &[&"keys", &"rotate", &"--keyring", &home.path("none")], "does not exist");
    says(2, &[&"keys", &"rotate", &key, &"--new-key"], "cannot be used with");
    says(2, &[&"keys", &"list", &"--files"], "CIPHERDIR");
    home.ok(&[&"keys", &"disable", &key]);
    says(6, &[&"keys", &"rotate"], "every key is disabled");
    says(6, &[&"keys", &"rotate", &key], "disabled: enable it first");
    let keyring = home.path("data/kmsfs/keyring.toml");
    let genuine = fs::read_to_string(&keyring).unwrap();
    fs::write(&keyring, genuine.replace("[[key]]", "key = [")).unwrap();
    says(2, &[&"keys", &"enable", &key], "malformed");
    home.shell("chmod 644 data/kmsfs/keyring.toml");
    says(2, &[&"keys", &"list"], "chmod 600");
    let mut home = Home::new();
    home.set("HOME", "");
    home.set("XDG_DATA_HOME", "");
    if rustix::process::geteuid().is_root() {
        assert!(home.refused(6, &[&"keys", &"list"]).contains("/var/lib/kmsfs"));
    }
}

#[test]
fn a_killed_change_leaves_the_old_keyring_or_the_new_one() {
    let home = Home::new();
    home.ok(&[&"init", &home.path("cipher")]);
    let versions = || json_of(&home, &[&"keys", &"list", &"--json"])["keys"][0]["versions"].as_array().unwrap().len();
    let mut before = versions();
    for round in 0..40_u64 {
        let mut running = home.start("rotate", &[&"keys", &"rotate"]);
        std::thread::sleep(Duration::from_micros(round * 500));
        if running.runs() {
            running.signal(Signal::KILL);
        }
        running.status();
        let after = versions();
        assert!(after == before || after == before + 1, "{before} {after}");
        before = after;
    }
    home.ok(&[&"keys", &"rotate"]);
    let left =
        fs::read_dir(home.path("data/kmsfs")).unwrap().map(|entry| text(entry.unwrap().file_name().as_encoded_bytes()));
    let mut left: Vec<_> = left.collect();
    left.sort();
    assert_eq!(left, ["keyring.toml", "known-volumes.toml"]);
    let found = json_of(&home, &[&"keys", &"list", &"--files", &"--json", &home.path("cipher")]);
    assert_eq!(found["keys"][0]["files"], json!(0));
}

#[test]
fn a_mount_is_locked_although_a_write_is_lost() {
    let volume = Volume::in_home(Home::new(), &[], &["--key-max-age", "1"]);
    let mut file = fs::File::create(volume.path("file")).unwrap();
    file.write_all(&[b'a'; 4096]).unwrap();
    file.sync_all().unwrap();
    let key = volume.status()["wrapping_key"].as_str().unwrap().to_owned();
    volume.home.ok(&[&"keys", &"disable", &key]);
    std::thread::sleep(Duration::from_secs(2));
    file.write_all(&[b'b'; 8192]).unwrap();
    let said = volume.home.refused(14, &[&"lock", &volume.plain]);
    assert!(said.contains("is locked, and not all that was written to it is stored"), "{said}");
    assert_eq!(volume.status()["locked"], json!(true));
    // The keyring gives the key again, and the mount stays locked.
    volume.home.ok(&[&"keys", &"enable", &key]);
    std::thread::sleep(Duration::from_secs(2));
    let failed = fs::read(volume.path("file")).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::ENOKEY), "{failed}");
}

/// Runs a command in a terminal of its own. `ahead` is typed before anything is asked, and each answer when the prompt is there. Returns the exit code, and what the terminal showed.
fn at_terminal(home: &Home, command: &str, ahead: &str, answers: &[&str]) -> (i32, String) {
    const SCRIPT: &str = "import os, pty, select, sys, time
pid, terminal = pty.fork()
if pid == 0:
    if sys.argv[2]: time.sleep(0.3)
    os.execvp('sh', ['sh', '-c', sys.argv[1]])
if sys.argv[2]: os.write(terminal, sys.argv[2].encode())
said, end, waiting = b'', time.time() + 60, sys.argv[3:]
try:
    while time.time() < end:
        if not select.select([terminal], [], [], 1)[0]: continue
        said += os.read(terminal, 1)
        if waiting and said.endswith(b': '):
            os.write(terminal, waiting.pop(0).encode() + b'\\n')
except OSError: pass
sys.stdout.buffer.write(said)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))";
    let path = format!("PATH={}:$PATH; {command}", home.program().parent().unwrap().display());
    let output = home.command("python3").args(["-c", SCRIPT, &path, ahead]).args(answers).output().unwrap();
    (output.status.code().unwrap(), text(&output.stdout))
}

#[test]
fn a_sealed_keyring_is_asked_for_at_a_terminal_by_its_name() {
    let mut home = Home::new();
    home.set("KMSFS_PASSPHRASE", "open sesame");
    let volume = Volume::in_home(home, &["--key", "local:sealed.toml"], &[]);
    fs::write(volume.path("file"), "content").unwrap();
    volume.unmount();
    let Volume { mut home, .. } = volume;
    home.unset("KMSFS_PASSPHRASE");
    let prompt = format!("Passphrase of the keyring {}: ", home.path("sealed.toml").display());
    for command in ["kmsfs cat cipher file", "kmsfs doctor cipher", "kmsfs keys list --keyring $PWD/sealed.toml"] {
        let (code, said) = at_terminal(&home, command, "", &["open sesame"]);
        assert!(code == 0 && said.contains(&prompt) && !said.contains("sesame"), "{command}: {code} {said}");
        assert_eq!(at_terminal(&home, command, "", &["wrong"]).0, 7, "{command}");
        let (code, said) = at_terminal(&home, command, "", &[""]);
        assert!(code == 7 && said.contains("is empty"), "{command}: {said}");
    }
    let (code, said) =
        at_terminal(&home, "kmsfs mount cipher plain && cat plain/file && kmsfs umount plain", "", &["open sesame"]);
    assert!(code == 0 && said.contains("content"), "{said}");
    // Nobody is asked in vain.
    let (code, said) = at_terminal(&home, "kmsfs mount cipher missing", "", &[]);
    assert!(code == 9 && said.contains("mkdir -p") && !said.contains(&prompt), "{said}");
    // Input typed ahead counts, before the prompt and after it.
    let (code, said) =
        at_terminal(&home, "kmsfs cat cipher file; read line; echo next: $line", "open sesame\nmore\n", &[]);
    assert!(code == 0 && said.contains("content") && said.contains("next: more"), "{said}");

    // Nobody is asked without a terminal, and the message names what a person would want.
    let said = home.refused(7, &[&"cat", &"cipher", &"file"]);
    assert!(said.contains("--passphrase, --passphrase-file") && said.contains("sealed.toml"), "{said}");
    let (code, said) = at_terminal(&home, "kmsfs cat cipher file </dev/null", "", &[]);
    assert!(code == 7 && !said.contains("Passphrase"), "{said}");
    // Nor where another key does.
    home.set("KMSFS_PASSPHRASE", "open sesame");
    home.ok(&[&"init", &"both", &"--key", &"local:sealed.toml"]);
    home.secret("pw", "open sesame");
    home.shell("cp -p sealed.toml open.toml");
    home.ok(&[&"keys", &"passphrase", &"--remove", &"--keyring", &"open.toml"]);
    home.ok(&[&"keys", &"rotate", &"--new-key", &"--keyring", &"open.toml"]);
    home.unset("KMSFS_PASSPHRASE");
    let (code, said) = at_terminal(&home, "kmsfs recipients add both local:open.toml", "", &["open sesame"]);
    assert!(code == 0 && said.contains(&prompt), "{said}");
    let (code, said) = at_terminal(&home, "kmsfs ls both", "", &[]);
    assert!(code == 0 && !said.contains("Passphrase"), "{said}");
}

#[test]
fn a_passphrase_file_is_its_owners_alone_and_descriptors_go_on_working() {
    let home = Home::new();
    home.secret("pw", "open sesame\n");
    home.ok(&[&"init", &"cipher", &"--passphrase-file", &"pw"]);
    let run =
        |script: &str| home.shell(&format!("PATH={}:$PATH; {script}", home.program().parent().unwrap().display()));
    run("kmsfs ls cipher --passphrase-file - <pw");
    run("kmsfs ls cipher --passphrase-file /dev/stdin <pw");
    run("cat pw | kmsfs ls cipher --passphrase-file /dev/stdin");
    run("bash -c 'kmsfs ls cipher --passphrase-file <(cat pw)'");
    run("KMSFS_PASSPHRASE_FILE=pw kmsfs ls cipher");
    run("ln -s pw link; kmsfs ls cipher --passphrase-file link");
    for mode in ["644", "640", "604"] {
        run(&format!("chmod {mode} pw"));
        let said = home.refused(7, &[&"ls", &"cipher", &"--passphrase-file", &"pw"]);
        assert!(said.contains(&format!("has mode 0{mode}")) && said.contains("chmod 600 pw"), "{said}");
        home.refused(7, &[&"ls", &"cipher", &"--passphrase-file", &"link"]);
        // The shell has opened it.
        run("kmsfs ls cipher --passphrase-file /dev/stdin <pw");
    }
}
