//! `kmsfs inspect`: from the path of a file on a mount, or its plain path, to its ciphertext, and back.

use std::fs;
use std::os::unix::fs::symlink;

use crate::support::{Argument, Home, Volume, text};
use serde_json::Value;

fn reports(volume: &Volume, arguments: &[Argument<'_>]) -> Vec<Value> {
    let arguments = [&[&"inspect" as Argument<'_>, &"--json"], arguments].concat();
    volume.home.ok(&arguments).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn report(volume: &Volume, arguments: &[Argument<'_>]) -> Value {
    let mut reports = reports(volume, arguments);
    assert_eq!(reports.len(), 1, "{reports:?}");
    reports.remove(0)
}

/// Ordinary files, long names, deep ones, hard links, and what is no file.
fn fill(volume: &Volume) -> Vec<String> {
    let (long, deep) = ("n".repeat(255), [&"d".repeat(100); 30].map(String::as_str).join("/"));
    fs::create_dir(volume.path("docs")).unwrap();
    fs::create_dir_all(volume.path(&deep)).unwrap();
    let files = vec!["secret.txt".to_owned(), format!("docs/{long}"), format!("{deep}/leaf"), "docs/a b\n".to_owned()];
    files.iter().for_each(|file| fs::write(volume.path(file), "thirteen byte").unwrap());
    fs::hard_link(volume.path("secret.txt"), volume.path("docs/again")).unwrap();
    symlink("secret.txt", volume.path("link")).unwrap();
    files
}

#[test]
fn a_plain_path_leads_to_its_ciphertext_and_back() {
    let volume = Volume::new(&[]);
    let files = fill(&volume);
    for file in &files {
        let on_mount = report(&volume, &[&volume.path(file)]);
        assert_eq!((&on_mount["kind"], &on_mount["plain_size"]), (&"file".into(), &13.into()), "{on_mount}");
        assert_eq!((&on_mount["slots"][0]["mac"], &on_mount["plain_path"]), (&"authentic".into(), &file[..].into()));
        assert_eq!(report(&volume, &[&volume.cipher, file]), on_mount);
        let cipher = on_mount["path"].as_str().unwrap().to_owned();
        assert!(cipher.starts_with(volume.cipher.to_str().unwrap()), "{cipher}");
        // Encrypted names may be too long for one path.
        if cipher.len() < 4096 {
            assert_eq!(report(&volume, &[&cipher]), on_mount);
        }
    }
    let names = [&"secret.txt", &"docs/again"].map(|name| report(&volume, &[&volume.path(name)]));
    assert_eq!(names[0]["slots"][0]["file_id"], names[1]["slots"][0]["file_id"]);
    assert_ne!(names[0]["path"], names[1]["path"]);
    for (name, kind) in [("docs", "directory"), ("link", "symbolic link")] {
        let shown = report(&volume, &[&volume.path(name)]);
        assert_eq!((&shown["kind"], &shown["plain_path"]), (&kind.into(), &name.into()));
    }
    let both = reports(&volume, &[&volume.plain, &volume.cipher, &"/docs/again", &"secret.txt"]);
    let kinds: Vec<_> = both.iter().map(|report| report["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["volume", "file", "file"], "a directory before a plain path only says where that begins");
    for line in volume.home.ok(&[&"ls", &"-R", &"--cipher", &volume.cipher, &"docs"]).lines() {
        let Some((cipher, name)) = line.split_once('\t') else { continue };
        let shown = report(&volume, &[&volume.cipher.join(cipher)]);
        assert!(shown["plain_path"].as_str().unwrap().starts_with(&format!("docs/{name}")), "{line}: {shown}");
    }
    // With its keys locked away, the mount still leads to its cipher directory.
    volume.home.ok(&[&"lock", &volume.plain]);
    assert_eq!(report(&volume, &[&volume.path("secret.txt")]), names[0]);
    volume.home.ok(&[&"unlock", &volume.plain]);
}

#[test]
fn an_ordinary_user_finds_their_files() {
    let volume = Volume::in_home(Home::of_nobody(), &[], &[]);
    volume.home.shell(&format!("echo twelve bytes > {}/file", volume.plain.display()));
    let shown = report(&volume, &[&volume.path("file")]);
    assert_eq!((&shown["slots"][0]["mac"], &shown["plain_path"]), (&"authentic".into(), &"file".into()));
    assert_eq!(report(&volume, &[&volume.cipher, &"file"]), shown);
}

#[test]
fn what_is_not_there_is_told_and_leaves_nothing() {
    let volume = Volume::new(&[]);
    fs::write(volume.path("file"), "x").unwrap();
    let page = volume.home.path("page.html");
    let outside = volume.home.path("outside");
    fs::write(&outside, "not a multiple of a page").unwrap();
    let missing: [&[Argument<'_>]; 3] =
        [&[&volume.path("nothing")], &[&volume.cipher, &"nothing"], &[&volume.cipher, &"file/below"]];
    for path in missing {
        let arguments = [&[&"inspect" as Argument<'_>, &"--html", &page], path].concat();
        let said = volume.home.refused(1, &arguments);
        assert!(said.contains("there is no such file or directory"), "{said}");
    }
    volume.home.refused(13, &[&"inspect", &"--html", &page, &outside]);
    volume.home.refused(2, &[&"inspect", &"--html", &page, &volume.plain]);
    let left: Vec<_> = fs::read_dir(volume.home.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("page.html")), "{left:?}");
    volume.home.ok(&[&"inspect", &"--html", &page, &volume.path("file")]);
    let output = volume.home.kmsfs(&[&"inspect", &volume.path("file"), &"nowhere"]);
    assert_eq!(output.status.code(), Some(14), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("plain path:"), "the first is shown: {}", text(&output.stdout));
}
