//! The README's first command does what it says.
#![cfg(feature = "mount")]
#![allow(clippy::unwrap_used)] // it is how a test fails

use std::process::Command;

#[test]
fn the_demonstration_is_told_to_its_end() {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/demo");
    let output = Command::new(demo).env("KMSFS_BIN", env!("CARGO_BIN_EXE_kmsfs")).output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    assert_eq!(complained, "");
    let scenes = said.lines().filter(|line| line.split_once(". ").is_some_and(|(n, _)| n.parse::<u8>().is_ok()));
    assert_eq!(scenes.count(), 9, "{said}");
    assert!(said.contains("Input/output error") && said.contains("Key has been revoked"), "{said}");
}
