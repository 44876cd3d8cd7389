//! The demonstration: that its scenes show what they say, whoever runs it and whatever ends it, and that nothing is left behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::kms_server;
use crate::support::{Home, eventually};
use rustix::process::{Pid, Signal, kill_process};

const SCENES: [&str; 9] =
    ["volume", "data_key", "header", "same_text_twice", "flipped_bit", "moved_page", "disabled_key", "rewrap", "calls"];

/// A home whose temporary files can be seen.
fn home() -> Home {
    with_tmp(Home::new())
}

fn with_tmp(mut home: Home) -> Home {
    home.shell("mkdir tmp");
    home.set("TMPDIR", home.path("tmp"));
    home
}

/// Nothing is left, neither files nor a mount nor something in the user's own directories.
fn assert_nothing_left(home: &Home) {
    for place in ["tmp", "data", "state", "run"] {
        let left: Vec<_> = fs::read_dir(home.path(place)).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

fn scenes(text: &str) -> Vec<serde_json::Value> {
    let scenes: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<&str> = scenes.iter().map(|scene| scene["scene"].as_str().unwrap()).collect();
    assert_eq!(names, SCENES);
    scenes
}

/// What every demonstration must have seen.
fn assert_convincing(scenes: &[serde_json::Value]) {
    let [_, data_key, header, twice, flipped, moved, disabled, rewrap, calls] = scenes else { panic!("{scenes:?}") };
    let fields = header["fields"].as_array().unwrap();
    let field = |name: &str| fields.iter().find(|field| field["name"] == name).unwrap()["bytes"].as_str().unwrap();
    assert_eq!(field("magic"), "4b4d534653");
    assert_eq!(field("commitment"), data_key["fingerprint"]);
    assert!(field("wrapped key").ends_with(data_key["wrapped_key"].as_str().unwrap()));
    assert!(twice["equal_bytes_in_twin"].as_u64().unwrap() < 100 && twice["equal_bytes_again"].as_u64().unwrap() < 100);
    for refused in [flipped, moved] {
        assert!(refused["read"].as_str().unwrap().starts_with("Input/output error"), "{refused}");
    }
    assert!(disabled["read"].as_str().unwrap().starts_with("Key has been revoked"), "{disabled}");
    assert!(disabled["dark_after_seconds"].as_f64().unwrap() < 20.0, "{disabled}");
    assert_eq!((&rewrap["files"], &rewrap["changed_in_pages"]), (&2.into(), &0.into()));
    assert!(rewrap["changed_in_headers"].as_u64().unwrap() > 100 && rewrap["fingerprint"] == data_key["fingerprint"]);
    assert!(
        calls["calls"].as_u64().unwrap() >= 6 && calls["calls_by_operation"]["GenerateDataKey"].as_u64() >= Some(3)
    );
}

#[test]
fn machines_are_told_what_was_seen() {
    let home = home();
    assert_convincing(&scenes(&home.ok(&[&"demo", &"--json"])));
    assert_nothing_left(&home);
}

#[test]
fn people_are_told_without_colours_where_there_is_no_terminal() {
    let mut home = home();
    // The user's own keyring is not touched, and not used.
    home.set("KMSFS_KEYRING", home.path("own.toml"));
    let said = home.ok(&[&"demo"]);
    for words in ["A data key is born", "commitment", "Input/output error", "Key has been revoked", "dollars"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(!said.contains('\x1b'), "{said}");
    assert!(!home.path("own.toml").exists());
    assert_nothing_left(&home);
}

#[test]
fn a_terminal_sees_colours_unless_it_does_not_want_them() {
    let mut home = home();
    let program = home.program().display().to_string();
    let on_terminal = |home: &Home, arguments: &str| {
        home.shell(&format!("script -qec '{program} demo {arguments}' /dev/null < /dev/null"))
    };
    assert!(on_terminal(&home, "").contains("\x1b[36m"));
    assert!(!on_terminal(&home, "--no-color").contains('\x1b'));
    home.set("NO_COLOR", "1");
    assert!(!on_terminal(&home, "").contains('\x1b'));
}

#[test]
fn an_ordinary_user_can_see_it() {
    let home = with_tmp(Home::of_nobody());
    assert_convincing(&scenes(&home.ok(&[&"demo", &"--json"])));
    assert_nothing_left(&home);
}

#[test]
fn ctrl_c_leaves_nothing_behind() {
    let home = home();
    let mut demo = Command::new(home.program())
        .args(["demo", "--pause"])
        .env("TMPDIR", home.path("tmp"))
        .env("HOME", home.path("home"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(demo.stdin.as_mut().unwrap(), b"\n").unwrap();
    let mounted =
        |tmp: &Path| fs::read_dir(tmp).unwrap().any(|entry| Home::is_mounted(&entry.unwrap().path().join("plain")));
    eventually("it is mounted", || mounted(&home.path("tmp")));
    kill_process(Pid::from_child(&demo), Signal::INT).unwrap();
    assert_eq!(demo.wait().unwrap().code(), Some(130));
    assert_nothing_left(&home);
}

#[test]
fn a_key_that_cannot_be_had_is_told_and_leaves_nothing_behind() {
    let home = home();
    let said = home.refused(2, &[&"demo", &"--key", &"gpg:me"]);
    assert!(said.contains("no provider is called"), "{said}");
    let said = home.refused(2, &[&"demo", &"--key", &"local:/proc/version"]);
    assert!(said.contains("/proc/version"), "{said}");
    // No keyring is made outside of the demonstration.
    for option in ["--key", "--rewrap-to"] {
        let keyring = home.path("keyring.toml");
        let said = home.refused(6, &[&"demo", &option, &format!("local:{}", keyring.display())]);
        assert!(said.contains("keyring.toml") && !keyring.exists(), "{said}");
    }
    assert_nothing_left(&home);
}

#[test]
fn a_kms_key_is_used_and_left_as_it_is() {
    let server = kms_server::KmsServer::start();
    let key = server.create_key();
    let mut home = home();
    for (name, value) in server.environment() {
        home.set(name, value);
    }
    let scenes = scenes(&home.ok(&[&"demo", &"--json", &"--key", &format!("aws-kms:{}", key.arn)]));
    assert_convincing(&scenes);
    assert_eq!(scenes[1]["key_id"], key.arn.as_str());
    assert_nothing_left(&home);
}
