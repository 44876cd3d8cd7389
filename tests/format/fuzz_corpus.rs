//! The bodies of the fuzz targets without a fuzzer: every input of `fuzz/corpus` again, and a short round of inputs that are made of
//! those at random. `scripts/fuzz` runs them for longer.
//!
//! `KMSFS_FUZZ_SEED` repeats a round, `KMSFS_FUZZ_SECONDS` sets how long it takes for each target.

// The fuzzer's crate has them as a library of its own.
#[allow(unreachable_pub, dead_code)]
#[allow(clippy::cast_possible_truncation)]
#[path = "../../fuzz/src/lib.rs"]
mod bodies;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bodies::{ALL, Body};

/// How long the round of each target takes, if the environment does not say, and the most inputs in it.
const ROUND: Duration = Duration::from_millis(600);
const MOST: usize = 20_000;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", directory.display());
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn every_input_of_the_corpus_holds() {
    let targets = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/fuzz_targets");
    let mut files: Vec<_> = fs::read_dir(targets).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let files: Vec<_> = files.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
    assert_eq!(files, ALL.map(|(name, _)| name), "a target is not in the list of bodies");
    for (target, body) in ALL {
        for (path, data) in corpus(target) {
            assert!(catch_unwind(|| body(&data)).is_ok(), "{target} breaks on {}", path.display());
        }
    }
}

#[test]
fn a_round_of_random_inputs_holds() {
    let seed = number_from("KMSFS_FUZZ_SEED").unwrap_or_else(|| u64::from_le_bytes(kmsfs::crypto::random_array()));
    let seconds = number_from("KMSFS_FUZZ_SECONDS");
    println!("KMSFS_FUZZ_SEED={seed}");
    for (target, body) in ALL {
        let inputs: Vec<_> = corpus(target).into_iter().map(|(_, data)| data).collect();
        let mut random = Random(seed);
        let begin = Instant::now();
        let mut tried = 0;
        let goes_on = |tried: usize| match seconds {
            Some(seconds) => begin.elapsed() < Duration::from_secs(seconds),
            None => tried < MOST && begin.elapsed() < ROUND,
        };
        while goes_on(tried) {
            run(target, body, &mutated(&inputs, &mut random), seed);
            tried += 1;
        }
        println!("{target}: {tried} inputs in {} ms", begin.elapsed().as_millis());
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// Runs a body; what it breaks on is kept.
fn run(target: &str, body: Body, data: &[u8], seed: u64) {
    if catch_unwind(AssertUnwindSafe(|| body(data))).is_err() {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{seed}"));
        fs::write(&kept, data).unwrap();
        panic!("KMSFS_FUZZ_SEED={seed}: {target} breaks on {}", kept.display());
    }
}

/// Numbers that a seed tells.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// One of the inputs with a few changes, or bytes of no origin.
fn mutated(inputs: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    if random.below(8) == 0 {
        let len = 1 << random.below(9);
        return (0..len).map(|_| random.byte()).collect();
    }
    let mut data = inputs[random.below(inputs.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(data.len());
        match random.below(7) {
            0 | 1 if !data.is_empty() => data[at] ^= 1 << random.below(8),
            2 if !data.is_empty() => data[at] = random.byte(),
            3 => data.truncate(at),
            4 => data.insert(at, random.byte()),
            5 if !data.is_empty() => {
                let end = (at + 1 + random.below(16)).min(data.len());
                data.drain(at..end);
            }
            _ => {
                let other = &inputs[random.below(inputs.len())];
                let from = random.below(other.len());
                data.truncate(at);
                data.extend_from_slice(&other[from..]);
            }
        }
    }
    data
}
