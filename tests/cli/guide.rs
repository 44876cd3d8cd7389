//! Each command in `docs/GUIDE.md` and `docs/TROUBLESHOOTING.md` is run: here, on real volumes under a keyring, a KMS and a security
//! module, or by the test that [`ELSEWHERE`] names. A command that is neither fails, and so does one that no document has any more.
//! Messages that `docs/TROUBLESHOOTING.md` explains are those of the program.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::support::document;
use crate::support::kms_server::{self, KmsServer};
use crate::support::{self, Home, eventually, python, text};

const DOCUMENTS: [&str; 2] = ["docs/GUIDE.md", "docs/TROUBLESHOOTING.md"];

/// Commands of the document that another test runs: how they begin, and the test.
const ELSEWHERE: &[(&str, &str, &str)] = &[
    ("cp systemd/", "tests/system/systemd_booted.rs", "the_document_is_followed"),
    ("install -D ", "tests/system/systemd_booted.rs", "the_document_is_followed"),
    ("install -d -m ", "tests/system/systemd_booted.rs", "the_document_is_followed"),
    ("(umask 077; ", "tests/system/systemd_booted.rs", "the_document_is_followed"),
    ("chattr +i ", "tests/system/systemd_booted.rs", "the_document_is_followed"),
    ("systemctl ", "tests/system/systemd_booted.rs", "the_document_is_followed"),
    ("journalctl ", "tests/system/systemd_booted.rs", "the_document_is_followed"),
    (
        "kmsfs init /srv/cipher --key local:/etc/kmsfs/data.toml",
        "tests/system/systemd_booted.rs",
        "the_document_is_followed",
    ),
    ("mount -t kmsfs CIPHERDIR MOUNTPOINT", "tests/mount/mount.rs", "mount_8_has_a_helper"),
    ("mount -o remount,ro MOUNTPOINT", "tests/mount/mount.rs", "mount_8_has_a_helper"),
    (
        "kmsfs umount --force MOUNTPOINT",
        "tests/mount/mounting.rs",
        "a_mount_that_another_namespace_has_is_named_and_can_be_ended",
    ),
    ("kmsfs top MOUNTPOINT", "tests/cli/observability.rs", "top_fits_a_terminal_and_leaves_it_as_it_was"),
];

/// What is run in this test, as the document has it.
const RUN: &[&str] = &[
    // Under a keyring.
    "kmsfs speed",
    "kmsfs estimate PATH",
    "kmsfs man DIR",
    "kmsfs doctor CIPHERDIR",
    "kmsfs mount /srv/cipher /srv/plain",
    "kmsfs sync MOUNTPOINT",
    "kmsfs unlock MOUNTPOINT",
    "kmsfs umount MOUNTPOINT",
    "kmsfs init CIPHERDIR",
    "rsync -aHX /srv/cipher/ /media/backup/cipher/",
    "kmsfs check /media/backup/cipher",
    "kmsfs check /media/backup/cipher --salvage /srv/rescued",
    "kmsfs mount CIPHERDIR MOUNTPOINT --audit-log FILE",
    "kmsfs mount CIPHERDIR MOUNTPOINT --metrics 127.0.0.1:9464",
    "kmsfs status --keys /srv/plain",
    "kmsfs audit verify FILE... --volume CIPHERDIR",
    "kmsfs audit show FILE... --names CIPHERDIR",
    "kmsfs check CIPHERDIR",
    "kmsfs check CIPHERDIR --salvage DIR",
    "kmsfs check CIPHERDIR --repair",
    "scripts/decrypt.py CIPHERDIR OUTDIR",
    "kmsfs export /srv/cipher /srv/restored --verify",
    "kmsfs export /srv/cipher letters/2026 ./letters",
    "kmsfs import ./photos /srv/cipher photos --verify",
    "kmsfs cat /srv/cipher letters/2026/to-anna",
    "kmsfs ls --cipher /srv/cipher",
    "kmsfs inspect /srv/cipher letters/2026/to-anna",
    "kmsfs keys list",
    "kmsfs keys rotate",
    "kmsfs keys disable local:k-a1148dfa6ba2c7ea",
    "kmsfs keys enable  local:k-a1148dfa6ba2c7ea",
    "kmsfs keys passphrase",
    "kmsfs rekey CIPHERDIR --dry-run",
    "kmsfs rekey CIPHERDIR [PATH]",
    "kmsfs rewrap CIPHERDIR --to local:KEYRING",
    "kmsfs shred CIPHERDIR PATH... --yes",
    "kmsfs forget CIPHERDIR",
    // A database of another user.
    "kmsfs init /srv/cipher",
    "mkdir -p /srv/plain",
    "kmsfs mount -o allow_other /srv/cipher /srv/plain",
    "chmod 711 /srv/plain",
    "install -d -o postgres -g postgres -m 700 /srv/plain/pgdata",
    // Under a KMS, with a keyring for recovery.
    "aws kms create-key --query KeyMetadata.KeyId --output text",
    "aws kms create-alias --alias-name alias/app-data --target-key-id KEYID",
    "kmsfs init /srv/cipher --key aws-kms:alias/app-data",
    "kmsfs doctor --policy /srv/cipher",
    "kmsfs doctor /srv/cipher",
    "kmsfs rewrap CIPHERDIR --to aws-kms:arn:aws:kms:... --dry-run",
    "kmsfs rewrap CIPHERDIR --to aws-kms:arn:aws:kms:...",
    "kmsfs recipients add CIPHERDIR local:/media/safe/recovery.toml",
    "kmsfs rewrap CIPHERDIR",
    "kmsfs recipients list CIPHERDIR",
    "kmsfs recipients remove CIPHERDIR aws-kms:arn:...",
    "kmsfs recipients remove CIPHERDIR OLDKEY",
    "kmsfs keys list --files CIPHERDIR",
    // With a security module, and with age.
    "kmsfs init /srv/cipher --key 'pkcs11:token=kms;object=app?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/kmsfs/pin'",
    "kmsfs mount /srv/cipher /srv/plain --pkcs11-module /usr/lib/softhsm/libsofthsm2.so --pkcs11-pin-file /etc/kmsfs/pin",
    "age-keygen -o recovery.txt",
    "kmsfs recipients add /srv/cipher age:age1...",
    "kmsfs rewrap /srv/cipher",
    "kmsfs mount /srv/cipher /srv/plain --age-identity recovery.txt",
];

/// A place where commands of the document are run, with what its placeholders stand for.
struct Scene {
    home: Home,
    words: Vec<(String, String)>,
}

impl Scene {
    /// A home with the paths of the document in it.
    fn new(words: &[(&str, &str)]) -> Self {
        let mut home = Home::new();
        let root = env!("CARGO_MANIFEST_DIR");
        let programs = Path::new(env!("CARGO_BIN_EXE_kmsfs")).parent().unwrap().display().to_string();
        let path = format!("{root}/.venv/bin:{programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        home.set("PATH", path);
        for place in ["srv", "srv/plain", "etc", "media"] {
            fs::create_dir(home.path(place)).unwrap();
        }
        let at = |name: &str| home.path(name).display().to_string();
        let mut all: Vec<(String, String)> =
            words.iter().map(|(word, meaning)| ((*word).to_owned(), (*meaning).to_owned())).collect();
        all.extend([
            ("/srv/".to_owned(), at("srv/")),
            ("/media/safe/".to_owned(), at("media/")),
            ("/media/backup/".to_owned(), at("media/")),
            ("/etc/kmsfs/".to_owned(), at("etc/")),
            ("CIPHERDIR".to_owned(), at("srv/cipher")),
            ("MOUNTPOINT".to_owned(), at("srv/plain")),
            ("FILE...".to_owned(), at("audit.log")),
            ("FILE".to_owned(), at("audit.log")),
            ("OUTDIR".to_owned(), at("decrypted")),
            ("PATH...".to_owned(), "letters".to_owned()),
            ("estimate PATH".to_owned(), "estimate .".to_owned()),
            ("man DIR".to_owned(), "man .".to_owned()),
            ("[PATH]".to_owned(), String::new()),
            ("local:KEYRING".to_owned(), "local:next.toml".to_owned()),
            // A port that another test does not have.
            ("127.0.0.1:9464".to_owned(), "127.0.0.1:0".to_owned()),
            ("scripts/decrypt.py".to_owned(), format!("{root}/scripts/decrypt.py")),
            (" DIR".to_owned(), format!(" {}", at("salvaged"))),
        ]);
        Self { home, words: all }
    }

    /// What a command of the document is here.
    fn meant(&self, documented: &str) -> String {
        assert!(RUN.contains(&documented), "{documented:?} is not on the list");
        self.words.iter().fold(documented.to_owned(), |text, (word, meaning)| text.replace(word, meaning))
    }

    /// Runs a command of the document, which must succeed; returns what it prints.
    fn run(&self, documented: &str) -> String {
        self.home.shell(&self.meant(documented))
    }

    /// Mounts in a way of the document, writes what later commands are for, and unmounts.
    fn mount(&self, documented: &str, mounted: impl FnOnce()) {
        self.run(documented);
        assert!(Home::is_mounted(&self.home.path("srv/plain")));
        self.home.shell("mkdir -p srv/plain/letters/2026; echo dear Anna >srv/plain/letters/2026/to-anna");
        mounted();
        self.unmount();
    }

    fn unmount(&self) {
        let plain = self.home.path("srv/plain");
        eventually("nothing uses the mount", || self.home.kmsfs(&[&"umount", &plain]).status.success());
    }
}

#[test]
fn each_command_of_the_document_is_run_by_a_test() {
    let document = DOCUMENTS.map(document::read).join("\n\n");
    let mut wrong = Vec::new();
    let mut found = BTreeSet::new();
    let begins = |text: &str| {
        ["kmsfs ", "scripts/", "systemctl ", "journalctl ", "mount -"].iter().any(|word| text.starts_with(word))
    };
    let in_sentences = document::spans(&document).into_iter().filter(|text| begins(text) && is_command(text));
    for command in document::commands(&document).into_iter().chain(in_sentences) {
        let elsewhere = ELSEWHERE.iter().find(|(beginning, ..)| command.starts_with(beginning));
        if let Some((beginning, ..)) = elsewhere {
            found.insert((*beginning).to_owned());
        } else if RUN.contains(&command.as_str()) {
            found.insert(command);
        } else if !is_mention(&command) {
            wrong.push(format!("no test runs: {command}"));
        }
    }
    let known = RUN.iter().chain(ELSEWHERE.iter().map(|(beginning, ..)| beginning));
    wrong.extend(known.filter(|text| !found.contains(**text)).map(|text| format!("not in the document: {text}")));
    for (_, file, test) in ELSEWHERE {
        if !document::read(file).contains(&format!("fn {test}(")) {
            wrong.push(format!("{file} has no test {test}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Not what the program says or how its second process is called.
fn is_command(text: &str) -> bool {
    !text.starts_with("kmsfs --attend") && !text.ends_with(" --help")
}

/// A command's name alone (`kmsfs keys provision`), with which a sentence speaks of it: it must be one of the program's.
fn is_mention(text: &str) -> bool {
    let words: Vec<_> = text.split(' ').skip(1).collect();
    text.starts_with("kmsfs ")
        && words.iter().all(|word| word.chars().all(|c| c.is_ascii_lowercase()))
        && std::process::Command::new(env!("CARGO_BIN_EXE_kmsfs"))
            .args(&words)
            .arg("--help")
            .output()
            .is_ok_and(|output| output.status.success() && text_of_usage(&output.stdout).contains(text))
}

fn text_of_usage(help: &[u8]) -> String {
    text(help).lines().filter(|line| line.starts_with("Usage: ")).collect()
}

/// Each message that the document explains stands in the sources.
#[test]
fn each_message_that_is_explained_is_one_of_the_program() {
    let mut sources = String::new();
    for path in support::walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")) {
        if path.extension().is_some_and(|kind| kind == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            // A string that goes on in the next line is one.
            sources.extend(text.split("\\\n").map(str::trim_start));
        }
    }
    let document = document::read("docs/TROUBLESHOOTING.md");
    // What programs say of an errno is the C library's.
    let of_errno = document.split("\n## ").find(|part| part.starts_with("A program on a mount fails")).unwrap();
    let ours = document.replace(of_errno, "");
    let rows = ours.lines().filter(|line| line.starts_with("| `"));
    let messages: Vec<_> = rows.flat_map(|row| document::spans(row.split(" | ").next().unwrap())).collect();
    assert!(messages.len() > 40, "{messages:?}");
    let strange: Vec<_> = messages.iter().filter(|message| !sources.contains(*message)).collect();
    assert!(strange.is_empty(), "no message of the program: {strange:?}");
}

/// From nothing to a database of a user who is not the one that mounts.
#[test]
fn the_commands_for_a_database() {
    support::needs_root();
    let scene = Scene::new(&[("-o postgres -g postgres", "-o nobody -g nogroup")]);
    scene.home.shell("chmod 755 . srv");
    scene.run("kmsfs init /srv/cipher");
    scene.run("mkdir -p /srv/plain");
    let documented = scene.meant("kmsfs mount -o allow_other /srv/cipher /srv/plain");
    let said = scene.home.shell(&format!("{documented} 2>&1"));
    assert!(said.contains("mode 0700") && said.contains("chmod 711"), "{said}");
    scene.run("chmod 711 /srv/plain");
    scene.run("install -d -o postgres -g postgres -m 700 /srv/plain/pgdata");
    let sql = "create table t (a); insert into t values (42); select a from t";
    let as_nobody = format!("cd srv/plain/pgdata && runuser -u nobody -- sqlite3 data.db '{sql}'");
    assert_eq!(scene.home.shell(&as_nobody), "42\n");
    scene.unmount();
    let said = scene.home.shell(&format!("{documented} 2>&1"));
    assert_eq!(said, "", "the mode lasts");
    let again = "cd srv/plain/pgdata && runuser -u nobody -- sqlite3 data.db 'select a from t'";
    assert_eq!(scene.home.shell(again), "42\n");
    scene.unmount();
}

#[test]
fn the_commands_for_a_keyring() {
    let mut scene = Scene::new(&[]);
    assert!(scene.run("kmsfs speed").contains("xaes-256-gcm"));
    assert!(scene.run("kmsfs estimate PATH").contains("calls"));
    scene.run("kmsfs man DIR");
    assert!(scene.home.path("man8/mount.kmsfs.8").exists() && scene.home.path("man5/kmsfs-config.5").exists());
    scene.run("kmsfs init CIPHERDIR");
    scene.run("kmsfs mount /srv/cipher /srv/plain");
    scene.run("kmsfs sync MOUNTPOINT");
    scene.home.shell("kmsfs lock srv/plain");
    scene.run("kmsfs unlock MOUNTPOINT");
    scene.run("kmsfs umount MOUNTPOINT");
    let listed: serde_json::Value = serde_json::from_str(&scene.home.shell("kmsfs keys list --json")).unwrap();
    let key = listed["keys"][0]["key"].as_str().unwrap().to_owned();
    scene.words.insert(0, ("local:k-a1148dfa6ba2c7ea".to_owned(), key.clone()));
    assert!(!scene.run("kmsfs doctor CIPHERDIR").contains("FAIL"));
    scene.mount("kmsfs mount CIPHERDIR MOUNTPOINT --audit-log FILE", || {
        scene.home.shell("sync -f srv/plain");
        assert!(scene.run("kmsfs status --keys /srv/plain").contains(&key));
    });
    assert!(scene.run("kmsfs audit verify FILE... --volume CIPHERDIR").contains("ended"));
    assert!(scene.run("kmsfs audit show FILE... --names CIPHERDIR").contains("Decrypt"));
    scene.mount("kmsfs mount CIPHERDIR MOUNTPOINT --metrics 127.0.0.1:9464", || {
        let status = scene.home.shell("kmsfs status --json srv/plain");
        let status: serde_json::Value = serde_json::from_str(&status).unwrap();
        let address = status["metrics"].as_str().unwrap().trim_start_matches("http://");
        let script = "import sys, urllib.request; print(urllib.request.urlopen('http://' + sys.argv[1].split('/')[0] + '/metrics').read().decode())";
        assert!(python(script, &[&address], Path::new("/")).contains("kmsfs_info"));
    });
    copies_without_symlinks_keep_content_alone(&scene);
    scene.run("kmsfs check CIPHERDIR");
    scene.run("kmsfs check CIPHERDIR --salvage DIR");
    scene.run("kmsfs check CIPHERDIR --repair");
    scene.run("scripts/decrypt.py CIPHERDIR OUTDIR");
    scene.run("kmsfs export /srv/cipher /srv/restored --verify");
    scene.run("kmsfs export /srv/cipher letters/2026 ./letters");
    for copy in ["decrypted/letters/2026/to-anna", "srv/restored/letters/2026/to-anna", "letters/to-anna"] {
        assert_eq!(fs::read_to_string(scene.home.path(copy)).unwrap(), "dear Anna\n", "{copy}");
    }
    scene.home.shell("mkdir photos; echo picture >photos/one");
    scene.run("kmsfs import ./photos /srv/cipher photos --verify");
    assert_eq!(scene.home.shell("kmsfs cat srv/cipher photos/one"), "picture\n");
    assert_eq!(scene.run("kmsfs cat /srv/cipher letters/2026/to-anna"), "dear Anna\n");
    assert!(scene.run("kmsfs ls --cipher /srv/cipher").contains("letters"));
    assert!(scene.run("kmsfs inspect /srv/cipher letters/2026/to-anna").contains("letters/2026/to-anna"));

    assert!(scene.run("kmsfs keys list").contains(&key));
    assert!(scene.run("kmsfs keys rotate").contains("version 2"));
    scene.run("kmsfs keys disable local:k-a1148dfa6ba2c7ea");
    let said = scene.home.refused(6, &[&"cat", &"srv/cipher", &"photos/one"]);
    assert!(said.contains("disabled"), "{said}");
    scene.run("kmsfs keys enable  local:k-a1148dfa6ba2c7ea");
    at_terminal(&scene, &scene.meant("kmsfs keys passphrase"), &["new words", "new words"]);
    scene.home.refused(7, &[&"cat", &"srv/cipher", &"photos/one"]);
    scene.home.set("KMSFS_PASSPHRASE", "new words");
    assert!(scene.run("kmsfs rekey CIPHERDIR --dry-run").contains("files"));
    scene.run("kmsfs rekey CIPHERDIR [PATH]");
    scene.run("kmsfs rewrap CIPHERDIR --to local:KEYRING");
    scene.run("kmsfs shred CIPHERDIR PATH... --yes");
    assert_eq!(scene.home.shell("kmsfs ls srv/cipher"), "photos\n");

    another_volume_in_its_place(&scene);
}

/// It is refused until the one that is remembered is forgotten.
fn another_volume_in_its_place(scene: &Scene) {
    scene.home.shell("mv srv/cipher srv/elsewhere; kmsfs init srv/other; mv srv/other srv/cipher");
    scene.home.refused(5, &[&"check", &"srv/cipher"]);
    scene.run("kmsfs forget CIPHERDIR");
    scene.run("kmsfs check CIPHERDIR");
}

/// A copy keeps all; one by a tool without symlinks has lost the names.
fn copies_without_symlinks_keep_content_alone(scene: &Scene) {
    scene.run("rsync -aHX /srv/cipher/ /media/backup/cipher/");
    scene.run("kmsfs check /media/backup/cipher");
    scene.home.shell("find media/cipher -type l -delete");
    let words = |documented| scene.meant(documented).split(' ').skip(1).map(str::to_owned).collect::<Vec<_>>();
    let refused = |documented| {
        let words = words(documented);
        scene.home.refused(13, &words.iter().map(|word| word as support::Argument<'_>).collect::<Vec<_>>())
    };
    assert!(refused("kmsfs check /media/backup/cipher").contains("damaged"));
    refused("kmsfs check /media/backup/cipher --salvage /srv/rescued");
    let rescued = scene.home.shell("cd srv/rescued/unreachable; grep -rl 'dear Anna' . | wc -l");
    assert_eq!(rescued.trim(), "1");
    scene.home.shell("rm -r media/cipher");

    if std::process::Command::new("rclone").arg("version").output().is_err() {
        println!("left out: rclone is not installed");
        return;
    }
    scene.home.shell(
        "RCLONE_CONFIG=/dev/null; export RCLONE_CONFIG
         rclone --quiet sync --links srv/cipher remote
         rclone --quiet sync --links remote media/cipher",
    );
    scene.run("kmsfs check /media/backup/cipher");
    scene.home.shell("rm -r media/cipher remote");
}

/// A mount gives out no file handles, which the kernel's NFS server would need.
#[test]
fn a_mount_has_no_file_handles() {
    const SCRIPT: &str = "import ctypes, errno, sys
libc = ctypes.CDLL(None, use_errno=True)
handle = (ctypes.c_uint * 34)(128)
failed = libc.name_to_handle_at(-100, sys.argv[1].encode(), handle, ctypes.byref(ctypes.c_int()), 0)
print(failed and errno.errorcode[ctypes.get_errno()])";
    let volume = support::Volume::new(&[]);
    fs::write(volume.path("file"), "x").unwrap();
    let said = python(SCRIPT, &[&volume.path("file")], Path::new("/"));
    assert!(["ENOTSUP\n", "EOPNOTSUPP\n"].contains(&said.as_str()), "{said}");
}

/// Runs a command at a terminal, where it asks for something as often as there are answers; it must succeed.
fn at_terminal(scene: &Scene, command: &str, answers: &[&str]) {
    const SCRIPT: &str = "import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execvp('sh', ['sh', '-c', sys.argv[1]])
said = b''
for answer in sys.argv[2:]:
    while not said.endswith(b': '):
        said += os.read(terminal, 1)
    said += b'\\n'
    os.write(terminal, answer.encode() + b'\\n')
try:
    while os.read(terminal, 100): pass
except OSError: pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))";
    let output = scene.home.command("python3").args(["-c", SCRIPT, command]).args(answers).output().unwrap();
    assert!(output.status.success(), "{command}: {}", text(&output.stderr));
}

/// Makes the volume as the document does, from the key on; returns the key's ARN.
fn under_a_key_of_aws(scene: &mut Scene, server: &KmsServer) -> String {
    if scene.home.command("aws").arg("--version").output().unwrap().status.success() {
        let key = scene.run("aws kms create-key --query KeyMetadata.KeyId --output text");
        scene.words.insert(0, ("KEYID".to_owned(), key.trim().to_owned()));
        scene.run("aws kms create-alias --alias-name alias/app-data --target-key-id KEYID");
    } else {
        println!("left out: `aws kms`, since the AWS command line is not installed");
        let alias = serde_json::json!({"AliasName": "alias/app-data", "TargetKeyId": server.create_key().id});
        server.administer("CreateAlias", &alias);
    }
    let made = scene.run("kmsfs init /srv/cipher --key aws-kms:alias/app-data");
    made.split("aws-kms:").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap().to_owned()
}

#[test]
fn the_commands_for_a_kms_and_a_keyring_for_recovery() {
    let server = KmsServer::start();
    let new = server.create_key().arn;
    let name = |arn: &str| format!("aws-kms:{arn}");
    let mut scene = Scene::new(&[("aws-kms:arn:aws:kms:...", &name(&new)), ("aws-kms:arn:...", &name(&new))]);
    server.environment().into_iter().for_each(|(name, value)| scene.home.set(name, value));
    // What the AWS command line goes by.
    scene.home.set("AWS_DEFAULT_REGION", kms_server::REGION);
    scene.home.set("AWS_ENDPOINT_URL", server.endpoint());
    let old = under_a_key_of_aws(&mut scene, &server);
    scene.words.insert(0, ("OLDKEY".to_owned(), name(&old)));
    scene.mount("kmsfs mount CIPHERDIR MOUNTPOINT --audit-log FILE", || {});
    let policy: serde_json::Value = serde_json::from_str(&scene.run("kmsfs doctor --policy /srv/cipher")).unwrap();
    assert!(policy["IamPolicy"].to_string().contains(&old), "{policy}");
    assert!(!scene.run("kmsfs doctor /srv/cipher").contains("FAIL"));
    scene.run("kmsfs rewrap CIPHERDIR --to aws-kms:arn:aws:kms:... --dry-run");
    assert!(scene.run("kmsfs keys list --files CIPHERDIR").contains(&old));
    scene.run("kmsfs rewrap CIPHERDIR --to aws-kms:arn:aws:kms:...");
    assert!(!scene.run("kmsfs keys list --files CIPHERDIR").contains(&old));

    scene.run("kmsfs recipients add CIPHERDIR local:/media/safe/recovery.toml");
    scene.run("kmsfs rewrap CIPHERDIR");
    let listed = scene.run("kmsfs recipients list CIPHERDIR");
    assert!(listed.contains(&new) && listed.contains("local:k-"), "{listed}");
    scene.home.shell(&format!("kmsfs recipients add srv/cipher {}", name(&old)));
    scene.run("kmsfs recipients remove CIPHERDIR OLDKEY");
    scene.run("kmsfs rewrap CIPHERDIR");
    scene.run("kmsfs recipients remove CIPHERDIR aws-kms:arn:...");
    drop(server);
    assert_eq!(scene.home.shell("kmsfs cat srv/cipher letters/2026/to-anna"), "dear Anna\n");
}

#[test]
fn the_commands_for_a_security_module_and_for_age() {
    const PIN: &str = "1234";
    let mut scene = Scene::new(&[]);
    let config = scene.home.path("softhsm2.conf");
    fs::create_dir(scene.home.path("tokens")).unwrap();
    fs::write(&config, format!("directories.tokendir = {}\n", scene.home.path("tokens").display())).unwrap();
    fs::write(scene.home.path("etc/pin"), PIN).unwrap();
    scene.home.set("SOFTHSM2_CONF", config);
    scene.home.shell(&format!(
        "softhsm2-util --init-token --free --label kms --pin {PIN} --so-pin {PIN}
         pkcs11-tool --module /usr/lib/softhsm/libsofthsm2.so --login --pin {PIN} --token-label kms --keygen --key-type AES:32 --label app"
    ));
    scene.run("kmsfs init /srv/cipher --key 'pkcs11:token=kms;object=app?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/kmsfs/pin'");
    scene.mount("kmsfs mount /srv/cipher /srv/plain --pkcs11-module /usr/lib/softhsm/libsofthsm2.so --pkcs11-pin-file /etc/kmsfs/pin", || {});

    scene.home.set("KMSFS_PKCS11_MODULE", "/usr/lib/softhsm/libsofthsm2.so");
    scene.home.set("KMSFS_PKCS11_PIN_FILE", scene.home.path("etc/pin"));
    scene.run("age-keygen -o recovery.txt");
    let identity = fs::read_to_string(scene.home.path("recovery.txt")).unwrap();
    let recipient = identity.lines().find_map(|line| line.strip_prefix("# public key: ")).unwrap().to_owned();
    scene.words.insert(0, ("age1...".to_owned(), recipient));
    scene.run("kmsfs recipients add /srv/cipher age:age1...");
    scene.run("kmsfs rewrap /srv/cipher");
    // After the disaster there is no module.
    scene.home.set("KMSFS_PKCS11_PIN_FILE", "");
    scene.home.set("KMSFS_PKCS11_MODULE", "");
    scene.mount("kmsfs mount /srv/cipher /srv/plain --age-identity recovery.txt", || {
        assert_eq!(scene.home.shell("cat srv/plain/letters/2026/to-anna"), "dear Anna\n");
    });
}
