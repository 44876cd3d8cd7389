//! What a mount inherits from whoever starts it, where it may lie, and how it is found.

use std::fs;
use std::path::Path;

use rustix::process::{Signal, kill_process};

use crate::support::{self, Home, Volume, bytes, eventually, is_dead, text};

/// A volume of the user nobody that is not mounted: no limit is lifted for him that root may lift.
fn of_nobody() -> Volume {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    volume.unmount();
    volume
}

/// Runs a script with the volume's paths in `$C` and `$M`, and the program as `$K`.
fn script(volume: &Volume, script: &str) -> String {
    let home = &volume.home;
    let (program, cipher, plain) = (home.program().display(), volume.cipher.display(), volume.plain.display());
    home.shell(&format!("K={program}; C={cipher}; M={plain}\n{script}"))
}

#[test]
fn descriptors_of_whoever_mounts_are_closed_with_him() {
    let volume = of_nobody();
    script(&volume, "sh -c 'exec 9>lock; flock 9; \"$1\" mount $2 $3' - $K $C $M; flock -n lock true");
    let captured = script(&volume, "$K umount $M; x=$( { $K mount $C $M >/dev/null 2>&1; } 3>&1 ); echo \"<$x>\"");
    assert_eq!(captured, "<>\n");
    volume.unmount();
}

#[test]
fn signals_that_were_blocked_or_ignored_count() {
    let volume = of_nobody();
    script(&volume, "env --block-signal --ignore-signal=CHLD --ignore-signal=TERM $K mount $C $M");
    let pid = volume.pid();
    kill_process(pid, Signal::TERM).unwrap();
    eventually("the signal ends it", || is_dead(pid));
    assert!(!Home::is_mounted(&volume.plain));
}

#[test]
fn a_limit_of_file_sizes_is_an_error_of_the_write_that_meets_it() {
    let volume = of_nobody();
    let content = bytes(1, 1 << 20);
    volume.mount();
    script(&volume, "echo >$M/small; touch $M/large; chmod 666 $M/large");
    fs::write(volume.home.path("content"), &content).unwrap();
    script(&volume, "cat content >$M/large; sync $M/large; $K umount $M");
    // In the middle of a page.
    let warned = script(&volume, "prlimit --fsize=513000:513000 $K mount $C $M 2>&1");
    assert!(warned.contains("513000 bytes"), "{warned}");
    let over = "import os\nf = os.open(os.environ['M'] + '/large', os.O_RDWR)\nos.pwrite(f, b'x' * 300000, 300000)\nos.fsync(f)";
    let failed =
        script(&volume, &format!("export M; ! python3 -c \"{over}\" 2>&1; cat $M/small; $K umount $M; $K check $C"));
    assert!(failed.contains("File too large"), "{failed}");
    assert!(failed.contains("clean"), "{failed}");
    volume.mount();
    let after = script(&volume, "cat $M/large >after; wc -c <after");
    assert_eq!(after.trim(), content.len().to_string());
    let after = fs::read(volume.home.path("after")).unwrap();
    assert!(after.iter().zip(&content).all(|(after, before)| after == before || *after == b'x'));
}

#[test]
fn a_mount_that_cannot_have_its_memory_is_refused_and_leaves_nothing() {
    let volume = of_nobody();
    let mut command = volume.home.command("prlimit");
    command.arg("--as=400000000:400000000").arg(volume.home.program()).args(volume.mount_arguments());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("memory"));
    assert!(!Home::is_mounted(&volume.plain));
}

#[test]
fn a_mount_over_the_home_with_its_keyring_reads_nothing_through_itself() {
    let mut home = Home::of_nobody();
    home.set("XDG_DATA_HOME", home.path("plain/.local/share"));
    home.set("XDG_STATE_HOME", home.path("plain/.local/state"));
    home.shell("mkdir plain");
    let volume = Volume::in_home(home, &[], &[]);
    // Reading it takes a key, and so the keyring.
    script(&volume, "D=$M/.local/share/kmsfs; mkdir -p $D; umask 077; echo decoy >$D/keyring.toml; echo 64 >$M/64");
    script(&volume, "$K lock $M; $K unlock $M; timeout -s KILL 20 cat $M/64");
    volume.unmount();
    let log = script(&volume, "cat $M/.local/state/kmsfs/*.log");
    assert!(log.contains("unmounted") && !log.contains("keyring"), "{log}");
    assert_eq!(script(&volume, "find $M -name '*.toml' -o -name '*.log' | wc -l").trim(), "3");
    volume.mount();
    assert_eq!(script(&volume, "cat $M/64").trim(), "64");
}

#[test]
fn a_mount_is_found_whatever_session_asks_and_whatever_its_path_is_called() {
    let volume = of_nobody();
    volume.mount();
    script(&volume, "echo 1 >$M/f; ln -s $M link");
    for (name, runtime) in [("$M/", "$PWD/other"), ("link", ""), ("./plain", "/nonexistent"), ("$M", "$PWD/run")] {
        let status = script(&volume, &format!("XDG_RUNTIME_DIR={runtime} $K status --json {name}"));
        assert!(status.contains("\"pid\""), "{status}");
    }
    let by_root = std::process::Command::new(env!("CARGO_BIN_EXE_kmsfs")).arg("status").arg(&volume.plain).output();
    assert!(by_root.unwrap().status.success(), "root may ask");
    script(&volume, "XDG_RUNTIME_DIR= $K lock link; ! cat $M/f 2>/dev/null; XDG_RUNTIME_DIR=/nowhere $K unlock $M");
    let pid = volume.pid();
    script(&volume, "XDG_RUNTIME_DIR= $K umount link");
    eventually("it has been waited for", || is_dead(pid));
}

#[test]
fn all_mounts_are_listed() {
    let volume = Volume::new(&[]);
    let listed =
        || -> Vec<serde_json::Value> { serde_json::from_str(&volume.home.ok(&[&"status", &"--json"])).unwrap() };
    let ours = || listed().into_iter().find(|mount| mount["mountpoint"] == *volume.plain.to_str().unwrap());
    let pid = volume.pid();
    let found = ours().unwrap();
    assert_eq!(found["cipher_directory"], *volume.cipher.to_str().unwrap());
    assert_eq!(found["process"], pid.as_raw_nonzero().get());
    volume.unmount();
    assert!(ours().is_none());
}

#[test]
fn without_a_runtime_directory_an_ordinary_user_has_mounts_too() {
    let mut home = Home::of_nobody();
    home.set("XDG_RUNTIME_DIR", "");
    let volume = Volume::in_home(home, &[], &[]);
    let pid = volume.pid();
    volume.unmount();
    eventually("it has been waited for", || is_dead(pid));
}

#[test]
fn a_directory_above_a_mount_may_be_renamed() {
    for end in ["$K umount b/m", "kill $P"] {
        let mut volume = of_nobody();
        script(&volume, "mkdir -p a/m");
        volume.plain = volume.home.path("a/m");
        volume.mount();
        let pid = volume.pid();
        script(&volume, "mv a b; $K status b/m");
        script(&volume, &format!("P={}; {end}", pid.as_raw_nonzero()).replace("kill", "kill -TERM"));
        eventually("it ends", || is_dead(pid));
        assert!(!Home::is_mounted(&volume.home.path("b/m")));
    }
}

#[test]
fn a_dead_mount_in_the_search_path_can_be_taken_away() {
    let mut volume = of_nobody();
    volume.mount();
    volume.kill();
    let path = format!("{}/bin:/usr/sbin:/usr/bin:/sbin:/bin", volume.plain.display());
    volume.home.set("PATH", path);
    volume.unmount();
    volume.mount();
}

#[test]
fn a_mount_that_another_namespace_has_is_named_and_can_be_ended() {
    support::needs_root();
    let volume = Volume::new(&[]);
    fs::write(volume.path("f"), "kept").unwrap();
    let holder = std::process::Command::new("unshare").args(["-m", "--propagation", "private", "sleep", "100"]).spawn();
    let mut holder = holder.unwrap();
    eventually("it is there", || fs::read_to_string(format!("/proc/{}/comm", holder.id())).unwrap().trim() == "sleep");
    let pid = volume.pid();
    let said = volume.home.refused(1, &[&"umount", &volume.plain]);
    assert!(said.contains(&holder.id().to_string()) && said.contains("--force"), "{said}");
    let again = volume.home.refused(1, &[&"umount", &volume.plain]);
    assert!(again.contains(&holder.id().to_string()), "{again}");
    volume.home.ok(&[&"umount", &"--force", &volume.plain]);
    eventually("it ends", || is_dead(pid));
    volume.mount();
    assert_eq!(fs::read_to_string(volume.path("f")).unwrap(), "kept");
    holder.kill().unwrap();
    holder.wait().unwrap();
}

#[test]
fn what_is_mounted_below_a_mount_is_named() {
    support::needs_root();
    let volume = Volume::new(&[]);
    let inner = volume.path("inner");
    fs::create_dir(&inner).unwrap();
    support::run("mount", &[&"-t", &"tmpfs", &"tmpfs", &inner], Path::new("/"));
    let said = volume.home.refused(1, &[&"umount", &volume.plain]);
    support::run("umount", &[&inner], Path::new("/"));
    assert!(said.contains(&format!("`umount {}`", inner.display())), "{said}");
    volume.unmount();
}

#[test]
fn what_is_mounted_already_is_named_with_what_to_do() {
    let volume = Volume::new(&[]);
    let Volume { home, cipher, plain, .. } = &volume;
    let pid = volume.pid().as_raw_nonzero();
    fs::create_dir(home.path("second")).unwrap();
    // Whether or not the volume has files.
    for file in [None, Some("f")] {
        file.into_iter().for_each(|name| fs::write(volume.path(name), "x").unwrap());
        let said = home.refused(11, &[&"mount", cipher, plain]);
        assert!(said.contains(&format!("is mounted at {} already", plain.display())), "{said}");
    }
    let umount = format!("hint: `kmsfs umount {}`", plain.display());
    for arguments in
        [&["mount", "cipher", "second"][..], &["import", "second", "cipher"], &["check", "--repair", "cipher"]]
    {
        let arguments: Vec<support::Argument<'_>> = arguments.iter().map(|argument| argument as _).collect();
        let said = home.refused(11, &arguments);
        let place = format!("is mounted at {} by process {pid} ", plain.display());
        assert!(said.contains(&place) && said.contains(&umount), "{said}");
    }
    let said = home.refused(9, &[&"mount", &"cipher", &"missing/place"]);
    assert!(said.contains("hint: ") && said.contains("`mkdir -p missing/place`"), "{said}");
    let said = home.refused(12, &[&"umount", &"/proc"]);
    assert!(said.contains("/proc is no kmsfs mount, but one of proc"), "{said}");
}

#[test]
fn a_dead_mount_is_told_from_a_live_one() {
    let volume = Volume::new(&[]);
    let (home, plain) = (&volume.home, &volume.plain);
    volume.kill();
    for command in ["status", "lock", "unlock", "sync"] {
        let said = home.refused(12, &[&command, plain]);
        let end = format!("`kmsfs umount {}`", plain.display());
        assert!(said.contains("is a dead mount") && said.contains(&end), "{said}");
    }
    let listed: Vec<serde_json::Value> = serde_json::from_str(&home.ok(&[&"status", &"--json"])).unwrap();
    let state = |listed: &[serde_json::Value]| {
        let ours = listed.iter().find(|mount| mount["mountpoint"] == *plain.to_str().unwrap());
        ours.map(|mount| mount["state"].as_str().unwrap().to_owned())
    };
    assert_eq!(state(&listed).as_deref(), Some("dead"));
    let output = home.kmsfs(&[&"umount", plain]);
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("warning: ") && said.contains("was a dead mount"), "{said}");
    assert!(!Home::is_mounted(plain));
    volume.mount();
    volume.kill();
    // A mount takes the dead one away.
    volume.mount();
}

#[test]
fn a_remount_shows_in_the_status() {
    support::needs_root();
    let volume = Volume::new(&[]);
    for (option, read_only) in [("ro", true), ("rw", false)] {
        volume.home.ok(&[&"mount", &"-o", &format!("remount,{option}"), &volume.cipher, &volume.plain]);
        assert_eq!(volume.status()["read_only"], read_only);
    }
}

#[test]
fn the_status_shows_what_the_mount_was_told_of_keys() {
    let options =
        ["--key-max-age", "2m", "--stale-grace", "90s", "--idle-lock", "1h", "--kms-rate", "7", "--read-only"];
    let volume = Volume::in_home(Home::new(), &[], &[]);
    volume.unmount();
    volume.home.ok(&[&"recipients", &"add", &volume.cipher, &"local:second.toml"]);
    let mut arguments = volume.mount_arguments();
    arguments.extend(options.iter().map(|option| option as support::Argument<'_>));
    volume.home.ok(&arguments);
    let status = volume.status();
    let told = ["key_max_age_seconds", "stale_grace_seconds", "idle_lock_seconds", "kms_rate"]
        .map(|field| status[field].as_f64());
    assert_eq!(told, [Some(120.0), Some(90.0), Some(3600.0), Some(7.0)]);
    assert_eq!((&status["read_only"], status["further_recipients"].as_array().unwrap().len()), (&true.into(), 1));
}

/// The terminal of `kmsfs mount`, and the log too.
#[test]
fn warnings_of_a_mount_in_the_background_reach_whoever_started_it() {
    let volume = of_nobody();
    let script_of = |line: &str| script(&volume, line);
    script_of("rm -f data/kmsfs/known-volumes.toml; mkdir data/kmsfs/known-volumes.toml.new");
    let said = script_of("$K mount $C $M 2>&1");
    assert!(said.contains("kmsfs: warning: the volume is not remembered"), "{said}");
    assert!(volume.home.logs().contains("the volume is not remembered"));
    script_of("$K umount $M; rmdir data/kmsfs/known-volumes.toml.new");
    assert_eq!(script_of("$K mount $C $M 2>&1"), "");
    volume.unmount();
    // Without a limit of locked memory that is worth one there is memory that only the process reaches, where the kernel has it.
    let said = script_of("prlimit --memlock=0:0 $K mount $C $M 2>&1");
    let memory = volume.status()["key_memory"].as_str().unwrap().to_owned();
    assert_eq!(said.contains("ordinary memory"), memory == "ordinary", "{memory}: {said}");
}

/// What was written is not durable, and the one who ends the mount hears of it.
#[test]
fn a_forced_end_says_what_is_not_durable() {
    support::needs_root();
    let home = Home::new();
    home.shell(
        "truncate -s 16M image; mkfs.ext4 -q -b 4096 -m 0 image; mkdir small; mount -o loop image small; mkdir small/c",
    );
    let keyring = home.path("k.toml");
    home.ok(&[&"init", &"small/c", &"--key", &format!("local:{}", keyring.display())]);
    fs::create_dir(home.path("plain")).unwrap();
    home.ok(&[&"mount", &"small/c", &"plain"]);
    let held = fs::File::create(home.path("plain/big")).unwrap();
    // In the kernel's memory, whatever is there to hold it.
    std::os::unix::fs::FileExt::write_all_at(&held, &vec![7; 30 << 20], 0).ok();
    let said = home.refused(14, &[&"umount", &"--force", &"plain"]);
    assert!(said.contains("durable"), "{said}");
    assert!(!Home::is_mounted(&home.path("plain")));
    drop(held);
    home.shell("umount small");
}

#[test]
fn a_forced_end_of_a_busy_mount_leaves_a_volume_that_is_whole() {
    let volume = Volume::new(&[]);
    let script = "import os,sys
n=0
try:
    while True:
        with open(sys.argv[1]+'/f%d'%(n%50),'wb') as f: f.write(os.urandom(20000))
        n+=1
        if n==100: print('busy',flush=True)
except OSError as e: sys.exit(0 if n>=100 else 1)";
    let mut writer = std::process::Command::new("python3")
        .args(["-c", script])
        .arg(&volume.plain)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Read::read_exact(writer.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
    let pid = volume.pid();
    volume.home.ok(&[&"umount", &"--force", &volume.plain]);
    eventually("it ends", || is_dead(pid));
    assert!(writer.wait().unwrap().success());
    assert!(volume.home.ok(&[&"check", &volume.cipher]).contains("clean"));
}
