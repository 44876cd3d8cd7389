//! The same random operations of four users on a mount and on a plain directory of the same machine: results, errors, names,
//! content and attributes are compared after each step. Whatever differs is a difference that an application can see.
//!
//! `KMSFS_COMPARE_SECONDS` says for how long (default 15), `KMSFS_COMPARE_SEED` repeats a run.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use crate::differential::Twins;
use crate::support::{self, Volume, needs_root};

/// Processes at work at the same time, each in a directory of its own.
const WORKERS: u64 = 3;

fn seconds() -> u64 {
    std::env::var("KMSFS_COMPARE_SECONDS").map_or(15, |text| text.parse().unwrap())
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    std::env::var("KMSFS_COMPARE_SEED").map_or_else(|_| now.as_secs(), |text| text.parse().unwrap())
}

#[test]
fn a_mount_and_a_plain_directory_cannot_be_told_apart() {
    needs_root();
    let home = support::Home::new();
    let volume = Volume::in_home(home, &[], &["-o", "allow_other,suid,dev"]);
    let plain = tempfile::tempdir().unwrap();
    for directory in [&volume.home.path(""), &volume.plain, plain.path()] {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (seed, end) = (seed(), Instant::now() + Duration::from_secs(seconds()));
    println!("KMSFS_COMPARE_SEED={seed}");
    let [steps, successes] = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let mut twins = Twins::new(&volume.plain, plain.path(), seed.wrapping_add(worker));
                scope.spawn(move || {
                    while Instant::now() < end {
                        twins.step();
                    }
                    twins.compare_everything();
                    twins.counts()
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .fold([0, 0], |sum, one| [sum[0] + one[0], sum[1] + one[1]])
    });
    println!("{steps} operations without a difference, {successes} of which did something");
    assert!(steps > 100 && successes > steps / 8, "{steps} {successes}");
    support::eventually("nothing stays open", || volume.status()["files_open"] == 0);
    let before = support::tree(&volume.plain);
    volume.remount();
    support::assert_same("after a remount", &support::tree(&volume.plain), &before);
}
