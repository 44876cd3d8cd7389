//! The units under a real systemd, which a test boots (`support/booted.rs`): what `docs/GUIDE.md` says of them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::support::booted::Booted;
use crate::support::document;
use crate::support::fault_proxy::{Fault, FaultProxy};
use crate::support::kms_server::KmsServer;

/// Makes volumes `/srv/NAME` under keyrings with a passphrase, and configures their units, as an administrator does.
fn volumes(system: &Booted, names: &[&str]) {
    for name in names {
        system.ok(&format!(
            "install -d -m 700 /etc/kmsfs
             printf 'secret of {name}' >/etc/kmsfs/{name}.passphrase
             chmod 600 /etc/kmsfs/{name}.passphrase
             kmsfs init /srv/{name} --key local:/etc/kmsfs/{name}.toml --passphrase-file /etc/kmsfs/{name}.passphrase
             mkdir /srv/{name}-plain
             printf 'CIPHERDIR=/srv/{name}\\nMOUNTPOINT=/srv/{name}-plain\\n' >/etc/kmsfs/{name}.conf"
        ));
        let credential = format!(
            "LoadCredential=passphrase:/etc/kmsfs/{name}.passphrase\nEnvironment=KMSFS_PASSPHRASE_FILE=%d/passphrase"
        );
        drop_in(system, name, "passphrase", &credential);
    }
}

/// Adds lines to the unit of a volume.
fn drop_in(system: &Booted, name: &str, what: &str, lines: &str) {
    let directory = format!("/etc/systemd/system/kmsfs@{name}.service.d");
    fs::create_dir_all(system.path(&directory)).unwrap();
    fs::write(system.path(&format!("{directory}/{what}.conf")), format!("[Service]\n{lines}\n")).unwrap();
    system.ok("systemctl daemon-reload");
}

fn is_mounted(system: &Booted, path: &str) -> bool {
    system.run(&format!("mountpoint -q {path}")).status.success()
}

/// The commands of `docs/GUIDE.md` for systemd, one after the other, with the files that it shows.
#[test]
fn the_document_is_followed() {
    let Some(system) = Booted::start("rm etc/systemd/system/kmsfs*; cp -r \"$UNITS\" opt/systemd") else { return };
    let document = document::read("docs/GUIDE.md");
    let files = document::blocks(&document).into_iter().find(|block| block.language == "ini").unwrap();
    for file in files.lines.join("\n").split("# ").skip(1) {
        let (name, content) = file.split_once('\n').unwrap();
        fs::write(system.path(&format!("/opt/{name}")), content).unwrap();
    }
    let ours = [
        "cp systemd/",
        "install -D",
        "install -d -m ",
        "(umask 077; ",
        "chattr +i ",
        "systemctl ",
        "journalctl ",
        "kmsfs init /srv/cipher --key local:/etc/kmsfs/data.toml",
    ];
    let commands = document::commands(&document);
    let commands = commands.iter().filter(|command| ours.iter().any(|beginning| command.starts_with(beginning)));
    let said: Vec<String> = commands.map(|command| system.ok(&format!("cd /opt; {command}"))).collect();
    assert!(said.len() >= 10, "{said:?}");
    system.ok("echo x >/srv/plain/x");
    // Nothing is written into it while nothing is mounted, by whomever modes hold.
    system.fails("systemctl stop kmsfs@data; setpriv --reuid 1 --clear-groups touch /srv/plain/y");
    system.ok("systemctl start kmsfs@data; grep -qx x /srv/plain/x");
    assert!(said.last().unwrap().contains("\"KMSFS_MOUNTPOINT\":\"/srv/plain\""), "{said:?}");
    // What sentences have.
    assert_eq!(system.ok("systemctl show -p ExecMainStatus kmsfs@data"), "ExecMainStatus=0\n");
    assert_eq!(system.journal("-p err -u kmsfs@data"), "");
}

#[test]
fn a_unit_is_up_when_its_mount_can_be_used_and_what_is_written_survives() {
    let Some(system) = Booted::start("") else { return };
    volumes(&system, &["data"]);
    system.ok("systemctl start kmsfs@data; echo first >/srv/data-plain/first");
    assert_eq!(system.property("kmsfs@data", "StatusText"), "mounted at /srv/data-plain");
    // Everybody sees the mount: the service has no namespace of its own.
    let namespaces =
        system.ok("readlink /proc/1/ns/mnt; readlink /proc/$(systemctl show --value -p MainPID kmsfs@data)/ns/mnt");
    assert_eq!(namespaces.lines().next(), namespaces.lines().last());
    let status = system.ok("kmsfs status /srv/data-plain");
    assert!(status.contains("sandbox system calls: on"), "{status}");

    // Stopped, it is unmounted, and all that was written is in the cipher directory, synced or not.
    system.ok("dd if=/dev/urandom of=/srv/data-plain/large bs=1M count=20 status=none
               sha256sum </srv/data-plain/large >/opt/sum; systemctl stop kmsfs@data");
    assert!(!is_mounted(&system, "/srv/data-plain"));
    assert_eq!(system.property("kmsfs@data", "ActiveState"), "inactive");
    assert_eq!(system.property("kmsfs@data", "Result"), "success");
    system.ok("kmsfs check /srv/data --passphrase-file /etc/kmsfs/data.passphrase
               systemctl start kmsfs@data; sha256sum </srv/data-plain/large | cmp - /opt/sum; grep -qx first /srv/data-plain/first");

    // While a program has a file open, stopping waits for it; it loses nothing.
    system.ok("exec 3>/srv/data-plain/open; echo before >&3; systemctl stop --no-block kmsfs@data
         while mountpoint -q /srv/data-plain; do sleep 0.05; done
         systemctl show --value -p ActiveState kmsfs@data | grep -qx deactivating; echo after >&3; exec 3>&-");
    system.wait_for("kmsfs@data", "ActiveState", "inactive");
    assert_eq!(system.property("kmsfs@data", "Result"), "success");
    assert!(system.journal("-u kmsfs@data -p warning -o cat").contains("/srv/data-plain is in use"));
    system.ok("systemctl start kmsfs@data; printf 'before\\nafter\\n' | cmp - /srv/data-plain/open");
    system.ok("systemctl restart kmsfs@data; grep -qx first /srv/data-plain/first");
}

#[test]
fn what_dies_or_hangs_is_started_again_on_a_clean_mount_point() {
    let Some(system) = Booted::start("") else { return };
    volumes(&system, &["data"]);
    system.ok("systemctl start kmsfs@data; echo kept >/srv/data-plain/file; sync /srv/data-plain/file");
    let again = |restarts: &str| {
        system.wait_for("kmsfs@data", "NRestarts", restarts);
        system.wait_for("kmsfs@data", "ActiveState", "active");
        system.ok("grep -qx kept /srv/data-plain/file; echo more >/srv/data-plain/more");
        assert_eq!(system.ok("grep -c ' /srv/data-plain ' /proc/self/mounts").trim(), "1");
    };
    system.ok("kill -KILL $(systemctl show --value -p MainPID kmsfs@data)");
    again("1");

    drop_in(&system, "data", "watchdog", "WatchdogSec=2s");
    system.ok("systemctl restart kmsfs@data");
    // Alive, it is let be: twice the interval without a restart.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(system.property("kmsfs@data", "NRestarts"), "0");
    system.ok("kill -STOP $(systemctl show --value -p MainPID kmsfs@data)");
    again("1");
    assert!(system.journal("-u kmsfs@data").contains("Watchdog timeout"));
}

/// Each ends in `failed`, at once and for good, with the exit code of `docs/GUIDE.md` and the reason as an error.
#[test]
fn what_only_an_administrator_can_mend_fails_and_says_why() {
    let Some(system) = Booted::start("") else { return };
    volumes(&system, &["wrong", "keyless", "volumeless", "pointless", "unset"]);
    system.ok("printf mistaken >/etc/kmsfs/wrong.passphrase; rm /etc/kmsfs/keyless.toml; rm -r /srv/volumeless
               touch /srv/pointless-plain/in-the-way; echo 'OPTIONS=--frobnicate' >>/etc/kmsfs/unset.conf");
    let mut found = Vec::new();
    for (name, code, why) in [
        ("wrong", "7", "wrong passphrase"),
        ("keyless", "6", "/etc/kmsfs/keyless.toml"),
        ("volumeless", "3", "/srv/volumeless does not exist"),
        ("pointless", "9", "it is not empty"),
        ("unset", "2", "--frobnicate"),
    ] {
        let unit = format!("kmsfs@{name}");
        system.fails(&format!("systemctl start {unit}"));
        let state = ["ActiveState", "ExecMainStatus", "NRestarts"].map(|property| system.property(&unit, property));
        if state != ["failed", code, "0"] {
            found.push(format!("{name}: {state:?}"));
        }
        let told = system.journal(&format!("-u {unit} -o cat -p err"));
        if !told.contains(why) {
            found.push(format!("{name}: {told}"));
        }
        assert!(!told.contains("secret of") && !told.contains("mistaken"), "{told}");
    }
    assert!(found.is_empty(), "{}", found.join("\n"));

    // Mended, it starts.
    system.ok("printf 'secret of wrong' >/etc/kmsfs/wrong.passphrase; systemctl start kmsfs@wrong; mountpoint -q /srv/wrong-plain");
}

/// A KMS that is away is asked again for as long as it takes.
#[test]
fn a_unit_waits_for_a_kms_that_is_away() {
    let Some(system) = Booted::start("") else { return };
    let server = KmsServer::start();
    let key = server.create_key();
    let proxy = FaultProxy::start(&server.endpoint());
    let mut settings: String = server.environment().iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    settings.push_str(&format!("KMSFS_ENDPOINT_URL={}\nKMSFS_KMS_OPERATION_TIMEOUT=2\n", proxy.endpoint()));
    system.ok("install -d -m 700 /etc/kmsfs; mkdir /srv/plain");
    fs::write(system.path("/etc/kmsfs/aws"), settings).unwrap();
    system.ok(&format!("set -a; . /etc/kmsfs/aws; kmsfs init /srv/cipher --key aws-kms:{}", key.arn));
    let configuration =
        format!("CIPHERDIR=/srv/cipher\nMOUNTPOINT=/srv/plain\nOPTIONS=--expect-key aws-kms:{}\n", key.arn);
    fs::write(system.path("/etc/kmsfs/cloud.conf"), configuration).unwrap();
    drop_in(&system, "cloud", "aws", "EnvironmentFile=/etc/kmsfs/aws");
    proxy.inject("Decrypt", .., Fault::Reset);
    system.fails("systemctl start kmsfs@cloud");
    assert_eq!(system.property("kmsfs@cloud", "ExecMainStatus"), "8");
    system.wait_for("kmsfs@cloud", "NRestarts", "2");
    proxy.heal();
    system.wait_for("kmsfs@cloud", "ActiveState", "active");
    system.ok("echo secret >/srv/plain/file; systemctl restart kmsfs@cloud; grep -qx secret /srv/plain/file");

    // A refused key is not: that is for an administrator.
    server.administer("DisableKey", &serde_json::json!({ "KeyId": key.id }));
    system.fails("systemctl restart kmsfs@cloud");
    assert_eq!(system.property("kmsfs@cloud", "ExecMainStatus"), "6");
    system.wait_for("kmsfs@cloud", "ActiveState", "failed");
}

#[test]
fn the_target_starts_and_stops_all_and_so_does_a_boot() {
    let Some(mut system) = Booted::start("") else { return };
    volumes(&system, &["one", "two"]);
    system.ok("systemctl enable kmsfs@one kmsfs@two kmsfs.target 2>&1; systemctl start kmsfs.target
               mountpoint -q /srv/one-plain; mountpoint -q /srv/two-plain; echo x >/srv/two-plain/x");
    // What is ordered after the target finds its files.
    let uses = "[Unit]\nWants=kmsfs.target\nAfter=kmsfs.target\n[Service]\nType=oneshot\nRemainAfterExit=yes\n\
                ExecStart=/bin/cat /srv/two-plain/x\n[Install]\nWantedBy=multi-user.target\n";
    fs::write(system.path("/etc/systemd/system/uses.service"), uses).unwrap();
    system.ok("systemctl stop kmsfs.target");
    assert!(!is_mounted(&system, "/srv/one-plain") && !is_mounted(&system, "/srv/two-plain"));
    system.ok("systemctl daemon-reload; systemctl enable uses 2>&1; systemctl start uses");
    assert_eq!(system.property("uses", "Result"), "success");

    // Not synced: the shutdown unmounts in order.
    system.ok("dd if=/dev/urandom of=/srv/one-plain/large bs=1M count=8 status=none; sha256sum </srv/one-plain/large >/opt/sum");
    system.reboot();
    for unit in ["kmsfs@one", "kmsfs@two", "uses"] {
        assert_eq!(system.property(unit, "ActiveState"), "active", "{unit}");
    }
    system.ok("sha256sum </srv/one-plain/large | cmp - /opt/sum");
    let ended = system.journal("-b -1 -u kmsfs@one -o cat");
    assert!(ended.contains("unmounted") && !ended.contains("Failed"), "{ended}");
}

/// Both lines of `/etc/fstab` in `docs/GUIDE.md`, and a volume that is missing.
#[test]
fn fstab_mounts_at_first_access_and_lets_a_missing_volume_be() {
    let Some(mut system) = Booted::start("") else { return };
    if !Path::new("/dev/autofs").exists() {
        println!("left out: this kernel has no autofs");
        return;
    }
    volumes(&system, &["lazy", "eager"]);
    let options = |name: &str| format!("passphrase_file=/etc/kmsfs/{name}.passphrase");
    let table = format!(
        "/srv/lazy /srv/lazy-plain kmsfs _netdev,nofail,x-systemd.automount,x-systemd.idle-timeout=2,{} 0 0\n\
         /srv/eager /srv/eager-plain kmsfs _netdev,nofail,key_max_age=60,log_format=journald,{} 0 0\n\
         /srv/missing /srv/missing-plain kmsfs _netdev,nofail,{} 0 0\n",
        options("lazy"),
        "nosuid",
        options("lazy")
    );
    fs::write(system.path("/etc/fstab"), table).unwrap();
    // What is no option comes from the environment of the unit that is made of the line.
    let directory = system.path("/etc/systemd/system/srv-eager\\x2dplain.mount.d");
    fs::create_dir_all(&directory).unwrap();
    let lines = "[Mount]\nEnvironment=KMSFS_PASSPHRASE_FILE=/etc/kmsfs/eager.passphrase\n";
    fs::write(directory.join("environment.conf"), lines).unwrap();
    system.ok("systemctl daemon-reload; systemctl restart remote-fs.target");
    system.wait_for("srv-eager\\x2dplain.mount", "ActiveState", "active");
    system.ok("echo eager >/srv/eager-plain/file; kmsfs status /srv/eager-plain");
    system.wait_for("srv-missing\\x2dplain.mount", "ActiveState", "failed");
    assert_eq!(system.property("remote-fs.target", "ActiveState"), "active");
    let told = system.journal("-b -o cat -p err");
    assert!(told.contains("/srv/missing does not exist"), "{told}");

    let mounted = "grep -q '^/srv/lazy /srv/lazy-plain fuse.kmsfs' /proc/self/mounts";
    system.fails(mounted);
    system.ok(&format!("timeout 30 sh -c 'echo lazy >/srv/lazy-plain/file'; {mounted}"));
    // Without use it goes, and the next access finds what was written.
    system.wait_for("srv-lazy\\x2dplain.mount", "ActiveState", "inactive");
    assert!(system.journal("-b -u 'srv-lazy\\x2dplain.mount'").contains("Deactivated successfully"));
    system.ok("timeout 30 grep -qx lazy /srv/lazy-plain/file");
    // Unmounted by hand the automount point stays.
    system.ok(&format!("cd /; umount /srv/lazy-plain; timeout 30 grep -qx lazy /srv/lazy-plain/file; {mounted}"));
    let said = system.journal("-b -o cat SYSLOG_IDENTIFIER=kmsfs KMSFS_MOUNTPOINT=/srv/eager-plain");
    assert!(said.starts_with("mounted volume="), "{said}");
    system.ok("systemctl stop 'srv-eager\\x2dplain.mount'; systemctl start 'srv-eager\\x2dplain.mount'; grep -qx eager /srv/eager-plain/file");
    // And so it is after a boot, which none of them holds up.
    system.reboot();
    system.ok(&format!(
        "grep -qx eager /srv/eager-plain/file; ! {mounted}; timeout 30 grep -qx lazy /srv/lazy-plain/file"
    ));
    assert_eq!(system.property("multi-user.target", "ActiveState"), "active");
}

#[test]
fn the_journal_has_entries_with_fields_and_priorities() {
    let Some(system) = Booted::start("") else { return };
    volumes(&system, &["data"]);
    system.ok("systemctl start kmsfs@data; echo content >/srv/data-plain/file; kmsfs lock /srv/data-plain; kmsfs unlock /srv/data-plain");
    // A header that does not authenticate is an error, from a thread of a process that has long been in its sandbox.
    system.ok("f=$(find /srv/data -type f -links 1 -size +8 ! -path '*/.kmsfs/*'); dd if=/dev/zero of=$f bs=64 seek=1 count=100 conv=notrunc status=none
               kmsfs lock /srv/data-plain; kmsfs unlock /srv/data-plain");
    system.fails("cat /srv/data-plain/file");
    let entries: Vec<serde_json::Value> = system
        .journal("-u kmsfs@data -o json SYSLOG_IDENTIFIER=kmsfs")
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let mounted = entries.iter().find(|entry| entry["KMSFS_MOUNTPOINT"] == "/srv/data-plain").unwrap();
    assert_eq!((&mounted["PRIORITY"], &mounted["_TRANSPORT"]), (&"6".into(), &"journal".into()), "{mounted}");
    assert!(mounted["MESSAGE"].as_str().unwrap().starts_with("mounted volume="), "{mounted}");
    assert!(mounted["KMSFS_TARGET"].as_str().unwrap().starts_with("kmsfs::"), "{mounted}");
    assert_eq!(mounted["KMSFS_VOLUME"].as_str().unwrap().len(), 36, "{mounted}");
    let told = system.journal("-u kmsfs@data -p warning -o cat");
    assert!(told.contains("the file's header does not"), "{told}");
    // No tail of lines without fields comes by way of standard error.
    assert!(entries.iter().all(|entry| entry["_TRANSPORT"] == "journal"), "{entries:?}");

    // Text and JSON on standard error, for who wants them.
    for (format, sign) in
        [("text", "kmsfs::cli::commands::serve: mounted volume="), ("json", "\"message\":\"mounted\"")]
    {
        system.ok(&format!("echo OPTIONS=--log-format {format} >>/etc/kmsfs/data.conf; systemctl restart kmsfs@data"));
        let told = system.journal("-u kmsfs@data -o cat -p info _TRANSPORT=stdout");
        assert!(told.contains(sign), "{told}");
    }
}

/// The lower the better, of 10.
#[test]
fn the_exposure_of_the_unit_is_known() {
    const WORST: f64 = 5.0;
    let Some(system) = Booted::start("") else { return };
    volumes(&system, &["data"]);
    let said = system.ok("systemd-analyze security --no-pager kmsfs@data.service");
    let line = said.lines().find(|line| line.contains("Overall exposure level")).unwrap();
    println!("{line}");
    let score: f64 = line.split(": ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(score <= WORST, "{said}");
}
