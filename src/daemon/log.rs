//! Logging: one line per event, to standard error or to a file, or an entry in the journal of systemd. What is not ours never logs below warning, so that no
//! library writes requests or answers into it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::level_filters::LevelFilter;
use tracing::subscriber::SetGlobalDefaultError;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt};

use super::journal::Journal;
pub use super::log_format::Format;
use super::log_format::Lines;

/// How much is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(LevelFilter);

impl Level {
    /// What failed.
    pub const ERROR: Self = Self(LevelFilter::ERROR);
    /// What must be looked at.
    pub const WARN: Self = Self(LevelFilter::WARN);
    /// What an operator wants to know.
    pub const INFO: Self = Self(LevelFilter::INFO);
    /// The names, from least to most.
    pub const NAMES: [&'static str; 5] = ["error", "warn", "info", "debug", "trace"];
}

impl FromStr for Level {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        if !Self::NAMES.contains(&name) {
            return Err(());
        }
        name.parse().map(Self).map_err(|_| ())
    }
}

/// Where the log goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard error.
    Stderr,
    /// A file that is appended to, made with mode 0600 if it is missing.
    File(PathBuf),
    /// Such a file, from when [`begin`] names it; what is logged before waits for that.
    Later,
    /// The journal of systemd.
    Journal,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file cannot be opened.
    #[error("the log file {path} cannot be opened: {error}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// There is no journal.
    #[error("the journal of systemd cannot be reached: {0}")]
    Journal(io::Error),
    /// There is a log already.
    #[error(transparent)]
    Twice(#[from] SetGlobalDefaultError),
}

/// How the crates of the AWS SDK are called. Their warnings repeat whole answers of servers, with the credentials in
/// them; what they mean is in our own errors.
const SHOWS_ANSWERS: &str = "aws_";

/// Sends every event of this process from now on to `target`. Without a `format` standard error gets text, but if it leads to
/// the journal, the journal gets entries with fields.
///
/// # Errors
/// [`LogError`].
pub fn init(level: Level, format: Option<Format>, target: &Target) -> Result<(), LogError> {
    let filter = Targets::new()
        .with_default(level.0.min(LevelFilter::WARN))
        .with_target("kmsfs", level.0)
        .with_target(SHOWS_ANSWERS, LevelFilter::OFF);
    let to_stderr = *target == Target::Stderr;
    let for_journal = to_stderr && stderr_is_journal();
    let journal = match format {
        _ if *target == Target::Journal => Some(Journal::connect().map_err(LogError::Journal)?),
        Some(Format::Journald) if to_stderr => Some(Journal::connect().map_err(LogError::Journal)?),
        // Who can be asked for nothing else still takes lines.
        None if for_journal => Journal::connect().ok(),
        _ => None,
    };
    if let Some(journal) = journal {
        let subscriber = tracing_subscriber::registry().with(filter).with(journal).with(ToTerminal);
        return Ok(tracing::subscriber::set_global_default(subscriber)?);
    }
    let lines = Lines { format: format.unwrap_or_default(), for_journal };
    let layer = tracing_subscriber::fmt::layer().event_format(lines);
    match target {
        Target::Stderr | Target::Journal => {
            let subscriber = tracing_subscriber::registry().with(filter).with(layer.with_writer(io::stderr));
            tracing::subscriber::set_global_default(subscriber)?;
        }
        Target::File(_) | Target::Later => {
            if let Target::File(path) = target {
                begin(path)?;
            }
            let layer = layer.with_writer(|| ToFile);
            let subscriber = tracing_subscriber::registry().with(filter).with(layer).with(ToTerminal);
            tracing::subscriber::set_global_default(subscriber)?;
        }
    }
    Ok(())
}

/// Writes the log to the file at `path` from now on, and first what was logged before.
///
/// # Errors
/// [`LogError`].
pub fn begin(path: &Path) -> Result<(), LogError> {
    let failed = |error| LogError::File { path: path.to_owned(), error };
    let mut file = open(path).map_err(failed)?;
    let mut place = place();
    if let Place::Memory(waiting) = &*place {
        file.write_all(waiting).map_err(failed)?;
    }
    *place = Place::File(file);
    Ok(())
}

/// Whether the terminal hears warnings too, as it should while somebody waits there for this process.
pub fn warn_terminal(does: bool) {
    WARNS_TERMINAL.store(does, Ordering::Relaxed);
}

static WARNS_TERMINAL: AtomicBool = AtomicBool::new(false);
static PLACE: Mutex<Place> = Mutex::new(Place::Memory(Vec::new()));
/// No more than this waits for a file.
const MAX_WAITING: usize = 1 << 20;

/// Where lines of the log go.
enum Place {
    Memory(Vec<u8>),
    File(File),
}

fn place() -> MutexGuard<'static, Place> {
    PLACE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct ToFile;

impl Write for ToFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *place() {
            Place::File(file) => return file.write(bytes),
            Place::Memory(waiting) if waiting.len() < MAX_WAITING => waiting.extend_from_slice(bytes),
            Place::Memory(_) => {}
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells a person of warnings.
struct ToTerminal;

impl<S: Subscriber> Layer<S> for ToTerminal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let is_ours = event.metadata().target().starts_with("kmsfs");
        if is_ours && *event.metadata().level() == tracing::Level::WARN && WARNS_TERMINAL.load(Ordering::Relaxed) {
            let message = super::log_format::message(event);
            // Whoever does not hear it finds it in the log.
            let _ = writeln!(io::stderr(), "kmsfs: warning: {message}");
        }
    }
}

/// Whether standard error is the stream to the journal that systemd has named in `JOURNAL_STREAM`.
#[must_use]
pub fn stderr_is_journal() -> bool {
    let named = std::env::var("JOURNAL_STREAM").ok();
    let found = rustix::fs::fstat(io::stderr()).ok();
    named.zip(found).is_some_and(|(named, found)| named == format!("{}:{}", found.st_dev, found.st_ino))
}

/// Sends the message of a panic to the log too: a process in the background has no standard error.
pub fn panics() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!("{panic}");
        before(panic);
    }));
}

/// Opens the log file, or makes it.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn levels_have_five_names() {
        for name in Level::NAMES {
            name.parse::<Level>().unwrap();
        }
        for bad in ["", "off", "INFO", "3", "warning"] {
            bad.parse::<Level>().unwrap_err();
        }
        assert!(Level::WARN < Level::INFO);
    }

    #[test]
    fn a_mistyped_directory_is_not_made() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(open(&home.path().join("new/volume.log")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!home.path().join("new").exists());
    }

    #[test]
    fn log_files_are_private_and_appended_to() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("volume.log");
        for line in ["one\n", "two\n"] {
            io::Write::write_all(&mut open(&path).unwrap(), line.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
