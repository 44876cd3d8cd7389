//! The README's first command does what it says.
#![cfg(feature = "mount")]
#![allow(clippy::unwrap_used)] // it is how a test fails

use std::process::Command;

#[test]
fn the_demonstration_shows_plaintext_through_the_mount_only() {
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/demo");
    let output = Command::new(demo).env("KMSFS_BIN", env!("CARGO_BIN_EXE_kmsfs")).output().unwrap();
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}\n{complained}");
    assert_eq!(complained, "");
    // Once as it is written, and twice as it is read: before and after the second mount.
    assert_eq!(said.matches("The treasure is under the old oak.").count(), 3, "{said}");
    assert!(said.contains("mac:         authentic"), "{said}");
    let grep = said.split("grep -c treasure").nth(1).unwrap();
    assert_eq!(grep.lines().nth(1), Some("0"), "the ciphertext does not have it: {said}");
}
