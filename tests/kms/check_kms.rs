//! `kmsfs check` of a volume under a KMS: one call for each data key, many at a time, and what it says when the KMS refuses.

use std::time::{Duration, Instant};

use crate::support::fault_proxy;
use crate::support::kms_mount::KmsVolume;
use crate::support::{Argument, flip};
use serde_json::Value;

const DECRYPT: &str = "Decrypt";

fn check(scene: &KmsVolume, arguments: &[Argument<'_>]) -> (i32, Value) {
    let all: Vec<Argument<'_>> =
        [&[&"check" as Argument<'_>, &"--json"], arguments, &[&scene.volume.cipher as Argument<'_>]].concat();
    let output = scene.volume.home.kmsfs(&all);
    (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

#[test]
fn keys_are_fetched_in_parallel_and_each_once() {
    const FILES: usize = 300;
    let latency = Duration::from_millis(100);
    let scene = KmsVolume::new(&[]);
    scene.files("f", FILES, 100);
    scene.volume.unmount();
    scene.server.set_latency(latency);
    let before = scene.server.calls(DECRYPT);
    let started = Instant::now();
    let (code, report) = check(&scene, &[]);
    let took = started.elapsed();
    assert_eq!((code, &report["clean"]), (0, &Value::Bool(true)), "{report:#}");
    assert_eq!(scene.server.calls(DECRYPT) - before, FILES as u64 + 1, "one for each file, and the volume key");
    println!("{FILES} keys at {latency:?} each: {took:?}");
    assert!(took < latency * u32::try_from(FILES).unwrap() / 3, "not one after the other: {took:?}");
}

#[test]
fn a_slow_rate_is_kept_and_costs_no_finding() {
    const FILES: usize = 40;
    let scene = KmsVolume::new(&[]);
    scene.files("f", FILES, 100);
    scene.volume.unmount();
    let started = Instant::now();
    // Those that come late wait longer than a call waits for its turn.
    let (code, report) = check(&scene, &[&"--kms-rate", &"5"]);
    assert_eq!(code, 0, "{report:#}");
    assert!(started.elapsed() > Duration::from_secs(6), "{:?}", started.elapsed());
}

#[test]
fn a_refusal_is_told_for_each_file_and_damage_counts_more() {
    let scene = KmsVolume::new(&[]);
    scene.files("f", 10, 10_000);
    let damaged = scene.volume.behind("f3");
    scene.volume.unmount();
    // The volume key is had, and then no other one.
    scene.proxy.inject(DECRYPT, 2.., fault_proxy::Fault::Exception(400, "AccessDeniedException"));
    let (code, report) = check(&scene, &[]);
    let findings = report["findings"].as_array().unwrap();
    assert_eq!((code, findings.len()), (6, 10), "{report:#}");
    assert!(findings.iter().all(|f| f["severity"] == "key" && f["plain"].as_str().unwrap().starts_with('f')));
    flip(&damaged, 40);
    scene.proxy.heal();
    scene.proxy.inject(DECRYPT, 2.., fault_proxy::Fault::Exception(400, "AccessDeniedException"));
    let (code, report) = check(&scene, &[]);
    assert_eq!(code, 13, "{report:#}");
    assert_eq!(check(&scene, &[&"--structure"]).0, 0, "without a key a flipped field is not seen, and no call is made");
}
