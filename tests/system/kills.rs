//! `kill -9` of the process behind a mount, at random moments under load: what was closed or synced is there after the next mount,
//! which takes the dead mount point away by itself.
//!
//! `KMSFS_KILLS` sets how often, `KMSFS_KILLS_SEED` when; a run prints both.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::{self, Volume, bytes, eventually, is_dead, walk};
use rustix::process::{Signal, kill_process};

/// Kills in a run, if the environment does not say.
const KILLS: u64 = 25;
const WRITERS: u64 = 4;
/// Bytes of a slot in the table, and slots.
const SLOT: usize = 1500;
const SLOTS: usize = 30;
/// So many whole files of a writer are kept; older ones are removed.
const KEPT: u64 = 8;

/// What one writer has done to its directory, as far as it was told so.
struct Writer {
    root: PathBuf,
    number: u64,
    /// Counts what it did, over all rounds.
    step: u64,
    random: u64,
    /// Whole files by name, and what was closed.
    whole: BTreeMap<String, u64>,
    /// Names that were removed.
    removed: BTreeSet<String>,
    /// Bytes of the log that were closed.
    logged: usize,
    /// The version in each slot of the table that was synced or closed.
    table: Vec<u64>,
    /// The version of the file that is replaced by renaming.
    swapped: u64,
    /// What the file that is cut holds.
    cut: Vec<u8>,
    /// What was begun last, and may have happened or not.
    begun: Begun,
    /// The process behind the mount is being killed: see [`close`].
    dying: Arc<AtomicBool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Begun {
    Nothing,
    Whole(String),
    Removal(String),
    Log(usize),
    Slot(usize, u64),
    Swap(u64),
    Cut(Vec<u8>),
}

impl Writer {
    fn new(root: PathBuf, number: u64, seed: u64, dying: &Arc<AtomicBool>) -> Self {
        fs::create_dir(&root).unwrap();
        File::create(root.join("log")).unwrap();
        fs::write(root.join("table"), vec![0; SLOT * SLOTS]).unwrap();
        fs::write(root.join("swapped"), bytes(0, 10_000)).unwrap();
        File::create(root.join("cut")).unwrap();
        Self {
            root,
            number,
            step: 0,
            random: seed.wrapping_add(number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            whole: BTreeMap::new(),
            removed: BTreeSet::new(),
            logged: 0,
            table: vec![0; SLOTS],
            swapped: 0,
            cut: Vec::new(),
            begun: Begun::Nothing,
            dying: Arc::clone(dying),
        }
    }

    fn below(&mut self, end: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % end as u64).unwrap()
    }

    /// Works until the mount is gone.
    fn work(&mut self) -> io::Error {
        loop {
            self.step += 1;
            if let Err(error) = self.work_once() {
                return error;
            }
            self.begun = Begun::Nothing;
        }
    }

    fn work_once(&mut self) -> io::Result<()> {
        let dying = Arc::clone(&self.dying);
        let at = |name: &str| self.root.join(name);
        let (log, table, swapped, fresh, cut) = (at("log"), at("table"), at("swapped"), at("fresh"), at("cut"));
        match self.below(6) {
            0 => self.write_whole(),
            1 => self.remove_old(),
            2 => {
                let len = 1 + self.below(6000);
                self.begun = Begun::Log(len);
                let lines = bytes(self.number, self.logged + len)[self.logged..].to_vec();
                close(&dying, OpenOptions::new().append(true).open(log)?, &lines, self.below(2) == 0)?;
                self.logged += len;
                Ok(())
            }
            3 => {
                let (slot, version) = (self.below(SLOTS), self.step);
                self.begun = Begun::Slot(slot, version);
                let file = OpenOptions::new().read(true).write(true).open(table)?;
                file.write_all_at(&bytes(version, SLOT), (slot * SLOT) as u64)?;
                close(&dying, file, b"", self.below(2) == 0)?;
                self.table[slot] = version;
                Ok(())
            }
            4 => {
                let version = self.step;
                self.begun = Begun::Swap(version);
                close(&dying, File::create(&fresh)?, &bytes(version, 10_000), self.below(2) == 0)?;
                fs::rename(fresh, swapped)?;
                self.swapped = version;
                Ok(())
            }
            _ => {
                let (size, filler) = (self.below(30_000), self.step.to_le_bytes()[0] | 1);
                let mut next = self.cut.clone();
                next.resize(size, filler);
                self.begun = Begun::Cut(next.clone());
                let file = OpenOptions::new().write(true).open(cut)?;
                if size < self.cut.len() {
                    file.set_len(size as u64)?;
                } else {
                    file.write_all_at(&next[self.cut.len()..], self.cut.len() as u64)?;
                }
                close(&dying, file, b"", self.below(2) == 0)?;
                self.cut = next;
                Ok(())
            }
        }
    }

    fn write_whole(&mut self) -> io::Result<()> {
        let step = self.step;
        let name = match step % 4 {
            0 => format!("{step}-{}", "long".repeat(55)),
            1 => format!("directory-{step}/file"),
            _ => format!("file-{step}"),
        };
        self.begun = Begun::Whole(name.clone());
        let path = self.root.join(&name);
        if let Some((directory, _)) = name.split_once('/') {
            fs::create_dir(self.root.join(directory))?;
        }
        let (len, dying) = (self.len_of(step), Arc::clone(&self.dying));
        close(&dying, File::create(path)?, &bytes(step, len), self.below(3) == 0)?;
        self.whole.insert(name, step);
        Ok(())
    }

    fn len_of(&self, step: u64) -> usize {
        usize::try_from((step * 7919 + self.number * 104_729) % 40_000).unwrap()
    }

    fn remove_old(&mut self) -> io::Result<()> {
        let old = self.whole.iter().find(|(_, step)| **step + KEPT * 6 < self.step).map(|(name, _)| name.clone());
        let Some(name) = old else { return Ok(()) };
        self.begun = Begun::Removal(name.clone());
        fs::remove_file(self.root.join(&name))?;
        if let Some((directory, _)) = name.split_once('/') {
            fs::remove_dir(self.root.join(directory))?;
        }
        self.whole.remove(&name);
        self.removed.insert(name);
        Ok(())
    }

    /// Holds what is there now against what was promised, and goes on from what is there.
    fn check(&mut self) {
        let begun = std::mem::replace(&mut self.begun, Begun::Nothing);
        for path in walk(&self.root).into_iter().filter(|path| path.is_file()) {
            fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        self.check_whole(&begun);
        self.check_table(&begun);
        let log = fs::read(self.root.join("log")).unwrap();
        let more = if let Begun::Log(more) = begun { more } else { 0 };
        let what = format!("{} bytes of a log, {} closed and {more} begun", log.len(), self.logged);
        assert!((self.logged..=self.logged + more).contains(&log.len()), "{what}");
        // Its size may be there before its last bytes are: the kernel sends both as it likes.
        assert!(log[..self.logged] == bytes(self.number, log.len())[..self.logged], "{what}");
        self.mend_log(&log);
        let swapped = fs::read(self.root.join("swapped")).unwrap();
        if swapped != bytes(self.swapped, 10_000) {
            let Begun::Swap(version) = begun else { panic!("a file that was renamed over is not what it was") };
            assert!(swapped == bytes(version, 10_000), "half a file was renamed over another");
            self.swapped = version;
        }
        let _ = fs::remove_file(self.root.join("fresh"));
        let cut = fs::read(self.root.join("cut")).unwrap();
        if cut != self.cut {
            let Begun::Cut(next) = &begun else { panic!("{} bytes, where {} were closed", cut.len(), self.cut.len()) };
            let kept = self.cut.len().min(next.len());
            assert!(cut.len() >= kept && cut[..kept] == next[..kept], "cut: {} bytes", cut.len());
            self.cut = cut;
        }
    }

    /// Brings the log back to where its writer believes it is.
    fn mend_log(&self, log: &[u8]) {
        if log.len() > self.logged {
            OpenOptions::new().write(true).open(self.root.join("log")).unwrap().set_len(self.logged as u64).unwrap();
        }
    }

    fn check_whole(&mut self, begun: &Begun) {
        let removal = if let Begun::Removal(name) = begun { Some(name) } else { None };
        for (name, step) in &self.whole {
            match fs::read(self.root.join(name)) {
                Ok(found) => assert!(found == bytes(*step, self.len_of(*step)), "{name} is not what was closed"),
                Err(error) => assert_eq!(Some(name), removal, "{error}"),
            }
        }
        for name in &self.removed {
            assert!(fs::symlink_metadata(self.root.join(name)).is_err(), "{name} was removed");
        }
        if let Some(name) = removal {
            let _ = fs::remove_file(self.root.join(name));
            let _ = name.split_once('/').map(|(directory, _)| fs::remove_dir(self.root.join(directory)));
            self.whole.remove(name);
        }
        if let Begun::Whole(name) = begun {
            let _ = fs::remove_file(self.root.join(name));
            let _ = name.split_once('/').map(|(directory, _)| fs::remove_dir(self.root.join(directory)));
        }
    }

    fn check_table(&mut self, begun: &Begun) {
        let table = fs::read(self.root.join("table")).unwrap();
        assert_eq!(table.len(), SLOT * SLOTS);
        for (slot, found) in table.chunks(SLOT).enumerate() {
            let content = |version| if version == 0 { vec![0; SLOT] } else { bytes(version, SLOT) };
            let closed = content(self.table[slot]);
            if found == closed {
                continue;
            }
            let Begun::Slot(begun, version) = begun else { panic!("slot {slot} is not what was closed") };
            assert_eq!(slot, *begun, "another slot than the one that was being written");
            let new = content(*version);
            let old_or_new =
                found.iter().zip(closed.iter().zip(&new)).all(|(byte, (old, new))| byte == old || byte == new);
            assert!(old_or_new, "slot {slot}");
            let file = OpenOptions::new().write(true).open(self.root.join("table")).unwrap();
            file.write_all_at(&closed, (slot * SLOT) as u64).unwrap();
        }
    }
}

/// Writes what is left, and closes or syncs: only what that returned for is promised. (`close` itself cannot fail in Rust, so the
/// file is flushed by closing a copy of its descriptor.)
///
/// Once the process is dead, the kernel drops what it cannot write, and `close` returns success; fsync does not. So a close
/// that returns while the process is being killed promises nothing.
fn close(dying: &AtomicBool, mut file: File, rest: &[u8], sync: bool) -> io::Result<()> {
    file.write_all(rest)?;
    if sync {
        return file.sync_all();
    }
    flush(&file)?;
    if dying.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(libc::ENOTCONN)) } else { Ok(()) }
}

/// What `close` does, with its result.
#[allow(unsafe_code)] // neither the standard library nor rustix tells what close returns
fn flush(file: &File) -> io::Result<()> {
    use std::os::fd::IntoRawFd;
    let copy = file.try_clone()?.into_raw_fd();
    // SAFETY: the descriptor is a copy that nobody else has.
    match unsafe { libc::close(copy) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn number_from(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

#[test]
fn what_was_closed_or_synced_survives_kill_9_at_any_moment() {
    let kills = number_from("KMSFS_KILLS").unwrap_or(KILLS);
    let seed = number_from("KMSFS_KILLS_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("KMSFS_KILLS={kills} KMSFS_KILLS_SEED={seed}");
    let volume = Volume::new(&[]);
    let dying = Arc::new(AtomicBool::new(false));
    let writer = |number: u64| Writer::new(volume.path(format!("writer-{number}")), number, seed, &dying);
    let mut writers: Vec<Writer> = (0..WRITERS).map(writer).collect();
    for kill in 0..kills {
        let pid = volume.pid();
        std::thread::scope(|scope| {
            let working: Vec<_> = writers.iter_mut().map(|writer| scope.spawn(|| writer.work())).collect();
            let wait = 30 + bytes(seed.wrapping_add(kill), 2).iter().map(|byte| u64::from(*byte)).sum::<u64>();
            std::thread::sleep(Duration::from_millis(wait));
            dying.store(true, Ordering::SeqCst);
            kill_process(pid, Signal::KILL).unwrap();
            for working in working {
                let error = working.join().unwrap();
                let gone = [libc::ENOTCONN, libc::ECONNABORTED, libc::EIO];
                assert!(error.raw_os_error().is_some_and(|errno| gone.contains(&errno)), "before the kill: {error}");
            }
        });
        eventually("the process is dead", || is_dead(pid));
        dying.store(false, Ordering::SeqCst);
        volume.mount();
        writers.iter_mut().for_each(Writer::check);
        if kill % 10 == 9 {
            volume.remount();
            writers.iter_mut().for_each(Writer::check);
        }
        if kill % 50 == 49 {
            println!("{} kills", kill + 1);
        }
    }
    let steps: u64 = writers.iter().map(|writer| writer.step).sum();
    println!("{kills} kills during {steps} steps of {WRITERS} writers: nothing lost");
}

/// The check would find it.
#[test]
fn the_check_finds_what_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let work = |number: u64| {
        let mut writer = Writer::new(directory.path().join(number.to_string()), number, 1, &Arc::default());
        for _ in 0..200 {
            writer.step += 1;
            writer.work_once().unwrap();
            writer.begun = Begun::Nothing;
        }
        writer.check();
        writer
    };
    let damage: [fn(&Path); 4] = [
        |root| OpenOptions::new().write(true).open(root.join("log")).unwrap().set_len(5).unwrap(),
        |root| support::flip(&root.join("table"), 3000),
        |root| support::flip(&root.join("swapped"), 1),
        |root| fs::write(root.join("cut"), "").unwrap(),
    ];
    for (number, damage) in (0..).zip(damage) {
        let mut writer = work(number);
        writer.cut = bytes(1, 10);
        fs::write(writer.root.join("cut"), &writer.cut).unwrap();
        writer.check();
        damage(&writer.root);
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| writer.check()));
        assert!(found.is_err(), "damage {number}");
    }
}
