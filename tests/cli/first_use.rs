//! What somebody is told who does not know the program yet, mistypes something, lacks a key or may not read a directory: one short
//! answer that says what to do, and the right exit code.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::support::{Argument, Home, Volume, text};

/// Runs it, which must fail with this code, print nothing, and say no more than fits a small terminal.
fn told(home: &Home, code: i32, arguments: &[Argument<'_>]) -> String {
    let output = home.kmsfs(arguments);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(text(&output.stdout), "");
    assert!(said.lines().count() <= 16, "{said}");
    said
}

#[test]
fn without_arguments_it_says_where_to_begin() {
    let said = told(&Home::new(), 2, &[]);
    for words in ["kmsfs demo", "kmsfs init", "kmsfs mount", "kmsfs --help"] {
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_mistyped_command_or_option_is_answered_with_what_may_have_been_meant() {
    let home = Home::new();
    let two_lines = |arguments: &[Argument<'_>]| {
        let said = told(&home, 2, arguments);
        assert!(said.starts_with("kmsfs: ") && said.lines().count() == 2, "{said}");
        assert!(said.lines().last().unwrap().starts_with("hint: "), "{said}");
        said
    };
    assert!(two_lines(&[&"mout", &"a", &"b"]).contains("there is mount"));
    assert!(two_lines(&[&"inti", &"a"]).contains("there is init"));
    assert!(two_lines(&[&"mount", &"a", &"b", &"--log-fil", &"x"]).contains("there is --log-file"));
    assert!(two_lines(&[&"mount", &"a", &"b", &"--ro"]).contains("-o ro"));
    assert!(two_lines(&[&"/a", &"/b", &"-o", &"foo"]).contains("-o foo"));
    assert!(two_lines(&[&"keys"]).contains("kmsfs keys --help"));
    let said = two_lines(&[&"mount", &"a"]);
    assert!(said.contains("<MOUNTPOINT>") && said.contains("usage: kmsfs mount"), "{said}");
    assert!(told(&home, 2, &[&"init", &"a", &"--key", &"aws:alias/x"]).contains("aws-kms:KEY"));
}

#[test]
fn a_mistyped_directory_is_named_and_nothing_is_made_of_it() {
    let home = Home::new();
    fs::create_dir(home.path("plain")).unwrap();
    let said = told(&home, 3, &[&"mount", &"chipher", &"plain"]);
    assert!(said.contains("chipher does not exist") && said.contains("kmsfs init"), "{said}");
    let said = told(&home, 3, &[&"mount", &"plain", &"state"]);
    assert!(said.contains("is not a volume") && said.contains("hint: "), "{said}");
    assert!(!home.path("chipher").exists());
}

#[test]
fn a_missing_key_is_named_with_what_to_do() {
    let volume = Volume::new(&[]);
    volume.unmount();
    let keyring = volume.home.path("data/kmsfs/keyring.toml");
    fs::remove_file(&keyring).unwrap();
    for arguments in [&["mount", "cipher", "plain"][..], &["check", "cipher"], &["rewrap", "cipher", "--to", "local:x"]]
    {
        let arguments: Vec<Argument<'_>> = arguments.iter().map(|argument| argument as Argument<'_>).collect();
        let said = told(&volume.home, 6, &arguments);
        assert!(said.contains("keyring.toml"), "{said}");
    }
    assert!(!keyring.exists() && !volume.home.path("x").exists());
}

#[test]
fn who_may_not_read_a_directory_is_told_who_he_is() {
    let home = Home::of_nobody();
    let closed = home.path("closed");
    fs::create_dir_all(closed.join("cipher")).unwrap();
    fs::create_dir(home.path("plain")).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let cipher = closed.join("cipher");
    let refusals: [(i32, &[Argument<'_>]); 5] = [
        (3, &[&"mount", &cipher, &"plain"]),
        (3, &[&"check", &cipher]),
        (14, &[&"inspect", &cipher]),
        (14, &[&"init", &cipher]),
        (14, &[&"init", &closed]),
    ];
    for (code, arguments) in refusals {
        let said = told(&home, code, arguments);
        assert!(said.contains("Permission denied") && said.contains("hint: this is user "), "{said}");
    }
}
