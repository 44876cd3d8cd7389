//! `kmsfs export` and `import` under a KMS: many calls at a time, each data key once, and what happens when it refuses or is slow.

use std::fs;
use std::time::{Duration, Instant};

use crate::support::fault_proxy;
use crate::support::kms_mount::{KmsVolume, content};

const DECRYPT: &str = "Decrypt";

#[test]
fn keys_are_fetched_and_made_in_parallel_and_each_once() {
    const FILES: usize = 200;
    let latency = Duration::from_millis(100);
    let scene = KmsVolume::new(&[]);
    scene.files("f", FILES, 100);
    scene.volume.unmount();
    scene.server.set_latency(latency);
    let (home, cipher, out) = (&scene.volume.home, &scene.volume.cipher, scene.volume.home.path("out"));
    let before = scene.server.calls(DECRYPT);
    let began = Instant::now();
    home.ok(&[&"export", cipher, &out]);
    let (exported, calls) = (began.elapsed(), scene.server.calls(DECRYPT) - before);
    assert_eq!(calls, FILES as u64 + 1, "one for each file, and the volume key");
    let began = Instant::now();
    home.ok(&[&"import", &out, cipher, &"again"]);
    let imported = began.elapsed();
    println!("{FILES} files at {latency:?} for each key: out in {exported:?}, in in {imported:?}");
    let one_by_one = latency * u32::try_from(FILES).unwrap();
    assert!(
        exported < one_by_one / 3 && imported < one_by_one / 3,
        "not one after the other: {exported:?}, {imported:?}"
    );
    home.ok(&[&"export", &"--verify", cipher, &"again", &home.path("again")]);
    assert_eq!(fs::read(home.path("again/f7")).unwrap(), content(7, 100));
}

#[test]
fn a_slow_rate_fails_nothing() {
    const FILES: usize = 100;
    let scene = KmsVolume::new(&[]);
    scene.files("f", FILES, 100);
    scene.volume.unmount();
    let began = Instant::now();
    // Those that come last wait longer than a call waits for its turn.
    scene.volume.home.ok(&[&"export", &"--kms-rate", &"5", &scene.volume.cipher, &scene.volume.home.path("out")]);
    assert!(began.elapsed() > Duration::from_secs(15), "{:?}", began.elapsed());
}

#[test]
fn a_provider_that_refuses_is_not_asked_for_every_file() {
    let scene = KmsVolume::new(&[]);
    scene.files("f", 600, 100);
    scene.volume.unmount();
    let (home, cipher, out) = (&scene.volume.home, &scene.volume.cipher, scene.volume.home.path("out"));
    let before = scene.proxy.calls(DECRYPT);
    // The volume key is had, and then no other one.
    scene.proxy.inject(DECRYPT, 2.., fault_proxy::Fault::Exception(400, "AccessDeniedException"));
    let said = home.refused(6, &[&"export", cipher, &out]);
    assert!(said.contains("64 files in a row had no key"), "{said}");
    // Those refused in a row, those under way, and those that were fetched ahead until it was clear: 96 at a time.
    let calls = scene.proxy.calls(DECRYPT) - before;
    assert!(calls < 250, "{calls} calls");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
    scene.proxy.heal();
    home.ok(&[&"export", cipher, &out]);
    assert_eq!(fs::read(out.join("f7")).unwrap(), content(7, 100));
}
