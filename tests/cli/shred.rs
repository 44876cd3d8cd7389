//! `kmsfs shred`: what opens the files is gone from the disk below, and nothing else is.

use std::fs::{self, File};
use std::path::Path;

use crate::support::{Argument, Home, Volume, bytes, needs_root, run, text, tree};

fn system(program: &str, arguments: &[Argument<'_>]) -> String {
    run(program, arguments, Path::new("/"))
}

fn holds(image: &[u8], part: &[u8]) -> bool {
    image.windows(part.len()).any(|window| window == part)
}

/// Looks at every byte of the disk, since that is what somebody who has it does.
#[test]
fn no_byte_of_a_shredded_header_is_left_on_the_disk() {
    needs_root();
    let home = Home::new();
    let (image, disk) = (home.path("image"), home.path("cipher"));
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    system("mkfs.ext4", &[&"-q", &"-F", &"-b", &"4096", &image]);
    fs::create_dir(&disk).unwrap();
    system("mount", &[&"-o", &"loop", &image, &disk]);
    fs::remove_dir(disk.join("lost+found")).unwrap();
    let volume = Volume::in_home(home, &[], &[]);
    fs::create_dir_all(volume.path("secret/deep")).unwrap();
    for name in ["secret/a", "secret/deep/b", "kept"] {
        fs::write(volume.path(name), bytes(1, 10_000)).unwrap();
    }
    fs::hard_link(volume.path("secret/a"), volume.path("secret/deep/again")).unwrap();
    let behind = ["secret/a", "secret/deep/b", "kept"].map(|name| volume.behind(name));
    volume.unmount();
    // From each header the data key's id, the file's and the wrapped key: 128 bytes in either slot.
    let headers = behind.map(|path| fs::read(path).unwrap()[32..160].to_vec());
    system("sync", &[&"-f", &disk]);
    let before = fs::read(&image).unwrap();
    assert!(headers.iter().all(|header| holds(&before, header)), "else this test could not fail");
    assert_eq!(volume.home.ok(&[&"shred", &"--yes", &volume.cipher, &"secret"]), "");
    system("umount", &[&disk]);
    let after = fs::read(&image).unwrap();
    assert_eq!(headers.map(|header| holds(&after, &header)), [false, false, true]);
    system("mount", &[&"-o", &"loop", &image, &disk]);
    volume.home.ok(&[&"check", &volume.cipher]);
    assert_eq!(volume.home.ok(&[&"ls", &"-R", &volume.cipher]), "kept\n");
    assert_eq!(volume.home.kmsfs(&[&"cat", &volume.cipher, &"kept"]).stdout, bytes(1, 10_000));
    system("umount", &[&disk]);
}

#[test]
fn only_what_was_named_and_may_go_is_shredded() {
    let volume = Volume::new(&[]);
    fs::create_dir_all(volume.path("d/e")).unwrap();
    for name in ["d/a", "d/e/b", "d/linked", "dd", "other"] {
        fs::write(volume.path(name), name).unwrap();
    }
    fs::hard_link(volume.path("d/linked"), volume.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink("../other", volume.path("d/link")).unwrap();
    fs::write(volume.path("d").join("n".repeat(255)), "long").unwrap();
    let before = tree(&volume.plain);
    let home = &volume.home;
    let shred = |more: &[&str]| {
        let mut arguments: Vec<Argument<'_>> = vec![&"shred", &volume.cipher];
        arguments.extend(more.iter().map(|word| word as Argument<'_>));
        home.kmsfs(&arguments)
    };
    let refused = |code, more: &[&str], words: &str| {
        let output = shred(more);
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(code) && said.contains(words), "{more:?}: {said}");
    };
    refused(11, &["--yes", "d"], "in use");
    volume.unmount();
    refused(2, &["--yes", "/"], "no name at its end");
    refused(2, &["--yes", "d/.."], "`..`");
    refused(2, &["--yes"], "PATH");
    refused(1, &["--yes", "d", "nothing"], "there is no such file");
    refused(1, &["--yes", "d"], "has another name");
    refused(2, &["dd", "d/e"], "nothing was changed");
    volume.mount();
    assert!(tree(&volume.plain) == before, "nothing was changed");
    volume.unmount();
    let shown = shred(&["d", "elsewhere", "d/e", "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let numbers = ["files", "directories", "others"].map(|name| shown[name].as_u64().unwrap());
    assert_eq!((numbers, &shown["shredded"]), ([5, 2, 1], &false.into()), "{shown:#}");
    assert!(shred(&["d", "elsewhere", "d/e", "--yes"]).status.success());
    volume.mount();
    let left: Vec<_> = tree(&volume.plain).into_keys().map(|path| path.to_string_lossy().into_owned()).collect();
    assert_eq!(left, ["dd", "other"]);
    volume.unmount();
    home.ok(&[&"check", &volume.cipher]);
}
