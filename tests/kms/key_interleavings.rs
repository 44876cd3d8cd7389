//! Programs that write, replace, rename and exchange beside `rekey`, `rewrap` and `recipients`, with kills of all of them.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::support::{Argument, Volume, bytes};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::Signal;

/// Seconds of it, and which one it is.
const SECONDS: &str = "KMSFS_INTERLEAVE_SECONDS";
const SEED: &str = "KMSFS_INTERLEAVE_SEED";
const PROGRAMS: usize = 3;
/// Files of one program.
const FILES: usize = 4;
/// Within a page, so that an overwrite is there or not.
const LEN: usize = 3000;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// What each file of a program may hold.
type May = Vec<Vec<Vec<u8>>>;

/// Works until something fails, or it is over. What was under way then may be there or not.
fn work(volume: &Volume, program: usize, random: &mut Random, may: &mut May, over: &AtomicBool, steps: &AtomicU64) {
    let path = |n: usize| volume.path(format!("{program}-{n}"));
    while !over.load(Ordering::Relaxed) {
        let [n, other] = [(); 2].map(|()| usize::try_from(random.below(FILES as u64)).unwrap());
        let new = bytes(random.below(1 << 40), LEN);
        let overwrites = random.below(3);
        let touched = if overwrites == 2 { vec![n, other] } else { vec![n] };
        let step = || -> io::Result<()> {
            match overwrites {
                0 => {
                    let file = File::options().write(true).open(path(n))?;
                    file.write_all_at(&new, 0)?;
                    file.sync_all()
                }
                1 => {
                    let temporary = volume.path(format!("{program}-new"));
                    let mut file = File::create(&temporary)?;
                    file.write_all(&new)?;
                    file.sync_all()?;
                    fs::rename(temporary, path(n))
                }
                _ => Ok(renameat_with(CWD, path(n), CWD, path(other), RenameFlags::EXCHANGE)?),
            }
        };
        let done = step();
        steps.fetch_add(1, Ordering::Relaxed);
        if overwrites == 2 {
            let both = [may[n].clone(), may[other].clone()];
            may.swap(n, other);
            if done.is_err() {
                touched.iter().for_each(|n| may[*n] = both.concat());
            }
        } else if done.is_ok() {
            may[n] = vec![new];
        } else {
            may[n].push(new);
        }
        if done.is_err() {
            return;
        }
    }
}

/// Changes keys, and breaks off now and then.
fn change_keys(volume: &Volume, random: &mut Random, over: &AtomicBool, runs: &AtomicU64) {
    while !over.load(Ordering::Relaxed) {
        let keyring = format!("local:{}", volume.home.path(format!("data/kmsfs/{}.toml", random.below(4))).display());
        let listed = volume.home.kmsfs(&[&"recipients", &"list", &volume.cipher, &"--json"]);
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap_or_default();
        let first = listed[0]["key"].as_str().unwrap_or_default().to_owned();
        let last = listed.as_array().and_then(|all| all.last()?["key"].as_str()).unwrap_or_default().to_owned();
        let command: &[Argument<'_>] = match random.below(6) {
            0 | 1 => &[&"rekey", &volume.cipher],
            2 | 3 => &[&"rewrap", &volume.cipher, &"--to", &keyring, &"--from", &first],
            4 => &[&"recipients", &"add", &volume.cipher, &keyring],
            _ => &[&"recipients", &"remove", &volume.cipher, &last],
        };
        let running = volume.home.start("change", command);
        if random.below(2) == 0 {
            std::thread::sleep(Duration::from_millis(random.below(120)));
            running.signal(if random.below(2) == 0 { Signal::INT } else { Signal::KILL });
        }
        running.status();
        runs.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn nothing_that_was_synced_is_lost_while_keys_change() {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (seconds, seed) = (number(SECONDS, 12), number(SEED, 1));
    let volume = Volume::new(&["--files-per-data-key", "3"]);
    let mut random = Random(seed);
    let mut may: Vec<May> = vec![vec![Vec::new(); FILES]; PROGRAMS];
    for (program, may) in may.iter_mut().enumerate() {
        for (n, may) in may.iter_mut().enumerate() {
            let content = bytes((program * FILES + n) as u64, LEN);
            fs::write(volume.path(format!("{program}-{n}")), &content).unwrap();
            may.push(content);
        }
    }
    volume.remount();
    let (steps, runs) = (AtomicU64::new(0), AtomicU64::new(0));
    let (end, mut round) = (Instant::now() + Duration::from_secs(seconds), 0);
    while Instant::now() < end {
        let over = AtomicBool::new(false);
        let mut seeds = std::iter::repeat_with(|| Random(random.below(1 << 31))).take(PROGRAMS + 1).collect::<Vec<_>>();
        let length = Duration::from_millis(300 + random.below(1500));
        let kill = random.below(3) > 0;
        let [for_keys, for_programs @ ..] = &mut seeds[..] else { unreachable!() };
        std::thread::scope(|scope| {
            for ((program, may), random) in may.iter_mut().enumerate().zip(for_programs) {
                let (volume, over, steps) = (&volume, &over, &steps);
                scope.spawn(move || work(volume, program, random, may, over, steps));
            }
            scope.spawn(|| change_keys(&volume, for_keys, &over, &runs));
            std::thread::sleep(length);
            if kill {
                volume.kill();
            }
            over.store(true, Ordering::Relaxed);
        });
        if kill {
            volume.mount();
        } else {
            volume.remount();
        }
        for (program, may) in may.iter_mut().enumerate() {
            for (n, may) in may.iter_mut().enumerate() {
                let found = fs::read(volume.path(format!("{program}-{n}")));
                let found = found.unwrap_or_else(|error| panic!("seed {seed}, round {round}: {program}-{n}: {error}"));
                assert!(may.contains(&found), "seed {seed}, round {round}: {program}-{n} holds what it may not");
                *may = vec![found];
            }
        }
        round += 1;
    }
    println!("{round} rounds, {} steps, {} changes of keys", steps.into_inner(), runs.into_inner());
    assert!(round > 0);
    volume.home.ok(&[&"rekey", &volume.cipher]);
    volume.unmount();
    volume.home.ok(&[&"check", &volume.cipher]);
}
