//! `kmsfs rekey`: seals the files of a volume anew, each under a new data key.
//!
//! Where a mount has the volume, that mount does it, file by file as it is told, since programs use the files meanwhile.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::pins::Pins;
use crate::cli::progress::{self, Step};
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock::{self, Expected};
use crate::cli::writing;
use crate::cli::{passphrase, report};
use crate::daemon::control::Ask;
use crate::daemon::log::Level;
use crate::format::hex;
use crate::fs::{Filesystem, Options, Rekeyed, Run};
use crate::keys::{KeyLimits, Volume};
use crate::storage::CipherDirectory;
use crate::storage::cipher_directory::LockMode;

use super::estimate::Cost;
use super::header_files::HeaderFiles;
use super::key_hold::{self, Hold};
use super::rekey_notes::{FileId, Notes};
use super::status;
use super::tree_totals::weight;

/// How long a mount may take for one file.
const DEADLINE: Duration = Duration::from_secs(6 * 3600);
/// Failures that are told one by one.
const TOLD: u64 = 20;

/// Seal files anew, each under a new data key; for when a data key may have become known
///
/// Moving to another wrapping key does not need it: that is `kmsfs rewrap`. Every byte is read once and written twice; a
/// program that uses a file waits while that file is sealed. Inodes, names, times, holes and attributes stay. The volume
/// may be mounted on this host. An interrupted run is continued by the same command.
#[derive(Debug, Args)]
pub(crate) struct RekeyArgs {
    /// The directory that holds the ciphertext
    #[arg(value_name = "CIPHERDIR")]
    cipher_directory: PathBuf,
    /// Only this file or directory, by its plain path in the volume
    #[arg(value_name = "PATH")]
    path: Option<String>,
    /// Make so many calls of the key's provider a second at most; of a mount its own limit counts
    #[arg(long, value_name = "CALLS")]
    kms_rate: Option<NonZeroU32>,
    /// Seal so many files at a time at most
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: u8,
    /// Show the files, bytes, disk space, calls and dollars that it would take, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: SettingsArgs,
}

/// What `--dry-run` shows.
#[derive(Serialize)]
struct Plan {
    files: u64,
    /// Of those, what an interrupted run has done.
    files_done_before: u64,
    /// Read once and written twice.
    bytes: u64,
    /// Needed on the disk meanwhile: as many of the largest files as are sealed at a time.
    disk_space_needed: u64,
    disk_space_free: u64,
    /// Calls of a far provider: Decrypt and GenerateDataKey.
    calls: u64,
    dollars: f64,
}

/// What `--json` shows at the end.
#[derive(Serialize)]
struct Report {
    files: u64,
    bytes: u64,
    failed: u64,
    files_done_before: u64,
}

/// What a mount answers about one file.
#[derive(Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) bytes: Option<u64>,
    /// The id of the file that was there, in hexadecimal.
    pub(super) file: Option<String>,
    pub(super) error: Option<String>,
    /// The file is gone.
    pub(super) gone: bool,
}

impl Answer {
    /// Has the filesystem seal the file.
    pub(super) fn of(filesystem: &Filesystem, path: &str, run: Option<Run>) -> Self {
        let nothing = Self { bytes: None, file: None, error: None, gone: false };
        match filesystem.rekey(path, run) {
            Ok(Rekeyed::Done { bytes, file_id }) => {
                Self { bytes: Some(bytes), file: Some(hex::encode(&file_id)), ..nothing }
            }
            Ok(Rekeyed::NothingToDo) => nothing,
            Err(crate::fs::Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                Self { gone: true, ..nothing }
            }
            Err(error) => Self { error: Some(error.to_string()), ..nothing },
        }
    }
}

/// Has one file sealed anew, here or by a mount.
type Seal<'a> = &'a (dyn Fn(&str) -> Result<Answer, CliError> + Sync);

struct File {
    path: String,
    id: FileId,
    len: u64,
}

/// Passes that look for files that were moved meanwhile, and the wait before each.
const PASSES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(200);

/// Does it.
pub(crate) fn run(args: &RekeyArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let directory = CipherDirectory::open(&args.cipher_directory)?;
    let mut hold = Hold::take(&directory, LockMode::Shared)?;
    let failed = |error| CliError::io(".kmsfs/rekey", &error);
    let _alone = directory.redo_logs().and_then(|logs| logs.lock_run()).map_err(failed)?.ok_or_else(|| {
        CliError::new(Exit::Locked, "another `kmsfs rekey` is at work on the volume: wait until it is done")
    })?;
    let volume = unlock(&directory, args, &settings, &environment)?;
    hold.unlocked(writing::seal(&volume))?;
    let mut notes = Notes::load(&environment, &volume.config.volume_id)?;
    if args.dry_run {
        let (files, _) = find(&directory, &volume, args.path.as_deref())?;
        let before = files.iter().filter(|file| notes.has(&file.id)).count() as u64;
        return report::print(&plan(&directory, &volume, &files, before, args.parallel)?, args.json);
    }
    notes.begin()?;
    let (mut work, run) = (Work::new(&notes), Some(notes.run));
    let start = args.path.as_deref();
    let (mut files_done_before, mut whole) = (None, true);
    let mut pass = |(found, unreadable): (Vec<File>, u64), seal: Seal<'_>| {
        files_done_before.get_or_insert(found.iter().filter(|file| notes.has(&file.id)).count() as u64);
        work.unreadable = unreadable;
        work.run(found, seal, args.parallel)
    };
    if hold.is_mounted() {
        let through = |path: &str| through_mount(&directory, path, run);
        for n in 0..PASSES {
            if n > 0 {
                std::thread::sleep(PAUSE);
            }
            let begin = hold.moves(&directory);
            let found = find(&directory, &volume, start)?;
            let walked = hold.moves(&directory);
            let end = if pass(found, &through) { hold.moves(&directory) } else { walked };
            // A walk that finds every file at its place has missed none.
            whole = begin.is_some() && begin == end;
            if whole {
                break;
            }
        }
    } else {
        let found = find(&directory, &volume, start)?;
        let options = Options { prefetch: false, ..Options::default() };
        let own = CipherDirectory::open(directory.path())?;
        let filesystem = Filesystem::open_held(own, volume, options, hold.hand_over())
            .map_err(|error| CliError::new(Exit::Other, error))?;
        pass(found, &|path: &str| Ok(Answer::of(&filesystem, path, run)));
        filesystem.shutdown().map_err(|error| CliError::new(Exit::Io, error))?;
    }
    work.verdict(files_done_before.unwrap_or(0), whole, args.json)
}

fn unlock(
    directory: &CipherDirectory,
    args: &RekeyArgs,
    settings: &Settings,
    environment: &Environment,
) -> Result<Volume, CliError> {
    let sealed = unlock::read_config(directory)?;
    let secret = passphrase::for_volume(settings, environment, Some(&sealed.config))?;
    let providers = settings.for_providers(secret.map(passphrase::for_provider));
    let limits = KeyLimits { calls_per_second: args.kms_rate, ..KeyLimits::default() };
    let pins = Pins::of(environment);
    unlock::unlock(directory.path(), &sealed, &Expected::default(), pins.as_ref(), &providers, limits)
}

/// All files with a header at or below `path`; and how many headers cannot be read, which is told.
fn find(directory: &CipherDirectory, volume: &Volume, path: Option<&str>) -> Result<(Vec<File>, u64), CliError> {
    let tree = HeaderFiles::of(directory)?;
    let start = path.map(|path| tree.cipher_path(volume, path)).transpose()?.unwrap_or_default();
    let (mut files, mut unreadable) = (Vec::new(), 0);
    tree.walk_with_sizes(&start, |path, len, page| {
        let header = page.map_err(|error| error.to_string()).and_then(|page| {
            let header = page.map(|page| volume.ring.authenticate(&page)).transpose();
            header.map(Option::flatten).map_err(|error| error.to_string())
        });
        match header {
            Ok(Some(header)) => files.push(File { path: path.to_owned(), id: header.header().file_id, len }),
            Ok(None) => {}
            Err(why) => {
                report::tell(&format!("{path}: {why}"));
                unreadable += 1;
            }
        }
    });
    Ok((files, unreadable))
}

fn plan(
    directory: &CipherDirectory,
    volume: &Volume,
    files: &[File],
    before: u64,
    parallel: u8,
) -> Result<Plan, CliError> {
    let mut lengths: Vec<u64> = files.iter().map(|file| file.len).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    let free = rustix::fs::fstatvfs(directory.root_fd());
    let free = free.map_err(|error| CliError::io(directory.path().display(), &error.into()))?;
    let left = files.len() as u64 - before;
    let keys = left.div_ceil(volume.config.files_per_data_key.into());
    let calls = if volume.ring.is_remote() { left + keys } else { 0 };
    Ok(Plan {
        files: files.len() as u64,
        files_done_before: before,
        bytes: lengths.iter().sum(),
        disk_space_needed: lengths.iter().take(parallel.into()).sum(),
        disk_space_free: free.f_bavail.saturating_mul(free.f_frsize),
        calls,
        dollars: Cost::of(calls, 1).dollars,
    })
}

fn through_mount(directory: &CipherDirectory, path: &str, run: Option<Run>) -> Result<Answer, CliError> {
    let place = key_hold::served(directory.path()).into_iter().next().ok_or_else(|| {
        CliError::new(Exit::NotMounted, "the volume was unmounted meanwhile").hint("run the command again")
    })?;
    let ask = Ask::Rekey { path: path.to_owned(), run: run.map(|run| hex::encode(&run)) };
    let answer = status::connect(&place).and_then(|client| client.tell(ask, DEADLINE));
    let answer = answer.map_err(|error| status::failure(&place, &error))?;
    serde_json::from_str(&answer).map_err(|_| {
        let what = format_args!("the mount at {} does not know how: it is of another version", place.display());
        CliError::new(Exit::Other, what).hint("unmount it and mount it again")
    })
}

struct Work<'a> {
    notes: &'a Notes,
    sealed: AtomicU64,
    bytes: AtomicU64,
    /// Headers that could not be read when they were last looked at.
    unreadable: u64,
    failed: Mutex<HashSet<FileId>>,
    first: Mutex<Option<CliError>>,
    /// Nobody was there to seal.
    interrupted: AtomicBool,
}

impl<'a> Work<'a> {
    fn new(notes: &'a Notes) -> Self {
        Self {
            notes,
            sealed: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            unreadable: 0,
            failed: Mutex::default(),
            first: Mutex::default(),
            interrupted: AtomicBool::new(false),
        }
    }

    /// Has those of `files` sealed anew that were not yet; returns whether there were any.
    fn run(&self, mut files: Vec<File>, seal: Seal<'_>, parallel: u8) -> bool {
        files.retain(|file| !self.notes.has(&file.id) && !locked(&self.failed).contains(&file.id));
        let total: u64 = files.iter().map(|file| weight(1, file.len)).sum();
        // Files that are dealt with, and what they weigh.
        let (passed, done) = (AtomicUsize::new(0), AtomicU64::new(0));
        let step = || {
            let text = report::part(passed.load(Ordering::SeqCst) as u64, files.len() as u64, "file");
            Step { text, of: Some((done.load(Ordering::SeqCst), total)) }
        };
        let next = AtomicUsize::new(0);
        progress::show_while(step, || {
            std::thread::scope(|scope| {
                for _ in 0..parallel {
                    scope.spawn(|| {
                        while let Some(file) = files.get(next.fetch_add(1, Ordering::SeqCst)) {
                            self.seal(file, seal);
                            passed.fetch_add(1, Ordering::SeqCst);
                            done.fetch_add(weight(1, file.len), Ordering::SeqCst);
                        }
                    });
                }
            });
        });
        !files.is_empty()
    }

    fn seal(&self, file: &File, seal: Seal<'_>) {
        match seal(&file.path) {
            Ok(Answer { error: Some(why), .. }) => self.fail(file, CliError::new(Exit::Other, why)),
            Ok(Answer { bytes: Some(bytes), file: Some(id), .. }) => {
                // A program may have put another file there.
                if let Some(id) = hex::decode(&id)
                    && self.notes.note(id)
                {
                    self.bytes.fetch_add(bytes, Ordering::SeqCst);
                    self.sealed.fetch_add(1, Ordering::SeqCst);
                }
            }
            Ok(_) => {}
            Err(error) => {
                self.interrupted.store(true, Ordering::SeqCst);
                self.fail(file, error);
            }
        }
    }

    fn fail(&self, file: &File, error: CliError) {
        let mut failed = locked(&self.failed);
        failed.insert(file.id);
        if failed.len() as u64 <= TOLD {
            report::tell(&format!("{}: {error}", file.path));
        }
        locked(&self.first).get_or_insert(error);
    }

    /// What came of it all. A run that was not interrupted is over, whatever failed.
    fn verdict(self, files_done_before: u64, whole: bool, json: bool) -> Result<(), CliError> {
        let interrupted = self.interrupted.load(Ordering::SeqCst);
        if !interrupted && whole {
            self.notes.forget()?;
        }
        let (files, bytes) = (self.sealed.load(Ordering::SeqCst), self.bytes.load(Ordering::SeqCst));
        let failed = locked(&self.failed).len() as u64 + self.unreadable;
        if json {
            report::print(&Report { files, bytes, failed, files_done_before }, true)?;
        }
        if failed > 0 {
            let first = self.first.into_inner().unwrap_or_else(PoisonError::into_inner);
            let why = first.map_or_else(|| "a header cannot be read".to_owned(), |error| error.to_string());
            let what = format!("{} done, {failed} not; the first: {why}", report::counted(files, "file"));
            let hint = if interrupted { "the same command goes on from here" } else { "the same command begins anew" };
            return Err(CliError::new(Exit::Other, what).hint(hint));
        }
        if !whole {
            let what = "programs of the mount move files all the time, so that one may have been missed";
            return Err(
                CliError::new(Exit::Other, what).hint("run the command again when they pause: it goes on from here")
            );
        }
        let before = if files_done_before > 0 { format!(", {files_done_before} before") } else { String::new() };
        let (files, size) = (report::counted(files, "file"), progress::size_text(bytes));
        progress::conclude(&format!("{files} sealed anew{before}, {size}"), json);
        Ok(())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
