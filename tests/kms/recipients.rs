//! Recipients as people hold them: what an added one still lacks, the names that find a key again, and the messages of the
//! moment in which keys are away.

use std::fs;

use crate::support::{Argument, Home, Volume, text};
use serde_json::Value;

/// A recipient of age whose identity nobody has.
const STRANGER: &str = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";

/// A volume under `main.toml` with three files and an empty one, not mounted.
fn volume() -> Volume {
    let volume = Volume::in_home(Home::new(), &["--key", "local:main.toml"], &[]);
    for name in ["a", "b", "c"] {
        fs::write(volume.path(name), name).unwrap();
    }
    fs::write(volume.path("empty"), "").unwrap();
    volume.unmount();
    volume
}

/// Exit code, standard output and standard error.
fn run(home: &Home, arguments: &[Argument<'_>]) -> (Option<i32>, String, String) {
    let output = home.kmsfs(arguments);
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn list(home: &Home) -> Vec<Value> {
    serde_json::from_str(&home.ok(&[&"recipients", &"list", &"cipher", &"--json"])).unwrap()
}

/// How many files have a record of each key, and how many have none.
fn counts(home: &Home) -> Vec<(u64, u64)> {
    let count = |key: &Value, name: &str| key[name].as_u64().unwrap();
    list(home).iter().map(|key| (count(key, "files_with"), count(key, "files_without"))).collect()
}

/// The exit code of `doctor`, and what it says of a check.
fn doctor(home: &Home, check: &str) -> (Option<i32>, Vec<String>) {
    let (code, said, _) = run(home, &[&"doctor", &"cipher", &"--json"]);
    let report: Value = serde_json::from_str(&said).unwrap();
    let checks = report["checks"].as_array().unwrap().iter().filter(|found| found["check"] == check);
    let line = |found: &Value| format!("{}: {}", found["grade"].as_str().unwrap(), found["what"].as_str().unwrap());
    (code, checks.map(line).collect())
}

#[test]
fn what_an_added_key_still_lacks_is_said_until_it_has_it() {
    let volume = volume();
    let home = &volume.home;
    let (code, said, told) = run(home, &[&"recipients", &"add", &"cipher", &"local:rec.toml"]);
    let command = format!("kmsfs rewrap {}", volume.cipher.display());
    assert_eq!((code, said.as_str()), (Some(0), ""), "{told}");
    let [made, lack] = told.lines().collect::<Vec<_>>()[..] else { panic!("{told}") };
    assert_eq!(made, format!("keyring: {} (new, without a passphrase)", home.path("rec.toml").display()));
    assert!(lack.starts_with("3 of 3 files cannot be opened with local:k-") && lack.contains(&command), "{told}");
    assert_eq!(counts(home), [(3, 0), (0, 3)]);
    assert!(list(home).iter().all(|key| key["all_files_counted"] == true));
    let (code, files) = doctor(home, "files");
    assert!(code == Some(0) && files.len() == 1 && files[0].starts_with("warn: 3 of 3 files cannot"), "{files:?}");

    // The key that the files need is away: that is no health.
    fs::rename(home.path("main.toml"), home.path("away")).unwrap();
    let (code, files) = doctor(home, "files");
    assert!(code == Some(6) && files.last().unwrap().starts_with("fail: 3 of 3 files need a key"), "{files:?}");
    fs::rename(home.path("away"), home.path("main.toml")).unwrap();
    home.shell(&format!("PATH={}:$PATH; {command}", home.program().parent().unwrap().display()));
    assert_eq!(counts(home), [(3, 0), (3, 0)]);
    let all = "ok: 3 of 3 files have a record of every recipient".to_owned();
    assert_eq!(doctor(home, "files"), (Some(0), vec![all]));
    fs::rename(home.path("main.toml"), home.path("away")).unwrap();
    assert_eq!(doctor(home, "files").0, Some(0));
    fs::rename(home.path("away"), home.path("main.toml")).unwrap();

    // There is nothing to say of a key that lacks nothing.
    let empty = Volume::in_home(Home::new(), &[], &[]);
    empty.unmount();
    let (code, said, told) = run(&empty.home, &[&"recipients", &"add", &"cipher", &"local:usb/safe/rec.toml"]);
    assert_eq!((code, said.as_str(), told.lines().count()), (Some(0), "", 1), "{told}");
    // A disk that is not mounted would be missed here.
    let directory = format!("(new, in the new directory {}, without", empty.home.path("usb").display());
    assert!(told.contains(&directory), "{told}");
}

#[test]
fn a_mount_says_how_a_keyring_that_it_cannot_read_comes_in() {
    let mut home = Home::new();
    home.set("KMSFS_PASSPHRASE", "word");
    let volume = Volume::in_home(home, &[], &[]);
    for place in ["safe/ring.toml", "data/kmsfs/ring.toml"] {
        let place = volume.home.path(place);
        let key = format!("local:{}", place.display());
        let said = volume.home.refused(6, &[&"recipients", &"add", &volume.cipher, &key]);
        assert!(said.contains(&format!("`kmsfs umount {}`, then the same command", volume.plain.display())), "{said}");
        assert!(!place.exists() && list(&volume.home).len() == 1, "{said}");
        volume.unmount();
        volume.home.ok(&[&"recipients", &"add", &volume.cipher, &key]);
        volume.home.ok(&[&"recipients", &"remove", &volume.cipher, &key]);
        volume.mount();
    }
}

#[test]
fn a_key_is_found_again_by_the_name_that_added_it() {
    let volume = volume();
    let home = &volume.home;
    home.ok(&[&"recipients", &"add", &"cipher", &"local:rec.toml"]);
    home.ok(&[&"rewrap", &"cipher"]);
    let said = home.refused(2, &[&"recipients", &"remove", &"cipher", &"local:other.toml"]);
    let path = home.path("rec.toml");
    assert!(said.contains(&format!("(in {})", path.display())), "the file of each key: {said}");
    let listed = home.ok(&[&"keys", &"list", &"cipher"]);
    assert!(listed.contains(path.to_str().unwrap()), "{listed}");

    let mount: [Argument<'_>; 3] = [&"mount", &"cipher", &"plain"];
    let expect = |names: &[&str]| {
        let names = names.iter().flat_map(|name| ["--expect-key", *name]).collect::<Vec<_>>();
        let words = names.iter().map(|word| word as Argument<'_>);
        run(home, &mount.into_iter().chain(words).collect::<Vec<_>>()).0
    };
    assert_eq!(expect(&["local:rec.toml"]), Some(5), "the other key is not expected");
    assert_eq!(expect(&["local:rec.toml", "local:main.toml"]), Some(0));
    // What is added meanwhile has to be expected too.
    home.refused(6, &[&"recipients", &"add", &"cipher", &STRANGER]);
    volume.unmount();

    home.ok(&[&"rewrap", &"cipher", &"--to", &"local:new.toml", &"--from", &"local:main.toml"]);
    home.ok(&[&"recipients", &"remove", &"cipher", &"local:rec.toml"]);
    assert_eq!(counts(home), [(3, 0)]);
    assert_eq!(list(home)[0]["keyring"], home.path("new.toml").to_str().unwrap());

    // Also one whose file is gone.
    home.ok(&[&"recipients", &"add", &"cipher", &"local:gone.toml"]);
    fs::remove_file(home.path("gone.toml")).unwrap();
    home.ok(&[&"recipients", &"remove", &"cipher", &"local:gone.toml"]);
    assert_eq!(list(home).len(), 1);
}

#[cfg(feature = "age")]
#[test]
fn when_no_key_unlocks_the_volume_every_recipient_is_named() {
    let volume = volume();
    let home = &volume.home;
    home.ok(&[&"recipients", &"add", &"cipher", &"local:rec.toml"]);
    home.ok(&[&"recipients", &"add", &"cipher", &STRANGER]);
    let (_, found) = doctor(home, "provider");
    let age: Vec<_> = found.iter().filter(|line| line.contains("age: ")).collect();
    assert!(age.len() == 1 && age[0].starts_with("ok") && !age[0].contains("keyring"), "{found:?}");
    let (_, created) = doctor(home, "create");
    assert!(created.len() == 3 && created.iter().all(|line| line.starts_with("ok: ")), "{created:?}");
    assert!(created[2].contains(&format!("age:{STRANGER} gets a record")), "{created:?}");

    for name in ["main.toml", "rec.toml"] {
        fs::remove_file(home.path(name)).unwrap();
    }
    let said = home.refused(6, &[&"mount", &"cipher", &"plain"]);
    for named in ["no key unlocks", "main.toml", "rec.toml", STRANGER, "--age-identity"] {
        assert!(said.contains(named), "{named}: {said}");
    }
    let (code, unwraps) = doctor(home, "unwrap");
    assert!(code == Some(6) && unwraps == [format!("fail: age:{STRANGER} only wraps here: its identity is not given")]);
}

#[test]
fn what_is_left_of_a_volume_is_not_taken_for_none() {
    let volume = volume();
    let (home, cipher) = (&volume.home, &volume.cipher);
    let init: [Argument<'_>; 4] = [&"init", &"cipher", &"--key", &"local:new.toml"];
    for (file, hint) in [("volume.toml", "check --repair"), ("volume.toml.1", "from a backup")] {
        fs::remove_file(cipher.join(".kmsfs").join(file)).unwrap();
        for command in
            [&[&"mount" as Argument<'_>, &"cipher", &"plain"][..], &[&"recipients", &"list", &"cipher"], &init]
        {
            let said = home.refused(4, command);
            assert!(said.contains("is a volume whose config") && said.contains(hint), "{said}");
        }
        let found = doctor(home, "cipher directory");
        assert!(found.0 == Some(4) && found.1[0].contains("config .kmsfs/volume.toml is missing"), "{found:?}");
    }
    assert!(!home.path("new.toml").exists());
}

#[test]
fn the_hint_names_the_file_that_remembers_and_forget_says_where_it_looked() {
    let volume = volume();
    let Volume { mut home, cipher, .. } = volume;
    home.ok(&[&"init", &"other", &"--key", &"local:main.toml"]);
    fs::copy(home.path("other/.kmsfs/volume.toml"), cipher.join(".kmsfs/volume.toml")).unwrap();
    let file = home.path("data/kmsfs/known-volumes.toml");
    let said = home.refused(5, &[&"mount", &"cipher", &"plain"]);
    let command = format!("kmsfs forget {}", cipher.display());
    assert!(said.contains(file.to_str().unwrap()) && said.contains(&command), "{said}");
    home.set("XDG_DATA_HOME", home.path("elsewhere"));
    let said = home.refused(3, &[&"forget", &"cipher"]);
    assert!(said.contains(home.path("elsewhere/kmsfs/known-volumes.toml").to_str().unwrap()), "{said}");
    home.set("XDG_DATA_HOME", home.path("data"));
    home.ok(&[&"forget", &"cipher"]);
    assert!(!fs::read_to_string(file).unwrap().contains(cipher.to_str().unwrap()));
}
