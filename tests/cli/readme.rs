//! The README's commands do what it says: the demonstration, and both blocks for a first volume.

use std::path::Path;
use std::process::Command;

use crate::support::Home;
use crate::support::document;
use crate::support::kms_server::{self, KmsServer};

/// The blocks for a shell.
fn blocks() -> Vec<String> {
    let blocks = document::blocks(&document::read("README.md")).into_iter().filter(|block| block.language == "sh");
    blocks.map(|block| block.lines.join("\n")).collect()
}

/// A home of its own, in which `kmsfs` is the one under test.
fn home() -> Home {
    let mut home = Home::new();
    let programs = Path::new(env!("CARGO_BIN_EXE_kmsfs")).parent().unwrap().display().to_string();
    home.set("PATH", format!("{programs}:{}", std::env::var("PATH").unwrap()));
    home
}

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

#[test]
fn the_first_volume_needs_no_account() {
    let home = home();
    let block = &blocks()[0];
    let said = home.shell(&format!("exec 2>&1\n{block}"));
    assert!(said.contains("keyring: ") && said.contains("keep a copy"), "{said}");
    assert!(!home.path("home/plain/secret.txt").exists());
    assert_eq!(home.shell("kmsfs cat ~/cipher secret.txt"), "The treasure is under the old oak.\n");
}

#[test]
fn the_second_volume_is_under_a_key_of_aws() {
    let server = KmsServer::start();
    let mut home = home();
    server.environment().into_iter().for_each(|(name, value)| home.set(name, value));
    // What the AWS command line goes by.
    home.set("AWS_DEFAULT_REGION", kms_server::REGION);
    home.set("AWS_ENDPOINT_URL", server.endpoint());
    if !home.command("aws").arg("--version").output().unwrap().status.success() {
        println!("left out: the AWS command line is not installed");
        return;
    }
    let said = home.shell(&blocks()[1]);
    assert!(said.contains("aws-kms:arn:"), "{said}");
    home.shell("echo x >~/app-data/x; kmsfs umount ~/app-data");
    assert_eq!(home.shell("kmsfs cat ~/app-cipher x"), "x\n");
    assert!(home.shell("cat policy.json").contains("kms:GenerateDataKey"));
}

#[test]
fn its_speeds_are_those_of_the_table() {
    let row = |document: &str, begin: &str| -> Vec<String> {
        let row = document.lines().find(|line| line.starts_with(begin)).unwrap();
        row.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('*').to_owned()).collect()
    };
    let (readme, performance) = (document::read("README.md"), document::read("docs/PERFORMANCE.md"));
    let (peers, claims) = (row(&readme, "| | kmsfs |"), row(&readme, "| speed of kmsfs by default, times theirs"));
    let columns = row(&performance, "| workload |");
    let table = performance.lines().skip_while(|line| !line.starts_with("| workload |")).skip(2);
    let rows: Vec<_> = table.take_while(|line| line.starts_with('|')).map(|line| row(line, "|")).collect();
    for peer in ["gocryptfs", "securefs", "EncFS"] {
        let column = columns.iter().position(|name| *name == format!("to {peer}")).unwrap();
        let speeds = rows.iter().map(|row| row[column].parse::<f64>().unwrap());
        let (least, most) =
            speeds.fold((f64::MAX, 0.0_f64), |(least, most), speed| (least.min(speed), most.max(speed)));
        let claim = &claims[peers.iter().position(|name| name == peer).unwrap()];
        assert_eq!(*claim, format!("{least:.2} to {most:.1}"), "{peer}");
    }
}
