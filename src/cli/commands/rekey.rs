//! `kmsfs rekey`: seals the files of a volume anew, each under a new data key.
//!
//! Where a mount has the volume, that mount does it, file by file as it is told, since programs use the files meanwhile.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::cli::environment::Environment;
use crate::cli::error::{CliError, Exit};
use crate::cli::pins::Pins;
use crate::cli::settings::{self, Settings, SettingsArgs};
use crate::cli::unlock::{self, Expected};
use crate::cli::{passphrase, progress, report};
use crate::daemon::control::Ask;
use crate::daemon::log::Level;
use crate::fs::{Filesystem, Options, Rekeyed};
use crate::keys::{KeyLimits, Volume};
use crate::storage::{CipherDirectory, RedoLogs};

use super::estimate::Cost;
use super::header_files::HeaderFiles;
use super::key_hold::{self, Hold};
use super::status;

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
    pub(super) error: Option<String>,
    /// The file is gone.
    pub(super) gone: bool,
}

impl Answer {
    /// Has the filesystem seal the file.
    pub(super) fn of(filesystem: &Filesystem, path: &str) -> Self {
        match filesystem.rekey(path) {
            Ok(Rekeyed::Done(bytes)) => Self { bytes: Some(bytes), error: None, gone: false },
            Ok(Rekeyed::NothingToDo) => Self { bytes: None, error: None, gone: false },
            Err(crate::fs::Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
                Self { bytes: None, error: None, gone: true }
            }
            Err(error) => Self { bytes: None, error: Some(error.to_string()), gone: false },
        }
    }
}

/// Has one file sealed anew, here or by a mount.
type Seal<'a> = Box<dyn Fn(&str) -> Result<Answer, CliError> + Sync + 'a>;

struct File {
    path: String,
    id: [u8; 32],
    len: u64,
}

/// Does it.
pub(crate) fn run(args: &RekeyArgs) -> Result<(), CliError> {
    let environment = Environment::of_process();
    let settings = Settings::load(&args.settings, &environment)?;
    settings::log_to_stderr(&settings, Level::WARN)?;
    let directory = CipherDirectory::open(&args.cipher_directory)?;
    let hold = Hold::take(&directory)?;
    let volume = unlock(&directory, args, &settings, &environment)?;
    let logs = directory.redo_logs().map_err(|error| CliError::io(".kmsfs/rekey", &error))?;
    let done = logs.done().map_err(|error| CliError::io(".kmsfs/rekey", &error))?;
    let (files, unreadable) = find(&directory, &volume, args.path.as_deref())?;
    let before = files.iter().filter(|file| done.contains(&file.id)).count() as u64;
    if args.dry_run {
        return report::print(&plan(&directory, &volume, &files, before, args.parallel)?, args.json);
    }
    let mut offline = None;
    let seal: Seal<'_> = if hold.is_mounted() {
        let directory = &directory;
        Box::new(move |path| through_mount(directory, path))
    } else {
        let options = Options { prefetch: false, ..Options::default() };
        let filesystem = Filesystem::open(CipherDirectory::open(directory.path())?, volume, options)
            .map_err(|error| CliError::new(Exit::Other, error))?;
        offline = Some(Arc::clone(&filesystem));
        Box::new(move |path| Ok(Answer::of(&filesystem, path)))
    };
    let work = Work {
        files: files.into_iter().filter(|file| !done.contains(&file.id)).collect(),
        next: AtomicUsize::new(0),
        sealed: AtomicU64::new(0),
        bytes: AtomicU64::new(0),
        failed: AtomicU64::new(unreadable),
        first: Mutex::default(),
        logs: &logs,
        seal,
    };
    work.run(args.parallel);
    if let Some(filesystem) = offline {
        filesystem.shutdown();
    }
    let failed = work.failed.load(Ordering::SeqCst);
    let sealed = work.sealed.load(Ordering::SeqCst);
    if failed == 0 {
        logs.forget_done().map_err(|error| CliError::io(".kmsfs/rekey", &error))?;
    }
    let bytes = work.bytes.load(Ordering::SeqCst);
    if args.json {
        report::print(&Report { files: sealed, bytes, failed, files_done_before: before }, true)?;
    }
    if failed == 0 {
        return Ok(());
    }
    let first = work.first.into_inner().unwrap_or_else(PoisonError::into_inner);
    let why = first.map_or_else(|| "a header cannot be read".to_owned(), |error| error.to_string());
    let what = format!("{sealed} files are done and {failed} are not; the first: {why}");
    Err(CliError::new(Exit::Other, what).hint("the same command goes on from here"))
}

fn unlock(
    directory: &CipherDirectory,
    args: &RekeyArgs,
    settings: &Settings,
    environment: &Environment,
) -> Result<Volume, CliError> {
    let sealed = unlock::read_config(directory)?;
    let secret = settings.passphrase.as_ref().map(|source| source.read(environment, false)).transpose()?;
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

fn through_mount(directory: &CipherDirectory, path: &str) -> Result<Answer, CliError> {
    let place = key_hold::served(directory.path()).into_iter().next().ok_or_else(|| {
        CliError::new(Exit::NotMounted, "the volume was unmounted meanwhile").hint("run the command again")
    })?;
    let answer = status::connect(&place).and_then(|client| client.tell(Ask::Rekey(path.to_owned()), DEADLINE));
    let answer = answer.map_err(|error| status::failure(&place, &error))?;
    serde_json::from_str(&answer).map_err(|_| {
        let what = format_args!("the mount at {} does not know how: it is of another version", place.display());
        CliError::new(Exit::Other, what).hint("unmount it and mount it again")
    })
}

struct Work<'a> {
    files: Vec<File>,
    next: AtomicUsize,
    sealed: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
    first: Mutex<Option<CliError>>,
    logs: &'a RedoLogs,
    seal: Seal<'a>,
}

impl Work<'_> {
    fn run(&self, parallel: u8) {
        let total: u64 = self.files.iter().map(|file| file.len).sum();
        let line = |seconds: u64| {
            let (sealed, bytes) = (self.sealed.load(Ordering::SeqCst), self.bytes.load(Ordering::SeqCst));
            let left = (bytes > 0).then(|| (total.saturating_sub(bytes)).saturating_mul(seconds) / bytes);
            let left = left.map_or_else(String::new, |left| format!(", about {left} s left"));
            format!("{sealed} of {} files, {} of {} MiB{left}      ", self.files.len(), bytes >> 20, total >> 20)
        };
        progress::show_while(line, || {
            std::thread::scope(|scope| {
                for _ in 0..parallel {
                    scope.spawn(|| self.work());
                }
            });
        });
    }

    fn work(&self) {
        while let Some(file) = self.files.get(self.next.fetch_add(1, Ordering::SeqCst)) {
            match (self.seal)(&file.path) {
                Ok(Answer { error: None, bytes, .. }) => {
                    // Without the note the file is sealed again when the command is, which does no harm.
                    let _ = self.logs.note_done(&file.id);
                    self.bytes.fetch_add(bytes.unwrap_or(0), Ordering::SeqCst);
                    self.sealed.fetch_add(u64::from(bytes.is_some()), Ordering::SeqCst);
                }
                Ok(Answer { error: Some(why), .. }) => self.fail(&file.path, CliError::new(Exit::Other, why)),
                Err(error) => self.fail(&file.path, error),
            }
        }
    }

    fn fail(&self, path: &str, error: CliError) {
        if self.failed.fetch_add(1, Ordering::SeqCst) < TOLD {
            report::tell(&format!("{path}: {error}"));
        }
        self.first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }
}
