//! Real mounts when very many files are opened at once: with a KMS that throttles, no stampede and no starvation; with one
//! that never answers, files whose keys are in memory do not notice.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::support::eventually;
use crate::support::fault_proxy::Fault;
use crate::support::kms_mount::{KmsVolume, LONGEST_OPEN, Opened, median, open_all};
use rustix::fs::{Advice, fadvise};

const DECRYPT: &str = "Decrypt";
/// Distinct cold opens, unless [`WHOLE`] is set.
const SOME: usize = 1000;
/// The variable that makes the storm as large as it is specified.
const WHOLE: &str = "KMSFS_TEST_WHOLE";

#[test]
fn two_hundred_openers_of_one_file_make_one_call() {
    let scene = KmsVolume::new(&["--no-prefetch"]);
    let file = scene.files("f", 1, 100).remove(0);
    scene.make_cold();
    scene.server.set_latency(Duration::from_millis(300));
    let before = scene.server.calls(DECRYPT);
    let opened = open_all(&vec![file; 200], 200);
    assert!(opened.iter().all(|opened| opened.result.is_ok()), "{opened:?}");
    assert_eq!(scene.server.calls(DECRYPT) - before, 1);
}

#[test]
fn a_storm_of_cold_opens_at_a_kms_with_a_limit() {
    const RATE: u32 = 100;
    const OPENERS: usize = 64;
    let count = if std::env::var_os(WHOLE).is_some() { 5000 } else { SOME };
    if count == SOME {
        println!("left out: {} of 5000 opens; {WHOLE}=1 makes them all", 5000 - SOME);
    }
    let scene = KmsVolume::new(&["--no-prefetch"]);
    let mut cold = scene.files("f", count + 1, 100);
    let warm = cold.pop().unwrap();
    scene.make_cold();
    drop(File::open(&warm).unwrap());
    scene.server.set_rate(Some(RATE));
    let (before, throttled) = (scene.server.calls(DECRYPT), scene.server.failures("ThrottlingException"));
    let (started, over) = (Instant::now(), AtomicBool::new(false));
    let mut failed = 0;
    let mut took = Vec::new();
    let mut rounds = 0;
    let mut warm_took = Vec::new();
    let mut waiting = 0;
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| {
            let (mut warm_took, mut waiting) = (Vec::new(), 0);
            while !over.load(Ordering::Relaxed) {
                let asked = Instant::now();
                drop(File::open(&warm).unwrap());
                warm_took.push(asked.elapsed());
                waiting = waiting.max(scene.status("operations_waiting"));
                std::thread::sleep(Duration::from_millis(50));
            }
            (warm_took, waiting)
        });
        let mut missing = cold;
        while !missing.is_empty() && rounds < 20 {
            rounds += 1;
            let opened = open_all(&missing, OPENERS);
            let mut again = Vec::new();
            for (path, opened) in missing.into_iter().zip(opened) {
                took.push(opened.took);
                if let Err(error) = opened.result {
                    assert_eq!(error.raw_os_error(), Some(libc::ETIMEDOUT), "{error}");
                    again.push(path);
                }
            }
            failed += again.len();
            missing = again;
        }
        over.store(true, Ordering::Relaxed);
        assert!(missing.is_empty(), "{} files never opened", missing.len());
        (warm_took, waiting) = watching.join().unwrap();
    });
    let elapsed = started.elapsed();
    let calls = scene.server.calls(DECRYPT) - before;
    let throttled = scene.server.failures("ThrottlingException") - throttled;
    let (longest, middle) = (took.iter().max().copied().unwrap(), median(took.clone()));
    let warm_longest = warm_took.iter().max().copied().unwrap();
    println!(
        "{count} opens by {OPENERS} threads at {RATE} calls/s: {:.1} s, {failed} failed in {rounds} rounds, {calls} calls, \
         {throttled} throttled; an open took {middle:?} (median), {longest:?} (longest); of a file with its key in memory \
         {:?}, {warm_longest:?}; at most {waiting} operations waited",
        elapsed.as_secs_f64(),
        median(warm_took),
    );
    assert!(calls <= count as u64 * 3 / 2, "a stampede");
    assert!(longest < LONGEST_OPEN, "somebody starves");
    assert!(waiting <= OPENERS as u64 + 1, "the queue has no end");
    assert!(warm_longest < Duration::from_secs(2), "a cached file waits");
}

/// How often the undisturbed and the disturbed mount take turns.
const ROUNDS: usize = 3;
/// How long each is measured.
const ROUND: Duration = Duration::from_secs(1);
/// The share of the undisturbed throughput that must be left on a machine that may be busy with other tests; `scripts/bench
/// kms` prints the exact one.
const LEAST_SHARE: f64 = 0.5;

#[test]
fn files_whose_keys_are_in_memory_do_not_notice_a_kms_that_hangs() {
    const WAITING: usize = 1000;
    let scene = KmsVolume::new(&["--no-prefetch"]);
    let cold = scene.files("cold", WAITING, 100);
    let warm = scene.files("warm", 2, 4 << 20);
    scene.make_cold();
    let warm: Vec<_> = warm.iter().map(|path| File::options().read(true).write(true).open(path).unwrap()).collect();
    let (mut calm, mut stormy) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 0..ROUNDS {
        scene.proxy.heal();
        measure(&warm, &mut calm);
        scene.proxy.inject(DECRYPT, .., Fault::Stall);
        let opened = std::thread::scope(|scope| {
            let storm = scope.spawn(|| open_all(&cold, WAITING));
            eventually("all wait", || scene.status("operations_waiting") >= WAITING as u64 * 9 / 10);
            measure(&warm, &mut stormy);
            assert!(scene.status("operations_waiting") >= WAITING as u64 / 2, "they no longer waited: {round}");
            storm.join().unwrap()
        });
        for Opened { result, took } in &opened {
            let errno = result.as_ref().err().and_then(std::io::Error::raw_os_error);
            assert_eq!(errno, Some(libc::ETIMEDOUT));
            assert!(*took < LONGEST_OPEN, "an open took {took:?}");
        }
        // What was refused a moment ago is refused again without a call.
        scene.proxy.heal();
        scene.make_cold();
        warm.iter().for_each(|file| assert_eq!(file.read_at(&mut [0], 0).unwrap(), 1));
    }
    for (name, calm, stormy) in [("reads", &calm[0], &stormy[0]), ("writes", &calm[1], &stormy[1])] {
        let [calm, stormy] = [calm, stormy].map(|rates| {
            let mut rates = rates.clone();
            rates.sort_by(f64::total_cmp);
            rates[rates.len() / 2]
        });
        let share = stormy / calm;
        println!("{name}: {calm:.1} MiB/s, with {WAITING} opens waiting {stormy:.1} MiB/s: {:.0} %", share * 100.0);
        assert!(share >= LEAST_SHARE, "{name} are slowed down by opens that wait");
    }
}

/// Reads the first file past the kernel's cache, and writes the second; adds MiB a second to `rates`.
fn measure(files: &[File], rates: &mut [Vec<f64>; 2]) {
    let mut buffer = vec![0; 1 << 20];
    for (writes, rates) in rates.iter_mut().enumerate() {
        let (started, mut done) = (Instant::now(), 0.0);
        let file = &files[writes];
        while started.elapsed() < ROUND {
            for place in 0..4 {
                match writes {
                    0 => file.read_exact_at(&mut buffer, place << 20).unwrap(),
                    _ => file.write_all_at(&buffer, place << 20).unwrap(),
                }
                done += 1.0;
            }
            match writes {
                0 => fadvise(file, 0, None, Advice::DontNeed).unwrap(),
                _ => file.sync_data().unwrap(),
            }
        }
        rates.push(done / started.elapsed().as_secs_f64());
    }
}
